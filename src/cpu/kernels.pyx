# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, freethreading_compatible=True
"""The schedules of the softmax losses on a CPU: how rows are read, summed and written, and by which thread.

A row is one softmax: all classes of one sample. Rows are worked off in tiles of up to LANES rows, in three steps:

1. read the logits: the maximum, where it is (the *top* entry), and the sum of exp over all other entries;
2. finish up to LANES rows at once, one in each lane (``row_finish`` of formulas.h);
3. write gradient and Hessian diagonal, and set right the two entries where p - 1 would have cancelled.

Two schedules do steps 1 and 3. *wide* puts the lanes along the classes of one row, *many* puts LANES rows into the
lanes and walks over the classes. Both add in the same order: class c belongs to virtual lane c mod VIRTUAL, eight terms
of a lane make a block, blocks are added in double precision of the type, lanes are added pairwise. So a row has the
same bits in any schedule, layout, batch or thread.

This file is compiled once for each instruction set and storage type (see primitives.h); it knows no loss.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_New
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport parallel, threadid

cimport numpy as cnp

cnp.import_array()

cdef extern from "cpu/interrupt.h" nogil:
    ctypedef struct xce_watch:
        Py_ssize_t units, taken
    void xce_watch_begin(xce_watch *watch)
    int xce_watch_end(const xce_watch *watch) except -1
    bint xce_look(xce_watch *watch)
    void xce_begin(xce_watch *watch)
    Py_ssize_t xce_take(xce_watch *watch)
    void xce_end(xce_watch *watch)

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
        FIRST_DIVERGENCE "DIVERGENCE_forward"
    const scalar INF "XCE_INF"
    const scalar NAN "XCE_NAN"
    const char *const *PHI_NAMES "XCE_PHI_NAMES"

    ctypedef struct real_sum:
        real high, low
    ctypedef struct exp_reference:
        pass
    ctypedef struct real_pair:
        real high, low
    ctypedef struct exp_pair:
        real_pair exp, expm1
    ctypedef struct log_prob:
        real u, p, not_p, low
    ctypedef struct distance_pair:
        real_pair x, y, gap
    ctypedef struct prob_pair:
        real p, t, d, above_top, d_low
    ctypedef struct row_match:
        pass
    ctypedef struct row_factors:
        real factor, b, d, far, exp, hess1, hess2
    ctypedef struct row_sums:
        real value, d1, d2, extra
    ctypedef struct jet:
        real value, d1, d2
    ctypedef struct scalar_pair:
        scalar high, low
    ctypedef struct logit_transform:
        scalar_pair softcap, temperature
    ctypedef struct logit_origin:
        real max
    ctypedef struct row_state:
        exp_reference ref
        real max, greatest, rest_low, inverse, log_z
    ctypedef struct row_slope:
        pass
    ctypedef struct row_target:
        real factor, weight, index, d_top, d_label
        row_sums sum
        scalar z_loss
        real_pair label_entry
        rmask label_is_top
    ctypedef struct row_result:
        real value, b, d, far, grad_top, hess_top, grad_label, hess_label, slope

    real r_set(scalar a)
    real r_iota()
    real r_abs(real a)
    real r_max(real a, real b)
    rmask r_gt(real a, real b)
    rmask r_eq(real a, real b)
    rmask r_not(rmask m)
    rmask r_first_lanes(int n)
    rmask r_lanes_in(unsigned bits)
    unsigned r_lanes_of(rmask m)
    int lowest_bit(unsigned bits)
    real r_select(rmask m, real a, real b)
    scalar r_max_of_lanes(real a)
    scalar r_sum_of_lanes(real a)
    real r_load_scalars(const scalar *p)
    void r_store_scalars(scalar *p, real a)
    void prefetch(const char *p)
    void prefetch_far(const char *p)
    void prefetch_to_write(const char *p)
    real r_load(const storage *p)
    real r_load_part(const storage *p, int n, scalar fill)
    void r_store(storage *p, real a)
    void r_store_part(storage *p, real a, int n)
    real r_gather(const char *p, Py_ssize_t stride, int n, scalar fill)
    void r_scatter(char *p, Py_ssize_t stride, real a, int n)
    void stream(char *to, const char *from_, size_t n)
    void stream_end()
    void turn_in(const char *rows, Py_ssize_t stride, Py_ssize_t n, real *vectors)
    void turn_out(const real *vectors, Py_ssize_t n, char *rows, Py_ssize_t stride)
    rmask r_gather_bytes(const char *p, Py_ssize_t stride, int n)
    exp_reference r_exp_reference(real max)
    real r_exp_relative(real x, exp_reference ref)
    real r_exp_relative_pair(real_pair x, exp_reference ref)
    exp_pair steep_exp(real_pair x)
    exp_pair r_exp_pair_near(real_pair x)
    ctypedef struct steep_term:
        real high, middle, low
    steep_term steep_summand(real_pair e)
    real_pair steep_total(steep_term sums)
    bint is_steep(int phi, scalar parameter)
    real_sum r_sum_add(real_sum s, real a)
    real r_add8(const real *a)
    row_state row_close(real max, real rest)
    real row_lse(row_state s)
    row_state row_close_transformed(logit_transform t, real max, real rest)
    scalar label_share(double smoothing)
    scalar smoothing_share(double smoothing, int64_t n_classes)
    scalar share_of_left(double smoothing, scalar n_left)
    real dense_coefficient(real share, scalar kept, real q)
    scalar label_coefficient(int status, int64_t label, scalar kept, const scalar *weight)
    real top_coefficient(real d_top, real index, rmask is_label)
    scalar nll_value(int status, scalar a, scalar log_prob)
    scalar filled_entry(int status, scalar factor)
    log_prob log_prob_of(real max, real log_z, real_pair x, real p)
    real below_top(real a, real max, real x)
    real row_entropy(row_state s, real sum)
    real row_spread(row_state s)
    row_slope slope_of_top(row_state s, real a_top, int phi, scalar parameter)
    void relative_finish(row_result *r, row_state s, row_target t, row_slope slope, int phi, scalar parameter)
    row_sums relative_terms(row_slope top, log_prob at, real_pair x, real_pair e, real a, int phi, scalar parameter)
    row_sums linear_sums(row_state s, real distances, real weights)
    row_factors loss_factors(row_result r, real factor, real inverse)
    row_factors match_factors(int divergence, row_match row, row_result r, real factor)
    jet entry_derivatives(row_factors f, real inverse, real e)
    real linear_derivative(row_factors f, real grad, real d)
    void relative_derivatives(row_factors f, jet *at, real slope, real d2)
    row_result row_finish(row_state s, row_target t, int phi, scalar parameter)
    real total_of(real_pair a)
    real exp_difference(real a, real b, real d)
    prob_pair match_gap(row_match row, real x_exp, real y_exp, real_pair gap)
    prob_pair match_entry(row_match row, distance_pair at)
    row_match match_rows(row_state student, row_state teacher, real excess, real_pair y)
    jet divergence_term(int divergence, prob_pair at, row_match row)
    row_sums match_terms(real p, jet f)
    jet match_derivatives(int divergence, jet f, real p, row_factors row)
    row_result match_finish(
        row_state student, row_match row, row_sums sums, real_pair y, real weight, real factor, int divergence
    )
    void add_far(real far, real factor, real p, real not_p, real *grad, real *hess)
    logit_transform transform_of(double softcap, double temperature)
    logit_origin transform_origin(logit_transform t, real max)
    real_pair distance_by_temperature(logit_transform t, logit_origin o, real x)
    distance_pair distances_of_pair(logit_transform t, logit_origin student, logit_origin teacher, real x, real y)
    real_pair distance_by_softcap(logit_transform t, logit_origin o, real x)
    real transform_logit(logit_transform t, real x)
    void transform_derivatives(logit_transform t, real x, real *g, real *h)
    void transform_result(logit_transform t, row_result *r, real raw_top, real raw_label)

cdef extern from "cpu/numbers.h" nogil:
    double read_number(const char *p, int kind)
    scalar read_scalar(const char *p, int kind)
    void write_scalar(char *p, int kind, scalar a)
    void write_number(char *p, int kind, scalar a)
    real r_gather_numbers(const char *p, Py_ssize_t stride, int n, scalar fill, int kind)
    void r_scatter_numbers(char *p, Py_ssize_t stride, real a, int n, int kind)
    Py_ssize_t size_of_kind(int kind)
    bint read_label(const char *p, int kind, int64_t *label)

include "front.pxi"
include "job.pxi"
include "entries.pxi"
include "rows.pxi"
include "teacher.pxi"
include "tiles.pxi"
include "elements.pxi"

cdef Py_ssize_t DESK_VECTORS = (sizeof(Desk) + sizeof(real) - 1) // sizeof(real)

# ---- from arrays to a job ------------------------------------------------------------------------------------------

cdef struct Plan:
    int axes                                  # of rows
    Py_ssize_t shape[MAX_AXES]
    Py_ssize_t strides[OPERANDS][MAX_AXES]


cdef struct Order:
    Job job
    Job teacher
    Plan plan
    xce_watch watch


cdef void place(Job *job, Plan *plan, int k, object array, int axis) except *:
    """Enter an operand: with its class axis (X, Q, WHERE, GRAD, HESS), or of the rows' shape (axis -1)."""
    cdef cnp.ndarray a
    cdef int i, j = 0
    if array is None:
        return
    a = <cnp.ndarray>array
    job.at[k].data = cnp.PyArray_BYTES(a)
    job.kind[k] = kind_of(a)
    if k < ENTRY_OPERANDS and job.kind[k] == STORAGE_KIND or k == VALUE and job.kind[k] == SCALAR_KIND:
        job.kind[k] = 0
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


