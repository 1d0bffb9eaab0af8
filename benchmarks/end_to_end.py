"""Whole guided generations: entrgi against the published loop, same models, same settings.

    python benchmarks/end_to_end.py                   # benchmarks/results/end_to_end.{json,csv,png}
    python benchmarks/end_to_end.py --smoke           # seconds: tiny models, every code path of this script
    python benchmarks/end_to_end.py --readme          # the README's table from the last results
    python benchmarks/end_to_end.py --workloads dream-7b --steps 16 --no-checks --repeats 1 --output build/slice

First, with the random draws of the published loop (``published_loop.py``) replaced by those of entrgi's keys, both must
produce the same tokens over a whole generation in fp32; also without randomness (top_p = 0), where the published loop
runs as it is. Then both are timed as they are, taking turns: the published loop with ``torch.multinomial``, entrgi with
its keyed draws. A control row gives the published loop the matrix-product library that entrgi chooses for itself on
some processors (:mod:`entrgi.matmul`): what is left is owed to everything else. Where CUDA is present, a 7-billion
denoiser and a 1.7-billion reward with random weights are built on the device and timed too, entrgi also with CUDA
graphs and with compiled models.

Figures per row: wall seconds (median, least, most), processor seconds of the process, tokens per second, the split over
the parts of a step from one more run with :class:`entrgi.timing.Recorder`, and the peak of memory above the models:
on the CPU the growth of the resident set in a fresh process over two denoising steps (the first one is the
largest), on CUDA the allocator's peak of the timed runs. The reward's embedding by the denoiser's ids is part of it for
both: entrgi makes it in every generation where it is not the reward's own table, the published code when it loads its
models. Workloads that a run leaves out keep their rows in the file. ``--steps`` ends each generation after so many
steps, the first and largest ones, for a machine that is at hand for minutes only.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import published_loop
import random_pairs
import torch
import transformers
from provenance import provenance

import entrgi
from entrgi import SamplerConfig, SequenceClassifierReward, demo
from entrgi.denoisers import DreamDenoiser, MaskedLM
from entrgi.generation import derive_seeds
from entrgi.matmul import onednn_matmul
from entrgi.timing import Recorder

OUTPUT = Path(__file__).parent / "results" / "end_to_end"
# Spans of a step -> the columns of the split. What is in no span (host work between them) is "other".
PARTS = {
    "denoiser": ("denoiser",),
    "vocabulary": (
        *("sample_tokens", "logit_statistics", "relaxed_embedding", "logit_update"),
        *("vocabulary forward", "vocabulary backward"),
    ),
    "reward forward": ("reward forward",),
    "reward backward": ("reward backward",),
    "other": ("commit", "attention mask"),
}
SPLIT = (*PARTS, "set-up and score")
MODEL_PARTS = ("denoiser", "reward forward", "reward backward")


@dataclass(frozen=True)
class Pair:
    """The two models, in entrgi's adapters and as the published loop calls them; they share all weights."""

    denoiser: entrgi.denoisers.Denoiser
    reward: entrgi.rewards.Reward
    models: published_loop.Models
    prompt: str


def demo_pair(dtype: torch.dtype, device: str) -> Pair:
    """The embedded pair: DistilBERT denoiser and reward, V = 8,192."""
    (denoiser, words), (reward, reward_words) = demo.load_denoiser(dtype), demo.load_reward(dtype)
    return _pair(MaskedLM, denoiser.to(device), words, reward.to(device), reward_words, "The movie was")


def random_pair(
    shapes: tuple[random_pairs.Shape, random_pairs.Shape], words: int, prompt_words: int
) -> Callable[[torch.dtype, str], Pair]:
    """Builds a Dream-type denoiser and a Skywork-type reward of ``shapes``."""

    def build(dtype: torch.dtype, device: str) -> Pair:
        tokenizer = random_pairs.tokenizer(words)
        denoiser, reward = random_pairs.dream(shapes[0], dtype, device), random_pairs.skywork(shapes[1], dtype, device)
        return _pair(DreamDenoiser, denoiser, tokenizer, reward, tokenizer, random_pairs.prompt(prompt_words))

    return build


