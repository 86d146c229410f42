"""Up to LANES rows at once: read them, finish them, write them; and the portions that threads take."""

cdef inline void set_outputs(const Job *job, const Tile *tile, View *v) noexcept nogil:
    """What step 3 needs of the rows, each in its lane."""
    cdef real sample = r_load_scalars(tile.sample)
    cdef real outside = r_set(share_outside(job.phi) if job.sparse_teacher else 0)
    v.factor = sample * r_set(job.scale)
    v.inverse, v.log_z, v.max = tile.state.inverse, tile.state.log_z, tile.state.max
    v.b, v.d = tile.result.b, tile.result.d
    if job.what == LOSS:
        v.out_exp = (outside - v.b) * v.factor * v.inverse
    else:
        v.out_exp = v.inverse
    v.out_hess1 = (outside - v.b) * v.factor
    v.out_hess2 = (v.b + v.d - outside - outside) * v.factor
    v.share = r_load_scalars(tile.share)
    v.ref = r_exp_reference(v.max)
    if job.teacher != NULL:
        v.teacher_max, v.teacher_log_z, v.teacher_inverse = tile.teacher.max, tile.teacher.log_z, tile.teacher.inverse
        v.teacher_ref = r_exp_reference(v.teacher_max)


cdef inline void pick_row(View *v, int i) noexcept nogil:
    """Row i's in every lane."""
    v.factor, v.inverse, v.log_z, v.max = lane(v.factor, i), lane(v.inverse, i), lane(v.log_z, i), lane(v.max, i)
    v.out_exp, v.out_hess1, v.out_hess2 = lane(v.out_exp, i), lane(v.out_hess1, i), lane(v.out_hess2, i)
    v.share = lane(v.share, i)
    v.b, v.d = lane(v.b, i), lane(v.d, i)
    v.ref = r_exp_reference(v.max)
    v.teacher_max, v.teacher_log_z = lane(v.teacher_max, i), lane(v.teacher_log_z, i)
    v.teacher_inverse = lane(v.teacher_inverse, i)
    v.teacher_ref = r_exp_reference(v.teacher_max)


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
        s_store(<storage *>entry_of(job, tile, GRAD, i, c), grad)
    if job.want_hess:
        s_store(<storage *>entry_of(job, tile, HESS, i, c), hess)


cdef inline void fill_row(const Job *job, const Tile *tile, int i, int operand, scalar a) noexcept nogil:
    cdef Py_ssize_t c
    if a == 0 and job.at[operand].classes == sizeof(storage):
        memset(tile.at[operand] + i * job.at[operand].rows, 0, job.n_classes * sizeof(storage))
        return
    for c in range(job.n_classes):
        s_store(<storage *>entry_of(job, tile, operand, i, c), a)


cdef inline void clear_row(const Job *job, const Tile *tile, int i, scalar a) noexcept nogil:
    if job.want_grad:
        fill_row(job, tile, i, GRAD, a)
    if job.want_hess:
        fill_row(job, tile, i, HESS, a)


cdef void nll_tile(const Job *job, Tile *tile) noexcept nogil:
    """Rows of log-probabilities, of which only the labelled ones are read."""
    cdef scalar values[LANES]
    cdef scalar a
    cdef int i
    for i in range(LANES):
        values[i] = 0
    for i in range(tile.n):
        a = 0
        if tile.label[i] >= 0:
            a = tile.index[i] * tile.sample[i]
            if a != 0:
                values[i] = -a * raw_logit_of(job, tile, i, tile.label[i])
        elif tile.status[i] == INVALID:
            values[i] = NAN
        if job.writes:
            clear_row(job, tile, i, values[i] if tile.status[i] == INVALID else 0)
            if tile.label[i] >= 0:
                set_entry(job, tile, i, tile.label[i], -(a * job.scale), 0)
    tile.result.value = r_load_scalars(values)