cdef double work(Job *job, int n_threads) except? -1.0:
    """All units; the sum of the losses."""
    cdef Py_ssize_t n_units = (job.n_rows + job.unit_rows - 1) // job.unit_rows, first = 0
    cdef Py_ssize_t chunk = max(CHUNK_LOGITS // job.unit_rows // job.n_classes, <Py_ssize_t>1)
    cdef Py_ssize_t desk = stage_vectors(job) + picked_vectors(job) + DESK_VECTORS
    cdef double total = 0
    cdef void *memory
    cdef real *desks
    cdef double *sums
    cdef xce_watch *watch = job.watch
    chunk = min(chunk, <Py_ssize_t>CHUNK_UNITS)
    n_threads = <int>min(<Py_ssize_t>n_threads, n_units)
    # not on the stack, which a caller's thread may have little of
    memory = PyMem_RawMalloc((n_threads * desk + 1) * sizeof(real) + min(chunk, n_units) * sizeof(double))
    if memory == NULL:
        raise MemoryError(f"{n_threads * desk * sizeof(real)} bytes for the work of {n_threads} threads")
    desks = <real *>(<size_t>memory + sizeof(real) - <size_t>memory % sizeof(real))
    sums = <double *>(desks + n_threads * desk)
    xce_watch_begin(watch)
    try:
        while first < n_units:
            watch.units, watch.taken = min(chunk, n_units - first), 0
            with nogil:
                if n_threads == 1 or watch.units == 1:
                    take_units(job, first, desks, desk, sums)
                else:
                    with parallel(num_threads=n_threads):
                        take_units(job, first, desks + threadid() * desk, desk, sums)
            xce_watch_end(watch)
            total += sum_of_doubles(sums, watch.units)
            first += watch.units
        return total
    finally:
        PyMem_RawFree(memory)


cdef void take_units(const Job *job, Py_ssize_t first, real *desk, Py_ssize_t vectors, double *sums) noexcept nogil:
    """A thread's part of a chunk: the next portion that nobody has, until there are no more."""
    cdef Py_ssize_t i
    xce_begin(job.watch)
    while True:
        i = xce_take(job.watch)
        if i < 0 or (i > 0 and xce_look(job.watch)):
            break
        sums[i] = unit(job, first + i, <Desk *>desk, desk + DESK_VECTORS)
    xce_end(job.watch)


cdef Py_ssize_t stage_vectors(const Job *job) noexcept nogil:
    """What a thread keeps between the readings of its rows, in vectors; at most STAGE."""
    cdef Py_ssize_t vectors = job.n_classes
    if job.keeps_pairs:
        return PARTS * pair_vectors(job) * (job.tile_rows if job.wide else 1)
    if job.wide:
        vectors = job.tile_rows * ((job.n_classes + LANES - 1) // LANES)
    if vectors > STAGE:
        return 0
    return 2 * vectors if job.streams or job.teacher != NULL else vectors


cdef Py_ssize_t picked_vectors(const Job *job) noexcept nogil:
    """Beyond that: student's and teacher's logits at the classes of a sparse teacher, and which classes these are."""
    cdef Py_ssize_t masks = (job.n_classes + LANES - 1) // LANES if job.wide else job.n_classes
    if not job.sparse_teacher:
        return 0
    return 2 * (job.teacher.n_classes + LANES) + masks * <Py_ssize_t>sizeof(uint16_t) // <Py_ssize_t>sizeof(real) + 1


cdef enum:
    MAX_WEIGHTS = 2


cdef struct Weights:
    Walk walks[MAX_WEIGHTS]
    int n


cdef void walk_weights(Weights *weights, tuple arrays) except *:
    """Enter up to two arrays of the rows' shape."""
    cdef int k
    weights.n = len(arrays)
    for k in range(weights.n):
        walk(&weights.walks[k], arrays[k])


cdef inline bint has_weight(const Weights *weights, Py_ssize_t flat) noexcept nogil:
    """Whether no weight of a row is 0."""
    cdef Py_ssize_t left
    cdef int k
    for k in range(weights.n):
        if read_number(place_in(&weights.walks[k], flat, &left), weights.walks[k].kind) == 0:
            return False
    return True


def scan_labels(label, Py_ssize_t n_classes, long long ignore_index, tuple weights):
    """The flat C-order index of the first label that is neither a class nor `ignore_index`, or -1.

    Labels are left out that one of the `weights` is 0 for, up to two arrays of their shape.
    """
    cdef Weights counting
    cdef Walk labels
    cdef const char *p
    cdef Py_ssize_t flat = 0, stop = cnp.PyArray_SIZE(<cnp.ndarray>label), stride, i, k, end, left
    cdef const int64_t *longs
    cdef bint bad, is_bad
    cdef int label_kind
    cdef xce_watch watch
    xce_watch_begin(&watch)
    walk(&labels, label)
    label_kind = labels.kind
    walk_weights(&counting, weights)
    stride = labels.strides[labels.axes - 1]
    with nogil:
        while flat < stop and not xce_look(&watch):
            p, i = place_in(&labels, flat, &left), 0
            left = min(left, stop - flat, <Py_ssize_t>LOOK_LABELS)
            if label_kind == -8 and stride == 8 and <size_t>p % 8 == 0:
                while i < left:                         # the common case, a vector at a time
                    longs = <const int64_t *>p
                    end = min(i + 512, left)
                    bad = False
                    for k in range(i, end):
                        bad |= (<uint64_t>longs[k] >= <uint64_t>n_classes) & (longs[k] != ignore_index)
                    if bad:
                        break
                    i = end
            while i < left:
                is_bad = not is_label(p + i * stride, label_kind, n_classes, ignore_index)
                if is_bad and has_weight(&counting, flat + i):
                    break
                i += 1
            flat += i
            if i < left:
                break
    xce_watch_end(&watch)
    return flat if flat < stop else -1


cdef inline bint is_label(const char *p, int kind, Py_ssize_t n_classes, long long ignore_index) noexcept nogil:
    cdef Label label = label_at(p, kind, n_classes, ignore_index)
    return label.status != INVALID


def scan_repetitions(indices, Py_ssize_t n_classes, tuple weights):
    """The flat number of the first row that has a class twice, and the smallest class that it has twice; or -1, -1.

    `indices` has the places of a row last. Rows are left out that one of the `weights` is 0 for, up to two arrays of
    the rows' shape.
    """
    cdef Walk rows
    cdef Weights counting
    cdef Py_ssize_t n_places = cnp.PyArray_DIM(<cnp.ndarray>indices, cnp.PyArray_NDIM(<cnp.ndarray>indices) - 1)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(<cnp.ndarray>indices, cnp.PyArray_NDIM(<cnp.ndarray>indices) - 1)
    cdef Py_ssize_t n_rows = cnp.PyArray_SIZE(<cnp.ndarray>indices) // n_places, row = 0, j, left
    cdef Py_ssize_t look_rows = max(LOOK_LABELS // n_places, <Py_ssize_t>1)
    cdef Py_ssize_t twice = -1
    cdef const char *p
    cdef Label label
    cdef uint8_t *seen                 # a bit for each class
    cdef xce_watch watch
    xce_watch_begin(&watch)
    walk(&rows, indices[..., 0])
    walk_weights(&counting, weights)
    seen = <uint8_t *>PyMem_RawCalloc((n_classes + 7) // 8, 1)
    if seen == NULL:
        raise MemoryError(f"{(n_classes + 7) // 8} bytes for the classes of a teacher")
    with nogil:
        while row < n_rows and not (row % look_rows == 0 and xce_look(&watch)):
            if has_weight(&counting, row):
                p = place_in(&rows, row, &left)
                for j in range(n_places):
                    if is_time_to_look(&watch, j):
                        break
                    label = label_at(p + j * stride, rows.kind, n_classes, -1)
                    if label.value < 0:
                        continue
                    if seen[label.value // 8] & <uint8_t>(1 << label.value % 8) and not 0 <= twice < label.value:
                        twice = label.value
                    seen[label.value // 8] |= <uint8_t>(1 << label.value % 8)
                if twice >= 0:
                    break
                for j in range(n_places):
                    if is_time_to_look(&watch, j):
                        break
                    label = label_at(p + j * stride, rows.kind, n_classes, -1)
                    if label.value >= 0:
                        seen[label.value // 8] = 0
            row += 1
    PyMem_RawFree(seen)
    xce_watch_end(&watch)
    return (row if twice >= 0 else -1), twice


def classes_are_left(where, cnp.ndarray out):
    """Write whether `where`, which has the classes last, leaves a row any; `out` is of the rows' shape, in C order."""
    cdef Walk masks
    cdef Py_ssize_t n_rows = cnp.PyArray_SIZE(out), flat = 0, n, i, left
    cdef Py_ssize_t n_classes = cnp.PyArray_DIM(<cnp.ndarray>where, cnp.PyArray_NDIM(<cnp.ndarray>where) - 1)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(<cnp.ndarray>where, cnp.PyArray_NDIM(<cnp.ndarray>where) - 1)
    cdef char *to = cnp.PyArray_BYTES(out)
    cdef const char *m
    cdef xce_watch watch
    xce_watch_begin(&watch)
    walk(&masks, where[..., 0])
    with nogil:
        while flat < n_rows and not xce_look(&watch):
            m = place_in(&masks, flat, &left)
            n = min(left, n_rows - flat, max(LOOK_LABELS // n_classes, <Py_ssize_t>1))
            for i in range(n):
                to[flat + i] = classes_left(
                    &watch, m + i * masks.strides[masks.axes - 1], n_classes, stride, False
                ) != 0
            flat += n
    xce_watch_end(&watch)


# What the rows' shares of the mean's denominator are made of.
cdef struct Shares:
    Walk labels
    Walk samples
    Walk masks
    const scalar *weight
    Py_ssize_t n_classes, class_stride
    int64_t ignore_index
    xce_watch *watch


def denominator(
    label, Py_ssize_t n_classes, long long ignore_index, weight, sample_weight, where, Py_ssize_t start, Py_ssize_t stop
):
    """The sum of class weight times sample weight over rows start..stop in C order, as far as they count.

    And whether any term is not 0. `where` has the classes last.
    """
    cdef Shares shares
    cdef xce_watch watch
    cdef bint any_term = False
    cdef double total
    xce_watch_begin(&watch)
    shares.watch, shares.n_classes, shares.ignore_index = &watch, n_classes, ignore_index
    shares.weight, shares.class_stride = NULL, 0
    walk(&shares.labels, label)
    walk(&shares.samples, sample_weight)
    walk(&shares.masks, None if where is None else where[..., 0])
    if weight is not None:
        shares.weight = <const scalar *>cnp.PyArray_DATA(<cnp.ndarray>weight)
    if where is not None:
        shares.class_stride = cnp.PyArray_STRIDE(<cnp.ndarray>where, cnp.PyArray_NDIM(<cnp.ndarray>where) - 1)
    with nogil:
        total = sum_of_shares(&shares, start, stop, &any_term)
    xce_watch_end(&watch)
    return total, any_term


cdef double sum_of_shares(const Shares *of, Py_ssize_t start, Py_ssize_t stop, bint *any_term) noexcept nogil:
    cdef const char *y = NULL
    cdef const char *s = NULL
    cdef const char *m = NULL
    cdef const scalar *w = of.weight
    cdef Py_ssize_t y_stride = of.labels.strides[of.labels.axes - 1] if of.labels.data != NULL else 0
    cdef Py_ssize_t s_stride = of.samples.strides[of.samples.axes - 1] if of.samples.data != NULL else 0
    cdef Py_ssize_t m_stride = of.masks.strides[of.masks.axes - 1] if of.masks.data != NULL else 0
    cdef Py_ssize_t flat = start, i, k, count = 0, n, left
    cdef Label found
    cdef double sums[8]
    cdef double lows[8]                # what the sums round away: it would be an error that all gradients share
    cdef double term, total
    cdef scalar sample
    for i in range(8):
        sums[i] = lows[i] = 0
    found.status, found.value = ACTIVE, 0
    while flat < stop and not xce_look(of.watch):
        n = min(stop - flat, <Py_ssize_t>LOOK_LABELS)
        if of.labels.data != NULL:
            y = place_in(&of.labels, flat, &left)
            n = min(n, left)
        if of.samples.data != NULL:
            s = place_in(&of.samples, flat, &left)
            n = min(n, left)
        if of.masks.data != NULL:
            m = place_in(&of.masks, flat, &left)
            n = min(n, left, max(LOOK_LABELS // of.n_classes, <Py_ssize_t>1))
        if w == NULL and s == NULL and m == NULL and of.labels.kind == -8 and y_stride == 8 and <size_t>y % 8 == 0:
            count = 0
            for i in range(n):
                count += (<const int64_t *>y)[i] != of.ignore_index
            sums[0] += <double>count
        else:
            for i in range(n):
                sample = 1 if s == NULL else read_scalar(s + i * s_stride, of.samples.kind)
                if sample == 0:
                    continue
                if m != NULL and not classes_left(of.watch, m + i * m_stride, of.n_classes, of.class_stride, False):
                    continue
                if y != NULL:
                    found = label_at(y + i * y_stride, of.labels.kind, of.n_classes, of.ignore_index)
                term = 1 if found.status == ACTIVE or (w == NULL and found.status == INVALID) else 0
                if w != NULL and found.status == ACTIVE:
                    term = w[found.value]
                if s != NULL:
                    term *= sample
                k = (flat - start + i) % 8
                add_keeping(&sums[k], &lows[k], term)
                any_term[0] |= term != 0
        flat += n
    total = sum_of_doubles(sums, 8)
    return total + sum_of_doubles(lows, 8) if total - total == 0 else total


PHI = {(<bytes>PHI_NAMES[_i]).decode(): _i for _i in range(FIRST_DIVERGENCE)}
DIVERGENCES = {(<bytes>PHI_NAMES[_i]).decode(): _i for _i in range(FIRST_DIVERGENCE, PHI_COUNT)}


NUMBERS = tuple([(<bytes>XCE_OPTION_NAMES[_i]).decode() for _i in range(OPTIONS)])
cdef tuple OPERAND_NAMES = tuple([(<bytes>XCE_OPERAND_NAMES[_i]).decode() for _i in range(OPERANDS)])


def run(int what, int phi, numbers, long long ignore_index, dict operands, int axis, double scale, int n_threads):
    """Compute what is asked for into the arrays that are not None; the sum of the losses.

    All arrays are checked: shapes as they must be, at least one row and one class. `numbers` are `row_options`. The
    logits (`x`), the probabilities or the teacher's logits (`q`), `grad`, `hess`, `sample` (weights) and `value`
    are of floats of any type, `label` and `indices`, the classes of a sparse teacher, of any numbers; the class
    weights and other outputs of rows are of this module's scalar type.
    """
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, sizeof(Order))  # not on the stack, as in `work`
    cdef Order *order = <Order *>PyBytes_AS_STRING(memory)
    cdef Job *job = &order.job
    cdef Plan *plan = &order.plan
    cdef cnp.ndarray x = <cnp.ndarray>operands["x"]
    cdef Py_ssize_t teacher_classes = 0
    cdef int i, j = 0
    memset(job, 0, sizeof(Job))
    for i in range(OPTIONS):
        (<double *>&job.options)[i] = numbers[i]
    job.what, job.phi, job.ignore_index, job.scale = what, phi, ignore_index, <scalar>scale
    plan.axes = cnp.PyArray_NDIM(x) - 1
    job.n_rows = 1
    for i in range(plan.axes + 1):
        if i != axis:
            plan.shape[j] = cnp.PyArray_DIM(x, i)
            job.n_rows *= plan.shape[j]
            j += 1
    job.n_classes = cnp.PyArray_DIM(x, axis)
    for i in range(OPERANDS):
        place(job, plan, i, operands.get(OPERAND_NAMES[i]), axis if i < ENTRY_OPERANDS or i == INDICES else -1)
    merge_axes(job, plan)
    weight = operands.get("weight")
    if weight is not None:
        job.weight = <const scalar *>cnp.PyArray_DATA(<cnp.ndarray>weight)
    if phi >= FIRST_DIVERGENCE:
        teacher_classes = cnp.PyArray_DIM(<cnp.ndarray>operands["q"], axis)
    return compute(order, teacher_classes, n_threads)


cdef int run_plain_rows(plain_rows *given) except -1:
    """Compute a call of the plain kind; 0 if its denominator is not, and nothing is computed."""
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, sizeof(Order))
    cdef Order *order = <Order *>PyBytes_AS_STRING(memory)
    cdef Job *job = &order.job
    if given.is_mean and (given.weight != NULL or given.sample != NULL):
        given.denominator = sum_of_plain_shares(given)
        if given.denominator == 0 or not FLOAT32_ABOVE < abs(given.denominator) < FLOAT32_BELOW:
            return 0
    memset(job, 0, sizeof(Job))
    job.options = given.options
    job.what, job.phi, job.ignore_index = LOSS, given.phi, given.ignore_index
    job.scale = <scalar>(1 / given.denominator) if given.denominator != 0 else 0
    job.n_rows = job.run = given.n_rows
    job.n_classes, job.weight = given.n_classes, <const scalar *>given.weight
    place_plain(job, X, <char *>given.x)
    place_plain(job, GRAD, <char *>given.grad)
    place_plain(job, HESS, <char *>given.hess)
    job.at[LABEL].data, job.at[LABEL].rows, job.kind[LABEL] = <char *>given.labels, sizeof(int64_t), -8
    job.at[SAMPLE].data, job.at[SAMPLE].rows = <char *>given.sample, given.sample_bytes
    job.kind[SAMPLE] = 16 + given.sample_bytes
    job.at[VALUE].data, job.at[VALUE].rows = <char *>given.value, sizeof(scalar)
    given.total = compute(order, 0, given.n_threads)
    return 1


cdef void place_plain(Job *job, int k, char *data) noexcept:
    job.at[k].data, job.at[k].classes, job.at[k].rows = data, sizeof(storage), job.n_classes * sizeof(storage)


cdef double sum_of_plain_shares(const plain_rows *given) except? -1.0:
    cdef Shares shares
    cdef bint any_term = False
    cdef xce_watch watch
    cdef double total
    xce_watch_begin(&watch)
    shares.watch, shares.n_classes, shares.ignore_index = &watch, given.n_classes, given.ignore_index
    shares.weight, shares.class_stride = <const scalar *>given.weight, 0
    walk_plain(&shares.labels, <char *>given.labels, sizeof(int64_t), -8, given.n_rows)
    walk_plain(&shares.samples, <char *>given.sample, given.sample_bytes, 16 + given.sample_bytes, given.n_rows)
    walk_plain(&shares.masks, NULL, 0, 0, 0)
    with nogil:
        total = sum_of_shares(&shares, 0, given.n_rows, &any_term)
    xce_watch_end(&watch)
    return total


cdef int run_plain_elements(plain_elements *given) except -1:
    """Compute losses of single elements that lie side by side, in this module's storage type."""
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, sizeof(Elements))
    cdef Elements *job = <Elements *>PyBytes_AS_STRING(memory)
    cdef int k
    for k in range(E_ARRAYS):
        job.walks[k].data = NULL
    walk_plain(&job.walks[E_X], <char *>given.x, sizeof(storage), 0, given.n)
    walk_plain(&job.walks[E_Y], <char *>given.y, sizeof(storage), 0, given.n)
    walk_plain(&job.walks[E_VALUE], <char *>given.value, sizeof(scalar), SCALAR_KIND, given.n)
    walk_plain(&job.walks[E_GRAD], <char *>given.grad, sizeof(storage), 0, given.n)
    walk_plain(&job.walks[E_HESS], <char *>given.hess, sizeof(storage), 0, given.n)
    job.n, job.scale, job.row = given.n, <scalar>given.scale, 0
    given.total = compute_elements(job, given.formula, given.params, given.n_threads)
    return 1


PLAIN_ROWS = PyCapsule_New(<void *>run_plain_rows, XCE_PLAIN_ROWS, NULL)
PLAIN_ELEMENTS = PyCapsule_New(<void *>run_plain_elements, XCE_PLAIN_ELEMENTS, NULL)


cdef double compute(Order *order, Py_ssize_t teacher_classes, int n_threads) except? -1.0:
    """Compute a job whose arrays are entered, and what follows from them and its options is not."""
    cdef Job *job = &order.job
    cdef Job *teacher = &order.teacher
    cdef row_options given = job.options
    cdef int i, what = job.what, phi = job.phi
    cdef bint is_foreign, is_general
    job.watch = &order.watch
    for i in range(OPERANDS):
        if job.at[i].data != NULL:
            job.used[job.n_used] = i
            job.n_used += 1
    is_foreign = job.kind[X] != 0 or job.kind[Q] != 0 or job.kind[GRAD] != 0 or job.kind[HESS] != 0
    job.parameter, job.z_loss = <scalar>given.parameter, <scalar>given.z_loss
    job.label_share = label_share(given.label_smoothing)
    job.share = smoothing_share(given.label_smoothing, job.n_classes) if what != STATE else 1
    job.transform = transform_of(given.softcap, given.temperature)
    job.transforms = given.softcap != 0 or given.temperature != 1
    job.linear = phi == PHI_CROSS_ENTROPY
    job.sparse_teacher = job.at[INDICES].data != NULL
    job.dense = what == STATE or (
        what == LOSS and not job.sparse_teacher and (job.at[Q].data != NULL or given.label_smoothing != 0)
    )
    job.relative = job.dense and not job.linear and phi < FIRST_DIVERGENCE
    job.steep = what == LOSS and is_steep(phi, job.parameter)
    job.by_distance = job.transforms or job.relative or job.steep or phi >= FIRST_DIVERGENCE
    job.want_grad, job.want_hess = job.at[GRAD].data != NULL, job.at[HESS].data != NULL
    job.writes = job.want_grad or job.want_hess
    job.wide = (
        (job.at[X].classes == size_of_kind(job.kind[X]) and job.n_classes > MANY_UP_TO) or job.n_classes > MANY_AT_MOST
    )
    job.level = FULL
    is_general = given.softcap != 0 or job.at[WHERE].data != NULL or is_foreign or what == STATS
    if not is_general and (not job.wide or adjacent(job)):
        job.level = MIXED
        if not job.by_distance:
            job.level = DENSE if job.dense else SPARSE
    job.keeps_pairs = (
        (job.relative or (phi >= FIRST_DIVERGENCE and not job.sparse_teacher))
        and PARTS * pair_vectors(job) <= STAGE
    )
    if phi >= FIRST_DIVERGENCE:
        if not job.wide and not job.sparse_teacher and not job.keeps_pairs:  # many classes with a stride
            job.level = FULL
        teacher[0] = job[0]
        teacher.n_classes = teacher_classes
        teacher.dense, teacher.want_grad, teacher.want_hess, teacher.writes = False, False, False, False
        job.teacher = teacher
    # rows of gradient side by side, and too many to stay in a cache
    job.streams = (
        not job.wide and job.want_grad and not STORAGE_IS_16_BIT and not is_foreign and job.n_classes <= STAGE
        and job.at[GRAD].classes == sizeof(storage) and job.at[GRAD].data != job.at[X].data
        and job.at[GRAD].rows == job.n_classes * <Py_ssize_t>sizeof(storage)
        and job.n_rows > STREAM_BYTES // job.at[GRAD].rows
    )
    # a wide tile takes as many rows as the stage holds, so that their finishing shares the lanes
    job.tile_rows = LANES
    if job.wide:
        job.tile_rows = <int>max(min(<Py_ssize_t>LANES, STAGE * LANES // (2 * job.n_classes)), <Py_ssize_t>1)
        if job.keeps_pairs:
            job.tile_rows = <int>min(<Py_ssize_t>LANES, STAGE // (PARTS * pair_vectors(job)))
    job.unit_rows = UNIT_ROWS
    while job.unit_rows > 1 and job.n_classes > UNIT_LOGITS // job.unit_rows:
        job.unit_rows //= 2
    return work(job, n_threads)


cdef bint adjacent(const Job *job) noexcept:
    """Whether the classes of all operands lie side by side."""
    cdef int k
    for k in range(ENTRY_OPERANDS):
        if k == Q and job.sparse_teacher:
            continue
        if job.at[k].data != NULL and job.at[k].classes != sizeof(storage):
            return False
    return True
