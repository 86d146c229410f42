"""No byte outside the arrays is touched: each lies against a forbidden page. And what memory a call takes besides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xce import _cpu

GUARDED = """
import ctypes, itertools, mmap, sys
sys.path.insert(0, {tests!r})
import numpy as np
import xce
from cases import TARGETS_OF_LOSSES, problem
from checks import DTYPES, dtype_of, same_bits

libc, page, alive = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def guarded(a, order, at_end):
    "A copy of `a` that ends where a forbidden page begins, or begins where one ends."
    size = -(-max(a.nbytes, 1) // page) * page
    room = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for guard in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    alive.append((room, start, size))
    offset = page + (size - a.nbytes if at_end else 0)
    result = np.ndarray(a.shape, a.dtype, np.frombuffer(room, np.uint8)[offset:], order=order)
    result[...] = a
    return result

def free():
    for _, start, size in alive:
        libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size + 2 * page), 3)
    alive.clear()

FEATURES = (
    {{"ignore": True}},
    {{"label_smoothing": 0.1, "weight": True, "sample_weight": True}},
    {{"where": True, "label_smoothing": 0.1, "temperature": 0.7, "softcap": 5.0, "z_loss": 0.01, "reduction": "none"}},
)
SHAPES = (((1, 3), -1), ((5, 10), -1), ((17, 70), -1), ((33, 129), -1), ((3, 257), -1), ((2, 1100), -1), ((10, 3), 0),
          ((70, 5), 0), ((1100, 3), 0), ((2, 5, 3), 1), ((2, 1030, 3), 1), ((9,), 0))
turn = itertools.count()
for dtype, (shape, axis), (case, mode) in itertools.product(DTYPES, SHAPES, TARGETS_OF_LOSSES):
  own = case.function is xce.cross_entropy
  for features in FEATURES if own else [FEATURES[next(turn) % 3]]:
    x, y, options = problem(features, mode, shape, axis, dtype_of(dtype), case=case)
    options |= case.params[next(turn) % len(case.params)]
    flags = dict(return_grad=True, return_hess=True)
    expected = case.function(x, y, **options, **flags)
    if mode == "index":
        y = np.asarray(y).astype("i2" if features is FEATURES[0] else "i8")
    for order, at_end in itertools.product("CF" if own else "CF"[next(turn) % 2], (True, False)):
        print(case.name, dtype, shape, axis, features, mode, order, "end" if at_end else "start", flush=True)
        place = lambda a: guarded(a, order, at_end) if isinstance(a, np.ndarray) else a
        arrays = {{k: place(v) for k, v in options.items()}}
        z, target, grad, hess = place(x), place(y), place(np.zeros_like(x)), place(np.zeros_like(x))
        value = case.function(z, target, **arrays)
        results = case.function(z, target, grad_out=grad, hess_out=hess, **arrays, **flags)
        same_bits(value, expected[0])
        for a, b in zip(results, expected):
            same_bits(a, b)
        case.function(z, target, return_hess=True, hess_out=hess, **arrays)
        case.function(z, target, return_grad=True, grad_out=z, **arrays)
        same_bits(z, expected[1])
        z[...] = x
        if own and features is FEATURES[0]:
            xce.softmax(z, axis=axis, out=grad)
            xce.log_softmax(z, axis=axis, out=hess)
            xce.logsumexp(z, axis=axis)
            if mode == "index":
                xce.logit_stats(z, target, axis=axis, ignore_index=arrays.get("ignore_index", -100))
        del results, arrays, z, target, grad, hess
        free()
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages as Linux does")
@pytest.mark.parametrize("level", _cpu.available_levels())
def test_nothing_outside_the_arrays_is_touched(level: str) -> None:
    pytest.importorskip("ml_dtypes")
    code = GUARDED.format(tests=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"XCE_CPU": level}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    last = result.stdout.splitlines()[-1:]
    assert (result.returncode, last) == (0, ["done"]), f"after {last}: {result.stderr}"


