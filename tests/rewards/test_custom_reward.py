"""Rewards of one's own: a head in an EmbeddingReward, options by name, and what was called otherwise before."""

import importlib.util
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

import entrgi.vocabulary
from entrgi import CallableReward, LogLikelihoodReward, WeightedReward, generate, load_reward
from entrgi.prompts import Completion
from entrgi.rewards import BoundReward, EmbeddingReward, ModelRewardOptions, Reader, RewardOptions
from entrgi.rewards.options import ModelRewardArguments, RewardArguments
from entrgi.vocabulary import align, align_embedding
from support import architectures, binding, tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward.py"
TEXTS = [Completion("the", f"the {text}", text) for text in ("movie was good", "bad", "w3")]


def test_the_example_guides(capsys):
    spec = importlib.util.spec_from_file_location("custom_reward", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    unguided, guided = map(float, re.findall(r"distance to the target (\d+\.\d+)", capsys.readouterr().out))
    assert guided < unguided - 0.3


def table(width=8):
    return torch.randn(64, width, generator=torch.Generator().manual_seed(0))


class Pooling(nn.Module):
    """A head with dropout, over the response alone."""

    def __init__(self):
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, inputs_embeds, visible, places):
        judged = (visible & places.response)[..., None]
        pooled = (torch.tanh(inputs_embeds) * judged).sum(1) / judged.sum(1)
        return self.layer(self.dropout(pooled))[:, 0]


def pooling(reads="response"):
    torch.manual_seed(0)
    head = Pooling().train()
    tok = tiny.tokenizer(chat=tiny.CHAT)
    return head, EmbeddingReward(Reader("pool", tok, [table()], judges_response=reads == "response"), head)


def test_a_module_runs_through_a_twin():
    head, reward = pooling()
    ids = tiny.tokenizer()("movie was good", add_special_tokens=False)["input_ids"]
    for _ in range(2):  # followed as it is trained
        expected = torch.tanh(table()[ids]).mean(0) @ head.layer.weight[0] + head.layer.bias[0]
        torch.testing.assert_close(reward.score(TEXTS)[0], expected.detach())
        with torch.no_grad():
            head.layer.weight.mul_(2)
    assert head.training
    assert head.layer.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in reward.head.parameters())


def test_guided_as_it_is_scored():
    _, reward = pooling()
    places = binding.layouts(["the", "the"], [3, 1])
    ids = torch.zeros(2, max(place.length for place in places), dtype=torch.long)
    for row, place, completion in zip(ids, places, TEXTS, strict=False):
        words = completion.response.split()
        row[place.start : place.stop] = torch.tensor([tiny.WORDS.index(word) for word in words])
    value, gradient = binding.window_gradient(reward.bind(binding.denoiser(), places, 1), ids, places, 1)
    torch.testing.assert_close(value, reward.score(TEXTS[:2]))
    assert (gradient.norm(dim=1) > 0).all()


def test_a_function_as_head():
    reader = Reader("sum", tiny.tokenizer(), [table()], RewardOptions(include_prompt=False))
    reward = EmbeddingReward(reader, lambda embeds, visible, places: embeds.sum((1, 2)))
    expected = torch.stack([table()[[2, *row, 3]].sum() for row in ([6, 7, 8], [9])])
    torch.testing.assert_close(reward.score(TEXTS[:2]), expected)
    both = WeightedReward([reward, CallableReward(lambda e, m: e.sum((1, 2)), tiny.tokenizer(), table())], [1, 1])
    assert both.part_names[0] == "sum"


def test_relaxed_likelihoods_begin_at_the_second_position():
    reward = LogLikelihoodReward(architectures.causal_lm("gpt2"), tiny.tokenizer(), normalize=False)
    ids = torch.tensor([[2, 5, 6, 7]])
    logits = reward.model(input_ids=ids).logits.log_softmax(-1)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    expected = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(reward.relaxed(reward.weight[ids], everywhere), expected.sum(1))
    last = torch.tensor([[False, False, False, True]])
    torch.testing.assert_close(reward.relaxed(reward.weight[ids], everywhere, last), expected[:, 2])


@pytest.mark.parametrize(
    ("options", "arguments"),
    [(RewardOptions, RewardArguments), (ModelRewardOptions, ModelRewardArguments)],
    ids=["read", "run"],
)
def test_editors_see_the_options(options, arguments):
    assert get_type_hints(options) == get_type_hints(arguments)
    described = "".join(cls.__doc__ for cls in options.__mro__[:-1])
    assert all(f"        {field.name}: " in described for field in fields(options))


