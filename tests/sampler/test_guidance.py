"""optimize_logits against softmax, autograd and torch.optim.Adam, with the same injected draws."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from entrgi.guidance import optimize_logits
from entrgi.rewards import attention_mask
from entrgi_ext import ops
from entrgi_ext.reference import gumbel
from support import tiny
from support.method import Options, optimize, visible

V, D, S = 40, 16, 14
EOS, PAD = 3, 0
# Per trajectory: length of the prefix, of the response, of the suffix.
SHAPES = [(0, 7, 1), (5, 7, 2), (1, 7, 1)]
TAU = 0.7


@dataclass
class Problem:
    """Ragged prompts, some tokens committed, an end of sequence inside two of the responses."""

    logits: torch.Tensor
    embedding: torch.Tensor
    inputs_embeds: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor
    response: torch.Tensor
    keys: torch.Tensor
    hard: torch.Tensor


def problem(dtype, vocabulary=V, width=D, steps=3, seed=7):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, vocabulary, (len(SHAPES), S), generator=generator)
    valid, response = torch.zeros(2, len(SHAPES), S, dtype=torch.bool)
    rows = []
    for p, (prefix, window, suffix) in enumerate(SHAPES):
        valid[p, : prefix + window + suffix] = True
        response[p, prefix : prefix + window] = True
        masked = [1, 2, 4, 6] if p != 1 else [0, 3, 4, 5]
        rows += [p * S + prefix + i for i in masked]
        if p < 2:  # committed, with masked positions on both sides
            tokens[p, prefix + (3 if p == 0 else 2)] = EOS if p == 0 else PAD
    logits = 2 * torch.randn(len(rows), vocabulary, generator=generator)
    # Rows whose best id is the end of sequence at first, by less than guidance can move.
    logits[5, EOS] = logits[5].max() + 0.05
    logits[9, EOS] = logits[9].max() + 0.05
    inputs_embeds = torch.randn(len(SHAPES), S, width, generator=generator)
    embedding = torch.randn(vocabulary, width, generator=generator)
    keys = torch.stack([torch.arange(len(rows)) + 11, *torch.zeros(2, len(rows)).long(), torch.tensor(rows)], 1)
    hard = torch.randint(0, vocabulary, (steps, len(rows)), generator=generator)
    # Every dtype gets the same values.
    tensors = [x.bfloat16().to(dtype) for x in (logits, embedding, inputs_embeds)]
    return Problem(*tensors, torch.tensor(rows), tokens, valid, response, keys, hard)


def network(dtype, width=D, scale=1.0):
    """A small reward network: one attention layer over the visible positions, pooled."""
    generator = torch.Generator().manual_seed(3)
    a, b, c = (scale * torch.randn(width, width, generator=generator) / width**0.5 for _ in "abc")
    a, b, c = (x.bfloat16().to(dtype) for x in (a, b, c))

    def reward(x, mask):  # [S, d], bool [S] -> scalar
        scores = (x @ a) @ (x @ b).T / width**0.5
        h = scores.masked_fill(~mask, -math.inf).softmax(-1) @ torch.tanh(x @ c)
        return torch.tanh(h[mask] + x[mask]).mul(mask.sum().to(dtype)).mean()

    return reward


GUIDANCE = ["entrgi", "aps", "expectation", "gumbel"]


@contextmanager
def drawing(hard):
    """Draws are the rows of ``hard``, int64 [M, N], in turn, whatever the logits are."""
    draws, draw = iter(hard), ops.sample_tokens
    with mock.patch.object(ops, "sample_tokens", lambda *given: draw(*given)._replace(token=next(draws))):
        yield


def ours(task, guidance, steps, reward, **options):
    z, buffer = task.logits.clone(), task.inputs_embeds.clone()

    def batched(embeds, tokens):
        mask = attention_mask(tokens, task.valid, task.response, EOS, PAD)
        return torch.stack([reward(e, m) for e, m in zip(embeds, mask, strict=True)])

    arguments = (z, task.embedding, buffer, task.rows, task.tokens, batched)
    options = {"keys": task.keys, "guidance": guidance, "steps": steps, "temperature": TAU, "lr": 0.5, **options}
    with drawing(task.hard):
        trace = optimize_logits(*arguments, **options)
    return z, trace


def direct(task, guidance, steps, reward, scale=1.0, **options):
    options = Options(
        steps=1,
        temperature=TAU,
        guidance=guidance,
        guidance_steps=steps,
        reward_scale=scale,
        eos=EOS,
        pad=PAD,
        **options,
    )

    def total(e, argmax):
        embeds = task.inputs_embeds.flatten(0, 1).index_put((task.rows,), e).view_as(task.inputs_embeds)
        ids = task.tokens.flatten().index_put((task.rows,), argmax).view_as(task.tokens)
        value = 0
        for p, (prefix, window, suffix) in enumerate(SHAPES):
            mask = visible(ids[p].tolist(), prefix, prefix + window, options)
            mask[prefix + window + suffix :] = [False] * (S - prefix - window - suffix)
            value = value + reward(embeds[p], torch.tensor(mask))
        return value

    def noise(m):
        keys = task.keys.clone()
        keys[:, 2] = m
        return gumbel(keys, torch.arange(task.logits.shape[1])).to(task.logits.dtype)

    return optimize(task.logits, task.embedding, options, total, lambda m, _: task.hard[m], noise)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_equals_autograd_and_adam_in_fp64(guidance, steps, scale):
    task, reward = problem(torch.float64), network(torch.float64)
    z, _ = ours(task, guidance, steps, reward, reward_scale=scale)
    expected = direct(task, guidance, steps, reward, scale)
    assert (expected - task.logits).abs().max() > 0.4 * steps, "guidance must have moved the logits"
    assert (z - expected).abs().max() <= 1e-8


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_equals_autograd_and_sgd_in_fp64(guidance, steps):
    task, reward = problem(torch.float64), network(torch.float64)
    z, _ = ours(task, guidance, steps, reward, optimizer="sgd", lr=20.0, reward_scale=0.5)
    expected = direct(task, guidance, steps, reward, 0.5, optimizer="sgd", guidance_lr=20.0)
    assert (expected - task.logits).abs().max() > 0.1 * steps, "guidance must have moved the logits"
    assert (z - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("relaxation", [0.3, 2.5])
def test_temperature_of_the_gumbel_relaxation(optimizer, relaxation):
    task, reward = problem(torch.float64), network(torch.float64)
    z, _ = ours(task, "gumbel", 3, reward, optimizer=optimizer, gumbel_temperature=relaxation)
    expected = direct(task, "gumbel", 3, reward, optimizer=optimizer, gumbel_temperature=relaxation)
    assert (z - expected).abs().max() <= 1e-8
    assert (z - ours(task, "gumbel", 3, reward, optimizer=optimizer)[0]).abs().max() > 1e-3


def test_end_of_sequence_mask_follows_argmax():
    """Where the optimised logits stop or start to favour the end of sequence, the reward sees it at once."""
    task, reward = problem(torch.float64), network(torch.float64)
    z, _ = ours(task, "entrgi", 3, reward)
    changed = (task.logits.argmax(-1) == EOS) != (z.argmax(-1) == EOS)
    assert changed.any()


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_torch(guidance, dtype):
    """Error against fp64 at most twice that of autograd and Adam in the same dtype: mean, root mean square, maximum.

    Over eight problems: Adam moves a logit by lr whichever sign its gradient has, so where that is nearly zero
    rounding decides, and the largest error of a single problem is luck in both.
    """
    vocabulary, width, steps = 400, 32, 3
    errors, own_errors = [], []
    for seed in range(8):
        exact, task = (problem(t, vocabulary, width, seed=seed) for t in (torch.float64, dtype))
        truth = direct(exact, guidance, steps, network(torch.float64, width))
        z, _ = ours(task, guidance, steps, network(dtype, width))
        errors.append(z.double() - truth)
        own_errors.append(direct(task, guidance, steps, network(dtype, width)).double() - truth)

    def sizes(parts):
        e = torch.cat(parts).abs()
        return torch.stack([e.mean(), e.square().mean().sqrt(), e.max()])

    assert (sizes(errors) <= 2 * sizes(own_errors)).all(), f"{sizes(errors)} against {sizes(own_errors)}"


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_qwen3_reward(guidance):
    """A causal reward model pooled at the last real position; it rounds to fp32 inside, even in fp64."""
    width, steps = 32, 3
    task = problem(torch.float64, tiny.LOGITS_WIDTH, width)
    model = tiny.qwen3_reward(torch.float64)
    task.embedding = model.weight

    def alone(embeds, mask):  # one unpadded trajectory through the model's own forward
        last = int(mask.nonzero().max()) + 1
        attended = mask[None, :last].long()
        return model.model(inputs_embeds=embeds[None, :last], attention_mask=attended).logits[0, 0]

    def batched(embeds, tokens):
        return model.relaxed(embeds, attention_mask(tokens, task.valid, task.response, EOS, PAD))

    z = task.logits.clone()
    arguments = (z, task.embedding, task.inputs_embeds.clone(), task.rows, task.tokens, batched)
    with drawing(task.hard):
        optimize_logits(*arguments, keys=task.keys, guidance=guidance, steps=steps, temperature=TAU)
    expected = direct(task, guidance, steps, alone)
    # A component whose gradient is near Adam's eps moves by a part of lr that such rounding decides.
    difference = (z - expected).abs()
    assert difference.median() <= 1e-7
    assert difference.max() <= 1e-3


def test_trace_reports_rewards_weights_and_initial_entropy():
    task, reward = problem(torch.float64), network(torch.float64)
    _, trace = ours(task, "entrgi", 3, reward)
    assert trace.rewards.shape == (3, len(SHAPES))
    assert trace.weights.shape == (3, len(task.rows))
    p, q = task.logits.softmax(-1), (task.logits / TAU).softmax(-1)
    torch.testing.assert_close(trace.weights[0], -(p * p.log()).sum(-1) / math.log(V))
    torch.testing.assert_close(trace.initial_entropy, -(q * q.log()).sum(-1))
    assert trace.rewards[-1].sum() > trace.rewards[0].sum(), "ascent"


def test_padding_rows_are_left_alone():
    task, reward = problem(torch.float64), network(torch.float64)
    z, trace = ours(task, "entrgi", 3, reward)
    padded = problem(torch.float64)
    order = torch.tensor([3, 0, 1, -1, *range(4, 12), 2, -1])
    real = order >= 0
    padded.logits = torch.where(real[:, None], task.logits[order], 1.5)
    padded.rows = torch.where(real, task.rows[order], -1)
    padded.keys, padded.hard = task.keys[order], task.hard[:, order]
    got, padded_trace = ours(padded, "entrgi", 3, reward)
    torch.testing.assert_close(got[real], z[order[real]], rtol=0, atol=1e-12)
    assert (got[~real] == 1.5).all()
    torch.testing.assert_close(padded_trace.rewards, trace.rewards, rtol=0, atol=1e-12)


def test_draws_are_fresh_in_every_step_and_keyed():
    """Without injected tokens each Adam step draws with its own iteration number."""
    from entrgi_ext.reference import sample_tokens

    task, reward = problem(torch.float64), network(torch.float64)
    common_options = {"keys": task.keys, "guidance": "aps", "temperature": TAU, "top_p": 0.9, "top_k": 20}
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[[5, 6, EOS]] = True

    def batched(embeds, tokens):
        mask = attention_mask(tokens, task.valid, task.response, EOS, PAD)
        return torch.stack([reward(e, m) for e, m in zip(embeds, mask, strict=True)])

    common = (task.embedding, task.inputs_embeds.clone(), task.rows, task.tokens, batched)
    drawn, z = [], task.logits.clone()
    for m in range(3):  # replay: the first m draws injected give the logits of the next one
        keys = task.keys.clone()
        keys[:, 2] = m
        drawn.append(sample_tokens(z, keys, TAU, 0.9, 20, forbidden).token)
        z = task.logits.clone()
        with drawing(drawn):
            optimize_logits(z, *common, steps=m + 1, **common_options)
    got = task.logits.clone()
    optimize_logits(got, *common, steps=3, forbidden=forbidden, **common_options)
    assert torch.equal(got, z)
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_one_word_vocabulary_has_no_entropy():
    z = torch.zeros(2, 1)
    trace = optimize_logits(
        z,
        torch.ones(1, 4),
        torch.zeros(1, 2, 4),
        torch.arange(2),
        torch.zeros(1, 2, dtype=torch.long),
        lambda e, _: e.sum((1, 2)),
        keys=torch.zeros(2, 4, dtype=torch.long),
    )
    assert torch.equal(trace.weights, torch.zeros(3, 2))
    assert torch.isfinite(z).all()


def test_no_rows():
    task = problem(torch.float32)
    task.logits, task.rows, task.keys = task.logits[:0], task.rows[:0], task.keys[:0]
    task.hard = task.hard[:, :0]
    _, trace = ours(task, "entrgi", 3, network(torch.float32))
    assert trace.weights.shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": "none"}, "guidance must be one of entrgi, aps, expectation, gumbel, got 'none'"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, got 'lion'"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"row_index": torch.zeros(3, dtype=torch.long)}, r"row_index must have shape \[12\], got \[3\]"),
        ({"embedding": torch.zeros(V, D + 1)}, "embedding must have shape"),
        ({"tokens": torch.zeros(2, S, dtype=torch.long)}, "tokens must have shape"),
        ({"keys": torch.zeros(12, 3, dtype=torch.long)}, "keys must have shape"),
        ({"tokens": torch.zeros(3, S, dtype=torch.int32)}, "tokens must be int64, got torch.int32"),
        ({"reward": lambda e, _: e.sum()}, r"reward must return shape \[3\], got \[\]"),
        ({"reward": lambda e, _: torch.zeros(3)}, "reward must be differentiable in inputs_embeds"),
        ({"logits": torch.zeros(12)}, "logits, embedding, inputs_embeds must be"),
        ({"inputs_embeds": torch.zeros(S, 3, D).transpose(0, 1)}, "inputs_embeds must be contiguous"),
    ],
)
def test_bad_input(change, message):
    task = problem(torch.float32)
    arguments = {
        "logits": task.logits,
        "embedding": task.embedding,
        "inputs_embeds": task.inputs_embeds,
        "row_index": task.rows,
        "tokens": task.tokens,
        "reward": lambda e, _: e.sum((1, 2)),
        "keys": task.keys,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        optimize_logits(**arguments)


def test_the_former_name_of_an_argument():
    arguments = {
        "logits": torch.zeros(2, 3),
        "embedding": torch.ones(3, 4),
        "inputs_embeds": torch.zeros(1, 2, 4),
        "rows": torch.arange(2),
        "tokens": torch.zeros(1, 2, dtype=torch.long),
        "reward": lambda e, _: e.sum((1, 2)),
        "keys": torch.zeros(2, 4, dtype=torch.long),
    }
    with pytest.warns(DeprecationWarning, match="rows= is deprecated .*, use row_index=") as caught:
        optimize_logits(**arguments)
    assert caught[0].filename == __file__


def test_rows_out_of_range():
    task = problem(torch.float32)
    task.rows[0] = 3 * S
    with pytest.raises(RuntimeError, match=r"row_index must be -1 or in \[0, 42\), got 42"):
        ours(task, "entrgi", 1, network(torch.float32))
