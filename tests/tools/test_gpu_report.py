"""``benchmarks/gpu_report.py``: what people read of the GPU day."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import gpu_report  # noqa: E402

PAGE = "before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n"
FAMILY_PAGE = "a page\n<!-- gpu:begin relaxed_embedding -->\n<!-- gpu:end -->\n"


def end(phase, case, status="right", **fields):
    return {"event": "end", "at": 1.0, "phase": phase, "case": case, "status": status, **fields}


def timed(case, ms, floor, **baselines):
    rows = [{"implementation": "entrgi", "median_ms": ms, "floor_ms": floor, "over_floor": ms / floor, "noise": 0.01}]
    rows += [{"implementation": name, "median_ms": value} for name, value in baselines.items()]
    return end("bench", case, rows=rows)


def records(device="NVIDIA H200", dry=False):
    return [
        {"event": "run", "at": 0, "commit": "abc1234", "dry": dry, "on": "GPU"},
        {"event": "device", "at": 1, "device": device, "torch": "2.11.0", "multiprocessors": 132},
        end("ceilings", "copy", ms=1.0, per_second=4.3e12),
        end("ceilings", "product 8192 x 8192 x 8192", ms=1.4, per_second=7.9e14),
        end("ceilings", "clusters", resident={"1": 132, "4": 32}),
        end("smoke", "a", kernels=["relaxed_embedding_sm90"]),
        end("smoke", "b", kernels=["relaxed_embedding_sm90"]),
        end("main", "c", "wrong", kernels=["logit_update_sm90"], why="gradient is off\nby 0.3"),
        end("smoke", "d", "hang", kernels=["vocab_pass_sm90"], why="no answer within 10 s"),
        end("tests", "kernel tests", counts={"PASSED": 700, "FAILED": 1}, failed=["tests/x.py::y"]),
        timed("relaxed_embedding N=512 d=2048", 0.45, 0.322, composed=0.599, published=0.9),
        timed("sample_tokens N=64 spread 3", 0.05, 0.0046),
        timed("relaxed_embedding N=8 d=2048", 0.15, 0.13),
        end("bench", "adam_step_middle N=512 d=2048", "skipped", why="wrong in main: c"),
        end("end-to-end", "dream-7b: entrgi", seconds_per_step=0.21, parts={"denoiser": 0.05}),
        {"event": "cut", "at": 9, "phase": "bench", "left": 3, "of": 40},
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository of its own."""
    pages = [tmp_path / "README.md", tmp_path / "docs" / "kernels" / "a.md", tmp_path / "docs" / "kernels" / "b.md"]
    pages[1].parent.mkdir(parents=True)
    for page, text in zip(pages, (PAGE, FAMILY_PAGE, "no markers\n"), strict=True):
        page.write_text(text)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(gpu_report, "PAGES", tuple(pages))
    gpu_report.RESULTS.mkdir(parents=True)
    return tmp_path


