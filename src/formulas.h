/* The losses. Every softmax loss is sum_c a_c phi(u_c), u = log_softmax(x): the target decides the coefficients a, the loss
 * decides phi. A divergence from a teacher is the same with a = 1 and a phi that knows the teacher's log-probability, too. A
 * loss of single elements is a function of x and y. This file has all these functions with their derivatives, and what
 * follows from them for a row. It has no loops over classes; the schedules in cpu/ have those, and no mathematics of losses.
 */
#ifndef XCE_FORMULAS_H
#define XCE_FORMULAS_H

#include "options.h"
#include "primitives.h"

/* One entry of log_softmax. p and 1 - p come with it because neither follows from the other, nor from u, without loss. */
typedef struct {
    real u, p, not_p;
    real low; /* what the smaller of p and not_p rounds away, where the loss is steep */
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

XCE_FN void scale_derivatives(jet *f, real by) { f->d1 = f->d1 * by, f->d2 = f->d2 * by; }

/* ---- phi: one function per loss, and one line in the list ---------------------------------------------------------- */

XCE_FN jet phi_cross_entropy(log_prob at, scalar parameter)
{
    (void)parameter;
    jet phi = {-at.u, r_set(-1), r_set(0)};
    return phi;
}

/* From XCE_STEEP_ABOVE on (1 - p)^gamma, which multiplies the error of 1 - p by gamma, is formed from 1 - p in two parts, and in
 * float64: xce/_engines/numbers.py has calls with float32 computed there, too. */
XCE_FN int is_steep_power(scalar gamma) { return sizeof(scalar) == 8 && gamma > XCE_STEEP_ABOVE; }

/* exp(x) and exp(x) - 1 of any distance x: r_exp_pair has x.low in the terms up to the square only, which errs by a third of an
 * ulp where x.high is -20 */
XCE_FN exp_pair steep_exp(real_pair x)
{
    exp_pair e = r_exp_pair(r_pair(x.high, r_set(0)));
    real more = e.exp.high * x.low;
    e.exp = r_pair_of(e.exp.high, e.exp.low + more), e.expm1 = r_pair_of(e.expm1.high, e.expm1.low + more);
    return e;
}

/* c^g, rest being 1 - c: exp(g log c), where one step of Newton's method from log c rounded has what that lacks. Where it is not
 * below the smallest number, g log c is at most 708, and as often does an error of log c count. */
XCE_CALLED real steep_power(real_pair c, real_pair rest, real_pair g)
{
    rmask is_small = r_gt(r_set((scalar)0.5), c.high);
    real log_c = r_select(is_small, r_log(c.high), r_log1p(-rest.high, -rest.low));
    exp_pair e = r_exp_pair(r_pair(log_c, r_set(0)));
    real_pair wanted = {r_select(is_small, c.high, -rest.high), r_select(is_small, c.low, -rest.low)};
    real_pair found = {r_select(is_small, e.exp.high, e.expm1.high), r_select(is_small, e.exp.low, e.expm1.low)};
    real more = r_rounded_difference(wanted, found) / e.exp.high, power = g.high * log_c;
    real low = r_product_low(g.high, log_c, power) + r_fma(g.high, more, g.low * log_c);
    return r_exp_pair_near(r_pair(power, low)).exp.high;
}

XCE_FN jet phi_focal_loss(log_prob at, scalar gamma) /* -(1 - p)^gamma u */
{
    real g = r_set(gamma), power;
    if (is_steep_power(gamma))
        power = steep_power(r_pair(at.not_p, at.low), r_pair(at.p, at.low), r_pair(g, r_set(0)));
    else
        power = r_pow(at.not_p, g);
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
    if (epsilon < 0) { /* (1 + epsilon) (-u) - epsilon (-u - (1 - p)): down to -1 nothing cancels */
        real n = at.not_p, rest = r_set(1 + epsilon);
        /* -log(1 - n) - n: the correction of log(1 - n) or, from 1 - sqrt(1/2) to 1 - sqrt(1/8), that of log(2 (1 - n)) */
        rmask small = r_gt(r_set((scalar)0.29289321881345247560), n), middle = r_gt(r_set((scalar)0.64644660940672623780), n);
        real correction = r_log_split(r_set(1), r_select(small, -n, r_set(1) - (n + n))).correction;
        real doubled = (n - r_set(1 - XCE_LN2_HIGH)) + (correction + r_set(XCE_LN2_LOW));
        real bent = r_select(small, correction, r_select(middle, doubled, -at.u - n));
        /* far away both terms may be beyond the type */
        phi.value = r_select(r_gt(-at.u, r_set((scalar)0x1p60)), phi.value, r_fma(rest, -at.u, -e * bent));
        phi.d1 = r_select(r_gt(at.p, r_set((scalar)0.5)), r_fma(e, n, -rest), phi.d1);
    }
    return phi;
}

XCE_FN jet phi_generalized_cross_entropy(log_prob at, scalar q) /* (1 - p^q) / q */
{
    if (q == 0)
        return phi_cross_entropy(at, q);
    real power = at.p; /* of p itself, as exp(q u) would err by |q u| / 2 ulp; but that does not underflow before p^q does */
    if (q != 1)
        power = r_select(r_gt(at.p, r_set(XCE_SMALLEST)), r_pow(at.p, r_set(q)), r_exp(r_set(q) * at.u));
    jet phi = {-r_expm1(r_set(q) * at.u) / r_set(q), -power, r_set(-q) * power};
    if (q < (scalar)0.0009765625) { /* 2^-10, where q u may underflow: of so small a product, expm1 is the product itself */
        rmask is_small = r_gt(r_set((scalar)(sizeof(scalar) == 8 ? 0x1p-54 : 0x1p-25)), r_abs(r_set(q) * at.u));
        phi.value = r_select(is_small, -at.u, phi.value);
    }
    return phi;
}

#define XCE_SOFTMAX_LOSSES(LOSS) \
    LOSS(cross_entropy) LOSS(focal_loss) LOSS(poly_loss) LOSS(generalized_cross_entropy)

/* ---- divergences from a teacher ------------------------------------------------------------------------------------- */

/* A class of student and teacher: their probabilities, d = log(p / t), and by how much d is greater than at the student's top
 * class. Differences of probabilities are products with expm1 of d, never differences of what is rounded. */
typedef struct {
    real p, t, d, above_top;
    real d_low; /* what d rounds away */
} prob_pair;

/* What a row of student and teacher has in common. Close to the teacher, log_z of both are the same but for `apart`, which is
 * the log1p of a sum of differences. */
typedef struct {
    real inverse, teacher_inverse; /* 1 / sum of exp */
    real apart;                    /* log_z of the student less that of the teacher */
    real_pair gap;                 /* at the student's top class: its distance less the teacher's */
    real top_share, top_softplus;  /* there: t / (p + t) and log(1 + t / p) */
} row_match;

/* a - b, d being log(a / b) */
XCE_FN real exp_difference(real a, real b, real d)
{
    return r_select(r_gt(r_set(1), r_abs(d)), b * (d + r_exp_bend(d)), a - b);
}

/* b log(b / a) + a - b >= 0, d being log(a / b): the terms of Kullback and Leibler's divergence, the sum of which is theirs */
XCE_FN real kullback_leibler(real a, real b, real d)
{
    return r_select(r_gt(r_set(1), r_abs(d)), b * r_exp_bend(d), weighted(b, -d) + (a - b));
}

/* log(1 + exp(-|d|)), d in two parts. Far from 0 it is exp(-|d|), which would err by half an ulp of d. */
XCE_FN real log1p_exp_minus_size(real d, real low)
{
    real e = r_exp(-r_abs(d)), rest = r_select(r_gt(d, r_set(0)), -low, low);
    return r_log1p_unit(r_fma(r_select(r_gt(r_set((scalar)1e-7), e), rest, r_set(0)), e, e));
}

XCE_FN real log1p_exp_minus(real d, real low) /* log(1 + exp(-d)) */
{
    return r_max(-d, r_set(0)) + log1p_exp_minus_size(d, low);
}

/* Value, and what makes the derivatives of a divergence: with p and its d1,
 *     grad_k = p_k e_k,  e_k = d1_k - sum_c p_c d1_c,
 *     hess_k = p_k ((1 - 2 p_k) (e_k + d2_k) + p_k sum_c p_c d2_c),
 * where any number may be added to all d1: they are 0 at the top, so that nothing common to all classes is rounded. */
XCE_FN jet divergence_forward(prob_pair at, row_match row) /* t log(t / p); d1 is the gradient, the Hessian is p (1 - p) */
{
    (void)row;
    jet f = {kullback_leibler(at.p, at.t, at.d), exp_difference(at.p, at.t, at.d), r_set(0)};
    return f;
}

XCE_FN jet divergence_reverse(prob_pair at, row_match row) /* p log(p / t) */
{
    (void)row;
    const real infinite = r_set(XCE_INF); /* where the teacher does not have the class */
    jet f = {kullback_leibler(at.t, at.p, -at.d), r_select(r_eq(at.d, infinite), infinite, at.above_top), r_set(1)};
    return f;
}

XCE_FN jet divergence_js(prob_pair at, row_match row) /* (p log(p / m) + t log(t / m)) / 2, m = (p + t) / 2 */
{
    const real half = r_set((scalar)0.5), zero = r_set(0), one = r_set(1), log_2 = r_set((scalar)0.69314718055994530942);
    rmask is_near = r_gt(one, r_abs(at.d));
    /* close: m (d tanh(d/2) - log cosh(d/2)^2) / 2 */
    real square = at.d * at.d, cosh_part = square * r_horner(COSH_TAIL, XCE_COSH_DEGREE, square);
    real near_value = half * half * (at.p + at.t) * cosh_part;
    real log_rest = log1p_exp_minus_size(at.d, at.d_low);
    real softplus = r_max(-at.d, zero) + log_rest; /* log(2 m / p) */
    real far_value = half * (weighted(at.p, log_2 - softplus) + weighted(at.t, log_2 - (r_max(at.d, zero) + log_rest)));
    /* log(p / m) less that of the top class */
    rmask near_top = r_gt(one, r_abs(at.above_top));
    real below = -r_select(near_top, at.above_top, zero), change = row.top_share * (below + r_exp_bend(below));
    real slope = r_select(near_top, -r_log1p(change, zero), row.top_softplus - softplus);
    jet f = {r_select(is_near, near_value, far_value), slope, divided(at.t, at.p + at.t, zero)};
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

XCE_FN int is_steep(int phi, scalar parameter) { return phi == PHI_focal_loss && is_steep_power(parameter); }

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
    }
}

