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
}


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
