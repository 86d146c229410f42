/* The loops of the losses of single elements, one for each formula, on blocks of numbers that lie side by side; and how a
 * block comes from an array of any kind and stride, and goes to one. */
#ifndef XCE_ELEMENTS_H
#define XCE_ELEMENTS_H

#include "formulas.h"

enum { XCE_ELEMENTS = 256 }; /* in a block: of nine arrays, 18 KiB at most */

typedef struct {
    const scalar *x, *y, *w, *factor; /* w: pos_weight; factor: of all elements, or NULL */
    scalar *value, *grad, *hess;      /* grad and hess may be NULL; grad may be x */
    scalar scale;                     /* of the derivatives */
    parameters with;
} element_block;

XCE_FN real factored(const element_block *b, int i, real f)
{
    return b->factor ? weighted(r_load_scalars(b->factor + i), f) : f;
}

#define XCE_JET(name) \
    element_##name(r_load_scalars(b.x + i), r_load_scalars(b.y + i), r_load_scalars(b.w + i), b.with)
#define XCE_LOOP(name) \
    XCE_CALLED void values_of_##name(const element_block *block) \
    { \
        const element_block b = *block; \
        for (int i = 0; i < XCE_ELEMENTS; i += XCE_LANES) \
            r_store_scalars(b.value + i, factored(&b, i, XCE_JET(name).value)); \
    } \
    XCE_CALLED void jets_of_##name(const element_block *block) \
    { \
        const element_block b = *block; \
        for (int i = 0; i < XCE_ELEMENTS; i += XCE_LANES) { \
            jet f = XCE_JET(name); \
            r_store_scalars(b.value + i, factored(&b, i, f.value)); \
            if (b.grad) \
                r_store_scalars(b.grad + i, factored(&b, i, f.d1) * r_set(b.scale)); \
            if (b.hess) \
                r_store_scalars(b.hess + i, factored(&b, i, f.d2) * r_set(b.scale)); \
        } \
    }
XCE_ELEMENT_LOSSES(XCE_LOOP)

typedef void (*element_loop)(const element_block *);
#define XCE_VALUES(name) values_of_##name,
#define XCE_JETS(name) jets_of_##name,
static const element_loop ELEMENT_VALUES[] __attribute__((unused)) = {XCE_ELEMENT_LOSSES(XCE_VALUES)};
static const element_loop ELEMENT_JETS[] __attribute__((unused)) = {XCE_ELEMENT_LOSSES(XCE_JETS)};
enum { XCE_ELEMENT_COUNT = (int)(sizeof ELEMENT_VALUES / sizeof *ELEMENT_VALUES) };

/* The types that a block is read from: 0 is `storage`, others are their size in bytes, negative for signed integers. */
enum { XCE_BOOL = 17, XCE_FLOAT = 20, XCE_DOUBLE = 24 };

/* the same loop with a stride that the compiler knows, which it turns into vectors */
#define XCE_READ(type, convert) \
    { \
        type a; \
        if (stride == (ptrdiff_t)sizeof a) \
            for (int i = 0; i < n; i++) { \
                memcpy(&a, p + i * (ptrdiff_t)sizeof a, sizeof a); \
                to[i] = (scalar)(convert); \
            } \
        else \
            for (int i = 0; i < n; i++) { \
                memcpy(&a, p + i * stride, sizeof a); \
                to[i] = (scalar)(convert); \
            } \
        break; \
    }

XCE_CALLED void read_elements(scalar *to, const char *p, ptrdiff_t stride, int n, int kind)
{
    int i = 0;
    switch (kind) {
    case XCE_BOOL: XCE_READ(uint8_t, a != 0)
    case XCE_FLOAT: XCE_READ(float, a)
    case XCE_DOUBLE: XCE_READ(double, a)
    case -1: XCE_READ(int8_t, a)
    case -2: XCE_READ(int16_t, a)
    case -4: XCE_READ(int32_t, a)
    case -8: XCE_READ(int64_t, a)
    case 1: XCE_READ(uint8_t, a)
    case 2: XCE_READ(uint16_t, a)
    case 4: XCE_READ(uint32_t, a)
    case 8: XCE_READ(uint64_t, a)
    default:
        if (stride == (ptrdiff_t)sizeof(storage))
            for (; i + XCE_LANES <= n; i += XCE_LANES)
                r_store_scalars(to + i, r_load((const storage *)(p + i * (ptrdiff_t)sizeof(storage))));
        for (; i < n; i++)
            to[i] = s_load((const storage *)(p + i * stride));
    }
}

XCE_CALLED void write_elements(const scalar *from, char *p, ptrdiff_t stride, int n)
{
    int i = 0;
    if (stride == (ptrdiff_t)sizeof(storage))
        for (; i + XCE_LANES <= n; i += XCE_LANES)
            r_store((storage *)(p + i * (ptrdiff_t)sizeof(storage)), r_load_scalars(from + i));
    for (; i < n; i++)
        s_store((storage *)(p + i * stride), from[i]);
}

/* In sixteen lanes of double, whatever the width of the machine. */
XCE_CALLED double sum_of_elements(const scalar *a, int n)
{
    typedef double four __attribute__((vector_size(32)));
    typedef scalar narrow_four __attribute__((vector_size(4 * sizeof(scalar))));
    four sums[4] = {{0}, {0}, {0}, {0}};
    double lanes[16];
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 4; k++) {
            narrow_four b;
            memcpy(&b, a + i + 4 * k, sizeof b);
            sums[k] += __builtin_convertvector(b, four);
        }
    memcpy(lanes, sums, sizeof lanes);
    for (int k = 0; i + k < n; k++)
        lanes[k] += a[i + k];
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; k++)
            lanes[k] += lanes[k + half];
    return lanes[0];
}

/* the first of n numbers that is not in low..high, or n; if `finite`, infinities are not, either */
XCE_CALLED int first_outside(const scalar *a, int n, scalar low, scalar high, int finite)
{
    unsigned bad = 0;
    for (int i = 0; i < n; i++)
        bad |= !(a[i] >= low) | !(a[i] <= high) | (finite & !(a[i] - a[i] == 0));
    for (int i = 0; bad; i++)
        if (!(a[i] >= low && a[i] <= high) || (finite && !(a[i] - a[i] == 0)))
            return i;
    return n;
}

#endif
