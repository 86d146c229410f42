/* The schedules of the softmax losses on a GPU.
 *
 * GROUP threads share a row whose classes lie side by side: up to 32, several groups in a block; more, a block, or a CLUSTER
 * of blocks. A thread owns chunks of 16 bytes, which it reads once and keeps in shared memory (`cached` of them; the others
 * it reads again). The row is walked for its maximum, for the sums, and to be written. Rows whose classes lie apart belong to
 * one thread each (`strided_rows`), neighbours to neighbours.
 *
 * A row's sums are added by each thread in the order of its classes, by warps in a butterfly, by blocks and clusters in the
 * order of their parts: the same bits in every run. No atomics. Offsets have 64 bits, within a chunk 32.
 */

/* what a module was compiled for, where it knows */
#if defined(XCE_PHI)
#define PHI(j) XCE_PHI
#define WHAT(j) XCE_WHAT
#else
#define PHI(j) ((int)(j).phi)
#define WHAT(j) ((int)(j).what)
#endif

template <int BYTES> struct chunk_of { enum { N = 16 / BYTES }; };
enum { VEC = chunk_of<(int)sizeof(storage)>::N };

struct __align__(16) chunk { storage at[VEC]; };

/* ---- where things are ------------------------------------------------------------------------------------------------- */

struct row_place {
    int64_t index[XCE_AXES];
};

XCE_FN row_place find_row(const row_job &j, int64_t row)
{
    row_place at;
    for (int a = (int)j.axes - 1; a > 0; a--) {
        at.index[a] = row % j.shape[a];
        row /= j.shape[a];
    }
    at.index[0] = row;
    return at;
}

XCE_FN char *row_of(const row_job &j, const operand &o, const row_place &at)
{
    char *p = o.data;
    if (p)
        for (int a = 0; a < (int)j.axes; a++)
            p += at.index[a] * o.rows[a];
    return p;
}

struct label_of_row {
    int status;
    int64_t value; /* -1: none */
};

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

/* ---- sums and maxima of a group ----------------------------------------------------------------------------------------- */

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

/* what one warp, or block, tells the others */
struct message {
    scalar a, b, c;
    int64_t n;
};

struct message_board {
    message warp[32], block;
};

struct greatest { /* the greatest a, and the smallest n among those that have it */
    XCE_FN message join(message s, message t)
    {
        bool take = t.a > s.a || (t.a == s.a && t.n < s.n);
        return take ? t : s;
    }
};

struct sums {
    XCE_FN message join(message s, message t)
    {
        message u = {s.a + t.a, s.b + t.b, s.c + t.c, 0};
        return u;
    }
};

template <int GROUP, int CLUSTER, class How> XCE_FN message agree(message m, message_board *board)
{
    const unsigned lanes = lanes_of_group<GROUP>();
    for (int step = (GROUP < 32 ? GROUP : 32) / 2; step; step /= 2) {
        message other = {__shfl_xor_sync(lanes, m.a, step), __shfl_xor_sync(lanes, m.b, step),
                         __shfl_xor_sync(lanes, m.c, step), __shfl_xor_sync(lanes, m.n, step)};
        /* the lower lane's part first, so that both partners get the same bits, NaN and -0 included */
        m = (threadIdx.x & step) ? How::join(other, m) : How::join(m, other);
    }
    if (GROUP > 32) {
        if (threadIdx.x % 32 == 0)
            board->warp[threadIdx.x / 32] = m;
        __syncthreads();
        m = board->warp[0];
        for (int w = 1; w < GROUP / 32; w++)
            m = How::join(m, board->warp[w]);
        __syncthreads();
    }
    if (CLUSTER > 1) {
        if (threadIdx.x == 0)
            board->block = m;
        cluster_barrier();
        m = *cluster_address(&board->block, 0);
        for (int b = 1; b < CLUSTER; b++)
            m = How::join(m, *cluster_address(&board->block, b));
        cluster_barrier();
    }
    return m;
}

/* ---- entries ------------------------------------------------------------------------------------------------------------ */

/* A row as its threads see it. */
struct row_view {
    const char *x, *q, *where;
    char *grad, *hess;
    int shift;                 /* entries by which the first chunk begins before the row */
    int64_t chunks;
    scalar share;              /* eps / C, of the classes that `where` left */
};

