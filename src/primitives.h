/* The number types of the kernels and their elementary functions: the only file that knows one processor from another.
 *
 * Which processor it is, this file alone asks; what differs is in cpu/vectors.h, cpu/memory.h and cuda/threads.h. A kernel is
 * compiled once for each storage type, chosen by -DXCE_STORAGE_<float32|float64|float16|bfloat16>:
 *     storage   what lies in memory
 *     scalar    what is computed with: double for float64, float for the others
 *     real      what one instruction works on: LANES scalars on a CPU, one in a CUDA thread; arithmetic operators apply
 *     rmask     the answer of a comparison of two reals, for r_select
 *
 * exp, log, pow, expm1 and tanh are built from +, *, fma and bit operations only, so every processor with fma gives the same
 * bits (compile with -ffp-contract=off). x86-64-v2 has no fma: it multiplies and adds, and has bits of its own.
 * The polynomials come from coefficients.py.
 */
#ifndef XCE_PRIMITIVES_H
#define XCE_PRIMITIVES_H

#if defined(XCE_CUDA)
#include "cuda/threads.h"
#else
#include "cpu/memory.h"
#endif

/* ---- elementary functions ---------------------------------------------------------------------------------------- */

#if defined(XCE_STORAGE_float64)
#define XCE_LN2_HIGH 0x1.62e42fefa2p-1 /* 40 bits: n * LN2_HIGH is exact */
#define XCE_LN2_LOW 7.3710025651677989018e-13
#define XCE_LOG2E 1.4426950408889634074
#define XCE_MAGIC 0x1.8p52 /* adding it rounds to an integer, which the low bits then hold */
#define XCE_BIAS 1023
#define XCE_MANTISSA 52
#define XCE_SMALLEST 0x1p-1022
#define XCE_TWO_TO_MANTISSA 0x1p52
#define XCE_SHIFT_FROM 2048.0
#define XCE_EXP_DEGREE 9
XCE_TABLE scalar EXP_TAIL[] = {
    0.50000000000000109322,    0.16666666666666405083,    0.041666666666527011553,  0.008333333333498232644,
    0.0013888888944577336577,  0.00019841269500706271639, 0.000024801492012689106064, 2.7557589503671579525e-6,
    2.7630668454594725926e-7,  2.4999751073767187189e-8};
#define XCE_EXP_SERIES_DEGREE 11
#define XCE_BEND_DEGREE 13
XCE_TABLE scalar EXP_BEND[] = { /* for x up to 1 */
    0.5000000000000000058,     0.16666666666666664564,    0.041666666666666092909,   0.0083333333333338981502,
    0.0013888888888981222579,  0.0001984126984084579958,  0.000024801587246024407395, 2.7557319354965950997e-6,
    2.7557335111832519088e-7,  2.5052090530358783647e-8,  2.0874429195111359256e-9,  1.6059843526879795126e-10,
    1.1639492153746739875e-11, 7.6799175496002370167e-13};
#define XCE_COSH_DEGREE 10
XCE_TABLE scalar COSH_TAIL[] = {
    0.2499999999999999987,     -0.031249999999999686284,  0.0034722222222097051215, -0.00036892361091592214667,
    0.000038442458752764929476, -3.9670984071903368347e-6, 4.0714976779979348196e-7, -4.1610841035615681788e-8,
    4.2010092196032907311e-9,  -3.9379642951223083952e-10, 2.5675485401782566396e-11};
#define XCE_LOG_DEGREE 6
XCE_TABLE scalar LOG_TAIL[] = {
    0.66666666666667373634, 0.39999999999392841418, 0.28571428747702217561, 0.22222197984385658572,
    0.18183597036736136522, 0.1531316276316602276,  0.14805315867207625241};
