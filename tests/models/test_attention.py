"""Names of attention that a model is given, and gives back."""

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from entrgi.models import attention
from support import tiny


@pytest.fixture
def model():
    """A classifier that holds a part with another attention, as some hold one for images."""
    result = BertForSequenceClassification(tiny.bert_config()).eval()
    result.part = BertModel(tiny.bert_config()).eval()
    for module, name in ((result, "sdpa"), (result.part, "eager")):
        module.config._attn_implementation = name
    return result


def names(model):
    return (
        model.config._attn_implementation,
        model.bert.config._attn_implementation,
        model.part.config._attn_implementation,
    )


def test_a_part_with_another_attention_keeps_it(model):
    attention.keep_masks_on_device(model)
    assert names(model) == ("entrgi_sdpa", "entrgi_sdpa", "eager")


def test_a_model_that_computes_something_else_is_left_as_it_was(model, monkeypatch):
    before = names(model)
    monkeypatch.setattr(attention, "is_close", lambda *_: False)
    attention.keep_masks_on_device(model)
    assert names(model) == before == ("sdpa", "sdpa", "eager")


def test_a_trial_that_fails_leaves_the_model_as_it_was_and_one_without_memory_says_so(model):
    def fail(*_):
        raise error

    model.bert.register_forward_pre_hook(fail)
    error = RuntimeError("not with masks")
    attention.keep_masks_on_device(model)
    assert names(model) == ("sdpa", "sdpa", "eager")
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        attention.keep_masks_on_device(model)
