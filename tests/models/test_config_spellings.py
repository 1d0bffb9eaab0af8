"""config.json: every spelling of a field means the same, and what is not understood is named."""

import copy
import warnings

import pytest
import torch
from transformers import CONFIG_MAPPING, BertForMaskedLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto import modeling_auto

from entrgi import load_reward
from entrgi.denoisers import DreamDenoiser, LLaDADenoiser, load_denoiser
from entrgi.models.checkpoints import read_config
from entrgi.models.rope import SCALINGS, Rope, read_rope, settle_rope
from support import checkpoints
from support import official_layouts as official
from support.checkpoints import change_config

WITHOUT = {name: value for name, value in official.DREAM.items() if name not in ("rope_theta", "rope_scaling")}
LINEAR = {"factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 10, "beta_fast": 2.0, "beta_slow": 1.0}
INSIDE = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}


def both(kind, parameters, theta=50.0):
    """A scaling in the spellings of transformers 4 and 5, and in both at once."""
    old = {"rope_theta": theta, "rope_scaling": {"type": kind, **parameters}}
    new = {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **parameters}}
    return {
        "type": old,
        "rope_type": {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **parameters}},
        "both names": {"rope_theta": theta, "rope_scaling": {"rope_type": kind, "type": kind, **parameters}},
        "rope_parameters": new,
        "theta outside": {"rope_theta": theta, "rope_parameters": {"rope_type": kind, **parameters}},
        "all": {**old, **new},
        "nulls": {**new, "rope_theta": None, "rope_scaling": {**dict.fromkeys(["type", "attention_factor"])}},
        "by layer": {"rope_parameters": {"full_attention": new["rope_parameters"]}},
        "by layers": {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
                "full_attention": new["rope_parameters"],
            },
        },
        "integers": {
            "rope_theta": int(theta),
            "rope_parameters": {
                "rope_type": kind,
                **{name: int(value) if value == int(value) else value for name, value in parameters.items()},
            },
        },
    }


PLAIN = {
    "theta alone": {"rope_theta": 50.0},
    "null scaling": {"rope_theta": 50.0, "rope_scaling": None, "rope_parameters": None},
    "empty scaling": {"rope_theta": 50.0, "rope_scaling": {}},
    "empty parameters": {"rope_theta": 50.0, "rope_parameters": {}},
    "theta inside": {"rope_parameters": {"rope_theta": 50.0}},
    "theta beside scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 50}},
    "whole rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0}},
}
SPELLINGS = [("default", {}, name, fields) for name, fields in {**both("default", {}), **PLAIN}.items()]
for scaling, values in {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}.items():
    SPELLINGS += [(scaling, values, name, fields) for name, fields in both(scaling, values).items()]
SPELLINGS += [
    ("yarn", {"factor": 2.0}, "the model's context", both("yarn", {"factor": 2.0})["type"]),
    ("yarn", YARN, "outside", {**both("yarn", INSIDE)["type"], "original_max_position_embeddings": 10}),
]


