/* What is computed, on which arrays: one argument of the kernels, filled in by xce/_engines/cuda.py, which lists the same
 * fields in the same order. Every field has 8 bytes, so that nobody has to think of padding. */
#ifndef XCE_JOB_H
#define XCE_JOB_H

#include "options.h"

enum { XCE_AXES = 8 }; /* of rows, after neighbours were joined */

typedef struct {
    char *data;                /* NULL: there is none */
    int64_t classes;           /* bytes from a class to the next */
    int64_t rows[XCE_AXES];    /* bytes from a row to the next, along each axis of rows */
} operand;

#define XCE_FIELD(name) operand name;
typedef struct {
    XCE_ROW_OPERANDS(XCE_FIELD)
    const scalar *weight;
    const double *denominator; /* of the mean, on the device; NULL: 1 */
    int64_t n_rows, n_classes, n_places, axes, shape[XCE_AXES];
    int64_t what, phi, label_kind, index_kind, ignore_index, dense, teacher, q_is_scalar, cached;
    row_options options;
} row_job;
#undef XCE_FIELD

typedef struct {
    operand label, sample, left, value;
    const scalar *weight;
    double *partials, *result;   /* the sums of blocks, and the sum of them */
    double *sizes;               /* or NULL: the sums of the terms' sizes, which tell weights that cancel */
    scalar *loss;                /* or NULL: result over *denominator, NaN if that is 0, or the result itself */
    const double *denominator;
    int64_t n_partials, n_rows, n_classes, axes, shape[XCE_AXES];
    int64_t label_kind, ignore_index;
    double factor;               /* of the loss, besides */
} sum_job;

typedef struct {
    char *data;                  /* NULL: there is none */
    int64_t kind;                /* of its numbers: see read_number */
    int64_t adjacent;            /* 1: in C order without gaps */
    int64_t strides[XCE_AXES];
} numbers;

typedef struct {
    numbers x, y, pos_weight, weight, sample, value, grad, hess;
    const double *denominator;   /* of the mean, on the device; NULL: 1 */
    double *partials;            /* a sum of values for each block */
    double factor;               /* of the derivatives, besides */
    int64_t n, axes, shape[XCE_AXES];
    double with[5];
} element_job;

typedef struct {
    numbers x, out, weight, sample; /* an element is not bad where one of the weights is 0 */
    int64_t n, axes, shape[XCE_AXES];
    int64_t classes, lanes;      /* of means: bytes from a class of x to the next, and how many threads share a row */
    int64_t what, n_classes, ignore_index;
    double low, high;            /* what is allowed, both ends included */
} array_job;

#endif
