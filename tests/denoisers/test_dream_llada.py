"""Dream and LLaDA from checkpoints in their official layouts, against passes written out in plain torch."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entrgi.denoisers import CallableDenoiser, DreamDenoiser, LLaDADenoiser, MaskedLM, load_denoiser
from support import official_layouts as official
from support import tiny
from support.host_reads import NoHostReads

DREAM_KINDS = {
    "dream": {},
    "dream tied": {"tie_word_embeddings": True},
    "dream full heads": {"num_key_value_heads": 4},
}
LLADA_KINDS = {
    "llada": {},
    "llada grouped": {"n_kv_heads": 2},
    "llada one kv head": {"n_kv_heads": None, "multi_query_attention": True},
    "llada tied": {"weight_tying": True},
    "llada qkv bias": {"include_qkv_bias": True},
    "llada bias": {"include_bias": True},
    "llada wide output": {"embedding_size": official.VOCAB + 6},
    "llada ratio": {"mlp_hidden_size": None, "mlp_ratio": 2},
}
KINDS = [*DREAM_KINDS, *LLADA_KINDS]
LENGTHS = (9, 4, 7)


def recipe(kind):
    """(fields, weights, reference) of a checkpoint."""
    if kind in DREAM_KINDS:
        fields = {**official.DREAM, **DREAM_KINDS[kind]}
        return fields, official.dream_weights(fields), official.dream_logits
    fields = {**official.LLADA, **LLADA_KINDS[kind]}
    return fields, official.llada_weights(fields), official.llada_logits


def sequences(seed=0):
    """Right-padded tokens, their mask, and each sequence alone."""
    generator = torch.Generator().manual_seed(seed)
    alone = [torch.randint(official.VOCAB, (length,), generator=generator) for length in LENGTHS]
    tokens = torch.full((len(alone), max(LENGTHS)), official.EOS)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(alone):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    return tokens, mask, alone


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-6), (torch.float32, 5e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_an_independent_pass(tmp_path, kind, dtype, tolerance):
    """Key map, shift, rotary angles, grouped heads, biases, tying and padding, at every position."""
    fields, weights, reference = recipe(kind)
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights), dtype=dtype)
    assert denoiser.dtype == dtype
    tokens, mask, alone = sequences()
    positions = torch.arange(tokens.numel())
    padded = denoiser.logits(tokens, mask, positions).unflatten(0, tokens.shape)
    for row, sequence in enumerate(alone):
        expected = reference(weights, fields, sequence)
        assert denoiser.vocab_size == expected.shape[1]
        single = denoiser.logits(sequence[None], None, torch.arange(len(sequence)))
        for got in (padded[row, : len(sequence)], single):
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_head_at_chosen_positions(tmp_path, kind):
    fields, weights, _ = recipe(kind)
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights))
    tokens, mask, _ = sequences()
    everywhere = denoiser.logits(tokens, mask, torch.arange(tokens.numel()))
    rows = []
    denoiser.model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
    positions = torch.tensor([0, 9, 12, 3, 3])  # two first positions, no order, one twice
    got = denoiser.logits(tokens, mask, positions)
    torch.testing.assert_close(got, everywhere[positions])
    assert rows == [5], "the output layer runs on these rows only"
    got.fill_(0)  # the sampler overwrites it
    torch.testing.assert_close(denoiser.logits(tokens, mask, positions), everywhere[positions])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["dream", "llada grouped"])
def test_no_value_is_read_on_the_host(tmp_path, kind, padded):
    fields, weights, _ = recipe(kind)
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights))
    (tokens, mask, _), positions = sequences(), torch.tensor([1, 2])
    with NoHostReads():
        denoiser.logits(tokens, mask if padded else None, positions)
        with pytest.raises(AssertionError, match="waits"):
            mask.all().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["dream", "llada grouped"])
def test_no_pass_waits_for_the_device(tmp_path, kind, padded):
    folder = official.write_checkpoint(tmp_path, *recipe(kind)[:2])
    denoiser = load_denoiser(folder, device="cuda", dtype=torch.float64)
    assert denoiser.device.type == "cuda"
    (tokens, mask, _), positions = sequences(), torch.tensor([1, 2, 9])
    mask = mask if padded else None
    expected = load_denoiser(folder, dtype=torch.float64).logits(tokens, mask, positions)
    arguments = [None if x is None else x.cuda() for x in (tokens, mask, positions)]
    denoiser.logits(*arguments)  # libraries warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = denoiser.logits(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_dream_tokenizer(tmp_path):
    """vocab.json and merges.txt of a class that is code of the repository: Qwen2's byte-level BPE."""
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, *recipe("dream")[:2]))
    assert isinstance(denoiser, DreamDenoiser)
    names = ("mask_token_id", "eos_token_id", "pad_token_id", "max_length")
    assert [getattr(denoiser, name) for name in names] == [official.MASK, official.EOS, official.EOS, 40]
    pieces = ["<|im_start|>", *"user", "Ċ", "the", "Ġ", "mo", "vi", "e", "<|im_end|>", "Ċ"]
    pieces += ["<|im_start|>", *"assistant", "Ċ"]
    encoded = denoiser.encode("the movie")
    assert denoiser.tokenizer.convert_ids_to_tokens(encoded.body) == pieces
    assert (encoded.prefix, encoded.suffix, encoded.is_text) == ([], [], False)
    as_messages = denoiser.encode([{"role": "user", "content": "the movie"}])
    assert as_messages == encoded


