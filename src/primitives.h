/* The number types of the kernels and their elementary functions: the only file that knows one processor from another.
 *
 * A kernel is compiled once for each storage type, chosen by -DXCE_STORAGE_<float32|float64|float16|bfloat16>:
 *     storage   what lies in memory
 *     scalar    what is computed with: double for float64, float for the others
 *     real      LANES scalars that one instruction works on; arithmetic operators apply
 *     rmask     the answer of a comparison of two reals, for r_select
 *
 * exp, log, pow, expm1 and tanh are built from +, *, fma and bit operations only, so every processor with fma gives the same
 * bits (compile with -ffp-contract=off). x86-64-v2 has no fma: it multiplies and adds, and has bits of its own.
 * The polynomials come from coefficients.py.
 */
#ifndef XCE_PRIMITIVES_H
#define XCE_PRIMITIVES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define XCE_FN static inline __attribute__((always_inline, unused))
#define XCE_CALLED static __attribute__((noinline, unused)) /* long, and not where the time goes */

#if defined(XCE_STORAGE_float64)
typedef double scalar;
typedef int64_t sint;
#else
typedef float scalar;
typedef int32_t sint;
#endif

#if defined(XCE_STORAGE_float16) || defined(XCE_STORAGE_bfloat16)
#define XCE_STORAGE_IS_16_BIT 1
typedef uint16_t storage __attribute__((aligned(1), may_alias));
#else
#define XCE_STORAGE_IS_16_BIT 0
typedef scalar storage __attribute__((aligned(1), may_alias)); /* arrays may lie at any byte */
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define XCE_AVX512 1
#define XCE_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define XCE_AVX2 1
#define XCE_VECTOR_BYTES 32
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif
#define XCE_VECTOR_BYTES 16
#endif

typedef scalar real __attribute__((vector_size(XCE_VECTOR_BYTES)));
typedef sint ints __attribute__((vector_size(XCE_VECTOR_BYTES)));

/* Sums run in VIRTUAL lanes whatever the width of the machine, so that they associate alike everywhere. */
#define XCE_LANES ((int)(sizeof(real) / sizeof(scalar)))
#define XCE_VIRTUAL ((int)(64 / sizeof(scalar)))
#define XCE_VECTORS (XCE_VIRTUAL / XCE_LANES) /* native vectors in the virtual one */

#define XCE_INF ((scalar)__builtin_inf())
#define XCE_NAN ((scalar)__builtin_nan(""))

/* ---- vectors ----------------------------------------------------------------------------------------------------- */

XCE_FN real r_set(scalar a) { return a - (real){0}; }
/* A constant that stays in a register through a loop. GCC would rather read it from memory in every instruction, and a CPU
 * reads but one 64-byte vector a cycle. */
XCE_FN real r_constant(scalar a)
{
    real b = r_set(a);
#if defined(XCE_AVX512)
    __asm__("" : "+v"(b));
#endif
    return b;
}
XCE_FN real r_load_scalars(const scalar *p) { real a; memcpy(&a, p, sizeof a); return a; }
XCE_FN void r_store_scalars(scalar *p, real a) { memcpy(p, &a, sizeof a); }
XCE_FN ints r_bits(real a) { ints b; memcpy(&b, &a, sizeof b); return b; }
XCE_FN real r_from_bits(ints a) { real b; memcpy(&b, &a, sizeof b); return b; }

