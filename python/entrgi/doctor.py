"""What is installed, what was loaded, and the one thing to do about it: the report of ``entrgi doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

Version = tuple[int, int]


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


def cuda_versions() -> tuple[Version | None, Version | None]:
    """The newest CUDA that the NVIDIA driver supports, and that of the runtime built into the operators.

    None where there is no driver, and both where the CUDA operators are not loaded.
    """
    if library_problems()["cuda"] is not None:
        return None, None
    driver, runtime = torch.ops.entrgi.cuda_versions()
    return _version(driver), _version(runtime)


def _version(number: int) -> Version | None:
    """13020 is 13.2; 0 says that there is none."""
    return (number // 1000, number % 1000 // 10) if number else None


def advise(
    *,
    cpu_problem: str | None,
    cuda_problem: str | None,
    torch_cuda: str | None,
    driver: str | None,
    cuda_available: bool,
    supported: Version | None,
    built: Version | None,
    compiles: bool,
) -> tuple[bool, str]:
    """(healthy, one line).

    Args:
        cpu_problem, cuda_problem: why an operator library is not loaded, None where it is.
        torch_cuda: of torch's build, None without CUDA.
        driver: its version, None without one.
        cuda_available: whether torch can use a GPU.
        supported, built: the CUDA that the driver supports, and that of the operators' runtime.
        compiles: whether the driver must compile the operators' PTX for a GPU.
    """
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
    if supported is not None and built is not None and supported < built:
        text = f"the driver ({driver}) supports CUDA {_name(supported)}, the operators were built with {_name(built)}"
        if supported[0] < built[0]:
            return False, f"The CUDA operators cannot run: {text}. Update the driver."
        if compiles:
            return False, f"No code for this GPU can be compiled: {text}. Update the driver."
        return True, f"The operators run on the CPU and on CUDA; {text}: update the driver if a launch fails."
    return True, "All is well: the operators run on the CPU and on CUDA."


def _name(version: Version) -> str:
    return ".".join(map(str, version))


def examine() -> Report:
    """Looks at torch, CUDA, the driver, the devices, and the operator libraries of this process."""
    driver, compiled = driver_version(), compiled_architectures()
    supported, built = cuda_versions()
    facts = {
        "entrgi": metadata.version("entrgi"),
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none (CPU-only build)",
        "NVIDIA driver": f"{driver}, for CUDA up to {_name(supported)}" if driver and supported else driver or "none",
        "devices": "; ".join(devices(compiled)) or f"CPU only, {torch.get_num_threads()} threads",
    }
    problems = library_problems()
    for name, problem in problems.items():
        facts[f"{name} operators"] = problem or "loaded"
    if built is not None:
        facts["cuda operators"] += f", built with CUDA {_name(built)}"
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
        supported=supported,
        built=built,
        compiles=any(ptx_for(capability, compiled) is not None for capability in capabilities()),
    )
    return Report(facts, healthy, advice)


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def devices(compiled: list[str]) -> list[str]:
    """Name, compute capability and code of every GPU that torch can use."""
    return [
        f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}: runs {code_for((major, minor), compiled)}"
        for i, (major, minor) in enumerate(capabilities())
    ]


def code_for(capability: tuple[int, int], compiled: list[str]) -> str:
    """Which of the compiled architectures' code runs on a GPU of a compute capability."""
    if not compiled:
        return "no CUDA operators: none were built"
    if capability < (8, 0):
        return "no CUDA operators: they need compute capability 8.0"
    machine_code = machine_code_for(capability, compiled)
    if machine_code is not None:
        return f"{machine_code} code{' (Hopper kernels)' if machine_code == 'sm_90a' else ''}"
    ptx = ptx_for(capability, compiled)
    if ptx is not None:
        return f"PTX of {ptx}, which the driver compiles at first use: tens of seconds, then from its cache"
    return f"no CUDA operators: compiled for {', '.join(compiled)} only"


def machine_code_for(capability: tuple[int, int], compiled: list[str]) -> str | None:
    """Machine code runs within its major version only, that of sm_90a on 9.0 alone."""
    if capability == (9, 0) and "sm_90a" in compiled:
        return "sm_90a"
    return "sm_80" if capability[0] == 8 and "sm_80" in compiled else None


def ptx_for(capability: tuple[int, int], compiled: list[str]) -> str | None:
    """The newest PTX that the driver can compile for a GPU, None where machine code serves it, or nothing does."""
    if machine_code_for(capability, compiled) is not None:
        return None
    versions = [int(name.removeprefix("compute_")) for name in compiled if name.startswith("compute_")]
    usable = [version for version in versions if 80 <= version <= 10 * capability[0] + capability[1]]
    return f"compute_{max(usable)}" if usable else None


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


def refused_everywhere(op: str, fields: dict[str, Any]) -> str | None:
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
