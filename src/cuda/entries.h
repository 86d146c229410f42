/* Rows entry by entry: classes that lie apart, one thread a row, neighbours to neighbours; and the options that need more than
 * the logit and a coefficient at each entry. */
#ifndef XCE_ENTRIES_H
#define XCE_ENTRIES_H

/* What the options of a loss make of the derivatives of one entry, by the raw logit. */
template <int LEVEL>
XCE_FN void loss_derivatives(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, scalar x, scalar *g,
                             scalar *h)
{
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
    if (is_removed(j, v, c)) /* whatever the row holds */
        *g = *h = 0;
}

/* Four entries at a time, whose sum is added to the others in twice the precision; one, where each is a long calculation. */
template <int STEP, int LEVEL, class F> XCE_FN void sum_entries(int64_t first, int64_t n, real_sum *sum, F term)
{
    int64_t c = first;
    for (; LEVEL < FULL && c + 3 * STEP < n; c += 4 * STEP)
        add_to(sum, (term(c) + term(c + STEP)) + (term(c + 2 * STEP) + term(c + 3 * STEP)));
    for (; c < n; c += STEP)
        add_to(sum, term(c));
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
        const filled_row f = fill(j, v, rank == 0);
        if (WHAT(j) == NLL && v.grad)
            group_barrier<GROUP, CLUSTER>();
        for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
            if (v.grad)
                put<output>(v.grad + c * j.grad.classes, c == v.label.value ? f.at_label : f.elsewhere);
            if (v.hess)
                put<storage>(v.hess + c * j.hess.classes, f.elsewhere);
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
#pragma unroll(LEVEL < FULL ? 4 : 1)
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
    sum_entries<GROUP * CLUSTER, LEVEL>(rank, n, &rest, [&](int64_t c) -> scalar {
        scalar x = entry<LEVEL>(j, v, c), e = c == r.top ? 0 : r_exp_relative(x, ref);
        if (is_linear<LEVEL>(j) && c != r.top) {
            scalar d = coefficient(j, v, c);
            add_to(&distances, weighted(d, top.value - x)), add_to(&weights, d);
        }
        if (WHAT(j) == STATS) {
            above += x > v.label_logit;
            add_to(&spread, weighted(e, top.value - x));
        }
        return e;
    });
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
    auto write = [&](int64_t c, scalar g, scalar h) {
        if (v.hess)
            put<storage>(v.hess + c * j.hess.classes, h);
        if (v.grad)
            put<output>(v.grad + c * j.grad.classes, g);
    };
#pragma unroll(LEVEL < FULL ? 4 : 1)
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar g, h, x = entry<LEVEL>(j, v, c);
        derivatives(j, r, x, &g, &h);
        if (WHAT(j) == LOSS)
            loss_derivatives<LEVEL>(j, v, r, c, x, &g, &h);
        write(c, g, h);
    }
    if (WHAT(j) == LOSS) { /* where these do not hold, by the threads that have just written there */
        const int64_t label = v.label.value, team = GROUP * CLUSTER;
        if (label >= 0 && label % team == rank && !is_removed(j, v, label))
            write(label, r.grad_label, r.hess_label);
        if (r.top % team == rank && !is_removed(j, v, r.top))
            write(r.top, r.grad_top, r.hess_top);
    }
    if (LEVEL == FULL && v.indices)
        write_sparse<GROUP, CLUSTER, LEVEL>(j, v, r, rank);
}

#endif
