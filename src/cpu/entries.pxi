"""Entries in the lanes: how they are read, what they add to the sums of their rows, what is written for them."""

cdef inline real fetch(const char *p, Py_ssize_t lane, int n, scalar fill, bint adjacent) noexcept nogil:
    if adjacent or lane == sizeof(storage):
        return r_load(<const storage *>p) if n == LANES else r_load_part(<const storage *>p, n, fill)
    return r_gather(p, lane, n, fill)


cdef inline void put(char *p, Py_ssize_t lane, real a, int n, bint adjacent) noexcept nogil:
    if not (adjacent or lane == sizeof(storage)):
        r_scatter(p, lane, a, n)
    elif n == LANES:
        r_store(<storage *>p, a)
    else:
        r_store_part(<storage *>p, a, n)


cdef inline Py_ssize_t place_of(const View *v, int operand, Py_ssize_t c, bint wide, int level) noexcept nogil:
    """Bytes from class 0 to class c; the stride is a constant where classes lie side by side."""
    return c * (<Py_ssize_t>sizeof(storage) if wide and level != FULL else v.step[operand])


cdef inline rmask remaining(const View *v, Py_ssize_t c, int n) noexcept nogil:
    return r_gather_bytes(v.at[WHERE] + c * v.step[WHERE], v.lane[WHERE], n)


cdef inline real raw_logits(const View *v, Py_ssize_t c, int n, bint wide) noexcept nogil:
    return fetch(v.at[X] + c * v.step[X], v.lane[X], n, -INF if wide else 0, False)


cdef real transformed(const Job *job, const View *v, Py_ssize_t c, int n, real x) noexcept nogil:
    """Raw logits as the loss takes them; removed classes are -inf."""
    if job.transforms:
        x = transform_logit(job.transform, x)
    if v.at[WHERE] != NULL:
        x = r_select(remaining(v, c, n), x, r_set(-INF))
    return x


cdef inline real logits(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level) noexcept nogil:
    """Logits from class c on; -inf past the end of a row."""
    cdef real x
    if not wide and v.kept_logits != NULL:
        return v.kept_logits[c]
    if level == FULL:
        return transformed(job, v, c, n, raw_logits(v, c, n, wide))
    x = fetch(v.at[X] + place_of(v, X, c, wide, level), v.lane[X], n, -INF if wide else 0, wide)
    return transform_logit(job.transform, x) if level == MIXED and job.transforms else x


cdef inline real teacher_logits(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level
) noexcept nogil:
    """The teacher's, transformed likewise."""
    cdef real y
    if not wide and v.kept_teacher != NULL:
        return v.kept_teacher[c]
    y = fetch(
        v.at[Q] + place_of(v, Q, c, wide, level), v.lane[Q], n, -INF if wide else 0, wide and level != FULL
    )
    return transform_logit(job.transform, y) if job.transforms else y


cdef inline log_prob entries(const View *v, real x, real p) noexcept nogil:
    cdef log_prob at
    at.u, at.p, at.not_p = (x - v.max) - v.log_z, p, r_set(1) - p
    at.v, at.t, at.d = r_set(0), r_set(0), r_set(0)
    return at


cdef inline void add_teacher(const View *v, real x, real y, log_prob *at) noexcept nogil:
    cdef row_state student, teacher
    student.max, student.log_z = v.max, v.log_z
    teacher.max, teacher.log_z, teacher.inverse = v.teacher_max, v.teacher_log_z, v.teacher_inverse
    teacher.ref = v.teacher_ref
    row_teacher(student, teacher, x, y, at)


cdef inline real coefficients(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level) noexcept nogil:
    """The dense coefficients d = w ((1 - eps) q + eps / C); 0 past the end of a row and where a class is removed."""
    cdef real d = v.share
    if level == FULL and job.q_is_scalar:
        d = r_fma(r_set(job.label_share), r_gather_scalars(v.at[Q] + c * v.step[Q], v.lane[Q], n), d)
    elif v.at[Q] != NULL:
        d = r_fma(
            r_set(job.label_share),
            fetch(v.at[Q] + place_of(v, Q, c, wide, level), v.lane[Q], n, 0, wide and level != FULL),
            d,
        )
    if job.weight != NULL:
        d = d * (load_scalars(job.weight + c, n) if wide else r_set(job.weight[c]))
    if wide and n < LANES:
        d = r_select(r_first_lanes(n), d, r_set(0))
    if level == FULL and v.at[WHERE] != NULL:
        d = r_select(remaining(v, c, n), d, r_set(0))
    return d


cdef inline real load_scalars(const scalar *p, int n) noexcept nogil:
    cdef scalar padded[LANES]
    cdef int i
    if n == LANES:
        return r_load_scalars(p)
    for i in range(LANES):
        padded[i] = p[i] if i < n else 0
    return r_load_scalars(padded)


cdef inline real without_top(const View *v, real a, Py_ssize_t c, bint wide) noexcept nogil:
    if wide:
        return r_select(r_eq(r_iota(), r_set(<scalar>(v.top - c))), r_set(0), a)
    return r_select(r_eq(v.tops, r_set(<scalar>c)), r_set(0), a)


