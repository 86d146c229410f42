# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, freethreading_compatible=True
"""The schedules of the softmax losses on a CPU: how rows are read, summed and written, and by which thread.

A row is one softmax: all classes of one sample. Rows are worked off in tiles of up to LANES rows, in three steps:

1. read the logits: the maximum, where it is (the *top* entry), and the sum of exp over all other entries;
2. finish up to LANES rows at once, one in each lane (``row_finish`` of formulas.h);
3. write gradient and Hessian diagonal, and set right the two entries where p - 1 would have cancelled.

Two schedules do steps 1 and 3. *wide* puts the lanes along the classes of one row, *many* puts LANES rows into the lanes and
walks over the classes. Both add in the same order: class c belongs to virtual lane c mod VIRTUAL, eight terms of a lane
make a block, blocks are added in double precision of the type, lanes are added pairwise. So a row has the same bits in any
schedule, layout, batch or thread.

This file is compiled once for each instruction set and storage type (see primitives.h); it knows no loss.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from cython.parallel cimport prange

cimport numpy as cnp

cnp.import_array()

cdef extern from "formulas.h" nogil:
    ctypedef float scalar
    ctypedef float real
    ctypedef int rmask
    ctypedef float storage  # may be 16 bits wide: only s_load and s_store look inside

    enum:
        LANES "XCE_LANES"
        VIRTUAL "XCE_VIRTUAL"
        VECTORS "XCE_VECTORS"
        STORAGE_IS_16_BIT "XCE_STORAGE_IS_16_BIT"
        CORNER "XCE_CORNER"
        PHI_COUNT "XCE_PHI_COUNT"
        PHI_CROSS_ENTROPY "PHI_cross_entropy"
    const scalar INF "XCE_INF"
    const scalar NAN "XCE_NAN"
    const char *const *PHI_NAMES "XCE_PHI_NAMES"

    ctypedef struct real_sum:
        real high, low
    ctypedef struct exp_reference:
        pass
    ctypedef struct log_prob:
        real u, p, not_p
    ctypedef struct jet:
        real value, d1, d2
    ctypedef struct logit_transform:
        scalar softcap, temperature
    ctypedef struct row_state:
        exp_reference ref
        real max, top, rest, inverse, log_z
    ctypedef struct row_target:
        real factor, weight, index, label_logit, d_top, d_label, sum, sum1, sum2, z_loss
        rmask label_is_top
    ctypedef struct row_result:
        real value, b, d, grad_top, hess_top, grad_label, hess_label

    real r_set(scalar a)
    real r_iota()
    real r_fma(real a, real b, real c)
    real r_abs(real a)
    real r_max(real a, real b)
    rmask r_gt(real a, real b)
    rmask r_eq(real a, real b)
    rmask r_not(rmask m)
    rmask r_first_lanes(int n)
    unsigned r_lanes_of(rmask m)
    int lowest_bit(unsigned bits)
    real r_select(rmask m, real a, real b)
    scalar r_max_of_lanes(real a)
    real r_load_scalars(const scalar *p)
    void r_store_scalars(scalar *p, real a)
    scalar s_load(const storage *p)
    void s_store(storage *p, scalar a)
    void prefetch(const char *p)
    void prefetch_to_write(const char *p)
    real r_load(const storage *p)
    real r_load_part(const storage *p, int n, scalar fill)
    void r_store(storage *p, real a)
    void r_store_part(storage *p, real a, int n)
    real r_gather(const char *p, Py_ssize_t stride, int n, scalar fill)
    void r_scatter(char *p, Py_ssize_t stride, real a, int n)
    void turn_in(const char *rows, Py_ssize_t stride, Py_ssize_t n, real *vectors)
    void turn_out(const real *vectors, Py_ssize_t n, char *rows, Py_ssize_t stride)
    rmask r_gather_bytes(const char *p, Py_ssize_t stride, int n)
    exp_reference r_exp_reference(real max)
    real r_exp_relative(real x, exp_reference ref)
    real_sum r_sum_zero()
    real_sum r_sum_add(real_sum s, real a)
    real r_add8(const real *a)
    row_state row_close(real max, real rest)
    log_prob row_top(row_state s)
    log_prob row_entry(row_state s, real x)
    real row_lse(row_state s)
    row_result row_finish(row_state s, row_target t, int phi, real parameter)
    jet loss_phi(int phi, log_prob at, real parameter)
    real weighted(real a, real phi)
    real transform_logit(logit_transform t, real x)
    void transform_derivatives(logit_transform t, real x, real *g, real *h)

# ---- the job ---------------------------------------------------------------------------------------------------------

cdef enum:
    MAX_AXES = 32
    BLOCK = 8              # vectors that are added up before they enter the double-precision sum
    TERMS = 3              # sums that one reading of a row can form, sum of exp included

    # What is computed
    LOSS = 0
    SOFTMAX = 1
    LOG_SOFTMAX = 2
    LOGSUMEXP = 3
    STATS = 4
    STATE = 5

    # What is true of a row
    ACTIVE = 0
    IGNORED = 1
    INVALID = 2            # a label out of range that nobody checked, or that changed since: the row becomes NaN

    # What a reading adds up
    SUM_EXP = 0
    SUM_LINEAR = 1         # exp; d (max - x); d
    SUM_STATS = 2          # exp; exp (max - x); logits above the label's
    SUM_PHI = 3            # d phi; d phi'; d phi''

    # Where exp waits for step 3
    FORGET = 0
    IN_GRAD = 1            # in the memory of the gradient, side by side
    STAGED = 2             # on the stage

    # How much of the generality is compiled in; all levels give the same bits where they apply
    SPARSE = 0             # a label and nothing else: dense coefficients are all 0
    DENSE = 1              # probabilities or smoothing, phi linear
    FULL = 2               # everything, decided while running: where, softcap, temperature, other phi, any strides

# Tuning, measured on two cores of an AMD EPYC (Zen 4); ARCHITECTURE.md tells how:
cdef enum:
    MANY_UP_TO = 96        # classes
    MANY_AT_MOST = 16777216  # classes; beyond, a float32 lane cannot hold the index of the top entry
    STAGE = 1024           # vectors kept between the readings: 64 KiB a thread at most
    UNIT_LOGITS = 32768    # a thread's portion ...
    UNIT_ROWS = 1024       # ... which is a number of rows that depends on the classes alone, as its sum is rounded
    CHUNK_LOGITS = 16777216  # between two looks for Ctrl-C: some 10 ms
    CHUNK_UNITS = 2048

cdef enum:
    X, Q, WHERE, GRAD, HESS, ENTRY_OPERANDS
    LABEL = ENTRY_OPERANDS, SAMPLE, VALUE, LABEL_LOGIT, TOP, RANK, SPREAD, LINEAR, OPERANDS

cdef struct Operand:
    char *data
    Py_ssize_t classes     # bytes from a class to the next
    Py_ssize_t rows        # bytes from a row to the next along the last axis of rows
    Py_ssize_t outer[MAX_AXES]

cdef struct Job:
    int what, phi
    scalar parameter
    Py_ssize_t n_classes, n_rows
    Py_ssize_t run                     # rows along the last axis of rows
    int outer_axes
    Py_ssize_t outer_shape[MAX_AXES]
    Operand at[OPERANDS]
    int used[OPERANDS]                 # which of them there are
    int n_used
    int label_kind
    long long ignore_index
    const scalar *weight
    scalar label_smoothing
    scalar share, label_share          # eps / C, unless `where` makes C a matter of the row, and 1 - eps
    scalar z_loss
    scalar scale                       # of derivatives: 1 / denominator of the mean
    logit_transform transform
    bint transforms, linear, dense, want_grad, want_hess, writes, wide
    int level, tile_rows
    Py_ssize_t unit_rows

# Up to LANES rows: per lane, what step 1 found and step 3 needs.
cdef struct Tile:
    char *at[OPERANDS]                 # of the first row
    int n
    int status[LANES]
    Py_ssize_t label[LANES]            # -1: none
    Py_ssize_t top[LANES]
    scalar max[LANES]
    scalar sums[TERMS][LANES]
    scalar index[LANES]                # coefficient of the label beyond its dense one
    scalar label_logit[LANES]
    scalar sample[LANES]
    scalar share[LANES]
    scalar phi_sums[TERMS][LANES]
    row_state state
    row_result result

# Entries in the lanes: of one row (wide) or of one class (many).
cdef struct View:
    char *at[ENTRY_OPERANDS]
    Py_ssize_t step[ENTRY_OPERANDS]    # bytes from a class to the next
    Py_ssize_t lane[ENTRY_OPERANDS]    # bytes from a lane to the next
    const real *kept_logits            # what is kept between the readings, or NULL;
    real *kept_exp                     # both may be the same memory
    real *turned_grad                  # where the gradient waits to be turned into rows, or NULL
    Py_ssize_t top                     # wide
    real tops                          # many
    real max, share, label_logit
    exp_reference ref
    real log_z, inverse, b, d, factor, out_exp, out_hess1, out_hess2
    rmask active

# ---- entries -----------------------------------------------------------------------------------------------------------

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
    if not wide and v.kept_logits != NULL:
        return v.kept_logits[c]
    if level == FULL:
        return transformed(job, v, c, n, raw_logits(v, c, n, wide))
    return fetch(v.at[X] + place_of(v, X, c, wide, level), v.lane[X], n, -INF if wide else 0, wide)


cdef inline real coefficients(const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level) noexcept nogil:
    """The dense coefficients d = w ((1 - eps) q + eps / C); 0 past the end of a row and where a class is removed."""
    cdef real d = v.share
    if v.at[Q] != NULL:
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
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level, int kind, int keep, bint skip_top, real *out
) noexcept nogil:
    """What an entry adds to the sums of its row; the top entry adds nothing."""
    cdef real x = logits(job, v, c, n, wide, level), e = r_exp_relative(x, v.ref), d
    cdef log_prob at
    cdef jet phi
    if kind == SUM_PHI:
        at.u, at.p = (x - v.max) - v.log_z, e * v.inverse
        at.not_p = r_set(1) - at.p
        phi = loss_phi(job.phi, at, r_set(job.parameter))
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


cdef void terms_full(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int kind, int keep, real *out
) noexcept nogil:
    terms(job, v, c, n, wide, FULL, kind, keep, True, out)


cdef inline void write(
    const Job *job, const View *v, Py_ssize_t c, int n, bint wide, int level, int keep
) noexcept nogil:
    """The outputs of the entries, from what row_finish found for their rows."""
    cdef bint dense = level == DENSE or (level == FULL and job.dense)
    cdef real x, e, d, p, g, h
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
        d = coefficients(job, v, c, n, wide, level)
        if level == FULL and not job.linear:
            at.u, at.p, at.not_p = (x - v.max) - v.log_z, p, r_set(1) - p
            phi = loss_phi(job.phi, at, r_set(job.parameter))
            g = g + v.factor * weighted(d, phi.d1)
            h = h + v.factor * (weighted(d, phi.d2) * (at.not_p - p))
        else:
            g = r_fma(d, r_set(0) - v.factor, g)
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


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef inline void pairwise(scalar *lanes) noexcept nogil:
    """lanes[0] becomes the sum of the virtual lanes."""
    cdef int width = VIRTUAL // 2, i
    while width > 0:
        for i in range(width):
            lanes[i] += lanes[i + width]
        width //= 2


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
    cdef int n_terms = 1 if kind == SUM_EXP else TERMS
    cdef int n_lanes = VECTORS if wide else VIRTUAL, lane_step = LANES if wide else 1
    cdef int lane, j, t, n, present
    cdef bint plain
    cdef real block_terms[TERMS][BLOCK]
    cdef real entry[TERMS]
    cdef real_sum total[TERMS][VIRTUAL]
    cdef scalar high[VIRTUAL]
    cdef scalar low[VIRTUAL]
    for t in range(n_terms):
        for lane in range(n_lanes):
            total[t][lane] = r_sum_zero()
    block = 0
    while block < n_classes:
        # all there, and the top entry elsewhere
        plain = (
            level != FULL and wide and block + BLOCK * VIRTUAL <= n_classes
            and not block <= v.top < block + BLOCK * VIRTUAL
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
                    n = <int>min(<Py_ssize_t>LANES, n_classes - c - j * VIRTUAL) if wide else LANES
                    if level == FULL:
                        terms_full(job, v, c + j * VIRTUAL, n, wide, kind, keep, entry)
                    else:
                        terms(job, v, c + j * VIRTUAL, n, wide, level, kind, keep, True, entry)
                    for t in range(n_terms):
                        block_terms[t][j] = entry[t]
                if present == 1:
                    for t in range(n_terms):  # adding zeros changes nothing
                        total[t][lane] = r_sum_add(total[t][lane], entry[t])
                    continue
                for t in range(n_terms):
                    for j in range(present, BLOCK):
                        block_terms[t][j] = r_set(0)
            for t in range(n_terms):
                total[t][lane] = r_sum_add(total[t][lane], r_add8(block_terms[t]))
        block += BLOCK * VIRTUAL
    for t in range(n_terms):
        if wide:
            for lane in range(n_lanes):
                r_store_scalars(&high[lane * LANES], total[t][lane].high)
                r_store_scalars(&low[lane * LANES], total[t][lane].low)
            pairwise(high)
            if n_classes > BLOCK * VIRTUAL:  # else 0
                pairwise(low)
            sums[t] = sum_of(r_set(high[0]), r_set(low[0]))
        else:
            n = VIRTUAL // 2
            while n > 0:
                for lane in range(<int>min(<Py_ssize_t>n, n_classes - n)):  # the others are 0
                    total[t][lane].high = total[t][lane].high + total[t][lane + n].high
                    if n_classes > BLOCK * VIRTUAL:
                        total[t][lane].low = total[t][lane].low + total[t][lane + n].low
                n //= 2
            sums[t] = sum_of(total[t][0].high, total[t][0].low)


# GCC allots registers well in a function with one loop and badly in one with many, so each loop that matters is a function.

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

cdef void sum_full(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if job.wide:
        reduce(job, v, True, FULL, kind, keep, sums)
    else:
        reduce(job, v, False, FULL, kind, keep, sums)


cdef void sum_rows(const Job *job, const View *v, int kind, int keep, real *sums) noexcept nogil:
    if job.level == FULL:
        sum_full(job, v, kind, keep, sums)
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


cdef inline bint lies_in_rows(const Job *job, const char *data, int operand, int n) noexcept nogil:
    """Whether a full tile of an operand lies in rows of adjacent classes, to be turned block by block."""
    return (
        data != NULL and n == LANES and job.n_classes >= CORNER
        and job.at[operand].classes == sizeof(storage) and job.at[operand].rows != sizeof(storage)
    )


cdef void top_many(const Job *job, View *v, int n, real *stage, real *maximum, real *top) noexcept nogil:
    """The same for a row in each lane; keeps the logits in `stage` if there is one."""
    cdef Py_ssize_t c
    cdef real x, best = r_set(-INF), place = r_set(0), index = r_set(0)
    cdef bint turned = stage != NULL and lies_in_rows(job, v.at[X], X, n)
    if turned:
        turn_in(v.at[X], v.lane[X], job.n_classes, stage)
        v.kept_logits = stage
    for c in range(job.n_classes):
        x = stage[c] if turned else raw_logits(v, c, n, False)
        if job.level == FULL:
            x = transformed(job, v, c, n, x)
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
    cdef Py_ssize_t c = 0, n_classes = job.n_classes
    if wide:
        while c + LANES <= n_classes:
            write(job, v, c, LANES, True, level, keep)
            c += LANES
        if c < n_classes:
            write(job, v, c, <int>(n_classes - c), True, level, keep)
    else:
        for c in range(n_classes):
            write(job, v, c, n, False, level, keep)


cdef void write_wide_sparse(const Job *job, const View *v) noexcept nogil:
    write_all(job, v, 1, True, SPARSE, STAGED if STORAGE_IS_16_BIT else IN_GRAD)

cdef void write_wide_dense(const Job *job, const View *v) noexcept nogil:
    write_all(job, v, 1, True, DENSE, STAGED if STORAGE_IS_16_BIT else IN_GRAD)

cdef void write_many(const Job *job, const View *v, int n, int keep) noexcept nogil:
    write_all(job, v, n, False, DENSE if job.dense else SPARSE, keep)

cdef void write_full(const Job *job, const View *v, int n, int keep) noexcept nogil:
    write_all(job, v, n, job.wide, FULL, keep)


cdef void write_rows(const Job *job, const View *v, int n, int keep) noexcept nogil:
    if job.wide and keep != FORGET and job.level == SPARSE:
        write_wide_sparse(job, v)
    elif job.wide and keep != FORGET and job.level == DENSE:
        write_wide_dense(job, v)
    elif job.wide or job.level == FULL:
        write_full(job, v, n, keep)
    else:
        write_many(job, v, n, keep)


cdef inline scalar dense_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    """The dense coefficient of one entry, as `coefficients` has it."""
    cdef real d = r_set(tile.share[i])
    if job.at[WHERE].data != NULL:
        if (tile.at[WHERE] + i * job.at[WHERE].rows + c * job.at[WHERE].classes)[0] == 0:
            return 0
    if job.at[Q].data != NULL:
        d = r_fma(
            r_set(job.label_share),
            r_set(s_load(<const storage *>(tile.at[Q] + i * job.at[Q].rows + c * job.at[Q].classes))),
            d,
        )
    if job.weight != NULL:
        d = d * r_set(job.weight[c])
    return first_lane(d)


cdef inline scalar first_lane(real a) noexcept nogil:
    cdef scalar lanes[LANES]
    r_store_scalars(lanes, a)
    return lanes[0]


cdef inline scalar logit_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    """One logit, as `logits` has it."""
    cdef real x = r_set(raw_logit_of(job, tile, i, c))
    if job.transforms:
        x = transform_logit(job.transform, x)
    if job.at[WHERE].data != NULL:
        if (tile.at[WHERE] + i * job.at[WHERE].rows + c * job.at[WHERE].classes)[0] == 0:
            return -INF
    return first_lane(x)


cdef inline scalar raw_logit_of(const Job *job, const Tile *tile, int i, Py_ssize_t c) noexcept nogil:
    return s_load(<const storage *>(tile.at[X] + i * job.at[X].rows + c * job.at[X].classes))


cdef struct Label:
    int status
    Py_ssize_t value                   # -1: none


cdef inline Label label_at(const char *p, int kind, Py_ssize_t n_classes, long long ignore_index) noexcept nogil:
    """Read a label once, then check and use only that copy: another thread may write to the array meanwhile."""
    cdef Label label
    cdef long long value
    label.value = -1
    if kind == -8:
        value = (<const volatile int64_t *>p)[0]
    elif kind == -4:
        value = (<const volatile int32_t *>p)[0]
    elif kind == -2:
        value = (<const volatile int16_t *>p)[0]
    elif kind == -1:
        value = (<const volatile int8_t *>p)[0]
    elif kind == 1:
        value = (<const volatile uint8_t *>p)[0]
    elif kind == 2:
        value = (<const volatile uint16_t *>p)[0]
    elif kind == 4:
        value = (<const volatile uint32_t *>p)[0]
    else:
        value = <long long>(<const volatile uint64_t *>p)[0]
        if value < 0:                  # above the largest int64: neither a class nor ignore_index
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
    """Where the rows lie, and what their labels say."""
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
    if job.wide:                       # ignored rows leave gaps there
        r_store_scalars(tile.max, r_set(0))
        for k in range(TERMS):
            r_store_scalars(tile.sums[k], r_set(0))
    if tile.at[LABEL] != NULL:
        for i in range(n):
            label = label_at(
                tile.at[LABEL] + i * job.at[LABEL].rows, job.label_kind, job.n_classes, job.ignore_index
            )
            tile.label[i] = label.value
            # the statistics of a row want no label
            tile.status[i] = label.status if job.what == LOSS else ACTIVE
            if label.status == ACTIVE:
                tile.index[i] = job.label_share if job.weight == NULL else job.label_share * job.weight[label.value]
            elif label.status == INVALID:
                tile.index[i] = NAN
    if tile.at[SAMPLE] != NULL:
        for i in range(n):
            tile.sample[i] = (<const scalar *>(tile.at[SAMPLE] + i * job.at[SAMPLE].rows))[0]
    if job.at[WHERE].data != NULL and job.label_smoothing != 0:
        for i in range(n):
            index = 0
            for inner in range(job.n_classes):
                index += (tile.at[WHERE] + i * job.at[WHERE].rows + inner * job.at[WHERE].classes)[0] != 0
            tile.share[i] = job.label_smoothing / <scalar>index if index else 0


cdef inline void look(const Job *job, const Tile *tile, View *v, int i) noexcept nogil:
    """A view of row i (wide) or of the whole tile (many)."""
    cdef bint wide = job.wide
    cdef int k
    for k in range(ENTRY_OPERANDS):
        v.at[k] = tile.at[k]
        v.step[k] = job.at[k].classes
        v.lane[k] = job.at[k].classes if wide else job.at[k].rows
        if wide and v.at[k] != NULL:
            v.at[k] += i * job.at[k].rows
    v.kept_logits, v.kept_exp, v.turned_grad = NULL, NULL, NULL


cdef inline void finish(const Job *job, Tile *tile) noexcept nogil:
    """Step 2: the values of the rows, and what step 3 needs, a row in each lane."""
    cdef row_target t
    cdef row_result r
    cdef scalar d_top[LANES]
    cdef scalar d_label[LANES]
    cdef scalar elsewhere[LANES]
    cdef scalar raw_label[LANES]
    cdef scalar raw_top[LANES]
    cdef real zero = r_set(0)
    cdef int i
    for i in range(LANES):
        elsewhere[i] = tile.label[i] != tile.top[i] and tile.label[i] >= 0
    t.d_top, t.d_label = zero, zero
    if job.dense or job.transforms:
        for i in range(LANES):
            d_top[i], d_label[i], raw_label[i], raw_top[i] = 0, 0, 0, 0
        for i in range(tile.n):
            if tile.status[i] == IGNORED:
                continue
            d_top[i] = dense_of(job, tile, i, tile.top[i])
            raw_top[i] = raw_logit_of(job, tile, i, tile.top[i])
            if tile.label[i] >= 0:
                d_label[i] = dense_of(job, tile, i, tile.label[i])
                raw_label[i] = raw_logit_of(job, tile, i, tile.label[i])
        t.d_top, t.d_label = r_load_scalars(d_top), r_load_scalars(d_label)
    t.index, t.label_logit = r_load_scalars(tile.index), r_load_scalars(tile.label_logit)
    t.label_is_top = r_eq(r_load_scalars(elsewhere), zero)
    t.weight = r_load_scalars(tile.sample)
    t.factor = t.weight * r_set(job.scale)
    t.z_loss = r_set(job.z_loss)
    t.sum, t.sum1, t.sum2 = zero, zero, zero
    if job.dense and job.linear:
        t.sum = r_load_scalars(tile.sums[1]) + weighted(r_load_scalars(tile.sums[2]), tile.state.log_z)
        t.sum1 = zero - r_load_scalars(tile.sums[2])
    elif job.dense:
        t.sum, t.sum1 = r_load_scalars(tile.phi_sums[0]), r_load_scalars(tile.phi_sums[1])
        t.sum2 = r_load_scalars(tile.phi_sums[2])
    r = row_finish(tile.state, t, job.phi, r_set(job.parameter))
    if job.transforms:
        transform_derivatives(job.transform, r_load_scalars(raw_top), &r.grad_top, &r.hess_top)
        transform_derivatives(job.transform, r_load_scalars(raw_label), &r.grad_label, &r.hess_label)
    tile.result = r


# ---- tiles -------------------------------------------------------------------------------------------------------------

cdef inline void set_outputs(const Job *job, const Tile *tile, View *v) noexcept nogil:
    """What step 3 needs of the rows, each in its lane."""
    cdef real sample = r_load_scalars(tile.sample), zero = r_set(0)
    v.factor = sample * r_set(job.scale)
    v.inverse, v.log_z, v.max = tile.state.inverse, tile.state.log_z, tile.state.max
    v.b, v.d = tile.result.b, tile.result.d
    if job.what == LOSS:
        v.out_exp = (zero - v.b) * v.factor * v.inverse
    else:
        v.out_exp = v.inverse
    v.out_hess1 = (zero - v.b) * v.factor
    v.out_hess2 = (v.b + v.d) * v.factor
    v.share = r_load_scalars(tile.share)
    v.ref = r_exp_reference(v.max)


cdef inline void pick_row(View *v, int i) noexcept nogil:
    """Row i's in every lane."""
    v.factor, v.inverse, v.log_z, v.max = lane(v.factor, i), lane(v.inverse, i), lane(v.log_z, i), lane(v.max, i)
    v.out_exp, v.out_hess1, v.out_hess2 = lane(v.out_exp, i), lane(v.out_hess1, i), lane(v.out_hess2, i)
    v.share = lane(v.share, i)
    v.ref = r_exp_reference(v.max)