#else
#define XCE_LN2_HIGH 0x1.62ep-1f
#define XCE_LN2_LOW 0.000031946184945309417232f
#define XCE_LOG2E 1.4426950408889634074f
#define XCE_LOG2E_LOW 1.9259629911266174e-8f /* what it lacks */
#define XCE_MAGIC 0x1.8p23f
#define XCE_BIAS 127
#define XCE_MANTISSA 23
#define XCE_SMALLEST 0x1p-126f
#define XCE_TWO_TO_MANTISSA 0x1p23f
#if defined(XCE_CUDA) && defined(XCE_SHORT) /* a difference of 16-bit numbers has no low bits to lose */
#define XCE_SHIFT_FROM 0.0f
#else
#define XCE_SHIFT_FROM 256.0f
#endif
#define XCE_EXP_DEGREE 4
XCE_TABLE scalar EXP_TAIL[] = {
    0.49999993333493562724f, 0.16666518938611104423f, 0.041668407972857895843f, 0.0083689217933171346901f,
    0.0013814174161023442303f};
#define XCE_EXP_SERIES_DEGREE 5
#define XCE_BEND_DEGREE 7
XCE_TABLE scalar EXP_BEND[] = { /* for x up to 1 */
    0.49999999787740360802f,  0.16666667018376608078f,    0.041666735765316956481f,    0.0083333098565403251844f,
    0.001388541060599270192f, 0.00019844057056484049946f, 0.000025358166211658599105f, 2.7723819226489061925e-6f};
#define XCE_COSH_DEGREE 4
XCE_TABLE scalar COSH_TAIL[] = {
    0.24999999379746365456f, -0.031249691380116794946f, 0.0034697404239098961913f, -0.00036184160218996349706f,
    0.000029946802397700659675f};
#define XCE_LOG_DEGREE 3
XCE_TABLE scalar LOG_TAIL[] = {
    0.66666665620246897075f, 0.40000341402247163645f, 0.28536885488651404605f, 0.23590670679906557904f};
XCE_TABLE scalar LOG_UNIT_TAIL[] = { /* for s up to 1/3 */
    0.6666667576654697879f, 0.39998863096041175823f, 0.28617337214225155509f, 0.21422231851459182489f,
    0.24323104715978038887f};
#endif

XCE_TABLE scalar EXP_SERIES[] = { /* 1 / 3!, 1 / 4!, ... */
    (scalar)0.16666666666666666667,     (scalar)0.041666666666666666667,    (scalar)0.0083333333333333333333,
    (scalar)0.0013888888888888888889,   (scalar)0.00019841269841269841270,  (scalar)2.4801587301587301587e-5,
    (scalar)2.7557319223985890653e-6,   (scalar)2.7557319223985890653e-7,   (scalar)2.5052108385441718775e-8,
    (scalar)2.0876756987868098979e-9,   (scalar)1.6059043836821614599e-10,  (scalar)1.1470745597729724714e-11};

XCE_FN real r_horner(const scalar *coefficients, int degree, real x)
{
    real sum = r_constant(coefficients[degree]);
    for (int i = degree - 1; i >= 0; i--)
        sum = r_fma(sum, x, r_constant(coefficients[i]));
    return sum;
}

/* exp(x - max), relative to a power of two near it.
 *
 * Subtracting max first would round away the low bits of x and cost |x - max| / 2 ulp. Instead exp(x) 2^-N is formed, with
 * N = round(max / ln 2): the integer drops out of the range reduction for nothing. Only where |max| >= SHIFT_FROM is max
 * subtracted before; there every x that matters (within a factor 2 of max) subtracts exactly.
 * The results are exp(x - max) times one number in [0.7, 1.42] a row, which cancels in every quotient. */
typedef struct {
    real shift; /* subtracted from x, exactly */
    real low;   /* x - shift is kept above it; at `low` the result is exactly 0 */
    real magic; /* rounds to integers and holds -N and the exponent's bias */
} exp_reference;

XCE_FN exp_reference r_exp_reference(real max)
{
    exp_reference ref;
    ref.shift = r_select(r_gt(r_set(XCE_SHIFT_FROM), r_abs(max)), r_set(0), max);
    real n = r_fma(max - ref.shift, r_set(XCE_LOG2E), r_set(XCE_MAGIC)) - r_set(XCE_MAGIC);
    ref.low = (n - r_set(XCE_BIAS)) * r_set((scalar)0.69314718055994530942);
    ref.magic = r_set(XCE_MAGIC + XCE_BIAS) - n;
    return ref;
}

