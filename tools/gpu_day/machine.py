"""What stands for the device: a GPU; the simulator for raw kernels and the CPU for PyTorch; or answers made up."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .build import ROOT, cuda_home

GPU, SIMULATOR, STUB = "gpu", "simulator", "stub"
# Of programs, after what PATH names.
PLACES = (str(Path(sys.executable).parent), str(cuda_home() / "bin"), str(cuda_home() / "compute-sanitizer"))


@dataclass(frozen=True)
class Machine:
    """How children are started.

    Attributes:
        prefix: before the process that launches raw kernels.
        seconds: deadline of a request of each phase.
        planted: what shall happen to the first small case of an operator, in a dry run: "hang" or "wrong".
    """

    kind: str
    scratch: Path
    bindings: Path
    prefix: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    planted: dict[str, str] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        return self.kind != GPU

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def environment(self, prefix: str = "", **extra: str) -> dict[str, str]:
        paths = [ROOT / "python", ROOT, self.scratch / "site"]
        own = {
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), *PLACES]),
            "PYTHONUNBUFFERED": "1",
            "GPU_DAY_DEVICE": self.device,
            "GPU_DAY_BINDINGS": str(self.bindings),
            "GPU_DAY_PREFIX": " ".join(filter(None, [prefix, self.prefix])),
            "GPU_DAY_THREADS": str(1 if self.dry else 8),
            "ENTRGI_TEST_DEVICE": "sim" if self.dry else "cuda",
        }
        return {**os.environ, **own, **extra}

    def script(self, name: str) -> tuple[str, list[str]]:
        """Of a child, and its arguments."""
        return ("stub", [name]) if self.kind == STUB else (name, [])

    def probe_command(self, source: Path, target: Path) -> list[str] | None:
        """Compiles ``probe.cu`` for this device."""
        if self.kind == STUB or (nvcc := find("nvcc")) is None:
            return None
        code = ["-cudart", "static", "-gencode", "arch=compute_80,code=compute_80"]
        if self.kind == SIMULATOR:
            code = ["-cudart", "shared", "--no-compress"]
        code += ["-gencode", f"arch=compute_90a,code={'compute_90a' if self.dry else 'sm_90a'}"]
        return [nvcc, "-std=c++20", *code, str(source), "-o", str(target)]

    def probe(self, target: Path, what: str) -> list[str]:
        if self.kind == STUB:
            answer = '{"alive": true}' if what == "alive" else '{"1": 132, "2": 66, "4": 32, "8": 16}'
            return [sys.executable, "-c", f"print({answer!r})"]
        if not target.exists():  # no compiler, or one that failed
            program = "import torch; torch.ones(1 << 26, device='cuda').sum().item(); print('{\"alive\": true}')"
            return [sys.executable, "-c", program]
        return [*shlex.split(self.prefix), str(target), what]


def find(tool: str) -> str | None:
    """A program, of the CUDA toolkit or of this Python's environment perhaps."""
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(PLACES))


def gpu(scratch: Path) -> Machine:
    # The bindings' name is known once they are built.
    seconds = {"ceilings": 20, "smoke": 10, "main": 15, "bench": 30, "forced": 30, "step": 50, "sanitize": 20}
    return Machine(GPU, scratch, ROOT / "entrgi_ext", seconds={**seconds, "end-to-end": 100})


def dry(scratch: Path, planted: dict[str, str], stub: bool = False) -> tuple[Machine, str]:
    """The simulator, where it is; why it is not there."""
    why = ""
    if not stub:
        try:
            return _simulator(scratch, planted), ""
        except Exception as reason:  # whatever it is, the parent can still be tried out
            why = f"{type(reason).__name__}: {reason}".splitlines()[0]
    phases = ("ceilings", "smoke", "main", "bench", "forced", "step", "sanitize", "end-to-end")
    return Machine(STUB, scratch, scratch, seconds=dict.fromkeys(phases, 2.5), planted=planted), why or "not asked for"


def _simulator(scratch: Path, planted: dict[str, str]) -> Machine:
    path = ROOT / "tests" / "support" / "build_simulated.py"
    spec = importlib.util.spec_from_file_location("build_simulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prefix, environment = module.simulator_command()
    os.environ["CUDASIM_BUILD"] = environment["CUDASIM_BUILD"]
    bindings = module.build_bindings("compute_90a")
    seconds = dict.fromkeys(("ceilings", "main", "bench", "forced", "step", "sanitize", "end-to-end"), 60.0)
    return Machine(SIMULATOR, scratch, bindings, shlex.join(prefix), {**seconds, "smoke": 10.0}, planted)
