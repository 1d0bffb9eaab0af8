"""`entrgi sample`: what it prints, its JSON, its files, its errors and its exit codes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields

import pytest
from typer.testing import CliRunner

import entrgi
from entrgi import SamplerConfig, cli, generate, preset, trace
from entrgi.cli import display
from entrgi.cli.models import MODELS
from entrgi.cli.options import SAMPLER, sampler_config
from entrgi.cli.prompts import PROMPTS
from entrgi.config import DTYPES, PRESETS
from support import checkpoints, tiny

QUICK = ["sample", "--prompt", "The movie was", "-k", "2", "-l", "4", "-m", "1"]
SEED = 5


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def run_json(*arguments: str) -> dict:
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny checkpoints."""
    root = tmp_path_factory.mktemp("models")
    return {
        "denoiser": checkpoints.denoiser(root / "denoiser"),
        "chat": checkpoints.denoiser(root / "chat", chat=tiny.CHAT),
        "reward": checkpoints.reward(root / "reward"),
        "second": checkpoints.reward(root / "second", seed=2),
        "other": checkpoints.reward(root / "other", words=checkpoints.OTHER_WORDS),
        "language": checkpoints.language_model(root / "language"),
    }


@pytest.fixture(scope="module")
def quick(folders) -> list[str]:
    """A short run of tiny models."""
    pair = ["--model", folders["denoiser"], "--reward", folders["reward"]]
    return ["sample", *pair, "-p", "the movie was", "-k", "2", "-l", "4", "-m", "1"]


def matches(result: dict, output: entrgi.Output) -> None:
    """A run's JSON is that generation, bit for bit."""
    results = result["results"]
    assert [each["texts"] for each in results] == output.texts
    assert [each["responses"] for each in results] == output.responses
    assert [each["rewards"] for each in results] == output.rewards.tolist()
    assert [each["candidate_rewards"] for each in results] == output.candidate_rewards.tolist()
    assert [list(map(int, each["trajectory_seeds"])) for each in results] == output.seeds.tolist()
    assert result["history"]["reward"] == output.history.reward
    assert result["history"]["step"] == output.history.step


# --- the embedded pair ------------------------------------------------------------------------------------------


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
    assert first["not_finite"] == {}
    other = run_json(*QUICK, "--seed", "8")["runs"]["entrgi"]["results"][0]
    assert other["trajectory_seeds"] != result["trajectory_seeds"]


def test_embedded_pair_has_its_own_length() -> None:
    for given, expected in (
        ({}, (16, 16)),
        ({"steps": 4}, (16, 4)),
        ({"max_new_tokens": 9}, (9, 128)),
        ({"max_new_tokens": 9, "steps": 4}, (9, 4)),
        ({"max_new_tokens": 0, "infill": True}, (0, 128)),
    ):
        config = sampler_config("paper", given, embedded=True)
        assert (config.max_new_tokens, config.steps) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", [None, 1, 9, 128, 256])
def test_what_is_not_given_is_what_it_is_in_python(name: str, length: int | None) -> None:
    given = {} if length is None else {"max_new_tokens": length}
    assert sampler_config(name, given) == preset(name, **given)
    if length is not None:
        assert sampler_config(name, given, embedded=True) == preset(name, **given)


@pytest.mark.slow  # the same of the library: tests/models/test_demo.py
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
    assert runs["unguided"]["config"]["entropy_rule"] == "initial"
    seeds = [each["results"][0]["trajectory_seeds"] for each in runs.values()]
    assert seeds[0] == seeds[1]


# --- options of the sampler -------------------------------------------------------------------------------------

