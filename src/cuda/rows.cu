/* The schedules of the softmax losses on a GPU.
 *
 * GROUP threads share a row: up to 32, several groups in a block; more, a block, or a CLUSTER of blocks. Classes that lie
 * side by side are read in chunks of 16 bytes, once: a thread keeps its chunks in shared memory (`cached` of them; the others
 * it reads again). The row is walked for its maximum, for the sums, and to be written (`chunked_row`). Classes that lie apart
 * belong to one thread each row, neighbours to neighbours; they, and the options that need more than the logits and a
 * coefficient at each entry, are walked entry by entry (`plain_row`).
 *
 * A row's sums are added by each thread in the order of its classes, by warps in a butterfly, by blocks and clusters in the
 * order of their parts: the same bits in every run. No atomics. Offsets have 64 bits, within a row those of chunks 32.
 */

/* what a module was compiled for, where it knows */
#if defined(XCE_PHI)
#define PHI(j) XCE_PHI
#define WHAT(j) XCE_WHAT
#else
#define PHI(j) ((int)(j).phi)
#define WHAT(j) ((int)(j).what)
#endif

/* How general: labels only; coefficients at all entries, in which the loss is linear; anything. */
enum { SPARSE, DENSE, FULL };

/* ---- where things are ------------------------------------------------------------------------------------------------- */

struct row_place {
    int64_t row, outer, inner; /* the last two for up to two axes */
};

XCE_FN row_place find_row(const row_job &j, int64_t row)
{
    row_place at = {row, row, 0};
    if (j.axes == 2) {
        if ((uint64_t)row >> 32 || j.shape[1] >> 32)
            at.outer = row / j.shape[1];
        else
            at.outer = (uint32_t)row / (uint32_t)j.shape[1];
        at.inner = row - at.outer * j.shape[1];
    }
    return at;
}

XCE_FAR int64_t walk(const int64_t *shape, int axes, const int64_t *strides, int64_t flat) /* any number of axes */
{
    int64_t offset = 0;
    for (int a = axes - 1; a > 0; a--) {
        offset += flat % shape[a] * strides[a];
        flat /= shape[a];
    }
    return offset + flat * strides[0];
}

XCE_FN char *row_of(const row_job &j, const operand &o, const row_place &at)
{
    if (!o.data)
        return 0;
    return o.data + (j.axes <= 2 ? at.outer * o.rows[0] + at.inner * o.rows[1]
                                 : walk(j.shape, (int)j.axes, o.rows, at.row));
}

XCE_FN int64_t read_integer(const char *p, int kind)
{
    switch (kind) {
    case -1: return *(const signed char *)p;
    case -2: return *(const short *)p;
    case -4: return *(const int32_t *)p;
    case 1: return *(const unsigned char *)p;
    case 2: return *(const uint16_t *)p;
    case 4: return *(const uint32_t *)p;
    default: return *(const int64_t *)p;
    }
}

struct label_of_row {
    int status;
    int64_t value; /* -1: none */
};

XCE_FN label_of_row read_label(const char *p, int kind, int64_t n_classes, int64_t ignore_index)
{
    label_of_row y = {INVALID, -1};
    int64_t value = read_integer(p, kind);
    if (kind == 8 && value < 0) /* above the largest int64: neither a class nor ignore_index */
        return y;
    if (value == ignore_index)
        y.status = IGNORED;
    else if (value >= 0 && value < n_classes)
        y.status = ACTIVE, y.value = value;
    return y;
}

/* ---- what the threads of a row agree on --------------------------------------------------------------------------------- */

