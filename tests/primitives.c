/* The elementary functions of primitives.h for test_primitives.py, compiled for each instruction set and number type. */
#include "primitives.h"

#define FUNCTIONS(F) \
    F(exp, r_exp(x), exp(x)) F(exp_any, r_exp_any(x), exp(x)) F(expm1, r_expm1(x), expm1(x)) F(log, r_log(x), log(x)) \
    F(log1p, r_log1p(x, r_set(0)), log1p(x)) F(tanh, r_tanh(x), tanh(x)) F(pow, r_pow(x, r_set(g)), pow(x, g))

enum {
#define NUMBER(name, own, exact) FUNCTION_##name,
    FUNCTIONS(NUMBER)
};

static real own(int function, real x, scalar g)
{
    switch (function) {
#define CASE(name, own, exact) case FUNCTION_##name: return own;
        FUNCTIONS(CASE)
    }
    return x;
}

void apply(int function, scalar g, const scalar *x, scalar *y, long n)
{
    for (long i = 0; i < n; i += XCE_LANES) /* whole vectors: the caller pads */
        r_store_scalars(y + i, own(function, r_load_scalars(x + i), g));
}

#if !defined(XCE_STORAGE_float64)
static double precise(int function, double x, double g)
{
    switch (function) {
#undef CASE
#define CASE(name, own, exact) case FUNCTION_##name: return exact;
        FUNCTIONS(CASE)
    }
    return x;
}

/* The largest error, in ULP, at every `step`-th float from `low` to `high`, by their bits, and where it is. Exact results
 * below `least` may be 0, or have lost a bit before they were doubled. */
double sweep(int function, float g, uint32_t low, uint32_t high, uint32_t step, double least, float *place)
{
    double worst = 0;
    for (uint64_t at = low; at <= high; at += (uint64_t)step * XCE_LANES) {
        float x[XCE_LANES], y[XCE_LANES];
        for (int i = 0; i < XCE_LANES; i++) {
            uint64_t bits = at + (uint64_t)step * (uint64_t)i;
            uint32_t narrow = bits > high ? high : (uint32_t)bits;
            memcpy(&x[i], &narrow, sizeof x[i]);
        }
        r_store_scalars(y, own(function, r_load_scalars(x), g));
        for (int i = 0; i < XCE_LANES; i++) {
            double exact = precise(function, x[i], g), error;
            if ((float)exact == y[i])
                error = isinf(y[i]) ? 0 : fabs(y[i] - exact);
            else
                error = isfinite(y[i]) && !isnan(exact) ? fabs(y[i] - exact) : INFINITY;
            int exponent = exact == 0 ? -126 : ilogb(exact);
            error = ldexp(error, 23 - (exponent < -126 ? -126 : exponent > 127 ? 127 : exponent));
            if (fabs(exact) < least && (y[i] == 0 || error <= 2))
                continue;
            if (!(error <= worst)) {
                worst = error;
                *place = x[i];
            }
        }
    }
    return worst;
}
#endif
