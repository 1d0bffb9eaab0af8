"""The operators, as functions on tensors.

The following holds for all of them:

- ``logits`` is a matrix [N, V] in bfloat16, float16 or float32; on the CPU it may also be float64. Its rows may lie any
  distance apart, and its last dimension must be contiguous. V is at least 1 and at most 2^23; N may be 0.
- ``embedding``, called E in the formulas, is a matrix [V, d] in bfloat16, float16 or float32, or in float64 if and only
  if the logits are float64. Its rows may lie any distance apart. Row i is the reward model's input embedding of
  vocabulary id i.
- *acc* stands for float64 where the logits are float64, and for float32 otherwise. Statistics, soft embeddings, the
  optimiser's moments and all arithmetic are in this dtype.
- Entropies and logsumexps are in nats. ``temperature`` is tau in the formulas, between 1e-6 and 1e6, and
  q = softmax(z / tau).
- All tensors of one call must be on the same device.
- A wrong shape, dtype, device or scalar raises ``RuntimeError``, which names the argument, what was passed and what was
  expected.
- A row of logits that contains NaN or +inf, or that contains no finite value, raises ``RuntimeError`` on the CPU. On
  CUDA, where raising an error would wait for the device, such a row gives NaN and token -1 (see :func:`sample_tokens`).
- A row is padding where ``row_index`` is -1, or where no trajectory of ``splits`` contains it. Nothing of a padding row
  is read: its logits, logsumexp, tokens, weight and positions may be NaN or uninitialised. Operators that have neither
  argument know no padding, so all their logits must be finite.
- Results do not change from run to run on one machine, bit for bit. On the CPU with torch's MKL, the bits of a row do
  not depend on the number of threads either. They do not depend on the other rows of the call, at any temperature in
  calls of 16 rows or more, and in all calls at temperatures below 1/16.
- A derivative that an operator does not have is refused; it is never silently zero. All operators refuse forward mode
  (``torch.func.jvp``), gradients in arguments other than those named, and second derivatives
  (:mod:`entrgi_ext.autograd`).
- Where the largest ``|z| / tau`` of a row exceeds the range of acc, the row's logsumexp is infinite, while its
  entropies, argmax and token are still right. Operators that read a logsumexp refuse such a row on the CPU and give NaN
  for it on CUDA.
- Of ``keys``, all 64 bits of the seed count. Step, iteration and position count modulo 2^32.
- On CUDA, products of a float32 embedding with 128 rows or more are torch's own, at the precision to which torch is set
  (``torch.set_float32_matmul_precision``).
- On CUDA, the environment variable ``ENTRGI_FORCE_PLAN`` replaces parts of the launch plans (:mod:`entrgi_ext.plans`).
  It is meant for experiments. A plan that cannot be had raises ``RuntimeError`` at the launch. The CPU operators do not
  read the variable.

Functions whose names end in ``_`` write their first arguments in place and take no part in autograd: while gradients
are recorded, the tensors that they read must not require grad. A tensor that is written must not share memory with any
other argument; otherwise ``ValueError`` is raised.

References: EntRGi (arXiv 2602.05000), APS (arXiv 2510.02291).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import registration  # loads the libraries, registers fakes and autograd
from .autograd import call
from .reference import Sample, Statistics

_ops = torch.ops.entrgi


def _constant(tensor: Tensor) -> Tensor:
    """The tensor as autograd's constant; most are, and ``detach`` takes as long as a small operator."""
    return tensor.detach() if tensor.requires_grad else tensor


def _renamed(rows: Tensor, row_index: Tensor | None) -> Tensor:
    """The value of ``row_index``, given under its former name."""
    if row_index is not None:
        raise TypeError("rows is the former name of row_index: expected one of them, got both")
    warnings.warn(
        "rows is deprecated and will be removed in the next release, use row_index", DeprecationWarning, stacklevel=3
    )
    return rows


