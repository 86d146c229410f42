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

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport prange, threadid

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
        FIRST_DIVERGENCE "DIVERGENCE_forward"
    const scalar INF "XCE_INF"
    const scalar NAN "XCE_NAN"
    const char *const *PHI_NAMES "XCE_PHI_NAMES"

    ctypedef struct real_sum:
        real high, low
    ctypedef struct exp_reference:
        pass
    ctypedef struct log_prob:
        real u, p, not_p, v, t, d
    ctypedef struct jet:
        real value, d1, d2
    ctypedef struct logit_transform:
        scalar softcap, temperature
    ctypedef struct row_state:
        exp_reference ref
        real max, top, rest, inverse, log_z
    ctypedef struct row_target:
        real factor, weight, index, label_logit, d_top, d_label, sum, sum1, sum2, z_loss, v_top, t_top, gap_top
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
    scalar r_sum_of_lanes(real a)
    real r_load_scalars(const scalar *p)
    void r_store_scalars(scalar *p, real a)
    scalar s_load(const storage *p)
    void s_store(storage *p, scalar a)
    void prefetch(const char *p)
    void prefetch_far(const char *p)
    void prefetch_to_write(const char *p)
    real r_load(const storage *p)
    real r_load_part(const storage *p, int n, scalar fill)
    void r_store(storage *p, real a)
    void r_store_part(storage *p, real a, int n)
    real r_gather(const char *p, Py_ssize_t stride, int n, scalar fill)
    void r_scatter(char *p, Py_ssize_t stride, real a, int n)
    real r_gather_scalars(const char *p, Py_ssize_t stride, int n)
    void stream(char *to, const char *from_, size_t n)
    void stream_end()
    void turn_in(const char *rows, Py_ssize_t stride, Py_ssize_t n, real *vectors)
    void turn_out(const real *vectors, Py_ssize_t n, char *rows, Py_ssize_t stride)
    rmask r_gather_bytes(const char *p, Py_ssize_t stride, int n)
    exp_reference r_exp_reference(real max)
    real r_exp_relative(real x, exp_reference ref)
    real_sum r_sum_add(real_sum s, real a)
    real r_add8(const real *a)
    row_state row_close(real max, real rest)
    real row_lse(row_state s)
    void row_teacher(row_state student, row_state teacher, real x, real y, log_prob *at)
    row_result row_finish(row_state s, row_target t, int phi, scalar parameter)
    jet loss_phi(int phi, log_prob at, scalar parameter)
    scalar share_outside(int phi)
    real weighted(real a, real phi)
    real transform_logit(logit_transform t, real x)
    void transform_derivatives(logit_transform t, real x, real *g, real *h)

