/* The numbers of a CUDA thread: `real` is one scalar. Compiled by NVRTC, which has no headers of C. */
#ifndef XCE_THREADS_H
#define XCE_THREADS_H

#define XCE_PASTE(a, b) XCE_PASTED(a, b)
#define XCE_PASTED(a, b) a##b
#define XCE_FN static __device__ __forceinline__
#define XCE_CALLED static __device__ __noinline__
#if defined(XCE_EMULATED) /* by tests/emulation.h, where one library has all losses */
#define XCE_PART XCE_CALLED
#else
#define XCE_PART XCE_FN /* a module has one loss, so there is little to it */
#endif
#define XCE_TABLE static __device__ constexpr
#define XCE_NAMES static __device__ const char *const

#if !defined(XCE_EMULATED)
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif

#if defined(XCE_STORAGE_float64)
typedef double scalar;
typedef int64_t sint;
#else
typedef float scalar;
typedef int32_t sint;
#endif

#if defined(XCE_STORAGE_float16) || defined(XCE_STORAGE_bfloat16)
#define XCE_SHORT
typedef uint16_t storage;
#else
typedef scalar storage;
#endif
#if defined(XCE_OUTPUT_float16) || defined(XCE_OUTPUT_bfloat16)
typedef uint16_t output; /* of gradients, where float32 logits stand for shorter ones */
#else
typedef storage output;
#endif

typedef scalar real;
typedef sint ints;
typedef bool rmask;

#if defined(XCE_STORAGE_float64)
#define XCE_INF __longlong_as_double(0x7ff0000000000000LL)
#define XCE_NAN __longlong_as_double(0x7ff8000000000000LL)
XCE_FN ints r_bits(real a) { return __double_as_longlong(a); }
XCE_FN real r_from_bits(ints a) { return __longlong_as_double(a); }
XCE_FN real r_abs(real a) { return fabs(a); }
XCE_FN real r_fma(real a, real b, real c) { return fma(a, b, c); }
#else
#define XCE_INF __int_as_float(0x7f800000)
#define XCE_NAN __int_as_float(0x7fc00000)
XCE_FN ints r_bits(real a) { return __float_as_int(a); }
XCE_FN real r_from_bits(ints a) { return __int_as_float(a); }
XCE_FN real r_abs(real a) { return fabsf(a); }
XCE_FN real r_fma(real a, real b, real c) { return fmaf(a, b, c); }
#endif

XCE_FN real r_set(scalar a) { return a; }
XCE_FN real r_constant(scalar a) { return a; }
XCE_FN real r_of_ints(ints a) { return (real)a; }
XCE_FN ints r_add_bits(ints a, ints b) { return (ints)((uint64_t)a + (uint64_t)b); } /* wraps */
XCE_FN ints r_if_positive(ints a) { return a > 0 ? a : 0; }
XCE_FN rmask r_gt(real a, real b) { return a > b; }
XCE_FN rmask r_eq(real a, real b) { return a == b; }
XCE_FN rmask r_not(rmask m) { return !m; }
XCE_FN rmask r_is_nan(real a) { return a != a; }
XCE_FN real r_select(rmask m, real a, real b) { return m ? a : b; }
XCE_FN real r_max(real a, real b) { return a > b ? a : b; } /* b where either is NaN, as on a CPU */
XCE_FN real r_remainder(real a, real q, real b) { return r_fma(-q, b, a); }
XCE_FN real r_product_low(real a, real b, real product) { return r_fma(a, b, -product); }
#if defined(XCE_STORAGE_float64)
XCE_FN scalar r_greatest(scalar a, scalar b) { return fmax(a, b); } /* the number where one is NaN */
#else
XCE_FN scalar r_greatest(scalar a, scalar b) { return fmaxf(a, b); }
#endif

/* ---- what the C language does not have ---------------------------------------------------------------------------------- */

