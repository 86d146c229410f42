# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, freethreading_compatible=True
"""The front of the losses: a plain call goes from here to the kernels and back in one trip.

Plain are arrays of NumPy without gaps (rows of logits with a label of int64 for each, and weights of floats; or single
elements with targets of their own type), and options of the usual kinds. They are checked here, and labels are counted
in the same reading. Anything else goes to `_rows` and `_elements`, which take more and explain what is wrong. This file
is compiled once, for no instruction set.
"""

from libc.math cimport fabs
from libc.stdint cimport int64_t, uint64_t
from cpython.dict cimport PyDict_GetItem, PyDict_Next
from cpython.float cimport PyFloat_AS_DOUBLE
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.tuple cimport PyTuple_GET_ITEM

cimport numpy as cnp

import numpy

cnp.import_array()

include "cpu/front.pxi"

cdef extern from "cpu/front.h" nogil:
    ctypedef int (*run_plain_rows)(plain_rows *) except -1
    ctypedef int (*run_plain_elements)(plain_elements *) except -1

cdef extern from *:
    """
    #include <numpy/arrayscalars.h>
    static PyObject *xce_number(double a, int is_double)
    {
        PyObject *number = is_double ? PyArrayScalar_New(Double) : PyArrayScalar_New(Float);
        if (number && is_double)
            PyArrayScalar_ASSIGN(number, Double, a);
        else if (number)
            PyArrayScalar_ASSIGN(number, Float, (float)a);
        return number;
    }
    """
    object xce_number(double a, bint is_double)

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *descr, int subok)

# Labels or targets that are looked at without letting other threads, or Ctrl-C, in between: 10 ms
cdef enum:
    SCANNED = 16777216

LIMITS_OF_FLOAT32 = FLOAT32_ABOVE, FLOAT32_BELOW, STEEP_ABOVE  # as options.h has them

cdef type ndarray = numpy.ndarray
cdef object float64 = numpy.dtype("float64")
cdef double NAN = float("nan")

cdef object general_rows = None      # `_rows.row_loss`, for all that is not plain
cdef object general_elements = None  # `_elements.element_loss`, likewise
cdef object unit_interval = None     # the range of targets that is checked here
cdef object library = None           # `_libraries.numpy`, which knows what computes on its arrays,
cdef object engine_of = None         # by this function
cdef dict kernels = None             # (module, scalar type) by the dtype of logits, as far as they were loaded
cdef object load = None              # a dtype's
cdef object team = None              # `_threads.team`
cdef Py_ssize_t serial_below = 0     # logits
cdef row_options plain_numbers       # what nobody asked for


cdef int connect() except -1:
    """Import what the front stands before; `general_rows` last, which tells other threads that all is there."""
    global general_rows, general_elements, unit_interval, library, engine_of, kernels, load, team, serial_below
    from xce import _checks, _elements, _options, _rows, _threads
    from xce._engines import cpu
    from xce._libraries import numpy as library
    kernels, load, engine_of = cpu._KERNELS, cpu._load, library.OF_CPU
    team, serial_below = _threads.team, _threads.SERIAL_BELOW
    general_elements, unit_interval = _elements.element_loss, _checks.BETWEEN_0_AND_1
    for i, number in enumerate(_options.Numbers()):
        (<double *>&plain_numbers)[i] = number
    general_rows = _rows.row_loss
    return 0


cdef inline bint has_kernels() except -1:
    """Whether the kernels of the CPU compute on NumPy's arrays, as they do unless a test has something else do it."""
    if general_rows is None:
        connect()
    return library.engine is engine_of


# ---- options -------------------------------------------------------------------------------------------------------

cdef struct Options:
    row_options numbers
    int64_t ignore_index
    bint wants_grad, wants_hess, sums, is_mean
    bint of_rows               # one that only losses of rows have was given
    int n_threads              # 0: as many as there are
    PyObject *grad             # buffers and weights, or NULL
    PyObject *hess
    PyObject *weight
    PyObject *sample_weight


