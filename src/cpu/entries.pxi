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


cdef inline real read(
    const View *v, int operand, Py_ssize_t c, int n, scalar fill, bint wide, int level
) noexcept nogil:
    """Entries of an operand from class c on; `fill` in lanes past the n-th."""
    if level == FULL and v.kind[operand] != 0:
        return r_gather_numbers(v.at[operand] + c * v.step[operand], v.lane[operand], n, fill, v.kind[operand])
    return fetch(
        v.at[operand] + place_of(v, operand, c, wide, level), v.lane[operand], n, fill, wide and level != FULL
    )


cdef inline void write_to(
    const View *v, int operand, Py_ssize_t c, real a, int n, bint wide, int level
) noexcept nogil:
    if level == FULL and v.kind[operand] != 0:
        r_scatter_numbers(v.at[operand] + c * v.step[operand], v.lane[operand], a, n, v.kind[operand])
    else:
        put(v.at[operand] + place_of(v, operand, c, wide, level), v.lane[operand], a, n, wide and level != FULL)


cdef inline rmask remaining(const View *v, Py_ssize_t c, int n) noexcept nogil:
    return r_gather_bytes(v.at[WHERE] + c * v.step[WHERE], v.lane[WHERE], n)


cdef inline real logits(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level) noexcept nogil:
    """Logits from class c on, as they were given; -inf past the end of a row and for removed classes."""
    cdef real x
    if not wide and v.kept_logits != NULL:
        return v.kept_logits[c]
    x = read(v, X, c, n, -INF if wide else 0, wide, level)
    if level == FULL and v.at[WHERE] != NULL:
        x = r_select(remaining(v, c, n), x, r_set(-INF))
    return x


