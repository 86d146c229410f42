"""Up to LANES rows at once: read them, finish them, write them; and the portions that threads take."""

cdef inline void set_outputs(const Job *job, const Tile *tile, View *v) noexcept nogil:
    """What step 3 needs of the rows, each in its lane."""
    cdef real factor = r_load_scalars(tile.sample) * r_set(job.scale)
    v.inverse, v.log_z, v.max = tile.state.inverse, tile.state.log_z, tile.state.max
    if job.what != LOSS:
        v.out.exp = v.inverse
    elif job.sparse_teacher:
        v.out = match_factors(job.phi, tile.match, tile.result, factor)
    else:
        v.out = loss_factors(tile.result, factor, v.inverse)
    v.share = r_load_scalars(tile.share)
    v.ref = r_exp_reference(v.max)
    if job.teacher != NULL:
        v.by.match = tile.match
    if job.relative:
        v.by.slope = tile.slope


cdef inline void pick_row(const Job *job, const Tile *tile, View *v, int i) noexcept nogil:
    """Row i's in every lane."""
    v.inverse, v.log_z, v.max, v.share = lane(v.inverse, i), lane(v.log_z, i), lane(v.max, i), lane(v.share, i)
    fill_lanes(<real *>&v.out, sizeof(row_factors), i)
    v.ref = r_exp_reference(v.max)
    if job.by_distance:
        v.by.origin = transform_origin(job.transform, r_set(tile.max[i]))
    if job.teacher != NULL:
        fill_lanes(<real *>&v.by.match, sizeof(row_match), i)
    if job.relative:
        fill_lanes(<real *>&v.by.slope, sizeof(row_slope), i)


