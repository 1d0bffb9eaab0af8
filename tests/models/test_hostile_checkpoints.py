"""Checkpoints from strangers: they choose no code, keep no machine busy, and end in one sentence at worst."""

import json
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrgi import load_denoiser, load_reward
from entrgi.models import adapters
from support import checkpoints
from support import official_layouts as official
from support.checkpoints import change_config
from support.grids import few

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def dream(path):
    return official.write_checkpoint(path, official.DREAM, official.dream_weights(official.DREAM))


def llada(path):
    return official.write_checkpoint(path, official.LLADA, official.llada_weights(official.LLADA))


KINDS = {
    "dream": (dream, load_denoiser),
    "llada": (llada, load_denoiser),
    "masked": (checkpoints.denoiser, load_denoiser),
    "classifier": (checkpoints.reward, load_reward),
    "causal": (checkpoints.language_model, load_reward),
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """One folder of each kind, to be copied."""
    folders = {}
    for name, (write, _) in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name])
    return folders


@pytest.fixture(params=KINDS)
def checkpoint(request, originals, tmp_path):
    """(folder, its loader, how its errors begin)."""
    folder = shutil.copytree(originals[request.param], tmp_path / "checkpoint")
    load = KINDS[request.param][1]
    return folder, load, "^denoiser: " if load is load_denoiser else "^reward: "


class Runs:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


IMPLEMENTATIONS = [
    *({key: "somebody/kernel"} for key in ("_attn_implementation", "attn_implementation", "experts_implementation")),
    *({key: "somebody/kernel"} for key in ("_experts_implementation", "_attn_implementation_internal")),
    {"attn_implementation": "somebody/kernel@main:function"},
    {"_attn_implementation": "paged|somebody/kernel"},
    {"_attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}},
    {"_attn_implementation": ["somebody/kernel"]},
    {"text_config": {"_attn_implementation": "somebody/kernel"}},
    {"encoder": {"decoder": {"experts_implementation": "somebody/kernel"}}},
    {"layers": [{"attn_implementation": "somebody/kernel"}]},
    {"_attn_implementation": "module.py:function"},
]


@pytest.mark.parametrize("fields", IMPLEMENTATIONS, ids=str)
def test_implementations_from_a_hub(checkpoint, fields):
    folder, load, begin = checkpoint
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=rf"{begin}.*implementation\w* '[^']*', expected one of eager, sdpa: code"):
        load(folder)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "eager", "sdpa", None, 7])
def test_other_implementations_are_ours_to_choose(checkpoint, name):
    """Without the package that they name, transformers would fetch kernels from a hub."""
    folder, load, _ = checkpoint
    change_config(folder, _attn_implementation=name, attn_implementation=name, experts_implementation=name)
    loaded = load(folder).model.config._attn_implementation
    assert "flash" not in loaded
    assert "flex" not in loaded


@pytest.mark.parametrize("option", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("kind", ["masked", "classifier", "causal"])
def test_implementations_asked_for(originals, kind, option):
    with pytest.raises(ValueError, match=f"{option} is 'somebody/kernel', expected one of transformers' own"):
        KINDS[kind][1](originals[kind], **{option: "somebody/kernel"})


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-1.bin", "pytorch_model.bin.index.json"]])
def test_pickles(checkpoint, tmp_path, names):
    """Not read where there is nothing else, nor where there is."""
    folder, load, begin = checkpoint
    weights = sorted(folder.glob("model*"))
    for name in names:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"weight_map": {"a": names[0]}}))
        else:
            torch.save({"a": Runs(tmp_path / "ran")}, folder / name)
    load(folder)
    for file in weights:
        file.unlink()
    message = rf"{begin}.* has no model\.safetensors, .*; {names[0]} is a pickle, which can run code and is never read"
    with pytest.raises(ValueError, match=message):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickles_asked_for(originals):
    for kind in ("masked", "classifier", "causal"):
        with pytest.raises(ValueError, match="use_safetensors is False, expected True: pickles are never read"):
            KINDS[kind][1](originals[kind], use_safetensors=False)


PLACES = [
    "../outside.safetensors",
    "sub/outside.safetensors",
    "./outside.safetensors",
    "/etc/outside.safetensors",
    "..\\outside.safetensors",
    "C:outside.safetensors",
    "..",
    "",
    "out\0side.safetensors",
    "model.bin",
    "model.safetensors.bin",
    "config.json",
    ".safetensors",
    "model.safetensors\n",
    7,
    None,
    ["model.safetensors"],
    {"file": "model.safetensors"},
]


@pytest.mark.parametrize("place", PLACES, ids=repr)
@pytest.mark.parametrize("beside", [False, True])
def test_files_outside_of_the_folder(checkpoint, place, beside):
    """An index that names one is refused, also where a single file would be read."""
    folder, load, begin = checkpoint
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    save_file(tensors, folder.parent / "outside.safetensors")
    if beside:
        save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, place)}))
    with pytest.raises(ValueError, match=rf"{begin}.*index\.json' has .* for .*, expected the plain name of a \.safet"):
        load(folder)


