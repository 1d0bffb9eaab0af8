"""The optimisation loop that every stage shares: schedule, autocast, log and checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

_CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Plan:
    """How one stage is optimised. ``lr`` rises over ``warmup`` steps, then falls linearly to 0."""

    steps: int
    lr: float
    batch_size: int = 64
    warmup: int = 30
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    seed: int = 0


def optimise(
    model: nn.Module,
    plan: Plan,
    loss_at: Callable[[int], torch.Tensor],
    stage: Path,
    *,
    bf16: bool = True,
) -> float:
    """Minimise ``loss_at(step)`` over the parameters that require a gradient.

    ``loss_at`` must depend on its step alone (and the weights), so that a run which was stopped
    goes on from ``stage/checkpoint.pt`` as if it had not been. ``bf16`` autocasts the products:
    on CPUs with bf16 instructions a step takes under a third of its fp32 time.

    Returns:
        Seconds of training, summed over all sessions.
    """
    stage.mkdir(parents=True, exist_ok=True)
    checkpoint = stage / "checkpoint.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": plan.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=plan.lr,
        betas=plan.betas,
    )
    done, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["done"], saved["seconds"]

    started, mean = time.monotonic() - seconds, None
    for step in range(done, plan.steps):
        # Dropout is seeded per step too: resuming repeats the same run.
        torch.manual_seed(plan.seed * 1_000_003 + step)
        rise = (step + 1) / plan.warmup
        fall = (plan.steps - step) / max(1, plan.steps - plan.warmup)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, rise, fall)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.97 * mean + 0.03 * loss.item()
        seconds = time.monotonic() - started
        if (step + 1) % 10 == 0:
            print(f"{stage.name} {step + 1}/{plan.steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == plan.steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "done": step + 1,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
    (stage / "plan.json").write_text(json.dumps(asdict(plan) | {"seconds": seconds}, indent=2))
    return seconds
