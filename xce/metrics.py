"""Figures of merit of classifiers, computed from the same row statistics as the losses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array, is_torch_array

from xce import _check as check
from xce._call import Array
from xce._dispatch import owner_of, view
from xce._docs import documented_like
from xce.losses import cross_entropy, logit_stats

__all__ = ["brier_score", "log_loss", "perplexity", "top_k_accuracy"]


@documented_like(cross_entropy)
def perplexity(
    logits: Array,
    target: Array | int,
    *,
    ignore_index: int = -100,
    axis: int = -1,
    sample_weight: Array | None = None,
    n_threads: int | None = None,
    validate: bool = True,
) -> Any:
    r"""Perplexity of class indices, the exponential of their mean cross-entropy.

    .. math:: \mathrm{PPL} = \exp\Bigl(-\frac1N \sum_i \log p_{i, y_i}\Bigr)

    Parameters
    ----------
    target : array of integers, or int
        Class indices, of the shape of `logits` without `axis`. For a language model: the next tokens.
    ignore_index : int, default -100
        Rows with this label do not count.
    validate : bool, default True
        False skips the checks that read the data: labels and weights.

    Returns
    -------
    scalar
        The perplexity, at least 1 (float32, or float64 for float64 logits), of the kind and on the device of
        `logits`. It is NaN without rows that count.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, or a weight is negative or not finite.
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
    _refuse_probabilities(logits, target)
    # fmt: off
    loss = cross_entropy(
        logits, target, ignore_index=ignore_index, axis=axis, sample_weight=sample_weight, n_threads=n_threads,
        validate=validate,
    )
    # fmt: on
    return np.exp(loss) if isinstance(loss, np.generic) else array_namespace(loss).exp(loss)


