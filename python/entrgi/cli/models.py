"""The models that commands load: a denoiser, and one reward or a weighted sum of several."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from entrgi.cli.options import Option
from entrgi.cli.prompts import parse_json
from entrgi.config import DTYPES

if TYPE_CHECKING:
    import torch

    from entrgi.denoisers import Denoiser
    from entrgi.rewards import Reward

EMBEDDED, NO_REWARD = "demo", "none"
KINDS = ("classifier", "likelihood")
PANEL = "Models"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

MODELS = (
    Option(
        "model", str, "Denoiser: a checkpoint folder, a hub id, or the embedded pair's.", default=EMBEDDED, panel=PANEL
    ),
    Option(
        "reward", list[str], "Reward model, likewise; repeat for a weighted sum. none: unguided texts.", panel=PANEL
    ),
    Option("reward_weight", list[float], "Weight of each reward, in their order. Default: 1.", panel=PANEL),
    Option("reward_kind", list[str], "Once, or for each reward. Default: what it is.", panel=PANEL, choices=KINDS),
    Option(
        "adapter", list[str], "LoRA adapter of the reward; once, or for each reward ('none' for none).", panel=PANEL
    ),
    Option("reward_label", list[str], "Label of a classifier with several, by name or index.", panel=PANEL),
    Option("model_adapter", list[str], "LoRA adapter of the denoiser; several are merged in turn.", panel=PANEL),
    Option("mask_token_id", int, "Mask token of a denoiser that does not declare one.", panel=PANEL),
    Option(
        "missing", str, "What rewards read for tokens they lack.", default="unk", panel=PANEL, choices=("unk", "zero")
    ),
    Option(
        "include_prompt",
        bool,
        "Whether rewards without a chat template read the prompt, too. Default: they do.",
        panel=PANEL,
        negatable=True,
    ),
    Option(
        "chat_template_kwargs",
        str,
        'Arguments of the denoiser\'s chat template, a JSON object: {"enable_thinking": false}.',
        panel=PANEL,
    ),
    Option("reward_chat_template_kwargs", str, "Likewise of the rewards' templates.", panel=PANEL),
    Option("device", str, "auto, cpu, cuda, cuda:1 ...", default="auto", panel=PANEL),
    Option("dtype", str, "Of all models. Default: the checkpoint's.", panel=PANEL, choices=DTYPES),
    Option("compile", bool, "Compile the models' transformer blocks.", default=False, panel=PANEL),
)


@dataclass(frozen=True)
class RewardChoice:
    """One reward as named on the command line."""

    name: str
    weight: float
    kind: str | None
    adapter: str | None
    label: str | None

    def labelled(self) -> dict[str, int | str]:
        """The label as ``load_reward`` takes it."""
        if self.label is None:
            return {}
        return {"label": int(self.label) if self.label.isdecimal() else self.label}


@dataclass(frozen=True)
class Models:
    """What the options of :data:`MODELS` say; :meth:`load` makes it real."""

    model: str
    rewards: tuple[RewardChoice, ...]
    model_adapter: list[str] | None
    mask_token_id: int | None
    missing: str
    include_prompt: bool | None
    chat_template_kwargs: dict[str, Any] | None
    reward_chat_template_kwargs: dict[str, Any] | None
    device: str
    dtype: str | None
    compile: bool

    @classmethod
    def of(cls, options: dict[str, Any]) -> Models:
        """From the values of :data:`MODELS`' options, by name; others are passed over.

        Raises:
            ValueError: for another number of weights, kinds or adapters than of rewards, for folders that are not
                there, and for what the embedded pair does not take. Nothing is imported to find out.
        """
        names = options["reward"] or [EMBEDDED]
        weights = options["reward_weight"] or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"--reward-weight: expected one for each of {len(names)} rewards, got {len(weights)}")
        for weight in weights:
            if not math.isfinite(weight):
                raise ValueError(f"--reward-weight must be finite, got {weight}")
        kinds = _for_each("--reward-kind", options["reward_kind"], len(names))
        adapters = _for_each("--adapter", options["adapter"], len(names))
        adapters = [None if adapter == "none" else adapter for adapter in adapters]
        labels = _for_each("--reward-label", options["reward_label"], len(names))
        choices = zip(names, weights, kinds, adapters, labels, strict=True)
        rewards = tuple(RewardChoice(*choice) for choice in choices)
        own = {field.name: options[field.name] for field in fields(cls) if field.name != "rewards"}
        own["model_adapter"] = own["model_adapter"] or None
        for name in ("chat_template_kwargs", "reward_chat_template_kwargs"):
            own[name] = _json_object(f"--{name.replace('_', '-')}", own[name])
        if NO_REWARD in names:
            for name in ("reward", "reward_weight", "reward_kind", "reward_label", "adapter"):
                given = options[name] if name != "reward" else names[1:]
                if given:
                    raise ValueError(f"--{name.replace('_', '-')}: expected nothing beside --reward none, got {given}")
            rewards = ()
        models = cls(rewards=rewards, **own)
        models.check()
        return models

    def check(self) -> None:
        """Raise ValueError for names that cannot be had, as far as can be seen without a model's own files."""
        check_name("--model", self.model)
        for adapter in self.model_adapter or ():
            if self.is_embedded:
                raise ValueError("--model-adapter: expected a checkpoint as --model, the embedded pair takes none")
            check_name("--model-adapter", adapter, "adapter_config.json")
        for reward in self.rewards:
            check_name("--reward", reward.name)
            if reward.name == EMBEDDED and reward.kind == "likelihood":
                raise ValueError("--reward-kind: the embedded pair's reward is a classifier, got 'likelihood'")
            if reward.label is not None and reward.name == EMBEDDED:
                raise ValueError(f"--reward-label: the embedded pair's reward has one label, got {reward.label!r:.60}")
            if reward.adapter is not None:
                if reward.name == EMBEDDED:
                    raise ValueError("--adapter: expected a checkpoint as --reward, the embedded pair takes none")
                check_name("--adapter", reward.adapter, "adapter_config.json")

    @property
    def is_embedded(self) -> bool:
        """Whether the denoiser is the embedded pair's."""
        return self.model == EMBEDDED

    def describe(self) -> dict[str, Any]:
        """Plain data for traces and JSON."""
        return {"denoiser": self.model, "rewards": [vars(reward) for reward in self.rewards]}

    def settings(self) -> dict[str, Any]:
        """All that texts follow from; plain data."""
        own = ("model_adapter", "mask_token_id", "missing", "include_prompt", "dtype")
        own += ("chat_template_kwargs", "reward_chat_template_kwargs")
        return {**self.describe(), **{name: getattr(self, name) for name in own}}

    def load(self) -> tuple[Denoiser, Reward | None]:
        """Both on the device, no reward where ``none`` was asked for.

        Raises ValueError where something named cannot be had.
        """
        import entrgi

        device = usable_device(self.device)
        shared = {"dtype": self.dtype, "device": device, "compile": self.compile}
        denoiser = entrgi.load_denoiser(
            self.model,
            adapter=self.model_adapter,
            mask_token_id=self.mask_token_id,
            chat_template_kwargs=self.chat_template_kwargs,
            **shared,
        )
        if not self.rewards:
            return denoiser, None
        shared["unmapped"] = self.missing
        if self.reward_chat_template_kwargs is not None:
            shared["chat_template_kwargs"] = self.reward_chat_template_kwargs
        if self.include_prompt is not None:
            shared["include_prompt"] = self.include_prompt
        rewards = [
            entrgi.load_reward(choice.name, kind=choice.kind, adapter=choice.adapter, **choice.labelled(), **shared)
            for choice in self.rewards
        ]
        factors = [choice.weight for choice in self.rewards]
        return denoiser, rewards[0] if factors == [1] else entrgi.WeightedReward(rewards, factors)