struct message_board {
    double warp[32][3], block[3]; /* a message each */
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

const int64_t NOWHERE = 0x7fffffffffffffffLL;

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
XCE_FN scalar total(real_sum s) { return r_abs(s.high) == XCE_INF ? s.high : s.high + s.low; }

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

/* ---- a row ---------------------------------------------------------------------------------------------------------------- */

/* A row, as all its threads see it. */
struct row_view {
    row_place at;
    const char *x, *q, *where, *indices;
    char *grad, *hess;
    label_of_row label;
    scalar label_logit;        /* transformed */
    scalar index;              /* the coefficient of the labelled class; NaN for a bad label */
    scalar sample, scale;      /* its weight, and 1 over the denominator of the mean */
    scalar share;              /* eps / C, of the classes that `where` left */
};

/* What a row leaves for its entries. */
struct row_outputs {
    row_state state, teacher;
    scalar factor, b, d, out_exp, out_hess1, out_hess2;
    scalar value, grad_top, hess_top, grad_label, hess_label;
    int64_t top;
};

template <int LEVEL> XCE_FN scalar transformed(const row_job &j, const row_view &v, int64_t c, scalar x)
{
    if (LEVEL < FULL)
        return x;
    if (j.softcap != 0 || j.temperature != 1) {
        logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
        x = transform_logit(t, x);
    }
    return v.where && !v.where[c * j.where.classes] ? -XCE_INF : x;
}

XCE_FN scalar raw_entry(const row_job &j, const row_view &v, int64_t c)
{
    return s_load(*(const storage *)(v.x + c * j.x.classes));
}

template <int LEVEL> XCE_FN scalar entry(const row_job &j, const row_view &v, int64_t c)
{
    return transformed<LEVEL>(j, v, c, raw_entry(j, v, c));
}

template <int LEVEL> XCE_FN row_view view_row(const row_job &j, int64_t row)
{
    row_view v;
    v.at = find_row(j, row);
    v.x = row_of(j, j.x, v.at), v.grad = row_of(j, j.grad, v.at), v.hess = row_of(j, j.hess, v.at);
    v.q = LEVEL > SPARSE ? row_of(j, j.q, v.at) : 0;
    v.where = LEVEL == FULL ? row_of(j, j.where, v.at) : 0;
    v.indices = LEVEL == FULL ? row_of(j, j.indices, v.at) : 0;
    const char *label = row_of(j, j.label, v.at), *sample = row_of(j, j.sample, v.at);
    const bool has_loss = WHAT(j) == LOSS || WHAT(j) == NLL;
    v.label.status = ACTIVE, v.label.value = -1;
    if (label)
        v.label = read_label(label, (int)j.label_kind, j.n_classes, j.ignore_index);
    v.sample = sample ? *(const scalar *)sample : 1;
    v.index = 0;
    if (label && has_loss && v.label.status != IGNORED) {
        scalar rest = (scalar)(1 - j.label_smoothing);
        v.index = v.label.status == INVALID ? XCE_NAN : j.weight ? rest * j.weight[v.label.value] : rest;
    }
    if (!has_loss)
        v.label.status = ACTIVE;
    double denominator = j.denominator ? *j.denominator : 1;
    v.scale = denominator != 0 ? (scalar)(1 / denominator) : 0;
    v.label_logit = v.label.value >= 0 ? entry<LEVEL>(j, v, v.label.value) : 0;
    v.share = WHAT(j) == STATE ? 1 : (scalar)(j.label_smoothing / (double)j.n_classes);
    return v;
}

/* d = w ((1 - eps) q + eps / C) */
XCE_FN scalar coefficient_of(const row_job &j, const row_view &v, int64_t c, scalar q)
{
    scalar d = v.q ? r_fma((scalar)(1 - j.label_smoothing), q, v.share) : v.share;
    return j.weight ? d * j.weight[c] : d;
}

XCE_FN scalar probability(const row_job &j, const row_view &v, int64_t c)
{
    if (!v.q)
        return 0;
    const char *p = v.q + c * j.q.classes;
    return j.q_is_scalar ? *(const scalar *)p : s_load(*(const storage *)p);
}

XCE_FN scalar coefficient(const row_job &j, const row_view &v, int64_t c)
{
    return v.where && !v.where[c * j.where.classes] ? 0 : coefficient_of(j, v, c, probability(j, v, c));
}

/* All that is linear in the coefficients is summed with the exponentials, by one reading of the row. */
template <int LEVEL> XCE_FN bool is_linear(const row_job &j)
{
    return LEVEL > SPARSE && (WHAT(j) == STATE || (j.dense && PHI(j) == PHI_cross_entropy));
}

/* ---- what is done once a row --------------------------------------------------------------------------------------------- */

/* The classes of a sparse teacher, and the teacher's logits; of all classes: place = class. */
XCE_FN int64_t class_at(const row_job &j, const row_view &v, int64_t place)
{
    return read_label(v.indices + place * j.indices.classes, (int)j.index_kind, j.n_classes, -1).value;
}

XCE_FN scalar teacher_logit(const row_job &j, const row_view &v, int64_t place)
{
    scalar y = s_load(*(const storage *)(v.q + place * j.q.classes));
    logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
    return j.softcap != 0 || j.temperature != 1 ? transform_logit(t, y) : y;
}

/* phi at an entry, and where it is; with a teacher, at a place of it */
XCE_FN jet phi_at(const row_job &j, const row_view &v, const row_outputs &r, int64_t place, scalar x, log_prob *at)
{
    *at = row_entry(r.state, x);
    if (j.teacher)
        row_teacher(r.state, r.teacher, x, teacher_logit(j, v, place), at);
    return loss_phi(PHI(j), *at, (scalar)j.parameter);
}

/* `linear`: the sums of d (max - x) and of d; `phi`: those of the phis; `top_place`: where the teacher has the top class */
template <int LEVEL>
XCE_FN void finish_row(const row_job &j, const row_view &v, row_outputs *r, const scalar *linear, const scalar *phi,
                       int64_t top_place)
{
    const bool is_sparse = LEVEL == FULL && v.indices, is_dense = LEVEL > SPARSE && j.dense;
    row_target t;
    t.factor = v.sample * v.scale, t.weight = v.sample, t.index = v.index, t.label_logit = v.label_logit;
    t.label_is_top = v.label.value < 0 || v.label.value == r->top;
    t.d_top = t.d_label = t.v_top = t.t_top = t.gap_top = 0;
    t.sum = t.sum1 = t.sum2 = 0, t.z_loss = (scalar)j.z_loss;
    scalar outside = is_sparse ? share_outside(PHI(j)) : 0;
    if (LEVEL == FULL && j.teacher) {
        scalar y = is_sparse && top_place < 0 ? -XCE_INF : teacher_logit(j, v, is_sparse ? top_place : r->top);
        log_prob at;
        row_teacher(r->state, r->teacher, r->state.max, y, &at);
        t.d_top = 1, t.v_top = at.v, t.t_top = at.t, t.gap_top = at.d;
        if (r->teacher.log_z != r->teacher.log_z)
            t.index = XCE_NAN;
    } else if (is_dense) {
        t.d_top = coefficient(j, v, r->top);
        t.d_label = v.label.value >= 0 ? coefficient(j, v, v.label.value) : 0;
    }
    if (is_linear<LEVEL>(j)) {
        t.sum = linear[0] + weighted(linear[1], r->state.log_z);
        t.sum1 = 0 - linear[1];
    } else if (LEVEL == FULL && (is_dense || j.teacher)) {
        scalar rest = is_sparse ? r->state.rest * r->state.inverse * outside : 0;
        t.sum = phi[0] + rest, t.sum1 = phi[1] + rest, t.sum2 = phi[2] + rest;
    }
    row_result f = row_finish(r->state, t, PHI(j), (scalar)j.parameter);
    if (LEVEL == FULL && (j.softcap != 0 || j.temperature != 1)) {
        logit_transform with = {(scalar)j.softcap, (scalar)j.temperature};
        transform_derivatives(with, raw_entry(j, v, r->top), &f.grad_top, &f.hess_top);
        if (v.label.value >= 0)
            transform_derivatives(with, raw_entry(j, v, v.label.value), &f.grad_label, &f.hess_label);
    }
    r->factor = t.factor, r->b = f.b, r->d = f.d;
    r->out_exp = (outside - f.b) * t.factor * r->state.inverse;
    r->out_hess1 = (outside - f.b) * t.factor;
    r->out_hess2 = (f.b + f.d - outside - outside) * t.factor;
    r->grad_top = f.grad_top, r->hess_top = f.hess_top, r->grad_label = f.grad_label, r->hess_label = f.hess_label;
    r->value = f.value;
}

/* One warp finishes the row for the others; its value is stored. */
template <int GROUP, int LEVEL>
XCE_FN void close_loss(const row_job &j, const row_view &v, row_outputs *r, row_outputs *shared, bool is_first,
                       const scalar *linear, const scalar *phi, int64_t top_place)
{
    if (GROUP <= 32)
        finish_row<LEVEL>(j, v, r, linear, phi, top_place);
    else {
        if (threadIdx.x < 32) {
            finish_row<LEVEL>(j, v, r, linear, phi, top_place);
            if (threadIdx.x == 0)
                *shared = *r;
        }
        __syncthreads();
        *r = *shared;
    }
    if (is_first && j.value.data)
        *(scalar *)row_of(j, j.value, v.at) = r->value;
}

/* The row outputs of what is not a loss. */
template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void put_statistics(const row_job &j, const row_view &v, const row_outputs &r, scalar linear, statistics found,
                           int64_t rank, message_board *board)
{
    if (!j.value.data)
        return;
    scalar lse = row_lse(r.state);
    int64_t nan = -1;
    if (lse != lse && WHAT(j) != STATE) { /* of infinities it is the greatest of them; only NaN makes it NaN */
        greatest first = {0, NOWHERE};
        for (int64_t c = rank; c < j.n_classes && first.value == 0; c += GROUP * CLUSTER) {
            scalar x = entry<LEVEL>(j, v, c);
            if (x != x)
                first.value = 1, first.place = c;
        }
        first = agree<GROUP, CLUSTER>(first, board);
        nan = first.value != 0 ? first.place : -1;
        lse = nan < 0 ? r.state.max : lse;
    }
    if (rank != 0)
        return;
    *(scalar *)row_of(j, j.value, v.at) = WHAT(j) == STATE ? r.state.max : lse;
    if (WHAT(j) == LOGSUMEXP)
        return;
    *(scalar *)row_of(j, j.label_logit, v.at) = v.label.value >= 0 ? v.label_logit : XCE_NAN;
    if (WHAT(j) == STATE) {
        *(scalar *)row_of(j, j.spread, v.at) = r.state.rest / r.state.top;
        *(scalar *)row_of(j, j.linear, v.at) = linear;
        return;
    }
    *(scalar *)row_of(j, j.spread, v.at) = r.state.log_z + found.spread * r.state.inverse;
    *(int64_t *)row_of(j, j.top, v.at) = nan < 0 ? r.top : nan;
    *(int64_t *)row_of(j, j.rank, v.at) = v.label.value >= 0 && nan < 0 ? found.above : -1;
}

/* A row of which nothing is summed: its value, the derivative at the label, and what all other entries get. */
struct filled_row {
    scalar at_label, elsewhere;
};

XCE_FN bool is_filled(const row_job &j, const row_view &v)
{
    return WHAT(j) == NLL || v.label.status == IGNORED;
}

XCE_FN filled_row fill(const row_job &j, const row_view &v, bool is_first)
{
    scalar a = v.label.value >= 0 ? v.index * v.sample : 0, bad = v.label.status == INVALID ? XCE_NAN : 0;
    filled_row f = {v.label.status == ACTIVE ? -(a * v.scale) : bad, bad};
    if (is_first && j.value.data)
        *(scalar *)row_of(j, j.value, v.at) = v.label.status == IGNORED ? 0
                                              : v.label.value < 0     ? bad
                                              : a != 0                ? -a * v.label_logit
                                                                      : 0;
    return f;
}

/* ---- rows in chunks ------------------------------------------------------------------------------------------------------ */

/* Chunks of 16 bytes: the first one may begin before the row, the last one end beyond it. */
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
    s.x = v.x - s.shift * sizeof(storage), s.grad = v.grad - s.shift * sizeof(output);
    s.hess = v.hess - s.shift * sizeof(storage);
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
    const char *q = v.q - s.shift * sizeof(storage) + (uint64_t)k * 16;
    const bool is_near = is_whole(s, k) && !j.q_is_scalar && j.q.classes == sizeof(storage) && (uint64_t)q % 16 == 0;
    if (v.q && is_near)
        unpack(*(const chunk *)q, d);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        int64_t c = (int64_t)k * VEC + i - s.shift;
        if (c < 0 || c >= j.n_classes)
            d[i] = 0;
        else
            d[i] = coefficient_of(j, v, c, !v.q ? 0 : is_near ? d[i] : probability(j, v, c));
    }
}

