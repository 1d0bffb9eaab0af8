"""What must hold of counted launches."""

from __future__ import annotations

import re
from dataclasses import dataclass

from simulated_traffic.counting import Counted
from simulated_traffic.shapes import SIZES

# Kernels that read survivors of a data-dependent filter again: their traffic is not the plan's alone.
DEPENDS_ON_DATA = {("sample_tokens", "vocab_pass")}

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Exemption:
    """What is known of a kernel and tolerated up to a limit.

    ``what``: "coalescing", whose limit is the least share of the touched sectors' bytes; or "shared_load" or
    "shared_store", whose limit is the most wavefronts per CTA where conflicts are more than two-way.
    """

    kernel: str
    what: str
    limit: float
    why: str
    logits: tuple[str, ...] = (*HALVES, "float32")


HEAD = "thread 0 reads the head of a row, so that all vectors lie 16 bytes beside a line"
MERGE = "one merge of the warps' states of 32 bytes after the loop"
EXEMPTIONS = (
    Exemption("partial_kernel", "coalescing", 0.5, "eight logits per thread in two loads", ("float32",)),
    Exemption("partial_kernel", "coalescing", 0.94, HEAD, HALVES),
    Exemption("row_kernel", "coalescing", 0.94, HEAD, HALVES),
    Exemption("partial_kernel", "shared_load", 512, MERGE),
    Exemption("row_kernel", "shared_load", 512, MERGE),
    Exemption("vocab_pass_sm90_kernel", "shared_store", 640, "one exchange of the warps' sums after each loop"),
)


def complaints(c: Counted) -> list[str]:
    """What does not hold of the list at the head of this file; empty where all does."""
    return [*against_the_plan(c), *once(c), *hardware(c)]


def against_the_plan(c: Counted, tolerance: float = 0.02) -> list[str]:
    if (c.shape.operator, c.plan["kernel"]) in DEPENDS_ON_DATA:
        return []
    found, moved = [], sum(count for name, count in c.issued.items() if name != "flops")
    draws = c.shape.operator == "sample_tokens"
    for name, issued in c.issued.items():
        if name == "flops" and c.shape.embedding == "float32":
            continue  # ordinary multiply-adds are not told from other arithmetic
        planned = c.planned[name]
        # A few words beside the rest (a row's statistics where bulk copies bring the tiles) are not worth a formula.
        scale = planned if name == "flops" else max(planned, 0.1 * moved)
        # What survives the filter decides how many threads read the row's key; the plan states the most.
        missing = 0 if draws and name == "load_bytes" else planned - issued
        if max(issued - planned - read_again(c), missing) > tolerance * scale:
            found.append(f"{name}: issued {issued}, planned {planned}")
    return found


def read_again(c: Counted) -> int:
    """Bytes of the few rows of a draw that may be read twice: where a threshold cannot be told from its bound."""
    few = c.shape.N // 20 if c.shape.operator == "sample_tokens" else 0
    return few * c.shape.V * SIZES[c.shape.logits]


