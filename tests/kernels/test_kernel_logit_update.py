"""The logit update's kernels against ``entrgi_ext.reference``: gradient, Adam and SGD.

Each test runs on the kernel that the plan chooses and, where that may be Hopper's, on the one for sm_80 as well; with
fp32 embeddings on both that take them.
Hopper's takes matrices in aligned rows (:func:`aligned`) and logits in fp32 or the embedding's dtype.
"""

import json
import math
import subprocess
import sys

import pytest
import torch

from support.cases import DTYPES, assert_as_good_as, placed
from support.logit_updates import ADAM, TAU, aligned, check_adam, check_gradient, inputs
from support.raw_kernels import NAMES, RawKernels
from support.variants import every_kernel, is_matmul

ROWS = [5, 40, 130]
kernel, possible = every_kernel("logit_update")
pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2, only=possible)]


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_gradient(kernels, reference, logits_dtype, embedding_dtype, n):
    grad, z, *rest = inputs(reference, n, 1001, 200, logits_dtype, embedding_dtype)
    arguments = grad, aligned(z), *rest
    got = kernels.logit_gradient(*arguments, None, TAU)
    check_gradient(reference, got, *arguments)
    assert torch.equal(got, kernels.logit_gradient(*arguments, None, TAU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (1, 64), (31, 3), (33, 129), (257, 31), (515, 7)])
@pytest.mark.parametrize("n", [1, 17, 65])
def test_tails(kernels, reference, dtype, vocab, dim, n):
    arguments = inputs(reference, n, vocab, dim, dtype, dtype)
    got = kernels.logit_gradient(*arguments, None, TAU)
    if vocab == 1:  # q = 1 and E = e_soft: what is left is rounding
        assert got.abs().max() <= 1e-5
    else:
        check_gradient(reference, got, *arguments)


@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.05, 10.0])
def test_temperatures(kernels, reference, embedding_dtype, tau):
    arguments = inputs(reference, 6, 700, 50, torch.bfloat16, embedding_dtype, tau)
    check_gradient(reference, kernels.logit_gradient(*arguments, None, tau), *arguments, tau)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("granule", [16, 8, 4, 2])
