"""What this package asks of itself on a GPU, as data: each entry judges one row of results against rows beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .results import Row, beside

# Rates that the targets name are those of this class of chips; elsewhere they are not asked for.
HOPPER = re.compile(r"\b(H100|H200|H800|GH200)\b")
EMBED_TFLOPS, UPDATE_TFLOPS = 650.0, 700.0


@dataclass(frozen=True)
class Context:
    """Rows of the same shape, by (operator, implementation), and the row that is judged."""

    row: Row
    others: dict[tuple[str, str], Row]

    def ms(self, operator: str | None = None, implementation: str = "entrgi") -> float | None:
        row = self.others.get((operator or str(self.row["operator"]), implementation))
        return None if row is None or row.get("median_ms") in (None, "") else float(row["median_ms"])

    def ms_beside(self, implementation: str) -> float:
        """Ours, as that one was timed."""
        other = self.others.get((str(self.row["operator"]), implementation), {})
        return beside(self.row, other.get("timing"))

    def number(self, name: str) -> float:
        return float(self.row.get(name) or 0.0)

    @property
    def on_hopper(self) -> bool:
        return HOPPER.search(str(self.row["device"])) is not None

    @property
    def half_table(self) -> bool:
        return self.row["embedding"] != "float32"

    @property
    def tflop(self) -> float:
        return 2e-12 * int(self.row["N"]) * int(self.row["V"]) * int(self.row["d"])


@dataclass(frozen=True)
class Verdict:
    target: str
    met: bool | None  # None: what it compares with was not measured


def _within(c: Context, limit: float, words: str) -> Verdict:
    return Verdict(words, c.number("median_ms") <= limit)


def vocabulary_pass(c: Context) -> list[Verdict]:
    kind = "copy bandwidth" if int(c.row["N"]) >= 512 else "a graph-replayed copy of as many bytes"
    return [_within(c, c.number("copy_ms") / 0.9, f">= 90 % of {kind}")]


def draw(c: Context) -> list[Verdict]:
    statistics = c.ms("logit_statistics")
    words = "the draw adds <= 35 %"
    return [Verdict(words, None) if statistics is None else _within(c, 1.35 * statistics, words)]


def embedding(c: Context) -> list[Verdict]:
    verdicts, rows = [], int(c.row["N"])
    if c.half_table and rows <= 64:
        verdicts.append(_within(c, c.number("copy_ms") / 0.85, ">= 85 % of copy bandwidth"))
    elif c.half_table and c.on_hopper:
        fast = 1e3 * c.tflop / EMBED_TFLOPS
        if rows >= 512:
            verdicts.append(_within(c, fast, f">= {EMBED_TFLOPS:.0f} TFLOP/s"))
        else:
            larger = max(c.number("copy_ms") / 0.85, fast)
            verdicts.append(_within(c, 1.25 * larger, "within 1.25x of the larger of bytes and FLOPs"))
    return [*verdicts, *ahead_of_two_passes(c)]


def ahead_of_two_passes(c: Context) -> list[Verdict]:
    two_pass = c.ms(implementation="two-pass")
    words = "faster than a plain product and one compiled pass"
    return [] if two_pass is None else [_within(c, two_pass, words)]


def update(c: Context) -> list[Verdict]:
    if not (c.half_table and c.on_hopper):
        return []
    moving, computing = c.number("copy_ms"), 1e3 * c.tflop / UPDATE_TFLOPS
    slower, faster = max(moving, computing), min(moving, computing)
    slack = 0.15 if slower >= 2 * faster else 0.35
    words = f"within {slack:.0%} of max(2 N V d / {UPDATE_TFLOPS:.0f} TFLOP/s, bytes)"
    return [_within(c, (1 + slack) * slower, words), *ahead_of_two_passes(c)]


def whole_step(c: Context) -> list[Verdict]:
    verdicts, products = [], c.number("gemm_ms")
    for name, times in (("published", 8), ("compiled", 3)):
        baseline, ours = c.ms(implementation=name), c.ms_beside(name)
        if baseline is None:
            verdicts.append(Verdict(f"against {name}", None))
        elif products < baseline / times:
            verdicts.append(Verdict(f">= {times}x over {name}", ours <= baseline / times))
        else:
            verdicts.append(
                _within(c, 1.3 * c.number("floor_ms"), f"<= 1.3x of the floor ({name} is near its products)")
            )
    composed = c.ms(implementation="composed")
    if composed is not None:
        verdicts.append(Verdict("ahead of composed", c.ms_beside("composed") <= composed))
    if c.row["peak_MiB"] not in (None, ""):
        n, v, d = (int(c.row[name]) for name in ("N", "V", "d"))
        # Moments, both embeddings, the largest workspace (the splits' partial sums: a multiple of N d that the launch
        # plan chooses with the splits, so it is taken from there), small change of the allocator.
        allowed = (2 * 4 * n * v + 2 * 4 * n * d) / 2**20 + c.number("workspace_MiB") + 2
        verdicts.append(Verdict("peak memory z + moments + O(N d)", c.number("peak_MiB") <= allowed))
    return verdicts


TARGETS: dict[str, Callable[[Context], list[Verdict]]] = {
    "logit_statistics": vocabulary_pass,
    "greedy": draw,
    "sample_tokens": draw,
    "relaxed_embedding": embedding,
    "logit_gradient": update,
    "adam_step_first": update,
    "adam_step_middle": update,
    "adam_step_last": update,
    "sgd_step": update,
    "adam_iteration": whole_step,
}


def judge(rows: list[Row]) -> None:
    """Fills ``target`` and ``met`` of this package's rows measured on a GPU."""
    others: dict[tuple, dict[tuple[str, str], Row]] = {}
    for row in rows:
        others.setdefault(_shape(row), {})[str(row["operator"]), str(row["implementation"])] = row
    for row in rows:
        if row["implementation"] != "entrgi" or row["kind"] != "cuda" or not row["median_ms"]:
            continue
        verdicts = TARGETS.get(str(row["operator"]), lambda _context: [])(Context(row, others[_shape(row)]))
        row["target"] = "; ".join(verdict.target for verdict in verdicts)
        row["met"] = "; ".join({True: "met", False: "MISSED", None: "open"}[verdict.met] for verdict in verdicts)


def _shape(row: Row) -> tuple:
    return (*(int(row[name]) for name in ("N", "V", "d")), row["logits"], row["embedding"])
