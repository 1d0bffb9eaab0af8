import io
import json
from logging import StreamHandler

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers.utils import logging

from entrgi import (
    CallableReward,
    LogLikelihoodReward,
    SequenceClassifierReward,
    WeightedReward,
    generate,
    load_reward,
    preset,
)
from entrgi.prompts import Completion
from entrgi.rewards import attention_mask
from entrgi.rewards.sequences import build_reward_sequences
from entrgi.sequences import Frame
from support import architectures, binding, tiny


def texts(*responses, prompt=""):
    return [Completion(prompt, " ".join([prompt, text]).strip(), text) for text in responses]


@pytest.mark.parametrize(("eos", "pad"), [(3, 0), (3, 3), (None, 0), (3, None), (None, None)])
def test_attention_mask(eos, pad):
    """Against the rule, position by position."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (50, 9), generator=generator)
    valid = torch.arange(9) < torch.randint(5, 10, (50, 1), generator=generator)
    response = valid & (torch.arange(9) >= 2) & (torch.arange(9) < 7)
    got = attention_mask(tokens, valid, response, eos, pad)
    for p in range(50):
        ended = False
        for i in range(9):
            expected = bool(valid[p, i])
            if response[p, i]:
                token = int(tokens[p, i])
                expected = expected and not ended and token != pad
                ended = ended or token == eos
            assert bool(got[p, i]) == expected


@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward])
def test_relaxed_at_one_hot_embeddings_is_the_models_own_score(make):
    """Right padding, masked ends and padded rows change nothing that the model itself would see."""
    reward = make(torch.float64)
    rows = [[2, 9, 12, 3], [2, 30, 31, 32, 33, 3], [40]]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask = torch.arange(6) < torch.tensor([len(row) for row in rows])[:, None]
    got = reward.relaxed(reward.weight[ids], mask)
    for value, row in zip(got, rows, strict=True):
        own = reward.model(input_ids=torch.tensor([row])).logits[0, 0]
        torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward])
def test_masked_positions_keep_their_place(make):
    """Position ids are the plain indices: hiding a position does not move the later ones."""
    reward = make(torch.float64)
    ids = torch.tensor([[2, 9, 12, 13, 14, 3]])
    mask = torch.tensor([[True, True, False, False, True, True]])
    moved = reward.relaxed(reward.weight[ids[:, mask[0]]], torch.ones(1, 4, dtype=torch.bool))
    kept = reward.relaxed(reward.weight[ids], mask)
    assert (kept - moved).abs() > 1e-3
    position_ids = torch.tensor([[0, 1, 4, 5]])
    own = reward.model(inputs_embeds=reward.weight[ids[:, mask[0]]], position_ids=position_ids).logits[:, 0]
    torch.testing.assert_close(kept, own, rtol=1e-5, atol=1e-6)


def test_hidden_positions_have_no_influence():
    reward = tiny.qwen3_reward(torch.float64)
    embeds = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True, False]])
    reward.relaxed(embeds, mask).sum().backward()
    norms = embeds.grad.norm(dim=-1)[0]
    assert ((norms > 0) == mask[0]).all()


@pytest.mark.parametrize("prompt", ["the movie", "<<PLACEHOLDER>>", "user : the [SEP] assistant : w1 [SEP]"])
def test_chat_frame_is_built_from_the_messages(prompt):
    """Prompts that hold the template's own markers come through whole."""
    reward = tiny.qwen3_reward()
    prefix, suffix = reward.reader.format.frame(prompt, [])
    rendered = f"user : {prompt} [SEP] assistant :"
    assert prefix == [tiny.WORDS.index(w) if w in tiny.WORDS else 1 for w in rendered.split()]
    assert suffix == [3]


def test_chat_frame_of_a_conversation():
    reward = tiny.qwen3_reward()
    messages = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
    ]
    prefix, _ = reward.reader.format.frame(messages, [])
    text = "system : w1 [SEP] user : w2 [SEP] assistant : w3 [SEP] user : w4 [SEP] assistant :"
    assert prefix == [tiny.WORDS.index(word) for word in text.split()]


def test_plain_frame():
    assert tiny.bert_reward().reader.format.frame("the movie", [5, 6]) == ([2, 5, 6], [3])
    assert tiny.bert_reward(include_prompt=False).reader.format.frame("the movie", [5, 6]) == ([2], [3])


