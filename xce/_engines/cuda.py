"""Losses on a GPU: selects the kernel of a call and fills its job, the struct that is its only argument.

Nothing here needs a GPU: a `Device` has the memory and launches the kernels. That of `xce._engines.cupy` is CuPy;
the tests have one that runs the same kernels on the CPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import xce
from xce._call import Call, ElementCall, LogitStats
from xce._engines.device import Device, Module
from xce._engines.numbers import (
    FLOAT32,
    FLOAT32_ABOVE,
    FLOAT32_BELOW,
    FLOAT64,
    common_dtype,
    distinct,
    has_options_beyond,
    in_buffers,
    in_wider,
    is_beyond,
    is_plain,
    is_steep,
    number_kind,
    unbounded,
)
from xce._engines.plans import planned, signature
from xce._options import NUMBERS


@cache
def text(*names: str) -> str:
    """The text of kernels, without the lines that include one file in another: NVRTC gets it in one piece."""
    # beside the package or, where Python found the bare sources of a checkout, where that is installed
    places = (files("xce"), *map(Path, xce.__path__))
    root = next(place / "_cuda" for place in places if (place / "_cuda").is_dir())
    parts = []
    for name in names:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        kept = ("" if line.startswith('#include "') else line for line in lines)
        parts.append(f'#line 1 "{name}"\n' + "\n".join(kept))
    return "\n".join(parts) + "\n"


@cache
def names(macro: str, file: str = "formulas.h") -> tuple[str, ...]:
    """The names in a list of a header, where they are numbered in this order."""
    found = re.search(rf"#define {macro}\((\w+)\)((?:.*\\\n)*.*)", text(file))
    assert found
    return tuple(re.findall(rf"{found[1]}\((\w+)\)", found[2]))


AXES = 8  # of arrays, after neighbours were joined; XCE_AXES of job.h
_WHAT = {"loss": 0, "softmax": 1, "log_softmax": 2, "logsumexp": 3, "stats": 4, "state": 5, "nll": 6}

_I8, _F8 = np.int64, np.float64
OPERAND = np.dtype([("data", _I8), ("classes", _I8), ("rows", _I8, AXES)])


def _fields(names: str, dtype: Any) -> list[tuple[str, Any]]:
    return [(name, dtype) for name in names.split()]


_SHAPE = [("shape", _I8, AXES)]
ARRAY = np.dtype([("data", _I8), ("kind", _I8), ("adjacent", _I8), ("strides", _I8, AXES)])
ROW_JOB = np.dtype(
    _fields(" ".join(names("XCE_ROW_OPERANDS", "options.h")), OPERAND)
    + _fields("weight denominator n_rows n_classes n_places axes", _I8)
    + _SHAPE
    + _fields("what phi label_kind index_kind ignore_index dense teacher q_is_scalar cached", _I8)
    + [("options", _fields(" ".join(NUMBERS), _F8))]
)
SUM_JOB = np.dtype(
    _fields("label sample left value", OPERAND)
    + _fields("weight partials result sizes loss denominator n_partials n_rows n_classes axes", _I8)
    + _SHAPE
    + _fields("label_kind ignore_index", _I8)
    + _fields("factor", _F8)
)
ELEMENT_JOB = np.dtype(
    _fields("x y pos_weight weight sample value grad hess", ARRAY)
    + _fields("denominator partials", _I8)
    + _fields("factor", _F8)
    + _fields("n axes", _I8)
    + _SHAPE
    + [("with", _F8, 5)]
)
ARRAY_JOB = np.dtype(
    _fields("x out weight sample", ARRAY)
    + _fields("n axes", _I8)
    + _SHAPE
    + _fields("classes lanes what n_classes ignore_index", _I8)
    + _fields("low high", _F8)
)
_IS_LABEL, _IS_WITHIN, _IS_BEYOND = range(3)  # what a scan asks


class Regime(NamedTuple):
    """How many threads share a row, and over how many blocks."""

    group: int
    cluster: int
    threads: int  # of a block


# Bytes of a row up to which a regime serves: sixteen chunks of 16 bytes a thread. On an H100 that was the fastest of 22
# regimes for 1024, 4096, 16384 classes of bfloat16 and 1024 of float32 (`asv_benchmarks/gpu.py --regimes`). With fewer
# chunks, what a row costs once, some 300 instructions of a thread, weighs more; with more, too few rows are under way.
# Short rows are bound by instructions, not by memory: two thirds of the issue slots at 1024 classes of bfloat16, with
# 80 registers a thread.
_REGIMES = (
    (1024, Regime(4, 1, 128)),
    (2048, Regime(8, 1, 128)),
    (4096, Regime(16, 1, 128)),
    (8192, Regime(32, 1, 128)),
    (16384, Regime(64, 1, 64)),
    (32768, Regime(128, 1, 128)),
    (65536, Regime(256, 1, 256)),
)
_CLUSTERS = ((131072, Regime(256, 2, 256)), (262144, Regime(256, 4, 256)), (math.inf, Regime(256, 8, 256)))
_STRIDED = Regime(1, 1, 128)

SPARSE, DENSE, FULL = range(3)  # levels of row.h


def source(module: Module) -> str:
    """The text of a module with its definitions.

    They stand in the text and are no options of the compiler: CuPy compiles an empty file for each new set of options,
    in every process, even if the module itself is in its cache.
    """
    definitions = (("XCE_CUDA", "1"), (f"XCE_STORAGE_{module.storage}", "1"), *module.definitions)
    return "".join(f"#define {name} {value}\n" for name, value in definitions) + text(*module.files)


def phis() -> tuple[str, ...]:
    """The functions of a log-probability, and then those of two."""
    return names("XCE_SOFTMAX_LOSSES") + names("XCE_DIVERGENCES")


COMMON = ("options.h", "cuda/threads.h", "primitives.h", "formulas.h", "cuda/job.h", "cuda/places.h")
ROWS = (*COMMON, "cuda/team.h", "cuda/row.h", "cuda/chunks.h", "cuda/entries.h", "cuda/rows.cu")
SUMS, ELEMENTS = (*COMMON, "cuda/sums.cu"), (*COMMON, "cuda/sums.cu", "cuda/elements.cu")
ARRAYS = Module("float64", (*ELEMENTS, "cuda/arrays.cu"), (("XCE_ARRAYS", "1"),))  # whatever the logits are


def choose(device: Device, row_bytes: int, adjacent: bool) -> Regime:
    """The regime for rows of a size."""
    if not adjacent:
        return _STRIDED
    for limit, regime in _REGIMES:
        if row_bytes <= limit:
            return regime
    if not device.has_clusters:
        return _REGIMES[-1][1]
    return next(regime for limit, regime in _CLUSTERS if row_bytes <= limit)


class Rows:
    """The rows of arrays: their shape, after joining neighbouring axes that all arrays walk in one stride."""

    def __init__(self, shape: tuple[int, ...], axis: int, arrays: dict[str, Any]) -> None:
        full = {name: a for name, a in arrays.items() if a is not None}
        self.strides: dict[str, list[int]] = {}
        self.classes: dict[str, int] = {}
        rows = shape[:axis] + shape[axis + 1 :]
        for name, a in full.items():
            strides = list(a.strides)
            self.classes[name] = strides.pop(axis) if a.ndim > len(rows) else 0
            self.strides[name] = strides
        self.shape: list[int] = []
        joined: dict[str, list[int]] = {name: [] for name in full}
        for k, n in enumerate(rows):
            if n == 1:
                continue
            if self.shape and all(joined[name][-1] == self.strides[name][k] * n for name in full):
                self.shape[-1] *= n
                for name in full:
                    joined[name][-1] = self.strides[name][k]
                continue
            self.shape.append(n)
            for name in full:
                joined[name].append(self.strides[name][k])
        self.strides = joined
        if not self.shape:
            self.shape = [1]
            self.strides = {name: [0] for name in full}
        if len(self.shape) > AXES:
            raise ValueError(f"arrays of shape {shape} lie in memory in more than {AXES} pieces that do not join")

    def enter(self, device: Device, job: Any, arrays: dict[str, Any]) -> None:
        """Write the arrays into a job."""
        for name, a in arrays.items():
            if a is not None:
                if name in ("weight", "denominator"):
                    job[name] = device.pointer(a)
                    continue
                job[name]["data"] = device.pointer(a)
                job[name]["classes"] = self.classes[name]
                job[name]["rows"][: len(self.shape)] = self.strides[name]
        job["n_rows"], job["axes"] = math.prod(self.shape), len(self.shape)
        job["shape"][: len(self.shape)] = self.shape


def keeps_rows(module: Module) -> bool:
    """Whether a kernel keeps what it reads of rows in shared memory."""
    values = dict(module.definitions)
    return values.get("XCE_GROUP", "1") != "1" and values["XCE_LEVEL"] != str(FULL)


def storage_name(x: Any) -> str:
    """The storage type of an array of floats."""
    return "bfloat16" if x.dtype.kind not in "fd" else str(x.dtype)


def run(call: Any, device: Device) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return _run(call, device) if call.logits.ndim <= AXES else _in_one_piece(call, device)


def _run(call: Any, device: Device) -> Any:
    if call.logits.dtype != FLOAT64 and is_beyond_float32(call, device):
        return _in_wider(call, FLOAT64, device)
    arrays, decisions = _OF_ELEMENTS if call.op == "element" else _OF_ROWS
    given = list(arrays(call))
    key = *map(signature, given), decisions(call), _REGIMES, _CLUSTERS
    return planned(device, key, given, lambda device: _RUN[call.op](call, device))


# the arrays of a call, and all else that decides on what is computed
_BUFFERS, _RETURNED = ("grad_out", "hess_out"), ("reduction", "return_grad", "return_hess")
_OF_ROWS = (
    attrgetter(
        "logits", "labels", "probabilities", "teacher", "teacher_indices", "weight", "sample_weight", "where", *_BUFFERS
    ),
    attrgetter("op", "axis", "loss", "numbers", "ignore_index", *_RETURNED),
)
_OF_ELEMENTS = (
    attrgetter("logits", "target", "weight", "pos_weight", "sample_weight", *_BUFFERS),
    attrgetter("op", "axis", "formula", "params", *_RETURNED),
)


def _in_one_piece(call: Any, device: Device) -> Any:
    """Compute a call on copies, whose axes join, and fill the caller's buffers."""
    copies = {name: a.copy() for name, a in zip(call._fields, call, strict=True) if hasattr(a, "strides")}
    return in_buffers(call, _run(call._replace(**copies | {"grad_out": None, "hess_out": None}), device))


