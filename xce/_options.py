"""The options that functions share, each said once: its default, what it may be, its documentation.

A family of functions takes the options of one `TypedDict`. Signatures, documentation and checks are made from it;
the options that are numbers become the fields of ``row_options`` in ``src/options.h``, in the order of `NUMBERS`.
"""

from __future__ import annotations

import difflib
import inspect
from collections import namedtuple
from collections.abc import Callable
from functools import cache, partial
from textwrap import indent
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, cast, get_type_hints

from xce import _checks as check
from xce._arrays import Array
from xce._docs import complete

__all__ = [
    "DEFAULTS",
    "NUMBERS",
    "CrossEntropyOptions",
    "DistillationOptions",
    "ElementOptions",
    "ElementOutputs",
    "LinearOptions",
    "MapOptions",
    "MetricOptions",
    "NllOptions",
    "Numbers",
    "Reduction",
    "StatsOptions",
    "checked",
    "takes",
]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Gradients: TypeAlias = tuple[Array | None, Array | None, Array | None]
F = TypeVar("F", bound=Callable[..., Any])


class Option(NamedTuple):
    """An option of several functions."""

    default: Any
    kind: str  # as numpydoc has it, the default apart
    text: str
    check: Callable[[str, Any], Any] | None = None  # of its value; None: an array, checked beside the others
    is_number: bool = False  # a field of `row_options`


# Coefficients

_WEIGHT = Option(
    None,
    "array of shape (C,)",
    """Class weights: floating, integer or bool, finite and not negative.""",
)
_IGNORE_INDEX = Option(
    -100,
    "int",
    """Rows with this label are excluded from loss, derivatives and denominator, and are not read. Any int64, also a
    class. Without effect on probabilities.""",
    check.label,
)
_LABEL_SMOOTHING = Option(
    0.0,
    "float",
    """The share of the target, in [0, 1], that is spread evenly over the classes.""",
    partial(check.real, allowed=check.UNIT),
    is_number=True,
)

# Logits

_WHERE = Option(
    None,
    "array of bool, broadcastable to the shape of `logits`",
    """False removes a class: it gets probability and gradient 0 and no share of the smoothing, and its logit
    is not read. A target there makes the loss infinite. A row that is left without a class counts nowhere, as
    with a sample weight of 0.""",
)
_TEMPERATURE = Option(
    1.0,
    "float",
    """The logits are divided by it, after `softcap`. The derivatives are those by the raw logits.""",
    partial(check.real, allowed=check.POSITIVE),
    is_number=True,
)
_SOFTCAP = Option(
    None,
    "float",
    """Replaces the logits by ``softcap * tanh(logits / softcap)``; -inf stays -inf.""",
    partial(check.real, allowed=check.POSITIVE, or_none=True),
    is_number=True,
)
_Z_LOSS = Option(
    0.0,
    "float",
    """Adds ``z_loss * lse**2`` to the loss of a row, with `lse` the log-sum-exp of its logits as
    transformed. The sample weight multiplies it, the class weights do not; "mean" divides it like the rest.""",
    check.real,
    is_number=True,
)
_AXIS = Option(-1, "int", """The class axis.""")

# Results

