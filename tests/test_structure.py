"""What the design promises of every loss: a case, documentation that runs, a benchmark, and nothing imported."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cases import LOSSES, TARGETS_OF_LOSSES, Case, oracle, problem
from checks import DTYPES, every_loss

import xce
from xce import _cpu, _options, _reference
from xce._engines import cuda as _cuda

ROOT = Path(__file__).parents[1]
FUNCTIONS = {name: f for name in xce.__all__ if inspect.isfunction(f := getattr(xce, name))}
PARAMETERS = {name: inspect.signature(f).parameters for name, f in FUNCTIONS.items()}
OF_LAYERS = {  # losses of a layer, with the gradients of its parameters -> where their tests are
    name: f"test_{name.partition('_')[0]}.py"
    for name, parameters in PARAMETERS.items()
    if "linear_weight" in parameters
}
PUBLIC_LOSSES = sorted(
    {name for name, parameters in PARAMETERS.items() if "return_grad" in parameters} - set(OF_LAYERS)
)
OF_ARRAYS = sorted(
    name
    for name, parameters in PARAMETERS.items()
    if {"logits", "inputs", "x"} & set(parameters) or name in PUBLIC_LOSSES
)


def sections(f: Callable[..., Any]) -> list[str]:
    """The headings of a docstring in numpydoc's format."""
    return re.findall(r"^([A-Z][A-Za-z ]+)\n-{3,}$", inspect.getdoc(f) or "", re.MULTILINE)


def test_there_is_something_to_test() -> None:
    assert "cross_entropy" in PUBLIC_LOSSES
    assert {"cross_entropy", "linear_cross_entropy", "softmax", "logsumexp"} <= set(OF_ARRAYS)
    assert "linear_cross_entropy" in OF_LAYERS


def test_the_package_tells_what_it_has_in_forty_lines() -> None:
    lines = (xce.__doc__ or "").splitlines()
    assert len(lines) <= 40
    for name in xce.__all__:
        assert re.search(rf"\b{name}\b", "\n".join(lines)), name


@pytest.mark.parametrize("loss", PUBLIC_LOSSES)
def test_every_loss_has_a_case(loss: str) -> None:
    assert loss in {case.name for case in LOSSES}


@every_loss
def test_every_case_is_a_public_loss(case: Case) -> None:
    assert case.function is getattr(xce, case.name)
    assert case.name in PUBLIC_LOSSES
    assert [other.name for other in LOSSES].count(case.name) == 1


def test_every_formula_has_a_case_and_a_kernel() -> None:
    found: dict[str, set[str]] = {"phi": set(), "divergence": set(), "element": set()}
    for case, mode in TARGETS_OF_LOSSES:
        x, target, options = problem({}, mode, case=case)
        with mock.patch.object(_reference, "run", wraps=_reference.run) as run:
            oracle(case.function, x, target, **options)
        (call,) = run.call_args.args
        if call.op == "element":
            found["element"].add(call.formula)
        else:
            found["divergence" if call.op == "distillation" else "phi"].add(call.loss)
    assert found == {
        "phi": set(_reference.PHI), "divergence": set(_reference.DIVERGENCES), "element": set(_reference.ELEMENTS)
    }  # fmt: skip
    for storage in DTYPES:
        kernels = _cpu.kernels(storage)
        for known, formulas in zip(
            (kernels.PHI, kernels.DIVERGENCES, kernels.ELEMENT_FORMULAS), found.values(), strict=True
        ):
            assert set(known) == formulas


@pytest.mark.parametrize("loss", PUBLIC_LOSSES)
def test_every_loss_warns_of_finite_differences(loss: str) -> None:
    notes = (inspect.getdoc(getattr(xce, loss)) or "").partition("\nNotes\n")[2]
    assert notes.count("A float32 loss is too coarse for the finite differences") == 1


# A formula is written once: the CUDA kernels are a second schedule, not a second library


