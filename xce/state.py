"""`LossState`: the cross entropy of rows whose logits come in pieces."""

from __future__ import annotations

import copy
import math
import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from xce import _checks as check
from xce._arrays import Array, described, dtype_name, in_float64, is_label, parts, widen
from xce._errors import LabelError
from xce._libraries import Arrays, arrays_of
from xce._options import Reduction
from xce._rows import row_call
from xce.losses import cross_entropy

__all__ = ["LossState"]

_ROWS = 1 << 13  # that are computed on at a time, beside what is kept of them


class _Piece(NamedTuple):
    """What classes ``start..stop-1`` of some rows contribute; all float64, one entry a row."""

    start: int
    stop: int
    max: np.ndarray
    rest: np.ndarray  # sum of exp(logit - max) over all classes of the piece but the first maximum; -1: all are -inf
    label_logit: np.ndarray  # NaN where the label lies elsewhere
    linear: np.ndarray  # sum of weight * (max - logit)
    weight: float  # sum of the class weights

    def of_rows(self, part: slice) -> _Piece:
        """What they contribute to some of the rows."""
        return self._replace(
            max=self.max[part], rest=self.rest[part], label_logit=self.label_logit[part], linear=self.linear[part]
        )


@dataclass
class _Block:
    """Adjacent rows that have the same classes so far."""

    first: int
    is_numbered: bool  # the caller has numbered the rows
    label: np.ndarray  # int64; -1: the row is removed
    sample_weight: np.ndarray  # float64
    pieces: list[_Piece]  # in the order of their classes
    n_classes: int  # how many classes those have

    @property
    def stop(self) -> int:
        return self.first + self.label.size

    def of_rows(self, first: int, stop: int) -> _Block:
        """The part of rows ``first..stop-1``, with a list of its own."""
        part = slice(first - self.first, stop - self.first)
        pieces = [piece.of_rows(part) for piece in self.pieces]
        return _Block(first, self.is_numbered, self.label[part], self.sample_weight[part], pieces, self.n_classes)

    def add(self, piece: _Piece) -> None:
        insort(self.pieces, piece, key=attrgetter("start"))
        self.n_classes += piece.stop - piece.start


class _RowSet:
    """A set of row numbers as disjoint ranges, in their order."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, self.stops, strict=True)

    def add(self, start: int, stop: int) -> None:
        i, j = bisect_left(self.stops, start), bisect_right(self.starts, stop)
        if i < j:  # joined with those that it touches
            start, stop = min(start, self.starts[i]), max(stop, self.stops[j - 1])
        self.starts[i:j], self.stops[i:j] = [start], [stop]

    def merge_with(self, other: _RowSet) -> None:
        for start, stop in list(other):
            self.add(start, stop)

    def common(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first range that it has in common with another range."""
        i = bisect_right(self.stops, start)
        if i == len(self.stops) or self.starts[i] >= stop:
            return None
        return max(start, self.starts[i]), min(stop, self.stops[i])


