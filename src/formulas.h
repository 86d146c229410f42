/* The losses. Every softmax loss is sum_c a_c phi(u_c), u = log_softmax(x): the target decides the coefficients a, the loss
 * decides phi. A divergence from a teacher is the same with a = 1 and a phi that knows the teacher's log-probability, too. A
 * loss of single elements is a function of x and y. This file has all these functions with their derivatives, and what
 * follows from them for a row. It has no loops over classes; the schedules in cpu/ have those, and no mathematics of losses.
 */
#ifndef XCE_FORMULAS_H
#define XCE_FORMULAS_H

#include "primitives.h"

/* One entry of log_softmax. p and 1 - p come with it because neither follows from the other, nor from u, without loss. */
typedef struct {
    real u, p, not_p;
    real v, t, d; /* the teacher's log-probability and probability, if there is one, and u - v */
} log_prob;

typedef struct {
    real value, d1, d2; /* of phi, phi' and phi'' with respect to u; of f with respect to x */
} jet;

/* a f: a factor of 0 removes the term, whatever f is there */
XCE_FN real weighted(real a, real f) { return r_select(r_eq(a, r_set(0)), r_set(0), a * f); }

XCE_FN real divided(real a, real b, real limit) /* a / b, the limit where b is 0 */
{
    return r_select(r_eq(b, r_set(0)), limit, a / b);
}

/* ---- phi: one function per loss, and one line in the list ---------------------------------------------------------- */

XCE_FN jet phi_cross_entropy(log_prob at, scalar parameter)
{
    (void)parameter;
    jet phi = {-at.u, r_set(-1), r_set(0)};
    return phi;
}

XCE_FN jet phi_focal_loss(log_prob at, scalar gamma) /* -(1 - p)^gamma u */
{
    real g = r_set(gamma), power = r_pow(at.not_p, g);
    real slope = weighted(at.p, divided(at.u, at.not_p, r_set(-1))); /* p u / (1 - p), between -1 and 0 */
    real bend = r_set(2) + at.u - (g - r_set(1)) * slope;
    jet phi = {weighted(power, -at.u), power * r_fma(g, slope, r_set(-1)),
               weighted(at.p, g * divided(power, at.not_p, r_set(0)) * bend)};
    return phi;
}

XCE_FN jet phi_poly_loss(log_prob at, scalar epsilon) /* -u + epsilon (1 - p) */
{
    real e = r_set(epsilon);
    jet phi = {r_fma(e, at.not_p, -at.u), r_fma(-e, at.p, r_set(-1)), -e * at.p};
    return phi;
}

XCE_FN jet phi_generalized_cross_entropy(log_prob at, scalar q) /* (1 - p^q) / q */
{
    if (q == 0)
        return phi_cross_entropy(at, q);
    real power = r_exp(r_set(q) * at.u);
    jet phi = {-r_expm1(r_set(q) * at.u) / r_set(q), -power, r_set(-q) * power};
    return phi;
}

#define XCE_SOFTMAX_LOSSES(LOSS) \
    LOSS(cross_entropy) LOSS(focal_loss) LOSS(poly_loss) LOSS(generalized_cross_entropy)

/* ---- divergences from a teacher ------------------------------------------------------------------------------------- */

/* Each term has a multiple of p - t added, which sums to 0, so that no term is negative and none cancels another. Close to
 * the teacher they are functions of d = u - v. A class that the teacher does not have (t = 0) has a multiple of p as its
 * term, and hence as both derivatives: share_outside. */

XCE_FN jet divergence_forward(log_prob at) /* t (v - u) + p - t */
{
    real d = at.d, difference = at.p - at.t, bend, slope = r_expm1_parts(d, &bend);
    rmask close = r_gt(r_set(1), r_abs(d));
    jet f = {r_select(close, at.t * bend, weighted(at.t, -d) + difference), r_select(close, at.t * slope, difference),
             at.p};
    return f;
}