OPTIONS = [
    ([], {}),
    (["--preset", "rgrl"], {"preset": "rgrl"}),
    (
        ["--preset", "rgrl", "--temperature", "0.5", "--deprioritize-eos", "--top-k", "9", "-m", "2"],
        {"preset": "rgrl", "temperature": 0.5, "deprioritize_eos": True, "top_k": 9, "guidance_steps": 2},
    ),
    (["--no-deprioritize-eos"], {"deprioritize_eos": False}),
    (["--steps", "3", "--schedule", "uniform"], {"steps": 3, "schedule": "uniform"}),
    (["-t", "4", "--schedule", "rgrl"], {"steps": 4, "schedule": "rgrl"}),
    (["--block-length", "2"], {"block_length": 2}),
    (["--threshold", "-2.5"], {"threshold": -2.5}),
    (["--early-exit"], {"early_exit": True}),
    (["--best-of", "5"], {"best_of": 5}),
    (["--alg", "origin"], {"alg": "origin"}),
    (["--alg", "random", "--temperature", "0"], {"alg": "random", "temperature": 0}),
    (["--end-tokens", "all"], {"end_tokens": "all"}),
    (["--alg", "topk_margin", "--alg-temp", "0.3"], {"alg": "topk_margin", "alg_temp": 0.3}),
    (["--entropy-rule", "filtered"], {"entropy_rule": "filtered"}),
    (["--top-p", "0.6", "--top-k", "7"], {"top_p": 0.6, "top_k": 7}),
    (["--guidance", "none"], {"guidance": "none"}),
    (["--guidance", "aps", "--guidance-lr", "0.2"], {"guidance": "aps", "guidance_lr": 0.2}),
    (["--guidance", "gumbel", "--gumbel-temperature", "0.4"], {"guidance": "gumbel", "gumbel_temperature": 0.4}),
    (["--guidance-interval", "2"], {"guidance_interval": 2}),
    (["--guidance-interval", "1:3"], {"guidance_interval": (1, 3)}),
    (["--optimizer", "sgd", "--reward-scale", "-2"], {"optimizer": "sgd", "reward_scale": -2.0}),
    (["--logits-dtype", "bfloat16"], {"logits_dtype": "bfloat16"}),
    (["--max-rows", "8", "--row-bucket", "4"], {"max_rows": 8, "row_bucket": 4}),
    (["--infill", "-l", "0", "-p", "the [MASK] was [MASK]"], {"infill": True, "max_new_tokens": 0}),
]


@pytest.mark.parametrize(("arguments", "change"), OPTIONS, ids=lambda value: " ".join(map(str, value)))
def test_options_are_those_of_generate(folders, arguments: list[str], change: dict) -> None:
    import torch

    given = {"num_return_sequences": 2, "max_new_tokens": 5, **change}
    name = given.pop("preset", "paper")
    if "logits_dtype" in given:
        given["logits_dtype"] = getattr(torch, given["logits_dtype"])
    config = preset(name, **given)

    named = ["-k", "2", *([] if "-l" in arguments else ["-l", "5"]), "--seed", str(SEED)]
    prompts = [arguments[arguments.index("-p") + 1]] if "-p" in arguments else ["the movie", "w1 w2 w3"]
    named += [] if "-p" in arguments else [x for prompt in prompts for x in ("-p", prompt)]
    result = run_json("sample", "--model", folders["denoiser"], "--reward", folders["reward"], *named, *arguments)
    (made,) = result["runs"].values()

    expected = json.loads(json.dumps(trace.plain_options(config)))
    assert made["config"] == expected
    pair = entrgi.load_denoiser(folders["denoiser"]), entrgi.load_reward(folders["reward"])
    matches(made, generate(prompts, *pair, config, seed=SEED))


def test_every_field_has_its_option() -> None:
    assert sorted(option.name for option in SAMPLER) == sorted(field.name for field in fields(SamplerConfig))
    shown = {option.name: option.presets.strip(" \\[]").removeprefix("default: ") for option in SAMPLER}
    for name, expected in (
        ("temperature", "0.7, rgrl: 0.9"),
        ("top_k", "off, rgrl: 50"),
        ("deprioritize_eos", "yes, rgrl: no"),
        ("alg_temp", "0.0"),
        ("guidance_interval", "1"),
        ("steps", "128"),
        ("best_of", ""),
        ("early_exit", ""),
    ):
        assert shown[name] == expected
    with_choices = {option.name: option.choices for option in SAMPLER if option.choices}
    assert list(with_choices) == [
        "schedule",
        "end_tokens",
        "alg",
        "entropy_rule",
        "guidance",
        "optimizer",
        "logits_dtype",
    ]
    assert with_choices["logits_dtype"] == DTYPES
    for option in SAMPLER:
        assert re.fullmatch(r"[A-Z].*\.", option.help), f"{option.name} has no text in SamplerConfig"
        assert "``" not in option.help
    assert {option.name for option in SAMPLER if option.negatable} == {"deprioritize_eos", "infill"}
    covered = {name for _, change in OPTIONS for name in change}
    assert {option.name for option in SAMPLER} - covered == {"num_return_sequences", "cuda_graphs"}