XCE_FN real r_exp_relative_tail(real x, exp_reference ref, real *low) /* what the result rounds away, too */
{
    real y = r_max(ref.low, x - ref.shift); /* NaN passes: it is the second operand */
    real t = r_fma(y, r_constant(XCE_LOG2E), ref.magic);
    real n = t - ref.magic;
    real r = r_fma(n, r_constant(-XCE_LN2_LOW), r_fma(n, r_constant(-XCE_LN2_HIGH), y));
    real tail = r_horner(EXP_TAIL, XCE_EXP_DEGREE, r);
    real one = r_constant(1), p = r_fma(r_fma(tail, r, one), r, one);
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA); /* 2^(n - N); 0 at the lower end */
    *low = (r_fma(tail, r * r, r) + (one - p)) * power;
    return p * power;
}

XCE_FN real r_exp_relative(real x, exp_reference ref)
{
#if defined(XCE_CUDA) && !defined(XCE_STORAGE_float64) /* where an instruction has 2^r for small r */
#if defined(XCE_SHORT)
    return exp2_unit((x - ref.shift) * XCE_LOG2E);
#else
    real y = max_or_nan(x - ref.shift, ref.low), t = r_fma(y, XCE_LOG2E, ref.magic), n = t - ref.magic;
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA);
    return exp2_unit(r_fma(y, XCE_LOG2E_LOW, r_fma(y, XCE_LOG2E, -n))) * power;
#endif
#else
    real unused;
    return r_exp_relative_tail(x, ref, &unused);
#endif
}

/* ---- numbers in two parts ------------------------------------------------------------------------------------------ */

/* high + low, low below the last place of high: what a difference, quotient or product rounds away, kept. */
typedef struct {
    real high, low;
} real_pair;

XCE_FN real_pair r_pair(real high, real low)
{
    real_pair a = {high, low};
    return a;
}

XCE_FN real total_of(real_pair a) { return a.high + a.low; }

XCE_FN real_pair r_pair_of(real high, real low) /* their sum; low is the smaller one. Infinities have no low part */
{
    real sum = high + low;
    return r_pair(sum, r_select(r_gt(r_set(XCE_INF), r_abs(sum)), low - (sum - high), r_set(0)));
}

XCE_FN real_pair r_difference(real a, real b) /* a - b, exactly */
{
    real high = a - b, c = high - a; /* infinite if high is, and rounded up from the greatest number */
    return r_pair(high, r_select(r_gt(r_set(XCE_INF), r_abs(c)), (a - (high - c)) - (b + c), r_set(0)));
}

XCE_FN real r_rounded_difference(real_pair a, real_pair b)
{
    real_pair d = r_difference(a.high, b.high);
    return d.high + (d.low + (a.low - b.low));
}

XCE_FN real_pair r_pair_subtract(real_pair a, real_pair b)
{
    real_pair d = r_difference(a.high, b.high);
    return r_pair_of(d.high, d.low + (a.low - b.low));
}

XCE_FN real_pair one_plus(real_pair a)
{
    real_pair b = r_difference(r_set(1), -a.high);
    return r_pair_of(b.high, b.low + a.low);
}

XCE_FN real_pair r_pair_multiply(real_pair a, real_pair b)
{
    real high = a.high * b.high;
    return r_pair_of(high, r_product_low(a.high, b.high, high) + (a.high * b.low + a.low * b.high));
}

XCE_FN real_pair r_pair_divide(real_pair a, real_pair b) /* the high part is right for infinities and zeros, too */
{
    real high = a.high / b.high, back = high * b.high;
    real low = (((a.high - back) - r_product_low(high, b.high, back)) + (a.low - high * b.low)) / b.high;
    return r_pair(high, r_select(r_gt(r_set(XCE_INF), r_abs(low)), low, r_set(0)));
}

XCE_FN real_pair r_scaled(real factor, real_pair a) /* by a power of two */
{
    return r_pair(factor * a.high, factor * a.low);
}

/* exp(x - max) of a number in two parts, as r_exp_relative has it of one */
XCE_FN real r_exp_relative_pair(real_pair x, exp_reference ref)
{
#if defined(XCE_CUDA) && !defined(XCE_STORAGE_float64)
#if defined(XCE_SHORT)
    real y = x.high - ref.shift;
    return exp2_unit(r_fma(r_gt(y, r_set(-XCE_BIAS)) ? x.low : 0, XCE_LOG2E, y * XCE_LOG2E));
#else
    real y = max_or_nan(x.high - ref.shift, ref.low), t = r_fma(y, XCE_LOG2E, ref.magic), n = t - ref.magic;
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA);
    real fraction = r_fma(y, XCE_LOG2E_LOW, r_fma(y, XCE_LOG2E, -n));
    return exp2_unit(r_fma(y > ref.low ? x.low : 0, XCE_LOG2E, fraction)) * power;
