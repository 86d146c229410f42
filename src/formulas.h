/* The losses. Every softmax loss is sum_c a_c phi(u_c), u = log_softmax(x): the target decides the coefficients a, the loss
 * decides phi. This file has the functions phi with their derivatives, and what follows from them for a row. It has no loops
 * over classes; the schedules in cpu/ have those, and no mathematics of losses.
 */
#ifndef XCE_FORMULAS_H
#define XCE_FORMULAS_H

#include "primitives.h"

/* One entry of log_softmax. p and 1 - p come with it because neither follows from the other, nor from u, without loss. */
typedef struct {
    real u, p, not_p;
} log_prob;

typedef struct {
    real value, d1, d2; /* phi, phi' and phi'' with respect to u */
} jet;

/* ---- phi: one function per loss, and one line in the list ---------------------------------------------------------- */

XCE_FN jet phi_cross_entropy(log_prob at, real parameter)
{
    (void)parameter;
    jet phi = {-at.u, r_set(-1), r_set(0)};
    return phi;
}

#define XCE_SOFTMAX_LOSSES(LOSS) LOSS(cross_entropy)

enum {
#define XCE_ENUMERATE(name) PHI_##name,
    XCE_SOFTMAX_LOSSES(XCE_ENUMERATE) XCE_PHI_COUNT
};

static const char *const XCE_PHI_NAMES[] __attribute__((unused)) = {
#define XCE_NAME(name) #name,
    XCE_SOFTMAX_LOSSES(XCE_NAME)};

XCE_FN jet loss_phi(int phi, log_prob at, real parameter)
{
    switch (phi) {
    default:
#define XCE_CASE(name) \
    case PHI_##name: \
        return phi_##name(at, parameter);
        XCE_SOFTMAX_LOSSES(XCE_CASE)
    }
}

/* a phi: a coefficient of 0 removes its term, whatever phi is there */
XCE_FN real weighted(real a, real phi) { return r_select(r_eq(a, r_set(0)), r_set(0), a * phi); }

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
    log_prob at = {-s.log_z, s.top * s.inverse, s.rest * s.inverse};
    return at;
}

XCE_FN log_prob row_entry(row_state s, real x) /* any entry but the top one: p <= 1/2 */
{
    real p = r_exp_relative(x, s.ref) * s.inverse;
    log_prob at = {(x - s.max) - s.log_z, p, r_set(1) - p};
    return at;
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
} row_target;

typedef struct {
    real value;
    real b, d;              /* grad_k = f (a_k phi'_k - p_k b), hess_k = f (a_k phi''_k (1 - 2 p_k) + p_k (p_k (b + d) - b)) */
    real grad_top, hess_top, grad_label, hess_label;
} row_result;

XCE_FN row_result row_finish(row_state s, row_target t, int phi, real parameter)
{
    const real zero = r_set(0);
    log_prob at_top = row_top(s), at_label = row_entry(s, t.label_logit);
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

XCE_FN real transform_logit(logit_transform t, real x) /* softcap tanh(x / softcap) / temperature; infinities stay */
{
    if (t.softcap != 0) {
        real capped = r_set(t.softcap) * r_tanh(x / r_set(t.softcap));
        x = r_select(r_eq(r_abs(x), r_set(XCE_INF)), x, capped);
    }
    return x / r_set(t.temperature);
}

/* Derivatives with respect to the raw logit, of a loss whose derivatives by the transformed one are g and h. */
XCE_FN void transform_derivatives(logit_transform t, real x, real *g, real *h)
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
