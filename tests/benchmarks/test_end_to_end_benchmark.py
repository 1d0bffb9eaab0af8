"""The port of the published loop is right, and ``benchmarks/end_to_end.py`` compares what it says it compares."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from entrgi import preset
from entrgi.timing import Recorder
from support import method, tiny, transcribe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import end_to_end
import published_loop
import random_pairs

SEEDS = torch.tensor([[3, -(2**40)], [5, 2**61]])
DETAILS = {"max_new_tokens": 5, "steps": 4, "num_return_sequences": 2}


def keyed(models, config, seeds=SEEDS):
    return published_loop.KeyedDraw(config.top_p, config.top_k, seeds.flatten(), published_loop.never_drawn(models))


def check_against_the_method(prompts=("the movie", "w3 was"), tok=None, eos_bias=0.0, **options):
    """BERT-type models, fp64: the port with keyed draws against ``method.py``, token for token."""
    denoiser, reward = transcribe.tiny_models(torch.float64, tok, eos_bias)
    config = preset("paper", **{**DETAILS, **options})
    models = published_loop.adapt(denoiser, reward, shift=False, attention=("sdpa", "sdpa"))
    result = published_loop.generate(prompts, models, config, draw=keyed(models, config))
    own = {name: value for name, value in {**DETAILS, **options}.items() if name not in transcribe.NOT_OF_THE_METHOD}
    expected = transcribe.transcribed(
        denoiser,
        reward,
        prompts,
        SEEDS,
        transcribe.method_options("paper", denoiser.tokenizer.pad_token_id, **own),
        config.max_new_tokens,
    )
    assert result.tokens.flatten(0, 1).tolist() == [list(tokens) for tokens, _ in expected]
    return result


@pytest.mark.parametrize("guidance", ["entrgi", "aps", "expectation"])
@pytest.mark.parametrize("alg", published_loop.SUPPORTED)
def test_port_equals_the_method(guidance, alg):
    check_against_the_method(guidance=guidance, alg=alg)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.0},
        {"top_p": 1.0, "top_k": 2},
        {"top_p": 0.5, "top_k": 3, "temperature": 1.3},
        {"guidance_steps": 1, "guidance_lr": 0.1},
        {"steps": 9},
        {"alg": "maskgit_plus", "eos_bias": 3.0, "max_new_tokens": 6, "steps": 3, "guidance_steps": 1},
        {"deprioritize_eos": False, "eos_bias": 4.0},
        {"deprioritize_eos": False, "eos_bias": 4.0, "tok": tiny.tokenizer(pad="[SEP]")},
    ],
    ids=str,
)
def test_port_equals_the_method_in_options(options):
    check_against_the_method(**options)


def test_port_of_shifted_models_equals_the_method():
    """Dream and Skywork in small, prompts of different lengths: the published padding on the left."""
    pair = end_to_end.TINY_PAIR(torch.float64, "cpu")
    models, config = pair.models, preset("paper", **DETAILS)
    prompts = ["w1 w2", "w5 w4 w3 w9"]
    result = published_loop.generate(prompts, models, config, draw=keyed(models, config))
    embedding = models.reward.get_input_embeddings().weight[models.token_map]
    options = method.Options(steps=4, mask=models.mask_id, eos=models.eos_id, pad=models.pad_id)

    def logits_of(tokens):
        everything = torch.zeros(1, 1, len(tokens), len(tokens), dtype=torch.float64)
        with torch.no_grad():
            logits = models.denoiser(torch.tensor([list(map(int, tokens))]), attention_mask=everything).logits[0]
        return logits[[0, *range(len(tokens) - 1)]]

    def reward_model(embeds, mask):
        return models.reward(inputs_embeds=embeds[None], attention_mask=mask[None].long()).logits[0, 0]

    def ids_of(text):
        return models.tokenizer(text).input_ids

    with published_loop.own_attention(models):
        for b, prompt in enumerate(prompts):
            start = ids_of(f"<|im_start|> user {prompt} <|im_end|> <|im_start|> assistant")
            window = (len(start), len(start) + config.max_new_tokens)
            for k in range(2):
                tokens = method.generate(
                    [*start, *[models.mask_id] * config.max_new_tokens],
                    int(SEEDS[b, k]),
                    window,
                    options,
                    logits_of,
                    embedding,
                    start,
                    ids_of("<|im_end|>"),
                    reward_model,
                    published_loop.never_drawn(models),
                )
                assert result.responses[b, k].tolist() == list(map(int, tokens[window[0] :]))


def test_port_does_the_published_work():
    """Every step, ``lm_head`` at every position, the whole reward sequence in every Adam step, texts one at a time."""
    pair, config = end_to_end.TINY_PAIR(torch.float32, "cpu"), preset("paper", **{**DETAILS, "steps": 9})
    heads, rewards = [], []
    pair.models.denoiser.lm_head.register_forward_hook(lambda _module, _inputs, logits: heads.append(logits.shape))
    pair.models.reward.model.register_forward_hook(
        lambda _module, _inputs, output: rewards.append(output.last_hidden_state.shape[:2])
    )
    prompt = pair.models.tokenizer("<|im_start|> user w1 w2 <|im_end|> <|im_start|> assistant").input_ids
    published_loop.generate(["w1 w2"], pair.models, config)
    assert heads == [(2, len(prompt) + 5, pair.denoiser.vocab_size)] * 9
    assert rewards[:-2] == [(2, len(prompt) + 5 + 1)] * (9 * 3)
    assert [shape[0] for shape in rewards[-2:]] == [1, 1]


def test_published_draws_follow_the_filtered_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12, dtype=torch.float64).mul(2)
    expected = method.filtered(logits[0] * 0.7, method.Options(steps=1, top_p=0.8), torch.zeros(12, dtype=torch.bool))
    draw = published_loop.PublishedDraw(top_p=0.8)
    tokens, probabilities = draw(logits.expand(20_000, -1), 0, 0, 0, torch.zeros(20_000, dtype=torch.long), 0)
    torch.testing.assert_close(probabilities[0], expected)
    kept = expected > 0
    counts = tokens.bincount(minlength=12)
    assert counts[~kept].sum() == 0
    chi_square = ((counts - 20_000 * expected)[kept] ** 2 / (20_000 * expected[kept])).sum()
    assert chi_square < 30  # at most 11 degrees of freedom: p < 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "none"}, "guidance must be"),
        ({"alg": "origin"}, "alg must be"),
        ({"alg_temp": 0.5}, "alg_temp is no option"),
        ({"block_length": 2}, "block_length is no option"),
    ],
    ids=str,
)
def test_port_refuses_what_it_does_not_do(options, message):
    models = end_to_end.TINY_PAIR(torch.float32, "cpu").models
    with pytest.raises(ValueError, match=message):
        published_loop.generate(["w1"], models, preset("paper", **{**DETAILS, **options}))


def test_port_refuses_left_padding_of_absolute_positions():
    models = published_loop.adapt(*transcribe.tiny_models(torch.float32), shift=False, attention=("sdpa", "sdpa"))
    with pytest.raises(ValueError, match="cannot be padded on the left"):
        published_loop.generate(["the", "the movie"], models, preset("paper", **DETAILS))


@pytest.fixture(scope="module")
def embedded():
    return end_to_end.demo_pair(torch.float32, "cpu")


@pytest.mark.parametrize("top_p", [0.95, 0.0])
def test_entrgi_equals_the_port_on_the_embedded_pair(embedded, top_p):
    """fp32, whole generations; without randomness the published code path runs as it is."""
    config = preset("paper", max_new_tokens=5, steps=5, num_return_sequences=2, top_p=top_p)
    check = end_to_end.check_equal(embedded, "demo", config, seed=1, keyed=top_p > 0)
    assert check.equal
    assert check.largest_reward_difference < 1e-4


def test_entrgi_equals_the_port_on_shifted_models(device):
    pair = end_to_end.TINY_PAIR(torch.float32, device)
    check = end_to_end.check_equal(pair, "tiny", preset("paper", max_new_tokens=6, steps=6), seed=0)
    assert check.equal


def test_unequal_tokens_are_noticed():
    """The published draws are not those of the keys: same models, same settings, other tokens."""
    pair = end_to_end.TINY_PAIR(torch.float32, "cpu")
    assert not end_to_end.check_equal(pair, "tiny", preset("paper", **DETAILS), seed=0, keyed=False).equal


def test_the_large_shapes_are_those_of_the_checkpoints():
    """Parameter counts of Dream-v0-Instruct-7B and Skywork-Reward-V2-Qwen3-1.7B; nothing is allocated."""
    dream = random_pairs.dream(random_pairs.DREAM_7B, torch.bfloat16, "meta")
    assert sum(p.numel() for p in dream.parameters()) == 7_615_616_512
    reward = random_pairs.skywork(random_pairs.SKYWORK_1_7B, torch.bfloat16, "meta")
    assert sum(p.numel() for p in reward.parameters()) == 1_720_577_024
    assert {p.dtype for p in (*dream.parameters(), *reward.parameters())} == {torch.bfloat16}


def test_smoke_mode(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "results" / "end_to_end"
    peaks = {"published": 2**22, "published, our products": 2**22, "entrgi": 2**20}
    monkeypatch.setattr(end_to_end, "peak_in_fresh_process", lambda _name, variant, _threads: peaks[variant])
    arguments = ["--smoke", "--workloads", "smoke", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments])
    end_to_end.main()

    written = json.loads(output.with_suffix(".json").read_text())
    assert all(check["equal"] for check in written["equal_tokens"])
    published, control, ours = written["results"]
    assert [row["variant"] for row in written["results"]] == list(peaks)
    for row in (published, control, ours):
        assert row["runs"] == 2
        assert 0 < row["least_s"] <= row["median_s"] <= row["most_s"]
        split = [row[f"{part}_s"] for part in end_to_end.SPLIT]
        assert all(seconds >= 0 for seconds in split)
        assert min(row[f"{part}_s"] for part in ("denoiser", "vocabulary", "reward forward", "reward backward")) > 0
    assert ours["speedup"] == pytest.approx(published["median_s"] / ours["median_s"], abs=0.02)
    assert (published["peak_MiB"], ours["peak_MiB"]) == (4.0, 1.0)
    assert written["verdicts"][0].endswith("peak memory 1 against 4 MiB: lower")
    with output.with_suffix(".csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == list(peaks)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--readme", "--output", str(output)])
    printed = capsys.readouterr().out
    end_to_end.main()
    table = capsys.readouterr().out
    assert table in printed
    assert f"**{ours['speedup']:.1f}x**" in table


# Of the four steps, entrgi skips the first: its schedule commits nothing in it.
@pytest.mark.parametrize(("variant", "skipped"), [("published", 0), ("entrgi", 1)])
def test_part_of_a_generation_is_its_first_steps(variant, skipped):
    runner = end_to_end.Runner(replace(end_to_end.SMOKE["smoke"], taken=3))
    for steps, taken in ((3, None), (2, 2), (4, 99)):
        with Recorder() as recorder:
            runner.run(variant, 0, recorder if variant == "published" else None, taken=taken)
        assert len(recorder.steps()) == steps - skipped


def test_parts_of_generations_stay_out_of_the_results(monkeypatch, capsys):
    for arguments, message in (
        (["--steps", "16"], "--steps: give --output"),
        (["--steps", "0", "--smoke"], "--steps must be at least 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments])
        with pytest.raises(SystemExit):
            end_to_end.parse_arguments()
        assert message in capsys.readouterr().err


def test_a_missed_target_is_said_plainly():
    row = {"workload": "w", "variant": "published", "speedup": 1.0, "target": None, "peak_MiB": 10.0, "median_s": 19.0}
    ours = {**row, "variant": "entrgi", "speedup": 1.9, "target": 2.0, "median_s": 10.0, "model_share": 0.5}
    assert end_to_end.verdicts([row, ours]) == [
        "w: entrgi is 1.9x the published loop, target 2x: MISSED (50% is the models' own passes; 3.8x without all "
        "else); peak memory 10 against 10 MiB: NOT LOWER"
    ]
    control = {**row, "variant": "published, our products", "median_s": 15.0}
    assert (
        "1.9x the published loop (1.50x with our matrix products in it), target"
        in end_to_end.verdicts([row, control, ours])[0]
    )
    met = {**ours, "speedup": 2.0, "peak_MiB": 9.0}
    assert end_to_end.verdicts([row, met]) == [
        "w: entrgi is 2.0x the published loop, target 2x: met; peak memory 9 against 10 MiB: lower"
    ]


def test_peak_memory_sees_what_is_allocated(monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    size = 200 * 2**20

    def run(self, variant, seed, recorder=None, **options):
        if variant == "large" and "max_new_tokens" not in options:
            torch.ones(size, dtype=torch.uint8)

    monkeypatch.setattr(end_to_end.Runner, "run", run)
    workload = end_to_end.SMOKE["smoke"]
    assert end_to_end.peak_bytes(workload, "large") == pytest.approx(size, rel=0.05)
    assert end_to_end.peak_bytes(workload, "small") < 0.05 * size
