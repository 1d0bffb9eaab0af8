"""Inputs of the relaxed embedding's kernels, what their results are compared with, and what a launch costs."""

import json
import subprocess
import sys

import pytest
import torch

from support.cases import placed, relative_l2
from support.raw_kernels import RawKernels

TAU = 0.7


def aligned(matrix):
    """The same with rows on 16-byte boundaries, NaN between them: what Hopper's kernel needs."""
    step = 16 // matrix.element_size()
    return placed(matrix, 0, -matrix.shape[1] % step)


def inputs(reference, n, vocab, dim, logits_dtype, embedding_dtype, scale=3.0):
    generator = torch.Generator().manual_seed(n + vocab + dim)
    z = aligned((torch.randn(n, vocab, generator=generator) * scale).to(logits_dtype))
    embedding = aligned(torch.randn(vocab, dim, generator=generator).to(embedding_dtype))
    lse = reference.logit_statistics(z, TAU).logsumexp
    hard = torch.randint(0, vocab, (n,), generator=generator)
    weight = torch.rand(n, generator=generator)
    return z, lse, embedding, hard, weight


def check(reference, output, soft, z, lse, embedding, hard, weight):
    arguments = z.double(), lse.double(), embedding.double(), hard, None if weight is None else weight.double(), TAU
    truth, truth_soft = reference.relaxed_embedding(*arguments)
    torchs, torchs_soft = reference.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    # fp32: both err by rounding z / tau - lse; which of them is luckier is chance.
    floor = 1e-6 if embedding.dtype == torch.float32 else 1e-4
    assert relative_l2(soft, truth_soft) <= 2 * relative_l2(torchs_soft, truth_soft) + floor
    assert torch.equal(torch.isnan(output), torch.isnan(truth))
    valid = ~torch.isnan(truth)
    assert relative_l2(output[valid], truth[valid]) <= 2 * relative_l2(torchs[valid], truth[valid]) + floor


ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_bindings", sys.argv[1])
bindings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bindings)
ask = getattr(bindings, sys.argv[2])
print(json.dumps([ask("relaxed_embedding", **options) for options in json.loads(sys.argv[3])]))
"""


def ask(kernels, what, *options):
    """``plan`` or ``requests`` of the bindings that are tested, for each of the options."""
    command = [kernels.command[0], sys.executable, "-c", ASK, kernels.command[-1], what, json.dumps(options)]
    result = subprocess.run(command, env=kernels.environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def launches(kernels, folder, *arguments, **options):
    """The simulator's statistics of each launch of a call: the product, then the reduction."""
    simulator, bindings = kernels.command[0], kernels.command[-1]
    if "cudasim-run" not in simulator:
        pytest.skip("counted by the simulator")
    worker = RawKernels(bindings, [simulator, "--stats", str(folder / "stats")], kernels.environment)
    worker.overrides = kernels.overrides
    worker.relaxed_embedding(*arguments, **options)
    worker.close()
    return [json.loads(line) for line in (folder / "stats").read_text().splitlines()]


def count(*arguments, **options):
    """Bytes and FLOPs of a call, summed over its launches."""
    each = launches(*arguments, **options)
    return {name: sum(one[name] for one in each) for name in each[0] if name.endswith(("bytes", "flop"))}