def test_help_shows_all_options_without_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from entrgi.cli import app;"
        "text = CliRunner().invoke(app, ['sample', '--help'], env={'COLUMNS': '200'}).output; print(text);"
        "loaded = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    )
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for option in (*PROMPTS, *MODELS, *SAMPLER):
        assert f"--{option.name.replace('_', '-')} " in text
    assert "[default: 0.7, rgrl: 0.9]" in text
    assert "One of entropy, maskgit_plus, topk_margin, anchor, random, origin." in text


@pytest.mark.parametrize("command", ["sample", "doctor", "view", "profile", "plan", "vocabulary"])
def test_commands_are_there(command: str) -> None:
    assert f"Usage: root {command}" in run(command, "--help")


# --- models and prompts -----------------------------------------------------------------------------------------


def test_a_label_and_the_parts_of_a_sum(tmp_path, folders) -> None:
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(7)
    names = {0: "sad", 1: "glad", 2: "7"}
    config = tiny.bert_config(num_labels=3, id2label=names, label2id={name: i for i, name in names.items()})
    folder = checkpoints.save(tmp_path / "labels", BertForSequenceClassification(config), tiny.tokenizer())
    common = ["sample", "--model", folders["denoiser"], "-p", "the movie", "-k", "2", "-l", "5", "--seed", str(SEED)]
    sampler = preset("paper", num_return_sequences=2, max_new_tokens=5)
    denoiser = entrgi.load_denoiser(folders["denoiser"])
    for given, label in (("glad", "glad"), ("0", 0)):
        (made,) = run_json(*common, "--reward", folder, "--reward-label", given)["runs"].values()
        expected = generate("the movie", denoiser, entrgi.load_reward(folder, label=label), sampler, seed=SEED)
        matches(made, expected)
        assert "reward_parts" not in made["results"][0]
    named = ["--reward", folder, "--reward", folder, "--reward-label", "sad", "--reward-label", "glad"]
    (made,) = run_json(*common, *named, "--reward-weight", "-1", "--reward-weight", "2")["runs"].values()
    (result,) = made["results"]
    assert result["rewards"] == pytest.approx([2 * glad - sad for sad, glad in result["reward_parts"]], rel=1e-5)
    for arguments, message in (
        (["--reward", folder], "has 3 labels"),
        (["--reward-label", "glad"], "--reward-label: the embedded pair's reward has one label"),
        (["--reward", folder, "--reward-label", "merry"], "has 3 labels"),
        (["--reward", "none"], "--reward: none goes with --guidance none"),
        (["--reward", "none", "--reward", "demo"], "--reward: expected nothing beside --reward none"),
        (["--reward", "none", "--reward-label", "glad"], "--reward-label: expected nothing beside --reward none"),
        (["--reward", "none", "--guidance", "none", "--best-of", "4"], "--reward: none goes with --guidance none"),
    ):
        assert message in run(*common, *arguments, code=2).replace("\n", " ")


def test_several_rewards_are_a_weighted_sum(folders) -> None:
    arguments = ["--reward", folders["reward"], "--reward", folders["second"]]
    named = ["-p", "the movie", "-k", "2", "-l", "5", "--seed", str(SEED)]
    config = preset("paper", num_return_sequences=2, max_new_tokens=5)
    rewards = [entrgi.load_reward(folders[name]) for name in ("reward", "second")]
    for flags, weights in (([], [1, 1]), (["--reward-weight", "2", "--reward-weight", "-0.5"], [2, -0.5])):
        result = run_json("sample", "--model", folders["denoiser"], *arguments, *flags, *named)
        expected = entrgi.WeightedReward(rewards, weights)
        matches(
            result["runs"]["entrgi"],
            generate(["the movie"], entrgi.load_denoiser(folders["denoiser"]), expected, config, seed=SEED),
        )
        assert [(each["name"], each["weight"]) for each in result["rewards"]] == [
            (folders[name], weight) for name, weight in zip(("reward", "second"), weights, strict=True)
        ]