XCE_FN jet divergence_reverse(log_prob at) /* p (u - v) + t - p */
{
    real d = at.d, bend;
    r_expm1_parts(-d, &bend);
    jet f = {r_select(r_gt(r_set(1), r_abs(d)), at.p * bend, weighted(at.p, d) + (at.t - at.p)), weighted(at.p, d),
             weighted(at.p, d + r_set(1))};
    return f;
}

XCE_FN jet divergence_js(log_prob at) /* (p log(p / m) + t log(t / m)) / 2, m = (p + t) / 2 */
{
    const real half = r_set((scalar)0.5), zero = r_set(0);
    real d = at.d, size = r_abs(d), unused;
    rmask close = r_gt(r_set(1), size);
    /* close: m (d tanh(d/2) - log cosh(d/2)^2) / 2, and log(p / m) = -log((1 + e^-d) / 2) */
    real up = r_expm1_parts(d, &unused), down = r_expm1_parts(-d, &unused);
    real near_value = half * half * (at.p + at.t) * (d * up / (up + r_set(2)) - r_log1p(up * down * r_set((scalar)-0.25), zero));
    real near_own = -r_log1p(down * half, zero);
    real softplus = r_log1p_unit(r_exp(-size)), log_2 = r_set((scalar)0.69314718055994530942);
    real own = log_2 - (r_max(-d, zero) + softplus), other = log_2 - (r_max(d, zero) + softplus);
    real far_value = half * (weighted(at.p, own) + weighted(at.t, other));
    real slope = half * weighted(at.p, r_select(close, near_own, own));
    jet f = {r_select(close, near_value, far_value), slope,
             r_fma(half, weighted(at.p, divided(at.t, at.p + at.t, zero)), slope)};
    return f;
}

#define XCE_DIVERGENCES(LOSS) LOSS(forward) LOSS(reverse) LOSS(js)

enum {
#define XCE_ENUMERATE(name) PHI_##name,
    XCE_SOFTMAX_LOSSES(XCE_ENUMERATE)
#undef XCE_ENUMERATE
#define XCE_ENUMERATE(name) DIVERGENCE_##name,
    XCE_DIVERGENCES(XCE_ENUMERATE) XCE_PHI_COUNT
#undef XCE_ENUMERATE
};

#define XCE_NAME(name) #name,
XCE_NAMES XCE_PHI_NAMES[] = {XCE_SOFTMAX_LOSSES(XCE_NAME) XCE_DIVERGENCES(XCE_NAME)};

XCE_PART jet loss_phi(int phi, log_prob at, scalar parameter)
{
    switch (phi) {
    default:
#define XCE_CASE(name) \
    case PHI_##name: \
        return phi_##name(at, parameter);
        XCE_SOFTMAX_LOSSES(XCE_CASE)
#undef XCE_CASE
#define XCE_CASE(name) \
    case DIVERGENCE_##name: \
        return divergence_##name(at);
        XCE_DIVERGENCES(XCE_CASE)
#undef XCE_CASE
    }
}

XCE_FN scalar share_outside(int phi) /* of a class that a sparse teacher does not have, in units of p */
{
    return phi == DIVERGENCE_forward ? 1 : (scalar)0.34657359027997265471; /* log(2) / 2; reverse would be infinite */
}

/* ---- losses of single elements: f(x, y, w, parameters), w being pos_weight or 1 ---------------------------------------- */

typedef struct {
    scalar at[3];
} parameters;

/* sigma(x), sigma(-x) and -log of both, each to its last places */
typedef struct {
    real p, q, minus_log_p, minus_log_q;
} sigmoid;

XCE_FN sigmoid r_sigmoid(real x)
{
    real zero = r_set(0), e = r_exp(-r_abs(x)), softplus = r_log1p_unit(e);
    real large = r_set(1) / (r_set(1) + e), small = e * large;
    rmask positive = r_gt(x, zero);
    sigmoid s = {r_select(positive, large, small), r_select(positive, small, large),
                 r_max(-x, zero) + softplus, r_max(x, zero) + softplus};
    return s;
}

