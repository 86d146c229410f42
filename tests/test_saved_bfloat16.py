"""NumPy saves bfloat16 as two bytes without a meaning: an array that comes from a file is refused with the way out."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xce

ml_dtypes: Any = pytest.importorskip("ml_dtypes")


def saved(x: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    np.save(file, x.astype(ml_dtypes.bfloat16))
    file.seek(0)
    return np.load(file)


VOID = saved(np.ones((3, 4)))
WHOLE, FLOATS, LABELS = VOID.view(ml_dtypes.bfloat16), np.ones((3, 4), np.float32), np.zeros(3, np.int64)
CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "cross_entropy": ("logits", lambda: xce.cross_entropy(VOID, LABELS)),
    "probabilities": ("target", lambda: xce.cross_entropy(FLOATS, VOID)),
    "class weights": ("weight", lambda: xce.cross_entropy(FLOATS, LABELS, weight=VOID[0])),
    "sample weights": ("sample_weight", lambda: xce.cross_entropy(FLOATS, LABELS, sample_weight=VOID[:, 0])),
    "softmax": ("x", lambda: xce.softmax(VOID)),
    "nll_loss": ("log_probs", lambda: xce.nll_loss(VOID, LABELS)),
    "teacher": ("teacher_logits", lambda: xce.distillation_loss(WHOLE, VOID)),
    "binary": ("target", lambda: xce.binary_cross_entropy_with_logits(FLOATS, VOID)),
    "pos_weight": ("pos_weight", lambda: xce.binary_cross_entropy_with_logits(FLOATS, FLOATS, pos_weight=VOID[0])),
    "linear": ("inputs", lambda: xce.linear_cross_entropy(VOID, WHOLE, LABELS)),
    "linear_weight": ("linear_weight", lambda: xce.linear_cross_entropy(WHOLE, VOID, LABELS)),
    "logit_stats": ("logits", lambda: xce.logit_stats(VOID, LABELS)),
    "LossState": ("logits", lambda: xce.LossState(4).update(VOID, LABELS)),
    "top_k": ("logits", lambda: xce.metrics.top_k_accuracy(VOID, LABELS, k=1)),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_message_says_how_to_view_it(call: str) -> None:
    name, function = CALLS[call]
    with pytest.raises(TypeError) as caught:
        function()
    message = str(caught.value)
    assert f"{name} has dtype |V2" in message
    assert message.endswith(f"; if it is bfloat16 from a file, pass {name}.view(ml_dtypes.bfloat16)")


def test_the_view_is_taken() -> None:
    logits = np.array([[1, 2, 3, 4], [0, 0, 0, 0], [4, 3, 2, 1]])
    found = xce.cross_entropy(saved(logits).view(ml_dtypes.bfloat16), LABELS, reduction="none")
    assert found == pytest.approx(np.log(np.exp(logits).sum(1)) - logits[:, 0], rel=1e-6)


def test_other_void_types_get_no_hint() -> None:
    with pytest.raises(TypeError, match=r"logits has dtype \|V4: expected [a-z0-9, ]+$"):
        xce.cross_entropy(np.zeros((3, 4), "V4"), LABELS)
