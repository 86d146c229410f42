/* The loops of the losses of single elements, one for each formula, on blocks of numbers that lie side by side; and how a
 * block comes from an array of any kind and stride, and goes to one. */
#ifndef XCE_ELEMENTS_H
#define XCE_ELEMENTS_H

#include "formulas.h"

enum { XCE_ELEMENTS = 256 }; /* in a block: of nine arrays, 18 KiB at most */

typedef struct {
    const scalar *x, *y, *w, *factor;  /* w: pos_weight; factor: of all elements, or NULL */
    const scalar *value_factor;        /* the same, or NULL where values are added up: that may need more than a scalar */
    const scalar *y_low, *w_low;       /* what y and w lack, or NULL */
    scalar *value, *grad, *hess;       /* grad and hess may be NULL; grad may be x */
    scalar scale;                      /* of the derivatives */
    parameters with;
} element_block;

/* A factor of 0 removes an element, whatever it holds. What overflows before the scale makes it smaller is scaled first. */
XCE_FN real factored(const scalar *factors, int i, real f, real scale)
{
    if (!factors)
        return f * scale;
    real factor = r_load_scalars(factors + i), product = factor * f;
    product = r_select(r_gt(r_set(XCE_INF), r_abs(product)), product * scale, factor * scale * f);
    return r_select(r_eq(factor, r_set(0)), r_set(0), product);
}

XCE_FN two_part read_two_part(const scalar *high, const scalar *low, int i)
{
    two_part a = {r_load_scalars(high + i), low ? r_load_scalars(low + i) : r_set(0)};
    return a;
}

#define XCE_JET(name) \
    element_##name(r_load_scalars(b.x + i), read_two_part(b.y, b.y_low, i), read_two_part(b.w, b.w_low, i), b.with)
#define XCE_LOOP(name) \
    XCE_CALLED void values_of_##name(const element_block *block) \
    { \
        const element_block b = *block; \
        for (int i = 0; i < XCE_ELEMENTS; i += XCE_LANES) \
            r_store_scalars(b.value + i, factored(b.value_factor, i, XCE_JET(name).value, r_set(1))); \
    } \
    XCE_CALLED void jets_of_##name(const element_block *block) \
    { \
        const element_block b = *block; \
        for (int i = 0; i < XCE_ELEMENTS; i += XCE_LANES) { \
            jet f = XCE_JET(name); \
            r_store_scalars(b.value + i, factored(b.value_factor, i, f.value, r_set(1))); \
            if (b.grad) \
                r_store_scalars(b.grad + i, factored(b.factor, i, f.d1, r_set(b.scale))); \
            if (b.hess) \
                r_store_scalars(b.hess + i, factored(b.factor, i, f.d2, r_set(b.scale))); \
        } \
    }
XCE_ELEMENT_LOSSES(XCE_LOOP)

typedef void (*element_loop)(const element_block *);
#define XCE_VALUES(name) values_of_##name,
#define XCE_JETS(name) jets_of_##name,
static const element_loop ELEMENT_VALUES[] __attribute__((unused)) = {XCE_ELEMENT_LOSSES(XCE_VALUES)};
static const element_loop ELEMENT_JETS[] __attribute__((unused)) = {XCE_ELEMENT_LOSSES(XCE_JETS)};
enum { XCE_ELEMENT_COUNT = (int)(sizeof ELEMENT_VALUES / sizeof *ELEMENT_VALUES) };

/* The types that a block is read from and written to: 0 is `storage`, integers have their size in bytes, negative for signed
 * ones; SWAPPED is added where the bytes lie the other way round. */
enum { XCE_BOOL = 17, XCE_HALF = 18, XCE_BFLOAT = 19, XCE_FLOAT = 20, XCE_DOUBLE = 24, XCE_SWAPPED = 128 };
enum { XCE_SCALAR_KIND = sizeof(scalar) == 8 ? XCE_DOUBLE : XCE_FLOAT };
#if defined(XCE_STORAGE_float16)
enum { XCE_STORAGE_KIND = XCE_HALF };
#elif defined(XCE_STORAGE_bfloat16)
enum { XCE_STORAGE_KIND = XCE_BFLOAT };
#else
enum { XCE_STORAGE_KIND = XCE_SCALAR_KIND };
#endif