XCE_FN scalar transformed(const row_job &j, const row_view &v, int64_t c, scalar x)
{
    if (j.softcap != 0 || j.temperature != 1) {
        logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
        x = transform_logit(t, x);
    }
    return v.where && !v.where[c * j.where.classes] ? -XCE_INF : x;
}

XCE_FN scalar teacher_logit(const row_job &j, const row_view &v, int64_t c)
{
    scalar y = s_load(*(const storage *)(v.q + c * j.q.classes));
    logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
    return j.softcap != 0 || j.temperature != 1 ? transform_logit(t, y) : y;
}

/* d = w ((1 - eps) q + eps / C) */
XCE_FN scalar coefficient(const row_job &j, const row_view &v, int64_t c)
{
    scalar d = v.share, rest = (scalar)(1 - j.label_smoothing);
    if (v.where && !v.where[c * j.where.classes])
        return 0;
    if (v.q) {
        const char *p = v.q + c * j.q.classes;
        d = r_fma(rest, j.q_is_scalar ? *(const scalar *)p : s_load(*(const storage *)p), d);
    }
    return j.weight ? d * j.weight[c] : d;
}

/* The entries of chunk k; -inf beyond the row. They come from `kept`, or from memory, and may stay in `keep`. */
template <bool FULL>
XCE_FN void read_chunk(const row_job &j, const row_view &v, int64_t k, const chunk *kept, chunk *keep, scalar *x)
{
    int64_t c = k * VEC - v.shift;
    chunk raw;
    if (kept)
        raw = *kept;
    else if (c >= 0 && c + VEC <= j.n_classes)
        raw = *(const chunk *)(v.x + c * (int64_t)sizeof(storage));
    else
        for (int i = 0; i < VEC; i++)
            raw.at[i] = c + i >= 0 && c + i < j.n_classes ? ((const storage *)v.x)[c + i] : s_store(-XCE_INF);
    if (keep)
        *keep = raw;
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        x[i] = s_load(raw.at[i]);
        if (FULL && c + i >= 0 && c + i < j.n_classes)
            x[i] = transformed(j, v, c + i, x[i]);
    }
}

XCE_FN void write_chunk(char *row, int64_t c, int64_t n_classes, const scalar *a)
{
    chunk raw;
    char *p = row + c * (int64_t)sizeof(storage);
#pragma unroll
    for (int i = 0; i < VEC; i++)
        raw.at[i] = s_store(a[i]);
    if (c >= 0 && c + VEC <= n_classes && (uint64_t)p % 16 == 0)
        *(chunk *)p = raw;
    else
        for (int i = 0; i < VEC; i++)
            if (c + i >= 0 && c + i < n_classes)
                ((storage *)p)[i] = raw.at[i];
}

/* ---- what a row leaves for its entries ------------------------------------------------------------------------------------ */

struct row_outputs {
    row_state state, teacher;
    scalar factor, b, d, out_exp, out_hess1, out_hess2;
    scalar value, grad_top, hess_top, grad_label, hess_label;
    int64_t top, label;
    int status;
};

/* The derivatives of one entry by the raw logit x. */
template <bool FULL> XCE_FN void derivatives(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, scalar x, scalar *g, scalar *h)
{
    if (v.where && !v.where[c * j.where.classes]) { /* whatever the row holds, also if it is its top or its label */
        *g = *h = 0;
        return;
    }
    scalar e = r_exp_relative(x, r.state.ref), p = e * r.state.inverse;
    if (WHAT(j) == LOG_SOFTMAX) {
        *g = (x - r.state.max) - r.state.log_z;
        return;
    }
    *g = e * r.out_exp;
    *h = p * r_fma(p, r.out_hess2, r.out_hess1);
    if (WHAT(j) != LOSS)
        return;
    if (c == r.top || c == r.label) { /* which row_finish has transformed already */
        *g = c == r.top ? r.grad_top : r.grad_label;
        *h = c == r.top ? r.hess_top : r.hess_label;
        return;
    }
    if (j.dense) {
        if (PHI(j) == PHI_cross_entropy)
            *g = r_fma(coefficient(j, v, c), -r.factor, *g);
        else if (FULL) {
            log_prob at = row_entry(r.state, x);
            jet f;
            if (j.teacher) {
                row_teacher(r.state, r.teacher, x, teacher_logit(j, v, c), &at);
                f = loss_phi(PHI(j), at, (scalar)j.parameter);
            } else {
                scalar d = coefficient(j, v, c);
                f = loss_phi(PHI(j), at, (scalar)j.parameter);
                f.d1 = weighted(d, f.d1), f.d2 = weighted(d, f.d2);
            }
            *g += r.factor * f.d1;
            *h += r.factor * (f.d2 * (at.not_p - at.p));
        }
    }
    if (FULL && (j.softcap != 0 || j.temperature != 1)) {
        logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
        transform_derivatives(t, s_load(*(const storage *)(v.x + c * j.x.classes)), g, h);
    }
}