def _pair(kind: type, denoiser, tokenizer, reward, reward_tokenizer, prompt: str) -> Pair:
    attention = tuple(model.config._attn_implementation for model in (denoiser, reward))
    ours = kind(denoiser, tokenizer), SequenceClassifierReward(reward, reward_tokenizer)
    return Pair(*ours, published_loop.adapt(*ours, shift=kind is DreamDenoiser, attention=attention), prompt)


TINY_PAIR = random_pair((random_pairs.TINY_DREAM, random_pairs.TINY_SKYWORK), random_pairs.TINY_WORDS, 5)
SMALL_PAIR = random_pair((random_pairs.SMALL_DREAM, random_pairs.SMALL_SKYWORK), random_pairs.WORDS, 24)
LARGE_PAIR = random_pair((random_pairs.DREAM_7B, random_pairs.SKYWORK_1_7B), random_pairs.WORDS, 64)


@dataclass(frozen=True)
class Workload:
    """What is timed: B = 1 prompt, K = 4, M = 3, L = T = ``length``, otherwise the ``paper`` preset.

    Attributes:
        models: words for the table.
        target: how many times faster than the published loop entrgi should be; None where nothing is asked.
        taken: steps after which a generation ends; None: all of them.
    """

    models: str
    build: Callable[[torch.dtype, str], Pair]
    device: str
    dtype: torch.dtype
    length: int
    target: float | None
    repeats: int
    variants: tuple[str, ...] = ("published", "published, our products", "entrgi")
    taken: int | None = None

    def config(self, **options: object) -> SamplerConfig:
        return entrgi.preset("paper", **{"max_new_tokens": self.length, "steps": self.length, **options})


DEMO = "embedded pair (2 DistilBERT, 6 layers of 768)"
SMALL = "Dream-type, 2 layers of 256; Qwen3-type reward, 2 layers of 512; random"
LARGE = "Dream-7B and Skywork-1.7B shapes, random"
TINY = "tiny random"
GPU_VARIANTS = ("published", "entrgi", "entrgi cuda_graphs", "entrgi compile", "entrgi compile cuda_graphs")
WORKLOADS = {
    "demo": Workload(DEMO, demo_pair, "cpu", torch.float32, 16, 2.0, 5),
    "demo-32": Workload(DEMO, demo_pair, "cpu", torch.float32, 32, 2.0, 3),
    "demo-32-bf16": Workload(DEMO, demo_pair, "cpu", torch.bfloat16, 32, 2.0, 3, ("published", "entrgi")),
    "vocabulary": Workload(SMALL, SMALL_PAIR, "cpu", torch.float32, 8, 2.0, 3),
    "dream-7b": Workload(LARGE, LARGE_PAIR, "cuda", torch.bfloat16, 128, 3.0, 3, GPU_VARIANTS),
}
SMOKE = {
    "smoke": Workload(TINY, TINY_PAIR, "cpu", torch.float32, 4, None, 2),
    "smoke-cuda": Workload(TINY, TINY_PAIR, "cuda", torch.bfloat16, 8, None, 2, GPU_VARIANTS),
}


def available(workloads: dict[str, Workload]) -> dict[str, Workload]:
    """Those whose device is here."""
    return {name: w for name, w in workloads.items() if w.device == "cpu" or torch.cuda.is_available()}


# ---- equal tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Whole generations of both loops with the same draws."""

    models: str
    device: str
    draws: str
    trajectories: int
    length: int
    steps: int
    equal_tokens: int
    largest_reward_difference: float

    @property
    def equal(self) -> bool:
        return self.equal_tokens == self.trajectories * self.length


def check_equal(pair: Pair, models: str, config: SamplerConfig, seed: int, keyed: bool = True) -> Check:
    """Compare the tokens of both loops, fp32.

    Args:
        keyed: the published loop draws with entrgi's keys. Without, it runs as it is, which is deterministic for
            ``top_p`` 0; it must then not want to draw what entrgi forbids, such as the mask.
    """
    seeds = derive_seeds(seed, 1, config.num_return_sequences)
    ours = entrgi.generate(pair.prompt, pair.denoiser, pair.reward, config, trajectory_seeds=seeds)
    forbidden = published_loop.never_drawn(pair.models)
    draw = published_loop.KeyedDraw(config.top_p, config.top_k, seeds.flatten(), forbidden) if keyed else None
    published = published_loop.generate([pair.prompt], pair.models, config, draw=draw)
    (start, stop), tokens = ours.windows[0], published.responses[0].cpu()
    same = ours.sequences[0, :, start:stop] == tokens
    # entrgi scores the text up to the first end of sequence, the published loop all of it.
    comparable = same.all(dim=1) & ~(tokens == pair.models.eos_id).any(dim=1)
    difference = (ours.rewards[0] - published.rewards[0]).abs()[comparable]
    return Check(
        models=models,
        device=str(pair.models.device),
        draws="keyed" if keyed else "published (greedy)",
        trajectories=len(tokens),
        length=config.max_new_tokens,
        steps=config.steps,
        equal_tokens=int(same.sum()),
        largest_reward_difference=float(difference.max()) if len(difference) else float("nan"),
    )


