/* Single numbers of any kind of array: labels, weights, logits of another type than the kernels are compiled for. */
#ifndef XCE_NUMBERS_H
#define XCE_NUMBERS_H

#include "elements.h"

/* A number that another thread may be changing is read once, from any address. */
#define XCE_ONCE(type, p) (((const volatile struct { type number; } __attribute__((packed)) *)(p))->number)

XCE_FN uint16_t read_16(const char *p, int swapped)
{
    uint16_t a = XCE_ONCE(uint16_t, p);
    return swapped ? __builtin_bswap16(a) : a;
}
XCE_FN uint32_t read_32(const char *p, int swapped)
{
    uint32_t a = XCE_ONCE(uint32_t, p);
    return swapped ? __builtin_bswap32(a) : a;
}
XCE_FN uint64_t read_64(const char *p, int swapped)
{
    uint64_t a = XCE_ONCE(uint64_t, p);
    return swapped ? __builtin_bswap64(a) : a;
}
XCE_FN float float_of(uint32_t bits) { float a; memcpy(&a, &bits, sizeof a); return a; }
XCE_FN double double_of(uint64_t bits) { double a; memcpy(&a, &bits, sizeof a); return a; }

/* four bits in a byte of their own: labels only */
enum { XCE_INT4 = 21, XCE_UINT4 = 22 };

/* A kind without its byte order; kinds of signed integers are negative, also when SWAPPED was added. */
XCE_FN int kind_of_bytes(int kind, int *swapped)
{
    *swapped = kind > XCE_SWAPPED / 2;
    return *swapped ? kind - XCE_SWAPPED : kind;
}

/* Four bits in a byte, whose others say nothing. */
XCE_FN int64_t four_bits(uint8_t a, int is_signed) { return is_signed && (a & 8) ? (int64_t)(a & 15) - 16 : a & 15; }

XCE_CALLED double read_number(const char *p, int kind)
{
    int swapped;
    switch (kind_of_bytes(kind, &swapped)) {
    case XCE_BOOL: return XCE_ONCE(uint8_t, p) != 0;
    case XCE_INT4: return (double)four_bits(XCE_ONCE(uint8_t, p), 1);
    case XCE_UINT4: return (double)four_bits(XCE_ONCE(uint8_t, p), 0);
    case XCE_HALF: return half_to_float(read_16(p, swapped));
    case XCE_BFLOAT: return bfloat_to_float(read_16(p, swapped));
    case XCE_FLOAT: return float_of(read_32(p, swapped));
    case XCE_DOUBLE: return double_of(read_64(p, swapped));
    case -1: return XCE_ONCE(int8_t, p);
    case -2: return (int16_t)read_16(p, swapped);
    case -4: return (int32_t)read_32(p, swapped);
    case -8: return (double)(int64_t)read_64(p, swapped);
    case 1: return XCE_ONCE(uint8_t, p);
    case 2: return read_16(p, swapped);
    case 4: return read_32(p, swapped);
    case 8: return (double)read_64(p, swapped);
    default: return s_load((const storage *)p);
    }
}

/* A number in the type of the computation. */
XCE_FN scalar read_scalar(const char *p, int kind)
{
    return kind ? (scalar)read_number(p, kind) : s_load((const storage *)p);
}

/* A result in a narrower type than that of the computation: rounded to 16 bits as NumPy does it, bfloat16 after float32. */
XCE_CALLED void write_number(char *p, int kind, scalar a)
{
    uint16_t half;
    float single;
    double wide;
    switch (kind) {
    case XCE_HALF: half = double_to_half((double)a); memcpy(p, &half, sizeof half); break;
    case XCE_BFLOAT: half = float_to_bfloat((float)a); memcpy(p, &half, sizeof half); break;
    case XCE_FLOAT: single = (float)a; memcpy(p, &single, sizeof single); break;
    case XCE_DOUBLE: wide = (double)a; memcpy(p, &wide, sizeof wide); break;
    default: s_store((storage *)p, a);
    }
}

XCE_FN void write_scalar(char *p, int kind, scalar a)
{
    if (kind)
        write_number(p, kind, a);
    else
        s_store((storage *)p, a);
}

/* n numbers, `stride` bytes apart, in the lanes, and back */
XCE_CALLED real r_gather_numbers(const char *p, ptrdiff_t stride, int n, scalar fill, int kind)
{
    scalar a[XCE_LANES];
    if (kind == XCE_DOUBLE) /* the most common: a loop without a choice */
        for (int i = 0; i < XCE_LANES; i++)
            a[i] = i < n ? (scalar)double_of(read_64(p + i * stride, 0)) : fill;
    else if (kind == XCE_FLOAT)
        for (int i = 0; i < XCE_LANES; i++)
            a[i] = i < n ? (scalar)float_of(read_32(p + i * stride, 0)) : fill;
    else
        for (int i = 0; i < XCE_LANES; i++)
            a[i] = i < n ? read_scalar(p + i * stride, kind) : fill;
    return r_load_scalars(a);
}
XCE_CALLED void r_scatter_numbers(char *p, ptrdiff_t stride, real a, int n, int kind)
{
    scalar lanes[XCE_LANES];
    r_store_scalars(lanes, a);
    for (int i = 0; i < n; i++)
        write_number(p + i * stride, kind, lanes[i]);
}

/* The bytes of a number */
XCE_FN ptrdiff_t size_of_kind(int kind)
{
    int swapped;
    switch (kind_of_bytes(kind, &swapped)) {
    case 0: return sizeof(storage);
    case XCE_HALF: case XCE_BFLOAT: case 2: case -2: return 2;
    case XCE_FLOAT: case 4: case -4: return 4;
    case XCE_DOUBLE: case 8: case -8: return 8;
    default: return 1;
    }
}

/* A label: 0 if it is no int64, a float that is not whole for example. */
XCE_CALLED int read_other_label(const char *p, int kind, int64_t *label)
{
    int swapped, base = kind_of_bytes(kind, &swapped);
    double number;
    switch (base) {
    case XCE_HALF: case XCE_BFLOAT: case XCE_FLOAT: case XCE_DOUBLE:
        number = read_number(p, kind);
        if (!(number >= -0x1p63 && number < 0x1p63))
            return 0;
        *label = (int64_t)number;
        return (double)*label == number;
    case XCE_INT4: case XCE_UINT4:
        *label = four_bits(XCE_ONCE(uint8_t, p), base == XCE_INT4);
        return 1;
    case -8: *label = (int64_t)read_64(p, swapped); return 1;
    case -4: *label = (int32_t)read_32(p, swapped); return 1;
    case -2: *label = (int16_t)read_16(p, swapped); return 1;
    case 4: *label = read_32(p, swapped); return 1;
    case 2: *label = read_16(p, swapped); return 1;
    default:
        *label = (int64_t)read_64(p, swapped);
        return *label >= 0;
    }
}
XCE_FN int read_label(const char *p, int kind, int64_t *label)
{
    switch (kind) {
    case -8: *label = XCE_ONCE(int64_t, p); return 1;
    case -4: *label = XCE_ONCE(int32_t, p); return 1;
    case -2: *label = XCE_ONCE(int16_t, p); return 1;
    case -1: *label = XCE_ONCE(int8_t, p); return 1;
    case 1: *label = XCE_ONCE(uint8_t, p); return 1;
    case 2: *label = XCE_ONCE(uint16_t, p); return 1;
    case 4: *label = XCE_ONCE(uint32_t, p); return 1;
    default: return read_other_label(p, kind, label);
    }
}

#endif