def qwen2_logits(weights, kind, parameters, tokens):
    """transformers' own model with the same rotary embedding, every position seeing all, shifted."""
    own = {name: WITHOUT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")}
    own |= {name: WITHOUT[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
    config = Qwen2Config(
        **own,
        max_position_embeddings=WITHOUT["max_position_embeddings"],
        tie_word_embeddings=False,
        **Rope(50.0, kind, parameters).options(),
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(weights)
    mask = torch.zeros(1, 1, len(tokens), len(tokens))
    with torch.no_grad():
        logits = model(input_ids=tokens[None], attention_mask={"full_attention": mask}).logits[0]
    return torch.cat([logits[:1], logits[:-1]])


@pytest.mark.parametrize(("kind", "parameters", "spelling", "rope"), SPELLINGS, ids=lambda x: str(x)[:20])
def test_every_spelling_of_a_rotary_embedding(tmp_path, kind, parameters, spelling, rope):
    """The logits are those of transformers' Qwen2 with the same rotary embedding, and differ from unscaled ones."""
    fields = {**WITHOUT, **copy.deepcopy(rope)}
    weights = official.dream_weights(fields)
    denoiser = load_denoiser(official.write_checkpoint(tmp_path, fields, weights))
    tokens = torch.arange(11, 31)
    got = denoiser.logits(tokens[None], None, torch.arange(20))
    torch.testing.assert_close(got, qwen2_logits(weights, kind, parameters, tokens), rtol=1e-4, atol=1e-4)
    if kind != "default":
        assert (got - qwen2_logits(weights, "default", {}, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": 50.0, "rope_parameters": {"rope_theta": 60.0}}, "the same rope_theta in both"),
        ({"rope_theta": 50.0, "rope_scaling": {"rope_type": "default", "rope_theta": 60}}, "the same rope_theta in"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 4},
            },
            "the same factor in both",
        ),
        (
            {
                "rope_theta": 5,
                "rope_scaling": {"type": "linear", **LINEAR},
                "rope_parameters": {"rope_type": "default"},
            },
            "the same rope_type in both",
        ),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "rope_type": "yarn", **LINEAR}}, "expected one name"),
        ({"rope_theta": 50.0, "rope_scaling": {"factor": 2.0}}, "expected a rope_type beside its parameters"),
        ({"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "factor": 2.0}}, "expected no 'factor'"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear"}}, "expected 'factor' for rope_type 'linear'"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "llama3", "factor": 8.0}}, "expected 'low_freq_factor'"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor to be a finite number >= 1"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": True}}, "factor to be a finite number"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 0.5}}, "factor to be a finite number >= 1"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 1e400}}, "factor to be a finite number"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": "yarn", **YARN, "truncate": 1}}, "truncate to be true or false"),
        ({"rope_theta": 50.0, "rope_scaling": "linear"}, "expected an object or null"),
        ({"rope_theta": 50.0, "rope_scaling": {"type": 3, "factor": 2.0}}, "expected one name as rope_type"),
        ({"rope_theta": "50"}, "rope_theta to be a finite number"),
        ({"rope_theta": -1.0}, "rope_theta to be a finite number"),
        ({"rope_theta": 50.0, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}, "rotary_fac"),
        (
            {"rope_parameters": {"linear_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 6.0}}},
            "'full_attention' among them",
        ),
        ({"rope_parameters": {"rope_theta": 5.0, "full_attention": {"rope_theta": 5.0}}}, "one set of values"),
        ({}, "config.json has no 'rope_theta'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "config.json has no 'rope_theta'"),
        *(
            ({"rope_theta": 50.0, place: {"rope_type": kind, "factor": 2.0}}, f"config.json has {place} .*expected one")
            for place in ("rope_scaling", "rope_parameters")
            for kind in ("dynamic", "longrope", "su", "mrope", "proportional", "llama4")
        ),
    ],
    ids=str,
)
def test_rotary_embeddings_that_are_not_understood(tmp_path, rope, message):
    fields = {**WITHOUT, **copy.deepcopy(rope)}
    folder = official.write_checkpoint(tmp_path, fields, official.dream_weights(fields))
    with pytest.raises(ValueError, match=f"^denoiser: .*{message}"):
        load_denoiser(folder)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "default"])
def test_llada_scales_no_angles(place, kind):
    """Its official code does not, so a scaling is not guessed at; an unscaled one is read in any spelling."""
    parameters = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}[kind]
    with pytest.raises(ValueError, match=rf"config\.json has {place} .*expected one of rope_type default: nothing"):
        LLaDADenoiser.build_model({**official.LLADA, place: {"rope_type": kind, **parameters}})
    fields = {name: value for name, value in official.LLADA.items() if name != "rope_theta"}
    model = LLaDADenoiser.build_model({**fields, place: {"rope_type": "default", "rope_theta": 50}})
    expected = LLaDADenoiser.build_model(official.LLADA).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


def test_base_of_a_rotary_embedding():
    assert read_rope("denoiser", {"rope_theta": 7}) == Rope(7.0, "default", {})


REWARD_SPELLINGS = {
    "theta": {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "parameters": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 4.0}},
    "both": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_theta": 50, "rope_type": "linear", "factor": 4},
    },
    "apart": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 50.0}},
}


@pytest.mark.parametrize("spelling", REWARD_SPELLINGS)
def test_rotary_embedding_of_a_reward(tmp_path, spelling):
    folder = checkpoints.language_model(tmp_path)
    change_config(folder, without=("rope_parameters", "rope_theta", "rope_scaling"), **REWARD_SPELLINGS[spelling])
    got = load_reward(folder, include_prompt=True).model.config.rope_parameters
    assert {**got, "type": None} == {"rope_theta": 50.0, "rope_type": "linear", "factor": 4.0, "type": None}
    rope = load_reward(folder).model.model.rotary_emb.inv_freq
    torch.testing.assert_close(rope, 1 / 50.0 ** (torch.arange(4) / 4) / 4)


def test_configs_as_transformers_writes_them(tmp_path):
    """Of every language model that it has: read like its own reader does."""
    mappings = (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    mappings += (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,)
    read = 0
    for model_type in sorted({name for mapping in mappings for name in mapping}):
        cls = CONFIG_MAPPING[model_type]
        try:
            text = cls().to_json_string(use_diff=False)
            (tmp_path / "config.json").write_text(text)
            expected = cls.from_pretrained(tmp_path)
        except Exception:  # a config without defaults, or that transformers does not read itself
            continue
        got = read_config("reward", tmp_path)
        assert got.to_dict() == {**expected.to_dict(), "_name_or_path": str(tmp_path)}, model_type
        read += 1
    assert read > 150


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 50.0, "rope_parameters": {"rope_theta": 60.0, "rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        },
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
    ],
    ids=str,
)
def test_rotary_embedding_of_a_reward_said_twice(tmp_path, rope):
    folder = checkpoints.language_model(tmp_path)
    change_config(folder, without=("rope_parameters", "rope_theta", "rope_scaling"), **rope)
    with pytest.raises(ValueError, match=r"^reward: config\.json has .*, expected the same (factor|rope_\w+) in all"):
        load_reward(folder)


