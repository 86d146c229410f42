/* Rows entry by entry: classes that lie apart, one thread a row, neighbours to neighbours; and the options that need more than
 * the logit and a coefficient at each entry. */
#ifndef XCE_ENTRIES_H
#define XCE_ENTRIES_H

/* What an entry with a coefficient adds to the sums; z is what row_entry takes. */
XCE_FN row_sums terms_of_phi(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, real_pair z)
{
    return relative_terms(r.slope, row_entry(r.state, z), z, r_exp_pair_near(z).exp, coefficient(j, v, c), PHI(j),
                          (scalar)j.options.parameter);
}

/* What the options of a loss make of the derivatives of one entry, by the raw logit. */
template <int LEVEL>
XCE_FN void loss_derivatives(const row_job &j, const row_view &v, const row_outputs &r, int64_t c, real_pair z, jet *at)
{
    if (is_linear<LEVEL>(j))
        at->d1 = linear_derivative(r.out, at->d1, coefficient(j, v, c));
    else if (LEVEL == FULL && j.teacher && !v.indices) {
        const prob_pair pair = pair_at(j, v, r, c, c);
        *at = match_derivatives(PHI(j), divergence_term(PHI(j), pair, r.match), pair.p, r.out);
    } else if (LEVEL == FULL && j.dense) {
        const row_sums f = terms_of_phi(j, v, r, c, z);
        relative_derivatives(r.out, at, f.extra, f.d2);
    }
    if (LEVEL == FULL && r.out.far != 0)
        add_far(r.out.far, r.out.factor, at->value, 1 - at->value, &at->d1, &at->d2);
    if (LEVEL == FULL && is_transformed(j))
        transform_derivatives(transform_of(j.options.softcap, j.options.temperature), raw_entry(j, v, c), &at->d1, &at->d2);
    if (is_removed(j, v, c)) /* whatever the row holds */
        at->d1 = at->d2 = 0;
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

/* The student's mass, in units of its top class, at the others that a sparse teacher does not have. A thread marks 64 of its
 * classes at a time by bits, reading all those of the teacher. */
template <int STEP>
XCE_FN scalar sum_outside(const row_job &j, const row_view &v, const row_outputs &r, exp_reference ref, int64_t rank)
{
    real_sum outside = {0, 0};
    for (int64_t first = rank; first < j.n_classes; first += (int64_t)64 * STEP) {
        uint64_t known = 0;
        for (int64_t place = 0; place < j.n_places; place++) {
            int64_t away = class_at(j, v, place) - first;
            if (away >= 0 && away < (int64_t)64 * STEP && away % STEP == 0)
                known |= (uint64_t)1 << away / STEP;
        }
        int64_t c = first;
        for (int i = 0; i < 64 && c < j.n_classes; i++, c += STEP)
            if (c != r.top && !(known >> i & 1))
                add_to(&outside, r_exp_relative_pair(distance(j, r.origin, entry<FULL>(j, v, c)), ref));
    }
    return r_sum_total(outside);
}

/* Match the row with its teacher's. What is left: the student's mass outside the teacher's classes, but for the top one, and the
 * place where the teacher has that, or -1. */
template <int GROUP, int CLUSTER>
XCE_FN scalar meet_teacher(const row_job &j, const row_view &v, row_outputs *r, int64_t rank, int64_t *top_place,
                           message_board *board)
{
    const int64_t n = v.indices ? j.n_places : j.n_classes;
    const exp_reference ref = r_exp_reference(r_set(0));
    greatest best = {-XCE_INF, NOWHERE}, place = {0, NOWHERE};
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        scalar t = teacher_logit(j, v, c);
        if (t > best.value)
            best.value = t, best.place = c;
        if (v.indices && class_at(j, v, c) == r->top)
            place.place = c;
    }
    best = agree<GROUP, CLUSTER>(best, board);
    *top_place = r->top;
    if (v.indices) {
        place = agree<GROUP, CLUSTER>(place, board);
        *top_place = place.place < n ? place.place : -1;
    }
    const int64_t greatest_place = best.value > -XCE_INF ? best.place : 0;
    r->teacher_origin = transform_origin(transform_of(j.options.softcap, j.options.temperature), best.value);
    real_sum rest = {0, 0}, excess = {0, 0};
    bool is_bad = false; /* a class out of range that nobody checked */
    for (int64_t place = rank; place < n; place += GROUP * CLUSTER) {
        const int64_t c = v.indices ? class_at(j, v, place) : place;
        if (c < 0) {
            is_bad = true;
            continue;
        }
        const distance_pair at = distances_at(j, v, *r, place, c);
        const scalar e = r_exp_relative_pair(at.y, ref);
        if (place != greatest_place)
            add_to(&rest, e);
        add_to(&excess, exp_difference(r_exp_relative_pair(at.x, ref), e, total_of(at.gap)));
    }
    scalar outside = v.indices ? sum_outside<GROUP * CLUSTER>(j, v, *r, ref, rank) : 0;
    sums<3> all = {{is_bad ? XCE_NAN : r_sum_total(rest), r_sum_total(excess), outside}};
    all = agree<GROUP, CLUSTER>(all, board);
    const row_state teacher = row_close_transformed(transform_of(j.options.softcap, j.options.temperature), best.value, all.at[0]);
    r->match = match_rows(r->state, teacher, all.at[1] + all.at[2] + (*top_place < 0 ? 1 : 0),
                          teacher_at_top(j, v, r->teacher_origin, *top_place));
    return all.at[2] * r->state.inverse;
}