/* ---- the row ---------------------------------------------------------------------------------------------------------------- */

/* Calls body(k, kept) for the chunks of this thread; `kept` is where a chunk stays in shared memory, or NULL. */
#define XCE_EACH_CHUNK(k, keep) \
    int64_t k = rank; \
    for (int i_ = 0; k < v.chunks; k += threads, i_++) \
        if (chunk *keep = V > 1 && i_ < j.cached ? kept + (int64_t)i_ * GROUP : (chunk *)0; true)

/* Entries of a chunk where lanes may lie beside the row: V entries from class `first` on. */
template <int V, bool FULL>
XCE_FN int64_t entries_of(const row_job &j, const row_view &v, int64_t k, const chunk *kept, scalar *x,
                          chunk *keep = 0)
{
    if (V > 1) {
        read_chunk<FULL>(j, v, k, kept, keep, x);
        return k * VEC - v.shift;
    }
    x[0] = s_load(*(const storage *)(v.x + k * j.x.classes));
    if (FULL)
        x[0] = transformed(j, v, k, x[0]);
    return k;
}

XCE_FN bool in_row(const row_job &j, int64_t c) { return c >= 0 && c < j.n_classes; }

XCE_FN void add_to(real_sum *s, scalar a) { *s = r_sum_add(*s, a); }
XCE_FN scalar total(real_sum s) { return r_abs(s.high) == XCE_INF ? s.high : s.high + s.low; }

/* A sparse teacher's class at a place, as the student's. */
XCE_FN int64_t class_at(const row_job &j, const char *indices, int64_t place)
{
    return read_label(indices + place * j.indices.classes, (int)j.index_kind, j.n_classes, -1).value;
}

XCE_FN jet sparse_entry(const row_job &j, const row_view &v, const row_outputs &r, int64_t place, scalar x, log_prob *at)
{
    *at = row_entry(r.state, x);
    row_teacher(r.state, r.teacher, x, teacher_logit(j, v, place), at);
    return loss_phi(PHI(j), *at, (scalar)j.parameter);
}

