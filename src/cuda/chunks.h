/* Rows in chunks of 16 bytes, of classes that lie side by side. Each is read once: a thread keeps its chunks in shared memory
 * (`cached` of them; the others it reads again). The row is walked for its maximum, for the sums, and to be written. The loops
 * do nothing but that: what is different at the top, at the label and beyond the ends is done before or after. */
#ifndef XCE_CHUNKS_H
#define XCE_CHUNKS_H

/* Chunks of 16 bytes: the first one may begin before the row, the last one end beyond it. So which thread adds what, and with it
 * the bits, depends on how far the row begins from a multiple of 16 bytes. */
struct row_chunks {
    const char *x;             /* where the first one begins */
    char *grad, *hess;         /* where the first one's entries would go */
    unsigned count, shift;     /* entries of the first one that lie before the row */
    unsigned first_whole, whole;
    bool grad_fits, hess_fits; /* whether whole chunks can be stored in one piece */
};

XCE_FN row_chunks chunks_of(const row_job &j, const row_view &v)
{
    row_chunks s;
    s.shift = (unsigned)((uint64_t)v.x % 16 / sizeof(storage));
    s.x = v.x - s.shift * sizeof(storage);
    s.grad = v.grad ? v.grad - s.shift * sizeof(output) : 0, s.hess = v.hess ? v.hess - s.shift * sizeof(storage) : 0;
    s.count = (unsigned)((j.n_classes + s.shift + VEC - 1) / VEC);
    s.first_whole = s.shift != 0;
    unsigned end = (unsigned)((j.n_classes + s.shift) / VEC);
    s.whole = end > s.first_whole ? end - s.first_whole : 0;
    s.grad_fits = (uint64_t)s.grad % (VEC * sizeof(output)) == 0, s.hess_fits = (uint64_t)s.hess % 16 == 0;
    return s;
}

XCE_FN bool is_whole(const row_chunks &s, unsigned k) { return k - s.first_whole < s.whole; }

XCE_FN bool in_row(const row_job &j, const row_chunks &s, unsigned k, int i)
{
    int64_t c = (int64_t)k * VEC + i - s.shift;
    return c >= 0 && c < j.n_classes;
}

