"""Everything that is measured, by operator and name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrgi.matmul import onednn_matmul

from . import ours
from .baselines import (
    adam_by,
    autograd_iteration,
    compiled,
    composed_commit,
    composed_embedding,
    composed_greedy,
    composed_iteration,
    composed_noise,
    composed_sample,
    composed_statistics,
    embedding_by,
    flashinfer_sample,
    gradient_by,
    of_logits,
    published_commit,
    published_embedding,
    published_greedy,
    published_noise,
    published_sample,
    published_statistics,
    race_sample,
    sgd_by,
    two_pass_adam,
    two_pass_embedding,
    two_pass_gradient,
)
from .cases import Inputs
from .ours import Call


@dataclass(frozen=True)
class Implementation:
    """One way to do an operator's work.

    Attributes:
        build: (inputs, index of their set) -> a call; the call returns its results by name.
        captured: whether a CUDA graph can hold it: not where PyTorch waits for the host.
        compiled: whether the first call compiles.
        needs: a module, or "cuda".
    """

    build: Callable[[Inputs, int], Call]
    captured: bool = True
    compiled: bool = False
    needs: str | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here."""
        if self.needs == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed"
        return "needs CUDA" if self.needs is not None and device.type != "cuda" else None


def _fast(build: Callable[[Inputs, int], Call]) -> Callable[[Inputs, int], Call]:
    """With the library for fp32 products on the CPU that the sampler of this package chooses."""

    def wrapped(x: Inputs, s: int) -> Call:
        call = build(x, s)
        if x.device.type != "cpu":
            return call

        def run() -> dict[str, Tensor]:
            with onednn_matmul(x.device):
                return call()

        return run

    return wrapped


def _compiled(function: Callable[[Tensor], dict[str, Tensor]]) -> Implementation:
    return Implementation(of_logits(lambda z: compiled(function)(z)), compiled=True)


PUBLISHED, COMPILED, COMPOSED, TWO_PASS, OURS = "published", "compiled", "composed", "two-pass", "entrgi"


def registry() -> dict[str, dict[str, Implementation]]:
    """Operator -> name -> implementation; this package's own is the first."""

    def group(published: Callable, composed: Callable, compiled_: Implementation, captured: bool = True) -> dict:
        return {
            PUBLISHED: Implementation(published, captured=captured),
            COMPILED: compiled_,
            COMPOSED: Implementation(_fast(composed)),
        }

    def by_compile(build: Callable) -> Implementation:
        return Implementation(build, compiled=True)

    def adam(two_pass: Callable, *step: int) -> dict:
        return {
            **group(adam_by("eager", *step), adam_by("manual", *step), by_compile(adam_by("compiled", *step))),
            TWO_PASS: Implementation(_fast(two_pass), compiled=True),
        }

    others = {
        "logit_statistics": group(
            of_logits(published_statistics), of_logits(composed_statistics), _compiled(published_statistics)
        ),
        "sample_tokens": {
            **group(of_logits(published_sample), of_logits(composed_sample), _compiled(race_sample), captured=False),
            "flashinfer": Implementation(of_logits(flashinfer_sample), captured=False, needs="flashinfer"),
        },
        "greedy": group(of_logits(published_greedy), of_logits(composed_greedy), _compiled(published_greedy)),
        "relaxed_embedding": {
            **group(
                embedding_by(published_embedding),
                composed_embedding,
                by_compile(embedding_by(published_embedding, compile=True)),
            ),
            TWO_PASS: Implementation(_fast(two_pass_embedding), compiled=True),
        },
        "logit_gradient": {
            **group(gradient_by("eager"), gradient_by("manual"), by_compile(gradient_by("compiled"))),
            TWO_PASS: Implementation(_fast(two_pass_gradient), compiled=True),
        },
        "adam_step_first": adam(two_pass_adam(step=1), 1),
        "adam_step_middle": adam(two_pass_adam()),
        "adam_step_last": adam(two_pass_adam(last=True)),
        "sgd_step": group(sgd_by("eager"), sgd_by("manual"), by_compile(sgd_by("compiled"))),
        "gumbel_perturb": group(of_logits(published_noise), of_logits(composed_noise), _compiled(published_noise)),
        "commit": {
            PUBLISHED: Implementation(published_commit),
            COMPOSED: Implementation(composed_commit),
        },
        "adam_iteration": group(
            autograd_iteration("eager"), composed_iteration, by_compile(autograd_iteration("compiled")), captured=False
        ),
    }
    return {name: {OURS: Implementation(_fast(ours.CALLS[name])), **others[name]} for name in ours.CALLS}
