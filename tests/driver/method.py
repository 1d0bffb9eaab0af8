"""The method written down a second time: one trajectory, one position at a time, softmax and autograd.

Nothing here imports the driver. Only the Gumbel noise of a key comes from ``entrgi_ext.reference``.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from entrgi_ext.reference import gumbel


@dataclass
class Options:
    steps: int
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    alg: str = "entropy"
    alg_temp: float = 0.0
    guidance: str = "entrgi"
    guidance_steps: int = 3
    guidance_lr: float = 0.5
    reward_scale: float = 1.0
    filtered_entropy: bool = False
    deprioritize_eos: bool = True
    mask: int = 4
    eos: int | None = 3
    pad: int | None = 0


def entropy(p):
    return -sum(float(x) * math.log(float(x)) for x in p if x > 0)


def filtered(z, options, forbidden):
    """softmax(filter(z / tau)) of one position, as a dense vector."""
    z = z.masked_fill(forbidden, -math.inf) + 0.0
    p = (z / options.temperature).softmax(0)
    order = sorted(range(len(z)), key=lambda i: (-float(z[i]), i))
    keep, ahead = [], 0.0
    for i in order:
        if (ahead <= options.top_p or not keep) and z[i] > -math.inf:
            keep.append(i)
        ahead += float(p[i])
    if options.top_k is not None:
        limit = float(z[order[min(options.top_k, len(z)) - 1]])
        keep = [i for i in keep if float(z[i]) >= limit]
    result = torch.zeros_like(p)
    result[keep] = p[keep] / p[keep].sum()
    return result


def draw(z, options, forbidden, key):
    """A keyed draw of one position; key = (seed, step, iteration, position)."""
    p = filtered(z, options, forbidden)
    noise = gumbel(torch.tensor([key]), torch.arange(len(z)))[0]
    return int((p.double().log() + noise).argmax())


def optimize(z, E, options, reward, hard_tokens):
    """M Adam steps on z [N, V]. ``reward(e [N, d], argmax [N])`` is a scalar; ``hard_tokens(m, z)`` is [N]."""
    z = torch.nn.Parameter(z.clone())
    adam = torch.optim.Adam([z], lr=options.guidance_lr, betas=(0.9, 0.999), eps=1e-8)
    for m in range(options.guidance_steps):
        q = (z / options.temperature).softmax(-1)
        soft = q @ E
        if options.guidance == "expectation":
            e = soft
        else:
            hard = E[hard_tokens(m, z.detach())]
            p = z.softmax(-1)
            w = -torch.special.xlogy(p, p).sum(-1) / math.log(z.shape[-1])
            w = torch.ones_like(w) if options.guidance == "aps" else w
            e = soft + (w[:, None] * (hard - soft)).detach()
        loss = -options.reward_scale * reward(e, z.detach().argmax(-1))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return z.detach()


def visible(tokens, first, stop, options):
    """What the reward model attends to in a sequence whose response is tokens[first:stop]."""
    seen_eos, mask = False, []
    for i, token in enumerate(tokens):
        inside = first <= i < stop
        mask.append(not (inside and (seen_eos or token == options.pad)))
        seen_eos = seen_eos or (inside and token == options.eos)
    return mask


def commit_count(n_masked, step, steps):
    t = np.asarray(torch.linspace(1, 1e-3, steps + 1))
    if step == steps - 1:
        return n_masked
    return int(np.float32(n_masked) * (np.float32(1) - t[step + 1] / t[step]))


def generate(tokens, seed, window, options, logits_of, E, prefix, suffix, reward_model, forbidden):
    """One trajectory.

    ``tokens``: its ids, masks included; ``window``: (first, stop) of the response; ``logits_of(tokens)`` gives
    [S, V]; ``prefix`` and ``suffix``: ids around the response for the reward; ``reward_model(embeds [S, d], mask)``.
    """
    tokens, (first, stop) = list(tokens), window
    for step in range(options.steps):
        positions = [i for i, token in enumerate(tokens) if token == options.mask]
        n = commit_count(len(positions), step, options.steps)
        if n == 0:
            continue
        z0 = logits_of(tokens)[positions]
        z = z0

        def key(iteration, position, step=step):
            return [seed, step, iteration, position]

        if options.guidance != "none":

            def hard_tokens(m, z, positions=positions, key=key):
                drawn = [draw(z[i], options, forbidden, key(m, p)) for i, p in enumerate(positions)]
                return torch.tensor(drawn)

            def reward(e, argmax, positions=positions):
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

            z = optimize(z0, E, options, reward, hard_tokens)

        proposals = []
        for i, position in enumerate(positions):
            token = draw(z[i], options, forbidden, key(-1, position))
            p = filtered(z[i], options, forbidden)
            top = p.sort(descending=True).values
            score = {
                "entropy": -entropy(p if options.filtered_entropy else (z0[i] / options.temperature).softmax(0)),
                "maskgit_plus": float(p[token]),
                "topk_margin": float(top[0] - top[1]),
                "anchor": float(z[i, token]),
            }[options.alg]
            if options.deprioritize_eos and token == options.eos:
                score = -math.inf
            if options.alg_temp > 0:
                noise = gumbel(torch.tensor([key(-2, position)]), torch.zeros(1, dtype=torch.long))
                score = score / options.alg_temp + float(noise)
            proposals.append((score, position, token))
        for _, position, token in sorted(proposals, key=lambda x: (-x[0], x[1]))[:n]:
            tokens[position] = token
    return tokens