class LossState:
    r"""Cross entropy of rows that arrive in pieces: batches of rows, shards of classes, or both, in any order.

    A shard of classes leaves for each of its rows the maximum :math:`m`, the sum
    :math:`r = \sum_{c} e^{x_c - m}` over its other entries, and the terms of the target. Two of them merge by

    .. math:: m = \max(m_1, m_2), \qquad r = r_1 + (1 + r_2)\, e^{m_2 - m} \quad (m_1 \ge m_2),

    and when all classes of a row have come, its loss is :math:`(m - x_y) + \log(1 + r)`. Pieces are merged in the order
    of their classes and losses are added exactly, so the result has the same bits whatever the order of arrival, and
    however the rows are cut into batches.

    Parameters
    ----------
    n_classes : int, optional
        The number of classes of a whole row. None: every update brings whole rows.
    weight : array of shape (n_classes,), optional
        Class weights, finite and not negative.
    ignore_index : int, default -100
        Rows with this label are excluded from loss and denominator.
    label_smoothing : float, default 0.0
        The share of the target that is spread evenly over the classes.
    keep_rows : bool, default False
        Keep the loss of each row for ``result("none")``: 8 bytes a row. Otherwise finished rows take no memory, but for
        the gaps between their numbers.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`.

    See Also
    --------
    cross_entropy : the same for rows that are there as a whole.

    Notes
    -----
    Rows are told apart by their numbers, which `row_offset` of `update` gives; shards of classes need not cut the rows
    in the same places. Without `row_offset` each state counts its own rows from 0: two states that have seen different
    whole rows may be merged, unless ``keep_rows=True``, where the numbers say which row is which.

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
        if n_classes is not None:
            n_classes = check.whole("n_classes", n_classes, 1, or_none=True)
        self.n_classes = n_classes
        self.ignore_index = check.label("ignore_index", ignore_index)
        self.label_smoothing = check.real("label_smoothing", label_smoothing, check.UNIT)
        self.keep_rows = check.flag("keep_rows", keep_rows)
        self._weight = None if weight is None else _class_weight(weight, n_classes)
        self._sum = _ExactSum()
        self._denominator = _ExactSum()
        self._rows: list[tuple[int, np.ndarray]] = []  # the losses of finished rows, and the number of the first
        self._open: list[_Block] = []  # disjoint, in the order of their rows
        self._finished = _RowSet()
        self._numbered = _RowSet()  # those of the finished rows that the caller has numbered
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
        target : array of integers of shape (...), or int
            The labels among all classes, the same for each shard of a row; also as floats that are whole numbers.
        class_offset : int, default 0
            The class of the first column.
        row_offset : int, optional
            The number of the first row, to tell which shards belong together when several batches are under way.
            None: the rows after those that are finished.
        sample_weight : array broadcastable to the shape of `target`, or number, optional
            Row weights, finite, of either sign, the same for each shard of a row. A weight of 0 removes its row,
            whatever its logits and its label are.

        Returns
        -------
        LossState
            The state itself.

        Raises
        ------
        LabelError
            A label is neither a class nor `ignore_index`.
        TypeError, ValueError
            As `cross_entropy`; or the classes do not lie within ``n_classes``, or some of them came before for some of
            the rows, or a row has another label or weight than in its other shards. Nothing is changed then.
        """
        arrays = _on_device(logits)
        x = arrays.first
        if not x.shape or not x.shape[-1]:
            raise ValueError(f"logits has shape {x.shape}: expected (..., width), with at least one class")
        width, rows = x.shape[-1], x.shape[:-1]
        n_classes = width if self.n_classes is None else self.n_classes
        start = check.whole("class_offset", class_offset, 0)
        if start + width > n_classes:
            hint = "; give LossState(n_classes) to add shards" if self.n_classes is None else ""
            raise ValueError(
                f"logits hold classes {start}..{start + width - 1}: expected classes within 0..{n_classes - 1}{hint}"
            )
        first = self._next_row if row_offset is None else check.whole("row_offset", row_offset, 0, or_none=True)
        s = _row_weight(sample_weight, rows)
        target = np.asarray(target) if isinstance(target, Real) else _on_host(target, "target")
        is_whole, n_rows = width == n_classes, math.prod(rows)
        if not is_whole or not n_rows or target.shape != rows:
            y = _labels(target, x.shape, n_classes, self.ignore_index, s == 0)
        check.of_dtype(x, "logits", *check.FLOATS)
        if not n_rows:
            return self
        stop = first + n_rows
        if is_whole:
            self._check_classes(first, stop, [(start, start + width)], self._finished)
            sums = self._whole_sums(arrays, x, target, s)
            self._finish(first, stop, row_offset is not None, *sums)
        else:
            block = _Block(first, row_offset is not None, y.ravel(), in_float64(s).ravel(), [], 0)
            self._check_classes(first, stop, [(start, start + width)], self._finished)
            self._check_targets(block)
            block.add(self._whole_piece(arrays, x, y, start))
            self._join(block)
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
            Its options differ, or the same classes of the same rows came to both, or a row has another label or weight
            in its other shards. Nothing is changed then.
        """
        if not isinstance(other, LossState):
            raise TypeError(f"other is {described(other)}: expected a LossState")
        for name in ("n_classes", "ignore_index", "label_smoothing", "keep_rows"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"{name} differs: {getattr(self, name)!r} here, {getattr(other, name)!r} in other")
        if not _is_same(self._weight, other._weight):
            raise ValueError("weight differs between the two states")
        mine, theirs = (self._finished, other._finished) if self.keep_rows else (self._numbered, other._numbered)
        for first, stop in theirs:
            self._check_classes(first, stop, [(0, self.n_classes or sys.maxsize)], mine)
        for block in other._open:
            self._check_classes(block.first, block.stop, [piece[:2] for piece in block.pieces], mine)
            self._check_targets(block)

        self._rows += other._rows
        self._sum.merge(other._sum)
        self._denominator.merge(other._denominator)
        self._finished.merge_with(other._finished)
        self._numbered.merge_with(other._numbered)
        self._next_row = max(self._next_row, other._next_row)
        for block in other._open:
            self._join(block)
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
            raise ValueError(f"reduction={reduction!r} is unknown: expected 'mean', 'sum' or 'none'")
        for block in self._open:
            gaps = ", ".join(f"{start}..{stop - 1}" for start, stop in self._missing(block.pieces))
            raise ValueError(f"classes {gaps} of rows {block.first}..{block.stop - 1} have not come")
        if reduction == "none":
            if not self.keep_rows:
                raise ValueError("reduction='none' needs LossState(keep_rows=True)")
            self._rows.sort(key=lambda rows: rows[0])
            return np.concatenate([np.empty(0), *(losses for _, losses in self._rows)])
        return self._sum.value() if reduction == "sum" else self._sum.over(self._denominator)

    def __repr__(self) -> str:
        state = (
            f"{check.counted(len(self._open), 'block', 'blocks')} of rows open" if self._open else "all rows finished"
        )
        return f"<LossState: n_classes={self.n_classes}, {state}>"

    # ------------------------------------------------------------------------------------------------------------

    def _whole_losses(self, arrays: Arrays, x: Array, y: np.ndarray, sample_weight: np.ndarray) -> np.ndarray:
        own = partial(_beside, arrays, x)

        def computed(x: Array) -> np.ndarray:
            losses = cross_entropy(
                x,
                own(y),
                weight=own(self._weight),
                ignore_index=-1,
                label_smoothing=self.label_smoothing,
                reduction="none",
            )
            return _of_rows(arrays, losses)

        losses = computed(x)
        if np.isinf(losses).any():  # perhaps in float32 only
            losses = np.where(np.isinf(losses), computed(_in_float64(arrays, x)), losses)
        with np.errstate(all="ignore"):
            return np.where(y.ravel() < 0, 0.0, sample_weight * losses)

    def _piece(self, arrays: Arrays, x: Array, y: np.ndarray, start: int) -> _Piece:
        stop = start + x.shape[-1]
        local = np.where((y >= start) & (y < stop), y - start, -1)
        weight = None if self._weight is None else self._weight[start:stop]
        own = partial(_beside, arrays, x)
        call = row_call(arrays, "state", "", 0.0, x, own(local), {"weight": own(weight), "ignore_index": -1})
        top, rest, label_logit, linear = (_of_rows(arrays, a) for a in arrays.engine.run(call))
        if self.label_smoothing and np.isinf(linear).any():  # perhaps in float32 only
            wide = arrays.engine.run(call._replace(logits=_in_float64(arrays, x)))
            linear = np.where(np.isinf(linear), _of_rows(arrays, wide[3]), linear)
        if (top == -np.inf).any():  # rows of -inf only add nothing, unless a NaN hides there, as logsumexp tells
            bare = call._replace(op="logsumexp", labels=None, weight=None)
            empty = _of_rows(arrays, arrays.engine.run(bare)) == -np.inf
            rest[empty], linear[empty] = -1, 0
        return _Piece(start, stop, top, rest, label_logit, linear, _total(weight, stop - start))

    def _whole_sums(
        self, arrays: Arrays, x: Array, target: Array, sample_weight: Array
    ) -> tuple[np.ndarray | None, _ExactSum, _ExactSum]:
        """The losses of whole rows, if they are kept, their sum and that of the denominator; a block at a time."""
        kept = np.empty(target.size) if self.keep_rows else None
        total, denominator, at = _ExactSum(), _ExactSum(), 0
        for part in parts(target.shape, _ROWS):
            logits, s = x[(*part, ...)], in_float64(sample_weight[(*part, ...)])
            options = x.shape[-1], self.ignore_index
            try:
                y = _labels(target[(*part, ...)], logits.shape, *options, s == 0)
            except (TypeError, ValueError):
                _labels(target, x.shape, *options, sample_weight == 0)  # says where among all rows
                raise
            s = s.ravel()
            losses = self._whole_losses(arrays, logits, y, s)
            with np.errstate(all="ignore"):
                denominator.add(self._weights_of(y.ravel()) * s)
            total.add(losses)
            if kept is not None:
                kept[at : at + y.size] = losses
            at += y.size
        return kept, total, denominator

    def _whole_piece(self, arrays: Arrays, x: Array, y: Array, start: int) -> _Piece:
        """The same as `_piece`, a block of rows at a time."""
        columns, at = [np.empty(y.size) for _ in range(4)], 0
        for part in parts(y.shape, _ROWS):
            piece = self._piece(arrays, x[(*part, ...)], y[(*part, ...)], start)
            for column, values in zip(columns, (piece.max, piece.rest, piece.label_logit, piece.linear), strict=True):
                column[at : at + values.size] = values
            at += piece.max.size
        top, rest, label_logit, linear = columns
        return piece._replace(max=top, rest=rest, label_logit=label_logit, linear=linear)

    def _overlapping(self, first: int, stop: int) -> slice:
        """Which open blocks have some of the rows."""
        start = bisect_right(self._open, first, key=attrgetter("stop"))
        return slice(start, bisect_left(self._open, stop, start, key=attrgetter("first")))

    def _check_classes(self, first: int, stop: int, spans: list[tuple[int, int]], finished: _RowSet) -> None:
        """Refuse classes of rows that are finished, or have come to open blocks."""
        if (rows := finished.common(first, stop)) is not None:
            raise _came_twice(spans[0], rows)
        for known in self._open[self._overlapping(first, stop)]:
            for start, end in spans:
                i = bisect_right(known.pieces, start, key=attrgetter("stop"))
                if i < len(known.pieces) and (piece := known.pieces[i]).start < end:
                    classes = max(start, piece.start), min(end, piece.stop)
                    raise _came_twice(classes, (max(first, known.first), min(stop, known.stop)))

    def _check_targets(self, block: _Block) -> None:
        """Refuse rows that have another label or weight in open blocks."""
        for known in self._open[self._overlapping(block.first, block.stop)]:
            first, stop = max(known.first, block.first), min(known.stop, block.stop)
            here = slice(first - block.first, stop - block.first)
            there = slice(first - known.first, stop - known.first)
            for name, one, other in (
                ("target", block.label[here], known.label[there]),
                ("sample_weight", block.sample_weight[here], known.sample_weight[there]),
            ):
                if (differs := one != other).any():
                    row = first + int(differs.argmax())
                    raise ValueError(
                        f"{name} of row {row} differs from that of its other shards: pass row_offset to tell batches "
                        "apart"
                    )

    def _join(self, block: _Block) -> None:
        """Add a block that was checked, which cuts those that it overlaps."""
        overlapping = self._overlapping(block.first, block.stop)
        blocks, at = [], block.first
        for known in self._open[overlapping]:
            first, stop = max(known.first, block.first), min(known.stop, block.stop)
            if at < first:
                blocks.append(block.of_rows(at, first))
            if known.first < first:
                blocks.append(known.of_rows(known.first, first))
            rest = [known.of_rows(stop, known.stop)] if stop < known.stop else []
            both = known if (first, stop) == (known.first, known.stop) else known.of_rows(first, stop)
            both.is_numbered |= block.is_numbered
            for piece in block.of_rows(first, stop).pieces:
                both.add(piece)
            if both.n_classes < (self.n_classes or 0):
                blocks.append(both)
            else:
                self._close(both, self._losses(both))
            blocks += rest
            at = stop
        if at < block.stop:
            blocks.append(block.of_rows(at, block.stop))
        self._open[overlapping] = blocks

    def _missing(self, pieces: list[_Piece]) -> list[tuple[int, int]]:
        ends = [0, *(piece.stop for piece in pieces)]
        starts = [*(piece.start for piece in pieces), self.n_classes or 0]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def _losses(self, block: _Block) -> np.ndarray:
        """The weighted losses of rows whose classes have all come."""
        pieces = block.pieces
        with np.errstate(all="ignore"):
            top = np.max([piece.max for piece in pieces], axis=0)
            rest = np.zeros_like(top)
            linear = np.zeros_like(top)
            found = np.zeros(top.shape, bool)  # the piece with the first maximum
            label_logit = np.full_like(top, np.nan)
            for piece in pieces:
                is_top = (piece.max == top) & ~found
                found |= is_top
                rest += np.where(is_top, piece.rest, (1 + piece.rest) * _exp_of_difference(piece.max, top))
                shift = np.where(piece.max == top, 0.0, top - piece.max)
                linear += piece.linear + (piece.weight * shift if piece.weight else 0.0)
                label_logit = np.where(np.isnan(piece.label_logit), label_logit, piece.label_logit)
            rest = np.where(np.isfinite(top), rest, np.nan)
            log_z = np.log1p(rest)
            n_classes, eps = self.n_classes or 1, self.label_smoothing
            own = (1 - eps) * self._weights_of(block.label)
            losses = np.where(own == 0, 0.0, own * ((top - label_logit) + log_z))
            if eps:
                all_weights = sum(piece.weight for piece in pieces)
                losses = losses + eps / n_classes * (linear + (all_weights * log_z if all_weights else 0.0))
            losses = block.sample_weight * np.where(np.isnan(log_z), np.nan, losses)
            return np.where(block.label < 0, 0.0, losses)

    def _weights_of(self, label: np.ndarray) -> np.ndarray:
        """The class weight of each row's label; 0 where there is none."""
        if self._weight is None:
            return (label >= 0).astype(np.float64)
        return np.where(label < 0, 0.0, self._weight.astype(np.float64)[label])

    def _close(self, block: _Block, losses: np.ndarray) -> None:
        """Add the losses of rows whose classes have all come."""
        total, denominator = _ExactSum(), _ExactSum()
        total.add(losses)
        with np.errstate(all="ignore"):
            denominator.add(self._weights_of(block.label) * block.sample_weight)
        self._finish(block.first, block.stop, block.is_numbered, losses, total, denominator)

    def _finish(
        self,
        first: int,
        stop: int,
        is_numbered: bool,
        losses: np.ndarray | None,
        total: _ExactSum,
        denominator: _ExactSum,
    ) -> None:
        """Add what is known of rows whose classes have all come."""
        if self.keep_rows and losses is not None:
            losses[np.isnan(losses)] = np.nan  # of one sign, whatever was added in which order
            self._rows.append((first, losses))
        self._finished.add(first, stop)
        if is_numbered:
            self._numbered.add(first, stop)
        self._next_row = max(self._next_row, stop)
        self._sum.merge(total)
        self._denominator.merge(denominator)