def test_plain_text_follows_bos(tmp_path):
    """Also where the tokenizer declares a [CLS], as LLaDA's does."""
    for kind in ("dream", "llada"):
        folder = official.write_checkpoint(tmp_path / kind, *recipe(kind)[:2])
        encoded = load_denoiser(folder, chat=False).encode("the movie")
        assert (encoded.prefix, encoded.suffix, encoded.is_text) == ([official.BOS], [], True)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        assert load_denoiser(folder, chat=False).encode("the movie").prefix == []


def test_ids_of_llada(tmp_path):
    """Its tokenizer has no mask token: the id is the config's."""
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, *recipe("llada")[:2]))
    assert isinstance(denoiser, LLaDADenoiser)
    assert denoiser.tokenizer.mask_token_id is None
    names = ("mask_token_id", "eos_token_id", "pad_token_id", "max_length")
    assert [getattr(denoiser, name) for name in names] == [official.MASK, official.EOS, official.EOS, 40]


def test_pad_of_the_tokenizer_before_the_config(tmp_path):
    """DiffuCoder's tokenizer pads with a token of its own."""
    folder = official.write_checkpoint(tmp_path, *recipe("dream")[:2])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    (folder / "special_tokens_map.json").unlink()
    assert load_denoiser(folder).pad_token_id == official.IM_END


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_dtype_of_the_checkpoint(tmp_path, kind):
    """Rotary frequencies stay float32 in a bfloat16 model, whether it is loaded or handed over."""
    fields, weights, reference = recipe(kind)
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights, dtype=torch.bfloat16))
    assert denoiser.dtype == torch.bfloat16
    frequencies = denoiser.model.model.rotary_emb.inv_freq
    half = torch.arange(4) / 4
    torch.testing.assert_close(frequencies, 1 / 50.0**half)
    handed = type(denoiser)(denoiser.model.to(torch.float32).to(torch.bfloat16), denoiser.tokenizer, mask_token_id=4)
    torch.testing.assert_close(handed.model.model.rotary_emb.inv_freq, frequencies, rtol=0, atol=0)
    tokens = sequences()[0][:1]
    got = denoiser.logits(tokens, None, torch.arange(9))
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    expected = reference(rounded, fields, tokens[0])
    assert got.dtype == torch.bfloat16
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 0.03