def test_likelihood_rewards_missing_rows_and_dtypes(folders) -> None:
    named = ["--model", folders["denoiser"], "-p", "the movie", "-k", "2", "-l", "4", "--seed", str(SEED)]
    config = preset("paper", num_return_sequences=2, max_new_tokens=4)
    import torch

    for arguments, reward, dtype in (
        (["--reward", folders["language"]], entrgi.load_reward(folders["language"]), None),
        (
            ["--reward", folders["language"], "--reward-kind", "likelihood", "--dtype", "float64"],
            entrgi.LogLikelihoodReward.from_pretrained(folders["language"], dtype=torch.float64),
            torch.float64,
        ),
        (["--reward", folders["other"]], entrgi.load_reward(folders["other"]), None),
        (
            ["--reward", folders["other"], "--missing", "zero"],
            entrgi.load_reward(folders["other"], unmapped="zero"),
            None,
        ),
    ):
        result = run_json("sample", *named, *arguments)
        denoiser = entrgi.load_denoiser(folders["denoiser"], dtype=dtype)
        matches(result["runs"]["entrgi"], generate(["the movie"], denoiser, reward, config, seed=SEED))


def test_adapters(folders, tmp_path) -> None:
    pytest.importorskip("peft")
    on_reward = checkpoints.adapter(tmp_path / "a", folders["reward"], "SEQ_CLS", 11)
    on_denoiser = checkpoints.adapter(tmp_path / "b", folders["denoiser"], None, 12)
    named = ["-p", "the movie", "-k", "2", "-l", "4", "--seed", str(SEED)]
    config = preset("paper", num_return_sequences=2, max_new_tokens=4)
    result = run_json(
        *("sample", "--model", folders["denoiser"], "--model-adapter", on_denoiser, *named),
        *("--reward", folders["reward"], "--reward", folders["second"], "--adapter", on_reward, "--adapter", "none"),
    )
    rewards = [entrgi.load_reward(folders["reward"], adapter=on_reward), entrgi.load_reward(folders["second"])]
    denoiser = entrgi.load_denoiser(folders["denoiser"], adapter=on_denoiser)
    expected = generate(["the movie"], denoiser, entrgi.WeightedReward(rewards, [1, 1]), config, seed=SEED)
    matches(result["runs"]["entrgi"], expected)
    plain = generate(
        ["the movie"],
        entrgi.load_denoiser(folders["denoiser"]),
        entrgi.WeightedReward([entrgi.load_reward(folders[name]) for name in ("reward", "second")], [1, 1]),
        config,
        seed=SEED,
    )
    assert plain.texts != expected.texts  # the adapters do something
    both = [on_denoiser, checkpoints.adapter(tmp_path / "c", folders["denoiser"], None, 13)]
    result = run_json(
        *("sample", "--model", folders["denoiser"], "--reward", folders["reward"], *named),
        *(part for adapter in both for part in ("--model-adapter", adapter)),
    )
    denoiser = entrgi.load_denoiser(folders["denoiser"], adapter=both)
    expected = generate(["the movie"], denoiser, entrgi.load_reward(folders["reward"]), config, seed=SEED)
    matches(result["runs"]["entrgi"], expected)


def test_compile_reaches_both_models(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noting(load):
        def loader(*arguments: object, compile: bool, **options: object) -> object:
            asked.append(compile)
            return load(*arguments, compile=False, **options)

        return loader

    for name in ("load_denoiser", "load_reward"):
        monkeypatch.setattr(entrgi, name, noting(getattr(entrgi, name)), raising=False)
    named = ["sample", "--model", folders["denoiser"], "--reward", folders["reward"], "-p", "the", "-l", "2", "-k", "1"]
    run(*named, "--compile")
    run(*named)
    assert asked == [True, True, False, False]


CHATS = [
    [{"role": "user", "content": "the movie"}],
    [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}],
]


