"""The teacher of a divergence: its own softmax, at all classes or at those that INDICES names."""

cdef inline void view_teacher(const Job *job, const Tile *tile, View *v, int i) noexcept nogil:
    """A view of the teacher's logits as those of a job."""
    look(job, tile, v, i)
    v.at[X], v.step[X], v.lane[X], v.kind[X] = v.at[Q], v.step[Q], v.lane[Q], v.kind[Q]


cdef void find_teachers_top(const Job *job, Tile *tile, real *stage) noexcept nogil:
    """The greatest logit of each row, and its place; many: keep the logits if there is room."""
    cdef View v
    cdef scalar tops[LANES]
    cdef int i
    if job.wide:
        r_store_scalars(tile.teacher_max, r_set(0))
        for i in range(tile.n):
            if tile.status[i] == IGNORED:
                continue
            view_teacher(job, tile, &v, i)
            find_top(job.teacher, &v, &tile.teacher_max[i], &tile.teacher_top[i])
        return
    view_teacher(job, tile, &v, 0)
    top_many(job.teacher, &v, tile.n, kept_teacher(job, stage), &v.max, &v.tops)
    r_store_scalars(tile.teacher_max, v.max)
    r_store_scalars(tops, v.tops)
    for i in range(LANES):
        tile.teacher_top[i] = <Py_ssize_t>tops[i]


cdef inline real *kept_teacher(const Job *job, real *stage) noexcept nogil:
    """Where the logits of a dense teacher are kept (many), or NULL."""
    return stage + job.n_classes if not job.sparse_teacher and job.n_classes <= STAGE else NULL


cdef void sum_pair(const Job *job, const View *v, int kind, real *sums) noexcept nogil:
    """Sums over the teacher's classes."""
    if not job.sparse_teacher:
        sum_rows(job, v, kind, PAIRED if job.keeps_pairs else FORGET, sums)
    elif job.wide:                     # the teacher's job has the number of its classes
        reduce(job.teacher, v, True, FULL, kind, FORGET, sums)
    else:
        reduce(job.teacher, v, False, FULL, kind, FORGET, sums)


cdef inline Py_ssize_t pair_vectors(const Job *job) noexcept nogil:
    return (job.n_classes + LANES - 1) // LANES if job.wide else job.n_classes


cdef inline void view_kept(const Job *job, View *v, real *stage, int i) noexcept nogil:
    if job.keeps_pairs:
        v.kept_step = pair_vectors(job)
        v.kept_pair = stage + (i * PARTS * v.kept_step if job.wide else 0)


cdef inline void view_pair(const Job *job, const Tile *tile, View *v, real *stage, int i) noexcept nogil:
    """What sums over the teacher's classes need, for row i (wide) or for all rows (many)."""
    cdef real one_max = r_set(tile.max[i]) if job.wide else r_load_scalars(tile.max)
    cdef real one_teacher_max = r_set(tile.teacher_max[i]) if job.wide else r_load_scalars(tile.teacher_max)
    v.ref = r_exp_reference(r_set(0))
    v.by.origin = transform_origin(job.transform, one_max)
    v.by.teacher_origin = transform_origin(job.transform, one_teacher_max)
    view_kept(job, v, stage, i)
    if job.sparse_teacher:
        v.picked = <const real *>picked_row(job, stage, i)
        v.kept_teacher = v.picked + picked_size(job)
    elif not job.wide:
        v.kept_teacher = kept_teacher(job, stage)


