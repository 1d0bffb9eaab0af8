"""`entrgi sample` on the embedded pair: what it prints, its JSON, its errors and its exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrgi import cli

QUICK = ["sample", "--prompt", "The movie was", "-k", "2", "-l", "4", "-m", "1"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def run_json(*arguments: str) -> dict:
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_table_shows_texts_rewards_and_summary() -> None:
    output = run(*QUICK, "--seed", "1")
    assert "The movie was" in output
    assert "Top@1" in output
    assert "Avg@2" in output
    assert "seed 1" in output


def test_json_is_complete_and_reproducible() -> None:
    first, second = (run_json(*QUICK, "--seed", "7") for _ in range(2))
    run_of = first["runs"]["entrgi"]
    result = run_of["results"][0]
    assert result["rewards"] == second["runs"]["entrgi"]["results"][0]["rewards"]
    assert result["texts"] == second["runs"]["entrgi"]["results"][0]["texts"]
    assert all(text.startswith("The movie was") for text in result["texts"])
    assert result["top1"] == max(result["rewards"])
    assert result["avg"] == pytest.approx(sum(result["rewards"]) / 2)
    assert sum(run_of["history"]["committed"]) == 2 * 4
    assert run_of["complete"] is True
    other = run_json(*QUICK, "--seed", "8")["runs"]["entrgi"]["results"][0]
    assert other["trajectory_seeds"] != result["trajectory_seeds"]


def test_reward_scale_steers_both_ways() -> None:
    arguments = ["sample", "--prompt", "The movie was", "-k", "4", "-l", "8", "--seed", "0"]
    up, down = (
        run_json(*arguments, "--reward-scale", scale)["runs"]["entrgi"]["results"][0]["avg"] for scale in ("1", "-1")
    )
    assert up > down + 1


def test_compare_runs_unguided_first() -> None:
    runs = run_json(*QUICK, "--seed", "3", "--compare")["runs"]
    assert list(runs) == ["unguided", "entrgi"]
    assert runs["unguided"]["history"]["reward"] == [None] * len(runs["unguided"]["history"]["reward"])
    seeds = [each["results"][0]["trajectory_seeds"] for each in runs.values()]
    assert seeds[0] == seeds[1]


def test_prompts_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The plot\n\nI think\n")
    arguments = ["sample", "--prompts-file", str(file), "-k", "1", "-l", "2", "-m", "1", "--seed", "0"]
    results = run_json(*arguments)["runs"]["entrgi"]["results"]
    assert [result["prompt"] for result in results] == ["The plot", "I think"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-0.7"], "temperature must be > 0 and finite, got -0.7"),
        (["--alg", "best"], "alg must be one of"),
        (["--guidance", "magic"], "guidance must be one of"),
        (["--top-p", "1.5"], "top_p must be in [0, 1], got 1.5"),
        (["-k", "0"], "num_return_sequences must be an integer >= 1, got 0"),
        (["--prompt", "A [MASK] film"], "holds the mask token"),
        (["-l", "400"], "expected at most the denoiser's context"),
        (["--prompt", "I", "--model", "no/such/folder/here"], "no folder 'no/such/folder/here'"),
        (["--prompts-file", "missing.txt"], "no file 'missing.txt'"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--guidance", "none", "--compare"], "--compare: expected a --guidance"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    output = run("sample", *arguments, code=2)
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


def test_interrupt_prints_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from entrgi import display

    def on_step(_state: object) -> None:
        raise KeyboardInterrupt

    class Track:
        def __call__(self, _name: str, _steps: int):
            return on_step

    from contextlib import contextmanager

    @contextmanager
    def progress(*_args: object, **_kwargs: object):
        yield Track()

    monkeypatch.setattr(display, "progress", progress)
    output = run(*QUICK, code=130)
    assert "The movie was" in output
    assert "interrupted" in output


def test_interrupt_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import entrgi

    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entrgi, "generate", interrupted, raising=False)
    assert "interrupted before the first step" in run(*QUICK, code=130)