def test_plain_frame_begins_with_the_token_that_the_tokenizer_begins_with():
    tok = tiny.tokenizer()
    tok.cls_token = tok.sep_token = None
    tok.bos_token = "[CLS]"
    reward = SequenceClassifierReward(tiny.qwen3_classifier(), tok)
    assert reward.reader.format.frame("the movie", [5, 6]) == ([5, 6], [])
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    assert reward.reader.format.frame("the movie", [5, 6]) == ([2, 5, 6], [])


def test_include_prompt_decides_what_is_scored():
    denoiser = tiny.denoiser()
    config = preset("paper", num_return_sequences=1, max_new_tokens=3, steps=3)
    whole = generate("the movie", denoiser, tiny.bert_reward(), config, seed=1)
    alone = generate("the movie", denoiser, tiny.bert_reward(include_prompt=False), config, seed=1)
    assert whole.texts[0][0].startswith("the movie ")
    assert alone.texts == alone.responses
    torch.testing.assert_close(alone.rewards[0], tiny.bert_reward().score(texts(*alone.texts[0])))


def test_reward_sequences():
    """prefix | response | suffix, padded; response columns follow the denoiser's."""
    weight = torch.arange(20.0)[:, None].expand(20, 2).contiguous()
    layouts = binding.layouts(["w1 w2", "w1"], [2, 2])
    frames = [Frame([7, 8, 9], [3], 2), Frame([7], [3, 6], 2, kept=4)]
    batch = build_reward_sequences(
        frames, [layout.start for layout in layouts], 2, lambda ids: weight[ids], torch.device("cpu")
    )
    tokens = torch.tensor([[2, 5, 5, 11, 12, 3], [2, 5, 5, 13, 14, 3], [2, 5, 15, 16, 3, 0], [2, 5, 17, 18, 3, 0]])
    embeds, ids = batch.inputs(tokens, weight)
    expected = [[7, 8, 9, 11, 12, 3], [7, 8, 9, 13, 14, 3], [7, 15, 16, 3, 6, 0], [7, 17, 18, 3, 6, 0]]
    assert embeds[..., 0].tolist() == expected
    assert embeds.is_contiguous()
    assert ids[batch.response].tolist() == [11, 12, 13, 14, 15, 16, 17, 18]
    assert batch.valid.sum(1).tolist() == [6, 6, 5, 5]
    assert batch.positions[::2].tolist() == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 8]]
    rows = batch.row_index(torch.tensor([0, 1, 3]), torch.tensor([3, 4, 2]))
    assert rows.tolist() == [3, 6 + 4, 18 + 1]
    chosen = batch.select(torch.tensor([1, 2]))
    assert torch.equal(chosen.inputs(tokens[1:3], weight)[0], embeds[1:3])
    assert chosen.row_index(torch.tensor([1]), torch.tensor([2])).tolist() == [6 + 1]


@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward])
def test_hard_tokens_are_worth_what_their_text_is(make):
    """What guidance sees of a finished response is what the final score sees."""
    reward = make(torch.float64)
    layouts = binding.layouts(["the movie", "w1 w2 w3"], [5, 3])
    ids = binding.tokens(layouts, 2)
    bound = reward.bind(binding.denoiser(), layouts, 2)
    completions = []
    for row, layout in zip(ids.tolist(), [layout for layout in layouts for _ in range(2)], strict=True):
        response = " ".join(tiny.WORDS[i] for i in row[layout.start : layout.stop])
        completions += texts(response, prompt=layout.prompt)
    value, _ = binding.value_and_gradient(bound, ids)
    torch.testing.assert_close(value.float(), reward.score(completions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward])
def test_score_in_chunks(make):
    completions = texts("w1 w2 w3", "good", "", "the movie was bad", "w4", prompt="the movie")
    whole = make(torch.float64, score_batch_size=16).score(completions)
    assert whole.dtype == torch.float32
    for size in (1, 2, 5):
        reward = make(torch.float64, score_batch_size=size)
        sizes = []
        head = reward.head
        reward.head = lambda embeds, mask, places, head=head, sizes=sizes: (
            sizes.append(len(mask)) or head(embeds, mask, places)
        )
        torch.testing.assert_close(reward.score(completions), whole, rtol=1e-5, atol=1e-6)
        assert max(sizes) == size
        assert sum(sizes) == 5
    assert make().score([]).shape == (0,)