template <bool HESS>
XCE_FN void put_entry(const row_job &j, const row_view &v, int64_t c, scalar g, scalar h)
{
    if (HESS)
        put<storage>(v.hess + c * sizeof(storage), h);
    if (!HESS || v.grad)
        put<output>(v.grad + c * sizeof(output), g);
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
            if (WHAT(j) == LOG_SOFTMAX) {
                g[i] = (x[i] - r.state.max) - r.state.log_z;
                continue;
            }
            scalar e = r_exp_relative(x[i], r.state.ref), p = e * r.state.inverse;
            g[i] = e * r.out_exp;
            if (HESS)
                h[i] = p * r_fma(p, r.out_hess2, r.out_hess1);
        }
        if (WHAT(j) == LOSS && is_linear<LEVEL>(j)) {
            scalar d[VEC];
            coefficients(j, v, s, k, d);
#pragma unroll
            for (int i = 0; i < VEC; i++)
                g[i] = r_fma(d[i], -r.factor, g[i]);
        }
        if (HESS)
            write_chunk<storage>(j, s, s.hess, s.hess_fits, k, h);
        if (!HESS || v.grad)
            write_chunk<output>(j, s, s.grad, s.grad_fits, k, g);
    });
    /* what is different at the label and the top, by the thread that has just written there */
    const chunk_place top = place_of(s, r.top), label = place_of(s, v.label.value);
    if (WHAT(j) == LOSS && is_mine<GROUP, CLUSTER>(label, rank))
        put_entry<HESS>(j, v, v.label.value, r.grad_label, r.hess_label);
    if (is_mine<GROUP, CLUSTER>(top, rank)) {
        scalar g = WHAT(j) == LOSS ? r.grad_top : WHAT(j) == SOFTMAX ? r.state.top * r.state.inverse : -r.state.log_z;
        put_entry<HESS>(j, v, r.top, g, r.hess_top);
    }
}

