"""The same work without this package.

``published`` is the published algorithm in PyTorch eager: softmax, log(p + 1e-10), top-p by sorting, multinomial,
matmul, autograd, torch.optim.Adam. ``compiled`` is the same under torch.compile, with the draw by exponential
noise (as gpt-fast does, so that it waits for no host) and Adam as one fused pass. ``composed`` is the strongest
composition of PyTorch calls that we know: nothing computed twice, probabilities from the given logsumexp in E's dtype,
the library's matrix products, the gradient by hand, fused Adam. ``two-pass`` is a plain product and one compiled pass
over the logits: exp(z / tau - logsumexp) before the product of the embedding; q, the gradient and the optimiser's step
after that of the update, 22 bytes of a bf16 logit with fp32 moments. The others keep optimiser state in the logits'
dtype, as PyTorch does, except fp16, in which Adam's second moment would be 0: there the optimiser has fp32 logits and
moments of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .cases import BETAS, EPS, STEP, TEMPERATURE, TOP_P, Inputs
from .ours import Call


@cache
def compiled(function: Callable) -> Callable:
    """For each shape by itself, as this package's plans are: not with a size that was made symbolic."""
    return torch.compile(function, dynamic=False)


# ---- statistics and draw ---------------------------------------------------------------------------------------


def published_statistics(z: Tensor) -> dict[str, Tensor]:
    p, q = torch.softmax(z, dim=-1), torch.softmax(z / TEMPERATURE, dim=-1)
    entropy = -(p * torch.log(p + 1e-10)).sum(dim=-1)
    return {
        "entropy": entropy,
        "tempered_entropy": -(q * torch.log(q + 1e-10)).sum(dim=-1),
        "argmax": z.argmax(dim=-1),
    }


def nucleus(z: Tensor) -> Tensor:
    """softmax(filter(z / tau)) by sorting."""
    scaled = z / TEMPERATURE
    ranked, order = torch.sort(scaled, descending=True)
    remove = torch.cumsum(torch.softmax(ranked, dim=-1), dim=-1) > TOP_P
    remove = torch.cat([torch.zeros_like(remove[:, :1]), remove[:, :-1]], dim=1)
    return torch.softmax(scaled.masked_fill(remove.scatter(1, order, remove), -math.inf), dim=-1)


def multinomial(p: Tensor) -> Tensor:
    return torch.multinomial(p, 1)[:, 0]


def exponential_race(p: Tensor) -> Tensor:
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)


def published_sample(z: Tensor) -> dict[str, Tensor]:
    p = nucleus(z)
    token = multinomial(p)
    return {**published_statistics(z), "token": token, "probability": p.gather(1, token[:, None])[:, 0]}


def race_sample(z: Tensor) -> dict[str, Tensor]:
    p = nucleus(z)
    token = exponential_race(p)
    return {**published_statistics(z), "token": token, "probability": p.gather(1, token[:, None])[:, 0]}


def published_greedy(z: Tensor) -> dict[str, Tensor]:
    result = published_statistics(z)
    return {**result, "token": result["argmax"]}


def composed_statistics(z: Tensor) -> dict[str, Tensor]:
    log_p = torch.log_softmax(z, dim=-1, dtype=torch.float32)
    entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
    scaled = z.float() / TEMPERATURE
    log_q = torch.log_softmax(scaled, dim=-1)
    return {
        "logsumexp": scaled[:, 0] - log_q[:, 0],
        "entropy": entropy,
        "tempered_entropy": -torch.linalg.vecdot(log_q.exp(), log_q),
        "argmax": z.argmax(dim=-1),
    }


def sorted_draw(q: Tensor) -> Tensor:
    """One sort, then the inverse of the cumulative distribution."""
    ranked, order = torch.sort(q, dim=-1, descending=True)
    cumulative = ranked.cumsum(dim=-1, dtype=torch.float32)
    kept = (cumulative - ranked <= TOP_P).sum(dim=-1, keepdim=True)
    u = torch.rand(len(q), 1, device=q.device) * cumulative.gather(1, kept - 1)
    rank = torch.minimum(torch.searchsorted(cumulative, u), kept - 1)
    return order.gather(1, rank)[:, 0]


def composed_sample(z: Tensor) -> dict[str, Tensor]:
    q = torch.softmax(z / TEMPERATURE, dim=-1)
    return {**composed_statistics(z), "token": sorted_draw(q)}


def composed_greedy(z: Tensor) -> dict[str, Tensor]:
    result = composed_statistics(z)
    return {**result, "token": result["argmax"]}


