/* An array times a number that only the GPU knows, in place. Backward passes need it, and mostly the number is 1: nothing is
 * read or written then, and the CPU need not wait to learn it. */

typedef struct {
    char *data;             /* begins at a multiple of 16 bytes */
    const double *factor;
    int64_t n;              /* of numbers, side by side */
} scale_job;

enum { SCALED = 16 / sizeof(storage) };

struct __align__(16) scaled_chunk {
    storage at[SCALED];
};

#if defined(XCE_SCALE)
XCE_KERNEL(1) scale(scale_job j)
{
    scalar factor = (scalar)*j.factor;
    if (factor == 1)
        return;
    int64_t step = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    scaled_chunk *chunks = (scaled_chunk *)j.data;
    for (int64_t k = first; k < j.n / SCALED; k += step) {
        scaled_chunk c = chunks[k];
        for (int i = 0; i < SCALED; i++)
            c.at[i] = s_store(s_load(c.at[i]) * factor);
        chunks[k] = c;
    }
    for (int64_t i = j.n / SCALED * SCALED + first; i < j.n; i += step)
        ((storage *)j.data)[i] = s_store(s_load(((storage *)j.data)[i]) * factor);
}
#endif