def is_beyond_float32(call: Any, device: Device) -> bool:
    """Whether an option is, or a weight of float64; weights are read only where the caller lets the data be checked."""
    if call.op == "element":  # whose kernel multiplies its weights in float64
        return is_steep(call) or any(map(is_beyond, call.params)) or _has_beyond(call, device, *unbounded(call))
    if is_plain(call):
        return False
    return has_options_beyond(call) or _has_beyond(call, device, call.weight, call.sample_weight)


def _has_beyond(call: Any, device: Device, *weights: Any) -> bool:
    return call.validate and any(
        _scan(device, _IS_BEYOND, distinct(w), low=FLOAT32_ABOVE, high=FLOAT32_BELOW) >= 0
        for w in weights
        if w is not None and w.dtype == FLOAT64
    )


def _in_wider(call: Any, dtype: np.dtype[Any], device: Device) -> Any:
    def narrow(x: Any, logits: Any, out: Any) -> Any:
        return None if x is None else convert(device, x, _buffer(device, logits, out))

    return in_wider(call, dtype, lambda wide: _run(wide, device), lambda x, to: cast(device, x, to), narrow)


def _loss(call: Call, device: Device) -> tuple[Any, Any, Any]:
    if call.teacher is not None:
        common = common_dtype(call.logits.dtype, call.teacher.dtype)
        if common != call.logits.dtype:
            return _in_wider(call, common, device)  # type: ignore[no-any-return]
    value = device.empty(_rows_of(call), _scalar(call.logits))
    denominator = denominator_of_mean(device, call) if call.reduction == "mean" else None
    grad, hess = row_losses(device, call, value, denominator)
    return value if call.reduction == "none" else sum_of_losses(device, call, value, denominator), grad, hess


