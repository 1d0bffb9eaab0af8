"""Everything that is settled before the first denoising step: checks, seeds, layouts and the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from entrgi import memory
from entrgi.config import SamplerConfig
from entrgi.denoisers import Denoiser
from entrgi.denoisers.ends import end_ids
from entrgi.graphs import GuidanceGraphs
from entrgi.guidance import REWARD_NOT_FINITE
from entrgi.messages import Prompt, as_prompt, begun_turn
from entrgi.prompts import Completion, with_spelled_masks
from entrgi.rewards import BoundReward, Reward
from entrgi.rewards.none import NoReward
from entrgi.rewards.protocol import check_bound
from entrgi.schedule import Step, plan
from entrgi.sequences import Layout, Sequences, build_sequences
from entrgi.tokenizing import decode_ids, plain_ids
from entrgi.vocabulary import undecodable


@dataclass(frozen=True)
class Generation:
    """A generation that has passed all checks. Only ``sequences.tokens`` and ``error_flags`` change.

    Attributes:
        layouts: B prompts and where their responses lie.
        seeds: int64 [B, N], N trajectories per prompt.
        sequences: P = B * N trajectories, prompt by prompt.
        target: the reward bound to these trajectories, for guidance; None without a reward.
        ends: ids that end a response; none where holes are filled, whose text goes on behind them.
        judged: the layouts with the prompts that the reward is to read instead, if any.
        forbidden: ids that are never drawn, as :func:`entrgi_ext.sample_tokens` takes them.
        steps: the steps that commit something, in order; each is carried out before the next is taken.
        error_flags: int32 [T], one per denoising step, so that reading them once at the end names the step.
        graphs: captured guidance loops, or None where they are not asked for.
    """

    denoiser: Denoiser
    reward: Reward
    config: SamplerConfig
    layouts: list[Layout]
    seeds: Tensor
    sequences: Sequences
    target: BoundReward | None
    ends: tuple[int, ...]
    forbidden: Tensor
    steps: Iterable[Step]
    error_flags: Tensor
    graphs: GuidanceGraphs | None
    judged: list[Layout] | None = None

    def window_ids(self, prompt: int, row: list[int]) -> list[int]:
        """The response in a trajectory's ids, up to the first token that ends it."""
        layout = self.layouts[prompt]
        window = row[layout.start : layout.stop]
        return window[: next((i for i, token_id in enumerate(window) if token_id in self.ends), None)]

    @property
    def ranked_ends(self) -> tuple[int, ...]:
        """The ends that guidance hides what follows from, and that rank last: one as published, or all."""
        return self.layouts[0].end_ids

    def decode(self, layouts: list[Layout] | None = None) -> list[list[Completion]]:
        """What was written, [B][N], up to the first token that ends it, behind the prompts of ``layouts``."""

        def decode(ids: list[int]) -> str:
            return decode_ids(self.denoiser.tokenizer, ids, skip_special_tokens=True)

        rows = self.sequences.tokens.view(*self.seeds.shape, -1).tolist()
        result = []
        for b, layout in enumerate(layouts or self.layouts):
            windows = [self.window_ids(b, row) for row in rows[b]]
            completions = [Completion(layout.prompt, decode(layout.before + ids), decode(ids)) for ids in windows]
            result.append(completions)
        return result

    def choose(self, rewards: Tensor) -> Tensor:
        """Which of the N trajectories of each prompt are returned, int64 [B, K]; ``rewards`` [B, N], NaN if unknown."""
        if self.config.best_of is None:
            return torch.arange(rewards.shape[1]).expand_as(rewards)
        ranked = rewards.masked_fill(rewards.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return ranked[:, : self.config.num_return_sequences]

    def raise_on_error(self) -> None:
        """Waits for the device. Raises RuntimeError naming the first step whose error flag is set."""
        flags = self.error_flags.tolist()
        step = next((j for j, flag in enumerate(flags) if flag), None)
        if step is not None:
            raise RuntimeError(self.describe(step, " and ".join(_reasons(flags[step]))))

    def describe(self, step: int, error: RuntimeError | str) -> str:
        """An error of denoising step ``step`` in words, with its cause where the error is only a consequence."""
        flag = int(self.error_flags[step])
        reason = "the reward is not finite" if flag & REWARD_NOT_FINITE else error
        return f"denoising step {step} of {self.config.steps}: {reason}"


def _reasons(flag: int) -> list[str]:
    reasons = {
        1: "logits with NaN, +inf or nothing finite",
        2: "a position where every finite id is forbidden",
    }
    return [text for bit, text in reasons.items() if flag & bit]


def prepare(
    prompts: Prompt | Sequence[Prompt],
    denoiser: Denoiser,
    reward: Reward | None,
    config: SamplerConfig,
    *,
    seed: int | None,
    generator: torch.Generator | None,
    trajectory_seeds: Tensor | None,
    forbidden_ids: Sequence[int] = (),
    suppress_tokens: Sequence[int] | None = None,
    mask_id: int | None = None,
    reward_prompts: Prompt | Sequence[Prompt] | None = None,
) -> Generation:
    """Check and lay out a generation; arguments and ValueErrors are those of :func:`entrgi.generate`."""
    prompts = _as_list(prompts)
    num_trajectories = config.num_trajectories
    memory.check(config, len(prompts), denoiser.vocab_size, denoiser.dtype.itemsize, torch.device(denoiser.device))
    if trajectory_seeds is None:
        seeds = derive_seeds(_base_seed(seed, generator), len(prompts), num_trajectories)
    elif seed is None and generator is None:
        seeds = _check_seeds(trajectory_seeds, len(prompts), num_trajectories)
    else:
        raise ValueError("trajectory_seeds: pass one of seed, generator and trajectory_seeds")
    ends = end_ids(denoiser)
    _check_denoiser(denoiser, config, mask_id, ends)
    reward = _check_reward(reward, config)
    # Drawn in a hole, an end of sequence would cut off the user's own text behind it.
    never = {
        "mask_token_id": (denoiser.mask_token_id,),
        "forbidden_ids": forbidden_ids,
        "suppress_tokens": suppress_tokens,
        "ends": ends if config.infill else (),
    }
    forbidden = for_draws(_forbidden(denoiser, never), denoiser.device).to(denoiser.device)

    sequences, layouts, masked = _lay_out(prompts, denoiser, reward, config, seeds, ends)
    judged = None
    if reward_prompts is not None:
        judged = _read_otherwise(layouts, _as_list(reward_prompts, "reward_prompts"), denoiser, config, reward)
    target = check_bound(reward.bind(denoiser, judged or layouts, num_trajectories))
    if target is not None:
        _check_target(denoiser, target.embedding, config)

    def count_masked() -> list[int]:
        return (sequences.window & (sequences.tokens == denoiser.mask_token_id)).sum(dim=1).tolist()

    foreseen = config.threshold is None and not config.early_exit
    steps = plan(masked, sequences.seeds.tolist(), config, denoiser.device, None if foreseen else count_masked)
    return Generation(
        denoiser=denoiser,
        reward=reward,
        config=config,
        layouts=layouts,
        judged=judged,
        seeds=seeds,
        sequences=sequences,
        target=target,
        ends=() if config.infill else ends,
        forbidden=forbidden,
        # Where the schedule alone decides, everything is on the device before the first step.
        steps=list(steps) if foreseen else steps,
        error_flags=torch.zeros(config.steps, dtype=torch.int32, device=denoiser.device),
        graphs=GuidanceGraphs(denoiser.device) if config.cuda_graphs else None,
    )


def _lay_out(
    prompts: list[Prompt],
    denoiser: Denoiser,
    reward: Reward,
    config: SamplerConfig,
    seeds: Tensor,
    ends: tuple[int, ...],
) -> tuple[Sequences, list[Layout], list[list[int]]]:
    encoded = [denoiser.encode(prompt) for prompt in prompts]
    for index, ids in enumerate(encoded):
        if denoiser.mask_token_id not in ids.body:
            continue
        if not config.infill and (config.infill is not None or not ids.is_text):
            encoded[index] = with_spelled_masks(ids, denoiser.tokenizer, denoiser.mask_token_id)
        elif config.infill and not (ids.is_text and reward.reads_prompt):
            raise ValueError(
                f"prompts[{index}] is to be infilled, which needs a plain-text prompt and a reward that "
                "reads the whole text (no chat template, include_prompt=True)"
            )
    return build_sequences(
        prompts,
        encoded,
        seeds,
        max_new_tokens=config.max_new_tokens,
        mask_token_id=denoiser.mask_token_id,
        pad_token_id=denoiser.pad_token_id,
        infill=config.infill,
        end_ids=ends if config.end_tokens == "all" else ends[:1],
        max_length=denoiser.max_length,
        device=denoiser.device,
    )


def _read_otherwise(
    layouts: list[Layout], prompts: list[Prompt], denoiser: Denoiser, config: SamplerConfig, reward: Reward
) -> list[Layout]:
    """The layouts with the prompts that the reward is to read instead."""
    if isinstance(reward, NoReward):
        raise ValueError("reward_prompts: expected None without a reward that could read them")
    if config.infill:
        raise ValueError("reward_prompts: expected None with infill, where the reward reads the text around the holes")
    if len(prompts) != len(layouts):
        raise ValueError(f"reward_prompts: expected one for each of {len(layouts)} prompts, got {len(prompts)}")
    result = []
    for layout, prompt in zip(layouts, prompts, strict=True):
        continued = prompt if isinstance(prompt, str) else begun_turn(prompt) or ""
        result.append(replace(layout, prompt=prompt, before=plain_ids(denoiser.tokenizer, continued, "reward_prompts")))
    return result


def check_models(denoiser: Denoiser, reward: Reward | None) -> None:
    """Raise ValueError for what is no model at all."""
    for name, model, method in (("denoiser", denoiser, "logits"), ("reward", reward, "bind")):
        if name == "reward" and model is None:
            continue
        if not hasattr(model, method):
            expected = f"expected one of entrgi.{name}s or an object with their methods"
            raise ValueError(f"{name}: {expected}, got {model!r:.80}")


def derive_seeds(base: int, prompts: int, num_trajectories: int) -> Tensor:
    """Trajectory seeds, int64 [prompts, num_trajectories]; each depends on ``base`` and its two indices alone."""
    rows = [[_mix(_mix(_mix(base) + b) + k) for k in range(num_trajectories)] for b in range(prompts)]
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
        if not -(2**63) <= seed < 2**63:  # others would be the same as one of these
            raise ValueError(f"seed must be an integer in [-2^63, 2^63), got {seed!r:.60}")
        return int(seed)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device))


