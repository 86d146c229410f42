/* A row: what it is computed from, and what is done once for it, however its entries are walked. */
#ifndef XCE_ROW_H
#define XCE_ROW_H

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

XCE_FN char *row_of(const row_job &j, const operand &o, const row_place &at)
{
    if (!o.data)
        return 0;
    return o.data + (j.axes <= 2 ? at.outer * o.rows[0] + at.inner * o.rows[1]
                                 : walk(j.shape, (int)j.axes, o.rows, at.row));
}

/* A row, as all its threads see it. */
struct row_view {
    int64_t row;
    const char *x, *q, *where, *indices;
    char *grad, *hess;
    label_of_row label;
    scalar label_logit;        /* transformed */
    scalar share;              /* eps / C, of the classes that `where` left */
};

/* What it weighs. Read when it is needed: it would take registers from the loops. */
struct row_weight {
    scalar index;              /* the coefficient of the labelled class; NaN for a bad label */
    scalar sample, factor;     /* the row's, and that over the denominator of the mean */
};

/* What a row leaves for its entries. */
struct row_outputs {
    row_state state, teacher;
    scalar factor, b, d, out_exp, out_hess1, out_hess2;
    scalar value, grad_top, hess_top, grad_label, hess_label;
    int64_t top;
};

XCE_FN bool is_removed(const row_job &j, const row_view &v, int64_t c) { return v.where && !v.where[c * j.where.classes]; }

template <int LEVEL> XCE_FN scalar transformed(const row_job &j, const row_view &v, int64_t c, scalar x)
{
    if (LEVEL < FULL)
        return x;
    if (j.softcap != 0 || j.temperature != 1) {
        logit_transform t = {(scalar)j.softcap, (scalar)j.temperature};
        x = transform_logit(t, x);
    }
    return is_removed(j, v, c) ? -XCE_INF : x;
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
    const row_place at = find_row(j, row);
    v.row = row;
    v.x = row_of(j, j.x, at), v.grad = row_of(j, j.grad, at), v.hess = row_of(j, j.hess, at);
    v.q = LEVEL > SPARSE ? row_of(j, j.q, at) : 0;
    v.where = LEVEL == FULL ? row_of(j, j.where, at) : 0;
    v.indices = LEVEL == FULL ? row_of(j, j.indices, at) : 0;
    const char *label = row_of(j, j.label, at);
    v.label.status = ACTIVE, v.label.value = -1;
    if (label)
        v.label = read_label(label, (int)j.label_kind, j.n_classes, j.ignore_index);
    if (WHAT(j) != LOSS && WHAT(j) != NLL)
        v.label.status = ACTIVE;
    v.label_logit = v.label.value >= 0 ? entry<LEVEL>(j, v, v.label.value) : 0;
    v.share = WHAT(j) == STATE ? 1 : (scalar)(j.label_smoothing / (double)j.n_classes);
    return v;
}

XCE_FN row_weight weigh_row(const row_job &j, const row_view &v)
{
    row_weight w = {0, 1, 1};
    if (j.label.data && v.label.status != IGNORED) {
        scalar rest = (scalar)(1 - j.label_smoothing);
        w.index = v.label.status == INVALID ? XCE_NAN : j.weight ? rest * j.weight[v.label.value] : rest;
    }
    if (j.sample.data)
        w.sample = *(const scalar *)row_of(j, j.sample, find_row(j, v.row));
    w.factor = w.sample;
    if (j.denominator) /* in double: one over it may be more than a float holds */
        w.factor = *j.denominator != 0 ? (scalar)(w.sample / *j.denominator) : 0;
    return w;
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
    return is_removed(j, v, c) ? 0 : coefficient_of(j, v, c, probability(j, v, c));
}

/* All that is linear in the coefficients is summed with the exponentials, by one reading of the row. */
template <int LEVEL> XCE_FN bool is_linear(const row_job &j)
{
    return LEVEL > SPARSE && (WHAT(j) == STATE || (j.dense && PHI(j) == PHI_cross_entropy));
}

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
    const row_weight w = weigh_row(j, v);
    row_target t;
    t.factor = w.factor, t.weight = w.sample, t.index = w.index, t.label_logit = v.label_logit;
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
        *(scalar *)row_of(j, j.value, find_row(j, v.row)) = r->value;
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
    const row_place at = find_row(j, v.row);
    *(scalar *)row_of(j, j.value, at) = WHAT(j) == STATE ? r.state.max : lse;
    if (WHAT(j) == LOGSUMEXP)
        return;
    *(scalar *)row_of(j, j.label_logit, at) = v.label.value >= 0 ? v.label_logit : XCE_NAN;
    if (WHAT(j) == STATE) {
        *(scalar *)row_of(j, j.spread, at) = r.state.rest / r.state.top;
        *(scalar *)row_of(j, j.linear, at) = linear;
        return;
    }
    *(scalar *)row_of(j, j.spread, at) = r.state.log_z + found.spread * r.state.inverse;
    *(int64_t *)row_of(j, j.top, at) = nan < 0 ? r.top : nan;
    *(int64_t *)row_of(j, j.rank, at) = v.label.value >= 0 && nan < 0 ? found.above : -1;
}

/* The derivatives of one entry; of a loss, where only labels count. */
XCE_FN void derivatives(const row_job &j, const row_outputs &r, scalar x, scalar *g, scalar *h)
{
    scalar e = r_exp_relative(x, r.state.ref), p = e * r.state.inverse;
    *g = WHAT(j) == LOG_SOFTMAX ? (x - r.state.max) - r.state.log_z : e * r.out_exp;
    *h = p * r_fma(p, r.out_hess2, r.out_hess1);
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
    const row_weight w = weigh_row(j, v);
    scalar a = v.label.value >= 0 ? w.index * w.sample : 0, bad = v.label.status == INVALID ? XCE_NAN : 0;
    filled_row f = {v.label.value >= 0 ? -(w.index * w.factor) : bad, bad};
    if (is_first && j.value.data)
        *(scalar *)row_of(j, j.value, find_row(j, v.row)) = v.label.status == IGNORED ? 0
                                              : v.label.value < 0     ? bad
                                              : a != 0                ? -a * v.label_logit
                                                                      : 0;
    return f;
}

#endif
