"""LoRA adapters, merged into the weights."""

import sys

import architectures
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from entrgi import LogLikelihoodReward, SequenceClassifierReward, load_reward
from entrgi.checkpoints import load_pretrained
from entrgi.models.adapters import apply_adapter
from entrgi.prompts import Completion

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]
TEXTS = [Completion("w1", text, text) for text in ("w2 w3", "good")]


def adapter(model, folder, task, **options):
    """An adapter with weights that are not zero, and the model under it."""
    config = peft.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder)
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
