"""Every implementation is right before it is timed: results against fp64, on a few rows.

Bounds are relative L2 errors. This package's own are tight: those of its tests for the gradient (5e-3 for 16-bit
operands, 1e-5 for fp32), and rounding of the result's dtype elsewhere. The others need only be the same computation:
PyTorch rounds probabilities, products and moments to the operands' dtype, which costs a 16-bit gradient up to a
quarter of itself. Each error is a column of the results.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entrgi_ext import reference

from .cases import BETAS, EPS, STEP, TEMPERATURE, TOP_P, Inputs
from .registry import OURS

ROWS = 4  # checked of each case
EULER, GUMBEL_DEVIATION = 0.57721566, math.pi / math.sqrt(6)
STATISTICS = ("logsumexp", "entropy", "tempered_entropy")


class WrongResult(AssertionError):
    """An implementation computes something else: nothing is timed."""


class Truth:
    """fp64 results of a case's first set, on so many of its rows."""

    def __init__(self, x: Inputs, rows: int = ROWS):
        self.x, self.case = x, x.case
        self.rows = torch.linspace(0, x.case.N - 1, min(rows, x.case.N)).round().long().to(x.device)
        if not x.case.what.has_vocabulary:
            return
        self.z = x.logits[0][self.rows].double()
        self.statistics = reference.logit_statistics(self.z, TEMPERATURE)
        self.q = (self.z / TEMPERATURE - self.statistics.logsumexp[:, None]).exp()
        if x.case.d:
            g, products, self.soft = x.grad[self.rows].double(), [], 0.0
            for ids in x.chunks():
                e = x.embedding[ids].double()
                self.soft = self.soft + self.q[:, ids] @ e
                products.append(g @ e.T)
            inner = torch.cat(products, dim=1) - (g * self.soft).sum(dim=1, keepdim=True)
            self.gradient = self.q * inner / TEMPERATURE

    def adam(self) -> dict[str, Tensor]:
        step = 1 if self.case.operator == "adam_step_first" else STEP
        m, v = (moment[self.rows].double() for moment in self.x.moments(torch.float32))
        arguments = (self.gradient, self.x.lr, *BETAS, EPS, step)
        z, m, _ = reference.adam_step(self.z, m, v, *arguments)
        # The first step is the sign of the gradient: it has the moment's error or none.
        result = {"exp_avg": m, "negative_exp_avg": -m}
        return result if step == 1 else {**result, "logits": z - self.z}

    def expected(self) -> dict[str, Tensor]:
        """By name of the result; ``logits`` is their change."""
        operator, statistics = self.case.operator, self.statistics._asdict()
        if operator in ("logit_statistics", "sample_tokens", "greedy"):
            return statistics
        if operator == "relaxed_embedding":
            hard = self.x.embedding[self.x.tokens[self.rows]].double()
            weight = self.x.weight[self.rows, None].double()
            return {"soft": self.soft, "output": self.soft + weight * (hard - self.soft)}
        if operator == "logit_gradient":
            return {"gradient": self.gradient}
        if operator == "sgd_step":
            return {"logits": self.x.lr * self.gradient}
        result = self.adam()
        if operator == "adam_iteration":
            result |= {"soft": self.soft, "entropy": self.statistics.entropy}
        return result

    def check(self, name: str, results: dict[str, Tensor]) -> float | None:
        """The largest relative error of an implementation's results.

        Raises:
            WrongResult: beyond the bound.
        """
        if self.case.operator == "commit":
            self._commit(name, results["tokens"])
            return 0.0
        if self.case.operator == "gumbel_perturb":
            return self._noise(name, results["perturbed"])
        worst: float | None = None
        for key, expected in self.expected().items():
            if key not in results:
                continue
            got = results[key][self.rows].double()
            if key == "argmax":
                self._require(bool((self.z.gather(1, got.long()[:, None])[:, 0] == self.z.amax(1)).all()), name, key)
                continue
            difference = (got - expected).abs()
            if key == "logits":  # beyond what rounding them to their dtype costs, relative to their change
                new = self.z + expected
                rounding = torch.finfo(self.x.logits_dtype).eps * new.abs()
                difference = ((got - new).abs() - rounding).clamp_min(0.0)
            error = (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)).item()
            self._require(error <= self.bound(name == OURS, key), name, f"{key} has a relative error of {error:.2g}")
            worst = max(worst or 0.0, error)
        if "token" in results:
            self._token(name, results["token"][self.rows])
        return worst

    def bound(self, is_ours: bool, key: str) -> float:
        half_table = self.x.embedding_dtype != torch.float32
        if not is_ours:
            return 0.5 if half_table or self.x.logits_dtype != torch.float32 else 2e-3
        if key in STATISTICS:
            return 1e-5
        if key in ("soft", "output"):
            return 1e-2 if half_table else 1e-5
        return 5e-3 if half_table else 1e-5

    def _token(self, name: str, token: Tensor) -> None:
        ranked = self.z[torch.arange(len(token), device=token.device), token.long()]
        if self.case.operator == "greedy":
            self._require(bool((ranked == self.z.amax(dim=1)).all()), name, "a greedy token is not the largest")
            return
        # A 16-bit sort or sum puts the boundary elsewhere: whoever sums that way may be wrong by the ids around it.
        ahead = (self.q * (self.z > ranked[:, None])).sum(dim=1)
        slack = 1e-5 if name == OURS else 0.05
        self._require(bool((ahead <= TOP_P + slack).all()), name, "a token is not in the nucleus")

    def _noise(self, name: str, perturbed: Tensor) -> float:
        got = perturbed[self.rows].double()
        if name == OURS:
            expected = reference.gumbel_perturb(self.z, self.x.keys[self.rows], TEMPERATURE)
            error = ((got - expected).abs().amax() / expected.abs().amax()).item()
            self._require(error <= 1e-5, name, f"the noise is off by {error:.2g}")
            return error
        noise = (got - self.z) / TEMPERATURE
        mean = (noise.mean() - EULER).abs() / GUMBEL_DEVIATION * math.sqrt(noise.numel())
        self._require(mean.item() < 6, name, "the noise is not Gumbel noise")
        return (noise.std() / GUMBEL_DEVIATION - 1).abs().item()

    def _commit(self, name: str, tokens: Tensor) -> None:
        a = {key: value.cpu() for key, value in self.x.commit.items()}
        expected, _ = reference.commit(
            *(a[k] for k in ("tokens", "candidates", "confidence", "positions", "splits", "counts")), None, None, 0.0
        )
        self._require(torch.equal(tokens.cpu(), expected), name, "other tokens are committed")

    def _require(self, condition: bool, name: str, complaint: str) -> None:
        if not condition:
            raise WrongResult(f"{self.case}: {name}: {complaint}")