template <int GROUP, int CLUSTER>
XCE_FN void fill_row(const row_job &j, const row_view &v, const row_chunks &s, filled_row f, unsigned rank)
{
    scalar g[VEC], h[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++)
        g[i] = f.elsewhere, h[i] = WHAT(j) == NLL ? 0 : f.elsewhere;
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
XCE_FN void chunked_row(const row_job &j, int64_t row, chunk *kept, message_board *board, row_outputs *shared)
{
    const unsigned rank = (CLUSTER > 1 ? cluster_rank() * GROUP : 0) + threadIdx.x;
    const row_view v = view_row<LEVEL>(j, row);
    const row_chunks s = chunks_of(j, v);
    if (is_filled(j, v)) {
        fill_row<GROUP, CLUSTER>(j, v, s, fill(j, v, rank == 0), rank);
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
                d[i] = weighted(d[i], top.value - x[i]);
            add_to(&distances, sum_of(d));
        }
        if (WHAT(j) == STATS) {
            int n = 0;
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                e[i] = weighted(e[i], top.value - x[i]);
                n += x[i] > v.label_logit && (was_kept || !(k == top_at.k && i == top_at.i));
            }
            above += n;
            add_to(&spread, sum_of(e));
        }
    });
    scalar linear[2] = {0, 0};
    scalar sum;
    if (LEVEL > SPARSE) {
        sums<3> all = {{total(rest), total(distances), total(weights)}};
        all = agree<GROUP, CLUSTER>(all, board);
        sum = all.at[0], linear[0] = all.at[1], linear[1] = all.at[2];
    } else {
        sums<1> all = {{total(rest)}};
        sum = agree<GROUP, CLUSTER>(all, board).at[0];
    }
    r.state = row_close(top.value, sum);

    if (WHAT(j) == LOSS)
        close_loss<GROUP, LEVEL>(j, v, &r, shared, rank == 0, linear, linear, -1);
    else {
        statistics found = {total(spread), above};
        if (WHAT(j) == STATS)
            found = agree<GROUP, CLUSTER>(found, board);
        found.above += top.value > v.label_logit;
        put_statistics<GROUP, CLUSTER, LEVEL>(j, v, r, linear[0], found, rank, board);
        r.out_exp = r.state.inverse;
    }
    if (v.grad || v.hess) {
        group_barrier<GROUP, CLUSTER>(); /* others may still read the entry at the label where the gradient goes */
        if (v.hess)
            write_row<GROUP, CLUSTER, LEVEL, true>(j, v, s, r, rank, kept);
        else
            write_row<GROUP, CLUSTER, LEVEL, false>(j, v, s, r, rank, kept);
    }
}

