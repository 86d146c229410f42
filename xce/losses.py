"""The public functions: signature, documentation, and a line each."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

from xce import _checks as check
from xce._arrays import Array
from xce._call import LogitStats
from xce._core import element_loss, row_loss
from xce._elements import SIGNS, ElementLoss, logit_in_two_parts
from xce._options import (
    CrossEntropyOptions,
    DistillationOptions,
    ElementOptions,
    ElementOutputs,
    LinearOptions,
    MapOptions,
    NllOptions,
    Reduction,
    StatsOptions,
    takes,
)
from xce._rows import divergence as divergence_loss
from xce._rows import linear, logit_statistics, nll
from xce._transforms import log_sum_exp, transform

__all__ = [
    "LogitStats",
    "asymmetric_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "distillation_loss",
    "focal_loss",
    "generalized_cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "log_softmax",
    "logit_stats",
    "logsumexp",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poly_loss",
    "sigmoid_focal_loss",
    "soft_margin_loss",
    "softmax",
]


@takes(CrossEntropyOptions)
def cross_entropy(
    logits: Array,
    target: Array | int,
    **options: Unpack[CrossEntropyOptions],
) -> Any:
    r"""Cross-entropy between logits and class indices or probabilities, with derivatives on demand.

    With :math:`u = \log \mathrm{softmax}(x)`, :math:`p = e^u` and a row of coefficients :math:`a`,

    .. math::

        \ell = -\sum_c a_c u_c, \qquad
        \frac{\partial \ell}{\partial x_k} = A p_k - a_k, \qquad
        \frac{\partial^2 \ell}{\partial x_k^2} = A p_k (1 - p_k), \qquad A = \sum_c a_c .

    For a class index :math:`y`, :math:`a_c = s\,((1 - \varepsilon) w_y [c = y] + \frac{\varepsilon}{C} w_c)`;
    for probabilities :math:`q`, :math:`a_c = s\,w_c ((1 - \varepsilon) q_c + \frac{\varepsilon}{C})`, where
    :math:`w` is the class weight, :math:`s` the sample weight and :math:`\varepsilon` the label smoothing.

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Unnormalised log-probabilities in nats. 16-bit logits are computed in float32.
    target : array
        Class indices: integers, or floats that are whole numbers, of the shape of `logits` without `axis` (an
        int will do for logits of shape (C,)). Or probabilities: any floating dtype, the shape of `logits`, not
        negative; rows need not sum to 1.

    Returns
    -------
    scalar or array, or tuple of it and arrays
        The loss in nats (float32, or float64 for float64 logits), or ``(loss, grad)``, ``(loss, hess)``,
        ``(loss, grad, hess)``. The derivatives have the shape and dtype of `logits`. All arrays are of the
        kind and on the device of `logits`.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, a probability or weight is negative or NaN, or a buffer does not
        fit.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    Without rows that count, "mean" is NaN and "sum" is 0, with a gradient of zeros. A NaN or +inf in a row,
    or a row of -inf only, makes that row NaN and no other. A target at -inf has the loss +inf and a finite
    gradient, and a coefficient of 0 makes its term 0 even there. A logit counts as -inf where its distance from the
    row's greatest one is beyond the type. An error leaves every buffer untouched.

    A float32 loss is too coarse for the finite differences by which an optimiser replaces a missing gradient: pass
    it the gradient (``return_grad=True``; ``jac=True`` in SciPy), or give float64.

    References
    ----------
    .. [1] I. J. Good, "Rational decisions", Journal of the Royal Statistical Society B 14 (1952), 107-114.
    .. [2] C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016 (label
       smoothing).
    .. [3] A. Chowdhery et al., "PaLM: scaling language modeling with pathways", JMLR 24 (2023) (z-loss).

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> labels = np.array([0, 2])
    >>> print(f"{xce.cross_entropy(logits, labels):.6f}")
    0.753109
    >>> loss, grad = xce.cross_entropy(logits, labels, label_smoothing=0.1, return_grad=True)
    >>> print(np.round(grad, 4))
    [[-0.134   0.1057  0.0283]
     [ 0.15    0.15   -0.3   ]]
    >>> xce.cross_entropy(logits, np.array([0, 3]))
    Traceback (most recent call last):
        ...
    xce.LabelError: target[1] = 3 is out of range: labels of 3 classes are 0..2, or ignore_index=-100
    """
    return row_loss("cross_entropy", 0.0, logits, target, options)


@takes(CrossEntropyOptions, like=cross_entropy)
def focal_loss(
    logits: Array,
    target: Array | int,
    *,
    gamma: float = 2.0,
    **options: Unpack[CrossEntropyOptions],
) -> Any:
    r"""Softmax focal loss: cross-entropy that counts examples less the better they are classified.

    With :math:`u = \log \mathrm{softmax}(x)`, :math:`p = e^u` and the coefficients :math:`a` of `cross_entropy`,

    .. math:: \ell = -\sum_c a_c (1 - p_c)^\gamma u_c .

    Parameters
    ----------
    gamma : float, default 2.0
        The exponent, finite and not negative. 0 is `cross_entropy`.

    Notes
    -----
    Hessian diagonals of this loss can be negative. Balance between classes ("alpha" of the paper) is `weight`.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> print(f"{xce.focal_loss(logits, np.array([0, 2]), gamma=2.0):.6f}")
    0.266975
    """
    return row_loss("focal_loss", check.real("gamma", gamma), logits, target, options)


@takes(CrossEntropyOptions, like=cross_entropy)
def poly_loss(
    logits: Array,
    target: Array | int,
    *,
    epsilon: float = 1.0,
    **options: Unpack[CrossEntropyOptions],
) -> Any:
    r"""Poly-1 loss: cross-entropy with a weight of its own on the first term of its expansion.

    With :math:`u = \log \mathrm{softmax}(x)`, :math:`p = e^u` and the coefficients :math:`a` of `cross_entropy`,

    .. math:: \ell = \sum_c a_c (-u_c + \epsilon (1 - p_c)) .

    Parameters
    ----------
    epsilon : float, default 1.0
        The weight of the first polynomial term, any finite number: -1 takes the first term of the expansion away,
        0 is `cross_entropy`.

    References
    ----------
    .. [1] Z. Leng et al., "PolyLoss: a polynomial expansion perspective of classification loss functions",
       ICLR 2022.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> print(f"{xce.poly_loss(logits, np.array([0, 2]), epsilon=1.0):.6f}")
    1.253822
    """
    return row_loss("poly_loss", check.real("epsilon", epsilon, check.ANY_FINITE), logits, target, options)


@takes(CrossEntropyOptions, like=cross_entropy)
def generalized_cross_entropy(
    logits: Array,
    target: Array | int,
    *,
    q: float = 0.7,
    **options: Unpack[CrossEntropyOptions],
) -> Any:
    r"""Generalized cross-entropy: between cross-entropy and mean absolute error, robust against wrong labels.

    With :math:`u = \log \mathrm{softmax}(x)`, :math:`p = e^u` and the coefficients :math:`a` of `cross_entropy`,

    .. math:: \ell = \sum_c a_c \frac{1 - p_c^q}{q} .

    Parameters
    ----------
    q : float, default 0.7
        The exponent, in [0, 1]. 1 is the mean absolute error, the limit 0 is `cross_entropy`.

    Notes
    -----
    Hessian diagonals of this loss can be negative.

    References
    ----------
    .. [1] Z. Zhang and M. R. Sabuncu, "Generalized cross entropy loss for training deep neural networks with
       noisy labels", NeurIPS 2018.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> print(f"{xce.generalized_cross_entropy(logits, np.array([0, 2]), q=0.7):.6f}")
    0.560547
    """
    return row_loss("generalized_cross_entropy", check.real("q", q, check.UNIT), logits, target, options)


@takes(NllOptions, like=cross_entropy)
def nll_loss(
    log_probs: Array,
    target: Array | int,
    **options: Unpack[NllOptions],
) -> Any:
    r"""Negative log-likelihood of class indices, given log-probabilities.

    .. math:: \ell = -s\, w_y u_y

    for log-probabilities :math:`u`, the label :math:`y`, class weights :math:`w` and sample weights :math:`s`.
    `cross_entropy` of the logits is faster and more accurate than this of their `log_softmax`.

    Parameters
    ----------
    log_probs : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Log-probabilities in nats. They are taken as they are: rows need not be normalised.
    target : array of integers, or of floats that are whole numbers, or int
        Class indices, of the shape of `log_probs` without `axis`.
    ignore_index : int, default -100
        Rows with this label count nothing and are not read: loss and derivatives are exactly 0. Any int64, also a
        class.
    sample_weight : array or number, optional
        Row weights of any sign: floating, integer or bool, finite, broadcastable to the shape of
        `log_probs` without `axis`. A weight of 0 removes its row, whatever that holds: loss and derivatives are 0, and
        nothing there is checked.
    return_grad, return_hess : bool, default False
        Also return the gradient, and the diagonal of the Hessian, of each row's reduced loss by `log_probs`.
    grad_out, hess_out : array, optional
        Arrays of the shape and dtype of `log_probs` to write the derivatives to. ``grad_out=log_probs`` overwrites
        them; any other shared memory is an error.
    validate : bool, default True
        False skips the checks that read the data: labels and weights. A bad label then makes its row NaN.

    Returns
    -------
    scalar or array, or tuple of it and arrays
        The loss in nats (float32, or float64 for float64 input), or ``(loss, grad)``, ``(loss, hess)``,
        ``(loss, grad, hess)``: the derivatives by `log_probs`, of its shape and dtype. The Hessian is 0. All
        arrays are of the kind and on the device of `log_probs`.

    References
    ----------
    .. [1] I. J. Good, "Rational decisions", Journal of the Royal Statistical Society B 14 (1952), 107-114.

    Examples
    --------
    >>> import numpy as np, xce
    >>> log_probs = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    >>> print(f"{xce.nll_loss(log_probs, np.array([0, 2])):.6f}")
    0.458145
    """
    return nll(log_probs, target, options)


@takes(DistillationOptions, like=cross_entropy)
def distillation_loss(
    student_logits: Array,
    teacher_logits: Array,
    *,
    teacher_indices: Array | None = None,
    divergence: Literal["forward", "reverse", "js"] = "forward",
    **options: Unpack[DistillationOptions],
) -> Any:
    r"""Divergence between the softmax of a student's and of a teacher's logits, and derivatives by the student's.

    With :math:`s = \mathrm{softmax}(x / T)` of the student and :math:`t = \mathrm{softmax}(y / T)` of the teacher,

    .. math::

        \mathrm{forward}\;\, \mathrm{KL}(t \| s) = \sum_c t_c \log \frac{t_c}{s_c}, \qquad
        \mathrm{reverse}\;\, \mathrm{KL}(s \| t), \qquad
        \mathrm{js}\;\, \tfrac12 \mathrm{KL}(t \| m) + \tfrac12 \mathrm{KL}(s \| m), \quad
        m = \tfrac12 (s + t) .

    Neither softmax is ever stored.

    Parameters
    ----------
    student_logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Unnormalised log-probabilities in nats. 16-bit logits are computed in float32.
    teacher_logits : array of any of these dtypes
        The teacher's, of the shape of `student_logits`, or of `teacher_indices`. They may be -inf.
    teacher_indices : array of integers, optional
        The classes that `teacher_logits` are of, distinct in each row: of the shape of `student_logits`, but with
        any number of classes, at least 1, on `axis`. The teacher is normalised over these; its probability of all
        other classes is 0, so that "reverse" would be infinite and is an error.
    temperature : float, default 1.0
        The divisor :math:`T` of both logits. The derivatives are those by the raw logits. Hinton et al. multiply
        the loss by :math:`T^2`; here that is left to the caller.
    divergence : {"forward", "reverse", "js"}, default "forward"
        Kullback-Leibler from the teacher's side or from the student's, or Jensen-Shannon.
    reduction : {"mean", "sum", "none"}, default "mean"
        "none" returns the loss of every row. "mean" divides the sum, and the derivatives, by the number of rows,
        or by the sum of their weights.
    sample_weight : array or number, optional
        Row weights of any sign: floating, integer or bool, finite, broadcastable to the shape of
        `student_logits` without `axis`. A weight of 0 removes its row, whatever that holds: loss and derivatives
        are 0, and nothing there is checked.
    where : array of bool, optional
        True where a class takes part, broadcastable to `student_logits`. Elsewhere student and teacher both have
        probability 0, and the derivatives are 0.
    grad_out, hess_out : array, optional
        Arrays of the shape and dtype of `student_logits` to write the derivatives to.
        ``grad_out=student_logits`` overwrites the logits; any other shared memory is an error.
    validate : bool, default True
        False skips the checks that read the data: indices and weights.

    Returns
    -------
    scalar or array, or tuple of it and arrays
        The loss in nats (float32, or float64 for float64 logits), or ``(loss, grad)``, ``(loss, hess)``,
        ``(loss, grad, hess)``. The derivatives have the shape and dtype of `student_logits`. All arrays are of
        the kind and on the device of `student_logits`.

    Raises
    ------
    LabelError
        An entry of `teacher_indices` is not a class.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, a class is there twice, a weight is not finite, or a buffer does not
        fit.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    Rows of padding are left out by a `sample_weight` of 0 or False. A NaN or +inf in a row of either, or a row of
    -inf only, makes that row NaN and no other. Where the teacher is -inf and the student is not, "reverse" is
    infinite, and so are the derivatives of its row: +inf for that class's gradient.

    The value is right to 16 units in the last place and the gradient to 32 of the row's largest entry, however close
    or far apart the two are and whatever is added to either's logits.

    References
    ----------
    .. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.
    .. [2] R. Agarwal et al., "On-policy distillation of language models", ICLR 2024 (reverse and Jensen-Shannon).

    Examples
    --------
    >>> import numpy as np, xce
    >>> student, teacher = np.array([[2.0, 1.0, 0.0]]), np.array([[1.0, 1.0, 0.0]])
    >>> print(f"{xce.distillation_loss(student, teacher):.6f}")
    0.123292
    >>> loss, grad = xce.distillation_loss(student, teacher, divergence="js", return_grad=True)
    >>> print(np.round(grad, 4))
    [[ 0.0569 -0.0416 -0.0153]]
    """
    return divergence_loss(student_logits, teacher_logits, teacher_indices, divergence, options)


_BINARY = ElementLoss("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits")
_MULTILABEL = _BINARY._replace(function="multilabel_soft_margin_loss")
_BINARY_OF_PROBS = ElementLoss("binary_cross_entropy", "binary_cross_entropy", name="probs", range=check.UNIT_INTERVAL)
_SIGMOID_FOCAL = ElementLoss("sigmoid_focal_loss", "sigmoid_focal_loss", factors=("weight", "alpha"))
_ASYMMETRIC = ElementLoss("asymmetric_loss", "asymmetric_loss")
_SOFT_MARGIN = ElementLoss("soft_margin_loss", "soft_margin_loss", kinds=SIGNS, target_range=None)
_KL_DIV = ElementLoss("kl_div", "kl_div", name="log_probs", kinds=check.FLOATS, target_range=check.NOT_NEGATIVE)
_KL_DIV_LOG = _KL_DIV._replace(formula="kl_div_log_target", target_range=None)


@takes(ElementOptions)
def binary_cross_entropy_with_logits(
    logits: Array,
    target: Array,
    *,
    weight: Array | float | None = None,
    pos_weight: Array | float | None = None,
    label_smoothing: float = 0.0,
    **options: Unpack[ElementOptions],
) -> Any:
    r"""Binary cross-entropy between logits and targets, element by element, with derivatives on demand.

    With :math:`\sigma(x) = 1 / (1 + e^{-x})`, targets :math:`y`, smoothing :math:`\varepsilon`,
    :math:`y' = (1 - \varepsilon) y + \varepsilon / 2` and positive weights :math:`P`,

    .. math::

        \ell = -P y' \log \sigma(x) - (1 - y') \log \sigma(-x), \qquad
        \ell' = (1 - y') \sigma(x) - P y' \sigma(-x), \qquad
        \ell'' = (P y' + 1 - y') \sigma(x) \sigma(-x) .

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape
        Log-odds in nats. 16-bit logits are computed in float32.
    target : array of bool, integers or floats, of the shape of `logits`
        Targets in [0, 1].
    weight : array of bool, integers or floats, or one number, optional
        Factors of the elements, finite and of any sign, broadcastable to the shape of `logits`. A factor of 0
        removes its element, whatever logits and target hold there; "mean" counts it, as all elements, as 1.
    pos_weight : array of bool, integers or floats, or one number, optional
        Factors of the positive terms, finite and not negative, broadcastable to the shape of `logits`: of shape (C,)
        for logits of shape (N, C), one for each class.
    label_smoothing : float, default 0.0
        The share of the target, in [0, 1], that is spread evenly over both answers.

    Returns
    -------
    scalar or array, or tuple of it and arrays
        The loss in nats (float32, or float64 for float64 input), or ``(loss, grad)``, ``(loss, hess)``,
        ``(loss, grad, hess)``. The derivatives have the shape and dtype of the first argument. All arrays are
        of its kind and on its device.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, a target (or probability) is out of range, a weight is not finite, a
        `pos_weight` is negative, or a buffer does not fit.

    Notes
    -----
    Nothing cancels: ``loss(x, 1) == loss(-x, 0)`` exactly, for every `label_smoothing`, and an infinite logit of the
    right sign has the loss 0. Without elements, "mean" is NaN and "sum" is 0. Where the weights sum to 0, "mean" is
    NaN, and so are its derivatives at elements whose own weight is not 0. An error leaves every buffer untouched.

    A float32 loss is too coarse for the finite differences by which an optimiser replaces a missing gradient: pass
    it the gradient (``return_grad=True``; ``jac=True`` in SciPy), or give float64.

    References
    ----------
    .. [1] D. R. Cox, "The regression analysis of binary sequences", Journal of the Royal Statistical Society B 20
       (1958), 215-242.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits, target = np.array([2.0, -1.0, 0.0]), np.array([1, 0, 1])
    >>> loss, grad = xce.binary_cross_entropy_with_logits(logits, target, return_grad=True)
    >>> print(f"{loss:.6f}", np.round(grad, 4))
    0.377779 [-0.0397  0.0896 -0.1667]
    >>> xce.binary_cross_entropy_with_logits(logits, np.array([1, 0, 2]))
    Traceback (most recent call last):
        ...
    ValueError: target[2] = 2 is not allowed: expected targets between 0 and 1
    """
    smoothing = check.real("label_smoothing", label_smoothing, check.UNIT)
    params = 1 - smoothing, smoothing / 2
    return element_loss(_BINARY, params, logits, target, options, (weight, pos_weight))


@takes(ElementOptions, like=binary_cross_entropy_with_logits)
def binary_cross_entropy(
    probs: Array,
    target: Array,
    *,
    weight: Array | float | None = None,
    log_clamp: float | None = -100.0,
    **options: Unpack[ElementOptions],
) -> Any:
    r"""Binary cross-entropy between probabilities and targets, element by element.

    For probabilities :math:`p`, targets :math:`y` and the bound :math:`c` (`log_clamp`),

    .. math::

        \ell = -y \max(\log p, c) - (1 - y) \max(\log(1 - p), c), \qquad
        \ell' = \frac{p - y}{\max(p (1 - p), 10^{-12})} .

    `binary_cross_entropy_with_logits` of the logits is more accurate than this of their sigmoid.

    Parameters
    ----------
    probs : array of float16, bfloat16, float32 or float64, any shape
        Probabilities, in [0, 1].
    target : array of bool, integers or floats, of the shape of `probs`
        Targets in [0, 1].
    weight : array of bool, integers or floats, or one number, optional
        Factors of the elements, finite and of any sign, broadcastable to the shape of `probs`. A factor of 0 removes
        its element, whatever probabilities and target hold there; "mean" counts it, as all elements, as 1.
    log_clamp : float, optional, default -100.0
        The least value of a logarithm; None leaves them as they are, so that a certain and wrong probability
        has the loss +inf. Derivatives ignore it.
    sample_weight : array of bool, integers or floats, or one number, optional
        Factors of the elements that "mean" counts, finite and of any sign, broadcastable to the shape of `probs`.
        A factor of 0 removes its element, whatever probabilities and target hold there, from the denominator as well.
    validate : bool, default True
        False skips the checks that read the data: probabilities, targets and weights. Elements that a weight of 0
        removes are never checked.

    References
    ----------
    .. [1] D. R. Cox, "The regression analysis of binary sequences", Journal of the Royal Statistical Society B 20
       (1958), 215-242.

    Examples
    --------
    >>> import numpy as np, xce
    >>> probs, target = np.array([0.9, 0.2, 0.5]), np.array([1, 0, 1])
    >>> print(f"{xce.binary_cross_entropy(probs, target):.6f}")
    0.340550
    >>> xce.binary_cross_entropy(np.array([0.9, 1.2]), np.array([1, 0]))
    Traceback (most recent call last):
        ...
    ValueError: probs[1] = 1.2 is not allowed: expected probabilities between 0 and 1
    """
    clamp = check.real("log_clamp", log_clamp, check.AT_MOST_0, or_none=True)
    params = (-math.inf if clamp is None else clamp,)
    return element_loss(_BINARY_OF_PROBS, params, probs, target, options, (weight, None))


@takes(ElementOutputs, like=binary_cross_entropy_with_logits)
def sigmoid_focal_loss(
    logits: Array,
    target: Array,
    *,
    alpha: Array | float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "none",
    **options: Unpack[ElementOutputs],
) -> Any:
    r"""Sigmoid focal loss: binary cross-entropy that counts elements less the better they are classified.

    With :math:`p = \sigma(x)`, :math:`p_t = y p + (1 - y)(1 - p)` and
    :math:`\alpha_t = y \alpha + (1 - y)(1 - \alpha)`,

    .. math:: \ell = -\alpha_t (1 - p_t)^\gamma \, (y \log p + (1 - y) \log(1 - p)) .

    Parameters
    ----------
    alpha : float, array of floats or None, default 0.25
        The weight of positive targets, in [0, 1]; negatives get 1 - alpha. None or -1: no balancing. An array,
        broadcastable to the shape of `logits`, has one for each class of the last axis.
    gamma : float, default 2.0
        The exponent, finite and not negative.
    reduction : {"none", "mean", "sum"}, default "none"
        "none" returns the loss of every element. "mean" divides the sum, and the derivatives, by the number of
        elements or, with sample weights, by the sum of those.

    Notes
    -----
    Second derivatives of this loss can be negative.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017; arguments and numbers are those of
       torchvision's function of this name.

    Examples
    --------
    >>> import numpy as np, xce
    >>> print(np.round(xce.sigmoid_focal_loss(np.array([2.0, -1.0, 0.0]), np.array([1, 0, 1])), 6))
    [0.000451 0.016994 0.043322]
    """
    alpha = check.unboxed("alpha", alpha)
    is_number = alpha is None or isinstance(alpha, int | float)
    share = (-1.0 if alpha is None else check.real("alpha", alpha, check.ALPHA)) if is_number else 0.0
    # gamma, alpha or -1 where each class has its own, and whether there is one
    params = check.real("gamma", gamma), max(share, 0.0) if is_number else -1.0, float(share >= 0)
    factors = None, None if is_number else alpha
    own = check.choice("reduction", reduction, check.REDUCTIONS)
    return element_loss(_SIGMOID_FOCAL, params, logits, target, options, factors, reduction=own)


@takes(ElementOptions, like=binary_cross_entropy_with_logits)
def asymmetric_loss(
    logits: Array,
    target: Array,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    clip: float = 0.05,
    **options: Unpack[ElementOptions],
) -> Any:
    r"""Asymmetric loss for many labels of which few are positive.

    With :math:`p = \sigma(x)` and the shifted probability :math:`p_m = \max(p - m, 0)`, :math:`m` being `clip`,

    .. math:: \ell = \begin{cases}
        -(1 - p)^{\gamma_+} \log p & \text{for the target 1} \\
        -p_m^{\gamma_-} \log(1 - p_m) & \text{for the target 0}
        \end{cases}

    and, between them, :math:`-(1 - q)^\gamma (y \log p + (1 - y) \log(1 - p_m))` with
    :math:`q = y p + (1 - y)(1 - p_m)` and :math:`\gamma = y \gamma_+ + (1 - y) \gamma_-`.

    Parameters
    ----------
    gamma_pos, gamma_neg : float, default 0.0 and 4.0
        The exponents of positive and negative targets, finite and not negative.
    clip : float, default 0.05
        The shift of the probability of negative targets, in [0, 1): those below it count nothing.

    Notes
    -----
    Second derivatives of this loss can be negative. timm's modules have ``gamma_pos=1.0``, take the sum, and bound
    the logarithms at log(1e-8); here they have no bound.

    References
    ----------
    .. [1] T. Ridnik et al., "Asymmetric loss for multi-label classification", ICCV 2021.

    Examples
    --------
    >>> import numpy as np, xce
    >>> loss = xce.asymmetric_loss(np.array([2.0, 0.5, 0.0]), np.array([1, 0, 1]), reduction="none")
    >>> print(np.round(loss, 4))
    [0.1269 0.0913 0.6931]
    """
    gammas = check.real("gamma_pos", gamma_pos), check.real("gamma_neg", gamma_neg)
    clip = check.real("clip", clip, check.BELOW_1)
    params = (*gammas, clip, *(logit_in_two_parts(clip) if clip else (0.0, 0.0)))
    return element_loss(_ASYMMETRIC, params, logits, target, options)


@takes(ElementOptions, like=binary_cross_entropy_with_logits)
def soft_margin_loss(
    logits: Array,
    target: Array,
    **options: Unpack[ElementOptions],
) -> Any:
    r"""Logistic loss of targets -1 and 1.

    .. math:: \ell = \log(1 + e^{-y x})

    Parameters
    ----------
    target : array of integers or floats, of the shape of `logits`
        Targets, -1 or 1; any other number will do, too, but a loss of 0 and 1 is
        `binary_cross_entropy_with_logits`.
    validate : bool, default True
        False skips the check of the weights.

    References
    ----------
    .. [1] J. Friedman, T. Hastie and R. Tibshirani, "Additive logistic regression: a statistical view of boosting",
       Annals of Statistics 28 (2000), 337-407.

    Examples
    --------
    >>> import numpy as np, xce
    >>> print(f"{xce.soft_margin_loss(np.array([2.0, -1.0, 0.0]), np.array([1, -1, 1])):.6f}")
    0.377779
    """
    return element_loss(_SOFT_MARGIN, (), logits, target, options)


@takes(ElementOptions, like=binary_cross_entropy_with_logits)
def multilabel_soft_margin_loss(
    logits: Array,
    target: Array,
    *,
    weight: Array | None = None,
    axis: int = -1,
    **options: Unpack[ElementOptions],
) -> Any:
    r"""Binary cross-entropy of several labels a sample, averaged over the classes.

    .. math:: \ell = -\frac1C \sum_c w_c \bigl(y_c \log \sigma(x_c) + (1 - y_c) \log \sigma(-x_c)\bigr)

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Log-odds in nats. 16-bit logits are computed in float32.
    weight : array of bool, integers or floats of shape (C,), optional
        Class weights, finite and not negative. A weight of 0 removes its class.
    axis : int, default -1
        The class axis.
    reduction : {"mean", "sum", "none"}, default "mean"
        "none" returns the loss of every row. "mean" divides the sum, and the derivatives, by the number of rows,
        or by the sum of their weights.
    sample_weight : array of bool, integers or floats, or one number, optional
        Row weights, finite and of any sign, broadcastable to the shape of `logits` without `axis`. A weight of 0
        removes its row, whatever it holds.

    References
    ----------
    .. [1] D. R. Cox, "The regression analysis of binary sequences", Journal of the Royal Statistical Society B 20
       (1958), 215-242; arguments and numbers are those of PyTorch's function of this name.

    Examples
    --------
    >>> import numpy as np, xce
    >>> logits, target = np.array([[2.0, -1.0, 0.0]]), np.array([[1, 0, 1]])
    >>> print(f"{xce.multilabel_soft_margin_loss(logits, target):.6f}")
    0.377779
    """
    return element_loss(_MULTILABEL, (1.0, 0.0), logits, target, options, (weight, None), axis)


@takes(ElementOutputs, like=binary_cross_entropy_with_logits)
def kl_div(
    log_probs: Array,
    target: Array,
    *,
    log_target: bool = False,
    reduction: Literal["mean", "batchmean", "sum", "none"] = "mean",
    **options: Unpack[ElementOutputs],
) -> Any:
    r"""Terms of the Kullback-Leibler divergence, element by element, given log-probabilities.

    For log-probabilities :math:`u` and targets :math:`t`, or their logarithms :math:`v`,

    .. math:: \ell = t (\log t - u) = e^v (v - u) .

    `distillation_loss` of the logits is faster and more accurate than this of their `log_softmax`.

    Parameters
    ----------
    log_probs : array of float16, bfloat16, float32 or float64, any shape
        Log-probabilities in nats.
    target : array of floats, of the shape of `log_probs`
        Probabilities, not negative, or their logarithms.
    log_target : bool, default False
        Whether `target` holds logarithms.
    reduction : {"mean", "batchmean", "sum", "none"}, default "mean"
        "none" returns the term of every element. "mean" divides the sum, and the derivatives, by the number of
        elements, "batchmean" by the length of the first axis, which makes the divergence of it; with sample
        weights, each element's share is multiplied by its own.
    sample_weight : array of bool, integers or floats, or one number, optional
        Factors of the elements that "mean" and "batchmean" count, finite and of any sign, broadcastable to the shape
        of `log_probs`. A factor of 0 removes its element, whatever it holds.

    Notes
    -----
    A target of 0 has the term 0, whatever its log-probability is. The second derivative is 0. A term errs by a few
    units in its last place and, where log t - u cancels, by an eighth of one in that of t; with `log_target` it does
    not cancel.

    References
    ----------
    .. [1] S. Kullback and R. A. Leibler, "On information and sufficiency", Annals of Mathematical Statistics 22
       (1951), 79-86.

    Examples
    --------
    >>> import numpy as np, xce
    >>> log_probs, target = np.log([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    >>> print(f"{xce.kl_div(log_probs, target, reduction='batchmean'):.6f}")
    0.255413
    """
    loss = _KL_DIV_LOG if check.flag("log_target", log_target) else _KL_DIV
    own = check.choice("reduction", reduction, (*check.REDUCTIONS, "batchmean"))
    return element_loss(loss, (), log_probs, target, options, reduction=own)


@takes(MapOptions)
def softmax(
    x: Array,
    axis: int | tuple[int, ...] | None = -1,
    *,
    out: Array | None = None,
    **options: Unpack[MapOptions],
) -> Any:
    r"""Softmax, the probabilities of logits.

    .. math:: p_k = e^{x_k / T} \Big/ \sum_c e^{x_c / T}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis; or list or tuple of numbers
        Logits in nats. 16-bit logits are computed in float32. Lists become arrays of NumPy, their integers float64.
    axis : int, tuple of ints or None, default -1
        The class axis, or several that are taken as one; None takes all of them.
    temperature : float, default 1.0
        The divisor :math:`T` of the logits.
    where : array of bool, optional
        Broadcast to `x`; False removes a class from its row, whatever it holds.
    out : array of the shape and dtype of `x`, optional
        Array to write the result to. It may be `x` itself.

    Returns
    -------
    array
        Probabilities, of the shape, dtype and kind of `x`.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option is not allowed, there is no class, or `out` does not fit.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    A NaN or +inf in a row, or a row of -inf only, makes that row NaN and no other. A class that `where` removes has
    probability 0, also in a row of which nothing is left.

    References
    ----------
    .. [1] J. S. Bridle, "Probabilistic interpretation of feedforward classification network outputs", in
       Neurocomputing, NATO ASI Series 68 (1990), 227-236.

    Examples
    --------
    >>> import numpy as np, xce
    >>> print(np.round(xce.softmax(np.array([2.0, 1.0, 0.0])), 4))
    [0.6652 0.2447 0.09  ]
    """
    return transform("softmax", x, axis, out, options)


@takes(MapOptions)
def log_softmax(
    x: Array,
    axis: int | tuple[int, ...] | None = -1,
    *,
    out: Array | None = None,
    **options: Unpack[MapOptions],
) -> Any:
    r"""Logarithm of the softmax, without its underflow.

    .. math:: u_k = x_k / T - \log \sum_c e^{x_c / T}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis; or list or tuple of numbers
        Logits in nats. 16-bit logits are computed in float32. Lists become arrays of NumPy, their integers float64.
    axis : int, tuple of ints or None, default -1
        The class axis, or several that are taken as one; None takes all of them.
    temperature : float, default 1.0
        The divisor :math:`T` of the logits.
    where : array of bool, optional
        Broadcast to `x`; False removes a class from its row, whatever it holds.
    out : array of the shape and dtype of `x`, optional
        Array to write the result to. It may be `x` itself.

    Returns
    -------
    array
        Log-probabilities in nats, of the shape, dtype and kind of `x`.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option is not allowed, there is no class, or `out` does not fit.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    A NaN or +inf in a row, or a row of -inf only, makes that row NaN and no other. A class that `where` removes has
    log-probability -inf, also in a row of which nothing is left.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
       functions", IMA Journal of Numerical Analysis 41 (2021), 2311-2330.

    Examples
    --------
    >>> import numpy as np, xce
    >>> print(np.round(xce.log_softmax(np.array([1000.0, 0.0])), 4))
    [    0. -1000.]
    """
    return transform("log_softmax", x, axis, out, options)


def logsumexp(
    x: Array,
    axis: int | tuple[int, ...] | None = -1,
    b: Array | float | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    where: Array | None = None,
    n_threads: int | None = None,
) -> Any:
    r"""Logarithm of a sum of exponentials, without their overflow.

    .. math:: \mathrm{lse} = \log \sum_c b_c e^{x_c}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis; or list or tuple of numbers
        Logits in nats. 16-bit logits are computed in float32. Lists become arrays of NumPy, their integers float64.
    axis : int, tuple of ints or None, default -1
        The class axis, or several that are taken as one; None takes all of them.
    b : array or list of real numbers, or number, optional
        Factors of the exponentials, broadcast to `x`, of any sign. Where one is 0, `x` is not read.
    keepdims : bool, default False
        Keep `axis`, with length 1.
    return_sign : bool, default False
        Return the sign of the sum, too, and the logarithm of its absolute value. Without it, the logarithm of a
        negative sum is NaN.
    where : array of bool, optional
        Broadcast to `x`; False removes a class from its row, whatever it holds.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.

    Returns
    -------
    scalar or array
        The log-sum-exp in nats, of the shape of `x` without `axis`: float64 of float64 logits, else float32, also of
        16-bit logits, for which SciPy rounds it to 16 bits.
    sign : scalar or array
        1, 0, -1 or NaN, likewise; only with ``return_sign=True``.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        An option is not allowed.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    A row without classes, of -inf only, or of which `where` leaves nothing, gives -inf, a row with +inf gives +inf, a
    row with NaN gives NaN. The arguments are those of ``scipy.special.logsumexp``, except that `axis` is -1 by
    default. With `b`, sums are formed in float64.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
       functions", IMA Journal of Numerical Analysis 41 (2021), 2311-2330.

    Examples
    --------
    >>> import numpy as np, xce
    >>> print(f"{xce.logsumexp(np.array([1000.0, 1000.0])):.6f}")
    1000.693147
    """
    return log_sum_exp(x, axis, b, keepdims, return_sign, where, n_threads)


@takes(StatsOptions)
def logit_stats(
    logits: Array,
    target: Array | int,
    **options: Unpack[StatsOptions],
) -> LogitStats:
    r"""Row statistics of logits that metrics are made of, in one pass.

    .. math::

        \mathrm{lse} = \log \sum_c e^{x_c}, \qquad \mathrm{rank} = \#\{c : x_c > x_y\}, \qquad
        H = -\sum_c p_c \log p_c

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Unnormalised log-probabilities in nats. 16-bit logits are computed in float32.
    target : array of integers, or of floats that are whole numbers, or int
        Class indices, of the shape of `logits` without `axis`.
    ignore_index : int, default -100
        Rows with this label have target logit NaN and rank -1; their other statistics are those of any row.
    validate : bool, default True
        False skips the check of the labels; a row with a bad label is then treated as ignored.

    Returns
    -------
    LogitStats
        ``(lse, target_logit, argmax, rank, entropy)``, each of the shape of `logits` without `axis`. The
        row's cross-entropy is ``lse - target_logit``, up to rounding: `cross_entropy` is more accurate.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    `lse` is that of `logsumexp`; `entropy` is NaN for a row without a finite largest logit. A row with a NaN
    has rank -1, and the position of its first NaN as argmax.

    References
    ----------
    .. [1] C. E. Shannon, "A mathematical theory of communication", Bell System Technical Journal 27 (1948),
       379-423.

    Examples
    --------
    >>> import numpy as np, xce
    >>> stats = xce.logit_stats(np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), np.array([0, 2]))
    >>> print(stats.argmax, stats.rank, np.round(stats.entropy, 4))
    [0 1] [0 1] [0.8324 0.5243]
    """
    return logit_statistics(logits, target, options)


@takes(LinearOptions)
def linear_cross_entropy(
    inputs: Array,
    linear_weight: Array,
    target: Array | int,
    *,
    linear_bias: Array | None = None,
    chunk_rows: int | None = None,
    **options: Unpack[LinearOptions],
) -> Any:
    r"""Cross-entropy of a linear layer's logits, which are never in memory all at once.

    With inputs :math:`x_i`, the layer's weights :math:`W` and bias :math:`b`, and :math:`\ell_i` the loss that
    `cross_entropy` gives row :math:`i` of the logits :math:`z_i = W x_i + b`, its reduction included,

    .. math::

        \ell = \sum_i \ell_i, \qquad g_i = \frac{\partial \ell_i}{\partial z_i}, \qquad
        \frac{\partial \ell}{\partial x_i} = W^\top g_i, \qquad
        \frac{\partial \ell}{\partial W} = \sum_i g_i x_i^\top, \qquad
        \frac{\partial \ell}{\partial b} = \sum_i g_i .

    The rows go through the layer in chunks, and each chunk of logits is overwritten by its gradient.

    Parameters
    ----------
    inputs : array of float16, bfloat16, float32 or float64, of shape (..., D)
        Features, of any number of rows. 16-bit arrays are computed in float32.
    linear_weight : array of the dtype of `inputs`, of shape (C, D)
        The layer's weights, a row for each class, as PyTorch stores them.
    target : array
        Class indices: integers, or floats that are whole numbers, of the shape of `inputs` without the last axis
        (an int will do for inputs of shape (D,)). Or probabilities: any floating dtype, of shape (..., C), not
        negative; rows need not sum to 1.
    linear_bias : array of the dtype of `inputs`, of shape (C,), optional
        The layer's bias; -inf removes a class.
    chunk_rows : int, optional
        The number of rows whose logits are in memory at a time. None: as many as fit into 128 MiB, at least
        one; on a GPU, into a 32nd of its memory, at most 4096.
    weight : array of shape (C,), optional
        Class weights of the loss: floating, integer or bool, finite and not negative.
    ignore_index : int, default -100
        Rows with this label count nothing, and nothing is computed for them. Any int64, also a class. Without
        effect on probabilities.
    where : array of bool, broadcastable to (..., C), optional
        False removes a class: its logit gets probability and gradient 0 and no share of the smoothing. A row
        that is left without a class counts nowhere.
    temperature : float, default 1.0
        The logits are divided by it, after `softcap`.
    z_loss : float, default 0.0
        Adds ``z_loss * lse**2`` to the loss of a row, as in `cross_entropy`.
    reduction : {"mean", "sum", "none"}, default "mean"
        As in `cross_entropy`; "mean" divides by the denominator of all rows. With "none" the gradients of
        `linear_weight` and `linear_bias` are those of the sum of the rows.
    sample_weight : array or number, optional
        Row weights of any sign: floating, integer or bool, finite, broadcastable to the shape of
        `inputs` without the last axis. A weight of 0 removes its row, whatever that holds: loss and derivatives
        are 0, and nothing there is checked.
    return_grad : bool, default False
        Also return the gradients by `inputs`, `linear_weight` and `linear_bias`.
    grad_out : tuple of three arrays or None, optional
        Arrays of the shapes and dtypes of `inputs`, `linear_weight` and `linear_bias` to write the gradients
        to, or None for a new one. The first may be `inputs`, which is overwritten; any other shared memory is
        an error. The other two may be of float32 where the parameters have 16 bits.
    n_threads : int, optional
        Upper bound on the number of threads of the loss. Those of the matrix products are the BLAS library's.
    validate : bool, default True
        False skips the checks that read the data: labels, probabilities and weights. A bad label then makes
        its row NaN.

    Returns
    -------
    scalar or array, or tuple of it and a tuple of arrays
        The loss in nats (float32, or float64 for float64 inputs), or ``(loss, (d_inputs, d_weight, d_bias))``,
        the gradients of the shapes and dtypes of what they belong to; `d_bias` is None without a bias. All
        arrays are of the kind and on the device of `inputs`.

    Raises
    ------
    LabelError
        A label is neither a class nor `ignore_index`.
    TypeError
        An argument is of the wrong kind or dtype, or the arrays come from different libraries.
    ValueError
        An option or shape is not allowed, a probability or weight is negative or NaN, or a buffer does not
        fit.

    Notes
    -----
    Beyond its outputs a call needs the memory of a chunk and some 30 MiB, whatever the sizes; arrays of libraries
    that have no kernels are computed at once. The products depend in their last digits on the BLAS
    library, its threads and `chunk_rows`, and so does the result.

    16-bit gradients of the parameters are rounded after each chunk; with many chunks, give buffers of float32. On a
    GPU they are rounded once: several chunks add up in float32, in the buffer itself if it is of float32.

    What is not finite in `linear_weight` makes the gradients of all inputs NaN, as it does in the product. The
    other edges are those of `cross_entropy`. An error leaves every buffer untouched.

    References
    ----------
    .. [1] E. Wijmans et al., "Cut your losses in large-vocabulary language models", arXiv:2411.09009 (2024).
    .. [2] P.-L. Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", arXiv:2410.10989 (2024)
       (chunks of rows, with gradients in place of logits).

    Examples
    --------
    >>> import numpy as np, xce
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> w = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    >>> labels = np.array([0, 1, 2])
    >>> loss, (dx, dw, db) = xce.linear_cross_entropy(x, w, labels, return_grad=True)
    >>> print(f"{loss:.6f} {xce.cross_entropy(x @ w.T, labels):.6f}")
    0.817669 0.817669
    >>> print(np.round(dw, 4), db)
    [[-0.146   0.1053]
     [ 0.1104 -0.3075]
     [-0.0333  0.1384]
     [ 0.0689  0.0638]] None
    """
    return linear(inputs, linear_weight, target, linear_bias, chunk_rows, options)