#endif
#else
    real y = r_max(ref.low, x.high - ref.shift);
    real t = r_fma(y, r_constant(XCE_LOG2E), ref.magic);
    real n = t - ref.magic;
    real r = r_fma(n, r_constant(-XCE_LN2_LOW), r_fma(n, r_constant(-XCE_LN2_HIGH), y));
    r = r + r_select(r_gt(y, ref.low), x.low, r_set(0)); /* at the lower end it may be anything */
    real tail = r_horner(EXP_TAIL, XCE_EXP_DEGREE, r), one = r_constant(1);
    return r_fma(r_fma(tail, r, one), r, one) * r_from_bits(r_bits(t) << XCE_MANTISSA);
#endif
}

/* exp(x) and exp(x) - 1 for x <= 0 in two parts, with an error of 0.05 ulp: Taylor's series, whose terms up to the square are in
 * two parts, too. Below the smallest normal number exp is 0. */
typedef struct {
    real_pair exp, expm1;
} exp_pair;

XCE_PART exp_pair r_exp_pair(real_pair x)
{
    const real one = r_set(1), zero = r_set(0), half = r_set((scalar)0.5);
    const real lowest = r_set((1 - XCE_BIAS) * (scalar)0.69314718055994530942);
    real y = r_max(lowest, x.high); /* NaN passes */
    real t = r_fma(y, r_set(XCE_LOG2E), r_set(XCE_MAGIC + XCE_BIAS)), n = t - r_set(XCE_MAGIC + XCE_BIAS);
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA);
    real shift = n * r_set(XCE_LN2_LOW);
    real_pair r = r_difference(r_fma(n, r_set(-XCE_LN2_HIGH), y), shift);
    rmask normal = r_not(r_gt(lowest, x.high));
    r.low = (r.low - r_product_low(n, r_set(XCE_LN2_LOW), shift)) + r_select(normal, x.low, zero);
    real square = r.high * r.high, square_low = r_product_low(r.high, r.high, square) + (r.high + r.high) * r.low;
    real cubic = r_horner(EXP_SERIES, XCE_EXP_SERIES_DEGREE, r.high) * (r.high * square);
    real_pair q = r_pair_of(r.high, half * square); /* exp(r) - 1 */
    q = r_pair_of(q.high, q.low + (cubic + (r.low + half * square_low)));
    real_pair e = r_pair_of(one, q.high);
    e = r_scaled(power, r_pair_of(e.high, e.low + q.low));
    real_pair m = r_pair_subtract(r_difference(power, one), r_scaled(-power, q));
    exp_pair result = {{r_select(normal, e.high, zero), r_select(normal, e.low, zero)},
                       {r_select(normal, m.high, -one), r_select(normal, m.low, zero)}};
    return result;
}

/* The same with an error of a third of an ulp (of exp - 1, too, however small), which the terms from the square on have */
XCE_FN exp_pair r_exp_pair_near(real_pair x)
{
    const real one = r_set(1), zero = r_set(0), magic = r_set(XCE_MAGIC + XCE_BIAS);
    const real lowest = r_set((1 - XCE_BIAS) * (scalar)0.69314718055994530942);
    real y = r_max(lowest, x.high); /* NaN passes */
    real t = r_fma(y, r_set(XCE_LOG2E), magic), n = t - magic;
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA), exact = r_fma(n, r_set(-XCE_LN2_HIGH), y);
    real r = r_fma(n, r_set(-XCE_LN2_LOW), exact);
    rmask normal = r_not(r_gt(lowest, x.high));
    real r_low = r_fma(n, r_set(-XCE_LN2_LOW), exact - r) + r_select(normal, x.low, zero);
    real square = r_horner(EXP_TAIL, XCE_EXP_DEGREE, r) * (r * r), q = r + square; /* exp(r) - 1 */
    real q_low = ((r - q) + square) + r_fma(r_low, q, r_low), e = one + q;
    real less = power - one, m = less + power * q, lost = power - (less + one);
    real e_low = ((one - e) + q) + q_low, rounded = e + e_low; /* e_low has all of x.low, which may be many ulp */
    exp_pair result = {{r_select(normal, power * rounded, zero), r_select(normal, power * (e_low - (rounded - e)), zero)},
                       {r_select(normal, m, -one), r_select(normal, ((less - m) + power * q) + (lost + power * q_low), zero)}};
    return result;
}

