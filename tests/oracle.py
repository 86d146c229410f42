"""What the losses must be, in longdouble and in forms that do not cancel: the oracle of `fuzz.py`.

Written from the textbook and from what the library documents. It imports nothing of the library, and reads as plainly
as it can: rows are the first axis, classes the last, everything is a longdouble (64 bits of precision on x86).

Every result is a `Bound`: the exact value, and what its error is measured by. An implementation in a type of precision
eps may be wrong by ``limit * eps * size``, where `limit` is what the library promises, and by `lost` where the type
underflows. `size` is the value itself where a formula without cancellation exists (a loss, a gradient of class labels),
and the sum of the terms' magnitudes where terms of both signs meet (soft labels, z-loss).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath
import numpy as np

Array = Any
LD = np.longdouble
INF, NAN = LD("inf"), LD("nan")


class Bound(NamedTuple):
    """An exact value, the magnitude that its error is relative to, and what may be lost to underflow."""

    value: Array
    size: Array
    lost: Array

    def scaled(self, factor: Array) -> Bound:
        """The same times an exact factor; a factor of 0 makes 0 of anything."""
        magnitude = np.abs(factor)
        return Bound(times(factor, self.value), times(magnitude, self.size), times(magnitude, self.lost))

    def at(self, condition: Array, value: Any) -> Bound:
        """With another, exact value where the condition holds."""
        condition = np.broadcast_to(condition, self.value.shape)
        return Bound(
            np.where(condition, LD(value), self.value),
            np.where(condition, LD(0), self.size),
            np.where(condition, LD(0), self.lost),
        )


class Losses(NamedTuple):
    """Of rows, or of elements: the loss and its derivatives, before any reduction."""

    loss: Bound
    grad: Bound
    hess: Bound


def wide(x: Any) -> Array:
    """An array of any numbers as longdouble, exactly."""
    x = np.asarray(x)
    return x.astype(np.float32).astype(LD) if x.dtype.itemsize == 2 and x.dtype.kind == "V" else x.astype(LD)


def times(a: Array, x: Array) -> Array:
    """A product in which a coefficient of 0 makes 0 of anything, infinities and NaN included."""
    return np.where(a == 0, LD(0), a * x)


def added(a: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    return np.sum(a, axis=axis, keepdims=keepdims)


# Softmax


class Softmax(NamedTuple):
    """Of rows of logits."""

    u: Array  # log p
    p: Array
    q: Array  # 1 - p
    lse: Array  # one per row, (R, 1)
    lse_size: Array  # |maximum| + log1p(rest): what lse is the sum of
    is_top: Array  # the first maximum
    bad: Array  # rows without a finite maximum, or with a NaN: (R, 1)
    has_nan: Array
    pu: Array  # p |u|, and the sum of it over all other classes: by how many ulps p and q move with an ulp of u
    qu: Array


def softmax(x: Array, temperature: float = 1.0, softcap: float | None = None) -> Softmax:
    """The softmax of ``softcap(x) / temperature``; differences to the maximum come first, so that no offset matters."""
    has_nan = np.isnan(x).any(-1, keepdims=True)
    top = np.argmax(np.where(np.isnan(x), -INF, x), -1)[:, None]
    m = np.take_along_axis(x, top, -1)
    bad = has_nan | ~np.isfinite(m)
    m = np.where(bad, LD(0), m)
    x = np.where(bad, LD(0), x)
    d, residual = difference(x, m) if softcap is None else (capped_difference(x, m, LD(softcap)), np.zeros_like(x))
    t = LD(temperature)
    d, residual = d / t, residual / t
    e = np.where(np.isinf(d), LD(0), np.exp(d) * (1 + np.where(np.isfinite(d), residual, 0)))
    is_top = np.arange(x.shape[-1]) == top
    others = np.where(is_top, LD(0), e)
    rest = added(np.sort(others, -1), -1, keepdims=True)
    log_z = np.log1p(rest)
    u = (d - log_z) + np.where(np.isfinite(d), residual, 0)
    p = e / (1 + rest)
    q = np.where(is_top, rest / (1 + rest), (1 + (rest - e)) / (1 + rest))
    greatest = capped(m, softcap) / t
    pu = times(p, np.abs(u))
    qu = np.where(is_top, added(np.where(is_top, 0, pu), -1, True), added(pu, -1, True) - pu)
    nan = np.where(bad, NAN, LD(0))
    return Softmax(
        u + nan, p + nan, q + nan, greatest + log_z + nan, np.abs(greatest) + log_z, is_top, bad, has_nan, pu, qu
    )


def difference(x: Array, m: Array) -> tuple[Array, Array]:
    """x - m, and what rounding took from it (Knuth's two-sum)."""
    d = x - m
    part = d - x
    residual = (x - (d - part)) + (-m - part)
    return d, np.where(np.isfinite(d), residual, LD(0))


def capped(x: Array, softcap: float | None) -> Array:
    if softcap is None:
        return x
    s = LD(softcap)
    return np.where(np.isinf(x), x, s * np.tanh(x / s))


def capped_difference(x: Array, m: Array, s: Array) -> Array:
    """s (tanh(x / s) - tanh(m / s)) for x <= m, without cancellation.

    With E(a) = exp(-2 |a|), tanh |a| - tanh |b| = -2 (E(a) - E(b)) / ((1 + E(a)) (1 + E(b))).
    """
    a, b = np.abs(x) / s, np.abs(m) / s
    gap = np.abs(np.where(np.isfinite(x), m - x, LD(0))) / s
    near = np.exp(-2 * np.minimum(a, b))
    e_a, e_b = np.exp(-2 * a), np.exp(-2 * b)
    same_sign = -2 * s * near * -np.expm1(-2 * gap) / ((1 + e_a) * (1 + e_b))
    apart = s * (np.tanh(x / s) - np.tanh(m / s))
    return np.where(x == -INF, -INF, np.where(np.sign(x) * np.sign(m) > 0, same_sign, apart))


# phi: value, first and second derivative by u = log p, each with the sum of its terms' magnitudes


class Phi(NamedTuple):
    f: Array
    f1: Array
    f2: Array
    f_size: Array
    f1_size: Array
    f2_size: Array


def phi(name: str, parameter: float, z: Softmax, tiny: float = 0.0) -> Phi:
    u, p, q = z.u, z.p, z.q
    one, zero = np.ones_like(u), np.zeros_like(u)
    c = LD(parameter)
    if name == "focal_loss" and parameter:
        power = power_of_rest(q, p, c)
        slope = np.where(q == 0, -one, np.where(p == 0, zero, p * u / np.where(q == 0, one, q)))
        f = times(power, -u)
        f1 = power * (c * slope - 1)
        factor = np.where((q == 0) | (p == 0), zero, c * p * power / np.where(q == 0, one, q))
        bounded_u = np.where(p == 0, zero, u)
        f2 = factor * (2 + bounded_u - (c - 1) * slope)
        f2_size = factor * (2 + np.abs(bounded_u) + np.abs((c - 1) * slope))
        return Phi(f, f1, f2, np.abs(f), np.abs(f1), f2_size)
    if name == "poly_loss":
        return Phi(-u + c * q, -1 - c * p, -c * p, np.abs(u) + abs(c) * q, 1 + abs(c) * p, abs(c) * p)
    if name == "generalized_cross_entropy" and parameter:
        power = np.exp(c * u)
        f = -np.expm1(c * u) / c
        size = power * (1 + np.where(p < tiny, np.abs(np.where(np.isfinite(u), c * u, 0)), 0) / 8)  # p is not there
        return Phi(f, -power, -c * power, f, size, c * size)
    return Phi(-u, -one, zero, np.abs(u), one, zero)


def power_of_rest(q: Array, p: Array, g: Array) -> Array:
    """q^g for q = 1 - p, whose rounding counts g times where it is large beside a small p."""
    return np.where(p < 0.5, np.exp(g * np.log1p(-np.minimum(p, LD(0.5)))), q**g)


# Coefficients


class Target(NamedTuple):
    """What target and weights decide; (R, C) and (R,)."""

    a: Array
    share: Array  # of each row in the denominator of the mean
    s: Array  # sample weight, 0 for rows that count nothing
    removed: Array  # rows that count nothing: ignored, weight 0, emptied by `where`
    invalid: Array  # rows with a bad label that nobody checked


def coefficients(
    target: Array,
    shape: tuple[int, int],
    *,
    weight: Array | None,
    sample_weight: Array | None,
    kept: Array,
    ignore_index: int,
    label_smoothing: float,
) -> Target:
    n_rows, n_classes = shape
    eps = LD(label_smoothing)
    w = np.ones(n_classes, LD) if weight is None else wide(weight)
    s = np.ones(n_rows, LD) if sample_weight is None else wide(sample_weight)
    n_kept = kept.sum(-1, keepdims=True)
    uniform = np.where(kept, 1 / np.maximum(n_kept, 1).astype(LD), LD(0))
    removed = (s == 0) | (n_kept[:, 0] == 0)
    if target.ndim == 2:
        soft = times(1 - eps, wide(target)) + eps * uniform
        a, share, invalid = w * soft, s, np.zeros(n_rows, bool)
    else:
        labels = [int(y) if np.isfinite(float(y)) else -1 for y in target]  # Python's integers, of any width
        ignored = np.array([y == ignore_index for y in labels], bool)
        removed |= ignored
        invalid = np.array([not 0 <= y < n_classes for y in labels], bool) & ~removed
        safe = np.array([y if 0 <= y < n_classes else 0 for y in labels], np.int64)
        onehot = np.arange(n_classes) == safe[:, None]
        a = (1 - eps) * w[safe][:, None] * onehot + eps * uniform * w
        share = s if weight is None else s * w[safe]
    s = np.where(removed, LD(0), s)
    a = np.where(removed[:, None], LD(0), s[:, None] * a)
    return Target(a, np.where(removed, LD(0), share), s, removed, invalid)


# Losses of rows


def softmax_loss(
    name: str,
    parameter: float,
    x: Array,
    target: Target,
    kept: Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    tiny: float,
    is_dense: bool = False,
) -> Losses:
    """Loss, gradient and Hessian diagonal of each row: sum_c a_c phi(u_c) + s z_loss lse^2.

    `is_dense`: the coefficients are those of probabilities or of smoothing, whatever they are.
    """
    x = np.where(kept, x, -INF)
    x = np.where(target.removed[:, None], LD(0), x)
    a, n_classes = target.a, x.shape[-1]
    z = softmax(x, temperature, softcap)
    f = phi(name, parameter, z, tiny)
    is_moved = temperature != 1.0 or softcap is not None

    v, v1, v2 = times(a, f.f), times(a, f.f1), times(a, f.f2)
    s, s1, s2 = (times(np.abs(a), size) for size in (f.f_size, f.f1_size, f.f2_size))
    loss, grad, hess = added(v, -1), entries(z, v1), hessian(z, v1, v2)
    loss_size, grad_size, hess_size = added(s, -1), entries(z, s1, 1), hessian(z, s1, s2, 1)
    if is_dense and name in ("poly_loss", "generalized_cross_entropy") and parameter:  # right beside the largest entry
        finite = np.where(np.isfinite(grad), np.abs(grad), 0).max(-1, keepdims=True, initial=0)
        grad_size = np.maximum(grad_size, finite)
    if is_moved:  # the loss within twice its bound, entries within twice theirs and |u| ULP
        moved = np.abs(np.where(np.isfinite(z.u), z.u, 0))
        of_p = s1 * z.qu + z.pu * added(s1, -1, True)
        of_phi = z.q * s2 * moved + z.p * added(s2 * moved, -1, True)
        loss_size = 2 * loss_size
        grad_size = 2 * grad_size + (of_p + of_phi) / 6
        farthest = np.where(a != 0, moved, 0).max(-1, keepdims=True, initial=0)
        of_q = np.abs(np.log(np.where((z.q > 0) & (z.q < 1), z.q, 1)))  # 1 - p is as far away as who shares it
        hess_size = hess_size * (2 + (np.maximum(moved, of_q) + farthest) / 8)
    if z_loss:
        by, lse, size = LD(z_loss) * target.s[:, None], z.lse, z.lse_size
        loss = loss + (by * lse**2)[:, 0]
        loss_size = loss_size + (2 * np.abs(by) * np.abs(lse) * size)[:, 0]
        grad = grad + 2 * by * lse * z.p
        hess = hess + 2 * by * (z.p**2 + lse * z.p * z.q)
        more = 2 * np.abs(by) * size
        grad_size = grad_size + more * (2 * z.p + is_moved * z.pu / 6)
        hess_size = hess_size + 2 * np.abs(by) * (z.p**2 + 2 * size * z.p * z.q) * (1 + is_moved * (1 + np.abs(z.lse)))
    lost = 8 * n_classes * LD(tiny) * (1 + abs(parameter)) ** 2 * (added(np.abs(a), -1) + abs(LD(z_loss) * target.s))
    lost_entries = np.broadcast_to(lost[:, None] * (1 + abs(LD(z_loss)) * z.lse_size), x.shape)

    t, slope, bend = LD(temperature), 1 / LD(temperature), LD(0)
    if softcap is not None:
        ratio = np.abs(np.where(np.isfinite(x), x, 0)) / LD(softcap)
        decay = np.where(np.isneginf(x), LD(0), np.exp(-2 * ratio))  # -inf stays, and does not move
        slope = 4 * decay / (1 + decay) ** 2 / t
        bend = -2 * np.tanh(np.where(np.isfinite(x), x, 0) / LD(softcap)) * slope / LD(softcap)
        # exp(-2 x / s) has the error of its argument
        grad_size, hess_size = grad_size * (1 + ratio / 2), hess_size * (1 + ratio / 2)
    hess = hess * slope**2 + grad * bend
    hess_size = hess_size * slope**2 + grad_size * np.abs(bend)
    lost_hess = lost_entries * (slope**2 + np.abs(bend)) + 8 * LD(tiny) * (1 + 1 / t**2)
    grad, grad_size, lost_entries = grad * slope, grad_size * slope, lost_entries * slope + 8 * LD(tiny) * (1 + 1 / t)

    bad = (z.bad[:, 0] | target.invalid) & ~target.removed
    found = Losses(
        Bound(loss, loss_size, lost).at(bad, NAN),
        Bound(grad, grad_size, lost_entries).at(bad[:, None], NAN),
        Bound(hess, hess_size, lost_hess).at(bad[:, None], NAN),
    )
    silent = target.removed[:, None] | ~kept
    return Losses(found.loss.at(target.removed, 0), found.grad.at(silent, 0), found.hess.at(silent, 0))


def entries(z: Softmax, v1: Array, sign: int = -1) -> Array:
    """v1_k - p_k sum v1, as v1_k (1 - p_k) - p_k (sum of the others); their magnitudes with sign 1."""
    without_top = added(np.where(z.is_top, LD(0), v1), -1, True)
    others = np.where(z.is_top, without_top, added(v1, -1, True) - v1)
    one_class_only = (v1 != 0).sum(-1, keepdims=True) == 1  # whose others sum to 0 exactly
    others = np.where(one_class_only & (v1 != 0), LD(0), others)
    return v1 * z.q + sign * z.p * others


def hessian(z: Softmax, v1: Array, v2: Array, sign: int = -1) -> Array:
    """v2_k (1 - p_k)^2 + p_k^2 (sum of the others) - p_k (1 - p_k) sum v1."""
    others = np.where(z.is_top, added(np.where(z.is_top, LD(0), v2), -1, True), added(v2, -1, True) - v2)
    return v2 * z.q**2 + z.p**2 * others + sign * z.p * z.q * added(v1, -1, True)


def nll(x: Array, target: Target) -> Losses:
    """The loss of log-probabilities as they are; only the label's is read."""
    a = np.where(target.removed[:, None], LD(0), target.a)
    loss = added(times(a, -x), -1)
    zero = np.zeros_like(x)
    return Losses(
        Bound(loss, np.abs(loss), np.zeros_like(loss)).at(target.invalid, NAN).at(target.removed, 0),
        Bound(-a, np.abs(a), zero).at(target.invalid[:, None], NAN).at(target.removed[:, None], 0),
        Bound(zero, zero, zero).at(target.invalid[:, None], NAN).at(target.removed[:, None], 0),
    )


# Divergences: differences of two log-softmaxes, accurate however close they are


def excess(d: Array) -> Array:
    """exp(-d) - 1 + d, which is d^2 / 2 near 0."""
    small = np.where(np.abs(d) < 0.1, d, LD(0))
    series, term = np.zeros_like(d), small * small / 2
    for k in range(3, 20):
        series, term = series + term, term * -small / k
    return np.where(np.abs(d) < 0.1, series, d + np.expm1(-d))


def kullback_leibler(a: Array, b: Array, d: Array) -> Array:
    """a log(a / b) + b - a >= 0, d being log(a / b)."""
    return np.where(np.abs(d) < 1, times(a, excess(d)), times(a, d) + (b - a))


def shannon(a: Array) -> Array:
    """(1 - a) log(1 - a) + (1 + a) log(1 + a), which is a^2 near 0."""
    small = np.where(np.abs(a) < 0.1, a, LD(0))
    series, power = np.zeros_like(a), small * small
    for k in range(1, 14):
        series, power = series + power / (k * (2 * k - 1)), power * small * small
    left, right = 1 - a, 1 + a
    direct = times(left, np.log(left)) + times(right, np.log(right))
    return np.where(np.abs(a) < 0.1, series, direct)


def log_ratio(x: Array, y: Array, z: Softmax, of_teacher: Softmax, temperature: float) -> tuple[Array, Array]:
    """d = log t - log p, and d less that of the student's top class, which needs no sum.

    Near each other d is the difference of the logits, less its log-mean-exp under p.
    """
    top = np.argmax(z.is_top, -1)[:, None]
    y_top, x_top = np.take_along_axis(y, top, -1), np.take_along_axis(x, top, -1)
    high, low = difference(y, y_top)
    high2, low2 = difference(x, x_top)
    delta = ((high - high2) + (low - low2)) / LD(temperature)
    delta = np.where(np.isneginf(x) & np.isneginf(y), LD(0), delta)  # where both are 0 nothing differs
    is_new = np.isneginf(x) & np.isfinite(y)  # what the student cannot have: it adds to the teacher's sum alone
    close = np.where(is_new, LD(0), delta)
    is_near = ~np.isnan(close).any(-1, keepdims=True) & (close.max(-1, keepdims=True) < 10_000)
    is_near &= (np.where(is_new, high / LD(temperature), 0).max(-1, keepdims=True)) < 10_000
    close = np.where(is_near, close, 0)
    p_top = np.take_along_axis(z.p, top, -1)
    more = p_top * added(np.where(is_new & is_near, np.exp(high / LD(temperature)), 0), -1, True)
    near = close - np.log1p(added(np.where(is_near, z.p, 0) * np.expm1(close), -1, True) + more)
    d = np.where(is_near, np.where(is_new, INF, near), of_teacher.u - z.u)
    return d, delta


def distillation(divergence: str, x: Array, y: Array, kept: Array, s: Array, temperature: float, tiny: float) -> Losses:
    """Divergence of the softmaxes of x (the student) and y, of each row, times s."""
    removed = (s == 0) | ~kept.any(-1)
    x, y = (np.where(removed[:, None], LD(0), np.where(kept, a, -INF)) for a in (x, y))
    student, teacher = softmax(x, temperature), softmax(y, temperature)
    bad = (student.bad | teacher.bad)[:, 0]
    p, t = student.p, teacher.p
    d, from_top = log_ratio(x, y, student, teacher, temperature)
    only_student, only_teacher = (t == 0) & (p > 0), (p == 0) & (t > 0)
    impossible = np.isneginf(y) & (p > 0)
    missing = np.isneginf(x) & (t > 0)
    both = np.isneginf(x) & np.isneginf(y)
    d = np.where(both, LD(0), d)
    if divergence == "forward":
        terms = np.where(only_student, p, np.where(both, 0, kullback_leibler(t, p, d)))
        terms = np.where(missing, INF, np.where(only_teacher & ~missing, t * (d - 1) + p, terms))
        grad = np.where(np.abs(d) < 1, -p * np.expm1(d), p - t)
        hess, hess_size = p * student.q, p * student.q
    elif divergence == "reverse":
        terms = np.where(only_teacher, t, np.where(both, 0, kullback_leibler(p, t, -d)))
        terms = np.where(impossible, INF, terms)
        loss = added(terms, -1)[:, None]
        w = np.where(p == 0, LD(0), -from_top)  # less that of the top class, whose gradient would cancel otherwise
        mean = added(times(p, w), -1, True)
        grad = times(p, w - mean)
        grad = np.where(impossible, INF, grad)
        hess = times(p, (1 - 2 * p) * (w - mean) + student.q)
        hess_size = times(p, np.abs(w) + loss + student.q)
    else:
        ratio = np.tanh(np.where(np.isfinite(d), d, 0) / 2)
        ratio = np.where(only_student & ~np.isfinite(d), LD(-1), np.where(only_teacher & ~np.isfinite(d), LD(1), ratio))
        far = np.abs(np.where(np.isfinite(d), d, 0)) > 1
        ratio = np.where(far & (p + t > 0), (t - p) / np.where(p + t > 0, p + t, 1), ratio)
        terms = (p + t) / 4 * shannon(ratio)
        # log(p / m) less that of the top class: where teacher and student share nothing, all of them are log 2
        top = np.argmax(student.is_top, -1)[:, None]
        d_top = np.take_along_axis(d, top, -1)
        rise = np.expm1(np.clip(from_top, -20000, 11000))
        own = -np.log1p(np.where(np.isneginf(d_top), 0, sigmoid(d_top)) * rise)
        own = np.where(np.isneginf(d_top) | (from_top > 1), -(softplus(d) - softplus(d_top)), own)
        own = np.where(p == 0, LD(0), own)
        mean = added(times(p, own), -1, True)
        grad = times(p, own - mean) / 2
        h = np.where(p + t > 0, p * t / np.where(p + t > 0, p + t, 1), LD(0))
        is_top = student.is_top
        others = np.where(is_top, added(np.where(is_top, 0, h), -1, True), added(h, -1, True) - h)
        hess = (times(p, (1 - 2 * p) * (own - mean)) + h * student.q**2 + p * p * others) / 2
        hess_size = (times(p, np.abs(own) + np.abs(mean)) + h + p * p * others) / 2
    loss = added(terms, -1)
    # entries are right relative to the largest of their row
    largest = np.max(np.where(np.isfinite(grad), np.abs(grad), 0), -1, keepdims=True)
    grad_size = np.broadcast_to(largest, grad.shape)
    hess_size = hess_size + np.max(np.where(np.isfinite(hess), np.abs(hess), 0), -1, keepdims=True)
    lost = 16 * x.shape[-1] * LD(tiny) * (1 + np.abs(np.where(np.isfinite(d), d, 0)).max(-1))
    of_entries = np.broadcast_to(lost[:, None], x.shape)
    inverse = 1 / LD(temperature)
    found = Losses(
        Bound(loss, np.abs(loss), lost),
        Bound(grad, grad_size, of_entries).scaled(inverse),
        Bound(hess, hess_size, of_entries).scaled(inverse**2),
    )
    factor = s[:, None]
    found = Losses(found.loss.scaled(s), found.grad.scaled(factor), found.hess.scaled(factor))
    bad &= ~removed
    found = Losses(found.loss.at(bad, NAN), found.grad.at(bad[:, None], NAN), found.hess.at(bad[:, None], NAN))
    silent = removed[:, None] | ~kept
    return Losses(found.loss.at(removed, 0), found.grad.at(silent, 0), found.hess.at(silent, 0))


# Losses of single elements


def softplus(x: Array) -> Array:
    return np.where(x == INF, INF, np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def sigmoid(x: Array) -> Array:
    decay = np.exp(-np.abs(x))
    return np.where(x < 0, decay / (1 + decay), 1 / (1 + decay))


def binary(x: Array, y: Array, pos_weight: Array, label_smoothing: float = 0.0) -> Losses:
    eps = LD(label_smoothing)
    yes, no = y * (1 - eps) + eps / 2, (1 - y) * (1 - eps) + eps / 2
    p, q = sigmoid(x), sigmoid(-x)
    terms = times(pos_weight * yes, softplus(-x)), times(no, softplus(x))
    up, down = times(no, p), times(pos_weight * yes, q)
    value = terms[0] + terms[1] + 0 * np.where(np.isnan(x), NAN, 0)
    hess = (pos_weight * yes + no) * p * q
    return Losses(simple(value), summed(up, -down), simple(hess))


def simple(x: Array) -> Bound:
    return Bound(x, np.abs(x), np.zeros_like(x))


def summed(*terms: Array) -> Bound:
    return Bound(sum(terms), sum(np.abs(a) for a in terms), np.zeros_like(terms[0]))


def binary_of_probs(p: Array, y: Array, log_clamp: float | None) -> Losses:
    least = -INF if log_clamp is None else LD(log_clamp)
    value = times(y, -np.maximum(np.log(p), least)) + times(1 - y, -np.maximum(np.log1p(-p), least))
    bound = LD(1e-12)
    slope = np.maximum(p * (1 - p), bound)
    grad = Bound((p - y) / slope, np.abs(p - y) / slope, np.zeros_like(p))
    hess = y / np.maximum(p, bound) ** 2 + (1 - y) / np.maximum(1 - p, bound) ** 2
    return Losses(simple(value), grad, simple(hess))


def soft_margin(x: Array, y: Array) -> Losses:
    z = times(y, x)
    p, q = sigmoid(z), sigmoid(-z)
    nan = np.where(np.isnan(x), NAN, LD(0))
    found = Losses(simple(softplus(-z) + nan), simple(times(-y, q) + nan), simple(times(y * y, p * q) + nan))
    of_product = np.where(np.abs(y) == 1, LD(1), 1 + np.minimum(np.abs(np.where(np.isfinite(z), z, 0)), 1e4) / 2)
    return Losses(*(b._replace(size=b.size * of_product) for b in found))  # y x is rounded


def sigmoid_focal(x: Array, y: Array, alpha: Array | None, gamma: float) -> Losses:
    """alpha_t (1 - p_t)^gamma times the binary loss; between 0 and 1, 1 - p_t is linear in the target."""
    g, one = LD(gamma), np.ones_like(x)
    base = binary(x, y, one)
    p, q = sigmoid(x), sigmoid(-x)
    balance = one if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    wrong, s1, s2 = y * q + (1 - y) * p, (1 - 2 * y) * p * q, (1 - 2 * y) * p * q * (q - p)
    return modulated(balance, wrong, y * p + (1 - y) * q, s1, s2, g, base, p * q)


def modulated(
    balance: Array, wrong: Array, right: Array, s1: Array, s2: Array, g: Array, base: Losses, pq: Array
) -> Losses:
    """balance wrong^g base, s1 and s2 being the derivatives of `wrong` = 1 - right."""
    safe = np.where(wrong == 0, LD(1), wrong)
    power = balance * np.where(g == 0, LD(1), power_of_rest(wrong, right, g))
    slope = np.where(wrong == 0, LD(0), g * s1 / safe)
    bend = np.where(wrong == 0, LD(0), g * ((g - 1) * (s1 / safe) ** 2 + s2 / safe))
    bend_size = np.where(wrong == 0, LD(0), g * (np.abs(g - 1) * (s1 / safe) ** 2 + pq / safe))
    b, b1, b2 = base
    value = times(
        np.where(np.isinf(b.value) & (wrong != 0), balance, power), b.value
    )  # where the power underflows, too
    grad = power * b1.value + times(power * slope, b.value)
    grad_size = power * b1.size + np.abs(times(power * slope, b.value))
    hess = power * b2.value + 2 * power * slope * b1.value + times(power * bend, b.value)
    hess_size = power * b2.size + 2 * power * np.abs(slope) * b1.size + np.abs(times(power * bend_size, b.value))
    zero = np.zeros_like(value)
    return Losses(Bound(value, np.abs(value), zero), Bound(grad, grad_size, zero), Bound(hess, hess_size, zero))


def asymmetric(x: Array, y: Array, gamma_pos: float, gamma_neg: float, clip: float) -> Losses:
    m = LD(clip)
    p, q = sigmoid(x), sigmoid(-x)
    pq = p * q
    # p - m without cancellation: where p is near m, from the distance of x to logit(m)
    shifted = np.maximum(p - m, 0) if m == 0 else np.maximum(shifted_sigmoid(x, m), 0)
    moves = shifted > 0 if m > 0 else np.ones(x.shape, bool)
    rest = q if m == 0 else q + m  # 1 - shifted
    rest = np.where(moves, rest, LD(1))
    s1, s2 = np.where(moves, pq, 0), np.where(moves, pq * (q - p), 0)
    log_rest = -softplus(x) if m == 0 else np.where(moves, np.log1p(-shifted), LD(0))
    ratio = p if m == 0 else s1 / rest
    value = times(y, softplus(-x)) + times(1 - y, -log_rest)
    up, down = (1 - y) * ratio, y * q
    bend = pq if m == 0 else ratio * (q - p) + ratio**2
    bend_size = pq if m == 0 else ratio * np.abs(q - p) + ratio**2
    base = Losses(
        simple(value),
        summed(up, -down),
        Bound(y * pq + (1 - y) * bend, y * pq + (1 - y) * bend_size, np.zeros_like(x)),
    )
    wrong = y * q + (1 - y) * shifted
    g = LD(gamma_pos) * y + LD(gamma_neg) * (1 - y)
    found = modulated(
        np.ones_like(x), wrong, y * p + (1 - y) * rest, -y * pq + (1 - y) * s1, -y * pq * (q - p) + (1 - y) * s2, g,
        base, pq * (y + (1 - y) * moves),
    )  # fmt: skip
    # between 0 and 1 the exponent is rounded, where it is not in two parts
    of_exponent = np.where(
        (y == 0) | (y == 1) | (wrong == 0) | (g > 10), LD(1), 1 + g * np.abs(np.log(np.where(wrong == 0, 1, wrong))) / 4
    )
    return Losses(*(b._replace(size=b.size * of_exponent) for b in found))


def shifted_sigmoid(x: Array, m: Array) -> Array:
    """sigmoid(x) - m = sigmoid(x) (1 - m) (1 - exp(logit(m) - x))."""
    with mpmath.workprec(160):
        exact = mpmath.log(mpmath.mpf(float(m)) / (1 - mpmath.mpf(float(m))))
        logit = LD(float(exact))
        rest = LD(float(exact - mpmath.mpf(float(logit))))
    gap = np.where(np.isinf(x), x, (x - logit) - rest)
    direct = sigmoid(x) - m
    return np.where(np.abs(gap) < 1, sigmoid(x) * (1 - m) * -np.expm1(-np.where(np.abs(gap) < 1, gap, 0)), direct)


def kl_div(x: Array, t: Array, log_target: bool) -> Losses:
    share = np.exp(t) if log_target else t
    log_share = t if log_target else np.log(t)
    value = times(share, log_share - x)
    size = times(share, np.abs(log_share) + np.abs(x))
    zero = np.zeros_like(x)
    grad_size = share * (1 + np.abs(np.where(np.isfinite(t), t, 0)) / 8) if log_target else share
    return Losses(Bound(value, size, zero), Bound(-share, grad_size, zero), Bound(zero, zero, zero))


# Reductions


def reduced(found: Losses, reduction: str, share: Array, counts: Array) -> Losses:
    """The loss reduced, and its derivatives with the same factor.

    `share` is each row's (or element's) part of the denominator, `counts` says which of them count at all.
    """
    loss, grad, hess = found
    if reduction == "none":
        return found
    total = Bound(added(loss.value), added(loss.size), added(loss.lost))
    if reduction == "sum":
        return Losses(total, grad, hess)
    denominator, magnitude = added(share), added(np.abs(share))
    if denominator == 0:
        nowhere = np.zeros((), LD)
        undefined = Bound(nowhere + NAN, nowhere, nowhere)
        rows = counts.reshape(counts.shape + (1,) * (grad.value.ndim - counts.ndim))
        if magnitude == 0:
            return Losses(undefined, grad.at(True, 0), hess.at(True, 0))
        return Losses(undefined, grad.at(rows, NAN).at(~rows, 0), hess.at(rows, NAN).at(~rows, 0))
    cancelled = magnitude / np.abs(denominator)  # an ULP of the weights moves their sum by so much more
    factor = 1 / denominator

    def mean(b: Bound) -> Bound:
        b = b.scaled(factor)
        return Bound(b.value, b.size + (cancelled - 1) * np.abs(np.where(np.isfinite(b.value), b.value, 0)), b.lost)

    return Losses(mean(total), mean(grad), mean(hess))