class _ExactSum:
    """A sum of float64 without rounding, so that it does not depend on the order, nor on what is added together."""

    UNIT = 1074 + 52  # in bits: all numbers, with their 53 digits, are multiples of 2^-UNIT

    def __init__(self) -> None:
        self.total = 0  # in units
        self.others: set[float] = set()  # infinities; NaN is both of them

    def add(self, x: np.ndarray) -> None:
        for start in range(0, x.size, 1 << 16):
            part = x[start : start + (1 << 16)]
            finite = np.isfinite(part)
            if not finite.all():
                rest = part[~finite]
                self.others.update(sign for sign in (-math.inf, math.inf) if (np.isnan(rest) | (rest == sign)).any())
                part = part[finite]
            if part.size:
                self._add_finite(part)

    def _add_finite(self, x: np.ndarray) -> None:
        """Sum whole numbers of 53 bits by their exponents, in halves whose sums float64 holds."""
        digits, exponents = np.frexp(x)
        whole = np.ldexp(digits, 53).astype(np.int64)
        lowest = int(exponents.min())
        places = exponents - lowest
        high, low = np.bincount(places, whole >> 26), np.bincount(places, whole & ((1 << 26) - 1))
        for place in np.flatnonzero((high != 0) | (low != 0)).tolist():
            part = (int(high[place]) << 26) + int(low[place])
            self.total += part << (lowest + place - 53 + self.UNIT)

    def merge(self, more: _ExactSum) -> None:
        self.total += more.total
        self.others |= more.others

    def value(self) -> float:
        return self._over(1 << self.UNIT)

    def over(self, denominator: _ExactSum) -> float:
        if not denominator.total or denominator.others:
            return math.nan
        return self._over(denominator.total)

    def _over(self, units: int) -> float:
        if self.others:
            limit = self.others.copy()
            return math.nan if len(limit) > 1 else limit.pop() * (1 if units > 0 else -1)
        try:
            return self.total / units  # of integers: rounded once
        except OverflowError:
            return math.inf if (self.total > 0) == (units > 0) else -math.inf


