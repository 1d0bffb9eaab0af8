"""What our CUDA kernels ask of the memory system and of the arithmetic units, counted in the CUDA simulator.

    python benchmarks/simulated.py                  # results/simulated.{csv,md}, a few minutes; make bench-simulated

No GPU is needed and nothing is timed: the compiled kernels run on small shapes, for both builds (``compute_80`` and
``compute_90a``), and every launch is counted. The sums over an operator's launches are held against three things:

- *the plan*: the bytes and FLOPs that ``_bindings.requests`` says its kernels issue, within 2 %;
- *once*: z is read once by the statistics, E once per tile of rows by the two products, z and Adam's moments are read
  and written once by the update;
- *the hardware*: accesses coalesced (95 % of the bytes of the sectors touched are asked for) where rows are aligned,
  and no bank conflicts above two-way where shared memory is used more than in passing.

Beside them stands the floor (``_bindings.floor``): bytes that must cross the memory bus. Issued bytes may exceed it:
what several CTAs read of E or z comes from the L2 cache.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
from build_simulated import Unavailable, build_bindings, simulator_command  # noqa: E402
from raw_kernels import RawKernels  # noqa: E402

OUTPUT = ROOT / "benchmarks" / "results" / "simulated"
BUILDS = {"compute_80": 80, "compute_90a": 90}
TEMPERATURE, TOP_P, STEP = 0.7, 0.95, 2
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SM_COUNT = 132  # of the simulated device
# Kernels that read survivors of a data-dependent filter again: their traffic is not the plan's alone.
DEPENDS_ON_DATA = {("sample_tokens", "vocab_pass")}

# Kernels whose accesses are known not to coalesce.
KNOWN = {
    "partial_kernel": "reads eight fp32 logits per thread in two loads; see row_kernel",
    "row_kernel": "thread 0 reads the head of a row, so that all vectors lie 16 bytes beside a line",
}


@dataclass(frozen=True)
class Shape:
    """One call of an operator; ``options`` are step and last of ``adam_step_``."""

    operator: str
    N: int
    V: int
    d: int = 1
    logits: str = "bfloat16"
    embedding: str = "bfloat16"
    options: tuple[tuple[str, object], ...] = ()

    @property
    def aligned(self) -> bool:
        """Whether rows of z and E start at 16-byte boundaries."""
        return self.V * SIZES[self.logits] % 16 == 0 and (self.d == 1 or self.d * SIZES[self.embedding] % 16 == 0)

    def __str__(self) -> str:
        last = dict(self.options)
        extra = "".join(f" {name}={value}" for name, value in last.items())
        return f"{self.operator}{extra} N={self.N} V={self.V} d={self.d} {self.logits}/{self.embedding}"


def adam(n: int, v: int, d: int, step: int = STEP, last: bool = False, **dtypes: str) -> Shape:
    return Shape("adam_step_", n, v, d, **dtypes, options=(("step", step), ("last", last)))


FP32 = {"logits": "float32", "embedding": "float32"}
MIXED = {"logits": "float32"}
SHAPES = (
    *(Shape("logit_statistics", n, v) for n, v in ((1, 61_440), (8, 61_440), (8, 20_001), (150, 16_384))),
    Shape("logit_statistics", 8, 20_000, **MIXED),
    *(Shape("sample_tokens", n, v) for n, v in ((1, 61_440), (8, 61_440), (150, 16_384))),
    Shape("gumbel_perturb", 4, 20_000),
    *(Shape("relaxed_embedding", n, v, d) for n, v, d in ((1, 16_384, 256), (16, 16_384, 256), (64, 8192, 512))),
    *(Shape("relaxed_embedding", n, v, d) for n, v, d in ((128, 8192, 256), (300, 4096, 512), (17, 8191, 264))),
    Shape("relaxed_embedding", 64, 8192, 256, **MIXED),
    Shape("relaxed_embedding", 16, 4096, 256, **FP32),
    *(Shape("logit_gradient", n, v, d) for n, v, d in ((8, 8192, 256), (300, 4096, 256))),
    *(adam(n, 8192, 256) for n in (1, 16, 64)),
    *(adam(300, 4096, 512, step, last) for step, last in ((1, False), (2, False), (2, True), (1, True))),
    adam(17, 8191, 264),
    adam(64, 8192, 256, **MIXED),
    adam(16, 4096, 256, **FP32),
    Shape("sgd_step_", 64, 8192, 256),
)


@dataclass
class Counted:
    """A shape's launches on one build, as the simulator counted them, what was planned and the floor."""

    shape: Shape
    build: str
    plan: dict
    launches: list[dict]
    planned: dict | None = None
    floor: dict = field(default_factory=dict)

    def total(self, *names: str) -> int:
        return sum(launch[name] for launch in self.launches for name in names)

    @property
    def issued(self) -> dict[str, int]:
        """As ``_bindings.requests`` names them."""
        return {
            "load_bytes": self.total("global_load_bytes", "cp_async_bytes"),
            "bulk_bytes": self.total("tma_load_bytes", "tma_store_bytes"),
            "store_bytes": self.total("global_store_bytes"),
            "flops": self.total("mma_flop", "wgmma_flop"),
        }

    @property
    def touched_by_loads(self) -> int:
        """Bytes that are asked for, of each launch; by sectors where that is less, as a word for a whole warp is."""
        by_threads = sum(min(one["global_load_bytes"], 32 * one["global_load_sectors"]) for one in self.launches)
        return by_threads + self.total("cp_async_bytes", "tma_load_bytes")

    @property
    def stored(self) -> int:
        return self.total("global_store_bytes", "tma_store_bytes")