XCE_FN chunk read_ends(const row_job &j, const row_chunks &s, unsigned k) /* -inf beyond the row */
{
    chunk raw = {{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        storage a = s_store(-XCE_INF);
        if (in_row(j, s, k, i))
            a = ((const storage *)(s.x + (uint64_t)k * 16))[i];
        enter(&raw, i, a);
    }
    return raw;
}

XCE_FN chunk read_chunk(const row_job &j, const row_chunks &s, unsigned k)
{
    return is_whole(s, k) ? *(const chunk *)(s.x + (uint64_t)k * 16) : read_ends(j, s, k);
}

template <class T>
XCE_FN void write_chunk(const row_job &j, const row_chunks &s, char *row, bool fits, unsigned k, const scalar *a)
{
    char *p = row + (uint64_t)k * (VEC * sizeof(T));
    if (fits && is_whole(s, k))
        put_all<T>(p, a);
    else {
#pragma unroll
        for (int i = 0; i < VEC; i++)
            if (in_row(j, s, k, i))
                put<T>(p + i * sizeof(T), a[i]);
    }
}

/* Calls f(k, chunk, whether it was kept) for the chunks of a thread. */
template <int GROUP, int CLUSTER, class F>
XCE_FN void each_chunk(const row_job &j, const row_chunks &s, unsigned rank, const chunk *kept, F f)
{
    unsigned k = rank;
    for (int i = 0; i < (int)j.cached && k < s.count; i++, k += GROUP * CLUSTER)
        f(k, kept[i * GROUP], true);
    for (; k < s.count; k += GROUP * CLUSTER)
        f(k, read_chunk(j, s, k), false);
}

/* Bring what a thread keeps to shared memory, all at once. */
template <int GROUP, int CLUSTER>
XCE_FN void keep_chunks(const row_job &j, const row_chunks &s, unsigned rank, chunk *kept)
{
    unsigned k = rank;
    for (int i = 0; i < (int)j.cached && k < s.count; i++, k += GROUP * CLUSTER) {
        if (is_whole(s, k))
            copy_16(kept + i * GROUP, s.x + (uint64_t)k * 16);
        else
            kept[i * GROUP] = read_ends(j, s, k);
    }
    wait_for_copies();
}

/* The place of the greatest entry in the chunk where a thread found it. */
template <int GROUP, int CLUSTER>
XCE_FN int64_t place_in_chunk(const row_job &j, const row_chunks &s, unsigned rank, const chunk *kept, unsigned k,
                              scalar value)
{
    unsigned i = (k - rank) / (GROUP * CLUSTER);
    scalar x[VEC];
    unpack(i < (unsigned)j.cached ? kept[i * GROUP] : read_chunk(j, s, k), x);
    int place = 0;
#pragma unroll
    for (int n = VEC - 1; n >= 0; n--)
        place = x[n] == value ? n : place;
    return (int64_t)k * VEC + place - s.shift;
}

template <int GROUP, int CLUSTER>
XCE_FN greatest find_top(const row_job &j, const row_chunks &s, unsigned rank, const chunk *kept, message_board *board)
{
    scalar value = -XCE_INF;
    unsigned where = ~0u;
    each_chunk<GROUP, CLUSTER>(j, s, rank, kept, [&](unsigned k, const chunk &raw, bool) {
        scalar x[VEC];
        unpack(raw, x);
        scalar m = x[0];
#pragma unroll
        for (int i = 1; i < VEC; i++)
            m = r_greatest(m, x[i]);
        if (m > value)
            value = m, where = k;
    });
    greatest top = {value, NOWHERE};
    if (where != ~0u)
        top.place = place_in_chunk<GROUP, CLUSTER>(j, s, rank, kept, where, value);
    return agree<GROUP, CLUSTER>(top, board);
}

/* Where an entry of the row is among its chunks. */
struct chunk_place {
    unsigned k;
    int i;
};

XCE_FN chunk_place place_of(const row_chunks &s, int64_t c) /* nowhere, for c = -1 */
{
    uint64_t n = (uint64_t)(c + s.shift);
    chunk_place at = {c < 0 ? ~0u : (unsigned)(n / VEC), (int)(n % VEC)};
    return at;
}

template <int GROUP, int CLUSTER> XCE_FN bool is_mine(chunk_place at, unsigned rank)
{
    return at.k != ~0u && at.k % (GROUP * CLUSTER) == rank;
}

/* Take the top entry out of what its thread keeps: the exponential of what it leaves is 0. */
template <int GROUP, int CLUSTER> XCE_FN void remove_top(const row_job &j, chunk_place top, unsigned rank, chunk *kept)
{
    unsigned i = top.k / (GROUP * CLUSTER);
    if (is_mine<GROUP, CLUSTER>(top, rank) && i < (unsigned)j.cached)
        ((storage *)(kept + i * GROUP))[top.i] = s_store(-XCE_INF);
}

XCE_FN void remove(scalar *a, bool is_there, int place) /* without an index that is not a constant */
{
#pragma unroll
    for (int i = 0; i < VEC; i++)
        a[i] = is_there && i == place ? 0 : a[i];
}

/* The coefficients of a chunk; 0 beyond the row. */
XCE_FN void coefficients(const row_job &j, const row_view &v, const row_chunks &s, unsigned k, scalar *d)
{
    const char *q = v.q ? v.q + ((int64_t)k * 16 - (int64_t)(s.shift * sizeof(storage))) : 0;
    const bool is_near = is_whole(s, k) && !j.q_is_scalar && j.q.classes == sizeof(storage) && (uint64_t)q % 16 == 0;
    if (v.q && is_near)
        unpack(*(const chunk *)q, d);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        int64_t c = (int64_t)k * VEC + i - s.shift;
        if (c < 0 || c >= j.n_classes)
            d[i] = 0;
        else
            d[i] = coefficient_of(j, c, !v.q ? 0 : is_near ? d[i] : probability(j, v, c), v.share);
    }
}

template <bool HESS>
XCE_FN void put_entry(const row_view &v, const row_chunks &s, chunk_place at, scalar g, scalar h)
{
    uint64_t n = (uint64_t)at.k * VEC + at.i;
    if (HESS)
        put<storage>(s.hess + n * sizeof(storage), h);
    if (!HESS || v.grad)
        put<output>(s.grad + n * sizeof(output), g);
}

/* What the entries of a row get. */
template <int GROUP, int CLUSTER, int LEVEL, bool HESS>
XCE_FN void write_row(const row_job &j, const row_view &v, const row_chunks &s, const row_outputs &r, unsigned rank,
                      const chunk *kept)
{
    each_chunk<GROUP, CLUSTER>(j, s, rank, kept, [&](unsigned k, const chunk &raw, bool) {
        scalar x[VEC], g[VEC], h[VEC];
        unpack(raw, x);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const jet at = derivatives(j, r, r_pair(x[i], 0), r_exp_relative(x[i], r.state.ref));
            g[i] = at.d1, h[i] = at.d2;
        }
        if (WHAT(j) == LOSS && is_linear<LEVEL>(j)) {
            scalar d[VEC];
            coefficients(j, v, s, k, d);
#pragma unroll
            for (int i = 0; i < VEC; i++)
                g[i] = linear_derivative(r.out, g[i], d[i]);
        }
        if (HESS)
            write_chunk<storage>(j, s, s.hess, s.hess_fits, k, h);
        if (!HESS || v.grad)
            write_chunk<output>(j, s, s.grad, s.grad_fits, k, g);
    });
    /* what is different at the label and the top, by the thread that has just written there */
    const chunk_place top = place_of(s, r.top), label = place_of(s, v.label.value);
    if (WHAT(j) == LOSS && is_mine<GROUP, CLUSTER>(label, rank))
        put_entry<HESS>(v, s, label, r.grad_label, r.hess_label);
    if (is_mine<GROUP, CLUSTER>(top, rank)) {
        scalar g = WHAT(j) == LOSS ? r.grad_top : WHAT(j) == SOFTMAX ? row_top(r.state).p : row_top(r.state).u;
        put_entry<HESS>(v, s, top, g, r.hess_top);
    }
}