/* The sums of a divergence over all classes of the teacher but the top one. */
template <int GROUP, int CLUSTER>
XCE_FN row_sums sum_pair(const row_job &j, const row_view &v, const row_outputs &r, int64_t rank, message_board *board)
{
    real_sum f[3] = {{0, 0}, {0, 0}, {0, 0}};
    const int64_t n = v.indices ? j.n_places : j.n_classes;
    for (int64_t place = rank; place < n; place += GROUP * CLUSTER) {
        int64_t c = v.indices ? class_at(j, v, place) : place;
        if (c < 0 || c == r.top)
            continue;
        const prob_pair at = pair_at(j, v, r, place, c);
        const row_sums g = match_terms(at.p, divergence_term(PHI(j), at, r.match));
        add_to(&f[0], g.value), add_to(&f[1], g.d1), add_to(&f[2], g.d2);
    }
    sums<3> all = {{r_sum_total(f[0]), r_sum_total(f[1]), r_sum_total(f[2])}};
    all = agree<GROUP, CLUSTER>(all, board);
    row_sums found = {all.at[0], all.at[1], all.at[2], 0};
    return found;
}

/* The sums of phi, its derivatives and the slopes over all classes but the top one, where they are not linear. */
template <int GROUP, int CLUSTER>
XCE_FN row_sums sum_phi(const row_job &j, const row_view &v, const row_outputs &r, int64_t rank, message_board *board)
{
    real_sum f[4] = {{0, 0}, {0, 0}, {0, 0}, {0, 0}};
    for (int64_t c = rank; c < j.n_classes; c += GROUP * CLUSTER) {
        if (c == r.top)
            continue;
        const row_sums g = terms_of_phi(j, v, r, c, distance_or_logit<FULL>(j, r.origin, entry<FULL>(j, v, c)));
        add_to(&f[0], g.value), add_to(&f[1], g.d1), add_to(&f[2], g.d2), add_to(&f[3], g.extra);
    }
    sums<4> all = {{r_sum_total(f[0]), r_sum_total(f[1]), r_sum_total(f[2]), r_sum_total(f[3])}};
    all = agree<GROUP, CLUSTER>(all, board);
    const row_sums found = {all.at[0], all.at[1], all.at[2], all.at[3]};
    return found;
}

XCE_FN void write_entry(const row_job &j, const row_view &v, int64_t c, scalar grad, scalar hess)
{
    if (v.hess)
        put<storage>(v.hess + c * j.hess.classes, hess);
    if (v.grad)
        put<output>(v.grad + c * j.grad.classes, grad);
}

/* The classes of a sparse teacher have other derivatives than all others have; x is not the gradient's memory. */
template <int GROUP, int CLUSTER>
XCE_FN void write_sparse(const row_job &j, const row_view &v, const row_outputs &r, int64_t rank)
{
    group_barrier<GROUP, CLUSTER>();
    for (int64_t place = rank; place < j.n_places; place += GROUP * CLUSTER) {
        int64_t c = class_at(j, v, place);
        if (c < 0 || c == r.top || is_removed(j, v, c))
            continue;
        const prob_pair at = pair_at(j, v, r, place, c);
        jet f = match_derivatives(PHI(j), divergence_term(PHI(j), at, r.match), at.p, r.out);
        if (is_transformed(j))
            transform_derivatives(transform_of(j.options.softcap, j.options.temperature), 0, &f.d1, &f.d2);
        write_entry(j, v, c, f.d1, f.d2);
    }
}

