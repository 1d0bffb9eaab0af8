"""Arguments of loaders: what they mean in every entry, and that each mistake names itself."""

import json

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from entrgi import CallableDenoiser, LogLikelihoodReward, MaskedLM, SequenceClassifierReward, load_denoiser, load_reward
from entrgi.cli import app
from entrgi.cli.models import usable_device
from entrgi.denoisers import DreamDenoiser, LLaDADenoiser
from entrgi.models.checkpoints import _placed, read_config, read_tokenizer
from entrgi.models.errors import reason_of
from entrgi.models.placement import choose_device, choose_dtype
from entrgi.prompts import Completion
from support import architectures, checkpoints, tiny
from support import official_layouts as official
from support.checkpoints import change_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.grid(strength=1),  # arguments mean the same wherever they are given
]


def dream(path, **fields):
    fields = {**official.DREAM, **fields}
    return official.write_checkpoint(path, fields, official.dream_weights(fields))


def llada(path, **fields):
    fields = {**official.LLADA, **fields}
    return official.write_checkpoint(path, fields, official.llada_weights(fields))


ENTRIES = {
    "load dream": (dream, load_denoiser),
    "load llada": (llada, load_denoiser),
    "load masked": (checkpoints.denoiser, load_denoiser),
    "load classifier": (checkpoints.reward, load_reward),
    "load causal": (checkpoints.language_model, load_reward),
    "DreamDenoiser": (dream, DreamDenoiser.from_pretrained),
    "LLaDADenoiser": (llada, LLaDADenoiser.from_pretrained),
    "MaskedLM": (checkpoints.denoiser, MaskedLM.from_pretrained),
    "SequenceClassifierReward": (checkpoints.reward, SequenceClassifierReward.from_pretrained),
    "LogLikelihoodReward": (checkpoints.language_model, LogLikelihoodReward.from_pretrained),
}
DENOISERS = {"dream": dream, "llada": llada, "masked": checkpoints.denoiser}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    written = {}
    for write, _ in ENTRIES.values():
        if write not in written:
            written[write] = write(tmp_path_factory.mktemp("model"))
    return written


@pytest.fixture(params=ENTRIES)
def entry(request, folders):
    """(folder, function that loads it, how its errors begin)."""
    write, load = ENTRIES[request.param]
    name = "denoiser" if write in (dream, llada, checkpoints.denoiser) else "reward"
    return folders[write], load, f"^{name}: "


# Devices and dtypes.


@pytest.mark.parametrize("where", [0, "0", "cuda", "cuda:0", torch.device("cuda", 0)], ids=repr)
def test_index_of_a_device(entry, where):
    """0 is cuda:0, never the CPU."""
    folder, load, begin = entry
    if torch.cuda.is_available():
        assert load(folder, device=where).device == torch.device("cuda", 0)
    else:
        with pytest.raises(ValueError, match=rf"{begin}device .* cannot be used, expected cpu, cuda"):
            load(folder, device=where)


@pytest.mark.parametrize("where", ["bfloat16", "cuda:x", "gpu", "", True, False, 1.5, -1, 10**30, torch.float32, []])
def test_devices_that_are_none(entry, where):
    folder, load, begin = entry
    with pytest.raises(ValueError, match=rf"{begin}device .*, expected cpu, cuda, cuda:1 \.\.\. or an index"):
        load(folder, device=where)


@pytest.mark.parametrize("where", [None, "cpu", torch.device("cpu")], ids=repr)
def test_the_cpu(entry, where):
    folder, load, _ = entry
    assert load(folder, device=where).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, "float64", "torch.float64", "double"], ids=repr)
def test_names_of_dtypes(entry, dtype):
    folder, load, _ = entry
    loaded = load(folder, dtype=dtype)
    assert next(loaded.model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["auto", None])
def test_dtype_of_the_checkpoint(entry, dtype):
    folder, load, _ = entry
    assert next(load(folder, dtype=dtype).model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", ["cuda", "int8", torch.int8, 16, True, "float33", "nn", "", torch.complex64], ids=repr
)
def test_dtypes_that_are_none(entry, dtype):
    folder, load, begin = entry
    with pytest.raises(ValueError, match=f"{begin}dtype is .*, expected a floating dtype such as torch.bfloat16"):
        load(folder, dtype=dtype)