cdef inline real lane(real a, int i) noexcept nogil:
    """Lane i in every lane."""
    cdef scalar lanes[LANES]
    r_store_scalars(lanes, a)
    return r_set(lanes[i])


cdef inline void set_entries(const Job *job, const Tile *tile) noexcept nogil:
    """Write the derivatives at the top entries and at the labels, which entry by entry would have lost their accuracy."""
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
    if job.at[WHERE].data != NULL:
        if (tile.at[WHERE] + i * job.at[WHERE].rows + c * job.at[WHERE].classes)[0] == 0:
            return
    if job.want_grad:
        s_store(<storage *>(tile.at[GRAD] + i * job.at[GRAD].rows + c * job.at[GRAD].classes), grad)
    if job.want_hess:
        s_store(<storage *>(tile.at[HESS] + i * job.at[HESS].rows + c * job.at[HESS].classes), hess)


cdef inline void clear_row(const Job *job, const Tile *tile, int i) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(job.n_classes):
        if job.want_grad:
            s_store(<storage *>(tile.at[GRAD] + i * job.at[GRAD].rows + c * job.at[GRAD].classes), 0)
        if job.want_hess:
            s_store(<storage *>(tile.at[HESS] + i * job.at[HESS].rows + c * job.at[HESS].classes), 0)


