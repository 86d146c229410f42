"""The losses of single elements.

Arrays are walked in C order, whatever their strides, in blocks that are turned into numbers side by side (those that
already are, in place), and computed on by the loops of elements.h. Blocks, and the sums of their values, depend on the
shape alone.
"""

cdef extern from "cpu/elements.h" nogil:
    enum:
        ELEMENTS "XCE_ELEMENTS"
        ELEMENT_COUNT "XCE_ELEMENT_COUNT"
        KIND_BOOL "XCE_BOOL"
        KIND_FLOAT "XCE_FLOAT"
        KIND_DOUBLE "XCE_DOUBLE"
    const char *const *ELEMENT_NAMES "XCE_ELEMENT_NAMES"

    ctypedef struct parameters:
        scalar at[3]
    ctypedef struct element_block:
        const scalar *x
        const scalar *y
        const scalar *w
        const scalar *factor
        scalar *value
        scalar *grad
        scalar *hess
        scalar scale
        parameters with_ "with"
    ctypedef void (*element_loop)(const element_block *) noexcept nogil
    const element_loop *ELEMENT_VALUES
    const element_loop *ELEMENT_JETS
    void read_elements(scalar *to, const char *p, Py_ssize_t stride, int n, int kind)
    void write_elements(const scalar *from_, char *p, Py_ssize_t stride, int n)
    double sum_of_elements(const scalar *a, int n)
    int first_outside(const scalar *a, int n, scalar low, scalar high, bint finite)

cdef enum:
    UNIT_BLOCKS = 64           # a thread's portion

cdef enum:
    E_X, E_Y, E_POS_WEIGHT, E_WEIGHT, E_SAMPLE, E_INPUTS
    E_VALUE = E_INPUTS, E_GRAD, E_HESS, E_ARRAYS

# An array walked in C order, its axes joined as far as its own strides allow.
cdef struct Walk:
    char *data
    int kind                   # of its numbers
    int axes
    Py_ssize_t shape[MAX_AXES]
    Py_ssize_t strides[MAX_AXES]

cdef struct Elements:
    Walk walks[E_ARRAYS]
    element_loop loop
    scalar scale
    parameters with_
    Py_ssize_t n, unit
    Py_ssize_t row             # elements whose mean is one value, the last axis; or 0
    scalar row_scale


cdef void walk(Walk *w, object array, int kind) except *:
    """Enter an array, or nothing."""
    cdef cnp.ndarray a
    cdef int i
    w.data, w.kind, w.axes = NULL, kind, 0
    if array is None:
        return
    a = <cnp.ndarray>array
    w.data = cnp.PyArray_BYTES(a)
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) == 1:
            continue
        if w.axes and w.strides[w.axes - 1] == cnp.PyArray_STRIDE(a, i) * cnp.PyArray_DIM(a, i):
            w.shape[w.axes - 1] *= cnp.PyArray_DIM(a, i)
        else:
            w.axes += 1
            w.shape[w.axes - 1] = cnp.PyArray_DIM(a, i)
        w.strides[w.axes - 1] = cnp.PyArray_STRIDE(a, i)
    if w.axes == 0:
        w.axes, w.shape[0], w.strides[0] = 1, 1, 0


cdef inline char *place_in(const Walk *w, Py_ssize_t flat, Py_ssize_t *left) noexcept nogil:
    """Where an element is, and how many follow in one stride, itself included."""
    cdef int i = w.axes - 1
    cdef Py_ssize_t outer = flat // w.shape[i], inner = flat - outer * w.shape[i]
    cdef char *p = w.data + inner * w.strides[i]
    left[0] = w.shape[i] - inner
    while i > 0:
        i -= 1
        p += outer % w.shape[i] * w.strides[i]
        outer //= w.shape[i]
    return p


cdef inline bint is_in_place(const Walk *w, const char *p, Py_ssize_t left, int n) noexcept nogil:
    """Whether a block can be computed on where it lies."""
    return (
        n == ELEMENTS and left >= n and w.strides[w.axes - 1] == sizeof(scalar) and <size_t>p % sizeof(scalar) == 0
        and (w.kind == (KIND_DOUBLE if sizeof(scalar) == 8 else KIND_FLOAT) or (w.kind == 0 and not STORAGE_IS_16_BIT))
    )