def denominator_of_mean(device: Device, call: Call) -> Any:
    """The denominator of "mean", float64, on the device; NaN if it is a sum of weights that cancel."""
    weight, sample = _weights(device, call, _scalar(call.logits))
    if call.labels is None:  # class weights do not count for probabilities
        weight = None
    left = None if call.where is None else classes_left(call.where, call.axis, device)
    result = device.empty((1,), np.float64)
    arrays = {"label": call.labels, "sample": sample, "left": left}
    _sum(device, call, arrays, weight, result, None, None, _rows_of(call))
    return result


def sum_of_losses(device: Device, call: Call, value: Any, denominator: Any) -> Any:
    """The sum of the rows' losses over the denominator, if there is one."""
    total, loss = device.empty((1,), np.float64), device.empty((), value.dtype)
    _sum(device, call, {"value": value}, None, total, loss, denominator, value.shape)
    return loss


def row_losses(device: Device, call: Call, value: Any, denominator: Any) -> tuple[Any, Any]:
    """Write the losses of the rows into `value`; their gradients over the denominator, and Hessian diagonals."""
    logits = call.logits
    scalar = _scalar(logits)
    q = call.probabilities if call.teacher is None else call.teacher
    grad = _buffer(device, logits, call.grad_out) if call.return_grad else None
    hess = _buffer(device, logits, call.hess_out) if call.return_hess else None
    if (
        call.teacher_indices is not None
        and call.grad_out is not None
        and device.pointer(grad) == device.pointer(logits)
    ):
        # the sparse teacher's classes are read again after the rows are written
        logits = convert(device, logits, device.empty(logits.shape, logits.dtype))
    if q is not None and q.dtype != logits.dtype:
        q = cast(device, q, scalar if call.teacher is None else logits.dtype)
    weight, sample = _weights(device, call, scalar)
    if logits.size:
        arrays = {
            "x": logits,
            "q": q,
            "where": call.where,
            "grad": grad,
            "hess": hess,
            "label": call.labels,
            "indices": call.teacher_indices,
            "sample": sample,
            "value": value,
            "weight": weight,
            "denominator": denominator,
        }
        _rows(device, call, "nll" if call.op == "nll" else "loss", arrays)
    return grad, hess