def test_score_of_a_text_beyond_the_context():
    reward = tiny.bert_reward()
    words = ["w1"] * (tiny.CONTEXT + 5)
    with pytest.warns(UserWarning, match=f"text of {tiny.CONTEXT + 7} tokens"):
        got = reward.score(texts(" ".join(words)))
    expected = reward.score(texts(" ".join(words[: tiny.CONTEXT - 2])))
    assert torch.equal(got, expected)


def bare_reward(**tokens):
    """A causal classifier whose tokenizer adds nothing to a text."""
    tok = tiny.tokenizer()
    tok.cls_token = tok.sep_token = tok.pad_token = None
    for name, token in tokens.items():
        setattr(tok, name, token)
    return SequenceClassifierReward(architectures.classifier("gpt2"), tok)


def test_an_empty_text_is_read_as_its_end():
    """Guided and scored alike, where a tokenizer adds no special tokens."""
    reward = bare_reward(eos_token="[SEP]")
    own = reward.model(input_ids=torch.tensor([[3]])).logits[0, 0]
    torch.testing.assert_close(reward.score(texts(""))[0], own.float())
    layouts = binding.layouts(["", "w1"], [3, 3])
    ids = binding.tokens(layouts, 1)
    ids[:, 1:] = binding.EOS
    bound = reward.bind(binding.denoiser(pad=binding.EOS), layouts, 1)
    value, _ = binding.value_and_gradient(bound, ids)
    torch.testing.assert_close(value[0], own)
    torch.testing.assert_close(value[1].float(), reward.score(texts("", prompt="w1"))[0])