cdef inline void fill_lanes(real *a, size_t size, int i) noexcept nogil:
    """Lane i of every number of a structure in all its lanes."""
    cdef size_t k
    for k in range(size // sizeof(real)):
        a[k] = lane(a[k], i)


cdef inline real lane(real a, int i) noexcept nogil:
    """Lane i in every lane."""
    cdef scalar lanes[LANES]
    r_store_scalars(lanes, a)
    return r_set(lanes[i])


cdef inline void set_entries(const Job *job, const Tile *tile) noexcept nogil:
    """Write the derivatives at the top entries and at the labels, where p - 1 would have lost its digits."""
    cdef scalar grad_top[LANES]
    cdef scalar hess_top[LANES]
    cdef scalar grad_label[LANES]
    cdef scalar hess_label[LANES]
    cdef int i
    r_store_scalars(grad_top, tile.result.grad_top)
    r_store_scalars(hess_top, tile.result.hess_top)
    r_store_scalars(grad_label, tile.result.grad_label)
    r_store_scalars(hess_label, tile.result.hess_label)
    for i in range(tile.n):
        if tile.status[i] != ACTIVE:
            continue
        set_entry(job, tile, i, tile.top[i], grad_top[i], hess_top[i])
        if tile.label[i] >= 0 and tile.label[i] != tile.top[i]:
            set_entry(job, tile, i, tile.label[i], grad_label[i], hess_label[i])


cdef inline void set_entry(
    const Job *job, const Tile *tile, int i, Py_ssize_t c, scalar grad, scalar hess
) noexcept nogil:
    if is_removed(job, tile, i, c):
        return
    if job.want_grad:
        write_scalar(<char *>entry_of(job, tile, GRAD, i, c), job.kind[GRAD], grad)
    if job.want_hess:
        write_scalar(<char *>entry_of(job, tile, HESS, i, c), job.kind[HESS], hess)


cdef inline void fill_row(const Job *job, const Tile *tile, int i, int operand, scalar a) noexcept nogil:
    cdef Py_ssize_t c = 0, k, end, size = size_of_kind(job.kind[operand])
    while c < job.n_classes and not is_time_to_look(job.watch, c):
        end = min(c + LOOK_CLASSES, job.n_classes)
        if a == 0 and job.at[operand].classes == size:
            memset(<char *>entry_of(job, tile, operand, i, c), 0, (end - c) * size)
        else:
            for k in range(c, end):
                write_scalar(<char *>entry_of(job, tile, operand, i, k), job.kind[operand], a)
        c = end


cdef inline void clear_row(const Job *job, const Tile *tile, int i, scalar a) noexcept nogil:
    if job.want_grad:
        fill_row(job, tile, i, GRAD, a)
    if job.want_hess:
        fill_row(job, tile, i, HESS, a)


cdef void nll_tile(const Job *job, Tile *tile) noexcept nogil:
    """Rows of log-probabilities, of which only the labelled ones are read."""
    cdef scalar values[LANES]
    cdef scalar a, logit, elsewhere
    cdef int i
    for i in range(LANES):
        values[i] = 0
    for i in range(tile.n):
        a, logit = tile.index[i] * tile.sample[i], 0
        if tile.label[i] >= 0:
            logit = raw_logit_of(job, tile, i, tile.label[i])
        values[i] = nll_value(tile.status[i], a, logit)
        if job.writes:
            elsewhere = filled_entry(tile.status[i], job.scale)
            clear_row(job, tile, i, elsewhere)
            if tile.label[i] >= 0:
                set_entry(job, tile, i, tile.label[i], -(a * job.scale), elsewhere)
    tile.result.value = r_load_scalars(values)


cdef void wide_tile(const Job *job, Tile *tile, real *stage) noexcept nogil:
    cdef Py_ssize_t vectors = (job.n_classes + LANES - 1) // LANES
    cdef int kind = first_reading(job), keep = FORGET, i, k
    cdef View v
    cdef Distances by
    cdef real sums[TERMS + 1]
    for k in range(TERMS):
        sums[k] = r_set(0)
    if job.keeps_pairs:
        keep = PAIRED
    elif keeps_exp(job) and job.level < MIXED and job.want_grad and not STORAGE_IS_16_BIT:
        keep = IN_GRAD
    elif keeps_exp(job) and (job.level >= MIXED or STORAGE_IS_16_BIT) and tile.n * vectors <= STAGE:
        keep = STAGED
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            continue
        look(job, tile, &v, i)
        v.by = &by
        find_top(job, &v, &tile.max[i], &tile.top[i])
        if tile.label[i] >= 0:
            tile.label_logit[i] = logit_of(job, tile, i, tile.label[i])
        if job.sparse_teacher:
            pick(job, tile, i, stage)
            v.teacher_has = classes_of_teacher(job, stage)
        if has_dense_teacher(job):     # student and teacher are read together
            continue
        v.top = tile.top[i]
        open_row(job, &v, r_set(tile.max[i]))
        v.share, v.label_logit = r_set(tile.share[i]), r_set(tile.label_logit[i])
        v.kept_exp = stage + i * vectors
        sum_rows(job, &v, kind, keep, sums)
        tile.sums[0][i] = first_lane(sums[0])
        if kind != SUM_EXP:
            tile.sums[1][i], tile.sums[2][i] = first_lane(sums[1]), first_lane(sums[2])
        if kind == SUM_STATS:
            tile.above[i] = <int64_t>tile.sums[2][i] + <int64_t>first_lane(sums[TERMS])
    if not has_dense_teacher(job):
        close_rows(job, tile)
    if job.teacher != NULL:
        match_teacher(job, tile, NULL, stage)
    if job.relative:
        set_slopes(job, tile)
    if job.teacher != NULL or (job.dense and not job.linear):
        for i in range(tile.n):
            if tile.status[i] == IGNORED:
                continue
            look(job, tile, &v, i)
            v.by = &by
            set_outputs(job, tile, &v)
            pick_row(job, tile, &v, i)
            if job.teacher != NULL:
                view_pair(job, tile, &v, stage, i)
                v.top = tile.top_place[i] if job.sparse_teacher else tile.top[i]
                sum_pair(job, &v, second_reading(job), sums)
            else:
                v.top = tile.top[i]
                view_kept(job, &v, stage, i)
                sum_rows(job, &v, second_reading(job), keep, sums)
            for k in range(TERMS):
                tile.phi_sums[k][i] = first_lane(sums[k])
    finish_loss(job, tile)
    if not job.writes:
        return
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            clear_row(job, tile, i, 0)
            continue
        look(job, tile, &v, i)
        v.by = &by
        set_outputs(job, tile, &v)
        pick_row(job, tile, &v, i)
        if job.teacher != NULL:
            view_pair(job, tile, &v, stage, i)
        else:
            view_kept(job, &v, stage, i)
        v.kept_exp = stage + i * vectors
        write_rows(job, &v, 1, keep)
        if job.sparse_teacher:
            write_sparse(job, tile, &v, i)
    if job.what == LOSS:
        set_entries(job, tile)


cdef inline bint has_dense_teacher(const Job *job) noexcept nogil:
    return job.teacher != NULL and not job.sparse_teacher


cdef inline void open_row(const Job *job, View *v, real maximum) noexcept nogil:
    """What the entries are measured by, once the greatest logits are known."""
    v.max = maximum
    if job.by_distance:
        v.by.origin, v.max = transform_origin(job.transform, maximum), r_set(0)
    v.ref = r_exp_reference(v.max)


cdef inline void close_rows(const Job *job, Tile *tile) noexcept nogil:
    cdef real maximum = r_load_scalars(tile.max)
    cdef real_pair rest
    cdef steep_term sums
    rest.high, rest.low = r_load_scalars(tile.sums[0]), r_set(0)
    if job.steep:
        sums.high, sums.middle, sums.low = rest.high, r_load_scalars(tile.sums[1]), r_load_scalars(tile.sums[2])
        rest = steep_total(sums)
    if job.by_distance:
        tile.state = row_close_transformed(job.transform, maximum, rest.high)
    else:
        tile.state = row_close(maximum, rest.high)
    tile.state.rest_low = rest.low


cdef inline void finish_loss(const Job *job, Tile *tile) noexcept nogil:
    if job.teacher != NULL:
        finish_divergence(job, tile)
    elif job.what == LOSS:
        finish(job, tile)


cdef inline bint keeps_exp(const Job *job) noexcept nogil:
    """Whether step 3 wants the exp of step 1."""
    return job.writes and job.what != LOG_SOFTMAX and (job.linear or not job.dense)


cdef inline void prefetch_next(const Job *job, const Tile *tile) noexcept nogil:
    """Fetch the rows after these, and the room for the gradient of these, while these are computed on."""
    cdef Py_ssize_t i, c, size = job.n_classes * <Py_ssize_t>sizeof(storage)
    cdef const char *p = tile.at[X] + tile.n * job.at[X].rows
    if job.at[X].classes == sizeof(storage) and job.at[X].rows == size:
        for c in range(0, tile.n * size, 64):
            prefetch_far(p + c)
    if job.want_grad and not job.streams and job.at[GRAD].classes == sizeof(storage) and job.at[GRAD].rows == size:
        for c in range(0, tile.n * size, 64):
            prefetch_to_write(tile.at[GRAD] + c)


cdef void many_tile(const Job *job, Tile *tile, real *stage) noexcept nogil:
    cdef bint staged = job.n_classes <= STAGE
    cdef int kind = first_reading(job), keep = STAGED if staged and keeps_exp(job) else FORGET, i
    cdef View v
    cdef Distances by
    cdef real sums[TERMS]
    cdef scalar tops[LANES]
    cdef scalar active[LANES]
    if job.keeps_pairs:
        keep = PAIRED
    look(job, tile, &v, 0)
    v.by = &by
    top_many(job, &v, tile.n, stage if staged else NULL, &v.max, &v.tops)
    prefetch_next(job, tile)
    r_store_scalars(tile.max, v.max)
    r_store_scalars(tops, v.tops)
    for i in range(LANES):
        tile.top[i] = <Py_ssize_t>tops[i]
        active[i] = tile.status[i] != IGNORED
        if tile.label[i] < 0:
            continue
        if staged:
            tile.label_logit[i] = (<const scalar *>stage)[tile.label[i] * LANES + i]
        else:
            tile.label_logit[i] = logit_of(job, tile, i, tile.label[i])
    v.kept_logits = stage if staged else NULL
    v.kept_exp = stage
    if job.sparse_teacher:
        v.teacher_has = classes_of_teacher(job, stage)
        forget_classes(job, classes_of_teacher(job, stage), job.n_classes)
        for i in range(tile.n):
            pick(job, tile, i, stage)
    open_row(job, &v, v.max)
    v.share, v.label_logit = r_load_scalars(tile.share), r_load_scalars(tile.label_logit)
    for i in range(TERMS):
        sums[i] = r_set(0)
    if not has_dense_teacher(job):     # student and teacher are read together
        sum_rows(job, &v, kind, keep, sums)
        r_store_scalars(tile.sums[0], sums[0])
        if kind != SUM_EXP:
            r_store_scalars(tile.sums[1], sums[1])
            r_store_scalars(tile.sums[2], sums[2])
        if kind == SUM_STATS:
            for i in range(LANES):
                tile.above[i] = <int64_t>tile.sums[2][i]
        close_rows(job, tile)
    if job.relative:
        set_slopes(job, tile)
    if job.teacher != NULL:
        match_teacher(job, tile, &v, stage)
        v.tops = places_in_lanes(&tile.top_place[0] if job.sparse_teacher else &tile.top[0], tile.n)
    if job.teacher != NULL or (job.dense and not job.linear):
        set_outputs(job, tile, &v)
        if job.teacher != NULL:
            sum_pair(job, &v, second_reading(job), sums)
        else:
            view_kept(job, &v, stage, 0)
            sum_rows(job, &v, second_reading(job), keep, sums)
        for i in range(TERMS):
            r_store_scalars(tile.phi_sums[i], sums[i])
    finish_loss(job, tile)
    if not job.writes:
        return
    set_outputs(job, tile, &v)
    v.active = r_not(r_eq(r_load_scalars(active), r_set(0)))
    if staged and job.want_grad and job.what != LOG_SOFTMAX and lies_in_rows(job, &v, GRAD, tile.n):
        v.turned_grad = stage
    write_rows(job, &v, tile.n, keep)
    if v.turned_grad != NULL and job.streams:
        tile.at[GRAD] = <char *>(stage + job.n_classes)
    if v.turned_grad != NULL:
        turn_out(stage, job.n_classes, tile.at[GRAD], v.lane[GRAD])
    if job.sparse_teacher:
        write_sparse(job, tile, &v, 0)
    if job.what == LOSS:
        set_entries(job, tile)
    if v.turned_grad != NULL and job.streams:
        stream(v.at[GRAD], tile.at[GRAD], tile.n * job.at[GRAD].rows)


cdef inline int first_reading(const Job *job) noexcept nogil:
    if job.what == STATS:
        return SUM_STATS
    if job.sparse_teacher:
        return SUM_OUTSIDE
    if job.steep:
        return SUM_PARTS
    return SUM_LINEAR if job.what == STATE or (job.dense and job.linear) else SUM_EXP


cdef inline int second_reading(const Job *job) noexcept nogil:
    return SUM_PHI + job.phi if job.phi < FIRST_DIVERGENCE else SUM_DIVERGENCE + job.phi - FIRST_DIVERGENCE


cdef inline void put_rows(const Job *job, const Tile *tile, int k, real a, bint zero_if_ignored) noexcept nogil:
    cdef scalar lanes[LANES]
    cdef int i
    if tile.at[k] == NULL:
        return
    r_store_scalars(lanes, a)
    for i in range(tile.n):
        if zero_if_ignored and tile.status[i] == IGNORED:
            lanes[i] = 0
        if k == VALUE and job.kind[VALUE] != 0:
            write_number(tile.at[k] + i * job.at[k].rows, job.kind[VALUE], lanes[i])
        else:
            (<scalar *>(tile.at[k] + i * job.at[k].rows))[0] = lanes[i]


cdef Py_ssize_t first_nan(const Job *job, const Tile *tile, int i) noexcept nogil:
    cdef Py_ssize_t c
    cdef scalar x
    for c in range(job.n_classes):
        if is_time_to_look(job.watch, c):
            break
        x = logit_of(job, tile, i, c)
        if x != x:
            return c
    return -1


cdef inline void put_lse(const Job *job, const Tile *tile) noexcept nogil:
    """log(sum(exp)) of each row; that of infinities is the greatest of them."""
    cdef scalar lanes[LANES]
    cdef int i
    r_store_scalars(lanes, row_lse(tile.state))
    for i in range(tile.n):
        if lanes[i] != lanes[i] and first_nan(job, tile, i) < 0:
            lanes[i] = tile.max[i]
    put_rows(job, tile, VALUE, r_load_scalars(lanes), False)


cdef inline void put_stats(const Job *job, const Tile *tile) noexcept nogil:
    """The row outputs of STATS and STATE; ignored rows have no label to speak of."""
    cdef row_state s = tile.state
    cdef scalar label_logit
    cdef Py_ssize_t nan, rank
    cdef scalar log_z[LANES]
    cdef int i
    r_store_scalars(log_z, s.log_z)
    if job.what == STATE:
        put_rows(job, tile, VALUE, s.greatest, False)
        put_rows(job, tile, SPREAD, row_spread(s), False)
        put_rows(job, tile, LINEAR, r_load_scalars(tile.sums[1]), False)
    else:
        put_lse(job, tile)
        put_rows(job, tile, SPREAD, row_entropy(s, r_load_scalars(tile.sums[1])), False)
    for i in range(tile.n):
        label_logit = tile.label_logit[i] if tile.label[i] >= 0 else NAN
        (<scalar *>(tile.at[LABEL_LOGIT] + i * job.at[LABEL_LOGIT].rows))[0] = (
            first_lane(transform_logit(job.transform, r_set(label_logit))) if job.transforms else label_logit
        )
        if job.what == STATE:
            continue
        nan = -1
        if log_z[i] != log_z[i]:
            nan = first_nan(job, tile, i)
        rank = -1
        if tile.label[i] >= 0 and nan < 0:
            rank = tile.above[i] + (tile.max[i] > label_logit)
        (<int64_t *>(tile.at[TOP] + i * job.at[TOP].rows))[0] = tile.top[i] if nan < 0 else nan
        (<int64_t *>(tile.at[RANK] + i * job.at[RANK].rows))[0] = rank


cdef double sum_of_doubles(const double *a, Py_ssize_t n) noexcept nogil:
    """In eight interleaved sums, whatever thread does it."""
    cdef double lanes[8]
    cdef Py_ssize_t i, whole = n - n % 8
    cdef int k
    for k in range(8):
        lanes[k] = 0
    i = 0
    while i < whole:
        for k in range(8):
            lanes[k] += a[i + k]
        i += 8
    for k in range(<int>(n - whole)):
        lanes[k] += a[whole + k]
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))


