"""Fixtures that choose which kernel of an operator a test runs on."""

import pytest
import torch


def every_kernel(operator: str):
    """An autouse fixture: a test runs on the plan's kernel and, where that may be Hopper's, on the one for sm_80 too.

    With fp32 embeddings it runs on the two kernels that take them, whatever the rows; chunks have 256 ids.
    """
    ampere, simt, matmul = (f"{operator}_{suffix}" for suffix in ("sm80", "simt", "matmul"))

    @pytest.fixture(autouse=True, params=["planned", ampere, simt, matmul])
    def kernel(request, kernels):
        parameters = request.node.callspec.params
        is_float = parameters.get("embedding_dtype", parameters.get("dtype")) == torch.float32
        if is_float != (request.param in (simt, matmul)):
            pytest.skip("a kernel for the other embeddings")
        if request.param == ampere and parameters["kernels"] == "compute_80":
            pytest.skip("the plan's own kernel")
        overrides = {} if request.param == "planned" else {"kernel": request.param}
        if request.param == matmul:
            overrides["block_n"] = 256
        with kernels.overridden(**overrides):
            yield

    return kernel


def is_matmul(kernels) -> bool:
    """Whether the test runs on a kernel whose products are the caller's: it has chunks, no tiles and no splits."""
    return kernels.overrides.get("kernel", "").endswith("_matmul")
