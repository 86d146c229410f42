"""Some hundred calls of the fuzzer, the faults that it must find, and its oracle against mpmath."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import LD, Losses

mpmath: Any = pytest.importorskip("mpmath")
pytest.importorskip("ml_dtypes")
fuzz = pytest.importorskip("fuzz")

if np.finfo(np.longdouble).nmant < 63:
    pytest.skip("longdouble is too short here for an oracle", allow_module_level=True)

CALLS = 400
needs_peers = pytest.mark.skipif(
    not all(map(find_spec, ("array_api_strict", "jax", "torch"))), reason="needs the libraries whose arrays are passed"
)


@needs_peers
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(seed: int) -> None:
    wrong: list[str] = []

    def on_failure(index: int, call: Any, text: str) -> bool:
        wrong.append(f"python tests/fuzz.py --seed {seed} --index {index}: {call.function}: {text}")
        return len(wrong) >= 5

    report = fuzz.run(range(CALLS), seed, on_failure=on_failure)
    assert not wrong, "\n".join(wrong)
    assert report.calls == CALLS
    assert report.comparisons > 50 * CALLS
    assert report.refusals > 1


@needs_peers
@pytest.mark.parametrize("plant", fuzz.PLANTS)
def test_planted_faults_are_found(plant: str) -> None:
    """And are what is found: the same calls are right without them."""
    found: list[int] = []

    def on_failure(index: int, call: Any, text: str) -> bool:
        wrong: list[str] = []
        fuzz.run([index], 1, fuzz.ROWS, on_failure=lambda *args: bool(wrong.append(args[-1])))
        found.extend([index] if not wrong else [])
        return bool(found)

    fuzz.run(range(1000), 1, fuzz.ROWS, plant=plant, on_failure=on_failure)
    assert found


@needs_peers
def test_a_call_is_a_function_of_seed_and_index() -> None:
    for index in range(50):
        a, b = (fuzz.made(5, index) for _ in range(2))
        assert a.function == b.function
        assert [fuzz.described(x) for x in a.args] == [fuzz.described(x) for x in b.args]
        assert [fuzz.snapshot(x) for x in a.args] == [fuzz.snapshot(x) for x in b.args]
        assert list(a.options) == list(b.options)


# The oracle against definitions in mpmath, whose derivatives are differences in 250 digits

STEP, DIGITS = 60, 250


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The oracle divides by 0 where that is right."""
    with np.errstate(all="ignore"):
        yield


def differences(f: Any) -> tuple[Any, Any, Any]:
    """f(0) and two derivatives there."""
    h = mpmath.mpf(10) ** -STEP
    far, here, near = f(h), f(mpmath.mpf(0)), f(-h)
    return here, (far - near) / (2 * h), (far - 2 * here + near) / h**2


def mpf(values: Any) -> list[Any]:
    return [mpmath.mpf(float(v)) for v in values]


def log_softmax(x: list[Any]) -> list[Any]:
    top = max(x)
    log_z = mpmath.log(mpmath.fsum(mpmath.exp(a - top) for a in x))
    return [a - top - log_z for a in x]


def assert_exact(found: Losses, values: list[tuple[Any, Any, Any]], eps: float) -> None:
    """`values` holds value and derivatives by each entry of one row; errors are judged as those of a kernel."""
    for bound, k in zip(found, range(3), strict=True):
        for i in range(1 if k == 0 else len(values)):
            value, size, lost = (np.ravel(a)[i] for a in bound)
            error = abs(mpmath_of(value) - values[i][k])
            assert error <= eps * mpmath_of(size) + mpmath_of(lost) + mpmath.mpf("1e-100"), (k, i, value, values[i][k])


def mpmath_of(x: Any) -> Any:
    """A longdouble, exactly."""
    high = float(x)
    return mpmath.mpf(high) + mpmath.mpf(float(x - LD(high)))