# What a thread works with besides its stage; none of it on a stack, which may be small.
cdef struct Desk:
    Tile tile
    double values[UNIT_ROWS]


cdef double unit(const Job *job, Py_ssize_t index, Desk *desk, real *stage) noexcept nogil:
    """Work off a portion of rows; the sum of their losses."""
    cdef Py_ssize_t row = index * job.unit_rows, first = row, end = min(row + job.unit_rows, job.n_rows), left
    cdef double *values = desk.values
    cdef scalar lanes[LANES]
    cdef Tile *tile = &desk.tile
    cdef int n, i
    while row < end:
        left = min(end - row, job.run - row % job.run)
        n = <int>min(left, <Py_ssize_t>job.tile_rows)
        open_tile(job, tile, row, n)
        if job.what == NLL:
            nll_tile(job, tile)
        elif job.wide:
            wide_tile(job, tile, stage)
        else:
            many_tile(job, tile, stage)
        if job.what == STATS or job.what == STATE:
            put_stats(job, tile)
        elif job.what == LOGSUMEXP:
            put_lse(job, tile)
        elif job.what == LOSS or job.what == NLL:
            put_rows(job, tile, VALUE, tile.result.value, True)
            r_store_scalars(lanes, tile.result.value)
            for i in range(n):
                values[row - first + i] = 0 if tile.status[i] == IGNORED else lanes[i]
        row += n
    if job.streams:
        stream_end()
    return sum_of_doubles(values, end - first) if job.what == LOSS or job.what == NLL else 0
