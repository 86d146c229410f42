/* Where entries lie, and the labels that lie there: what every kernel reads. */
#ifndef XCE_PLACES_H
#define XCE_PLACES_H

const int64_t NOWHERE = 0x7fffffffffffffffLL;

/* From a flat number in C order to an offset; divided in 32 bits where that is enough, in a fifth of the time. */
XCE_CALLED int64_t walk(const int64_t *shape, int axes, const int64_t *strides, int64_t flat)
{
    int64_t offset = 0;
    int a = axes - 1;
    if (flat >> 32 == 0)
        for (uint32_t rest = (uint32_t)flat; a > 0 && shape[a] >> 32 == 0; a--, flat = rest) {
            uint32_t n = (uint32_t)shape[a], quotient = rest / n;
            offset += (int64_t)(rest - quotient * n) * strides[a];
            rest = quotient;
        }
    for (; a > 0; a--) {
        offset += flat % shape[a] * strides[a];
        flat /= shape[a];
    }
    return offset + flat * strides[0];
}

XCE_FN int64_t read_integer(const char *p, int kind)
{
    switch (kind) {
    case -1: return *(const signed char *)p;
    case -2: return *(const short *)p;
    case -4: return *(const int32_t *)p;
    case 1: return *(const unsigned char *)p;
    case 2: return *(const uint16_t *)p;
    case 4: return *(const uint32_t *)p;
    default: return *(const int64_t *)p;
    }
}

/* A label among floats: a whole number, whose size float holds, or none. Read as bits: subnormal numbers count as 0 elsewhere. */
XCE_FN bool read_whole(const char *p, int kind, int64_t *value)
{
    double x;
    if (kind == 24) {
        x = *(const double *)p;
    } else {
        uint32_t bits = kind == 20 ? *(const uint32_t *)p : (uint32_t) * (const uint16_t *)p << 16;
        if (kind != 18 && (bits & 0x7f800000) == 0 && (bits & 0x7fffff) != 0)
            return false;
        x = kind == 18 ? half_to_float(*(const uint16_t *)p) : __int_as_float((int)bits);
    }
    if (!(x >= -0x1p63 && x < 0x1p63))
        return false;
    *value = (int64_t)x;
    return (double)*value == x;
}

struct label_of_row {
    int status;
    int64_t value; /* -1: none */
};

XCE_FN label_of_row read_label(const char *p, int kind, int64_t n_classes, int64_t ignore_index)
{
    label_of_row y = {INVALID, -1};
    int64_t value = 0;
    if (kind >= 18) {
        if (!read_whole(p, kind, &value))
            return y;
    } else {
        value = read_integer(p, kind);
    }
    if (kind == 8 && value < 0) /* above the largest int64: neither a class nor ignore_index */
        return y;
    if (value == ignore_index)
        y.status = IGNORED;
    else if (value >= 0 && value < n_classes)
        y.status = ACTIVE, y.value = value;
    return y;
}

#endif