def test_an_empty_text_without_a_token_for_it():
    reward = bare_reward()
    with pytest.raises(ValueError, match="an empty text is no token at all to GPT2ForSequenceClassification"):
        reward.score(texts(""))
    with pytest.raises(ValueError, match="an empty text is no token at all"):
        reward.bind(binding.denoiser(), binding.layouts([""], [3]), 1)
    reward.bind(binding.denoiser(), binding.layouts(["w1"], [3]), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_the_text(value):
    reward = tiny.bert_reward()
    reward.head = lambda embeds, mask, places: torch.tensor([1.0, value])
    with pytest.raises(
        RuntimeError, match=f"reward: BertForSequenceClassification gives {value} for the text 'the bad'"
    ):
        reward.score(texts("good", "bad", prompt="the"))


def extended(chat=None, **special):
    """A tokenizer with a token [NEW], id 59, beyond the 59 rows of the models below; W1 and others are ordinary."""
    tok = tiny.tokenizer(tiny.WORDS[:59], chat=chat)
    tok.add_tokens(["[NEW]"])
    for name, token in special.items():
        setattr(tok, name, token)
    return tok


def short(kind):
    """Models and rewards of 59 rows: what makes a reward of a tokenizer."""
    if kind == "classifier":
        return lambda tok: SequenceClassifierReward(architectures.classifier("llama", vocab_size=59), tok)
    if kind == "likelihood":
        return lambda tok: LogLikelihoodReward(architectures.causal_lm("llama", vocab_size=59), tok)
    if kind == "callable":
        return lambda tok: CallableReward(lambda e, m: e.sum((1, 2)), tok, torch.ones(59, 4), name="mine")
    make = short("callable")
    return lambda tok: WeightedReward([make(tok), make(tok)], [1, 1])


BEYOND = r"reward: the tokenizer of \w+ has id 59 for '\[NEW\]', expected an id below 59, the rows of the model's embed"


@pytest.mark.parametrize("chat", [None, tiny.CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", ["classifier", "likelihood", "callable", "weighted"])
def test_a_token_beyond_the_embedding(kind, chat):
    """Of a text, once the text is given; a tokenizer may have tokens that are never used."""
    reward = short(kind)(extended(chat))
    assert reward.score(texts("w1 w2", prompt="w1")).isfinite().all()
    for prompt, response in (("w1", "w2 [NEW]"), ("[NEW]", "w2")):
        with pytest.raises(ValueError, match=BEYOND):
            reward.score(texts(response, prompt=prompt))
    denoiser = binding.denoiser(extended(), width=60)
    for prompt, message in (("w1 [NEW]", BEYOND), ("w1", r"has 59 rows, .* up to 59, which stands for '\[NEW\]'")):
        with pytest.raises(ValueError, match=message):
            reward.bind(denoiser, binding.layouts([prompt], [3], extended()), 1)


@pytest.mark.parametrize("kind", ["classifier", "likelihood"])
@pytest.mark.parametrize(
    "tok",
    [
        lambda: extended(cls_token="[NEW]"),
        lambda: extended(tiny.CHAT.replace("{% endfor %}", "[NEW] {% endfor %}")),
        lambda: extended("[NEW] " + tiny.CHAT),
    ],
    ids=["special", "template ends", "template begins"],
)
def test_a_token_of_every_text_beyond_the_embedding(kind, tok):
    """Known when the reward is made."""
    with pytest.raises(ValueError, match=BEYOND):
        short(kind)(tok())


LABELS = {0: "negative", 1: "neutral", 2: "positive"}


def with_labels(kind, **options):
    model = architectures.classifier(kind, num_labels=3, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    return SequenceClassifierReward(model, tiny.tokenizer(), **options)


class TestLabels:
    @pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "modernbert", "llama", "modernbert-decoder"])
    @pytest.mark.parametrize(("label", "index"), [(0, 0), ("neutral", 1), ("positive", 2), (2, 2)])
    def test_the_logit_of_one(self, kind, label, index):
        """Scored and guided: every kind of head, with and without a kept prefix."""
        reward = with_labels(kind, label=label)
        completions = texts("w1 w2", "good", prompt="the movie")
        for got, completion in zip(reward.score(completions), completions, strict=True):
            own = reward.model(input_ids=torch.tensor([reward.reader.ids(completion)[0]])).logits[0]
            torch.testing.assert_close(got, own[index].float(), rtol=1e-5, atol=1e-6)
            assert (own - own[index]).abs().sort().values[1] > 1e-3
        layouts = binding.layouts(["the movie"], [2])
        ids = binding.tokens(layouts, 1)
        ids[0, layouts[0].start : layouts[0].stop] = torch.tensor([tiny.WORDS.index("w1"), tiny.WORDS.index("w2")])
        value, gradient = binding.value_and_gradient(reward.bind(binding.denoiser(), layouts, 1), ids)
        torch.testing.assert_close(value.float(), reward.score(completions[:1]), rtol=1e-5, atol=1e-6)
        assert gradient.abs().sum() > 0

    @pytest.mark.parametrize("label", [None, 3, -1, "good", True, 1.0, "1"])
    def test_of_several_one_is_chosen(self, label):
        got = "" if label is None else f", got {label!r}"
        names = r"\(0 'negative', 1 'neutral', 2 'positive'\)"
        with pytest.raises(
            ValueError,
            match=f"^reward: BertForSequenceClassification has 3 labels {names}, "
            f"expected label= the index or the name of one{got}$",
        ):
            with_labels("bert", label=label)

    def test_a_single_one_needs_none(self):
        reward = tiny.bert_reward()
        for label in (0, "LABEL_0"):
            assert torch.equal(tiny.bert_reward(label=label).score("w1"), reward.score("w1"))
        with pytest.raises(ValueError, match=r"has 1 labels \(0 'LABEL_0'\), expected label= .*, got 1"):
            tiny.bert_reward(label=1)

    def test_loaded(self, tmp_path):
        original = with_labels("bert", label="positive")
        original.model.save_pretrained(tmp_path)
        original.tokenizer.save_pretrained(tmp_path)
        assert torch.equal(load_reward(tmp_path, label="positive").score("w1"), original.score("w1"))
        with pytest.raises(ValueError, match=r"has 3 labels \(0 'negative', .* expected label="):
            load_reward(tmp_path)


@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward, lambda: short("weighted")(extended())])
def test_plain_texts_and_pairs(make):
    reward = make()
    expected = reward.score([Completion("", "w1 w2", "w1 w2"), Completion("", "good", "good")])
    assert torch.equal(reward.score(["w1 w2", "good"]), expected)
    assert torch.equal(reward.score(("w1 w2", Completion("", "good", "good"))), expected)
    assert torch.equal(reward.score("w1 w2"), reward.score([Completion("", "w1 w2", "w1 w2")]))
    assert torch.equal(reward.score(Completion("", "w1 w2", "w1 w2")), reward.score("w1 w2"))
    assert torch.equal(reward.score([("the ", "w1")]), reward.score([Completion("the ", "the w1", "w1")]))
    assert reward.score([]).shape == (0,)


