"""Keys and values of the prompt, computed once: the same rewards and gradients, whatever shares the batch."""

import pytest
import torch

from entrgi import LogLikelihoodReward, SequenceClassifierReward, WeightedReward
from entrgi.rewards.prefix import PrefixCache
from support import architectures, binding, tiny

PROMPTS = ["the movie was w1 w2 w3 w4", "w5", [{"role": "user", "content": "w6 w7"}]]
WINDOWS, COPIES = [8, 6, 3], 2


def make(kind, dtype=None, **options):
    model = architectures.classifier(kind)
    return SequenceClassifierReward(
        model if dtype is None else model.to(dtype), tiny.tokenizer(chat=tiny.CHAT), **options
    )


def pair(kind, dtype=None):
    return make(kind, dtype), make(kind, dtype, reuse_prefix=False)


@pytest.mark.parametrize(
    ("kind", "dtype", "close"),
    [
        ("gpt2", torch.float64, 1e-10),
        ("opt", torch.float64, 1e-10),
        ("qwen3", torch.float64, 1e-6),
        ("qwen3", torch.float32, 1e-5),
        ("llama", torch.float32, 1e-5),
        ("gemma2", torch.float32, 1e-5),
        ("mistral", torch.float32, 1e-5),
    ],
)
def test_same_rewards_and_gradients(kind, dtype, close):
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    ids[1, places[0].start + 2] = binding.EOS
    results = []
    for reward in pair(kind, dtype):
        bound = reward.bind(binding.denoiser(), places, COPIES)
        results.append(binding.window_gradient(bound, ids, places, COPIES))
        width = bound.inputs(ids)[0].shape[1]
        assert width == (8 + 1 if reward.reuse_prefix else 12 + 8 + 1)
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=close, atol=close)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=close, atol=close * scale)
    assert value.unique().numel() == value.numel(), "different trajectories have different rewards"


def test_repeated_passes_leave_the_prefix_untouched():
    bound = make("qwen3").bind(binding.denoiser(), (places := binding.layouts(PROMPTS, WINDOWS)), COPIES)
    prefix = bound.sequences.prefix
    kept = [x.clone() for x in (*prefix.keys, *prefix.values, prefix.valid, prefix.last)]
    ids, other = binding.tokens(places, COPIES), binding.tokens(places, COPIES, seed=1)
    first = binding.value_and_gradient(bound, ids)
    binding.value_and_gradient(bound, other)
    for again, before in zip(binding.value_and_gradient(bound, ids), first, strict=True):
        assert torch.equal(again, before)
    for now, before in zip((*prefix.keys, *prefix.values, prefix.valid, prefix.last), kept, strict=True):
        assert torch.equal(now, before)


def test_copies_share_the_storage():
    places = binding.layouts(PROMPTS, WINDOWS)
    bound = make("qwen3").bind(binding.denoiser(), places, 7)
    prefix = bound.sequences.prefix
    assert {x.shape[0] for x in (*prefix.keys, *prefix.values, prefix.last, bound.sequences.frame)} == {3}


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_selections(prompts):
    """Trajectories are the same alone and together, over shared storage."""
    places = binding.layouts(prompts, WINDOWS[: len(prompts)])
    bound = make("gpt2").bind(binding.denoiser(), places, 4)
    ids = binding.tokens(places, 4)
    value, gradient = binding.value_and_gradient(bound, ids)
    for active in ([0], [1, 2], [0, 3] if len(prompts) == 1 else [0, 5, 6, 11], list(range(len(ids)))):
        chosen = bound.select(torch.tensor(active))
        assert (chosen is bound) == (len(active) == len(ids))
        some, some_gradient = binding.value_and_gradient(chosen, ids[active])
        torch.testing.assert_close(some, value[active], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(some_gradient, gradient[active], rtol=1e-10, atol=1e-10)
        again = chosen.select(torch.tensor([len(active) - 1]))
        torch.testing.assert_close(binding.value_and_gradient(again, ids[active[-1:]])[0], value[active[-1:]])


def test_a_batch_equals_its_single_runs():
    reward = make("gpt2")
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, 1)
    together = binding.value_and_gradient(reward.bind(binding.denoiser(), places, 1), ids)[0]
    for i, place in enumerate(places):
        alone = reward.bind(binding.denoiser(), [place], 1)
        value = binding.value_and_gradient(alone, ids[i : i + 1])[0]
        torch.testing.assert_close(value, together[i : i + 1], rtol=1e-10, atol=1e-10)