/* ---- rows entry by entry ------------------------------------------------------------------------------------------------- */

/* The derivatives of one entry by the raw logit. */
XCE_FN void derivatives(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, scalar x, scalar *g,
                        scalar *h)
{
    scalar e = r_exp_relative(x, r.state.ref), p = e * r.state.inverse;
    *g = WHAT(j) == LOG_SOFTMAX ? (x - r.state.max) - r.state.log_z : e * r.out_exp;
    *h = p * r_fma(p, r.out_hess2, r.out_hess1);
}

template <int LEVEL>
XCE_FN void loss_derivatives(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, scalar x, scalar *g,
                             scalar *h)
{
    if (c == r.top || c == v.label.value) { /* by the raw logit already */
        *g = c == r.top ? r.grad_top : r.grad_label;
        *h = c == r.top ? r.hess_top : r.hess_label;
        return;
    }
    if (is_linear<LEVEL>(j))
        *g = r_fma(coefficient(j, v, c), -r.factor, *g);
    else if (LEVEL == FULL && j.dense) {
        log_prob at;
        jet f = phi_at(j, v, r, c, x, &at);
        scalar d = j.teacher ? 1 : coefficient(j, v, c);
        *g += r.factor * weighted(d, f.d1);
        *h += r.factor * (weighted(d, f.d2) * (at.not_p - at.p));
    }
    if (LEVEL == FULL && (j.softcap != 0 || j.temperature != 1)) {
        logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
        transform_derivatives(t, raw_entry(j, v, c), g, h);
    }
    if (v.where && !v.where[c * j.where.classes])
        *g = *h = 0;
}