XCE_PART jet divergence_term(int divergence, prob_pair at, row_match row)
{
    switch (divergence) {
    default:
#define XCE_CASE(name) \
    case DIVERGENCE_##name: \
        return divergence_##name(at, row);
        XCE_DIVERGENCES(XCE_CASE)
#undef XCE_CASE
    }
}

/* ---- losses of single elements: f(x, y, w, parameters), w being pos_weight or 1 ---------------------------------------- */

/* A number that may be more precise than `real`: what high, the nearest, lacks is low. */
typedef struct {
    real high, low;
} two_part;

typedef struct {
    scalar at[5], low[5]; /* each in two parts */
} parameters;

XCE_FN parameters parameters_of(const double *values)
{
    parameters with;
    for (int k = 0; k < 5; k++) {
        with.at[k] = (scalar)values[k];
        with.low[k] = (scalar)(values[k] - (double)with.at[k]);
    }
    return with;
}

XCE_FN real complement(two_part a) /* 1 - a for 0 <= a <= 1, rounded once */
{
    real one = r_set(1), rest = one - a.high;
    return rest + (((one - rest) - a.high) - a.low);
}

/* sigma(x), sigma(-x) and -log of both, each to its last places; softplus = log(1 + exp(-|x|)) is the lesser of these */
typedef struct {
    real p, q, minus_log_p, minus_log_q, softplus;
} sigmoid;

XCE_FN sigmoid r_sigmoid(real x)
{
    real zero = r_set(0), e = r_exp(-r_abs(x)), softplus = r_log1p_unit(e);
    real large = r_set(1) / (r_set(1) + e), small = e * large;
    rmask positive = r_gt(x, zero);
    sigmoid s = {r_select(positive, large, small), r_select(positive, small, large),
                 r_max(-x, zero) + softplus, r_max(x, zero) + softplus, softplus};
    return s;
}

/* -w y log p - (1 - y) log(1 - p). One of the logarithms is the softplus and the other |x| more, so that only |x| needs a
 * factor of its own: 2 ulp for any y, 3 with smoothing, 4 where w is not 1 (the worst of 8 million: 2.0, 2.6, 3.9). */
XCE_FN jet binary_jet(sigmoid s, real x, real y, real not_y, real w)
{
    real wy = w * y, all = r_select(r_eq(w, r_set(1)), w, r_fma(w, y, not_y));
    real against = r_select(r_gt(x, r_set(0)), not_y, wy);
    real size = r_select(r_eq(against, r_set(0)), r_set(0), r_abs(x));
    jet f = {r_fma(against, size, all * s.softplus), not_y * s.p - wy * s.q, all * (s.p * s.q)};
    return f;
}

/* y' = y (1 - smoothing) + smoothing / 2, and 1 - y' likewise from 1 - y; with: 1 - smoothing, smoothing / 2 */
XCE_FN jet element_binary_cross_entropy_with_logits(real x, two_part y, two_part w, parameters with)
{
    real kept = r_set(with.at[0]), kept_low = r_set(with.low[0]), half = r_set(with.at[1]), not_y = complement(y);
    return binary_jet(r_sigmoid(x), x, r_fma(y.high, kept, half + r_fma(y.high, kept_low, y.low)),
                      r_fma(not_y, kept, half + not_y * kept_low), w.high);
}

XCE_FN jet element_binary_cross_entropy(real p, two_part y, two_part w, parameters with)
{
    (void)w;
    real clamp = r_set(with.at[0]), least = r_set((scalar)1e-12), not_p = r_set(1) - p, not_y = complement(y);
    real safe_p = r_max(least, p), safe_q = r_max(least, not_p);
    real difference = (p - y.high) - y.low; /* where it is small, p - y.high is exact */
    jet f = {weighted(y.high, -r_max(clamp, r_log(p))) + weighted(not_y, -r_max(clamp, r_log1p(-p, r_set(0)))),
             difference / r_max(least, p * not_p), y.high / (safe_p * safe_p) + not_y / (safe_q * safe_q)};
    return f;
}

/* b scale c^g for a jet b and a c >= 0 with c^g = power, (log c)' = slope and c'' / c = bend. An infinite value stays so where c^g
 * is too small for the type: where c is 0, b is finite. */
