"""The seeds of a command's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 2**53  # integers beyond are rounded by many readers of JSON


@dataclass(frozen=True)
class Seeds:
    """From which the trajectories' seeds derive, or these themselves."""

    base: int | None
    given: list[list[int]] | None

    @classmethod
    def of(cls, seed: int | None, given: Sequence[str] | None, prompts: int, num_trajectories: int) -> Seeds:
        """From the options; raises ValueError for seeds that are not of 64 bits, or of another number."""
        if seed is not None and given:
            raise ValueError("--trajectory-seeds: expected one of --seed and --trajectory-seeds, got both")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"--seed must be in [-2^63, 2^63), got {seed!r:.60}")
        if not given:
            return cls(seed, None)
        numbers = [_integer(part) for text in given for part in text.split(",")]
        wanted = prompts * num_trajectories
        if len(numbers) != wanted:
            expected = f"expected {num_trajectories} for each of {prompts} prompts, {wanted} in all"
            raise ValueError(f"--trajectory-seeds: {expected}, got {len(numbers)}")
        return cls(None, [numbers[i : i + num_trajectories] for i in range(0, wanted, num_trajectories)])

    def tensor(self, prompts: int, num_trajectories: int) -> Tensor:
        """int64 [prompts, num_trajectories]."""
        import torch

        from entrgi.generation import derive_seeds

        if self.given is not None:
            return torch.tensor(self.given)
        return derive_seeds(self._base, prompts, num_trajectories)

    @property
    def _base(self) -> int:
        assert self.base is not None  # a command draws one before it asks for anything
        return self.base

    def describe(self, index: int | None = None) -> dict[str, Any]:
        """Plain data that JSON's readers keep; of prompt number ``index``, its own seeds where they were given."""
        if self.given is None:
            return {"seed": self._base if abs(self._base) < EXACT else str(self._base)}
        own = {} if index is None else {"trajectory_seeds": list(map(str, self.given[index]))}
        return {"seed": None, **own}


def _integer(text: str) -> int:
    digits = text.strip()
    if digits.lstrip("+-").isdecimal() and len(digits) <= 20 and -(2**63) <= int(digits) < 2**63:
        return int(digits)
    raise ValueError(f"--trajectory-seeds: expected integers of 64 bits, got {text!r:.60}")
