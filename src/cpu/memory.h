/* How a CPU's numbers come from memory and go there: one at a time, side by side or with a stride, past the caches, turned. */
#ifndef XCE_MEMORY_H
#define XCE_MEMORY_H

#include "vectors.h"

/* 16-bit floats: to the nearest, ties to even; a NaN stays a NaN */
XCE_FN float bfloat_to_float(uint16_t a)
{
    uint32_t bits = (uint32_t)a << 16;
    float b;
    memcpy(&b, &bits, sizeof b);
    return b;
}
XCE_FN uint16_t float_to_bfloat(float a)
{
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return a == a ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (uint16_t)((bits >> 16) | 0x40);
}
XCE_FN float half_to_float(uint16_t a)
{
#if defined(__F16C__)
    return _cvtsh_ss(a);
#else
    union { uint32_t bits; float value; } b = {(uint32_t)(a & 0x7fff) << 13};
    if (b.bits >= 0x0f800000) /* inf and NaN */
        b.bits |= 0x7f800000 | (b.bits > 0x0f800000 ? 0x00400000 : 0);
    else /* scaling by 2^112 moves the exponent and makes subnormals right */
        b.value *= 0x1p112f;
    b.bits |= (uint32_t)(a & 0x8000) << 16;
    return b.value;
#endif
}
XCE_FN uint16_t float_to_half(float a)
{
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    uint32_t bits, magnitude, rounded;
    memcpy(&bits, &a, sizeof bits);
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        rounded = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    else if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        rounded = 0x7c00;
    else if (magnitude < 0x38800000) { /* below 2^-14: the adder rounds at the unit of half subnormals */
        float b;
        memcpy(&b, &magnitude, sizeof b);
        b += 0.5f;
        memcpy(&rounded, &b, sizeof rounded);
        rounded -= 0x3f000000;
    } else
        rounded = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000));
#endif
}
XCE_FN uint16_t double_to_half(double a) /* rounded once: float is rounded to odd, which keeps what decides a tie */
{
    float b = (float)a;
    uint32_t bits;
    memcpy(&bits, &b, sizeof bits);
    if (b - b == 0 && (double)b != a) {
        bits -= __builtin_fabs((double)b) > __builtin_fabs(a); /* toward 0 */
        bits |= 1;
    }
    memcpy(&b, &bits, sizeof b);
    return float_to_half(b);
}

#if defined(XCE_STORAGE_bfloat16)
XCE_FN scalar s_load(const storage *p) { return bfloat_to_float(*p); }
XCE_FN void s_store(storage *p, scalar a) { *p = float_to_bfloat(a); }
#elif defined(XCE_STORAGE_float16)
XCE_FN scalar s_load(const storage *p) { return half_to_float(*p); }
XCE_FN void s_store(storage *p, scalar a) { *p = float_to_half(a); }
#else
XCE_FN scalar s_load(const storage *p) { return *p; }
XCE_FN void s_store(storage *p, scalar a) { *p = a; }
#endif

/* LANES neighbours, and the first n of them with `fill` in the other lanes */
#if defined(XCE_AVX512) && defined(XCE_STORAGE_float32)
XCE_FN real r_load(const storage *p) { return (real)_mm512_loadu_ps(p); }
XCE_FN void r_store(storage *p, real a) { _mm512_storeu_ps(p, (__m512)a); }
XCE_FN real r_load_part(const storage *p, int n, scalar fill) { return (real)_mm512_mask_loadu_ps((__m512)r_set(fill), r_first_lanes(n), p); }
XCE_FN void r_store_part(storage *p, real a, int n) { _mm512_mask_storeu_ps(p, r_first_lanes(n), (__m512)a); }
#elif defined(XCE_AVX512) && defined(XCE_STORAGE_float64)
XCE_FN real r_load(const storage *p) { return (real)_mm512_loadu_pd(p); }
XCE_FN void r_store(storage *p, real a) { _mm512_storeu_pd(p, (__m512d)a); }
XCE_FN real r_load_part(const storage *p, int n, scalar fill) { return (real)_mm512_mask_loadu_pd((__m512d)r_set(fill), r_first_lanes(n), p); }
XCE_FN void r_store_part(storage *p, real a, int n) { _mm512_mask_storeu_pd(p, r_first_lanes(n), (__m512d)a); }
#elif defined(XCE_AVX512)
XCE_FN real r_widen(__m256i a)
{
#if defined(XCE_STORAGE_float16)
    return (real)_mm512_cvtph_ps(a);
#else
    return (real)_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16);