class Simulator:
    """Runs shapes on one build; close it afterwards.

    Raises:
        Unavailable: the simulator, nvcc or a header it needs is not on this machine.
    """

    def __init__(self, build: str):
        command, environment = simulator_command()
        self.build, self.bindings, self.environment = build, build_bindings(build), environment
        self.folder = tempfile.TemporaryDirectory()
        self.statistics = Path(self.folder.name) / "launches.jsonl"
        self.statistics.touch()
        self.prefix = [command[0], "--stats", str(self.statistics)]  # without --check, which takes several times longer
        self.kernels = RawKernels(self.bindings, self.prefix, environment)

    def count(self, shape: Shape) -> Counted:
        before = len(self.statistics.read_text().splitlines())
        launch(self.kernels, shape)
        lines = self.statistics.read_text().splitlines()[before:]
        return Counted(shape, self.build, self.kernels.plan, [json.loads(line) for line in lines])

    def ask(self, counted: list[Counted]) -> None:
        """Fills in plan requests and floors, in a process of its own that holds the same bindings."""
        questions = [
            {
                "shape": [c.shape.operator, c.shape.N, c.shape.V, c.shape.d, c.shape.logits, c.shape.embedding],
                "options": dict(c.shape.options),
                "device": {"arch": BUILDS[self.build], "num_sms": SM_COUNT},
                "alignment": {} if c.shape.aligned else {"logits_aligned": False},
            }
            for c in counted
        ]
        command = [self.prefix[0], sys.executable, "-c", ASK, str(self.bindings)]
        run = subprocess.run(
            command, input=json.dumps(questions), capture_output=True, text=True, env=self.environment, check=True
        )
        for each, answer in zip(counted, ast.literal_eval(run.stdout), strict=True):
            each.floor, each.planned = answer["floor"], answer["requests"]

    def close(self) -> None:
        self.kernels.close()
        self.folder.cleanup()


ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_bindings", sys.argv[1])
b = importlib.util.module_from_spec(spec)
spec.loader.exec_module(b)
answers = []
for q in json.load(sys.stdin):
    answer = {"floor": b.floor(*q["shape"], **q["options"]), "requests": None}
    if hasattr(b, "requests"):
        answer["requests"] = b.requests(*q["shape"], **q["options"], **q["device"], **q["alignment"])
    answers.append(answer)