XCE_FN jet binary_jet(sigmoid s, real y, real w)
{
    real not_y = r_set(1) - y, wy = w * y;
    jet f = {weighted(wy, s.minus_log_p) + weighted(not_y, s.minus_log_q), not_y * s.p - wy * s.q,
             (wy + not_y) * (s.p * s.q)};
    return f;
}

XCE_FN jet element_binary_cross_entropy_with_logits(real x, real y, real w, parameters with)
{
    real smoothing = r_set(with.at[0]);
    return binary_jet(r_sigmoid(x), r_fma(y, r_set(1) - smoothing, r_set((scalar)0.5) * smoothing), w);
}

XCE_FN jet element_binary_cross_entropy(real p, real y, real w, parameters with)
{
    (void)w;
    real clamp = r_set(with.at[0]), least = r_set((scalar)1e-12), one = r_set(1), not_p = one - p, not_y = one - y;
    real safe_p = r_max(least, p), safe_q = r_max(least, not_p);
    jet f = {weighted(y, -r_max(clamp, r_log(p))) + weighted(not_y, -r_max(clamp, r_log1p(-p, r_set(0)))),
             (p - y) / r_max(least, p * not_p), y / (safe_p * safe_p) + not_y / (safe_q * safe_q)};
    return f;
}

/* b c^g for a jet b and a c >= 0 with (log c)' = slope and c'' / c = bend */
XCE_FN jet focused(jet b, real power, real g, real slope, real bend)
{
    real curvature = g * r_fma((g - r_set(1)) * slope, slope, bend);
    jet f = {weighted(power, b.value), power * (b.d1 + weighted(g * slope, b.value)),
             power * (b.d2 + r_set(2) * g * b.d1 * slope + weighted(curvature, b.value))};
    return f;
}

XCE_FN jet element_sigmoid_focal_loss(real x, real y, real w, parameters with)
{
    (void)w;
    const real one = r_set(1), g = r_set(with.at[1]);
    scalar alpha = with.at[0];
    sigmoid s = r_sigmoid(x);
    real not_y = one - y, wrong = y * s.q + not_y * s.p; /* 1 - p_t */
    real slope = divided((not_y - y) * (s.p * s.q), wrong, not_y - y);
    real scale = alpha < 0 ? one : y * r_set(alpha) + not_y * r_set(1 - alpha);
    return focused(binary_jet(s, y, one), scale * r_pow(wrong, g), g, slope, slope * (s.q - s.p));
}

XCE_FN jet element_asymmetric_loss(real x, real y, real w, parameters with)
{
    (void)w;
    const real zero = r_set(0), one = r_set(1), clip = r_set(with.at[2]);
    sigmoid s = r_sigmoid(x);
    real not_y = one - y, density = s.p * s.q, shifted = s.p, rest = s.q, minus_log_rest = s.minus_log_q;
    real d1 = density, d2 = density * (s.q - s.p); /* of the shifted probability */
    if (with.at[2] != 0) {
        shifted = r_max(zero, s.p - clip);
        rest = one - shifted;
        minus_log_rest = -r_log1p(-shifted, zero);
        rmask moves = r_gt(s.p, clip);
        d1 = r_select(moves, d1, zero), d2 = r_select(moves, d2, zero);
    }
    /* (-log(1 - shifted))' and its derivative; without a clip, where q - p + ratio would cancel, those of softplus */
    real ratio = with.at[2] == 0 ? s.p : d1 / rest, bent = with.at[2] == 0 ? density : ratio * ((s.q - s.p) + ratio);
    jet b = {weighted(y, s.minus_log_p) + weighted(not_y, minus_log_rest), not_y * ratio - y * s.q,
             y * density + not_y * bent};
    real wrong = y * s.q + not_y * shifted, g = r_fma(y, r_set(with.at[0]), not_y * r_set(with.at[1]));
    real slope = divided(not_y * d1 - y * density, wrong, zero);
    real bend = divided(not_y * d2 - y * density * (s.q - s.p), wrong, zero);
    return focused(b, r_pow(wrong, g), g, slope, bend);
}

