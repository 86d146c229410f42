"""The first calls on a GPU: one regime of the kernels in one process, since a kernel that fails may end the context.

python asv_benchmarks/gpu_smoke.py            each regime in a process of its own, a line for each call
python asv_benchmarks/gpu_smoke.py NAME       one of them, here
python asv_benchmarks/gpu_smoke.py profile    the calls that a profiler shall look at, each kernel once
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from benchmarks.common import numpy_dtype

import xce
from xce._engines import cuda as _cuda

SECONDS = 120  # a kernel that does not return
DTYPES = ("float32", "bfloat16", "float16", "float64")
PROFILED = ((32768, 1024), (32768, 4096), (16384, 131072))


def regimes() -> Iterator[tuple[str, int, bool]]:
    """Name, bytes of a row, and whether the classes lie side by side."""
    yield "strided", 400, False
    below = 0
    for limit, regime in (*_cuda._REGIMES, *_cuda._CLUSTERS):
        yield "x".join(map(str, regime)), 2 * below if math.isinf(limit) else int(limit), True
        below = below if math.isinf(limit) else int(limit)


def all_names() -> list[str]:
    """The regimes, and what is not of rows."""
    return [*(name for name, *_ in regimes()), "elements", "linear", "checks"]


def arrays(shape: tuple[int, ...], n_classes: int, dtype: str) -> tuple[Any, Any]:
    """Logits and labels of the host."""
    rng = np.random.default_rng(len(shape) + n_classes)
    x = (3 * rng.standard_normal(shape)).astype(np.float32).astype(numpy_dtype(dtype))
    return x, rng.integers(n_classes, size=shape[:1] + shape[2:])


def compare(xp: Any, title: str, function: Any, *args: Any, **options: Any) -> bool:
    """Print how far the GPU's results are from those of the CPU's kernels."""
    began = time.perf_counter()
    there = function(*(xp.asarray(a) for a in args), **options)
    xp.cuda.Device().synchronize()
    took = time.perf_counter() - began
    worst = 0.0
    for a, b in zip(flat(there), flat(function(*args, **options)), strict=True):
        a, b = wide(xp.asnumpy(a)), wide(np.asarray(b))
        eps = {2: 2.0**-7, 4: 2.0**-20, 8: 2.0**-48}[np.asarray(args[0]).dtype.itemsize]
        worst = max(worst, float(np.max(np.abs(a - b) / (eps * np.max(np.abs(b)) + 1e-37), initial=0.0)))
    ok = worst <= 1
    print(
        f"{title}: {'right' if ok else f'WRONG by {worst:.3g} times the tolerance'}, first call {took:.2f} s",
        flush=True,
    )
    return ok


def flat(result: Any) -> list[Any]:
    """The arrays of a result, which may be nested."""
    return [a for part in result for a in flat(part)] if isinstance(result, tuple) else [result]


def wide(x: Any) -> Any:
    """An array in float64; CuPy has bfloat16 in a minimal form."""
    return x.astype(np.float64)


def run(name: str) -> bool:
    """The calls of one regime."""
    import cupy as xp

    flags, good = {"return_grad": True, "return_hess": True}, True
    if name == "elements":
        for dtype in DTYPES:
            x, _ = arrays((64, 1000), 1000, dtype)
            function = xce.binary_cross_entropy_with_logits
            good &= compare(xp, f"elements {dtype}", function, x, (x > 0).astype(x.dtype), **flags)
    elif name == "linear":
        x, y = arrays((64, 32), 100, "float32")
        w, _ = arrays((100, 32), 32, "float32")
        good &= compare(xp, "linear_cross_entropy float32", xce.linear_cross_entropy, x, w, y, return_grad=True)
    elif name == "checks":
        x, y = arrays((64, 100), 100, "float32")
        y[7] = 100
        try:
            xce.cross_entropy(xp.asarray(x), xp.asarray(y))
        except xce.LabelError as error:
            print(f"checks: right, {error}")
        else:
            print("checks: WRONG, a bad label was not seen")
            good = False
        rows = xce.cross_entropy(xp.asarray(x), xp.asarray(y), reduction="none", validate=False).get()
        good &= bool(np.array_equal(np.isnan(rows), np.arange(64) == 7))
    else:
        row_bytes, adjacent = next((size, flag) for found, size, flag in regimes() if found == name)
        for dtype in DTYPES:
            n_classes = row_bytes // numpy_dtype(dtype).itemsize
            n_rows = max(4, min(512, 2**20 // n_classes))
            x, y = arrays((n_rows, n_classes) if adjacent else (n_rows, n_classes, 8), n_classes, dtype)
            for options in ({}, {"label_smoothing": 0.1}, {"temperature": 0.7}):
                title = f"{name} {dtype} {n_rows}x{n_classes} {options or ''}"
                good &= compare(xp, title, xce.cross_entropy, x, y, axis=1, **options, **flags)
    return good


def profile() -> None:
    """One call of each, after one that compiles."""
    import cupy as xp

    for shape in PROFILED:
        for dtype in ("bfloat16", "float32"):
            x, y = (xp.asarray(a) for a in arrays(shape, shape[1], dtype))
            for return_grad in (False, True):
                for _ in range(2):
                    xce.cross_entropy(x, y, reduction="none", return_grad=return_grad, validate=False)
            xp.cuda.Device().synchronize()


def main(names: list[str]) -> int:
    """Run what is named, or everything; the number of processes that failed."""
    if names == ["profile"]:
        profile()
        return 0
    if names:
        return sum(not run(name) for name in names)
    failed = 0
    for name in all_names():
        try:
            code = subprocess.run([sys.executable, __file__, name], timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = f"none within {SECONDS} s"  # type: ignore[assignment]
        if code:
            print(f"{name}: FAILED, exit code {code}", flush=True)
            failed += 1
    print(f"{failed} of {len(all_names())} failed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
