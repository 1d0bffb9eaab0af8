"""The command line: ``entrgi sample`` and ``entrgi doctor``."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)

EMBEDDED = "demo"
EMBEDDED_PROMPT, EMBEDDED_TOKENS = "The movie was", 16
DTYPES = ("float32", "bfloat16", "float16", "float64")


@app.callback()
def main() -> None:
    """Reward-gradient guidance for masked diffusion language models."""


@app.command()
def doctor() -> None:
    """Show what is installed and loaded, and what to do where something is missing. Exit code 1 then."""
    from entrgi.display import doctor_table
    from entrgi.doctor import examine

    report = examine()
    console.print(doctor_table(report))
    console.print(report.advice, style="green" if report.healthy else "bold red")
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeat for several.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.", dir_okay=False)] = None,
    model: Annotated[
        str, typer.Option(help="Masked LM: a checkpoint folder, a hub id, or the embedded pair.")
    ] = EMBEDDED,
    reward: Annotated[
        str, typer.Option(help="Reward model: a checkpoint folder, a hub id, or the embedded pair.")
    ] = EMBEDDED,
    guidance: Annotated[str, typer.Option(help="entrgi, aps, expectation, or none (best-of-n).")] = "entrgi",
    compare: Annotated[bool, typer.Option(help="Show unguided beside guided, same seeds.")] = False,
    num_return_sequences: Annotated[int, typer.Option("--num-return-sequences", "-k", help="Per prompt.")] = 4,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-l", help="Response length. Default 128; 16 for the embedded pair."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-t", help="Denoising steps. Default: one for each new token (16 for none)."),
    ] = None,
    guidance_steps: Annotated[int, typer.Option("--guidance-steps", "-m", help="Adam steps per denoising step.")] = 3,
    guidance_lr: Annotated[float, typer.Option(help="Adam's learning rate, in logits.")] = 0.5,
    reward_scale: Annotated[float, typer.Option(help="Factor on the reward; -1 steers the other way.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of draws and relaxed embeddings.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus of the draws; 1 is off.")] = 0.95,
    top_k: Annotated[int | None, typer.Option(help="Largest logits that may be drawn.")] = None,
    alg: Annotated[str, typer.Option(help="Confidence: entropy, maskgit_plus, topk_margin or anchor.")] = "entropy",
    alg_temp: Annotated[float, typer.Option(help="> 0 draws positions instead of taking the best.")] = 0.0,
    infill: Annotated[bool, typer.Option(help="Fill mask tokens inside the prompts, too.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same device: same texts, bit for bit.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help=f"Of both models: {', '.join(DTYPES)}. Default: the checkpoint's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write texts with a masked diffusion LM, steered by a reward model."""
    from entrgi.config import preset

    with reported_errors():
        length = max_new_tokens
        if length is None:
            length = EMBEDDED_TOKENS if model == EMBEDDED else 128
        config = preset(
            "paper",
            num_return_sequences=num_return_sequences,
            max_new_tokens=length,
            steps=steps if steps is not None else length or EMBEDDED_TOKENS,
            guidance=guidance,
            guidance_steps=guidance_steps,
            guidance_lr=guidance_lr,
            reward_scale=reward_scale,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            alg=alg,
            alg_temp=alg_temp,
            infill=infill,
        )
        run_sample(
            read_prompts(prompt, prompts_file, model),
            config,
            compare=compare,
            models=(model, reward),
            seed=random.getrandbits(31) if seed is None else seed,
            device=device,
            dtype=dtype,
            as_json=as_json,
        )


def read_prompts(prompts: list[str] | None, file: Path | None, model: str) -> list[str]:
    """The prompts named on the command line, in order; the embedded pair has a default."""
    result = list(prompts or [])
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--prompts-file: no file {str(file)!r}")
        result += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not result and file is None and model == EMBEDDED:
        return [EMBEDDED_PROMPT]
    if not result:
        raise ValueError("--prompt: expected at least one prompt")
    return result


def load_models(model: str, reward: str, device: str, dtype: str | None) -> tuple:
    """(denoiser, reward) on ``device``; the name ``demo`` stands for the embedded pair."""
    import torch

    from entrgi import MaskedLM, SequenceClassifierReward, demo

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    weights = None if dtype is None else getattr(torch, dtype)

    loaded = []
    for name, wrapper, embedded in (
        (model, MaskedLM, demo.load_denoiser),
        (reward, SequenceClassifierReward, demo.load_reward),
    ):
        if name == EMBEDDED:
            network, tokenizer = embedded(weights or torch.float32)
            loaded.append(wrapper(network.to(device), tokenizer))
        else:
            loaded.append(wrapper.from_pretrained(name, dtype=weights, device=device))
    return tuple(loaded)


def run_sample(
    prompts: list[str],
    config: object,
    *,
    compare: bool,
    models: tuple[str, str],
    seed: int,
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Generate and print; on Ctrl-C print what is done and exit with 130."""
    from dataclasses import replace

    from entrgi import display, generate

    denoiser, reward = load_models(*models, device, dtype)
    configs = {config.guidance: config}
    if compare:
        if config.guidance == "none":
            raise ValueError("--compare: expected a --guidance to compare with none")
        # Unguided in everything but the guidance: the same confidence rule, the same draws.
        unguided = replace(config, guidance="none", entropy_rule=config.entropy_source)
        configs = {"unguided": unguided, config.guidance: config}

    outputs, interrupted = {}, False
    with display.progress(errors, enabled=not as_json) as track:
        try:
            for name, each in configs.items():
                on_step = track(name, each.steps)
                outputs[name] = generate(prompts, denoiser, reward, each, seed=seed, callback_on_step_end=on_step)
        except KeyboardInterrupt as interrupt:
            interrupted = True
            if hasattr(interrupt, "partial"):
                outputs[name] = interrupt.partial

    if not outputs:
        raise KeyboardInterrupt
    if as_json:
        description = {"model": models[0], "reward": models[1], "seed": seed, "device": str(denoiser.device)}
        runs = {name: display.as_dict(prompts, configs[name], output) for name, output in outputs.items()}
        print(json.dumps({**description, "runs": runs}, allow_nan=False))
    else:
        for renderable in display.report(prompts, outputs):
            console.print(renderable)
        console.print(f"seed {seed}, {denoiser.device}", style="dim")
    if interrupted:
        errors.print("interrupted: what is shown is unfinished", style="bold red")
        raise typer.Exit(130)


@contextmanager
def reported_errors():
    """Errors of the user's input end the command with one line and exit code 2, failures with 1."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, too
        raise
    except KeyboardInterrupt:
        errors.print("interrupted before the first step", style="bold red")
        raise typer.Exit(130) from None
    except ValueError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (RuntimeError, ImportError) as error:  # ImportError: operators that are not built or do not load
        errors.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
