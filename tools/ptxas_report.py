"""What the compiler made of every CUDA kernel: registers, shared memory, and the instructions that matter.

Reads the machine code in ``entrgi_ext/libentrgi_kernels.so`` with cuobjdump and writes ``docs/kernels/ptxas.md``; the
same library gives the same bytes. ``--check`` compares instead, and prints the difference. Either fails where a kernel
is not what it should be: a Hopper kernel without ``wgmma`` or TMA, one that left code for other GPUs, local memory.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "entrgi_ext" / "libentrgi_kernels.so"
REPORT = ROOT / "docs" / "kernels" / "ptxas.md"
ROWS = (8, 64, 512, 2048)
SHAPE = {"vocab": 152_064, "dim": 2048}

# Columns of the report and the instructions that each counts.
COUNTED = {
    "local": ("LDL", "STL"),
    "mma.sync": ("HMMA",),
    "wgmma": ("HGMMA",),
    "TMA": ("UTMALDG", "UTMASTG"),
    "bulk": ("UBLKCP",),
    "mbarrier": ("SYNCS",),
    # Values that are the same in all lanes, which the compiler does not know to be: read from a lane for every use, or
    # branched over in case lanes differ.
    "R2UR": ("R2UR",),
    "BRA.DIV": ("BRA.DIV",),
}
EMPTY_BODY = 4  # instructions: the stack pointer, EXIT, the loop behind it


class Unavailable(RuntimeError):
    """What the report needs is not on this machine."""


@dataclass(frozen=True)
class Function:
    """One kernel in the machine code of one architecture.

    Attributes:
        source: file that it comes from.
        name: with its template arguments, such as ``row_kernel<bf16, true>``.
        arch: sm_80 or sm_90a.
        registers: per thread, at the launch.
        moved: numbers of registers that its warpgroups take or give back afterwards (``setmaxnreg``).
        shared: bytes of static shared memory.
        stack: bytes per thread.
        instructions: in the code, without padding.
        counts: by the names of :data:`COUNTED`.
        product_loop: instructions of the shortest loop around a ``wgmma``, 0 without one.
    """

    source: str
    name: str
    arch: str
    registers: int
    moved: tuple[int, ...]
    shared: int
    stack: int
    instructions: int
    counts: dict[str, int]
    product_loop: int = 0

    @property
    def kernel(self) -> str:
        return self.name.split("<")[0]


def find_cuobjdump() -> str:
    """From PATH, the CUDA toolkit, or the triton package, which brings it with torch's CUDA builds."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for path in (None, *map(str, folders)):
        found = shutil.which("cuobjdump", path=path)
        if found is not None:
            return found
    raise Unavailable("cuobjdump was not found in PATH, CUDA_HOME/bin or the triton package")


def read(library: Path) -> list[Function]:
    """Every kernel of a library, cubin or object file, sorted."""
    if not library.exists():
        raise Unavailable(f"{library.name} is not built (make build, with CUDA)")
    opcodes = _opcodes(_dump("-sass", library))
    functions = []
    for (arch, symbol), (source, usage) in _usage(_dump("-res-usage", library)).items():
        found, code = opcodes[arch, symbol]
        counts = {name: sum(found[opcode] for opcode in counted) for name, counted in COUNTED.items()}
        set_to = [key for key in found if key.startswith("0x")]
        total = sum(count for key, count in found.items() if key != "NOP" and key not in set_to)
        moved = tuple(sorted(int(key, 16) for key in set_to))
        sizes = usage["REG"], moved, usage["SHARED"], usage["STACK"]
        name = readable(symbol)
        source = source or _source_of(name.split("<")[0])
        functions.append(Function(source, name, arch, *sizes, total, counts, _product_loop(code)))
    return sorted(functions, key=lambda f: (f.source, _natural(f.name), f.arch))


