"""The faster library for fp32 products may change their speed, not their precision, and nothing for others."""

import pytest
import torch

from entrgi import generate, matmul
from support import tiny

CPU = torch.device("cpu")
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 5, "steps": 5, "seed": 4}


def error(left, right):
    exact = left.double() @ right.double()
    return ((left @ right).double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("shape", [(64, 768, 3072), (13, 1024, 301), (128, 64, 64)], ids=str)
def test_products_stay_fp32(shape):
    torch.manual_seed(0)
    n, k, m = shape
    left, right = torch.randn(n, k), torch.randn(k, m)
    usual = error(left, right)
    with matmul.onednn_matmul(CPU):
        assert error(left, right) < 4 * usual + 1e-7
        assert matmul.products_are_exact(torch.matmul)


def test_reduced_precision_is_recognised():
    """What the probe is for: a processor that takes the permission at its word."""

    def in_bf16(left, right):
        return (left.bfloat16() @ right.bfloat16()).float()

    def in_tf32(left, right):
        kept = (left.view(torch.int32) & ~0x1FFF).view(torch.float32)  # 10 bits of fraction
        return kept @ right

    assert not matmul.products_are_exact(in_bf16)
    assert not matmul.products_are_exact(in_tf32)
    assert matmul.products_are_exact(torch.matmul)


def test_setting_is_restored(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before, seen = settings.fp32_precision, []

    def callback(_state):
        seen.append(settings.fp32_precision)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate("the", tiny.denoiser(), tiny.bert_reward(), callback_on_step_end=callback, **OPTIONS)
    assert seen == ["bf16"]
    assert settings.fp32_precision == before
    torch.get_float32_matmul_precision()  # raises where settings were left mixed


def test_setting_outlives_the_first_of_two_generations(monkeypatch):
    """In threads they overlap: the one that began first must not end the other's, nor the other keep its setting."""
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    first, second = matmul.onednn_matmul(CPU), matmul.onednn_matmul(CPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before


def test_a_reduced_precision_is_refused(monkeypatch):
    matmul._onednn_is_faster.cache_clear()
    monkeypatch.setattr(matmul, "_is_amd", lambda: True)
    monkeypatch.setattr(matmul, "products_are_exact", lambda _product: False)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with matmul.onednn_matmul(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        matmul._onednn_is_faster.cache_clear()


def test_same_tokens(monkeypatch):
    with matmul._permission:
        if not matmul.products_are_exact(torch.matmul):  # AMX: entrgi would not take oneDNN here
            pytest.skip("oneDNN's fp32 products have a reduced precision on this processor")
    models = tiny.denoiser(), tiny.bert_reward()
    outputs = []
    for faster in (True, False):
        monkeypatch.setattr(matmul, "_onednn_is_faster", lambda faster=faster: faster)
        outputs.append(generate(["the movie", "w3"], *models, **OPTIONS))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].rewards, outputs[1].rewards)
