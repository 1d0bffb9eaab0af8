"""Rewards bound to made-up prompts without a denoiser, and relaxed inputs for them."""

from types import SimpleNamespace

import torch

from entrgi.sequences import Layout
from support import tiny

EOS, PAD = 3, 0


def denoiser(tok=None, eos=EOS, pad=PAD, width=tiny.LOGITS_WIDTH, device="cpu"):
    """What bind reads of a denoiser."""
    return SimpleNamespace(
        tokenizer=tok or tiny.tokenizer(),
        vocab_size=width,
        eos_token_id=eos,
        pad_token_id=pad,
        device=torch.device(device),
        dtype=torch.float64,
    )


def layouts(prompts, windows, tok=None):
    """As a denoiser lays them out: [CLS] prompt window [SEP]; messages take one column."""
    tok = tok or tiny.tokenizer()
    result = []
    for prompt, window in zip(prompts, windows, strict=True):
        is_text = isinstance(prompt, str)
        before = tok(prompt, add_special_tokens=False)["input_ids"] if is_text else []
        prefix = [2, *before] if is_text else [2, 0]
        result.append(Layout(prefix, [3], window, prompt, before, (EOS,)))
    return result


def tokens(places, copies, seed=0, low=5, high=60):
    """Random words at the response windows of P = len(places) * copies trajectories, zeros elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    width = max(place.length for place in places)
    result = torch.zeros(len(places) * copies, width, dtype=torch.long)
    for row in range(result.shape[0]):
        place = places[row // copies]
        count = place.stop - place.start
        result[row, place.start : place.stop] = torch.randint(low, high, (count,), generator=generator)
    return result


def value_and_gradient(bound, ids):
    """Rewards of hard tokens, and their gradients [P, W] x d at the response windows, as one flat tensor per row."""
    embeds, columns = bound.inputs(ids)
    leaf = embeds.requires_grad_()
    value = bound(leaf, columns)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def window_rows(bound, places, copies):
    """Rows of the buffer that hold the response windows, in order."""
    trajectories, positions = [], []
    for row in range(len(places) * copies):
        place = places[row // copies]
        positions += range(place.start, place.stop)
        trajectories += [row] * (place.stop - place.start)
    return bound.row_index(torch.tensor(trajectories), torch.tensor(positions))


def window_gradient(bound, ids, places, copies):
    """Rewards [P] and their gradients [N, d] at the response positions."""
    value, gradient = value_and_gradient(bound, ids)
    return value, gradient.flatten(0, 1)[window_rows(bound, places, copies)]