def test_device_and_dtype_of_a_callable():
    def build(**options):
        return CallableDenoiser(lambda ids, mask: None, tiny.tokenizer(), 64, **options)

    assert (build().device, build().dtype) == (torch.device("cpu"), torch.float32)
    assert build(dtype="float64").dtype == torch.float64
    for option in ({"device": "bfloat16"}, {"device": True}, {"dtype": "cuda"}):
        with pytest.raises(ValueError, match=f"^denoiser: {next(iter(option))} .*expected"):
            build(**option)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^denoiser: device 0 cannot be used"):
            build(device=0)


def test_none_stays_none():
    assert choose_device("x", None) is None
    assert choose_dtype("x", None) is None


@pytest.mark.parametrize("kind", ["load masked", "load classifier", "load causal"])
def test_a_device_map_is_not_undone(folders, kind, monkeypatch):
    pytest.importorskip("accelerate")
    write, load = ENTRIES[kind]
    moved = []
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *place: moved.append(place) or self)
    load(folders[write], device_map={"": "cpu"})
    assert moved == []
    with pytest.raises(ValueError, match="got device 'cpu' and device_map, expected one of them"):
        load(folders[write], device_map="auto", device="cpu")


def test_a_quantised_model_stays_where_it_is():
    class Quantised:
        is_quantized = True

        def to(self, device):
            raise ValueError("`.to` is not supported for `4-bit` models")

    model = Quantised()
    assert _placed("reward", model, None) is model
    with pytest.raises(
        ValueError, match=r"^reward: Quantised cannot be moved to cpu once loaded, expected device_map="
    ):
        _placed("reward", model, torch.device("cpu"))


# Ids.


@pytest.mark.parametrize("kind", DENOISERS)
def test_ids_that_are_given(folders, kind):
    """They come before the tokenizer's and config.json's."""
    folder = folders[DENOISERS[kind]]
    plain = load_denoiser(folder)
    ids = {"mask_token_id": 11, "eos_token_id": 12, "pad_token_id": 13}
    for name, token_id in ids.items():
        assert getattr(plain, name) != token_id
        for load in (load_denoiser, type(plain).from_pretrained):
            loaded = load(folder, **{name: token_id})
            assert getattr(loaded, name) == token_id
            others = ids.keys() - {name}
            assert all(getattr(loaded, other) == getattr(plain, other) for other in others)
        assert (
            getattr(type(plain)(plain.model, plain.tokenizer, **{"mask_token_id": 4, name: token_id}), name) == token_id
        )
    for name in ("eos_token_id", "pad_token_id"):
        assert getattr(load_denoiser(folder, **{name: 0}), name) == 0


@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("kind", DENOISERS)
def test_ids_that_are_none(folders, kind, name):
    for token_id in (-1, 10**6, 1.0, "11", True, [11] if name != "eos_token_id" else [11, -1]):
        with pytest.raises(ValueError, match=rf"^denoiser: {name} .* is not an id below vocab_size \d+"):
            load_denoiser(folders[DENOISERS[kind]], **{name: token_id})


def test_a_mask_that_nothing_declares(tmp_path):
    """What the error advises does help."""
    folder = llada(tmp_path / "llada", mask_token_id=None)
    bert = checkpoints.denoiser(tmp_path / "bert")
    settings = tmp_path / "bert" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "mask_token": None}))
    for name in (folder, bert):
        with pytest.raises(ValueError, match="no mask token; expected a masked LM, or pass mask_token_id"):
            load_denoiser(name)
        assert load_denoiser(name, mask_token_id=7).mask_token_id == 7


