/* Sums, always in the same order: blocks sum what they are dealt, then one thread adds the blocks' sums. */

enum { SUM_THREADS = 256 }; /* of a block at most; a power of two */

struct double_array {
    double at[SUM_THREADS];
};

XCE_FN double sum_of_block(double sum)
{
    XCE_SHARED(double_array, sums);
    sums.at[threadIdx.x] = sum;
    for (int step = (int)blockDim.x / 2; step; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step)
            sums.at[threadIdx.x] += sums.at[threadIdx.x + step];
    }
    return sums.at[0]; /* of thread 0 alone */
}

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

#if defined(XCE_SUMS)
XCE_KERNEL(1) partial_sums(sum_job j)
{
    double sum = 0;
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; row < j.n_rows; row += step)
        sum += term_of(j, row);
    sum = sum_of_block(sum);
    if (threadIdx.x == 0)
        j.partials[blockIdx.x] = sum;
}

XCE_KERNEL(1) final_sum(sum_job j)
{
    double sum = 0;
    for (int64_t b = 0; b < j.n_partials; b++)
        sum += j.partials[b];
    *j.result = sum;
    if (j.loss) {
        double d = j.denominator ? *j.denominator : 1;
        *j.loss = d != 0 ? (scalar)(sum * j.factor / d) : XCE_NAN;
    }
}
#endif