def _rows_of(call: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = call.logits.shape
    return shape[: call.axis] + shape[call.axis + 1 :]


def _rows(device: Device, call: Call, what: str, arrays: dict[str, Any]) -> None:
    """Launch the kernel of the rows."""
    x, axis = arrays["x"], call.axis
    places = Rows(x.shape, axis, {n: a for n, a in arrays.items() if n not in ("weight", "denominator")})
    job = np.zeros((), ROW_JOB)
    places.enter(device, job, arrays)
    job["what"], job["n_classes"], job["options"] = _WHAT[what], x.shape[axis], tuple(call.numbers)
    job["ignore_index"], job["teacher"] = call.ignore_index, call.teacher is not None
    job["dense"] = call.probabilities is not None or call.numbers.label_smoothing != 0
    if call.teacher is not None:
        job["dense"] = call.teacher_indices is None
    job["phi"] = phis().index(call.loss) if call.loss else 0
    for name in ("label", "indices"):
        if arrays.get(name) is not None:
            job["index_kind" if name == "indices" else "label_kind"] = number_kind(arrays[name].dtype)
    if arrays.get("indices") is not None:
        job["n_places"] = arrays["indices"].shape[axis]
    q = arrays.get("q")
    job["q_is_scalar"] = q is not None and q.dtype != x.dtype

    grad, hess, n_classes = arrays.get("grad"), arrays.get("hess"), x.shape[axis]
    adjacent = n_classes == 1 or all(a is None or a.strides[axis] == a.dtype.itemsize for a in (x, grad, hess))
    regime = choose(device, n_classes * x.dtype.itemsize, adjacent)
    groups, level = regime.threads // regime.group, _level(job, call)
    is_chunked, vec = regime.group > 1 and level < FULL, 16 // x.dtype.itemsize
    chunks = -(-(n_classes + vec - 1) // vec)
    if is_chunked and chunks >= 2**31:
        raise ValueError(
            f"rows of {n_classes} classes are too long for a GPU: expected {2**31 * vec - 2 * vec} at most"
        )
    of_thread = -(-chunks // (regime.group * regime.cluster))
    cached = min(of_thread, device.shared_bytes // (16 * regime.threads)) if is_chunked else 0
    job["cached"] = cached
    output = None if grad is None or grad.dtype == x.dtype else storage_name(grad)
    module = rows_module(storage_name(x), regime, level, _WHAT[what], int(job["phi"]), output)
    units = -(-int(job["n_rows"]) // groups)
    grid = min(units, device.processors * 2048 // regime.threads) * regime.cluster
    device.launch(device.load(module, "rows"), grid, (regime.group, groups), 16 * regime.threads * cached, job)


def _level(job: Any, call: Call) -> int:
    """How general a row is."""
    is_dense = bool(job["dense"]) or int(job["what"]) == _WHAT["state"]
    is_transformed = call.numbers.softcap or call.numbers.temperature != 1 or call.where is not None
    if is_transformed or is_steep(call) or job["teacher"] or (is_dense and job["phi"]):
        return FULL
    return DENSE if is_dense else SPARSE


def rows_module(
    storage: str, regime: Regime, level: int, what: int = 0, phi: int = 0, output: str | None = None
) -> Module:
    """Return the module of a kernel of rows; `output` is the type of gradients, if not that of the logits."""
    values = {
        "GROUP": regime.group,
        "CLUSTER": regime.cluster,
        "THREADS": regime.threads,
        "LEVEL": level,
        "WHAT": what,
        "PHI": phi,
    }
    definitions = tuple((f"XCE_{name}", str(value)) for name, value in values.items())
    return Module(storage, ROWS, definitions if output is None else (*definitions, (f"XCE_OUTPUT_{output}", "1")))


def _sum(
    device: Device,
    call: Call,
    arrays: dict[str, Any],
    weight: Any,
    result: Any,
    loss: Any,
    denominator: Any,
    rows: tuple[int, ...],
) -> None:
    """Launch the sum of the rows' values, or of their shares of the mean's denominator."""
    label, job = arrays.get("label"), np.zeros((), SUM_JOB)
    Rows((*rows, 1), len(rows), arrays).enter(device, job, arrays)
    job["weight"] = 0 if weight is None else device.pointer(weight)
    job["n_rows"], job["n_classes"] = math.prod(rows), call.logits.shape[call.axis]
    job["label_kind"], job["ignore_index"] = 0 if label is None else number_kind(label.dtype), call.ignore_index
    partials = device.empty((device.sum_blocks,), np.float64)
    sizes = device.empty((device.sum_blocks,), np.float64) if loss is None else None
    job["partials"], job["sizes"] = device.pointer(partials), 0 if sizes is None else device.pointer(sizes)
    device.launch(device.load(_sums(call.logits), "partial_sums"), device.sum_blocks, (device.sum_threads, 1), 0, job)
    _final_sum(device, call.logits, partials, result, loss, denominator, 1.0, sizes)


def _final_sum(
    device: Device,
    logits: Any,
    partials: Any,
    result: Any,
    loss: Any,
    denominator: Any,
    factor: float,
    sizes: Any = None,
) -> None:
    job = np.zeros((), SUM_JOB)
    pointers = {"partials": partials, "sizes": sizes, "result": result, "loss": loss, "denominator": denominator}
    for name, a in pointers.items():
        job[name] = 0 if a is None else device.pointer(a)
    job["n_partials"], job["factor"] = partials.size, factor
    device.launch(device.load(_sums(logits), "final_sum"), 1, (device.sum_threads, 1), 0, job)


def _sums(logits: Any) -> Module:
    return Module("float64" if logits.dtype == np.float64 else "float32", SUMS, (("XCE_SUMS", "1"),))


# Single elements


def run_elements(call: ElementCall, device: Device) -> tuple[Any, Any, Any]:
    """Compute an `ElementCall`."""
    x, axis = call.logits, call.axis
    grad = _buffer(device, x, call.grad_out) if call.return_grad else None
    hess = _buffer(device, x, call.hess_out) if call.return_hess else None
    # the loss is the sum times `factor`, over the sum of the sample weights where these count
    denominator, factor = None, 1.0 if axis is None else 1.0 / x.shape[axis]
    if call.reduction in ("mean", "batchmean"):
        per_share = math.prod(x.shape[1:]) if call.reduction == "batchmean" else 1
        if call.sample_weight is not None:
            denominator, repetitions = _sum_of_weights(device, call.sample_weight)
            factor = float(per_share) / repetitions
        elif call.reduction == "batchmean":
            factor = 1.0 / len(x) if x.ndim and len(x) else math.nan if x.ndim else 1.0
        else:
            factor = 1.0 / x.size if x.size else math.nan
    value = device.empty(x.shape, _scalar(x)) if call.reduction == "none" else None
    arrays = {
        "x": x,
        "y": call.target,
        "pos_weight": call.pos_weight,
        "weight": call.weight,
        "sample": call.sample_weight,
        "value": value,
        "grad": grad,
        "hess": hess,
    }
    partials = _elements(device, arrays, call, denominator, factor)
    if value is not None:
        return value if axis is None else _mean(device, value, axis, value.dtype), grad, hess
    loss, total = device.empty((), _scalar(x)), device.empty((1,), np.float64)
    _final_sum(device, x, partials, total, loss, denominator, factor)
    return loss, grad, hess


def _elements(device: Device, arrays: dict[str, Any], call: ElementCall, denominator: Any, factor: float) -> Any:
    """Launch the kernel of the elements; the sums of its blocks."""
    x = call.logits
    job = np.zeros((), ELEMENT_JOB)
    _enter_numbers(device, job, Rows((*x.shape, 1), x.ndim, arrays), arrays, x.dtype)
    job["factor"], job["with"][: len(call.params)] = factor, call.params
    job["denominator"] = 0 if denominator is None else device.pointer(denominator)
    blocks = _blocks(device, -(-x.size // (16 // x.dtype.itemsize)))
    partials = device.empty((blocks,), np.float64)
    job["partials"] = device.pointer(partials)
    module = Module(storage_name(x), ELEMENTS, (("XCE_FORMULA", call.formula),))
    device.launch(device.load(module, "elements"), blocks, (device.sum_threads, 1), 0, job)
    return partials


def _enter_numbers(device: Device, job: Any, rows: Rows, arrays: dict[str, Any], storage: Any) -> None:
    """Write arrays of numbers into a job; `storage` is the type that its module is compiled for."""
    for name, a in arrays.items():
        if a is not None:
            job[name]["data"], job[name]["adjacent"] = device.pointer(a), a.flags.c_contiguous
            # a dtype of float64 equals None, too
            is_own = storage is not None and a.dtype == storage
            job[name]["kind"] = 0 if is_own else number_kind(a.dtype)
            job[name]["strides"][: len(rows.shape)] = rows.strides[name]
    job["n"], job["axes"] = math.prod(rows.shape), len(rows.shape)
    job["shape"][: len(rows.shape)] = rows.shape


def _blocks(device: Device, n_threads: int) -> int:
    """As many blocks as have work, and as are at work at a time."""
    blocks = min(-(-n_threads // device.sum_threads), device.processors * 2048 // device.sum_threads)
    return max(blocks, 1)  # a grid of none cannot be launched


def _scalar(x: Any) -> np.dtype[Any]:
    return FLOAT64 if x.dtype == FLOAT64 else FLOAT32


def _weights(device: Device, call: Call, scalar: np.dtype[Any]) -> tuple[Any, Any]:
    """Class weights and sample weights, in the type of the computation."""
    weight = None if call.weight is None else _side_by_side(device, call.weight, scalar)
    return weight, None if call.sample_weight is None else cast(device, call.sample_weight, scalar)


def _buffer(device: Device, x: Any, buffer: Any) -> Any:
    return device.empty(x.shape, x.dtype) if buffer is None else buffer


# Arrays: what CuPy could do as well, but does in more passes, or in bfloat16 by promises only


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...], device: Device) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, up to two arrays of the same shape, is 0 for are left out.
    """
    return _scan(device, _IS_LABEL, target, weights, n_classes=n_classes, ignore_index=ignore_index)


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...], device: Device) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, up to two arrays of the same shape, is 0 for are left out.
    """
    largest = float(np.finfo(np.float64).max)
    return _scan(
        device,
        _IS_WITHIN,
        values,
        weights,
        low=max(low, -largest) if high is None else low,
        high=largest if high is None else high,
    )


def classes_left(where: Any, axis: int, device: Device) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    return _mean(device, where.copy() if where.ndim > AXES else where, axis, FLOAT32)


def _scan(device: Device, what: int, x: Any, weights: tuple[Any, ...] = (), **allowed: float) -> int:
    """Wait for the device, and return the flat index of the first bad entry, or -1."""
    if not x.size:
        return -1
    if x.ndim > AXES:
        x, weights = x.reshape(-1), tuple(w.reshape(-1) for w in weights)
    arrays = dict(zip(("x", "weight", "sample"), (x, *weights), strict=False))

    def places(device: Device) -> Any:
        job, blocks = np.zeros((), ARRAY_JOB), _blocks(device, x.size)
        _enter_numbers(device, job, Rows((*x.shape, 1), x.ndim, arrays), arrays, FLOAT64)
        job["what"] = what
        for name, value in allowed.items():
            job[name] = value
        first = device.empty((blocks,), np.int64)
        job["out"]["data"] = device.pointer(first)
        device.launch(device.load(ARRAYS, "scan"), blocks, (device.sum_threads, 1), 0, job)
        return first

    key = what, *map(signature, arrays.values()), *allowed.items()
    first = int(device.to_numpy(planned(device, key, list(arrays.values()), places)).min())
    return first if first < x.size else -1


def convert(device: Device, x: Any, out: Any) -> Any:
    """Write the numbers of `x` into the array of floats `out`, and return that."""
    if x.size:
        job = _array_job(device, x, out)
        device.launch(device.load(ARRAYS, "convert"), _blocks(device, x.size), (device.sum_threads, 1), 0, job)
    return out


def cast(device: Device, x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in a floating type."""
    return x if x.dtype == dtype else convert(device, x, device.empty(x.shape, dtype))


def _side_by_side(device: Device, x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in a floating type, without gaps."""
    if x.dtype == dtype and x.flags.c_contiguous:
        return x
    return convert(device, x, device.empty(x.shape, dtype))


def _sum_of_weights(device: Device, x: Any) -> tuple[Any, int]:
    """The sum of an array's distinct entries, on the device, and how often each is repeated."""
    once = distinct(x)
    partials = device.empty((device.sum_blocks,), np.float64)
    job = _array_job(device, once)
    job["out"]["data"] = device.pointer(partials)
    device.launch(device.load(ARRAYS, "sum_numbers"), device.sum_blocks, (device.sum_threads, 1), 0, job)
    total = device.empty((1,), np.float64)
    _final_sum(device, x, partials, total, None, None, 1.0)
    return total, x.size // max(once.size, 1) or 1


def _mean(device: Device, x: Any, axis: int, dtype: np.dtype[Any]) -> Any:
    """The means over an axis, in a floating type."""
    out = device.empty(x.shape[:axis] + x.shape[axis + 1 :], dtype)
    if out.size:
        rows = Rows(x.shape, axis, {"x": x, "out": out})
        lanes = 32 if axis == x.ndim - 1 else 1
        job = np.zeros((), ARRAY_JOB)
        _enter_numbers(device, job, rows, {"x": x, "out": out}, FLOAT64)
        job["classes"], job["n_classes"], job["lanes"] = rows.classes["x"], x.shape[axis], lanes
        device.launch(
            device.load(ARRAYS, "mean_of_rows"), _blocks(device, out.size * lanes), (device.sum_threads, 1), 0, job
        )
    return out


def _array_job(device: Device, x: Any, out: Any = None) -> Any:
    """The argument of what visits all entries of `x`, and of `out` beside it."""
    job, arrays = np.zeros((), ARRAY_JOB), {"x": x, "out": out}
    _enter_numbers(device, job, Rows((*x.shape, 1), x.ndim, arrays), arrays, FLOAT64)
    return job


# What is not a loss


def _map(call: Call, device: Device) -> Any:
    out = _buffer(device, call.logits, call.grad_out)
    if out.size:
        _rows(device, call, call.op, {"x": call.logits, "where": call.where, "grad": out})
    return out


def _logsumexp(call: Call, device: Device) -> Any:
    lse = device.empty(_rows_of(call), _scalar(call.logits))
    if call.logits.size:
        _rows(device, call, "logsumexp", {"x": call.logits, "where": call.where, "value": lse})
    return lse


def _stats(call: Call, device: Device) -> LogitStats:
    rows = _rows_of(call)
    lse, target, entropy = (device.empty(rows, _scalar(call.logits)) for _ in range(3))
    top, rank = (device.empty(rows, np.int64) for _ in range(2))
    arrays = {
        "x": call.logits,
        "label": call.labels,
        "value": lse,
        "label_logit": target,
        "top": top,
        "rank": rank,
        "spread": entropy,
    }
    if call.logits.size:
        _rows(device, call, "stats", arrays)
    return LogitStats(lse, target, top, rank, entropy)


def _state(call: Call, device: Device) -> tuple[Any, Any, Any, Any]:
    """What a shard of classes contributes to its rows, see `xce.state`: max, rest, logit of the label, linear sum."""
    scalar = _scalar(call.logits)
    top, rest, label_logit, linear = (device.empty(_rows_of(call), scalar) for _ in range(4))
    arrays = {
        "x": call.logits,
        "label": call.labels,
        "value": top,
        "spread": rest,
        "label_logit": label_logit,
        "linear": linear,
        "weight": None if call.weight is None else _side_by_side(device, call.weight, scalar),
    }
    if call.logits.size:
        _rows(device, call, "state", arrays)
    return top, rest, label_logit, linear


_RUN: dict[str, Callable[[Any, Device], Any]] = {
    "nll": _loss,
    "distillation": _loss,
    "loss": _loss,
    "element": run_elements,
    "softmax": _map,
    "log_softmax": _map,
    "logsumexp": _logsumexp,
    "stats": _stats,
    "state": _state,
}


def modules() -> Iterable[tuple[Module, str]]:
    """Every kind of module with a kernel of it, for the tests that compile them."""
    regimes = [_STRIDED, *(regime for _, regime in (*_REGIMES, *_CLUSTERS))]
    for storage in ("float32", "float64", "float16", "bfloat16"):
        for regime in regimes:
            for level, phi in ((SPARSE, 0), (DENSE, 0), (FULL, len(phis()) - 1)):
                yield rows_module(storage, regime, level, _WHAT["loss"], phi), "rows"
        for phi in range(1, len(names("XCE_SOFTMAX_LOSSES"))):
            yield rows_module(storage, _REGIMES[-1][1], SPARSE, _WHAT["loss"], phi), "rows"
        for phi in range(1, len(phis()) - 1):
            yield rows_module(storage, _REGIMES[-1][1], FULL, _WHAT["loss"], phi), "rows"
        for what in _WHAT.values():
            level = DENSE if what == _WHAT["state"] else SPARSE
            yield rows_module(storage, _REGIMES[-1][1], level, what), "rows"
        for formula in names("XCE_ELEMENT_LOSSES"):
            yield Module(storage, ELEMENTS, (("XCE_FORMULA", formula),)), "elements"
    for output in ("float16", "bfloat16"):
        for level in (SPARSE, DENSE, FULL):
            yield rows_module("float32", _REGIMES[-1][1], level, output=output), "rows"
    for storage in ("float32", "float64"):
        yield Module(storage, SUMS, (("XCE_SUMS", "1"),)), "partial_sums"
    yield ARRAYS, "scan"
