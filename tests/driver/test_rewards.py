import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from entrgi import SequenceClassifierReward, generate, preset
from entrgi.rewards import attention_mask
from entrgi.sequences import Layout, build_reward_sequences


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
    prefix, suffix = reward.frame(prompt, [])
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
    prefix, _ = reward.frame(messages, [])
    text = "system : w1 [SEP] user : w2 [SEP] assistant : w3 [SEP] user : w4 [SEP] assistant :"
    assert prefix == [tiny.WORDS.index(word) for word in text.split()]


def test_plain_frame():
    assert tiny.bert_reward().frame("the movie", [5, 6]) == ([2, 5, 6], [3])
    assert tiny.bert_reward(include_prompt=False).frame("the movie", [5, 6]) == ([2], [3])


def test_plain_frame_begins_with_the_token_that_the_tokenizer_begins_with():
    tok = tiny.tokenizer()
    tok.cls_token = tok.sep_token = None
    tok.bos_token = "[CLS]"
    reward = SequenceClassifierReward(tiny.qwen3_classifier(), tok)
    assert reward.frame("the movie", [5, 6]) == ([5, 6], [])
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    assert reward.frame("the movie", [5, 6]) == ([2, 5, 6], [])


def test_include_prompt_decides_what_is_scored():
    denoiser = tiny.denoiser()
    config = preset("paper", num_return_sequences=1, max_new_tokens=3, steps=3)
    whole = generate("the movie", denoiser, tiny.bert_reward(), config, seed=1)
    alone = generate("the movie", denoiser, tiny.bert_reward(include_prompt=False), config, seed=1)
    assert whole.texts[0][0].startswith("the movie ")
    assert alone.texts == alone.responses
    torch.testing.assert_close(alone.rewards[0], tiny.bert_reward().score(alone.texts[0], [""]))


def test_reward_sequences():
    """prefix | response | suffix, padded; response columns follow the denoiser's."""
    weight = torch.arange(20.0)[:, None].expand(20, 2).contiguous()
    layouts = [Layout(1, 3, 5, 6, True), Layout(1, 2, 4, 5, True)]
    batch = build_reward_sequences([([7, 8, 9], [3]), ([7], [3, 6])], layouts, 2, weight, None)
    tokens = torch.tensor([[2, 5, 5, 11, 12, 3], [2, 5, 5, 13, 14, 3], [2, 5, 15, 16, 3, 0], [2, 5, 17, 18, 3, 0]])
    embeds, ids = batch.inputs(tokens, weight)
    expected = [[7, 8, 9, 11, 12, 3], [7, 8, 9, 13, 14, 3], [7, 15, 16, 3, 6, 0], [7, 17, 18, 3, 6, 0]]
    assert embeds[..., 0].tolist() == expected
    assert ids[batch.response].tolist() == [11, 12, 13, 14, 15, 16, 17, 18]
    assert batch.valid.sum(1).tolist() == [6, 6, 5, 5]
    rows = batch.rows(torch.tensor([0, 1, 3]), torch.tensor([3, 4, 2]))
    assert rows.tolist() == [3, 6 + 4, 18 + 1]
    chosen = batch.select(torch.tensor([1, 2]))
    assert torch.equal(chosen.inputs(tokens[1:3], weight)[0], embeds[1:3])


def test_score_of_a_text_beyond_the_context():
    reward = tiny.bert_reward()
    words = ["w1"] * (tiny.CONTEXT + 5)
    with pytest.warns(UserWarning, match=f"text of {tiny.CONTEXT + 7} tokens"):
        got = reward.score([" ".join(words)], [""])
    expected = reward.score([" ".join(words[: tiny.CONTEXT - 2])], [""])
    assert torch.equal(got, expected)


def test_parameters_are_frozen():
    reward, denoiser = tiny.bert_reward(), tiny.denoiser()
    for model in (reward.model, denoiser.model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_from_pretrained(tmp_path):
    original = tiny.bert_reward()
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = SequenceClassifierReward.from_pretrained(tmp_path)
    texts = ["the movie was good", "bad"]
    torch.testing.assert_close(loaded.score(texts, texts), original.score(texts, texts))
