"""The models that commands load: a denoiser, and one reward or a weighted sum of several."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from entrgi.cli.options import DTYPES, Option, dtype

if TYPE_CHECKING:
    import torch

    from entrgi.denoisers import Denoiser
    from entrgi.rewards import Reward

EMBEDDED = "demo"
PANEL = "Models"

MODELS = (
    Option(
        "model", str, "Denoiser: a checkpoint folder, a hub id, or the embedded pair's.", default=EMBEDDED, panel=PANEL
    ),
    Option("reward", list[str], "Reward model, likewise; repeat for a weighted sum.", panel=PANEL),
    Option("reward_weight", list[float], "Weight of each reward, in their order. Default: 1.", panel=PANEL),
    Option(
        "reward_kind",
        list[str],
        "classifier or likelihood; once, or for each reward. Default: what it is.",
        panel=PANEL,
    ),
    Option(
        "adapter", list[str], "LoRA adapter of the reward; once, or for each reward ('none' for none).", panel=PANEL
    ),
    Option("model_adapter", str, "LoRA adapter of the denoiser.", panel=PANEL),
    Option("mask_token_id", int, "Mask token of a denoiser that does not declare one.", panel=PANEL),
    Option("missing", str, "What rewards read for tokens they lack: unk or zero.", default="unk", panel=PANEL),
    Option(
        "include_prompt",
        bool,
        "Whether rewards without a chat template read the prompt, too. Default: they do.",
        panel=PANEL,
        negatable=True,
    ),
    Option("device", str, "auto, cpu, cuda, cuda:1 ...", default="auto", panel=PANEL),
    Option("dtype", str, f"Of all models: {', '.join(DTYPES)}. Default: the checkpoint's.", panel=PANEL),
    Option("compile", bool, "Compile the models' transformer blocks.", default=False, panel=PANEL),
)


@dataclass(frozen=True)
class RewardChoice:
    """One reward as named on the command line."""

    name: str
    weight: float
    kind: str | None
    adapter: str | None


@dataclass(frozen=True)
class Models:
    """What the options of :data:`MODELS` say; :meth:`load` makes it real."""

    model: str
    rewards: tuple[RewardChoice, ...]
    model_adapter: str | None
    mask_token_id: int | None
    missing: str
    include_prompt: bool | None
    device: str
    dtype: str | None
    compile: bool

    @classmethod
    def of(cls, options: dict[str, object]) -> Models:
        """From the values of :data:`MODELS`' options, by name; others are passed over.

        Raises:
            ValueError: for another number of weights, kinds or adapters than of rewards, and for unknown names.
        """
        names = options["reward"] or [EMBEDDED]
        weights = options["reward_weight"] or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"--reward-weight: expected one for each of {len(names)} rewards, got {len(weights)}")
        kinds = _for_each("--reward-kind", options["reward_kind"], len(names))
        adapters = _for_each("--adapter", options["adapter"], len(names))
        for kind in kinds:
            if kind not in (None, "classifier", "likelihood"):
                raise ValueError(f"--reward-kind must be classifier or likelihood, got {kind!r}")
        if options["missing"] not in ("unk", "zero"):
            raise ValueError(f"--missing must be unk or zero, got {options['missing']!r}")
        adapters = [None if adapter == "none" else adapter for adapter in adapters]
        choices = zip(names, weights, kinds, adapters, strict=True)
        rewards = tuple(RewardChoice(*choice) for choice in choices)
        own = [field.name for field in fields(cls) if field.name != "rewards"]
        return cls(rewards=rewards, **{name: options[name] for name in own})

    @property
    def is_embedded(self) -> bool:
        """Whether the denoiser is the embedded pair's."""
        return self.model == EMBEDDED

    def describe(self) -> dict[str, object]:
        """Plain data for traces and JSON."""
        return {"denoiser": self.model, "rewards": [vars(reward) for reward in self.rewards]}

    def load(self) -> tuple[Denoiser, Reward]:
        """Both on the device. Raises ValueError where something named cannot be had."""
        from entrgi import WeightedReward

        device = usable_device(self.device)
        weights = None if self.dtype is None else dtype("--dtype", self.dtype)
        denoiser = load_denoiser(
            self.model, device, weights, self.model_adapter, self.compile, mask_token_id=self.mask_token_id
        )
        shared = {"missing": self.missing, "compile": self.compile}
        if self.include_prompt is not None:
            shared["include_prompt"] = self.include_prompt
        rewards = [load_reward(choice, device, weights, **shared) for choice in self.rewards]
        factors = [choice.weight for choice in self.rewards]
        return denoiser, rewards[0] if factors == [1] else WeightedReward(rewards, factors)


def load_denoiser(
    name: str,
    device: torch.device,
    weights: torch.dtype | None = None,
    adapter: str | None = None,
    compile: bool = False,
    mask_token_id: int | None = None,
) -> Denoiser:
    """The denoiser ``name``, ``demo`` being the embedded one; the rest as in :func:`entrgi.load_denoiser`."""
    import entrgi
    from entrgi import demo

    if name != EMBEDDED:
        return entrgi.load_denoiser(
            name, dtype=weights, device=device, adapter=adapter, mask_token_id=mask_token_id, compile=compile
        )
    if adapter is not None:
        raise ValueError("--model-adapter: expected a checkpoint as --model, the embedded pair takes none")
    network, tokenizer = demo.load_denoiser() if weights is None else demo.load_denoiser(weights)
    return entrgi.MaskedLM(network.to(device), tokenizer, mask_token_id=mask_token_id, compile=compile)


def load_reward(choice: RewardChoice, device: torch.device, weights: torch.dtype | None, **options: object) -> Reward:
    """One reward, ``demo`` being the embedded one; ``options`` of its class."""
    import entrgi
    from entrgi import demo

    if choice.name != EMBEDDED:
        kind, adapter = choice.kind, choice.adapter
        return entrgi.load_reward(choice.name, kind=kind, dtype=weights, device=device, adapter=adapter, **options)
    if choice.kind == "likelihood":
        raise ValueError("--reward-kind: the embedded pair's reward is a classifier, got 'likelihood'")
    if choice.adapter is not None:
        raise ValueError("--adapter: expected a checkpoint as --reward, the embedded pair takes none")
    network, tokenizer = demo.load_reward() if weights is None else demo.load_reward(weights)
    return entrgi.SequenceClassifierReward(network.to(device), tokenizer, **options)


def usable_device(name: str) -> torch.device:
    """The device of that name, tried out; ``auto`` is CUDA where torch has it."""
    import torch

    from entrgi.models.placement import choose_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_device("--device:", name)


def _for_each(option: str, values: list | None, count: int) -> list:
    """One value for each reward; a single one is for all."""
    values = values or [None]
    if len(values) not in (1, count):
        raise ValueError(f"{option}: expected one, or one for each of {count} rewards, got {len(values)}")
    return values * count if len(values) == 1 else values
