/* What a job of rows is made of, on both processors. */
#ifndef XCE_OPTIONS_H
#define XCE_OPTIONS_H

/* The options that are numbers. xce/_options.py has their defaults and documentation, in this order; `parameter` is the
 * loss's own, a softcap of 0 is none. */
#define XCE_ROW_OPTIONS(OPTION) OPTION(parameter) OPTION(label_smoothing) OPTION(temperature) OPTION(softcap) OPTION(z_loss)

/* What is computed; what is true of a row: it is IGNORED if it has the label to ignore, the weight 0 or no class: nothing is read
 * of it. INVALID: a label out of range that nobody checked, or that changed since: the row becomes NaN. NLL: the logits are
 * log-probabilities already. */
enum { LOSS, SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, STATS, STATE, NLL };
enum { ACTIVE, IGNORED, INVALID };

#define XCE_FIELD(name) double name;
typedef struct { XCE_ROW_OPTIONS(XCE_FIELD) } row_options;
#undef XCE_FIELD

/* What float32 computes with: numbers far from its ends, and gammas that it has the digits for */
#define XCE_FLOAT32_ABOVE 1e-30
#define XCE_FLOAT32_BELOW 1e30
#define XCE_STEEP_ABOVE 10

/* The arrays. q: probabilities, or a teacher's logits; indices: the classes that these are of. The first five have the class
 * axis and are as long as there. */
#define XCE_ROW_OPERANDS(OPERAND) \
    OPERAND(x) OPERAND(q) OPERAND(where) OPERAND(grad) OPERAND(hess) OPERAND(label) OPERAND(indices) OPERAND(sample) \
    OPERAND(value) OPERAND(label_logit) OPERAND(top) OPERAND(rank) OPERAND(spread) OPERAND(linear)

#endif