cdef inline bint is_number(object value, double low, double *number) noexcept:
    """Whether an option is a float, 0 or of a size that float32 holds, and not less than `low`."""
    if type(value) is not float:
        return False
    number[0] = PyFloat_AS_DOUBLE(value)
    return low <= number[0] < FLOAT32_BELOW and (number[0] > FLOAT32_ABOVE or number[0] == 0)


cdef inline bint is_plain_parameter(double a) noexcept:
    """Whether a loss's own parameter is one that float32 computes with."""
    return a == 0 or FLOAT32_ABOVE < fabs(a) and -FLOAT32_BELOW < a <= STEEP_ABOVE


cdef inline bint is_plain_reduction(object value, Options *options) noexcept:
    options.is_mean, options.sums = value is "mean", value is not "none"
    return options.is_mean or value is "sum" or value is "none"


cdef bint are_plain(dict given, Options *options) except -1:
    """Read options; whether all are of the usual kinds."""
    cdef PyObject *key = NULL
    cdef PyObject *value = NULL
    cdef Py_ssize_t at = 0
    cdef object name, x
    options.numbers = plain_numbers
    options.ignore_index, options.n_threads, options.is_mean, options.sums = -100, 0, True, True
    options.wants_grad = options.wants_hess = options.of_rows = False
    options.grad = options.hess = options.weight = options.sample_weight = NULL
    while PyDict_Next(given, &at, &key, &value):
        name, x = <object>key, <object>value
        if name is "return_grad" and (x is True or x is False):
            options.wants_grad = x is True
        elif name is "return_hess" and (x is True or x is False):
            options.wants_hess = x is True
        elif name is "reduction":
            if not is_plain_reduction(x, options):
                return False
        elif name is "n_threads" and (x is None or type(x) is int and 1 <= x < 1 << 20):
            options.n_threads = 0 if x is None else x
        elif name is "grad_out" and (x is None or type(x) is ndarray):
            options.grad = NULL if x is None else value
        elif name is "hess_out" and (x is None or type(x) is ndarray):
            options.hess = NULL if x is None else value
        elif name is "sample_weight" and (x is None or type(x) is ndarray):
            options.sample_weight = NULL if x is None else value
        elif name is "validate" and x is True:
            pass
        else:
            options.of_rows = True
            if name is "weight" and (x is None or type(x) is ndarray):
                options.weight = NULL if x is None else value
            elif name is "label_smoothing":
                if not is_number(x, 0, &options.numbers.label_smoothing) or options.numbers.label_smoothing > 1:
                    return False
            elif name is "temperature":
                if not is_number(x, FLOAT32_ABOVE, &options.numbers.temperature):
                    return False
            elif name is "softcap":
                if x is not None and not is_number(x, FLOAT32_ABOVE, &options.numbers.softcap):
                    return False
            elif name is "z_loss":
                if not is_number(x, 0, &options.numbers.z_loss):
                    return False
            elif name is "ignore_index" and type(x) is int and -(1 << 60) < x < 1 << 60:
                options.ignore_index = x
            elif not (name is "axis" and type(x) is int and (x == -1 or x == 1) or name is "where" and x is None):
                return False
    return True


cdef bint are_buffers(const Options *options, cnp.ndarray x, cnp.ndarray target) noexcept:
    """Whether the buffers are asked for, and take what is like x in memory of their own, or the first in that of x."""
    if options.grad != NULL:
        if not (options.wants_grad and is_buffer(options, <cnp.ndarray>options.grad, x, target, True)):
            return False
    if options.hess != NULL:
        if not (options.wants_hess and is_buffer(options, <cnp.ndarray>options.hess, x, target, False)):
            return False
    return options.grad == NULL or are_apart(options.hess, <cnp.ndarray>options.grad)


