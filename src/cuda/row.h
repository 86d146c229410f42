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
    scalar label_logit;        /* as it was given */
    scalar share;              /* eps / C, of the classes that `where` left */
};

/* What it weighs. Read when it is needed: it would take registers from the loops. */
struct row_weight {
    scalar index;              /* the coefficient of the labelled class; NaN for a bad label */
    scalar sample, factor;     /* the row's, and that over the denominator of the mean */
};

/* What a row leaves for its entries. */
struct row_finished { /* what one warp finds for the others */
    row_factors out;
    scalar value, grad_top, hess_top, grad_label, hess_label;
};

struct row_outputs : row_finished {
    row_state state;
    logit_origin origin, teacher_origin; /* where entries are distances */
    row_match match;                     /* with a teacher */
    row_slope slope;                     /* where the gradient is made of slopes against the top entry's */
    int64_t top;
};

XCE_FN bool is_removed(const row_job &j, const row_view &v, int64_t c) { return v.where && !v.where[c * j.where.classes]; }

XCE_FN scalar raw_entry(const row_job &j, const row_view &v, int64_t c)
{
    return s_load(*(const storage *)(v.x + c * j.x.classes));
}

/* A logit as it was given; -inf of a removed class */
template <int LEVEL> XCE_FN scalar entry(const row_job &j, const row_view &v, int64_t c)
{
    scalar x = raw_entry(j, v, c);
    return LEVEL == FULL && is_removed(j, v, c) ? -XCE_INF : x;
}

XCE_FN bool is_transformed(const row_job &j) { return j.options.softcap != 0 || j.options.temperature != 1; }

/* Whether coefficients and phi' both vary */
template <int LEVEL> XCE_FN bool is_relative(const row_job &j)
{
    return LEVEL == FULL && WHAT(j) == LOSS && j.dense && PHI(j) != PHI_cross_entropy && !j.teacher;
}

XCE_FN bool is_steep_row(const row_job &j) { return WHAT(j) == LOSS && is_steep(PHI(j), (scalar)j.options.parameter); }

/* Whether entries are distances from the greatest one, in two parts */
template <int LEVEL> XCE_FN bool is_by_distance(const row_job &j)
{
    return LEVEL == FULL && (j.teacher || is_transformed(j) || is_relative<LEVEL>(j) || is_steep_row(j));
}

XCE_CALLED real_pair capped_distance(logit_transform t, logit_origin o, scalar x) { return distance_by_softcap(t, o, x); }

XCE_FN real_pair distance(const row_job &j, const logit_origin &o, scalar x)
{
    logit_transform t = transform_of(j.options.softcap, j.options.temperature);
    return j.options.softcap != 0 ? capped_distance(t, o, x) : distance_by_temperature(t, o, x);
}

template <int LEVEL> XCE_FN real_pair distance_or_logit(const row_job &j, const logit_origin &o, scalar x)
{
    return is_by_distance<LEVEL>(j) ? distance(j, o, x) : r_pair(x, 0);
}

template <int LEVEL> XCE_FN scalar exp_of(const row_job &j, real_pair z, exp_reference ref)
{
    return is_by_distance<LEVEL>(j) ? r_exp_relative_pair(z, ref) : r_exp_relative(z.high, ref);
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
    const char *label = row_of(j, j.label, at), *sample = row_of(j, j.sample, at);
    v.label.status = ACTIVE, v.label.value = -1;
    if (sample && *(const scalar *)sample == 0) /* removed, whatever the row holds */
        v.label.status = IGNORED;
    else if (label)
        v.label = read_label(label, (int)j.label_kind, j.n_classes, j.ignore_index);
    if (WHAT(j) != LOSS && WHAT(j) != NLL)
        v.label.status = ACTIVE;
    v.label_logit = v.label.value >= 0 ? entry<LEVEL>(j, v, v.label.value) : 0;
    v.share = WHAT(j) == STATE ? 1 : smoothing_share(j.options.label_smoothing, j.n_classes);
    return v;
}

