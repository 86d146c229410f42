/* Sums over rows, always in the same order: blocks sum what they are dealt, then one thread adds the blocks' sums. */

enum { SUM_BLOCKS = 64, SUM_THREADS = 256 };

typedef struct {
    operand label, sample, value;
    const scalar *weight;
    double *partials, *result;   /* SUM_BLOCKS sums, and the sum of them */
    scalar *loss;                /* or NULL: result over *denominator, NaN if that is 0, or the result itself */
    const double *denominator;
    int64_t n_rows, n_classes, axes, shape[XCE_AXES];
    int64_t label_kind, ignore_index;
} sum_job;

XCE_FN int64_t offset_of(const sum_job &j, const operand &o, int64_t row)
{
    int64_t offset = 0;
    for (int a = (int)j.axes - 1; a > 0; a--) {
        offset += row % j.shape[a] * o.rows[a];
        row /= j.shape[a];
    }
    return offset + row * o.rows[0];
}

/* A row's value or, where there are none, its share of the mean's denominator. */
XCE_FN double term_of(const sum_job &j, int64_t row)
{
    if (j.value.data)
        return *(const scalar *)(j.value.data + offset_of(j, j.value, row));
    double term = j.sample.data ? *(const scalar *)(j.sample.data + offset_of(j, j.sample, row)) : 1;
    if (j.label.data) {
        label_of_row y = read_label(j.label.data + offset_of(j, j.label, row), (int)j.label_kind, j.n_classes,
                                    j.ignore_index);
        if (y.status == IGNORED || (y.status == INVALID && j.weight))
            return 0;
        if (j.weight)
            term *= j.weight[y.value];
    }
    return term;
}

struct double_array { double at[SUM_THREADS]; };

XCE_KERNEL(1) partial_sums(sum_job j)
{
    XCE_SHARED(double_array, sums);
    double sum = 0;
    for (int64_t row = (int64_t)blockIdx.x * SUM_THREADS + threadIdx.x; row < j.n_rows; row += (int64_t)SUM_BLOCKS * SUM_THREADS)
        sum += term_of(j, row);
    sums.at[threadIdx.x] = sum;
    for (int step = SUM_THREADS / 2; step; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step)
            sums.at[threadIdx.x] += sums.at[threadIdx.x + step];
    }
    if (threadIdx.x == 0)
        j.partials[blockIdx.x] = sums.at[0];
}

XCE_KERNEL(1) final_sum(sum_job j)
{
    double sum = 0;
    for (int b = 0; b < SUM_BLOCKS; b++)
        sum += j.partials[b];
    *j.result = sum;
    if (j.loss) {
        double d = j.denominator ? *j.denominator : 1;
        *j.loss = d != 0 ? (scalar)(sum / d) : XCE_NAN;
    }
}
