"""What a draw of the vocabulary pass goes through on Hopper, and its instructions, counted in the CUDA simulator.

    python benchmarks/draw_statistics.py                       # results/draw_statistics.{csv,md}, some minutes
    python benchmarks/draw_statistics.py --before BINDINGS     # also of an older build's _bindings.so

No GPU is needed and nothing is timed. Rows of bf16 logits are drawn one at a time, at tau = 0.7 and top_p = 0.95:

- normal rows, N(0, sigma), and peaked rows (one id at 20 over N(-4, 2)), at V = 152,064 (Dream's) and V = 8,192;
- logits of the embedded pair's denoiser at several steps of a generation.

Each row takes one of these ways: its candidates are *pooled* in one CTA (*ranked* by counting at once if they are
128 or fewer), or searched in the *lists* of all CTAs (in *blocks*, where they do not fit those), or the guess failed
and the search has *fallen back* to all ids. It is *undecided* where the row's mass had to be added up exactly. The
current kernel counts this itself, in a build for this script (``ENTRGI_COUNT_DRAWS``); instructions are those of the
ordinary build. Of an older build only what the simulator counts of a launch is known: exponentials tell whether all
ids were searched, bytes whether the row was read twice; its pools and lists are one column.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import torch
from simulated_traffic.counting import Simulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.build_simulated import Unavailable, compiler, is_stale  # noqa: E402
from support.raw_kernels import RawKernels  # noqa: E402

OUTPUT = ROOT / "benchmarks" / "results" / "draw_statistics"
BUILD = "compute_90a"
TEMPERATURE, TOP_P = 0.7, 0.95
SCALES = (1, 2, 2.5, 2.75, 3, 3.5, 4, 6)
VOCABULARIES = (152_064, 8192)
STEPS = (0, 4, 8, 12)  # of a generation of 16 with the embedded pair
WAYS = ("ranked", "pooled", "lists", "blocks", "fallen back", "undecided")  # vocab_pass/cluster_draw.cuh, Event
COLUMNS = ("version", "logits", "V", "rows", "nucleus", *WAYS, "instructions per id", "at most")


def normal(scale: float, n: int, vocab: int) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(0)) * scale


def peaked(n: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z = normal(2, n, vocab) - 4
    z[torch.arange(n), torch.randint(vocab, (n,), generator=generator)] = 20.0
    return z


def of_the_pair(step: int, n: int) -> torch.Tensor:
    """Its logits at masked positions, after so many of 16 steps that commit the surest position each."""
    from entrgi.demo import load_denoiser

    model, tokenizer = load_denoiser()
    texts = ["The movie was", "I thought the plot", "The acting in this film", "What a"]
    ids = [tokenizer(text + " [MASK]" * 16, return_tensors="pt").input_ids[0] for text in texts]
    rows = []
    for tokens in ids:
        for _ in range(step):
            masked = (tokens == tokenizer.mask_token_id).nonzero()[:, 0]
            probability, token = model(input_ids=tokens[None]).logits[0, masked].softmax(dim=1).max(dim=1)
            best = probability.argmax()
            tokens[masked[best]] = token[best]
        rows.append(model(input_ids=tokens[None]).logits[0, tokens == tokenizer.mask_token_id])
    return torch.cat(rows)[:n]


def cases(rows: int):
    """Name and rows of each case; four times as many of the short ones."""
    for vocab in VOCABULARIES:
        n = rows if vocab == max(VOCABULARIES) else 4 * rows
        for scale in SCALES:
            yield f"N(0, {scale})", normal(scale, n, vocab)
        yield "peaked", peaked(n, vocab)
    for step in STEPS:
        yield f"embedded pair, step {step} of 16", of_the_pair(step, 4 * rows)


def counting_bindings(simulator: Simulator) -> Path:
    """The simulator's bindings with draws that count."""
    folder = ROOT / "build" / "sim" / f"{BUILD}-counting"
    folder.mkdir(parents=True, exist_ok=True)
    library, counting = folder / "_bindings.so", folder / "vocab_pass_sm90.cu.o"
    command, source = compiler(BUILD), ROOT / "csrc" / "kernels" / "vocab_pass" / "vocab_pass_sm90.cu"
    if is_stale(counting):
        listing = ["-MD", "-MF", f"{counting}.d"]
        subprocess.run([*command, "-DENTRGI_COUNT_DRAWS", *listing, "-c", source, "-o", counting], check=True)
    objects = simulator.bindings.parent.glob("*-*.o")
    objects = [path for path in objects if not path.name.endswith(f"-{counting.name}")]
    subprocess.run([*command, "-shared", *objects, counting, "-o", library], check=True)
    return library