template <int GROUP, int CLUSTER, int LEVEL>
XCE_FN void plain_row(const row_job &j, int64_t row, message_board *board, row_finished *shared)
{
    const int64_t rank = (CLUSTER > 1 ? cluster_rank() * GROUP : 0) + (GROUP > 1 ? threadIdx.x : 0);
    const int64_t n = j.n_classes;
    row_view v = view_row<LEVEL>(j, row);
    if (LEVEL == FULL && WHAT(j) == LOSS && v.where && v.label.status != IGNORED) {
        sums<1> left = {{0}};
        for (int64_t c = rank; c < n; c += GROUP * CLUSTER)
            left.at[0] += v.where[c * j.where.classes] != 0;
        leave_classes(j, &v, agree<GROUP, CLUSTER>(left, board).at[0]);
    }
    if (is_filled(j, v)) {
        const filled_row f = fill<GROUP, CLUSTER>(j, v, rank == 0);
        for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
            write_entry(j, v, c, c == v.label.value ? f.at_label : f.elsewhere, f.elsewhere);
        }
        return;
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
    const bool by_distance = is_by_distance<LEVEL>(j);
    const logit_transform with = transform_of(j.options.softcap, j.options.temperature);
    if (by_distance)
        r.origin = transform_origin(with, top.value);
    const scalar max = by_distance ? 0 : top.value;
    const exp_reference ref = r_exp_reference(max);

    real_sum rest = {0, 0}, distances = {0, 0}, weights = {0, 0}, spread = {0, 0};
    int64_t above = 0;
    sum_entries<GROUP * CLUSTER, LEVEL>(rank, n, &rest, [&](int64_t c) -> scalar {
        scalar x = entry<LEVEL>(j, v, c);
        real_pair z = distance_or_logit<LEVEL>(j, r.origin, x);
        if (LEVEL == FULL && is_steep_row(j)) {
            steep_term term = steep_summand(c == r.top ? r_pair(0, 0) : steep_exp(z).exp);
            add_to(&distances, term.middle), add_to(&weights, term.low);
            return term.high;
        }
        scalar e = c == r.top ? 0 : exp_of<LEVEL>(j, z, ref);
        if (is_linear<LEVEL>(j) && c != r.top) {
            scalar d = coefficient(j, v, c);
            add_to(&distances, below_top(d, max, z.high)), add_to(&weights, d);
        }
        if (WHAT(j) == STATS) {
            above += x > v.label_logit;
            add_to(&spread, below_top(e, max, z.high));
        }
        return e;
    });
    sums<3> all = {{r_sum_total(rest), r_sum_total(distances), r_sum_total(weights)}};
    all = agree<GROUP, CLUSTER>(all, board);
    const scalar linear[2] = {is_linear<LEVEL>(j) ? all.at[1] : 0, is_linear<LEVEL>(j) ? all.at[2] : 0};
    real_pair added = {all.at[0], 0};
    if (LEVEL == FULL && is_steep_row(j)) {
        steep_term sums = {all.at[0], all.at[1], all.at[2]};
        added = steep_total(sums);
    }
    r.state = by_distance ? row_close_transformed(with, top.value, added.high) : row_close(max, added.high);
    r.state.rest_low = added.low;

    if (LEVEL == FULL && WHAT(j) == LOSS && j.teacher) {
        int64_t top_place;
        const scalar outside = meet_teacher<GROUP, CLUSTER>(j, v, &r, rank, &top_place, board);
        row_sums found = sum_pair<GROUP, CLUSTER>(j, v, r, rank, board);
        found.extra = outside;
        close_loss<GROUP>(j, v, &r, shared, rank == 0, [&] { finish_pair(j, v, &r, found, top_place); });
    } else if (WHAT(j) == LOSS) {
        row_sums sum = linear_sums(r.state, linear[0], linear[1]);
        if (is_relative<LEVEL>(j)) {
            scalar a_top = top_coefficient(coefficient(j, v, r.top), weigh_row(j, v).index, label_is_top(v, r.top));
            r.slope = slope_of_top(r.state, a_top, PHI(j), (scalar)j.options.parameter);
            sum = sum_phi<GROUP, CLUSTER>(j, v, r, rank, board);
        }
        close_loss<GROUP>(j, v, &r, shared, rank == 0, [&] { finish_row<LEVEL>(j, v, &r, sum); });
    } else {
        statistics found = {r_sum_total(spread), above};
        put_statistics<GROUP, CLUSTER, LEVEL>(j, v, &r, top.value, linear[0], found, rank, board);
    }
    if (!v.grad && !v.hess)
        return;
    group_barrier<GROUP, CLUSTER>(); /* others may still read the entries at the top and the label */
#pragma unroll(LEVEL < FULL ? 4 : 1)
    for (int64_t c = rank; c < n; c += GROUP * CLUSTER) {
        const real_pair z = distance_or_logit<LEVEL>(j, r.origin, entry<LEVEL>(j, v, c));
        jet at = derivatives(j, r, z, exp_of<LEVEL>(j, z, r.state.ref));
        if (WHAT(j) == LOSS)
            loss_derivatives<LEVEL>(j, v, r, c, z, &at);
        else if (LEVEL == FULL && is_removed(j, v, c)) /* also in a row of which nothing is left */
            at.d1 = WHAT(j) == LOG_SOFTMAX ? -XCE_INF : 0;
        write_entry(j, v, c, at.d1, at.d2);
    }
    if (WHAT(j) == LOSS) { /* where these do not hold, by the threads that have just written there */
        const int64_t label = v.label.value, team = GROUP * CLUSTER;
        if (label >= 0 && label % team == rank && !is_removed(j, v, label))
            write_entry(j, v, label, r.grad_label, r.hess_label);
        if (r.top % team == rank && !is_removed(j, v, r.top))
            write_entry(j, v, r.top, r.grad_top, r.hess_top);
    }
    if (LEVEL == FULL && v.indices)
        write_sparse<GROUP, CLUSTER>(j, v, r, rank);
}

#endif
