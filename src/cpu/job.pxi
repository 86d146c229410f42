"""What is computed, on which arrays, and what is known of a tile of rows."""

cdef enum:
    MAX_AXES = 64          # as many as NumPy has
    BLOCK = 8              # vectors that are added up before they enter the double-precision sum
    TERMS = 4              # sums that one reading of a row can form, sum of exp included

    # What a reading adds up
    SUM_EXP = 0
    SUM_LINEAR = 1         # exp; d (max - x); d
    SUM_STATS = 2          # exp; exp (max - x); logits above the label's
    SUM_OUTSIDE = 3        # exp; exp of the classes that a sparse teacher does not have
    SUM_PARTS = 4          # exp of a steep loss in three parts
    SUM_PHI = 5            # d phi; d phi'; d phi''; slopes: a number for each phi
    SUM_TEACHER = 16       # the teacher's exp; the student's less that, of all classes; a dense teacher's student's
    SUM_DIVERGENCE = 17    # its value; p d1; p d2: a number for each divergence

    # Where exp waits for step 3
    FORGET = 0
    IN_GRAD = 1            # in the memory of the gradient, side by side
    STAGED = 2             # on the stage
    PAIRED = 3             # there, with the teacher's and the gap, then p, d1, d2 of a divergence; or slope and d phi''
    PARTS = 4              # that many vectors of each class

    # How much of the generality is compiled in; all levels give the same bits where they apply
    SPARSE = 0             # a label and nothing else: dense coefficients are all 0
    DENSE = 1              # probabilities or smoothing, phi linear
    MIXED = 2              # temperature, any phi, a teacher, all decided while running
    FULL = 3               # also where, softcap, any strides

# Tuning, measured on two cores of an AMD EPYC (Zen 4). Milliseconds before and after, 65536x100, float32, one thread:
#   hot loops in functions of their own, constants pinned to registers (GCC otherwise reads eight vectors of constants
#   from memory for each vector of logits)                                                       4.1  3.0 (8192x1000)
#   -fno-tree-loop-distribute-patterns (`rep stos` for 500 bytes of zeros), lane sums in registers  6.5  5.8
#   the next tile is prefetched into the second-level cache, not the first                          5.9  4.6
#   many instead of wide up to 128 classes                                                          6.1  4.3
#   gradients of more than 16 MiB transposed in a buffer and written past the caches                8.4  6.7 (with them)
cdef enum:
    MANY_UP_TO = 128        # classes
    MANY_AT_MOST = 16777216  # classes; beyond, a float32 lane cannot hold the index of the top entry
    # Vectors kept between the readings: 64 KiB a thread at most. In a row that fits, a class of a divergence costs two
    # exp, else six.
    STAGE = 1024
    STREAM_BYTES = 16777216  # gradients larger than this go past the caches
    UNIT_LOGITS = 32768    # a thread's portion ...
    UNIT_ROWS = 1024       # ... which is a number of rows that depends on the classes alone, as its sum is rounded
    CHUNK_LOGITS = 16777216  # whose sums are added up first
    LOOK_CLASSES = 16384   # of a row, or LANES rows, between two looks for Ctrl-C: 5 ms at most, with every option
    CHUNK_UNITS = 2048

    LOOK_LABELS = 32768    # between two looks where labels, weights or `where` are only read

cdef extern from *:
    """
    #include "options.h"
    #define XCE_NUMBER(name) OPERAND_##name,
    enum { XCE_ROW_OPERANDS(XCE_NUMBER) OPERANDS, ENTRY_OPERANDS = OPERAND_label };
    #undef XCE_NUMBER
    #define XCE_NAME(name) #name,
    static const char *const XCE_OPERAND_NAMES[] = {XCE_ROW_OPERANDS(XCE_NAME)};
    static const char *const XCE_OPTION_NAMES[] = {XCE_ROW_OPTIONS(XCE_NAME)};
    #undef XCE_NAME
    enum { OPTIONS = sizeof(row_options) / sizeof(double) };
    """
    enum:
        LOSS, SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, STATS, STATE, NLL
        ACTIVE, IGNORED, INVALID
        X "OPERAND_x"
        Q "OPERAND_q"
        WHERE "OPERAND_where"
        GRAD "OPERAND_grad"
        HESS "OPERAND_hess"
        LABEL "OPERAND_label"
        INDICES "OPERAND_indices"
        SAMPLE "OPERAND_sample"
        VALUE "OPERAND_value"
        LABEL_LOGIT "OPERAND_label_logit"
        TOP "OPERAND_top"
        RANK "OPERAND_rank"
        SPREAD "OPERAND_spread"
        LINEAR "OPERAND_linear"
        OPERANDS, ENTRY_OPERANDS, OPTIONS
    const char *const *XCE_OPERAND_NAMES
    const char *const *XCE_OPTION_NAMES

