"""The losses of single elements.

Arrays are walked in C order, whatever their strides, in blocks that are turned into numbers side by side (those that
already are, in place), and computed on by the loops of elements.h. Blocks, and the sums of their values, depend on the
shape alone.
"""

cdef extern from "cpu/elements.h" nogil:
    enum:
        ELEMENTS "XCE_ELEMENTS"
        ELEMENT_COUNT "XCE_ELEMENT_COUNT"
        KIND_DOUBLE "XCE_DOUBLE"
        KIND_BOOL "XCE_BOOL"
        KIND_HALF "XCE_HALF"
        KIND_SWAPPED "XCE_SWAPPED"
        SCALAR_KIND "XCE_SCALAR_KIND"
        STORAGE_KIND "XCE_STORAGE_KIND"
    const char *const *ELEMENT_NAMES "XCE_ELEMENT_NAMES"

    ctypedef struct parameters:
        pass
    parameters parameters_of(const double *values)
    ctypedef struct element_block:
        const scalar *x
        const scalar *y
        const scalar *w
        const scalar *factor
        const scalar *value_factor
        const scalar *y_low
        const scalar *w_low
        scalar *value
        scalar *grad
        scalar *hess
        scalar scale
        parameters with_ "with"
    ctypedef void (*element_loop)(const element_block *) noexcept nogil
    const element_loop *ELEMENT_VALUES
    const element_loop *ELEMENT_JETS
    void read_elements(scalar *to, scalar *low, const char *p, Py_ssize_t stride, int n, int kind)
    void write_elements(const scalar *from_, char *p, Py_ssize_t stride, int n, int kind)
    ctypedef struct row_sum:
        double high
        double low
    void add_to_row(row_sum *sum, const scalar *a, const scalar *factors, int start, int stop)
    double total_of_row(const row_sum *sum)
    void add_keeping(double *high, double *low, double term)
    double sum_of_elements(const scalar *a, const scalar *factors, int n)
    int first_bad(const scalar *a, int start, int n, scalar low, scalar high, int what)

cdef enum:
    UNIT_BLOCKS = 64           # a thread's portion
    SCANNED_UNITS = 256        # that are given out at a time, where numbers are only read

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
    xce_watch *watch

# What a thread works with; none of it on a stack, which may be small.
cdef struct ElementDesk:
    scalar buffers[E_ARRAYS][ELEMENTS]
    scalar lows[E_POS_WEIGHT + 1][ELEMENTS]
    scalar ones[ELEMENTS]


cdef int kind_of(object array) except -1000:
    """The type of an array's numbers, as elements.h numbers them; 0 if there is none."""
    cdef cnp.ndarray a
    cdef int size, kind = 0
    cdef char letter
    if array is None:
        return 0
    a = <cnp.ndarray>array
    size, letter = <int>cnp.PyArray_ITEMSIZE(a), a.descr.kind
    if letter == b"f":
        kind = KIND_HALF if size == 2 else 16 + size  # KIND_FLOAT, KIND_DOUBLE
    elif letter == b"i":
        kind = -size
    elif letter == b"u":
        kind = size
    elif letter == b"b":
        return KIND_BOOL
    else:  # bfloat16, int4, uint4
        from xce._engines.numbers import number_kind
        return number_kind(array.dtype)
    return kind if cnp.PyArray_ISNOTSWAPPED(a) else kind + KIND_SWAPPED


cdef void walk(Walk *w, object array) except *:
    """Enter an array, or nothing."""
    cdef cnp.ndarray a
    cdef int i
    w.data, w.kind, w.axes = NULL, kind_of(array), 0
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


cdef void walk_plain(Walk *w, char *data, Py_ssize_t stride, int kind, Py_ssize_t n) noexcept:
    """Enter numbers in even steps, or nothing."""
    w.data, w.kind, w.axes, w.shape[0], w.strides[0] = data, kind, 1, n, stride


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
        and (w.kind == SCALAR_KIND or (w.kind == 0 and not STORAGE_IS_16_BIT))
    )


cdef const scalar *read_block(const Walk *w, Py_ssize_t flat, int n, scalar *buffer, scalar *low) noexcept nogil:
    """n elements from one on as numbers side by side: themselves, or copies in `buffer`; what these lack in `low`."""
    cdef Py_ssize_t left
    cdef int done = 0, some
    cdef char *p = place_in(w, flat, &left)
    if is_in_place(w, p, left, n):
        return <const scalar *>p
    while True:
        some = <int>min(left, <Py_ssize_t>(n - done))
        read_elements(buffer + done, NULL if low == NULL else low + done, p, w.strides[w.axes - 1], some, w.kind)
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
        write_elements(block + done, p, w.strides[w.axes - 1], some, w.kind)
        done += some