def test_rotations_of_llada_in_full_precision(tmp_path):
    """``rope_full_precision``: queries and keys of a bfloat16 model turn by unrounded cosines."""
    hidden, positions = torch.zeros(1, 9, 32, dtype=torch.bfloat16), torch.arange(9)[None]
    kinds = {}
    for full in (True, False):
        fields = {**official.LLADA, "rope_full_precision": full}
        folder = official.write_checkpoint(tmp_path / str(full), fields, official.llada_weights(fields))
        denoiser = load_denoiser(folder, dtype=torch.bfloat16)
        kinds[full] = denoiser.model.model.rotary_emb(hidden, positions)[0].dtype
        assert denoiser.logits(sequences()[0], None, torch.arange(3)).dtype == torch.bfloat16
    assert kinds == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("shards", [1, 3])
def test_single_file_and_shards(tmp_path, shards):
    fields, weights, reference = recipe("dream")
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights, shards=shards))
    tokens = torch.arange(5)
    got = denoiser.logits(tokens[None], None, torch.arange(5))
    torch.testing.assert_close(got.double(), reference(weights, fields, tokens), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in denoiser.model.parameters())


def test_hub_id(tmp_path):
    """A hub id from the local cache; only what is needed is asked for, and code never."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--dream"
    fields, weights, reference = recipe("dream")
    official.write_checkpoint(repository / "snapshots" / commit, fields, weights)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    denoiser = load_denoiser("someone/dream", cache_dir=tmp_path, local_files_only=True)
    tokens = torch.arange(5)
    got = denoiser.logits(tokens[None], None, torch.arange(5))
    torch.testing.assert_close(got.double(), reference(weights, fields, tokens), rtol=1e-4, atol=1e-4)
    for cls in (load_denoiser, DreamDenoiser.from_pretrained):
        with pytest.raises(ValueError, match="cannot load 'someone/else'"):
            cls("someone/else", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "gelu"),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_unsupported_option_of_llada(tmp_path, field, value):
    fields = {**official.LLADA, field: value}
    folder = official.write_checkpoint(tmp_path, fields, official.llada_weights(official.LLADA))
    with pytest.raises(ValueError, match=rf"config\.json has {field} .*expected"):
        load_denoiser(folder)


def test_absent_option_of_llada(tmp_path):
    """An absent field is what the official code takes it for, which for these is not LLaDA."""
    for field in ("block_type", "activation_type", "rope", "layer_norm_type"):
        fields = {name: value for name, value in official.LLADA.items() if name != field}
        folder = official.write_checkpoint(tmp_path / field, fields, official.llada_weights(official.LLADA))
        with pytest.raises(ValueError, match=rf"config\.json has {field} "):
            load_denoiser(folder)
    fields = {**official.LLADA, "include_bias": True, "bias_for_layer_norm": None}
    with pytest.raises(ValueError, match="bias_for_layer_norm None and include_bias True"):
        LLaDADenoiser.build_model(fields)
    with pytest.raises(ValueError, match="n_kv_heads 2 and multi_query_attention True, expected n_kv_heads 1"):
        LLaDADenoiser.build_model({**official.LLADA, "n_kv_heads": 2, "multi_query_attention": True})
    with pytest.raises(ValueError, match="d_model 30, expected a multiple of n_heads 4"):
        LLaDADenoiser.build_model({**official.LLADA, "d_model": 30})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("block_size", 32),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_unsupported_option_of_dream(tmp_path, field, value):
    fields = {**official.DREAM, field: value}
    folder = official.write_checkpoint(tmp_path, fields, official.dream_weights(fields))
    with pytest.raises(ValueError, match=rf"config\.json has {field} .*expected"):
        load_denoiser(folder)


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_missing_field(tmp_path, kind):
    fields, weights, _ = recipe(kind)
    for field in ("rope_theta", "rms_norm_eps", "vocab_size"):
        left = {name: value for name, value in fields.items() if name != field}
        with pytest.raises(ValueError, match=rf"config\.json has no '{field}'"):
            load_denoiser(official.write_checkpoint(tmp_path, left, weights))


def changed(folder, change):
    """Apply ``change`` to the tensors of the shard that holds the output layer."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / next(
        place for name, place in index.items() if "lm_head" in name or name.endswith("transformer.ff_out.weight")
    )
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(("kind", "head"), [("dream", "lm_head"), ("llada", "model.transformer.ff_out")])
def test_weights_that_do_not_fit(tmp_path, kind, head):
    fields, weights, _ = recipe(kind)
    head = f"{head}.weight"

    def checkpoint(name):
        return official.write_checkpoint(tmp_path / name, fields, weights)

    with pytest.raises(ValueError, match=rf"lacks 1 weights, such as '{head}'"):
        load_denoiser(changed(checkpoint("missing"), lambda tensors: tensors.pop(head)))
    with pytest.raises(
        ValueError, match=r"holds 1 weights that its config\.json does not describe, such as 'extra\.weight'"
    ):
        load_denoiser(changed(checkpoint("more"), lambda tensors: tensors.update({"extra.weight": torch.zeros(2)})))
    with pytest.raises(ValueError, match=rf"'{head}' of .* has shape \[3, 32\], expected \[{official.VOCAB}, 32\]"):
        load_denoiser(changed(checkpoint("shape"), lambda tensors: tensors.update({head: torch.zeros(3, 32)})))
    with pytest.raises(ValueError, match=rf"'{head}' of .* is I8, expected one of .*quantised"):
        load_denoiser(changed(checkpoint("int8"), lambda tensors: tensors.update({head: tensors[head].to(torch.int8)})))
    more = {**fields, "num_hidden_layers": 3} if kind == "dream" else {**fields, "n_layers": 3}
    part = "model.layers.2" if kind == "dream" else "model.transformer.blocks.2"
    folder = official.write_checkpoint(tmp_path / "layers", more, weights)
    with pytest.raises(ValueError, match=rf"lacks \d+ weights, such as '{part}"):
        load_denoiser(folder)