def _exp_of_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(a - b), with what the difference rounds away (Knuth's two-sum)."""
    difference = a - b
    part = difference - a
    rest = (a - (difference - part)) - (b + part)
    corrected: np.ndarray = np.exp(difference) * (1 + np.where(np.isfinite(rest), rest, 0.0))
    return corrected


def _on_device(logits: Array) -> Arrays:
    """Return logits, as they are computed on, where they are; on the host where only the reference computes."""
    given = arrays_of(logits, "logits")
    x = given.view_first()
    return arrays_of(x if given.engine.HAS_KERNELS else given.engine.to_numpy(x), "logits")


def _on_host(x: Array, name: str) -> np.ndarray:
    """What there is one of for each row, or class, as an array of NumPy."""
    given = arrays_of(x, name)
    return widen(given.engine.to_numpy(given.view_first()))  # type: ignore[no-any-return]


def _class_weight(weight: Array, n_classes: int | None) -> np.ndarray:
    """A checked copy of the class weights."""
    w = np.array(_on_host(weight, "weight"))
    if dtype_name(w.dtype) in check.INTEGERS:
        w = w.astype(np.float64)
    return check.class_weight(arrays_of(w, "weight").engine, w, w.size if n_classes is None else n_classes, True)  # type: ignore[no-any-return]


def _row_weight(sample_weight: Any, rows: tuple[int, ...]) -> np.ndarray:
    """The checked sample weights, one a row."""
    if sample_weight is None:
        return np.broadcast_to(1.0, rows)
    s = np.asarray(sample_weight) if isinstance(sample_weight, Real) else _on_host(sample_weight, "sample_weight")
    s = check.of_dtype(s, "sample_weight", *check.NUMBERS)
    check.values(arrays_of(s, "sample_weight").engine, s, "sample_weight", *check.FINITE)
    return check.broadcast(s, "sample_weight", rows, "the rows")  # type: ignore[no-any-return]


def _labels(
    target: Any, shape: tuple[int, ...], n_classes: int, ignore_index: int, is_removed: np.ndarray
) -> np.ndarray:
    """The checked labels, in int64; -1 where a row is ignored or removed."""
    y = np.asarray(target) if isinstance(target, Real) else _on_host(target, "target")
    kind, rows = dtype_name(y.dtype), shape[:-1]
    is_float = kind in check.FLOATS
    if not (is_float or kind in (*check.INTEGERS, "int4", "uint4")) or (is_float and y.shape == shape):
        raise TypeError(f"target has dtype {kind} and shape {y.shape}: expected class indices of shape {rows}")
    if y.shape != rows:
        raise ValueError(f"target has shape {y.shape}: expected {rows}, that of logits without the classes")
    if is_float or kind in ("int4", "uint4"):
        y = in_float64(y)
    with np.errstate(all="ignore"):
        counted = ~is_label(y, ignore_index) & ~is_removed
        bad = counted & ~((y >= 0) & (y < n_classes))
        if is_float:
            bad |= counted & (np.floor(y) != y)
    if bad.any():
        place = int(bad.argmax())
        if is_float:
            raise _no_label(y, place, n_classes, ignore_index)
        raise check.label_error(y, place, n_classes, ignore_index)
    labels = np.full(rows, -1)
    with np.errstate(all="ignore"):
        np.copyto(labels, y, "unsafe", counted)
    return labels


def _no_label(y: np.ndarray, flat: int, n_classes: int, ignore_index: int) -> LabelError:
    index = ", ".join(str(int(i)) for i in np.unravel_index(flat, y.shape))
    return LabelError(
        f"target{f'[{index}]' if index else ''} = {y.ravel()[flat]:g} is no label: expected a whole number in "
        f"0..{n_classes - 1}, or ignore_index={ignore_index}"
    )


def _is_same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _came_twice(classes: tuple[int, int], rows: tuple[int, int]) -> ValueError:
    which = "all classes" if classes[1] == sys.maxsize else f"classes {classes[0]}..{classes[1] - 1}"
    return ValueError(f"{which} of rows {rows[0]}..{rows[1] - 1} came twice: pass row_offset to tell batches apart")


def _beside(arrays: Arrays, x: Array, a: np.ndarray | None) -> Array:
    """Return an array of the host where `x` is."""
    return None if a is None else arrays.engine.from_numpy(a, x)


def _of_rows(arrays: Arrays, x: Array) -> np.ndarray:
    return np.ravel(in_float64(arrays.engine.to_numpy(x)))


def _in_float64(arrays: Arrays, x: Array) -> Array:
    return arrays.engine.from_numpy(in_float64(arrays.engine.to_numpy(x)), x)


def _total(weight: np.ndarray | None, width: int) -> float:
    if weight is None:
        return float(width)
    with np.errstate(all="ignore"):  # the sum of large weights may be infinite
        return float(np.sum(weight, dtype=np.float64))
