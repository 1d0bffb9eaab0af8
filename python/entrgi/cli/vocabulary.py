"""``entrgi vocabulary``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrgi import memory
from entrgi.cli.console import console, reported_errors, write_json
from entrgi.cli.models import EMBEDDED, check_name, usable_device
from entrgi.cli.options import JSON_FILE, checked
from entrgi.config import SamplerConfig
from entrgi.files import check_target

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from entrgi.denoisers import Denoiser


def vocabulary(
    model: Annotated[
        str,
        typer.Option(help="Denoiser: a checkpoint folder, a hub id, or the embedded pair's.", **checked("--model")),
    ] = EMBEDDED,
    reward: Annotated[
        str, typer.Option(help="Reward model, of which only the tokenizer is read: likewise.", **checked("--reward"))
    ] = EMBEDDED,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="Text to continue, for the sample; repeat for several.", **checked("--prompt")
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-l",
            help="Masked positions behind each prompt of the sample.",
            **checked("--max-new-tokens", int, least=1),
        ),
    ] = 16,
    top: Annotated[
        int,
        typer.Option(
            help="How many tokens without a counterpart to name.", **checked("--top", int, least=0, most=2**63 - 1)
        ),
    ] = 10,
    mask_token_id: Annotated[
        int | None,
        typer.Option(help="Mask token of a model that does not declare one.", **checked("--mask-token-id", int)),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", **checked("--device"))] = "auto",
    as_json: Annotated[Path | None, JSON_FILE] = None,
) -> None:
    """Show how much of a model's vocabulary a reward model understands: the share of its ids, and of its probability.

    The probability is what the model predicts at masked positions behind the prompts. Names tokens that are lost, too.
    """
    with reported_errors():
        config = SamplerConfig(num_return_sequences=1, max_new_tokens=max_new_tokens, guidance="none")
        memory.check(config, 1)
        check_name("--model", model)
        check_name("--reward", reward, "tokenizer_config.json")
        if as_json is not None and str(as_json) != "-":
            check_target("--json", as_json)

        import entrgi
        from entrgi.vocabulary import align, coverage

        denoiser = entrgi.load_denoiser(model, device=usable_device(device), mask_token_id=mask_token_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few counterparts: the report says so
            alignment = align(denoiser.tokenizer, denoiser.vocab_size, load_reward_tokenizer(reward))
        if prompt:
            memory.check(config, len(prompt), denoiser.vocab_size, denoiser.dtype.itemsize, denoiser.device)
        logits = sample_logits(denoiser, prompt, max_new_tokens) if prompt else None
        report = coverage(alignment, denoiser.tokenizer, logits=logits, top=top)
        if as_json is not None:
            write_json(as_json, {"model": model, "reward": reward, **report.as_dict()})
        if str(as_json) == "-":
            return
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if logits is None:
            console.print("share of the probability: pass a --prompt", style="dim")


def load_reward_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the reward model ``name``, or the embedded one."""
    from entrgi import demo
    from entrgi.models.checkpoints import read_tokenizer

    return demo.load_tokenizer() if name == EMBEDDED else read_tokenizer("reward", name)


def sample_logits(denoiser: Denoiser, prompts: list[str], max_new_tokens: int) -> Tensor:
    """Logits [len(prompts) * max_new_tokens, V] at the masked positions behind the prompts, each read alone."""
    import torch

    from entrgi.sequences import build_sequences

    rows = []
    for prompt in prompts:
        sequences, _, masked = build_sequences(
            [prompt],
            [denoiser.encode(prompt)],
            torch.zeros(1, 1, dtype=torch.long),
            max_new_tokens=max_new_tokens,
            mask_token_id=denoiser.mask_token_id,
            pad_token_id=denoiser.pad_token_id,
            infill=True,
            max_length=denoiser.max_length,
            device=denoiser.device,
        )
        positions = torch.tensor(masked[0], device=denoiser.device)
        rows.append(denoiser.logits(sequences.tokens, sequences.attention_mask, positions))
    return torch.cat(rows)
