/* What is done to arrays besides the losses: the first bad entry is found, numbers are converted, added up and averaged.
 * Any kind of numbers, any strides. Nothing depends on the type of the logits: a module is compiled once. */

enum { IS_LABEL, IS_WITHIN, IS_BEYOND }; /* what a scan asks */

/* ---- numbers, exactly: float32 that is subnormal, too, which arithmetic flushes to 0 under -ftz=true --------------------- */

XCE_FN double double_of_float_bits(uint32_t bits)
{
    if (bits & 0x7f800000)
        return __int_as_float((int)bits);
    double steps = (double)(bits & 0x7fffff) * 0x1p-149;
    return bits >> 31 ? -steps : steps;
}

XCE_FN uint32_t nearest_float_bits(double x)
{
    double size = fabs(x);
    if (!(size < 0x1p-126))
        return (uint32_t)__float_as_int((float)x);
    double steps = size * 0x1p149 + 0x1p52 - 0x1p52; /* to a whole number, ties to even */
    return (uint32_t)steps | (__double_as_longlong(x) < 0 ? 0x80000000u : 0);
}

XCE_FN double read_double(const char *p, int kind)
{
    switch (kind) {
    case AS_BFLOAT: return double_of_float_bits((uint32_t) * (const uint16_t *)p << 16);
    case AS_FLOAT: return double_of_float_bits(*(const uint32_t *)p);
    default: return read_number<double>(p, kind);
    }
}

/* 16-bit numbers as NumPy has them: half is rounded once, bfloat16 after float. */
XCE_FN void write_double(char *p, int kind, double x)
{
    uint32_t bits = nearest_float_bits(x);
    switch (kind) {
    case AS_HALF: *(uint16_t *)p = double_to_half(x); break;
    case AS_BFLOAT:
        *(uint16_t *)p = (uint16_t)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        break;
    case AS_FLOAT: *(uint32_t *)p = bits; break;
    default: *(double *)p = x;
    }
}

/* ---- scans ----------------------------------------------------------------------------------------------------------- */

XCE_FN bool weighs(const array_job &j, const numbers &weight, int64_t flat)
{
    return !weight.data || read_double(weight.data + place_of(j, weight, flat), (int)weight.kind) != 0;
}

XCE_FN bool is_outside(const array_job &j, int64_t flat)
{
    const char *p = j.x.data + place_of(j, j.x, flat);
    if (j.what == IS_LABEL)
        return read_label(p, (int)j.x.kind, j.n_classes, j.ignore_index).status == INVALID;
    double x = read_double(p, (int)j.x.kind);
    if (j.what == IS_BEYOND) /* a finite number that is not 0 */
        return fabs(x) > 0 && fabs(x) < XCE_INF && !(fabs(x) > j.low && fabs(x) < j.high);
    return !(x >= j.low && x <= j.high);
}

XCE_FN bool is_bad(const array_job &j, int64_t flat)
{
    return is_outside(j, flat) && weighs(j, j.weight, flat) && weighs(j, j.sample, flat);
}

#if defined(XCE_ARRAYS)
/* The flat index of the first bad entry that a block sees, or NOWHERE. */
XCE_KERNEL(1) scan(XCE_JOB(array_job) j)
{
    int64_t first = NOWHERE, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t flat = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; flat < j.n; flat += step)
        if (is_bad(j, flat) && flat < first)
            first = flat;
    first = join_block(first, [](int64_t a, int64_t b) { return a < b ? a : b; });
    if (threadIdx.x == 0)
        ((int64_t *)j.out.data)[blockIdx.x] = first;
}

XCE_KERNEL(1) convert(XCE_JOB(array_job) j)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t flat = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; flat < j.n; flat += step)
        write_double(j.out.data + place_of(j, j.out, flat), (int)j.out.kind,
                     read_double(j.x.data + place_of(j, j.x, flat), (int)j.x.kind));
}

XCE_KERNEL(1) sum_numbers(XCE_JOB(array_job) j)
{
    double sum = 0;
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t flat = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; flat < j.n; flat += step)
        sum += read_double(j.x.data + place_of(j, j.x, flat), (int)j.x.kind);
    sum = sum_of_block(sum);
    if (threadIdx.x == 0)
        ((double *)j.out.data)[blockIdx.x] = sum;
}

/* Means over the classes: a warp for each row or, where neighbouring rows lie side by side, a thread. Numbers are double here. */
XCE_KERNEL(1) mean_of_rows(XCE_JOB(array_job) j)
{
    int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64_t)gridDim.x * blockDim.x;
    for (int64_t row = thread / j.lanes; row < j.n; row += threads / j.lanes) {
        const char *p = j.x.data + place_of(j, j.x, row);
        real_sum sum = {0, 0};
        if (j.x.kind == 0) /* double, of which a sum loses digits */
            for (int64_t c = thread % j.lanes; c < j.n_classes; c += j.lanes)
                sum = r_sum_add(sum, *(const double *)(p + c * j.classes));
        else
            for (int64_t c = thread % j.lanes; c < j.n_classes; c += j.lanes)
                sum.high += read_double(p + c * j.classes, (int)j.x.kind);
        for (int step = (int)j.lanes / 2; step; step /= 2) {
            double low = __shfl_xor_sync(0xffffffffu, sum.low, step);
            sum = r_sum_add(sum, __shfl_xor_sync(0xffffffffu, sum.high, step));
            sum.low += low;
        }
        if (thread % j.lanes == 0)
            write_double(j.out.data + place_of(j, j.out, row), (int)j.out.kind, r_sum_total(sum) / (double)j.n_classes);
    }
}
#endif