def _check_seeds(seeds: Tensor, prompts: int, num_trajectories: int) -> Tensor:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.long or tuple(seeds.shape) != (prompts, num_trajectories):
        got = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else repr(seeds)
        expected = f"[{prompts}, {num_trajectories}] (prompts, trajectories)"
        raise ValueError(f"trajectory_seeds must be an int64 tensor {expected}, got {got}")
    return seeds.cpu()


def _as_list(prompts: Prompt | Sequence[Prompt], label: str = "prompts") -> list[Prompt]:
    if isinstance(prompts, str):
        return [as_prompt(prompts, label)]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"{label}: expected text, a list of messages, or a list of either, got {prompts!r:.80}")
    if not prompts:
        raise ValueError(f"{label} must hold at least one prompt, got none")
    several = [prompts] if all(isinstance(item, dict) for item in prompts) else prompts
    return [as_prompt(prompt, f"{label}[{index}]") for index, prompt in enumerate(several)]


def _check_denoiser(denoiser: Denoiser, config: SamplerConfig, mask_id: int | None, ends: tuple[int, ...]) -> None:
    if mask_id is not None and mask_id != denoiser.mask_token_id:
        raise ValueError(
            f"mask_id must be the denoiser's mask token {denoiser.mask_token_id}, got {mask_id!r}; "
            "CallableDenoiser takes another as mask_token_id"
        )
    if config.early_exit and not ends:
        raise ValueError("early_exit: the denoiser has no end-of-sequence token to stop at")
    if config.cuda_graphs and denoiser.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs models on a CUDA device, got {denoiser.device}")


