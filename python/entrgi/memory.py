"""How much memory a generation needs at the very least, how much there is, and how many prompts go together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from entrgi.config import SamplerConfig

if TYPE_CHECKING:
    import torch

PER_POSITION = 25  # tokens twice (a step's report is a copy), entropy, weight, committed
PER_STEP = 44  # the schedule's ratios as Python's floats, an error flag
PER_SEED = 40  # as Python's integers, and in a tensor
MOMENTS = 8  # Adam's two in fp32, kept from one optimiser step to the next
ENOUGH_ROWS = 2048  # more rows of logits at once are no faster, and finished prompts would wait for others
ENOUGH_TOKENS = 32_768  # likewise for the tokens of a pass
SHARE = 0.25  # of what is free: the models' own passes need their part


def at_least(config: SamplerConfig, prompts: int, vocab: int = 1, logit_bytes: int = 2) -> int:
    """Bytes that a generation cannot do without, the models and their passes left out.

    Args:
        prompts: how many.
        vocab: V, width of the logits.
        logit_bytes: of one logit.
    """
    trajectories = prompts * config.num_trajectories
    positions = trajectories * config.max_new_tokens
    moments = MOMENTS if config.optimizer == "adam" and config.guidance_steps > 1 else 0
    guided = config.guidance != "none"
    rows = positions if guided else trajectories * min(config.max_new_tokens, config.block_length or 2**63)
    rows = config.padded(rows if config.max_rows is None else min(rows, config.max_rows))
    weights = 4 * config.guidance_steps if guided else 0
    per_row = vocab * (logit_bytes + (moments if guided else 0)) + weights
    return PER_SEED * trajectories + PER_POSITION * positions + PER_STEP * config.steps + rows * per_row


def check(
    config: SamplerConfig,
    prompts: int,
    vocab: int = 1,
    logit_bytes: int = 2,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError, with the bytes, where a generation needs more than ``device`` has; None is the host."""
    needed, free = at_least(config, prompts, vocab, logit_bytes), available(device)
    if free is None or needed <= free:
        return
    names = ["num_return_sequences" if config.best_of is None else "best_of", "max_new_tokens", "steps"]
    names += ["guidance_steps"] if config.guidance_steps > 1000 else []
    names += [name for name in ("max_rows", "row_bucket") if getattr(config, name) is not None]
    shown = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    raise ValueError(
        f"{shown}: {prompts} prompt{'' if prompts == 1 else 's'} would need at least {size(needed)} of memory, "
        f"{size(free)} are free; expected less"
    )


def prompts_at_once(
    config: SamplerConfig, length: int, vocab: int, logit_bytes: int, device: torch.device | None
) -> int:
    """How many prompts to generate for together: as many as fill the machine and fit its memory.

    Args:
        length: of a sequence in tokens, prompt and response.
    """
    rows = max(config.num_trajectories * config.max_new_tokens, 1)
    count = max(min(ENOUGH_ROWS // rows, ENOUGH_TOKENS // (config.num_trajectories * max(length, 1))), 1)
    free = available(device)
    while free is not None and count > 1 and at_least(config, count, vocab, logit_bytes) > SHARE * free:
        count //= 2
    return count


def available(device: torch.device | None = None) -> int | None:
    """Free bytes of a device, the host without one; None where nobody knows."""
    if device is not None and device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device is not None and device.type != "cpu":
        return None
    known = [value for value in (_host(), _group()) if value is not None]
    return min(known, default=None)


def _host(file: Path = Path("/proc/meminfo")) -> int | None:
    """Swap counts: who has it may use it."""
    known = _numbers(file)
    if "MemAvailable:" in known:
        return 1024 * (known["MemAvailable:"] + known.get("SwapFree:", 0))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take; cached files make way."""
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return None
    known = _numbers(folder / "memory.stat")
    cached = known.get("active_file", 0) + known.get("inactive_file", 0)
    return max(limit - used + cached, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The lines of a file of the kernel's: a name and a number."""
    try:
        rows = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def size(count: int) -> str:
    """Bytes for people: ``3.2 TB``."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
