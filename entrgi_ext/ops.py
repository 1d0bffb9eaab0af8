"""The operators, as functions on tensors.

Common to all of them:

- ``logits`` are [N, V] in bfloat16, float16 or float32 (float64 on the CPU), rows any distance apart, the last
  dimension contiguous. V is 1 ... 2^23, N may be 0.
- ``embedding`` E is [V, d] in bfloat16, float16 or float32 (float64 exactly where the logits are), rows any
  distance apart. Row i is the reward model's input embedding of vocabulary id i.
- *acc* stands for float32, and float64 for float64 logits: the dtype of statistics, of soft embeddings, of
  the optimiser's moments and of all arithmetic.
- Entropies and logsumexps are in nats. ``temperature`` is tau, from 1e-6 to 1e6; q = softmax(z / tau).
- All tensors of a call are on one device. Wrong shapes, dtypes, devices and scalars raise ``RuntimeError``
  naming the argument. Rows of logits that hold NaN or +inf, or nothing finite, raise on the CPU too; on CUDA,
  where raising would wait for the device, they give NaN and token -1 (see :func:`sample_tokens`).
- Padding: where ``rows`` is -1, or no trajectory of ``splits`` holds the row, nothing of the row is read: its logits,
  logsumexp, tokens, weight and positions may be NaN or uninitialised. Operators without such an argument know no
  padding: give them finite logits there.
- Results do not change from run to run on one machine, bit for bit. On the CPU, with torch's MKL, a row's bits do not
  depend on the number of threads either, nor on the other rows of the call: at any temperature in calls of 16 rows and
  more, below 1/16 in all.
- Derivatives that an operator does not have are refused, never zero: forward mode (``torch.func.jvp``) by all of them,
  gradients in other arguments than those named, second derivatives (:mod:`entrgi_ext.autograd`).
- Where the largest ``|z| / tau`` of a row leaves the range of acc, its logsumexp is infinite (its entropies, argmax and
  token are right all the same). What reads a logsumexp refuses such rows on the CPU; on CUDA they give NaN.
- ``keys``: of the seed all 64 bits count; step, iteration and position count modulo 2^32.
- On CUDA, products of a float32 E with 128 rows or more are torch's own, at the precision that torch is set to
  (``torch.set_float32_matmul_precision``).
- On CUDA, ``ENTRGI_FORCE_PLAN`` replaces parts of the launch plans (:mod:`entrgi_ext.plans`): for experiments. What it
  asks for and cannot have raises ``RuntimeError`` at the launch. The CPU operators do not read it.

Names ending in ``_`` write their first arguments in place and take no part in autograd: what they read must not require
grad where gradients are recorded. What they write shares memory with no other argument (``ValueError``).
References: EntRGi (arXiv 2602.05000), APS (arXiv 2510.02291).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import registration  # loads the libraries, registers fakes and autograd
from .autograd import call
from .reference import Sample, Statistics

_ops = torch.ops.entrgi


def _constant(tensor: Tensor) -> Tensor:
    """The tensor as autograd's constant; most are, and ``detach`` takes as long as a small operator."""
    return tensor.detach() if tensor.requires_grad else tensor