cdef inline void terms(
    const Job *job, const View *v, Py_ssize_t c, int n,
    bint wide, int level, int kind, int keep, bint skip_top, real *out,
) noexcept nogil:
    """What an entry adds to the sums of its row; the top entry adds nothing."""
    cdef real x = logits(job, v, c, n, wide, level), e = r_exp_relative(x, v.ref), d
    cdef log_prob at
    cdef jet phi
    if kind == SUM_PHI:
        at = entries(v, x, e * v.inverse)
        if job.teacher != NULL:
            add_teacher(v, x, teacher_logits(job, v, c, n, wide, level), &at)
            phi = loss_phi(job.phi, at, job.parameter)
            out[0], out[1], out[2] = phi.value, phi.d1, phi.d2
        else:
            phi = loss_phi(job.phi, at, job.parameter)
            d = coefficients(job, v, c, n, wide, level)
            out[0], out[1], out[2] = weighted(d, phi.value), weighted(d, phi.d1), weighted(d, phi.d2)
    else:
        if keep == IN_GRAD:
            put(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], e, n, True)
        elif keep == STAGED:
            v.kept_exp[c // LANES if wide else c] = e
        out[0] = e
        if kind == SUM_LINEAR:
            d = coefficients(job, v, c, n, wide, level)
            out[1], out[2] = weighted(d, v.max - x), d
        elif kind == SUM_STATS:
            out[1] = weighted(e, v.max - x)
            out[2] = r_select(r_gt(x, v.label_logit), r_set(1), r_set(0))
    if skip_top:
        out[0] = without_top(v, out[0], c, wide)
        if kind != SUM_EXP:
            out[1], out[2] = without_top(v, out[1], c, wide), without_top(v, out[2], c, wide)


cdef inline jet sparse_entries(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, log_prob *at
) noexcept nogil:
    """The divergence at places c on of a sparse teacher's classes."""
    cdef real x = v.picked[c // LANES if wide else c]
    at[0] = entries(v, x, r_exp_relative(x, v.ref) * v.inverse)
    add_teacher(v, x, teacher_logits(job, v, c, n, wide, FULL), at)
    return loss_phi(job.phi, at[0], job.parameter)


cdef void terms_sparse(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, real *out) noexcept nogil:
    cdef log_prob at
    cdef jet phi = sparse_entries(job, v, c, n, wide, &at)
    cdef real outside = at.p * r_set(share_outside(job.phi))
    out[0] = without_top(v, phi.value - outside, c, wide)
    out[1] = without_top(v, phi.d1 - outside, c, wide)
    out[2] = without_top(v, phi.d2 - outside, c, wide)


cdef void terms_full(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int kind, int keep, real *out
) noexcept nogil:
    terms(job, v, c, n, wide, FULL, kind, keep, True, out)


cdef inline void write(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level, int keep
) noexcept nogil:
    """The outputs of the entries, from what row_finish found for their rows."""
    cdef bint dense = level == DENSE or (level >= MIXED and job.dense)
    cdef real x = r_set(0), e, d, p, g, h
    cdef log_prob at
    cdef jet phi
    if job.what == LOG_SOFTMAX:
        g = (logits(job, v, c, n, wide, level) - v.max) - v.log_z
        put(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], g, n, wide and level != FULL)
        return
    if keep == IN_GRAD:
        e = fetch(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], n, 0, True)
    elif keep == STAGED:
        e = v.kept_exp[c // LANES if wide else c]
    else:
        x = logits(job, v, c, n, wide, level)
        e = r_exp_relative(x, v.ref)
    g = e * v.out_exp
    p = e * v.inverse
    h = p * r_fma(p, v.out_hess2, v.out_hess1)
    if dense:
        if level >= MIXED and not job.linear:
            at = entries(v, x, p)
            if job.teacher != NULL:
                add_teacher(v, x, teacher_logits(job, v, c, n, wide, level), &at)
                phi = loss_phi(job.phi, at, job.parameter)
            else:
                phi = loss_phi(job.phi, at, job.parameter)
                d = coefficients(job, v, c, n, wide, level)
                phi.d1, phi.d2 = weighted(d, phi.d1), weighted(d, phi.d2)
            g = g + v.factor * phi.d1
            h = h + v.factor * (phi.d2 * (at.not_p - p))
        else:
            d = coefficients(job, v, c, n, wide, level)
            g = r_fma(d, r_set(0) - v.factor, g)
    if level == MIXED and job.transforms and job.what == LOSS:
        transform_derivatives(job.transform, r_set(0), &g, &h)
    if level == FULL:
        if job.transforms and job.what == LOSS:
            transform_derivatives(
                job.transform, fetch(v.at[X] + c * v.step[X], v.lane[X], n, 0, False), &g, &h
            )
        if v.at[WHERE] != NULL:
            g = r_select(remaining(v, c, n), g, r_set(0))
            h = r_select(remaining(v, c, n), h, r_set(0))
    if not wide:
        g = r_select(v.active, g, r_set(0))
        h = r_select(v.active, h, r_set(0))
    if job.want_hess:
        put(v.at[HESS] + place_of(v, HESS, c, wide, level), v.lane[HESS], h, n, wide and level != FULL)
    if not wide and v.turned_grad != NULL:
        v.turned_grad[c] = g
    elif job.want_grad:
        put(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], g, n, wide and level != FULL)
