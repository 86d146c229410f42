"""Cross-entropy losses for arrays: the value, the gradient and the Hessian diagonal, in one pass."""

from . import _located

__path__ = _located.compiled_path(__name__, __path__)

from . import losses
from ._errors import LabelError
from ._threads import get_num_threads, num_threads, set_num_threads, show_config
from .losses import *  # noqa: F403
from .metrics import log_loss, perplexity
from .state import LossState

__all__ = [
    "LabelError",
    "LossState",
    "get_num_threads",
    "log_loss",
    "num_threads",
    "perplexity",
    "set_num_threads",
    "show_config",
]
__all__ += losses.__all__


def __getattr__(name: str) -> object:
    if name == "__version__":  # read only when asked for: it takes a millisecond
        from importlib.metadata import version

        return version("xce")
    if name == "torch":  # which loads PyTorch
        from importlib import import_module

        return import_module("xce.torch")
    raise AttributeError(f"module 'xce' has no attribute {name!r}")