def _check_reward(reward: Reward | None, config: SamplerConfig) -> Reward:
    """``reward``, or what stands for none. Raises ValueError where one is needed."""
    if reward is not None:
        return reward
    for name, value, off in (("guidance", config.guidance, "none"), ("best_of", config.best_of, None)):
        if value != off:
            raise ValueError(
                f"reward: expected one of entrgi.rewards or an object with their methods, got None with {name} "
                f"{value!r}: only without any ({name}={off!r}) can texts be written without a reward"
            )
    return cast(Reward, NoReward())


def _check_target(denoiser: Denoiser, embedding: Tensor, config: SamplerConfig) -> None:
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


def _forbidden(denoiser: Denoiser, never: Mapping[str, Iterable[int] | None]) -> Tensor:
    """bool [V]: ids without a token, and those in ``never``, by the argument that names them."""
    forbidden = undecodable(denoiser.tokenizer, denoiser.vocab_size)
    for name, ids in never.items():
        if ids is None:
            continue
        if not isinstance(ids, Iterable):
            raise ValueError(f"{name} must be a sequence of integers, got {ids!r:.80}")
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, Integral):
                raise ValueError(f"{name} must be integers, got {token_id!r}")
            if not 0 <= token_id < denoiser.vocab_size:
                raise ValueError(f"{name}: {token_id} is not an id below {denoiser.vocab_size}")
            forbidden[token_id] = True
    if forbidden.all():
        raise ValueError("forbidden_ids: every id is forbidden, expected at least one to draw")
    return forbidden


def for_draws(forbidden: Tensor, device: torch.device) -> Tensor:
    """The mask bool [V], or on CUDA, where at most one id in 256 is forbidden, the ids themselves, int32 [F].

    A kernel then reads F words and not V bytes in every draw. The CPU's would make a mask of them in every call.
    """
    few = int(forbidden.sum()) <= forbidden.shape[0] // 256
    return forbidden.nonzero()[:, 0].int() if few and device.type == "cuda" else forbidden
