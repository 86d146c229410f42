"""The data of one checked call of each kind, which `_rows` and `_elements` build and engines compute."""

from __future__ import annotations

from typing import Any, NamedTuple

from xce._arrays import Array
from xce._options import Numbers

_PLAIN = Numbers()


class Call(NamedTuple):
    """One checked computation; engines check nothing again."""

    op: str  # "loss" | "nll" | "distillation" | "softmax" | "log_softmax" | "logsumexp" | "stats" | "state"
    logits: Array  # any shape with at least one axis, floating
    axis: int  # the class axis, 0..ndim-1
    loss: str = ""  # the scalar function of the log-probability, or of two: the divergence
    numbers: Any = _PLAIN  # a `Numbers`: the parameter of that function, and the options that are numbers
    labels: Array = None  # None, or class indices of the rows' shape
    probabilities: Array = None  # None, or of the logits' shape
    teacher: Array = None  # None, or the logits of a teacher, of the logits' shape or that of
    teacher_indices: Array = None  # the classes that they are of
    weight: Array = None  # None, or (C,), floating
    sample_weight: Array = None  # None, or of the rows' shape, floating
    where: Array = None  # None, or bool, of the logits' shape
    ignore_index: int = -100
    reduction: str = "none"  # "mean" | "sum" | "none"
    return_grad: bool = False
    return_hess: bool = False
    grad_out: Array = None  # None, or buffers like the logits (also softmax's `out`)
    hess_out: Array = None
    n_threads: int | None = None
    validate: bool = True  # False: the data was not read, and a bad label makes its row NaN


class ElementCall(NamedTuple):
    """One checked computation of f(x, y) for every element; see `Call`."""

    op: str  # "element"
    formula: str  # the function f, and
    params: tuple[float, ...]  # its parameters
    logits: Array  # x: logits, or whatever the loss is a function of; floating
    target: Array  # y, of the same shape: bool, integers or floating
    weight: Array  # None, or factors of the elements, broadcast to the shape of x: bool, integers or floating
    pos_weight: Array  # None, or a second parameter of f, which may also be the alpha of a class, likewise
    sample_weight: Array  # None, or factors that the mean counts, likewise
    axis: int | None  # the axis over which elements are averaged to rows
    validate: bool
    reduction: str  # "mean" | "batchmean" | "sum" | "none"
    return_grad: bool
    return_hess: bool
    n_threads: int | None
    grad_out: Array
    hess_out: Array


class LinearCall(NamedTuple):
    """A checked cross entropy of ``inputs @ weight.T + bias``."""

    loss: Call  # of logits that are never formed: an array of their shape and dtype, without memory, stands for them
    inputs: Array  # (..., D), floating, as the next two
    weight: Array  # (C, D)
    bias: Array  # None, or (C,)
    chunk_rows: int | None
    grad_out: tuple[Array, ...]  # None, or buffers like inputs, weight and bias


class LogitStats(NamedTuple):
    """Row statistics of logits, each of the logits' shape without the class axis.

    Attributes
    ----------
    lse : array of float32 or float64
        Log of the sum of the exponentials of the row's logits, in nats.
    target_logit : array of float32 or float64
        Logit of the target class; NaN for an ignored row.
    argmax : array of int64
        Class with the largest logit, the first of several; the first NaN if there is one.
    rank : array of int64
        Number of classes with a logit strictly greater than the target's: 0 is a hit at top 1. It is -1 for
        an ignored row and for a row with a NaN.
    entropy : array of float32 or float64
        Entropy of ``softmax(logits)`` in nats.
    """

    lse: Array
    target_logit: Array
    argmax: Array
    rank: Array
    entropy: Array