XCE_FN jet focused(jet b, real scale, real power, real g, real slope, real bend)
{
    power = scale * power;
    real curvature = g * r_fma((g - r_set(1)) * slope, slope, bend);
    real of_value = r_select(r_eq(b.value, r_set(XCE_INF)), scale, power);
    jet f = {weighted(of_value, b.value), power * (b.d1 + weighted(g * slope, b.value)),
             power * (b.d2 + r_set(2) * g * b.d1 * slope + weighted(curvature, b.value))};
    return f;
}

/* What steep powers are of, in two parts: y, 1 - y, sigma(x) and sigma(-x) */
typedef struct {
    real_pair y, not_y, p, q;
} steep_parts;

XCE_FN steep_parts steep_parts_of(real x, two_part y)
{
    const real_pair one = {r_set(1), r_set(0)};
    real_pair e = r_exp_pair(r_pair(-r_abs(x), r_set(0))).exp, all = one_plus(e);
    real_pair large = r_pair_divide(one, all), small = r_pair_divide(e, all);
    rmask positive = r_gt(x, r_set(0));
    steep_parts s = {{y.high, y.low}, r_pair_subtract(one, r_pair(y.high, y.low)),
                     {r_select(positive, large.high, small.high), r_select(positive, large.low, small.low)},
                     {r_select(positive, small.high, large.high), r_select(positive, small.low, large.low)}};
    return s;
}

XCE_FN real_pair steep_mix(steep_parts s, real_pair a, real_pair b) /* y a + (1 - y) b */
{
    return r_pair_subtract(r_pair_multiply(s.y, a), r_scaled(r_set(-1), r_pair_multiply(s.not_y, b)));
}

/* with: gamma, alpha; an alpha below 0 is w */
XCE_FN jet element_sigmoid_focal_loss(real x, two_part y, two_part w, parameters with)
{
    const real one = r_set(1), g = r_set(with.at[0]);
    if (with.at[1] >= 0)
        w.high = r_set(with.at[1]), w.low = r_set(with.low[1]);
    sigmoid s = r_sigmoid(x);
    real not_y = complement(y), wrong = y.high * s.q + not_y * s.p; /* 1 - p_t */
    real slope = divided((not_y - y.high) * (s.p * s.q), wrong, not_y - y.high);
    real scale = with.at[2] != 0 ? y.high * w.high + not_y * complement(w) : one;
    real power;
    if (is_steep_power(with.at[0])) {
        steep_parts t = steep_parts_of(x, y);
        power = steep_power(steep_mix(t, t.q, t.p), steep_mix(t, t.p, t.q), r_pair(g, r_set(0)));
    } else
        power = r_pow(wrong, g);
    return focused(binary_jet(s, x, y.high, not_y, one), scale, power, g, slope, slope * (s.q - s.p));
}

/* with: gamma_pos, gamma_neg, clip, and the x at which sigma(x) is clip, in as many digits as two doubles have */
XCE_FN jet element_asymmetric_loss(real x, two_part y, two_part w, parameters with)
{
    (void)w;
    const real zero = r_set(0), one = r_set(1), clip = r_set(with.at[2]);
    sigmoid s = r_sigmoid(x);
    real not_y = complement(y), density = s.p * s.q, shifted = s.p, rest = s.q, minus_log_rest = s.minus_log_q;
    real d1 = density, d2 = density * (s.q - s.p), ratio = s.p, bent = density; /* of shifted; of -log(1 - shifted) */
    if (with.at[2] != 0) {
        /* sigma(x) - sigma(z) = sigma(x) sigma(-z) (1 - exp(z - x)), which keeps its digits near z */
        two_part share = {clip, r_set(with.low[2])};
        real gap = (r_set(with.at[3]) - x) + (r_set(with.low[3]) + r_set(with.at[4]));
        rmask stays = r_not(r_gt(zero, gap));
        real none = zero * s.p; /* NaN stays NaN */
        shifted = r_select(stays, none, s.p * complement(share) * -r_expm1(gap));
        rest = s.q + clip;
        ratio = r_select(stays, none, density / rest), bent = ratio * (s.q - s.p * (clip / rest));
        d1 = r_select(stays, none, d1), d2 = r_select(stays, none, d2);
        real little = one - shifted; /* of shifted where that is small, of rest where it is */
        rmask is_little = r_gt(r_set((scalar)0.5), shifted);
        minus_log_rest = r_select(stays, none,
            -r_log_join(r_log_split(r_select(is_little, little, r_max(r_set(XCE_SMALLEST), rest)),
                                    r_select(is_little, (one - little) - shifted, zero))));
    }
    jet b = {weighted(y.high, s.minus_log_p) + weighted(not_y, minus_log_rest), not_y * ratio - y.high * s.q,
             y.high * density + not_y * bent};
    real wrong = y.high * s.q + not_y * shifted, g = r_fma(y.high, r_set(with.at[0]), not_y * r_set(with.at[1]));
    real slope = divided(not_y * d1 - y.high * density, wrong, zero);
    real bend = divided(not_y * d2 - y.high * density * (s.q - s.p), wrong, zero);
    real power = r_pow(wrong, g);
    if (is_steep_power(with.at[0]) || is_steep_power(with.at[1])) {
        steep_parts t = steep_parts_of(x, y);
        real_pair of_p = t.p, of_q = t.q, all = steep_mix(t, r_pair(r_set(with.at[0]), zero), r_pair(r_set(with.at[1]), zero));
        if (with.at[2] != 0) {
            real_pair gap = r_difference(r_set(with.at[3]), x), share = {clip, r_set(with.low[2])};
            gap = r_pair_of(gap.high, gap.low + (r_set(with.low[3]) + r_set(with.at[4])));
            real_pair of_1 = {one, zero}, more = r_pair_multiply(t.p, r_pair_subtract(of_1, share));
            more = r_pair_multiply(more, r_scaled(r_set(-1), steep_exp(gap).expm1));
            rmask moves = r_gt(zero, gap.high);
            of_p = r_pair(r_select(moves, more.high, zero * s.p), r_select(moves, more.low, zero));
            of_q = r_pair_subtract(of_1, of_p);
        }
        real steep = steep_power(steep_mix(t, t.q, of_p), steep_mix(t, t.p, of_q), all);
        power = r_select(r_gt(all.high, r_set(XCE_STEEP_ABOVE)), steep, power);
    }
    return focused(b, one, power, g, slope, bend);
}

/* A function of y x, what that product rounds away included to the first order. */
XCE_FN jet element_soft_margin_loss(real x, two_part y, two_part w, parameters with)
{
    (void)w, (void)with;
    real margin = y.high * x, low = r_fma(y.low, x, r_remainder(-margin, -y.high, x));
    low = r_select(r_gt(r_set(XCE_INF), r_abs(margin)), low, r_set(0));
    sigmoid s = r_sigmoid(margin);
    real q = r_fma(-low * s.p, s.q, s.q), density = s.p * s.q;
    real curved = r_fma(low * (s.q - s.p), density, density);
    jet f = {r_fma(-low, s.q, s.minus_log_p), -y.high * q, y.high * curved * y.high}; /* y^2 may be infinite */
    return f;
}

/* The difference of log t and u is formed from the parts of log t, so that near log t = u it errs by the rounding of the
 * logarithm's last part alone, at most eps / 8. */
