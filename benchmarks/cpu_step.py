"""One Adam step's vocabulary work on the CPU: ours against PyTorch, in one interleaved run.

The work: statistics, a top-p draw, the relaxed embedding, and the Adam ascent step from the reward model's
gradient G (given here, so that no reward model is timed). Variants:

- ``entrgi``: sample_tokens, relaxed_embedding_, adam_step_.
- ``eager``: the published algorithm in PyTorch eager (softmax, log(p + 1e-10), sort-based top-p, multinomial,
  matmul, autograd, torch.optim.Adam).
- ``composed``: the strongest composition of PyTorch calls we know (logsumexp, one sort, inverse-CDF draw, manual
  gradient in place, fused Adam).
- ``gemms``: the two matrix products alone, the floor for anyone who uses the same BLAS.

Writes ``results/cpu_step.{csv,json,png}``. Peak memory is the high-water mark of the resident set in a fresh process
over its value with the inputs (z, E, G) in place; the two moments, of z's size each, are part of it.

    python benchmarks/cpu_step.py --threads 2
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEMPERATURE, TOP_P, LR, BETAS, EPS = 0.7, 0.95, 0.5, (0.9, 0.999), 1e-8


class Inputs:
    """z [N, V], E [V, d] and G [N, d], fp32. Logits of spread 3 leave some thousand ids in the nucleus."""

    def __init__(self, rows: int, vocabulary: int, width: int):
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(rows, vocabulary, generator=generator).mul_(3.0)
        self.embedding = torch.randn(vocabulary, width, generator=generator)
        self.grad = torch.randn(rows, width, generator=generator).mul_(1e-3)


class Entrgi:
    def __init__(self, inputs: Inputs):
        import entrgi_ext

        self.ops = entrgi_ext
        self.z, self.e, self.g = inputs.logits.clone(), inputs.embedding, inputs.grad
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.z), torch.zeros_like(self.z)
        self.output, self.soft = torch.empty_like(self.g), torch.empty_like(self.g)
        self.keys = torch.zeros(len(self.z), 4, dtype=torch.long)
        self.keys[:, 3] = torch.arange(len(self.z))
        self.sample = None

    def draw(self) -> None:
        self.sample = self.ops.sample_tokens(self.z, self.keys, TEMPERATURE, TOP_P)

    def embed(self) -> None:
        sample, weight = self.sample, self.sample.entropy / math.log(self.z.shape[1])
        self.ops.relaxed_embedding_(
            self.output,
            self.soft,
            self.z,
            sample.logsumexp,
            self.e,
            TEMPERATURE,
            hard_tokens=sample.token,
            weight=weight,
        )

    def update(self) -> None:
        self.ops.adam_step_(
            self.z,
            self.exp_avg,
            self.exp_avg_sq,
            self.g,
            self.sample.logsumexp,
            self.e,
            self.soft,
            TEMPERATURE,
            lr=LR,
            step=2,
        )

    def parts(self) -> dict[str, Callable[[], None]]:
        return {"statistics and draw": self.draw, "embedding": self.embed, "update": self.update}


class Eager:
    """The published algorithm."""

    def __init__(self, inputs: Inputs):
        self.z = inputs.logits.clone().requires_grad_()
        self.e, self.g = inputs.embedding, inputs.grad
        self.adam = torch.optim.Adam([self.z], lr=LR, betas=BETAS, eps=EPS)

    def step(self) -> None:
        z, e = self.z, self.e
        p = torch.softmax(z.detach(), dim=-1)
        weight = (-(p * torch.log(p + 1e-10)).sum(dim=-1) / math.log(z.shape[1]))[:, None]
        q = torch.softmax(z / TEMPERATURE, dim=-1)
        soft = q @ e
        with torch.no_grad():
            scaled = z / TEMPERATURE
            ranked, order = torch.sort(scaled, descending=True)
            remove = torch.cumsum(torch.softmax(ranked, dim=-1), dim=-1) > TOP_P
            remove[:, 1:] = remove[:, :-1].clone()
            remove[:, 0] = False
            scaled = scaled.masked_fill(remove.scatter(1, order, remove), -math.inf)
            token = torch.multinomial(torch.softmax(scaled, dim=-1), 1)[:, 0]
            hard = e[token]
        output = soft + (weight * (hard - soft)).detach()
        self.adam.zero_grad()
        (-(output * self.g).sum()).backward()
        self.adam.step()

    def parts(self) -> dict[str, Callable[[], None]]:
        return {"all": self.step}


class Composed:
    """PyTorch at its best: nothing computed twice, in place where it can be, no autograd."""

    def __init__(self, inputs: Inputs):
        self.z, self.e, self.g = inputs.logits.clone(), inputs.embedding, inputs.grad
        self.z.grad = torch.zeros_like(self.z)
        self.adam = torch.optim.Adam([self.z], lr=LR, betas=BETAS, eps=EPS, maximize=True, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        z, e, g = self.z, self.e, self.g
        log_p = z.log_softmax(dim=-1)
        weight = (-torch.linalg.vecdot(log_p.exp(), log_p) / math.log(z.shape[1]))[:, None]
        q = torch.softmax(z.div(TEMPERATURE), dim=-1, dtype=torch.float32)
        soft = q @ e
        ranked, order = torch.sort(q, dim=-1, descending=True)
        cumulative = ranked.cumsum(dim=-1)
        kept = (cumulative - ranked <= TOP_P).sum(dim=-1, keepdim=True)
        u = torch.rand(len(z), 1) * cumulative.gather(1, kept - 1)
        rank = torch.searchsorted(cumulative, u).clamp_(max=z.shape[1] - 1)
        hard = e[order.gather(1, rank)[:, 0]]
        soft.lerp(hard, weight)
        inner = torch.mm(g, e.T, out=self.z.grad)
        inner.sub_((g * soft).sum(dim=-1, keepdim=True)).mul_(q).div_(TEMPERATURE)
        self.adam.step()

    def parts(self) -> dict[str, Callable[[], None]]:
        return {"all": self.step}


class Gemms:
    def __init__(self, inputs: Inputs):
        self.q, self.e, self.g = inputs.logits, inputs.embedding, inputs.grad
        self.output, self.inner = torch.empty_like(self.g), torch.empty_like(self.q)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "q E": lambda: torch.mm(self.q, self.e, out=self.output),
            "G E^T": lambda: torch.mm(self.g, self.e.T, out=self.inner),
        }


VARIANTS = {"entrgi": Entrgi, "composed": Composed, "eager": Eager, "gemms": Gemms}


def measure(rows: int, vocabulary: int, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part of each variant, the variants taking turns."""
    inputs = Inputs(rows, vocabulary, width)
    parts = {name: make(inputs).parts() for name, make in VARIANTS.items()}
    times: dict[str, dict[str, list[float]]] = {v: {p: [] for p in ps} for v, ps in parts.items()}
    for repeat in range(repeats + 1):  # the first one warms up
        for variant, calls in parts.items():
            for part, call in calls.items():
                start = time.perf_counter()
                call()
                if repeat > 0:
                    times[variant][part].append(1e3 * (time.perf_counter() - start))
    return {v: {p: statistics.median(t) for p, t in ps.items()} for v, ps in times.items()}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def peak_bytes(variant: str, rows: int, vocabulary: int, width: int) -> int:
    """In this process: the high-water mark of two steps over the inputs. Run it in a fresh one."""
    tiny = VARIANTS[variant](Inputs(2, 64, 16)).parts()  # loads code, starts threads
    for call in tiny.values():
        call()
    inputs = Inputs(rows, vocabulary, width)
    torch.mm(inputs.logits[:, :4096], inputs.embedding[:4096])  # the BLAS's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    copied = inputs.logits.nbytes  # each variant works on its own copy of z
    calls = VARIANTS[variant](inputs).parts()
    for _ in range(2):
        for call in calls.values():
            call()
    return resident_bytes("VmHWM") - before - copied