def keys_of(n: int) -> torch.Tensor:
    keys = torch.zeros(n, 4, dtype=torch.long)
    keys[:, 3] = torch.arange(n)
    return keys


def each_row(simulator: Simulator, z: torch.Tensor):
    """What the simulator counted of a draw from each row."""
    before = len(simulator.statistics.read_text().splitlines())
    keys = keys_of(len(z))
    for i in range(len(z)):
        simulator.kernels.sample_tokens(z[i : i + 1], keys[i : i + 1], TEMPERATURE, TOP_P)
    return [json.loads(line) for line in simulator.statistics.read_text().splitlines()[before:]]


def nucleus(z: torch.Tensor) -> int:
    """The median number of ids that top-p keeps."""
    p = (z.float() / TEMPERATURE).softmax(dim=1).sort(dim=1, descending=True).values
    return int((p.cumsum(dim=1) - p <= TOP_P).sum(dim=1).median())


def counted(simulator: Simulator, draws: RawKernels | None, name: str, z: torch.Tensor) -> dict:
    """A row of the table; ``draws`` are the kernels that count, None for an older build."""
    n, vocab = z.shape
    launches = each_row(simulator, z)
    if draws is not None:
        flags = torch.zeros(1 + len(WAYS), dtype=torch.int32)
        draws.sample_tokens(z, keys_of(n), TEMPERATURE, TOP_P, error_flag=flags)
        ways = dict(zip(WAYS, flags[1:].tolist(), strict=True))
        # Rows whose blocks did not hold what was guessed are in two columns.
        ways["blocks"] = n - sum(ways[way] for way in ("ranked", "pooled", "lists", "fallen back"))
    else:
        # Two exponentials an id are the statistics'; one more is a mass of every id.
        all_ids = sum(one["ex2_count"] >= 2.9 * vocab for one in launches)
        again = sum(one["global_load_bytes"] >= 2 * vocab for one in launches)
        ways = {"pooled": n - all_ids, "fallen back": all_ids, "undecided": again}
    instructions = [32 * sum(one["warp_inst"].values()) / vocab for one in launches]
    return {
        "version": "before" if draws is None else "now",
        "logits": name,
        "V": vocab,
        "rows": n,
        "nucleus": nucleus(z),
        **{way: f"{ways[way] / n:.3f}" if way in ways else "" for way in WAYS},
        "instructions per id": f"{sum(instructions) / n:.1f}",
        "at most": f"{max(instructions):.1f}",
    }


def markdown(table: list[dict]) -> str:
    lines = [
        "# Draw statistics",
        "",
        "Written by `benchmarks/draw_statistics.py`, which says what the columns mean. Shares of rows; tau = 0.7,",
        "top_p = 0.95, bf16, one row a launch. `nucleus`: median number of ids kept. Instructions: PTX, warp",
        "instructions x 32 / V, whole kernel, mean and largest. `before` is inferred from what the simulator counts",
        "of a launch (its pool holds what was ranked, too), `now` is counted by the kernel. Rows of the embedded pair",
        "are its denoiser's logits at masked positions.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in table]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, help="an older build's bindings, for compute_90a")
    parser.add_argument("--rows", type=int, default=24, help="rows of each case at the larger V")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="path without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        simulator = Simulator(BUILD)
    except Unavailable as reason:
        sys.exit(f"CUDA kernels cannot be run here: {reason}")
    draws = RawKernels(counting_bindings(simulator), [simulator.prefix[0]], simulator.environment)
    older = None
    if arguments.before is not None:
        older = Simulator(BUILD)
        older.kernels.close()
        older.kernels = RawKernels(arguments.before, older.prefix, older.environment)
    table = []
    for name, z in cases(arguments.rows):
        logits = z.to(torch.bfloat16)
        if older is not None:
            table.append(counted(older, None, name, logits))
        table.append(counted(simulator, draws, name, logits))
        print(*table[-1].values(), flush=True)
    for each in (simulator, older, draws):
        if each is not None:
            each.close()
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    arguments.output.with_suffix(".md").write_text(markdown(table))


if __name__ == "__main__":
    main()