cdef void match_teacher(const Job *job, Tile *tile, View *many, real *stage) noexcept nogil:
    """Sum up the teachers of the rows, and match each with its student; `many`: the view of all rows there, or NULL.

    Students of dense teachers are summed up in the same reading.
    """
    cdef View one
    cdef Distances by
    cdef View *v = many
    cdef real sums[TERMS]
    cdef scalar excess[LANES]
    cdef row_state teacher
    cdef int i, k
    if not job.sparse_teacher:
        find_teachers_top(job, tile, stage)
    for k in range(TERMS):
        r_store_scalars(tile.teacher_sums[k], r_set(0))
    for i in range(tile.n if job.wide else 1):
        if job.wide:
            if tile.status[i] == IGNORED:
                continue
            v = &one
            look(job, tile, v, i)
            v.by = &by
            v.top, v.teacher_top = tile.top[i], tile.teacher_top[i]
        else:
            v.teacher_tops = places_in_lanes(tile.teacher_top, tile.n)
        view_pair(job, tile, v, stage, i)
        sum_pair(job, v, SUM_TEACHER, sums)
        for k in range(2):
            if job.wide:
                tile.teacher_sums[k][i] = first_lane(sums[k])
            else:
                r_store_scalars(tile.teacher_sums[k], sums[k])
        if job.sparse_teacher:
            continue
        if job.wide:
            tile.sums[0][i] = first_lane(sums[2])
        else:
            r_store_scalars(tile.sums[0], sums[2])
    if not job.sparse_teacher:
        close_rows(job, tile)
    teacher = row_close_transformed(
        job.transform, r_load_scalars(tile.teacher_max), r_load_scalars(tile.teacher_sums[0])
    )
    for i in range(LANES):
        excess[i] = tile.teacher_sums[1][i]
        if job.sparse_teacher and i < tile.n:
            excess[i] += tile.sums[1][i] + (tile.top_place[i] < 0)
    tile.match = match_rows(tile.state, teacher, r_load_scalars(excess), teacher_at_top(job, tile))


cdef inline real places_in_lanes(const Py_ssize_t *places, int n) noexcept nogil:
    cdef scalar lanes[LANES]
    cdef int i
    for i in range(LANES):
        lanes[i] = <scalar>places[i] if i < n else -1
    return r_load_scalars(lanes)


cdef inline real_pair teacher_at_top(const Job *job, const Tile *tile) noexcept nogil:
    """The teacher's distances at the student's top classes."""
    cdef scalar logit[LANES]
    cdef logit_origin origin = transform_origin(job.transform, r_load_scalars(tile.teacher_max))
    cdef Py_ssize_t place
    cdef int i
    r_store_scalars(logit, r_set(-INF))
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            continue
        place = tile.top_place[i] if job.sparse_teacher else tile.top[i]
        if place >= 0 and not is_removed(job, tile, i, tile.top[i]):
            logit[i] = read_scalar(entry_of(job, tile, Q, i, place), job.kind[Q])
    return distances(job, &origin, r_load_scalars(logit))


cdef void finish_divergence(const Job *job, Tile *tile) noexcept nogil:
    """Step 2."""
    cdef row_sums sums = second_sums(tile)
    cdef real weight = r_load_scalars(tile.sample)
    cdef scalar raw[LANES]
    cdef int i
    sums.extra = r_load_scalars(tile.sums[1]) * tile.state.inverse if job.sparse_teacher else r_set(0)
    tile.result = match_finish(
        tile.state, tile.match, sums, teacher_at_top(job, tile), weight, weight * r_set(job.scale), job.phi
    )
    if job.transforms:
        for i in range(LANES):
            raw[i] = raw_logit_of(job, tile, i, tile.top[i]) if i < tile.n and tile.status[i] != IGNORED else 0
        transform_result(job.transform, &tile.result, r_load_scalars(raw), r_set(0))


# ---- a sparse teacher ------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t picked_size(const Job *job) noexcept nogil:
    """Vectors of logits at the teacher's classes: of one row (wide) or of all (many)."""
    return (job.teacher.n_classes + LANES - 1) // LANES if job.wide else job.teacher.n_classes


cdef inline scalar *picked_row(const Job *job, real *stage, int i) noexcept nogil:
    """Where the logits at the teacher's classes are kept, first the student's: of row i (wide) or of all (many)."""
    return <scalar *>(stage + stage_vectors(job) + (2 * i * picked_size(job) if job.wide else 0))


cdef inline uint16_t *classes_of_teacher(const Job *job, real *stage) noexcept nogil:
    """Where it is kept which classes a teacher has; wide: of one row at a time."""
    cdef Py_ssize_t rows = job.tile_rows if job.wide else 1
    return <uint16_t *>(stage + stage_vectors(job) + 2 * rows * picked_size(job))