#if defined(XCE_AVX512) && !defined(XCE_STORAGE_float64)
typedef __mmask16 rmask;
#define XCE_CMP(a, b, how) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), how)
XCE_FN real r_select(rmask m, real a, real b) { return (real)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
XCE_FN real r_max(real a, real b) { return (real)_mm512_max_ps((__m512)a, (__m512)b); }
XCE_FN real r_fma(real a, real b, real c) { return (real)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
XCE_FN rmask r_first_lanes(int n) { return (rmask)((1u << n) - 1); }
#elif defined(XCE_AVX512)
typedef __mmask8 rmask;
#define XCE_CMP(a, b, how) _mm512_cmp_pd_mask((__m512d)(a), (__m512d)(b), how)
XCE_FN real r_select(rmask m, real a, real b) { return (real)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
XCE_FN real r_max(real a, real b) { return (real)_mm512_max_pd((__m512d)a, (__m512d)b); }
XCE_FN real r_fma(real a, real b, real c) { return (real)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
XCE_FN rmask r_first_lanes(int n) { return (rmask)((1u << n) - 1); }
#endif

#if defined(XCE_AVX512)
XCE_FN rmask r_gt(real a, real b) { return XCE_CMP(a, b, _CMP_GT_OQ); }
XCE_FN rmask r_eq(real a, real b) { return XCE_CMP(a, b, _CMP_EQ_OQ); }
XCE_FN rmask r_not(rmask m) { return (rmask)~m; }
XCE_FN rmask r_mask_of(ints nonzero) { return XCE_CMP((real)__builtin_convertvector(nonzero, real), (real){0}, _CMP_NEQ_OQ); }
XCE_FN unsigned r_lanes_of(rmask m) { return m; }
#else
typedef ints rmask; /* every lane all ones or all zeros */
XCE_FN rmask r_gt(real a, real b) { return a > b; }
XCE_FN rmask r_eq(real a, real b) { return a == b; }
XCE_FN rmask r_not(rmask m) { return ~m; }
XCE_FN rmask r_mask_of(ints nonzero) { return nonzero != 0; }
XCE_FN rmask r_first_lanes(int n)
{
    ints m;
    for (int i = 0; i < XCE_LANES; i++)
        m[i] = i < n ? -1 : 0;
    return m;
}
#if defined(XCE_AVX2) && defined(XCE_STORAGE_float64)
XCE_FN real r_select(rmask m, real a, real b) { return (real)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)m); }
XCE_FN real r_max(real a, real b) { return (real)_mm256_max_pd((__m256d)a, (__m256d)b); }
XCE_FN real r_fma(real a, real b, real c) { return (real)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
XCE_FN unsigned r_lanes_of(rmask m) { return (unsigned)_mm256_movemask_pd((__m256d)m); }
#elif defined(XCE_AVX2)
XCE_FN real r_select(rmask m, real a, real b) { return (real)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m); }
XCE_FN real r_max(real a, real b) { return (real)_mm256_max_ps((__m256)a, (__m256)b); }
XCE_FN real r_fma(real a, real b, real c) { return (real)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
XCE_FN unsigned r_lanes_of(rmask m) { return (unsigned)_mm256_movemask_ps((__m256)m); }
#else
XCE_FN real r_select(rmask m, real a, real b) { return r_from_bits((m & r_bits(a)) | (~m & r_bits(b))); }
XCE_FN real r_max(real a, real b) { return r_select(r_gt(a, b), a, b); }
XCE_FN unsigned r_lanes_of(rmask m)
{
    unsigned bits = 0;
    for (int i = 0; i < XCE_LANES; i++)
        bits |= (unsigned)(m[i] & 1) << i;
    return bits;
}
XCE_FN real r_fma(real a, real b, real c)
{
#if defined(__x86_64__)
    return a * b + c; /* no fma before x86-64-v3, and emulating it is 20 times slower */
#elif defined(__aarch64__) && defined(XCE_STORAGE_float64)
    return (real)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__aarch64__)
    return (real)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    real d;
    for (int i = 0; i < XCE_LANES; i++)
        d[i] = sizeof(scalar) == 8 ? (scalar)__builtin_fma(a[i], b[i], c[i]) : (scalar)__builtin_fmaf(a[i], b[i], c[i]);
    return d;
#endif
}
#endif
#endif

XCE_FN real r_remainder(real a, real q, real b) /* a - q b, exactly if q is a / b rounded; 0 where there is no fma */
{
#if defined(__x86_64__) && !defined(__FMA__)
    (void)q, (void)b;
    return a - a;
#else
    return r_fma(-q, b, a);
#endif
}

/* r_lanes_of: bit i is lane i.
 * r_max(a, b) is a > b ? a : b, that is b where either is NaN: r_max(x, running) skips NaN. */
XCE_FN rmask r_is_nan(real a) { return r_not(r_eq(a, a)); }
XCE_FN real r_abs(real a) { return r_from_bits(r_bits(a) & ((ints){0} + (sint)(~0ULL >> (65 - 8 * sizeof(sint))))); }
XCE_FN real r_iota(void)
{
    real a;
    for (int i = 0; i < XCE_LANES; i++)
        a[i] = (scalar)i;
    return a;
}
XCE_FN scalar r_max_of_lanes(real a) /* no NaN among them */
{
#if defined(XCE_AVX512) && defined(XCE_STORAGE_float64)
    return _mm512_reduce_max_pd((__m512d)a);
#elif defined(XCE_AVX512)
    return _mm512_reduce_max_ps((__m512)a);
#else
    scalar m[XCE_LANES];
    memcpy(m, &a, sizeof m);
    for (int width = XCE_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            m[i] = m[i] > m[i + width] ? m[i] : m[i + width];
    return m[0];
#endif
}
/* Lane i plus lane i + n / 2, again for the sums, and so on. */
#if defined(__x86_64__) && defined(XCE_STORAGE_float64)
XCE_FN scalar sum_of_16_bytes(__m128d a) { return _mm_cvtsd_f64(_mm_add_sd(a, _mm_unpackhi_pd(a, a))); }
#elif defined(__x86_64__)
XCE_FN scalar sum_of_16_bytes(__m128 a)
{
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
#endif
XCE_FN scalar r_sum_of_lanes(real a)
{
#if defined(XCE_AVX512) && defined(XCE_STORAGE_float64)
    __m256d b = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)a), _mm512_extractf64x4_pd((__m512d)a, 1));
    return sum_of_16_bytes(_mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1)));
