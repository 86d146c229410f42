/* The losses of single elements on a GPU: each thread takes VEC neighbours in C order at a time, as chunks of 16 bytes where an
 * array lies side by side, and one by one where it does not. One kernel a module: XCE_FORMULA. */

enum { AS_BOOL = 17, AS_FLOAT = 20, AS_DOUBLE = 24, AS_HALF = 18, AS_BFLOAT = 19 }; /* 0: storage, others as labels */

template <class T> XCE_FN T read_number(const char *p, int kind)
{
    switch (kind) {
    case 0: return s_load(*(const storage *)p);
    case AS_BOOL: return *p != 0;
    case AS_HALF: return (T)half_to_float(*(const uint16_t *)p);
    case AS_BFLOAT: return (T)__int_as_float((int)((uint32_t) * (const uint16_t *)p << 16));
    case AS_FLOAT: return (T) * (const float *)p;
    case AS_DOUBLE: return (T) * (const double *)p;
    case 8: return (T) * (const uint64_t *)p;
    default: return (T)read_integer(p, kind);
    }
}

template <class Job> XCE_FN int64_t place_of(const Job &j, const numbers &a, int64_t flat)
{
    return walk(j.shape, (int)j.axes, a.strides, flat);
}

XCE_FN int64_t place_of(const element_job &j, const numbers &a, int64_t flat)
{
    return a.adjacent ? flat * a.strides[j.axes - 1] : walk(j.shape, (int)j.axes, a.strides, flat);
}

/* Entries that do not lie in a chunk of their own type: called, as a kernel does this for eight arrays. */
template <class T> XCE_CALLED void read_apart(const element_job &j, const numbers &a, int64_t flat, T missing, T *out)
{
    for (int i = 0; i < VEC; i++)
        out[i] = a.data && flat + i < j.n ? read_number<T>(a.data + place_of(j, a, flat + i), (int)a.kind) : missing;
}

XCE_CALLED void write_apart(const element_job &j, const numbers &a, int64_t flat, const scalar *in)
{
    for (int i = 0; i < VEC && flat + i < j.n; i++)
        put<storage>(a.data + place_of(j, a, flat + i), in[i]);
}

XCE_FN bool in_chunk(const element_job &j, const numbers &a, int64_t flat)
{
    return a.adjacent && a.kind == 0 && flat + VEC <= j.n && (uint64_t)(a.data + flat * (int64_t)sizeof(storage)) % 16 == 0;
}

template <class T> XCE_FN void read_numbers(const element_job &j, const numbers &a, int64_t flat, T missing, T *out)
{
    if (!a.data) {
#pragma unroll
        for (int i = 0; i < VEC; i++)
            out[i] = missing;
    } else if (in_chunk(j, a, flat)) {
        scalar x[VEC];
        unpack(*(const chunk *)(a.data + flat * (int64_t)sizeof(storage)), x);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            out[i] = (T)x[i];
    } else {
        T apart[VEC]; /* in memory, and only that */
        read_apart<T>(j, a, flat, missing, apart);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            out[i] = apart[i];
    }
}

/* Whether numbers are more precise than a scalar, and what they lack as such: in memory, and only that. */
XCE_FN bool has_low(const numbers &a) { return sizeof(scalar) == sizeof(float) && a.data && a.kind == AS_DOUBLE; }

XCE_CALLED void read_low(const element_job &j, const numbers &a, int64_t flat, scalar *low)
{
    for (int i = 0; i < VEC; i++) {
        double x = flat + i < j.n ? read_number<double>(a.data + place_of(j, a, flat + i), (int)a.kind) : 0;
        scalar rest = (scalar)(x - (double)(scalar)x);
        low[i] = rest - rest == 0 ? rest : 0; /* infinities lack nothing */
    }
}

XCE_FN void write_numbers(const element_job &j, const numbers &a, int64_t flat, const scalar *in)
{
    if (in_chunk(j, a, flat))
        put_all<storage>(a.data + flat * (int64_t)sizeof(storage), in);
    else {
        scalar apart[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++)
            apart[i] = in[i];
        write_apart(j, a, flat, apart);
    }
}

#if defined(XCE_FORMULA)
#define XCE_ELEMENT XCE_PASTE(element_, XCE_FORMULA)

/* Weights are multiplied in double: they may be, and so may their sum, what a float does not hold. */
XCE_FN jet weigh_element(jet f, double factor, double scale)
{
    const jet none = {0, 0, 0};
    f.value = (scalar)(f.value * factor);
    scale_derivatives(&f, (scalar)(factor * scale));
    return factor == 0 ? none : f; /* whatever the element holds */
}

XCE_KERNEL(1) elements(XCE_JOB(element_job) j)
{
    const bool has_weights = j.weight.data || j.sample.data, y_has_low = has_low(j.y), w_has_low = has_low(j.pos_weight);
    const double scale = !j.denominator ? j.factor : *j.denominator != 0 ? j.factor / *j.denominator : XCE_NAN;
    const parameters with = parameters_of(j.with);
    int64_t step = (int64_t)gridDim.x * blockDim.x * VEC;
    double sum = 0;
    for (int64_t flat = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC; flat < j.n; flat += step) {
        scalar x[VEC], y[VEC], w[VEC], y_low[VEC], w_low[VEC], g[VEC], h[VEC];
        double weight[VEC], sample[VEC];
        read_numbers<scalar>(j, j.x, flat, 0, x);
        read_numbers<scalar>(j, j.y, flat, 0, y);
        read_numbers<scalar>(j, j.pos_weight, flat, 1, w);
        if (y_has_low)
            read_low(j, j.y, flat, y_low);
        if (w_has_low)
            read_low(j, j.pos_weight, flat, w_low);
        if (has_weights) {
            read_numbers<double>(j, j.weight, flat, 1, weight);
            read_numbers<double>(j, j.sample, flat, 1, sample);
#pragma unroll
            for (int i = 0; i < VEC; i++)
                weight[i] *= sample[i];
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            two_part target = {y[i], y_has_low ? y_low[i] : 0}, factor = {w[i], w_has_low ? w_low[i] : 0};
            jet f = XCE_ELEMENT(x[i], target, factor, with);
            if (has_weights) {
                if (flat + i < j.n && weight[i] != 0)
                    sum += f.value * weight[i];
                f = weigh_element(f, weight[i], scale);
            } else
                scale_derivatives(&f, (scalar)scale);
            x[i] = flat + i < j.n ? f.value : 0, g[i] = f.d1, h[i] = f.d2;
        }
        if (!has_weights)
            sum += sum_of(x);
        if (j.grad.data)
            write_numbers(j, j.grad, flat, g);
        if (j.hess.data)
            write_numbers(j, j.hess, flat, h);
        if (j.value.data) {
#pragma unroll
            for (int i = 0; i < VEC; i++)
                if (flat + i < j.n)
                    ((scalar *)j.value.data)[flat + i] = x[i];
        }
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0)
        j.partials[blockIdx.x] = sum;
}
#endif