cdef void forget_classes(const Job *job, uint16_t *has, Py_ssize_t n) noexcept nogil:
    """Clear the bits of n vectors."""
    cdef Py_ssize_t start = 0
    while start < n and not is_time_to_look(job.watch, start):
        memset(has + start, 0, min(n - start, <Py_ssize_t>LOOK_CLASSES) * sizeof(uint16_t))
        start += LOOK_CLASSES


cdef void pick(const Job *job, Tile *tile, int i, real *stage) noexcept nogil:
    """Keep student's and teacher's logits of row i at the teacher's classes: the gradient may be written over them."""
    cdef Py_ssize_t n = job.teacher.n_classes, whole = n, step = LANES, j
    cdef scalar *student = picked_row(job, stage, i)
    cdef scalar *teacher = student + picked_size(job) * LANES
    cdef uint16_t *has = classes_of_teacher(job, stage)
    cdef Label label
    if job.wide:
        whole, step = picked_size(job) * LANES, 1
        forget_classes(job, has, (job.n_classes + LANES - 1) // LANES)
    else:
        student += i
        teacher += i
    tile.top_place[i], tile.teacher_top[i], tile.teacher_max[i] = -1, 0, -INF
    for j in range(whole):
        if is_time_to_look(job.watch, j):
            return
        student[j * step] = teacher[j * step] = -INF
    for j in range(n):
        if is_time_to_look(job.watch, j):
            return
        label = index_at(job, tile, i, j)
        if label.value < 0:            # a class out of range that nobody checked
            tile.teacher_max[i] = NAN  # stays so, and makes the row NaN
            continue
        if label.value == tile.top[i]:
            tile.top_place[i] = j
        if job.wide:
            has[label.value // LANES] |= <uint16_t>(1 << (label.value % LANES))
        else:
            has[label.value] |= <uint16_t>(1 << i)
        student[j * step] = logit_of(job, tile, i, label.value)
        if not is_removed(job, tile, i, label.value):
            teacher[j * step] = read_scalar(entry_of(job, tile, Q, i, j), job.kind[Q])
        if teacher[j * step] > tile.teacher_max[i]:
            tile.teacher_max[i], tile.teacher_top[i] = teacher[j * step], j


cdef inline Label index_at(const Job *job, const Tile *tile, int i, Py_ssize_t j) noexcept nogil:
    # no class is ignored; a number that cannot be one stands for none
    return label_at(entry_of(job, tile, INDICES, i, j), job.kind[INDICES], job.n_classes, -1)


cdef void write_sparse(const Job *job, const Tile *tile, const View *v, int row) noexcept nogil:
    """The outputs at the teacher's classes of row `row` (wide) or of all rows (many)."""
    cdef Py_ssize_t n_places = job.teacher.n_classes, c = 0, k
    cdef scalar grad[LANES]
    cdef scalar hess[LANES]
    cdef prob_pair match
    cdef jet f
    cdef Label label
    cdef int n, i, step = LANES if job.wide else 1
    while c < n_places and not is_time_to_look(job.watch, c):
        n = <int>min(<Py_ssize_t>LANES, n_places - c) if job.wide else tile.n
        k = c // LANES if job.wide else c
        match = match_entry(v.by.match, pair_at(job, v, v.picked[k], v.kept_teacher[k]))
        f = match_derivatives(job.phi, divergence_term(job.phi, match, v.by.match), match.p, v.out)
        if job.transforms:
            transform_derivatives(job.transform, r_set(0), &f.d1, &f.d2)
        r_store_scalars(grad, f.d1)
        r_store_scalars(hess, f.d2)
        for i in range(n):
            label = index_at(job, tile, row if job.wide else i, c + i if job.wide else c)
            if label.value >= 0 and tile.status[row if job.wide else i] == ACTIVE:
                set_entry(job, tile, row if job.wide else i, label.value, grad[i], hess[i])
        c += step
