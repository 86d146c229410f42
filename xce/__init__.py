"""Cross-entropy losses for arrays: the value, the gradient and the Hessian diagonal, in one pass.

    loss, grad = xce.cross_entropy(logits, labels, return_grad=True)

Losses of rows, with class indices or probabilities as the target and the classes on the last axis unless told:
    cross_entropy                     from logits, with every option that deep-learning frameworks have
    focal_loss                        less of it for rows that are right already
    poly_loss                         cross entropy and epsilon (1 - p)
    generalized_cross_entropy         between cross entropy and 1 - p: for wrong labels
    nll_loss                          from log-probabilities, and class indices only
    distillation_loss                 divergence of logits from a teacher's
    linear_cross_entropy              of a linear layer, whose logits are never all in memory
Losses of single elements:
    binary_cross_entropy_with_logits  from logits
    binary_cross_entropy              from probabilities
    sigmoid_focal_loss                less of it for elements that are right already
    asymmetric_loss                   the same, with other exponents for positives and negatives
    soft_margin_loss                  with targets -1 and 1
    multilabel_soft_margin_loss       the mean over the classes of a row
    kl_div                            Kullback-Leibler divergence from log-probabilities
Functions of logits alone, and statistics:
    softmax                           probabilities
    log_softmax                       their logarithms
    logsumexp                         logarithm of the sum of exponentials
    logit_stats                       logsumexp, target logit, argmax, rank and entropy: a LogitStats
Metrics, with top_k_accuracy and brier_score in xce.metrics:
    log_loss                          of probabilities, as in scikit-learn
    perplexity                        of logits
And:
    LossState                         the loss of rows, or classes, that come in pieces
    LabelError                        the error of a label that is no class
    num_threads                       bounds the threads of a block; set_num_threads, get_num_threads
    show_config                       versions, instruction set, threads, GPU

PyTorch's own names, with autograd, are in xce.torch. Every function has examples: help(xce.cross_entropy).
"""

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