cdef bint is_buffer(
    const Options *options, cnp.ndarray out, cnp.ndarray x, cnp.ndarray target, bint in_place
) noexcept:
    if not (cnp.PyArray_ISCARRAY(out) and out.descr == x.descr and have_one_shape(out, x)):
        return False
    if not (in_place and cnp.PyArray_DATA(out) == cnp.PyArray_DATA(x)) and not are_apart(<PyObject *>x, out):
        return False
    if not are_apart(<PyObject *>target, out):
        return False
    return are_apart(options.weight, out) and are_apart(options.sample_weight, out)


cdef inline bint have_one_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef inline bint are_apart(PyObject *other, cnp.ndarray out) noexcept:
    """Whether an array, or NULL, has no gaps and shares no memory with another without gaps."""
    cdef cnp.ndarray a
    if other == NULL:
        return True
    a = <cnp.ndarray>other
    return cnp.PyArray_ISCARRAY_RO(a) and (
        cnp.PyArray_BYTES(a) + cnp.PyArray_NBYTES(a) <= cnp.PyArray_BYTES(out)
        or cnp.PyArray_BYTES(out) + cnp.PyArray_NBYTES(out) <= cnp.PyArray_BYTES(a)
    )


cdef PyObject *kernels_of(cnp.ndarray x) except? NULL:
    """The kernels of an array of floats, or NULL if they are not loaded and another call has to."""
    cdef PyObject *found = PyDict_GetItem(kernels, x.descr)
    if found == NULL and x.descr.kind == b"f" and cnp.PyArray_ITEMSIZE(x) <= 8:
        load(x.descr)
        found = PyDict_GetItem(kernels, x.descr)
    return found


cdef inline object like(cnp.ndarray x):
    """A new array like one without gaps, its entries unset."""
    return PyArray_NewLikeArray(x, cnp.NPY_CORDER, NULL, 0)


cdef tuple derivatives(const Options *options, cnp.ndarray x):
    """The arrays to write gradient and Hessian diagonal to: buffers, new ones, or None."""
    cdef object grad = None, hess = None
    if options.wants_grad:
        grad = <object>options.grad if options.grad != NULL else like(x)
    if options.wants_hess:
        hess = <object>options.hess if options.hess != NULL else like(x)
    return grad, hess


cdef inline void *data_of(object a) noexcept:
    """Where an array lies, or NULL if it is None."""
    return NULL if a is None else cnp.PyArray_DATA(<cnp.ndarray>a)


cdef int threads_of(const Options *options, Py_ssize_t size) except -1:
    return 1 if size < serial_below else team(options.n_threads or None, size)


cdef object returned(const Options *options, value, grad, hess):
    if options.wants_grad:
        return (value, grad, hess) if options.wants_hess else (value, grad)
    return (value, hess) if options.wants_hess else value


# ---- losses of rows ------------------------------------------------------------------------------------------------

def row_loss(str function, double parameter, logits, target, dict given):
    """Return what a public loss of rows returns, of labels or probabilities and the options that it was given."""
    if type(logits) is ndarray and type(target) is ndarray:
        result = plain_row_loss(function, parameter, <cnp.ndarray>logits, <cnp.ndarray>target, given)
        if result is not None:
            return result
    if general_rows is None:
        connect()
    return general_rows(function, parameter, logits, target, given)