def check_all(smoke: bool) -> list[Check]:
    """Every check; prints one line each.

    Raises:
        SystemExit: where a token differs.
    """
    checks = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        tiny = TINY_PAIR(torch.float32, device)
        config = entrgi.preset("paper", max_new_tokens=6, steps=6)
        checks += [check_equal(tiny, TINY, replace(config, top_p=p), seed=0) for p in (0.95, 0.0)]
        if smoke:
            continue
        pair, config = demo_pair(torch.float32, device), WORKLOADS["demo"].config()
        checks += [check_equal(pair, DEMO, config, seed) for seed in (0, 1)]
        checks.append(check_equal(pair, DEMO, replace(config, top_p=0.0), seed=0, keyed=False))
    if not smoke:
        # All of the vocabulary; the noise of the keys is slow in plain PyTorch, so few steps.
        pair = SMALL_PAIR(torch.float32, "cpu")
        checks.append(check_equal(pair, SMALL, entrgi.preset("paper", max_new_tokens=4, steps=4), seed=0))
    for check in checks:
        print(
            f"{'equal' if check.equal else 'DIFFERENT'}: {check.equal_tokens} of {check.trajectories * check.length} "
            f"tokens, {check.draws} draws, {check.device}, {check.models}"
        )
    if not all(check.equal for check in checks):
        sys.exit("entrgi and the published loop disagree: nothing was timed")
    return checks


# ---- time and memory -------------------------------------------------------------------------------------------


class _EnoughSteps(Exception):
    """Ends a generation."""


@dataclass
class _FirstSteps:
    """Ends a generation after the first ``most`` steps of its schedule.

    The published loop makes every one of them, and is counted by what it tells its recorder; entrgi skips those that
    commit nothing, and says which ones it made.
    """

    most: int
    recorder: Recorder | None = None
    open: list[str] = field(default_factory=list)
    made: int = 0

    def begin(self, name: str) -> None:
        self.open.append(name)
        if self.recorder is not None:
            self.recorder.begin(name)

    def end(self) -> None:
        if self.recorder is not None:
            self.recorder.end()
        if self.open.pop() == "step":
            self.made += 1
            self._enough(self.made)

    def after(self, state: entrgi.StepState) -> None:
        self._enough(state.step + 1)

    def _enough(self, steps: int) -> None:
        if steps >= self.most:
            raise _EnoughSteps


