"""`entrgi profile`: its times add up, its floors are those counted by hand, and what it writes can be read."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import entrgi
from entrgi import cli
from entrgi.profile import Profile, Rates, figure, measure_rates, profile, report
from entrgi.profile.work import WorkCounter
from entrgi.timing import span
from entrgi_ext import _bindings
from support import tiny

PROMPT, PROMPT_TOKENS = "the movie was", 3
K, L, M = 2, 4, 2
OPTIONS = {"max_new_tokens": L, "steps": L, "num_return_sequences": K, "guidance_steps": M}
ROWS = [8, 6, 4]  # the paper's schedule commits 0, 1, 1 and 2 of 4 positions; steps without a commit are skipped
HIDDEN, INTERMEDIATE, LAYERS, WIDTH = 32, 64, 2, tiny.LOGITS_WIDTH
FP32 = 4


@pytest.fixture(scope="module", autouse=True)
def machine():
    """A machine that copies 10 GB/s and computes 1 GFLOP/s: slow enough for products to be its bound, and not noisy."""

    def rates(_device: torch.device, dtypes: list[torch.dtype], working_set: int) -> Rates:
        return Rates(1e10, working_set, {str(dtype).removeprefix("torch."): 1e9 for dtype in dtypes})

    patch = pytest.MonkeyPatch()
    patch.setattr("entrgi.profile.profiler.measure_rates", rates)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def guided() -> Profile:
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    for model in (denoiser.model, reward.model):
        model.set_attn_implementation("eager")  # whose backward computes nothing twice
    return profile(PROMPT, denoiser, reward, **OPTIONS)


def part(result: Profile, name: str) -> object:
    (found,) = [each for each in result.parts if each.name == name]
    return found


def test_parts_add_up_to_the_step(guided: Profile) -> None:
    assert guided.parts[-1].name == "idle"
    assert sum(each.seconds for each in guided.parts) == pytest.approx(guided.seconds)
    assert sum(each.share for each in guided.parts) == pytest.approx(1)
    assert sum(each.floor for each in guided.parts[:-1]) == pytest.approx(guided.floor)
    for step in guided.steps:
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert set(step.floors) == set(step.parts) - {"idle"}
    assert sum(step.seconds for step in guided.steps) / len(guided.steps) == pytest.approx(guided.seconds)


def test_every_part_is_there_with_a_floor(guided: Profile) -> None:
    names = ["denoiser", "reward forward", "reward backward", "sample_tokens", "relaxed_embedding", "logit_update"]
    assert [each.name for each in guided.parts] == [*names, "commit", "idle"]
    assert [each.calls for each in guided.parts] == [1, M, M, M + 1, M, M, 1, 0]
    for each in guided.parts[:-1]:
        assert each.seconds > 0
        assert each.floor > 0
        assert each.ratio == each.seconds / each.floor
        assert each.bound == ("bytes" if each.name in ("sample_tokens", "commit") else "flops")
        assert each.floor == pytest.approx(each.bytes / 1e10 if each.bound == "bytes" else each.flops / 1e9)
    idle = guided.parts[-1]
    assert (idle.floor, idle.ratio, idle.bound) == (None, None, None)
    assert idle.seconds > 0


def test_rows_follow_the_schedule(guided: Profile) -> None:
    history = entrgi.generate(PROMPT, tiny.denoiser(), tiny.bert_reward(), seed=0, **OPTIONS).history
    left = [K * L - sum(history.committed[:i]) for i in range(len(history.committed))]
    assert [step.rows for step in guided.steps] == guided.shapes["N"] == left == ROWS


def test_floors_of_the_operators_are_those_of_the_bindings(guided: Profile) -> None:
    def floor(name: str, rows: int, **options: object) -> int:
        return _bindings.floor(name, rows, WIDTH, HIDDEN, "float32", "float32", **options)["bytes"]

    mean = len(ROWS)
    adam = [{"step": 1, "last": False}, {"step": 2, "last": True}]
    expected = {
        "sample_tokens": sum((M + 1) * floor("sample_tokens", n) for n in ROWS) / mean,
        "relaxed_embedding": sum(M * floor("relaxed_embedding", n) for n in ROWS) / mean,
        "logit_update": sum(floor("adam_step_", n, **options) for n in ROWS for options in adam) / mean,
        "commit": sum(floor("commit_", n, trajectories=K) for n in ROWS) / mean,
    }
    assert {name: part(guided, name).bytes for name in expected} == pytest.approx(expected)
    products = sum(2 * n * WIDTH * HIDDEN for n in ROWS) / mean
    assert part(guided, "relaxed_embedding").flops == part(guided, "logit_update").flops == M * products
    assert part(guided, "sample_tokens").flops == part(guided, "commit").flops == 0


def test_flops_of_the_models_are_those_counted_by_hand(guided: Profile) -> None:
    length = 1 + PROMPT_TOKENS + L + 1  # [CLS] prompt response [SEP]
    tokens = K * length
    linear = LAYERS * tokens * 2 * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE)
    attention = LAYERS * K * 2 * 2 * length**2 * HIDDEN
    head = sum(ROWS) / len(ROWS) * 2 * (HIDDEN**2 + HIDDEN * WIDTH)  # on masked positions only
    assert part(guided, "denoiser").flops == pytest.approx(linear + attention + head)
    classifier = K * 2 * (HIDDEN**2 + HIDDEN)
    assert part(guided, "reward forward").flops == M * (linear + attention + classifier)
    # Frozen parameters: the gradient of every linear layer's input alone, of attention those of both products' inputs.
    assert part(guided, "reward backward").flops == M * (linear + 2 * attention + classifier)


def test_the_models_read_their_parameters_and_write_their_result(guided: Profile) -> None:
    encoder = LAYERS * (4 * (HIDDEN**2 + HIDDEN) + 2 * HIDDEN * INTERMEDIATE + INTERMEDIATE + HIDDEN + 4 * HIDDEN)
    head = HIDDEN**2 + 3 * HIDDEN + HIDDEN * WIDTH + WIDTH
    result = sum(ROWS) / len(ROWS) * WIDTH
    least = encoder + head + result
    lookups = 3 * K * (1 + PROMPT_TOKENS + L + 1) * HIDDEN  # word, position, type: at most one row of each per token
    assert FP32 * least < part(guided, "denoiser").bytes <= FP32 * (least + lookups + 2 * HIDDEN)


def count(work: object) -> tuple[int, dict[str, int]]:
    with WorkCounter() as counter, span("step"), span("work"):
        work()
    ((result,),) = counter.counted
    return result.bytes, dict(result.flops)


def test_a_parameter_counts_once_and_a_lookup_by_its_rows() -> None:
    table, linear, ids = nn.Embedding(10, 4), nn.Linear(4, 6), torch.tensor([1, 2, 3])

    def work() -> None:
        for _ in range(2):
            linear(table(ids))

    assert count(work) == (FP32 * (3 * 4 + 4 * 6 + 6 + 3 * 6), {"float32": 2 * 2 * 3 * 4 * 6})


def test_backward_is_counted_where_it_runs() -> None:
    linear, x = nn.Linear(4, 6).requires_grad_(False), torch.randn(3, 4, requires_grad=True)
    with WorkCounter() as counter, span("step"):
        with span("forward"):
            y = linear(x)
        with span("backward"):
            torch.autograd.grad(y, x, torch.ones_like(y))
    ((forward, backward),) = counter.counted
    assert forward.flops == backward.flops == {"float32": 2 * 3 * 4 * 6}
    assert backward.bytes == FP32 * (4 * 6 + 3 * 4)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_counted_whatever_kernel_runs(heads: int) -> None:
    """Fewer key than query heads do the same products. The fused backward computes the scores again."""
    batch, length, width = 2, 8, 16
    query = torch.randn(batch, 4, length, width, requires_grad=True)
    key, value = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in "kv")
    with WorkCounter() as counter, span("step"):
        with span("forward"):
            y = functional.scaled_dot_product_attention(query, key, value, enable_gqa=heads != 4)
        with span("backward"):
            torch.autograd.grad(y.sum(), (query, key, value))
    ((forward, backward),) = counter.counted
    one = 2 * batch * 4 * length**2 * width
    assert forward.flops["float32"] == 2 * one
    assert backward.flops["float32"] in (4 * one, 5 * one)


def test_flops_are_kept_by_dtype() -> None:
    def work() -> None:
        torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
        torch.ones(2, 2, dtype=torch.float64) @ torch.ones(2, 2, dtype=torch.float64)

    assert count(work)[1] == {"bfloat16": 16, "float64": 16}
    rates = Rates(copy=1.0, copy_bytes=0, matmul={"bfloat16": 8.0, "float64": 4.0})
    assert rates.seconds(5, {"bfloat16": 16, "float64": 16}) == (6, "flops")
    assert rates.seconds(7, {"bfloat16": 16, "float64": 16}) == (7, "bytes")


def test_counting_changes_no_token() -> None:
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    plain = entrgi.generate(PROMPT, denoiser, reward, seed=0, **OPTIONS)
    with WorkCounter():
        counted = entrgi.generate(PROMPT, denoiser, reward, seed=0, **OPTIONS)
    assert torch.equal(plain.sequences, counted.sequences)
    assert torch.equal(plain.rewards, counted.rewards)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"guidance": "none"}, ["denoiser", "sample_tokens", "commit", "idle"]),
        (
            {"guidance": "gumbel"},
            [
                *("denoiser", "reward forward", "reward backward", "sample_tokens", "logit_statistics"),
                *("gumbel_perturb", "relaxed_embedding", "logit_update", "commit", "idle"),
            ],
        ),
    ],
)
def test_other_guidance_has_other_parts(options: dict, names: list[str]) -> None:
    result = profile(PROMPT, tiny.denoiser(), tiny.bert_reward(), repeats=1, first_steps=1, **OPTIONS, **options)
    assert [each.name for each in result.parts] == names
    assert all(each.floor > 0 for each in result.parts[:-1])
    assert len(result.steps) == 1
    if "gumbel_perturb" in names:
        floor = _bindings.floor("gumbel_perturb", ROWS[0], WIDTH, 1, "float32")
        assert part(result, "gumbel_perturb").bytes == M * floor["bytes"]


def test_micro_batches_are_summed() -> None:
    whole, divided = (
        profile(PROMPT, tiny.denoiser(), tiny.bert_reward(), repeats=1, max_rows=rows, **OPTIONS) for rows in (None, L)
    )
    assert part(whole, "denoiser").calls == 1
    assert part(divided, "denoiser").calls == pytest.approx((2 + 2 + 1) / 3)  # 2 x 4 and 2 x 3 rows, then 2 x 2 fit
    assert divided.shapes["N"] == whole.shapes["N"] == ROWS
    assert part(divided, "denoiser").flops == part(whole, "denoiser").flops
    assert part(divided, "relaxed_embedding").bytes > part(whole, "relaxed_embedding").bytes  # E is read twice


def test_float64_moves_twice_the_bytes() -> None:
    single, double = (
        profile(PROMPT, tiny.denoiser(dtype), tiny.bert_reward(dtype), repeats=1, first_steps=1, **OPTIONS)
        for dtype in (torch.float32, torch.float64)
    )
    assert set(double.rates.matmul) == {"float64"}
    for name in ("relaxed_embedding", "logit_update", "sample_tokens"):
        assert part(double, name).bytes == 2 * part(single, name).bytes


def test_a_run_that_does_not_repeat_itself_is_refused() -> None:
    denoiser, calls = tiny.denoiser(), 0
    logits = denoiser.logits

    def changing(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return logits(*args) * (0.01 if calls <= L else 100)  # later runs are so sure that the threshold is met

    denoiser.logits = changing
    options = {**OPTIONS, "guidance": "none", "alg": "maskgit_plus", "threshold": 0.9}
    with pytest.raises(RuntimeError, match=r"steps were counted and \d measured with the same seed"):
        profile(PROMPT, denoiser, tiny.bert_reward(), **options)


def test_every_run_is_announced() -> None:
    activities = []
    result = profile(PROMPT, tiny.denoiser(), tiny.bert_reward(), repeats=2, on_step=activities.append, **OPTIONS)
    steps = len(ROWS)
    assert activities == ["counting"] * steps + ["warming up"] + ["measuring"] * 2 * steps
    assert result.repeats == 2


@pytest.mark.parametrize("option", ["repeats", "first_steps"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be >= 1, got 0"):
        profile(PROMPT, tiny.denoiser(), tiny.bert_reward(), **{option: 0}, **OPTIONS)


def test_the_copy_is_as_large_as_what_a_step_goes_through(guided: Profile) -> None:
    """Parameters, E, and z with two moments at the first step's N."""
    table, logits = FP32 * WIDTH * HIDDEN, ROWS[0] * WIDTH * 3 * FP32
    assert guided.rates.copy_bytes == guided.shapes["parameter_bytes"] + table + logits


