"""What guidance does to the texts of the embedded pair: reward, an independent judge, and repetition.

    python benchmarks/demo_quality.py                 # benchmarks/results/demo_quality.{json,csv,png}

The same trajectory seeds serve all conditions, so differences are paired:

    unguided    no guidance, otherwise as guided (same confidence rule)
    guided      EntRGi up the reward
    negated     EntRGi down the reward
    best_of_4   the best of four unguided texts by the reward, with the published best-of-n rule

Judges: the reward itself (of the decoded text); the VADER lexicon's compound score in [-1, 1], which guidance
does not see; distinct-1 and distinct-2, the share of different words and word pairs, over all texts of a
condition and inside each text, which fall when guidance collapses into repetition.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from provenance import provenance
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from entrgi import MaskedLM, SamplerConfig, SequenceClassifierReward, demo, generate, preset
from entrgi.generation import derive_seeds

PREFIXES = ("", "The movie was")
COPIES = 4  # of best-of-n
SHOWN = 12


@dataclass(frozen=True)
class Texts:
    """The texts of one condition, one per prompt, with the reward of each and the seconds they took."""

    texts: list[str]
    rewards: list[float]
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    denoiser = MaskedLM(*demo.load_denoiser(torch.float32))
    reward = SequenceClassifierReward(*demo.load_reward(torch.float32))
    guided = preset(
        "paper",
        num_return_sequences=1,
        max_new_tokens=arguments.length,
        steps=arguments.steps or arguments.length,
        guidance_steps=arguments.guidance_steps,
    )
    conditions = {
        "unguided": replace(guided, guidance="none", entropy_rule="initial"),
        "guided": guided,
        "negated": replace(guided, reward_scale=-1.0),
        "best_of_4": replace(guided, guidance="none", num_return_sequences=COPIES),
    }
    results = []
    for prefix in PREFIXES:
        runs = {}
        for name, config in conditions.items():
            runs[name] = sample(prefix, config, denoiser, reward, arguments)
            print(f"{prefix!r:16} {name:10} reward {statistics.mean(runs[name].rewards):.2f}", flush=True)
        results += [summarise(prefix, name, run, runs["unguided"]) for name, run in runs.items()]
    write(results, guided, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="texts per condition (64)")
    parser.add_argument("--length", type=int, default=16, help="response tokens (16)")
    parser.add_argument("--steps", type=int, help="denoising steps (one per token)")
    parser.add_argument("--guidance-steps", type=int, default=3, help="Adam steps per denoising step (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="prompts at a time (32); changes no draw")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def sample(
    prefix: str,
    config: SamplerConfig,
    denoiser: MaskedLM,
    reward: SequenceClassifierReward,
    arguments: argparse.Namespace,
) -> Texts:
    """``n`` texts that begin with ``prefix``; of several copies the one with the best reward."""
    seeds = derive_seeds(arguments.seed, arguments.n, COPIES)[:, : config.num_return_sequences]
    texts, rewards, started = [], [], time.perf_counter()
    for chunk in seeds.split(arguments.batch):
        output = generate([prefix] * len(chunk), denoiser, reward, config, trajectory_seeds=chunk)
        best = output.rewards.argmax(dim=1).tolist()
        texts += [row[k] for row, k in zip(output.texts, best, strict=True)]
        rewards += output.top1.tolist()
    return Texts(texts, rewards, time.perf_counter() - started)


def summarise(prefix: str, condition: str, run: Texts, unguided: Texts) -> dict:
    """Means, standard errors and paired differences from ``unguided``; sample texts."""
    vader = SentimentIntensityAnalyzer()

    def judged(texts: list[str]) -> list[float]:
        return [vader.polarity_scores(text)["compound"] for text in texts]

    scores, scores_unguided = judged(run.texts), judged(unguided.texts)
    words = [re.findall(r"[\w']+", text.lower()) for text in run.texts]
    row = {"prefix": prefix, "condition": condition, "n": len(run.texts)}
    row |= mean_and_error("reward", run.rewards) | mean_and_error("vader", scores)
    row |= mean_and_error("reward_gain", subtract(run.rewards, unguided.rewards))
    row |= mean_and_error("vader_gain", subtract(scores, scores_unguided))
    for size in (1, 2):
        grams = [list(zip(*(text[i:] for i in range(size)), strict=False)) for text in words]
        row[f"distinct_{size}"] = share_of_different([gram for text in grams for gram in text])
        inside = [share_of_different(text) for text in grams if text]
        row[f"distinct_{size}_in_text"] = statistics.mean(inside) if inside else 0.0
    row["words"] = statistics.mean(map(len, words))
    row["seconds_per_text"] = run.seconds / len(run.texts)
    scored = zip(run.texts, run.rewards, scores, strict=True)
    row["samples"] = [{"text": t, "reward": round(r, 3), "vader": v} for t, r, v in list(scored)[:SHOWN]]
    return row


def subtract(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def share_of_different(items: list) -> float:
    return len(set(items)) / max(len(items), 1)


def mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {name: statistics.mean(values), f"{name}_se": error}


def write(results: list[dict], config: SamplerConfig, arguments: argparse.Namespace) -> None:
    arguments.results.mkdir(parents=True, exist_ok=True)
    about = {
        "settings": {
            "n": arguments.n,
            "seed": arguments.seed,
            "max_new_tokens": config.max_new_tokens,
            "steps": config.steps,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "guidance": config.guidance,
            "guidance_steps": config.guidance_steps,
            "guidance_lr": config.guidance_lr,
            "alg": config.alg,
        },
        "machine": {**provenance(torch.get_num_threads()), "transformers": transformers.__version__},
        "results": results,
    }
    (arguments.results / "demo_quality.json").write_text(json.dumps(about, indent=1) + "\n")
    columns = [name for name in results[0] if name != "samples"]
    with (arguments.results / "demo_quality.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in results:
            table.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    plot(results, arguments.results / "demo_quality.png")


def plot(results: list[dict], file: Path) -> None:
    """Reward, VADER and distinct-2 of every condition, with standard errors, for each prefix."""
    panels = {"reward": "reward", "vader": "VADER compound", "distinct_2": "distinct-2"}
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3), layout="constrained")
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for shift, prefix in zip((-0.2, 0.2), PREFIXES, strict=True):
            rows = [row for row in results if row["prefix"] == prefix]
            places = [i + shift for i in range(len(rows))]
            errors = [row.get(f"{column}_se", 0.0) for row in rows]
            axis.bar(
                places, [row[column] for row in rows], 0.4, yerr=errors, label=repr(prefix) if prefix else "no prefix"
            )
        axis.set_xticks(range(len(rows)), [row["condition"].replace("_", " ") for row in rows], fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