#if !defined(XCE_EMULATED)
#define XCE_SHARED(type, name) __shared__ type name
#define XCE_SHARED_ARRAY(type, name) extern __shared__ type name[]
#define XCE_JOB(type) const __grid_constant__ type /* read where it lies, in constant memory */
#define XCE_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define XCE_TAKES_MORE (__CUDA_ARCH__ >= 1000) /* registers for the same text */
#define XCE_KERNEL(cluster) XCE_PASTE(XCE_KERNEL_, cluster)
#define XCE_KERNEL_1 extern "C" __global__ void
#if __CUDA_ARCH__ >= 900 /* clusters: blocks that see each other's shared memory */
#define XCE_KERNEL_2 extern "C" __global__ void __cluster_dims__(2)
#define XCE_KERNEL_4 extern "C" __global__ void __cluster_dims__(4)
#define XCE_KERNEL_8 extern "C" __global__ void __cluster_dims__(8)
XCE_FN int cluster_rank()
{
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
XCE_FN void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
template <class T> XCE_FN const T *cluster_address(const T *mine, int rank) /* of the same variable in another block */
{
    const T *theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
}
#else
#define XCE_KERNEL_2 XCE_KERNEL_1
#define XCE_KERNEL_4 XCE_KERNEL_1
#define XCE_KERNEL_8 XCE_KERNEL_1
XCE_FN int cluster_rank() { return 0; } /* never called: no cluster is chosen there */
XCE_FN void cluster_barrier() {}
template <class T> XCE_FN const T *cluster_address(const T *mine, int) { return mine; }
#endif
XCE_FN float half_to_float(uint16_t a)
{
    float b;
    asm("cvt.f32.f16 %0, %1;" : "=f"(b) : "h"(a));
    return b;
}
XCE_FN uint16_t float_to_half(float a)
{
    uint16_t b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(a));
    return b;
}
XCE_FN uint16_t double_to_half(double a) /* rounded once */
{
    uint16_t b;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(b) : "d"(a));
    return b;
}
XCE_FN float exp2_unit(float a) /* to 2 ulp */
{
    float b;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
    return b;
}
#if __CUDA_ARCH__ >= 800
#define XCE_PACKS
XCE_FN uint32_t pack_half(float low, float high)
{
    uint32_t b;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(b) : "f"(high), "f"(low));
    return b;
}
XCE_FN uint32_t pack_bfloat(float low, float high)
{
    uint32_t b;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(b) : "f"(high), "f"(low));
    return b;
}
XCE_FN float max_or_nan(float a, float b)
{
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
/* 16 bytes on their way to shared memory, past the registers; there after wait_for_copies(), for the thread that asked */
XCE_FN void copy_16(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}
XCE_FN void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
XCE_FN float max_or_nan(float a, float b) { return b > a ? b : a; } /* where a is NaN; b never is */
XCE_FN void copy_16(void *to, const void *from) { *(uint4 *)to = *(const uint4 *)from; }
XCE_FN void wait_for_copies() {}
#endif
#endif

/* ---- 16-bit floats, rounded to the nearest, ties to even ----------------------------------------------------------------- */

#if defined(XCE_STORAGE_float16) || defined(XCE_OUTPUT_float16)
XCE_FN float short_load(uint16_t a) { return half_to_float(a); }
XCE_FN uint16_t short_store(float a) { return float_to_half(a); }
#else
XCE_FN float short_load(uint16_t a) { return __int_as_float((int)((uint32_t)a << 16)); }
XCE_FN uint16_t short_store(float a)
{
#if defined(XCE_PACKS)
    return (uint16_t)pack_bfloat(a, 0);
#endif
    uint32_t bits = (uint32_t)__float_as_int(a);
    return (uint16_t)(a != a ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#endif
XCE_FN uint32_t short_pack(float low, float high)
{
#if !defined(XCE_PACKS)
    return (uint32_t)short_store(high) << 16 | short_store(low);
#elif defined(XCE_STORAGE_float16) || defined(XCE_OUTPUT_float16)
    return pack_half(low, high);
#else
    return pack_bfloat(low, high);
#endif
}
#if defined(XCE_SHORT)
XCE_FN scalar s_load(storage a) { return short_load(a); }
XCE_FN storage s_store(scalar a) { return short_store(a); }
#else
XCE_FN scalar s_load(storage a) { return a; }
XCE_FN storage s_store(scalar a) { return a; }
#endif

template <class T> XCE_FN void put(char *at, scalar a) /* a number of type storage or output */
{
    if (sizeof(T) == 2)
        *(uint16_t *)at = short_store((float)a);
    else
        *(T *)at = (T)a;
}

/* ---- 16 bytes of an array ----------------------------------------------------------------------------------------------- */

enum { VEC = 16 / (int)sizeof(storage) };

struct __align__(16) chunk { uint32_t word[4]; };

XCE_FN void unpack(const chunk &raw, scalar *x)
{
#pragma unroll
    for (int i = 0; i < VEC; i++) {
#if defined(XCE_STORAGE_float64)
        x[i] = __longlong_as_double((int64_t)((uint64_t)raw.word[2 * i + 1] << 32 | raw.word[2 * i]));
#elif defined(XCE_STORAGE_bfloat16)
        x[i] = __int_as_float((int)(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16));
#elif defined(XCE_STORAGE_float16)
        x[i] = half_to_float((uint16_t)(raw.word[i / 2] >> 16 * (i % 2)));
#else
        x[i] = __int_as_float((int)raw.word[i]);
#endif
    }
}

XCE_FN void enter(chunk *raw, int i, storage a) /* entry i of a chunk, which was 0 */
{
#if defined(XCE_STORAGE_float64)
    uint64_t bits = (uint64_t)__double_as_longlong(a);
    raw->word[2 * i] = (uint32_t)bits, raw->word[2 * i + 1] = (uint32_t)(bits >> 32);
#elif defined(XCE_SHORT)
    raw->word[i / 2] |= (uint32_t)a << 16 * (i % 2);
#else
    raw->word[i] = (uint32_t)__float_as_int(a);
#endif
}

XCE_FN scalar sum_of(const scalar *a) /* of a chunk */
{
    scalar pair[VEC / 2];
#pragma unroll
    for (int i = 0; i < VEC / 2; i++)
        pair[i] = a[2 * i] + a[2 * i + 1];
    if (VEC == 8)
        return (pair[0] + pair[1 % (VEC / 2)]) + (pair[2 % (VEC / 2)] + pair[3 % (VEC / 2)]);
    return VEC == 4 ? pair[0] + pair[1 % (VEC / 2)] : pair[0];
}

/* VEC numbers of type storage or output, at a place aligned to them */
template <class T> XCE_FN void put_all(char *at, const scalar *a)
{
    if (sizeof(T) == 2) {
        uint32_t word[VEC / 2];
#pragma unroll
        for (int i = 0; i < VEC / 2; i++)
            word[i] = short_pack((float)a[2 * i], (float)a[2 * i + 1]);
        if (VEC == 8)
            *(uint4 *)at = make_uint4(word[0], word[1], word[2 % (VEC / 2)], word[3 % (VEC / 2)]);
        else
            *(uint2 *)at = make_uint2(word[0], word[1 % (VEC / 2)]);
    } else {
        chunk raw = {{0, 0, 0, 0}};
#pragma unroll
        for (int i = 0; i < VEC; i++)
            enter(&raw, i, (storage)a[i]);
        *(chunk *)at = raw;
    }
}

#endif