/* exp(x) 2^-n for integers n: results below the smallest normal number are 0, x must be below (n + 127) ln 2 (1023) */
XCE_FN real r_exp_scaled(real x, real n, real *low)
{
    exp_reference ref = {r_set(0), (n - r_set(XCE_BIAS)) * r_set((scalar)0.69314718055994530942),
                         r_set(XCE_MAGIC + XCE_BIAS) - n};
    return r_exp_relative_tail(x, ref, low);
}

XCE_FN real r_exp(real x) /* for x <= 80 (700 in float64), as logarithms of probabilities are */
{
    real unused;
    return r_exp_scaled(x, r_set(0), &unused);
}

XCE_FN real r_exp_any(real x) /* to the largest x, and infinity beyond */
{
    real unused, beyond = r_set((XCE_BIAS + (scalar)1.25) * (scalar)0.69314718055994530942);
    return r_set(2) * r_exp_scaled(r_select(r_gt(x, beyond), beyond, x), r_set(1), &unused);
}

XCE_FN real r_expm1(real x) /* exp(x) - 1 for x <= 80 (700) */
{
    x = r_max(r_set(-40), x);
    real t = r_fma(x, r_set(XCE_LOG2E), r_set(XCE_MAGIC + XCE_BIAS));
    real n = t - r_set(XCE_MAGIC + XCE_BIAS);
    real r = r_fma(n, r_set(-XCE_LN2_LOW), r_fma(n, r_set(-XCE_LN2_HIGH), x));
    real square = r_horner(EXP_TAIL, XCE_EXP_DEGREE, r) * (r * r); /* exp(r) - 1 - r */
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA);
    return r_fma(power, square + r, power - r_set(1));
}

/* exp(x) - 1 - x for -1 <= x <= 1 */
XCE_FN real r_exp_bend(real x) { return r_horner(EXP_BEND, XCE_BEND_DEGREE, x) * (x * x); }

/* log(z + c) for a normal number z > 0 that is z + c rounded: k ln 2 + m, |m| <= ln(2) / 2 */
typedef struct {
    real k, m, f, correction; /* m = f - correction */
} log_parts;

XCE_FN log_parts r_log_split(real z, real c)
{
    /* z = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); c goes into f */
    real one = r_set(1), root = r_set((scalar)0.70710678118654752440);
    ints bits = r_add_bits(r_bits(z), r_bits(one) - r_bits(root));
    ints k = (bits >> XCE_MANTISSA) - XCE_BIAS;
    ints mantissa = (bits & (((sint)1 << XCE_MANTISSA) - 1)) + r_bits(root);
    ints down = XCE_BIAS - k; /* 2^-k; 0 for the largest z, where it is no normal number and c does not matter */
    log_parts parts;
    parts.k = r_of_ints(k);
    parts.f = (r_from_bits(mantissa) - one) + c * r_from_bits(r_if_positive(down) << XCE_MANTISSA);
    real f = parts.f, s = f / (r_set(2) + f), half_square = r_set((scalar)0.5) * f * f, s2 = s * s;
    parts.correction = half_square - s * r_fma(s2, r_horner(LOG_TAIL, XCE_LOG_DEGREE, s2), half_square);
    return parts;
}

XCE_FN real r_log_join(log_parts a)
{
    return r_fma(a.k, r_set(XCE_LN2_HIGH), a.f - (a.correction - a.k * r_set(XCE_LN2_LOW)));
}

