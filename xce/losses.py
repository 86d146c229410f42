"""The public functions: signature, documentation, and three lines each."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from xce._call import Array, LogitStats, finish, finish_linear, normalise, normalise_linear, normalise_map
from xce._dispatch import owner_of

__all__ = [
    "LogitStats", "cross_entropy", "linear_cross_entropy", "log_softmax", "logit_stats", "logsumexp", "softmax"
]  # fmt: skip

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Array,
    target: Array | int,
    *,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    where: Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    axis: int = -1,
    reduction: Reduction = "mean",
    sample_weight: Array | None = None,
    return_grad: bool = False,
    return_hess: bool = False,
    grad_out: Array | None = None,
    hess_out: Array | None = None,
    n_threads: int | None = None,
    validate: bool = True,
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
        Class indices: any integer dtype, the shape of `logits` without `axis` (an int will do for logits of
        shape (C,)). Or probabilities: any floating dtype, the shape of `logits`, not negative; rows need not
        sum to 1.
    weight : array of shape (C,), optional
        Class weights, floating, finite and not negative.
    ignore_index : int, default -100
        Rows with this label count nothing and are not read: loss and derivatives are exactly 0. Any int64,
        also a class. Without effect on probabilities.
    label_smoothing : float, default 0.0
        The share of the target, in [0, 1], that is spread evenly over the classes.
    where : array of bool, broadcastable to the shape of `logits`, optional
        False removes a class: it gets probability and gradient 0 and no share of the smoothing, and is not
        read.
    temperature : float, default 1.0
        The logits are divided by it, after `softcap`. The derivatives are those by the raw logits.
    softcap : float, optional
        Replaces the logits by ``softcap * tanh(logits / softcap)``; -inf stays -inf.
    z_loss : float, default 0.0
        Adds ``z_loss * lse**2`` to the loss of a row, with `lse` the log-sum-exp of its logits as
        transformed. The sample weight multiplies it, the class weights do not.
    axis : int, default -1
        The class axis.
    reduction : {"mean", "sum", "none"}, default "mean"
        "none" returns the loss of every row. "mean" divides the sum, and the derivatives, by the number of
        rows not ignored; with class weights and class indices by the sum of ``weight[target]``; with sample
        weights by the sum over rows of the sample weight times that.
    sample_weight : array, optional
        Row weights, floating, finite and not negative, broadcastable to the shape of `logits` without `axis`.
    return_grad, return_hess : bool, default False
        Also return the gradient, and the diagonal of the Hessian, of each row's reduced loss by its logits.
    grad_out, hess_out : array, optional
        Arrays of the shape and dtype of `logits` to write the derivatives to. ``grad_out=logits`` overwrites
        the logits; any other shared memory is an error.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.
    validate : bool, default True
        False skips the checks that read the data: labels, probabilities and weights. A bad label then makes
        its row NaN.

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
    gradient, and a coefficient of 0 makes its term 0 even there. An error leaves every buffer untouched.

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
    xce._errors.LabelError: target[1] = 3 is out of range: labels of 3 classes are 0..2, or ignore_index=-100
    """
    owner = owner_of(logits, "logits")
    # fmt: off
    call = normalise(
        owner, "loss", "cross_entropy", 0.0, logits, axis, target, weight, sample_weight, where, ignore_index,
        label_smoothing, temperature, softcap, z_loss, reduction, return_grad, return_hess, grad_out,
        hess_out, n_threads, validate,
    )
    # fmt: on
    return finish(owner, call, owner.run(call))


def softmax(
    x: Array,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    out: Array | None = None,
    n_threads: int | None = None,
) -> Any:
    r"""Softmax, the probabilities of logits.

    .. math:: p_k = e^{x_k / T} \Big/ \sum_c e^{x_c / T}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Logits in nats. 16-bit logits are computed in float32.
    axis : int, default -1
        The class axis.
    temperature : float, default 1.0
        The divisor :math:`T` of the logits.
    out : array of the shape and dtype of `x`, optional
        Array to write the result to. It may be `x` itself.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.

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
    A NaN or +inf in a row, or a row of -inf only, makes that row NaN and no other.

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
    owner = owner_of(x, "x")
    call = normalise_map(owner, "softmax", x, axis, temperature, out, n_threads)
    return owner.wrap(owner.run(call))


def log_softmax(
    x: Array,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    out: Array | None = None,
    n_threads: int | None = None,
) -> Any:
    r"""Logarithm of the softmax, without its underflow.

    .. math:: u_k = x_k / T - \log \sum_c e^{x_c / T}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Logits in nats. 16-bit logits are computed in float32.
    axis : int, default -1
        The class axis.
    temperature : float, default 1.0
        The divisor :math:`T` of the logits.
    out : array of the shape and dtype of `x`, optional
        Array to write the result to. It may be `x` itself.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.

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
    A NaN or +inf in a row, or a row of -inf only, makes that row NaN and no other.

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
    owner = owner_of(x, "x")
    call = normalise_map(owner, "log_softmax", x, axis, temperature, out, n_threads)
    return owner.wrap(owner.run(call))