def test_files_that_do_not_read(tmp_path):
    fields, weights, _ = recipe("dream")

    def checkpoint(name):
        return official.write_checkpoint(tmp_path / name, fields, weights)

    folder = checkpoint("shard")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-00002\.safetensors, expected model\.safetensors, or"):
        load_denoiser(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors, expected"):
        load_denoiser(folder)
    folder = checkpoint("truncated")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match=r"cannot read .*model-00001-of-00002\.safetensors"):
        load_denoiser(folder)
    folder = checkpoint("index")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        load_denoiser(folder)
    folder = checkpoint("tokenizer")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / file).unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load_denoiser(folder)
    folder = checkpoint("config")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="denoiser: cannot"):
        load_denoiser(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_denoiser(folder)
    with pytest.raises(ValueError, match="no folder"):
        load_denoiser(tmp_path / "nowhere")


def test_another_kind_of_checkpoint(tmp_path):
    fields, weights, _ = recipe("dream")
    folder = official.write_checkpoint(tmp_path, fields, weights)
    with pytest.raises(ValueError, match="model_type 'Dream', expected 'llada' for a LLaDADenoiser"):
        LLaDADenoiser.from_pretrained(folder)
    with pytest.raises(ValueError, match="unknown option 'attn_implementation', expected one of cache_dir"):
        load_denoiser(folder, attn_implementation="eager")
    with pytest.raises(ValueError, match="trust_remote_code is not supported"):
        load_denoiser(folder, trust_remote_code=True)
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama', expected one of 'Dream', 'llada' or a masked"):
        load_denoiser(folder)


def test_rotary_buffers_of_old_exports_are_ignored(tmp_path):
    fields, weights, reference = recipe("dream")
    stored = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, stored))
    tokens = torch.arange(5)
    got = denoiser.logits(tokens[None], None, torch.arange(5))
    torch.testing.assert_close(got.double(), reference(weights, fields, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "embedding", "head"),
    [
        ("dream tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("llada tied", "model.transformer.wte.weight", "model.transformer.ff_out.weight"),
    ],
)
def test_tied_checkpoint_that_stores_its_output_layer(tmp_path, kind, embedding, head):
    fields, weights, _ = recipe(kind)
    same = {**weights, head: weights[embedding].clone()}
    denoiser = load_denoiser(official.write_checkpoint(tmp_path / "same", fields, same))
    assert denoiser.model.lm_head.weight is denoiser.model.model.embed_tokens.weight
    other = {**weights, head: weights[embedding] + 1}
    with pytest.raises(ValueError, match=rf"ties the output layer to the input embedding, yet '{head}' differs"):
        load_denoiser(official.write_checkpoint(tmp_path / "other", fields, other))


def write_adapter(folder, names, weights, seed=0, whole=(), more=0):
    """A rank-2 LoRA adapter on the modules that end in ``names``, and the weights it makes of ``weights``.

    What it brings whole has so many ``more`` rows.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, merged = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and module.rpartition(".")[2] in names:
            down = torch.randn(2, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], 2, generator=generator) * 0.1
            prefix = f"base_model.model.{module}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            merged[name] = weight + 3 / 2 * up @ down
    for name in whole:
        merged[name] = torch.randn(weights[name].shape[0] + more, weights[name].shape[1], generator=generator)
        tensors[f"base_model.model.{name}"] = merged[name]
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": list(names),
        "modules_to_save": [name.removesuffix(".weight").rpartition(".")[2] for name in whole] or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, merged


@pytest.mark.parametrize(
    ("kind", "names", "whole"),
    [
        ("dream", ("q_proj", "o_proj", "down_proj"), ()),
        ("llada", ("q_proj", "attn_out", "ff_proj", "up_proj"), ()),
        ("llada", ("v_proj",), ("model.transformer.wte.weight",)),
        ("llada qkv bias", ("k_proj", "ff_out"), ()),  # ff_out also names the output layer
    ],
)
def test_adapter_with_official_names(tmp_path, kind, names, whole):
    pytest.importorskip("peft")
    fields, weights, reference = recipe(kind)
    folder = official.write_checkpoint(tmp_path / "model", fields, weights)
    adapter, merged = write_adapter(tmp_path / "adapter", names, weights, whole=whole)
    denoiser = load_denoiser(folder, adapter=adapter)
    tokens = torch.arange(6)
    got = denoiser.logits(tokens[None], None, torch.arange(6)).double()
    torch.testing.assert_close(got, reference(merged, fields, tokens), rtol=1e-4, atol=1e-4)
    assert (got - reference(weights, fields, tokens)).abs().max() > 0.1
    assert not any(parameter.requires_grad for parameter in denoiser.model.parameters())


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("dream", ("model.embed_tokens.weight", "lm_head.weight")),
        ("dream tied", ("model.embed_tokens.weight",)),
        ("llada", ("model.transformer.wte.weight", "model.transformer.ff_out.weight")),
        ("llada tied", ("model.transformer.wte.weight",)),
    ],
)
def test_adapter_with_a_larger_vocabulary(tmp_path, kind, whole):
    """In a file beside the low ranks, as peft writes it where the embedding was resized before the training."""
    pytest.importorskip("peft")
    fields, weights, reference = recipe(kind)
    folder = official.write_checkpoint(tmp_path / "model", fields, weights)
    adapter, merged = write_adapter(tmp_path / "adapter", ("q_proj",), weights, whole=whole, more=3)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None}))
    denoiser = load_denoiser(folder, adapter=adapter)
    assert denoiser.vocab_size == official.VOCAB + 3
    tokens = torch.tensor([0, 4, official.VOCAB + 2, 5])
    got = denoiser.logits(tokens[None], None, torch.arange(4)).double()
    torch.testing.assert_close(got, reference(merged, fields, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "names"), [("dream", ("q_proj", "down_proj")), ("llada", ("q_proj", "ff_proj"))])
def test_several_adapters(tmp_path, kind, names):
    """Merged in turn, in the official names."""
    pytest.importorskip("peft")
    fields, weights, reference = recipe(kind)
    folder = official.write_checkpoint(tmp_path / "model", fields, weights)
    adapters, merged = [], weights
    for seed in range(2):
        adapter, merged = write_adapter(tmp_path / f"adapter {seed}", names, merged, seed=seed)
        adapters.append(adapter)
    denoiser = load_denoiser(folder, adapter=adapters)
    tokens = torch.arange(6)
    got = denoiser.logits(tokens[None], None, torch.arange(6)).double()
    torch.testing.assert_close(got, reference(merged, fields, tokens), rtol=1e-4, atol=1e-4)


def test_adapter_of_another_model(tmp_path):
    pytest.importorskip("peft")
    fields, weights, _ = recipe("llada")
    folder = official.write_checkpoint(tmp_path / "model", fields, weights)
    adapter, _ = write_adapter(tmp_path / "adapter", ("q_proj",), official.dream_weights(official.DREAM))
    with pytest.raises(ValueError, match=r"denoiser: adapter .* does not fit"):
        load_denoiser(folder, adapter=adapter)


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_compiled_blocks(tmp_path, monkeypatch, kind):
    """Every block in one graph, and all of them in the same one."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend, fullgraph=True)
    )
    fields, weights, reference = recipe(kind)
    folder = official.write_checkpoint(tmp_path, fields, weights)
    denoiser = load_denoiser(folder, compile=True)
    tokens, mask, alone = sequences()
    got = denoiser.logits(tokens, mask, torch.arange(tokens.numel())).unflatten(0, tokens.shape)
    assert len(graphs) == 1
    for row, sequence in enumerate(alone):
        expected = reference(weights, fields, sequence)
        torch.testing.assert_close(got[row, : len(sequence)].double(), expected, rtol=1e-4, atol=1e-4)