/* log(1 + x + low), x >= -1 or NaN, low below the last place of x; -inf at -1, +inf stays */
XCE_FN real r_log1p(real x, real low)
{
    real one = r_set(1), z = one + x; /* 1 + x = z + c exactly */
    real c = r_select(r_gt(x, one), one - (z - x), x - (z - one)) + low;
    real y = r_log_join(r_log_split(z, c));
    y = r_select(r_eq(z, r_set(0)), r_set(-XCE_INF), y);
    return r_select(r_gt(r_set(XCE_INF), x), y, x); /* infinity and NaN as they are */
}

XCE_FN real r_log1p_unit(real x) /* log(1 + x) for 0 <= x <= 1 or NaN, without taking exponents apart */
{
#if defined(XCE_STORAGE_float64)
    return r_log1p(x, r_set(0)); /* a polynomial that went so far would be longer */
#else
    real s = x / (r_set(2) + x), z = s * s; /* = 2 atanh(s) = x - s (x - z R(z)), which takes but a third from x */
    return r_fma(-s, r_fma(-z, r_horner(LOG_UNIT_TAIL, 4, z), x), x);
#endif
}

/* the logarithm of x >= 0, subnormal numbers included; k is exact */
XCE_FN log_parts r_log_of(real x)
{
    rmask small = r_gt(r_set(XCE_SMALLEST), x);
    log_parts parts = r_log_split(r_select(small, x * r_set(XCE_TWO_TO_MANTISSA), x), r_set(0));
    parts.k = parts.k - r_select(small, r_set(XCE_MANTISSA), r_set(0));
    return parts;
}

XCE_FN real r_log(real x) /* -inf at 0, NaN below */
{
    real y = r_select(r_eq(x, r_set(0)), r_set(-XCE_INF), r_log_join(r_log_of(x)));
    y = r_select(r_gt(r_set(0), x), r_set(XCE_NAN), y);
    return r_select(r_gt(r_set(XCE_INF), x), y, x);
}

/* x^g for 0 <= x <= 1 (or a little more) and g >= 0; 0^0 = 1. The exponent's integer part is split off exactly, so that the
 * error stays below 1.5 + g / 2 ulp whatever x is. */
XCE_FN real r_pow(real x, real g)
{
    log_parts log_x = r_log_of(x);
    real m = g * (log_x.f - log_x.correction), power = g * log_x.k, n = (power + r_set(XCE_MAGIC)) - r_set(XCE_MAGIC);
    real fraction = (power - n) + r_remainder(-power, -g, log_x.k); /* g k = n + fraction */
    real unused, y = r_exp_scaled(r_fma(fraction, r_set((scalar)0.69314718055994530942), m), -n, &unused);
    /* far below the smallest number, where neither n nor m are what they should be */
    real exponent = r_fma(m, r_set(XCE_LOG2E), power);
    y = r_select(r_gt(exponent, r_set(-2 * XCE_BIAS)), y, r_set(0));
    y = r_select(r_eq(x, r_set(0)), r_set(0), y);
    y = r_select(r_eq(g, r_set(0)), r_set(1), y);
    return r_select(r_is_nan(x), x, y);
}

/* 1 / cosh(x), whose square is 1 - tanh(x)^2 without the cancellation; x in two parts, as exp(-x) errs by an eps of x otherwise */
XCE_FN real r_sech(real_pair x)
{
    real e = r_exp(-r_abs(x.high));
    real low = r_select(r_gt(x.high, r_set(0)), x.low, -x.low);
    e = r_fma(r_select(r_gt(e, r_set(0)), -low, r_set(0)), e, e);
    return (e + e) / r_fma(e, e, r_set(1));
}

XCE_FN real r_tanh(real x)
{
    real e = r_expm1(r_set(-2) * r_abs(x));
    real y = e / (e + r_set(2)); /* -tanh(|x|) */
    return r_select(r_gt(x, r_set(0)), -y, y);
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* A sum in twice the precision: Knuth's exact addition keeps what each step rounds away. */
typedef struct {
    real high, low;
} real_sum;

XCE_FN real_sum r_sum_add(real_sum s, real a)
{
    real high = s.high + a, b = high - s.high;
    real_sum t = {high, s.low + ((s.high - (high - b)) + (a - b))};
    return t;
}

XCE_FN real r_sum_total(real_sum s) { return r_select(r_eq(r_abs(s.high), r_set(XCE_INF)), s.high, s.high + s.low); }

XCE_FN real r_add8(const real *a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

#endif