template <bool FULL>
XCE_FN row_outputs finish_row(const row_job &j, const row_view &v, row_outputs r, message linear, message phi, scalar index,
                              scalar sample, scalar scale, scalar label_logit, int64_t top_place)
{
    const bool sparse = j.indices.data != 0;
    row_target t;
    t.factor = sample * scale, t.weight = sample, t.index = index, t.label_logit = label_logit;
    t.label_is_top = r.label < 0 || r.label == r.top;
    t.d_top = t.d_label = t.v_top = t.t_top = t.gap_top = 0;
    t.sum = t.sum1 = t.sum2 = 0, t.z_loss = (scalar)j.z_loss;
    if (FULL && j.teacher) {
        scalar y = sparse && top_place < 0 ? -XCE_INF : teacher_logit(j, v, sparse ? top_place : r.top);
        log_prob at;
        row_teacher(r.state, r.teacher, r.state.max, y, &at);
        t.d_top = 1, t.v_top = at.v, t.t_top = at.t, t.gap_top = at.d;
        if (r.teacher.log_z != r.teacher.log_z)
            t.index = XCE_NAN;
    } else if (j.dense) {
        t.d_top = coefficient(j, v, r.top);
        t.d_label = r.label >= 0 ? coefficient(j, v, r.label) : 0;
    }
    if (FULL && sparse) {
        scalar outside = r.state.rest * r.state.inverse * share_outside(PHI(j));
        t.sum = phi.a + outside, t.sum1 = phi.b + outside, t.sum2 = phi.c + outside;
    } else if (j.dense && PHI(j) == PHI_cross_entropy) {
        t.sum = linear.b + weighted(linear.c, r.state.log_z);
        t.sum1 = 0 - linear.c;
    } else if (j.dense)
        t.sum = phi.a, t.sum1 = phi.b, t.sum2 = phi.c;
    row_result f = row_finish(r.state, t, PHI(j), (scalar)j.parameter);
    if (FULL && (j.softcap != 0 || j.temperature != 1)) {
        logit_transform with = {(scalar)j.softcap, (scalar)j.temperature};
        transform_derivatives(with, s_load(*(const storage *)(v.x + r.top * j.x.classes)), &f.grad_top, &f.hess_top);
        if (r.label >= 0)
            transform_derivatives(with, s_load(*(const storage *)(v.x + r.label * j.x.classes)), &f.grad_label,
                                  &f.hess_label);
    }
    scalar outside = sparse ? share_outside(PHI(j)) : 0;
    r.factor = t.factor, r.b = f.b, r.d = f.d;
    r.out_exp = (outside - f.b) * t.factor * r.state.inverse;
    r.out_hess1 = (outside - f.b) * t.factor;
    r.out_hess2 = (f.b + f.d - outside - outside) * t.factor;
    r.grad_top = f.grad_top, r.hess_top = f.hess_top, r.grad_label = f.grad_label, r.hess_label = f.hess_label;
    r.value = f.value;
    return r;
}

/* The row outputs of what is not a loss. */
template <int GROUP, int CLUSTER, bool FULL>
XCE_FN void put_statistics(const row_job &j, const row_view &v, const row_outputs &r, const row_place &at, message sum,
                           scalar label_logit, int64_t rank, int64_t threads, message_board *board)
{
    if (!j.value.data)
        return;
    scalar lse = row_lse(r.state);
    int64_t nan = -1;
    if (lse != lse && WHAT(j) != STATE) { /* of infinities it is the greatest of them; only NaN makes it NaN */
        message first = {0, 0, 0, 0x7fffffffffffffffLL};
        for (int64_t c = rank; c < j.n_classes && first.a == 0; c += threads) {
            scalar x = s_load(*(const storage *)(v.x + c * j.x.classes));
            if (FULL)
                x = transformed(j, v, c, x);
            if (x != x)
                first.a = 1, first.n = c;
        }
        first = agree<GROUP, CLUSTER, greatest>(first, board);
        nan = first.a != 0 ? first.n : -1;
        lse = nan < 0 ? r.state.max : lse;
    }
    if (rank != 0)
        return;
    *(scalar *)row_of(j, j.value, at) = WHAT(j) == STATE ? r.state.max : lse;
    if (WHAT(j) == LOGSUMEXP)
        return;
    scalar target = r.label >= 0 ? label_logit : XCE_NAN;
    *(scalar *)row_of(j, j.label_logit, at) = target;
    if (WHAT(j) == STATE) {
        *(scalar *)row_of(j, j.spread, at) = r.state.rest / r.state.top;
        *(scalar *)row_of(j, j.linear, at) = sum.b;
        return;
    }
    *(scalar *)row_of(j, j.spread, at) = r.state.log_z + sum.b * r.state.inverse;
    *(int64_t *)row_of(j, j.top, at) = nan < 0 ? r.top : nan;
    *(int64_t *)row_of(j, j.rank, at) = r.label >= 0 && nan < 0 ? (int64_t)sum.c + (r.state.max > target) : -1;
}