cdef inline real teacher_logits(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level
) noexcept nogil:
    """The teacher's likewise; at its own classes, if these are not all."""
    cdef real y
    if v.kept_teacher != NULL:
        return v.kept_teacher[c // LANES if wide else c]
    y = read(v, Q, c, n, -INF if wide else 0, wide, level)
    if level == FULL and v.at[WHERE] != NULL:
        y = r_select(remaining(v, c, n), y, r_set(-INF))
    return y


cdef real_pair capped_distances(const Job *job, const logit_origin *origin, real x) noexcept nogil:
    return distance_by_softcap(job.transform, origin[0], x)


cdef inline real_pair distances(const Job *job, const logit_origin *origin, real x) noexcept nogil:
    """Transformed logits less the greatest of their row."""
    if job.transform.softcap.high != 0:
        return capped_distances(job, origin, x)
    return distance_by_temperature(job.transform, origin[0], x)


cdef inline distance_pair pair_at(const Job *job, const View *v, real x, real y) noexcept nogil:
    """Those of student and teacher, and their difference."""
    return distances_of_pair(job.transform, v.by.origin, v.by.teacher_origin, x, y)


cdef inline real_pair entries(const Job *job, const View *v, real x, int level) noexcept nogil:
    """Logits as the loss takes them."""
    cdef real_pair z
    if level >= MIXED and job.by_distance:
        return distances(job, &v.by.origin, x)
    z.high, z.low = x, r_set(0)
    return z


cdef inline real exp_of(const Job *job, const View *v, real_pair z, int level) noexcept nogil:
    if level >= MIXED and job.by_distance:
        return r_exp_relative_pair(z, v.ref)
    return r_exp_relative(z.high, v.ref)


cdef real_pair exp_parts(real_pair z) noexcept nogil:
    return steep_exp(z).exp


cdef inline real coefficients(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level) noexcept nogil:
    """The dense coefficients, without eps / C for removed classes; 0 past the end."""
    cdef real d = v.share
    if level == FULL and v.at[WHERE] != NULL:  # smoothing spreads over the others
        d = r_select(remaining(v, c, n), d, r_set(0))
    if v.at[Q] != NULL:
        d = dense_coefficient(d, job.label_share, read(v, Q, c, n, 0, wide, level))
    if job.weight != NULL:
        d = d * (load_scalars(job.weight + c, n) if wide else r_set(job.weight[c]))
    if wide and n < LANES:
        d = r_select(r_first_lanes(n), d, r_set(0))
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
    return without(a, v.top, v.tops, c, wide)


cdef inline real without(real a, Py_ssize_t place, real places, Py_ssize_t c, bint wide) noexcept nogil:
    if wide:
        return r_select(r_eq(r_iota(), r_set(<scalar>(place - c))), r_set(0), a)
    return r_select(r_eq(places, r_set(<scalar>c)), r_set(0), a)


cdef inline row_sums terms_of_phi(
    const Job *job, const View *v, int phi, real_pair z, real_pair e, real d
) noexcept nogil:
    """Those of entries with coefficients, where slopes are measured against the top entry's."""
    cdef log_prob at = log_prob_of(v.max, v.log_z, z, e.high * v.inverse)
    return relative_terms(v.by.slope, at, z, e, d, phi, job.parameter)


cdef inline void terms(
    const Job *job, const View *v, Py_ssize_t c, int n,
    bint wide, int level, int kind, int keep, bint skip_top, real *out,
) noexcept nogil:
    """What an entry adds to the sums of its row; the top entry adds nothing."""
    cdef real x, e, d
    cdef real_pair z, parts
    cdef steep_term term
    cdef row_sums found
    if kind >= SUM_DIVERGENCE and keep == PAIRED:
        terms_of_match(job, v, kept_match(v, c, wide), c, wide, kind, keep, skip_top, out)
        return
    x = logits(job, v, c, n, wide, level)
    if kind >= SUM_TEACHER:
        terms_of_pair(job, v, x, teacher_logits(job, v, c, n, wide, level), c, wide, kind, keep, skip_top, out)
        return
    z = entries(job, v, x, level)
    if kind >= SUM_PHI:
        d, parts = coefficients(job, v, c, n, wide, level), r_exp_pair_near(z).exp
        found = terms_of_phi(job, v, kind - SUM_PHI, z, parts, d)
        if keep == PAIRED:
            keep_part(v, 0, c, wide, parts.high)
            keep_part(v, 1, c, wide, found.extra)
            keep_part(v, 2, c, wide, found.d2)
        out[0], out[1], out[2], out[3] = found.value, found.d1, found.d2, found.extra
    else:
        e = exp_of(job, v, z, level)  # the same where it is kept and where it is formed again
        if kind == SUM_PARTS:
            term = steep_summand(exp_parts(z))
        if keep == IN_GRAD:
            put(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], e, n, True)
        elif keep == STAGED:
            v.kept_exp[c // LANES if wide else c] = e
        out[0] = e
        if kind == SUM_LINEAR:
            d = coefficients(job, v, c, n, wide, level)
            out[1], out[2] = below_top(d, v.max, z.high), d
        elif kind == SUM_STATS:
            out[1] = below_top(e, v.max, z.high)
            out[2] = r_select(r_gt(x, v.label_logit), r_set(1), r_set(0))
        elif kind == SUM_PARTS:
            out[0], out[1], out[2] = term.high, term.middle, term.low
        elif kind == SUM_OUTSIDE:
            out[1] = r_select(r_lanes_in(v.teacher_has[c // LANES if wide else c]), r_set(0), e)
            out[2] = r_set(0)
    if skip_top:
        out[0] = without_top(v, out[0], c, wide)
        if kind != SUM_EXP:
            out[1], out[2] = without_top(v, out[1], c, wide), without_top(v, out[2], c, wide)
        if kind >= SUM_PHI:
            out[3] = without_top(v, out[3], c, wide)


cdef inline void terms_of_pair(
    const Job *job, const View *v, real x, real y, Py_ssize_t c,
    bint wide, int kind, int keep, bint skip_top, real *out,
) noexcept nogil:
    """The same of student and teacher, from their logits."""
    cdef distance_pair at = pair_at(job, v, x, y)
    if kind != SUM_TEACHER:
        terms_of_match(job, v, match_entry(v.by.match, at), c, wide, kind, keep, skip_top, out)
        return
    out[0], out[2] = r_exp_relative_pair(at.y, v.ref), r_exp_relative_pair(at.x, v.ref)
    out[1] = exp_difference(out[2], out[0], total_of(at.gap))
    if keep == PAIRED:
        keep_part(v, 0, c, wide, out[2])
        keep_part(v, 1, c, wide, out[0])
        keep_part(v, 2, c, wide, at.gap.high)
        keep_part(v, 3, c, wide, at.gap.low)
    if skip_top:
        out[0] = without(out[0], v.teacher_top, v.teacher_tops, c, wide)
        out[2] = without_top(v, out[2], c, wide)


cdef inline void keep_part(const View *v, int part, Py_ssize_t c, bint wide, real a) noexcept nogil:
    v.kept_pair[part * v.kept_step + (c // LANES if wide else c)] = a


cdef inline real kept_part(const View *v, int part, Py_ssize_t c, bint wide) noexcept nogil:
    return v.kept_pair[part * v.kept_step + (c // LANES if wide else c)]


cdef inline prob_pair kept_match(const View *v, Py_ssize_t c, bint wide) noexcept nogil:
    cdef real_pair gap
    gap.high, gap.low = kept_part(v, 2, c, wide), kept_part(v, 3, c, wide)
    return match_gap(v.by.match, kept_part(v, 0, c, wide), kept_part(v, 1, c, wide), gap)


cdef inline void terms_of_match(
    const Job *job, const View *v, prob_pair at, Py_ssize_t c, bint wide, int kind, int keep, bint skip_top, real *out,
) noexcept nogil:
    cdef jet f = divergence_term(FIRST_DIVERGENCE + kind - SUM_DIVERGENCE, at, v.by.match)
    cdef row_sums found = match_terms(at.p, f)
    if keep == PAIRED:
        keep_part(v, 0, c, wide, at.p)
        keep_part(v, 1, c, wide, f.d1)
        keep_part(v, 2, c, wide, f.d2)
    out[0] = without_top(v, f.value, c, wide) if skip_top else f.value
    if kind == SUM_DIVERGENCE:         # the forward one needs no other sum
        return
    out[1], out[2] = found.d1, found.d2
    if skip_top:
        out[1], out[2] = without_top(v, out[1], c, wide), without_top(v, out[2], c, wide)


cdef void terms_sparse(const Job *job, const View *v, Py_ssize_t c, bint wide, int kind, real *out) noexcept nogil:
    """At places c on of a sparse teacher's classes."""
    cdef Py_ssize_t k = c // LANES if wide else c
    terms_of_pair(job, v, v.picked[k], v.kept_teacher[k], c, wide, kind, FORGET, True, out)


cdef void terms_full(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int kind, int keep, real *out
) noexcept nogil:
    terms(job, v, c, n, wide, FULL, kind, keep, True, out)


cdef inline void write(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level, int keep
) noexcept nogil:
    """The outputs of the entries, from what row_finish found for their rows."""
    cdef bint dense = level == DENSE or (level >= MIXED and job.dense)
    cdef bint paired = level >= MIXED and dense and job.teacher != NULL
    cdef bint relative = level >= MIXED and dense and job.relative
    cdef real e, p, slope, d2
    cdef real_pair z, parts
    cdef prob_pair match
    cdef row_sums found
    cdef jet at
    z.high, z.low, slope, d2 = r_set(0), r_set(0), r_set(0), r_set(0)
    if job.what == LOG_SOFTMAX:
        z = entries(job, v, logits(job, v, c, n, wide, level), level)
        e = log_prob_of(v.max, v.log_z, z, r_set(0)).u
        if level == FULL and v.at[WHERE] != NULL:  # also in a row of which nothing is left
            e = r_select(remaining(v, c, n), e, r_set(-INF))
        write_to(v, GRAD, c, e, n, wide, level)
        return
    if paired:
        if keep == PAIRED:
            p, at.d1, at.d2 = kept_part(v, 0, c, wide), kept_part(v, 1, c, wide), kept_part(v, 2, c, wide)
        else:
            match = match_entry(v.by.match, pair_at(
                job, v, logits(job, v, c, n, wide, level), teacher_logits(job, v, c, n, wide, level)
            ))
            at, p = divergence_term(job.phi, match, v.by.match), match.p
        at = match_derivatives(job.phi, at, p, v.out)
    else:
        if keep == IN_GRAD:
            e = fetch(v.at[GRAD] + place_of(v, GRAD, c, wide, level), v.lane[GRAD], n, 0, True)
        elif keep == STAGED:
            e = v.kept_exp[c // LANES if wide else c]
        elif keep == PAIRED:
            e, slope, d2 = kept_part(v, 0, c, wide), kept_part(v, 1, c, wide), kept_part(v, 2, c, wide)
        else:
            z = entries(job, v, logits(job, v, c, n, wide, level), level)
            if relative:
                parts = r_exp_pair_near(z).exp
                found = terms_of_phi(job, v, job.phi, z, parts, coefficients(job, v, c, n, wide, level))
                e, slope, d2 = parts.high, found.extra, found.d2
            else:
                e = exp_of(job, v, z, level)
        at = entry_derivatives(v.out, v.inverse, e)
        p = at.value
        if relative:
            relative_derivatives(v.out, &at, slope, d2)
        elif dense:
            at.d1 = linear_derivative(v.out, at.d1, coefficients(job, v, c, n, wide, level))
    if level == FULL and job.z_loss != 0 and job.what == LOSS:
        add_far(v.out.far, v.out.factor, p, r_set(1) - p, &at.d1, &at.d2)
    if level >= MIXED and job.transforms and job.what == LOSS:
        transform_derivatives(
            job.transform, read(v, X, c, n, 0, wide, FULL) if level == FULL else r_set(0), &at.d1,
            &at.d2 if job.want_hess else NULL,
        )
    if level == FULL and v.at[WHERE] != NULL:
        at.d1 = r_select(remaining(v, c, n), at.d1, r_set(0))
        at.d2 = r_select(remaining(v, c, n), at.d2, r_set(0))
    if not wide:
        at.d1 = r_select(v.active, at.d1, r_set(0))
        at.d2 = r_select(v.active, at.d2, r_set(0))
    if job.want_hess:
        write_to(v, HESS, c, at.d2, n, wide, level)
    if not wide and v.turned_grad != NULL:
        v.turned_grad[c] = at.d1
    elif job.want_grad:
        write_to(v, GRAD, c, at.d1, n, wide, level)