def logit_statistics(logits: Tensor, temperature: float = 1.0) -> Statistics:
    """logsumexp, entropies and argmax of every row, in one read of the logits.

    Args:
        logits: [N, V].
        temperature: tau, in [1e-6, 1e6].

    Returns:
        ``Statistics`` of [N] tensors: ``logsumexp`` of z / tau, ``entropy`` H(softmax z) at temperature **1**
        (the numerator of EntRGi's weight w = H / log V) and ``tempered_entropy`` H(softmax(z / tau)), all acc;
        ``argmax`` int64, the first index of the largest logit.

    Differentiable in ``logits`` (the first three). Double backward raises ``RuntimeError``.

    Raises:
        RuntimeError: for invalid arguments, and on the CPU for a row with NaN, +inf or nothing finite.

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
    """:func:`logit_statistics` and, in the same read, a token drawn from softmax(filter(z / tau)).

    The filter orders ids by (z descending, id ascending) and keeps an id iff the probability mass strictly
    ahead of it is at most ``top_p`` (the first is always kept, 1.0 keeps all), then those whose z is at least
    the ``top_k``-th largest, ties included. Masses are integers in units of 2^-40 of the largest, so the boundary
    depends on no order of summation. The draw is a Gumbel maximum with Philox noise keyed by ``keys`` and the
    id alone: it does not depend on N, on the order of rows or on how the work is split.

    Args:
        logits: [N, V].
        keys: int64 [N, 4], per row (trajectory seed, denoising step, iteration, absolute position);
            iteration is 0 ... M-1 in the guidance steps and -1 for the draw that is committed.
        temperature: tau, in [1e-6, 1e6].
        top_p: in [0, 1].
        top_k: >= 1, may exceed V; None: off.
        forbidden: bool [V], ids that count as -inf for the draw, the filter, probability and margin, but not
            for the statistics; or int32 [F], those ids themselves, in any order, repeated or not. Where they are
            few the list is the faster of the two on CUDA; there, ids outside [0, V) are ignored.
        error_flag: int32 [1], CUDA only: bit 0 is set where a row is invalid (statistics NaN, argmax and token
            -1), bit 1 where a row has no id left to draw (token -1, probability, margin and filtered entropy NaN).
            Set bits stay set: the caller clears it. On the CPU these rows raise and the flag is not used.

    Returns:
        ``Sample`` of [N] tensors: the four of :class:`Statistics`, then ``token`` int64 and, all acc and under
        the filtered distribution, ``probability`` of the token, ``margin`` (largest minus second largest
        probability) and ``filtered_entropy``. Not differentiable.

    Raises:
        RuntimeError: for invalid arguments, and on the CPU for rows as above, naming the first, and for forbidden
            ids outside [0, V).

    Example:
        >>> keys = torch.tensor([[seed, step, -1, position] for position in masked])
        >>> token = sample_tokens(logits, keys, temperature=0.7, top_p=0.95).token
    """
    return Sample(*call(_ops.sample_tokens, logits, keys, temperature, top_p, top_k, forbidden, error_flag))


def gumbel_perturb(logits: Tensor, keys: Tensor, scale: float) -> Tensor:
    """z + scale * g, with g the standard Gumbel noise of the draws: one value for every (row of ``keys``, id).

    At ``scale`` = tau the first maximum of a row is, up to rounding, the token that :func:`sample_tokens` draws
    without a filter for the same keys; softmax(result / (tau lambda)) is the Gumbel-softmax relaxation of that draw at
    temperature lambda (Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712), whose gradient in the
    result is that in the logits.

    Args:
        logits: [N, V]. -inf stays -inf.
        keys: int64 [N, 4], as in :func:`sample_tokens`.
        scale: in [0, 1e6], in units of the logits.

    Returns:
        acc [N, V], rows at 16-byte boundaries (so there may be room between them). On the CPU the noise is computed in
        float64 and the result rounded once; on CUDA in float32. Both tails of g are kept: its 64-bit uniforms reach
        from -3.8 to 45.0. Differentiable in ``logits`` (the identity).

    Raises:
        RuntimeError: for invalid arguments, and on the CPU for a row with NaN, +inf or nothing finite, naming the
            first. On CUDA such values stay what they are, so the row is reported by whatever reads the result.

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
    """(1 - w) q E + w E[x], the input of the reward model, without ever holding q.

    ``hard_tokens`` None is the plain expectation q E; ``weight`` None is APS's straight-through (w = 1); EntRGi
    passes w = H(softmax z) / log V. The hard part is straight-through: the gradient is that of q E, whatever w.

    Args:
        logits: [N, V].
        embedding: [V, d]; must not require grad.
        temperature: tau, in [1e-6, 1e6].
        hard_tokens: int64 [N] in [0, V), or -1 for a row of NaN.
        weight: acc [N]; only with ``hard_tokens``. Must not require grad.
        logsumexp: acc [N], of z / tau, from :func:`logit_statistics` or :func:`sample_tokens` at the same
            temperature; computed here where None. Taken as a function of the logits, not as an input of its own: a
            leaf that requires grad is refused.

    Returns:
        ``(output, soft)``: [N, d] in E's dtype, and q E unblended, acc [N, d], for :func:`logit_gradient`.
        ``output`` is differentiable in ``logits``; ``soft`` is not differentiable. Double backward raises.

    Raises:
        RuntimeError: for invalid arguments; ``embedding`` or ``weight`` requires grad while gradients are recorded; on
            the CPU for hard tokens out of range.

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
    rows: Tensor | None = None,
) -> None:
    """:func:`relaxed_embedding` written straight into rows of the reward model's input buffer.

    Args:
        output: [R, d] in E's dtype, rows any distance apart; row ``rows[n]`` is written for row n of the logits,
            all others are left as they are.
        soft: acc [N, d], written (q E, unblended); left as it is in padding rows.
        logits, logsumexp, embedding, temperature, hard_tokens, weight: as in :func:`relaxed_embedding`.
        rows: int64 [N], distinct, in [0, R), or -1 for a padding row: nothing of it is written, and what it holds
            (logits, logsumexp, hard token, weight) counts for nothing. None: the identity, and R == N.

    Raises:
        RuntimeError: for invalid arguments; on the CPU for rows or hard tokens out of range.

    Example:
        >>> relaxed_embedding_(inputs.view(-1, d), soft, logits, sample.logsumexp, embedding, 0.7,
        ...                    hard_tokens=sample.token, weight=weight, rows=masked_rows)
    """
    arguments = (output, soft, logits, logsumexp, embedding, hard_tokens, weight, rows, temperature)
    call(_ops.relaxed_embedding_, *arguments)


def logit_gradient(
    grad: Tensor,
    logits: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """dReward/dz = q (G E^T - G . soft) / tau, where G = dReward/d(input embedding).

    Args:
        grad: G, [R, d] in E's dtype, last dimension contiguous.
        logits: [N, V], as they were in the forward pass.
        logsumexp: acc [N], of z / tau.
        embedding: [V, d].
        soft: acc [N, d], from the forward pass.
        temperature: tau, in [1e-6, 1e6].
        rows: int64 [N], the row of ``grad`` that belongs to row n of the logits, or -1 for a padding row: gradient
            0, and nothing of it is read (logits, logsumexp, soft). None: the identity, and R == N.

    Returns:
        acc [N, V], rows at 16-byte boundaries (so there may be room between them). Not differentiable: a backward pass
        that reaches it raises.

    Raises:
        RuntimeError: for invalid arguments; on the CPU for rows out of range.

    Example:
        >>> gradient = logit_gradient(inputs.grad, logits, logsumexp, embedding, soft, 0.7)
    """
    return call(_ops.logit_gradient, grad, logits, logsumexp, embedding, soft, rows, temperature)


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
    rows: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One Adam *ascent* step on the logits, with :func:`logit_gradient` computed on the fly.

    z += lr * m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps), with m and v as in Adam (Kingma & Ba,
    2015). The gradient is never stored.

    Args:
        logits: [N, V], updated in place (rounded to their dtype).
        exp_avg, exp_avg_sq: acc [N, V], updated in place. Step 1 does not read them (they may be uninitialised);
            the last step does not write them; both may be None where step 1 is the last.
        grad, logsumexp, embedding, soft, temperature, rows: as in :func:`logit_gradient`. Padding rows
            (``rows`` -1) of logits and moments are neither read nor written.
        lr: step size in units of the logits.
        step: counts from 1.
        last: this is the last step on these logits.
        betas: in [0, 1).
        eps: >= 0.

    Raises:
        RuntimeError: for invalid arguments; on the CPU for rows out of range.

    Example:
        >>> for step in range(1, M + 1):
        ...     ...  # sample, embed, reward model, backward
        ...     adam_step_(logits, exp_avg, exp_avg_sq, inputs.grad, logsumexp, embedding, soft, 0.7,
        ...                lr=0.5, step=step, last=step == M)
    """
    beta1, beta2 = betas
    call(
        _ops.adam_step_,
        logits,
        exp_avg,
        exp_avg_sq,
        grad,
        logsumexp,
        embedding,
        soft,
        rows,
        temperature,
        lr,
        beta1,
        beta2,
        eps,
        step,
        last,
    )


