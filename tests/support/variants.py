"""Which kernel of an operator a test runs on."""

import pytest
import torch


def every_kernel(operator: str):
    """(fixture, possible): a test runs on the plan's kernel and, where that may be Hopper's, on the one for sm_80 too.

    With fp32 embeddings it runs on the two kernels that take them, whatever the rows; chunks have 256 ids.
    ``possible`` is the condition of the tests' grid.
    """
    ampere, simt, matmul = (f"{operator}_{suffix}" for suffix in ("sm80", "simt", "matmul"))

    @pytest.fixture(autouse=True, params=["planned", ampere, simt, matmul])
    def kernel(request, kernels):
        overrides = {} if request.param == "planned" else {"kernel": request.param}
        if request.param == matmul:
            overrides["block_n"] = 256
        with kernels.overridden(**overrides):
            yield

    def possible(parameters: dict) -> bool:
        is_float = parameters.get("embedding_dtype", parameters.get("dtype")) == torch.float32
        is_same = parameters["kernel"] == ampere and parameters["kernels"] == "compute_80"  # as the plan's own
        return is_float == (parameters["kernel"] in (simt, matmul)) and not is_same

    return kernel, possible


def is_matmul(kernels) -> bool:
    """Whether the test runs on a kernel whose products are the caller's: it has chunks, no tiles and no splits."""
    return kernels.overrides.get("kernel", "").endswith("_matmul")
