/* The numbers of a CPU: `real` is as many scalars as one instruction works on. */
#ifndef XCE_VECTORS_H
#define XCE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define XCE_FN static inline __attribute__((always_inline, unused))
#define XCE_PART XCE_FN /* elsewhere too much to be compiled in many places */
#define XCE_TABLE static const
#define XCE_NAMES static const char *const __attribute__((unused))
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
XCE_FN real r_of_ints(ints a) { return __builtin_convertvector(a, real); }
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
XCE_FN rmask r_lanes_in(unsigned bits) { return (rmask)bits; }
XCE_FN unsigned r_lanes_of(rmask m) { return m; }
#else
typedef ints rmask; /* every lane all ones or all zeros */
XCE_FN rmask r_gt(real a, real b) { return a > b; }
XCE_FN rmask r_eq(real a, real b) { return a == b; }
XCE_FN rmask r_not(rmask m) { return ~m; }
XCE_FN rmask r_mask_of(ints nonzero) { return nonzero != 0; }
XCE_FN rmask r_lanes_in(unsigned bits)
{
    ints m;
    for (int i = 0; i < XCE_LANES; i++)
        m[i] = bits >> i & 1 ? -1 : 0;
    return m;
}
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

#if defined(__x86_64__) && !defined(__FMA__)
XCE_FN real r_upper_half(real a) /* of the bits of its mantissa */
{
    real b = r_set((scalar)(((sint)1 << (sizeof(scalar) == 8 ? 27 : 12)) + 1)) * a;
    return b - (b - a);
}
#endif
XCE_FN real r_product_low(real a, real b, real product) /* a b - product, exactly, product being a b rounded */
{
#if defined(__x86_64__) && !defined(__FMA__)
    real a_high = r_upper_half(a), a_low = a - a_high, b_high = r_upper_half(b), b_low = b - b_high;
    real low = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
    return r_select(r_eq(low, low), low, r_set(0)); /* beyond the type */
#else
    return r_fma(a, b, -product);
#endif
}

/* r_lanes_of, r_lanes_in: bit i is lane i.
 * r_max(a, b) is a > b ? a : b, that is b where either is NaN: r_max(x, running) skips NaN. */
XCE_FN ints r_add_bits(ints a, ints b) { return a + b; } /* wraps: -fwrapv */
XCE_FN ints r_if_positive(ints a) { return a & (a > 0); } /* or 0 */
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

#endif
