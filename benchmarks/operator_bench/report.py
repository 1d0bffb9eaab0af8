"""What people read of the results: the README's tables, the plot, verdicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .cases import WHOLE_STEP
from .results import FOLDER, Row, read

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"
NO_GPU = "No figure for a GPU exists yet."
# (V, d) of the README's table of a GPU; all others are in the file.
SHOWN_OF_A_GPU = (152_064, 2048)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
STYLES = {"published": "tab:red", "compiled": "tab:orange", "composed": "tab:purple", "two-pass": "tab:brown"}


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms" if value >= 2 else f"{value:.2f} ms"


def table(rows: list[Row]) -> str:
    """The whole Adam step of one device in Markdown."""
    chosen = [row for row in rows if row["operator"] == WHOLE_STEP]
    chosen = [row for row in chosen if row["kind"] == "cpu" or (row["V"], row["d"]) == SHOWN_OF_A_GPU]
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in chosen:
        key = (row["V"], row["d"], row["logits"], row["embedding"], row["N"])
        shapes.setdefault(key, {})[str(row["implementation"])] = row
    lines = [
        "| V | d | z, E | N | entrgi | floor: two GEMMs | composed PyTorch | compiled | published algorithm, eager "
        "| **speed-up over eager** | peak MiB: entrgi / composed / eager (fp32 moments alone) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (v, d, logits, embedding, n), by in sorted(shapes.items(), key=lambda item: item[0]):
        ours = by.get("entrgi")
        if ours is None or ours["median_ms"] is None:
            continue
        dtypes = " / ".join(dict.fromkeys((SHORT[str(logits)], SHORT[str(embedding)])))
        times = [milliseconds(by.get(name, {}).get("median_ms")) for name in ("composed", "compiled", "published")]
        peaks = [by.get(name, {}).get("peak_MiB") for name in ("entrgi", "composed", "published")]
        peak = " / ".join("-" if value is None else f"{max(value, 0):.0f}" for value in peaks)
        speedup = "" if ours["over_published"] is None else f"**{ours['over_published']:.1f}x**"
        cells = [
            f"{v:,}",
            d,
            dtypes,
            n,
            milliseconds(ours["median_ms"]),
            milliseconds(ours["gemm_ms"]),
            *times,
            speedup,
        ]
        lines.append("| " + " | ".join(map(str, [*cells, f"{peak} ({8 * n * v / 2**20:.0f})"])) + " |")
    return "\n".join(lines)


def section(folder: Path = FOLDER, kept: Iterable[str] = ()) -> str:
    """The README's block: a table for every device that has results, and those that are kept."""
    parts = list(kept)
    for file in sorted(folder.glob("operators_*.csv"), key=lambda file: (file.stem != "operators_cpu", file.stem)):
        rows = read(file.with_suffix(""))
        if not any(row["operator"] == WHOLE_STEP for row in rows):
            continue
        on_cpu = rows[0]["kind"] == "cpu"
        # Rows of several runs may stand in one table: then all of what they ran with is said.
        says = {name: _all(rows, name) for name in ("device", "threads", "driver", "torch", "commit")}
        where = f"{says['device']}, " + (f"threads: {says['threads']}" if on_cpu else f"driver {says['driver']}")
        where += f", torch {says['torch']}" + (f", commits {says['commit']}" if "," in says["commit"] else "")
        links = ", ".join(
            f"[{name}](benchmarks/results/{file.stem}.{suffix})"
            for name, suffix in (("results", "csv"), ("plot", "png"))
        )
        lines = [f"{where}; {links}:", "", table(rows)]
        if verdicts := summary(rows):
            lines += ["", verdicts]
        parts.append("\n".join(lines))
    if not any("driver" in part.split("\n", 1)[0] for part in parts):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def _all(rows: list[Row], name: str) -> str:
    """Every value of a column."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows))


def summary(rows: list[Row]) -> str:
    """How many targets are met, by operator; empty without targets."""
    counts: dict[str, Counter] = {}
    for row in rows:
        for verdict in str(row["met"] or "").split("; "):
            if verdict:
                counts.setdefault(str(row["operator"]), Counter())[verdict] += 1
    if not counts:
        return ""
    each = [
        f"{name} {count['met']} of {count.total()}" + (f", {count['open']} open" if count["open"] else "")
        for name, count in counts.items()
    ]
    return "Targets met: " + "; ".join(each) + "."


def rewrite(readme: Path = README, folder: Path = FOLDER) -> list[str]:
    """Replace what stands between the markers, except the tables of devices that have no results here: they are given.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold {BEGIN} and {END} once each, in this order")
    head, rest = text.split(BEGIN)
    block, tail = rest.split(END)
    kept = {stem: part for stem, part in _parts(block) if not (folder / f"{stem}.csv").exists()}
    readme.write_text(f"{head}{BEGIN}\n{section(folder, kept.values())}\n{END}{tail}")
    return list(kept)


def _parts(block: str) -> Iterator[tuple[str, str]]:
    """The tables of a block: the name of their results, the text from their heading on."""
    text = block.replace(NO_GPU, "").strip()
    for part in re.split(r"\n\n(?=[^|\n]*:\n\n\|)", text):
        if "\n|" in part:
            link = re.search(r"results/(operators_\w+)\.csv", part)
            yield link[1] if link else "operators_cpu", part.strip()


def plot(rows: list[Row], file: Path) -> None:
    """measured / floor against N: a panel for each operator, a line for each shape of ours, thin ones for PyTorch's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    rows = [row for row in rows if row["over_floor"]]
    if not rows:
        return
    operators = list(dict.fromkeys(str(row["operator"]) for row in rows))
    columns = min(4, len(operators))
    lines = -(-len(operators) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(operators) :]:
        axis.set_visible(False)
    for axis, operator in zip(axes.flat, operators, strict=False):
        here = [row for row in rows if row["operator"] == operator]
        shapes = list(dict.fromkeys((row["V"], row["d"], row["logits"]) for row in here))
        for place, shape in enumerate(shapes):
            label = (
                (f"V {shape[0]:,}" if shape[0] else "entrgi")
                + (f", d {shape[1]}" if shape[1] else "")
                + f", {SHORT[str(shape[2])]}"
            )
            _line(
                axis, here, shape, "entrgi", color=plt.cm.viridis(place / max(len(shapes), 2)), marker="o", label=label
            )
        for name, colour in STYLES.items():
            _line(axis, here, shapes[0], name, color=colour, linestyle="--", linewidth=0.9, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=operator)
        ticks = sorted({row["N"] for row in here})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.legend(fontsize=5.5)
    figure.supxlabel("rows N")
    figure.supylabel("measured / floor")
    figure.suptitle(f"{rows[0]['device']}; dashed: PyTorch at the first shape", fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _line(axis, rows: list[Row], shape: tuple, name: str, **style) -> None:
    chosen = [row for row in rows if (row["V"], row["d"], row["logits"]) == shape and row["implementation"] == name]
    chosen.sort(key=lambda row: row["N"])
    if chosen:
        axis.plot(
            [row["N"] for row in chosen], [row["over_floor"] for row in chosen], markersize=3, **{"marker": "."} | style
        )
