"""The method written down a second time: one trajectory, one position at a time, softmax and autograd.

Nothing here imports the driver. Only the Gumbel noise of a key comes from ``entrgi_ext.philox``.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from entrgi_ext.philox import gumbel


@dataclass
class Options:
    steps: int
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    schedule: str = "paper"
    alg: str = "entropy"
    alg_temp: float = 0.0
    threshold: float | None = None
    block_length: int | None = None
    early_exit: bool = False
    entropy_rule: str = "auto"
    guidance: str = "entrgi"
    guidance_steps: int = 3
    guidance_lr: float = 0.5
    guidance_interval: int | tuple[int, int] = 1
    optimizer: str = "adam"
    gumbel_temperature: float = 1.0
    reward_scale: float = 1.0
    deprioritize_eos: bool = True
    end_tokens: str = "eos"
    mask: int = 4
    eos: int | None = 3
    ends: tuple[int, ...] = (3,)  # all of them, eos included
    pad: int | None = 0

    @property
    def tau(self):
        return 1.0 if self.temperature == 0 else self.temperature

    @property
    def ranked_last(self):
        return self.ends if self.end_tokens == "all" else (self.eos,)


@dataclass
class Step:
    """What one denoising step did; positions are columns of the trajectory."""

    step: int
    tokens: list[int]
    committed: set[int]
    entropy: dict[int, float]
    weight: dict[int, float] = field(default_factory=dict)
    reward: float = math.nan


def entropy(p):
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


def filtered(z, options, forbidden):
    """softmax(filter(z / tau)) of one position, as a dense vector."""
    z = z.masked_fill(forbidden, -math.inf) + 0.0
    p = (z / options.tau).softmax(0)
    values, masses = z.tolist(), p.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    keep, ahead = [], 0.0
    for i in order:
        if (ahead <= options.top_p or not keep) and values[i] > -math.inf:
            keep.append(i)
        ahead += masses[i]
    if options.top_k is not None:
        limit = values[order[min(options.top_k, len(values)) - 1]]
        keep = [i for i in keep if values[i] >= limit]
    result = torch.zeros_like(p)
    result[keep] = p[keep] / p[keep].sum()
    return result


def draws(z, options, forbidden, keys):
    """A keyed draw of each position of z [N, V]; a key is (seed, step, iteration, position). Greedy: the first best."""
    if options.temperature == 0:
        return [int(row.masked_fill(forbidden, -math.inf).argmax()) for row in z]
    noise = gumbel(torch.tensor(keys), torch.arange(z.shape[1]))
    p = [filtered(row, options, forbidden) for row in z]
    return [int((row.double().log() + own).argmax()) for row, own in zip(p, noise, strict=True)]


def optimize(z, E, options, reward, hard_tokens, noise=None, trace=None):
    """M steps of ascent on z [N, V].

    ``reward(e [N, d], argmax [N])`` is a scalar, ``hard_tokens(m, z)`` is [N] and ``noise(m)`` [N, V]. To ``trace``
    goes the pair (w [N], reward before the update) of every step.
    """
    z = torch.nn.Parameter(z.clone())
    if options.optimizer == "sgd":
        ascent = torch.optim.SGD([z], lr=options.guidance_lr)
    else:
        ascent = torch.optim.Adam([z], lr=options.guidance_lr, betas=(0.9, 0.999), eps=1e-8)
    for m in range(options.guidance_steps):
        p = z.detach().softmax(-1)
        w = -torch.special.xlogy(p, p).sum(-1) / math.log(z.shape[-1])
        if options.guidance == "gumbel":
            q = ((z / options.tau + noise(m)) / options.gumbel_temperature).softmax(-1)
            e = q @ E
        else:
            e = soft = (z / options.tau).softmax(-1) @ E
            if options.guidance != "expectation":
                hard = E[hard_tokens(m, z.detach())]
                part = {"entrgi": w, "aps": torch.ones_like(w)}[options.guidance]
                e = soft + (part[:, None] * (hard - soft)).detach()
        value = reward(e, z.detach().argmax(-1))
        if trace is not None:
            trace.append((w, value.item()))
        ascent.zero_grad()
        (-options.reward_scale * value).backward()
        ascent.step()
    return z.detach()


def visible(tokens, first, stop, options):
    """What the reward model attends to in a sequence whose response is tokens[first:stop]."""
    seen_end, mask = False, []
    for i, token in enumerate(tokens):
        inside = first <= i < stop
        mask.append(not (inside and (seen_end or token == options.pad)))
        seen_end = seen_end or (inside and token in options.ranked_last)
    return mask


def kept_noise(schedule, i, steps):
    """s/t: the share of the masked positions that step i of ``steps`` leaves masked."""
    if schedule == "paper":
        t = np.asarray(torch.linspace(1, 1e-3, steps + 1))
        return float(t[i + 1] / t[i])
    if schedule == "rgrl":
        one, t, s = np.float32(1), np.float32((steps - i) / steps), np.float32((steps - i - 1) / steps)
        return float((one - (one - s)) / (one - (one - t)))
    return 1 - 1 / (steps - i)


def commit_count(masked, i, steps, schedule="paper"):
    """How many of ``masked`` positions step i of ``steps`` commits."""
    if i == steps - 1:
        return masked
    if schedule == "paper":
        t = np.asarray(torch.linspace(1, 1e-3, steps + 1))
        return int(np.float32(masked) * (np.float32(1) - t[i + 1] / t[i]))
    if schedule == "rgrl":
        return int(np.rint(np.float64(masked) * (1 - np.float64(kept_noise("rgrl", i, steps)))))
    # An even split of m: m // T each, one more in the first m % T. What is left goes on being split evenly.
    return math.ceil(masked / (steps - i))


def origin_commits(seed, step, position, ratio):
    """Whether a position is chosen, with probability 1 - ratio: the uniform behind its noise lies below that."""
    noise = float(gumbel(torch.tensor([[seed, step, -2, position]]), torch.zeros(1, dtype=torch.long)))
    return noise > -math.log(-math.log1p(-(1 - ratio)))


def is_guided(options, step):
    if options.guidance == "none":
        return False
    if isinstance(options.guidance_interval, int):
        return step % options.guidance_interval == 0
    first, stop = options.guidance_interval
    return first <= step < stop


def blocks(tokens, options):
    """[(positions, first step, number of steps)], left to right."""
    masked = [i for i, token in enumerate(tokens) if token == options.mask]
    length = options.block_length or len(masked)
    groups = [masked[a : a + length] for a in range(0, len(masked), length)] if masked else []
    bounds = [options.steps * b // len(groups) for b in range(len(groups) + 1)] if groups else []
    return [(group, bounds[b], bounds[b + 1] - bounds[b]) for b, group in enumerate(groups)]


def generate(tokens, seed, window, options, logits_of, E, prefix, suffix, reward_model, forbidden, record=None):
    """One trajectory.

    ``tokens``: its ids, masks included; ``window``: (first, stop) of the response; ``logits_of(tokens)`` gives
    [S, V]; ``prefix`` and ``suffix``: ids around the response for the reward; ``reward_model(embeds [S, d], mask)``.
    ``record``: a list that receives a Step for every denoising step made.
    """
    tokens, (first, stop) = list(tokens), window
    made = 0
    for group, first_step, n_steps in blocks(tokens, options):
        for i in range(n_steps):
            left = [position for position in group if tokens[position] == options.mask]
            if not left:
                break
            step = first_step + i if options.threshold is None else made
            made += 1
            last = i == n_steps - 1
            n = commit_count(len(left), i, n_steps, options.schedule)
            chosen = None
            if options.alg == "origin":
                ratio = kept_noise(options.schedule, i, n_steps)
                chosen = left if last else [p for p in left if origin_commits(seed, step, p, ratio)]
                n = len(chosen)
            if options.threshold is not None:
                n = max(n, 1)
            if n == 0:
                continue

            positions = [p for p, token in enumerate(tokens) if token == options.mask]
            z0 = logits_of(tokens)[positions]
            z, trace = z0, []

            def key(iteration, position, step=step):
                return [seed, step, iteration, position]

            if is_guided(options, step):

                def hard_tokens(m, z, positions=positions, key=key):
                    return torch.tensor(draws(z, options, forbidden, [key(m, p) for p in positions]))

                def noise(m, positions=positions, key=key, width=z0.shape[1], dtype=z0.dtype):
                    return gumbel(torch.tensor([key(m, p) for p in positions]), torch.arange(width)).to(dtype)

                def reward(e, argmax, positions=positions, tokens=tokens):
                    ids = list(tokens)
                    for position, token in zip(positions, argmax.tolist(), strict=True):
                        ids[position] = token
                    where = {position: i for i, position in enumerate(positions)}
                    rows = [E[token] for token in prefix]
                    rows += [e[where[i]] if i in where else E[tokens[i]] for i in range(first, stop)]
                    rows += [E[token] for token in suffix]
                    mask = visible(ids, first, stop, options)[first:stop]
                    mask = [True] * len(prefix) + mask + [True] * len(suffix)
                    return reward_model(torch.stack(rows), torch.tensor(mask))

                z = optimize(z0, E, options, reward, hard_tokens, noise, trace)

            rule = options.entropy_rule
            if rule == "auto":
                rule = "filtered" if options.guidance == "none" else "initial"
            drawn = draws(z, options, forbidden, [key(-1, position) for position in positions])
            proposals, spread = [], {}
            for row, position in enumerate(positions):
                initial = (z0[row] / options.tau).softmax(0)
                spread[position] = entropy(initial)
                if position not in left:
                    continue
                token = drawn[row]
                p = filtered(z[row], options, forbidden)
                top = p.sort(descending=True).values
                score = {
                    "entropy": -(entropy(p) if rule == "filtered" else spread[position]),
                    "maskgit_plus": float(p[token]),
                    "topk_margin": float(top[0] - top[1]),
                    "anchor": float(z[row, token]),
                    "random": 0.0,
                    "origin": 0.0,
                }[options.alg]
                if options.deprioritize_eos and token in options.ranked_last and options.alg != "origin":
                    score = -math.inf
                if options.alg_temp > 0 or options.alg == "random":
                    gumbels = gumbel(torch.tensor([key(-2, position)]), torch.zeros(1, dtype=torch.long))
                    score = score / (options.alg_temp or 1.0) + float(gumbels)
                proposals.append((score, position, token))
            if options.threshold is not None:
                n = max(n, sum(score >= options.threshold for score, _, _ in proposals))
            if chosen is not None:
                taken = [proposal for proposal in proposals if proposal[1] in chosen]
            else:
                taken = sorted(proposals, key=lambda x: (-x[0], x[1]))[:n]
            for _, position, token in taken:
                tokens[position] = token

            response = tokens[first:stop]
            end = next((i for i, token in enumerate(response) if token in options.ends), None)
            ended = options.early_exit and end is not None and options.mask not in response[:end]
            if ended:
                tokens = [options.eos if token == options.mask else token for token in tokens]
            if record is not None:
                weights, value = trace[-1] if trace else ([], math.nan)
                weight = dict(zip(positions, map(float, weights), strict=bool(trace)))
                committed = {position for _, position, _ in taken}
                record.append(Step(step, list(tokens), committed, spread, weight, value))
            if ended:
                return tokens
    return tokens