print(answers)
"""


def launch(kernels: RawKernels, shape: Shape) -> None:
    """One call on random inputs."""
    torch.manual_seed(0)
    n, v, d = shape.N, shape.V, shape.d
    z = torch.randn(n, v).mul_(3.0).to(getattr(torch, shape.logits))
    keys = torch.zeros(n, 4, dtype=torch.long)
    keys[:, 3] = torch.arange(n)
    if shape.operator == "logit_statistics":
        kernels.logit_statistics(z, TEMPERATURE)
        return
    if shape.operator == "sample_tokens":
        kernels.sample_tokens(z, keys, TEMPERATURE, TOP_P)
        return
    if shape.operator == "gumbel_perturb":
        kernels.gumbel_perturb(z, keys, TEMPERATURE)
        return
    lse = (z.float() / TEMPERATURE).logsumexp(dim=1)
    e = torch.randn(v, d).to(getattr(torch, shape.embedding))
    if shape.operator == "relaxed_embedding":
        kernels.relaxed_embedding(z, lse, e, torch.randint(v, (n,)), torch.rand(n), TEMPERATURE)
        return
    g, soft = torch.randn(n, d).to(e.dtype), torch.randn(n, d)
    inputs = (g, z, lse, e, soft, None, TEMPERATURE)
    if shape.operator == "logit_gradient":
        kernels.logit_gradient(*inputs)
    elif shape.operator == "sgd_step_":
        z = z.clone()
        kernels.sgd_step_(z, g, lse, e, soft, None, TEMPERATURE, 0.5)
    else:
        options = dict(shape.options)
        moments = torch.randn(n, v), torch.rand(n, v)
        if options == {"step": 1, "last": True}:
            moments = None, None
        rest = (0.5, 0.9, 0.999, 1e-8, options["step"], options["last"])
        kernels.adam_step_(z, *moments, g, lse, e, soft, None, TEMPERATURE, *rest)


# ---- what must hold --------------------------------------------------------------------------------------------


def complaints(c: Counted) -> list[str]:
    """What does not hold of the list at the head of this file; empty where all does."""
    return [*against_the_plan(c), *once(c), *hardware(c)]


def against_the_plan(c: Counted, tolerance: float = 0.02) -> list[str]:
    if c.planned is None or (c.shape.operator, c.plan["kernel"]) in DEPENDS_ON_DATA:
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
        if max(issued - planned, missing) > tolerance * scale:
            found.append(f"{name}: issued {issued}, planned {planned}")
    return found


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
    elif s.operator == "relaxed_embedding":
        table = _round(s.V, block_k) * _round(s.d, block_n) * element
        partial = 4 * c.plan["splits"] * s.N * _round(s.d, 4)
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
        name, instructions = kernel_name(one["kernel"]), sum(one["warp_inst"].values())
        if c.shape.aligned and name not in KNOWN and not (share := coalescing(one)) >= 0.95:
            found.append(f"{name}: {share:.2f} of the touched sectors' bytes are asked for")
        for kind in ("shared_load", "shared_store"):
            degree, wavefronts = one[f"{kind}_conflict_degree"], one[f"{kind}_wavefronts"]
            # A merge of few partial results after the loop may conflict: it is no work.
            if degree > 2 and wavefronts * (1 - 1 / degree) > 0.05 * instructions:
                found.append(f"{name}: {degree}-way bank conflicts of {kind}")
        if one["ldmatrix_conflict_degree"] > 2:
            found.append(f"{name}: {one['ldmatrix_conflict_degree']}-way bank conflicts of ldmatrix")
    return found


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


# ---- results ---------------------------------------------------------------------------------------------------


def kernel_name(mangled: str) -> str:
    """The function's own name: the last of the nested names."""
    name, rest = mangled, mangled.removeprefix("_ZN")
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[len(match[1]) :][:length], rest[len(match[1]) + length :]
    return name


def rows(c: Counted) -> list[dict]:
    """One row for each launch, and one for their sum with the plan's and the floor's bytes."""
    elements, s = c.shape.N * c.shape.V, c.shape
    about = {
        "build": c.build,
        "operator": s.operator,
        "step": "".join(f"{name}={value} " for name, value in s.options).strip(),
        **{"N": s.N, "V": s.V, "d": s.d, "z": s.logits, "E": s.embedding},
        "plan": f"{c.plan['kernel']} {'x'.join(map(str, c.plan['tile']))} splits {c.plan['splits']}",
    }
    result = []
    for one in c.launches:
        result.append(
            {
                **about,
                "kernel": kernel_name(one["kernel"]),
                "ctas": one["grid"][0],
                "load_bytes": one["global_load_bytes"] + one["cp_async_bytes"],
                "bulk_bytes": one["tma_load_bytes"] + one["tma_store_bytes"],
                "store_bytes": one["global_store_bytes"],
                "load_sectors": one["global_load_sectors"] + one["cp_async_sectors"],
                "store_sectors": one["global_store_sectors"],
                "coalescing": round(coalescing(one), 3),
                "conflicts_load": one["shared_load_conflict_degree"],
                "conflicts_store": one["shared_store_conflict_degree"],
                "conflicts_ldmatrix": one["ldmatrix_conflict_degree"],
                "tensor_flop": one["mma_flop"] + one["wgmma_flop"],
                "ex2_per_element": round(one["ex2_count"] / elements, 3),
                "instructions_per_element": round(one["lane_instructions"] / elements, 2),
            }
        )
    total = {**about, "kernel": "all", **{k: v for k, v in c.issued.items() if k != "flops"}}
    total["tensor_flop"] = c.issued["flops"]
    total["instructions_per_element"] = round(c.total("lane_instructions") / elements, 2)
    if c.planned is not None:
        total |= {f"planned_{name}": c.planned[name] for name in c.issued}
    total |= {"floor_bytes": c.floor["bytes"], "floor_flops": c.floor["flops"]}
    moved = c.issued["load_bytes"] + c.issued["bulk_bytes"] + c.issued["store_bytes"]
    total["bytes_over_floor"] = round(moved / c.floor["bytes"], 2)
    total["complaints"] = "; ".join(complaints(c))
    return [*result, total]