def check_name(option: str, name: str, file: str = "config.json") -> None:
    """Raise ValueError where ``name`` is neither a folder with ``file``, nor a hub id, nor the embedded pair's."""
    path = Path(name)
    if name == EMBEDDED and file == "config.json":
        return
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise ValueError(f"{option}: {name!r:.80} cannot be a folder: {error.strerror}") from error
    if is_folder and not any((path / each).is_file() for each in (file, "adapter_config.json")):
        raise ValueError(f"{option}: folder {name!r} has no {file}")
    if not is_folder and (exists or not _HUB_ID.fullmatch(name) or name.startswith(".")):
        raise ValueError(f"{option}: no folder {name!r}, expected a checkpoint folder or a hub id")


def _json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """The object that ``text`` is. Raises ValueError for anything else."""
    if text is None:
        return None
    value = parse_json(option, f"{text!r:.60}", text, "an object by name")
    if not isinstance(value, dict):
        raise ValueError(f"{option}: expected a JSON object, got {text!r:.60}")
    return value


def usable_device(name: str) -> torch.device:
    """The device of that name, tried out; ``auto`` is CUDA where torch has it."""
    import torch

    from entrgi.models.placement import choose_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return cast("torch.device", choose_device("--device:", name))  # of a name, never None


def _for_each(option: str, values: list | None, count: int) -> list:
    """One value for each reward; a single one is for all."""
    values = values or [None]
    if len(values) not in (1, count):
        raise ValueError(f"{option}: expected one, or one for each of {count} rewards, got {len(values)}")
    return values * count if len(values) == 1 else values