cpdef object plain_row_loss(str function, double parameter, cnp.ndarray logits, cnp.ndarray target, dict given):
    """Return the result of a plain call, or None if the call is not plain."""
    cdef Options options
    cdef plain_rows rows
    cdef Py_ssize_t count
    cdef PyObject *found
    cdef object value = None, grad, hess
    cdef bint is_double
    if not (
        has_kernels()
        and cnp.PyArray_NDIM(logits) == 2 and cnp.PyArray_ISCARRAY_RO(logits) and cnp.PyArray_SIZE(logits) > 0
        and cnp.PyArray_NDIM(target) == 1 and cnp.PyArray_ISCARRAY_RO(target)
        and cnp.PyArray_ITEMSIZE(target) == 8 and target.descr.kind == b"i" and cnp.PyArray_SIZE(target) <= SCANNED
        and cnp.PyArray_DIM(target, 0) == cnp.PyArray_DIM(logits, 0)
        and is_plain_parameter(parameter)
        and are_plain(given, &options) and are_buffers(&options, logits, target)
    ):
        return None
    found = kernels_of(logits)
    if found == NULL:
        return None
    module = <object>PyTuple_GET_ITEM(<object>found, 0)
    is_double = <object>PyTuple_GET_ITEM(<object>found, 1) is float64
    rows.n_rows, rows.n_classes = cnp.PyArray_DIM(logits, 0), cnp.PyArray_DIM(logits, 1)
    rows.x, rows.labels = cnp.PyArray_DATA(logits), <const int64_t *>cnp.PyArray_DATA(target)
    if not are_plain_weights(&options, &rows, logits, is_double):
        return None
    count = labels_that_count(rows.labels, rows.n_rows, rows.n_classes, options.ignore_index)
    if count < 0:
        return None
    rows.is_mean, rows.denominator = options.is_mean, <double>count if options.is_mean else 1
    if not options.sums:
        value = cnp.PyArray_EMPTY(1, cnp.PyArray_DIMS(logits), cnp.NPY_DOUBLE if is_double else cnp.NPY_FLOAT, 0)
    grad, hess = derivatives(&options, logits)
    rows.value, rows.grad, rows.hess = data_of(value), data_of(grad), data_of(hess)
    rows.phi, rows.options, rows.ignore_index = module.PHI[function], options.numbers, options.ignore_index
    rows.options.parameter = parameter
    rows.n_threads = threads_of(&options, cnp.PyArray_SIZE(logits))
    if not (<run_plain_rows>PyCapsule_GetPointer(module.PLAIN_ROWS, XCE_PLAIN_ROWS))(&rows):
        return None
    if options.sums:
        value = xce_number(rows.total / rows.denominator if rows.denominator != 0 else NAN, is_double)
    return returned(&options, value, grad, hess)


cdef inline Py_ssize_t labels_that_count(
    const int64_t *labels, Py_ssize_t n, Py_ssize_t n_classes, int64_t ignore_index
) noexcept nogil:
    """How many labels are not the one to ignore; -1 if one is no class."""
    cdef Py_ssize_t i, count = 0
    cdef bint counts, bad = False
    for i in range(n):
        counts = labels[i] != ignore_index
        count += counts
        bad |= counts & (<uint64_t>labels[i] >= <uint64_t>n_classes)
    return -1 if bad else count


cdef bint are_plain_weights(const Options *options, plain_rows *rows, cnp.ndarray logits, bint is_double) noexcept:
    """Enter the weights; whether they are plain: finite, of classes none negative, of rows none 0."""
    cdef cnp.ndarray a
    rows.weight = rows.sample = NULL
    rows.sample_bytes = 0
    if options.weight != NULL:
        a = <cnp.ndarray>options.weight
        if not is_vector(a, rows.n_classes) or cnp.PyArray_ITEMSIZE(a) != (8 if is_double else 4):
            return False
        rows.weight = cnp.PyArray_DATA(a)
        if not are_within(rows.weight, rows.n_classes, is_double, 0, False):
            return False
    if options.sample_weight != NULL:
        a = <cnp.ndarray>options.sample_weight
        if not is_vector(a, rows.n_rows) or cnp.PyArray_ITEMSIZE(a) < 4:
            return False
        rows.sample, rows.sample_bytes = cnp.PyArray_DATA(a), <int>cnp.PyArray_ITEMSIZE(a)
        if not are_within(rows.sample, rows.n_rows, rows.sample_bytes == 8, -FLOAT32_BELOW, True):
            return False
    return True


cdef inline bint is_vector(cnp.ndarray a, Py_ssize_t n) noexcept:
    """Whether an array has n floats side by side, of float64 at most."""
    return (
        cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == n and cnp.PyArray_ISCARRAY_RO(a)
        and a.descr.kind == b"f" and cnp.PyArray_ITEMSIZE(a) <= 8
    )