@pytest.mark.parametrize("fields", [{"transformers_weights": "../outside.safetensors"}, {"configuration_files": ["a"]}])
def test_other_files_by_config(checkpoint, fields):
    folder, load, begin = checkpoint
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=rf"{begin}.* has {next(iter(fields))} .*, expected none"):
        load(folder)


def test_code_beside_a_known_model(checkpoint, tmp_path):
    """auto_map of a model that is known is passed over: its code stays where it is."""
    folder, load, _ = checkpoint
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoTokenizer")
    classes = dict.fromkeys((*names, "AutoModelForSequenceClassification"), "own.Own")
    change_config(folder, auto_map=classes, custom_pipelines={"x": {"impl": "own.Own"}})
    load(folder)
    assert not (tmp_path / "ran").exists()


SIZES = [-1, 0, 10**7, 10**12, 10**30, "12", "x", 1.5, True, [1, -1], {}, 1e308]
LAYERS = {"dream": "num_hidden_layers", "llada": "n_layers"}
WIDTHS = {"dream": "hidden_size", "llada": "d_model"}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("what", ["layers", "width", "vocab_size", "labels"])
def test_sizes(originals, tmp_path, size, what):
    """Refused in no time, by the name of the field."""
    for kind, (_, load) in KINDS.items():
        folder = shutil.copytree(originals[kind], tmp_path / kind)
        names = {"layers": LAYERS.get(kind, "num_hidden_layers"), "width": WIDTHS.get(kind, "hidden_size")}
        name = {**names, "vocab_size": "vocab_size", "labels": "num_labels"}[what]
        if what == "labels" and kind in LAYERS:
            continue
        begun = time.monotonic()
        change_config(folder, **{name: size})
        with pytest.raises(ValueError, match=rf"^(denoiser|reward): .*({name}|describes|shape|lacks)"):
            load(folder)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 60},
        {"num_hidden_layers": 2000},
        {"hidden_size": 2**19, "intermediate_size": 2**19},
        {"vocab_size": 2**24},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["masked", "classifier", "causal"])
def test_models_beyond_their_files(originals, tmp_path, kind, fields):
    """Each size is possible, but the weights are not there: nothing is allocated for them."""
    folder = shutil.copytree(originals[kind], tmp_path / "checkpoint")
    fields = {**fields, "hidden_size": fields.get("hidden_size", 4096)}
    change_config(folder, without=("layer_types",), **fields)
    with pytest.raises(
        ValueError, match=r"config\.json of .* describes \d+ (weights of|layers) .*, its files hold \d+"
    ):
        KINDS[kind][1](folder)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
TEXTS = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"7",
    "text": b'"text"',
    "nested": NESTED.encode(),
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "half": None,
    "NaN": b'{"a": NaN}',
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "surrogate": b'{"a": "\\ud800"}',
    "NUL": b"\0" * 100,
    "noise": bytes(range(256)) * 20,
    "a folder": None,
    "twice": b'{"model_type": "bert", "model_type": "gpt2"}',
}


def damage(file, text):
    """Makes ``file`` half of itself, a folder, or one of TEXTS."""
    if text == "a folder":
        file.unlink()
        file.mkdir()
        return
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if text == "half" else TEXTS[text])


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_may_be_broken(checkpoint, text):
    """The model loads, or one ValueError names it; whichever file is broken, in whatever way."""
    folder, load, begin = checkpoint
    for file in sorted(folder.iterdir()):
        before = file.read_bytes()
        damage(file, text)
        if file.name == "config.json" or file.suffix == ".safetensors":
            with pytest.raises(ValueError, match=begin):
                load(folder)
        else:
            loads_or_names(load, folder, begin)
        if text == "a folder":
            file.rmdir()
        file.write_bytes(before)
    load(folder)


def loads_or_names(load, folder, begin, **options):
    """Assert that it loads, or raises a ValueError of one line that begins like this."""
    said = None
    try:
        load(folder, **options)
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert re.search(begin, said), said
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1500, said


VALUES = [None, -1, 0, 1, 10**18, 1e308, -0.5, True, "x", "", [], [[]], {}, {"a": 1}, ["a"]]


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_every_field_may_be_anything(checkpoint, value):
    folder, load, begin = checkpoint
    fields = json.loads((folder / "config.json").read_text())
    for name in fields:
        (folder / "config.json").write_text(json.dumps({**fields, name: value}))
        begun = time.monotonic()
        loads_or_names(load, folder, begin)
        assert time.monotonic() - begun < 10, name
    (folder / "config.json").write_text(json.dumps(fields))
    load(folder)


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_every_field_of_a_tokenizer_may_be_anything(checkpoint, value):
    folder, load, begin = checkpoint
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file).is_file():
            continue
        fields = json.loads((folder / file).read_text())
        for name in fields:
            (folder / file).write_text(json.dumps({**fields, name: value}))
            loads_or_names(load, folder, begin)
        (folder / file).write_text(json.dumps(fields))