cdef void wide_tile(const Job *job, Tile *tile, real *stage) noexcept nogil:
    cdef Py_ssize_t vectors = (job.n_classes + LANES - 1) // LANES
    cdef int kind = first_reading(job), keep = FORGET, i
    cdef View v
    cdef real sums[TERMS]
    if keeps_exp(job) and job.level < MIXED and job.want_grad and not STORAGE_IS_16_BIT:
        keep = IN_GRAD
    elif keeps_exp(job) and (job.level >= MIXED or STORAGE_IS_16_BIT) and tile.n * vectors <= STAGE:
        keep = STAGED
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            continue
        look(job, tile, &v, i)
        find_top(job, &v, &tile.max[i], &tile.top[i])
        if tile.label[i] >= 0:
            tile.label_logit[i] = logit_of(job, tile, i, tile.label[i])
        if job.sparse_teacher:
            pick(job, tile, i, picked_row(job, stage, i), 1)
        v.top = tile.top[i]
        v.max = r_set(tile.max[i])
        v.ref = r_exp_reference(v.max)
        v.share, v.label_logit = r_set(tile.share[i]), r_set(tile.label_logit[i])
        v.kept_exp = stage + i * vectors
        sum_rows(job, &v, kind, keep, sums)
        tile.sums[0][i] = first_lane(sums[0])
        if kind != SUM_EXP:
            tile.sums[1][i], tile.sums[2][i] = first_lane(sums[1]), first_lane(sums[2])
    tile.state = row_close(r_load_scalars(tile.max), r_load_scalars(tile.sums[0]))
    if job.teacher != NULL:
        read_teacher_wide(job, tile)
    if job.sparse_teacher or (job.dense and not job.linear):
        for i in range(tile.n):
            if tile.status[i] == IGNORED:
                continue
            look(job, tile, &v, i)
            set_outputs(job, tile, &v)
            pick_row(&v, i)
            if job.sparse_teacher:
                v.top, v.picked = tile.top_place[i], <const real *>picked_row(job, stage, i)
                sum_sparse(job, &v, sums)
            else:
                v.top = tile.top[i]
                sum_rows(job, &v, SUM_PHI, FORGET, sums)
            tile.phi_sums[0][i], tile.phi_sums[1][i] = first_lane(sums[0]), first_lane(sums[1])
            tile.phi_sums[2][i] = first_lane(sums[2])
    if job.what == LOSS:
        finish(job, tile)
    if not job.writes:
        return
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            clear_row(job, tile, i, 0)
            continue
        look(job, tile, &v, i)
        set_outputs(job, tile, &v)
        pick_row(&v, i)
        v.kept_exp = stage + i * vectors
        write_rows(job, &v, 1, keep)
        if job.sparse_teacher:
            v.picked = <const real *>picked_row(job, stage, i)
            write_sparse(job, tile, &v, i)
    if job.what == LOSS:
        set_entries(job, tile)


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
    cdef real sums[TERMS]
    cdef scalar tops[LANES]
    cdef scalar active[LANES]
    look(job, tile, &v, 0)
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
        v.picked = stage + stage_vectors(job)
        for i in range(tile.n):
            pick(job, tile, i, <scalar *>v.picked + i, LANES)
    v.ref = r_exp_reference(v.max)
    v.share, v.label_logit = r_load_scalars(tile.share), r_load_scalars(tile.label_logit)
    sum_rows(job, &v, kind, keep, sums)
    r_store_scalars(tile.sums[0], sums[0])
    if kind != SUM_EXP:
        r_store_scalars(tile.sums[1], sums[1])
        r_store_scalars(tile.sums[2], sums[2])
    tile.state = row_close(v.max, sums[0])
    if job.teacher != NULL:
        v.kept_teacher = read_teacher_many(job, tile, stage)
    if job.sparse_teacher or (job.dense and not job.linear):
        set_outputs(job, tile, &v)
        if job.sparse_teacher:
            for i in range(LANES):
                tops[i] = <scalar>tile.top_place[i] if i < tile.n else -1
            v.tops = r_load_scalars(tops)
            sum_sparse(job, &v, sums)
        else:
            sum_rows(job, &v, SUM_PHI, FORGET, sums)
        for i in range(TERMS):
            r_store_scalars(tile.phi_sums[i], sums[i])
    if job.what == LOSS:
        finish(job, tile)
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
    return SUM_LINEAR if job.what == STATE or (job.dense and job.linear) else SUM_EXP