XCE_FN jet element_kl_div(real u, two_part t, two_part w, parameters with)
{
    (void)w, (void)with;
    log_parts log_t = r_log_of(t.high);
    real ln2 = r_set(XCE_LN2_LOW), near = r_fma(log_t.k, r_set(XCE_LN2_HIGH), -u) + log_t.f;
    real low = divided(t.low, t.high, r_set(0));
    jet f = {weighted(t.high, near - ((log_t.correction - log_t.k * ln2) - low)), -t.high, r_set(0)};
    rmask is_usual = r_gt(r_set(XCE_INF), r_select(r_gt(t.high, r_set(0)), r_abs(u) + t.high, r_set(XCE_INF)));
    f.value = r_select(is_usual, f.value, weighted(t.high, r_log(t.high) - u));
    return f;
}

XCE_FN jet element_kl_div_log_target(real u, two_part v, two_part w, parameters with)
{
    (void)w, (void)with;
    real t = r_exp_any(v.high);
    t = r_select(r_gt(r_set(XCE_INF), t), r_fma(t, v.low, t), t);
    real difference = (v.high - u) + v.low; /* 0 counts 0 times a t beyond the type */
    jet f = {r_select(r_eq(difference, r_set(0)), r_set(0), weighted(t, difference)), -t, r_set(0)};
    return f;
}

#define XCE_ELEMENT_LOSSES(LOSS) \
    LOSS(binary_cross_entropy) LOSS(binary_cross_entropy_with_logits) LOSS(sigmoid_focal_loss) LOSS(asymmetric_loss) \
    LOSS(soft_margin_loss) LOSS(kl_div) LOSS(kl_div_log_target)

XCE_NAMES XCE_ELEMENT_NAMES[] = {XCE_ELEMENT_LOSSES(XCE_NAME)};

/* ---- coefficients --------------------------------------------------------------------------------------------------- */

/* d = w ((1 - eps) q + eps / C) of every class, and w (1 - eps) more of the labelled one */
XCE_FN scalar label_share(double smoothing) { return (scalar)(1 - smoothing); }

XCE_FN scalar smoothing_share(double smoothing, int64_t n_classes) { return (scalar)(smoothing / (double)n_classes); }

/* of the classes that `where` leaves */
XCE_FN scalar share_of_left(double smoothing, scalar n_left) { return (scalar)smoothing / n_left; }

XCE_FN real dense_coefficient(real share, scalar kept, real q) { return r_fma(r_set(kept), q, share); } /* times the weight */

XCE_FN scalar label_coefficient(int status, int64_t label, scalar kept, const scalar *weight)
{
    return status == INVALID ? XCE_NAN : status == IGNORED ? 0 : weight ? kept * weight[label] : kept;
}

/* Of a row of log-probabilities, a being the coefficient of its label, and of the entries of a row that is not summed up:
 * weights that cancel make the factor NaN. */
XCE_FN scalar nll_value(int status, scalar a, scalar log_prob)
{
    return status == INVALID ? XCE_NAN : status == ACTIVE && a != 0 ? -a * log_prob : 0;
}

XCE_FN scalar filled_entry(int status, scalar factor)
{
    return status == INVALID || (status == ACTIVE && factor != factor) ? XCE_NAN : 0;
}

/* ---- a row ---------------------------------------------------------------------------------------------------------- */

/* A z-loss beyond FAR is computed in units in which it does not overflow. */
#if defined(XCE_STORAGE_float64)
#define XCE_FAR_FROM 0x1p992
#define XCE_SHRINKING 0x1p-1000
#else
#define XCE_FAR_FROM 0x1p96f
#define XCE_SHRINKING 0x1p-104f
#endif

/* What one reading of a row leaves: its greatest logit, the first place of which is its `top`, and the sum over the others.
 * Entries are logits, or their distances from the greatest one where logits are transformed. */
typedef struct {
    exp_reference ref;
    real max;       /* the greatest entry: 0 of distances */
    real greatest;  /* the greatest logit, transformed */
    real shrunk;    /* that times XCE_SHRINKING, which a small temperature does not make infinite */
    real top;       /* exp of the top entry, in units of the reference */
    real rest;      /* the sum of exp over all other entries, in the same units */
    real rest_low;  /* what that rounds away, where the loss is steep */
    real inverse;   /* 1 / (top + rest) */
    real log_z;     /* log(sum_c exp(x_c - max)) = log1p(rest / top) */
} row_state;

XCE_FN row_state row_close(real max, real rest)
{
    row_state s;
    s.ref = r_exp_reference(max);
    s.max = s.greatest = max;
    s.shrunk = max * r_set(XCE_SHRINKING);
    real top_low;
    s.top = r_exp_relative_tail(max, s.ref, &top_low);
    s.rest = rest, s.rest_low = r_set(0);
    s.inverse = r_set(1) / (s.top + rest);
    /* what the quotient rounds away, and what top does: half a unit in the last place of the loss each */
    real ratio = rest / s.top;
    s.log_z = r_log1p(ratio, (r_remainder(rest, ratio, s.top) - ratio * top_low) / s.top);
    return s;
}

XCE_FN log_prob row_top(row_state s)
{
    log_prob at = {-s.log_z, s.top * s.inverse, s.rest * s.inverse, r_set(0)};
    return at;
}

XCE_FN log_prob log_prob_of(real max, real log_z, real_pair x, real p) /* of any entry but the top one: p <= 1/2 */
{
    log_prob at = {((x.high - max) - log_z) + x.low, p, r_set(1) - p, r_set(0)};
    return at;
}

XCE_FN log_prob row_entry(row_state s, real_pair x)
{
    return log_prob_of(s.max, s.log_z, x, r_exp_relative_pair(x, s.ref) * s.inverse);
}

XCE_FN real below_top(real a, real max, real x) { return weighted(a, max - x); } /* the terms of linear losses and the entropy */

XCE_FN real row_lse(row_state s) { return s.greatest + s.log_z; }

XCE_FN real row_entropy(row_state s, real sum) { return s.log_z + sum * s.inverse; } /* sum: of exp (max - x) */

XCE_FN real row_spread(row_state s) { return s.rest / s.top; }

/* Of a steep loss entries are distances, so that top is 1 (or NaN), and exp is added up in three parts: multiples of 2^-26 and of
 * 2^-52, the sums of which are exact, and what is left, the sum of which errs by little, also beside a sum of small terms. */
typedef struct {
    real high, middle, low;
} steep_term;

XCE_FN steep_term steep_summand(real_pair e)
{
    const real coarse = r_set((scalar)0x1.8p26), fine = r_set((scalar)0x1.8p0);
    real high = (e.high + coarse) - coarse, left = e.high - high, middle = (left + fine) - fine;
    steep_term t = {high, middle, (left - middle) + e.low};
    return t;
}

XCE_FN real_pair steep_total(steep_term sums)
{
    real_pair all = r_difference(sums.high, -sums.middle);
    return r_pair_of(all.high, all.low + sums.low);
}

XCE_FN real_pair steep_sum(row_state s)
{
    real_pair all = r_difference(s.top, -s.rest);
    return r_pair_of(all.high, all.low + s.rest_low);
}

XCE_FN log_prob steep_share(log_prob at, real_pair e, real_pair rest, real_pair all) /* p = e / all, 1 - p = rest / all */
{
    real_pair p = r_pair_divide(e, all), not_p = r_pair_divide(rest, all);
    at.p = p.high, at.not_p = not_p.high;
    at.low = r_select(r_gt(r_set((scalar)0.5), not_p.high), not_p.low, p.low);
    return at;
}

XCE_FN log_prob steep_top(row_state s)
{
    return steep_share(row_top(s), r_pair(s.top, r_set(0)), r_pair(s.rest, s.rest_low), steep_sum(s));
}