@pytest.mark.parametrize("what", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_in_place_of_files(originals, tmp_path, what):
    """Opening one would wait for ever."""
    folder = shutil.copytree(originals["masked"], tmp_path / "checkpoint")
    (folder / what).unlink()
    os.mkfifo(folder / what)
    with pytest.raises(ValueError, match=r"^denoiser: "):
        load_denoiser(folder)


# Adapters.


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """A base model and an adapter of it."""
    pytest.importorskip("peft")
    base = checkpoints.reward(tmp_path_factory.mktemp("base"))
    return base, checkpoints.adapter(tmp_path_factory.mktemp("adapter"), base, "SEQ_CLS", 3)


@pytest.fixture
def adapter(adapted, tmp_path):
    return adapted[0], shutil.copytree(adapted[1], tmp_path / "adapter")


def change_adapter(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("pattern", [r"((\w|\.)+)+!", r"([a-z_.0-9]+)*X"])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"]
)
def test_expressions_that_never_end(adapter, monkeypatch, field, pattern):
    base, folder = adapter
    monkeypatch.setattr(adapters, "_SECONDS", 1)
    value = {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}}.get(field, pattern)
    value = [pattern] if field in ("layers_pattern", "modules_to_save") else value
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^reward: adapter_config\.json of .* has regular expressions, .* not done"):
        load_reward(base, adapter=change_adapter(folder, **{field: value}))
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("pattern", [".*(query|value)", r"(?:.*?(?:encoder).*?(?:self).*?(?:query|value).*?)"])
def test_expressions_that_do(adapter, pattern):
    base, folder = adapter
    expected = load_reward(base, adapter=folder).model.state_dict()
    got = load_reward(base, adapter=change_adapter(folder, target_modules=pattern)).model.state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(("}, "has the regular expression .*, which cannot be read"),
        ({"target_modules": "a" * 5 + "{99999999999999999999}"}, "has the regular expression .*, which cannot be read"),
        ({"r": 10**9}, "has r 1000000000, expected an integer in"),
        ({"r": -1}, "has r -1, expected an integer in"),
        ({"r": "8"}, "has r '8', expected an integer in"),
        ({"rank_pattern": {"query": 10**9}}, "has rank_pattern .*, expected integers in"),
        ({"layer_replication": [[0, 10**7]]}, "has layer_replication .*, expected pairs of layers"),
        ({"layer_replication": [[0, 2]] * 5000}, "has layer_replication .*, expected pairs of layers"),
        ({"layer_replication": "many"}, "has layer_replication .*, expected pairs of layers"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "has megatron_config .*, expected null"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "x"}, "has peft_type 'PROMPT_TUNING', expected LORA"),
        ({"peft_type": "XLORA", "adapters": {"a": "somebody/adapter"}}, "has peft_type 'XLORA', expected LORA"),
        ({"peft_type": "NEW"}, "cannot apply adapter"),
        ({"peft_type": None}, "cannot apply adapter"),
        ({"target_modules": ["nothing"]}, "cannot apply adapter|does not fit"),
    ],
    ids=str,
)
def test_adapters_that_ask_for_more(adapter, fields, message):
    base, folder = adapter
    with pytest.raises(ValueError, match=f"^reward: .*({message})"):
        load_reward(base, adapter=change_adapter(folder, **fields))


def test_libraries_that_an_adapter_names(adapter, tmp_path, monkeypatch):
    """auto_mapping is passed over."""
    base, folder = adapter
    (tmp_path / "own_library.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Own", "parent_library": "own_library"}
    load_reward(base, adapter=change_adapter(folder, auto_mapping=mapping))
    assert not (tmp_path / "ran").exists()


def test_models_that_an_adapter_names(adapter, monkeypatch):
    """Nobody is asked for them."""
    import huggingface_hub

    def never(*_args, **_options):
        raise AssertionError("a hub is asked")

    for name in ("file_exists", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, never)
        monkeypatch.setattr(f"peft.utils.save_and_load.{name}", never, raising=False)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", never)
    base, folder = adapter
    load_reward(base, adapter=change_adapter(folder, base_model_name_or_path="somebody/model"))


def test_adapters_that_are_pickles(adapter, tmp_path):
    base, folder = adapter
    torch.save({"a": Runs(tmp_path / "ran")}, folder / "adapter_model.bin")
    load_reward(base, adapter=folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"it has no adapter_model\.safetensors; adapter_model\.bin is a pickle, which"
    ):
        load_reward(base, adapter=folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_of_an_adapter_may_be_broken(adapter, text):
    base, folder = adapter
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = folder / name
        before = file.read_bytes()
        damage(file, text)
        with pytest.raises(ValueError, match=r"^reward: "):
            load_reward(base, adapter=folder)
        if text == "a folder":
            file.rmdir()
        file.write_bytes(before)
    load_reward(base, adapter=folder)


@pytest.mark.parametrize("value", few(VALUES, None, "x", {"a": 1}), ids=str)
def test_every_field_of_an_adapter_may_be_anything(adapter, value):
    base, folder = adapter
    fields = json.loads((folder / "adapter_config.json").read_text())
    for name in fields:
        change_adapter(folder, **{**fields, name: value})
        loads_or_names(load_reward, base, "^reward: ", adapter=folder)