def test_options_that_are_numbers_stand_in_one_order() -> None:
    """They are handed to the kernels by their places."""
    for names in (_cpu.kernels("float32").NUMBERS, _cuda.names("XCE_ROW_OPTIONS", "options.h")):
        assert names == _options.NUMBERS


def test_every_formula_has_a_twin_of_cuda() -> None:
    """In the same order, as the kernels know a phi by its number."""
    formulas = _cuda.text("formulas.h")
    lists = {
        name: re.findall(r"LOSS\((\w+)\)", text)
        for name, text in re.findall(r"#define XCE_(\w+)\(LOSS\)((?:.*\\\n)*.*)", formulas)
    }
    assert list(_cuda.phis()) == lists["SOFTMAX_LOSSES"] + lists["DIVERGENCES"]
    assert set(_cuda.phis()) == {*_reference.PHI, *_reference.DIVERGENCES}
    assert set(_cuda.names("XCE_ELEMENT_LOSSES")) == set(lists["ELEMENT_LOSSES"]) == set(_reference.ELEMENTS)


def test_both_processors_compile_the_same_formulas() -> None:
    assert "formulas.h" in _cuda.ROWS
    assert "formulas.h" in _cuda.ELEMENTS
    assert '"formulas.h"' in source_of("cpu/elements.h")
    assert '"formulas.h"' in source_of("cpu/kernels.pyx")
    defined = re.findall(r"^XCE_\w+ jet (\w+)\(", source_of("formulas.h"), re.MULTILINE)
    assert len(defined) == len(set(defined)) > len(_cuda.phis())
    for file in sorted((ROOT / "src").glob("c*/*")):
        own = re.findall(r"\bjet (\w+)\([^)]*\)\s*(?:/\*.*\*/\s*)?{", file.read_text(encoding="utf-8"))
        assert not set(own) & set(defined), f"{file.name} has formulas of its own"