cdef inline void put_rows(const Job *job, const Tile *tile, int k, real a, bint zero_if_ignored) noexcept nogil:
    cdef scalar lanes[LANES]
    cdef int i
    if tile.at[k] == NULL:
        return
    r_store_scalars(lanes, a)
    for i in range(tile.n):
        if zero_if_ignored and tile.status[i] == IGNORED:
            lanes[i] = 0
        (<scalar *>(tile.at[k] + i * job.at[k].rows))[0] = lanes[i]


cdef Py_ssize_t first_nan(const Job *job, const Tile *tile, int i) noexcept nogil:
    cdef Py_ssize_t c
    cdef scalar x
    for c in range(job.n_classes):
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
        (<scalar *>(tile.at[VALUE] + i * job.at[VALUE].rows))[0] = lanes[i]


cdef inline void put_stats(const Job *job, const Tile *tile) noexcept nogil:
    """The row outputs of STATS and STATE; ignored rows have no label to speak of."""
    cdef row_state s = tile.state
    cdef scalar label_logit
    cdef Py_ssize_t nan, rank
    cdef scalar log_z[LANES]
    cdef int i
    r_store_scalars(log_z, s.log_z)
    if job.what == STATE:
        put_rows(job, tile, VALUE, s.max, False)
        put_rows(job, tile, SPREAD, s.rest / s.top, False)
        put_rows(job, tile, LINEAR, r_load_scalars(tile.sums[1]), False)
    else:
        put_lse(job, tile)
        put_rows(job, tile, SPREAD, s.log_z + r_load_scalars(tile.sums[1]) * s.inverse, False)
    for i in range(tile.n):
        label_logit = tile.label_logit[i] if tile.label[i] >= 0 else NAN
        (<scalar *>(tile.at[LABEL_LOGIT] + i * job.at[LABEL_LOGIT].rows))[0] = label_logit
        if job.what == STATE:
            continue
        nan = -1
        if log_z[i] != log_z[i]:
            nan = first_nan(job, tile, i)
        rank = -1
        if tile.label[i] >= 0 and nan < 0:
            rank = <Py_ssize_t>tile.sums[2][i] + (tile.max[i] > label_logit)
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


cdef double unit(const Job *job, Py_ssize_t index, real *stage) noexcept nogil:
    """Work off a portion of rows; the sum of their losses."""
    cdef Py_ssize_t row = index * job.unit_rows, first = row, end = min(row + job.unit_rows, job.n_rows), left
    cdef double values[UNIT_ROWS]
    cdef scalar lanes[LANES]
    cdef Tile tile
    cdef int n, i
    while row < end:
        left = min(end - row, job.run - row % job.run)
        n = <int>min(left, <Py_ssize_t>job.tile_rows)
        open_tile(job, &tile, row, n)
        if job.what == NLL:
            nll_tile(job, &tile)
        elif job.wide:
            wide_tile(job, &tile, stage)
        else:
            many_tile(job, &tile, stage)
        if job.what == STATS or job.what == STATE:
            put_stats(job, &tile)
        elif job.what == LOGSUMEXP:
            put_lse(job, &tile)
        elif job.what == LOSS or job.what == NLL:
            put_rows(job, &tile, VALUE, tile.result.value, True)
            r_store_scalars(lanes, tile.result.value)
            for i in range(n):
                values[row - first + i] = 0 if tile.status[i] == IGNORED else lanes[i]
        row += n
    if job.streams:
        stream_end()
    return sum_of_doubles(values, end - first) if job.what == LOSS or job.what == NLL else 0
