"""`entrgi plan`: the table, its JSON, forced plans and bad input; `entrgi_ext.plans` behind it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import entrgi_ext
from entrgi import cli
from entrgi_ext import _bindings, plans

H200 = {"arch": 90, "num_sms": 132}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["plan", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def run_json(*arguments: str) -> dict:
    return json.loads(run(*arguments, "--json"))


def process(*arguments: str, forced: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: the variable is read once."""
    command = [sys.executable, "-m", "entrgi.cli", "plan", *arguments]
    environment = {**os.environ, "ENTRGI_FORCE_PLAN": forced}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_table_has_every_operator_and_no_cut_numbers() -> None:
    output = run("--arch", "90")
    for name in plans.OPERATORS:
        assert f"\n {name} " in output
    assert "…" not in output
    for text in ("2048", "relaxed_embedding", "shared", "GFLOP", "V 152064 (bfloat16)", "arch 90 with 132 SMs"):
        assert text in output


def test_json_is_what_the_functions_say() -> None:
    shape = {"vocab": 30_522, "dim": 768, "logits_dtype": "float32", "embedding_dtype": "float16"}
    result = run_json(
        *("--rows", "1,17", "--rows", "300", "--vocab", "30522", "--dim", "768", "--logits-dtype", "float32"),
        *("--embedding-dtype", "float16", "--arch", "80", "--sms", "84", "--op", "adam_step_", "--op", "sample_tokens"),
    )
    assert {name: result[name] for name in shape} == shape
    assert (result["arch"], result["num_sms"], result["forced"]) == (80, 84, {})
    assert [(each["op"], each["n"]) for each in result["plans"]] == [
        (op, n) for op in ("adam_step_", "sample_tokens") for n in (1, 17, 300)
    ]
    for each in result["plans"]:
        plan = plans.launch_plan(each["op"], each["n"], **shape, arch=80, num_sms=84)
        assert each["kernel"] == plan.kernel
        assert tuple(each["tile"]) == plan.tile
        assert each["grid"] == plan.grid
        assert each["floor"]["bytes"] == plans.floor(each["op"], each["n"], **shape).bytes
        asked = plans.requests(each["op"], each["n"], **shape, arch=80, num_sms=84)
        assert each["requests"]["load_bytes"] == asked.load_bytes


def test_forced_plans_are_followed_and_shown() -> None:
    forced = "relaxed_embedding:kernel=relaxed_embedding_sm80,splits=3"
    shown = process("--op", "relaxed_embedding", "--rows", "8", "--arch", "90", forced=forced)
    assert f"ENTRGI_FORCE_PLAN={forced}" in shown.stdout
    made = process("--op", "relaxed_embedding", "--rows", "8", "--arch", "90", "--json", forced=forced)
    result = json.loads(made.stdout)
    assert result["forced"] == {"relaxed_embedding": {"kernel": "relaxed_embedding_sm80", "splits": 3}}
    assert result["plans"][0]["kernel"] == "relaxed_embedding_sm80"
    assert result["plans"][0]["splits"] == 3


def test_bad_forced_plans_are_one_line() -> None:
    result = process("--op", "commit_", forced="relaxed_embedding:tiles=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ENTRGI_FORCE_PLAN: expected a field (kernel, splits, ")
    assert result.stderr.endswith("got 'tiles'\n")
    assert result.stdout == ""