def peak_in_fresh_process(variant: str, rows: int, vocabulary: int, width: int, threads: int) -> int:
    shape = f"{variant},{rows},{vocabulary},{width}"
    command = [sys.executable, __file__, "--threads", str(threads), "--peak-of", shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({row["V"] for row in results})
    colours = {"statistics and draw": "tab:green", "embedding": "tab:blue", "update": "tab:orange"}
    colours |= {"q E": "tab:blue", "G E^T": "tab:orange"}
    order = ["gemms", "entrgi", "composed", "eager"]
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 3.6), squeeze=False)
    for axis, vocabulary in zip(axes[0], shapes, strict=True):
        rows, longest = [row for row in results if row["V"] == vocabulary], 0.0
        for position, variant in enumerate(order):
            left = 0.0
            for row in (row for row in rows if row["variant"] == variant and row["part"] != "total"):
                axis.barh(position, row["median_ms"], left=left, color=colours.get(row["part"], "tab:gray"))
                left += row["median_ms"]
            axis.text(left, position, f" {left:.0f} ms", va="center")
            longest = max(longest, left)
        axis.set_yticks(range(len(order)), order)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * longest)
        axis.legend(
            [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in list(colours.values())[:3]],
            ["statistics and draw", "embedding, q E", "update, G E^T"],
            loc="upper right",
            fontsize=8,
        )
        axis.set_xlabel("ms per Adam step (vocabulary work)")
        axis.set_title(f"N = {rows[0]['N']}, V = {vocabulary}, d = {rows[0]['d']}, fp32", fontsize=10)
    figure.suptitle(f"{results[0]['device']}, {results[0]['threads']} threads", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[30522, 151936])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_step", help="path without suffix")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        variant, *shape = options.peak_of.split(",")
        print(peak_bytes(variant, *map(int, shape)))
        return

    results: list[dict] = []
    for vocabulary in options.vocabularies:
        shape = (options.rows, vocabulary, options.width)
        times = measure(*shape, options.repeats)
        totals = {variant: sum(parts.values()) for variant, parts in times.items()}
        for variant, parts in times.items():
            peak = None
            if variant != "gemms":
                peak = peak_in_fresh_process(variant, *shape, options.threads) / 2**20
            for part, median in {**parts, "total": totals[variant]}.items():
                results.append(
                    {
                        "variant": variant,
                        "part": part,
                        "N": options.rows,
                        "V": vocabulary,
                        "d": options.width,
                        "logits": "float32",
                        "embedding": "float32",
                        "median_ms": round(median, 2),
                        "speedup_over_eager": round(totals["eager"] / totals[variant], 2) if part == "total" else None,
                        "peak_MiB": round(peak, 1) if part == "total" and peak is not None else None,
                        "moments_MiB": round(2 * options.rows * vocabulary * 4 / 2**20, 1),
                        **provenance(options.threads),
                    }
                )
                row = results[-1]
                print(
                    f"V = {vocabulary:6d}  {variant:9s} {part:20s} {row['median_ms']:9.1f} ms"
                    f"  {row['speedup_over_eager'] or '':>6}  {row['peak_MiB'] or '':>8}"
                )

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