#endif
}
XCE_FN __m256i r_narrow(real a)
{
#if defined(XCE_STORAGE_float16)
    return _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    ints bits = r_bits(a);
    ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, r_is_nan(a), (__m512i)((bits >> 16) | 0x40)));
#endif
}
XCE_FN real r_load(const storage *p) { return r_widen(_mm256_loadu_si256((const __m256i *)p)); }
XCE_FN void r_store(storage *p, real a) { _mm256_storeu_si256((__m256i *)p, r_narrow(a)); }
XCE_FN real r_load_part(const storage *p, int n, scalar fill)
{
    return r_select(r_first_lanes(n), r_widen(_mm256_maskz_loadu_epi16(r_first_lanes(n), p)), r_set(fill));
}
XCE_FN void r_store_part(storage *p, real a, int n) { _mm256_mask_storeu_epi16(p, r_first_lanes(n), r_narrow(a)); }
#else
#if XCE_STORAGE_IS_16_BIT
#if defined(XCE_AVX2) && defined(XCE_STORAGE_float16)
XCE_FN real r_load(const storage *p) { return (real)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
XCE_FN void r_store(storage *p, real a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
XCE_CALLED real r_load(const storage *p)
{
    real a;
    for (int i = 0; i < XCE_LANES; i++)
        a[i] = s_load(p + i);
    return a;
}
XCE_CALLED void r_store(storage *p, real a)
{
    for (int i = 0; i < XCE_LANES; i++)
        s_store(p + i, a[i]);
}
#endif
#else
XCE_FN real r_load(const storage *p) { real a; memcpy(&a, p, sizeof a); return a; }
XCE_FN void r_store(storage *p, real a) { memcpy(p, &a, sizeof a); }
#endif
XCE_CALLED real r_load_part(const storage *p, int n, scalar fill)
{
    scalar a[XCE_LANES];
    for (int i = 0; i < XCE_LANES; i++)
        a[i] = i < n ? s_load(p + i) : fill;
    return r_load_scalars(a);
}
XCE_CALLED void r_store_part(storage *p, real a, int n)
{
    for (int i = 0; i < XCE_LANES; i++)
        if (i < n)
            s_store(p + i, a[i]);
}
#endif

/* The same, `stride` bytes apart. */
XCE_CALLED real r_gather(const char *p, ptrdiff_t stride, int n, scalar fill)
{
    scalar a[XCE_LANES];
    for (int i = 0; i < XCE_LANES; i++)
        a[i] = i < n ? s_load((const storage *)(p + i * stride)) : fill;
    return r_load_scalars(a);
}
XCE_CALLED void r_scatter(char *p, ptrdiff_t stride, real a, int n)
{
    for (int i = 0; i < n; i++)
        s_store((storage *)(p + i * stride), a[i]);
}
XCE_CALLED rmask r_gather_bytes(const char *p, ptrdiff_t stride, int n) /* a lane is set where its byte is not 0 */
{
    ints a;
    for (int i = 0; i < XCE_LANES; i++)
        a[i] = i < n ? p[i * stride] != 0 : 0;
    return r_mask_of(a);
}

/* to the first-level cache, to the second, and to be written; any address will do */
XCE_FN void prefetch(const char *p) { __builtin_prefetch(p); }
XCE_FN void prefetch_far(const char *p) { __builtin_prefetch(p, 0, 1); }
XCE_FN void prefetch_to_write(const char *p) { __builtin_prefetch(p, 1); }

/* Copy past the caches, for a result that would only drive the logits out of them; stream_end before anybody reads it. */
#if defined(__x86_64__)
XCE_FN void stream(char *to, const char *from, size_t n)
{
    size_t head = (64 - ((uintptr_t)to & 63)) & 63, i;
    head = head < n ? head : n;
    memcpy(to, from, head);
    for (i = head; i + 64 <= n; i += 64)
        for (int k = 0; k < 64; k += 16) {
            __m128i a = _mm_loadu_si128((const __m128i *)(from + i + k));
            _mm_stream_si128((__m128i *)(to + i + k), a);
        }
    memcpy(to + i, from + i, n - i);
}
XCE_FN void stream_end(void) { _mm_sfence(); }
#else
XCE_FN void stream(char *to, const char *from, size_t n) { memcpy(to, from, n); }
XCE_FN void stream_end(void) {}
#endif

/* Turn LANES rows of n >= XCE_CORNER adjacent entries, `stride` bytes apart, into n vectors of scalars, and back. Blocks of
 * XCE_CORNER by XCE_CORNER are turned in registers; the last ones overlap rather than leave a rest. */
#if !XCE_STORAGE_IS_16_BIT
typedef scalar corner __attribute__((vector_size(16)));
#define XCE_CORNER ((int)(16 / sizeof(scalar)))
#if defined(__clang__)
#define XCE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef sint corner_places __attribute__((vector_size(16)));
#define XCE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (corner_places){__VA_ARGS__})
#endif
XCE_FN void turn_corner(const char *from, ptrdiff_t from_stride, char *to, ptrdiff_t to_stride)
{
    corner r[XCE_CORNER];
    for (int i = 0; i < XCE_CORNER; i++)
        memcpy(&r[i], from + i * from_stride, sizeof r[i]);
#if defined(XCE_STORAGE_float64)
    corner t[2] = {XCE_SHUFFLE(r[0], r[1], 0, 2), XCE_SHUFFLE(r[0], r[1], 1, 3)};
#else
    corner low01 = XCE_SHUFFLE(r[0], r[1], 0, 4, 1, 5), low23 = XCE_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
    corner high01 = XCE_SHUFFLE(r[0], r[1], 2, 6, 3, 7), high23 = XCE_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    corner t[4] = {XCE_SHUFFLE(low01, low23, 0, 1, 4, 5), XCE_SHUFFLE(low01, low23, 2, 3, 6, 7),
                   XCE_SHUFFLE(high01, high23, 0, 1, 4, 5), XCE_SHUFFLE(high01, high23, 2, 3, 6, 7)};
#endif
    for (int i = 0; i < XCE_CORNER; i++)
        memcpy(to + i * to_stride, &t[i], sizeof t[i]);
}
XCE_FN void turn_in(const char *rows, ptrdiff_t stride, ptrdiff_t n, real *vectors)
{
    for (int i = 0; i < XCE_LANES; i += XCE_CORNER)
        for (ptrdiff_t c = 0; c < n; c += XCE_CORNER) {
            ptrdiff_t at = c + XCE_CORNER <= n ? c : n - XCE_CORNER;
            turn_corner(rows + i * stride + at * (ptrdiff_t)sizeof(scalar), stride,
                        (char *)vectors + at * (ptrdiff_t)sizeof(real) + i * (ptrdiff_t)sizeof(scalar), sizeof(real));
        }
}
XCE_FN void turn_out(const real *vectors, ptrdiff_t n, char *rows, ptrdiff_t stride)
{
    for (int i = 0; i < XCE_LANES; i += XCE_CORNER)
        for (ptrdiff_t c = 0; c < n; c += XCE_CORNER) {
            ptrdiff_t at = c + XCE_CORNER <= n ? c : n - XCE_CORNER;
            turn_corner((const char *)vectors + at * (ptrdiff_t)sizeof(real) + i * (ptrdiff_t)sizeof(scalar), sizeof(real),
                        rows + i * stride + at * (ptrdiff_t)sizeof(scalar), stride);
        }
}
#else
#define XCE_CORNER 0 /* the conversion costs more than the turning */
XCE_FN void turn_in(const char *rows, ptrdiff_t stride, ptrdiff_t n, real *vectors)
{
    for (ptrdiff_t c = 0; c < n; c++)
        vectors[c] = r_gather(rows + c * (ptrdiff_t)sizeof(storage), stride, XCE_LANES, 0);
}
XCE_FN void turn_out(const real *vectors, ptrdiff_t n, char *rows, ptrdiff_t stride)
{
    for (ptrdiff_t c = 0; c < n; c++)
        r_scatter(rows + c * (ptrdiff_t)sizeof(storage), stride, vectors[c], XCE_LANES);
}
#endif

#endif