@pytest.mark.parametrize("spelling", REWARD_SPELLINGS)
def test_spellings_for_an_older_transformers(monkeypatch, spelling):
    """Version 4 reads rope_theta and rope_scaling, and passes over rope_parameters."""
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    part = copy.deepcopy(REWARD_SPELLINGS[spelling])
    settle_rope("reward", part)
    assert part.pop("rope_theta") == 50
    (scaling,) = part.values()
    assert {"rope_type" if name == "type" else name: value for name, value in scaling.items()} == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    expected = {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert Rope(50.0, "linear", {"factor": 4.0}).options() == expected
    assert Rope(50.0).options() == {"rope_theta": 50.0, "rope_scaling": None}


@pytest.mark.parametrize(
    ("kind", "fields", "tied"),
    [
        ("dream", {}, False),
        ("dream", {"tie_word_embeddings": True}, True),
        ("dream", {"weight_tying": True}, True),
        ("dream", {"tie_word_embeddings": None, "weight_tying": False}, False),
        ("llada", {}, True),
        ("llada", {"weight_tying": False}, False),
        ("llada", {"tie_word_embeddings": False}, False),
        ("llada", {"weight_tying": True, "tie_word_embeddings": True}, True),
        ("llada", {"weight_tying": None, "tie_word_embeddings": True}, True),
    ],
    ids=str,
)
def test_tied_embeddings(kind, fields, tied):
    cls, base = (DreamDenoiser, official.DREAM) if kind == "dream" else (LLaDADenoiser, official.LLADA)
    base = {name: value for name, value in base.items() if name not in ("weight_tying", "tie_word_embeddings")}
    assert cls.build_model({**base, **fields}).config.tie_word_embeddings is tied
    with pytest.raises(
        ValueError, match=r"has tie_word_embeddings (True|False) and weight_tying (True|False), expected"
    ):
        cls.build_model({**base, "tie_word_embeddings": tied, "weight_tying": not tied})
    for name in ("tie_word_embeddings", "weight_tying"):
        with pytest.raises(ValueError, match=f"has {name} 'false', expected true or false"):
            cls.build_model({**base, name: "false"})


LLADA_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_sequence_length": "max_position_embeddings",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
}


@pytest.mark.parametrize("name", LLADA_NAMES)
def test_names_of_llada_and_of_transformers(name):
    expected = LLaDADenoiser.build_model(official.LLADA).config.to_dict()
    renamed = {**official.LLADA, LLADA_NAMES[name]: official.LLADA[name]}
    assert LLaDADenoiser.build_model(renamed).config.to_dict() == expected
    del renamed[name]
    assert LLaDADenoiser.build_model(renamed).config.to_dict() == expected
    with pytest.raises(ValueError, match=rf"config\.json has {name} {official.LLADA[name]} and {LLADA_NAMES[name]} 8"):
        LLaDADenoiser.build_model({**official.LLADA, LLADA_NAMES[name]: 8})


DTYPES = [
    ({"torch_dtype": "bfloat16"}, torch.bfloat16),
    ({"dtype": "bfloat16"}, torch.bfloat16),
    ({"dtype": "torch.bfloat16"}, torch.bfloat16),
    ({"torch_dtype": "torch.float64"}, torch.float64),
    ({"dtype": "float64", "torch_dtype": "torch.float64"}, torch.float64),
    ({"dtype": "auto"}, torch.float32),
    ({"torch_dtype": "auto"}, torch.float32),
    ({"dtype": None, "torch_dtype": None}, torch.float32),
    ({}, torch.float32),
]
NO_DTYPES = [
    ({"dtype": "float64", "torch_dtype": "bfloat16"}, "dtype 'float64' and torch_dtype 'bfloat16', expected the same"),
    ({"dtype": "float33"}, "dtype of config.json is 'float33', expected a floating dtype"),
    ({"torch_dtype": "int8"}, "torch_dtype of config.json is 'int8', expected a floating dtype"),
    ({"dtype": 16}, "dtype of config.json is 16, expected a floating dtype"),
    ({"dtype": "load"}, "dtype of config.json is 'load', expected a floating dtype"),
]