cdef struct Operand:
    char *data
    Py_ssize_t classes     # bytes from a class to the next
    Py_ssize_t rows        # bytes from a row to the next along the last axis of rows
    Py_ssize_t outer[MAX_AXES]

cdef struct Job:
    int what, phi
    row_options options                # as given; `compute` says what follows from them
    scalar parameter
    Py_ssize_t n_classes, n_rows
    Py_ssize_t run                     # rows along the last axis of rows
    int outer_axes
    Py_ssize_t outer_shape[MAX_AXES]
    Operand at[OPERANDS]
    int used[OPERANDS]                 # which of them there are
    int n_used
    long long ignore_index
    int kind[OPERANDS]                 # of their numbers, see elements.h; 0: the storage type, or of VALUE the scalar
    xce_watch *watch
    const scalar *weight
    scalar share, label_share          # eps / C, unless `where` makes C a matter of the row, and 1 - eps
    scalar z_loss
    scalar scale                       # of derivatives: 1 / denominator of the mean
    logit_transform transform
    const Job *teacher                 # the teacher's logits as a job of their own, or NULL
    bint keeps_pairs                   # the stage holds what is PAIRED of a tile
    bint sparse_teacher                # it has logits of the classes INDICES only
    bint by_distance                   # entries are distances from the greatest one, in two parts
    bint steep                         # and exp is added up in parts
    bint relative                      # the gradient is made of slopes against the top entry's
    bint transforms, linear, dense, want_grad, want_hess, writes, wide, streams
    int level, tile_rows
    Py_ssize_t unit_rows

# Up to LANES rows: per lane, what step 1 found and step 3 needs.
cdef struct Tile:
    char *at[OPERANDS]                 # of the first row
    int n
    int status[LANES]
    Py_ssize_t label[LANES]            # -1: none
    Py_ssize_t top[LANES]
    scalar max[LANES]
    scalar sums[TERMS][LANES]
    int64_t above[LANES]               # logits above the label's, the top entry's apart
    scalar index[LANES]                # coefficient of the label beyond its dense one
    scalar label_logit[LANES]          # as it was given
    scalar sample[LANES]
    scalar share[LANES]
    scalar phi_sums[TERMS][LANES]
    Py_ssize_t teacher_top[LANES]      # the place among its classes
    scalar teacher_max[LANES]
    scalar teacher_sums[TERMS][LANES]
    Py_ssize_t top_place[LANES]        # among the classes of a sparse teacher, or -1
    row_state state
    row_match match
    row_slope slope
    row_result result

# What distances, and slopes, are measured from, of the rows in the lanes; apart from the view, which each loop copies.
cdef struct Distances:
    logit_origin origin, teacher_origin
    row_match match
    row_slope slope

# Entries in the lanes: of one row (wide) or of one class (many).
cdef struct View:
    char *at[ENTRY_OPERANDS]
    int n                              # rows in the lanes (many)
    Py_ssize_t step[ENTRY_OPERANDS]    # bytes from a class to the next
    Py_ssize_t lane[ENTRY_OPERANDS]    # bytes from a lane to the next
    int kind[ENTRY_OPERANDS]           # of the numbers there
    const real *kept_logits            # what is kept between the readings, as it was given, or NULL;
    real *kept_exp                     # both may be the same memory
    real *turned_grad                  # where the gradient waits to be turned into rows, or NULL
    const real *kept_teacher           # its logits, or NULL
    real *kept_pair                    # PARTS times, kept_step vectors apart
    Py_ssize_t kept_step
    const real *picked                 # the student's at a sparse teacher's classes; kept_teacher has the teacher's
    const uint16_t *teacher_has        # those classes: a bit for each lane
    Py_ssize_t top, teacher_top        # wide
    real tops, teacher_tops            # many
    real max, share, label_logit
    Distances *by
    exp_reference ref
    real log_z, inverse
    row_factors out
    rmask active