cdef void wide_tile(const Job *job, Tile *tile, real *stage) noexcept nogil:
    cdef Py_ssize_t vectors = (job.n_classes + LANES - 1) // LANES
    cdef int kind = first_reading(job), keep = FORGET, i
    cdef View v
    cdef real sums[TERMS]
    if keeps_exp(job) and job.level != FULL and job.want_grad and not STORAGE_IS_16_BIT:
        keep = IN_GRAD
    elif keeps_exp(job) and (job.level == FULL or STORAGE_IS_16_BIT) and tile.n * vectors <= STAGE:
        keep = STAGED
    for i in range(tile.n):
        if tile.status[i] == IGNORED:
            continue
        look(job, tile, &v, i)
        if job.level == FULL:
            top_wide_full(job, &v, &tile.max[i], &tile.top[i])
        else:
            top_wide(job, &v, &tile.max[i], &tile.top[i])
        if tile.label[i] >= 0:
            tile.label_logit[i] = logit_of(job, tile, i, tile.label[i])
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
    if job.dense and not job.linear:
        for i in range(tile.n):
            if tile.status[i] != IGNORED:
                look(job, tile, &v, i)
                set_outputs(job, tile, &v)
                pick_row(&v, i)
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
            clear_row(job, tile, i)
            continue
        look(job, tile, &v, i)
        set_outputs(job, tile, &v)
        pick_row(&v, i)
        v.kept_exp = stage + i * vectors
        write_rows(job, &v, 1, keep)
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
            prefetch(p + c)
    if job.want_grad and job.at[GRAD].classes == sizeof(storage) and job.at[GRAD].rows == size:
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
    v.ref = r_exp_reference(v.max)
    v.share, v.label_logit = r_load_scalars(tile.share), r_load_scalars(tile.label_logit)
    sum_rows(job, &v, kind, keep, sums)
    r_store_scalars(tile.sums[0], sums[0])
    if kind != SUM_EXP:
        r_store_scalars(tile.sums[1], sums[1])
        r_store_scalars(tile.sums[2], sums[2])
    tile.state = row_close(v.max, sums[0])
    if job.dense and not job.linear:
        set_outputs(job, tile, &v)
        sum_rows(job, &v, SUM_PHI, FORGET, sums)
        for i in range(TERMS):
            r_store_scalars(tile.phi_sums[i], sums[i])
    if job.what == LOSS:
        finish(job, tile)
    if not job.writes:
        return
    set_outputs(job, tile, &v)
    v.active = r_not(r_eq(r_load_scalars(active), r_set(0)))
    if keep == STAGED and job.want_grad and lies_in_rows(job, v.at[GRAD], GRAD, tile.n):
        v.turned_grad = stage
    write_rows(job, &v, tile.n, keep)
    if v.turned_grad != NULL:
        turn_out(stage, job.n_classes, v.at[GRAD], v.lane[GRAD])
    if job.what == LOSS:
        set_entries(job, tile)


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
        (<scalar *>(tile.at[k] + i * job.at[k].rows))[0] = 0 if zero_if_ignored and tile.status[i] == IGNORED else lanes[i]


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
    cdef int i
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
        if tile.sums[0][i] != tile.sums[0][i]:
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