@pytest.mark.parametrize(("fields", "expected"), DTYPES, ids=str)
@pytest.mark.parametrize(("write", "load"), [(checkpoints.denoiser, load_denoiser), (checkpoints.reward, load_reward)])
def test_every_spelling_of_a_dtype(tmp_path, write, load, fields, expected):
    model = load(change_config(write(tmp_path), without=("dtype", "torch_dtype"), **fields))
    assert next(model.model.parameters()).dtype == expected


@pytest.mark.parametrize(("fields", "message"), NO_DTYPES, ids=str)
@pytest.mark.parametrize(("write", "load"), [(checkpoints.denoiser, load_denoiser), (checkpoints.reward, load_reward)])
def test_dtypes_that_are_none(tmp_path, write, load, fields, message):
    with pytest.raises(ValueError, match=message):
        load(change_config(write(tmp_path), without=("dtype", "torch_dtype"), **fields))


@pytest.mark.parametrize("said", [{"model_type": None}, {"model_type": ""}, {}], ids=str)
def test_model_type_follows_from_the_architectures(tmp_path, said):
    """Whatever the folder is called."""

    def nameless(folder):
        return change_config(folder, without=("model_type",), **said)

    for name in ("bert", "roberta"):
        assert isinstance(load_denoiser(nameless(checkpoints.denoiser(tmp_path / name))).model, BertForMaskedLM)
    assert load_reward(nameless(checkpoints.reward(tmp_path / "reward"))).model.config.model_type == "bert"
    for cls, name, fields in ((DreamDenoiser, "dream", official.DREAM), (LLaDADenoiser, "llada", official.LLADA)):
        weights = getattr(official, f"{name}_weights")(fields)
        folder = nameless(official.write_checkpoint(tmp_path / name, fields, weights))
        assert isinstance(load_denoiser(folder), cls)
        assert isinstance(cls.from_pretrained(folder), cls)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llada", "LLaDAMoEModelLM"),
        ("llada", "LLaDA2MoeModelLM"),
        ("lladamoe", "LLaDAMoEModelLM"),
        ("Dream", "Fast_dLLM_QwenForCausalLM"),
        ("Dream", "SDARForCausalLM"),
        ("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM"),
        ("sdar", "SDARForCausalLM"),
        ("qwen3", "SDARForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        (None, "Qwen2ForCausalLM"),
        (None, "ILLaDAForCausalLM"),
        ("never heard of", "BertForMaskedLM"),
    ],
)
def test_another_architecture(tmp_path, model_type, architecture):
    name, fields = ("llada", official.LLADA) if model_type == "llada" else ("dream", official.DREAM)
    folder = official.write_checkpoint(tmp_path, fields, getattr(official, f"{name}_weights")(fields))
    change_config(folder, model_type=model_type, architectures=[architecture])
    with pytest.raises(ValueError, match=f"^denoiser: config.json of .*{architecture}.* to CallableDenoiser"):
        load_denoiser(folder)


CHANGING = {
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "is_causal": True,
    "is_decoder": True,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "logit_scale": 0.5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "bd_size": 32,
    "block_size": 4,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 64,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "quantization_config": {"bits": 4},
    "head_dim": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "vision_config": {"hidden_size": 8},
    "use_sliding_window": True,
    "rope_interleaved": True,
}
NEUTRAL = {
    **dict.fromkeys(CHANGING),
    "partial_rotary_factor": 1.0,
    "is_causal": False,
    "num_experts": 0,
    "logit_scale": 1,
    "head_dim": 8,
    "layer_types": ["full_attention", "full_attention"],
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("cls", [DreamDenoiser, LLaDADenoiser])
def test_fields_that_change_the_model(cls, name):
    base = official.DREAM if cls is DreamDenoiser else official.LLADA
    with pytest.raises(ValueError, match=rf"^denoiser: config\.json has {name} .*, expected .*supported"):
        cls.build_model({**base, name: CHANGING[name]})
    cls.build_model({**base, name: NEUTRAL[name]})


@pytest.mark.parametrize(("name", "value"), [("is_decoder", True), ("is_causal", True), ("bd_size", 32)])
def test_fields_that_make_a_masked_lm_causal(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"config of BertForMaskedLM has {name} {value}, expected"):
        load_denoiser(change_config(checkpoints.denoiser(tmp_path), **{name: value}))


def test_fields_that_are_not_read(tmp_path):
    """Named in a warning, unless they say nothing; a checkpoint as it is published has none."""
    for name, fields in (("dream", official.DREAM), ("llada", official.LLADA)):
        weights = getattr(official, f"{name}_weights")(fields)
        more = {**fields, "my_twist": 3, "another": None, "third": False, "_name_or_path": "x"}
        folder = official.write_checkpoint(tmp_path / name, more, weights)
        with pytest.warns(UserWarning, match="has fields that are not read: my_twist; if the model"):
            load_denoiser(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_denoiser(official.write_checkpoint(tmp_path / f"{name} as it is", fields, weights))