#elif defined(XCE_AVX512)
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256((__m512)a), _mm512_extractf32x8_ps((__m512)a, 1));
    return sum_of_16_bytes(_mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
#elif defined(XCE_AVX2) && defined(XCE_STORAGE_float64)
    return sum_of_16_bytes(_mm_add_pd(_mm256_castpd256_pd128((__m256d)a), _mm256_extractf128_pd((__m256d)a, 1)));
#elif defined(XCE_AVX2)
    return sum_of_16_bytes(_mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1)));
#elif defined(__x86_64__) && defined(XCE_STORAGE_float64)
    return sum_of_16_bytes((__m128d)a);
#elif defined(__x86_64__)
    return sum_of_16_bytes((__m128)a);
#else
    scalar s[XCE_LANES];
    memcpy(s, &a, sizeof s);
    for (int width = XCE_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            s[i] += s[i + width];
    return s[0];
#endif
}
XCE_FN int lowest_bit(unsigned bits) { return __builtin_ctz(bits); } /* bits != 0 */

/* ---- memory ------------------------------------------------------------------------------------------------------ */

#if defined(XCE_STORAGE_bfloat16)
XCE_FN scalar s_load(const storage *p)
{
    uint32_t bits = (uint32_t)*p << 16;
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}
XCE_FN void s_store(storage *p, scalar a)
{
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    /* to nearest, ties to even; a NaN stays a NaN */
    *p = a == a ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (uint16_t)((bits >> 16) | 0x40);
}
#elif defined(XCE_STORAGE_float16)
XCE_FN scalar s_load(const storage *p)
{
#if defined(__F16C__)
    return _cvtsh_ss(*p);
#else
    union { uint32_t bits; float value; } a = {(uint32_t)(*p & 0x7fff) << 13};
    if (a.bits >= 0x0f800000) /* inf and NaN */
        a.bits |= 0x7f800000 | (a.bits > 0x0f800000 ? 0x00400000 : 0);
    else /* scaling by 2^112 moves the exponent and makes subnormals right */
        a.value *= 0x1p112f;
    a.bits |= (uint32_t)(*p & 0x8000) << 16;
    return a.value;
#endif
}
XCE_FN void s_store(storage *p, scalar a)
{
#if defined(__F16C__)
    *p = (uint16_t)_cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
    *p = (uint16_t)(rounded | ((bits >> 16) & 0x8000));
#endif
}
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
XCE_CALLED real r_gather_scalars(const char *p, ptrdiff_t stride, int n) /* of the type of the computation */
{
    scalar a[XCE_LANES] = {0};
    for (int i = 0; i < n; i++)
        memcpy(&a[i], p + i * stride, sizeof a[i]);
    return r_load_scalars(a);
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
static const scalar EXP_TAIL[] = {
    0.50000000000000109322,    0.16666666666666405083,    0.041666666666527011553,  0.008333333333498232644,
    0.0013888888944577336577,  0.00019841269500706271639, 0.000024801492012689106064, 2.7557589503671579525e-6,
    2.7630668454594725926e-7,  2.4999751073767187189e-8};
#define XCE_LOG_DEGREE 6
static const scalar LOG_TAIL[] = {
    0.66666666666667373634, 0.39999999999392841418, 0.28571428747702217561, 0.22222197984385658572,
    0.18183597036736136522, 0.1531316276316602276,  0.14805315867207625241};
#else
#define XCE_LN2_HIGH 0x1.62ep-1f
#define XCE_LN2_LOW 0.000031946184945309417232f
#define XCE_LOG2E 1.4426950408889634074f
#define XCE_MAGIC 0x1.8p23f
#define XCE_BIAS 127
#define XCE_MANTISSA 23
#define XCE_SMALLEST 0x1p-126f
#define XCE_TWO_TO_MANTISSA 0x1p23f
#define XCE_SHIFT_FROM 256.0f
#define XCE_EXP_DEGREE 4
static const scalar EXP_TAIL[] = {
    0.49999993333493562724f, 0.16666518938611104423f, 0.041668407972857895843f, 0.0083689217933171346901f,
    0.0013814174161023442303f};
#define XCE_LOG_DEGREE 3
static const scalar LOG_TAIL[] = {
    0.66666665620246897075f, 0.40000341402247163645f, 0.28536885488651404605f, 0.23590670679906557904f};
static const scalar LOG_UNIT_TAIL[] = { /* for s up to 1/3 */
    0.6666667576654697879f, 0.39998863096041175823f, 0.28617337214225155509f, 0.21422231851459182489f,
    0.24323104715978038887f};
#endif

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
    real unused;
    return r_exp_relative_tail(x, ref, &unused);
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

/* exp(x) - 1 for -40 <= x <= 80 (700), and what it is without its linear term: exp(x) - 1 - x */
XCE_FN real r_expm1_parts(real x, real *without_linear)
{
    real t = r_fma(x, r_set(XCE_LOG2E), r_set(XCE_MAGIC + XCE_BIAS));
    real n = t - r_set(XCE_MAGIC + XCE_BIAS);
    real r = r_fma(n, r_set(-XCE_LN2_LOW), r_fma(n, r_set(-XCE_LN2_HIGH), x));
    real square = r_horner(EXP_TAIL, XCE_EXP_DEGREE, r) * (r * r); /* exp(r) - 1 - r */
    real power = r_from_bits(r_bits(t) << XCE_MANTISSA);
    *without_linear = r_fma(power, square, r_fma(power, r, power - r_set(1)) - x);
    return r_fma(power, square + r, power - r_set(1));
}

XCE_FN real r_expm1(real x)
{
    real unused;
    return r_expm1_parts(r_max(r_set(-40), x), &unused);
}

/* log(z + c) for a normal number z > 0 that is z + c rounded: k ln 2 + m, |m| <= ln(2) / 2 */
typedef struct {
    real k, m, f, correction; /* m = f - correction */
} log_parts;

XCE_FN log_parts r_log_split(real z, real c)
{
    /* z = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); c goes into f */
    real one = r_set(1), root = r_set((scalar)0.70710678118654752440);
    ints bits = r_bits(z) + (r_bits(one) - r_bits(root));
    ints k = (bits >> XCE_MANTISSA) - XCE_BIAS;
    ints mantissa = (bits & (((sint)1 << XCE_MANTISSA) - 1)) + r_bits(root);
    ints down = XCE_BIAS - k; /* 2^-k; 0 for the largest z, where it is no normal number and c does not matter */
    log_parts parts;
    parts.k = __builtin_convertvector(k, real);
    parts.f = (r_from_bits(mantissa) - one) + c * r_from_bits((down & (down > 0)) << XCE_MANTISSA);
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

XCE_FN real r_sech2(real x) /* 1 / cosh(x)^2 without the cancellation of 1 - tanh(x)^2 */
{
    real e = r_exp(r_set(-2) * r_abs(x)), d = r_set(1) + e;
    return r_set(4) * e / (d * d);
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
XCE_FN real r_add8(const real *a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

#endif