FRUGAL = """
import numpy as np
import xce

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def extra(function, *args, **options):
    "MiB that a call takes beyond its results."
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = memory("VmRSS")
    result = function(*args, **options)
    results = result if type(result) is tuple else [result]
    return memory("VmHWM") - before - sum(np.asarray(a).nbytes for a in results) / 2**20

loss, shape = xce.binary_cross_entropy_with_logits, (1 << 18, 16)
x, y = np.ones(shape, np.float32), np.ones(shape, np.float32)
for dtype in (np.float32, np.float64, np.float16):  # what is loaded once
    for w in (x, x.astype(np.float64)):
        loss(x.astype(dtype), y, sample_weight=w, weight=w[:1])
worst = {}
for kind in "? i1 u1 >i2 >i4 i8 >u8 f2 >f2 >f4 f8 >f8".split():
    a = np.ones(shape, kind)
    for name, b in {"C": a, "F": np.asfortranarray(a), "broadcast": np.broadcast_to(a[:, :1], shape)}.items():
        worst[kind, name, "target"] = extra(loss, x, b)
        for weight in ("weight", "pos_weight", "sample_weight"):
            worst[kind, name, weight] = extra(loss, x, y, **{weight: b})
        if "f" in kind:
            worst[kind, name, "logits"] = extra(loss, b, y, return_grad=True)
worst["parameter"] = extra(xce.sigmoid_focal_loss, x, y, gamma=1e-35, return_grad=True)
worst["weight"] = extra(loss, x, y, sample_weight=np.broadcast_to(1e-40, shape), return_hess=True)
worst["classes"] = extra(xce.multilabel_soft_margin_loss, x, y > 0, weight=np.arange(16), sample_weight=y[:, 0] > 0)
bad = {key: round(size, 2) for key, size in worst.items() if size > 1.5}
assert not bad, bad
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_nothing_is_converted_whole() -> None:
    """Losses of single elements read numbers of any type, byte order and layout where they lie."""
    result = subprocess.run([sys.executable, "-c", FRUGAL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


EXTRA = """
import sys
import numpy as np
import array_api_compat, ml_dtypes, xce

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def extra(call):
    "MiB beyond what there was, at the worst moment."
    call()
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before