XCE_FN row_weight weigh_row(const row_job &j, const row_view &v)
{
    row_weight w = {0, 1, 1};
    if (j.label.data)
        w.index = label_coefficient(v.label.status, v.label.value, label_share(j.options.label_smoothing), j.weight);
    if (j.sample.data)
        w.sample = *(const scalar *)row_of(j, j.sample, find_row(j, v.row));
    w.factor = w.sample;
    if (j.denominator) /* in double: one over it may be more than a float holds */
        w.factor = *j.denominator != 0 ? (scalar)(w.sample / *j.denominator) : 0;
    return w;
}

XCE_FN scalar coefficient_of(const row_job &j, int64_t c, scalar q, scalar share)
{
    return dense_coefficient(share, label_share(j.options.label_smoothing), q) * (j.weight ? j.weight[c] : 1);
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
    return coefficient_of(j, c, probability(j, v, c), is_removed(j, v, c) ? 0 : v.share); /* of the smoothing */
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

XCE_FN scalar teacher_logit(const row_job &j, const row_view &v, int64_t place) /* as it was given, too */
{
    scalar y = s_load(*(const storage *)(v.q + place * j.q.classes));
    return v.where && is_removed(j, v, v.indices ? class_at(j, v, place) : place) ? -XCE_INF : y;
}

/* Student and teacher at a class, which the teacher has at a place of its own */
XCE_FN distance_pair distances_at(const row_job &j, const row_view &v, const row_outputs &r, int64_t place, int64_t c)
{
    return distances_of_pair(transform_of(j.options.softcap, j.options.temperature), r.origin, r.teacher_origin, entry<FULL>(j, v, c),
                             teacher_logit(j, v, place));
}

XCE_FN prob_pair pair_at(const row_job &j, const row_view &v, const row_outputs &r, int64_t place, int64_t c)
{
    return match_entry(r.match, distances_at(j, v, r, place, c));
}

XCE_FN real_pair teacher_at_top(const row_job &j, const row_view &v, const logit_origin &teacher, int64_t top_place)
{
    return distance(j, teacher, top_place < 0 ? -XCE_INF : teacher_logit(j, v, top_place));
}

template <int LEVEL>
XCE_FN void put_result(const row_job &j, const row_view &v, row_outputs *r, row_result f, row_factors out)
{
    if (LEVEL == FULL && is_transformed(j))
        transform_result(transform_of(j.options.softcap, j.options.temperature), &f, raw_entry(j, v, r->top),
                         v.label.value >= 0 ? raw_entry(j, v, v.label.value) : 0);
    if (LEVEL < FULL && out.far != 0)
        add_far_to_factors(&out, r->state);
    r->out = out;
    r->grad_top = f.grad_top, r->hess_top = f.hess_top, r->grad_label = f.grad_label, r->hess_label = f.hess_label;
    r->value = f.value;
}

/* `found`: the sums over the classes of the teacher, which has the top one at `top_place` */
XCE_FN void finish_pair(const row_job &j, const row_view &v, row_outputs *r, row_sums found, int64_t top_place)
{
    const row_weight w = weigh_row(j, v);
    row_result f = match_finish(r->state, r->match, found, teacher_at_top(j, v, r->teacher_origin, top_place), w.sample,
                                w.factor, PHI(j));
    put_result<FULL>(j, v, r, f, match_factors(PHI(j), r->match, f, w.factor));
}

XCE_FN bool label_is_top(const row_view &v, int64_t top) { return v.label.value < 0 || v.label.value == top; }

template <int LEVEL> XCE_FN void finish_row(const row_job &j, const row_view &v, row_outputs *r, row_sums sum)
{
    const bool is_dense = LEVEL > SPARSE && j.dense;
    const row_weight w = weigh_row(j, v);
    row_target t;
    t.factor = w.factor, t.weight = w.sample, t.index = w.index;
    t.label_entry = distance_or_logit<LEVEL>(j, r->origin, v.label_logit);
    t.label_is_top = label_is_top(v, r->top);
    t.d_top = t.d_label = 0;
    t.sum = sum, t.z_loss = (scalar)j.options.z_loss;
    if (is_dense) {
        t.d_top = coefficient(j, v, r->top);
        t.d_label = v.label.value >= 0 ? coefficient(j, v, v.label.value) : 0;
    }
    row_result f = row_finish(r->state, t, PHI(j), (scalar)j.options.parameter);
    if (is_relative<LEVEL>(j))
        relative_finish(&f, r->state, t, r->slope, PHI(j), (scalar)j.options.parameter);
    put_result<LEVEL>(j, v, r, f, loss_factors(f, t.factor, r->state.inverse));
}

/* One warp finishes the row for the others, by a call of `finish`; its value is stored. */
template <int GROUP, class F>
XCE_FN void close_loss(const row_job &j, const row_view &v, row_outputs *r, row_finished *shared, bool is_first, F finish)
{
    if (GROUP <= 32)
        finish();
    else {
        if (threadIdx.x < 32) {
            finish();
            if (threadIdx.x == 0)
                *shared = *r;
        }
        __syncthreads();
        *(row_finished *)r = *shared;
    }
    if (is_first && j.value.data)
        *(scalar *)row_of(j, j.value, find_row(j, v.row)) = r->value;
}

/* The row outputs of what is not a loss, `found` being a thread's share, and what its entries are written with. */
template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void put_statistics(const row_job &j, const row_view &v, row_outputs *r, scalar top_logit, scalar linear,
                           statistics found, int64_t rank, message_board *board)
{
    if (WHAT(j) == STATS)
        found = agree<GROUP, CLUSTER>(found, board);
    r->out.exp = r->state.inverse, r->out.hess1 = r->out.hess2 = 0;
    if (!j.value.data)
        return;
    scalar lse = row_lse(r->state);
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
        lse = nan < 0 ? top_logit : lse;
    }
    if (rank != 0)
        return;
    const row_place at = find_row(j, v.row);
    *(scalar *)row_of(j, j.value, at) = WHAT(j) == STATE ? r->state.greatest : lse;
    if (WHAT(j) == LOGSUMEXP)
        return;
    scalar label_logit = v.label_logit;
    if (LEVEL == FULL && is_transformed(j))
        label_logit = transform_logit(transform_of(j.options.softcap, j.options.temperature), label_logit);
    *(scalar *)row_of(j, j.label_logit, at) = v.label.value >= 0 ? label_logit : XCE_NAN;
    if (WHAT(j) == STATE) {
        *(scalar *)row_of(j, j.spread, at) = row_spread(r->state);
        *(scalar *)row_of(j, j.linear, at) = linear;
        return;
    }
    *(scalar *)row_of(j, j.spread, at) = row_entropy(r->state, found.spread);
    *(int64_t *)row_of(j, j.top, at) = nan < 0 ? r->top : nan;
    *(int64_t *)row_of(j, j.rank, at) = v.label.value >= 0 && nan < 0 ? found.above : -1;
}

