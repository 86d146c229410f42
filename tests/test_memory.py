"""No byte outside the arrays is read or written: each lies against a page that must not be touched."""

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