def test_forced_plans_that_are_no_text_are_one_line() -> None:
    result = process("--op", "commit_", forced="\udcff")
    assert result.returncode == 2
    assert result.stderr == "error: ENTRGI_FORCE_PLAN: expected UTF-8 text, got '\\udcff'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "8,x"], "--rows: expected numbers >= 1 such as 1,8,64, got 'x'"),
        (["--rows", "0"], "--rows: expected numbers >= 1 such as 1,8,64, got '0'"),
        (["--rows", "2147483649"], "--rows must be <= 2147483648, got 2147483649"),
        (["--rows", "9" * 20], f"--rows must be a number of 64 bits, got {'9' * 20}"),
        (["--vocab", "0"], "--vocab must be >= 1, got 0"),
        (["--vocab", str(2**63 - 1)], "--vocab must be <= 2147483648, got 9223372036854775807"),
        (["--vocab", "9" * 20], f"--vocab must be a number of 64 bits, got {'9' * 20}"),
        (["--dim", "-1"], "--dim must be >= 1, got -1"),
        (["--dim", "1048577"], "--dim must be <= 1048576, got 1048577"),
        (["--rows", "2147483648", "--vocab", "2097153", "--dim", "1"], "shape must have n * vocab * dim <= 4503599627"),
        (["--arch", "75"], "--arch must be 80, 90 or 100, got 75"),
        (["--sms", "0"], "--sms must be >= 1, got 0"),
        (["--sms", "4097"], "--sms must be <= 4096, got 4097"),
        (["--sms", "99999999999"], "--sms must be a number of 32 bits, got 99999999999"),
        (["--op", "matmul"], "--op must be one of logit_statistics, "),
        (["--logits-dtype", "int8"], "--logits-dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (
            ["--embedding-dtype", "float64"],
            "--embedding-dtype must be one of bfloat16, float16, float32, got 'float64'",
        ),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    output = run(*arguments, code=2)
    assert message in output
    assert len(output.splitlines()) == 1


def test_the_largest_shapes_do_not_overflow() -> None:
    """All sizes that are taken give bytes and FLOPs that are at least the floor's, for every operator."""
    for rows, vocab, dim in ((2**31, 2**21, 1), (1, 2**31, 2**20), (2**31, 2, 2**20), (2**31, 1, 2**20)):
        for arch in ("80", "90"):
            for each in run_json(
                *("--rows", str(rows), "--vocab", str(vocab), "--dim", str(dim), "--arch", arch),
                *("--logits-dtype", "float32", "--embedding-dtype", "float32" if arch == "80" else "bfloat16"),
            )["plans"]:
                asked, least = each["requests"], each["floor"]
                assert least["bytes"] > 0
                assert all(asked[name] >= 0 for name in ("load_bytes", "bulk_bytes", "store_bytes"))
                assert asked["flops"] >= least["flops"] >= 0


# --- the functions ----------------------------------------------------------------------------------------------


def test_functions_wrap_the_bindings() -> None:
    shape = ("relaxed_embedding", 64, 152_064, 2048)
    plan = entrgi_ext.launch_plan(*shape, **H200, splits=5)
    made = _bindings.plan(*shape, **H200, splits=5)
    assert plan == plans.LaunchPlan(**made)
    assert plan.splits == 5
    floor = plans.floor("adam_step_", 64, 152_064, 2048, step=1, last=True)
    assert floor.bytes == _bindings.floor("adam_step_", 64, 152_064, 2048, step=1, last=True)["bytes"]
    asked = plans.requests("gumbel_perturb", 64, 152_064, **H200)
    assert asked.plan == plans.launch_plan("gumbel_perturb", 64, 152_064, **H200)
    assert asked.bytes >= plans.floor("gumbel_perturb", 64, 152_064).bytes * 0.99


def test_dtypes_are_torchs_or_names() -> None:
    named = plans.launch_plan("relaxed_embedding", 64, 1000, 64, "float32", "float16", **H200)
    assert plans.launch_plan("relaxed_embedding", 64, 1000, 64, torch.float32, torch.float16, **H200) == named


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = {"clusters_of_2": 39, "clusters_of_4": 19, "clusters_of_8": 9}
    here = {"arch": 90, "num_sms": 78, **clusters}
    monkeypatch.setattr(_bindings, "device", lambda: here)
    assert plans.target() == (90, 78, 39, 19, 9)
    assert plans.target().options() == {"arch": 90, "num_sms": 78, **clusters}
    assert plans.target(num_sms=7).options() == {"arch": 90, "num_sms": 7}
    assert plans.target(arch=80) == (80, 108, None, None, None)
    assert plans.target(arch=100) == (100, 148, None, None, None)
    here["arch"] = 75  # nothing runs there
    assert plans.target().options() == {"arch": 90, "num_sms": 132}
    monkeypatch.setattr(_bindings, "device", lambda: None)
    assert plans.target().options() == {"arch": 90, "num_sms": 132}


def test_plans_need_no_torch() -> None:
    program = (
        "import sys, entrgi_ext; entrgi_ext.launch_plan('sample_tokens', 8, 152064); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