include "job.pxi"
include "entries.pxi"
include "rows.pxi"
include "teacher.pxi"
include "tiles.pxi"
include "elements.pxi"

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
    cdef Py_ssize_t chunk = max(CHUNK_LOGITS // job.unit_rows // job.n_classes, <Py_ssize_t>1)
    cdef Py_ssize_t stage = stage_vectors(job) + picked_vectors(job)
    cdef double sums[CHUNK_UNITS]
    cdef double total = 0
    cdef void *memory
    cdef real *stages
    if chunk > CHUNK_UNITS:
        chunk = CHUNK_UNITS
    n_threads = <int>min(<Py_ssize_t>n_threads, n_units)
    # not on the stack, which a caller's thread may have little of
    memory = PyMem_RawMalloc((n_threads * stage + 1) * sizeof(real))
    if memory == NULL:
        raise MemoryError(f"{n_threads * stage * sizeof(real)} bytes for the work of {n_threads} threads")
    stages = <real *>(<size_t>memory + sizeof(real) - <size_t>memory % sizeof(real))
    try:
        while True:
            last = min(first + chunk, n_units)
            with nogil:
                if n_threads == 1 or last - first == 1:
                    for i in range(last - first):
                        sums[i] = unit(job, first + i, stages)
                else:
                    for i in prange(last - first, num_threads=n_threads, schedule="dynamic"):
                        sums[i] = unit(job, first + i, stages + threadid() * stage)
            total += sum_of_doubles(sums, last - first)
            first = last
            if first == n_units:
                return total
            PyErr_CheckSignals()
    finally:
        PyMem_RawFree(memory)


cdef Py_ssize_t stage_vectors(const Job *job) noexcept nogil:
    """What a thread keeps between the readings of its rows, in vectors; at most STAGE."""
    cdef Py_ssize_t vectors = job.n_classes
    if job.wide:
        vectors = job.tile_rows * ((job.n_classes + LANES - 1) // LANES)
    if vectors > STAGE:
        return 0
    return 2 * vectors if job.streams or job.teacher != NULL else vectors


cdef Py_ssize_t picked_vectors(const Job *job) noexcept nogil:
    """Beyond that: the logits at the classes of a sparse teacher."""
    return job.teacher.n_classes + LANES if job.sparse_teacher else 0


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
    """The sum of class weight times sample weight over the rows with a class; one-dimensional arrays or None."""
    cdef const char *y = NULL
    cdef const char *s = NULL
    cdef const scalar *w = NULL
    cdef Py_ssize_t n = 0, y_stride = 0, s_stride = 0, i, count = 0
    cdef Label found
    cdef double sums[8]
    cdef double term
    if weight is not None:
        w = <const scalar *>cnp.PyArray_DATA(<cnp.ndarray>weight)
    if sample_weight is not None:
        s, s_stride = cnp.PyArray_BYTES(<cnp.ndarray>sample_weight), cnp.PyArray_STRIDE(<cnp.ndarray>sample_weight, 0)
        n = cnp.PyArray_DIM(<cnp.ndarray>sample_weight, 0)
    if label is not None:
        y, y_stride = cnp.PyArray_BYTES(<cnp.ndarray>label), cnp.PyArray_STRIDE(<cnp.ndarray>label, 0)
        n = cnp.PyArray_DIM(<cnp.ndarray>label, 0)
    with nogil:
        for i in range(8):
            sums[i] = 0
        if w == NULL and s == NULL and label_kind == -8 and y_stride == 8 and <size_t>y % 8 == 0:
            for i in range(n):
                count += (<const int64_t *>y)[i] != ignore_index
            sums[0] = <double>count
        else:
            found.status, found.value = ACTIVE, 0
            for i in range(n):
                if y != NULL:
                    found = label_at(y + i * y_stride, label_kind, n_classes, ignore_index)
                term = 1 if found.status == ACTIVE or (w == NULL and found.status == INVALID) else 0
                if w != NULL and found.status == ACTIVE:
                    term = w[found.value]
                if s != NULL:
                    term *= (<const scalar *>(s + i * s_stride))[0]
                sums[i % 8] += term
    return sum_of_doubles(sums, 8)


PHI = {(<bytes>PHI_NAMES[_i]).decode(): _i for _i in range(FIRST_DIVERGENCE)}
DIVERGENCES = {(<bytes>PHI_NAMES[_i]).decode(): _i for _i in range(FIRST_DIVERGENCE, PHI_COUNT)}


def run(
    int what, int phi, double parameter, logits, int axis, label, int label_kind, q, where, weight, sample_weight,
    bint q_is_scalar, long long ignore_index, double label_smoothing, double temperature, double softcap,
    double z_loss, double scale, value, grad, hess, label_logit, top, rank, spread, linear, int n_threads,
    indices=None, int index_kind=0,
):
    """Compute what is asked for into the arrays that are not None; the sum of the losses.

    All arrays are checked: native byte order, logits, q, grad and hess of this module's storage type (or q of its
    scalar type: `q_is_scalar`), weight, sample_weight and the outputs of rows of its scalar type, shapes as they must
    be, at least one row and one class.
    `label_kind` is the size of the labels' type in bytes, negative for a signed one. Of a divergence, q is the
    teacher's logits, of all classes or of the classes `indices`, which `index_kind` tells the type of.
    """
    cdef Job job
    cdef Job teacher
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
    place(&job, &plan, INDICES, indices, axis)
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
    job.q_is_scalar = q_is_scalar
    job.sparse_teacher, job.index_kind = indices is not None, index_kind
    job.dense = what == STATE or (
        what == LOSS and not job.sparse_teacher and (q is not None or label_smoothing != 0)
    )
    job.want_grad, job.want_hess = grad is not None, hess is not None
    job.writes = job.want_grad or job.want_hess
    job.wide = (
        (job.at[X].classes == sizeof(storage) and job.n_classes > MANY_UP_TO) or job.n_classes > MANY_AT_MOST
    )
    job.level = FULL
    if softcap == 0 and where is None and not q_is_scalar and what != STATS and (not job.wide or adjacent(&job)):
        job.level = MIXED
        if not job.transforms and (job.linear or not job.dense):
            job.level = DENSE if job.dense else SPARSE
    if phi >= FIRST_DIVERGENCE:
        teacher = job
        teacher.n_classes = cnp.PyArray_DIM(<cnp.ndarray>q, axis)
        teacher.dense, teacher.want_grad, teacher.want_hess, teacher.writes = False, False, False, False
        teacher.level = FULL if job.sparse_teacher else job.level
        job.teacher = &teacher
    # rows of gradient side by side, and too many to stay in a cache
    job.streams = (
        not job.wide and job.want_grad and not STORAGE_IS_16_BIT and job.n_classes <= STAGE
        and job.at[GRAD].classes == sizeof(storage) and job.at[GRAD].data != job.at[X].data
        and job.at[GRAD].rows == job.n_classes * <Py_ssize_t>sizeof(storage)
        and job.n_rows > STREAM_BYTES // job.at[GRAD].rows
    )
    # a wide tile takes as many rows as the stage holds, so that their finishing shares the lanes
    job.tile_rows = LANES
    if job.wide:
        job.tile_rows = <int>max(min(<Py_ssize_t>LANES, STAGE * LANES // (2 * job.n_classes)), <Py_ssize_t>1)
    job.unit_rows = UNIT_ROWS
    while job.unit_rows > 1 and job.n_classes > UNIT_LOGITS // job.unit_rows:
        job.unit_rows //= 2
    return work(&job, n_threads)


cdef bint adjacent(const Job *job) noexcept:
    """Whether the classes of all operands lie side by side."""
    cdef int k
    for k in range(ENTRY_OPERANDS):
        if k == Q and job.sparse_teacher:
            continue
        if job.at[k].data != NULL and job.at[k].classes != sizeof(storage):
            return False
    return True