XCE_FN jet element_soft_margin_loss(real x, real y, real w, parameters with)
{
    (void)w, (void)with;
    sigmoid s = r_sigmoid(y * x);
    jet f = {s.minus_log_p, -y * s.q, y * y * (s.p * s.q)};
    return f;
}

XCE_FN jet element_kl_div(real u, real t, real w, parameters with)
{
    (void)w, (void)with;
    jet f = {weighted(t, r_log(t) - u), -t, r_set(0)};
    return f;
}

XCE_FN jet element_kl_div_log_target(real u, real v, real w, parameters with)
{
    (void)w, (void)with;
    real t = r_exp_any(v);
    jet f = {weighted(t, v - u), -t, r_set(0)};
    return f;
}

#define XCE_ELEMENT_LOSSES(LOSS) \
    LOSS(binary_cross_entropy) LOSS(binary_cross_entropy_with_logits) LOSS(sigmoid_focal_loss) LOSS(asymmetric_loss) \
    LOSS(soft_margin_loss) LOSS(kl_div) LOSS(kl_div_log_target)

XCE_NAMES XCE_ELEMENT_NAMES[] = {XCE_ELEMENT_LOSSES(XCE_NAME)};

/* ---- a row ---------------------------------------------------------------------------------------------------------- */

/* What one reading of a row leaves: its greatest logit, the first place of which is its `top`, and the sum over the others. */
typedef struct {
    exp_reference ref;
    real max;
    real top;       /* exp of the top entry, in units of the reference */
    real rest;      /* the sum of exp over all other entries, in the same units */
    real inverse;   /* 1 / (top + rest) */
    real log_z;     /* log(sum_c exp(x_c - max)) = log1p(rest / top) */
} row_state;

XCE_FN row_state row_close(real max, real rest)
{
    row_state s;
    s.ref = r_exp_reference(max);
    s.max = max;
    real top_low;
    s.top = r_exp_relative_tail(max, s.ref, &top_low);
    s.rest = rest;
    s.inverse = r_set(1) / (s.top + rest);
    /* what the quotient rounds away, and what top does: half a unit in the last place of the loss each */
    real ratio = rest / s.top;
    s.log_z = r_log1p(ratio, (r_remainder(rest, ratio, s.top) - ratio * top_low) / s.top);
    return s;
}

XCE_FN log_prob row_top(row_state s)
{
    log_prob at = {-s.log_z, s.top * s.inverse, s.rest * s.inverse, r_set(0), r_set(0), r_set(0)};
    return at;
}

XCE_FN log_prob row_entry(row_state s, real x) /* any entry but the top one: p <= 1/2 */
{
    real p = r_exp_relative(x, s.ref) * s.inverse;
    log_prob at = {(x - s.max) - s.log_z, p, r_set(1) - p, r_set(0), r_set(0), r_set(0)};
    return at;
}

/* Enter the teacher's logit y beside the student's x. The difference of their log-probabilities is that of the logits less one
 * number for the row: what is rounded away there is common to all classes, and moves a divergence in second order only. */
XCE_FN void row_teacher(row_state student, row_state teacher, real x, real y, log_prob *at)
{
    at->v = (y - teacher.max) - teacher.log_z;
    at->t = r_exp_relative(y, teacher.ref) * teacher.inverse;
    at->d = (x - y) - ((student.max - teacher.max) + (student.log_z - teacher.log_z));
}

XCE_FN real row_lse(row_state s) { return s.max + s.log_z; }

/* What the target says of a row. The dense coefficients d_c come from probabilities and smoothing, the index adds `index` to
 * one of them; sums run over all classes but the top one. */
typedef struct {
    real factor;            /* of the derivatives: sample weight over the denominator of the mean */
    real weight;            /* of the value: sample weight */
    real index;             /* coefficient of the labelled class beyond its dense one; 0 without a label */
    real label_logit;       /* (transformed) logit of that class */
    rmask label_is_top;
    real d_top, d_label;
    real sum, sum1, sum2;   /* of d phi, d phi', d phi'' */
    real z_loss;
    real v_top, t_top, gap_top; /* the teacher at the top entry */
} row_target;

