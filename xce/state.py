"""`LossState`: the cross entropy of rows whose logits come in pieces."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from xce._backends._scan import widen
from xce._call import Array, normalise
from xce._check import label_error
from xce._dispatch import owner_of
from xce.losses import Reduction, cross_entropy

__all__ = ["LossState"]


class _Piece(NamedTuple):
    """What classes ``start..stop-1`` of some rows contribute; all float64, one entry a row."""

    start: int
    stop: int
    max: np.ndarray
    rest: np.ndarray  # sum of exp(logit - max) over all classes of the piece but the first maximum; -1: all are -inf
    label_logit: np.ndarray  # NaN where the label lies elsewhere
    linear: np.ndarray  # sum of weight * (max - logit)
    weight: float  # sum of the class weights


class _Block(NamedTuple):
    """Rows that still lack classes."""

    target: np.ndarray
    sample_weight: np.ndarray
    pieces: list[_Piece]


class LossState:
    r"""Cross entropy of rows that arrive in pieces: batches of rows, shards of classes, or both, in any order.

    A shard of classes leaves for each of its rows the maximum :math:`m`, the sum
    :math:`r = \sum_{c} e^{x_c - m}` over its other entries, and the terms of the target. Two of them merge by

    .. math:: m = \max(m_1, m_2), \qquad r = r_1 + (1 + r_2)\, e^{m_2 - m} \quad (m_1 \ge m_2),

    and when all classes of a row have come, its loss is :math:`(m - x_y) + \log(1 + r)`. Pieces are merged in the order
    of their classes and losses are added exactly, so the result has the same bits whatever the order of arrival.

    Parameters
    ----------
    n_classes : int, optional
        The number of classes of a whole row. None: every update brings whole rows.
    weight : array of shape (n_classes,), optional
        Class weights.
    ignore_index : int, default -100
        Rows with this label count nothing.
    label_smoothing : float, default 0.0
        The share of the target that is spread evenly over the classes.
    keep_rows : bool, default False
        Keep the loss of each row for ``result("none")``: 16 bytes a row. Otherwise the memory of finished rows is
        constant.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`.

    See Also
    --------
    cross_entropy : the same for rows that are there as a whole.

    References
    ----------
    .. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867 (2018).
    .. [2] M. Shoeybi et al., "Megatron-LM", arXiv:1909.08053 (2019), section 3 (shards of the vocabulary).

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.array([[2.0, 1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    >>> labels = np.array([0, 2])
    >>> left, right = xce.LossState(4), xce.LossState(4)
    >>> _ = left.update(logits[:, :2], labels)
    >>> _ = right.update(logits[:, 2:], labels, class_offset=2)
    >>> print(f"{right.merge(left).result():.6f} {xce.cross_entropy(logits, labels):.6f}")
    1.413242 1.413242
    """

    def __init__(
        self,
        n_classes: int | None = None,
        *,
        weight: Array | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        keep_rows: bool = False,
    ) -> None:
        if n_classes is not None and (isinstance(n_classes, bool) or not isinstance(n_classes, (int, np.integer))):
            raise TypeError(f"n_classes is a {type(n_classes).__name__}: it must be None or an integer of at least 1")
        if n_classes is not None and n_classes < 1:
            raise ValueError(f"n_classes={n_classes} is not allowed: it must be None or at least 1")
        self.n_classes = None if n_classes is None else int(n_classes)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        if not isinstance(keep_rows, bool):
            raise TypeError(f"keep_rows is a {type(keep_rows).__name__}: it must be True or False")
        self.keep_rows = keep_rows
        self._weight = None if weight is None else np.array(_on_host(weight, "weight"))
        # the checks of cross_entropy, on a row of zeros
        zeros = np.broadcast_to(np.zeros(1), (self.n_classes or (1 if self._weight is None else self._weight.size),))
        cross_entropy(zeros, ignore_index, weight=self._weight, **self._options())
        self._sum = _ExactSum()
        self._denominator = _ExactSum()
        self._rows: dict[int, np.ndarray] = {}
        self._open: dict[int, _Block] = {}
        self._next_row = 0

    def update(
        self,
        logits: Array,
        target: Array,
        class_offset: int = 0,
        *,
        row_offset: int | None = None,
        sample_weight: Array | None = None,
    ) -> LossState:
        """Add logits, of whole rows or of a shard of their classes.

        Parameters
        ----------
        logits : array of shape (..., width), floating
            Classes ``class_offset`` to ``class_offset + width - 1`` of the rows.
        target : integer array of shape (...)
            The labels among all classes, the same for each shard of a row.
        class_offset : int, default 0
            The class of the first column.
        row_offset : int, optional
            The number of the first row, to tell which shards belong together when several batches are under way.
            None: the rows after those that are finished.
        sample_weight : array of the shape of `target`, optional
            Row weights, the same for each shard of a row.

        Returns
        -------
        LossState
            The state itself.

        Raises
        ------
        LabelError
            A label is neither a class nor `ignore_index`.
        TypeError, ValueError
            As `cross_entropy`; or the classes do not lie within ``n_classes``, or came before.
        """
        owner, x = _on_device(logits)
        width = x.shape[-1] if x.shape else 0
        n_classes = width if self.n_classes is None else self.n_classes
        if isinstance(class_offset, bool) or not isinstance(class_offset, (int, np.integer)):
            raise TypeError(f"class_offset is a {type(class_offset).__name__}: it must be an integer")
        if class_offset < 0 or class_offset + width > n_classes:
            hint = "; give LossState(n_classes) to add shards" if self.n_classes is None else ""
            raise ValueError(
                f"logits hold classes {class_offset}..{class_offset + width - 1}: they must lie within "
                f"0..{n_classes - 1}{hint}"
            )
        first = self._next_row if row_offset is None else row_offset
        if isinstance(first, bool) or not isinstance(first, (int, np.integer)):
            raise TypeError(f"row_offset is a {type(first).__name__}: it must be None or an integer of at least 0")
        if first < 0:
            raise ValueError(f"row_offset={first} is not allowed: it must be None or at least 0")
        first, y = int(first), _labels(target)
        s = None if sample_weight is None else _on_host(sample_weight, "sample_weight")
        if width == n_classes:
            self._add_whole(owner, x, y, first, s)
        else:
            self._add_piece(owner, x, y, int(class_offset), first, s)
        return self

    def merge(self, other: LossState) -> LossState:
        """Add what another state has seen; it stays as it is.

        Parameters
        ----------
        other : LossState
            A state with the same options.

        Returns
        -------
        LossState
            The state itself.

        Raises
        ------
        TypeError
            `other` is no `LossState`.
        ValueError
            Its options differ, or the same classes of the same rows came to both.
        """
        if not isinstance(other, LossState):
            raise TypeError(f"other is a {type(other).__name__}: it must be a LossState")
        for name in ("n_classes", "ignore_index", "label_smoothing", "keep_rows"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"{name} differs: {getattr(self, name)!r} here, {getattr(other, name)!r} in other")
        if not np.array_equal(self._weight, other._weight):  # type: ignore[arg-type]
            raise ValueError("weight differs between the two states")
        merged = copy.deepcopy(self)  # so that an error half-way changes nothing
        for first, losses in other._rows.items():
            merged._keep(first, losses)
        merged._sum.merge(other._sum)
        merged._denominator.merge(other._denominator)
        merged._next_row = max(merged._next_row, other._next_row)
        for first, block in other._open.items():
            merged._check_block(first, block)
            merged._join(first, block)
        self.__dict__ = merged.__dict__
        return self

    def __copy__(self) -> LossState:
        return copy.deepcopy(self)

    def result(self, reduction: Reduction = "mean") -> Any:
        """Return the loss of all rows that came.

        Parameters
        ----------
        reduction : {"mean", "sum", "none"}, default "mean"
            As in `cross_entropy`; "none" needs ``keep_rows=True`` and returns the rows in their order.

        Returns
        -------
        float or array of float64
            The loss in nats.

        Raises
        ------
        ValueError
            Classes of a row are missing, or the reduction is unknown or not available.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown: it must be one of 'mean', 'sum', 'none'")
        for first, block in self._open.items():
            gaps = ", ".join(f"{start}..{stop - 1}" for start, stop in self._missing(block.pieces))
            raise ValueError(f"classes {gaps} of rows {first}..{first + block.target.size - 1} have not come")
        if reduction == "none":
            if not self.keep_rows:
                raise ValueError("reduction='none' needs LossState(keep_rows=True)")
            blocks = [self._rows[first] for first in sorted(self._rows)]
            return np.concatenate(blocks) if blocks else np.empty(0)
        return self._sum.value() if reduction == "sum" else self._sum.over(self._denominator)

    def __repr__(self) -> str:
        state = f"{len(self._open)} blocks of rows open" if self._open else "all rows finished"
        return f"<LossState: n_classes={self.n_classes}, {state}>"

    # ------------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}

    def _add_whole(self, owner: ModuleType, x: Array, y: np.ndarray, first: int, s: np.ndarray | None) -> None:
        own = partial(_beside, owner, x)
        losses = cross_entropy(
            x, own(y), weight=own(self._weight), sample_weight=own(s), reduction="none", **self._options()
        )
        losses = _of_rows(owner, losses)
        self._close(first, losses, y.ravel(), _weights_of_rows(s, y))

    def _add_piece(
        self, owner: ModuleType, x: Array, y: np.ndarray, start: int, first: int, s: np.ndarray | None
    ) -> None:
        n_classes = self.n_classes or 0
        if (bad := owner_of(y, "target").scan_labels(y, n_classes, self.ignore_index)) >= 0:
            raise label_error(y, bad, n_classes, self.ignore_index)
        stop = start + x.shape[-1]
        is_here = (y != self.ignore_index) & (y >= start) & (y < stop)
        local = np.asarray(np.where(is_here, y.astype(np.int64) - start, -1))
        weight = None if self._weight is None else self._weight[start:stop]
        own = partial(_beside, owner, x)
        call = normalise(owner, "state", "", 0.0, x, -1, own(local), own(weight), own(s), ignore_index=-1)
        top, rest, label_logit, linear = (_of_rows(owner, a) for a in owner.run(call))
        if (top == -np.inf).any():  # rows of -inf only add nothing, unless a NaN hides there, as logsumexp tells
            bare = call._replace(op="logsumexp", target=None, weight=None, sample_weight=None)
            empty = _of_rows(owner, owner.run(bare)) == -np.inf
            rest[empty], linear[empty] = -1, 0
        piece = _Piece(start, stop, top, rest, label_logit, linear, _total(weight, stop - start))
        block = _Block(y.ravel().copy(), _weights_of_rows(s, y), [piece])
        self._check_block(first, block)
        self._join(first, block)

    def _check_block(self, first: int, block: _Block) -> None:
        """Raise if the block does not go with what is there."""
        if self.keep_rows:
            self._check_free(first, block.target.size)
        known = self._open.get(first)
        if known is None:
            return
        if not np.array_equal(known.target, block.target):
            raise ValueError(f"target of the rows from {first} differs from that of their other shards")
        if not np.array_equal(known.sample_weight, block.sample_weight):
            raise ValueError(f"sample_weight of the rows from {first} differs from that of their other shards")
        for a in known.pieces:
            for b in block.pieces:
                if a.start < b.stop and b.start < a.stop:
                    raise ValueError(
                        f"classes {max(a.start, b.start)}..{min(a.stop, b.stop) - 1} of the rows from {first} came "
                        "twice: pass row_offset to tell batches apart"
                    )

    def _join(self, first: int, block: _Block) -> None:
        known = self._open.get(first, block._replace(pieces=[]))
        pieces = sorted(known.pieces + block.pieces)
        self._open[first] = known._replace(pieces=pieces)
        if not self._missing(pieces):
            del self._open[first]
            self._close(
                first,
                self._losses(block.target, block.sample_weight, pieces),
                block.target,
                block.sample_weight,
            )

    def _missing(self, pieces: list[_Piece]) -> list[tuple[int, int]]:
        ends = [0, *(piece.stop for piece in pieces)]
        starts = [*(piece.start for piece in pieces), self.n_classes or 0]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def _losses(self, target: np.ndarray, sample_weight: np.ndarray, pieces: list[_Piece]) -> np.ndarray:
        with np.errstate(all="ignore"):
            top = np.max([piece.max for piece in pieces], axis=0)
            rest = np.zeros_like(top)
            linear = np.zeros_like(top)
            found = np.zeros(top.shape, bool)  # the piece with the first maximum
            label_logit = np.full_like(top, np.nan)
            for piece in pieces:
                is_top = (piece.max == top) & ~found
                found |= is_top
                rest += np.where(is_top, piece.rest, (1 + piece.rest) * np.exp(piece.max - top))
                shift = np.where(piece.max == top, 0.0, top - piece.max)
                linear += piece.linear + (piece.weight * shift if piece.weight else 0.0)
                label_logit = np.where(np.isnan(piece.label_logit), label_logit, piece.label_logit)
            rest = np.where(np.isfinite(top), rest, np.nan)
            log_z = np.log1p(rest)
            n_classes, eps = self.n_classes or 1, self.label_smoothing
            counted = target != self.ignore_index
            own = (1 - eps) * self._weights_of(target, counted)
            losses = np.where(own == 0, 0.0, own * ((top - label_logit) + log_z))
            if eps:
                all_weights = sum(piece.weight for piece in pieces)
                losses = losses + eps / n_classes * (linear + (all_weights * log_z if all_weights else 0.0))
            losses = np.where(sample_weight == 0, 0.0, sample_weight * losses)
            return np.where(counted, np.where(np.isnan(log_z), np.nan, losses), 0.0)

    def _weights_of(self, target: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """The class weight of each row's label; 0 where it is ignored."""
        if self._weight is None:
            return counted.astype(np.float64)
        return np.where(counted, self._weight.astype(np.float64)[np.where(counted, target, 0)], 0.0)

    def _close(self, first: int, losses: np.ndarray, target: np.ndarray, sample_weight: np.ndarray) -> None:
        if self.keep_rows:
            self._keep(first, losses)
        self._next_row = max(self._next_row, first + losses.size)
        self._sum.add(float(losses.sum()))
        counted = target != self.ignore_index
        self._denominator.add(float((self._weights_of(target, counted) * sample_weight).sum()))

    def _keep(self, first: int, losses: np.ndarray) -> None:
        self._check_free(first, losses.size)
        self._rows[first] = losses

    def _check_free(self, first: int, n_rows: int) -> None:
        for start, known in self._rows.items():
            if start < first + n_rows and first < start + known.size:
                raise ValueError(f"row {max(start, first)} is finished already: pass row_offset to tell rows apart")


class _ExactSum:
    """A sum of floats without rounding, so that it does not depend on the order."""

    def __init__(self) -> None:
        self.finite = Fraction(0)
        self.other = 0.0  # infinities and NaN

    def add(self, x: float) -> None:
        if math.isfinite(x):
            self.finite += Fraction(x)
        else:
            self.other += x

    def merge(self, more: _ExactSum) -> None:
        self.finite += more.finite
        self.other += more.other

    def value(self) -> float:
        return self.other if self.other else _float(self.finite)

    def over(self, denominator: _ExactSum) -> float:
        if not denominator.finite or denominator.other:
            return math.nan
        return self.other if self.other else _float(self.finite / denominator.finite)


def _float(x: Fraction) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _on_device(logits: Array) -> tuple[ModuleType, Array]:
    """Return logits where they are, and the backend that has kernels for them: that of NumPy if no other."""
    x = owner_of(logits, "logits").view(logits, "logits")
    owner = owner_of(x, "logits")
    if not hasattr(owner, "from_numpy"):
        x = owner.to_numpy(x)
        owner = owner_of(x, "logits")
    return owner, x


def _on_host(x: Array, name: str) -> np.ndarray:
    """What there is one of for each row, or class, as an array of NumPy."""
    x = owner_of(x, name).view(x, name)
    return widen(owner_of(x, name).to_numpy(x))  # type: ignore[no-any-return]


def _labels(target: Array) -> np.ndarray:
    """Class indices as a NumPy array in native byte order."""
    y = _on_host(target, "target")
    if y.dtype.kind not in "iu":
        raise TypeError(f"target has dtype {y.dtype}: LossState takes class indices, of an integer dtype")
    return y.astype(y.dtype.newbyteorder("="), copy=False)


def _weights_of_rows(sample_weight: np.ndarray | None, y: np.ndarray) -> np.ndarray:
    return np.ones(y.size) if sample_weight is None else np.broadcast_to(sample_weight, y.shape).ravel().astype(float)


def _beside(owner: ModuleType, x: Array, a: np.ndarray | None) -> Array:
    """Return an array of the host where `x` is."""
    return None if a is None else owner.from_numpy(a, x)


def _of_rows(owner: ModuleType, x: Array) -> np.ndarray:
    return np.ravel(owner.to_numpy(x)).astype(np.float64)


def _total(weight: np.ndarray | None, width: int) -> float:
    return float(width) if weight is None else float(np.sum(weight, dtype=np.float64))