PHI = {
    "cross_entropy": lambda u, _: -u,
    "focal_loss": lambda u, gamma: -((1 - mpmath.exp(u)) ** gamma) * u,
    "poly_loss": lambda u, epsilon: -u + epsilon * (1 - mpmath.exp(u)),
    "generalized_cross_entropy": lambda u, q: (1 - mpmath.exp(q * u)) / q if q else -u,
}
# rows of float64: random, offset, confident, close to each other
LOGITS = (
    [0.3, -1.25, 2.0, 0.7], [1e4 + 0.3, 1e4 - 1.25, 1e4 + 2.0, 1e4], [35.0, 0.5, -1.0, 2.0],
    [1e6, 1e6 + 1e-9, 0.0, 1e6 - 3.0],
)  # fmt: skip
EPS = 2.0**-54  # a quarter of what counts as one ULP of float64


@pytest.mark.parametrize("logits", LOGITS, ids=["random", "offset", "confident", "close"])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("name", "parameter"), [(k, p) for k in PHI for p in fuzz.PARAMETERS[k][1]])
def test_the_oracle_of_softmax_losses(
    name: str, parameter: float, soft: bool, transform: dict[str, float], logits: list[float]
) -> None:
    target = np.array([[0.5, 0.25, 0.0, 0.25]]) if soft else np.array([0])
    weight, s = np.array([1.0, 2.0, 0.5, 0.0]), np.array([1.5])
    kept = np.ones((1, 4), bool)
    chosen = oracle.coefficients(
        target, (1, 4), weight=weight, sample_weight=s, kept=kept, ignore_index=-100, label_smoothing=0.25
    )
    found = oracle.softmax_loss(name, parameter, oracle.wide([logits]), chosen, kept, tiny=0.0, **transform)
    t, cap = transform.get("temperature", 1.0), transform.get("softcap")
    q = target[0] if soft else np.eye(4)[0] * 1.0
    with mpmath.workdps(DIGITS):
        a = [mpmath.mpf(1.5) * w * (mpmath.mpf(0.75) * c + mpmath.mpf(1) / 16) for w, c in zip(weight, q, strict=True)]

        def at(k: int, h: Any) -> Any:
            x = [(v + (h if c == k else 0)) for c, v in enumerate(mpf(logits))]
            x = [(cap * mpmath.tanh(v / cap) if cap else v) / mpmath.mpf(t) for v in x]
            u = log_softmax(x)
            lse = x[0] - u[0]
            own = mpmath.fsum(b * PHI[name](v, mpmath.mpf(parameter)) for b, v in zip(a, u, strict=True))
            return own + mpmath.mpf(1.5) * mpmath.mpf(transform.get("z_loss", 0.0)) * lse**2

        assert_exact(found, [differences(lambda h, k=k: at(k, h)) for k in range(4)], EPS)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("distance", [1e-12, 1e-6, 0.1, 5.0, 60.0])
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_oracle_of_divergences(divergence: str, distance: float, shift: float, temperature: float) -> None:
    x = [0.3, -1.25, 2.0, 0.7]
    y = [float(a + shift + distance * b) for a, b in zip(x, [0.7, -1.0, 0.4, 0.1], strict=True)]
    s = oracle.wide([1.5])
    kept = np.ones((1, 4), bool)
    found = oracle.distillation(divergence, oracle.wide([x]), oracle.wide([y]), kept, s, temperature, 0.0)
    with mpmath.workdps(DIGITS):
        v = log_softmax([a / mpmath.mpf(temperature) for a in mpf(y)])

        def at(k: int, h: Any) -> Any:
            u = log_softmax([(a + (h if c == k else 0)) / mpmath.mpf(temperature) for c, a in enumerate(mpf(x))])
            p, t = [mpmath.exp(a) for a in u], [mpmath.exp(a) for a in v]
            if divergence == "forward":
                return mpmath.mpf(1.5) * mpmath.fsum(c * (b - a) for a, b, c in zip(u, v, t, strict=True))
            if divergence == "reverse":
                return mpmath.mpf(1.5) * mpmath.fsum(c * (a - b) for a, b, c in zip(u, v, p, strict=True))
            logs = [mpmath.log((a + b) / 2) for a, b in zip(p, t, strict=True)]
            terms = (a * (c - m) + b * (d - m) for a, b, c, d, m in zip(p, t, u, v, logs, strict=True))
            return mpmath.mpf(0.75) * mpmath.fsum(terms)

        assert_exact(found, [differences(lambda h, k=k: at(k, h)) for k in range(4)], 4 * EPS)