template <int GROUP, int CLUSTER>
XCE_FN void fill_row(const row_job &j, const row_view &v, const row_chunks &s, filled_row f, unsigned rank)
{
    scalar g[VEC], h[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++)
        g[i] = h[i] = f.elsewhere;
    for (unsigned k = rank; k < s.count; k += GROUP * CLUSTER) {
        if (v.hess)
            write_chunk<storage>(j, s, s.hess, s.hess_fits, k, h);
        if (v.grad)
            write_chunk<output>(j, s, s.grad, s.grad_fits, k, g);
    }
    if (v.grad && is_mine<GROUP, CLUSTER>(place_of(s, v.label.value), rank))
        put<output>(v.grad + v.label.value * sizeof(output), f.at_label);
}

template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void chunked_row(const row_job &j, int64_t row, chunk *kept, message_board *board, row_finished *shared)
{
    const unsigned rank = (CLUSTER > 1 ? cluster_rank() * GROUP : 0) + threadIdx.x;
    const row_view v = view_row<LEVEL>(j, row);
    const row_chunks s = chunks_of(j, v);
    if (is_filled(j, v)) {
        fill_row<GROUP, CLUSTER>(j, v, s, fill<GROUP, CLUSTER>(j, v, rank == 0), rank);
        return;
    }
    keep_chunks<GROUP, CLUSTER>(j, s, rank, kept);
    const greatest top = find_top<GROUP, CLUSTER>(j, s, rank, kept, board);
    row_outputs r;
    r.top = top.value > -XCE_INF ? top.place : 0;
    const chunk_place top_at = place_of(s, r.top);
    const exp_reference ref = r_exp_reference(top.value);

    /* the sums over all others; beyond the row the exponential is 0 */
    real_sum rest = {0, 0}, distances = {0, 0}, weights = {0, 0}, spread = {0, 0};
    int64_t above = 0;
    remove_top<GROUP, CLUSTER>(j, top_at, rank, kept);
    each_chunk<GROUP, CLUSTER>(j, s, rank, kept, [&](unsigned k, const chunk &raw, bool was_kept) {
        scalar x[VEC], e[VEC];
        unpack(raw, x);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            e[i] = r_exp_relative(x[i], ref);
        if (!was_kept)
            remove(e, k == top_at.k, top_at.i);
        add_to(&rest, sum_of(e));
        if (is_linear<LEVEL>(j)) {
            scalar d[VEC];
            coefficients(j, v, s, k, d);
            remove(d, k == top_at.k, top_at.i);
            add_to(&weights, sum_of(d));
#pragma unroll
            for (int i = 0; i < VEC; i++)
                d[i] = below_top(d[i], top.value, x[i]);
            add_to(&distances, sum_of(d));
        }
        if (WHAT(j) == STATS) {
            int n = 0;
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                e[i] = below_top(e[i], top.value, x[i]);
                n += x[i] > v.label_logit && (was_kept || !(k == top_at.k && i == top_at.i));
            }
            above += n;
            add_to(&spread, sum_of(e));
        }
    });
    scalar linear[2] = {0, 0};
    scalar sum;
    if (LEVEL > SPARSE) {
        sums<3> all = {{r_sum_total(rest), r_sum_total(distances), r_sum_total(weights)}};
        all = agree<GROUP, CLUSTER>(all, board);
        sum = all.at[0], linear[0] = all.at[1], linear[1] = all.at[2];
    } else {
        sums<1> all = {{r_sum_total(rest)}};
        sum = agree<GROUP, CLUSTER>(all, board).at[0];
    }
    r.state = row_close(top.value, sum);

    if (WHAT(j) == LOSS)
        close_loss<GROUP>(j, v, &r, shared, rank == 0, [&] {
            finish_row<LEVEL>(j, v, &r, linear_sums(r.state, linear[0], linear[1]));
        });
    else {
        statistics found = {r_sum_total(spread), above + (rank == 0 && top.value > v.label_logit)};
        put_statistics<GROUP, CLUSTER, LEVEL>(j, v, &r, top.value, linear[0], found, rank, board);
    }
    if (v.grad || v.hess) {
        group_barrier<GROUP, CLUSTER>(); /* others may still read the entry at the label where the gradient goes */
        if (WHAT(j) == LOSS && v.hess)
            write_row<GROUP, CLUSTER, LEVEL, true>(j, v, s, r, rank, kept);
        else
            write_row<GROUP, CLUSTER, LEVEL, false>(j, v, s, r, rank, kept);
    }
}

#endif
