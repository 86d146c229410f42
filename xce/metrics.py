"""Metrics of classifiers, computed from the same row statistics as the losses."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, Unpack

import numpy as np

from xce import _checks as check
from xce._arrays import BFLOAT16, Array, device_of, dtype_name, is_label, namespace, native, parts, widen
from xce._call import Call
from xce._engines import Engine
from xce._errors import LabelError
from xce._libraries import arrays_of, library_of
from xce._options import MetricOptions, takes
from xce._rows import stats_call
from xce.losses import cross_entropy, logit_stats

__all__ = ["brier_score", "log_loss", "perplexity", "top_k_accuracy"]

_BLOCK_BYTES = 1 << 19  # of logits, as they are computed on, between whose rows the metrics are added up
_NUMBERS = 1 << 14  # of log_loss that are computed on at a time
_TIES = 1 << 16  # logits that are compared at a time


@takes(MetricOptions, like=cross_entropy)
def perplexity(
    logits: Array,
    target: Array | int,
    **options: Unpack[MetricOptions],
) -> Any:
    r"""Perplexity of class indices, the exponential of their mean cross-entropy.

    .. math:: \mathrm{PPL} = \exp\Bigl(-\frac1N \sum_i \log p_{i, y_i}\Bigr)

    Parameters
    ----------
    target : array of integers, or of floats that are whole numbers, or int
        Class indices, of the shape of `logits` without `axis`. For a language model: the next tokens.
    ignore_index : int, default -100
        Rows with this label do not count.
    sample_weight : array broadcastable to the shape of `target`, or number, optional
        Row weights, finite, of either sign. A weight of 0 removes its row, whatever its logits and its label are.
    validate : bool, default True
        False skips the checks that read the data: labels and weights.

    Returns
    -------
    scalar
        The perplexity (float32, or float64 for float64 logits), of the kind and on the device of `logits`: at least 1
        if no weight is negative, infinite beyond the range of its dtype. It is NaN without rows that count.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, or a weight is not finite.
    numpy.exceptions.AxisError
        `axis` is out of range.

    References
    ----------
    .. [1] F. Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", Journal of the
       Acoustical Society of America 62 (1977), S63.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.zeros((3, 50))  # which know nothing of 50 words
    >>> print(f"{xce.perplexity(logits, np.array([3, 1, 4])):.4f}")
    50.0000
    """
    arrays = arrays_of(logits, "logits")
    with arrays.place():
        call = stats_call(arrays, "perplexity", target, options)
        loss, _, _ = arrays.engine.run(call._replace(op="loss", loss="cross_entropy", reduction="mean"))
    loss = arrays.wrap(loss)
    with np.errstate(all="ignore"):
        return np.exp(loss) if isinstance(loss, np.generic) else namespace(loss).exp(loss)


@takes(MetricOptions, like=logit_stats)
def top_k_accuracy(
    logits: Array,
    target: Array | int,
    *,
    k: int = 1,
    **options: Unpack[MetricOptions],
) -> float:
    r"""Fraction of rows whose target is among the k classes with the largest logits.

    .. math:: \frac1N \sum_i [\#\{c : x_{i c} > x_{i y_i} \text{ or } (x_{i c} = x_{i y_i}, c < y_i)\} < k]

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Logits, or any other scores that grow with the probability.
    k : int, default 1
        How many of the largest logits count as a hit, at least 1.
    ignore_index : int, default -100
        Rows with this label do not count.
    sample_weight : array broadcastable to the shape of `target`, or number, optional
        Row weights, finite, of either sign; the sum of those of the hits is divided by the sum of all. A weight of 0
        removes its row, whatever its logits and its label are.
    validate : bool, default True
        False skips the checks that read the data, labels and weights; a row with a bad label is then a miss.

    Returns
    -------
    float
        The fraction, in [0, 1] if no weight is negative; NaN without rows that count.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, or a weight is not finite.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    Of equal logits, those of smaller classes come first, as with argmax. A row with a NaN is a miss.

    References
    ----------
    .. [1] O. Russakovsky et al., "ImageNet large scale visual recognition challenge", International Journal of
       Computer Vision 115 (2015), 211-252.

    Examples
    --------
    >>> import numpy as np
    >>> from xce.metrics import top_k_accuracy
    >>> logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    >>> top_k_accuracy(logits, np.array([0, 1])), top_k_accuracy(logits, np.array([0, 1]), k=2)
    (0.5, 1.0)
    """
    return _mean_of_rows("top_k_accuracy", logits, target, options, _Hits(check.count("k", k)))


class _Hits:
    """1 for each row whose target is among the first k classes, 0 for the others."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, engine: Engine, call: Call) -> Array:
        stats = engine.run(call)
        xp = namespace(stats.rank)
        before = stats.rank
        if self.k > 1:
            before = before + self._ties(xp, call, stats)
            is_hit = before < self.k
        else:
            is_hit = stats.argmax == xp.astype(call.labels, xp.int64)
        return xp.astype((stats.rank >= 0) & is_hit, xp.float64)

    @staticmethod
    def _ties(xp: Any, call: Call, stats: Any) -> Array:
        """How many classes before the target have the same logit."""
        x = _without_bfloat16(xp.moveaxis(call.logits, call.axis, -1))
        of_target = xp.astype(stats.target_logit, x.dtype)[..., None]  # exactly: it was read from there
        label = xp.astype(call.labels, xp.int64)[..., None]
        width = max(1, _TIES // max(1, math.prod(stats.rank.shape)))
        ties = xp.zeros_like(stats.rank)
        for start in range(0, x.shape[-1], width):
            stop = min(start + width, x.shape[-1])
            part = x[..., start:stop]
            classes = xp.arange(start, stop, dtype=xp.int64, device=device_of(x))
            is_tie = (part == of_target) & (classes < label)
            ties += xp.sum(xp.astype(is_tie, xp.int8), axis=-1, dtype=xp.int64)
        return ties


@takes(MetricOptions, like=logit_stats)
def brier_score(
    logits: Array,
    target: Array | int,
    **options: Unpack[MetricOptions],
) -> float:
    r"""Brier score of the softmax of logits: mean squared distance of the probabilities from the truth.

    .. math:: \frac1N \sum_i \sum_c (p_{i c} - [c = y_i])^2, \qquad p = \mathrm{softmax}(x)

    Parameters
    ----------
    ignore_index : int, default -100
        Rows with this label do not count.
    sample_weight : array broadcastable to the shape of `target`, or number, optional
        Row weights, finite, of either sign; the mean divides by their sum. A weight of 0 removes its row, whatever its
        logits and its label are.
    validate : bool, default True
        False skips the checks that read the data, labels and weights; a bad label makes the score NaN.

    Returns
    -------
    float
        The score, in [0, 2] if no weight is negative; NaN without rows that count. That of two classes is twice the
        one of the positive class alone.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, or a weight is not finite.
    numpy.exceptions.AxisError
        `axis` is out of range.

    References
    ----------
    .. [1] G. W. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78
       (1950), 1-3.

    Examples
    --------
    >>> import numpy as np
    >>> from xce.metrics import brier_score
    >>> print(f"{brier_score(np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), np.array([0, 2])):.4f}")
    0.2175
    """
    return _mean_of_rows("brier_score", logits, target, options, _squared_distances)


def _squared_distances(engine: Engine, call: Call) -> Array:
    if call.logits.shape[call.axis] > _BLOCK_BYTES // 4:
        return _distances_of_long_rows(engine, call)
    call = call._replace(op="loss", loss="cross_entropy", reduction="sum", return_grad=True, sample_weight=None)
    _, grad, _ = engine.run(call)  # which is p - [c = y] with all its digits, and 0 where ignored
    xp = namespace(grad)
    grad = xp.moveaxis(_without_bfloat16(grad), call.axis, -1)
    rows = grad.shape[:-1]
    # side by side, so that sums do not depend on strides
    grad = xp.reshape(xp.reshape(grad, (-1,)), (-1, grad.shape[-1]))
    if grad.dtype != xp.float64:
        grad = xp.astype(grad, xp.float32, copy=False)
    grad *= grad
    return xp.reshape(xp.sum(grad, axis=-1, dtype=xp.float64), rows)


def _distances_of_long_rows(engine: Engine, call: Call) -> Array:
    """The same of rows whose gradients would take much memory: from sums over all classes but the top one.

    With e = exp(x - max), Z = 1 + the sum of the others: ((Z - e_y)^2 + the sum of e_c^2 over c other than y) / Z^2.
    """
    stats = engine.run(call)
    xp = namespace(stats.lse)
    x = xp.moveaxis(call.logits, call.axis, -1)
    top = xp.astype(stats.argmax, xp.int64)[..., None]
    greatest = xp.astype(_without_bfloat16(xp.take_along_axis(x, top, axis=-1)), xp.float64)
    total, squares = xp.zeros_like(greatest[..., 0]), xp.zeros_like(greatest[..., 0])
    width = max(1, _NUMBERS // max(1, math.prod(stats.lse.shape)))
    for start in range(0, x.shape[-1], width):
        part = _without_bfloat16(x[..., start : min(start + width, x.shape[-1])])
        e = xp.exp(_side_by_side(part, xp.float64) - greatest)
        is_top = xp.arange(start, start + part.shape[-1], dtype=xp.int64, device=device_of(x)) == top
        e = xp.where(is_top, xp.zeros_like(e), e)
        total, squares = total + xp.sum(e, axis=-1), squares + xp.sum(e * e, axis=-1)
    own = xp.exp(xp.astype(stats.target_logit, xp.float64) - greatest[..., 0])
    is_hit = stats.argmax == xp.astype(widen(call.labels), xp.int64)
    others = xp.where(is_hit, squares, squares + (1 - own) * (1 + own))
    wrong = xp.where(is_hit, total, total + (1 - own))
    # an infinite logit makes its row NaN, as that of a gradient
    return xp.where(xp.isfinite(greatest[..., 0]), (others + wrong * wrong) / (1 + total) ** 2, math.nan)


def _mean_of_rows(function: str, logits: Array, target: Array, options: Any, of_rows: Any) -> float:
    """Return the weighted mean of a function of rows, which is computed for a block of them at a time."""
    arrays, sums, weights = arrays_of(logits, "logits"), [], []
    with arrays.place(), np.errstate(all="ignore"):
        call = stats_call(arrays, function, target, options)
        for block in _blocks(call):
            values = of_rows(arrays.engine, block)
            xp = namespace(values)
            counts = xp.astype(~is_label(block.labels, call.ignore_index), xp.float64)
            if block.sample_weight is not None:
                s = _without_bfloat16(block.sample_weight)
                counts *= xp.astype(s, xp.float64)
            sums.append(float(xp.sum(xp.where(counts == 0, xp.zeros_like(values), counts * values))))
            weights.append(float(xp.sum(counts)))
    total = math.fsum(weights)
    return math.fsum(sums) / total if total else math.nan


def _blocks(call: Call) -> Iterator[Call]:
    """Cut a call into calls of some of its rows."""
    axis, shape = call.axis, call.logits.shape
    size = 8 if dtype_name(call.logits.dtype) == "float64" else 4
    for rows in parts(shape[:axis] + shape[axis + 1 :], max(1, _BLOCK_BYTES // (size * shape[axis]))):
        yield call._replace(
            logits=call.logits[(*rows[:axis], slice(None), *rows[axis:])],
            labels=call.labels[(*rows, ...)],
            sample_weight=None if call.sample_weight is None else call.sample_weight[(*rows, ...)],
        )


def _without_bfloat16(x: Array) -> Array:
    """Return `x`, or its float32 values where it holds bfloat16, with which libraries cannot compute."""
    if not isinstance(x.dtype, np.dtype) or dtype_name(x.dtype) != "bfloat16":
        return x
    bits = x["bfloat16"] if x.dtype == BFLOAT16 else x.view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def log_loss(
    y_true: Any,
    y_proba: Any,
    *,
    normalize: bool = True,
    sample_weight: Any | None = None,
    labels: Any | None = None,
) -> float:
    r"""Log loss of predicted probabilities: mean negative logarithm of what the true classes were given.

    .. math:: -\frac1N \sum_i \log p_{i, y_i}, \qquad \text{or} \quad -\frac1N \sum_i \sum_c q_{i c} \log p_{i c}

    Arguments and numbers are those of `sklearn.metrics.log_loss`, up to rounding; soft labels and a single class
    among `y_true` will do, too, and so will weights that sum to 0.

    Parameters
    ----------
    y_true : array or sequence of shape (n,), or array of shape (n, C)
        True classes, of any type that sorts: text, whole numbers. Or soft labels: their probabilities, not negative.
    y_proba : array or sequence of numbers, of shape (n, C) or (n,)
        Predicted probabilities, in [0, 1], classes in sorted order; or those of the second of two classes. They are
        clipped to [eps, 1 - eps], eps being the spacing of their dtype at 1.
    normalize : bool, default True
        Return the mean; else the sum.
    sample_weight : array or sequence of shape (n,), or number, optional
        Row weights, finite, of either sign; the mean divides by their sum. A weight of 0 removes its row, whatever
        stands there.
    labels : array or sequence of shape (C,), optional
        All classes, each once. Without it they are those in `y_true`; where these are fewer than C, 0..C-1, if they
        are whole numbers within that and 0 is among them (else they might be 1..C). Of two classes, 0, 1 or -1 alone
        tells the other.

    Returns
    -------
    float
        The loss in nats. The mean is NaN where the weights sum to 0, for which scikit-learn raises an error.

    Raises
    ------
    LabelError
        A label is missing (None, NaN, NaT, pandas.NA), a fraction, or not one of `labels`.
    TypeError
        An argument is of the wrong kind or dtype, or labels do not sort.
    ValueError
        A probability is out of range, a shape does not fit, or the classes cannot be told.

    Warns
    -----
    UserWarning
        The probabilities of a row do not sum to 1: they are taken as they are. Or `labels` are not sorted: the columns
        are taken in sorted order.

    References
    ----------
    .. [1] C. M. Bishop, "Pattern recognition and machine learning", Springer 2006, p. 209; arguments and numbers are
       those of scikit-learn.

    Examples
    --------
    >>> import numpy as np, xce
    >>> proba = np.array([[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
    >>> print(f"{xce.log_loss(['spam', 'ham', 'ham', 'spam'], proba):.5f}")
    0.21616
    """
    normalize = check.flag("normalize", normalize)
    p = _array(y_proba, "y_proba")
    if isinstance(p.dtype, np.dtype) and p.dtype.char == "g":  # longdouble, as scikit-learn does
        p = p.astype(np.float64)
    engine = arrays_of(p, "y_proba").engine
    xp = namespace(p)
    kind = dtype_name(check.of_dtype(p, "y_proba", *check.NUMBERS).dtype)
    if kind == "bfloat16":
        dtype, eps = xp.float32, 2.0**-7
    else:
        dtype = native(p.dtype) if kind in check.FLOATS else xp.float64  # of certain answers
        eps = float(xp.finfo(dtype).eps)
    if p.ndim not in (1, 2) or p.shape[0] == 0:
        raise ValueError(f"y_proba has shape {p.shape}: expected (n,) or (n, C) with at least one row")
    truth = _array(y_true, "y_true", of_labels=True)
    is_soft = len(truth.shape) == 2 and truth.shape[1] != 1
    if is_soft and truth.shape != p.shape:
        raise ValueError(f"y_true has shape {truth.shape}: expected (n,) or {p.shape}, the shape of y_proba")
    if is_soft:
        truth = check.of_dtype(truth, "y_true", *check.NUMBERS)
    weights = None if sample_weight is None else _row_weights(xp, p, sample_weight)
    if weights is not None and not any(
        bool(xp.any(_without_bfloat16(weights[rows]) != 0)) for rows in _rows(p.shape[0])
    ):
        return math.nan if normalize else 0.0
    check.values(engine, p, "y_proba", 0.0, 1.0, "expected probabilities between 0 and 1", _like(p, weights))
    n_columns = p.shape[1] if p.ndim == 2 and p.shape[1] != 1 else 2
    if is_soft:
        check.values(arrays_of(truth, "y_true").engine, truth, "y_true", *check.NOT_NEGATIVE, _like(truth, weights))
    else:
        truth = namespace(truth).reshape(truth, (-1,))
        if truth.shape[0] != p.shape[0]:
            found = check.counted(truth.shape[0], "row", "rows")
            raise ValueError(f"y_true has {found} but y_proba has {p.shape[0]}")
        truth = _class_labels(truth, "y_true", weights)
        classes = _classes(truth, weights, n_columns, labels)
    sums, totals, is_normal = [], [], True
    with np.errstate(all="ignore"):
        is_copied = is_soft or p.dtype not in (xp.float32, xp.float64)
        for rows in _rows(p.shape[0], n_columns if is_copied else 1):
            q = _side_by_side(_without_bfloat16(p[rows, ...]), dtype) if is_copied else p[rows, ...]
            q = xp.reshape(q, (rows.stop - rows.start, -1))
            q = xp.concat([1 - q, q], axis=1) if q.shape[1] == 1 else q
            q = q if dtype in (xp.float32, xp.float64) else xp.astype(q, xp.float32)
            s = None if weights is None else xp.astype(_without_bfloat16(weights[rows]), xp.float64)
            is_one = xp.abs(xp.sum(q, axis=1) - 1) <= math.sqrt(eps)
            is_normal = is_normal and bool(xp.all(is_one if s is None else is_one | (s == 0)))
            if is_soft:
                t = _side_by_side(xp.asarray(_without_bfloat16(truth[rows, :]), device=device_of(p)), q.dtype)
                losses = -xp.sum(t * xp.log(xp.clip(q, eps, 1 - eps)), axis=1)
            else:
                place = xp.asarray(_places(classes, truth, rows, s), device=device_of(p))
                losses = -xp.log(xp.clip(xp.take_along_axis(q, place[:, None], axis=1)[:, 0], eps, 1 - eps))
            losses = xp.astype(losses, xp.float64)
            if s is not None:
                losses = xp.where(s == 0, 0.0, s * losses)
                totals.append(float(xp.sum(s)))
            sums.append(float(xp.sum(losses)))
    if not is_normal:
        warnings.warn("y_proba: there are rows that do not sum to one; they are taken as they are", stacklevel=2)
    if not normalize:
        return math.fsum(sums)
    scale = p.shape[0] if weights is None else math.fsum(totals)
    return math.fsum(sums) / scale if scale else math.nan


def _rows(n: int, width: int = 1) -> Iterator[slice]:
    """Yield the rows that log_loss computes on at a time, side by side: they depend on the shape alone."""
    step = max(1, _NUMBERS // width)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _side_by_side(x: Array, dtype: Any) -> Array:
    """Return a copy in C order."""
    xp = namespace(x)
    return xp.reshape(xp.astype(xp.reshape(x, (-1,)), dtype), x.shape)


def _like(x: Array, weights: Array | None) -> tuple[Array, ...]:
    """Return the weights of rows as weights of the entries of `x`, where it lies."""
    if weights is None:
        return ()
    xp = namespace(x)
    weights = weights if namespace(weights) is xp else xp.asarray(weights, device=device_of(x))
    return (xp.broadcast_to(xp.reshape(weights, (-1, *(1 for _ in x.shape[1:]))), x.shape),)


def _array(x: Any, name: str, *, of_labels: bool = False) -> Any:
    """Return arrays as they are computed on, and lists, series and frames as arrays of NumPy."""
    if type(x) is np.ndarray:
        return x
    from array_api_compat import is_cupy_array, is_torch_array

    if hasattr(x, "__array_namespace__") or is_torch_array(x) or is_cupy_array(x):
        return library_of(x, name).view(x, name)
    array = check.from_list(x, name)
    # of a list with text, NumPy makes text of everything: None and NaN would be classes
    return np.asarray(x, object) if of_labels and array.dtype.kind in "US" and not hasattr(x, "dtype") else array


def _class_labels(x: Array, name: str, weights: Array | None = None) -> Array:
    """Return labels as they are sorted, those of rows that count being classes: not missing, floats whole numbers."""
    xp = namespace(x)
    if xp is np and x.dtype.kind in "OT":
        x = x.astype(object, copy=False)
        if len(kinds := set(map(type, x))) == 1 and kinds <= {bool, int, float, str}:
            x = np.asarray(x.tolist())
    x = widen(_without_bfloat16(x))
    if "complex" in dtype_name(x.dtype):
        raise TypeError(
            f"{name} has dtype {x.dtype}: expected numbers that are whole, text, or anything else that sorts"
        )
    for rows in _rows(x.shape[0]):
        bad = _is_no_class(xp, x[rows])
        if bad is None:
            break
        if weights is not None:
            bad = bad & xp.asarray(_without_bfloat16(weights[rows]) != 0, device=device_of(x))
        if bool(xp.any(bad)):
            at = rows.start + int(xp.argmax(xp.astype(bad, xp.uint8)))
            value = x[at] if xp is np else check.unboxed(name, x[at])
            if _is_missing(value):
                raise LabelError(f"{name}[{at}] = {value} is a missing value: expected a class")
            raise LabelError(
                f"{name}[{at}] = {check.number_text(value)} is not a class: expected numbers that are whole, text, or "
                "anything else that sorts; probabilities as labels have the shape (n, C)"
            )
    return x


def _is_no_class(xp: Any, labels: Array) -> Array | None:
    """Return which labels are missing, or floats that are not whole; None where the dtype has no such."""
    kind = labels.dtype.kind if isinstance(labels.dtype, np.dtype) else ""
    if kind == "f" or (not kind and xp.isdtype(labels.dtype, "real floating")):
        with np.errstate(invalid="ignore"):
            return ~xp.isfinite(labels) | (labels != xp.floor(labels))
    if kind in ("M", "m"):
        return np.isnat(labels)
    if kind == "O":
        return np.array([_is_missing(v) or _is_fraction(v) for v in labels.tolist()], bool)
    return None


def _is_fraction(label: Any) -> bool:
    return isinstance(label, Real) and not isinstance(label, Integral) and bool(label % 1)


def _is_missing(label: Any) -> bool:
    """Whether a label is None, NaN, NaT or pandas.NA."""
    try:
        return label is None or bool(label != label)
    except TypeError:  # of pandas.NA, which is neither
        return True


def _row_weights(xp: Any, p: Array, sample_weight: Any) -> Array:
    """Return the checked weights, one a row."""
    s = check.of_dtype(_array(sample_weight, "sample_weight"), "sample_weight", *check.NUMBERS)
    check.values(arrays_of(s, "sample_weight").engine, s, "sample_weight", *check.FINITE)
    if s.shape not in ((), p.shape[:1]):
        raise ValueError(f"sample_weight has shape {s.shape}: expected {p.shape[:1]}, one weight per row")
    s = s if namespace(s) is xp else xp.asarray(_without_bfloat16(s), device=device_of(p))
    return xp.broadcast_to(s, p.shape[:1])


def _classes_in(xp: Any, labels: Array, weights: Array | None = None) -> Array:
    """Return the distinct labels of rows that count, in order, which the standard leaves open."""
    found, limit = [labels[:0]], _NUMBERS
    for rows in _rows(labels.shape[0]):
        part = _counting(xp, labels[rows], None if weights is None else _without_bfloat16(weights[rows]))
        if part is not None:
            found.append(xp.unique_values(part))
        if sum(a.shape[0] for a in found) > limit:
            found = [xp.unique_values(xp.concat(found))]
            limit = 2 * found[0].shape[0] + _NUMBERS
    return xp.sort(xp.unique_values(xp.concat(found)))


def _counting(xp: Any, labels: Array, weights: Array | None) -> Array | None:
    """Return labels, of which those that do not count repeat one that does; None if none does."""
    if weights is None:
        return labels
    counts = xp.asarray(weights != 0, device=device_of(labels))
    if not bool(xp.any(counts)):
        return None
    first = xp.argmax(xp.astype(counts, xp.int8))
    return xp.take(labels, xp.where(counts, xp.arange(labels.shape[0], device=device_of(labels)), first))


def _classes(truth: Array, weights: Array | None, n_classes: int, labels: Any) -> Array:
    """Return all classes, in order."""
    xp = namespace(truth)
    if labels is not None:
        labels = _array(labels, "labels", of_labels=True)
        if labels.ndim != 1:
            raise ValueError(f"labels has shape {labels.shape}: expected (C,), each class once")
        labels = _class_labels(labels, "labels")
        labels = labels if namespace(labels) is xp else xp.asarray(labels, device=device_of(truth))
        classes = _sorted_classes(xp, labels, "labels")
        if labels.shape != classes.shape:
            ordered = xp.sort(labels)
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
            raise ValueError(
                f"labels has the class {check.number_text(twice[0])} more than once: expected each class once"
            )
        if classes.shape[0] != n_classes:
            found = check.counted(classes.shape[0], "class", "classes")
            raise ValueError(f"labels has {found} but y_proba has {n_classes}: {_text(classes)}")
        if not bool(xp.all(labels == classes)):
            warnings.warn(f"labels: the columns of y_proba are taken in sorted order, {_text(classes)}", stacklevel=3)
        return classes
    found = _sorted_classes(xp, truth, "y_true", weights)
    return found if found.shape[0] == n_classes else _all_classes(xp, found, truth, n_classes)


def _sorted_classes(xp: Any, labels: Array, name: str, weights: Array | None = None) -> Array:
    try:
        return _classes_in(xp, labels, weights)
    except TypeError as error:
        raise TypeError(f"{name} holds labels that do not sort ({error}): expected labels of one type") from None


def _places(classes: Array, truth: Array, rows: slice, weights: Array | None) -> Array:
    """Return the places of the true classes among all classes, whatever they are in rows that do not count."""
    xp = namespace(truth)
    if (truth := _counting(xp, truth[rows], weights)) is None:
        return xp.zeros(rows.stop - rows.start, dtype=xp.int64)
    try:
        place = xp.clip(xp.searchsorted(classes, truth), 0, classes.shape[0] - 1)
    except TypeError as error:
        raise TypeError(f"y_true does not sort with labels ({error}): expected labels of one type") from None
    bad = xp.take(classes, place) != truth
    if bool(xp.any(bad)):
        counts = bad if weights is None else bad & xp.asarray(weights != 0, device=device_of(truth))
        at = int(xp.argmax(xp.astype(counts, xp.uint8)))
        found = check.number_text(truth[at] if xp is np else check.unboxed("y_true", truth[at]))
        raise LabelError(f"y_true[{rows.start + at}] = {found} is not one of the classes {_text(classes)}")
    return place


def _all_classes(xp: Any, found: Array, every: Array, n_classes: int) -> Array:
    """Return the classes of which only some were found in rows that count."""
    kind = dtype_name(found.dtype)
    if kind == "bool":
        return xp.asarray([False, True])
    is_float = kind in check.FLOATS
    if kind in check.INTEGERS or (is_float and n_classes <= 2 / xp.finfo(found.dtype).eps):  # which it holds exactly
        low, high = int(found[0]), int(found[-1])
        if n_classes == 2 and low == -1 == high:  # of -1 and 1
            return xp.asarray([-1, 1], dtype=found.dtype)
        # without 0 they could also be 1..C
        if high < n_classes and (low == 0 or (n_classes == 2 and low == 1)):
            return xp.astype(xp.arange(n_classes), found.dtype)
    if (bad := _is_no_class(xp, every)) is not None:
        every = every[~bad]
    with contextlib.suppress(TypeError):  # what stands in removed rows need not sort
        if (others := _classes_in(xp, every)).shape[0] == n_classes:
            return others
    raise ValueError(
        f"y_true has {check.counted(found.shape[0], 'class', 'classes')} but y_proba has {n_classes}, and which are "
        f"missing cannot be told: pass all of them as labels; found are {_text(found)}"
    )


def _text(classes: Array) -> str:
    try:
        return str(classes)
    except ValueError:  # one is an integer of very many digits
        return f"of dtype {classes.dtype}"
