"""Minimax coefficients of the polynomials in primitives.h: ``python src/coefficients.py`` prints them.

Each function is written so that the polynomial carries only the small part of the result, and the polynomial is the
one whose *relative* error in the whole function is smallest in the maximum norm (Remez' exchange, 60 digits).
"""

from collections.abc import Callable

import mpmath as mp

mp.mp.dps = 60

EXP_RANGE = mp.log(2) / 2 * mp.mpf("1.003")  # the argument may lie a little beyond ln(2)/2 after rounding
LOG_RANGE = (mp.sqrt(2) - 1) / (mp.sqrt(2) + 1) * mp.mpf("1.003")  # s = f / (2 + f) for 1 + f in [sqrt(1/2), sqrt(2)]


def exp_tail(r: mp.mpf) -> mp.mpf:
    """Q in exp(r) = 1 + r + r^2 Q(r)."""
    if abs(r) < mp.mpf("1e-15"):
        return mp.mpf(1) / 2 + r / 6
    return (mp.expm1(r) - r) / r**2


def log_tail(z: mp.mpf) -> mp.mpf:
    """R in log(1 + f) = f - f^2/2 + s (f^2/2 + z R(z)), s = f / (2 + f), z = s^2; that is R = 2/3 + 2z/5 + ..."""
    if z < mp.mpf("1e-15"):
        return mp.mpf(2) / 3 + z * 2 / 5
    s = mp.sqrt(z)
    return (2 * mp.atanh(s) - 2 * s) / (s * z)


def cosh_tail(z: mp.mpf) -> mp.mpf:
    """J in d tanh(d/2) - 2 log(cosh(d/2)) = z J(z), z = d^2."""
    if z < mp.mpf("1e-12"):
        return mp.mpf(1) / 4 - z / 32
    half = mp.sqrt(z) / 2
    return (2 * half * mp.tanh(half) - 2 * mp.log(mp.cosh(half))) / z


def remez(
    f: Callable, weight: Callable, degree: int, low: mp.mpf, high: mp.mpf, rounds: int = 12
) -> tuple[list, mp.mpf]:
    """The polynomial of ``degree`` that minimises max |weight (f - p)| on [low, high], and that maximum."""
    n = degree + 2
    nodes = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * k / (n - 1)) for k in range(n)]
    grid = [low + (high - low) * mp.mpf(k) / 4000 for k in range(4001)]
    values, weights = [f(x) for x in grid], [weight(x) for x in grid]
    for _ in range(rounds):
        rows = mp.matrix(n, n)
        for i, x in enumerate(nodes):
            for j in range(degree + 1):
                rows[i, j] = x**j
            rows[i, degree + 1] = (-1) ** i / weight(x)
        solution = mp.lu_solve(rows, mp.matrix([f(x) for x in nodes]))
        coefficients = [solution[j] for j in range(degree + 1)]
        error = [w * (v - mp.polyval(coefficients[::-1], x)) for x, v, w in zip(grid, values, weights, strict=True)]
        nodes, best = [], None
        for x, e in zip(grid, error, strict=True):  # the extremum of each run of one sign
            if best is not None and mp.sign(e) != mp.sign(best[1]):
                nodes.append(best[0])
                best = None
            if best is None or abs(e) > abs(best[1]):
                best = (x, e)
        nodes.append(best[0])
        if len(nodes) != n:
            raise ArithmeticError(f"{len(nodes)} extrema instead of {n}")
    return coefficients, max(abs(e) for e in error)


def main() -> None:
    for name, degree in (("float32", 4), ("float64", 9)):
        c, error = remez(exp_tail, lambda r: r**2 / mp.exp(r) + mp.mpf("1e-30"), degree, -EXP_RANGE, EXP_RANGE)
        print(f"exp {name}: relative error 2^{float(mp.log(error, 2)):.1f}")
        print("   ", ", ".join(mp.nstr(x, 20) for x in c))
    square, unit = LOG_RANGE**2, mp.mpf(1) / 9 * mp.mpf("1.003")  # unit: s = x / (2 + x) for x in [0, 1]
    for name, degree, end in (("float32", 3, square), ("float64", 6, square), ("float32 unit", 4, unit)):
        # relative to log(1+f) ~ 2s the tail s z R(z) weighs z / 2
        c, error = remez(log_tail, lambda z: z / 2 + mp.mpf("1e-30"), degree, mp.mpf(0), end)
        print(f"log {name}: relative error 2^{float(mp.log(error, 2)):.1f}")
        print("   ", ", ".join(mp.nstr(x, 20) for x in c))
    one = mp.mpf("1.003")
    for name, degree in (("float32", 7), ("float64", 13)):
        c, error = remez(exp_tail, lambda r: 1 / exp_tail(r), degree, -one, one)
        print(f"exp to 1 {name}: relative error of what is not linear 2^{float(mp.log(error, 2)):.1f}")
        print("   ", ", ".join(mp.nstr(x, 20) for x in c))
    for name, degree in (("float32", 4), ("float64", 10)):
        c, error = remez(cosh_tail, lambda z: 1 / cosh_tail(z), degree, mp.mpf(0), one)
        print(f"cosh {name}: relative error 2^{float(mp.log(error, 2)):.1f}")
        print("   ", ", ".join(mp.nstr(x, 20) for x in c))
    ln2 = mp.log(2)
    for name, bits in (("float32", 12), ("float64", 40)):
        high = mp.floor(ln2 * 2**bits) / 2**bits  # few bits, so that n * high is exact without fma, too
        print(f"ln2 {name}: {float(high).hex()} + {mp.nstr(ln2 - high, 20)}")


if __name__ == "__main__":
    main()
