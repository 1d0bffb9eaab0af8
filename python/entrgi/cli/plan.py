"""``entrgi plan``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from entrgi.cli.console import check_json, console, reported_errors, write_json
from entrgi.cli.options import JSON_FILE, Option, accepts

if TYPE_CHECKING:
    from entrgi_ext.plans import Floor, Requests, Target

DTYPES = ("bfloat16", "float16", "float32")
ROWS = (1, 8, 64, 512, 2048)
COLUMNS = (
    *("N", "kernel", "tile\nMxNxK", "stages", "threads", "cluster", "splits", "CTAs", "shared\nKB"),
    *("workspace\nMB", "floor\nMB", "floor\nGFLOP", "issued\nMB"),
)
OPTIONS = {"n": "--rows", "vocab": "--vocab", "dim": "--dim", "arch": "--arch", "num_sms": "--sms", "op": "--op"}
OPTIONS |= {"logits_dtype": "--logits-dtype", "embedding_dtype": "--embedding-dtype"}


@dataclass(frozen=True)
class Line:
    """One operator at one N."""

    op: str
    n: int
    floor: Floor
    requests: Requests

    def cells(self) -> list[str]:
        plan, floor, requests = self.requests.plan, self.floor, self.requests
        return [
            str(self.n),
            plan.kernel,
            times(plan.tile),
            str(plan.stages or ""),
            str(plan.threads),
            times(plan.cluster) if plan.cluster != (1, 1) else "",
            str(plan.splits) if plan.splits > 1 else "",
            str(plan.grid),
            f"{plan.shared_bytes / 1024:.1f}" if plan.shared_bytes else "",
            megabytes(plan.workspace_bytes),
            megabytes(floor.bytes),
            f"{floor.flops / 1e9:,.1f}" if floor.flops else "",
            megabytes(requests.bytes),
        ]

    def as_dict(self) -> dict[str, Any]:
        requests = asdict(self.requests)
        return {"op": self.op, "n": self.n, **requests.pop("plan"), "floor": asdict(self.floor), "requests": requests}


def operators(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from entrgi_ext import plans

    return [name for name in plans.OPERATORS if name.startswith(incomplete)]


@accepts()
def plan(
    rows: Annotated[
        list[str] | None,
        Option(
            help="N, rows of logits: several with commas or repeated.",
            presets=f" \\[default: {','.join(map(str, ROWS))}]",
        ),
    ] = None,
    vocab: Annotated[int, Option(help="V, width of the logits.")] = 152_064,
    dim: Annotated[int, Option(help="d, width of the reward model's embeddings.")] = 2048,
    logits_dtype: Annotated[str, Option(help="Of z.", choices=DTYPES)] = "bfloat16",
    embedding_dtype: Annotated[str, Option(help="Of E.", choices=DTYPES)] = "bfloat16",
    arch: Annotated[
        int | None, Option(help="90 (Hopper), 100 (newer) or 80 (older). Default: the GPU here, else 90.")
    ] = None,
    sms: Annotated[int | None, Option(help="Multiprocessors. Default: the GPU here, else 132, 148 or 108.")] = None,
    op: Annotated[list[str] | None, Option(help="Only this operator; may be repeated.", complete=operators)] = None,
    json: Annotated[Path | None, JSON_FILE] = None,
) -> None:
    """Show how every CUDA operator is launched for a shape, and the least it must read, write and compute.

    Needs no GPU. ENTRGI_FORCE_PLAN is followed. Its splits are parts of the vocabulary; of logit_update_sm90, which
    has no parts, the clusters of its persistent grid; kernels with neither refuse them.
    """
    with reported_errors(), named_options():
        from entrgi_ext import plans

        check_json(json)
        target = plans.target(arch, sms)
        shape = {"vocab": vocab, "dim": dim, "logits_dtype": logits_dtype, "embedding_dtype": embedding_dtype}
        lines = [
            Line(name, n, plans.floor(name, n, **shape), plans.requests(name, n, **shape, **target.options()))
            for name in op or plans.OPERATORS
            for n in numbers(rows)
        ]
        data = {**target.options(), **shape, "forced": plans.forced(), "plans": [line.as_dict() for line in lines]}
        if write_json(json, data):
            return
        show(lines)
        for note in notes(shape, target, os.environ.get("ENTRGI_FORCE_PLAN")):
            console.print(note, style="dim", markup=False, highlight=False, soft_wrap=line_width() is None)


@contextmanager
def named_options() -> Iterator[None]:
    """Errors that begin with an argument's name begin with the option's."""
    try:
        yield
    except UnicodeDecodeError as error:  # all options are text already
        raise ValueError(
            f"ENTRGI_FORCE_PLAN: expected UTF-8 text, got {os.environ['ENTRGI_FORCE_PLAN']!r:.80}"
        ) from error
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in OPTIONS:
            raise
        raise ValueError(f"{OPTIONS[name]} {rest}") from error


def numbers(rows: list[str] | None) -> list[int]:
    """``["1,8", "64"]`` is [1, 8, 64]."""
    if not rows:
        return list(ROWS)
    parts = [part.strip() for text in rows for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or len(part) > 100 or int(part) < 1:
            raise ValueError(f"--rows: expected numbers >= 1 such as 1,8,64, got {part!r:.80}")
    return [int(part) for part in parts]


def times(sizes: tuple[int, ...]) -> str:
    """``(128, 64, 0)`` is ``128x64x-``; nothing where all are 0."""
    return "x".join(str(size or "-") for size in sizes) if any(sizes) else ""


def megabytes(count: int) -> str:
    """Nothing for nothing."""
    if count == 0:
        return ""
    return f"{count / 1e6:,.2f}" if count >= 1e4 else "<0.01"


def table(lines: list[Line], columns: Sequence[int], no_wrap: bool = True) -> Table:
    """A section for every operator.

    Args:
        columns: which of :data:`COLUMNS`, N among them.
        no_wrap: false where not even one column fits the terminal.
    """
    result = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("operator", no_wrap=no_wrap, overflow="fold")
    for index in columns:
        name = COLUMNS[index]
        result.add_column(name, no_wrap=no_wrap, overflow="fold", justify="left" if name == "kernel" else "right")
    previous = None
    for line in lines:
        if previous not in (None, line.op):
            result.add_section()
        cells = line.cells()
        result.add_row("" if line.op == previous else line.op, *(cells[index] for index in columns))
        previous = line.op
    return result


def natural_width(result: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=1000), result).maximum


def show(lines: list[Line]) -> None:
    """Whole numbers, whatever the terminal's width: what does not fit side by side follows as a further table."""
    width = line_width()
    groups, group = [], [0]
    for index in range(1, len(COLUMNS)):
        if width is not None and len(group) > 1 and natural_width(table(lines, [*group, index])) > width:
            groups.append(group)
            group = [0]
        group.append(index)
    for columns in [*groups, group]:
        result = table(lines, columns)
        natural = natural_width(result)
        if width is not None and natural > width:
            console.print(table(lines, columns, no_wrap=False))
        else:
            Console(width=max(natural, console.width)).print(result)


def line_width() -> int | None:
    """Of the terminal, or of ``COLUMNS``; None where lines may be as long as they are: in files and pipes."""
    return console.width if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal() else None


def notes(shape: dict[str, Any], target: Target, forced: str | None) -> list[str]:
    """What the table is about, a line each."""
    lines = [
        f"V {shape['vocab']} ({shape['logits_dtype']}), d {shape['dim']} ({shape['embedding_dtype']}), "
        f"arch {target.arch} with {target.num_sms} SMs, rows at 16-byte boundaries; MB = 1e6 bytes, KB = 1024 bytes",
        "issued: bytes that threads and bulk copies request, before any cache; adam_step_: neither first nor last step",
    ]
    return lines + ([f"ENTRGI_FORCE_PLAN={forced}"] if forced else [])
