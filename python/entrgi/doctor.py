"""What is installed, what was loaded, and the one thing to do about it: the report of ``entrgi doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata

import torch


@dataclass(frozen=True)
class Report:
    """The facts of one machine and what they mean.

    Attributes:
        facts: what was found, in the order in which it is printed.
        healthy: whether the operators work for the devices that torch sees.
        advice: one line: what to do, or that nothing needs doing.
    """

    facts: dict[str, str]
    healthy: bool
    advice: str


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return None
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = result.stdout.split() if result.returncode == 0 else []
    return lines[0] if lines else None


def advise(
    *,
    cpu_problem: str | None,
    cuda_problem: str | None,
    torch_cuda: str | None,
    driver: str | None,
    cuda_available: bool,
) -> tuple[bool, str]:
    """(healthy, one line). The problems say why an operator library is not loaded, None where it is."""
    if cpu_problem is not None:
        if "needs torch" in cpu_problem:
            return False, "torch is too old for the operators: `pip install --upgrade torch`."
        return False, (
            "The operators did not load: run `make build` in a checkout, or reinstall the wheel "
            "(`pip install --force-reinstall --no-deps entrgi-*.whl`)."
        )
    if driver is None:
        return True, "All is well: no NVIDIA driver here, the operators run on the CPU."
    if torch_cuda is None:
        return False, "There is a GPU, but torch is a CPU-only build: install a CUDA build of torch."
    if not cuda_available:
        return False, f"torch (CUDA {torch_cuda}) cannot use the GPU: update the driver, now {driver}."
    if cuda_problem is not None:
        return False, (
            "No CUDA operators: install nvcc, then in a checkout `pip install --no-deps nvidia-cutlass && "
            "ENTRGI_CUDA=1 pip install --no-build-isolation .`."
        )
    return True, "All is well: the operators run on the CPU and on CUDA."


def examine() -> Report:
    """Looks at torch, CUDA, the driver, the devices, and the operator libraries of this process."""
    driver, compiled = driver_version(), compiled_architectures()
    facts = {
        "entrgi": metadata.version("entrgi"),
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none (CPU-only build)",
        "NVIDIA driver": driver or "none",
        "devices": "; ".join(devices(compiled)) or f"CPU only, {torch.get_num_threads()} threads",
    }
    problems = library_problems()
    for name, problem in problems.items():
        facts[f"{name} operators"] = problem or "loaded"
    facts["compiled architectures"] = ", ".join(compiled) or "none (built without CUDA, or not built at all)"
    forced = os.environ.get("ENTRGI_FORCE_PLAN")
    if forced:
        facts["ENTRGI_FORCE_PLAN"] = forced_plan_state(forced)
    healthy, advice = advise(
        cpu_problem=problems["cpu"],
        cuda_problem=problems["cuda"],
        torch_cuda=torch.version.cuda,
        driver=driver,
        cuda_available=torch.cuda.is_available(),
    )
    return Report(facts, healthy, advice)


def devices(compiled: list[str]) -> list[str]:
    """Name, compute capability and code of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [
        f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}: runs {code_for((major, minor), compiled)}"
        for i, (major, minor) in enumerate(capabilities)
    ]


def code_for(capability: tuple[int, int], compiled: list[str]) -> str:
    """Which of the compiled architectures' code runs on a GPU of a compute capability.

    Machine code runs within its major version only, that of sm_90a on 9.0 alone; anything newer takes the PTX.
    """
    if not compiled:
        return "no CUDA operators: none were built"
    if capability < (8, 0):
        return "no CUDA operators: they need compute capability 8.0"
    if capability == (9, 0) and "sm_90a" in compiled:
        return "sm_90a code (Hopper kernels)"
    if capability[0] == 8 and "sm_80" in compiled:
        return "sm_80 code"
    if "compute_80" in compiled:
        return "the portable path: PTX of compute_80, compiled by the driver"
    return f"no CUDA operators: compiled for {', '.join(compiled)} only"


def library_problems() -> dict[str, str | None]:
    """Why the operators of each device are not loaded, None where they are."""
    try:  # loading is what may fail, so it must not happen when this module is imported
        from entrgi_ext import loaded_libraries
    except ImportError as error:
        return {"cpu": str(error), "cuda": "not tried"}
    return loaded_libraries()


def compiled_architectures() -> list[str]:
    """What the CUDA kernels of this installation were compiled for; empty without CUDA or without bindings."""
    try:
        from entrgi_ext import _bindings
    except ImportError:
        return []
    return _bindings.compiled_architectures()


def forced_plan_state(value: str) -> str:
    """The variable's value, and why it is refused where it is."""
    try:
        from entrgi_ext import plans

        refusals = [refusal for op, fields in plans.forced().items() if (refusal := refused_everywhere(op, fields))]
    except (ImportError, ValueError) as error:
        refusals = [str(error)]
    if refusals:
        return f"{value} (refused: {'; '.join(refusals)})"
    return f"{value} (CUDA launches follow it where a shape allows, the CPU does not)"


def refused_everywhere(op: str, fields: dict[str, object]) -> str | None:
    """Why none of a few ordinary shapes can be served under forced fields; None where one can."""
    from entrgi_ext import plans

    refusal = None
    for dtype in ("float32", "float16", "bfloat16"):
        for rows in (2048, 8, 64):
            try:
                plans.launch_plan(op, rows, 152_064, 2048, dtype, dtype, **fields)
            except ValueError as error:
                refusal = str(error)
            else:
                return None
    return refusal