def logsumexp(x: Array, *, axis: int = -1, keepdims: bool = False, n_threads: int | None = None) -> Any:
    r"""Logarithm of the sum of exponentials, without their overflow.

    .. math:: \mathrm{lse} = \log \sum_c e^{x_c}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Logits in nats. 16-bit logits are computed in float32.
    axis : int, default -1
        The class axis.
    keepdims : bool, default False
        Keep `axis`, with length 1.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.

    Returns
    -------
    scalar or array
        The log-sum-exp in nats, float32 or, of float64 logits, float64, of the shape of `x` without `axis`.

    Raises
    ------
    TypeError
        An argument is of the wrong kind or dtype.
    ValueError
        An option is not allowed, or there is no class.
    numpy.exceptions.AxisError
        `axis` is out of range.

    Notes
    -----
    A row of -inf only gives -inf, a row with +inf gives +inf, a row with NaN gives NaN.

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
    owner = owner_of(x, "x")
    call = normalise_map(owner, "logsumexp", x, axis, n_threads=n_threads)
    lse = owner.run(call)
    return owner.wrap(lse[(slice(None),) * call.axis + (None, ...)] if keepdims else lse)


def logit_stats(
    logits: Array,
    target: Array | int,
    *,
    axis: int = -1,
    ignore_index: int = -100,
    n_threads: int | None = None,
    validate: bool = True,
) -> LogitStats:
    r"""Row statistics of logits that metrics are made of, in one pass.

    .. math::

        \mathrm{lse} = \log \sum_c e^{x_c}, \qquad \mathrm{rank} = \#\{c : x_c > x_y\}, \qquad
        H = -\sum_c p_c \log p_c

    Parameters
    ----------
    logits : array of float16, bfloat16, float32 or float64, any shape with a class axis
        Unnormalised log-probabilities in nats. 16-bit logits are computed in float32.
    target : array of integers, or int
        Class indices, of the shape of `logits` without `axis`.
    axis : int, default -1
        The class axis.
    ignore_index : int, default -100
        Rows with this label have target logit NaN and rank -1; their other statistics are those of any row.
    n_threads : int, optional
        Upper bound on the number of threads. The result does not depend on it.
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
    owner = owner_of(logits, "logits")
    # fmt: off
    call = normalise(
        owner, "stats", "", 0.0, logits, axis, target, ignore_index=ignore_index, n_threads=n_threads,
        validate=validate,
    )
    # fmt: on
    return LogitStats(*map(owner.wrap, owner.run(call)))


def linear_cross_entropy(
    inputs: Array,
    linear_weight: Array,
    target: Array | int,
    *,
    linear_bias: Array | None = None,
    chunk_rows: int | None = None,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    where: Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    sample_weight: Array | None = None,
    return_grad: bool = False,
    grad_out: tuple[Array | None, Array | None, Array | None] | None = None,
    n_threads: int | None = None,
    validate: bool = True,
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
        Class indices: any integer dtype, the shape of `inputs` without the last axis (an int will do for
        inputs of shape (D,)). Or probabilities: any floating dtype, of shape (..., C), not negative; rows need
        not sum to 1.
    linear_bias : array of the dtype of `inputs`, of shape (C,), optional
        The layer's bias; -inf removes a class.
    chunk_rows : int, optional
        The number of rows whose logits are in memory at a time. None: as many as fit into 128 MiB, at least
        one.
    weight : array of shape (C,), optional
        Class weights of the loss, floating, finite and not negative.
    ignore_index : int, default -100
        Rows with this label count nothing, and nothing is computed for them. Any int64, also a class. Without
        effect on probabilities.
    label_smoothing : float, default 0.0
        The share of the target, in [0, 1], that is spread evenly over the classes.
    where : array of bool, broadcastable to (..., C), optional
        False removes a class: its logit gets probability and gradient 0 and no share of the smoothing.
    temperature : float, default 1.0
        The logits are divided by it, after `softcap`.
    softcap : float, optional
        Replaces the logits by ``softcap * tanh(logits / softcap)``; -inf stays -inf.
    z_loss : float, default 0.0
        Adds ``z_loss * lse**2`` to the loss of a row, as in `cross_entropy`.
    reduction : {"mean", "sum", "none"}, default "mean"
        As in `cross_entropy`; "mean" divides by the denominator of all rows. With "none" the gradients of
        `linear_weight` and `linear_bias` are those of the sum of the rows.
    sample_weight : array, optional
        Row weights, floating, finite and not negative, broadcastable to the shape of `inputs` without the last
        axis.
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

    16-bit gradients of the parameters are rounded after each chunk; with many chunks, give buffers of float32.

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
    owner = owner_of(inputs, "inputs")
    call = normalise_linear(
        owner, inputs, linear_weight, target, linear_bias, chunk_rows, weight, sample_weight, where, grad_out,
        ignore_index=ignore_index, label_smoothing=label_smoothing, temperature=temperature, softcap=softcap,
        z_loss=z_loss, reduction=reduction, return_grad=return_grad, n_threads=n_threads, validate=validate,
    )  # fmt: skip
    return finish_linear(owner, call, owner.run_linear(call))
