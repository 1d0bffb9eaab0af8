"""`entrgi doctor`: the advice for every state an installation can be in, and the report of this one."""

import pytest
from typer.testing import CliRunner

from entrgi import doctor
from entrgi.cli import app

GOOD = {
    "cpu_problem": None,
    "cuda_problem": None,
    "torch_cuda": "13.0",
    "driver": "580.1",
    "cuda_available": True,
    "supported": (13, 0),
    "built": (13, 0),
    "compiles": False,
}
SUPPORTS = "the driver (580.1) supports CUDA"


@pytest.mark.parametrize(
    ("change", "healthy", "words"),
    [
        ({}, True, "on CUDA"),
        ({"cpu_problem": "undefined symbol"}, False, "--force-reinstall"),
        ({"cpu_problem": "entrgi_ext needs torch >= 2.10, found 2.9"}, False, "--upgrade torch"),
        (
            {"driver": None, "torch_cuda": None, "cuda_available": False, "cuda_problem": "not built"},
            True,
            "on the CPU",
        ),
        ({"driver": None, "cuda_available": False}, True, "on the CPU"),
        ({"torch_cuda": None, "cuda_available": False}, False, "install a CUDA build of torch"),
        ({"cuda_available": False}, False, "update the driver, now 580.1"),
        ({"cuda_problem": "not built"}, False, "ENTRGI_CUDA=1"),
        ({"supported": (13, 2)}, True, "All is well: the operators run on the CPU and on CUDA."),
        ({"supported": (12, 9)}, False, f"cannot run: {SUPPORTS} 12.9, the operators were built with 13.0. Update"),
        ({"built": (13, 2)}, True, f"{SUPPORTS} 13.0, the operators were built with 13.2: update the driver if"),
        ({"built": (13, 2), "compiles": True}, False, f"can be compiled: {SUPPORTS} 13.0, the operators were built"),
        ({"supported": None}, True, "on CUDA"),
        ({"built": None, "cuda_problem": "not built"}, False, "ENTRGI_CUDA=1"),
    ],
)
def test_advice(change: dict, healthy: bool, words: str) -> None:
    state, line = doctor.advise(**{**GOOD, **change})
    assert state is healthy
    assert words in line
    assert "\n" not in line


def test_report_of_this_machine() -> None:
    import torch

    facts = doctor.examine().facts
    assert facts["torch"] == torch.__version__
    assert facts["cpu operators"] == "loaded"
    assert "compiled architectures" in facts


BUILT = ["sm_80", "sm_90a", "compute_90"]
COMPILED_LATE = "PTX of compute_90, which the driver compiles at first use: tens of seconds, then from its cache"


@pytest.mark.parametrize(
    ("capability", "compiled", "words"),
    [
        ((9, 0), BUILT, "sm_90a code (Hopper kernels)"),
        ((8, 0), BUILT, "sm_80 code"),
        ((8, 9), BUILT, "sm_80 code"),
        ((10, 0), BUILT, COMPILED_LATE),
        ((12, 0), BUILT, COMPILED_LATE),
        ((9, 0), ["sm_80", "compute_90"], COMPILED_LATE),
        ((9, 0), ["sm_80", "compute_80"], COMPILED_LATE.replace("90", "80")),
        ((10, 0), ["compute_80", "compute_90", "compute_120"], COMPILED_LATE),
        ((8, 6), ["compute_80"], COMPILED_LATE.replace("90", "80")),
        ((8, 6), ["sm_90a", "compute_90"], "no CUDA operators: compiled for sm_90a, compute_90 only"),
        ((7, 5), BUILT, "no CUDA operators: they need compute capability 8.0"),
        ((10, 0), ["sm_80", "sm_90a"], "no CUDA operators: compiled for sm_80, sm_90a only"),
        ((9, 0), [], "no CUDA operators: none were built"),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], compiled: list[str], words: str) -> None:
    assert doctor.code_for(capability, compiled) == words