class Runner:
    """Runs the variants of a workload on one pair of models."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.pair = workload.build(workload.dtype, workload.device)
        self.compiled = False

    def run(
        self, variant: str, seed: int, recorder: Recorder | None = None, taken: int | None = None, **options: object
    ) -> None:
        """One generation, or the first ``taken`` steps of it.

        Compiled variants compile the shared models for good, so they come last.
        """
        config, taken = self.workload.config(**options), taken or self.workload.taken
        if "compile" in variant:
            self.compile()
        pair, part = self.pair, _FirstSteps(taken, recorder) if taken else None
        with suppress(_EnoughSteps):
            if variant.startswith("published"):
                products = onednn_matmul(pair.models.device) if "our products" in variant else nullcontext()
                with products:
                    published_loop.generate([pair.prompt], pair.models, config, seed=seed, recorder=part or recorder)
                return
            config = replace(config, cuda_graphs="cuda_graphs" in variant)
            after = part.after if part else None
            entrgi.generate(pair.prompt, pair.denoiser, pair.reward, config, seed=seed, callback_on_step_end=after)

    def compile(self) -> None:
        """Adapters that compile, around the same models."""
        if not self.compiled:
            denoiser, reward = self.pair.denoiser, self.pair.reward
            denoiser = type(denoiser)(denoiser.model, denoiser.tokenizer, compile=True)
            reward = type(reward)(reward.model, reward.tokenizer, compile=True)
            self.pair, self.compiled = replace(self.pair, denoiser=denoiser, reward=reward), True

    def held_bytes(self, variant: str) -> int:
        """What a variant keeps beside the models from before the generation on."""
        return self.pair.models.embeddings.nbytes if variant.startswith("published") else 0

    def timed(self, variant: str, seed: int) -> tuple[float, float]:
        """Wall seconds and processor seconds."""
        self.wait()
        start, cpu = time.perf_counter(), time.process_time()
        self.run(variant, seed)
        self.wait()
        return time.perf_counter() - start, time.process_time() - cpu

    def split(self, variant: str) -> dict[str, float] | None:
        """Seconds of a generation's parts, from a run of its own; None where graphs hide them."""
        if "cuda_graphs" in variant:
            return None
        self.wait()
        start = time.perf_counter()
        with Recorder(self.workload.device) as recorder:
            self.run(variant, 0, recorder if variant.startswith("published") else None)
        self.wait()
        total, spans = time.perf_counter() - start, Counter()
        for step in recorder.steps():
            spans["idle"] += step.idle
            for name, times in step.spans.items():
                spans[name] += times.total
        parts = {part: sum(spans.pop(name, 0.0) for name in names) for part, names in PARTS.items()}
        parts["other"] += sum(spans.values())
        parts["set-up and score"] = total - sum(parts.values())
        return parts

    def wait(self) -> None:
        if self.workload.device == "cuda":
            torch.cuda.synchronize()