def markdown(table: list[dict]) -> str:
    """A table for people: a line for each kernel, and a bold one for the operator with its plan and its floor."""
    lines = [
        "# Simulated traffic",
        "",
        "Written by `make bench-simulated`; `benchmarks/simulated.py` says what is counted and what must hold.",
        "`load`, `bulk`, `store`: KiB that threads and bulk copies ask for, before any cache. `conflicts`: degree of",
        "bank conflicts of shared loads / stores / ldmatrix, 1 is none. `plan`: largest deviation from what the launch",
        "plan states. A bold line sums an operator's launches. Known not to coalesce: "
        + "; ".join(f"`{name}` ({why})" for name, why in KNOWN.items())
        + ".",
    ]
    for build in dict.fromkeys(row["build"] for row in table):
        lines += [
            "",
            f"## {build}",
            "",
            "| operator | N, V, d | z / E | kernel | CTAs | load | bulk | store | coalesced | conflicts | tensor MFLOP "
            "| ex2 / element | instructions / element | plan | bytes / floor |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in table if row["build"] == build]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    whole = row["kernel"] == "all"
    dtypes = f"{row['z']} / {row['E']}".replace("bfloat", "bf").replace("float", "fp")
    kib = [f"{row[name] / 1024:.0f}" for name in ("load_bytes", "bulk_bytes", "store_bytes")]
    cells = [f"{row['operator']} {row['step']}".strip(), f"{row['N']}, {row['V']}, {row['d']}", dtypes]
    if whole:
        cells += [
            f"**{row['plan']}**",
            "",
            *(f"**{value}**" for value in kib),
            "",
            "",
            f"{row['tensor_flop'] / 1e6:.1f}",
        ]
        cells += ["", row["instructions_per_element"], deviation(row), f"**{row['bytes_over_floor']}**"]
    else:
        conflicts = " / ".join(f"{row[f'conflicts_{kind}']:.3g}" for kind in ("load", "store", "ldmatrix"))
        cells += [
            f"`{row['kernel']}`",
            row["ctas"],
            *kib,
            row["coalescing"],
            conflicts,
            f"{row['tensor_flop'] / 1e6:.1f}",
        ]
        cells += [row["ex2_per_element"], row["instructions_per_element"], "", ""]
    return "| " + " | ".join(map(str, cells)) + " |"


def deviation(row: dict) -> str:
    if "planned_load_bytes" not in row:
        return "not stated"
    if (row["operator"], row["plan"].split()[0]) in DEPENDS_ON_DATA:
        return "depends on data"
    names = [name for name in ("load_bytes", "bulk_bytes", "store_bytes") if row[f"planned_{name}"]]
    return f"{max((abs(row[name] / row[f'planned_{name}'] - 1) for name in names), default=1.0):.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--builds", nargs="+", choices=list(BUILDS), default=list(BUILDS))
    parser.add_argument("--only", help="operators whose name holds this")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="path without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: list[dict] = []
    for build in arguments.builds:
        try:
            simulator = Simulator(build)
        except Unavailable as reason:
            sys.exit(f"CUDA kernels cannot be run here: {reason}")
        counted = []
        for shape in SHAPES:
            if arguments.only is None or arguments.only in shape.operator:
                start = time.monotonic()
                counted.append(simulator.count(shape))
                print(f"{build}: {shape}: {counted[-1].plan['kernel']}, {time.monotonic() - start:.1f} s", flush=True)
        simulator.ask(counted)
        simulator.close()
        for each in counted:
            table += rows(each)
    columns = list(dict.fromkeys(name for row in table for name in row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    arguments.output.with_suffix(".md").write_text(markdown(table))
    wrong = [row for row in table if row.get("complaints")]
    for row in wrong:
        shape = f"{row['operator']} {row['step']} N={row['N']} V={row['V']} d={row['d']}"
        print(f"{row['build']}: {shape}: {row['complaints']}")
    print(f"{len(wrong)} complaints; written to {arguments.output}.{{csv,md}}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