@pytest.mark.parametrize("value", ["<mask>", 1.5, True, {"id": 3}, ["x"]], ids=repr)
@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id", "pad_token_id"])
def test_ids_of_a_config_that_are_none(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^denoiser: config\.json has {name} .*, expected an id"):
        load_denoiser(dream(tmp_path, **{name: value}))


@pytest.mark.parametrize("kind", [*DENOISERS, "callable"])
def test_ids_beyond_the_embedding(folders, kind):
    """A token that was added to the tokenizer alone: an index error, or an assertion on the device."""
    denoiser = load_denoiser(folders[DENOISERS.get(kind, checkpoints.denoiser)], chat=False)
    tokenizer = denoiser.tokenizer
    added = [f"<extra{i}>" for i in range(20)]
    tokenizer.add_tokens(added)
    if kind == "callable":
        denoiser = CallableDenoiser(denoiser.model, tokenizer)
    denoiser.encode("the movie")
    with pytest.raises(
        ValueError, match=r"^prompts: the denoiser's tokenizer has id \d+ for '<extra19>', expected an id"
    ):
        denoiser.encode("the <extra19> movie")


def test_a_mask_given_on_the_command_line(folders, tmp_path):
    folder = llada(tmp_path, mask_token_id=None)
    arguments = ["sample", "--model", str(folder), "-p", "the", "-k", "1", "-l", "2", "--json"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code != 0
    assert "mask_token_id" in said.output
    said = CliRunner().invoke(app, [*arguments, "--mask-token-id", str(official.MASK)])
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize("index", ["0", "cuda"])
def test_devices_on_the_command_line(index):
    if torch.cuda.is_available():
        assert usable_device(index).type == "cuda"
    else:
        with pytest.raises(ValueError, match=rf"^--device: '?{index}'? cannot be used, expected cpu"):
            usable_device(index)


# Options.


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_lenght", "max_length"), ("dtypes", "dtype"), ("revison", "revision"), ("divice", "device")],
)
def test_options_that_are_misspelled(entry, wrong, right):
    folder, load, begin = entry
    with pytest.raises(
        ValueError, match=rf"{begin}unknown option '{wrong}', expected one of .*; did you mean '{right}'"
    ):
        load(folder, **{wrong: None})


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("load classifier", "include_promt", "include_prompt"),
        ("load classifier", "num_lables", "num_labels"),
        ("load causal", "normalise", "normalize"),
        ("load masked", "mask_token", "mask_token_id"),
        ("load dream", "mask_id", "mask_token_id"),
        ("load llada", "pad_token", "pad_token_id"),
        ("load classifier", "reuse_prefixes", "reuse_prefix"),
    ],
)
def test_options_of_a_class_that_are_misspelled(folders, kind, wrong, right):
    write, load = ENTRIES[kind]
    with pytest.raises(ValueError, match=rf"unknown option '{wrong}', .*; did you mean '{right}'"):
        load(folders[write], **{wrong: None})


def test_fields_of_a_config_as_options(tmp_path):
    """Such as num_labels, and whatever else a config has."""
    folder = checkpoints.reward(tmp_path)
    reward = load_reward(folder, hidden_dropout_prob=0.25)
    assert reward.model.config.hidden_dropout_prob == 0.25


@pytest.mark.parametrize("name", [None, "", 7, "a\0b", "x" * 5000, "a/b/c", "~/model", "\ud800"], ids=repr)
def test_names_that_are_none(name):
    for load, begin in ((load_denoiser, "denoiser"), (load_reward, "reward"), (MaskedLM.from_pretrained, "denoiser")):
        with pytest.raises(ValueError, match=rf"^{begin}: "):
            load(name, local_files_only=True)


# Heads.


@pytest.mark.parametrize("ignore", [None, False, True])
def test_heads_of_another_shape(tmp_path, ignore):
    """ignore_mismatched_sizes would make them random."""
    folder = checkpoints.reward(tmp_path / "reward")
    options = {} if ignore is None else {"ignore_mismatched_sizes": ignore}
    with pytest.raises(ValueError, match=r"in another shape, such as 'classifier\.\w+' \[1.*\], expected \[3.*\]"):
        load_reward(folder, num_labels=3, **options)
    masked = change_config(checkpoints.denoiser(tmp_path / "masked"), vocab_size=63)
    with pytest.raises(ValueError, match=r"in another shape, such as .* \[64.*\], expected \[63"):
        load_denoiser(masked, **options)
    causal = change_config(checkpoints.language_model(tmp_path / "causal"), head_dim=4)
    with pytest.raises(ValueError, match=r"in another shape, such as .*, expected \["):
        load_reward(causal, **options)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "opt", "mistral"])
def test_a_causal_model_is_no_masked_one(kind):
    model = architectures.causal_lm(kind)
    with pytest.raises(ValueError, match=f"^denoiser: {type(model).__name__} is a causal language model, expected a"):
        MaskedLM(model, tiny.tokenizer())


def test_a_subclass_of_a_causal_model():
    class Mine(type(architectures.causal_lm("llama"))):
        pass

    with pytest.raises(ValueError, match=r"^denoiser: Mine is a causal language model"):
        MaskedLM(Mine(architectures.config("llama")), tiny.tokenizer())


