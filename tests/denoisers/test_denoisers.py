import functools

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FunnelConfig,
    MobileBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from entrgi import CallableDenoiser, MaskedLM, SamplerConfig, generate
from entrgi.denoisers.compilation import compile_blocks
from entrgi.prompts import encode_prompt
from support import tiny
from support.host_reads import NoHostReads

TOKENS = torch.tensor([[2, 9, 4, 4, 3], [2, 4, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
POSITIONS = torch.tensor([2, 3, 6])


COMMON = {
    "vocab_size": tiny.LOGITS_WIDTH,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": lambda: BertConfig(**COMMON),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=tiny.LOGITS_WIDTH,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=40,
        initializer_range=0.3,
    ),
    "roberta": lambda: RobertaConfig(**COMMON),
    "modernbert": lambda: ModernBertConfig(
        **COMMON,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        local_attention=4,  # shorter than the sequences below
        global_attn_every_n_layers=2,
    ),
    "electra": lambda: ElectraConfig(**COMMON, embedding_size=16),
    "albert": lambda: AlbertConfig(**COMMON, embedding_size=16),
    "deberta-v2": lambda: DebertaV2Config(**COMMON),
}
OLD = int(transformers.__version__.split(".")[0]) < 5
WITHOUT_SDPA = ["deberta-v2", "electra"] if OLD else ["deberta-v2"]


def model_of(family, attention="sdpa"):
    torch.manual_seed(0)
    attention = "eager" if family in WITHOUT_SDPA else attention
    return AutoModelForMaskedLM.from_config(FAMILIES[family](), attn_implementation=attention).eval()


def padded_batch(length=12):
    tokens = torch.randint(5, 50, (3, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[length], [length - 5], [3]])).long()
    return tokens.where(mask.bool(), 0), mask, torch.tensor([0, 5, length + 1, length + 6, 2 * length + 2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_at_chosen_positions(family, attention):
    """The logits are those of a full pass with a mask of ones and zeros, whatever the family calls its head."""
    model = model_of(family, attention)
    tokens, mask, positions = padded_batch()
    with torch.no_grad():
        full = model(input_ids=tokens, attention_mask=mask).logits.flatten(0, 1)
        unpadded = model(input_ids=tokens[:1], attention_mask=mask[:1]).logits[0]
    denoiser = MaskedLM(model, tiny.tokenizer())
    assert denoiser.vocab_size == tiny.LOGITS_WIDTH
    torch.testing.assert_close(denoiser.logits(tokens, mask, positions), full[positions])
    torch.testing.assert_close(denoiser.logits(tokens[:1], None, torch.tensor([3, 1])), unpadded[[3, 1]])
    for row, length in enumerate((12, 7, 3)):
        alone = denoiser.logits(tokens[row : row + 1, :length], None, torch.arange(length))
        torch.testing.assert_close(alone, full[row * 12 : row * 12 + length], rtol=1e-4, atol=1e-4)
    shape = model(input_ids=tokens, attention_mask=mask).logits.shape
    assert shape[:2] == tokens.shape, "the model itself has no hook"


@pytest.mark.skipif(OLD, reason="masks are read on the host there")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_SDPA])
def test_no_value_is_read_on_the_host(family, padded):
    tokens, mask, positions = padded_batch()
    denoiser = MaskedLM(model_of(family), tiny.tokenizer())
    with NoHostReads():
        denoiser.logits(tokens, mask if padded else None, positions)


def test_compiled_blocks(monkeypatch):
    torch.compiler.reset()  # tests before this one in the process may have used up the recompilations of a layer
    backend = functools.partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", backend)
    tokens, mask, positions = padded_batch()
    expected = MaskedLM(model_of("bert"), tiny.tokenizer()).logits(tokens, mask, positions)
    compiled = MaskedLM(model_of("bert"), tiny.tokenizer(), compile=True)
    torch.testing.assert_close(compiled.logits(tokens, mask, positions), expected)


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (BertConfig(**COMMON), ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"]),
        # Its blocks hold lists of their own.
        (
            MobileBertConfig(**{**COMMON, "embedding_size": 32, "num_hidden_layers": 2}),
            ["mobilebert.encoder.layer.0", "mobilebert.encoder.layer.1"],
        ),
        # A list of lists.
        (
            FunnelConfig(vocab_size=64, block_sizes=[1, 2], d_model=32, n_head=4, d_head=8, d_inner=64),
            ["funnel.encoder.blocks.0.0", "funnel.encoder.blocks.1.0", "funnel.encoder.blocks.1.1"],
        ),
    ],
    ids=["bert", "mobilebert", "funnel"],
)
def test_which_blocks_are_compiled(config, blocks):
    model = AutoModelForMaskedLM.from_config(config)
    compile_blocks(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled[: len(blocks)] == blocks
    assert not any("ffn" in name for name in compiled)


def test_model_without_blocks():
    model = BertForMaskedLM(BertConfig(**COMMON))
    model.bert.encoder.layer = nn.Identity()
    with pytest.raises(ValueError, match="compile=True: BertForMaskedLM has no list of transformer blocks"):
        compile_blocks(model)


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


def test_callable_model():
    """A model gets its arguments by name, no mask where nothing is padded, and lends what it knows."""
    calls = []

    class Remote(BertForMaskedLM):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
            calls.append((inputs_embeds, attention_mask))
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    torch.manual_seed(0)
    model = Remote(tiny.bert_config()).double().train()
    denoiser = CallableDenoiser(model, tiny.tokenizer())
    assert (denoiser.vocab_size, denoiser.dtype, denoiser.device) == (64, torch.float64, torch.device("cpu"))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = MaskedLM(model, tiny.tokenizer()).logits(TOKENS, MASK, POSITIONS)
    calls.clear()
    torch.testing.assert_close(denoiser.logits(TOKENS, MASK, POSITIONS), expected)
    denoiser.logits(TOKENS, None, POSITIONS)
    assert calls[0][0] is None
    assert torch.equal(calls[0][1], MASK)
    assert calls[1] == (None, None)


def test_callable_module_of_its_own_kind():
    """Any other module is called by position, like a function."""

    class Plain(nn.Module):
        def forward(self, tokens, mask):
            assert torch.equal(mask, torch.ones_like(tokens))
            return torch.nn.functional.one_hot(tokens, 64).float()

    logits = CallableDenoiser(Plain(), tiny.tokenizer(), 64).logits(TOKENS, None, POSITIONS)
    assert torch.equal(logits.argmax(-1), TOKENS.flatten()[POSITIONS])


def test_bad_callables():
    with pytest.raises(ValueError, match="expected a callable, got int"):
        CallableDenoiser(3, tiny.tokenizer(), 64)
    with pytest.raises(ValueError, match="vocab_size is None, expected the width of the logits"):
        CallableDenoiser(lambda ids, mask: None, tiny.tokenizer())


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
    denoiser = MaskedLM(model_of("roberta"), tiny.tokenizer())
    tokens = torch.full((1, denoiser.max_length + 1), 9)
    denoiser.logits(tokens[:, :-1], None, torch.tensor([0]))
    with pytest.raises((IndexError, RuntimeError)):
        denoiser.logits(tokens, None, torch.tensor([0]))