cdef const scalar *read_block(const Walk *w, Py_ssize_t flat, int n, scalar *buffer) noexcept nogil:
    """n elements from one on as numbers side by side: themselves, or copies in `buffer`."""
    cdef Py_ssize_t left
    cdef int done = 0, some
    cdef char *p = place_in(w, flat, &left)
    if is_in_place(w, p, left, n):
        return <const scalar *>p
    while True:
        some = <int>min(left, <Py_ssize_t>(n - done))
        read_elements(buffer + done, p, w.strides[w.axes - 1], some, w.kind)
        done += some
        if done == n:
            return buffer
        p = place_in(w, flat + done, &left)


cdef void write_block(const Walk *w, Py_ssize_t flat, int n, const scalar *block) noexcept nogil:
    cdef Py_ssize_t left
    cdef int done = 0, some
    cdef char *p
    while done < n:
        p = place_in(w, flat + done, &left)
        some = <int>min(left, <Py_ssize_t>(n - done))
        write_elements(block + done, p, w.strides[w.axes - 1], some)
        done += some


cdef scalar *output_block(const Walk *w, Py_ssize_t flat, int n, scalar *buffer) noexcept nogil:
    """Where n elements of an output are to be put: their own place, `buffer`, or NULL if nobody wants them."""
    cdef Py_ssize_t left
    cdef char *p
    if w.data == NULL:
        return NULL
    p = place_in(w, flat, &left)
    return <scalar *>p if is_in_place(w, p, left, n) else buffer