cdef double unit(const Job *job, Py_ssize_t index) noexcept nogil:
    """Work off a portion of rows; the sum of their losses."""
    cdef Py_ssize_t row = index * job.unit_rows, first = row, end = min(row + job.unit_rows, job.n_rows), left
    cdef double values[UNIT_ROWS]
    cdef scalar lanes[LANES]
    cdef real stage[STAGE]
    cdef Tile tile
    cdef int n, i
    while row < end:
        left = min(end - row, job.run - row % job.run)
        n = <int>min(left, <Py_ssize_t>job.tile_rows)
        open_tile(job, &tile, row, n)
        if job.wide:
            wide_tile(job, &tile, stage)
        else:
            many_tile(job, &tile, stage)
        if job.what == STATS or job.what == STATE:
            put_stats(job, &tile)
        elif job.what == LOGSUMEXP:
            put_lse(job, &tile)
        elif job.what == LOSS:
            put_rows(job, &tile, VALUE, tile.result.value, True)
            r_store_scalars(lanes, tile.result.value)
            for i in range(n):
                values[row - first + i] = 0 if tile.status[i] == IGNORED else lanes[i]
        row += n
    return sum_of_doubles(values, end - first) if job.what == LOSS else 0


# ---- from arrays to a job ------------------------------------------------------------------------------------------

