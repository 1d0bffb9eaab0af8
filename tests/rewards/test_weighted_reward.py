"""A weighted sum: its reward and its gradient are the sums of the single ones."""

import pytest
import torch

from entrgi import CallableReward, LogLikelihoodReward, SequenceClassifierReward, WeightedReward, generate
from entrgi.prompts import Completion
from support import architectures, binding, tiny
from support.host_reads import NoHostReads

PROMPTS, WINDOWS, COPIES = ["the movie was w1 w2", "w5"], [7, 4], 2
WEIGHTS = [0.75, -2.0, 0.5]


def rewards():
    """Three formats, three widths."""
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [
        SequenceClassifierReward(architectures.classifier("gpt2"), tiny.tokenizer(chat=tiny.CHAT)),
        LogLikelihoodReward(architectures.causal_lm("opt", hidden_size=16, word_embed_proj_dim=16), tiny.tokenizer()),
        CallableReward(lambda e, m: (e.sin().sum(-1) * m).sum(1) / m.sum(1), tiny.tokenizer(), weight),
    ]


def relaxed(bound, places, ids, q):
    """Rewards where the response positions hold q [N, V] E, and the gradient by q."""
    rows = binding.window_rows(bound, places, len(ids) // len(places))
    buffer, columns = bound.inputs(ids)
    value = bound(buffer.flatten(0, 1).index_copy(0, rows, q @ bound.embedding).view(buffer.shape), columns)
    return value.detach(), torch.autograd.grad(value.sum(), q)[0]


def soft(places, copies):
    count = sum(place.stop - place.start for place in places) * copies
    logits = torch.randn(count, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.softmax(dim=1).requires_grad_()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradient_is_the_sum_of_the_gradients(count):
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    ids[1, places[0].start + 3] = binding.EOS
    q = soft(places, COPIES)
    chosen = rewards()[:count]
    singles = [relaxed(r.bind(binding.denoiser(), places, COPIES), places, ids, q) for r in chosen]
    bound = WeightedReward(chosen, WEIGHTS[:count]).bind(binding.denoiser(), places, COPIES)
    value, gradient = relaxed(bound, places, ids, q)
    assert bound.embedding.shape == (64, sum((32, 16, 5)[:count]))
    assert bound.inputs(ids)[0].shape[1] == max(WINDOWS), "the buffer holds the response window alone"
    expected = sum(w * v for w, (v, _) in zip(WEIGHTS, singles, strict=False))
    expected_gradient = sum(w * g for w, (_, g) in zip(WEIGHTS, singles, strict=False))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_selections():
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    bound = WeightedReward(rewards(), WEIGHTS).bind(binding.denoiser(), places, COPIES)
    value, gradient = binding.value_and_gradient(bound, ids)
    assert bound.select(torch.arange(4)) is bound
    for active in ([0], [1, 2], [0, 2, 3]):
        some, some_gradient = binding.value_and_gradient(bound.select(torch.tensor(active)), ids[active])
        torch.testing.assert_close(some, value[active], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(some_gradient, gradient[active], rtol=1e-10, atol=1e-10)


def test_sums_of_sums():
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    a, b, c = rewards()
    nested = WeightedReward([WeightedReward([a, b], [1.5, -4.0]), c], [0.5, 0.5])
    flat = WeightedReward([a, b, c], [0.75, -2.0, 0.5])
    results = [binding.value_and_gradient(r.bind(binding.denoiser(), places, COPIES), ids) for r in (nested, flat)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_embeddings_of_different_dtypes():
    """The common table is as precise as the most precise one; each model is fed its own dtype."""
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    half, single = tiny.bert_reward(torch.bfloat16), tiny.qwen3_reward(torch.float32)
    bound = WeightedReward([half, single], [1.0, 2.0]).bind(binding.denoiser(), places, COPIES)
    assert bound.embedding.dtype == torch.float32
    value, gradient = binding.value_and_gradient(bound, ids)
    parts = [binding.value_and_gradient(r.bind(binding.denoiser(), places, COPIES), ids)[0] for r in (half, single)]
    torch.testing.assert_close(value, parts[0] + 2 * parts[1])
    assert gradient.dtype == torch.float32
    with pytest.raises(ValueError, match=r"torch.float32, torch.float64, expected float64 for all or none"):
        WeightedReward([single, rewards()[2]], [1, 1]).bind(binding.denoiser(), places, COPIES)


def test_score():
    completions = [Completion("the", f"the {text}", text) for text in ("movie was good", "bad", "w3")]
    expected = sum(w * r.score(completions) for w, r in zip(WEIGHTS, rewards(), strict=True))
    got = WeightedReward(rewards(), WEIGHTS).score(completions)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_parts():
    """Every reward's own score, unweighted, and their names; sums of sums have the inner sum as a part."""
    completions = [Completion("the", f"the {text}", text) for text in ("movie was good", "bad")]
    reward = WeightedReward(rewards(), WEIGHTS)
    parts = reward.score_parts(completions)
    assert torch.equal(parts, torch.stack([part.score(completions) for part in rewards()], dim=1))
    assert torch.equal(reward.weigh(parts), reward.score(completions))
    assert reward.part_names == ("GPT2ForSequenceClassification", "OPTForCausalLM", "<lambda>")
    outer = WeightedReward([reward, rewards()[0]], [2, 1])
    assert torch.equal(outer.score_parts(completions)[:, 0], reward.score(completions))
    assert outer.part_names == ("WeightedReward", "GPT2ForSequenceClassification")
    assert reward.score_parts("w1").shape == (1, 3)
    assert reward.score([]).shape == (0,)


def test_reads_the_prompt_where_all_of_them_do():
    chat, *plain = rewards()
    assert WeightedReward(plain, [1, 1]).reads_prompt
    assert not WeightedReward([chat, *plain], [1, 1, 1]).reads_prompt


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (0, [], "rewards must hold at least one reward, got none"),
        (2, [1.0], "weights: got 1 for 2 rewards, expected one for each"),
        (2, [1.0, float("nan")], r"weights\[1\] must be a finite number, got nan"),
        (1, ["1"], r"weights\[0\] must be a finite number, got '1'"),
        (1, [True], r"weights\[0\] must be a finite number, got True"),
    ],
)
def test_arguments(count, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedReward(rewards()[:count], weights)


def test_errors_are_the_rewards_own():
    reward = WeightedReward([tiny.bert_reward(), tiny.bert_reward(max_length=7)], [1, 1])
    with pytest.raises(ValueError, match=r"prompts\[0\] needs 9 tokens in the reward model's format"):
        reward.bind(binding.denoiser(), binding.layouts(["the"], [6]), 1)


def test_nothing_reads_the_device():
    places = binding.layouts(PROMPTS, WINDOWS)
    bound = WeightedReward(rewards(), WEIGHTS).bind(binding.denoiser(), places, COPIES)
    ids = binding.tokens(places, COPIES)
    trajectories, positions = torch.tensor([0, 3]), torch.tensor([8, 3])
    with NoHostReads():
        embeds, columns = bound.inputs(ids)
        bound.row_index(trajectories, positions)
        leaf = embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(bound(leaf, columns).sum(), leaf)
    assert gradient.abs().sum() > 0


def test_generation():
    """One reward twice, in halves, is that reward; two that disagree cancel."""
    options = {"max_new_tokens": 5, "steps": 5, "seed": 0}
    half = WeightedReward([tiny.qwen3_reward(torch.float64)] * 2, [0.5, 0.5])
    results = [
        generate(["the movie", "w1"], tiny.denoiser(torch.float64), reward, **options)
        for reward in (tiny.qwen3_reward(torch.float64), half)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].rewards, results[1].rewards)


def test_an_output_tells_the_parts():
    """Of the texts returned, each reward's own score; nothing is read twice for it."""
    rewards = [tiny.bert_reward(seed=seed) for seed in (1, 5)]
    both = WeightedReward(rewards, [0.5, -2.0])
    options = {"max_new_tokens": 4, "steps": 4, "num_return_sequences": 2, "best_of": 5, "seed": 3}
    output = generate(["the movie", "w1"], tiny.denoiser(), both, **options)
    assert output.reward_parts.shape == (2, 2, 2)
    torch.testing.assert_close(both.weigh(output.reward_parts.flatten(0, 1)).view(2, 2), output.rewards)
    for b, prompt in enumerate(["the movie", "w1"]):
        made = [Completion(prompt, *texts) for texts in zip(output.texts[b], output.responses[b], strict=True)]
        for i, reward in enumerate(rewards):
            torch.testing.assert_close(output.reward_parts[b, :, i], reward.score(made))
    assert generate("w1", tiny.denoiser(), rewards[0], **options).reward_parts is None
