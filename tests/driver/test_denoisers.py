import pytest
import tiny
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from entrgi import CallableDenoiser, MaskedLM, SamplerConfig, generate
from entrgi.prompts import encode_prompt

TOKENS = torch.tensor([[2, 9, 4, 4, 3], [2, 4, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
POSITIONS = torch.tensor([2, 3, 6])


def models():
    common = {"vocab_size": tiny.LOGITS_WIDTH, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}
    distil = DistilBertConfig(
        vocab_size=tiny.LOGITS_WIDTH, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    )
    modern = ModernBertConfig(**common, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return {
        "bert": tiny.denoiser().model,
        "distilbert": DistilBertForMaskedLM(distil),
        "roberta": RobertaForMaskedLM(RobertaConfig(**common)),
        "modernbert": ModernBertForMaskedLM(modern),
    }


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "modernbert"])
def test_head_at_chosen_positions(name):
    """The logits are those of a full pass, whatever the architecture calls its head."""
    torch.manual_seed(0)
    model = models()[name]
    denoiser = MaskedLM(model, tiny.tokenizer())
    assert denoiser.vocab_size == tiny.LOGITS_WIDTH
    got = denoiser.logits(TOKENS, MASK, POSITIONS)
    full = model(input_ids=TOKENS, attention_mask=MASK).logits.flatten(0, 1)
    torch.testing.assert_close(got, full[POSITIONS])
    assert model(input_ids=TOKENS, attention_mask=MASK).logits.shape[:2] == TOKENS.shape, "the hook is gone"
    alone = denoiser.logits(TOKENS[1:, :3], None, torch.tensor([1]))
    torch.testing.assert_close(alone, got[2:], rtol=1e-4, atol=1e-5)


def test_layout_of_a_masked_lm():
    encoded = tiny.denoiser().encode("the movie")
    assert (encoded.prefix, encoded.body, encoded.suffix, encoded.is_text) == ([2], [5, 6], [3], True)


def test_layout_with_a_chat_template():
    encoded = encode_prompt(tiny.tokenizer(chat=tiny.CHAT), "the movie")
    words = [tiny.WORDS[i] for i in encoded.body]
    assert words == ["user", ":", "the", "movie", "[SEP]"]
    assert (encoded.prefix, encoded.suffix, encoded.is_text) == ([], [], False)
    assert encode_prompt(tiny.tokenizer(chat=tiny.CHAT), "the", chat=False).is_text


def callable_denoiser(**options):
    model = tiny.denoiser().model
    return CallableDenoiser(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask), tiny.tokenizer(), tiny.LOGITS_WIDTH, **options
    )


def test_callable_equals_the_masked_lm():
    config = SamplerConfig(num_return_sequences=2, max_new_tokens=4, steps=4)
    reward = tiny.bert_reward()
    ours = generate("the movie", callable_denoiser(), reward, config, seed=3)
    theirs = generate("the movie", tiny.denoiser(), reward, config, seed=3)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_shift():
    """The logits of position l come from l - 1; the first position keeps its own."""
    plain, shifted = callable_denoiser(), callable_denoiser(shift=True)
    tokens = torch.full((2, 4), 4)
    positions = torch.tensor([0, 1, 3, 4, 6])
    expected = plain.logits(tokens, None, torch.tensor([0, 0, 2, 4, 5]))
    assert torch.equal(shifted.logits(tokens, None, positions), expected)


def test_callable_of_the_wrong_shape():
    denoiser = CallableDenoiser(lambda ids, mask: torch.zeros(3, 7), tiny.tokenizer(), 64)
    with pytest.raises(ValueError, match=r"expected logits of shape \[2, 5, 64\], got \[3, 7\]"):
        denoiser.logits(TOKENS, None, POSITIONS)


def test_from_pretrained(tmp_path):
    original = tiny.denoiser()
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = MaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.max_length) == (4, 3, 0, 40)
    expected = original.logits(TOKENS, MASK, POSITIONS)
    torch.testing.assert_close(loaded.logits(TOKENS, MASK, POSITIONS), expected)


def test_roberta_counts_positions_from_its_padding_id():
    denoiser = MaskedLM(models()["roberta"], tiny.tokenizer())
    tokens = torch.full((1, denoiser.max_length + 1), 9)
    denoiser.logits(tokens[:, :-1], None, torch.tensor([0]))
    with pytest.raises((IndexError, RuntimeError)):
        denoiser.logits(tokens, None, torch.tensor([0]))