typedef struct {
    real value;
    real b, d;              /* grad_k = f (a_k phi'_k - p_k b), hess_k = f (a_k phi''_k (1 - 2 p_k) + p_k (p_k (b + d) - b)) */
    real grad_top, hess_top, grad_label, hess_label;
} row_result;

XCE_PART row_result row_finish(row_state s, row_target t, int phi, scalar parameter)
{
    const real zero = r_set(0);
    log_prob at_top = row_top(s), at_label = row_entry(s, t.label_logit);
    at_top.v = t.v_top, at_top.t = t.t_top, at_top.d = t.gap_top;
    jet top = loss_phi(phi, at_top, parameter), label = loss_phi(phi, at_label, parameter);
    real a_top = t.d_top + r_select(t.label_is_top, t.index, zero);
    real index = r_select(t.label_is_top, zero, t.index); /* what is left for a label elsewhere */
    real lse = row_lse(s), two_z = t.z_loss + t.z_loss;

    row_result r;
    r.value = t.sum + weighted(a_top, top.value) + weighted(index, label.value);
    r.value = weighted(t.weight, r_select(r_eq(t.z_loss, zero), r.value, r.value + t.z_loss * lse * lse));
    real sick = s.log_z + t.index; /* a row with NaN, or with a bad label, is NaN whatever weighs it */
    r.value = r_select(r_eq(sick, sick), r.value, sick);
    two_z = r_select(r_eq(two_z, zero), zero, two_z * lse);
    /* a_top phi' is kept out of b for the top entry itself: p - 1 would cancel there */
    real b_others = t.sum1 + weighted(index, label.d1) - two_z;
    r.b = b_others + weighted(a_top, top.d1);
    real d_others = t.sum2 + weighted(index, label.d2) + (t.z_loss + t.z_loss);
    r.d = d_others + weighted(a_top, top.d2);
    r.grad_top = t.factor * (weighted(a_top, top.d1) * at_top.not_p - at_top.p * b_others);
    r.hess_top = t.factor * (weighted(a_top, top.d2) * (at_top.not_p * at_top.not_p)
                             + at_top.p * (at_top.p * d_others - at_top.not_p * r.b));
    real a_label = t.d_label + index, curved = r_fma(at_label.p, r.b + r.d, -r.b);
    r.grad_label = t.factor * (weighted(a_label, label.d1) - at_label.p * r.b);
    r.hess_label = t.factor * (weighted(a_label, label.d2) * (at_label.not_p - at_label.p) + at_label.p * curved);
    return r;
}

/* ---- what is done to a logit before the softmax ----------------------------------------------------------------------- */

typedef struct {
    scalar softcap, temperature; /* softcap 0: none */
} logit_transform;

XCE_PART real transform_logit(logit_transform t, real x) /* softcap tanh(x / softcap) / temperature; infinities stay */
{
    if (t.softcap != 0) {
        real capped = r_set(t.softcap) * r_tanh(x / r_set(t.softcap));
        x = r_select(r_eq(r_abs(x), r_set(XCE_INF)), x, capped);
    }
    return x / r_set(t.temperature);
}

/* Derivatives with respect to the raw logit, of a loss whose derivatives by the transformed one are g and h. */
XCE_PART void transform_derivatives(logit_transform t, real x, real *g, real *h)
{
    real d1 = r_set(1), d2 = r_set(0), inverse = r_set(1) / r_set(t.temperature);
    if (t.softcap != 0) {
        real y = x / r_set(t.softcap);
        d1 = r_sech2(y);
        d2 = r_set(-2) * r_tanh(y) * d1 / r_set(t.softcap);
    }
    d1 = d1 * inverse;
    *h = *h * d1 * d1 + *g * d2 * inverse;
    *g = *g * d1;
}

#endif
