"""Everything that is settled before the first denoising step: checks, seeds, layouts and the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from entrgi.config import SamplerConfig
from entrgi.denoisers import Denoiser
from entrgi.prompts import Encoded, Prompt
from entrgi.rewards import Reward
from entrgi.schedule import Step, plan
from entrgi.sequences import Layout, RewardSequences, Sequences, build_reward_sequences, build_sequences
from entrgi.vocabulary import align_embedding, undecodable


@dataclass(frozen=True)
class Task:
    """A generation that has passed all checks. Only ``sequences.tokens`` and ``error_flags`` change.

    Attributes:
        prompts, encoded, layouts: B of each.
        seeds: int64 [B, K].
        sequences, reward_sequences: P = B * K trajectories, prompt by prompt.
        embedding: [V, d], the reward's embedding by the denoiser's ids.
        forbidden: bool [V], ids that are never drawn.
        steps: the steps that commit something.
        error_flags: int32 [T], one per denoising step, so that reading them once at the end names the step.
    """

    denoiser: Denoiser
    reward: Reward
    config: SamplerConfig
    prompts: list[Prompt]
    encoded: list[Encoded]
    layouts: list[Layout]
    seeds: Tensor
    sequences: Sequences
    reward_sequences: RewardSequences
    embedding: Tensor
    forbidden: Tensor
    steps: list[Step]
    error_flags: Tensor

    def reads_whole_text(self, prompt: int) -> bool:
        """Whether the reward scores prompt and response as one text."""
        return self.reward.reads_prompt and self.encoded[prompt].is_text

    def decode(self) -> tuple[list[list[str]], list[list[str]]]:
        """Texts to score and responses alone, [B][K] each, up to the first end-of-sequence token."""
        rows = self.sequences.tokens.view(*self.seeds.shape, -1).tolist()
        eos, decode = self.denoiser.eos_token_id, self.denoiser.tokenizer.decode
        texts, responses = [], []
        for b, layout in enumerate(self.layouts):
            texts.append([])
            responses.append([])
            for row in rows[b]:
                window = row[layout.start : layout.stop]
                window = window[: window.index(eos)] if eos in window else window
                before = row[layout.text_start : layout.start] if self.reads_whole_text(b) else []
                texts[b].append(decode(before + window, skip_special_tokens=True))
                responses[b].append(decode(window, skip_special_tokens=True))
        return texts, responses

    def raise_on_error(self) -> None:
        """Waits for the device. Raises RuntimeError naming the first step whose error flag is set."""
        flags = self.error_flags.tolist()
        step = next((j for j, flag in enumerate(flags) if flag), None)
        if step is None:
            return
        reasons = {
            1: "logits with NaN, +inf or nothing finite",
            2: "a position where every finite id is forbidden",
        }
        reason = " and ".join(text for bit, text in reasons.items() if flags[step] & bit)
        raise RuntimeError(f"denoising step {step} of {self.config.steps}: {reason}")


def prepare(
    prompts: Prompt | Sequence[Prompt],
    denoiser: Denoiser,
    reward: Reward,
    config: SamplerConfig,
    *,
    seed: int | None,
    generator: torch.Generator | None,
    trajectory_seeds: Tensor | None,
    forbidden_ids: Sequence[int],
) -> Task:
    """Check and lay out a generation; arguments and ValueErrors are those of :func:`entrgi.generate`."""
    prompts = _as_list(prompts)
    copies = config.num_return_sequences
    if trajectory_seeds is None:
        seeds = derive_seeds(_base_seed(seed, generator), len(prompts), copies)
    elif seed is None and generator is None:
        seeds = _check_seeds(trajectory_seeds, len(prompts), copies)
    else:
        raise ValueError("trajectory_seeds: pass one of seed, generator and trajectory_seeds")
    embedding = align_embedding(
        reward.weight, reward.tokenizer, denoiser.tokenizer, denoiser.vocab_size, reward.missing
    )
    _check_models(denoiser, embedding, config)
    # Drawn in a hole, an end of sequence would cut off the user's own text behind it.
    ends = (denoiser.eos_token_id,) if config.infill and denoiser.eos_token_id is not None else ()
    forbidden = _forbidden(denoiser, (*forbidden_ids, *ends))

    encoded = [denoiser.encode(prompt) for prompt in prompts]
    sequences, layouts, masked = build_sequences(
        encoded,
        seeds,
        max_new_tokens=config.max_new_tokens,
        mask_token_id=denoiser.mask_token_id,
        pad_token_id=denoiser.pad_token_id,
        infill=config.infill,
        max_length=denoiser.max_length,
        device=denoiser.device,
    )
    frames = []
    for index, (prompt, ids, layout) in enumerate(zip(prompts, encoded, layouts, strict=True)):
        if denoiser.mask_token_id in ids.body and not (ids.is_text and reward.reads_prompt):
            raise ValueError(
                f"prompts[{index}] is to be infilled, which needs a plain-text prompt and a reward that "
                "reads the whole text (no chat template, include_prompt=True)"
            )
        before = ids.body[: layout.start - layout.text_start] if ids.is_text else []
        frames.append(reward.frame(prompt, before))
    return Task(
        denoiser=denoiser,
        reward=reward,
        config=config,
        prompts=prompts,
        encoded=encoded,
        layouts=layouts,
        seeds=seeds,
        sequences=sequences,
        reward_sequences=build_reward_sequences(frames, layouts, copies, reward.weight, reward.max_length),
        embedding=embedding,
        forbidden=forbidden,
        steps=plan(masked, config.steps, denoiser.device),
        error_flags=torch.zeros(config.steps, dtype=torch.int32, device=denoiser.device),
    )


def derive_seeds(base: int, prompts: int, copies: int) -> Tensor:
    """Trajectory seeds, int64 [prompts, copies]; each depends on ``base`` and its two indices alone."""
    rows = [[_mix(_mix(_mix(base) + b) + k) for k in range(copies)] for b in range(prompts)]
    return torch.tensor([[x - 2**64 if x >= 2**63 else x for x in row] for row in rows], dtype=torch.long)


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): nearby integers become unrelated ones."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _base_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: pass one of seed, generator and trajectory_seeds")
        if not isinstance(seed, Integral) or isinstance(seed, bool):  # numpy's integers, too
            raise ValueError(f"seed must be an integer, got {seed!r}")
        return int(seed)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device))


def _check_seeds(seeds: Tensor, prompts: int, copies: int) -> Tensor:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.long or tuple(seeds.shape) != (prompts, copies):
        got = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else repr(seeds)
        raise ValueError(f"trajectory_seeds must be int64 [{prompts}, {copies}] (prompts, copies), got {got}")
    return seeds.cpu()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts: expected text, a list of messages, or a list of either, got {prompts!r:.80}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    return [prompts] if all(isinstance(item, dict) for item in prompts) else prompts


def _check_models(denoiser: Denoiser, embedding: Tensor, config: SamplerConfig) -> None:
    if embedding.device != denoiser.device:
        raise ValueError(
            f"reward: its model is on {embedding.device}, expected the denoiser's device {denoiser.device}"
        )
    dtype = config.logits_dtype or denoiser.dtype
    if (dtype == torch.float64) != (embedding.dtype == torch.float64):
        raise ValueError(
            f"logits_dtype is {dtype} and the reward's embedding {embedding.dtype}, "
            "expected float64 for both or neither"
        )


def _forbidden(denoiser: Denoiser, forbidden_ids: Sequence[int]) -> Tensor:
    forbidden = undecodable(denoiser.tokenizer, denoiser.vocab_size)
    for token_id in (denoiser.mask_token_id, *forbidden_ids):
        if not 0 <= token_id < denoiser.vocab_size:
            raise ValueError(f"forbidden_ids: {token_id} is not an id below {denoiser.vocab_size}")
        forbidden[token_id] = True
    if forbidden.all():
        raise ValueError("forbidden_ids: every id is forbidden, expected at least one to draw")
    return forbidden.to(denoiser.device)