/* The teacher's maximum and sum, and where it has the student's top class. */
template <int GROUP, int CLUSTER>
XCE_FN row_state meet_teacher(const row_job &j, const row_view &v, int64_t rank, int64_t top, int64_t *top_place,
                              message_board *board)
{
    const int64_t n = v.indices ? j.n_places : j.n_classes;
    greatest best = {-XCE_INF, NOWHERE}, place = {0, NOWHERE};
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar t = teacher_logit(j, v, c);
        if (t > best.value)
            best.value = t, best.place = c;
        if (v.indices && class_at(j, v, c) == top)
            place.place = c;
    }
    best = agree<GROUP, CLUSTER>(best, board);
    *top_place = top;
    if (v.indices) {
        place = agree<GROUP, CLUSTER>(place, board);
        *top_place = place.place < n ? place.place : -1;
    }
    const exp_reference ref = r_exp_reference(best.value);
    const int64_t greatest_place = best.value > -XCE_INF ? best.place : 0;
    real_sum rest = {0, 0};
    bool is_bad = false; /* a class out of range that nobody checked */
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        if (c != greatest_place)
            add_to(&rest, r_exp_relative(teacher_logit(j, v, c), ref));
        is_bad |= v.indices && class_at(j, v, c) < 0;
    }
    sums<1> all = {{is_bad ? XCE_NAN : total(rest)}};
    return row_close(best.value, agree<GROUP, CLUSTER>(all, board).at[0]);
}