def once(c: Counted) -> list[str]:
    """Upper bounds of what is read, and what is written, if each tensor is touched as often as it should be.

    A bulk copy counts whole tiles, also where they stand out over the matrix and nothing is read.
    """
    s, found = c.shape, []
    block_m, block_n, block_k = (max(block, 1) for block in c.plan["tile"])
    z, scores, element = s.N * s.V * SIZES[s.logits], 4 * s.N * s.V, SIZES[s.embedding]
    rows = _round(s.N, block_m)
    per_row = s.N * (s.d * (element + 4) + 8)  # G and the soft embedding, or a hard row and the result
    if s.operator == "logit_statistics":
        # Beside z the partial results of the splits, and a sector for each warp of what the row has.
        reads, writes = z + s.N * (32 * c.plan["splits"] + 1024), None
    elif s.operator == "sample_tokens" and c.plan["kernel"] == "vocab_pass_sm90":
        # The row stays in shared memory; every warp reads sectors of its key.
        reads, writes = z + read_again(c) + s.N * 1024, None
    elif s.operator in ("gumbel_perturb", "logit_statistics_backward"):
        # Each warp reads up to seven words of the row, of a sector each.
        reads = z + 7 * c.plan["threads"] * c.plan["grid"]
        writes = scores if s.operator == "gumbel_perturb" else z
    elif s.operator == "relaxed_embedding":
        table = _round(s.V, block_k) * _round(s.d, block_n) * element
        partial = 4 * c.plan["splits"] * s.N * _round(s.d, 4)
        z = rows * _round(s.V, block_k) * SIZES[s.logits] if c.plan["kernel"] == "relaxed_embedding_sm90" else z
        reads = rows // block_m * table + _ceil(s.d, block_n) * z + partial + 3 * per_row + 8192 * len(c.launches)
        writes = None
    elif s.operator in ("logit_gradient", "adam_step_", "sgd_step_"):
        options, width = dict(s.options), _round(s.d, block_k)
        table, columns = _round(s.V, block_n) * width * element, _ceil(s.V, block_n)
        reads = rows // block_m * table + columns * rows * (width * element + 64) + z + 3 * per_row
        reads += 2 * scores if options.get("step", 1) > 1 else 0
        writes = scores if s.operator == "logit_gradient" else z
        writes += 2 * scores if s.operator == "adam_step_" and not options["last"] else 0
    else:
        return []
    if c.touched_by_loads > 1.02 * reads:
        found.append(f"reads {c.touched_by_loads} bytes, each tensor once would be {reads}")
    if writes is not None and not 0 <= c.stored - writes <= per_row:
        found.append(f"writes {c.stored} bytes, each tensor once would be {writes}, and {per_row} of workspace")
    return found


def hardware(c: Counted) -> list[str]:
    found = []
    for one in c.launches:
        name = kernel_name(one["kernel"])
        least = min([0.95, *limits(c, name, "coalescing")])
        if c.shape.aligned and not (share := coalescing(one)) >= least:
            found.append(f"{name}: {share:.2f} of the touched sectors' bytes are asked for")
        for kind in ("shared_load", "shared_store"):
            degree, wavefronts = one[f"{kind}_conflict_degree"], one[f"{kind}_wavefronts"]
            if degree > 2 and wavefronts > one["grid"][0] * max([0, *limits(c, name, kind)]):
                found.append(f"{name}: {degree}-way bank conflicts of {kind}")
        if one["ldmatrix_conflict_degree"] > 2:
            found.append(f"{name}: {one['ldmatrix_conflict_degree']}-way bank conflicts of ldmatrix")
    return found


def limits(c: Counted, kernel: str, what: str) -> list[float]:
    return [e.limit for e in EXEMPTIONS if (e.kernel, e.what) == (kernel, what) and c.shape.logits in e.logits]


def coalescing(one: dict) -> float:
    """Bytes asked for over bytes of the sectors touched, of all loads, stores and cp.async; at most 1 for each.

    A launch that touches a few sectors per block in all (a reduction, one number a row) counts as coalesced.
    """
    kinds = [
        (one["global_load_sectors"], min(one["global_load_efficiency"], 1.0)),
        (one["global_store_sectors"], min(one["global_store_efficiency"], 1.0)),
        (one["cp_async_sectors"], min(one["cp_async_bytes"] / 32 / max(one["cp_async_sectors"], 1), 1.0)),
    ]
    # Bulk copies are whole rows of sectors.
    kinds.append(((one["tma_load_bytes"] + one["tma_store_bytes"]) // 32, 1.0))
    sectors = sum(count for count, _ in kinds)
    if sectors <= 256 * one["grid"][0]:
        return 1.0
    return sum(count * efficiency for count, efficiency in kinds) / sectors


def _ceil(a: int, b: int) -> int:
    return -(-a // max(b, 1))


def _round(a: int, b: int) -> int:
    return _ceil(a, b) * b


def kernel_name(mangled: str) -> str:
    """The function's own name: the last of the nested names."""
    name, rest = mangled, mangled.removeprefix("_ZN")
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[len(match[1]) :][:length], rest[len(match[1]) + length :]
    return name