n, c, rng = 1 << 17, 64, np.random.default_rng(0)
logits, kinds = rng.random((n, c), np.float32), ("f4", "f8", "f2", ml_dtypes.bfloat16, ">f4", ">f8", ">f2")
y, weights = rng.integers(c, size=n), rng.random(n)
some = rng.integers(c // 4, size=(n, 1)) * 4 + np.arange(3)
for own in kinds[int(sys.argv[1])::4]:
    x = logits.astype(own)
    grad, hess = (np.zeros(x.shape, x.dtype.newbyteorder("=")) for _ in range(2))
    both = dict(return_grad=True, return_hess=True, grad_out=grad, hess_out=hess)
    calls = {}
    for other in (*kinds, "F"):
        q = np.asfortranarray(logits, "f8") if other == "F" else logits.astype(other)
        calls[f"probabilities {other}"] = lambda q=q: xce.focal_loss(x, q, **both)
        calls[f"teacher {other}"] = lambda q=q: xce.distillation_loss(x, q, temperature=2.0, **both)
        calls[f"sparse teacher {other}"] = lambda q=q: xce.distillation_loss(x, q[:, :3], teacher_indices=some, **both)
    for kind in ("f4", ">i8", "f8", "i2"):
        calls[f"labels {kind}"] = lambda a=y.astype(kind): xce.cross_entropy(x, a, **both)
        calls[f"nll {kind}"] = lambda a=y.astype(kind): xce.nll_loss(x, a, **both)
    strided = np.repeat(y, 2)[::2]
    calls["strided labels"] = lambda: xce.cross_entropy(x, strided, **both)
    calls["a grid of labels"] = lambda: xce.cross_entropy(x.reshape(256, -1, c), y.reshape(-1, 256).T)
    for kind in ("f2", "f4", "f8", "?", "i4", ">f8"):
        s = weights.astype(kind)
        calls[f"sample weights {kind}"] = lambda s=s: xce.cross_entropy(x, y, sample_weight=s, **both)
    calls["one sample weight"] = lambda: xce.cross_entropy(x, y, sample_weight=np.broadcast_to(True, n), **both)
    calls["beyond float32"] = lambda: xce.cross_entropy(x, y, z_loss=1e-40, **both)
    calls["where"] = lambda: xce.cross_entropy(x, y, where=np.broadcast_to(True, x.shape), softcap=3.0, **both)
    calls["softmax"] = lambda: xce.softmax(x, out=grad)
    calls["log_softmax beyond float32"] = lambda: xce.log_softmax(x, out=grad, temperature=1e35)
    for name, call in calls.items():
        used = extra(call)
        if used > 1 + 2 / 16:
            print(own, name, f"{used:.1f} MiB")
"""


BLOCKS = """
import sys
import numpy as np
import array_api_compat, xce
from xce.metrics import brier_score

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def extra(call):
    "MiB beyond what there was, at the worst moment."
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before

n, rng = 1 << 21, np.random.default_rng(0)
v = rng.random(n, np.float32)
p, swapped, rows, y = v.reshape(-1, 2), v.astype(">f4"), v.reshape(1 << 14, 128), rng.integers(2, size=n // 2)
out, weights, one = np.empty_like(p), rng.random(n // 2), np.float32(1)
p = np.stack([v, one - v], 1)
labels = (v > 0.5).astype(int)
calls = {
    "a factor": lambda: xce.logsumexp(v, b=2.0),
    "a factor, all axes": lambda: xce.logsumexp(rows, axis=None, b=2.0),
    "factors of classes": lambda: xce.logsumexp(rows, axis=None, b=np.arange(128)),
    "factors of classes, columns": lambda: xce.logsumexp(np.asfortranarray(rows[:1000]), b=np.arange(128)),
    "other byte order, a tuple": lambda: xce.softmax(swapped.reshape(-1, 2), axis=(1,), out=out),
    "other byte order, all axes": lambda: xce.logsumexp(swapped.reshape(-1, 2), axis=None),
    "other byte order, factors": lambda: xce.logsumexp(swapped.reshape(-1, 2), axis=None, b=3),
    "Brier score": lambda: brier_score(v, 3),
}
for name, q in {"float32": p, "columns": np.asfortranarray(p), "other byte order": p.astype(">f4")}.items():
    calls |= {
        f"log loss, {name}": lambda q=q: xce.log_loss(labels, q),
        f"log loss of words, {name}": lambda q=q: xce.log_loss(labels.astype("U1")[: n // 8], q[: n // 8]),
        f"log loss of soft labels, {name}": lambda q=q: xce.log_loss(q, q),
        f"log loss with weights, {name}": lambda q=q: xce.log_loss(labels, q, sample_weight=v),
        f"log loss of one column, {name}": lambda q=q: xce.log_loss(labels, q[:, 1], sample_weight=labels),
        f"rows of a state, {name}": lambda q=q: xce.LossState().update(q, labels),
        f"rows of a state with weights, {name}": lambda q=q: xce.LossState().update(q, labels, sample_weight=v),
    }
for name, call in calls.items():
    call()
    if (used := extra(call)) > 1 + 2 / 16:
        print(name, f"{used:.1f} MiB")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
@pytest.mark.parametrize("part", range(4))
def test_a_call_takes_little_memory_besides_its_outputs(part: int) -> None:
    pytest.importorskip("ml_dtypes")
    result = subprocess.run(
        [sys.executable, "-c", EXTRA, str(part)], env=os.environ | {"XCE_NUM_THREADS": "2"}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_array_functions_take_blocks() -> None:
    """What is computed by array functions takes as little memory as what kernels compute."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCKS], env=os.environ | {"XCE_NUM_THREADS": "2"}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