/* The sums of phi and its derivatives over all classes but the top one, where they are not linear. */
template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void sum_phi(const row_job &j, const row_view &v, const row_outputs &r, int64_t rank, scalar *phi,
                    message_board *board)
{
    real_sum f[3] = {{0, 0}, {0, 0}, {0, 0}};
    const int64_t n = v.indices ? j.n_places : j.n_classes;
    for (int64_t place = rank; place < n; place += GROUP * CLUSTER) {
        int64_t c = v.indices ? class_at(j, v, place) : place;
        if (c < 0 || c == r.top)
            continue;
        log_prob at;
        jet g = phi_at(j, v, r, place, entry<LEVEL>(j, v, c), &at);
        scalar d = j.teacher ? 1 : coefficient(j, v, c), outside = v.indices ? at.p * share_outside(PHI(j)) : 0;
        add_to(&f[0], weighted(d, g.value) - outside), add_to(&f[1], weighted(d, g.d1) - outside);
        add_to(&f[2], weighted(d, g.d2) - outside);
    }
    sums<3> all = {{total(f[0]), total(f[1]), total(f[2])}};
    all = agree<GROUP, CLUSTER>(all, board);
    for (int i = 0; i < 3; i++)
        phi[i] = all.at[i];
}

/* The classes of a sparse teacher have other derivatives than all others have; x is not the gradient's memory. */
template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void write_sparse(const row_job &j, const row_view &v, const row_outputs &r, int64_t rank)
{
    group_barrier<GROUP, CLUSTER>();
    for (int64_t place = rank; place < j.n_places; place += GROUP * CLUSTER) {
        int64_t c = class_at(j, v, place);
        if (c < 0 || c == r.top)
            continue;
        log_prob at;
        jet f = phi_at(j, v, r, place, entry<LEVEL>(j, v, c), &at);
        scalar g = r.factor * (f.d1 - at.p * r.b);
        scalar h = r.factor * (f.d2 * (at.not_p - at.p) + at.p * r_fma(at.p, r.b + r.d, -r.b));
        if (j.temperature != 1) {
            logit_transform t = {0, (scalar)j.temperature};
            transform_derivatives(t, 0, &g, &h);
        }
        if (v.grad)
            put<output>(v.grad + c * j.grad.classes, g);
        if (v.hess)
            put<storage>(v.hess + c * j.hess.classes, h);
    }
}