def element_definition(name: str, x: Any, y: Any, params: dict[str, Any]) -> Any:
    log, one = mpmath.log, mpmath.mpf(1)
    if name == "binary_cross_entropy":
        return -(y * log(x) if y else 0) - ((1 - y) * log(1 - x) if y != 1 else 0)
    if name == "soft_margin_loss":
        return log(1 + mpmath.exp(-y * x))
    if name == "kl_div":
        return mpmath.exp(y) * (y - x) if params["log_target"] else (y * (log(y) - x) if y else one * 0)
    p = 1 / (1 + mpmath.exp(-x))
    not_p = 1 / (1 + mpmath.exp(x))
    if name in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
        eps = mpmath.mpf(params.get("label_smoothing", 0.0))
        y = y * (1 - eps) + eps / 2
        return -(mpmath.mpf(1.25) * y * log(p)) - (1 - y) * log(not_p)
    if name == "sigmoid_focal_loss":
        alpha, gamma = params["alpha"], mpmath.mpf(params["gamma"])
        balance = one if alpha in (None, -1.0) else y * alpha + (1 - y) * (1 - mpmath.mpf(alpha))
        return balance * (y * not_p + (1 - y) * p) ** gamma * (-y * log(p) - (1 - y) * log(not_p))
    clip = mpmath.mpf(params["clip"])
    shifted = max(p - clip, one * 0)
    gamma = y * mpmath.mpf(params["gamma_pos"]) + (1 - y) * mpmath.mpf(params["gamma_neg"])
    wrong = y * not_p + (1 - y) * shifted
    return (wrong**gamma if gamma else one) * (-y * log(p) - (1 - y) * log(1 - shifted if clip else not_p))


ELEMENT_PARAMETERS: dict[str, tuple[dict[str, Any], ...]] = {
    "binary_cross_entropy": ({"log_clamp": None},),
    "binary_cross_entropy_with_logits": ({}, {"label_smoothing": 0.1}, {"label_smoothing": 1e-6}),
    "soft_margin_loss": ({},),
    "kl_div": ({"log_target": False}, {"log_target": True}),
    "sigmoid_focal_loss": ({"alpha": 0.25, "gamma": 2.0}, {"alpha": None, "gamma": 0.5}, {"alpha": 0.9, "gamma": 0.0}),
    "asymmetric_loss": (
        {"gamma_pos": 0.0, "gamma_neg": 4.0, "clip": 0.05}, {"gamma_pos": 2.5, "gamma_neg": 0.5, "clip": 0.0},
        {"gamma_pos": 1.0, "gamma_neg": 1.0, "clip": 0.2}, {"gamma_pos": 0.0, "gamma_neg": 0.0, "clip": 0.0},
    ),
}  # fmt: skip
# the last two: next to logit(0.05), on either side
NUMBERS = (0.3, -2.0, 30.0, -40.0, 1e-9, -2.9444389791664403 + 1e-7, -2.9444389791664403 - 1e-7)


@pytest.mark.parametrize("y", [0.0, 1.0, 0.25])
@pytest.mark.parametrize(("name", "params"), [(k, p) for k, each in ELEMENT_PARAMETERS.items() for p in each])
def test_the_oracle_of_elements(name: str, params: dict[str, Any], y: float) -> None:
    numbers = NUMBERS if name != "binary_cross_entropy" else (0.3, 1e-5, 0.9999)
    if name == "soft_margin_loss":
        y = {0.0: -1.0, 1.0: 1.0, 0.25: 0.25}[y]
    pos = LD(1.25) if "cross_entropy_with_logits" in name else LD(1)
    with mpmath.workdps(DIGITS):
        for x in numbers:
            found = fuzz.element_formula(name, oracle.wide([x]), oracle.wide([y]), np.array([pos]), params)
            exact = differences(lambda h, x=x: element_definition(name, mpmath.mpf(x) + h, mpmath.mpf(y), params))
            assert_exact(found, [exact], 4 * EPS)