SCHEDULES = sorted(file.name for file in (ROOT / "src/cuda").glob("*") if file.name != "threads.h")


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_cuda_have_no_mathematics(name: str) -> None:
    """They call what primitives.h and formulas.h have, and none of CUDA's own functions."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", source_of(f"cuda/{name}"), flags=re.DOTALL)
    functions = "exp|exp2|exp10|expm1|log|log2|log10|log1p|pow|sqrt|rsqrt|tanh|sinh|cosh|erf"
    assert re.findall(rf"(?<!\w)_*(?:fast_)?(?:{functions})f?\(|\b(?:ex2|lg2|tanh)\.approx", text) == []


SOURCES = [f"cpu/{file.name}" for file in sorted((ROOT / "src/cpu").glob("*.p[xy]*"))] + [
    f"cuda/{name}" for name in SCHEDULES
]
# phi and its derivatives: f.d1, at->d2, phi[0]; but job.phi is the number of a loss
TERM = r"(?<![\w.>])(?!j(?:ob)?\.phi\b)(?:\w+(?:\[\w*\])*(?:\.|->))*(?:phi|d1|d2)\b(?:\[\w*\])*"
FORMULAS = "r_fma|weighted|divided|scaled_difference|times_square"
ARITHMETIC = rf"[-+*/]=? *[-(]*{TERM}|{TERM} *(?:[-+*/]=|[-+*/] *[\w(])|\b(?:{FORMULAS})\([^;\n]*{TERM}"


@pytest.mark.parametrize("name", SOURCES)
def test_schedules_have_no_arithmetic_on_phi_and_its_derivatives(name: str) -> None:
    """What they are multiplied by and added to stands in formulas.h, for both processors."""
    comments = r"/\*.*?\*/|//[^\n]*" if name.startswith("cuda/") else r"#[^\n]*|\"{3}.*?\"{3}"
    assert re.findall(ARITHMETIC, re.sub(comments, "", source_of(name), flags=re.DOTALL)) == []


@pytest.mark.parametrize(
    "line", ["g = factor * f.d1", "sum += phi[1];", "at->d2 += a", "r_fma(a, f.d2, b)", "v = f.d1 - b"]
)
def test_arithmetic_on_phi_and_its_derivatives_is_found(line: str) -> None:
    assert re.search(ARITHMETIC, line)


def test_one_file_knows_one_processor_from_another() -> None:
    for name in ("formulas.h", *(f"cuda/{name}" for name in SCHEDULES)):
        assert not re.findall(r"XCE_CUDA|__CUDACC__|__x86_64__|__aarch64__", source_of(name)), name


def test_every_file_of_cuda_is_installed() -> None:
    installed = (ROOT / "meson.build").read_text(encoding="utf-8")
    for file in (ROOT / "src/cuda").glob("*"):
        assert f"'src/cuda/{file.name}'" in installed


def source_of(name: str) -> str:
    return (ROOT / "src" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("loss", sorted(OF_LAYERS))
def test_every_loss_of_a_layer_has_tests_and_a_benchmark(loss: str) -> None:
    tests = (ROOT / "tests" / OF_LAYERS[loss]).read_text(encoding="utf-8")
    assert f"xce.{loss}(" in tests
    assert loss in benchmarked("LAYERS")


@pytest.mark.parametrize("function", sorted(set(OF_ARRAYS) - set(PUBLIC_LOSSES) - set(OF_LAYERS)))
def test_every_other_function_has_a_benchmark(function: str) -> None:
    assert function in benchmarked("TRANSFORMS")


def benchmarked(table: str) -> set[str]:
    """The keys of a table of the benchmarks, whose module is read but not imported."""
    module = ast.parse((ROOT / "asv_benchmarks/benchmarks/common.py").read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError(f"common.py has no {table}")


@pytest.mark.parametrize("function", OF_ARRAYS)
def test_docstrings_have_all_sections(function: str) -> None:
    found = sections(FUNCTIONS[function])
    expected = ["Parameters", "Returns", "Raises", "References", "Examples"]
    assert [name for name in found if name in expected] == expected


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_docstrings_name_every_parameter_in_order(function: str) -> None:
    text = (inspect.getdoc(FUNCTIONS[function]) or "") + "\n\nEnd\n---"
    if not PARAMETERS[function]:
        return
    block = re.search(r"^Parameters\n-+\n(.*?)^[A-Z]\w+\n-{3,}$", text, re.MULTILINE | re.DOTALL)
    assert block, "no section Parameters"
    described = [
        name.strip() for line in re.findall(r"^(\w[\w, ]*) :", block[1], re.MULTILINE) for name in line.split(",")
    ]
    assert described == list(PARAMETERS[function])


@pytest.mark.parametrize("name", [name for name in xce.__all__ if callable(getattr(xce, name))])
def test_everything_public_has_a_docstring(name: str) -> None:
    summary = (inspect.getdoc(getattr(xce, name)) or "").split("\n\n")[0]
    assert summary.endswith(".")


DOCTEST = """
import doctest, sys, xce
tests = [test for name in {names} for test in doctest.DocTestFinder().find(getattr(xce, name), name, globs={{}})]
without = set({names}) - {{test.name for test in tests if test.examples}}
runner = doctest.DocTestRunner()
for test in tests:
    runner.run(test)
sys.exit(f"without an example: {{without}}" if without else runner.failures)
"""


def test_every_public_function_has_examples_that_run() -> None:
    """In an interpreter of its own: they set threads."""
    result = subprocess.run(
        [sys.executable, "-c", DOCTEST.format(names=sorted(FUNCTIONS))], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_the_package_imports_no_other_library() -> None:
    others = "{'cupy', 'torch', 'jax', 'dask', 'matplotlib', 'scipy', 'sklearn', 'ml_dtypes', 'click', 'rich'}"
    code = f"import sys, xce; found = {others} & set(sys.modules); sys.exit(f'imported: {{found}}' if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_that_is_public_is_there() -> None:
    assert all(hasattr(xce, name) for name in xce.__all__)
