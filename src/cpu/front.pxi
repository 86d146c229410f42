# Calls of the plain kind, as front.h has them: for the front, which makes them, and for the kernels.

cdef extern from "cpu/front.h" nogil:
    enum:
        PARAMETERS "XCE_PARAMETERS"
        STEEP_ABOVE "XCE_STEEP_ABOVE"
    double FLOAT32_ABOVE "XCE_FLOAT32_ABOVE"
    double FLOAT32_BELOW "XCE_FLOAT32_BELOW"
    ctypedef struct row_options:
        double parameter, label_smoothing, temperature, softcap, z_loss
    ctypedef struct plain_rows:
        const void *x
        void *grad
        void *hess
        void *value
        const int64_t *labels
        const void *weight
        const void *sample
        int sample_bytes
        Py_ssize_t n_rows, n_classes
        int64_t ignore_index
        row_options options
        int phi, n_threads
        bint is_mean
        double total, denominator
    ctypedef struct plain_elements:
        const void *x
        const void *y
        void *value
        void *grad
        void *hess
        Py_ssize_t n
        const double *params
        double scale, total
        int formula, n_threads
    const char *XCE_PLAIN_ROWS
    const char *XCE_PLAIN_ELEMENTS