template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void plain_row(const row_job &j, int64_t row, message_board *board, row_outputs *shared)
{
    const int64_t rank = (CLUSTER > 1 ? cluster_rank() * GROUP : 0) + (GROUP > 1 ? threadIdx.x : 0);
    const int64_t n = j.n_classes;
    row_view v = view_row<LEVEL>(j, row);
    if (is_filled(j, v)) {
        filled_row f = fill(j, v, rank == 0);
        for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
            if (v.grad)
                put<output>(v.grad + c * j.grad.classes, c == v.label.value ? f.at_label : f.elsewhere);
            if (v.hess)
                put<storage>(v.hess + c * j.hess.classes, WHAT(j) == NLL ? 0 : f.elsewhere);
        }
        return;
    }
    if (LEVEL == FULL && v.where && j.label_smoothing != 0) {
        sums<1> left = {{0}};
        for (int64_t c = rank; c < n; c += GROUP * CLUSTER)
            left.at[0] += v.where[c * j.where.classes] != 0;
        left = agree<GROUP, CLUSTER>(left, board);
        v.share = left.at[0] != 0 ? (scalar)j.label_smoothing / left.at[0] : 0;
    }

    greatest top = {-XCE_INF, NOWHERE};
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar x = entry<LEVEL>(j, v, c);
        if (x > top.value)
            top.value = x, top.place = c;
    }
    top = agree<GROUP, CLUSTER>(top, board);
    row_outputs r;
    r.top = top.value > -XCE_INF ? top.place : 0;
    const exp_reference ref = r_exp_reference(top.value);

    real_sum rest = {0, 0}, distances = {0, 0}, weights = {0, 0}, spread = {0, 0};
    int64_t above = 0;
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar x = entry<LEVEL>(j, v, c);
        above += WHAT(j) == STATS && x > v.label_logit;
        if (c == r.top)
            continue;
        scalar e = r_exp_relative(x, ref);
        add_to(&rest, e);
        if (is_linear<LEVEL>(j)) {
            scalar d = coefficient(j, v, c);
            add_to(&distances, weighted(d, top.value - x)), add_to(&weights, d);
        }
        if (WHAT(j) == STATS)
            add_to(&spread, weighted(e, top.value - x));
    }
    sums<3> all = {{total(rest), total(distances), total(weights)}};
    all = agree<GROUP, CLUSTER>(all, board);
    scalar linear[2] = {all.at[1], all.at[2]}, phi[3] = {0, 0, 0};
    r.state = row_close(top.value, all.at[0]);

    if (WHAT(j) == LOSS) {
        int64_t top_place = -1;
        if (LEVEL == FULL && j.teacher)
            r.teacher = meet_teacher<GROUP, CLUSTER>(j, v, rank, r.top, &top_place, board);
        if (LEVEL == FULL && (j.teacher || j.dense) && !is_linear<LEVEL>(j))
            sum_phi<GROUP, CLUSTER, LEVEL>(j, v, r, rank, phi, board);
        close_loss<GROUP, LEVEL>(j, v, &r, shared, rank == 0, linear, phi, top_place);
    } else {
        statistics found = {total(spread), above};
        if (WHAT(j) == STATS)
            found = agree<GROUP, CLUSTER>(found, board);
        put_statistics<GROUP, CLUSTER, LEVEL>(j, v, r, linear[0], found, rank, board);
        r.out_exp = r.state.inverse, r.out_hess1 = r.out_hess2 = 0;
    }
    if (!v.grad && !v.hess)
        return;
    group_barrier<GROUP, CLUSTER>(); /* others may still read the entries at the top and the label */
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar g, h, x = entry<LEVEL>(j, v, c);
        derivatives(j, v, r, c, x, &g, &h);
        if (WHAT(j) == LOSS)
            loss_derivatives<LEVEL>(j, v, r, c, x, &g, &h);
        if (v.hess)
            put<storage>(v.hess + c * j.hess.classes, h);
        if (v.grad)
            put<output>(v.grad + c * j.grad.classes, g);
    }
    if (LEVEL == FULL && v.indices)
        write_sparse<GROUP, CLUSTER, LEVEL>(j, v, r, rank);
}

/* Rows in turns: blocks (or clusters) take the next ones when they are through. */
template <int GROUP, int CLUSTER, int LEVEL> XCE_FN void all_rows(const row_job &j)
{
    XCE_SHARED_ARRAY(chunk, cache);
    XCE_SHARED(message_board, board);
    XCE_SHARED(row_outputs, outputs);
    chunk *kept = cache + (int64_t)threadIdx.y * j.cached * GROUP + (GROUP > 1 ? threadIdx.x : 0);
    int64_t step = (int64_t)(gridDim.x / CLUSTER) * blockDim.y;
    for (int64_t row = (int64_t)(blockIdx.x / CLUSTER) * blockDim.y + threadIdx.y; row < j.n_rows; row += step) {
        if (GROUP > 1 && LEVEL < FULL)
            chunked_row<GROUP, CLUSTER, LEVEL>(j, row, kept, &board, &outputs);
        else
            plain_row<GROUP, CLUSTER, LEVEL>(j, row, &board, &outputs);
    }
}

/* One kernel a module: XCE_GROUP threads share a row (1: classes with a stride), XCE_CLUSTER blocks, at XCE_LEVEL. Which one a
 * row gets is decided in xce/_backends/_cuda.py. */
#if defined(XCE_GROUP)
/* Threads that shall be resident on a multiprocessor; 768 leave each of them 80 registers, 512 leave 128. */
#if XCE_LEVEL == 0 && !defined(XCE_STORAGE_float64)
#define XCE_RESIDENT 768
#elif XCE_LEVEL == 2 && defined(XCE_STORAGE_float64)
#define XCE_RESIDENT 256
#else
#define XCE_RESIDENT 512
#endif
XCE_KERNEL(XCE_CLUSTER) XCE_BOUNDS(XCE_THREADS, XCE_RESIDENT / XCE_THREADS) rows(XCE_JOB(row_job) j) { all_rows<XCE_GROUP, XCE_CLUSTER, XCE_LEVEL>(j); }
#endif
