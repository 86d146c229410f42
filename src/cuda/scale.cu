/* An array times a number that only the GPU knows, in place. Backward passes need it, and mostly the number is 1: nothing is
 * read or written then, and the CPU need not wait to learn it. */

typedef struct {
    char *data;             /* begins at a multiple of 16 bytes */
    const double *factor;
    int64_t n;              /* of numbers, side by side */
} scale_job;

#if defined(XCE_SCALE)
XCE_KERNEL(1) scale(XCE_JOB(scale_job) j)
{
    scalar factor = (scalar)*j.factor;
    if (factor == 1)
        return;
    int64_t step = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (int64_t k = first; k < j.n / VEC; k += step) {
        scalar x[VEC];
        unpack(((const chunk *)j.data)[k], x);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            x[i] *= factor;
        put_all<storage>(j.data + k * 16, x);
    }
    for (int64_t i = j.n / VEC * VEC + first; i < j.n; i += step)
        put<storage>(j.data + i * (int64_t)sizeof(storage), s_load(((const storage *)j.data)[i]) * factor);
}
#endif
