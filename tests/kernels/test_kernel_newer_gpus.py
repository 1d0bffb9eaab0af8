"""What GPUs newer than Hopper run: the PTX of compute_90, which has clusters but no ``wgmma``. In the simulator, whose
device takes it for want of sm_90a, and through ptxas for sm_100."""

import re
import subprocess

import pytest
import torch

from support.build_simulated import SOURCES, Unavailable, build_bindings, simulator_command
from support.cases import DTYPES
from support.compiled import compile_command
from support.raw_kernels import RawKernels

pytestmark = [pytest.mark.simulator, pytest.mark.slow]  # kernels of another architecture are compiled
TAU, TOP_P = 0.7, 0.95


@pytest.fixture(scope="module")
def newer():
    torch.set_num_threads(1)
    try:
        worker = RawKernels(build_bindings("compute_90"), *simulator_command())
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    yield worker
    worker.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_draw_as_single_blocks_do(newer, dtype):
    torch.manual_seed(0)
    n, vocab = 3, 9_001
    z, keys = (3 * torch.randn(n, vocab)).to(dtype), torch.arange(4 * n).view(n, 4)
    results = {}
    for kernel in ("vocab_pass_sm90", "vocab_pass"):
        with newer.overridden(kernel=kernel):
            results[kernel] = newer.sample_tokens(z, keys, TAU, TOP_P)
    drawn = zip(*(result[3:] for result in results.values()), strict=True)  # argmax, token, its probability ...
    assert all(torch.equal(a, b) for a, b in drawn)
    newer.sample_tokens(z, keys, TAU, TOP_P)
    assert newer.plan["kernel"] == "vocab_pass_sm90"  # what the plan takes


def test_products_are_those_of_ampere(newer, reference):
    torch.manual_seed(0)
    z, e = torch.randn(5, 300).bfloat16(), torch.randn(300, 64).bfloat16()
    lse = (z.float() / TAU).logsumexp(dim=1)
    _, soft = newer.relaxed_embedding(z, lse, e, None, None, TAU)
    assert newer.plan["kernel"] == "relaxed_embedding_sm80"
    torch.testing.assert_close(soft, torch.softmax(z.float() / TAU, dim=1) @ e.float(), rtol=1e-2, atol=1e-2)
    newer.logit_gradient(torch.randn(5, 64).bfloat16(), z, lse, e, soft, None, TAU)
    assert newer.plan["kernel"] == "logit_update_sm80"


def test_a_blackwell_gpu_compiles_it_without_spills(tmp_path):
    source = SOURCES / "kernels" / "vocab_pass" / "vocab_pass_sm90.cu"
    options = ["-gencode=arch=compute_90,code=sm_100", '-DENTRGI_CUDA_ARCHITECTURES="compute_90"']
    command = compile_command(*options, "-c", "-o", str(tmp_path / "vocab_pass.o"), str(source))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stdout)
    assert len(kernels) >= 6
    assert {spilled for _, *each in kernels for spilled in each} == {"0"}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", result.stdout)]
    assert max(registers) <= 64  # four blocks to a multiprocessor