def logit_statistics(logits: Tensor, temperature: float = 1.0) -> Statistics:
    """The logsumexp, two entropies and the argmax of every row, from one read of the logits.

    Args:
        logits: [N, V].
        temperature: tau, between 1e-6 and 1e6.

    Returns:
        :class:`Statistics` of vectors [N]. ``logsumexp`` is that of z / tau, ``entropy`` is H(softmax z) at temperature
        **1** (the numerator of EntRGi's weight w = H / log V), and ``tempered_entropy`` is H(softmax(z / tau)); these
        three are acc. ``argmax`` is int64, the first index of the largest logit.

        The first three are differentiable in ``logits``. A second derivative raises ``RuntimeError``.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a row contains NaN or +inf or nothing finite.

    Example:
        >>> statistics = logit_statistics(logits, temperature=0.7)
        >>> weight = statistics.entropy / math.log(logits.shape[1])
    """
    return Statistics(*call(_ops.logit_statistics, logits, temperature))


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    forbidden: Tensor | None = None,
    error_flag: Tensor | None = None,
) -> Sample:
    """:func:`logit_statistics` and, from the same read, a token of each row drawn from softmax(filter(z / tau)).

    The filter orders ids by (z descending, id ascending). It keeps an id if the probability mass strictly ahead of it
    is at most ``top_p``; the first id is always kept, and 1.0 keeps all. Of these it keeps the ids whose z is at least
    the ``top_k``-th largest, ties included. Masses are integers in units of 2^-40 of the largest, so that the boundary
    depends on no order of summation. The draw is a Gumbel maximum with Philox noise, which is determined by the row of
    ``keys`` and the id alone: it does not depend on N, on the order of the rows or on how the work is split.

    Args:
        logits: [N, V].
        keys: int64 [N, 4]; each row is (trajectory seed, denoising step, iteration, absolute position). The iteration
            is 0 ... M-1 in the guidance steps and -1 for the draw that is committed.
        temperature: tau, between 1e-6 and 1e6.
        top_p: between 0 and 1.
        top_k: at least 1; it may exceed V. None turns this filter off.
        forbidden: ids that count as -inf for the draw, the filter, the probability and the margin, but not for the
            statistics. Either bool [V], or int32 [F], the ids themselves in any order, repeated or not. On CUDA the
            list is the faster of the two where the ids are few, and ids outside [0, V) are ignored.
        error_flag: int32 [1], for CUDA only. Bit 0 is set if a row is invalid (its statistics are NaN, its argmax and
            token -1), and bit 1 if a row has no id left to draw (its token is -1; its probability, margin and filtered
            entropy are NaN). Bits are never cleared here; the caller does that. On the CPU such rows raise an error and
            the flag is not used.

    Returns:
        :class:`Sample` of vectors [N]: the four of :class:`Statistics`, then ``token`` (int64) and, acc and under the
        filtered distribution, ``probability`` of the token, ``margin`` (the largest minus the second largest
        probability) and ``filtered_entropy``. None of them is differentiable.

    Raises:
        RuntimeError: if an argument is invalid. On the CPU also if a row is invalid or has no id left to draw (the
            first such row is named), or if a forbidden id is outside [0, V).

    Example:
        >>> keys = torch.tensor([[seed, step, -1, position] for position in masked])
        >>> token = sample_tokens(logits, keys, temperature=0.7, top_p=0.95).token
    """
    return Sample(*call(_ops.sample_tokens, logits, keys, temperature, top_p, top_k, forbidden, error_flag))