XCE_FN log_prob steep_entry(log_prob at, real_pair x, real_pair all) /* any but the top one */
{
    real_pair e = steep_exp(x).exp;
    return steep_share(at, e, r_pair_subtract(all, e), all);
}

/* Terms of an entry in the sums of its row, and these sums, over all classes but the top one: of d phi, d phi', d phi'' and the
 * slopes below; of a divergence, of the value, p d1, p d2, and what the student has outside a sparse teacher's classes. */
typedef struct {
    real value, d1, d2, extra;
} row_sums;

/* Where coefficients and phi' both vary, a_k phi'_k - p_k sum_c a_c phi'_c may be a small difference of large terms. With
 *     v_k = a_k phi'_k - p_k a_top phi'_top / p_top,  grad_k = v_k - p_k sum_c v_c,
 * the terms that cancel meet in v_k, each class with the top one (where v is 0): there they have exp(x_k - max) in two parts,
 * and no denominator that is rounded. */
typedef struct {
    real a_top;             /* of the top entry, with a label there */
    real p;                 /* of the top entry */
    real not_d1;            /* -phi'_top */
    real_pair top, share;   /* of poly: a_top (1 + epsilon p_top), epsilon p_top; of a steep loss top is the sum of exp */
} row_slope;

XCE_PART row_slope slope_of_top(row_state s, real a_top, int phi, scalar parameter)
{
    log_prob at = row_top(s);
    jet top = loss_phi(phi, at, parameter);
    real_pair one = {r_set(1), r_set(0)};
    row_slope r = {a_top, at.p, -top.d1, one, one};
    if (is_steep(phi, parameter))
        r.top = steep_sum(s);
    if (phi == PHI_poly_loss) {
        real_pair epsilon = {r_set(parameter), r_set(0)}, all = one_plus(r_pair(s.rest, r_set(0)));
        r.share = r_pair_multiply(epsilon, r_pair_divide(one, all));
        real_pair less = r_pair_multiply(epsilon, r_pair_divide(r_pair(s.rest, r_set(0)), all)); /* 1 - p_top for p_top */
        r.top = parameter > 0 ? one_plus(r.share) : r_pair_subtract(r_difference(one.high, -epsilon.high), less);
        r.top = r_pair_multiply(r_pair(a_top, r_set(0)), r.top);
    }
    return r;
}

XCE_FN real scaled_difference(real a, real_pair x, real b, real_pair y) /* a x - b y */
{
    real by = b * y.high, by_low = r_product_low(b, y.high, by);
    real ax = a * x.high, ax_low = r_product_low(a, x.high, ax);
    return (ax - by) + ((ax_low - by_low) + (a * x.low - b * y.low));
}

/* phi of an entry with a coefficient, and v_k; x: its distance from the top one, e: exp of that */
XCE_FN jet relative_phi(row_slope top, log_prob at, real_pair x, real_pair e, real a, int phi, scalar parameter, real *slope)
{
    real_pair one = {r_set(1), r_set(0)};
    if (phi == PHI_generalized_cross_entropy && parameter != 0) { /* -p^q = -p_top^q exp(x)^q */
        real q = r_set(parameter), high = q * x.high, log_power = q * at.u;
        real_pair e_power = e;
        if (parameter != 1)
            e_power = r_exp_pair_near(r_pair(high, r_fma(q, x.low, r_product_low(q, x.high, high)))).exp;
        real power = top.not_d1 * e_power.high;
        real loss = r_select(r_gt(log_power, r_set(-1)), -(log_power + r_exp_bend(log_power)), one.high - power);
        jet f = {loss / q, -power, -q * power};
        *slope = top.not_d1 * scaled_difference(top.a_top, e, a, e_power);
        return f;
    }
    if (is_steep(phi, parameter))
        at = steep_entry(at, x, top.top);
    jet f = loss_phi(phi, at, parameter);
    if (phi == PHI_poly_loss) { /* -1 - epsilon p */
        real with = a * top.share.high, with_low = r_fma(a, top.share.low, r_product_low(a, top.share.high, with));
        real_pair b = r_difference(top.top.high, with);
        *slope = scaled_difference(b.high, e, a, one) + (b.low + (top.top.low - with_low)) * e.high;
    } else if (phi == PHI_generalized_cross_entropy)
        *slope = scaled_difference(top.a_top, e, a, one);
    else /* without the top one's: entries of no coefficient are right relative to themselves */
        *slope = weighted(a, f.d1);
    return f;
}

XCE_FN row_sums relative_terms(row_slope top, log_prob at, real_pair x, real_pair e, real a, int phi, scalar parameter)
{
    real slope;
    jet f = relative_phi(top, at, x, e, a, phi, parameter, &slope);
    row_sums terms = {weighted(a, f.value), weighted(a, f.d1), weighted(a, f.d2), slope};
    return terms;
}

XCE_FN row_sums linear_sums(row_state s, real distances, real weights) /* phi is -u; the sums of d (max - x) and d */
{
    row_sums sum = {distances + weighted(weights, s.log_z), r_set(0) - weights, r_set(0), r_set(0)};
    return sum;
}

/* What the target says of a row. The dense coefficients d_c come from probabilities and smoothing, the index adds `index` to
 * one of them; sums run over all classes but the top one. */
typedef struct {
    real factor;            /* of the derivatives: sample weight over the denominator of the mean */
    real weight;            /* of the value: sample weight */
    real index;             /* coefficient of the labelled class beyond its dense one; 0 without a label */
    real_pair label_entry;  /* of that class */
    rmask label_is_top;
    real d_top, d_label;
    row_sums sum;
    scalar z_loss;
} row_target;

XCE_FN real top_coefficient(real d_top, real index, rmask is_label) { return d_top + r_select(is_label, index, r_set(0)); }

typedef struct {
    real value;
    real b, d;              /* grad_k = f (a_k phi'_k - p_k b), hess_k = f (a_k phi''_k (1 - 2 p_k) + p_k (p_k (b + d) - b)) */
    real far;               /* and what z-loss adds to -b, times XCE_SHRINKING, where that would overflow; else 0 */
    real grad_top, hess_top, grad_label, hess_label;
    real slope;             /* b of the gradient: grad_k = v_k - p_k slope where that is relative */
} row_result;

/* What the entries of a row are written with; inverse: 1 / sum of exp */
typedef struct {
    real factor, b, d, far;
    real exp, hess1, hess2; /* grad_k = e_k exp, hess_k = p_k (p_k hess2 + hess1), to which coefficients add theirs */
} row_factors;

XCE_FN row_factors loss_factors(row_result r, real factor, real inverse)
{
    row_factors f = {factor, r.b, r.d, r.far, (r_set(0) - r.slope) * factor * inverse, (r_set(0) - r.b) * factor,
                     (r.b + r.d) * factor};
    return f;
}

/* Derivatives of an entry: of labels and z-loss; what a coefficient adds in a linear loss; and in others. value: p */
XCE_FN jet entry_derivatives(row_factors f, real inverse, real e)
{
    real p = e * inverse;
    jet at = {p, e * f.exp, p * r_fma(p, f.hess2, f.hess1)};
    return at;
}

XCE_FN real linear_derivative(row_factors f, real grad, real d) { return r_fma(d, r_set(0) - f.factor, grad); }

XCE_FN void relative_derivatives(row_factors f, jet *at, real slope, real d2)
{
    at->d1 = at->d1 + f.factor * slope;
    at->d2 = at->d2 + f.factor * (d2 * ((r_set(1) - at->value) - at->value));
}