cdef double element_unit(const Elements *job, Py_ssize_t index) noexcept nogil:
    """Work off a portion of the elements; the sum of their values."""
    cdef Py_ssize_t flat = index * job.unit, end = min(flat + job.unit, job.n), row = 0
    cdef scalar buffers[E_ARRAYS][ELEMENTS]
    cdef scalar ones[ELEMENTS]
    cdef const scalar *in_[E_INPUTS]
    cdef scalar *out[E_ARRAYS]
    cdef element_block block
    cdef double total = 0, in_row = 0
    cdef int n, i, k
    block.scale, block.with_ = job.scale, job.with_
    for i in range(ELEMENTS):
        ones[i] = 1
    memset(buffers, 0, sizeof(buffers))
    while flat < end:
        n = <int>min(<Py_ssize_t>ELEMENTS, end - flat)
        for k in range(E_INPUTS):
            in_[k] = &ones[0]
            if job.walks[k].data != NULL:
                in_[k] = read_block(&job.walks[k], flat, n, &buffers[k][0])
        block.x, block.y, block.w, block.factor = in_[E_X], in_[E_Y], in_[E_POS_WEIGHT], in_[E_WEIGHT]
        if job.walks[E_WEIGHT].data == NULL:
            block.factor = in_[E_SAMPLE] if job.walks[E_SAMPLE].data != NULL else NULL
        elif job.walks[E_SAMPLE].data != NULL:
            for i in range(ELEMENTS):
                buffers[E_WEIGHT][i] = in_[E_WEIGHT][i] * in_[E_SAMPLE][i]
            block.factor = &buffers[E_WEIGHT][0]
        for k in range(E_INPUTS, E_ARRAYS):
            out[k] = output_block(&job.walks[k], flat, n, &buffers[k][0])
        block.value = &buffers[E_VALUE][0]
        if not job.row and out[E_VALUE] != NULL:
            block.value = out[E_VALUE]
        block.grad, block.hess = out[E_GRAD], out[E_HESS]
        job.loop(&block)
        total += sum_of_elements(block.value, n)
        if job.row:
            for i in range(n):
                in_row += block.value[i]
                row += 1
                if row == job.row:
                    (<scalar *>job.walks[E_VALUE].data)[(flat + i) // job.row] = <scalar>(in_row * job.row_scale)
                    row, in_row = 0, 0
        elif out[E_VALUE] == &buffers[E_VALUE][0]:
            write_values(&job.walks[E_VALUE], flat, n, out[E_VALUE])
        for k in range(E_GRAD, E_ARRAYS):
            if out[k] == &buffers[k][0]:
                write_block(&job.walks[k], flat, n, out[k])
        flat += n
    return total


cdef void write_values(const Walk *w, Py_ssize_t flat, int n, const scalar *values) noexcept nogil:
    """Values have an array of their own, in the type of the computation, side by side."""
    cdef scalar *to = <scalar *>w.data + flat
    cdef int i
    for i in range(n):
        to[i] = values[i]


ELEMENT_FORMULAS = {(<bytes>ELEMENT_NAMES[_i]).decode(): _i for _i in range(ELEMENT_COUNT)}


def run_elements(
    int formula, tuple params, x, y, int y_kind, pos_weight, weight, sample_weight, double scale, Py_ssize_t row,
    value, grad, hess, int n_threads,
):
    """Compute a formula for every element of arrays of one shape; the sum of the values.

    x, grad and hess are of this module's storage type, the weights of its scalar type, y of any kind that elements.h
    reads; `value` is of the scalar type and in C order: an entry for each element or, if `row` is not 0, the mean of
    each `row` elements, the length of the last axis.
    """
    cdef Elements job
    cdef Py_ssize_t n_units, first = 0, last, i, chunk
    cdef double sums[CHUNK_UNITS]
    cdef double total = 0
    cdef int k, scalar_kind = KIND_DOUBLE if sizeof(scalar) == 8 else KIND_FLOAT
    job.n = cnp.PyArray_SIZE(<cnp.ndarray>x)
    walk(&job.walks[E_X], x, 0)
    walk(&job.walks[E_Y], y, y_kind)
    walk(&job.walks[E_POS_WEIGHT], pos_weight, scalar_kind)
    walk(&job.walks[E_WEIGHT], weight, scalar_kind)
    walk(&job.walks[E_SAMPLE], sample_weight, scalar_kind)
    walk(&job.walks[E_VALUE], value, scalar_kind)
    walk(&job.walks[E_GRAD], grad, 0)
    walk(&job.walks[E_HESS], hess, 0)
    job.loop = ELEMENT_VALUES[formula] if grad is None and hess is None else ELEMENT_JETS[formula]
    job.scale, job.row, job.row_scale = <scalar>scale, row, <scalar>(1.0 / row) if row else 0
    for k in range(3):
        job.with_.at[k] = <scalar>(<double>params[k]) if k < len(params) else 0
    job.unit = ELEMENTS * UNIT_BLOCKS
    if row:
        job.unit = max(job.unit // row, <Py_ssize_t>1) * row
    n_units = (job.n + job.unit - 1) // job.unit
    chunk = min(max(CHUNK_LOGITS // job.unit, <Py_ssize_t>1), <Py_ssize_t>CHUNK_UNITS)
    while first < n_units:
        last = min(first + chunk, n_units)
        with nogil:
            if n_threads == 1 or last - first == 1:
                for i in range(last - first):
                    sums[i] = element_unit(&job, first + i)
            else:
                for i in prange(last - first, num_threads=n_threads, schedule="dynamic"):
                    sums[i] = element_unit(&job, first + i)
        total += sum_of_doubles(sums, last - first)
        first = last
        if first < n_units:
            PyErr_CheckSignals()
    return total


def scan_range(x, int kind, double low, double high, bint finite, int n_threads):
    """The flat C-order index of the first element that is NaN or not in low..high (if `finite`: or infinite), or -1."""
    cdef Walk w
    cdef Py_ssize_t n = cnp.PyArray_SIZE(<cnp.ndarray>x), unit = ELEMENTS * UNIT_BLOCKS, first = 0, last, i
    cdef Py_ssize_t n_units = (n + unit - 1) // unit
    cdef Py_ssize_t found[CHUNK_UNITS]
    walk(&w, x, kind)
    while first < n_units:
        last = min(first + CHUNK_UNITS // 2, n_units)
        with nogil:
            if n_threads == 1 or last - first == 1:
                for i in range(last - first):
                    found[i] = scan_unit(&w, (first + i) * unit, min((first + i + 1) * unit, n), low, high, finite)
            else:
                for i in prange(last - first, num_threads=n_threads, schedule="static"):
                    found[i] = scan_unit(&w, (first + i) * unit, min((first + i + 1) * unit, n), low, high, finite)
        for i in range(last - first):
            if found[i] >= 0:
                return found[i]
        first = last
        if first < n_units:
            PyErr_CheckSignals()
    return -1


cdef Py_ssize_t scan_unit(
    const Walk *w, Py_ssize_t flat, Py_ssize_t end, double low, double high, bint finite
) noexcept nogil:
    cdef scalar buffer[ELEMENTS]
    cdef int n, place
    while flat < end:
        n = <int>min(<Py_ssize_t>ELEMENTS, end - flat)
        place = first_outside(read_block(w, flat, n, buffer), n, <scalar>low, <scalar>high, finite)
        if place < n:
            return flat + place
        flat += n
    return -1