cdef struct Plan:
    int axes                                  # of rows
    Py_ssize_t shape[MAX_AXES]
    Py_ssize_t strides[OPERANDS][MAX_AXES]


cdef void place(Job *job, Plan *plan, int k, object array, int axis) except *:
    """Enter an operand: with its class axis (X, Q, WHERE, GRAD, HESS), or of the rows' shape (axis -1)."""
    cdef cnp.ndarray a
    cdef int i, j = 0
    if array is None:
        return
    a = <cnp.ndarray>array
    job.at[k].data = cnp.PyArray_BYTES(a)
    for i in range(cnp.PyArray_NDIM(a)):
        if i == axis:
            job.at[k].classes = cnp.PyArray_STRIDE(a, i)
        else:
            plan.strides[k][j] = cnp.PyArray_STRIDE(a, i)
            j += 1


cdef void merge_axes(Job *job, Plan *plan) noexcept:
    """Join neighbouring axes of rows that every operand walks in one stride; the order of the rows stays."""
    cdef int axis, last = -1, k
    cdef bint joins
    for axis in range(plan.axes):
        if plan.shape[axis] == 1:
            continue
        joins = last >= 0
        if joins:
            for k in range(OPERANDS):
                if job.at[k].data != NULL and plan.strides[k][last] != plan.strides[k][axis] * plan.shape[axis]:
                    joins = False
        if joins:
            plan.shape[last] *= plan.shape[axis]
        else:
            last += 1
            plan.shape[last] = plan.shape[axis]
        for k in range(OPERANDS):
            plan.strides[k][last] = plan.strides[k][axis]
    job.outer_axes = last if last > 0 else 0
    job.run = plan.shape[last] if last >= 0 else 1
    for axis in range(job.outer_axes):
        job.outer_shape[axis] = plan.shape[axis]
    for k in range(OPERANDS):
        job.at[k].rows = plan.strides[k][last] if last >= 0 else 0
        for axis in range(job.outer_axes):
            job.at[k].outer[axis] = plan.strides[k][axis]


