"""Is a result right? Every row against fp64, by the benchmark's own references and bounds."""

from __future__ import annotations

import torch
from operator_bench.cases import TEMPERATURE, TOP_P, Inputs
from operator_bench.correctness import Truth, WrongResult, reference
from operator_bench.registry import OURS
from torch import Tensor

# A row alone may err by so many times the bound on all rows together: the tight bounds of fp32 leave out what a row of
# little but cancellation loses. Rows of less than a tenth of the usual size are judged as if they had that.
WORST_ROW, WORST_ROW_OF_TIGHT, SMALL_ROW = 4.0, 50.0, 0.1
TIGHT = 1e-4
OTHER_TOKENS = 0.02  # share of rows, or one row, that may draw another token: what is equal but for rounding


def judge(x: Inputs, results: dict[str, Tensor]) -> dict:
    """{"status", "errors" by result: over all rows and in the worst one; "why" where it is wrong}."""
    truth, errors = Truth(x, rows=x.case.N), {}
    if x.case.operator in ("commit", "gumbel_perturb"):
        try:
            errors["all"] = truth.check(OURS, results)
        except WrongResult as wrong:
            return {"status": "wrong", "why": str(wrong), "errors": errors}
        return {"status": "right", "errors": errors}
    complaints = []
    for name, expected in truth.expected().items():
        if name not in results:
            continue
        got = results[name].double()
        if name == "argmax":
            if not torch.equal(got.long(), _first_maximum(truth.z)):
                complaints.append("argmax is not the first maximum")
            continue
        difference = (got - expected).abs()
        if name == "logits":  # beyond what rounding them to their dtype costs, relative to their change
            new = truth.z + expected
            difference = ((got - new).abs() - torch.finfo(x.logits_dtype).eps * new.abs()).clamp_min(0.0)
        errors[name] = _ratio(difference, expected)
        errors[f"{name}, worst row"] = worst = _worst_row(difference, expected)
        bound = truth.bound(True, name)
        most = bound * (WORST_ROW_OF_TIGHT if bound < TIGHT and expected.dim() == 2 else WORST_ROW)
        if not (errors[name] <= bound and worst <= most):  # NaN is not within a bound
            complaints.append(f"{name} is off by {errors[name]:.2g}, in a row by {worst:.2g}; bound {bound:.2g}")
    if "token" in results:
        complaints += _tokens(x, truth, results["token"], errors)
    return {"status": "wrong" if complaints else "right", "why": "; ".join(complaints), "errors": errors}


def _first_maximum(z: Tensor) -> Tensor:
    """PyTorch's own argmax promises no order among equals on CUDA."""
    ids = torch.arange(z.shape[1], device=z.device)
    return ids.where(z == z.amax(dim=1, keepdim=True), z.shape[1]).amin(dim=1)


def _ratio(difference: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)).item()


def _worst_row(difference: Tensor, expected: Tensor) -> float:
    if difference.dim() == 1:  # numbers of similar size, one a row
        return (difference.max() / expected.abs().mean()).item()
    size = torch.linalg.vector_norm(expected, dim=1)
    usual = size.square().mean().sqrt()
    rows = torch.linalg.vector_norm(difference, dim=1) / size.clamp_min(SMALL_ROW * usual)
    return rows.nan_to_num(nan=torch.inf).max().item()


def _tokens(x: Inputs, truth: Truth, tokens: Tensor, errors: dict) -> list[str]:
    if not bool(((tokens >= 0) & (tokens < x.case.V)).all()):
        return ["a token is no id"]
    try:
        truth._token(OURS, tokens)
    except WrongResult as wrong:
        return [str(wrong)]
    expected = reference.sample_tokens(truth.z, x.keys, TEMPERATURE, TOP_P).token
    errors["other tokens"] = other = int((tokens != expected).sum())
    most = max(1, int(OTHER_TOKENS * x.case.N))
    return [f"{other} of {x.case.N} tokens are not the reference's"] if other > most else []
