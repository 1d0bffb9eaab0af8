"""Fixtures that choose which kernel of an operator a test runs on."""

import pytest
import torch


def planned_and(ampere: str):
    """An autouse fixture: each test runs on the plan's kernel and, where that may be Hopper's, on ``ampere`` too."""

    @pytest.fixture(autouse=True, params=["planned", ampere])
    def kernel(request, kernels):
        parameters = request.node.callspec.params
        overrides = {}
        if request.param == ampere:
            dtype = parameters.get("embedding_dtype", parameters.get("dtype"))
            if parameters["kernels"] == "compute_80" or dtype == torch.float32:
                pytest.skip("the plan's own kernel")
            overrides = {"kernel": ampere}
        with kernels.overridden(**overrides):
            yield

    return kernel
