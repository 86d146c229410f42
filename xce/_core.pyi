from typing import Any

LIMITS_OF_FLOAT32: tuple[float, float, float]

def row_loss(function: str, parameter: float, logits: Any, target: Any, given: Any) -> Any: ...
def element_loss(
    loss: Any,
    params: tuple[float, ...],
    x: Any,
    target: Any,
    given: Any,
    factors: tuple[Any, Any] = ...,
    axis: Any = ...,
    reduction: str | None = ...,
) -> Any: ...
def plain_row_loss(function: str, parameter: float, logits: Any, target: Any, given: Any) -> Any: ...
def plain_element_loss(
    loss: Any, params: tuple[float, ...], x: Any, target: Any, given: Any, reduction: str | None
) -> Any: ...