/* What z-loss adds to -b: where that would overflow, `far` times 1 / XCE_SHRINKING. */
typedef struct {
    real near, far;
} slope_of_z;

XCE_FN slope_of_z z_slope(row_state s, scalar z_loss)
{
    slope_of_z a = {r_set(0), r_set(0)};
    if (z_loss != 0) {
        real lse = row_lse(s), z = r_set(z_loss);
        rmask is_far = r_gt(z * r_abs(lse), r_set(XCE_FAR_FROM));
        a.near = r_select(is_far, r_set(0), (z + z) * lse);
        a.far = r_select(is_far, (z + z) * r_fma(s.log_z, r_set(XCE_SHRINKING), s.shrunk), r_set(0));
    }
    return a;
}

/* f p far and f p (1 - p) far, without what overflows before they do; where p is 0, so are they */
XCE_FN void add_far(real far, real factor, real p, real not_p, real *grad, real *hess)
{
    real g = weighted(p, far) * factor;
    rmask is_near = r_eq(far, r_set(0));
    *grad = r_select(is_near, *grad, *grad + g * r_set(1 / XCE_SHRINKING));
    *hess = r_select(is_near, *hess, *hess + weighted(not_p, g) * r_set(1 / XCE_SHRINKING));
}

/* In a row that is far logits are equal or apart: exp is that of the top entry, or 0. The factors for that, within the type, so
 * that times 0 they are 0 */
XCE_FN real without_infinity(real a)
{
    const real most = r_set(sizeof(scalar) == 8 ? (scalar)0x1.fffffffffffffp1023 : (scalar)0x1.fffffep127);
    return r_select(r_gt(a, most), most, r_select(r_gt(-most, a), -most, a));
}

XCE_FN void add_far_to_factors(row_factors *f, row_state s)
{
    real p = s.top * s.inverse, g = s.top * f->exp, h = p * r_fma(p, f->hess2, f->hess1);
    add_far(f->far, f->factor, p, r_set(1) - p, &g, &h);
    f->exp = without_infinity(g / s.top), f->hess1 = without_infinity(h / p), f->hess2 = r_set(0);
}

XCE_FN real times_square(real a, real b) /* a b^2, where b^2 alone would underflow, too */
{
    real square = b * b;
    return r_select(r_gt(square, r_set(XCE_SMALLEST)), a * square, (a * b) * b);
}

XCE_PART row_result row_finish(row_state s, row_target t, int phi, scalar parameter)
{
    const real zero = r_set(0);
    log_prob at_top = row_top(s), at_label = row_entry(s, t.label_entry);
    if (is_steep(phi, parameter))
        at_top = steep_top(s), at_label = steep_entry(at_label, t.label_entry, steep_sum(s));
    jet top = loss_phi(phi, at_top, parameter), label = loss_phi(phi, at_label, parameter);
    real a_top = top_coefficient(t.d_top, t.index, t.label_is_top);
    real index = r_select(t.label_is_top, zero, t.index); /* what is left for a label elsewhere */

    row_result r;
    r.value = t.sum.value + weighted(a_top, top.value) + weighted(index, label.value);
    slope_of_z z = z_slope(s, t.z_loss);
    r.far = z.far;
    if (t.z_loss != 0) {
        real lse = row_lse(s);
        r.value = r.value + r_set(t.z_loss) * lse * lse;
    }
    r.value = weighted(t.weight, r.value);
    real sick = s.log_z + t.index; /* a row with NaN, or with a bad label, is NaN whatever weighs it */
    r.value = r_select(r_eq(sick, sick), r.value, sick);
    /* a_top phi' is kept out of b for the top entry itself: p - 1 would cancel there */
    real b_others = t.sum.d1 + weighted(index, label.d1) - z.near;
    r.b = b_others + weighted(a_top, top.d1);
    real d_others = t.sum.d2 + weighted(index, label.d2) + r_set(t.z_loss + t.z_loss);
    r.d = d_others + weighted(a_top, top.d2);
    r.grad_top = t.factor * (weighted(a_top, top.d1) * at_top.not_p - at_top.p * b_others);
    r.hess_top = t.factor * (times_square(weighted(a_top, top.d2), at_top.not_p)
                             + at_top.p * (at_top.p * d_others - at_top.not_p * r.b));
    r.slope = r.b;
    real a_label = t.d_label + index, curved = r_fma(at_label.p, r.b + r.d, -r.b);
    r.grad_label = t.factor * (weighted(a_label, label.d1) - at_label.p * r.b);
    r.hess_label = t.factor * (weighted(a_label, label.d2) * (at_label.not_p - at_label.p) + at_label.p * curved);
    if (t.z_loss != 0) {
        add_far(r.far, t.factor, at_top.p, at_top.not_p, &r.grad_top, &r.hess_top);
        add_far(r.far, t.factor, at_label.p, at_label.not_p, &r.grad_label, &r.hess_label);
    }
    return r;
}

/* The gradient from slopes instead */
XCE_PART void relative_finish(row_result *r, row_state s, row_target t, row_slope slope, int phi, scalar parameter)
{
    if (phi != PHI_poly_loss && phi != PHI_generalized_cross_entropy)
        return;
    log_prob at = row_entry(s, t.label_entry);
    real index = r_select(t.label_is_top, r_set(0), t.index), v;
    jet label = relative_phi(slope, at, t.label_entry, r_exp_pair_near(t.label_entry).exp, t.d_label + index, phi,
                             parameter, &v);
    r->slope = (t.sum.extra + weighted(index, label.d1)) - z_slope(s, t.z_loss).near;
    r->grad_top = t.factor * (slope.p * (r_set(0) - r->slope));
    r->grad_label = t.factor * (v - at.p * r->slope);
    if (t.z_loss != 0) {
        real unused = r_set(0);
        add_far(r->far, t.factor, slope.p, unused, &r->grad_top, &unused);
        add_far(r->far, t.factor, at.p, unused, &r->grad_label, &unused);
    }
}

/* ---- a row and its teacher's ------------------------------------------------------------------------------------------ */

/* Of a class of student and teacher: the distances from the greatest of each, and the first less the second */
typedef struct {
    real_pair x, y, gap;
} distance_pair;

XCE_FN real_pair distance_gap(real_pair x, real_pair y) /* x - y */
{
    real_pair gap = r_difference(x.high, y.high);
    return r_pair(gap.high, gap.low + (x.low - y.low));
}

XCE_FN prob_pair match_gap(row_match row, real x_exp, real y_exp, real_pair gap)
{
    real_pair d = r_difference(gap.high, row.apart);
    d = r_pair_of(d.high, d.low + gap.low);
    prob_pair at = {x_exp * row.inverse, y_exp * row.teacher_inverse, d.high, r_rounded_difference(gap, row.gap), d.low};
    return at;
}

XCE_FN prob_pair match_entry(row_match row, distance_pair at)
{
    const exp_reference ref = r_exp_reference(r_set(0));
    return match_gap(row, r_exp_relative_pair(at.x, ref), r_exp_relative_pair(at.y, ref), at.gap);
}

XCE_FN prob_pair match_top(row_match row, real_pair y) /* at the student's top class; y: the teacher's distance there */
{
    const real_pair zero = {r_set(0), r_set(0)};
    distance_pair at = {zero, y, distance_gap(zero, y)};
    return match_entry(row, at);
}

