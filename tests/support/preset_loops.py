"""Both presets written straight from the method, as the loop that each is: whole matrices of logits, the gradient
in closed form, Adam by hand. Shares only the Gumbel noise of a key with the rest; takes method.generate's arguments,
of whose options only ``steps`` and the special ids are read.
"""

import math

import torch

from entrgi_ext.philox import gumbel


def entropy(p):
    return -torch.special.xlogy(p, p).sum(1)


def filter_(z, tau, top_p, top_k, forbidden):
    """softmax(filter(z / tau)), [N, V]."""
    z = z.masked_fill(forbidden, -math.inf)
    p = (z / tau).softmax(1)
    order = z.argsort(dim=1, descending=True, stable=True)
    ranked = p.gather(1, order)
    ahead = torch.cat([torch.zeros_like(ranked[:, :1]), ranked.cumsum(1)[:, :-1]], 1)
    p = torch.zeros_like(p).scatter(1, order, ranked * (ahead <= top_p))
    if top_k is not None:
        p = p * (z >= z.topk(top_k, dim=1).values[:, -1:])
    return p / p.sum(1, keepdim=True)


def draw(p, seed, step, iteration, positions):
    keys = torch.tensor([[seed, step, iteration, position] for position in positions.tolist()])
    return (p.log() + gumbel(keys, torch.arange(p.shape[1]))).argmax(1)


def guide(z, adam_steps, read, E, tau, top_p, top_k, forbidden, seed, step, positions):
    m = v = torch.zeros_like(z)
    for i in range(adam_steps):
        w = (entropy(z.softmax(1)) / math.log(z.shape[1]))[:, None]
        q = (z / tau).softmax(1)
        soft = q @ E
        hard = E[draw(filter_(z, tau, top_p, top_k, forbidden), seed, step, i, positions)]
        e = ((1 - w) * soft + w * hard).requires_grad_()
        (G,) = torch.autograd.grad(read(e, z.argmax(1)), e)
        gradient = q * (G @ E.T - (G * soft).sum(1, keepdim=True)) / tau
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        z = z + 0.5 * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    return z


def reader(tokens, masked, window, E, prefix, suffix, reward_model, eos, pad):
    """(e [N, d], argmax [N]) -> reward, with the prompt and the committed tokens around e."""
    inside = slice(*window)

    def read(e, argmax):
        ids, embeds = tokens.clone(), E[tokens].clone()
        ids[masked], embeds[masked] = argmax, e
        response = ids[inside]
        is_eos = (response == eos).long()
        seen = (is_eos.cumsum(0) - is_eos == 0) & (response != pad)
        ends = [torch.ones(len(part), dtype=torch.bool) for part in (prefix, suffix)]
        embeds = torch.cat([E[torch.tensor(prefix)], embeds[inside], E[torch.tensor(suffix)]])
        return reward_model(embeds, torch.cat([ends[0], seen, ends[1]]))

    return read


def paper(tokens, seed, window, options, logits_of, E, prefix, suffix, reward_model, forbidden, record=None):
    tokens, steps = torch.tensor(tokens), options.steps
    times = torch.linspace(1, 1e-3, steps + 1)
    for j in range(steps):
        masked = (tokens == options.mask).nonzero()[:, 0]
        n = int(len(masked) * (1 - times[j + 1] / times[j])) if j < steps - 1 else len(masked)
        if n == 0:
            continue
        z0 = logits_of(tokens.tolist())[masked]
        read = reader(tokens, masked, window, E, prefix, suffix, reward_model, options.eos, options.pad)
        z = guide(z0, 3, read, E, 0.7, 0.95, None, forbidden, seed, j, masked)
        token = draw(filter_(z, 0.7, 0.95, None, forbidden), seed, j, -1, masked)
        confidence = -entropy((z0 / 0.7).softmax(1))
        confidence[token == options.eos] = -math.inf
        best = confidence.argsort(descending=True, stable=True)[:n]
        tokens[masked[best]] = token[best]
    return tokens.tolist()


def rgrl(tokens, seed, window, options, logits_of, E, prefix, suffix, reward_model, forbidden, record=None):
    tokens, steps = torch.tensor(tokens), options.steps
    for j, i in enumerate(range(steps, 0, -1)):
        t, s = torch.tensor(i / steps), torch.tensor((i - 1) / steps)
        r = (1 - (1 - s)) / (1 - (1 - t))
        masked = (tokens == options.mask).nonzero()[:, 0]
        n = int(torch.round(len(masked) * (1 - r.double())))
        if n == 0:
            continue
        z0 = logits_of(tokens.tolist())[masked]
        read = reader(tokens, masked, window, E, prefix, suffix, reward_model, options.eos, options.pad)
        z = guide(z0, 1, read, E, 0.9, 0.95, 50, forbidden, seed, j, masked)
        p = filter_(z, 0.9, 0.95, 50, forbidden)
        token = draw(p, seed, j, -1, masked)
        best = (-entropy(p)).argsort(descending=True, stable=True)[:n]
        tokens[masked[best]] = token[best]
    return tokens.tolist()
