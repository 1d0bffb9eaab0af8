"""Which file of a checkpoint holds a tensor, for every kind of model that is loaded."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrgi import load_denoiser, load_reward
from support import checkpoints
from support import official_layouts as official

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Kind:
    """A checkpoint whose weights are laid out by the test."""

    def __init__(self, write, load):
        self.write, self.load = write, load

    def folder(self, path):
        """A folder with everything but weights, and the weights."""
        folder = self.write(path)
        weights = {}
        for file in sorted(path.glob("model*")):
            weights |= load_file(file) if file.suffix == ".safetensors" else {}
            file.unlink()
        return folder, weights

    def check(self, folder, weights):
        """Loaded, it has just these weights."""
        model = self.load(folder).model
        modules = {}
        if isinstance(folder, str):
            got = model.state_dict()
        else:
            cls = type(self.load(folder))
            modules = cls._modules(model)
            got = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            torch.testing.assert_close(got[f"{modules.get(path, path)}.{leaf}"], weight, rtol=0, atol=0)
        assert next(model.parameters()).dtype == torch.float32


def dream(path):
    return official.write_checkpoint(path, official.DREAM, official.dream_weights(official.DREAM))


def llada(path):
    return official.write_checkpoint(path, official.LLADA, official.llada_weights(official.LLADA))


KINDS = {
    "dream": Kind(dream, load_denoiser),
    "llada": Kind(llada, load_denoiser),
    "masked": Kind(lambda path: checkpoints.denoiser(path), load_denoiser),
    "classifier": Kind(lambda path: checkpoints.reward(path), load_reward),
    "causal": Kind(lambda path: checkpoints.language_model(path), load_reward),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def checkpoint(kind, tmp_path):
    """(folder, its path, weights by name), without weights."""
    folder, weights = kind.folder(tmp_path)
    return folder, tmp_path, weights


def other(weights):
    """Weights that are not those."""
    return {name: torch.full_like(weight, 7.0) for name, weight in weights.items()}


def halves(weights):
    names = sorted(weights)
    return {name: weights[name] for name in names[::2]}, {name: weights[name] for name in names[1::2]}


def write_shards(path, first, second, index=None):
    save_file(first, path / FIRST)
    save_file(second, path / SECOND)
    places = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)} if index is None else index
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards(kind, checkpoint):
    folder, path, weights = checkpoint
    write_shards(path, *halves(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kind.check(folder, weights)


def test_a_new_file_beside_an_old_index(kind, checkpoint):
    """The single file is the checkpoint; that an index names others is said."""
    folder, path, weights = checkpoint
    write_shards(path, *halves(other(weights)))
    save_file(weights, path / "model.safetensors")
    argument = "denoiser" if kind.load is load_denoiser else "reward"
    with pytest.warns(
        UserWarning, match=rf"{argument}: .* holds model\.safetensors, which is read.* 2 other .*{FIRST}"
    ):
        kind.check(folder, weights)


@pytest.mark.parametrize("content", ["lost shards", "itself"])
def test_an_index_beside_its_own_file(kind, checkpoint, content):
    folder, path, weights = checkpoint
    save_file(weights, path / "model.safetensors")
    place = {"lost shards": FIRST, "itself": "model.safetensors"}[content]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, place)}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind.check(folder, weights)
    said = [warning for warning in caught if "which is read" in str(warning.message)]
    assert bool(said) == (content == "lost shards")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_cannot_be_read_beside_a_file(kind, checkpoint, text):
    folder, path, weights = checkpoint
    save_file(weights, path / "model.safetensors")
    (path / INDEX).write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind.check(folder, weights)
    said = [warning for warning in caught if "model.safetensors beside it is read" in str(warning.message)]
    assert bool(said) == (not text.startswith("{") or text == "{")


@pytest.mark.parametrize("where", [FIRST, SECOND])
def test_stray_copies_in_other_shards(kind, checkpoint, where):
    """A tensor is read from the file that the index names for it, in whatever order files are read."""
    folder, path, weights = checkpoint
    first, second = halves(weights)
    index = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)}
    if where == FIRST:
        write_shards(path, {**first, **other(second)}, second, index)
    else:
        write_shards(path, first, {**other(first), **second}, index)
    kind.check(folder, weights)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "pytorch_model.safetensors",
        "shard-00000-model-00001-of-00001.safetensors",  # transformers reads the whole folder where there is one
        "consolidated.safetensors",
    ],
)
def test_files_that_nothing_names(kind, checkpoint, name):
    folder, path, weights = checkpoint
    write_shards(path, *halves(weights))
    save_file(other(weights), path / name)
    kind.check(folder, weights)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.", "module.module."],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_prefixes_of_wrappers(kind, checkpoint, prefix, sharded):
    folder, path, weights = checkpoint
    named = {prefix + name: weight for name, weight in weights.items()}
    if sharded:
        write_shards(path, *halves(named))
    else:
        save_file(named, path / "model.safetensors")
    kind.check(folder, weights)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_wrappers_inside_of_names(kind, checkpoint, wrapper):
    folder, path, weights = checkpoint
    named = {}
    for name, weight in weights.items():
        head, *rest = name.split(".")
        named[".".join([head, wrapper, *rest]) if len(rest) > 1 else name] = weight
    save_file(named, path / "model.safetensors")
    kind.check(folder, weights)


def test_a_tensor_with_and_without_prefix(kind, checkpoint):
    folder, path, weights = checkpoint
    name = min(weights)
    save_file({**weights, f"module.{name}": weights[name] + 1}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"holds '{name}' twice: '(module\.)?{name}' in .* and '(module\.)?{name}' in"
    ):
        kind.load(folder)


def test_a_tensor_in_two_shards_and_not_in_the_index(kind, checkpoint):
    folder, path, weights = checkpoint
    first, second = halves(weights)
    name = min(first)
    index = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)}
    del index[name]
    write_shards(path, first, {**second, name: weights[name] + 1}, index)
    with pytest.raises(ValueError, match=rf"holds '{name}' twice: .* in {FIRST} and .* in {SECOND}"):
        kind.load(folder)


def test_a_tensor_that_the_index_leaves_out(kind, checkpoint):
    """It is read, as transformers does."""
    folder, path, weights = checkpoint
    first, second = halves(weights)
    index = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)}
    del index[min(first)]
    write_shards(path, first, second, index)
    kind.check(folder, weights)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_tensor_that_is_not_where_the_index_says(kind, checkpoint, elsewhere):
    folder, path, weights = checkpoint
    first, second = halves(weights)
    name = min(first)
    index = {**dict.fromkeys(first, FIRST), **dict.fromkeys(second, SECOND)}
    weight = first.pop(name)
    write_shards(path, first, {**second, name: weight} if elsewhere else second, index)
    with pytest.raises(ValueError, match=rf"lacks 1 weights, such as '{name}', which its index places in {FIRST}"):
        kind.load(folder)


@pytest.mark.parametrize("lost", [FIRST, SECOND])
def test_a_lost_shard(kind, checkpoint, lost):
    folder, path, weights = checkpoint
    write_shards(path, *halves(weights))
    (path / lost).unlink()
    with pytest.raises(ValueError, match=rf"has no {lost}, expected model\.safetensors, or {INDEX} and the files"):
        kind.load(folder)


def test_a_shard_without_an_index(kind, checkpoint):
    folder, path, weights = checkpoint
    save_file(weights, path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors, expected"):
        kind.load(folder)


def test_a_shard_that_cannot_be_read(kind, checkpoint):
    folder, path, weights = checkpoint
    write_shards(path, *halves(weights))
    (path / SECOND).write_bytes((path / SECOND).read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"cannot read '.*{SECOND}'"):
        kind.load(folder)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_of_the_weights(tmp_path, variant):
    kind = KINDS["classifier"]
    folder, weights = kind.folder(tmp_path)
    save_file(other(weights), tmp_path / "model.safetensors")
    save_file(weights, tmp_path / f"model.{variant}.safetensors")
    got = load_reward(folder, variant=variant).model.state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in weights.items())


def test_a_model_in_a_subfolder(kind, checkpoint, tmp_path_factory):
    _, path, weights = checkpoint
    save_file(weights, path / "model.safetensors")
    outer = tmp_path_factory.mktemp("outer")
    shutil.copytree(path, outer / "inner")
    expected, got = (model.model.state_dict() for model in (kind.load(path), kind.load(outer, subfolder="inner")))
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match=r"config\.json"):
        kind.load(outer)


def test_links_of_a_hub_cache(kind, checkpoint, tmp_path_factory):
    """Weights may be links out of the folder, as a hub's cache lays them."""
    folder, path, weights = checkpoint
    blobs = tmp_path_factory.mktemp("blobs")
    write_shards(path, *halves(weights))
    for name in (FIRST, SECOND, INDEX, "config.json"):
        (path / name).rename(blobs / name)
        (path / name).symlink_to(blobs / name)
    kind.check(folder, weights)
    (blobs / SECOND).unlink()
    with pytest.raises(ValueError, match=f"has no {SECOND}, expected"):
        kind.load(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_beside_its_model(tmp_path):
    """It is merged, once, as where it lies elsewhere."""
    pytest.importorskip("peft")
    base = checkpoints.reward(tmp_path / "base")
    checkpoints.adapter(tmp_path / "adapter", base, "SEQ_CLS", 3)
    expected = load_reward(base, adapter=tmp_path / "adapter").model.state_dict()
    plain = load_reward(base).model.state_dict()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).rename(tmp_path / "base" / name)
    got = load_reward(base).model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert not all(torch.equal(plain[name], weight) for name, weight in expected.items())