/* `excess`: the sum of exp of the student's distances less that of the teacher's, over all classes; y: the teacher's distance at
 * the student's top class */
XCE_PART row_match match_rows(row_state student, row_state teacher, real excess, real_pair y)
{
    row_match row;
    row.inverse = student.inverse, row.teacher_inverse = teacher.inverse;
    real ratio = excess * teacher.inverse;
    row.apart = r_select(r_gt(r_set((scalar)0.5), r_abs(ratio)), r_log1p(ratio, r_set(0)),
                         r_log((student.top + student.rest) * teacher.inverse));
    row.gap = r_pair(-y.high, -y.low);
    row.top_share = row.top_softplus = r_set(0);
    prob_pair at = match_top(row, y);
    row.top_share = at.t / (at.p + at.t);
    row.top_softplus = log1p_exp_minus(at.d, at.d_low);
    return row;
}

XCE_FN row_sums match_terms(real p, jet f)
{
    row_sums terms = {f.value, weighted(p, f.d1), weighted(p, f.d2), r_set(0)};
    return terms;
}

XCE_FN scalar value_outside(int divergence) /* of a class that a sparse teacher does not have, in units of p */
{
    return divergence == DIVERGENCE_forward ? 1 : (scalar)0.34657359027997265471; /* log(2) / 2; reverse would be infinite */
}

XCE_FN scalar divergence_scale(int divergence) { return divergence == DIVERGENCE_js ? (scalar)0.5 : 1; }

/* Gradient and Hessian diagonal of a class but the top one, from its divergence_term; b and d are the sums of p d1 and p d2, b
 * 0 or NaN where neither counts. */
XCE_PART jet match_derivatives(int divergence, jet f, real p, row_factors row)
{
    const real not_p = r_set(1) - p, factor = row.factor, b = row.b, d = row.d;
    if (divergence == DIVERGENCE_forward) {
        f.d1 = factor * (f.d1 + b);
        f.d2 = factor * (p * not_p + b);
        return f;
    }
    real e = f.d1 - b, scale = factor * r_set(divergence_scale(divergence));
    if (divergence == DIVERGENCE_reverse) /* infinite, from the classes that the teacher does not have */
        e = r_select(r_eq(b, r_set(XCE_INF)), r_select(r_eq(f.d1, b), b, -b), e);
    rmask usual = r_eq(b, b); /* in a row of NaN p = 0 removes nothing */
    f.d2 = r_select(usual, scale * weighted(p, weighted(not_p - p, e + f.d2) + p * d), b);
    f.d1 = r_select(usual, scale * weighted(p, e), b);
    return f;
}

/* The same for classes that a sparse teacher does not have */
XCE_FN row_factors match_factors(int divergence, row_match row, row_result r, real factor)
{
    real at_p = factor + r.b, curved = -factor; /* grad = p at_p */
    if (divergence != DIVERGENCE_forward) {
        real e = row.top_softplus - r.b, scale = factor * r_set(divergence_scale(divergence));
        at_p = scale * e, curved = scale * (r.d - (e + e));
    }
    row_factors f = {factor, r.b, r.d, r.far, at_p * row.inverse, at_p, curved};
    return f;
}

XCE_PART row_result match_finish(row_state student, row_match row, row_sums sums, real_pair y, real weight, real factor,
                                 int divergence)
{
    prob_pair at = match_top(row, y);
    log_prob top = row_top(student);
    jet f = divergence_term(divergence, at, row);
    row_result r;
    r.value = (sums.value + r_set(value_outside(divergence)) * sums.extra) + f.value;
    r.b = divergence == DIVERGENCE_forward ? r_set(0) : sums.d1 + weighted(sums.extra, row.top_softplus);
    real sick = student.log_z + (row.teacher_inverse - row.teacher_inverse); /* NaN rows are NaN whatever weighs them */
    r.b = r_select(r_eq(sick, sick), r.b, sick);
    if (divergence == DIVERGENCE_reverse)
        r.b = r_select(r_eq(r.value, r_set(XCE_INF)), r.value + (sick - sick), r.b);
    real others = sums.d2, e = -r.b, scale = factor * r_set(divergence_scale(divergence));
    r.d = others + at.p * f.d2;
    if (divergence == DIVERGENCE_forward) {
        r.grad_top = factor * (f.d1 + r.b);
        r.hess_top = factor * (top.p * top.not_p + r.b);
    } else {
        e = r_select(r_eq(at.d, r.b), r.b, e);
        r.grad_top = scale * weighted(top.p, e);
        r.hess_top = scale * top.p
                     * (weighted(top.not_p - top.p, e) + (top.not_p * top.not_p * f.d2 + top.p * others));
        r.hess_top = r_select(r_eq(sick, sick), r.hess_top, sick); /* also where p is 1 / 2 */
    }
    r.value = r_select(r_eq(sick, sick), weighted(weight, r.value), sick);
    r.slope = r.b, r.grad_label = r.hess_label = r.far = r_set(0);
    return r;
}

/* ---- what is done to a logit before the softmax ----------------------------------------------------------------------- */

/* f(x) = softcap tanh(x / softcap) / temperature. Rows are computed from the distances f(x) - f(max), in two parts, so that
 * neither an offset nor a small temperature costs digits; f itself is needed for logsumexp alone. */
typedef struct {
    scalar high, low; /* 0.7 is a number that float32 does not have */
} scalar_pair;

typedef struct {
    scalar_pair softcap, temperature; /* softcap 0: none */
    int is_moderate;    /* whether dividing by them is multiplying by their reciprocals: neither is near the ends of the type */
    scalar share, slope; /* the logits' share in differences, which are then within the type; 1 / temperature */
} logit_transform;

XCE_FN scalar_pair split_number(double a)
{
    scalar_pair b = {(scalar)a, (scalar)(a - (double)(scalar)a)};
    return b;
}

XCE_FN logit_transform transform_of(double softcap, double temperature)
{
    const double limit = sizeof(scalar) == 8 ? 0x1p500 : 0x1p60;
    logit_transform t = {split_number(softcap), split_number(temperature), 0, temperature > 1 ? (scalar)0.5 : 1, 0};
    t.is_moderate = temperature < limit && temperature * limit > 1 && softcap < limit && (softcap == 0 || softcap * limit > 1);
    t.slope = t.is_moderate ? (scalar)1 / t.temperature.high : 0;
    return t;
}

/* The greatest logit of a row, from which distances are measured, and with b = |max / softcap| what they have in common */
typedef struct {
    real max, share_of_max;
    real_pair by_temperature, by_softcap; /* 1 / (share temperature), 1 / softcap */
    real_pair decay; /* exp(-2 b) */
    real_pair scale; /* softcap / (1 + exp(-2 b)) */
} logit_origin;

XCE_FN int is_one(scalar_pair a) { return a.high == 1 && a.low == 0; }

XCE_FN real_pair pair_of(scalar_pair a) { return r_pair(r_set(a.high), r_set(a.low)); }

XCE_FN real_pair divided_by(real_pair a, scalar_pair by)
{
    real_pair b = pair_of(by);
    if (is_one(by))
        return a;
    real inverse = r_set(1 / by.high), high = a.high / b.high, back = high * b.high;
    real low = (((a.high - back) - r_product_low(high, b.high, back)) + (a.low - high * b.low)) * inverse;
    return r_pair(high, r_select(r_gt(r_set(XCE_INF), r_abs(low)), low, r_set(0)));
}