def test_alignments(kernels, reference, logits_dtype, embedding_dtype, granule):
    grad, z, lse, embedding, soft = inputs(reference, 6, 328, 72, logits_dtype, embedding_dtype)

    def shifted(tensor):
        step = max(granule // tensor.element_size(), 1)
        return placed(tensor, offset=step, pad=(step - tensor.shape[1]) % step + step)

    got = kernels.logit_gradient(shifted(grad), shifted(z), lse, shifted(embedding), shifted(soft), None, TAU)
    check_gradient(reference, got, grad, z, lse, embedding, soft)
    updated, m, v = shifted(z), shifted(torch.zeros(6, 328)), shifted(torch.zeros(6, 328))
    kernels.adam_step_(
        updated, m, v, shifted(grad), lse, shifted(embedding), shifted(soft), None, TAU, step=2, last=False, **ADAM
    )
    check_adam(reference, updated, m, v, z, torch.zeros(6, 328), torch.zeros(6, 328), got, step=2)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_adam(kernels, reference, logits_dtype, embedding_dtype, n):
    """First step (moments unwritten memory), middle, last (moments left alone), and the only step (none)."""
    grad, z, lse, embedding, soft = inputs(reference, n, 401, 64, logits_dtype, embedding_dtype)
    rest = (grad, lse, embedding, soft, None, TAU)

    def own_gradient(x):
        return kernels.logit_gradient(grad, x, lse, embedding, soft, None, TAU)

    start, zeros = z.clone(), torch.zeros(n, 401)
    z, m, v = aligned(z), aligned(torch.empty(n, 401)), aligned(torch.empty(n, 401))
    gradient = own_gradient(z)
    kernels.adam_step_(z, m, v, *rest, step=1, last=False, new=("exp_avg", "exp_avg_sq"), **ADAM)
    check_adam(reference, z, m, v, start, zeros, zeros, gradient, step=1)
    if n == ROWS[0]:
        for step in (2, 3):
            before = z.clone(), m.clone(), v.clone()
            gradient = own_gradient(z)
            kernels.adam_step_(z, m, v, *rest, step=step, last=step == 3, **ADAM)
            check_adam(reference, z, None if step == 3 else m, v, *before, gradient, step=step)
        assert torch.equal(m, before[1])
        assert torch.equal(v, before[2])
        only = aligned(start)
        gradient = own_gradient(only)
        kernels.adam_step_(only, None, None, *rest, step=1, last=True, **ADAM)
        check_adam(reference, only, None, None, start, zeros, zeros, gradient, step=1)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
def test_sgd(kernels, reference, logits_dtype, embedding_dtype):
    grad, z, lse, embedding, soft = inputs(reference, 7, 401, 64, logits_dtype, embedding_dtype)
    gradient = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    truth = z.double() + 3.0 * gradient.double()
    for updated in (placed(z, 1, 2), aligned(z)):
        kernels.sgd_step_(updated, grad, lse, embedding, soft, None, TAU, lr=3.0)
        assert_as_good_as(updated, (z.float() + 3.0 * gradient).to(logits_dtype), truth, ulps=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_scattered_rows_and_padding(kernels, reference, dtype, n):
    grad, z, lse, embedding, soft = inputs(reference, n, 333, 48, dtype, dtype)
    padding = torch.arange(n) % 3 == 1
    rows = torch.randperm(2 * n)[:n]
    everywhere = torch.full((2 * n, 48), math.nan, dtype=dtype)
    everywhere[rows] = grad
    rows[padding] = -1
    spoiled = [aligned(z), lse.clone(), soft.clone()]
    for x in spoiled:
        x[padding] = math.nan
    z_, lse_, soft_ = spoiled
    got = kernels.logit_gradient(everywhere, z_, lse_, embedding, soft_, rows, TAU)
    assert (got[padding] == 0).all()
    here = ~padding
    check_gradient(reference, got[here], grad[here], z[here], lse[here], embedding, soft[here])

    z_[padding] = 5.0
    m, v = aligned(torch.full((n, 333), -7.0)), aligned(torch.full((n, 333), 7.0))
    before = z_.clone()
    kernels.adam_step_(z_, m, v, everywhere, lse_, embedding, soft_, rows, TAU, step=2, last=False, **ADAM)
    assert (z_[padding] == 5).all()
    assert (m[padding] == -7).all()
    assert (v[padding] == 7).all()
    sevens = torch.full((int(here.sum()), 333), 7.0)
    check_adam(reference, z_[here], m[here], v[here], before[here], -sevens, sevens, got[here], step=2)
    kernels.sgd_step_(z_, everywhere, lse_, embedding, soft_, rows, TAU, lr=1.0)
    assert (z_[padding] == 5).all()
    # A row outside the gradient's is padding too.
    rows[here] = 2 * n
    assert (kernels.logit_gradient(everywhere, aligned(z), lse, embedding, soft, rows, TAU) == 0).all()


@pytest.mark.parametrize("embedding_dtype", DTYPES)
def test_infinities(kernels, reference, embedding_dtype):
    """-inf logits have gradient 0 and stay; a bad row's gradient is NaN, and no other row's is."""
    grad, z, lse, embedding, soft = inputs(reference, 20, 500, 33, torch.float32, embedding_dtype)
    z[:, ::2] = -math.inf
    z[7, 3] = math.nan
    lse = reference.logit_statistics(z, TAU).logsumexp
    got = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    assert torch.isnan(got[7]).all()
    good = torch.arange(20) != 7
    assert (got[good][:, ::2] == 0).all()
    check_gradient(reference, got[good], grad[good], z[good], lse[good], embedding, soft[good])
    m, v = torch.zeros(20, 500), torch.zeros(20, 500)
    kernels.adam_step_(z, m, v, grad, lse, embedding, soft, None, TAU, step=1, last=False, **ADAM)
    assert (z[good][:, ::2] == -math.inf).all()
    assert torch.isfinite(z[good][:, 1::2]).all()


@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.7, 0.05, 3e-3])
def test_saturated_rows_have_no_gradient(kernels, embedding_dtype, tau):
    """All mass on one id, through all three kernels: q is 1 however z / tau is rounded, and the bracket cancels.

    Adam would make a full step of what is left. What may be left is the rounding of two dot products.
    """
    generator = torch.Generator().manual_seed(5)
    n, vocab, dim = 20, 300, 64
    z = torch.randn(n, vocab, generator=generator) * 2
    top = torch.randint(0, vocab, (n,), generator=generator)
    z[torch.arange(n), top] = 40 + 20 * torch.rand(n, generator=generator)
    embedding = torch.randn(vocab, dim, generator=generator).to(embedding_dtype)
    grad = torch.randn(n, dim, generator=generator).to(embedding_dtype)
    with kernels.overridden():
        lse = kernels.logit_statistics(z, tau)[0]
        _, soft = kernels.relaxed_embedding(z, lse, embedding, None, None, tau)
    got = kernels.logit_gradient(grad, z, lse, embedding, soft, None, tau)
    terms = (grad.double().abs() * embedding.double()[top].abs()).sum(dim=1, keepdim=True)
    assert (got.double().abs() <= 2 * torch.finfo(torch.float32).eps * terms / tau).all()