_REDUCTION = Option(
    "mean",
    '{"mean", "sum", "none"}',
    """"none" returns the loss of every row. "mean" divides the sum, and the derivatives, by the number of
    rows not ignored; with class weights and class indices by the sum of ``weight[target]``; with sample
    weights by the sum over rows of the sample weight times that. A mean over weights that sum to 0 is
    NaN, and so are the derivatives of the rows that count, unless there are none.""",
    partial(check.choice, allowed=check.REDUCTIONS),
)
_SAMPLE_WEIGHT = Option(
    None,
    "array or number",
    """Row weights of any sign: floating, integer or bool, finite, broadcastable to the shape of
    `logits` without `axis`. A weight of 0 removes its row, whatever that holds: loss and derivatives are 0, and
    nothing there is checked.""",
)
_RETURN_GRAD = Option(
    False,
    "bool",
    """Also return the gradient, and the diagonal of the Hessian, of each row's reduced loss by its logits.""",
    check.flag,
)
_RETURN_HESS = _RETURN_GRAD
_GRAD_OUT = Option(
    None,
    "array",
    """Arrays of the shape and dtype of `logits` to write the derivatives to. ``grad_out=logits`` overwrites
    the logits; any other shared memory is an error.""",
)
_HESS_OUT = _GRAD_OUT
_N_THREADS = Option(
    None,
    "int",
    """Upper bound on the number of threads. The result does not depend on it.""",
    check.thread_count,
)
_VALIDATE = Option(
    True,
    "bool",
    """False skips the checks that read the data: labels, probabilities and weights. A bad label then makes
    its row NaN, and a call on a GPU waits for nothing.""",
    check.flag,
)

# Of single elements

_ELEMENT_REDUCTION = _REDUCTION._replace(
    text=""""none" returns the loss of every element. "mean" divides the sum, and the derivatives, by the number of
    elements or, with sample weights, by the sum of those.""",
)
_ELEMENT_SAMPLE_WEIGHT = Option(
    None,
    "array of bool, integers or floats, or one number",
    """Factors of the elements that "mean" counts, finite and of any sign, broadcastable to the shape of `logits`.
    A factor of 0 removes its element, whatever logits and target hold there, from the denominator as well.""",
)
_ELEMENT_RETURN_GRAD = _RETURN_GRAD._replace(
    text="""Also return the first and the second derivative of each element's reduced loss by the first argument.""",
)
_ELEMENT_RETURN_HESS = _ELEMENT_RETURN_GRAD
_ELEMENT_GRAD_OUT = _GRAD_OUT._replace(
    text="""Arrays of the shape and dtype of the first argument to write the derivatives to. `grad_out` may be the
    first argument itself, which it then overwrites; any other shared memory is an error.""",
)
_ELEMENT_HESS_OUT = _ELEMENT_GRAD_OUT
_ELEMENT_VALIDATE = _VALIDATE._replace(
    text="""False skips the checks that read the data: targets and weights. Elements that a weight of 0 removes are
    never checked.""",
)


class _Ignoring(TypedDict, total=False):
    ignore_index: Annotated[int, _IGNORE_INDEX]


class _Weighing(TypedDict, total=False):
    weight: Annotated[Array | None, _WEIGHT]


class _Smoothing(TypedDict, total=False):
    label_smoothing: Annotated[float, _LABEL_SMOOTHING]


class _Softmax(TypedDict, total=False):
    where: Annotated[Array | None, _WHERE]
    temperature: Annotated[float, _TEMPERATURE]


class _Logits(_Softmax, total=False):
    softcap: Annotated[float | None, _SOFTCAP]
    z_loss: Annotated[float, _Z_LOSS]


class _Axis(TypedDict, total=False):
    axis: Annotated[int, _AXIS]


class _Reduced(TypedDict, total=False):
    reduction: Annotated[Reduction, _REDUCTION]
    sample_weight: Annotated[Array | float | None, _SAMPLE_WEIGHT]
    return_grad: Annotated[bool, _RETURN_GRAD]


class _Outputs(_Reduced, total=False):
    return_hess: Annotated[bool, _RETURN_HESS]
    grad_out: Annotated[Array | None, _GRAD_OUT]
    hess_out: Annotated[Array | None, _HESS_OUT]


class _LinearOutputs(_Reduced, total=False):
    grad_out: Annotated[Gradients | None, _GRAD_OUT]


class _Threads(TypedDict, total=False):
    n_threads: Annotated[int | None, _N_THREADS]


class _Execution(_Threads, total=False):
    validate: Annotated[bool, _VALIDATE]


class CrossEntropyOptions(_Weighing, _Ignoring, _Smoothing, _Logits, _Axis, _Outputs, _Execution, total=False):
    """The options of `cross_entropy` and of its variants."""