XCE_FN real_pair minus_twice_abs(real_pair a)
{
    return r_pair(r_set(-2) * r_abs(a.high), r_select(r_gt(a.high, r_set(0)), r_set(-2) * a.low, r_set(2) * a.low));
}

XCE_PART logit_origin transform_origin(logit_transform t, real max)
{
    const real_pair zero = {r_set(0), r_set(0)}, one = {r_set(1), r_set(0)};
    logit_origin o = {max, r_set(t.share) * max, zero, zero, zero, zero};
    if (t.is_moderate)
        o.by_temperature = r_pair_divide(one, r_scaled(r_set(t.share), pair_of(t.temperature)));
    if (t.softcap.high != 0) {
        if (t.is_moderate)
            o.by_softcap = r_pair_divide(one, pair_of(t.softcap));
        o.decay = r_exp_pair(minus_twice_abs(divided_by(r_pair(max, r_set(0)), t.softcap))).exp;
        o.scale = r_pair_divide(pair_of(t.softcap), one_plus(o.decay));
    }
    return o;
}

XCE_FN real_pair times_reciprocal(real_pair a, real_pair b)
{
    real high = a.high * b.high, low = r_product_low(a.high, b.high, high) + r_fma(a.high, b.low, a.low * b.high);
    return r_pair(high, r_select(r_gt(r_set(XCE_INF), r_abs(low)), low, r_set(0)));
}

/* x - max, exactly, times the share */
XCE_FN real_pair raw_distance(logit_transform t, logit_origin o, real x)
{
    return r_difference(r_set(t.share) * x, o.share_of_max);
}

XCE_FN real_pair raw_over_temperature(logit_transform t, logit_origin o, real_pair a) /* a: a difference times the share */
{
    if (t.is_moderate)
        return times_reciprocal(a, o.by_temperature);
    return r_scaled(r_set(1 / t.share), divided_by(a, t.temperature));
}

XCE_FN real_pair distance_by_temperature(logit_transform t, logit_origin o, real x) /* x - max over the temperature */
{
    real_pair d = raw_distance(t, o, x);
    return is_one(t.temperature) ? d : raw_over_temperature(t, o, d);
}

/* Student and teacher at a class. The gap is formed before it is divided: it may be smaller than what quotients round away. */
XCE_FN distance_pair distances_of_pair(logit_transform t, logit_origin student, logit_origin teacher, real x, real y)
{
    real_pair a = raw_distance(t, student, x), b = raw_distance(t, teacher, y), gap = distance_gap(a, b);
    distance_pair d = {a, b, gap};
    if (!is_one(t.temperature)) {
        d.x = raw_over_temperature(t, student, a), d.y = raw_over_temperature(t, student, b);
        d.gap = raw_over_temperature(t, student, r_pair_of(gap.high, gap.low));
    }
    return d;
}

/* With a = x / softcap and b = max / softcap, tanh a - tanh b is
 *     2 expm1(2 (a - b)) k / ((1 + exp(-2 |a|)) (1 + exp(-2 |b|))),
 * k = exp(-2 min(|a|, |b|)) if both have one sign, and 1 if not: a product, in which nothing cancels. */
XCE_PART real_pair distance_by_softcap(logit_transform t, logit_origin o, real x)
{
    const real zero = r_set(0), one = r_set(1);
    real_pair a = r_pair(x, zero), apart = r_difference(x, o.max);
    a = t.is_moderate ? times_reciprocal(a, o.by_softcap) : divided_by(a, t.softcap);
    apart = t.is_moderate ? times_reciprocal(apart, o.by_softcap) : divided_by(apart, t.softcap);
    real_pair decay = r_exp_pair_near(minus_twice_abs(a)).exp;
    real_pair factor = r_exp_pair_near(r_scaled(r_set(2), apart)).expm1;
    rmask above = r_gt(x, zero), below = r_gt(zero, o.max);
    real_pair k = {r_select(above, decay.high, r_select(below, o.decay.high, one)),
                   r_select(above, decay.low, r_select(below, o.decay.low, zero))};
    factor = r_pair_multiply(r_pair_multiply(r_scaled(r_set(2), factor), k), o.scale);
    real_pair d = r_pair_divide(factor, one_plus(decay));
    if (!is_one(t.temperature))
        d = t.is_moderate ? r_scaled(r_set(t.share), times_reciprocal(d, o.by_temperature)) : divided_by(d, t.temperature);
    /* infinities stay */
    rmask infinite = r_eq(r_max(r_abs(x), r_abs(o.max)), r_set(XCE_INF));
    return r_pair(r_select(infinite, x - o.max, d.high), r_select(infinite, zero, d.low));
}

XCE_PART real transform_logit(logit_transform t, real x) /* f(x); infinities stay */
{
    if (t.softcap.high == 0)
        return total_of(divided_by(r_pair(x, r_set(0)), t.temperature));
    exp_pair e = r_exp_pair(minus_twice_abs(divided_by(r_pair(x, r_set(0)), t.softcap)));
    real_pair y = r_pair_multiply(pair_of(t.softcap), r_pair_divide(e.expm1, one_plus(e.exp)));
    real f = total_of(divided_by(y, t.temperature)); /* -f(|x|) */
    return r_select(r_eq(r_abs(x), r_set(XCE_INF)), x, r_select(r_gt(x, r_set(0)), -f, f));
}

/* A row of transformed logits: its greatest one, and the sum of exp of the other distances */
XCE_FN row_state row_close_transformed(logit_transform t, real max, real rest)
{
    row_state s = row_close(max - max, rest); /* NaN of infinities */
    s.greatest = transform_logit(t, max);
    s.shrunk = t.softcap.high == 0 ? max * r_set(XCE_SHRINKING) / r_set(t.temperature.high) : s.greatest * r_set(XCE_SHRINKING);
    return s;
}

XCE_FN real over_temperature(logit_transform t, real a) /* whose reciprocal may be infinite */
{
    return t.is_moderate ? a * r_set(t.slope) : a / r_set(t.temperature.high);
}

/* Derivatives with respect to the raw logit, of a loss whose derivatives by the transformed one are g and h; h may be NULL */
XCE_PART void transform_derivatives(logit_transform t, real x, real *g, real *h)
{
    real first = *g, second = h ? *h : first;
    if (t.softcap.high != 0) {
        real_pair y = divided_by(r_pair(x, r_set(0)), t.softcap);
        real sech = r_sech(y), d1 = sech * sech, bend = r_set(-2) * r_tanh(y.high);
        real slope = over_temperature(t, sech) * sech; /* a temperature may lift a subnormal sech^2 back into the type */
        rmask is_subnormal = r_gt(r_set(XCE_SMALLEST), d1);
        if (h) {
            real usual = over_temperature(t, second * d1 * d1) + first * (bend * d1 / r_set(t.softcap.high));
            real small = second * slope * slope + first * (bend * slope / r_set(t.softcap.high));
            *h = r_select(is_subnormal, small, over_temperature(t, usual));
        }
        *g = r_select(is_subnormal, first * slope, over_temperature(t, first * d1));
        return;
    }
    if (h)
        *h = over_temperature(t, over_temperature(t, second));
    *g = over_temperature(t, first);
}

/* The same of the entries that `row_finish` or `match_finish` found, at the top class and the label's */
XCE_PART void transform_result(logit_transform t, row_result *r, real raw_top, real raw_label)
{
    transform_derivatives(t, raw_top, &r->grad_top, &r->hess_top);
    transform_derivatives(t, raw_label, &r->grad_label, &r->hess_label);
}

#endif
