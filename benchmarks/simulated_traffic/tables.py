"""Counts as rows for a file, and as a table for people."""

from __future__ import annotations

from simulated_traffic.checks import DEPENDS_ON_DATA, EXEMPTIONS, coalescing, complaints, kernel_name
from simulated_traffic.counting import Counted


def rows(c: Counted) -> list[dict]:
    """One row for each launch, and one for their sum with the plan's and the floor's bytes."""
    elements, s = c.shape.N * c.shape.V, c.shape
    about = {
        "build": c.build,
        "operator": s.operator,
        "step": "".join(f"{name}={value} " for name, value in s.options).strip(),
        **{"N": s.N, "V": s.V, "d": s.d, "z": s.logits, "E": s.embedding},
        "plan": plan_text(c.plan),
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
    total |= {f"planned_{name}": c.planned[name] for name in c.issued}
    total |= {"floor_bytes": c.floor["bytes"], "floor_flops": c.floor["flops"]}
    moved = c.issued["load_bytes"] + c.issued["bulk_bytes"] + c.issued["store_bytes"]
    total["bytes_over_floor"] = round(moved / c.floor["bytes"], 2)
    total["complaints"] = "; ".join(complaints(c))
    return [*result, total]


def plan_text(plan: dict) -> str:
    return f"{plan['kernel']} {'x'.join(map(str, plan['tile']))} splits {plan['splits']}"


def markdown(table: list[dict]) -> str:
    """A table for people: a line for each kernel, and a bold one for the operator with its plan and its floor."""
    lines = [
        "# Simulated traffic",
        "",
        "Written by `make bench-simulated`; `benchmarks/simulated.py` says what is counted and what must hold.",
        "`load`, `bulk`, `store`: KiB that threads and bulk copies ask for, before any cache. `conflicts`: degree of",
        "bank conflicts of shared loads / stores / ldmatrix, 1 is none. `plan`: largest deviation from what the launch",
        "plan states. A bold line sums an operator's launches. Known and tolerated, up to a limit:",
        "",
        "| kernel | z | what | limit | why |",
        "|---|---|---|---|---|",
    ]
    for e in EXEMPTIONS:
        unit = "of the sectors' bytes, at least" if e.what == "coalescing" else "wavefronts per CTA, at most"
        lines.append(f"| `{e.kernel}` | {', '.join(e.logits)} | {e.what} | {e.limit} {unit} | {e.why} |")
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
    if (row["operator"], row["plan"].split()[0]) in DEPENDS_ON_DATA:
        return "depends on data"
    names = [name for name in ("load_bytes", "bulk_bytes", "store_bytes") if row[f"planned_{name}"]]
    return f"{max((abs(row[name] / row[f'planned_{name}'] - 1) for name in names), default=1.0):.1%}"
