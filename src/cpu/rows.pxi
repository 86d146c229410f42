"""The readings of a row: its greatest entry, its sums, its outputs."""

cdef inline scalar sum_of_virtual_lanes(const real_sum *total, bint low) noexcept nogil:
    """Virtual lane i plus i + VIRTUAL / 2, again for the sums, and so on."""
    cdef real vectors[VECTORS]
    cdef int n = VECTORS // 2, i
    for i in range(VECTORS):
        vectors[i] = total[i].low if low else total[i].high
    while n > 0:
        for i in range(n):
            vectors[i] = vectors[i] + vectors[i + n]
        n //= 2
    return r_sum_of_lanes(vectors[0])


cdef inline bint is_time_to_look(xce_watch *watch, Py_ssize_t c) noexcept nogil:
    """Whether to stop before class c of a long row: an exception will be raised."""
    return c % LOOK_CLASSES == 0 and c != 0 and xce_look(watch)


cdef double count_of(const real_sum *total) noexcept nogil:
    """A number of entries, which float32 would round beyond 2^24."""
    cdef scalar lanes[LANES]
    cdef double count = 0
    cdef int k, i
    for k in range(VECTORS):
        r_store_scalars(lanes, total[k].high)
        for i in range(LANES):
            count += lanes[i]
        r_store_scalars(lanes, total[k].low)
        for i in range(LANES):
            count += lanes[i]
    return count


cdef inline void add_block(real_sum *total, real a, bint first) noexcept nogil:
    if first:
        total.high, total.low = a, r_set(0)
    else:
        total[0] = r_sum_add(total[0], a)


cdef inline real sum_of(real high, real low) noexcept nogil:
    # an infinite sum has NaN in its low part
    return r_select(r_eq(r_abs(high), r_set(INF)), high, high + low)