XCE_FN float float_of_bits(uint32_t bits) { float a; memcpy(&a, &bits, sizeof a); return a; }

#define XCE_INT(type) type number; memcpy(&number, &a, sizeof number);
/* the same loop with a stride that the compiler knows, which it turns into vectors */
#define XCE_READ_AT(bits, swap, step, convert) \
    for (int i = 0; i < n; i++) { \
        uint##bits##_t a; \
        memcpy(&a, p + i * (step), sizeof a); \
        a = swap(a); \
        convert; \
    }
#define XCE_READ(bits, swap, convert) \
    if (stride == bits / 8) \
        XCE_READ_AT(bits, swap, (ptrdiff_t)(bits / 8), convert) \
    else \
        XCE_READ_AT(bits, swap, stride, convert) \
    break;
#define XCE_READ_BOTH(kind, bits, swap, convert) \
    case kind: XCE_READ(bits, , convert) \
    case XCE_SWAPPED + (kind): XCE_READ(bits, swap, convert)
#define XCE_AS(type) { XCE_INT(type) to[i] = (scalar)number; }
#define XCE_KEEPING(type) { \
        XCE_INT(type) \
        to[i] = (scalar)number; \
        scalar rest = (scalar)(number - (double)to[i]); \
        if (low) \
            low[i] = rest - rest == 0 ? rest : 0; /* infinities lack nothing */ \
    }

/* n numbers as scalars; what that rounds away of doubles goes to `low`, if that is not NULL */
XCE_CALLED void read_elements(scalar *to, scalar *low, const char *p, ptrdiff_t stride, int n, int kind)
{
    int done = 0;
    if (low && kind % XCE_SWAPPED != XCE_DOUBLE)
        memset(low, 0, n * sizeof *low);
    switch (kind) {
    case XCE_BOOL: XCE_READ(8, , to[i] = a != 0)
    case 1: XCE_READ(8, , to[i] = a)
    case -1: XCE_READ(8, , XCE_AS(int8_t))
    XCE_READ_BOTH(XCE_HALF, 16, __builtin_bswap16, to[i] = half_to_float(a))
    XCE_READ_BOTH(XCE_BFLOAT, 16, __builtin_bswap16, to[i] = bfloat_to_float(a))
    XCE_READ_BOTH(XCE_FLOAT, 32, __builtin_bswap32, to[i] = float_of_bits(a))
    XCE_READ_BOTH(XCE_DOUBLE, 64, __builtin_bswap64, XCE_KEEPING(double))
    XCE_READ_BOTH(2, 16, __builtin_bswap16, to[i] = a)
    XCE_READ_BOTH(4, 32, __builtin_bswap32, to[i] = (scalar)a)
    XCE_READ_BOTH(8, 64, __builtin_bswap64, to[i] = (scalar)a)
    XCE_READ_BOTH(-2, 16, __builtin_bswap16, XCE_AS(int16_t))
    XCE_READ_BOTH(-4, 32, __builtin_bswap32, XCE_AS(int32_t))
    XCE_READ_BOTH(-8, 64, __builtin_bswap64, XCE_AS(int64_t))
    default:
        if (stride == (ptrdiff_t)sizeof(storage))
            for (; done + XCE_LANES <= n; done += XCE_LANES)
                r_store_scalars(to + done, r_load((const storage *)(p + done * (ptrdiff_t)sizeof(storage))));
        for (; done < n; done++)
            to[done] = s_load((const storage *)(p + done * stride));
    }
}

#define XCE_WRITE(type, convert) \
    for (int i = 0; i < n; i++) { \
        type a = convert; \
        memcpy(p + i * stride, &a, sizeof a); \
    } \
    break;