@documented_like(logit_stats)
def top_k_accuracy(
    logits: Array,
    target: Array | int,
    *,
    k: int = 1,
    ignore_index: int = -100,
    axis: int = -1,
    n_threads: int | None = None,
    validate: bool = True,
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
    validate : bool, default True
        False skips the check of the labels; a row with a bad label is then a miss.

    Returns
    -------
    float
        The fraction, in [0, 1]; NaN without rows that count.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed.
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
    k = check.count("k", k)
    stats = logit_stats(logits, target, axis=axis, ignore_index=ignore_index, n_threads=n_threads, validate=validate)
    xp = array_namespace(stats.rank)
    labels = xp.asarray(target)
    known = stats.rank >= 0
    if k == 1:
        hits = known & (stats.argmax == xp.astype(labels, xp.int64))
    else:
        x = xp.moveaxis(logits, axis, -1)
        of_target = xp.astype(stats.target_logit, x.dtype)[..., None]  # exactly: it was read from there
        before = xp.arange(x.shape[-1]) < xp.astype(labels, xp.int64)[..., None]
        ties = xp.sum(xp.astype((x == of_target) & before, xp.int64), axis=-1)
        hits = known & (stats.rank + ties < k)
    n_rows = _counted(xp, labels, ignore_index)
    return int(xp.sum(xp.astype(hits, xp.int64))) / n_rows if n_rows else math.nan


@documented_like(logit_stats)
def brier_score(
    logits: Array,
    target: Array | int,
    *,
    ignore_index: int = -100,
    axis: int = -1,
    n_threads: int | None = None,
    validate: bool = True,
) -> float:
    r"""Brier score of the softmax of logits: mean squared distance of the probabilities from the truth.

    .. math:: \frac1N \sum_i \sum_c (p_{i c} - [c = y_i])^2, \qquad p = \mathrm{softmax}(x)

    Parameters
    ----------
    ignore_index : int, default -100
        Rows with this label do not count.
    validate : bool, default True
        False skips the check of the labels; a bad label makes the score NaN.

    Returns
    -------
    float
        The score, in [0, 2]; NaN without rows that count. That of two classes is twice the one of the positive
        class alone.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed.
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
    _refuse_probabilities(logits, target)
    # fmt: off
    _, grad = cross_entropy(  # which is p - [c = y] with all its digits, and 0 where ignored
        logits, target, ignore_index=ignore_index, axis=axis, reduction="sum", return_grad=True, n_threads=n_threads,
        validate=validate,
    )
    # fmt: on
    xp = array_namespace(grad)
    grad = grad if grad.dtype in (xp.float32, xp.float64) else xp.astype(grad, xp.float32)
    n_rows = _counted(xp, xp.asarray(target), ignore_index)
    return float(xp.sum(grad * grad, dtype=xp.float64)) / n_rows if n_rows else math.nan


def _refuse_probabilities(logits: Array, target: Any) -> None:
    if not isinstance(target, int):
        check.typed(view(owner_of(logits, "logits"), logits, target, "target", "logits"), "target", *check.INTEGERS)


def _counted(xp: Any, labels: Array, ignore_index: int) -> int:
    """Return the number of rows that are not ignored."""
    limits = xp.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        return math.prod(labels.shape)
    return int(xp.sum(xp.astype(labels != ignore_index, xp.int64)))


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
    among `y_true` will do, too.

    Parameters
    ----------
    y_true : array or sequence of shape (n,), or array of shape (n, C)
        True classes, of any type that sorts. Or soft labels: their probabilities, not negative.
    y_proba : array or sequence of floats, of shape (n, C) or (n,)
        Predicted probabilities, in [0, 1], classes in sorted order; or those of the second of two classes. They are
        clipped to [eps, 1 - eps], eps being the spacing of their dtype at 1.
    normalize : bool, default True
        Return the mean; else the sum.
    sample_weight : array or sequence of shape (n,), optional
        Row weights; the mean divides by their sum.
    labels : array or sequence of shape (C,), optional
        All classes. Without it they are those in `y_true` or, where these are fewer than C and integers, 0..C-1.

    Returns
    -------
    float
        The loss in nats.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
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
    owner = owner_of(p, "y_proba")
    if check.dtype_name(p.dtype) in ("bool", *check.INTEGERS):  # certain answers
        p = array_namespace(p).astype(p, array_namespace(p).float64)
    p = check.typed(p, "y_proba", "float16", "float32", "float64")
    check.values(owner, p, "y_proba", 0.0, 1.0, "every probability must be between 0 and 1")
    xp = array_namespace(p)
    if p.ndim not in (1, 2) or p.shape[0] == 0:
        raise ValueError(f"y_proba has shape {p.shape} but must have (n,) or (n, C) with at least one row")
    if p.ndim == 1 or p.shape[1] == 1:
        p = xp.reshape(p, (-1, 1))
        p = xp.concat([1 - p, p], axis=1)
    eps = float(xp.finfo(p.dtype).eps)
    p = p if p.dtype in (xp.float32, xp.float64) else xp.astype(p, xp.float32)
    if not bool(xp.all(xp.abs(xp.sum(p, axis=1) - 1) <= math.sqrt(eps))):
        warnings.warn("y_proba: there are rows that do not sum to one; they are taken as they are", stacklevel=2)
    weights = None if sample_weight is None else _row_weights(xp, p, sample_weight)

    truth = _array(y_true, "y_true")
    if len(truth.shape) == 2 and truth.shape[1] != 1:
        losses = _of_soft_labels(xp, p, truth, eps)
    else:
        index = xp.asarray(_class_indices(truth, p.shape, labels), device=device(p))
        losses = -xp.log(xp.clip(xp.take_along_axis(p, index[:, None], axis=1)[:, 0], eps, 1 - eps))
    losses = xp.astype(losses, xp.float64)
    total = float(xp.sum(losses if weights is None else weights * losses))
    if not normalize:
        return total
    scale = p.shape[0] if weights is None else float(xp.sum(weights))
    return total / scale if scale else math.nan


def _array(x: Any, name: str) -> Any:
    """Return arrays as they are computed on, and lists, series and frames as arrays of NumPy."""
    if hasattr(x, "__array_namespace__") or is_torch_array(x) or is_cupy_array(x):
        return owner_of(x, name).view(x, name)
    return np.asarray(x)


def _row_weights(xp: Any, p: Array, sample_weight: Any) -> Array:
    weights = _array(sample_weight, "sample_weight")
    weights = check.factors(owner_of(weights, "sample_weight"), weights, "sample_weight", True)
    if weights.shape != p.shape[:1]:
        raise ValueError(f"sample_weight has shape {weights.shape} but must have {p.shape[:1]}, one weight per row")
    return xp.asarray(weights, dtype=xp.float64, device=device(p))


def _of_soft_labels(xp: Any, p: Array, truth: Array, eps: float) -> Array:
    if truth.shape != p.shape:
        raise ValueError(f"y_true has shape {truth.shape} but must have (n,) or {p.shape}, the shape of y_proba")
    truth = xp.astype(xp.asarray(truth, device=device(p)), p.dtype)
    check.values(owner_of(truth, "y_true"), truth, "y_true", *check.NOT_NEGATIVE)
    return -xp.sum(truth * xp.log(xp.clip(p, eps, 1 - eps)), axis=1)


def _class_indices(truth: Array, shape: tuple[int, int], labels: Any) -> Array:
    """Return the places of the true classes among all classes."""
    xp = array_namespace(truth)
    truth = xp.reshape(truth, (-1,))
    if truth.shape[0] != shape[0]:
        raise ValueError(f"y_true has {truth.shape[0]} rows but y_proba has {shape[0]}")
    found = xp.unique_values(truth)
    if labels is not None:
        classes = xp.unique_values(xp.asarray(labels))
        if classes.shape[0] != shape[1]:
            raise ValueError(f"labels has {classes.shape[0]} classes but y_proba has {shape[1]}: {classes}")
        if not bool(xp.all(xp.asarray(labels) == classes)):
            warnings.warn(f"labels: the columns of y_proba are taken in sorted order, {classes}", stacklevel=3)
    elif found.shape[0] == shape[1]:
        classes = found
    else:
        classes = _all_classes(xp, found, shape[1])
    place = xp.clip(xp.searchsorted(classes, truth), 0, classes.shape[0] - 1)
    if not bool(xp.all(xp.take(classes, place) == truth)):
        flat = int(xp.argmax(xp.astype(xp.take(classes, place) != truth, xp.uint8)))
        raise ValueError(f"y_true[{flat}] = {truth[flat]} is not one of the classes {classes}")
    return place


def _all_classes(xp: Any, found: Array, n_classes: int) -> Array:
    """Return the classes of which only some were found."""
    kind = check.dtype_name(found.dtype)
    if kind == "bool":
        return xp.asarray([False, True])
    if kind in check.INTEGERS:
        if n_classes == 2 and int(found[0]) == -1:  # of -1 and 1
            return xp.asarray([-1, 1], dtype=found.dtype)
        if int(found[0]) >= 0 and int(found[-1]) < n_classes:
            return xp.astype(xp.arange(n_classes), found.dtype)
    raise ValueError(
        f"y_true has {found.shape[0]} classes but y_proba has {n_classes}, and which are missing cannot be told: "
        f"pass all of them as labels; found are {found}"
    )