def gumbel_perturb(logits: Tensor, keys: Tensor, scale: float) -> Tensor:
    """z + scale * g, where g is the standard Gumbel noise of the draws: one value for every (row of ``keys``, id).

    With ``scale`` = tau the first maximum of a row is, up to rounding, the token that :func:`sample_tokens` draws
    without a filter for the same keys. softmax(result / (tau lambda)) is the Gumbel-softmax relaxation of that draw at
    temperature lambda (Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712); its gradient in the result is
    its gradient in the logits.

    Args:
        logits: [N, V]. -inf stays -inf.
        keys: int64 [N, 4], as in :func:`sample_tokens`.
        scale: between 0 and 1e6, in units of the logits.

    Returns:
        A matrix [N, V] in acc whose rows start at 16-byte boundaries, so that there may be room between them. On the
        CPU the noise is computed in float64 and the result is rounded once; on CUDA the noise is computed in float32.
        Both tails of g are kept: its 64-bit uniforms reach from -3.8 to 45.0. The result is differentiable in
        ``logits``.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a row contains NaN or +inf or nothing finite (the
            first such row is named). On CUDA such values stay what they are, and whatever reads the result reports
            them.

    Example:
        >>> perturbed = gumbel_perturb(logits, keys, 0.7)
        >>> logsumexp = logit_statistics(perturbed, 0.7 * relaxation).logsumexp
        >>> relaxed, soft = relaxed_embedding(perturbed, embedding, 0.7 * relaxation, logsumexp=logsumexp)
    """
    return call(_ops.gumbel_perturb, logits, keys, scale)