cdef double work(const Job *job, int n_threads) except? -1.0:
    """All units; the sum of the losses. Raises KeyboardInterrupt between chunks."""
    cdef Py_ssize_t n_units = (job.n_rows + job.unit_rows - 1) // job.unit_rows, first = 0, last, i
    cdef Py_ssize_t chunk = max(CHUNK_LOGITS // (job.unit_rows * job.n_classes), <Py_ssize_t>1)
    cdef double sums[CHUNK_UNITS]
    cdef double total = 0
    if chunk > CHUNK_UNITS:
        chunk = CHUNK_UNITS
    while True:
        last = min(first + chunk, n_units)
        with nogil:
            if n_threads == 1 or last - first == 1:
                for i in range(last - first):
                    sums[i] = unit(job, first + i)
            else:
                for i in prange(last - first, num_threads=n_threads, schedule="dynamic"):
                    sums[i] = unit(job, first + i)
        total += sum_of_doubles(sums, last - first)
        first = last
        if first == n_units:
            return total
        PyErr_CheckSignals()


def scan_labels(label, int label_kind, Py_ssize_t n_classes, long long ignore_index):
    """The place of the first label of a one-dimensional array that is neither a class nor `ignore_index`, or -1."""
    cdef cnp.ndarray a = <cnp.ndarray>label
    cdef const char *p = cnp.PyArray_BYTES(a)
    cdef Py_ssize_t n = cnp.PyArray_DIM(a, 0), stride = cnp.PyArray_STRIDE(a, 0), i = 0, k, end
    cdef const int64_t *longs
    cdef bint bad
    with nogil:
        if label_kind == -8 and stride == 8 and <size_t>p % 8 == 0:
            while i < n:                                # the common case, a vector at a time
                longs = <const int64_t *>p
                end = min(i + 512, n)
                bad = False
                for k in range(i, end):
                    bad |= (<uint64_t>longs[k] >= <uint64_t>n_classes) & (longs[k] != ignore_index)
                if bad:
                    break
                i = end
        while i < n:
            if not is_label(p + i * stride, label_kind, n_classes, ignore_index):
                break
            i += 1
    return i if i < n else -1


cdef inline bint is_label(const char *p, int kind, Py_ssize_t n_classes, long long ignore_index) noexcept nogil:
    cdef Label label = label_at(p, kind, n_classes, ignore_index)
    return label.status != INVALID


def denominator(label, int label_kind, Py_ssize_t n_classes, long long ignore_index, weight, sample_weight):
    """The sum of class weight times sample weight over the rows with a class; one-dimensional arrays."""
    cdef cnp.ndarray a = <cnp.ndarray>label
    cdef const char *p = cnp.PyArray_BYTES(a)
    cdef Py_ssize_t n = cnp.PyArray_DIM(a, 0), stride = cnp.PyArray_STRIDE(a, 0), i, count = 0
    cdef const scalar *w = NULL
    cdef const char *s = NULL
    cdef Py_ssize_t s_stride = 0
    cdef Label found
    cdef double sums[8]
    cdef double term, return_value
    if weight is not None:
        w = <const scalar *>cnp.PyArray_DATA(<cnp.ndarray>weight)
    if sample_weight is not None:
        s = cnp.PyArray_BYTES(<cnp.ndarray>sample_weight)
        s_stride = cnp.PyArray_STRIDE(<cnp.ndarray>sample_weight, 0)
    with nogil:
        if w == NULL and s == NULL:
            if label_kind == -8 and stride == 8 and <size_t>p % 8 == 0:
                for i in range(n):
                    count += (<const int64_t *>p)[i] != ignore_index
            else:
                for i in range(n):
                    count += label_at(p + i * stride, label_kind, n_classes, ignore_index).status != IGNORED
            return_value = <double>count
        else:
            for i in range(8):
                sums[i] = 0
            for i in range(n):
                found = label_at(p + i * stride, label_kind, n_classes, ignore_index)
                if found.status == ACTIVE:
                    term = 1 if w == NULL else w[found.value]
                    if s != NULL:
                        term *= (<const scalar *>(s + i * s_stride))[0]
                    sums[i % 8] += term
            return_value = sum_of_doubles(sums, 8)
    return return_value


PHI = {(<bytes>PHI_NAMES[_i]).decode(): _i for _i in range(PHI_COUNT)}


def run(
    int what, int phi, double parameter, logits, int axis, label, int label_kind, q, where, weight, sample_weight,
    long long ignore_index, double label_smoothing, double temperature, double softcap, double z_loss, double scale,
    value, grad, hess, label_logit, top, rank, spread, linear, int n_threads,
):
    """Compute what is asked for into the arrays that are not None; the sum of the losses.

    All arrays are checked: native byte order, logits, q, grad and hess of this module's storage type, weight and sample_weight
    and the outputs of rows of its scalar type, shapes as they must be, at least one row and one class.
    `label_kind` is the size of the labels' type in bytes, negative for a signed one.
    """
    cdef Job job
    cdef Plan plan
    cdef cnp.ndarray x = <cnp.ndarray>logits
    cdef int i, j = 0
    memset(&job, 0, sizeof(Job))
    job.what, job.phi, job.parameter = what, phi, <scalar>parameter
    plan.axes = cnp.PyArray_NDIM(x) - 1
    job.n_rows = 1
    for i in range(plan.axes + 1):
        if i != axis:
            plan.shape[j] = cnp.PyArray_DIM(x, i)
            job.n_rows *= plan.shape[j]
            j += 1
    job.n_classes = cnp.PyArray_DIM(x, axis)
    place(&job, &plan, X, x, axis)
    place(&job, &plan, Q, q, axis)
    place(&job, &plan, WHERE, where, axis)
    place(&job, &plan, GRAD, grad, axis)
    place(&job, &plan, HESS, hess, axis)
    place(&job, &plan, LABEL, label, -1)
    place(&job, &plan, SAMPLE, sample_weight, -1)
    place(&job, &plan, VALUE, value, -1)
    place(&job, &plan, LABEL_LOGIT, label_logit, -1)
    place(&job, &plan, TOP, top, -1)
    place(&job, &plan, RANK, rank, -1)
    place(&job, &plan, SPREAD, spread, -1)
    place(&job, &plan, LINEAR, linear, -1)
    merge_axes(&job, &plan)
    for i in range(OPERANDS):
        if job.at[i].data != NULL:
            job.used[job.n_used] = i
            job.n_used += 1
    job.label_kind, job.ignore_index = label_kind, ignore_index
    if weight is not None:
        job.weight = <const scalar *>cnp.PyArray_DATA(<cnp.ndarray>weight)
    job.label_smoothing = <scalar>label_smoothing
    job.label_share = <scalar>(1 - label_smoothing)
    job.share = <scalar>(label_smoothing / job.n_classes) if what != STATE else 1
    job.z_loss, job.scale = <scalar>z_loss, <scalar>scale
    job.transform.softcap, job.transform.temperature = <scalar>softcap, <scalar>temperature
    job.transforms = softcap != 0 or temperature != 1
    job.linear = phi == PHI_CROSS_ENTROPY
    job.dense = what == STATE or (what == LOSS and (q is not None or label_smoothing != 0))
    job.want_grad, job.want_hess = grad is not None, hess is not None
    job.writes = job.want_grad or job.want_hess
    job.wide = (
        (job.at[X].classes == sizeof(storage) and job.n_classes > MANY_UP_TO) or job.n_classes > MANY_AT_MOST
    )
    job.level = FULL
    if not job.transforms and where is None and what != STATS and (job.linear or not job.dense) and (
        not job.wide or adjacent(&job)
    ):
        job.level = DENSE if job.dense else SPARSE
    # a wide tile takes as many rows as the stage holds, so that their finishing shares the lanes
    job.tile_rows = LANES
    if job.wide:
        job.tile_rows = <int>max(min(<Py_ssize_t>LANES, STAGE * LANES // (2 * job.n_classes)), <Py_ssize_t>1)
    job.unit_rows = UNIT_ROWS
    while job.unit_rows > 1 and job.unit_rows * job.n_classes > UNIT_LOGITS:
        job.unit_rows //= 2
    return work(&job, n_threads)


cdef bint adjacent(const Job *job) noexcept:
    """Whether the classes of all operands lie side by side."""
    cdef int k
    for k in range(ENTRY_OPERANDS):
        if job.at[k].data != NULL and job.at[k].classes != sizeof(storage):
            return False
    return True