def sgd_step_(
    logits: Tensor,
    grad: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    temperature: float = 1.0,
    *,
    lr: float,
    rows: Tensor | None = None,
) -> None:
    """z += lr * :func:`logit_gradient`, in place and without storing the gradient.

    Arguments and errors as in :func:`adam_step_`.

    Example:
        >>> sgd_step_(logits, inputs.grad, logsumexp, embedding, soft, 0.7, lr=0.5)
    """
    call(_ops.sgd_step_, logits, grad, logsumexp, embedding, soft, rows, temperature, lr)


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

    Candidates are ranked by confidence, the earlier row first among equals. NaN and, where ``eos_token_id`` is
    given, candidates equal to it rank as -inf: last, but they are committed if ``counts`` reaches them. Candidate
    -1 never is.

    Args:
        tokens: int64 [P, S], written in place.
        committed: bool [N], overwritten: True where the row's candidate was written.
        candidates: int64 [N], the drawn tokens, or -1.
        confidence: float32 [N] (float64 on the CPU too).
        positions: int64 [N], the column of ``tokens`` that row n is for.
        splits: int64 [P + 1]: rows splits[p] ... splits[p + 1] - 1 belong to trajectory p. N may be larger: of rows
            before splits[0] and from splits[P] on (padding) nothing is read, and ``committed`` is False.
        counts: int64 [P], how many to commit; all of a trajectory's candidates where there are fewer.
        keys: int64 [N, 4] as in :func:`sample_tokens`, iteration -2; needed where ``alg_temp`` > 0.
        eos_token_id: de-prioritise this token; None: no such rule.
        alg_temp: > 0 draws without replacement from softmax(confidence / alg_temp), as a Gumbel top-n.

    Raises:
        RuntimeError: for invalid arguments; on the CPU for positions, splits or counts out of range, before
            anything is written.

    Example:
        >>> commit_(tokens, committed, sample.token, -entropy, positions, splits, counts, eos_token_id=2)
    """
    call(
        _ops.commit_,
        tokens,
        committed,
        candidates,
        confidence,
        positions,
        splits,
        counts,
        keys,
        eos_token_id,
        alg_temp,
    )


def warm_up(device: torch.device | str | int | None = None) -> None:
    """Loads every CUDA kernel on a device and sets its attributes, which its first launch does otherwise.

    Worth a call before a graph of one's own is captured, where nothing may be loaded, and where the first step must not
    be the slow one. Devices newer than the machine code in the package (compute capability 10.0 and above) compile it
    here, some tens of seconds, once: the driver keeps the result. Later calls do next to nothing.

    Args:
        device: a CUDA device, or the CPU, which has nothing to load. None: the current CUDA device, and nothing at all
            on a machine where torch can use none.

    Raises:
        ValueError: for a device that is neither.
        RuntimeError: for a CUDA device on which the operators cannot run, saying why.

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