class NllOptions(_Weighing, _Ignoring, _Axis, _Outputs, _Execution, total=False):
    """The options of `nll_loss`."""


class DistillationOptions(_Softmax, _Axis, _Outputs, _Execution, total=False):
    """The options of `distillation_loss`."""


class LinearOptions(_Weighing, _Ignoring, _Smoothing, _Logits, _LinearOutputs, _Execution, total=False):
    """The options of `linear_cross_entropy`."""


class StatsOptions(_Axis, _Ignoring, _Execution, total=False):
    """The options of `logit_stats`."""


class MetricOptions(StatsOptions, total=False):
    """The options of metrics."""

    sample_weight: Annotated[Array | float | None, _SAMPLE_WEIGHT]


class MapOptions(_Softmax, _Threads, total=False):
    """The options of `softmax` and `log_softmax`."""


class ElementOutputs(TypedDict, total=False):
    """The options of losses of single elements but the reduction."""

    sample_weight: Annotated[Array | float | None, _ELEMENT_SAMPLE_WEIGHT]
    return_grad: Annotated[bool, _ELEMENT_RETURN_GRAD]
    return_hess: Annotated[bool, _ELEMENT_RETURN_HESS]
    grad_out: Annotated[Array | None, _ELEMENT_GRAD_OUT]
    hess_out: Annotated[Array | None, _ELEMENT_HESS_OUT]
    n_threads: Annotated[int | None, _N_THREADS]
    validate: Annotated[bool, _ELEMENT_VALIDATE]


class _ElementReduction(TypedDict, total=False):
    reduction: Annotated[Reduction, _ELEMENT_REDUCTION]


class ElementOptions(_ElementReduction, ElementOutputs, total=False):
    """The options of losses of single elements."""


# From options to signatures, documentation and values


@cache
def _options(family: Any) -> dict[str, Option]:
    """The options of a family by name, in the order of signatures."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(family, include_extras=True).items()}


DEFAULTS = {name: option.default for name, option in _options(CrossEntropyOptions).items()}
NUMBERS = ("parameter", *(name for name, option in _options(CrossEntropyOptions).items() if option.is_number))
# The parameter of the loss, and the options that are numbers: 0 where one is None.
Numbers = cast("Any", namedtuple)("Numbers", NUMBERS, defaults=(0.0, *(DEFAULTS[name] or 0.0 for name in NUMBERS[1:])))

_families: dict[str, dict[str, Option]] = {}  # by function


def checked(function: str, given: Any) -> dict[str, Any]:
    """Return the options that a function was given, a dictionary, each checked as far as it can be alone."""
    options, found = _families[function], {}
    for name, value in given.items():
        option = options.get(name)
        if option is None:
            near = difflib.get_close_matches(name, options, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
        found[name] = value if option.check is None else option.check(name, value)
    return found


def takes(family: Any, like: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Let a function, whose last parameter stands for them, take the options of a family: with their signature.

    What it does not describe is described as in the family, or as in the function `like`.
    """

    def complete_function(function: F) -> F:
        options = _families[function.__name__] = _options(family)
        bare = inspect.signature(function)
        own = list(bare.parameters.values())[:-1]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=family.__annotations__[name].__forward_arg__.removeprefix("Annotated[").rpartition(",")[0],
            )
            for name, option in options.items()
        ]
        function.__signature__ = bare.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        complete(function, _described(options), like)
        return function

    return complete_function


def _described(options: dict[str, Option]) -> dict[str, str]:
    """Return the entries of the section Parameters; options that are alike share one."""
    names: dict[Option, list[str]] = {}
    for name, option in options.items():
        names.setdefault(option, []).append(name)
    entries = {}
    for option, alike in names.items():
        key = ", ".join(alike)
        default = "optional" if option.default is None else f"default {option.default!r}".replace("'", '"')
        text = indent(inspect.cleandoc(option.text), "    ")
        entries[key] = f"{key} : {option.kind}, {default}\n{text}"
    return entries