@pytest.mark.parametrize("embedding_dtype", DTYPES)
def test_tiny_gradients_still_move(kernels, reference, embedding_dtype):
    """Adam normalises: a gradient of 1e-7 moves its logit by about lr."""
    grad, z, lse, embedding, soft = inputs(reference, 3, 300, 32, torch.float32, embedding_dtype)
    start = z.clone()
    gradient = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    kernels.adam_step_(z, None, None, grad, lse, embedding, soft, None, TAU, step=1, last=True, **ADAM)
    small = (gradient.abs() > 5e-8) & (gradient.abs() < 1e-6)
    assert small.sum() > 20
    assert ((z - start)[small].abs() > 0.4).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels, dtype):
    z, embedding = torch.empty(0, 9, dtype=dtype), torch.ones(9, 5, dtype=dtype)
    nothing = torch.empty(0, 5, dtype=dtype)
    got = kernels.logit_gradient(nothing, z, torch.empty(0), embedding, torch.empty(0, 5), None, 1.0)
    assert got.shape == (0, 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_32_bit_offsets(kernels, reference, dtype):
    """Row 1 of matrices whose rows are 2^33 elements apart; row 0, which is not there, is padding."""
    grad, z, lse, embedding, soft = inputs(reference, 2, 200, 24, dtype, dtype)
    gradient = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    rows = torch.tensor([-1, 1])
    updated, m, v = z[1:].clone(), torch.zeros(1, 200), torch.zeros(1, 200)
    with kernels.first_row_absent(dict.fromkeys(("logits", "exp_avg", "exp_avg_sq", "soft", "grad"), 2**33)):
        kernels.adam_step_(
            updated, m, v, grad[1:], lse, embedding, soft[1:].contiguous(), rows, TAU, step=2, last=False, **ADAM
        )
    zeros = torch.zeros(1, 200)
    check_adam(reference, updated, m, v, z[1:], zeros, zeros, gradient[1:], step=2)


# Run in the simulator, which provides the bindings with the CUDA runtime that they link.
PRINT_REQUESTS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_bindings", sys.argv[1])
bindings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bindings)
print(json.dumps([bindings.requests(**call) for call in json.loads(sys.argv[2])]))
"""


@pytest.mark.parametrize(
    ("n", "vocab", "dim", "logits_dtype", "dtype"),
    [
        (8, 1024, 256, torch.bfloat16, torch.bfloat16),
        (40, 1001, 200, torch.float32, torch.float16),
        (40, 1001, 200, torch.bfloat16, torch.float16),
        (130, 702, 72, torch.bfloat16, torch.bfloat16),
        (300, 1024, 128, torch.bfloat16, torch.bfloat16),
        (70, 700, 72, torch.float32, torch.float32),
    ],
)
def test_requests_are_what_the_simulator_counts(
    kernels, reference, tmp_path, request, n, vocab, dim, logits_dtype, dtype
):
    if "cudasim-run" not in kernels.command[0]:
        pytest.skip("counted by the simulator")
    simulator, bindings = kernels.command[0], kernels.command[-1]
    worker = RawKernels(bindings, [simulator, "--stats", str(tmp_path / "stats")], kernels.environment)
    worker.overrides = kernels.overrides
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, dim, logits_dtype, dtype)
    z, rest = aligned(z), (grad, lse, embedding, soft, None, TAU)
    arch = 80 if request.node.callspec.params["kernels"] == "compute_80" else 90
    shape = {"n": n, "vocab": vocab, "dim": dim, "logits_dtype": NAMES[logits_dtype], "embedding_dtype": NAMES[dtype]}
    shape |= kernels.overrides | {"arch": arch}
    calls = []
    for step, last in ((1, False), (2, False), (3, True)):
        moments = aligned(torch.zeros(n, vocab)), aligned(torch.zeros(n, vocab))
        worker.adam_step_(z, *moments, *rest, step=step, last=last, **ADAM)
        calls.append(shape | {"op": "adam_step_", "step": step, "last": last})
    worker.sgd_step_(z, *rest, lr=1.0)
    calls.append(shape | {"op": "sgd_step_"})
    worker.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    calls.append(shape | {"op": "logit_gradient"})
    worker.close()

    command = [simulator, sys.executable, "-c", PRINT_REQUESTS, bindings, json.dumps(calls)]
    result = subprocess.run(command, env=kernels.environment, capture_output=True, text=True, check=True)
    launches = [json.loads(line) for line in (tmp_path / "stats").read_text().splitlines()]
    # The product's own, where it is the caller's and not in the simulator.
    theirs = ((n + vocab) * dim * 4, n * vocab * 4) if is_matmul(kernels) else (0, 0)
    each = len(launches) // len(calls)
    for number, requests in enumerate(json.loads(result.stdout)):
        own = launches[each * number : each * (number + 1)]  # the inner products, then the update, chunk by chunk

        def counted(*names, own=own):
            return sum(launch[name] for launch in own for name in names)

        loads, stores = counted("global_load_bytes", "cp_async_bytes"), counted("global_store_bytes")
        assert requests["load_bytes"] == pytest.approx(loads + theirs[0], rel=0.02)
        assert requests["bulk_bytes"] == pytest.approx(counted("tma_load_bytes"), rel=0.02)
        assert requests["store_bytes"] == pytest.approx(stores + theirs[1], rel=0.02)
        if dtype != torch.float32:  # the ordinary cores compute q as well
            assert requests["flops"] == pytest.approx(counted("mma_flop", "wgmma_flop"), rel=0.02)
