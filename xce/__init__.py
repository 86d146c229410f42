"""Cross-entropy losses for arrays: the value, the gradient and the Hessian diagonal, in one pass."""

from ._located import compiled_path

__path__ = compiled_path(__name__, __path__)

from . import losses
from ._errors import LabelError
from ._threads import get_num_threads, num_threads, set_num_threads, show_config
from .losses import *  # noqa: F403
from .state import LossState

__all__ = [
    "LabelError",
    "LossState",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "show_config",
]
__all__ += losses.__all__
