"""Cross-entropy losses for arrays: the value, the gradient and the Hessian diagonal, in one pass."""

from ._located import compiled_path

__path__ = compiled_path(__name__, __path__)

from ._errors import LabelError
from ._threads import get_num_threads, num_threads, set_num_threads, show_config
from .losses import LogitStats, cross_entropy, log_softmax, logit_stats, logsumexp, softmax
from .state import LossState

__all__ = [
    "LabelError",
    "LogitStats",
    "LossState",
    "cross_entropy",
    "get_num_threads",
    "log_softmax",
    "logit_stats",
    "logsumexp",
    "num_threads",
    "set_num_threads",
    "show_config",
    "softmax",
]