def saved(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(folder)


def test_without_records_nothing_is_claimed(home):
    assert gpu_report.main([]) == 0
    assert (home / "README.md").read_text() == PAGE.replace("old", gpu_report.NOTHING)
    assert gpu_report.NOTHING in (home / "docs" / "kernels" / "a.md").read_text()
    assert (home / "docs" / "kernels" / "b.md").read_text() == "no markers\n"


def test_records_become_files_and_pages(home, tmp_path):
    pytest.importorskip("matplotlib")
    assert gpu_report.main([saved(tmp_path / "out", records())]) == 0
    base = gpu_report.RESULTS / "gpu_nvidia_h200"
    assert base.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with base.with_suffix(".csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    row = rows["relaxed_embedding N=512 d=2048"]
    assert (row["median_us"], row["floor_us"], row["composed_us"]) == ("450.0", "322.0", "599.0")
    assert (row["expected_low_us"], row["expected_high_us"]) == ("397", "520")
    assert row["commit"] == "abc1234"
    assert rows["relaxed_embedding N=8 d=2048"]["expected_low_us"] == ""
    assert json.loads(base.with_suffix(".json").read_text())["about"]["multiprocessors"] == 132

    readme = (home / "README.md").read_text()
    assert readme.startswith("before\n<!-- gpu:begin -->\nNVIDIA H200, torch 2.11.0, commit abc1234")
    assert readme.endswith("<!-- gpu:end -->\nafter\n")
    assert "| `relaxed_embedding_sm90` | right | 2 | 0 | 0 | 0 | 0 |" in readme
    assert "| `logit_update_sm90` | **wrong** | 0 | 1 | 0 | 0 | 0 |" in readme
    assert "| `vocab_pass_sm90` | **hangs** | 0 | 0 | 1 | 0 | 0 |" in readme
    assert "copy 4.30 TB/s; bf16 product 8192 x 8192 x 8192 790 TFLOP/s; clusters at once: 132 of 1, 32 of 4" in readme
    assert "| relaxed_embedding N=512 d=2048 | 322 | 397 - 520 | **450** | 1.40 | 599 | 900 |  |" in readme
    assert "- wrong: main: c: gradient is off by 0.3" in readme
    assert "- bench: 3 of 40 cases not reached" in readme
    assert "adam_step_middle N=512" not in readme
    assert "dream-7b: entrgi | 0.2100 | denoiser 0.050" in readme
    assert "benchmarks/results/gpu_nvidia_h200.csv" in readme

    page = (home / "docs" / "kernels" / "a.md").read_text()
    assert "relaxed_embedding N=512" in page
    assert "sample_tokens" not in page
    # Once more, from what was written: nothing changes.
    assert gpu_report.main([]) == 0
    assert (home / "README.md").read_text() == readme


def test_calls_are_put_together_and_the_last_result_counts(home, tmp_path):
    again = [records()[0], records()[1], end("main", "c", kernels=["logit_update_sm90"])]
    assert gpu_report.main([saved(tmp_path / "one", records()), saved(tmp_path / "two", again)]) == 0
    readme = (home / "README.md").read_text()
    assert "| `logit_update_sm90` | right | 1 | 0 | 0 | 0 | 0 |" in readme
    assert "relaxed_embedding N=512" in readme


def test_two_devices_are_two_reports(home, tmp_path):
    paths = [
        saved(tmp_path / name, records(device)) for name, device in (("h200", "NVIDIA H200"), ("h100", "NVIDIA H100"))
    ]
    with pytest.raises(ValueError, match="several devices, NVIDIA H100, NVIDIA H200"):
        gpu_report.main(paths)
    for path in paths:
        gpu_report.main([path])
    readme = (home / "README.md").read_text()
    assert readme.index("NVIDIA H100, torch") < readme.index("NVIDIA H200, torch")


def test_a_dry_run_is_nobodys_result(home, tmp_path, capsys):
    path = saved(tmp_path / "out", records(dry=True))
    with pytest.raises(SystemExit):
        gpu_report.main([path])
    assert "records of a dry run: give --output" in capsys.readouterr().err
    assert (home / "README.md").read_text() == PAGE
    assert not list(gpu_report.RESULTS.iterdir())

    assert gpu_report.main([path, "--output", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.startswith("**A dry run, no figure is a GPU's.** simulated:")
    assert "397" not in report  # what is expected of a GPU stands beside no other figure
    assert (tmp_path / "report" / "gpu_simulated.csv").exists()
    assert (home / "README.md").read_text() == PAGE


@pytest.mark.slow  # a dry run of its own
def test_the_records_of_a_dry_run_make_a_report(tmp_path):
    """Of the parent with made-up answers: hang, wrong result and missing build are in it, the README untouched."""
    before = [page.read_text() for page in gpu_report.PAGES]
    script = ROOT / "tools" / "gpu_day.py"
    command = [sys.executable, script, "run", "--dry-run", "--stub", "--output", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    assert gpu_report.main([str(tmp_path / "out"), "--output", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "| `embed_a` | **hangs** | 0 | 0 | 1 |" in report
    assert "| `update_a` | **wrong** | 0 | 1 | 0 |" in report
    assert "- failed: build: libraries" in report
    assert [page.read_text() for page in gpu_report.PAGES] == before


def test_what_was_expected_names_cases_that_are_measured():
    from gpu_day import shapes

    real = shapes.real()
    names = {shapes.title(case) for case in real.bench}
    for case, spread, forbidden in real.draws:
        names.add(f"{shapes.title(case)} spread {spread:g}{', forbidden ids' if forbidden else ''}")
    for row in json.loads(gpu_report.EXPECTED.read_text())["cases"]:
        assert row["case"] in names
        low, high = row["expected_us"]
        assert row["floor_us"] <= low <= high


def test_the_committed_pages_say_what_the_committed_records_say():
    """``python benchmarks/gpu_report.py`` was run after the last change of either."""
    reports = [gpu_report.Report(gpu_report.read(file)) for file in sorted(gpu_report.RESULTS.glob("gpu_*.jsonl"))]
    marked = 0
    for page in gpu_report.PAGES:
        text = page.read_text()
        assert gpu_report.rewritten(page, text, reports) == text, page.name
        marked += len(gpu_report.MARKED.findall(text))
    assert marked


def test_records_without_a_device_are_refused(home, tmp_path, capsys):
    lines = [record for record in records() if record["event"] != "device"]
    with pytest.raises(SystemExit):
        gpu_report.main([saved(tmp_path / "out", lines)])
    assert "name no device" in capsys.readouterr().err
    assert (home / "README.md").read_text() == PAGE