def flashinfer_sample(z: Tensor) -> dict[str, Tensor]:
    """Its rejection sampling over softmax(z / tau): the token alone."""
    from flashinfer.sampling import top_p_sampling_from_probs

    return {"token": top_p_sampling_from_probs(torch.softmax(z.float() / TEMPERATURE, dim=-1), TOP_P)}


def of_logits(function: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z = x.logits[s]
        return lambda: function(z)

    return build


# ---- relaxed embedding, its gradient, optimisers ---------------------------------------------------------------


def published_embedding(z: Tensor, e: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    soft = torch.softmax(z / TEMPERATURE, dim=-1).to(e.dtype) @ e
    return soft + (weight[:, None] * (e[tokens] - soft)).detach().to(soft.dtype)


def probabilities_by_hand(z: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(z / tau - lse) in two passes, which are the cheapest ones on each device."""
    if z.dtype != torch.float32 and z.device.type == "cpu":  # PyTorch's mixed dtypes are slow there
        return (z * (1 / TEMPERATURE)).sub_(lse[:, None].to(z.dtype)).exp_().to(dtype)
    return torch.add(-lse[:, None], z, alpha=1 / TEMPERATURE, out=torch.empty_like(z)).exp_().to(dtype)


def composed_embedding(x: Inputs, s: int) -> Call:
    z, lse, e, tokens, weight = x.logits[s], x.logsumexp[s], x.embedding, x.tokens, x.weight

    def call() -> dict[str, Tensor]:
        soft = probabilities_by_hand(z, lse, e.dtype) @ e
        return {"output": soft.lerp(e[tokens], weight[:, None].to(e.dtype)), "soft": soft}

    return call


def probabilities(z: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    return (z.float() / TEMPERATURE - lse[:, None]).exp().to(dtype)


def embedding_by(function: Callable, compile: bool = False) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z, e, tokens, weight = x.logits[s], x.embedding, x.tokens, x.weight
        run = compiled(function) if compile else function

        def call() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": run(z, e, tokens, weight)}

        return call

    return build


def two_pass_embedding(x: Inputs, s: int) -> Call:
    z, lse, e, tokens, weight = x.logits[s], x.logsumexp[s], x.embedding, x.tokens, x.weight
    first = compiled(probabilities)

    def call() -> dict[str, Tensor]:
        soft = torch.mm(first(z, lse, e.dtype), e)
        return {"output": soft.lerp(e[tokens], weight[:, None].to(e.dtype)), "soft": soft}

    return call


def autograd_of(x: Inputs, z: Tensor, g: Tensor, compile: bool) -> Callable[[], Tensor]:
    """The backward pass of the published embedding alone; its forward pass runs here."""
    forward = compiled(published_embedding) if compile else published_embedding
    output = forward(z.requires_grad_(), x.embedding, x.tokens, x.weight)
    return lambda: torch.autograd.grad(output, z, g, retain_graph=True)[0]


def into_gradient(q: Tensor, g: Tensor, soft: Tensor, e: Tensor, inner: Tensor) -> Tensor:
    """q (G E^T - G . soft) / tau into ``inner``: 1 / tau is a factor of G, not another pass over N V."""
    g = g / TEMPERATURE
    dot = torch.linalg.vecdot(g.float(), soft.float())[:, None]
    torch.mm(g, e.T, out=inner)
    return inner.sub_(dot.to(e.dtype)).mul_(q)


def gradient_by_hand(x: Inputs, z: Tensor, s: int, g: Tensor) -> Callable[[], Tensor]:
    lse, e, soft = x.logsumexp[s], x.embedding, x.soft
    inner = torch.empty(z.shape, dtype=e.dtype, device=z.device)

    def gradient() -> Tensor:
        q = probabilities_by_hand(z.detach(), lse, e.dtype)
        return into_gradient(q, g, soft, e, inner).to(z.dtype)

    return gradient


def adam_update(z: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float, step: int) -> None:
    """For torch.compile: one pass. The step of torch.optim.Adam."""
    m.lerp_(gradient, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    z.sub_(lr / (1 - BETAS[0] ** step) * m / denominator)


class Optimizer:
    """Adam's descent on one copy of the logits: ``torch.optim.Adam``, fused or not, or the compiled pass above.

    It is given the gradient of the negative reward, as a loss has it: ``maximize`` would cost eager Adam another pass.
    """

    def __init__(self, x: Inputs, z: Tensor, kind: str, step: int, captured: bool = True):
        # Compiled forward passes may have saved z: it is written by data, which autograd does not watch.
        self.z, self.kind, self.step, self.lr = z.data, kind, step, x.lr
        self.own = z.detach().float() if z.dtype == torch.float16 else z
        dtype = self.own.dtype
        self.m, self.v = x.moments(dtype) if step > 1 else (torch.zeros_like(z, dtype=dtype) for _ in range(2))
        self.m.neg_()
        if kind != "compiled":
            on_device = (z.device.type == "cuda" and captured) or kind == "manual"
            options = {"fused": kind == "manual", "capturable": z.device.type == "cuda" and captured}
            self.adam = torch.optim.Adam([self.own], lr=x.lr, betas=BETAS, eps=EPS, **options)
            count = torch.tensor(float(step - 1), device=z.device if on_device else "cpu")
            self.adam.state[self.own] = {"step": count, "exp_avg": self.m, "exp_avg_sq": self.v}

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> dict[str, Tensor]:
        if self.step == 1:  # every denoising step begins with a fresh optimiser
            self.m.zero_(), self.v.zero_()
        gradient = gradient.to(self.own.dtype)
        if self.kind == "compiled":
            compiled(adam_update)(self.own.data, gradient, self.m, self.v, self.lr, self.step)
        else:
            self.own.grad = gradient
            self.adam.step()
        if self.own.dtype != self.z.dtype:
            self.z.copy_(self.own)
        return {"logits": self.z, "negative_exp_avg": self.m}


def gradient_of(x: Inputs, z: Tensor, s: int, kind: str, sign: int = 1) -> Callable[[], Tensor]:
    g = sign * x.grad
    return gradient_by_hand(x, z, s, g) if kind == "manual" else autograd_of(x, z, g, compile=kind == "compiled")


def gradient_by(kind: str) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        gradient = gradient_of(x, x.logits[s].detach(), s, kind)
        return lambda: {"gradient": gradient()}

    return build


def adam_by(kind: str, step: int = STEP) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z = x.own_logits(s)
        gradient, optimizer = gradient_of(x, z, s, kind, sign=-1), Optimizer(x, z, kind, step)
        return lambda: optimizer(gradient())

    return build


def sgd_by(kind: str) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z, lr = x.own_logits(s), x.lr
        gradient = gradient_of(x, z, s, kind)
        update = compiled(torch.Tensor.add_) if kind == "compiled" else torch.Tensor.add_

        def call() -> dict[str, Tensor]:
            update(z.data, gradient(), alpha=lr)
            return {"logits": z.detach()}

        return call

    return build


def ascent_pass(
    z: Tensor, lse: Tensor, product: Tensor, dot: Tensor, m: Tensor | None, v: Tensor | None, lr: float, step: int
) -> tuple[Tensor, ...]:
    """For torch.compile: all that follows the product G E^T / tau, in one pass. Adam's moments where ``step`` > 0.

    The new logits and moments; without a step (0) the gradient alone. Moments are read from the second step on.
    """
    gradient = probabilities(z, lse, torch.float32) * (product.float() - dot)
    if step == 0:
        return (gradient,)
    first, second = (1 - BETAS[0]) * gradient, (1 - BETAS[1]) * gradient * gradient
    if m is not None and v is not None:
        first, second = first + BETAS[0] * m, second + BETAS[1] * v
    denominator = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
    ascended = z.float() + lr / (1 - BETAS[0] ** step) * first / denominator
    return ascended.to(z.dtype), first, second


def two_pass_product(x: Inputs, product: Tensor) -> Tensor:
    """G E^T / tau into ``product``, in E's dtype; G . soft / tau."""
    g = x.grad / TEMPERATURE
    torch.mm(g, x.embedding.T, out=product)
    return torch.linalg.vecdot(g.float(), x.soft.float())[:, None]


def two_pass_gradient(x: Inputs, s: int) -> Call:
    z, lse, run = x.logits[s], x.logsumexp[s], compiled(ascent_pass)
    product = torch.empty(z.shape, dtype=x.embedding.dtype, device=z.device)
    return lambda: {"gradient": run(z, lse, product, two_pass_product(x, product), None, None, 0.0, 0)[0]}


def two_pass_adam(step: int = STEP, last: bool = False) -> Callable[[Inputs, int], Call]:
    def update(z: Tensor, lse: Tensor, product: Tensor, dot: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
        moments = (m, v) if step > 1 else (None, None)
        ascended, first, second = ascent_pass(z, lse, product, dot, *moments, lr, step)
        z.copy_(ascended)
        if not last:
            m.copy_(first), v.copy_(second)

    def build(x: Inputs, s: int) -> Call:
        z, lse, run = x.own_logits(s), x.logsumexp[s], compiled(update)
        product = torch.empty(z.shape, dtype=x.embedding.dtype, device=z.device)
        m, v = x.moments(torch.float32)

        def call() -> dict[str, Tensor]:
            run(z, lse, product, two_pass_product(x, product), m, v, x.lr)
            return {"logits": z} if last else {"logits": z, "exp_avg": m}

        return call

    return build


# ---- the whole step --------------------------------------------------------------------------------------------


def published_forward(z: Tensor, e: Tensor, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = torch.softmax(z.detach(), dim=-1)
    entropy = -(p * torch.log(p + 1e-10)).sum(dim=-1)
    token = draw(nucleus(z.detach()))
    soft = torch.softmax(z / TEMPERATURE, dim=-1).to(e.dtype) @ e
    weight = (entropy / math.log(z.shape[1]))[:, None]
    return soft + (weight * (e[token] - soft)).detach().to(soft.dtype), soft, entropy, token


def compiled_forward(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return published_forward(z, e, exponential_race)


def autograd_iteration(kind: str) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z, e, g = x.own_logits(s).requires_grad_(), x.embedding, -x.grad
        optimizer = Optimizer(x, z, kind, STEP, captured=kind == "compiled")

        def call() -> dict[str, Tensor]:
            if kind == "compiled":
                output, soft, entropy, token = compiled(compiled_forward)(z, e)
            else:
                output, soft, entropy, token = published_forward(z, e, multinomial)
            (gradient,) = torch.autograd.grad(output, z, g)
            return {**optimizer(gradient), "soft": soft.detach(), "entropy": entropy, "token": token}

        return call

    return build


def composed_iteration(x: Inputs, s: int) -> Call:
    z, e, g = x.own_logits(s), x.embedding, -x.grad
    optimizer = Optimizer(x, z, "manual", STEP)
    inner = torch.empty(z.shape, dtype=e.dtype, device=z.device)

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        log_p = torch.log_softmax(z, dim=-1)
        entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
        del log_p
        q = torch.softmax(z / TEMPERATURE, dim=-1)
        soft = q.to(e.dtype) @ e
        token = sorted_draw(q)
        soft.lerp(e[token], (entropy / x.log_vocabulary)[:, None].to(e.dtype))
        gradient = into_gradient(q, g, soft, e, inner).to(z.dtype)
        return {**optimizer(gradient), "soft": soft, "entropy": entropy, "token": token}

    return call


# ---- noise and commit ------------------------------------------------------------------------------------------


def published_noise(z: Tensor) -> dict[str, Tensor]:
    u = torch.rand(z.shape, device=z.device)
    return {"perturbed": z - TEMPERATURE * torch.log(-torch.log(u))}


def composed_noise(z: Tensor) -> dict[str, Tensor]:
    noise = torch.empty(z.shape, device=z.device).exponential_().log_()
    return {"perturbed": torch.sub(z, noise, alpha=TEMPERATURE, out=noise)}


def published_commit(x: Inputs, _s: int) -> Call:
    """Per trajectory a top-n and an assignment; the counts are known to the host."""
    a = x.commit
    tokens, splits, counts = a["tokens"].clone(), a["splits"].tolist(), a["counts"].tolist()

    def call() -> dict[str, Tensor]:
        for p, count in enumerate(counts):
            rows = slice(splits[p], splits[p + 1])
            best = torch.topk(a["confidence"][rows], count).indices
            tokens[p, a["positions"][rows][best]] = a["candidates"][rows][best]
        return {"tokens": tokens}

    return call


def composed_commit(x: Inputs, _s: int) -> Call:
    """All trajectories at once: one sort of padded rows, one scatter."""
    a, (p, length) = x.commit, x.commit["tokens"].shape
    tokens = a["tokens"].clone()
    trajectory = torch.bucketize(torch.arange(x.case.N, device=x.device), a["splits"][1:], right=True)
    slot = trajectory * length + a["positions"]

    def call() -> dict[str, Tensor]:
        padded = torch.full((p * length,), -math.inf, device=x.device)
        padded[slot] = a["confidence"]
        rank = padded.view(p, length).argsort(dim=1, descending=True).argsort(dim=1).view(-1)[slot]
        kept = rank < a["counts"][trajectory]
        flat = tokens.view(-1)
        flat[slot] = torch.where(kept, a["candidates"], flat[slot])
        return {"tokens": tokens}

    return call
