"""What the launch plans can choose, asked of the plans themselves: kernels, tiles, clusters, splits, dtypes.

Nothing here names a kernel or a tile: sweeps over shapes find what plans choose, and every combination that a plan
accepts as asked for is a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product

from operator_bench.cases import OPERATORS, Case

from entrgi_ext.plans import launch_plan

DTYPES = ("bfloat16", "float16", "float32")
EPILOGUES = ("adam_step_first", "adam_step_last", "sgd_step")  # of kernels that adam_step_middle has in all dtypes
FAMILIES = {
    "vocabulary": ("logit_statistics", "sample_tokens"),
    "embedding": ("relaxed_embedding",),
    "update": ("adam_step_middle", "logit_gradient", *EPILOGUES),
    "others": ("gumbel_perturb", "commit"),
}
CLUSTERS = (1, 2, 4, 8)
SPLITS = (0, 3)
MOST_ROWS = 800  # of a tile times its cluster


@dataclass(frozen=True)
class Variant:
    """One case of the smoke test: an operator's case and what its plan is asked for.

    Attributes:
        aligned: whether rows of the logits start at 16-byte boundaries.
        plan: kernel, tile and cluster that must run.
        overrides: of the launch.
        rank: of its dtypes and alignment, 0 the first to be checked.
    """

    case: Case
    aligned: bool
    plan: dict
    overrides: dict
    rank: int = 0

    @property
    def name(self) -> str:
        tile = "" if not self.plan["block_m"] else f" {self.plan['block_m']}x{self.plan['block_n']}"
        text = f"{self.case.operator}: {self.plan['kernel']}{tile}"
        text += f" cluster {self.plan['cluster_m']}x{self.plan['cluster_n']}"
        if self.plan["splits"] > 1:
            text += f" splits {self.plan['splits']}"
        return f"{text} {self.case.logits}/{self.case.embedding}{'' if self.aligned else ' unaligned'} N={self.case.N}"

    def as_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}


def plan_of(case: Case, arch: int | None, part: int = 0, **options: object) -> dict:
    """Fields of the plan of one of a case's parts; ``arch`` None is that of the GPU that is here.

    Raises:
        ValueError: what the options ask for cannot be had.
    """
    (name, _), shape = case.what.parts[part], (case.N, max(case.V, 1), max(case.d, 1), case.logits, case.embedding)
    plan = launch_plan(name, *shape, arch=arch, trajectories=case.trajectories, **options)
    return {"op": name, **fields_of(plan.kernel, plan.tile, plan.cluster, plan.splits)}


def fields_of(kernel: str, tile: tuple, cluster: tuple, splits: int) -> dict:
    return {
        "kernel": kernel,
        **dict(zip(("block_m", "block_n", "block_k"), tile, strict=True)),
        **dict(zip(("cluster_m", "cluster_n"), cluster, strict=True)),
        "splits": splits,
    }


def variants(family: str, arch: int, small: bool) -> list[Variant]:
    """The cases of a family: every variant in the first dtypes, smallest first, then the other dtypes."""
    found: dict[str, Variant] = {}
    for operator in FAMILIES[family]:
        alignments = (True, False) if OPERATORS[operator].has_vocabulary else (True,)
        for rank, (dtypes, aligned) in enumerate(product(_dtypes(operator), alignments)):
            for kernel in _kernels(operator, dtypes, arch):
                for variant in _of_kernel(operator, dtypes, aligned, kernel, arch, small):
                    if variant.plan["splits"] <= 1 or "splits" not in variant.overrides or rank == 0:
                        found.setdefault(variant.name, replace(variant, rank=rank))
    ordered = sorted(found.values(), key=lambda variant: (variant.rank, variant.case.N))
    return _one_of_each(ordered) if small else ordered


def _one_of_each(ordered: list[Variant]) -> list[Variant]:
    """The first case of each operator and kernel."""
    first: dict[tuple, Variant] = {}
    for variant in ordered:
        first.setdefault((variant.case.operator, variant.plan["kernel"]), variant)
    return list(first.values())


def _dtypes(operator: str) -> list[tuple[str, str]]:
    """Of logits and embedding: both bfloat16 first, then equal ones, then the mixed ones."""
    what = OPERATORS[operator]
    if not what.has_vocabulary:
        return [("float32", "float32")]
    equal = [(dtype, dtype) for dtype in DTYPES]
    mixed = [(z, e) for z, e in product(DTYPES, DTYPES) if z != e]
    return equal + mixed if what.products and operator not in EPILOGUES else equal


def _case(operator: str, rows: int, dtypes: tuple[str, str], vocabulary: int = 2000, width: int = 200) -> Case:
    what = OPERATORS[operator]
    if not what.has_vocabulary:
        return Case(operator, rows, 0, 0, *dtypes)
    return Case(operator, rows, vocabulary, width if what.products else 0, *dtypes)


def _kernels(operator: str, dtypes: tuple[str, str], arch: int) -> list[str]:
    """Every kernel that some plan for these dtypes chooses, on this architecture or below."""
    found = {}
    for code, rows, vocabulary in product((arch, 80), (1, 512), (2000, 152_064, 1 << 23)):
        for options in ({}, {"logits_aligned": False}, {"embedding_aligned": False}):
            with suppress(ValueError):  # dtypes that were not built
                found[plan_of(_case(operator, rows, dtypes, vocabulary), code, **options)["kernel"]] = None
    return list(found)


def _of_kernel(
    operator: str, dtypes: tuple[str, str], aligned: bool, kernel: str, arch: int, small: bool
) -> Iterator[Variant]:
    fixed = {"logits_aligned": aligned}
    asked_kernel = {"kernel": kernel} if len(_kernels(operator, dtypes, arch)) > 1 else {}
    tiles = {}
    for rows in (1, 17, 65, 129, 300, 2048):
        for height in (0, *(tile[0] for tile in list(tiles))):
            try:
                plan = plan_of(_case(operator, rows, dtypes), arch, **fixed, **asked_kernel, **_given(block_m=height))
            except ValueError:
                continue
            if plan["kernel"] == kernel:
                tiles[plan["block_m"], plan["block_n"]] = None
    for (block_m, block_n), cluster_m, cluster_n, splits in product(tiles, CLUSTERS, CLUSTERS, SPLITS):
        tile = {"block_m": block_m, "block_n": block_n} if block_m else {}
        asked = _given(**tile, cluster_m=cluster_m, cluster_n=cluster_n, splits=splits)
        rows = min(block_m * cluster_m + 5, MOST_ROWS) if block_m and not small else 7
        case = _case(operator, rows, dtypes, *((328, 72) if small else ()))
        overrides = {**asked_kernel, **asked}
        try:
            plan = plan_of(case, arch, **fixed, **overrides)
        except ValueError:
            continue
        if all(plan[name] == value for name, value in asked.items()) and plan["kernel"] == kernel:
            yield Variant(case, aligned, plan, overrides if case.what.has_vocabulary else {})


def _given(**fields: int) -> dict[str, int]:
    return {name: value for name, value in fields.items() if value}