def test_a_pair_with_messages():
    reward, messages = tiny.qwen3_reward(), [{"role": "user", "content": "the"}]
    assert torch.equal(reward.score([(messages, "w1")]), reward.score([("the", "w1")]))


@pytest.mark.parametrize(
    "item", [None, 3, b"w1", ["the", "w1"], ("the", None), ("the", "w1", "w2"), (None, "w1")], ids=str
)
def test_what_cannot_be_scored(item):
    with pytest.raises(ValueError, match=r"completions\[1\]: expected a text, a pair|: expected text or messages"):
        tiny.bert_reward().score(["w1", item])


def test_a_tuple_of_two_texts_is_neither():
    with pytest.raises(ValueError, match="may be a pair or two texts"):
        tiny.bert_reward().score(("the", "w1"))


@pytest.mark.parametrize("given", [None, 3, {"w1": "w2"}], ids=str)
def test_what_holds_no_texts(given):
    for reward in (tiny.bert_reward(), short("weighted")(extended())):
        with pytest.raises(ValueError, match="completions: expected texts, pairs"):
            reward.score(given)


def test_messages_without_a_template():
    layouts = binding.layouts([[{"role": "user", "content": "w1"}]], [3])
    with pytest.raises(ValueError, match="got chat messages, and the tokenizer of BertForSequence"):
        tiny.bert_reward(torch.float64).bind(binding.denoiser(), layouts, 1)
    bound = tiny.bert_reward(torch.float64, include_prompt=False).bind(binding.denoiser(), layouts, 1)
    assert bound.sequences.valid.shape[1] == 5


def test_context():
    layouts = binding.layouts(["w1", "w1 w2"], [4, 4])
    with pytest.raises(ValueError, match=r"prompts\[1\] needs 8 tokens in the reward model's format.* context of 7"):
        tiny.bert_reward(max_length=7).bind(binding.denoiser(), layouts, 1)
    tiny.bert_reward(max_length=8).bind(binding.denoiser(), layouts, 1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        ({"score_batch_size": 0}, "score_batch_size must be an integer >= 1, got 0"),
        ({"score_batch_size": 2.5}, "score_batch_size must be an integer >= 1, got 2.5"),
    ],
    ids=str,
)
def test_options(option, message):
    with pytest.raises(ValueError, match=message):
        tiny.bert_reward(**option)


def test_encoder_decoder():
    model = tiny.bert_reward().model
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="does not take inputs_embeds"):
        SequenceClassifierReward(model, tiny.tokenizer())


def test_scaled_embeddings():
    """Gemma scales its embedding's rows; guidance has to work with the rows that the model reads."""
    model = architectures.classifier("gemma3_text")
    reward = SequenceClassifierReward(model, tiny.tokenizer(chat=tiny.CHAT))
    table = model.get_input_embeddings()
    assert not torch.equal(reward.weight, table.weight)
    assert torch.equal(reward.weight, table(torch.arange(64)))
    bound = reward.bind(binding.denoiser(), binding.layouts(["w1"], [3]), 1)
    assert torch.equal(bound.embedding[:60], reward.weight[:60])
    ids = torch.tensor(
        [tiny.tokenizer()("user : w1 [SEP] assistant : w2 [SEP]", add_special_tokens=False)["input_ids"]]
    )
    torch.testing.assert_close(
        reward.score(texts("w2", prompt="w1"))[0], model(input_ids=ids).logits[0, 0].float(), rtol=1e-5, atol=1e-6
    )


def test_capped_scores_need_eager_attention():
    model = architectures.classifier("gemma2")
    model.config._attn_implementation = "sdpa"
    assert SequenceClassifierReward(model, tiny.tokenizer()).model.config._attn_implementation == "entrgi_eager"