cdef bint are_within(const void *numbers, Py_ssize_t n, bint is_double, double low, bint not_0) noexcept nogil:
    """Whether numbers are at least `low`, and 0, unless they are not to be, or of a size that float32 holds."""
    cdef Py_ssize_t i
    cdef double a
    for i in range(n):
        a = (<const double *>numbers)[i] if is_double else (<const float *>numbers)[i]
        if not (low <= a < FLOAT32_BELOW and (FLOAT32_ABOVE < fabs(a) or a == 0 and not not_0)):
            return False
    return True


# ---- losses of single elements -------------------------------------------------------------------------------------

def element_loss(loss, tuple params, x, target, dict given, tuple factors=(None, None), axis=None, reduction=None):
    """Return what a public loss of single elements returns; see `_elements.element_loss`."""
    if type(x) is ndarray and type(target) is ndarray and axis is None and factors[0] is None and factors[1] is None:
        result = plain_element_loss(loss, params, <cnp.ndarray>x, <cnp.ndarray>target, given, reduction)
        if result is not None:
            return result
    if general_rows is None:
        connect()
    return general_elements(loss, params, x, target, given, factors, axis, reduction)


cpdef object plain_element_loss(loss, tuple params, cnp.ndarray x, cnp.ndarray target, dict given, reduction):
    """Return the result of a plain call, or None if the call is not plain."""
    cdef Options options
    cdef plain_elements elements
    cdef PyObject *found
    cdef object value = None, grad, hess
    cdef bint is_double
    cdef double numbers[PARAMETERS]
    cdef double denominator
    cdef int i
    if not (
        has_kernels()
        and cnp.PyArray_ISCARRAY_RO(x) and cnp.PyArray_ISCARRAY_RO(target) and x.descr == target.descr
        and have_one_shape(x, target) and cnp.PyArray_NDIM(x) > 0 and 0 < cnp.PyArray_SIZE(x) <= SCANNED
        and loss.range is None and loss.target_range is unit_interval
        and are_plain(given, &options) and not options.of_rows and options.sample_weight == NULL
        and are_buffers(&options, x, target) and (reduction is None or is_plain_reduction(reduction, &options))
    ):
        return None
    found = kernels_of(x)
    if found == NULL:
        return None
    module = <object>PyTuple_GET_ITEM(<object>found, 0)
    is_double = <object>PyTuple_GET_ITEM(<object>found, 1) is float64
    if cnp.PyArray_ITEMSIZE(x) != (8 if is_double else 4):  # 16 bits
        return None
    for i in range(PARAMETERS):
        numbers[i] = <double>params[i] if i < len(params) else 0
        if not is_plain_parameter(numbers[i]):
            return None
    elements.n, elements.x, elements.y = cnp.PyArray_SIZE(x), cnp.PyArray_DATA(x), cnp.PyArray_DATA(target)
    if not are_between_0_and_1(elements.y, elements.n, is_double):
        return None
    denominator = <double>elements.n if options.is_mean else 1
    if not options.sums:
        value = like(x)
    grad, hess = derivatives(&options, x)
    elements.value, elements.grad, elements.hess = data_of(value), data_of(grad), data_of(hess)
    elements.formula, elements.params, elements.scale = module.ELEMENT_FORMULAS[loss.formula], numbers, 1 / denominator
    elements.n_threads = threads_of(&options, elements.n)
    (<run_plain_elements>PyCapsule_GetPointer(module.PLAIN_ELEMENTS, XCE_PLAIN_ELEMENTS))(&elements)
    if options.sums:
        value = xce_number(elements.total / denominator, is_double)
    return returned(&options, value, grad, hess)


cdef bint are_between_0_and_1(const void *numbers, Py_ssize_t n, bint is_double) noexcept nogil:
    cdef Py_ssize_t i
    cdef bint bad = False
    if is_double:
        for i in range(n):
            bad |= not (0 <= (<const double *>numbers)[i] <= 1)
    else:
        for i in range(n):
            bad |= not (0 <= (<const float *>numbers)[i] <= 1)
    return not bad