@dataclass
class Measured:
    """The runs of one variant."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    prompt_tokens: int = 0
    parts: dict[str, float] | None = None


def measure(name: str, workload: Workload, repeats: int, threads: int) -> dict[str, Measured]:
    """Time all variants of a workload in turns; compiled ones by themselves afterwards."""
    runner = Runner(workload)
    encoded = runner.pair.denoiser.encode(runner.pair.prompt)
    prompt_tokens = len(encoded.prefix) + len(encoded.body)
    results = {variant: Measured(prompt_tokens=prompt_tokens) for variant in workload.variants}
    turns = [[v for v in workload.variants if "compile" not in v]]
    turns += [[v] for v in workload.variants if "compile" in v]
    for variants in turns:
        for repeat in range(repeats + 1):  # the first one warms up
            for variant in variants:
                if workload.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    models = torch.cuda.memory_allocated()
                wall, cpu = runner.timed(variant, repeat)
                print(f"{name}: {variant}: {wall:.2f} s{'' if repeat else ' (warm-up)'}", flush=True)
                if repeat > 0:
                    results[variant].seconds.append(wall)
                    results[variant].cpu_seconds.append(cpu)
                    if workload.device == "cuda":
                        peak = torch.cuda.max_memory_allocated() - models + runner.held_bytes(variant)
                        results[variant].peak_bytes = max(results[variant].peak_bytes or 0, peak)
        for variant in variants:
            results[variant].parts = runner.split(variant)
    del runner
    gc.collect()
    if workload.device == "cpu":
        for variant, result in results.items():
            result.peak_bytes = peak_in_fresh_process(name, variant, threads)
    return results


def resident_bytes(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")


def peak_bytes(workload: Workload, variant: str) -> int:
    """Growth of the resident set over two denoising steps. Run it in a fresh process (Linux)."""
    runner = Runner(workload)
    runner.run(variant, 0, max_new_tokens=2, steps=2, num_return_sequences=1)  # loads code, starts threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    runner.run(variant, 0, steps=2)
    return resident_bytes("VmHWM") - before + runner.held_bytes(variant)


def peak_in_fresh_process(name: str, variant: str, threads: int) -> int | None:
    """:func:`peak_bytes`; None where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--threads", str(threads), "--peak-of", name, variant]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"peak memory of {name}, {variant}: {run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


# ---- results ---------------------------------------------------------------------------------------------------


def rows_of(name: str, workload: Workload, results: dict[str, Measured], about: dict[str, object]) -> list[dict]:
    """One row per variant, the JSON's and the CSV's."""
    config = workload.config()
    tokens = config.num_return_sequences * config.max_new_tokens
    published = results["published"]
    rows = []
    for variant, result in results.items():
        seconds = statistics.median(result.seconds)
        rows.append(
            {
                "workload": name,
                "variant": variant,
                "models": workload.models,
                "on": workload.device,
                "dtype": str(workload.dtype).removeprefix("torch."),
                "prompt_tokens": result.prompt_tokens,
                "K": config.num_return_sequences,
                "L": config.max_new_tokens,
                "T": config.steps,
                "M": config.guidance_steps,
                "steps": workload.taken or config.steps,
                "runs": len(result.seconds),
                "median_s": round(seconds, 3),
                "least_s": round(min(result.seconds), 3),
                "most_s": round(max(result.seconds), 3),
                "cpu_median_s": round(statistics.median(result.cpu_seconds), 3),
                "s_per_step": round(seconds / (workload.taken or config.steps), 4),
                "tokens_per_s": None if workload.taken else round(tokens / seconds, 2),
                "speedup": round(statistics.median(published.seconds) / seconds, 2),
                "cpu_speedup": round(
                    statistics.median(published.cpu_seconds) / statistics.median(result.cpu_seconds), 2
                ),
                "target": None if variant.startswith("published") else workload.target,
                "peak_MiB": None if result.peak_bytes is None else round(result.peak_bytes / 2**20, 1),
                "model_share": model_share(result.parts),
                **{f"{part}_s": None if result.parts is None else round(result.parts[part], 3) for part in SPLIT},
                **about,
            }
        )
    return rows


def machine(workload: Workload, threads: int) -> dict[str, object]:
    """Provenance, with the GPU where the workload runs on one."""
    about = provenance(threads)
    if workload.device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        about["device"] = f"{torch.cuda.get_device_name()} (sm {capability}), CUDA {torch.version.cuda}"
    return {**about, "transformers": transformers.__version__}


def verdicts(rows: list[dict]) -> list[str]:
    """One sentence per workload: the best entrgi variant against the target, and its memory.

    A target that is missed comes with what it would take: the share of the time that the models' own passes have,
    and the speed-up if everything else took none.
    """
    sentences = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        chosen = [row for row in rows if row["workload"] == name]
        published, ours = chosen[0], [row for row in chosen if not row["variant"].startswith("published")]
        best = max(ours, key=lambda row: row["speedup"])
        sentence = f"{name}: {best['variant']} is {best['speedup']}x the published loop"
        for control in chosen[1:]:
            if control["variant"].startswith("published"):
                sentence += f" ({control['median_s'] / best['median_s']:.2f}x with our matrix products in it)"
        if best["target"] is not None:
            met = best["speedup"] >= best["target"]
            sentence += f", target {best['target']:g}x: {'met' if met else 'MISSED'}"
            if not met and best["model_share"]:
                most = published["median_s"] / (best["model_share"] * best["median_s"])
                sentence += f" ({best['model_share']:.0%} is the models' own passes; {most:.1f}x without all else)"
        if best["peak_MiB"] is not None:
            word = "lower" if best["peak_MiB"] < published["peak_MiB"] else "NOT LOWER"
            sentence += f"; peak memory {best['peak_MiB']:.0f} against {published['peak_MiB']:.0f} MiB: {word}"
        sentences.append(sentence)
    return sentences


def model_share(parts: dict[str, float] | None) -> float | None:
    """Share of denoiser, reward forward and backward in a generation."""
    if parts is None:
        return None
    return round(sum(parts[name] for name in MODEL_PARTS) / sum(parts.values()), 3)


def readme_table(rows: list[dict]) -> str:
    """The README's table, in Markdown."""
    lines = [
        "| models | dtype | prompt | L = T | variant | seconds | published | **speed-up** | target | MiB / published |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["variant"] == "published":
            published = row
            continue
        target = "" if row["target"] is None else f"{row['target']:g}x"
        memory = "" if row["peak_MiB"] is None else f"{row['peak_MiB']:.0f} / {published['peak_MiB']:.0f}"
        cells = [
            *(f"{row['models']} ({row['on'].upper()})", row["dtype"], row["prompt_tokens"], row["L"], row["variant"]),
            *(f"{row['median_s']:.1f}", f"{published['median_s']:.1f}", f"**{row['speedup']:.1f}x**", target, memory),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def others(output: Path, workloads: dict[str, Workload]) -> list[dict]:
    """Rows of earlier runs of other workloads, which may come from another machine."""
    file = output.with_suffix(".json")
    rows = json.loads(file.read_text())["results"] if file.exists() else []
    return [row for row in rows if row["workload"] not in workloads]


def write(checks: list[Check], rows: list[dict], output: Path) -> None:
    """``output`` with the suffixes .json, .csv and .png."""
    output.parent.mkdir(parents=True, exist_ok=True)
    equal = [{**vars(check), "equal": check.equal} for check in checks]
    about = {"equal_tokens": equal, "verdicts": verdicts(rows), "results": rows}
    output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    with output.with_suffix(".csv").open("w", newline="") as file:
        # Rows of earlier runs may lack what later ones have.
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    plot(rows, output.with_suffix(".png"))


def plot(rows: list[dict], file: Path) -> None:
    """The parts of a generation, stacked, for every workload and variant that has them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(max(6.0, 4.2 * len(names)), 3.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        chosen = [row for row in rows if row["workload"] == name]
        for place, row in enumerate(chosen):
            left, split = 0.0, [row[f"{part}_s"] for part in SPLIT]
            # The split comes from one more run: shares of it, scaled to the median of the timed runs.
            scale = row["median_s"] / sum(split) if None not in split else 0.0
            for colour, (part, seconds) in enumerate(zip(SPLIT, split, strict=True)):
                width = row["median_s"] if scale == 0.0 and colour == 0 else (seconds or 0.0) * scale
                shade = "lightgray" if scale == 0.0 else f"C{colour}"
                axis.barh(place, width, left=left, color=shade, label=part if place == 0 else None)
                left += width
            axis.text(left, place, f" {row['median_s']:.1f} s ({row['speedup']:.1f}x)", va="center", fontsize=8)
        axis.set_yticks(range(len(chosen)), [row["variant"] for row in chosen], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.35 * max(row["median_s"] for row in chosen))
        axis.set_xlabel("seconds", fontsize=8)
        axis.set_title(f"{name} ({chosen[0]['on']}, {chosen[0]['dtype']}, L = T = {chosen[0]['L']})", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SPLIT), fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        name, variant = arguments.peak_of
        print(peak_bytes({**WORKLOADS, **SMOKE}[name], variant))
        return
    if arguments.readme:
        print(readme_table(json.loads(arguments.output.with_suffix(".json").read_text())["results"]))
        return
    workloads = available(SMOKE if arguments.smoke else WORKLOADS)
    if arguments.workloads:
        workloads = {name: workloads[name] for name in arguments.workloads}
    if arguments.steps:
        workloads = {name: replace(w, taken=arguments.steps, target=None) for name, w in workloads.items()}
    if arguments.smoke and arguments.output == OUTPUT:
        arguments.output = Path(tempfile.mkdtemp()) / OUTPUT.name
    checks, rows = [] if arguments.no_checks else check_all(arguments.smoke), others(arguments.output, workloads)
    for name, workload in workloads.items():
        about = machine(workload, arguments.threads)
        results = measure(name, workload, arguments.repeats or workload.repeats, arguments.threads)
        rows += rows_of(name, workload, results, about)
        write(checks, rows, arguments.output)  # after each, so that an interrupted run leaves what it has
    print(readme_table(rows), *verdicts(rows), f"written to {arguments.output}.{{json,csv,png}}", sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, *SMOKE], help="all that this machine can run")
    parser.add_argument("--repeats", type=int, help="timed runs of each variant (3 to 5, by workload)")
    parser.add_argument("--steps", type=int, help="of each generation; default: all")
    parser.add_argument("--no-checks", action="store_true", help="do not compare tokens first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny models, seconds")
    parser.add_argument("--readme", action="store_true", help="print the README's table from the results at --output")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="path without suffix")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps is not None:
        if arguments.steps < 1:
            parser.error(f"--steps must be at least 1, got {arguments.steps}")
        if arguments.output == OUTPUT and not arguments.smoke:
            parser.error("--steps: give --output, parts of generations are not the results of whole ones")
    return arguments


if __name__ == "__main__":
    main()