def _dump(what: str, library: Path) -> Iterator[str]:
    """Line by line: a library is a hundred megabytes of text."""
    command = [find_cuobjdump(), what, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield from process.stdout
        problem = process.stderr.read().strip()
    if process.returncode != 0:
        raise RuntimeError(f"cuobjdump {what} failed: {problem}")


def _usage(lines: Iterable[str]) -> dict[tuple[str, str], tuple[str, dict[str, int]]]:
    """By architecture and symbol, the source file and the resources."""
    found, arch, source, symbol = {}, "", "", ""
    for line in lines:
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif line.startswith("identifier = "):
            source = Path(line.split(" = ")[1].strip()).name
        elif line.startswith(" Function "):
            symbol = line.split()[1].rstrip(":")
        elif line.startswith("  REG:"):
            pairs = (pair.split(":") for pair in line.split())
            found[arch, symbol] = source, {name: int(value) for name, value in pairs}
    return found


@cache
def _source_of(kernel: str) -> str:
    """The file that defines a kernel: a library without source lines does not name it."""
    definition = re.compile(rf"\b{kernel}_kernel\(")
    sources = sorted((ROOT / "csrc" / "kernels").rglob("*.cu"))
    found = [path.name for path in sources if definition.search(path.read_text())]
    return found[0] if found else ""


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.DIV)?)(.*)")
_SET_MAX_REGISTERS = re.compile(r".*\b(0x[0-9a-f]+) ;")
_TARGET = re.compile(r"[^/]*\b0x([0-9a-f]+) ;")

# Places of products, and (place, target) of branches backwards.
Code = tuple[list[int], list[tuple[int, int]]]


def _opcodes(lines: Iterable[str]) -> dict[tuple[str, str], tuple[Counter, Code]]:
    """By architecture and symbol, how often every instruction stands in the code, every operand of setmaxnreg too, and
    where products and loops are."""
    found: dict[tuple[str, str], tuple[Counter, Code]] = {}
    arch, counted, products, loops = "", Counter(), [], []
    for line in lines:
        instruction = _INSTRUCTION.match(line)
        if instruction is not None:
            place, opcode, rest = int(instruction[1], 16), instruction[2], instruction[3]
            counted[opcode] += 1
            if opcode == "USETMAXREG":
                counted[_SET_MAX_REGISTERS.match(rest)[1]] += 1
            elif opcode == "HGMMA":
                products.append(place)
            elif opcode == "BRA" and (target := _TARGET.match(rest)) and int(target[1], 16) < place:
                loops.append((place, int(target[1], 16)))
        elif line.startswith("arch = "):
            arch = line.split()[-1]
        elif "Function : " in line:
            counted, products, loops = Counter(), [], []
            found[arch, line.split()[-1]] = counted, (products, loops)
    return found


def _product_loop(code: Code) -> int:
    products, loops = code
    around = [end - begin for end, begin in loops if any(begin <= place <= end for place in products)]
    return min(around) // 16 + 1 if around else 0  # an instruction has 16 bytes


@cache
def _demangler() -> object:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    return function