/* The derivatives of one entry, e its exp; of a loss, where only labels count. */
XCE_FN jet derivatives(const row_job &j, const row_outputs &r, real_pair z, scalar e)
{
    jet at = entry_derivatives(r.out, r.state.inverse, e);
    if (WHAT(j) == LOG_SOFTMAX)
        at.d1 = log_prob_of(r.state.max, r.state.log_z, z, at.value).u;
    return at;
}

/* Enter that `where` leaves this many classes to a row. */
XCE_FN void leave_classes(const row_job &j, row_view *v, scalar n)
{
    if (n == 0)
        v->label.status = IGNORED, v->label.value = -1;
    else if (j.options.label_smoothing != 0)
        v->share = share_of_left(j.options.label_smoothing, n);
}

/* A row of which nothing is summed: its value, the derivative at the label, and what all other entries get. */
struct filled_row {
    scalar at_label, elsewhere;
};

XCE_FN bool is_filled(const row_job &j, const row_view &v)
{
    return WHAT(j) == NLL || v.label.status == IGNORED;
}

template <int GROUP, int CLUSTER> XCE_FN filled_row fill(const row_job &j, const row_view &v, bool is_first)
{
    const row_weight w = weigh_row(j, v);
    const scalar elsewhere = filled_entry(v.label.status, w.factor);
    filled_row f = {v.label.value >= 0 ? -(w.index * w.factor) : elsewhere, elsewhere};
    if (is_first && j.value.data)
        *(scalar *)row_of(j, j.value, find_row(j, v.row)) = nll_value(v.label.status, w.index * w.sample, v.label_logit);
    if (WHAT(j) == NLL && v.grad)
        group_barrier<GROUP, CLUSTER>(); /* the gradient may go where the entry at the label has just been read */
    return f;
}

#endif
