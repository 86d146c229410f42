/* Calls of the plain kind, as src/core.pyx hands them to the kernels of a storage type: arrays without gaps, checked. */
#ifndef XCE_FRONT_H
#define XCE_FRONT_H

#include <stddef.h>
#include <stdint.h>
#include "options.h"

enum { XCE_PARAMETERS = 5 }; /* of a formula of single elements */

typedef struct {
    const void *x;               /* n_rows x n_classes */
    void *grad, *hess;           /* likewise, or NULL */
    void *value;                 /* of rows, of the scalar type; or NULL */
    const int64_t *labels;
    const void *weight;          /* of classes, of the scalar type; or NULL */
    const void *sample;          /* weights of rows, floats of so many bytes; or NULL */
    int sample_bytes;
    ptrdiff_t n_rows, n_classes;
    int64_t ignore_index;
    row_options options;
    int phi, n_threads, is_mean;
    double total;                /* the sum of the losses; and what it is to be divided by, */
    double denominator;          /* given unless a mean has weights */
} plain_rows;

typedef struct {
    const void *x, *y;           /* of the storage type, as grad and hess */
    void *value, *grad, *hess;   /* or NULL */
    ptrdiff_t n;
    const double *params;        /* XCE_PARAMETERS */
    double scale;                /* of the derivatives */
    double total;                /* the sum of the losses */
    int formula, n_threads;
} plain_elements;

/* 1; or 0: the call is not plain, and nothing was written; or -1: an exception is set. */
typedef int (*run_plain_rows)(plain_rows *);
typedef int (*run_plain_elements)(plain_elements *);

/* the names of their capsules */
#define XCE_PLAIN_ROWS "xce.plain_rows"
#define XCE_PLAIN_ELEMENTS "xce.plain_elements"

#endif