def test_every_gpu_is_listed_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    capabilities = [(9, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    assert doctor.devices(BUILT) == [
        "GPU 0, sm_90: runs sm_90a code (Hopper kernels)",
        f"GPU 1, sm_120: runs {COMPILED_LATE}",
    ]


@pytest.mark.parametrize(
    ("supported", "capability", "healthy", "words"),
    [
        ((12, 8), (9, 0), False, "cannot run: the driver (570.1) supports CUDA 12.8, the operators were built"),
        ((13, 0), (9, 0), True, "update the driver if a launch fails"),
        ((13, 0), (10, 0), False, "No code for this GPU can be compiled"),
        ((13, 2), (10, 0), True, "All is well: the operators run on the CPU and on CUDA."),
    ],
)
def test_driver_and_runtime_are_compared(
    monkeypatch: pytest.MonkeyPatch,
    supported: tuple[int, int],
    capability: tuple[int, int],
    healthy: bool,
    words: str,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.1")
    monkeypatch.setattr(doctor, "library_problems", lambda: {"cpu": None, "cuda": None})
    monkeypatch.setattr(doctor, "cuda_versions", lambda: (supported, (13, 2)))
    monkeypatch.setattr(doctor, "compiled_architectures", lambda: BUILT)
    report = doctor.examine()
    assert report.healthy is healthy
    assert words in report.advice
    assert report.facts["NVIDIA driver"] == "570.1, for CUDA up to {}.{}".format(*supported)
    assert report.facts["cuda operators"] == "loaded, built with CUDA 13.2"


def test_versions_are_those_of_the_library() -> None:
    """Asked of it where it is loaded, without a GPU, too."""
    supported, built = doctor.cuda_versions()
    assert (built is None) == (doctor.library_problems()["cuda"] is not None)
    assert built is None or built >= (12, 0)
    assert supported is None or supported >= (11, 0)


@pytest.mark.parametrize(("number", "version"), [(0, None), (12080, (12, 8)), (13000, (13, 0)), (13020, (13, 2))])
def test_version_numbers(number: int, version: tuple[int, int] | None) -> None:
    assert doctor._version(number) == version


def test_forced_plans_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from entrgi_ext import plans

    assert "ENTRGI_FORCE_PLAN" not in doctor.examine().facts
    assert plans.forced() == {}  # read once in a process: here, so that no other test sees what is set now
    monkeypatch.setenv("ENTRGI_FORCE_PLAN", "sample_tokens:splits=2")
    monkeypatch.setattr(plans, "forced", lambda: {"sample_tokens": {"splits": 2}})
    assert doctor.examine().facts["ENTRGI_FORCE_PLAN"].startswith("sample_tokens:splits=2 (CUDA launches follow it")

    def refuse() -> dict:
        raise ValueError("ENTRGI_FORCE_PLAN: expected a field")

    monkeypatch.setattr(plans, "forced", refuse)
    assert "(refused: ENTRGI_FORCE_PLAN: expected a field)" in doctor.examine().facts["ENTRGI_FORCE_PLAN"]


@pytest.mark.parametrize(
    ("op", "fields", "refusal"),
    [
        ("logit_gradient", {"stages": 99}, "(refused: stages must be "),
        ("commit_", {"splits": 2}, "(refused: splits must be 1 for commit"),
        ("relaxed_embedding", {"kernel": "relaxed_embedding_simt"}, None),  # of fp32 embeddings alone
        ("relaxed_embedding", {"block_m": 16, "kernel": "relaxed_embedding_sm80"}, None),
    ],
)
def test_forced_plans_are_tried(monkeypatch: pytest.MonkeyPatch, op: str, fields: dict, refusal: str | None) -> None:
    from entrgi_ext import plans

    monkeypatch.setattr(plans, "forced", lambda: {op: fields})
    state = doctor.forced_plan_state("this")
    assert state.startswith("this (CUDA launches follow it" if refusal is None else f"this {refusal}")


def test_command_exits_with_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.Report({"torch": "2.x"}, healthy=False, advice="Do this one thing.")
    monkeypatch.setattr(doctor, "examine", lambda: report)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "Do this one thing." in result.output


def test_operators_that_do_not_load_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import entrgi_ext

    def fail() -> dict:
        raise ImportError("libentrgi_cpu.so is missing")

    monkeypatch.delattr(entrgi_ext, "loaded_libraries", raising=False)
    monkeypatch.setattr(entrgi_ext, "__getattr__", lambda name: fail())
    report = doctor.examine()
    assert not report.healthy
    assert report.facts["cpu operators"] == "libentrgi_cpu.so is missing"
