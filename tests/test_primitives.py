"""The elementary functions of the kernels, alone: their errors in ULP, and infinities, zeros and NaN.

float32 is tried at every 997th of its 2^32 numbers against the C library in double precision, at all of them if
``XCE_EVERY_FLOAT`` is set (some minutes); float64 at random numbers against longdouble.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from xce import _cpu

HERE = Path(__file__).parent
SOURCES = HERE.parent / "src"
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
INF, NAN = math.inf, math.nan

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
    pytest.mark.skipif(not SOURCES.exists(), reason="the sources are not here"),
    pytest.mark.skipif(platform.machine() == "x86_64" and not {"v3", "v4"} & set(_cpu.available_levels()),
                       reason="without fma the functions have other bounds"),
]  # fmt: skip

FUNCTIONS = ["exp", "exp_any", "expm1", "log", "log1p", "tanh", "pow"]  # as primitives.c numbers them


class Bound(NamedTuple):
    function: str
    low: float  # the arguments that it is for, in float32
    high: float
    ulps: float
    precise: Callable[[Any], Any]  # of longdouble
    exponent: float = 0.0


POWERS = (0.25, 0.5, 1.0, 2.0, 3.7, 5.0, 20.0)
BOUNDS = [
    Bound("exp", -INF, 80.0, 1, np.exp),
    Bound("exp_any", -INF, INF, 1, np.exp),
    Bound("expm1", -INF, 80.0, 2, np.expm1),
    Bound("log", 0.0, INF, 1, np.log),
    Bound("log1p", -1.0, INF, 1.4, np.log1p),  # from x = 0.41 on the rounding of f, in log_parts, counts twice
    Bound("tanh", -INF, INF, 3.5, np.tanh),
    *(Bound("pow", 0.0, 1.0, 1.5 + g / 2, lambda x, g=g: x**g, g) for g in POWERS),
]
each_bound = pytest.mark.parametrize(
    "bound", BOUNDS, ids=lambda b: b.function + (f" {b.exponent}" if b.exponent else "")
)


class Library:
    def __init__(self, file: Path, scalar: Any) -> None:
        self.code, self.scalar = ctypes.CDLL(str(file)), scalar
        self.type = np.dtype(scalar)
        self.code.apply.argtypes = [ctypes.c_int, scalar, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]

    def apply(self, function: str, x: Any, exponent: float = 0.0) -> np.ndarray:
        values = np.asarray(x, self.type)
        padded = np.zeros(-(-values.size // 16) * 16, self.type)
        padded[: values.size] = values
        result = np.empty_like(padded)
        self.code.apply(FUNCTIONS.index(function), exponent, padded.ctypes.data, result.ctypes.data, padded.size)
        return result[: values.size]


LEVELS = sorted(set(_cpu.available_levels()) - {"v2"})


@pytest.fixture(scope="module", params=LEVELS)
def libraries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Library]:
    """Compiled as the kernels are."""
    folder = tmp_path_factory.mktemp(request.param)
    march = [] if request.param == "base" else [f"-march=x86-64-{request.param}"]
    found = {}
    for name, scalar in (("float32", ctypes.c_float), ("float64", ctypes.c_double)):
        file = folder / f"{name}.so"
        flags = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", *march]
        command = [
            COMPILER,
            *flags,
            f"-DXCE_STORAGE_{name}",
            f"-I{SOURCES}",
            str(HERE / "primitives.c"),
            "-o",
            str(file),
            "-lm",
        ]
        subprocess.run(command, check=True, capture_output=True)  # type: ignore[arg-type]
        found[name] = Library(file, scalar)
    return found


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


@each_bound
def test_float32(bound: Bound, libraries: dict[str, Library], record_property: Any) -> None:
    sweep = libraries["float32"].code.sweep
    sweep.restype = ctypes.c_double
    sweep.argtypes = [
        ctypes.c_int,
        ctypes.c_float,
        *[ctypes.c_uint32] * 3,
        ctypes.c_double,
        ctypes.POINTER(ctypes.c_float),
    ]
    step = 1 if os.environ.get("XCE_EVERY_FLOAT") else 997
    ends = []  # of the bits: positive numbers rise with them, negative ones fall
    if bound.high > 0:
        ends.append((bits(max(bound.low, 0.0)), bits(bound.high)))
    if bound.low < 0:
        ends.append((bits(-0.0), bits(bound.low)))
    least = 4 * float(np.finfo(np.float32).tiny) if bound.function in ("exp", "exp_any", "pow") else 0.0
    place = ctypes.c_float()
    for low, high in ends:
        error = sweep(FUNCTIONS.index(bound.function), bound.exponent, low, high, step, least, ctypes.byref(place))
        record_property("ulps", float(error))
        assert error <= bound.ulps, f"{error} ULP at {place.value!r}"


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is too short here")
@each_bound
def test_float64(bound: Bound, libraries: dict[str, Library], rng: np.random.Generator, record_property: Any) -> None:
    n = 100_000
    limit = {"exp": 700.0, "exp_any": 709.0, "expm1": 700.0}.get(bound.function, 1e300)
    sizes = 10.0 ** rng.uniform(-300, 300, n)
    near = rng.standard_normal(n) * rng.choice([1e-3, 1.0, 30.0], n)
    x = np.concatenate([sizes, -sizes, near, 1 + near, rng.random(n), 1 - rng.random(n) ** 8, -rng.random(n)])
    x = x[(x >= max(bound.low, -708.0 if "exp" in bound.function else -1e300)) & (x <= min(bound.high, limit))]
    with np.errstate(all="ignore"):
        exact = bound.precise(x.astype(np.longdouble))
        normal = np.abs(exact) > 4 * np.finfo(np.float64).tiny
        result = libraries["float64"].apply(bound.function, x, bound.exponent)
        error = np.abs(result.astype(np.longdouble) - exact)[normal] / np.spacing(
            np.abs(exact[normal].astype(np.float64))
        )
    record_property("ulps", float(error.max()))
    assert len(error) > n / 2
    assert error.max() <= bound.ulps, f"{error.max()} ULP at {x[normal][error.argmax()]!r}"
    assert (np.abs(result[~normal]) < 1e-300).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(dtype: str, libraries: dict[str, Library]) -> None:
    largest, least = float(np.finfo(dtype).max), float(np.finfo(dtype).smallest_subnormal)
    for function, x, expected in (
        ("exp", [0.0, -0.0, -INF, NAN, -1e30, least, -least], [1, 1, 0, NAN, 0, 1, 1]),
        ("exp_any", [0.0, -0.0, -INF, INF, NAN, -largest, largest, 1e4, least], [1, 1, 0, INF, NAN, 0, INF, INF, 1]),
        ("expm1", [0.0, -INF, NAN, -1e30], [0, -1, NAN, -1]),
        ("log", [0.0, -0.0, 1.0, INF, NAN, -1.0, -INF, -least], [-INF, -INF, 0, INF, NAN, NAN, NAN, NAN]),
        ("log1p", [0.0, -1.0, INF, NAN, least, -least], [0, -INF, INF, NAN, least, -least]),
        ("tanh", [0.0, INF, -INF, NAN, 1e30, -1e30], [0, 1, -1, NAN, 1, -1]),
    ):
        np.testing.assert_array_equal(libraries[dtype].apply(function, x), np.array(expected, dtype), err_msg=function)
    for g in (0.0, 0.5, 1.0, 3.0, 1e6):
        found = libraries[dtype].apply("pow", [0.0, 1.0, NAN], g)
        np.testing.assert_array_equal(found, [1.0 if g == 0 else 0.0, 1.0, NAN])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is too short here")
@pytest.mark.xfail(reason="1.36 ULP found where the target is 1", strict=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log1p_keeps_the_limit(dtype: str, libraries: dict[str, Library]) -> None:
    x = np.linspace(0.415, 0.5, 100_000, dtype=dtype)
    exact = np.log1p(x.astype(np.longdouble))
    error = np.abs(libraries[dtype].apply("log1p", x) - exact) / np.spacing(exact.astype(dtype))
    assert error.max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_arguments_of_log(dtype: str, libraries: dict[str, Library]) -> None:
    largest = float(np.finfo(dtype).max)
    x = np.array([largest, 0.8 * largest, 0.70 * largest, 0.3 * largest], dtype)
    for function in ("log", "log1p"):
        np.testing.assert_allclose(libraries[dtype].apply(function, x), np.log(x.astype(np.longdouble)), rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_arguments_of_log(dtype: str, libraries: dict[str, Library]) -> None:
    least = np.finfo(dtype).smallest_subnormal
    x = least * np.array([1, 2, 3, 5, 1000], dtype)
    np.testing.assert_allclose(
        libraries[dtype].apply("log", x), np.log(x.astype(np.longdouble)).astype(dtype), rtol=2e-7
    )
