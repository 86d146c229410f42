/* The losses of rows on a GPU. GROUP threads share a row: up to 32, several groups in a block; more, a block, or a CLUSTER of
 * blocks. Its sums are added by each thread in the order of its classes, in twice the precision, then as team.h says. Offsets
 * have 64 bits, within a row those of chunks 32.
 */

/* Rows in turns: blocks (or clusters) take the next ones when they are through. */
template <int GROUP, int CLUSTER, int LEVEL> XCE_FN void all_rows(const row_job &j)
{
    XCE_SHARED_ARRAY(chunk, cache);
    XCE_SHARED(message_board, board);
    XCE_SHARED(row_finished, outputs);
    chunk *kept = cache + (int64_t)threadIdx.y * j.cached * GROUP + (GROUP > 1 ? threadIdx.x : 0);
    int64_t step = (int64_t)(gridDim.x / CLUSTER) * blockDim.y;
    for (int64_t row = (int64_t)(blockIdx.x / CLUSTER) * blockDim.y + threadIdx.y; row < j.n_rows; row += step) {
        if (GROUP > 1 && LEVEL < FULL)
            chunked_row<GROUP, CLUSTER, LEVEL>(j, row, kept, &board, &outputs);
        else
            plain_row<GROUP, CLUSTER, LEVEL>(j, row, &board, &outputs);
    }
}

/* One kernel a module: XCE_GROUP threads share a row (1: classes with a stride), XCE_CLUSTER blocks, at XCE_LEVEL. Which one a
 * row gets is decided in xce/_engines/cuda.py. */
#if defined(XCE_GROUP)
/* Threads that shall be resident on a multiprocessor: 768 leave each of them 80 registers, 512 leave 128. */
#if XCE_LEVEL == 0
#define XCE_RESIDENT (!XCE_TAKES_MORE && sizeof(scalar) == 4 && XCE_WHAT != STATS ? 768 : 512)
#else
#define XCE_RESIDENT (!XCE_TAKES_MORE && (sizeof(scalar) == 4 || XCE_LEVEL == DENSE) ? 512 : 256)
#endif
XCE_KERNEL(XCE_CLUSTER) XCE_BOUNDS(XCE_THREADS, XCE_RESIDENT / XCE_THREADS) rows(XCE_JOB(row_job) j)
{
    all_rows<XCE_GROUP, XCE_CLUSTER, XCE_LEVEL>(j);
}
#endif
