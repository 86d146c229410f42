/* What the threads of a row agree on: by warps in a butterfly, by blocks and clusters in the order of their parts, so that every
 * run has the same bits. No atomics. */
#ifndef XCE_TEAM_H
#define XCE_TEAM_H

struct message_board {
    double warp[32][4], block[4]; /* a message each */
};

struct greatest { /* the greatest value, and the first of the places that have it */
    scalar value;
    int64_t place;
    XCE_FN greatest join(const greatest &s, const greatest &t)
    {
        return t.value > s.value || (t.value == s.value && t.place < s.place) ? t : s;
    }
};

template <int N> struct sums {
    scalar at[N];
    XCE_FN sums join(const sums &s, const sums &t)
    {
        sums u;
        for (int i = 0; i < N; i++)
            u.at[i] = s.at[i] + t.at[i];
        return u;
    }
};

struct statistics {
    scalar spread;
    int64_t above;
    XCE_FN statistics join(const statistics &s, const statistics &t)
    {
        statistics u = {s.spread + t.spread, s.above + t.above};
        return u;
    }
};

template <int GROUP> XCE_FN unsigned lanes_of_group()
{
    if (GROUP >= 32)
        return 0xffffffffu;
    int first = (int)(threadIdx.y * blockDim.x) % 32;
    return ((1u << (GROUP & 31)) - 1) << first;
}

template <int GROUP, int CLUSTER> XCE_FN void group_barrier()
{
    if (CLUSTER > 1)
        cluster_barrier();
    else if (GROUP > 32)
        __syncthreads();
    else
        __syncwarp(lanes_of_group<GROUP>());
}

template <class M> XCE_FN M shuffled(unsigned lanes, const M &m, int step)
{
    union { M m; uint32_t word[sizeof(M) / 4]; } mine, other;
    mine.m = m;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(M) / 4); i++)
        other.word[i] = __shfl_xor_sync(lanes, mine.word[i], step);
    return other.m;
}

template <int GROUP, int CLUSTER, class M> XCE_FN M agree(M m, message_board *board)
{
    const unsigned lanes = lanes_of_group<GROUP>();
#pragma unroll
    for (int step = (GROUP < 32 ? GROUP : 32) / 2; step; step /= 2) {
        M other = shuffled(lanes, m, step);
        /* the lower lane's part first, so that both partners get the same bits, NaN and -0 included */
        m = (threadIdx.x & step) ? M::join(other, m) : M::join(m, other);
    }
    if (GROUP > 32) {
        if (threadIdx.x % 32 == 0)
            *(M *)board->warp[threadIdx.x / 32] = m;
        __syncthreads();
        m = *(const M *)board->warp[0];
#pragma unroll
        for (int w = 1; w < GROUP / 32; w++)
            m = M::join(m, *(const M *)board->warp[w]);
        __syncthreads();
    }
    if (CLUSTER > 1) {
        if (threadIdx.x == 0)
            *(M *)board->block = m;
        cluster_barrier();
        m = *(const M *)cluster_address(&board->block[0], 0);
#pragma unroll
        for (int b = 1; b < CLUSTER; b++)
            m = M::join(m, *(const M *)cluster_address(&board->block[0], b));
        cluster_barrier();
    }
    return m;
}

XCE_FN void add_to(real_sum *s, scalar a) { *s = r_sum_add(*s, a); }

#endif
