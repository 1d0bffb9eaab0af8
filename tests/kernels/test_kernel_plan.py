"""Launch plans and floors, from the bindings as they are built (with or without CUDA): no kernel runs here."""

import importlib.util
import subprocess
import sys

import pytest
from build_simulated import ROOT

OPERATORS = [
    "logit_statistics",
    "logit_statistics_backward",
    "sample_tokens",
    "gumbel_perturb",
    "relaxed_embedding",
    "logit_gradient",
    "adam_step_",
    "sgd_step_",
    "commit_",
]
SHAPES = [(1, 152_064, 1024), (8, 151_937, 2048), (64, 30_522, 768), (512, 152_064, 2048), (2048, 152_064, 4096)]


@pytest.fixture(scope="module")
def bindings():
    found = sorted((ROOT / "entrgi_ext").glob("_bindings*.so"))
    if not found:
        pytest.skip("entrgi_ext/_bindings is not built")
    spec = importlib.util.spec_from_file_location("_bindings", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("n", [0, 1, 16, 17, 64, 65, 512, 100_000])
@pytest.mark.parametrize("vocab", [1, 1000, 152_064, 2**23])
def test_every_plan_can_be_launched(bindings, op, n, vocab):
    for logits_dtype, embedding_dtype in (("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "float32")):
        for arch, num_sms in ((80, 108), (86, 28), (90, 132)):
            plan = bindings.plan(op, n, vocab, 2048, logits_dtype, embedding_dtype, arch=arch, num_sms=num_sms)
            assert 0 <= plan["grid"] < 2**31
            assert plan["grid"] > 0 or n == 0
            assert 0 < plan["threads"] <= 1024
            assert plan["shared_bytes"] <= 99 * 1024  # what every device from sm_80 on has
            assert 1 <= plan["splits"] <= max(vocab, 1)
            assert plan["workspace_bytes"] >= 0


def test_few_rows_fill_the_device(bindings):
    for n, vocab, dim in SHAPES[:2]:
        assert bindings.plan("logit_statistics", n, vocab)["grid"] >= 32
        assert bindings.plan("relaxed_embedding", n, vocab, dim)["grid"] >= 132
    assert bindings.plan("logit_statistics", 512, 152_064)["splits"] == 1


@pytest.mark.parametrize(("n", "vocab", "dim"), SHAPES)
def test_splits_can_be_asked_for(bindings, n, vocab, dim):
    for splits in (1, 3, 17):
        plan = bindings.plan("relaxed_embedding", n, vocab, dim, splits=splits)
        assert plan["splits"] == splits
        assert plan["workspace_bytes"] == splits * n * dim * 4


def test_floors(bindings):
    n, vocab, dim = 512, 152_064, 2048
    logits, scores, table = n * vocab * 2, n * vocab * 4, vocab * dim * 2
    floor = bindings.floor("adam_step_", n, vocab, dim)
    assert floor["flops"] == 2 * n * vocab * dim
    assert floor["bytes"] == pytest.approx(2 * logits + 4 * scores + table, rel=0.01)
    first, last = (bindings.floor("adam_step_", n, vocab, dim, **kw)["bytes"] for kw in ({"step": 1}, {"last": True}))
    assert first == last == floor["bytes"] - 2 * scores
    assert bindings.floor("adam_step_", n, vocab, dim, step=1, last=True)["bytes"] == floor["bytes"] - 4 * scores
    assert bindings.floor("logit_statistics", n, vocab)["bytes"] == pytest.approx(logits, rel=1e-3)
    assert bindings.floor("gumbel_perturb", n, vocab)["bytes"] == pytest.approx(logits + scores, rel=1e-3)
    assert bindings.floor("relaxed_embedding", 8, vocab, dim)["bytes"] == pytest.approx(table, rel=0.01)


def test_bad_arguments_are_named(bindings):
    with pytest.raises(ValueError, match=r"op must be one of .* got nothing"):
        bindings.plan("nothing", 1, 1)
    with pytest.raises(ValueError, match=r"logits_dtype must be one of .* got float64"):
        bindings.plan("sample_tokens", 1, 1, logits_dtype="float64")
    for wrong in ({"n": -1, "vocab": 1}, {"n": 1, "vocab": 0}, {"n": 1, "vocab": 1, "dim": 0}):
        with pytest.raises(ValueError, match=r"must be >= "):
            bindings.floor("relaxed_embedding", **wrong)


def test_architectures(bindings):
    assert bindings.has_cuda == bool(bindings.compiled_architectures())


def test_bindings_import_without_torch(bindings):
    program = "import importlib.util, sys; s = importlib.util.spec_from_file_location('_bindings', sys.argv[1]); "
    program += "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
    program += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, bindings.__file__], check=False).returncode == 0