/* Results of a wider type than the caller's are rounded here; to 16 bits as NumPy does it: float16 once, bfloat16 after float32. */
XCE_CALLED void write_elements(const scalar *from, char *p, ptrdiff_t stride, int n, int kind)
{
    int done = 0;
    switch (kind) {
    case XCE_HALF: XCE_WRITE(uint16_t, double_to_half(from[i]))
    case XCE_BFLOAT: XCE_WRITE(uint16_t, float_to_bfloat((float)from[i]))
    case XCE_FLOAT: XCE_WRITE(float, (float)from[i])
    case XCE_DOUBLE: XCE_WRITE(double, from[i])
    default:
        if (stride == (ptrdiff_t)sizeof(storage))
            for (; done + XCE_LANES <= n; done += XCE_LANES)
                r_store((storage *)(p + done * (ptrdiff_t)sizeof(storage)), r_load_scalars(from + done));
        for (; done < n; done++)
            s_store((storage *)(p + done * stride), from[done]);
    }
}

XCE_FN double product_of(const scalar *a, const scalar *factors, int i)
{
    if (!factors)
        return a[i];
    return factors[i] == 0 ? 0 : (double)a[i] * factors[i];
}

XCE_FN void add_keeping(double *high, double *low, double term) /* what rounding takes from the sum (Knuth) */
{
    double total = *high + term, part = total - *high;
    *low += (*high - (total - part)) + (term - part);
    *high = total;
}

/* A sum as it grows. What rounding takes from a sum of doubles is kept: rows may have very many classes. */
typedef struct {
    double high, low;
} row_sum;

XCE_CALLED void add_to_row(row_sum *sum, const scalar *a, const scalar *factors, int from, int to)
{
    double high = sum->high, low = sum->low;
    for (int i = from; i < to; i++) {
        double term = product_of(a, factors, i);
        if (sizeof(scalar) == sizeof(double))
            add_keeping(&high, &low, term);
        else
            high += term;
    }
    sum->high = high, sum->low = low;
}

XCE_FN double total_of_row(const row_sum *sum) /* infinities have nothing to add */
{
    return sum->high - sum->high == 0 ? sum->high + sum->low : sum->high;
}

/* The sum, or that of the products with factors, if there are any, in sixteen lanes of double, whatever the width of the
 * machine. A factor of 0 removes an element. */
XCE_CALLED double sum_of_elements(const scalar *a, const scalar *factors, int n)
{
    typedef double four __attribute__((vector_size(32)));
    typedef int64_t longs __attribute__((vector_size(32)));
    typedef scalar narrow_four __attribute__((vector_size(4 * sizeof(scalar))));
    four sums[4] = {{0}, {0}, {0}, {0}};
    double lanes[16];
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 4; k++) {
            narrow_four b, factor;
            memcpy(&b, a + i + 4 * k, sizeof b);
            four term = __builtin_convertvector(b, four);
            if (factors) {
                memcpy(&factor, factors + i + 4 * k, sizeof factor);
                four by = __builtin_convertvector(factor, four);
                term = (four)((longs)(term * by) & (longs)(by != 0));
            }
            sums[k] += term;
        }
    memcpy(lanes, sums, sizeof lanes);
    for (int k = 0; i + k < n; k++)
        lanes[k] += product_of(a, factors, i + k);
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; k++)
            lanes[k] += lanes[k + half];
    return lanes[0];
}

/* What a scan looks for: numbers not in low..high, those and infinite ones, or those that are neither 0 nor of a size within
 * low..high, infinities and NaN not among them. */
enum { XCE_OUTSIDE, XCE_OUTSIDE_OR_INFINITE, XCE_BEYOND };

XCE_FN int is_bad(scalar a, scalar low, scalar high, int what)
{
    scalar size = a < 0 ? -a : a;
    if (what == XCE_BEYOND)
        return (size > 0) & (size < XCE_INF) & !((size > low) & (size < high));
    return !(a >= low) | !(a <= high) | ((what == XCE_OUTSIDE_OR_INFINITE) & !(size < XCE_INF));
}

/* the first of n numbers from `start` on that is bad, or n */
XCE_CALLED int first_bad(const scalar *a, int start, int n, scalar low, scalar high, int what)
{
    int bad = 0;
    if (start == 0)
        for (int i = 0; i < n; i++)
            bad |= is_bad(a[i], low, high, what);
    if (start || bad)
        for (int i = start; i < n; i++)
            if (is_bad(a[i], low, high, what))
                return i;
    return n;
}

#endif
