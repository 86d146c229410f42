/* Rows copied from where they lie to where BLAS reads them, and back: any strides, another type, zeros for rows that do not
 * count, of which nothing is read. One kernel a module: XCE_COPY is SAME for numbers of XCE_BYTES that stay as they are, WIDEN for 16-bit
 * ones that become float32, NARROW for those that come from it. */

/* Some rows of an array, as xce/_engines/cuda_linear.py lists them: all its rows have one number, in C order. */
typedef struct {
    char *data;                        /* NULL: there is none */
    int64_t columns;                   /* bytes from a column to the next */
    int64_t first;                     /* the number of the first of them */
    int64_t axes, shape[XCE_AXES], strides[XCE_AXES];
} row_range;

typedef struct {
    row_range from, to, label, sample, left;
    int64_t n_rows, n_columns, label_kind, sample_size, ignore_index;
    uint64_t fill;                     /* where there is no `from`: the bits of a number */
} copy_job;

XCE_FN char *range_row(const row_range &r, int64_t row)
{
    return r.data + walk(r.shape, (int)r.axes, r.strides, r.first + row);
}

XCE_FN bool is_zero(const char *p, int64_t size) { return size == 8 ? *(const double *)p == 0 : *(const float *)p == 0; }

XCE_FN bool is_removed(const copy_job &j, int64_t row)
{
    if (j.sample.data && is_zero(range_row(j.sample, row), j.sample_size))
        return true;
    if (j.left.data && *(const float *)range_row(j.left, row) == 0)
        return true;
    return j.label.data && read_label(range_row(j.label, row), (int)j.label_kind, 1, j.ignore_index).status == IGNORED;
}

#if defined(XCE_COPY)

enum { SAME, WIDEN, NARROW };

template <int BYTES> struct bits_of;
template <> struct bits_of<1> { typedef unsigned char type; };
template <> struct bits_of<2> { typedef uint16_t type; };
template <> struct bits_of<4> { typedef uint32_t type; };
template <> struct bits_of<8> { typedef uint64_t type; };

template <int COPY> struct copier { /* SAME */
    typedef bits_of<XCE_BYTES>::type from, to;
    XCE_FN to convert(from a) { return a; }
};
template <> struct copier<WIDEN> {
    typedef storage from;
    typedef scalar to;
    XCE_FN to convert(from a) { return s_load(a); }
};
template <> struct copier<NARROW> {
    typedef scalar from;
    typedef storage to;
    XCE_FN to convert(from a) { return s_store(a); }
};

typedef copier<XCE_COPY> copying;
typedef copying::from number_in;
typedef copying::to number_out;
enum { SIDE = 16 / (sizeof(number_in) > sizeof(number_out) ? sizeof(number_in) : sizeof(number_out)), TURNS = 4 };

template <class T> struct __align__(SIDE * sizeof(T)) side_by_side { T at[SIDE]; };

template <class T> XCE_FN bool lie_aligned(const char *p, int64_t columns)
{
    return columns == (int64_t)sizeof(T) && (uint64_t)p % sizeof(side_by_side<T>) == 0;
}

/* SIDE numbers of a row, or those that are left of it. */
XCE_FN void copy_side(const copy_job &j, const char *from, char *to, int64_t column)
{
    side_by_side<number_out> out;
    side_by_side<number_in> in;
    const bool whole = column + SIDE <= j.n_columns;
    to += column * j.to.columns;
    if (!from)
        for (int i = 0; i < SIDE; i++)
            out.at[i] = (number_out)j.fill;
    else {
        const char *source = from + column * j.from.columns;
        if (whole && lie_aligned<number_in>(source, j.from.columns))
            in = *(const side_by_side<number_in> *)source;
        else
            for (int i = 0; i < SIDE; i++)
                in.at[i] = column + i < j.n_columns ? *(const number_in *)(source + i * j.from.columns) : (number_in)0;
        for (int i = 0; i < SIDE; i++)
            out.at[i] = copying::convert(in.at[i]);
    }
    if (whole && lie_aligned<number_out>(to, j.to.columns))
        *(side_by_side<number_out> *)to = out;
    else
        for (int i = 0; i < SIDE && column + i < j.n_columns; i++)
            *(number_out *)(to + i * j.to.columns) = out.at[i];
}

/* Blocks take tiles in turns: threadIdx.y is a row, a thread has TURNS times SIDE columns of it. */
XCE_KERNEL(1) copy_rows(XCE_JOB(copy_job) j)
{
    const int64_t width = (int64_t)blockDim.x * SIDE, across = (j.n_columns + width * TURNS - 1) / (width * TURNS);
    const int64_t tiles = (j.n_rows + blockDim.y - 1) / blockDim.y * across;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t row = tile / across * blockDim.y + threadIdx.y;
        if (row >= j.n_rows)
            continue;
        char *to = range_row(j.to, row);
        const char *from = j.from.data && !is_removed(j, row) ? range_row(j.from, row) : (const char *)0;
        int64_t column = tile % across * width * TURNS + (int64_t)threadIdx.x * SIDE;
        for (int turn = 0; turn < TURNS && column < j.n_columns; turn++, column += width)
            copy_side(j, from, to, column);
    }
}
#endif
