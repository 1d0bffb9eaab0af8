"""In-place operators bump version counters: a backward through a stale tensor raises instead of being wrong."""

from __future__ import annotations

import pytest
import torch

from support.calls import WRITTEN, arguments, call

FLOATING = [
    (name, key) for name, keys in WRITTEN.items() for key in keys if key not in ("error_flag", "tokens", "committed")
]


@pytest.mark.parametrize(("name", "key"), FLOATING)
def test_a_stale_backward_raises(device, name, key):
    keywords = arguments(name, device)
    weight = torch.ones_like(keywords[key]).requires_grad_()

    def loss():
        return (weight * keywords[key]).sum()  # saves keywords[key] for the gradient of weight

    loss().backward()  # without the operator in between it is fine
    stale = loss()
    call(name, keywords)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WRITTEN.items() for key in keys])
def test_versions_count_and_only_of_what_is_written(device, name, key):
    keywords = arguments(name, device)
    tensors = {k: t for k, t in keywords.items() if isinstance(t, torch.Tensor)}
    before = {k: t._version for k, t in tensors.items()}
    call(name, keywords)
    assert tensors[key]._version > before[key]
    for other in tensors.keys() - set(WRITTEN[name]):
        assert tensors[other]._version == before[other], other


def test_views_share_the_version(device):
    """Logits are usually a slice of a larger buffer."""
    keywords = arguments("sgd_step_", device)
    buffer = torch.zeros(8, keywords["logits"].shape[1], device=device)
    weight = torch.ones_like(buffer).requires_grad_()
    keywords["logits"] = buffer[2:7].copy_(keywords["logits"])
    stale = (weight * buffer).sum()
    call("sgd_step_", keywords)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_moments_of_a_single_step_may_be_missing(device):
    keywords = arguments("adam_step_", device)
    keywords.update(exp_avg=None, exp_avg_sq=None, step=1, last=True)
    version = keywords["logits"]._version
    call("adam_step_", keywords)
    assert keywords["logits"]._version > version


@pytest.mark.parametrize("name", ["relaxed_embedding_", "adam_step_", "sgd_step_"])
def test_under_no_grad_and_inference_mode(device, name):
    for context in (torch.no_grad, torch.inference_mode):
        expected = arguments(name, device)
        call(name, expected)
        with context():
            keywords = arguments(name, device)
            call(name, keywords)
            for key in WRITTEN[name]:
                torch.testing.assert_close(keywords[key], expected[key], equal_nan=True)


@pytest.mark.parametrize("name", ["relaxed_embedding_", "adam_step_", "sgd_step_"])
def test_autograd_takes_no_part(device, name):
    """Leaves that require a gradient are written, too, and gradients are recorded afterwards as before."""
    expected, keywords = arguments(name, device), arguments(name, device)
    call(name, expected)
    for key in WRITTEN[name]:
        keywords[key].requires_grad_()
    call(name, keywords)
    assert torch.is_grad_enabled()
    for key in WRITTEN[name]:
        assert keywords[key].is_leaf, key
        torch.testing.assert_close(keywords[key].detach(), expected[key], equal_nan=True)


@pytest.mark.parametrize("name", WRITTEN)
def test_tensors_made_in_inference_mode(device, name):
    """A denoiser may have run there; its logits are then written outside, where torch's own operators refuse to."""
    expected = arguments(name, device)
    call(name, expected)
    with torch.inference_mode():
        keywords = arguments(name, device)
    call(name, keywords)
    for key in WRITTEN[name]:
        assert keywords[key].is_inference()
        torch.testing.assert_close(keywords[key], expected[key], equal_nan=True)


def test_what_is_normal_beside_them_is_counted(device):
    keywords = arguments("adam_step_", device)
    with torch.inference_mode():
        keywords["logits"] = keywords["logits"].clone()
    before = keywords["exp_avg_sq"]._version
    call("adam_step_", keywords)
    assert keywords["exp_avg_sq"]._version > before
