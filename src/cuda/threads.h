/* The numbers of a CUDA thread: `real` is one scalar. Compiled by NVRTC, which has no headers of C. */
#ifndef XCE_THREADS_H
#define XCE_THREADS_H

#define XCE_PASTE(a, b) XCE_PASTED(a, b)
#define XCE_PASTED(a, b) a##b
#define XCE_FN static __device__ __forceinline__
#define XCE_PART static __device__ __noinline__ /* compile time; what matters calls none of them for each entry */
#define XCE_TABLE static __device__ const
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
typedef uint16_t storage;
#else
typedef scalar storage;
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

/* ---- clusters: blocks that see each other's shared memory, from compute capability 9.0 on ------------------------------- */

#if !defined(XCE_EMULATED) /* by tests/emulation.h */
#define XCE_SHARED(type, name) __shared__ type name
#define XCE_SHARED_ARRAY(type, name) extern __shared__ type name[]
#define XCE_KERNEL(cluster) XCE_PASTE(XCE_KERNEL_, cluster)
#define XCE_KERNEL_1 extern "C" __global__ void
#if __CUDA_ARCH__ >= 900
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
XCE_FN int cluster_rank() { return 0; } /* never called: the backend does not choose clusters there */
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
#endif

/* 16-bit floats, rounded to the nearest, ties to even */
#if defined(XCE_STORAGE_bfloat16)
XCE_FN scalar s_load(storage a) { return __int_as_float((int)((uint32_t)a << 16)); }
XCE_FN storage s_store(scalar a)
{
    uint32_t bits = (uint32_t)__float_as_int(a);
    return (storage)(a != a ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#elif defined(XCE_STORAGE_float16)
XCE_FN scalar s_load(storage a) { return half_to_float(a); }
XCE_FN storage s_store(scalar a) { return float_to_half(a); }
#else
XCE_FN scalar s_load(storage a) { return a; }
XCE_FN storage s_store(scalar a) { return a; }
#endif

#endif