def readable(symbol: str) -> str:
    """``relaxed_embedding_sm80<bf16, bf16, 16, 256>`` of a mangled name, without what depends on the build."""
    status = ctypes.c_int()
    pointer = _demangler()(symbol.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return symbol
    name = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    name = re.sub(r"\(anonymous namespace\)::|\bentrgi::|^void ", "", name)
    name = name[: _end_of_name(name)]
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = re.sub(rf"\b{long}\b", short, name)
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
    return re.sub(r"_kernel\b", "", name)


def _end_of_name(name: str) -> int:
    """Where the parameters begin: the first parenthesis outside the template arguments."""
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return place
    return len(name)


def _natural(name: str) -> list[object]:
    """Sorts 16 before 128."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def problems(functions: Iterable[Function]) -> list[str]:
    """What is wrong with the machine code, a line each."""
    found = []
    for f in functions:
        needed: tuple[str, ...] = ()
        if f.kernel.endswith("_sm80"):
            needed = ("mma.sync",)
        elif f.kernel.endswith("_sm90") and f.arch == "sm_90a":
            needed = ("bulk", "mbarrier") if f.kernel.startswith("vocab_pass") else ("wgmma", "TMA", "mbarrier")
        where = f"{f.name} ({f.source}, {f.arch})"
        found += [f"{where} has no {name} instruction" for name in needed if f.counts[name] == 0]
        if f.counts["local"] > 0:
            found.append(f"{where} uses local memory: {f.counts['local']} loads and stores")
        if f.kernel.endswith("_sm90") and f.arch != "sm_90a" and f.instructions > EMPTY_BODY:
            found.append(f"{where} left {f.instructions} instructions where it never runs")
    return found


def compilers(library: Path) -> str:
    """Versions of ptxas, as the machine code names them."""
    versions = set(re.findall(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes()))
    return ", ".join(sorted(version.decode() for version in versions)) or "unknown"


HEAD = """# What the compiler makes of the kernels

Written by `make ptxas-report` from the built library; ptxas {compilers}. One row for every kernel and architecture:
registers per thread (at the launch / after `setmaxnreg`), bytes of static shared memory (on sm_90a 1,024 of them are
the system's), stack bytes per thread, instructions in the code (not: how often they run), and of these loads and stores
of local memory, `mma.sync` (HMMA), `wgmma` (HGMMA), tensor copies (UTMALDG), bulk copies (UBLKCP), operations on
mbarriers (SYNCS), values moved to a uniform register (R2UR) and branches in case lanes differ (BRA.DIV), both signs of
a value that is uniform without the compiler knowing; loop: instructions of the shortest loop around a `wgmma`. `make`
and CI fail on register spills, on `wgmma` that ptxas serialises and on `setmaxnreg` that it ignores; elsewhere they
warn.
"""


def report(functions: list[Function], compiler: str, launches: list[str]) -> str:
    lines = [HEAD.format(compilers=compiler)]
    for source in sorted({f.source for f in functions}):
        here = [f for f in functions if f.source == source]
        empty = [f for f in here if f.kernel.endswith("_sm90") and f.instructions <= EMPTY_BODY]
        lines += [
            f"## {source}",
            "",
            _row("kernel", "architecture", "registers", "shared", "stack", "code", *COUNTED, "loop"),
        ]
        lines.append("|---|---|" + "--:|" * (5 + len(COUNTED)))
        for f in here:
            if f not in empty:
                registers = " / ".join(map(str, (f.registers, *f.moved)))
                sizes = (f.shared, f.stack, f.instructions, *f.counts.values(), f.product_loop)
                lines.append(_row(f"`{f.name}`", f.arch, registers, *(size or "" for size in sizes)))
        lines.append("")
        if empty:
            lines += [f"Empty on {', '.join(sorted({f.arch for f in empty}))}: {len(empty)} kernels.", ""]
    return "\n".join([*lines, *launches])


def launches() -> list[str]:
    """How the kernels are launched at the shapes that matter: dynamic shared memory comes from there."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from entrgi_ext import plans

    if plans.forced():
        raise Unavailable("ENTRGI_FORCE_PLAN is set, and the report shows the plans that nothing forces")
    lines = [
        f"## Launches at V = {SHAPE['vocab']:,}, d = {SHAPE['dim']:,}, bf16",
        "",
        _row("operator", "N", "device", "kernel", "tile m x n x k", "stages", "threads", "cluster", "splits", "shared"),
        "|---|--:|---|---|---|--:|--:|---|--:|--:|",
    ]
    for op in plans.OPERATORS:
        for n in ROWS:
            for arch in (80, 90):
                plan = plans.launch_plan(op, n, **SHAPE, arch=arch)
                tile = " x ".join(str(size or "-") for size in plan.tile) if any(plan.tile) else ""
                cluster = " x ".join(map(str, plan.cluster)) if plan.cluster != (1, 1) else ""
                device = "H200" if arch == 90 else "A100"
                sizes = (plan.stages or "", plan.threads, cluster, plan.splits, plan.shared_bytes or "")
                lines.append(_row(op, n, device, plan.kernel, tile, *sizes))
    return [*lines, ""]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed report instead of writing it")
    arguments = parser.parse_args()
    try:
        functions = read(LIBRARY)
        text = report(functions, compilers(LIBRARY), launches())
    except Unavailable as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    wrong = problems(functions)
    print("".join(f"error: {line}\n" for line in wrong), end="", file=sys.stderr)
    if not arguments.check:
        REPORT.write_text(text)
        print(f"{REPORT.relative_to(ROOT)}: {len(functions)} kernels")
        return 1 if wrong else 0
    committed = REPORT.read_text() if REPORT.exists() else ""
    difference = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "built", lineterm="")
    changed = list(difference)
    print("\n".join(changed) or "the committed report is that of the built library")
    return 1 if wrong or changed else 0


if __name__ == "__main__":
    sys.exit(main())