def test_rates_are_those_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrgi.profile.rates.SECONDS", 0.001)
    rates = measure_rates(torch.device("cpu"), [torch.float32, torch.float64], working_set=0)
    assert rates.copy_bytes == 8 << 20
    assert 1e8 < rates.copy < 1e13
    assert set(rates.matmul) == {"float32", "float64"}
    assert all(1e8 < rate < 1e14 for rate in rates.matmul.values())


def test_figure_has_a_pair_of_bars_for_every_part(guided: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = figure.figure(guided, torch.device("cpu"))
    left, right = drawn.axes
    measured = [1e3 * each.seconds for each in guided.parts]
    floors = [1e3 * each.floor for each in guided.parts if each.floor is not None]
    assert sorted(bar.get_width() for bar in left.patches) == pytest.approx(sorted(measured + floors))
    assert [label.get_text() for label in left.get_yticklabels()] == [each.name for each in guided.parts]
    heights = [bar.get_height() for bar in right.patches if hasattr(bar, "get_height")]
    assert sum(heights) == pytest.approx(sum(1e3 * step.seconds for step in guided.steps))
    figure.write(tmp_path / "profile.png", guided, torch.device("cpu"))
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_readable() -> None:
    assert [report.milliseconds(x) for x in (1.2345, 0.01234, 1e-6, 1e-9)] == ["1,234", "12.3", "0.001", "< 0.001"]
    assert [report.times(x) for x in (1.94, 11599.0, None)] == ["1.9x", "11,599x", ""]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["profile", "-k", "1", "-l", "4", "-m", "1", "--repeats", "1", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_command_prints_a_table_and_writes_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data_file, image = tmp_path / "profile.json", tmp_path / "profile.png"
    output = run("--first-steps", "2", "--json", str(data_file), "--png", str(image))
    for name in ("denoiser", "reward forward", "reward backward", "sample_tokens", "commit", "idle", "step", "GB/s"):
        assert name in output
    data = json.loads(data_file.read_text(), parse_constant=pytest.fail)
    assert data["denoiser"] == "demo"
    assert data["config"]["guidance_steps"] == 1
    assert len(data["steps"]) == 2
    assert data["shapes"]["V"] == 8192
    assert sum(each["seconds"] for each in data["parts"]) == pytest.approx(data["step"]["seconds"])
    assert image.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--png", "profile.jpg"], "--plot: expected a file name ending in .png, .pdf, .svg, got 'profile.jpg'"),
        (["--plot", "profile.jpg"], "--plot: expected a file name ending in .png, .pdf, .svg, got 'profile.jpg'"),
        (["--plot", "same.png", "--json", "same.png"], "--plot: 'same.png' is the file of --json, too"),
        (["--repeats", "1000000000"], "--repeats: expected an integer >= 1 and <= 10000, got '1000000000'"),
        (["--json", "missing-folder/x.json"], "--json: no folder"),
        (["--guidance", "magic"], "guidance must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    output = run(*arguments, code=2)
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


def test_interrupt_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from entrgi import profile as profiling

    def interrupted(*_args: object, on_step: object, **_options: object) -> None:
        on_step("counting")
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile", interrupted)
    assert "interrupted" in run("--json", str(tmp_path / "profile.json"), code=130)
    assert list(tmp_path.iterdir()) == []
