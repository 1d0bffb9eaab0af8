"""The CPU kernels are compiled for several instruction sets; ENTRGI_CPU_ISA picks a lower one than the machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.calls import OPERATORS, WRITTEN, arguments, backward_arguments, call
from support.helpers import LOGIT_DTYPES

TESTS = Path(__file__).parents[1]


def everything() -> dict[str, torch.Tensor]:
    """What every operator returns or writes, for every dtype, at a size with odd tails."""
    results = {}
    for dtype in LOGIT_DTYPES:
        for name in OPERATORS:
            keywords = arguments(name, "cpu", dtype, n=4, v=4500 + 37, d=41)
            result = call(name, keywords)
            outputs = () if result is None else result if isinstance(result, tuple) else (result,)
            for i, tensor in enumerate((*outputs, *(keywords[key] for key in WRITTEN.get(name, [])))):
                results[f"{name} {dtype} {i}"] = tensor
        results[f"backward {dtype}"] = torch.ops.entrgi.logit_statistics_backward(*backward_arguments("cpu", dtype))
    return results


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_equal_on_every_instruction_set(tmp_path, isa):
    path = tmp_path / "results.pt"
    program = f"""
import sys
import torch
sys.path.append({str(TESTS)!r})  # last: an installed entrgi_ext stays the one that is tested
from ops.test_instruction_sets import everything
torch.save(everything(), {str(path)!r})
"""
    environment = {**os.environ, "ENTRGI_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=tmp_path, timeout=300)
    other = torch.load(path)
    for key, expected in everything().items():
        if not expected.is_floating_point():
            assert torch.equal(other[key], expected), key
            continue
        tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}.get(expected.dtype, 0.02)
        scale = float(expected.nan_to_num().abs().max())
        torch.testing.assert_close(
            other[key],
            expected,
            rtol=tolerance,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda m, k=key: f"{k}: {m}",
        )
