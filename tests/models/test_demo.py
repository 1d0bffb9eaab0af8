"""The embedded pair: small, whole, the same vocabulary on both sides, and steerable."""

import shutil
from pathlib import Path

import pytest
import torch

import entrgi
from entrgi import demo
from entrgi.demo import weights
from entrgi.prompts import Completion

FOLDER = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def pair() -> tuple[entrgi.MaskedLM, entrgi.SequenceClassifierReward]:
    return entrgi.MaskedLM(*demo.load_denoiser()), entrgi.SequenceClassifierReward(*demo.load_reward())


def test_ships_in_24_megabytes() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) <= 24e6


def test_reward_tells_good_from_bad(pair) -> None:
    texts = ["A wonderful film, I loved it.", "The movie was not bad.", "This is not a good movie.", "A dull mess."]
    scores = pair[1].score([Completion("", text, text) for text in texts]).tolist()
    assert scores[0] > 1
    assert scores[1] > 0
    assert scores[2] < -1
    assert scores[3] < -1


def test_guidance_steers_both_ways(pair) -> None:
    """Same seeds: clearly better texts going up, clearly worse going down."""
    means = {}
    for name, changes in (
        ("none", {"guidance": "none", "entropy_rule": "initial"}),
        ("up", {}),
        ("down", {"reward_scale": -1.0}),
    ):
        config = entrgi.preset("paper", num_return_sequences=8, max_new_tokens=10, steps=10, **changes)
        means[name] = entrgi.generate("The movie was", *pair, config, seed=0).rewards.mean().item()
    assert means["up"] > means["none"] + 0.5
    assert means["down"] < means["none"] - 0.5


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "reward" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[:-100])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(weights.DemoFilesError, match=r"model\.safetensors"):
        weights.verify(folder)


def test_vocabulary_is_shared(pair) -> None:
    denoiser, reward = pair
    assert denoiser.tokenizer.get_vocab() == reward.tokenizer.get_vocab()
    assert denoiser.vocab_size == reward.weight.shape[0]
    with torch.no_grad():
        logits = denoiser.model(input_ids=torch.tensor([[2, 3, 4]])).logits
    assert logits.shape == (1, 3, denoiser.vocab_size)