cdef scalar *output_block(const Walk *w, Py_ssize_t flat, int n, scalar *buffer) noexcept nogil:
    """Where n elements of an output are to be put: their own place, `buffer`, or NULL if nobody wants them."""
    cdef Py_ssize_t left
    cdef char *p
    if w.data == NULL:
        return NULL
    p = place_in(w, flat, &left)
    return <scalar *>p if is_in_place(w, p, left, n) else buffer


cdef inline bint has_low(const Walk *w) noexcept nogil:
    """Whether numbers are more precise than `scalar`."""
    return sizeof(scalar) == 4 and w.data != NULL and w.kind % KIND_SWAPPED == KIND_DOUBLE


cdef double element_unit(const Elements *job, Py_ssize_t index, ElementDesk *desk) noexcept nogil:
    """Work off a portion of the elements; the sum of their values."""
    cdef Py_ssize_t flat = index * job.unit, end = min(flat + job.unit, job.n), row = 0
    cdef const scalar *in_[E_INPUTS]
    cdef scalar *low
    cdef scalar *out[E_ARRAYS]
    cdef scalar mean
    cdef element_block block
    cdef row_sum in_row
    cdef double total = 0
    cdef int n, i, k, some
    in_row.high = in_row.low = 0
    block.scale, block.with_ = job.scale, job.with_
    block.y_low = &desk.lows[E_Y][0] if has_low(&job.walks[E_Y]) else NULL
    block.w_low = &desk.lows[E_POS_WEIGHT][0] if has_low(&job.walks[E_POS_WEIGHT]) else NULL
    for i in range(ELEMENTS):
        desk.ones[i] = 1
    memset(desk.buffers, 0, sizeof(desk.buffers))
    memset(desk.lows, 0, sizeof(desk.lows))
    while flat < end:
        if flat != 0 and flat // ELEMENTS % UNIT_BLOCKS == 0 and xce_look(job.watch):
            break
        n = <int>min(<Py_ssize_t>ELEMENTS, end - flat)
        for k in range(E_INPUTS):
            in_[k] = &desk.ones[0]
            if job.walks[k].data != NULL:
                low = &desk.lows[k][0] if (k == E_Y or k == E_POS_WEIGHT) and has_low(&job.walks[k]) else NULL
                in_[k] = read_block(&job.walks[k], flat, n, &desk.buffers[k][0], low)
        block.x, block.y, block.w, block.factor = in_[E_X], in_[E_Y], in_[E_POS_WEIGHT], in_[E_WEIGHT]
        if job.walks[E_WEIGHT].data == NULL:
            block.factor = in_[E_SAMPLE] if job.walks[E_SAMPLE].data != NULL else NULL
        elif job.walks[E_SAMPLE].data != NULL:
            for i in range(ELEMENTS):
                desk.buffers[E_WEIGHT][i] = in_[E_WEIGHT][i] * in_[E_SAMPLE][i]
            block.factor = &desk.buffers[E_WEIGHT][0]
        for k in range(E_INPUTS, E_ARRAYS):
            out[k] = output_block(&job.walks[k], flat, n, &desk.buffers[k][0])
        block.value, block.value_factor = &desk.buffers[E_VALUE][0], NULL
        if not job.row and out[E_VALUE] != NULL:
            block.value, block.value_factor = out[E_VALUE], block.factor
        block.grad, block.hess = out[E_GRAD], out[E_HESS]
        job.loop(&block)
        if job.row:
            i = 0
            while i < n:
                some = <int>min(<Py_ssize_t>(n - i), job.row - row)
                add_to_row(&in_row, block.value, block.factor, i, i + some)
                i, row = i + some, row + some
                if row == job.row:
                    mean = <scalar>(total_of_row(&in_row) * job.row_scale)
                    write_block(&job.walks[E_VALUE], (flat + i - 1) // job.row, 1, &mean)
                    row, in_row.high, in_row.low = 0, 0, 0
        elif out[E_VALUE] == NULL:
            total += sum_of_elements(block.value, block.factor, n)
        elif out[E_VALUE] == &desk.buffers[E_VALUE][0]:
            write_block(&job.walks[E_VALUE], flat, n, out[E_VALUE])
        for k in range(E_GRAD, E_ARRAYS):
            if out[k] == &desk.buffers[k][0]:
                write_block(&job.walks[k], flat, n, out[k])
        flat += n
    return total


ELEMENT_FORMULAS = {(<bytes>ELEMENT_NAMES[_i]).decode(): _i for _i in range(ELEMENT_COUNT)}


def run_elements(int formula, tuple params, tuple arrays, double scale, Py_ssize_t row, int n_threads):
    """Compute a formula for every element of arrays of one shape; the sum of the values.

    `arrays` are x, y, pos_weight, weight, sample_weight, value, grad and hess, or None: of numbers of any type the
    inputs, of floats of native byte order the others. `value` is in C order: an entry for each element or, if `row` is
    not 0, the mean of each `row` elements, the length of the last axis.
    """
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, sizeof(Elements))
    cdef Elements *job = <Elements *>PyBytes_AS_STRING(memory)
    cdef double values[PARAMETERS]
    cdef int k
    for k in range(E_ARRAYS):
        walk(&job.walks[k], arrays[k])
        if job.walks[k].kind == STORAGE_KIND:
            job.walks[k].kind = 0
    for k in range(PARAMETERS):
        values[k] = <double>params[k] if k < len(params) else 0
    job.n, job.scale, job.row = cnp.PyArray_SIZE(<cnp.ndarray>arrays[E_X]), <scalar>scale, row
    return compute_elements(job, formula, values, n_threads)


