/* A GPU for tests, on the CPU: each thread of a block, or of a cluster of blocks, is a fibre; barriers and shuffles switch to
 * the next one. It finds wrong indices and wrong algorithms, also under the sanitizers; it does not find races. */
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define XCE_CUDA
#define XCE_EMULATED
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline, unused))
#define __noinline__ __attribute__((noinline, unused))
#define __align__(n) __attribute__((aligned(n)))

namespace emulation {

struct int3 { unsigned x = 0, y = 0, z = 0; };

struct barrier {
    int arrived = 0;
    unsigned generation = 0;
};

const size_t SHARED = 16 << 10;

struct block_state {
    std::vector<char> dynamic, shared;
    barrier all, warps[32][32]; /* by warp and first lane */
    alignas(16) char slots[1024][16];
};

const size_t STACK = 64 << 10;

struct fibre {
    ucontext_t context;
    int3 thread, block;
    int number, rank; /* in its block; of the block in the cluster */
    bool done = false;
};

inline std::vector<fibre> fibres;
inline std::vector<char> stacks; /* kept from launch to launch */
inline std::vector<block_state> blocks;
inline barrier cluster_wide;
inline ucontext_t scheduler;
inline fibre *current;
inline int3 grid_dim, block_dim;
inline unsigned steps; /* counts what moved on, to notice a deadlock */
inline unsigned turn; /* of clusters: in every second one the last fibre goes first, which shows who relies on the other order */

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait(barrier &b, int expected)
{
    steps++;
    if (++b.arrived == expected) {
        b.arrived = 0;
        b.generation++;
        return;
    }
    unsigned generation = b.generation;
    while (b.generation == generation)
        yield();
    steps++;
}

inline block_state &mine() { return blocks[current->rank]; }
inline int threads_of_block() { return (int)(block_dim.x * block_dim.y); }

inline void warp_wait(unsigned lanes)
{
    wait(mine().warps[current->number / 32][__builtin_ctz(lanes)], __builtin_popcount(lanes));
}

template <class T> T shuffle_xor(unsigned lanes, T value, int step)
{
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes here");
    int lane = current->number % 32, from = lane ^ step;
    if (!(lanes >> lane & 1) || !(lanes >> from & 1)) {
        std::fprintf(stderr, "shuffle of lane %d with lane %d outside of mask %x\n", lane, from, lanes);
        std::abort();
    }
    std::memcpy(mine().slots[current->number], &value, sizeof value);
    warp_wait(lanes);
    std::memcpy(&value, mine().slots[current->number - lane + from], sizeof value);
    warp_wait(lanes);
    return value;
}

inline void (*body)(void);

inline void run_fibre()
{
    body();
    current->done = true;
    steps++;
    while (true)
        yield();
}

/* Run the blocks of a grid, cluster by cluster. */
inline void launch(void (*kernel)(void), unsigned grid, unsigned x, unsigned y, int cluster, size_t dynamic)
{
    body = kernel;
    grid_dim.x = grid, grid_dim.y = grid_dim.z = 1;
    block_dim.x = x, block_dim.y = y, block_dim.z = 1;
    int threads = (int)(x * y);
    for (unsigned first = 0; first < grid; first += cluster) {
        blocks.resize(cluster);
        cluster_wide = barrier();
        fibres.assign((size_t)threads * cluster, fibre());
        if (stacks.size() < fibres.size() * STACK)
            stacks.resize(fibres.size() * STACK);
        for (auto &b : blocks) { /* shared memory starts as NaN */
            b.dynamic.assign(dynamic, (char)0xff);
            b.shared.assign(SHARED, (char)0xff);
            b.all = barrier();
            std::memset(b.warps, 0, sizeof b.warps);
        }
        for (int i = 0; i < threads * cluster; i++) {
            fibre &f = fibres[i];
            f.rank = i / threads, f.number = i % threads;
            f.thread.x = f.number % x, f.thread.y = f.number / x;
            f.block.x = first + f.rank;
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = stacks.data() + i * STACK;
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = &scheduler;
            makecontext(&f.context, run_fibre, 0);
        }
        turn++;
        for (bool left = true; left;) {
            unsigned before = steps;
            left = false;
            for (size_t i = 0; i < fibres.size(); i++) {
                fibre &f = fibres[turn % 2 ? i : fibres.size() - 1 - i];
                if (!f.done) {
                    current = &f;
                    swapcontext(&scheduler, &f.context);
                    left |= !f.done;
                }
            }
            if (left && steps == before) {
                std::fprintf(stderr, "deadlock: threads wait for others that do not come\n");
                std::abort();
            }
        }
    }
}

inline void *shared_variable(size_t offset, size_t size)
{
    if (offset + size > mine().shared.size())
        std::abort();
    return mine().shared.data() + offset;
}

} // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)
#define __syncthreads() emulation::wait(emulation::mine().all, emulation::threads_of_block())
#define __syncwarp(lanes) emulation::warp_wait(lanes)
#define __shfl_xor_sync(lanes, value, step) emulation::shuffle_xor(lanes, value, step)

/* the variables of a kernel, one after the other */
#define XCE_SHARED(type, name) \
    type &name = *(type *)emulation::shared_variable(4096 * (__COUNTER__ - emulation_counter), sizeof(type))
#define XCE_SHARED_ARRAY(type, name) type *name = (type *)emulation::mine().dynamic.data()
static const int emulation_counter = __COUNTER__ + 1;

static inline int cluster_rank() { return emulation::current->rank; }
static inline void cluster_barrier()
{
    emulation::wait(emulation::cluster_wide, emulation::threads_of_block() * (int)emulation::blocks.size());
}
template <class T> static inline const T *cluster_address(const T *mine, int rank)
{
    size_t offset = (const char *)mine - emulation::mine().shared.data();
    return (const T *)(emulation::blocks[rank].shared.data() + offset);
}

static inline float __int_as_float(int a) { float b; std::memcpy(&b, &a, sizeof b); return b; }
static inline int __float_as_int(float a) { int b; std::memcpy(&b, &a, sizeof b); return b; }
static inline double __longlong_as_double(long long a) { double b; std::memcpy(&b, &a, sizeof b); return b; }
static inline long long __double_as_longlong(double a) { long long b; std::memcpy(&b, &a, sizeof b); return b; }
static inline float half_to_float(uint16_t a) { _Float16 b; std::memcpy(&b, &a, sizeof b); return (float)b; }
static inline uint16_t double_to_half(double a) { _Float16 b = (_Float16)a; uint16_t c; std::memcpy(&c, &b, sizeof c); return c; }
static inline uint16_t float_to_half(float a) { _Float16 b = (_Float16)a; uint16_t c; std::memcpy(&c, &b, sizeof c); return c; }
static inline float exp2_unit(float a) { float b = std::exp2(a); return b < 0x1p-126f ? 0 : b; } /* ftz */
static inline float max_or_nan(float a, float b) { return b > a ? b : a; }
static inline void copy_16(void *to, const void *from) { std::memcpy(to, from, 16); }
static inline void wait_for_copies() {}
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::fabs;
using std::fmax;
using std::fma;

#define XCE_JOB(type) type
#define XCE_BOUNDS(threads, blocks)
#define XCE_KERNEL(cluster) static void