template <int GROUP, int CLUSTER, bool FULL, int V>
XCE_FN void one_row(const row_job &j, int64_t row, chunk *kept, message_board *board, row_outputs *shared)
{
    const int64_t threads = GROUP * CLUSTER, rank = (CLUSTER > 1 ? cluster_rank() * GROUP : 0) + (GROUP > 1 ? threadIdx.x : 0);
    const row_place at_row = find_row(j, row);
    const char *indices = row_of(j, j.indices, at_row), *label = row_of(j, j.label, at_row);
    const char *sample_at = row_of(j, j.sample, at_row);
    row_view v;
    v.x = row_of(j, j.x, at_row), v.q = row_of(j, j.q, at_row), v.where = FULL ? row_of(j, j.where, at_row) : 0;
    v.grad = row_of(j, j.grad, at_row), v.hess = row_of(j, j.hess, at_row);
    v.shift = V > 1 ? (int)((uint64_t)v.x % 16 / sizeof(storage)) : 0;
    v.chunks = V > 1 ? (j.n_classes + v.shift + V - 1) / V : j.n_classes;
    v.share = WHAT(j) == STATE ? 1 : (scalar)(j.label_smoothing / (double)j.n_classes);
    const bool has_loss = WHAT(j) == LOSS || WHAT(j) == NLL, writes = v.grad || v.hess;
    const bool first = rank == 0;

    label_of_row y = {ACTIVE, -1};
    if (label)
        y = read_label(label, (int)j.label_kind, j.n_classes, j.ignore_index);
    scalar sample = sample_at ? *(const scalar *)sample_at : 1;
    scalar rest_share = (scalar)(1 - j.label_smoothing), index = 0;
    if (label && has_loss)
        index = y.status == INVALID ? XCE_NAN
                : y.status == ACTIVE ? (j.weight ? rest_share * j.weight[y.value] : rest_share) : 0;
    double denominator = j.denominator ? *j.denominator : 1;
    scalar scale = denominator != 0 ? (scalar)(1 / denominator) : 0;

    row_outputs r;
    r.status = has_loss ? y.status : ACTIVE, r.label = y.value, r.top = -1, r.value = 0;
    scalar label_logit = 0;
    if (r.label >= 0) {
        label_logit = s_load(*(const storage *)(v.x + r.label * j.x.classes));
        if (FULL)
            label_logit = transformed(j, v, r.label, label_logit);
    }

    if (WHAT(j) == NLL || r.status == IGNORED) { /* nothing to be summed: all entries but the label's are `fill` */
        scalar a = r.label >= 0 ? index * sample : 0, fill = r.status == INVALID ? XCE_NAN : 0;
        r.value = r.status == IGNORED ? 0 : r.label < 0 ? fill : a != 0 ? -a * label_logit : 0;
        XCE_EACH_CHUNK(k, unused)
        {
            int64_t c = V > 1 ? k * VEC - v.shift : k;
            scalar g[V], zero[V];
            (void)unused;
            for (int i = 0; i < V; i++) {
                g[i] = r.status == ACTIVE && c + i == r.label ? -(a * scale) : fill;
                zero[i] = 0;
            }
            if (V > 1) {
                if (v.grad)
                    write_chunk(v.grad, c, j.n_classes, g);
                if (v.hess)
                    write_chunk(v.hess, c, j.n_classes, zero);
            } else {
                if (v.grad)
                    *(storage *)(v.grad + c * j.grad.classes) = s_store(g[0]);
                if (v.hess)
                    *(storage *)(v.hess + c * j.hess.classes) = s_store(0);
            }
        }
        if (first && j.value.data)
            *(scalar *)row_of(j, j.value, at_row) = r.value;
        return;
    }

    scalar x[V];
    if (FULL && v.where && j.label_smoothing != 0) {
        message n = {0, 0, 0, 0};
        for (int64_t c = rank; c < j.n_classes; c += threads)
            n.a += v.where[c * j.where.classes] != 0;
        n = agree<GROUP, CLUSTER, sums>(n, board);
        v.share = n.a != 0 ? (scalar)j.label_smoothing / n.a : 0;
    }

    /* the greatest entry and its first place */
    message top = {-XCE_INF, 0, 0, 0x7fffffffffffffffLL};
    {
        XCE_EACH_CHUNK(k, keep)
        {
            int64_t c = entries_of<V, FULL>(j, v, k, 0, x, keep);
            for (int i = 0; i < V; i++)
                if (x[i] > top.a)
                    top.a = x[i], top.n = c + i;
        }
    }
    top = agree<GROUP, CLUSTER, greatest>(top, board);
    r.top = top.a > -XCE_INF ? top.n : 0;
    const exp_reference ref = r_exp_reference(top.a);

    /* the sums over all others */
    real_sum s[3] = {{0, 0}, {0, 0}, {0, 0}};
    const bool linear = WHAT(j) == STATE || (j.dense && PHI(j) == PHI_cross_entropy);
    {
        XCE_EACH_CHUNK(k, keep)
        {
            int64_t c = entries_of<V, FULL>(j, v, k, keep, x);
            scalar part[3] = {0, 0, 0};
            for (int i = 0; i < V; i++) {
                if (c + i == r.top || !in_row(j, c + i))
                    continue;
                scalar e = r_exp_relative(x[i], ref);
                part[0] += e;
                if (linear) {
                    scalar d = coefficient(j, v, c + i);
                    part[1] += weighted(d, top.a - x[i]), part[2] += d;
                } else if (WHAT(j) == STATS)
                    part[1] += weighted(e, top.a - x[i]), part[2] += x[i] > label_logit;
            }
            for (int i = 0; i < 3; i++)
                add_to(&s[i], part[i]);
        }
    }
    message sum = {total(s[0]), total(s[1]), total(s[2]), 0}, phi = {0, 0, 0, 0};
    sum = agree<GROUP, CLUSTER, sums>(sum, board);
    r.state = row_close(top.a, sum.a);

    /* the teacher's, and the sums of what is not linear */
    int64_t top_place = -1;
    if (FULL && j.teacher) {
        const int64_t n = j.indices.data ? j.n_places : j.n_classes;
        message best = {-XCE_INF, 0, 0, 0x7fffffffffffffffLL}, place = {0, 0, 0, 0x7fffffffffffffffLL};
        for (int64_t c = rank; c < n; c += threads) {
            scalar t = teacher_logit(j, v, c);
            if (t > best.a)
                best.a = t, best.n = c;
            if (indices && class_at(j, indices, c) == r.top)
                place.n = c;
        }
        best = agree<GROUP, CLUSTER, greatest>(best, board);
        if (indices) {
            place = agree<GROUP, CLUSTER, greatest>(place, board);
            top_place = place.n < n ? place.n : -1;
        }
        const exp_reference teacher_ref = r_exp_reference(best.a);
        const int64_t teacher_top = best.a > -XCE_INF ? best.n : 0;
        real_sum rest = {0, 0};
        bool bad = false; /* a class out of range that nobody checked */
        for (int64_t c = rank; c < n; c += threads) {
            if (c != teacher_top)
                add_to(&rest, r_exp_relative(teacher_logit(j, v, c), teacher_ref));
            bad |= indices && class_at(j, indices, c) < 0;
        }
        message t = {bad ? XCE_NAN : total(rest), 0, 0, 0};
        t = agree<GROUP, CLUSTER, sums>(t, board);
        r.teacher = row_close(best.a, t.a);
    }
    if (FULL && (j.teacher || (j.dense && !linear))) {
        real_sum f[3] = {{0, 0}, {0, 0}, {0, 0}};
        if (indices) {
            for (int64_t c = rank; c < j.n_places; c += threads) {
                int64_t k = class_at(j, indices, c);
                if (k < 0 || k == r.top)
                    continue;
                log_prob at;
                jet g = sparse_entry(j, v, r, c, transformed(j, v, k, s_load(*(const storage *)(v.x + k * j.x.classes))), &at);
                scalar outside = at.p * share_outside(PHI(j));
                add_to(&f[0], g.value - outside), add_to(&f[1], g.d1 - outside), add_to(&f[2], g.d2 - outside);
            }
        } else {
            XCE_EACH_CHUNK(k, keep)
            {
                int64_t c = entries_of<V, FULL>(j, v, k, keep, x);
                for (int i = 0; i < V; i++) {
                    if (c + i == r.top || !in_row(j, c + i))
                        continue;
                    log_prob at = row_entry(r.state, x[i]);
                    jet g;
                    if (j.teacher) {
                        row_teacher(r.state, r.teacher, x[i], teacher_logit(j, v, c + i), &at);
                        g = loss_phi(PHI(j), at, (scalar)j.parameter);
                    } else {
                        scalar d = coefficient(j, v, c + i);
                        g = loss_phi(PHI(j), at, (scalar)j.parameter);
                        g.value = weighted(d, g.value), g.d1 = weighted(d, g.d1), g.d2 = weighted(d, g.d2);
                    }
                    add_to(&f[0], g.value), add_to(&f[1], g.d1), add_to(&f[2], g.d2);
                }
            }
        }
        phi.a = total(f[0]), phi.b = total(f[1]), phi.c = total(f[2]);
        phi = agree<GROUP, CLUSTER, sums>(phi, board);
    }

    if (WHAT(j) == LOSS) {
        if (GROUP <= 32 || threadIdx.x < 32)
            r = finish_row<FULL>(j, v, r, sum, phi, index, sample, scale, label_logit, top_place);
        if (GROUP > 32) { /* one warp does it for all */
            if (threadIdx.x == 0)
                *shared = r;
            __syncthreads();
            r = *shared;
        }
        if (first && j.value.data)
            *(scalar *)row_of(j, j.value, at_row) = r.value;
    } else {
        r.out_exp = r.state.inverse, r.out_hess1 = r.out_hess2 = 0;
        put_statistics<GROUP, CLUSTER, FULL>(j, v, r, at_row, sum, label_logit, rank, threads, board);
    }

    if (writes) {
        if (CLUSTER > 1)
            cluster_barrier(); /* others may still read the entries of this row at its top and label */
        XCE_EACH_CHUNK(k, keep)
        {
            scalar g[V], h[V];
            int64_t c = entries_of<V, FULL>(j, v, k, keep, x);
            for (int i = 0; i < V; i++) {
                g[i] = h[i] = 0;
                if (in_row(j, c + i))
                    derivatives<FULL>(j, v, r, c + i, x[i], &g[i], &h[i]);
            }
            if (V > 1) {
                if (v.hess)
                    write_chunk(v.hess, c, j.n_classes, h);
                if (v.grad)
                    write_chunk(v.grad, c, j.n_classes, g);
            } else {
                if (v.hess)
                    *(storage *)(v.hess + c * j.hess.classes) = s_store(h[0]);
                if (v.grad)
                    *(storage *)(v.grad + c * j.grad.classes) = s_store(g[0]);
            }
        }
        if (FULL && indices) { /* what the sparse teacher's classes have instead; x is not the gradient's memory */
            group_barrier<GROUP, CLUSTER>();
            for (int64_t c = rank; c < j.n_places; c += threads) {
                int64_t k = class_at(j, indices, c);
                if (k < 0 || k == r.top)
                    continue;
                log_prob at;
                jet f = sparse_entry(j, v, r, c, transformed(j, v, k, s_load(*(const storage *)(v.x + k * j.x.classes))), &at);
                scalar g = r.factor * (f.d1 - at.p * r.b);
                scalar h = r.factor * (f.d2 * (at.not_p - at.p) + at.p * r_fma(at.p, r.b + r.d, -r.b));
                if (j.temperature != 1) {
                    logit_transform t = {0, (scalar)j.temperature};
                    transform_derivatives(t, 0, &g, &h);
                }
                if (v.grad)
                    *(storage *)(v.grad + k * j.grad.classes) = s_store(g);
                if (v.hess)
                    *(storage *)(v.hess + k * j.hess.classes) = s_store(h);
            }
        }
    }
}