def test_prompts_files_messages_and_system(folders, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("the plot\n\nw4 w5\n")
    (tmp_path / "one.json").write_text(json.dumps(CHATS[1]))
    (tmp_path / "two.json").write_text(json.dumps(CHATS))
    system = {"role": "system", "content": "good bad"}
    texts = ["w9", "the plot", "w4 w5"]
    for arguments, prompts in (
        (["-p", "w9", "--prompts-file", str(tmp_path / "prompts.txt")], texts),
        (["--messages", str(tmp_path / "one.json")], CHATS[1:]),
        (
            ["-p", "w9", "--messages", str(tmp_path / "two.json"), "--system", "good bad"],
            [[system, {"role": "user", "content": "w9"}], *([system, *chat] for chat in CHATS)],
        ),
    ):
        named = ["--model", folders["chat"], "--reward", folders["reward"], "--no-include-prompt"]
        named += ["-k", "1", "-l", "3", "--seed", str(SEED)]
        result = run_json("sample", *named, *arguments)["runs"]["entrgi"]
        assert [each["prompt"] for each in result["results"]] == prompts
        reward = entrgi.load_reward(folders["reward"], include_prompt=False)
        pair = entrgi.load_denoiser(folders["chat"]), reward
        config = preset("paper", num_return_sequences=1, max_new_tokens=3)
        matches(result, generate(prompts, *pair, config, seed=SEED))
    assert "system: 'good bad'\nuser: 'w9'" in run("sample", *named, *arguments)


# --- files ------------------------------------------------------------------------------------------------------


def test_trace_and_plot_are_written(folders, tmp_path) -> None:
    named = ["--model", folders["denoiser"], "--reward", folders["reward"], "-p", "the movie", "-k", "2", "-l", "4"]
    files = ["--trace", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "out.png")]
    result = run_json("sample", *named, "--seed", "5", "--compare", *files)
    written = trace.read(tmp_path / "out.jsonl")
    assert [each.name for each in written.runs] == ["unguided", "entrgi"]
    assert written.source["denoiser"] == folders["denoiser"]
    assert written.source["seed"] == 5
    for each in written.runs:
        made = result["runs"][each.name]
        assert each.config == made["config"]
        assert [r.texts for r in each.results] == [r["texts"] for r in made["results"]]
        assert [step.step for step in each.steps] == made["history"]["step"]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.png"]


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-0.7"], "temperature must be 0 or in [1e-6, 1e6], got -0.7"),
        (["--alg", "best"], "alg must be one of"),
        (["--guidance", "magic"], "guidance must be one of"),
        (["--top-p", "1.5"], "top_p must be in [0, 1], got 1.5"),
        (["-k", "0"], "num_return_sequences must be an integer >= 1, got 0"),
        (["--preset", "best"], "--preset must be one of paper, rgrl, got 'best'"),
        (["--guidance-interval", "1:2:3"], "--guidance-interval: expected a number of steps (4) or a window (8:96)"),
        (["--guidance-interval", "x"], "--guidance-interval: expected a number of steps"),
        (["--guidance-interval", "5:2"], "guidance_interval must be an integer >= 1 or a window"),
        (["--logits-dtype", "int8"], "--logits-dtype must be one of float32"),
        (["--best-of", "2"], "best_of must be >= num_return_sequences (4), got 2"),
        (["--cuda-graphs", "--device", "cpu"], "cuda_graphs"),
        (["--prompt", "A [MASK] film"], "holds the mask token"),
        (["-l", "400"], "expected at most the denoiser's context"),
        (["--prompt", "I", "--model", "no/such/folder/here"], "no folder 'no/such/folder/here'"),
        (["--reward", "no/such/folder/here"], "no folder 'no/such/folder/here'"),
        (["--prompts-file", "missing.txt"], "no file 'missing.txt'"),
        (["--messages", "missing.json"], "--messages: no file 'missing.json'"),
        (["--messages", __file__], "is not JSON"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--missing", "drop"], "--missing must be one of unk, zero, got 'drop'"),
        (["--reward-kind", "judge"], "--reward-kind must be one of classifier, likelihood, got 'judge'"),
        (["--reward-kind", "likelihood"], "the embedded pair's reward is a classifier"),
        (
            ["--reward-weight", "1", "--reward-weight", "2"],
            "--reward-weight: expected one for each of 1 rewards, got 2",
        ),
        (["--adapter", "a", "--adapter", "b"], "--adapter: expected one, or one for each of 1 rewards, got 2"),
        (["--adapter", "a"], "--adapter: expected a checkpoint as --reward"),
        (["--model-adapter", "a"], "--model-adapter: expected a checkpoint as --model"),
        (["--guidance", "none", "--compare"], "--compare: expected a --guidance"),
        (["--trace", "no/folder/x.jsonl"], "--trace: no folder"),
        (["--trace", "."], "--trace: '.' is a folder"),
        (["--plot", "curves.gif"], "--plot: expected a file name ending in .png"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    output = run("sample", *arguments, code=2)
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output
    assert len([line for line in output.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[]", "expected a list of messages"),
        ('{"role": "user", "content": "a"}', "expected a list of messages"),
        ('[{"role": "user"}]', "chat 0: expected text or messages with 'role' and 'content'"),
        ('[[{"role": "user", "content": 1}]]', "chat 0: message 0 (role 'user') has the content 1, expected text"),
        ('[[{"role": "user", "content": [{"type": "image"}]}]]', "has the part {'type': 'image'}, expected"),
        ('[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]', "has a system message already: 'a'"),
    ],
)
def test_bad_messages(tmp_path, data: str, message: str) -> None:
    (tmp_path / "m.json").write_text(data)
    assert message in run("sample", "--messages", str(tmp_path / "m.json"), "--system", "x", code=2).replace("\n", " ")


def test_failures_exit_with_one(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr(entrgi, "generate", fail, raising=False)
    assert "error: the device is gone" in run(*quick, code=1)


def test_numbers_that_json_lacks_are_null_and_named() -> None:
    data, lost = display.finite({"a": [1.0, math.nan, {"b": -math.inf}], "c": (math.inf,), "d": "nan", "e": None})
    assert data == {"a": [1.0, None, {"b": None}], "c": [None], "d": "nan", "e": None}
    assert lost == {"a[1]": "nan", "a[2].b": "-inf", "c[0]": "inf"}


# --- Ctrl-C -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C after so many steps: call it with the number."""

    def press(after: int) -> None:
        seen = []

        def on_step(_state: object) -> None:
            seen.append(1)
            if len(seen) == after:
                raise KeyboardInterrupt

        @contextmanager
        def progress(*_args: object, **_kwargs: object):
            yield lambda _name, _steps: on_step

        monkeypatch.setattr(display, "progress", progress)

    return press


def test_interrupt_prints_what_is_done(quick, pressed) -> None:
    pressed(1)
    output = run(*quick, code=130)
    assert "the movie was" in output
    assert "interrupted" in output
    assert "nan" not in output


def test_interrupt_leaves_a_valid_partial_trace(quick, pressed, tmp_path) -> None:
    pressed(2)
    files = ["--trace", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "out.png")]
    run(*quick, *files, code=130)
    (made,) = trace.read(tmp_path / "out.jsonl").runs
    assert not made.complete
    assert len(made.steps) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.png"]


def test_interrupt_in_the_second_run_keeps_the_first(quick, pressed, tmp_path) -> None:
    pressed(3 + 1)  # four tokens are three steps
    run(*quick, "--compare", "--trace", str(tmp_path / "out.jsonl"), code=130)
    written = trace.read(tmp_path / "out.jsonl")
    assert [(each.name, each.complete, len(each.steps)) for each in written.runs] == [
        ("unguided", True, 3),
        ("entrgi", False, 1),
    ]


def test_interrupted_json_has_nulls(quick, pressed) -> None:
    pressed(1)
    result = CliRunner().invoke(cli.app, [*quick, "--json"])
    assert result.exit_code == 130
    data = json.loads(result.stdout)
    assert data["runs"]["entrgi"]["results"][0]["rewards"] == [None, None]
    assert data["not_finite"]["runs.entrgi.results[0].rewards[1]"] == "nan"


def test_interrupt_before_the_first_step(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entrgi, "generate", interrupted, raising=False)
    assert "interrupted before the first step" in run(*quick, code=130)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
    ids=lambda each: str(each),
)
def test_signals_end_a_running_generation(tmp_path, number: signal.Signals, code: int) -> None:
    """The real thing: a process, a signal in the middle, its exit code, a valid trace and nothing else left."""
    file = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "entrgi", "sample", "-k", "1", "-l", "100", "-t", "100", "-m", "3"]
    process = subprocess.Popen(
        [*command, "--trace", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", "FORCE_COLOR": "1"},
    )
    seen = b""
    try:
        os.set_blocking(process.stderr.fileno(), False)
        deadline = time.monotonic() + 120
        while not re.search(rb"[1-9]\d*/100", seen):  # the progress bar: some steps are done
            assert time.monotonic() < deadline, seen
            assert process.poll() is None, seen
            seen += process.stderr.read() or b""
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert b"The movie was" in output
    (made,) = trace.read(file).runs
    assert not made.complete
    assert 1 <= len(made.steps) < 100
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
