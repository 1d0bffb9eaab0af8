"""LoRA adapters, merged into the weights."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from entrgi import LogLikelihoodReward, SequenceClassifierReward, load_reward
from entrgi.models.adapters import apply_adapter
from entrgi.models.checkpoints import load_pretrained
from entrgi.prompts import Completion
from support import architectures, tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]
TEXTS = [Completion("w1", text, text) for text in ("w2 w3", "good")]


def adapter(model, folder, task, seed=5, save="auto", **options):
    """An adapter with weights that are not zero, and the model under it; ``save`` its embedding, too."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder, save_embedding_layers=save)
    return wrapped


@pytest.fixture
def base(tmp_path):
    architectures.causal_lm("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny.tokenizer(chat=tiny.CHAT).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_merged_weights_are_the_adapters_model(tmp_path):
    model = architectures.classifier("qwen3")
    plain = SequenceClassifierReward(architectures.classifier("qwen3"), tiny.tokenizer(chat=tiny.CHAT)).score(TEXTS)
    wrapped = adapter(architectures.classifier("qwen3"), tmp_path, "SEQ_CLS")
    merged, brought = apply_adapter(model, tmp_path)
    ids = torch.tensor([[10, 11, 12]])
    torch.testing.assert_close(merged(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    assert brought == {"score.weight"}
    assert not any("lora" in name for name, _ in merged.named_parameters())
    got = SequenceClassifierReward(merged, tiny.tokenizer(chat=tiny.CHAT)).score(TEXTS)
    assert (got - plain).abs().min() > 1e-3


def test_a_classifier_from_a_language_model_and_its_adapter(base, tmp_path):
    """The base has no head, the adapter brings it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    wrapped = adapter(model, tmp_path / "lora", "SEQ_CLS")
    reward = load_reward(base, adapter=tmp_path / "lora")
    assert isinstance(reward, SequenceClassifierReward)
    ids = torch.tensor([[10, 11, 12]])
    torch.testing.assert_close(reward.model(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForSequenceClassification, such as 'score.weight'"):
        load_reward(base, kind="classifier")


def test_language_model(base, tmp_path):
    model, _ = load_pretrained("reward", base, AutoModelForCausalLM, None, None)
    wrapped = adapter(model, tmp_path / "lora", "CAUSAL_LM")
    reward = load_reward(base, adapter=tmp_path / "lora", normalize=False)
    assert isinstance(reward, LogLikelihoodReward)
    ids = torch.tensor([[10, 11, 12]])
    torch.testing.assert_close(reward.model(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_a_model_still_wrapped(tmp_path):
    wrapped = adapter(architectures.classifier("qwen3"), tmp_path, "SEQ_CLS")
    merged, _ = apply_adapter(architectures.classifier("qwen3"), tmp_path)
    scores = [SequenceClassifierReward(m, tiny.tokenizer(chat=tiny.CHAT)).score(TEXTS) for m in (wrapped, merged)]
    torch.testing.assert_close(*scores)


def test_without_peft(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"reward: adapter='lora' needs peft: pip install peft"):
        load_reward(base, kind="likelihood", adapter="lora")


def test_adapters_that_cannot_be_had(base, tmp_path):
    for name, message in {
        tmp_path / "nowhere": "reward: no adapter folder",
        base: "has no adapter_config.json",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_reward(base, kind="likelihood", adapter=name)
    adapter(architectures.causal_lm("llama"), tmp_path / "lora", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"is an adapter; expected its base model, and the adapter as adapter="):
        load_reward(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="reward: cannot apply adapter"):
        load_reward(base, adapter=tmp_path / "lora")


@pytest.mark.parametrize(
    "options", [{"intermediate_size": 40}, {"num_hidden_layers": 4}, {"num_hidden_layers": 2}], ids=str
)
def test_adapters_of_another_model(base, tmp_path, options):
    adapter(architectures.causal_lm("llama", **options), tmp_path / "lora", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"reward: (cannot apply adapter|adapter .* does not fit LlamaForCausalLM)"):
        load_reward(base, adapter=tmp_path / "lora")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [64, 70, 48])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("phi", {}),  # its output layer has a bias
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=str,
)
def test_an_adapter_that_brings_an_embedding(tmp_path, kind, options, rows, tied):
    """Beside its own weights, in place of the model's, or under them; with as many tokens, more or fewer."""
    if "embed_tokens" in options.get("target_modules", []) and len(options["target_modules"]) == 2 and not tied:
        options = options | {"modules_to_save": ["lm_head"]}  # it would be resized and not saved
    model = architectures.causal_lm(kind, tie_word_embeddings=tied)
    torch.manual_seed(3)
    if rows != 64:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.normal_(std=0.2)
    wrapped = adapter(model, tmp_path, "CAUSAL_LM", save=True, **options)
    merged, brought = apply_adapter(architectures.causal_lm(kind, tie_word_embeddings=tied), tmp_path)
    ids = torch.tensor([[10, 11, rows - 1]])
    torch.testing.assert_close(merged(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    assert any("embed_tokens" in name for name in brought)
    assert merged.config.vocab_size == merged.get_input_embeddings().num_embeddings == rows
    assert merged.get_output_embeddings().out_features == rows


def test_an_embedding_of_another_width(tmp_path):
    adapter(
        architectures.causal_lm("llama", hidden_size=64, tie_word_embeddings=False),
        tmp_path,
        "CAUSAL_LM",
        modules_to_save=["embed_tokens"],
    )
    with pytest.raises(ValueError, match=r"adapter: cannot apply adapter .* size mismatch"):
        apply_adapter(architectures.causal_lm("llama"), tmp_path)


def test_a_reward_with_a_larger_vocabulary(base, tmp_path):
    """The adapter's rows reach the reward; its classifier counts them."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    model.resize_token_embeddings(70, mean_resizing=False)
    wrapped = adapter(model, tmp_path / "lora", "SEQ_CLS", save=True)
    reward = load_reward(base, adapter=tmp_path / "lora")
    assert reward.weight.shape == (70, 32)
    ids = torch.tensor([[10, 11, 69]])
    torch.testing.assert_close(reward.model(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def merged_in_turn(model, folders):
    for folder in folders:
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


@pytest.mark.parametrize("second", [{}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_several_adapters(base, tmp_path, second):
    folders = [tmp_path / "first", tmp_path / "second"]
    for index, (folder, options) in enumerate(zip(folders, ({}, second), strict=True)):
        model, _ = load_pretrained("reward", base, AutoModelForCausalLM, None, None)
        adapter(model, folder, "CAUSAL_LM", seed=index, **options)
    model, _ = load_pretrained("reward", base, AutoModelForCausalLM, None, None)
    expected = merged_in_turn(model, folders)
    ids = torch.tensor([[10, 11, 12]])
    own = expected(input_ids=ids).logits
    for adapters in (folders, tuple(map(str, folders))):
        reward = load_reward(base, adapter=adapters)
        torch.testing.assert_close(reward.model(input_ids=ids).logits, own, rtol=1e-6, atol=1e-6)
    for adapters in (folders[:1], folders[1:]):
        assert (load_reward(base, adapter=adapters).model(input_ids=ids).logits - own).abs().max() > 1e-3


def test_one_of_several_adapters_makes_a_classifier(base, tmp_path):
    model, _ = load_pretrained("reward", base, AutoModelForCausalLM, None, None)
    adapter(model, tmp_path / "first", "CAUSAL_LM")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    adapter(model, tmp_path / "second", "SEQ_CLS")
    reward = load_reward(base, adapter=[tmp_path / "first", tmp_path / "second"])
    assert isinstance(reward, SequenceClassifierReward)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], r"reward: adapter is \[\], expected a folder or hub id, or a list of them"),
        (3, "reward: adapter is 3, expected a folder or hub id"),
        ({"a": "b"}, "reward: adapter is {'a': 'b'}, expected"),
        (["nowhere", None], "reward: adapter has None, expected folders or hub ids"),
        (["./no/where"], "reward: no adapter folder './no/where'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [None, "likelihood"])
def test_what_is_no_adapter(base, kind, adapters, message):
    with pytest.raises(ValueError, match=message):
        load_reward(base, kind=kind, adapter=adapters)