def test_positions_stay_inside_the_table():
    """A long prompt beside a long response: their padding reaches beyond the context, their tokens do not."""
    prompts, windows = [" ".join(["w1"] * 30), "w2"], [3, 33]
    places = binding.layouts(prompts, windows)
    ids = binding.tokens(places, 1)
    values = [binding.value_and_gradient(reward.bind(binding.denoiser(), places, 1), ids)[0] for reward in pair("gpt2")]
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_everything_after_the_prefix_hidden(kind):
    """pad == eos (Dream) and a template without a suffix: the last visible position is the prefix's."""
    open_end = (
        "{% for m in messages %}{% if not loop.first %} {% endif %}{{ m['role'] }} : {{ m['content'] }}{% endfor %}"
    )
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    ids[2, places[1].start] = binding.EOS
    values = []
    for reuse in (True, False):
        tok = tiny.tokenizer(chat=open_end)
        reward = SequenceClassifierReward(architectures.classifier(kind), tok, reuse_prefix=reuse)
        bound = reward.bind(binding.denoiser(pad=binding.EOS), places, COPIES)
        values.append(binding.value_and_gradient(bound, ids)[0])
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    prefix = torch.tensor([tok("user : w5 assistant :", add_special_tokens=False)["input_ids"]])
    own = reward.model(input_ids=prefix).logits[0, 0]
    torch.testing.assert_close(values[0][2], own, rtol=1e-6, atol=1e-6)


def test_prompts_of_no_length():
    """One trajectory has nothing before its response, the other has."""
    tok = tiny.tokenizer()
    tok.cls_token = None
    places = binding.layouts(["", "w1 w2 w3"], [4, 5])
    ids = binding.tokens(places, 2)
    values = []
    for reuse in (True, False):
        reward = SequenceClassifierReward(architectures.classifier("gpt2"), tok, reuse_prefix=reuse)
        values.append(binding.value_and_gradient(reward.bind(binding.denoiser(), places, 2), ids)[0])
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)


def test_in_a_sum():
    """A sum of rewards reuses the prefixes of each."""
    places = binding.layouts(PROMPTS, WINDOWS)
    ids = binding.tokens(places, COPIES)
    results = []
    for reuse in (True, False):
        lm = LogLikelihoodReward(architectures.causal_lm("gpt2"), tiny.tokenizer(chat=tiny.CHAT), reuse_prefix=reuse)
        both = WeightedReward([make("gpt2", reuse_prefix=reuse), lm], [1.0, -0.5])
        results.append(binding.value_and_gradient(both.bind(binding.denoiser(), places, COPIES), ids))
    for with_reuse, without in zip(*results, strict=True):
        torch.testing.assert_close(with_reuse, without, rtol=1e-10, atol=1e-10)


def test_cache_keeps_nothing():
    """Keys of one pass are not seen by the next, and prompts find their own."""
    bound = make("gpt2").bind(binding.denoiser(), binding.layouts(PROMPTS, WINDOWS), COPIES)
    prefix, prompt = bound.sequences.prefix, bound.sequences.prompt
    new = torch.randn(6, *prefix.keys[0].shape[1:2], 5, prefix.keys[0].shape[3], dtype=torch.float64)
    results = []
    for copies in (COPIES, None):
        cache = PrefixCache(prefix, prompt, copies)
        for _ in range(2):
            keys, values = cache.update(new, 2 * new, 1)
            results.append(keys)
            assert torch.equal(keys[..., :-5, :], prefix.keys[1][prompt])
            assert torch.equal(values[..., :-5, :], prefix.values[1][prompt])
            assert torch.equal(values[..., -5:, :], 2 * new)
    assert all(torch.equal(keys, results[0]) for keys in results)