def test_another_vocabulary():
    """The text before the window is written in the reward's own tokens, the response in rows of its table."""
    words = [*tiny.SPECIAL, *reversed(tiny.WORDS[5:40])]
    reward = SequenceClassifierReward(architectures.classifier("bert"), tiny.tokenizer(words))
    layouts = binding.layouts(["the movie [SEP] w1"], [3])
    bound = reward.bind(binding.denoiser(), layouts, 1)
    ids = binding.tokens(layouts, 1, high=40)
    own = [words.index(w) for w in ("[CLS]", "the", "movie", "w1")]
    own += [words.index(tiny.WORDS[i]) for i in ids[0, layouts[0].start : layouts[0].stop].tolist()] + [3]
    value, _ = binding.value_and_gradient(bound, ids)
    torch.testing.assert_close(value[0], reward.model(input_ids=torch.tensor([own])).logits[0, 0])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_compile(kind, monkeypatch):
    """Traced as compiled models are, prefix cache included; making machine code of it would take a minute."""
    own = torch.nn.Module.compile
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(m) or own(m, backend="eager"))
    places = binding.layouts(["the movie", "w1"], [4, 3])
    ids = binding.tokens(places, 2)
    results = []
    for compile in (False, True):
        model = architectures.classifier(kind, num_hidden_layers=1)
        tok = tiny.tokenizer(chat=tiny.CHAT if kind == "llama" else None)
        reward = SequenceClassifierReward(model, tok, compile=compile)
        results.append(binding.value_and_gradient(reward.bind(binding.denoiser(), places, 2), ids))
    assert compiled == [reward.model.base_model]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class TestCallable:
    """Any function of embeddings."""

    @staticmethod
    def mean(embeds, mask):
        return (embeds.sum(-1) * mask).sum(1) / mask.sum(1)

    def test_value_and_gradient(self):
        weight = torch.randn(64, 8, dtype=torch.float64)
        reward = CallableReward(self.mean, tiny.tokenizer(), weight)
        places = binding.layouts(["the movie", "w1"], [4, 3])
        ids = binding.tokens(places, 1)
        ids[0, places[0].start + 1] = binding.EOS
        bound = reward.bind(binding.denoiser(), places, 1)
        value, gradient = binding.window_gradient(bound, ids, places, 1)
        rows = [[2, 5, 6, *ids[0, 3:5].tolist(), 3], [2, 15, *ids[1, 2:5].tolist(), 3]]
        torch.testing.assert_close(value, torch.stack([weight[row].sum(-1).mean() for row in rows]))
        expected = torch.tensor([1 / 6, 1 / 6, 0, 0, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected[:, None].expand(7, 8))

    def test_score(self):
        weight = torch.randn(64, 8)
        reward = CallableReward(lambda e, m: self.mean(e, m)[:, None], tiny.tokenizer(), weight, include_prompt=False)
        got = reward.score(texts("the movie", "w1", prompt="w2"))
        torch.testing.assert_close(
            got, torch.stack([weight[[2, 5, 6, 3]].sum(-1).mean(), weight[[2, 15, 3]].sum(-1).mean()])
        )

    def test_padding_is_zero(self):
        """A sum over all positions is a sum over the real ones, in a ragged batch and in a ragged chunk."""
        weight = torch.randn(64, 8)
        reward = CallableReward(lambda e, m: e.sum((1, 2)), tiny.tokenizer(), weight)
        places = binding.layouts(["the movie", "w1"], [4, 3])
        ids = binding.tokens(places, 1)
        value, _ = binding.value_and_gradient(reward.bind(binding.denoiser(), places, 1), ids)
        torch.testing.assert_close(value[1], weight[[2, 15, *ids[1, 2:5].tolist(), 3]].sum())
        torch.testing.assert_close(reward.score(texts("w1 w2", "w1"))[1], weight[[2, 15, 3]].sum())

    def test_guides(self):
        """The reward is the share of one word: guidance finds it."""
        denoiser = tiny.denoiser()
        weight = torch.nn.functional.one_hot(torch.arange(64), 64).float()
        reward = CallableReward(lambda e, m: (e[..., 30] * m).sum(1), tiny.tokenizer(), weight)
        options = {"max_new_tokens": 6, "steps": 6, "seed": 0, "guidance_lr": 2.0}
        guided = generate("the movie", denoiser, reward, **options)
        free = generate("the movie", denoiser, reward, guidance="none", **options)
        assert guided.rewards.mean() >= free.rewards.mean() + 3

    @pytest.mark.parametrize(
        ("function", "weight", "message"),
        [
            (None, torch.zeros(64, 8), "function: expected a callable, got None"),
            (mean, torch.zeros(64), r"weight: expected a floating tensor \[V, d\], got torch.float32 \[64\]"),
            (mean, torch.zeros(64, 8).long(), "weight: expected a floating tensor"),
            (mean, [1.0], r"weight: expected a floating tensor \[V, d\], got \[1.0\]"),
        ],
        ids=lambda x: str(x)[:20],
    )
    def test_arguments(self, function, weight, message):
        with pytest.raises(ValueError, match=message):
            CallableReward(function, tiny.tokenizer(), weight)

    def test_another_shape(self):
        reward = CallableReward(lambda e, m: e.sum(-1), tiny.tokenizer(), torch.zeros(64, 8), name="mine")
        with pytest.raises(ValueError, match=r"mine must return rewards of shape \[1\], got \[1, 3\]"):
            reward.score(texts("w1"))


def test_parameters_are_frozen():
    reward, denoiser = tiny.bert_reward(), tiny.denoiser()
    for model in (reward.model, denoiser.model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_from_pretrained(tmp_path):
    original = tiny.bert_reward()
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    some = texts("the movie was good", "bad")
    for loaded in (SequenceClassifierReward.from_pretrained(tmp_path), load_reward(tmp_path)):
        torch.testing.assert_close(loaded.score(some), original.score(some))
    assert load_reward(tmp_path, dtype=torch.float64, include_prompt=False).weight.dtype == torch.float64


def test_load_reward_refuses_what_is_no_reward(tmp_path):
    tiny.denoiser().model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is BertForMaskedLM, expected a sequence classifier or a causal language model"
    ):
        load_reward(tmp_path)
    with pytest.raises(ValueError, match="kind must be one of classifier, likelihood, got 'judge'"):
        load_reward(tmp_path, kind="judge")
    with pytest.raises(ValueError, match="lacks 4 weights of BertForSequenceClassification"):
        load_reward(tmp_path, kind="classifier")
    with pytest.raises(ValueError, match=r"reward: no folder .*nowhere"):
        load_reward(tmp_path / "nowhere")


def test_code_from_a_repository_is_refused(tmp_path):
    reward = tiny.bert_reward()
    reward.model.save_pretrained(tmp_path)
    reward.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reward: trust_remote_code is not supported"):
        load_reward(tmp_path, trust_remote_code=True)
    load_reward(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("kind", [None, "classifier", "likelihood"])
@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_from_a_repository_is_not_run_even_if_asked_for(kind, part, tmp_path, monkeypatch):
    """transformers asks on the terminal where nothing is said about it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it ran')\n")
    if part == "config":
        classes = {
            "AutoConfig": "own.C",
            "AutoModelForSequenceClassification": "own.M",
            "AutoModelForCausalLM": "own.M",
        }
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "its own", "auto_map": classes}))
        tiny.tokenizer().save_pretrained(tmp_path)
    else:
        tiny.qwen3_classifier().save_pretrained(tmp_path)
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    reason = "it needs code from its repository" if part == "config" else ""  # a known model's tokenizer needs none
    with pytest.raises(ValueError, match=f"^reward: cannot load '[^']*': {reason}") as raised:
        load_reward(tmp_path, kind=kind)
    assert not ran.exists()
    assert "trust_remote_code" not in str(raised.value)


def test_hub_id_with_options(tmp_path):
    """Options that say where a checkpoint is looked for hold for its config and its tokenizer, too."""
    repository, commit = tmp_path / "models--someone--reward", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "branch").write_text(commit)
    reward = tiny.bert_reward()
    reward.model.save_pretrained(repository / "snapshots" / commit)
    reward.tokenizer.save_pretrained(repository / "snapshots" / commit)
    place = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = load_reward("someone/reward", revision="branch", **place)
    torch.testing.assert_close(loaded.weight, reward.weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"reward: cannot load 'someone/reward', no folder here: [^.]*(\.[^ ][^.]*)*$"):
        load_reward("someone/reward", revision="other", **place)


def test_loading_is_quiet(tmp_path):
    """What transformers reports of missing weights is one error here; what else it has to say is left alone."""
    tiny.denoiser().model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    said, before = io.StringIO(), logging.get_verbosity()
    handler = StreamHandler(said)
    logging.add_handler(handler)
    try:
        with pytest.raises(ValueError, match="lacks 4 weights"):
            load_reward(tmp_path, kind="classifier")
    finally:
        logging.remove_handler(handler)
    assert said.getvalue() == ""
    assert logging.get_verbosity() == before