def test_same_as_a_callable(tmp_path):
    """The whole model behind a callable, shifted by the caller."""
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, *recipe("dream")[:2]))
    plain = CallableDenoiser(
        lambda ids, mask: denoiser.model(input_ids=ids),
        denoiser.tokenizer,
        official.VOCAB,
        mask_token_id=official.MASK,
        shift=True,
    )
    tokens, positions = sequences()[0][:1], torch.tensor([0, 1, 8])
    torch.testing.assert_close(plain.logits(tokens, None, positions), denoiser.logits(tokens, None, positions))


def test_masked_lm_by_its_config(tmp_path):
    original = tiny.denoiser()
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path, max_length=20, chat=False)
    assert isinstance(loaded, MaskedLM)
    assert (loaded.max_length, loaded.chat) == (20, False)
    tokens = torch.full((1, 5), 4)
    expected = original.logits(tokens, None, torch.tensor([2]))
    torch.testing.assert_close(loaded.logits(tokens, None, torch.tensor([2])), expected)


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_rotary_frequencies_follow_the_model_to_another_device(tmp_path, kind):
    """They are the denoiser's own, so moving the user's model leaves them where they were."""
    fields, _, _ = recipe(kind)
    cls = DreamDenoiser if kind == "dream" else LLaDADenoiser
    model = cls.build_model(fields).requires_grad_(False)
    folder = official.write_checkpoint(tmp_path, *recipe(kind)[:2])
    denoiser = cls(model, load_denoiser(folder).tokenizer, mask_token_id=official.MASK)
    model.to("meta")
    tokens = sequences()[0].to("meta")
    assert denoiser.logits(tokens, None, torch.tensor([0, 1], device="meta")).device.type == "meta"
    assert denoiser.model.model.rotary_emb.inv_freq.device.type == "meta"