cdef double compute_elements(Elements *job, int formula, const double *params, int n_threads) except? -1.0:
    """Compute a job whose arrays are entered; the sum of the values."""
    cdef bytes memory
    cdef Py_ssize_t n_units, first = 0, chunk
    cdef ElementDesk *desks
    cdef double *sums
    cdef xce_watch watch
    cdef double total = 0
    job.loop = ELEMENT_JETS[formula]
    if job.walks[E_GRAD].data == NULL and job.walks[E_HESS].data == NULL:
        job.loop = ELEMENT_VALUES[formula]
    job.row_scale = <scalar>(1.0 / job.row) if job.row else 0
    job.with_ = parameters_of(params)
    job.unit = ELEMENTS * UNIT_BLOCKS
    if job.row:
        job.unit = max(job.unit // job.row, <Py_ssize_t>1) * job.row
    n_units = (job.n + job.unit - 1) // job.unit
    chunk = min(max(CHUNK_LOGITS // job.unit, <Py_ssize_t>1), <Py_ssize_t>CHUNK_UNITS, n_units)
    n_threads = <int>min(<Py_ssize_t>n_threads, n_units)
    memory = PyBytes_FromStringAndSize(NULL, n_threads * sizeof(ElementDesk) + chunk * sizeof(double) + sizeof(double))
    desks = <ElementDesk *>(<size_t>PyBytes_AS_STRING(memory) + 7 & ~<size_t>7)
    sums = <double *>(desks + n_threads)
    xce_watch_begin(&watch)
    job.watch = &watch
    while first < n_units:
        watch.units, watch.taken = min(chunk, n_units - first), 0
        with nogil:
            if n_threads == 1 or watch.units == 1:
                take_element_units(job, first, desks, sums)
            else:
                with parallel(num_threads=n_threads):
                    take_element_units(job, first, desks + threadid(), sums)
        xce_watch_end(&watch)
        total += sum_of_doubles(sums, watch.units)
        first += watch.units
    return total


cdef void take_element_units(const Elements *job, Py_ssize_t first, ElementDesk *desk, double *sums) noexcept nogil:
    """A thread's part of a chunk: the next portion that nobody has, until there are no more."""
    cdef Py_ssize_t i
    xce_begin(job.watch)
    while True:
        i = xce_take(job.watch)
        if i < 0:
            break
        sums[i] = element_unit(job, first + i, desk)
    xce_end(job.watch)


cdef struct Scan:
    Walk x
    Walk weights[2]
    int n_weights
    Py_ssize_t n
    scalar low, high
    int what
    xce_watch *watch


def scan_range(x, tuple weights, double low, double high, int what, int n_threads):
    """The flat C-order index of the first element that is bad, or -1.

    `what` is bad, elements.h lists; no element is one of whose `weights`, up to two arrays of the shape of x, is 0.
    """
    cdef Scan job
    cdef Py_ssize_t n_units, first = 0, last, i
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, SCANNED_UNITS * sizeof(Py_ssize_t))
    cdef Py_ssize_t *found = <Py_ssize_t *>PyBytes_AS_STRING(memory)
    cdef xce_watch watch
    xce_watch_begin(&watch)
    job.watch = &watch
    walk(&job.x, x)
    job.n_weights = len(weights)
    for i in range(job.n_weights):
        walk(&job.weights[i], weights[i])
    job.n, job.low, job.high, job.what = cnp.PyArray_SIZE(<cnp.ndarray>x), <scalar>low, <scalar>high, what
    n_units = (job.n + ELEMENTS * UNIT_BLOCKS - 1) // (ELEMENTS * UNIT_BLOCKS)
    while first < n_units:
        last = min(first + SCANNED_UNITS, n_units)
        watch.units, watch.taken = last - first, 0
        with nogil:
            if n_threads == 1 or last - first == 1:
                take_scan_units(&job, first, found)
            else:
                with parallel(num_threads=n_threads):
                    take_scan_units(&job, first, found)
        xce_watch_end(&watch)
        for i in range(last - first):
            if found[i] >= 0:
                return found[i]
        first = last
    return -1


cdef void take_scan_units(const Scan *job, Py_ssize_t first, Py_ssize_t *found) noexcept nogil:
    """A thread's part, as `take_units`."""
    cdef Py_ssize_t i
    xce_begin(job.watch)
    while True:
        i = xce_take(job.watch)
        if i < 0 or (i > 0 and xce_look(job.watch)):
            break
        found[i] = scan_unit(job, first + i)
    xce_end(job.watch)


cdef Py_ssize_t scan_unit(const Scan *job, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t flat = index * ELEMENTS * UNIT_BLOCKS, end = min(flat + ELEMENTS * UNIT_BLOCKS, job.n)
    cdef scalar buffers[3][ELEMENTS]
    cdef const scalar *x
    cdef const scalar *weights[2]
    cdef int n, k, place
    cdef bint weighs
    while flat < end:
        n = <int>min(<Py_ssize_t>ELEMENTS, end - flat)
        x = read_block(&job.x, flat, n, &buffers[2][0], NULL)
        place = first_bad(x, 0, n, job.low, job.high, job.what)
        if place < n:
            for k in range(job.n_weights):
                weights[k] = read_block(&job.weights[k], flat, n, &buffers[k][0], NULL)
        while place < n:
            weighs = True
            for k in range(job.n_weights):
                weighs = weighs and weights[k][place] != 0
            if weighs:
                return flat + place
            place = first_bad(x, place + 1, n, job.low, job.high, job.what)
        flat += n
    return -1


def sum_range(x, int n_threads):
    """The sum of an array, which depends on nothing but the numbers in C order."""
    cdef Walk w
    cdef Py_ssize_t n = cnp.PyArray_SIZE(<cnp.ndarray>x), unit = ELEMENTS * UNIT_BLOCKS, first = 0, last
    cdef Py_ssize_t n_units = (n + unit - 1) // unit
    cdef bytes memory = PyBytes_FromStringAndSize(NULL, SCANNED_UNITS * sizeof(double))
    cdef double *sums = <double *>PyBytes_AS_STRING(memory)
    cdef double total = 0
    cdef xce_watch watch
    xce_watch_begin(&watch)
    walk(&w, x)
    while first < n_units:
        last = min(first + SCANNED_UNITS, n_units)
        watch.units, watch.taken = last - first, 0
        with nogil:
            if n_threads == 1 or last - first == 1:
                take_sum_units(&w, n, first, sums, &watch)
            else:
                with parallel(num_threads=n_threads):
                    take_sum_units(&w, n, first, sums, &watch)
        xce_watch_end(&watch)
        total += sum_of_doubles(sums, last - first)
        first = last
    return total


cdef void take_sum_units(const Walk *w, Py_ssize_t n, Py_ssize_t first, double *sums, xce_watch *watch) noexcept nogil:
    """A thread's part, as `take_units`."""
    cdef Py_ssize_t unit = ELEMENTS * UNIT_BLOCKS, i
    xce_begin(watch)
    while True:
        i = xce_take(watch)
        if i < 0 or (i > 0 and xce_look(watch)):
            break
        sums[i] = sum_unit(w, (first + i) * unit, min((first + i + 1) * unit, n))
    xce_end(watch)


cdef double sum_unit(const Walk *w, Py_ssize_t flat, Py_ssize_t end) noexcept nogil:
    cdef scalar buffer[ELEMENTS]
    cdef double total = 0
    cdef int n
    while flat < end:
        n = <int>min(<Py_ssize_t>ELEMENTS, end - flat)
        total += sum_of_elements(read_block(w, flat, n, buffer, NULL), NULL, n)
        flat += n
    return total
