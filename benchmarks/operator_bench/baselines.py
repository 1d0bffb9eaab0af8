"""The same work without this package.

``published`` is the published algorithm in PyTorch eager: softmax, log(p + 1e-10), top-p by sorting, multinomial,
matmul, autograd, torch.optim.Adam. ``compiled`` is the same under torch.compile, with the draw by exponential
noise (as gpt-fast does, so that it waits for no host) and Adam as one fused pass. ``composed`` is the strongest
composition of PyTorch calls that we know: nothing computed twice, probabilities in E's dtype, the library's matrix
products, the gradient by hand, fused Adam. ``two-pass`` is exp(z / tau - logsumexp) in one compiled pass, then a plain
product. All keep optimiser state in the logits' dtype, as PyTorch does.
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
    return torch.compile(function)


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


def composed_embedding(z: Tensor, e: Tensor, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
    soft = torch.softmax(z / TEMPERATURE, dim=-1).to(e.dtype) @ e
    return {"output": soft.lerp(e[tokens], weight[:, None].to(e.dtype)), "soft": soft}


def probabilities(z: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    return (z.float() / TEMPERATURE - lse[:, None]).exp().to(dtype)


def embedding_by(function: Callable, compile: bool = False) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z, e, tokens, weight = x.logits[s], x.embedding, x.tokens, x.weight
        run = compiled(function) if compile else function

        def call() -> dict[str, Tensor]:
            with torch.no_grad():
                output = run(z, e, tokens, weight)
            return output if isinstance(output, dict) else {"output": output}

        return call

    return build


def two_pass_embedding(x: Inputs, s: int) -> Call:
    z, lse, e, tokens, weight = x.logits[s], x.logsumexp[s], x.embedding, x.tokens, x.weight
    first = compiled(probabilities)

    def call() -> dict[str, Tensor]:
        soft = torch.mm(first(z, lse, e.dtype), e)
        return {"output": soft.lerp(e[tokens], weight[:, None].to(e.dtype)), "soft": soft}

    return call


def autograd_of(x: Inputs, z: Tensor, compile: bool) -> Callable[[], Tensor]:
    """The backward pass of the published embedding alone; its forward pass runs here."""
    forward = compiled(published_embedding) if compile else published_embedding
    output = forward(z.requires_grad_(), x.embedding, x.tokens, x.weight)
    return lambda: torch.autograd.grad(output, z, x.grad, retain_graph=True)[0]


def gradient_by_hand(x: Inputs, z: Tensor) -> Callable[[], Tensor]:
    e, g, soft = x.embedding, x.grad, x.soft
    dot = torch.linalg.vecdot(g.float(), soft)[:, None]
    inner = torch.empty(z.shape, dtype=e.dtype, device=z.device)

    def gradient() -> Tensor:
        q = torch.softmax(z.detach() / TEMPERATURE, dim=-1)
        torch.mm(g, e.T, out=inner)
        return inner.sub_(dot.to(e.dtype)).mul_(q).div_(TEMPERATURE).to(z.dtype)

    return gradient


def adam_update(z: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float, step: int) -> None:
    """For torch.compile: one pass. The ascent step of torch.optim.Adam."""
    m.lerp_(gradient, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    z.add_(lr / (1 - BETAS[0] ** step) * m / denominator)


class Optimizer:
    """Adam's ascent on one copy of the logits: ``torch.optim.Adam``, fused or not, or the compiled pass above."""

    def __init__(self, x: Inputs, z: Tensor, kind: str, step: int):
        # Compiled forward passes may have saved z: it is written by data, which autograd does not watch.
        self.z, self.kind, self.step, self.lr = z.data, kind, step, x.lr
        self.m, self.v = x.moments(z.dtype) if step > 1 else (torch.zeros_like(z), torch.zeros_like(z))
        if kind != "compiled":
            self.m.neg_()  # torch.optim.Adam ascends by descending on the negative
            on_cuda = z.device.type == "cuda"
            options = {"fused": kind == "fused", "capturable": on_cuda}
            self.adam = torch.optim.Adam([z], lr=x.lr, betas=BETAS, eps=EPS, maximize=True, **options)
            count = torch.tensor(float(step - 1), device=z.device if on_cuda or kind == "fused" else "cpu")
            self.adam.state[z] = {"step": count, "exp_avg": self.m, "exp_avg_sq": self.v}

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> dict[str, Tensor]:
        if self.step == 1:  # every denoising step begins with a fresh optimiser
            self.m.zero_(), self.v.zero_()
        if self.kind == "compiled":
            compiled(adam_update)(self.z, gradient, self.m, self.v, self.lr, self.step)
        else:
            self.adam.param_groups[0]["params"][0].grad = gradient
            self.adam.step()
        return {"logits": self.z, "exp_avg" if self.kind == "compiled" else "negative_exp_avg": self.m}


def gradient_of(x: Inputs, z: Tensor, kind: str) -> Callable[[], Tensor]:
    return gradient_by_hand(x, z) if kind == "fused" else autograd_of(x, z, compile=kind == "compiled")


def gradient_by(kind: str) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        gradient = gradient_of(x, x.logits[s].detach(), kind)
        return lambda: {"gradient": gradient()}

    return build


def adam_by(kind: str, step: int = STEP) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z = x.own_logits(s)
        gradient, optimizer = gradient_of(x, z, kind), Optimizer(x, z, kind, step)
        return lambda: optimizer(gradient())

    return build


def sgd_by(kind: str) -> Callable[[Inputs, int], Call]:
    def build(x: Inputs, s: int) -> Call:
        z, lr = x.own_logits(s), x.lr
        gradient = gradient_of(x, z, kind)
        update = compiled(torch.Tensor.add_) if kind == "compiled" else torch.Tensor.add_

        def call() -> dict[str, Tensor]:
            update(z.data, gradient(), alpha=lr)
            return {"logits": z.detach()}

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
        z, e, g = x.own_logits(s).requires_grad_(), x.embedding, x.grad
        optimizer = Optimizer(x, z, kind, STEP)

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
    z, e, g = x.own_logits(s), x.embedding, x.grad
    optimizer = Optimizer(x, z, "fused", STEP)
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
        torch.mm(g, e.T, out=inner)
        dot = torch.linalg.vecdot(g.float(), soft.float())[:, None]
        gradient = inner.sub_(dot.to(e.dtype)).mul_(q).div_(TEMPERATURE).to(z.dtype)
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