def relaxed_embedding(
    logits: Tensor,
    embedding: Tensor,
    temperature: float = 1.0,
    *,
    hard_tokens: Tensor | None = None,
    weight: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(1 - w) q E + w E[x], the input of the reward model, without ever storing q.

    Without ``hard_tokens`` the result is the plain expectation q E. With tokens but without ``weight``, w is 1, which
    is APS's straight-through estimator; EntRGi passes w = H(softmax z) / log V. The gradient is that of q E, whatever w
    is.

    Args:
        logits: [N, V].
        embedding: [V, d]. It must not require grad.
        temperature: tau, between 1e-6 and 1e6.
        hard_tokens: int64 [N], ids in [0, V). An id of -1 makes the row NaN.
        weight: acc [N]; it may be given only together with ``hard_tokens``. It must not require grad.
        logsumexp: acc [N], the logsumexp of z / tau from :func:`logit_statistics` or :func:`sample_tokens` at the same
            temperature. It is computed here if it is None. It is taken as a function of the logits and not as an input
            of its own, so a leaf that requires grad is refused.

    Returns:
        ``(output, soft)``. ``output`` is [N, d] in the embedding's dtype and differentiable in ``logits``; a second
        derivative raises ``RuntimeError``. ``soft`` is q E before the blend, acc [N, d], which :func:`logit_gradient`
        takes; it is not differentiable.

    Raises:
        RuntimeError: if an argument is invalid, if ``embedding`` or ``weight`` requires grad while gradients are
            recorded, or, on the CPU, if a hard token is out of range.

    Example:
        >>> weight = (sample.entropy / math.log(logits.shape[1])).detach()
        >>> output, _ = relaxed_embedding(logits, embedding, 0.7, hard_tokens=sample.token, weight=weight)
        >>> reward(output).sum().backward()  # logits.grad
    """
    if logsumexp is None:
        logsumexp = call(_ops.logit_statistics, _constant(logits), temperature)[0]
    elif not logsumexp.is_leaf:
        logsumexp = logsumexp.detach()
    return call(_ops.relaxed_embedding, logits, logsumexp, embedding, hard_tokens, weight, temperature)


def relaxed_embedding_(
    output: Tensor,
    soft: Tensor,
    logits: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    temperature: float = 1.0,
    *,
    hard_tokens: Tensor | None = None,
    weight: Tensor | None = None,
    row_index: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """:func:`relaxed_embedding`, written straight into rows of the reward model's input buffer.

    Args:
        output: [R, d] in the embedding's dtype, with rows any distance apart. Row ``row_index[n]`` is written for row n
            of the logits; all other rows keep their values.
        soft: acc [N, d], which receives q E before the blend. Padding rows of it keep their values.
        logits: [N, V].
        logsumexp: acc [N], the logsumexp of z / tau.
        embedding: [V, d].
        temperature: tau, between 1e-6 and 1e6.
        hard_tokens: as in :func:`relaxed_embedding`.
        weight: as in :func:`relaxed_embedding`.
        row_index: int64 [N], distinct rows of ``output`` in [0, R), or -1 for a padding row, of which nothing is read
            or written. None stands for 0 ... N-1 and needs R == N.
        rows: the former name of ``row_index``. Deprecated.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a row index or a hard token is out of range or a row
            index is repeated.
        ValueError: if ``output`` or ``soft`` shares memory with another argument.

    Example:
        >>> relaxed_embedding_(inputs.view(-1, d), soft, logits, sample.logsumexp, embedding, 0.7,
        ...                    hard_tokens=sample.token, weight=weight, row_index=masked_rows)
    """
    row_index = row_index if rows is None else _renamed(rows, row_index)
    arguments = (output, soft, logits, logsumexp, embedding, hard_tokens, weight, row_index, temperature)
    call(_ops.relaxed_embedding_, *arguments)


def logit_gradient(
    grad: Tensor,
    logits: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    temperature: float = 1.0,
    *,
    row_index: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """dReward/dz = q (G E^T - G . soft) / tau, where G = dReward/d(input embedding).

    Args:
        grad: G, [R, d] in the embedding's dtype, contiguous in its last dimension.
        logits: [N, V], as they were in the forward pass.
        logsumexp: acc [N], the logsumexp of z / tau.
        embedding: [V, d].
        soft: acc [N, d], from the forward pass.
        temperature: tau, between 1e-6 and 1e6.
        row_index: int64 [N], the row of ``grad`` that belongs to row n of the logits, in [0, R), or -1 for a padding
            row, whose gradient is 0 and of which nothing is read. None stands for 0 ... N-1 and needs R == N.
        rows: the former name of ``row_index``. Deprecated.

    Returns:
        A matrix [N, V] in acc whose rows start at 16-byte boundaries, so that there may be room between them. It is not
        differentiable: a backward pass that reaches it raises ``RuntimeError``.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a row index is out of range.

    Example:
        >>> gradient = logit_gradient(inputs.grad, logits, logsumexp, embedding, soft, 0.7)
    """
    row_index = row_index if rows is None else _renamed(rows, row_index)
    return call(_ops.logit_gradient, grad, logits, logsumexp, embedding, soft, row_index, temperature)


def adam_step_(
    logits: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    grad: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    temperature: float = 1.0,
    *,
    lr: float,
    step: int,
    last: bool = False,
    row_index: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    rows: Tensor | None = None,
) -> None:
    """One Adam *ascent* step on the logits with the gradient of :func:`logit_gradient`, which is never stored.

    z += lr * m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps), where m and v are updated as in Adam (Kingma &
    Ba, 2015).

    Args:
        logits: [N, V], updated in place and rounded to their dtype. Padding rows keep their values.
        exp_avg: m, acc [N, V], updated in place except in padding rows. Step 1 does not read it, so it may be
            uninitialised; the last step does not write it. It may be None if step 1 is the last.
        exp_avg_sq: v, acc [N, V], likewise.
        grad: G, [R, d], as in :func:`logit_gradient`.
        logsumexp: acc [N], the logsumexp of z / tau.
        embedding: [V, d].
        soft: acc [N, d], from the forward pass.
        temperature: tau, between 1e-6 and 1e6.
        lr: the step size, in units of the logits.
        step: the number of this step, which counts from 1.
        last: whether this is the last step on these logits.
        row_index: int64 [N], as in :func:`logit_gradient`.
        betas: (beta1, beta2), each in [0, 1).
        eps: at least 0.
        rows: the former name of ``row_index``. Deprecated.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a row index is out of range.
        ValueError: if the logits or the moments share memory with another argument.

    Example:
        >>> for step in range(1, M + 1):
        ...     ...  # sample, embed, reward model, backward
        ...     adam_step_(logits, exp_avg, exp_avg_sq, inputs.grad, logsumexp, embedding, soft, 0.7,
        ...                lr=0.5, step=step, last=step == M)
    """
    row_index = row_index if rows is None else _renamed(rows, row_index)
    arguments = (logits, exp_avg, exp_avg_sq, grad, logsumexp, embedding, soft, row_index, temperature)
    call(_ops.adam_step_, *arguments, lr, *betas, eps, step, last)


def sgd_step_(
    logits: Tensor,
    grad: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    temperature: float = 1.0,
    *,
    lr: float,
    row_index: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """z += lr * :func:`logit_gradient`, in place and without storing the gradient.

    The arguments and errors are those of :func:`adam_step_`.

    Example:
        >>> sgd_step_(logits, inputs.grad, logsumexp, embedding, soft, 0.7, lr=0.5)
    """
    row_index = row_index if rows is None else _renamed(rows, row_index)
    call(_ops.sgd_step_, logits, grad, logsumexp, embedding, soft, row_index, temperature, lr)


def commit_(
    tokens: Tensor,
    committed: Tensor,
    candidates: Tensor,
    confidence: Tensor,
    positions: Tensor,
    splits: Tensor,
    counts: Tensor,
    *,
    keys: Tensor | None = None,
    eos_token_id: int | None = None,
    alg_temp: float = 0.0,
) -> None:
    """Writes the most confident candidates of every trajectory into its tokens.

    Candidates are ranked by confidence, and the earlier row goes first among equals. A confidence of NaN ranks as -inf,
    and so does a candidate that equals ``eos_token_id``, if that is given: they are committed last, if ``counts``
    reaches them. A candidate of -1 is never committed.

    Args:
        tokens: int64 [P, S], written in place.
        committed: bool [N], overwritten with whether the row's candidate was written.
        candidates: int64 [N], the drawn tokens, or -1.
        confidence: float32 [N]; on the CPU it may also be float64.
        positions: int64 [N], the column of ``tokens`` that belongs to row n.
        splits: int64 [P + 1]. Rows splits[p] ... splits[p + 1] - 1 belong to trajectory p. Rows before splits[0] and
            from splits[P] on are padding: nothing of them is read, and their ``committed`` is False.
        counts: int64 [P], how many candidates of each trajectory to commit. All of them are committed if there are
            fewer.
        keys: int64 [N, 4], as in :func:`sample_tokens`, with iteration -2. They must be given if ``alg_temp`` > 0.
        eos_token_id: a token that is committed last. None turns this rule off.
        alg_temp: if it is greater than 0, candidates are drawn without replacement from
            softmax(confidence / alg_temp), as a Gumbel top-n.

    Raises:
        RuntimeError: if an argument is invalid or, on the CPU, if a position, split or count is out of range. Nothing
            has been written then.
        ValueError: if ``tokens`` or ``committed`` shares memory with another argument.

    Example:
        >>> commit_(tokens, committed, sample.token, -entropy, positions, splits, counts, eos_token_id=2)
    """
    arguments = (tokens, committed, candidates, confidence, positions, splits, counts)
    call(_ops.commit_, *arguments, keys, eos_token_id, alg_temp)


def warm_up(device: torch.device | str | int | None = None) -> None:
    """Loads every CUDA kernel on a device and sets its attributes, which otherwise happens at its first launch.

    Call it before you capture a CUDA graph of your own, during which nothing may be loaded, and where the first step
    must not be slow. Devices newer than the machine code in the package (compute capability 10.0 and above) compile the
    kernels here once, which takes some tens of seconds; the driver keeps the result. Later calls do next to nothing.

    Args:
        device: a CUDA device, or the CPU, which has nothing to load. None stands for the current CUDA device; if torch
            can use none on this machine, nothing happens.

    Raises:
        ValueError: if the device is neither a CUDA device nor the CPU.
        RuntimeError: if it is a CUDA device on which the operators cannot run. The message says why.

    Example:
        >>> entrgi_ext.warm_up("cuda:1")
    """
    if device is None and not torch.cuda.is_available():
        return
    if device is None or isinstance(device, int):  # a number needs torch's own idea of an accelerator otherwise
        device = "cuda" if device is None else f"cuda:{device}"
    device = torch.device(device)
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, the CPU or None, got {device}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"warm_up: torch {torch.__version__} can use no CUDA device here, got {device}")
    problem = registration.loaded_libraries()["cuda"]
    if problem is not None:
        raise RuntimeError(f"warm_up: the CUDA operators are not loaded: {problem}")
    _ops.warm_up(torch.cuda.current_device() if device.index is None else device.index)
