"""``entrgi vocabulary``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from entrgi import memory
from entrgi.cli.console import check_json, console, reported_errors, write_json
from entrgi.cli.models import EMBEDDED, check_name, usable_device
from entrgi.cli.options import JSON_FILE, Option, accepts
from entrgi.config import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from entrgi.denoisers import Denoiser


@accepts()
def vocabulary(
    model: Annotated[str, Option(help="Denoiser: a checkpoint folder, a hub id, or the embedded pair's.")] = EMBEDDED,
    reward: Annotated[str, Option(help="Reward model, of which only the tokenizer is read: likewise.")] = EMBEDDED,
    prompt: Annotated[
        list[str] | None, Option(help="Text to continue, for the sample; repeat for several.", short="-p")
    ] = None,
    max_new_tokens: Annotated[
        int, Option(help="Masked positions behind each prompt of the sample.", short="-l", least=1)
    ] = 16,
    top: Annotated[int, Option(help="How many tokens without a counterpart to name.", least=0, most=2**63 - 1)] = 10,
    mask_token_id: Annotated[int | None, Option(help="Mask token of a model that does not declare one.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    json: Annotated[Path | None, JSON_FILE] = None,
) -> None:
    """Show how much of a model's vocabulary a reward model understands: the share of its ids, and of its probability.

    The probability is what the model predicts at masked positions behind the prompts. Names tokens that are lost, too.
    """
    with reported_errors():
        config = SamplerConfig(num_return_sequences=1, max_new_tokens=max_new_tokens, guidance="none")
        memory.check(config, 1)
        check_name("--model", model)
        check_name("--reward", reward, "tokenizer_config.json")
        check_json(json)

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
        if write_json(json, {"model": model, "reward": reward, **report.as_dict()}):
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
