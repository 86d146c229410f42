/* Sums, always in the same order: blocks sum what they are dealt, then one block sums the sums. */

enum { SUM_THREADS = 256 }; /* of a block at most; a power of two */

template <class T> struct of_threads {
    T at[SUM_THREADS];
};

/* What the threads of a block have, joined in a tree; of thread 0 alone. */
template <class T, class F> XCE_FN T join_block(T mine, F join)
{
    XCE_SHARED(of_threads<T>, all);
    all.at[threadIdx.x] = mine;
    for (int step = (int)blockDim.x / 2; step; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step)
            all.at[threadIdx.x] = mine = join(mine, all.at[threadIdx.x + step]);
    }
    return mine;
}

XCE_FN double sum_of_block(double sum)
{
    return join_block(sum, [](double a, double b) { return a + b; });
}

XCE_FN const char *row_of(const sum_job &j, const operand &o, int64_t row)
{
    return o.data + walk(j.shape, (int)j.axes, o.rows, row);
}

/* A row's value or, where there are none, its share of the mean's denominator. */
XCE_FN double term_of(const sum_job &j, int64_t row)
{
    if (j.value.data)
        return *(const scalar *)row_of(j, j.value, row);
    double term = j.sample.data ? *(const scalar *)row_of(j, j.sample, row) : 1;
    if (term == 0 || (j.left.data && *(const float *)row_of(j, j.left, row) == 0))
        return 0;
    if (j.label.data) {
        label_of_row y = read_label(row_of(j, j.label, row), (int)j.label_kind, j.n_classes, j.ignore_index);
        if (y.status == IGNORED || (y.status == INVALID && j.weight))
            return 0;
        if (j.weight)
            term *= j.weight[y.value];
    }
    return term;
}

#if defined(XCE_SUMS)
XCE_KERNEL(1) partial_sums(XCE_JOB(sum_job) j)
{
    double sum = 0, size = 0;
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; row < j.n_rows; row += step) {
        double term = term_of(j, row);
        sum += term, size += fabs(term);
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0)
        j.partials[blockIdx.x] = sum;
    if (!j.sizes)
        return;
    __syncthreads();
    size = sum_of_block(size);
    if (threadIdx.x == 0)
        j.sizes[blockIdx.x] = size;
}

XCE_KERNEL(1) final_sum(XCE_JOB(sum_job) j) /* of one block */
{
    double sum = 0;
    for (int64_t b = threadIdx.x; b < j.n_partials; b += blockDim.x)
        sum += j.partials[b];
    sum = sum_of_block(sum);
    if (threadIdx.x != 0)
        return;
    for (int64_t b = 0; j.sizes && sum == 0 && b < j.n_partials; b++)
        if (j.sizes[b] != 0) /* weights that cancel: what is divided by their sum is not a number */
            sum = XCE_NAN;
    *j.result = sum;
    if (j.loss) {
        double d = j.denominator ? *j.denominator : 1;
        *j.loss = d != 0 ? (scalar)(sum * j.factor / d) : XCE_NAN;
    }
}
#endif