MAKERS = {
    "SequenceClassifierReward": tiny.bert_reward,
    "LogLikelihoodReward": lambda **options: LogLikelihoodReward(
        architectures.causal_lm("gpt2"), tiny.tokenizer(), **options
    ),
    "CallableReward": lambda **options: CallableReward(
        lambda e, m: e.sum((1, 2)), tiny.tokenizer(), table(), **options
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_options_that_are_none(name):
    with pytest.raises(ValueError, match=rf"{name}: unknown option 'max_lenght', .*; did you mean 'max_length'\?"):
        MAKERS[name](max_lenght=7)
    with pytest.raises(ValueError, match="reward: unmapped must be one of unk, zero, got 'mean'"):
        MAKERS[name](unmapped="mean")


def test_options_that_would_do_nothing():
    with pytest.raises(ValueError, match="CallableReward: unknown option 'compile'"):
        MAKERS["CallableReward"](compile=True)


class TestNamesFromBefore:
    @pytest.mark.parametrize("name", MAKERS)
    def test_missing(self, name):
        with pytest.warns(DeprecationWarning, match="missing= is deprecated .*, use unmapped="):
            old = MAKERS[name](missing="zero")
        assert old.reader.options == MAKERS[name](unmapped="zero").reader.options
        with pytest.raises(TypeError, match="got both unmapped= and missing="):
            MAKERS[name](missing="zero", unmapped="zero")

    def test_the_caller_is_warned_at_its_own_line(self, tmp_path):
        original = tiny.bert_reward()
        original.model.save_pretrained(tmp_path)
        original.tokenizer.save_pretrained(tmp_path)
        for load in (lambda: load_reward(tmp_path, missing="zero"), lambda: load_reward("demo", missing="zero")):
            with pytest.warns(DeprecationWarning, match="missing= is deprecated") as caught:
                assert load().reader.options.unmapped == "zero"
            assert {warning.filename for warning in caught} == {__file__}

    def test_of_vocabularies(self):
        alignment = align(tiny.tokenizer(), 64, tiny.tokenizer())
        with pytest.warns(DeprecationWarning, match="missing= is deprecated") as caught:
            old = align_embedding(table(), alignment, missing="zero", reward_tokenizer=tiny.tokenizer())
        assert caught[0].filename == __file__
        assert torch.equal(old, align_embedding(table(), alignment, "zero", tiny.tokenizer()))
        with pytest.warns(
            DeprecationWarning, match="MISSING_ROWS is deprecated .*, use entrgi.vocabulary.UNMAPPED_ROWS"
        ):
            assert entrgi.vocabulary.MISSING_ROWS == ("unk", "zero")

    def test_rows(self):
        bound = tiny.bert_reward().bind(binding.denoiser(), binding.layouts(["the"], [3]), 1)
        where = torch.tensor([0]), torch.tensor([3])
        with pytest.warns(DeprecationWarning, match=r"rows\(...\) is deprecated .*, use row_index\(...\)"):
            assert torch.equal(bound.rows(*where), bound.row_index(*where))

    @pytest.mark.parametrize("inside", ["alone", "in a sum", "of the protocol"])
    def test_bound_rewards_that_have_rows_alone(self, inside):
        """Guided as ever, with one warning for each generation."""
        kind = WithRowsOfTheProtocol if inside == "of the protocol" else WithRows
        options = {"max_new_tokens": 4, "steps": 4, "seed": 0, "max_rows": 4}
        old, new = tiny.qwen3_reward(), tiny.qwen3_reward()
        plain = old.bind
        old.bind = lambda *arguments: kind(plain(*arguments))
        if inside == "in a sum":
            old, new = (WeightedReward([reward], [1.0]) for reward in (old, new))
        with pytest.warns(
            DeprecationWarning, match=r"WithRows\w*\.rows\(...\) of a bound reward is deprecated"
        ) as caught:
            output = generate(["the movie", "w1"], tiny.denoiser(), old, **options)
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            expected = generate(["the movie", "w1"], tiny.denoiser(), new, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert output.history.reward == expected.history.reward


class WithRows:
    """A bound reward as somebody wrote it before."""

    def __init__(self, bound):
        self.bound, self.embedding, self.inputs, self.rows = bound, bound.embedding, bound.inputs, bound.row_index

    def select(self, active):
        return type(self)(self.bound.select(active))

    def __call__(self, inputs_embeds, ids):
        return self.bound(inputs_embeds, ids)


class WithRowsOfTheProtocol(WithRows, BoundReward):
    """It has inherited a ``row_index`` that does nothing."""