cdef inline void reduce(
    const Job *job, const View *view, bint wide, int level, int kind, int keep, real *sums
) noexcept nogil:
    """The sums of a row, in every lane (wide), or of each lane's row (many)."""
    cdef View here = view[0]           # in registers; no store to an array can change it
    cdef const View *v = &here
    cdef Py_ssize_t n_classes = job.n_classes, block, c
    cdef int n_terms = 1 if kind == SUM_EXP or kind == SUM_DIVERGENCE else TERMS - 1
    cdef int n_lanes = VECTORS if wide else VIRTUAL, lane_step = LANES if wide else 1
    cdef int lane, j, t, n, present
    cdef bint plain
    cdef real block_terms[TERMS][BLOCK]
    cdef real entry[TERMS]
    cdef real_sum total[TERMS][VIRTUAL]
    if SUM_PHI <= kind < SUM_TEACHER:
        n_terms = TERMS
    for t in range(n_terms):
        for lane in range(VECTORS if wide else 1):
            total[t][lane].high, total[t][lane].low = r_set(0), r_set(0)
    block = 0
    while block < n_classes:
        if is_time_to_look(job.watch, block):
            break
        # all there, and the top entry elsewhere
        plain = (
            level != FULL and wide and block + BLOCK * VIRTUAL <= n_classes
            and not block <= v.top < block + BLOCK * VIRTUAL
            and not (kind == SUM_TEACHER and block <= v.teacher_top < block + BLOCK * VIRTUAL)
        )
        for lane in range(n_lanes):
            c = block + lane * lane_step
            if c >= n_classes:
                break
            if plain:
                for j in range(BLOCK):
                    prefetch(v.at[X] + job.at[X].rows + (c + j * VIRTUAL) * <Py_ssize_t>sizeof(storage))
                    terms(job, v, c + j * VIRTUAL, LANES, wide, level, kind, keep, False, entry)
                    for t in range(n_terms):
                        block_terms[t][j] = entry[t]
            else:
                present = <int>min(<Py_ssize_t>BLOCK, (n_classes - c + VIRTUAL - 1) // VIRTUAL)
                for j in range(present):
                    n = <int>min(<Py_ssize_t>LANES, n_classes - c - j * VIRTUAL) if wide else v.n
                    if v.picked != NULL and kind >= SUM_TEACHER:
                        terms_sparse(job, v, c + j * VIRTUAL, wide, kind, entry)
                    elif level == FULL:
                        terms_full(job, v, c + j * VIRTUAL, n, wide, kind, keep, entry)
                    else:
                        terms(job, v, c + j * VIRTUAL, n, wide, level, kind, keep, True, entry)
                    for t in range(n_terms):
                        block_terms[t][j] = entry[t]
                if present == 1:
                    for t in range(n_terms):  # adding zeros would change nothing
                        add_block(&total[t][lane], entry[t], block == 0)
                    continue
                for t in range(n_terms):
                    for j in range(present, BLOCK):
                        block_terms[t][j] = r_set(0)
            for t in range(n_terms):
                add_block(&total[t][lane], r_add8(block_terms[t]), block == 0)
        block += BLOCK * VIRTUAL
    for t in range(n_terms):
        if wide:
            sums[t] = r_set(sum_of_virtual_lanes(total[t], False))
            if n_classes > BLOCK * VIRTUAL:  # else the low parts are 0
                sums[t] = sum_of(sums[t], r_set(sum_of_virtual_lanes(total[t], True)))
        else:
            n = VIRTUAL // 2
            while n > 0:
                for lane in range(<int>min(<Py_ssize_t>n, n_classes - n)):  # the others are 0
                    total[t][lane].high = total[t][lane].high + total[t][lane + n].high
                    if n_classes > BLOCK * VIRTUAL:
                        total[t][lane].low = total[t][lane].low + total[t][lane + n].low
                n //= 2
            sums[t] = sum_of(total[t][0].high, total[t][0].low)
    if wide and kind == SUM_STATS:
        sums[TERMS] = r_set(<scalar>(count_of(total[2]) - first_lane(sums[2])))


# GCC allots registers well in a function of one loop and badly in one of many: each loop that matters is a function.

cdef void sum_wide_sparse(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, SPARSE, SUM_EXP, FORGET, sums)

cdef void sum_wide_sparse_keeping(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, SPARSE, SUM_EXP, STAGED if STORAGE_IS_16_BIT else IN_GRAD, sums)

cdef void sum_wide_dense(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, DENSE, SUM_LINEAR, FORGET, sums)

cdef void sum_wide_dense_keeping(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, DENSE, SUM_LINEAR, STAGED if STORAGE_IS_16_BIT else IN_GRAD, sums)

cdef void sum_many_sparse(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, SPARSE, SUM_EXP, FORGET, sums)

cdef void sum_many_sparse_keeping(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, SPARSE, SUM_EXP, STAGED, sums)

cdef void sum_many_dense(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, DENSE, SUM_LINEAR, FORGET, sums)

cdef void sum_many_dense_keeping(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, DENSE, SUM_LINEAR, STAGED, sums)

cdef void sum_wide_mixed(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, kind, keep, sums)

cdef void sum_wide_phi1(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_PHI + 1, PAIRED, sums)

cdef void sum_wide_phi2(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_PHI + 2, PAIRED, sums)

cdef void sum_wide_phi3(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_PHI + 3, PAIRED, sums)

cdef void sum_wide_phi(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if keep == PAIRED and kind == SUM_PHI + 1:
        sum_wide_phi1(job, v, sums)
    elif keep == PAIRED and kind == SUM_PHI + 2:
        sum_wide_phi2(job, v, sums)
    elif keep == PAIRED and kind == SUM_PHI + 3:
        sum_wide_phi3(job, v, sums)
    else:
        sum_wide_mixed(job, v, kind, keep, sums)

cdef void sum_wide_teacher(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_TEACHER, FORGET, sums)

cdef void sum_wide_teacher_keeping(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_TEACHER, PAIRED, sums)

cdef void sum_wide_divergence(const Job *job, const View *v, int kind, real *sums) noexcept nogil:
    if kind == SUM_DIVERGENCE:
        reduce(job, v, True, MIXED, SUM_DIVERGENCE, FORGET, sums)
    elif kind == SUM_DIVERGENCE + 1:
        reduce(job, v, True, MIXED, SUM_DIVERGENCE + 1, FORGET, sums)
    else:
        reduce(job, v, True, MIXED, SUM_DIVERGENCE + 2, FORGET, sums)

cdef void sum_wide_forward(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_DIVERGENCE, PAIRED, sums)

cdef void sum_wide_reverse(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_DIVERGENCE + 1, PAIRED, sums)

cdef void sum_wide_js(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, True, MIXED, SUM_DIVERGENCE + 2, PAIRED, sums)

cdef void sum_wide_pairs(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if kind == SUM_TEACHER:
        if keep == PAIRED:
            sum_wide_teacher_keeping(job, v, sums)
        else:
            sum_wide_teacher(job, v, sums)
    elif keep != PAIRED:
        sum_wide_divergence(job, v, kind, sums)
    elif kind == SUM_DIVERGENCE:
        sum_wide_forward(job, v, sums)
    elif kind == SUM_DIVERGENCE + 1:
        sum_wide_reverse(job, v, sums)
    else:
        sum_wide_js(job, v, sums)

cdef void sum_many_mixed(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, kind, keep, sums)

cdef void sum_many_phi1(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_PHI + 1, PAIRED, sums)

cdef void sum_many_phi2(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_PHI + 2, PAIRED, sums)

cdef void sum_many_phi3(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_PHI + 3, PAIRED, sums)

cdef void sum_many_phi(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if keep == PAIRED and kind == SUM_PHI + 1:
        sum_many_phi1(job, v, sums)
    elif keep == PAIRED and kind == SUM_PHI + 2:
        sum_many_phi2(job, v, sums)
    elif keep == PAIRED and kind == SUM_PHI + 3:
        sum_many_phi3(job, v, sums)
    else:
        sum_many_mixed(job, v, kind, keep, sums)

cdef void sum_many_teacher(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_TEACHER, PAIRED, sums)

cdef void sum_many_forward(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_DIVERGENCE, PAIRED, sums)

cdef void sum_many_reverse(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_DIVERGENCE + 1, PAIRED, sums)

cdef void sum_many_js(const Job *job, const View *v, real *sums) noexcept nogil:
    reduce(job, v, False, MIXED, SUM_DIVERGENCE + 2, PAIRED, sums)

cdef void sum_many_pairs(const Job *job, const View *v, int kind, real *sums) noexcept nogil:
    if kind == SUM_TEACHER:
        sum_many_teacher(job, v, sums)
    elif kind == SUM_DIVERGENCE:
        sum_many_forward(job, v, sums)
    elif kind == SUM_DIVERGENCE + 1:
        sum_many_reverse(job, v, sums)
    else:
        sum_many_js(job, v, sums)

cdef void sum_full(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if job.wide:
        reduce(job, v, True, FULL, kind, keep, sums)
    else:
        reduce(job, v, False, FULL, kind, keep, sums)


cdef void sum_rows(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if job.level == FULL:
        sum_full(job, v, kind, keep, sums)
    elif job.level == MIXED and SUM_PHI <= kind < SUM_TEACHER:
        if job.wide:
            sum_wide_phi(job, v, kind, keep, sums)
        else:
            sum_many_phi(job, v, kind, keep, sums)
    elif job.level == MIXED and kind >= SUM_TEACHER:
        if job.wide:
            sum_wide_pairs(job, v, kind, keep, sums)
        else:
            sum_many_pairs(job, v, kind, sums)
    elif job.level == MIXED:
        if job.wide:
            sum_wide_mixed(job, v, kind, keep, sums)
        else:
            sum_many_mixed(job, v, kind, keep, sums)
    elif job.wide and job.level == SPARSE:
        if keep == FORGET:
            sum_wide_sparse(job, v, sums)
        else:
            sum_wide_sparse_keeping(job, v, sums)
    elif job.wide:
        if keep == FORGET:
            sum_wide_dense(job, v, sums)
        else:
            sum_wide_dense_keeping(job, v, sums)
    elif job.level == SPARSE:
        if keep == FORGET:
            sum_many_sparse(job, v, sums)
        else:
            sum_many_sparse_keeping(job, v, sums)
    elif keep == FORGET:
        sum_many_dense(job, v, sums)
    else:
        sum_many_dense_keeping(job, v, sums)


cdef inline void find_top_wide(
    const Job *job, const View *view, int level, scalar *maximum, Py_ssize_t *top
) noexcept nogil:
    """The maximum of a row and its first place; NaN is passed over."""
    cdef View here = view[0]
    cdef const View *v = &here
    cdef Py_ssize_t n_classes = job.n_classes, block, c, first
    cdef int k, j, n
    cdef real best[VECTORS]
    cdef real best_block[VECTORS]
    cdef real greatest, m
    cdef rmask newer
    cdef scalar blocks[LANES]
    cdef unsigned lanes
    for k in range(VECTORS):
        best[k] = r_set(-INF)
        best_block[k] = r_set(0)
    block = 0
    while block < n_classes:
        if is_time_to_look(job.watch, block):
            break
        for k in range(VECTORS):
            greatest = r_set(-INF)
            if block + BLOCK * VIRTUAL <= n_classes:
                for j in range(BLOCK):
                    greatest = r_max(logits(job, v, block + j * VIRTUAL + k * LANES, LANES, True, level), greatest)
            else:
                for j in range(BLOCK):
                    c = block + j * VIRTUAL + k * LANES
                    if c < n_classes:
                        n = LANES if c + LANES <= n_classes else <int>(n_classes - c)
                        greatest = r_max(logits(job, v, c, n, True, level), greatest)
            newer = r_gt(greatest, best[k])
            best[k] = r_max(greatest, best[k])
            best_block[k] = r_select(newer, r_set(<scalar>(block // (BLOCK * VIRTUAL))), best_block[k])
        block += BLOCK * VIRTUAL
    greatest = best[0]
    for k in range(1, VECTORS):
        greatest = r_max(best[k], greatest)
    maximum[0] = r_max_of_lanes(greatest)
    top[0] = 0
    if maximum[0] == -INF:
        return
    # the first block among those of the lanes that reached the maximum; then the first place in it
    m = r_set(maximum[0])
    first = n_classes
    for k in range(VECTORS):
        lanes = r_lanes_of(r_eq(best[k], m))
        r_store_scalars(blocks, best_block[k])
        while lanes:
            first = min(first, <Py_ssize_t>blocks[lowest_bit(lanes)])
            lanes &= lanes - 1
    first -= first >> 20               # beyond 2^24 blocks, float32 has rounded the number
    c = first * BLOCK * VIRTUAL
    while c < n_classes:
        n = LANES if c + LANES <= n_classes else <int>(n_classes - c)
        lanes = r_lanes_of(r_eq(logits(job, v, c, n, True, level), m))
        if lanes:
            top[0] = c + lowest_bit(lanes)
            return
        c += LANES


cdef void top_wide(const Job *job, const View *v, scalar *maximum, Py_ssize_t *top) noexcept nogil:
    find_top_wide(job, v, SPARSE, maximum, top)

cdef void top_wide_full(const Job *job, const View *v, scalar *maximum, Py_ssize_t *top) noexcept nogil:
    find_top_wide(job, v, FULL, maximum, top)


cdef void find_top(const Job *job, const View *v, scalar *maximum, Py_ssize_t *top) noexcept nogil:
    if job.level == FULL:
        top_wide_full(job, v, maximum, top)
    else:
        top_wide(job, v, maximum, top)


cdef inline bint lies_in_rows(const Job *job, const View *v, int operand, int n) noexcept nogil:
    """Whether a full tile of an operand lies in rows of adjacent classes, to be turned block by block."""
    return (
        v.at[operand] != NULL and n == LANES and job.n_classes >= CORNER
        and v.step[operand] == sizeof(storage) and v.lane[operand] != sizeof(storage) and v.kind[operand] == 0
    )


cdef void top_many(const Job *job, View *v, int n, real *stage, real *maximum, real *top) noexcept nogil:
    """The same for a row in each lane; keeps the logits in `stage` if there is one."""
    cdef Py_ssize_t c, start, end = 0
    cdef real x, best = r_set(-INF), place = r_set(0), index = r_set(0)
    cdef bint turned = stage != NULL and lies_in_rows(job, v, X, n)
    if turned:
        turn_in(v.at[X], v.lane[X], job.n_classes, stage)
        v.kept_logits = stage
    while end < job.n_classes and not is_time_to_look(job.watch, end):
        start, end = end, min(end + LOOK_CLASSES, job.n_classes)
        for c in range(start, end):
            x = stage[c] if turned else read(v, X, c, n, 0, False, FULL)
            if job.level == FULL and v.at[WHERE] != NULL:
                x = r_select(remaining(v, c, n), x, r_set(-INF))
            if stage != NULL and (job.level == FULL or not turned):
                stage[c] = x
            place = r_select(r_gt(x, best), index, place)
            best = r_max(x, best)
            index = index + r_set(1)
    maximum[0], top[0] = best, place


cdef inline void write_all(const Job *job, const View *view, int n, bint wide, int level, int keep) noexcept nogil:
    """The outputs of a row (wide), or of n rows (many)."""
    cdef View here = view[0]
    cdef const View *v = &here
    cdef Py_ssize_t c = 0, end
    while c < job.n_classes and not is_time_to_look(job.watch, c):
        end = min(c + LOOK_CLASSES, job.n_classes)
        if wide:
            while c + LANES <= end:
                write(job, v, c, LANES, True, level, keep)
                c += LANES
            if c < end:
                write(job, v, c, <int>(end - c), True, level, keep)
                c = end
        else:
            while c < end:
                write(job, v, c, n, False, level, keep)
                c += 1


cdef void write_wide_sparse(const Job *job, const View *v) noexcept nogil:
    write_all(job, v, 1, True, SPARSE, STAGED if STORAGE_IS_16_BIT else IN_GRAD)

cdef void write_wide_dense(const Job *job, const View *v) noexcept nogil:
    write_all(job, v, 1, True, DENSE, STAGED if STORAGE_IS_16_BIT else IN_GRAD)

cdef void write_many(const Job *job, const View *v, int n, int keep) noexcept nogil:
    write_all(job, v, n, False, DENSE if job.dense else SPARSE, keep)

cdef void write_mixed(const Job *job, const View *v, int n, int keep) noexcept nogil:
    if job.wide:
        write_all(job, v, n, True, MIXED, keep)
    else:
        write_all(job, v, n, False, MIXED, keep)

cdef void write_wide_pairs(const Job *job, const View *v) noexcept nogil:
    write_all(job, v, 1, True, MIXED, PAIRED)

cdef void write_many_pairs(const Job *job, const View *v, int n) noexcept nogil:
    write_all(job, v, n, False, MIXED, PAIRED)

cdef void write_full(const Job *job, const View *v, int n, int keep) noexcept nogil:
    write_all(job, v, n, job.wide, FULL, keep)


cdef void write_rows(const Job *job, const View *v, int n, int keep) noexcept nogil:
    if job.z_loss != 0 and r_lanes_of(r_not(r_eq(v.out.far, r_set(0)))):
        write_full(job, v, n, keep)
    elif job.level == MIXED and keep == PAIRED:
        if job.wide:
            write_wide_pairs(job, v)
        else:
            write_many_pairs(job, v, n)
    elif job.level == MIXED:
        write_mixed(job, v, n, keep)
    elif job.wide and keep != FORGET and job.level == SPARSE:
        write_wide_sparse(job, v)
    elif job.wide and keep != FORGET and job.level == DENSE:
        write_wide_dense(job, v)
    elif job.wide or job.level == FULL:
        write_full(job, v, n, keep)
    else:
        write_many(job, v, n, keep)


cdef inline const char *entry_of(const Job *job, const Tile *tile, int operand, int i, Py_ssize_t c) noexcept nogil:
    return tile.at[operand] + i * job.at[operand].rows + c * job.at[operand].classes


cdef inline bint is_removed(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    return job.at[WHERE].data != NULL and entry_of(job, tile, WHERE, i, c)[0] == 0


cdef inline scalar dense_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    """The dense coefficient of one entry, as `coefficients` has it."""
    cdef scalar q = 0 if job.at[Q].data == NULL else read_scalar(entry_of(job, tile, Q, i, c), job.kind[Q])
    cdef scalar weight = 1 if job.weight == NULL else job.weight[c]
    cdef real share = r_set(0 if is_removed(job, tile, i, c) else tile.share[i])
    return first_lane(dense_coefficient(share, job.label_share, r_set(q)) * r_set(weight))


cdef inline scalar first_lane(real a) noexcept nogil:
    cdef scalar lanes[LANES]
    r_store_scalars(lanes, a)
    return lanes[0]


cdef inline scalar logit_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    """One logit, as `logits` has it."""
    return -INF if is_removed(job, tile, i, c) else raw_logit_of(job, tile, i, c)


cdef inline scalar raw_logit_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    return read_scalar(entry_of(job, tile, X, i, c), job.kind[X])


cdef struct Label:
    int status
    Py_ssize_t value                   # -1: none


cdef inline Label label_at(const char *p, int kind, Py_ssize_t n_classes, long long ignore_index) noexcept nogil:
    """Read a label once, then check and use only that copy: another thread may write to the array meanwhile."""
    cdef Label label
    cdef int64_t value
    label.value = -1
    if not read_label(p, kind, &value):  # neither a class nor ignore_index
        label.status = INVALID
        return label
    if value == ignore_index:
        label.status = IGNORED
    elif 0 <= value < n_classes:
        label.status, label.value = ACTIVE, value
    else:
        label.status = INVALID
    return label


cdef inline void open_tile(const Job *job, Tile *tile, Py_ssize_t row, int n) noexcept nogil:
    """Where the rows lie, which of them count, and what their labels say."""
    cdef Py_ssize_t outer = row // job.run, inner = row - outer * job.run, index
    cdef Label label
    cdef int i, k, axis
    tile.n = n
    for i in range(OPERANDS):
        tile.at[i] = NULL
    for i in range(job.n_used):
        k = job.used[i]
        tile.at[k] = job.at[k].data + inner * job.at[k].rows
    for axis in range(job.outer_axes - 1, -1, -1):
        index = outer % job.outer_shape[axis]
        outer //= job.outer_shape[axis]
        for i in range(job.n_used):
            k = job.used[i]
            tile.at[k] += index * job.at[k].outer[axis]
    for i in range(LANES):
        tile.status[i] = ACTIVE
    for i in range(LANES):
        tile.label[i] = -1
    r_store_scalars(tile.share, r_set(job.share))
    r_store_scalars(tile.sample, r_set(1))
    r_store_scalars(tile.index, r_set(0))
    r_store_scalars(tile.label_logit, r_set(0))
    if job.teacher != NULL:
        r_store_scalars(tile.teacher_max, r_set(0))
        for i in range(LANES):
            tile.top[i], tile.teacher_top[i], tile.top_place[i] = 0, 0, -1
    if job.wide:                       # ignored rows leave gaps there
        r_store_scalars(tile.max, r_set(0))
        for k in range(TERMS):
            r_store_scalars(tile.sums[k], r_set(0))
    # whatever a row holds, a weight of 0 removes it, and so does `where` if it leaves no class
    if tile.at[SAMPLE] != NULL:
        for i in range(n):
            tile.sample[i] = read_scalar(tile.at[SAMPLE] + i * job.at[SAMPLE].rows, job.kind[SAMPLE])
            if tile.sample[i] == 0:
                tile.status[i] = IGNORED
    if job.at[WHERE].data != NULL and job.what == LOSS:
        for i in range(n):
            index = classes_left(
                job.watch, tile.at[WHERE] + i * job.at[WHERE].rows, job.n_classes, job.at[WHERE].classes,
                job.options.label_smoothing != 0,
            )
            if index == 0:
                tile.status[i] = IGNORED
            elif job.options.label_smoothing != 0:
                tile.share[i] = share_of_left(job.options.label_smoothing, <scalar>index)
    if tile.at[LABEL] != NULL:
        for i in range(n):
            if tile.status[i] == IGNORED:
                continue
            label = label_at(
                tile.at[LABEL] + i * job.at[LABEL].rows, job.kind[LABEL], job.n_classes, job.ignore_index
            )
            tile.label[i] = label.value
            # the statistics of a row want no label
            tile.status[i] = label.status if job.what == LOSS or job.what == NLL else ACTIVE
            tile.index[i] = label_coefficient(label.status, label.value, job.label_share, job.weight)


cdef inline Py_ssize_t classes_left(
    xce_watch *watch, const char *where, Py_ssize_t n_classes, Py_ssize_t stride, bint counts
) noexcept nogil:
    """How many classes `where` leaves to a row or, unless that `counts`, whether it leaves any."""
    cdef Py_ssize_t count = 0, c = 0, end
    while c < n_classes and not is_time_to_look(watch, c):
        end = min(c + LOOK_CLASSES, n_classes)
        if counts:
            while c < end:
                count += where[c * stride] != 0
                c += 1
        else:
            while c < end:
                if where[c * stride] != 0:
                    return 1
                c += 1
    return count


cdef inline void look(const Job *job, const Tile *tile, View *v, int i) noexcept nogil:
    """A view of row i (wide) or of the whole tile (many)."""
    cdef bint wide = job.wide
    cdef int k
    for k in range(ENTRY_OPERANDS):
        v.at[k] = tile.at[k]
        v.step[k] = job.at[k].classes
        v.kind[k] = job.kind[k]
        v.lane[k] = job.at[k].classes if wide else job.at[k].rows
        if wide and v.at[k] != NULL:
            v.at[k] += i * job.at[k].rows
    v.kept_logits, v.kept_exp, v.turned_grad, v.kept_teacher = NULL, NULL, NULL, NULL
    v.picked, v.teacher_has, v.kept_pair = NULL, NULL, NULL
    v.tops, v.n = r_set(-1), tile.n


cdef inline rmask label_is_top(const Tile *tile) noexcept nogil:
    """Where no label is elsewhere."""
    cdef scalar elsewhere[LANES]
    cdef int i
    for i in range(LANES):
        elsewhere[i] = tile.label[i] != tile.top[i] and tile.label[i] >= 0
    return r_eq(r_load_scalars(elsewhere), r_set(0))


cdef void set_slopes(const Job *job, Tile *tile) noexcept nogil:
    """What the slopes of the entries are measured from."""
    cdef scalar d_top[LANES]
    cdef real a_top
    cdef int i
    for i in range(LANES):
        d_top[i] = dense_of(job, tile, i, tile.top[i]) if i < tile.n and tile.status[i] != IGNORED else 0
    a_top = top_coefficient(r_load_scalars(d_top), r_load_scalars(tile.index), label_is_top(tile))
    tile.slope = slope_of_top(tile.state, a_top, job.phi, job.parameter)


cdef inline row_sums second_sums(const Tile *tile) noexcept nogil:
    cdef row_sums sums
    sums.value, sums.d1 = r_load_scalars(tile.phi_sums[0]), r_load_scalars(tile.phi_sums[1])
    sums.d2, sums.extra = r_load_scalars(tile.phi_sums[2]), r_load_scalars(tile.phi_sums[3])
    return sums


cdef void finish_slopes(const Job *job, const Tile *tile, const row_target *t, row_result *r) noexcept nogil:
    relative_finish(r, tile.state, t[0], tile.slope, job.phi, job.parameter)


cdef inline void finish(const Job *job, Tile *tile) noexcept nogil:
    """Step 2: the values of the rows, and what step 3 needs, a row in each lane."""
    cdef row_target t
    cdef row_result r
    cdef scalar d_top[LANES]
    cdef scalar d_label[LANES]
    cdef scalar raw_label[LANES]
    cdef scalar raw_top[LANES]
    cdef logit_origin origin
    cdef real zero = r_set(0), distances_sum = zero, weights = zero
    cdef int i
    t.d_top, t.d_label = zero, zero
    if job.dense or job.transforms:
        for i in range(LANES):
            d_top[i], d_label[i], raw_label[i], raw_top[i] = 0, 0, 0, 0
        for i in range(tile.n):
            if tile.status[i] == IGNORED:
                continue
            if job.dense:
                d_top[i] = dense_of(job, tile, i, tile.top[i])
            raw_top[i] = raw_logit_of(job, tile, i, tile.top[i])
            if tile.label[i] >= 0:
                if job.dense:
                    d_label[i] = dense_of(job, tile, i, tile.label[i])
                raw_label[i] = raw_logit_of(job, tile, i, tile.label[i])
        t.d_top, t.d_label = r_load_scalars(d_top), r_load_scalars(d_label)
    t.index = r_load_scalars(tile.index)
    t.label_entry.high, t.label_entry.low = r_load_scalars(tile.label_logit), zero
    if job.by_distance:
        origin = transform_origin(job.transform, r_load_scalars(tile.max))
        t.label_entry = distances(job, &origin, t.label_entry.high)
    t.label_is_top = label_is_top(tile)
    t.weight = r_load_scalars(tile.sample)
    t.factor = t.weight * r_set(job.scale)
    t.z_loss = job.z_loss
    if job.dense:
        distances_sum, weights = r_load_scalars(tile.sums[1]), r_load_scalars(tile.sums[2])
    t.sum = second_sums(tile) if job.relative else linear_sums(tile.state, distances_sum, weights)
    r = row_finish(tile.state, t, job.phi, job.parameter)
    if job.relative:
        finish_slopes(job, tile, &t, &r)
    if job.transforms:
        transform_result(job.transform, &r, r_load_scalars(raw_top), r_load_scalars(raw_label))
    tile.result = r
