"""The teacher of a divergence: its own softmax, at all classes or at those that INDICES names."""

cdef inline void look_at_teacher(const Job *job, const Tile *tile, View *v, int i) noexcept nogil:
    """A view of the teacher's logits as those of a job."""
    look(job, tile, v, i)
    v.at[X], v.step[X], v.lane[X] = v.at[Q], v.step[Q], v.lane[Q]


cdef void read_teacher_wide(const Job *job, Tile *tile) noexcept nogil:
    cdef View v
    cdef real sums[TERMS]
    cdef int i
    r_store_scalars(tile.teacher_max, r_set(0))
    r_store_scalars(tile.teacher_rest, r_set(0))
    for i in range(tile.n):
        look_at_teacher(job, tile, &v, i)
        find_top(job.teacher, &v, &tile.teacher_max[i], &v.top)
        v.max = r_set(tile.teacher_max[i])
        v.ref = r_exp_reference(v.max)
        sum_rows(job.teacher, &v, SUM_EXP, FORGET, sums)
        tile.teacher_rest[i] = first_lane(sums[0])
    close_teacher(tile)


cdef const real *read_teacher_many(const Job *job, Tile *tile, real *stage) noexcept nogil:
    """The same for a row in each lane; the logits that are kept, or NULL."""
    cdef View v
    cdef real sums[TERMS]
    cdef real *kept = stage + job.n_classes if job.n_classes <= STAGE and not job.sparse_teacher else NULL
    look_at_teacher(job, tile, &v, 0)
    top_many(job.teacher, &v, tile.n, kept, &v.max, &v.tops)
    v.kept_logits = kept
    v.ref = r_exp_reference(v.max)
    sum_rows(job.teacher, &v, SUM_EXP, FORGET, sums)
    r_store_scalars(tile.teacher_max, v.max)
    r_store_scalars(tile.teacher_rest, sums[0])
    close_teacher(tile)
    return kept


cdef inline void close_teacher(Tile *tile) noexcept nogil:
    cdef scalar log_z[LANES]
    cdef int i
    tile.teacher = row_close(r_load_scalars(tile.teacher_max), r_load_scalars(tile.teacher_rest))
    r_store_scalars(log_z, tile.teacher.log_z)
    for i in range(tile.n):
        if log_z[i] != log_z[i]:
            tile.index[i] = NAN        # makes the row NaN


cdef inline void teacher_at_top(const Job *job, const Tile *tile, row_target *t) noexcept nogil:
    """The teacher's log-probability and probability of the student's top class."""
    cdef scalar logit[LANES]
    cdef Py_ssize_t place
    cdef log_prob at
    cdef real y
    cdef int i
    r_store_scalars(logit, r_set(-INF))
    for i in range(tile.n):
        place = tile.top_place[i] if job.sparse_teacher else tile.top[i]
        if place >= 0:
            logit[i] = s_load(<const storage *>entry_of(job, tile, Q, i, place))
    y = r_load_scalars(logit)
    if job.transforms:
        y = transform_logit(job.transform, y)
    row_teacher(tile.state, tile.teacher, tile.state.max, y, &at)
    t.v_top, t.t_top, t.gap_top = at.v, at.t, at.d


# ---- a sparse teacher ------------------------------------------------------------------------------------------------

cdef inline scalar *picked_row(const Job *job, real *stage, int i) noexcept nogil:
    """Where the logits of row i at the teacher's classes are kept (wide)."""
    return <scalar *>(stage + stage_vectors(job) + i * ((job.teacher.n_classes + LANES - 1) // LANES))


cdef void pick(const Job *job, Tile *tile, int i, scalar *picked, Py_ssize_t step) noexcept nogil:
    """Keep the logits of row i at the teacher's classes: the gradient may be written over them."""
    cdef Py_ssize_t n = job.teacher.n_classes, whole = n if step > 1 else (n + LANES - 1) // LANES * LANES, j
    cdef Label label
    tile.top_place[i] = -1
    for j in range(n):
        label = index_at(job, tile, i, j)
        if label.value == tile.top[i]:
            tile.top_place[i] = j
        if label.value >= 0:
            picked[j * step] = logit_of(job, tile, i, label.value)
        else:                          # a class out of range that nobody checked
            picked[j * step] = -INF
            tile.index[i] = NAN
    for j in range(n, whole):
        picked[j * step] = -INF


cdef inline Label index_at(const Job *job, const Tile *tile, int i, Py_ssize_t j) noexcept nogil:
    # no class is ignored; a number that cannot be one stands for none
    return label_at(entry_of(job, tile, INDICES, i, j), job.index_kind, job.n_classes, -1)


cdef void sum_sparse(const Job *job, const View *v, real *sums) noexcept nogil:
    """Over the teacher's classes, whose number its job has; all else is the student's."""
    if job.wide:
        reduce(job.teacher, v, True, FULL, SUM_SPARSE, FORGET, sums)
    else:
        reduce(job.teacher, v, False, FULL, SUM_SPARSE, FORGET, sums)


cdef void write_sparse(const Job *job, const Tile *tile, const View *v, int row) noexcept nogil:
    """The outputs at the teacher's classes of row `row` (wide) or of all rows (many)."""
    cdef Py_ssize_t n_places = job.teacher.n_classes, c = 0
    cdef scalar grad[LANES]
    cdef scalar hess[LANES]
    cdef log_prob at
    cdef jet phi
    cdef real g, h
    cdef Label label
    cdef int n, i, step = LANES if job.wide else 1
    while c < n_places:
        n = <int>min(<Py_ssize_t>LANES, n_places - c) if job.wide else tile.n
        phi = sparse_entries(job, v, c, n, job.wide, &at)
        g = v.factor * (phi.d1 - at.p * v.b)
        h = v.factor * (phi.d2 * (at.not_p - at.p) + at.p * r_fma(at.p, v.b + v.d, r_set(0) - v.b))
        if job.transforms:
            transform_derivatives(job.transform, r_set(0), &g, &h)
        r_store_scalars(grad, g)
        r_store_scalars(hess, h)
        for i in range(n):
            label = index_at(job, tile, row if job.wide else i, c + i if job.wide else c)
            if label.value >= 0:
                set_entry(job, tile, row if job.wide else i, label.value, grad[i], hess[i])
        c += step