def test_a_subclass_of_a_masked_model():
    class Mine(BertForMaskedLM):
        pass

    assert MaskedLM(Mine(tiny.bert_config()), tiny.tokenizer()).vocab_size == 64
    with pytest.raises(ValueError, match="the config of Mine has is_decoder True, expected False"):
        MaskedLM(Mine(tiny.bert_config(is_decoder=True)), tiny.tokenizer())


# Whatever is raised below.

ERRORS = [
    RuntimeError("shapes differ"),
    ValueError("no such thing"),
    TypeError("got a str"),
    KeyError("weight_map"),
    IndexError("list index out of range"),
    AttributeError("'str' object has no attribute 'get'"),
    AssertionError(),
    ImportError("needs sentencepiece"),
    OSError("no such file"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting value", "", 0),
    RecursionError("maximum recursion depth exceeded"),
    NotImplementedError(),
    OverflowError("int too big to convert"),
    ZeroDivisionError("division by zero"),
    SafetensorError("InvalidHeader"),
    Exception("expected `,` or `}` at line 1 column 5"),
    type("PanicException", (BaseException,), {})("called `Option::unwrap()` on a `None` value"),
    StopIteration(),
    EOFError(),
]


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["config", "tokenizer", "model"])
def test_whatever_is_raised_below(entry, monkeypatch, error, place):
    folder, load, begin = entry

    def fails(*_arguments, **_options):
        raise error

    if place == "tokenizer":
        for cls in (AutoTokenizer, PreTrainedTokenizerFast):
            monkeypatch.setattr(cls, "from_pretrained", fails)
        monkeypatch.setattr("transformers.tokenization_utils_base.PreTrainedTokenizerBase.from_pretrained", fails)
    elif place == "model":
        for cls in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForCausalLM):
            monkeypatch.setattr(cls, "from_pretrained", fails)
        monkeypatch.setattr("entrgi.denoisers.causal.load_weights", fails)
    else:
        monkeypatch.setattr("entrgi.models.fields.json.loads", fails)
        if isinstance(error, ValueError | OSError | RecursionError):
            begin = f"{begin}cannot read|{begin}"
    with pytest.raises(ValueError, match=begin) as raised:
        load(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_is_nobodys_fault_goes_on(folders, monkeypatch, error):
    def fails(*_arguments, **_options):
        raise error

    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", fails)
    with pytest.raises(type(error)):
        load_denoiser(folders[checkpoints.denoiser])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No file. Please do not set `use_safetensors=True`.", "No file"),
        ("Pass `ignore_mismatched_sizes=True` to load. Shapes differ.", "Shapes differ"),
        ("For details look at the above report!", "RuntimeError"),
        ("Loading needs trust_remote_code=True.", "it needs code from its repository, which is never run"),
        ("Use `weights_only=False` at your risk", "RuntimeError"),
        ("model.norm is missing.\nSee docs.", "model.norm is missing"),
        ("x" * 1000, "x" * 400 + " ..."),
    ],
)
def test_advice_that_would_not_help(text, reason):
    assert reason_of(RuntimeError(text)) == reason


@pytest.mark.parametrize("read", [read_config, read_tokenizer])
def test_reading_a_part(folders, read, tmp_path):
    read("reward", folders[checkpoints.reward])
    with pytest.raises(ValueError, match=r"^reward: no folder"):
        read("reward", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^reward: folder .* has no config.json"):
        read("reward", tmp_path)


def test_models_loaded_under_inference_mode(folders):
    """Their weights take part in gradients later."""
    with torch.inference_mode():
        denoisers = [load_denoiser(folders[write]) for write in DENOISERS.values()]
        rewards = [load_reward(folders[write]) for write in (checkpoints.reward, checkpoints.language_model)]
    for loaded in (*denoisers, *rewards):
        assert not any(tensor.is_inference() for tensor in loaded.model.state_dict().values())
        assert not any(buffer.is_inference() for buffer in loaded.model.buffers())
    weight = rewards[0].model.get_input_embeddings().weight
    embeds = weight[None, 5:9].clone().requires_grad_()
    rewards[0].relaxed(embeds, torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    assert embeds.grad.abs().max() > 0
    assert rewards[1].score([Completion("the", "the movie", "movie")]).shape == (1,)