/* Rows in turns: blocks (or clusters) take the next ones when they are through. */
template <int GROUP, int CLUSTER, bool FULL, int V> XCE_FN void all_rows(const row_job &j)
{
    XCE_SHARED_ARRAY(chunk, cache);
    XCE_SHARED(message_board, board);
    XCE_SHARED(row_outputs, outputs);
    chunk *kept = cache + (int64_t)threadIdx.y * j.cached * GROUP + (GROUP > 1 ? threadIdx.x : 0);
    int64_t step = (int64_t)(gridDim.x / CLUSTER) * blockDim.y;
    for (int64_t row = (int64_t)(blockIdx.x / CLUSTER) * blockDim.y + threadIdx.y; row < j.n_rows; row += step)
        one_row<GROUP, CLUSTER, FULL, V>(j, row, kept, &board, &outputs);
}

/* One kernel a module: XCE_GROUP threads share a row (1: classes with a stride), XCE_CLUSTER blocks, XCE_FULL options. Which
 * one a row gets is decided in xce/_backends/_cuda.py. */
#if defined(XCE_GROUP)
XCE_KERNEL(XCE_CLUSTER) rows(row_job j) { all_rows<XCE_GROUP, XCE_CLUSTER, XCE_FULL, XCE_GROUP == 1 ? 1 : (int)VEC>(j); }
#endif
