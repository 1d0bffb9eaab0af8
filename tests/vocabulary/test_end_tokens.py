"""The tokens that end a response, wherever a checkpoint names them, and what they do."""

import json

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import entrgi
from entrgi import generate
from entrgi.denoisers.ends import choose_end_ids, turn_end
from entrgi.rewards import attention_mask
from support import official_layouts as official
from support import tiny
from support.checkpoints import change_config

ENDS = (3, 20, 30)
SIZES = {"max_new_tokens": 8, "steps": 8, "num_return_sequences": 4, "seed": 1, "guidance": "none"}
EOS, TURN, OTHER = official.EOS, official.IM_END, official.IM_START
A, B = 70, 71  # ordinary ids of the official layouts


def write(tmp_path, kind, fields=None, generation=None, template=True):
    """A tiny checkpoint with what its files say of ends."""
    own = {"Dream": official.DREAM, "llada": official.LLADA}[kind]
    weights = {"Dream": official.dream_weights, "llada": official.llada_weights}[kind](own)
    folder = official.write_checkpoint(tmp_path / kind, own, weights)
    change_config(folder, **(fields or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if not template:
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": None}))
    return folder


# ------------------------------------------------------------------------------------------------ where they come from

SOURCES = [
    ({}, None, False, (EOS,)),
    ({}, None, True, (EOS, TURN)),
    ({"eos_token_id": [EOS, OTHER]}, None, False, (EOS, OTHER)),
    ({"eos_token_id": OTHER}, None, False, (EOS, OTHER)),
    ({"eos_token_id": None}, None, True, (EOS, TURN)),
    ({}, {"eos_token_id": [A, B]}, False, (EOS, A, B)),
    ({}, {"eos_token_id": A}, True, (EOS, A, TURN)),
    ({"eos_token_id": [OTHER]}, {"eos_token_id": [A, EOS]}, True, (EOS, OTHER, A, TURN)),
    ({}, {"eos_token_id": [official.MASK, 10**6, -1, A]}, False, (EOS, A)),  # what is never drawn ends nothing
    ({}, {}, False, (EOS,)),
]


@pytest.mark.parametrize(("fields", "generation", "template", "expected"), SOURCES, ids=str)
@pytest.mark.parametrize("kind", ["Dream", "llada"])
def test_every_source(tmp_path, kind, fields, generation, template, expected):
    denoiser = entrgi.load_denoiser(write(tmp_path, kind, fields, generation, template))
    assert denoiser.end_token_ids == expected
    assert denoiser.eos_token_id == expected[0]


@pytest.mark.parametrize("value", ["<|end|>", 1.5, {"id": 3}, [3, "x"], True], ids=repr)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_id(tmp_path, file, value):
    folder = write(tmp_path, "Dream")
    before = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**before, "eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"^denoiser: {file} has eos_token_id .*, expected an id or several"):
        entrgi.load_denoiser(folder)


@pytest.mark.parametrize(("given", "expected"), [(7, (7,)), ([7, 9, 7], (7, 9)), ((9,), (9,)), ([], ())])
def test_those_that_are_given_are_all(tmp_path, given, expected):
    folder = write(tmp_path, "Dream", generation={"eos_token_id": [A, B]})
    denoiser = entrgi.load_denoiser(folder, eos_token_id=given)
    assert denoiser.end_token_ids == expected
    assert denoiser.eos_token_id == (expected[0] if expected else None)


def test_masked_language_models_and_callables(tmp_path):
    model = tiny.denoiser().model
    assert entrgi.MaskedLM(model, tiny.tokenizer()).end_token_ids == (3,)
    model.config.eos_token_id = [20, 30]
    model.generation_config = GenerationConfig(eos_token_id=40)
    assert entrgi.MaskedLM(model, tiny.tokenizer()).end_token_ids == (3, 20, 30, 40)
    assert entrgi.CallableDenoiser(model, tiny.tokenizer()).end_token_ids == (3, 20, 30, 40)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [41]}))
    assert entrgi.load_denoiser(tmp_path).end_token_ids == (3, 20, 30, 41)
    called = entrgi.CallableDenoiser(lambda ids, mask: None, tiny.tokenizer(), 64, eos_token_id=[5, 6])
    assert called.end_token_ids == (5, 6)


def test_the_default_of_a_class_is_no_declaration():
    """Llama's config says 2 whatever the vocabulary."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert model.config.eos_token_id == 2
    assert entrgi.CallableDenoiser(model, tiny.tokenizer()).end_token_ids == (3,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (official.CHATML, TURN),
        ("{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}", TURN),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}.<|im_end|>{% endfor %}", None),  # not what follows at once
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        (None, None),
    ],
)
def test_what_closes_a_turn(tmp_path, template, expected):
    tok = entrgi.load_denoiser(write(tmp_path, "Dream")).tokenizer
    tok.chat_template = template
    assert turn_end(tok) == expected
    assert choose_end_ids(None, tok, official.VOCAB, official.MASK) == tuple(
        x for x in (EOS, expected) if x is not None
    )


# ------------------------------------------------------------------------------------------------------- what they do


@pytest.fixture
def denoiser():
    """Ends of all kinds are drawn in the middle of texts."""
    made = tiny.denoiser()
    with torch.no_grad():
        made.model.get_output_embeddings().bias[[20, 30]] += 3.0
    made.end_token_ids = ENDS
    return made


def windows(output):
    first, stop = output.windows[0]
    return [row[first:stop] for row in output.sequences[0].tolist()]


def first_end(window, ends=ENDS):
    return next((i for i, token in enumerate(window) if token in ends), len(window))


def test_texts_are_cut_at_each(denoiser):
    output = generate("the", denoiser, None, **SIZES)
    rows = windows(output)
    assert {row[first_end(row)] for row in rows if first_end(row) < len(row)} >= {20}
    for row, response in zip(rows, output.responses[0], strict=True):
        assert response == denoiser.tokenizer.decode(row[: first_end(row)], skip_special_tokens=True)
    denoiser.end_token_ids = (3,)
    assert generate("the", denoiser, None, **SIZES).responses != output.responses


def test_rewards_read_what_is_cut(denoiser):
    reward = tiny.bert_reward()
    output = generate("the", denoiser, reward, **SIZES)
    expected = [
        entrgi.prompts.Completion("the", text, response)
        for text, response in zip(output.texts[0], output.responses[0], strict=True)
    ]
    torch.testing.assert_close(output.rewards[0], reward.score(expected), rtol=0, atol=0)


def test_generation_ends_early_at_each(denoiser):
    output = generate("the", denoiser, None, early_exit=True, deprioritize_eos=False, **{**SIZES, "block_length": 2})
    ended = [row for row in windows(output) if first_end(row) < len(row) - 2]
    assert ended
    for row in ended:
        tail = row[first_end(row) + 2 :]
        assert set(tail) == {3}, "filled with the first of the ends"


def test_streams_stop_at_each(denoiser):
    class Streamer:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    options = {**SIZES, "num_return_sequences": 1, "seed": 5}
    output = generate("the", denoiser, None, streamer=streamer, **options)
    (row,) = windows(output)
    assert first_end(row, ENDS[1:]) < len(row)
    assert streamer.ids[output.windows[0][0] :] == row[: first_end(row)]


def test_no_end_is_drawn_in_a_hole(denoiser):
    prompts = ["the [MASK] was [MASK] good [MASK]"] * 4
    options = {**SIZES, "infill": True, "max_new_tokens": 0}
    assert not set(ENDS) & set(generate(prompts, denoiser, None, **options).sequences.flatten().tolist()[1:-1]) - {3}
    denoiser.end_token_ids = (3,)
    assert {20, 30} & set(generate(prompts, denoiser, None, **options).sequences.flatten().tolist())


@pytest.mark.parametrize("ends", [3, (3,), (3, 7), (7, 3, 9), (), None])
def test_what_a_reward_sees(ends):
    """Behind the first end nothing, whichever it is; the end itself it does."""
    tokens = torch.tensor([[2, 5, 7, 6, 3, 5, 3], [2, 5, 5, 3, 7, 9, 3], [2, 3, 9, 0, 5, 6, 3]])
    response = torch.zeros_like(tokens, dtype=torch.bool)
    response[:, 1:6] = True
    visible = attention_mask(tokens, torch.ones_like(response), response, ends, 0)
    each = () if ends is None else (ends,) if isinstance(ends, int) else ends
    for row, shown in zip(tokens.tolist(), visible.tolist(), strict=True):
        ended = False
        for column, token in enumerate(row):
            inside = 1 <= column < 6
            assert shown[column] == (not inside or not (ended or token == 0))
            ended |= inside and token in each


def test_published_guidance_knows_one():
    """Presets hide behind eos alone, as published; texts are cut at every end all the same."""
    assert entrgi.preset("paper").end_tokens == entrgi.preset("rgrl").end_tokens == "eos"
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    options = {**SIZES, "guidance": "entrgi"}
    alone = generate("the", denoiser, reward, **options)
    denoiser.end_token_ids = (3, *range(20, 60, 3))
    several = generate("the", denoiser, reward, **options)
    assert torch.equal(alone.sequences, several.sequences)
    assert alone.texts != several.texts
    hidden = generate("the", denoiser, reward, end_tokens="all", **options)
    assert not torch.equal(hidden.sequences, several.sequences)


def test_an_ordinary_word_of_config_json_is_no_end(tmp_path):
    """Some classes write a default of their own there: ConvBERT's is 2, whatever the vocabulary."""
    denoiser = entrgi.load_denoiser(write(tmp_path, "Dream", {"eos_token_id": [EOS, A, TURN]}, template=False))
    assert A not in denoiser.end_token_ids
    assert denoiser.end_token_ids == (EOS, TURN)
    stated = write(tmp_path / "stated", "Dream", {"eos_token_id": A}, {"eos_token_id": A}, template=False)
    assert entrgi.load_denoiser(stated).end_token_ids == (EOS, A), "where generation_config.json says so, it is one"


def test_a_class_without_defaults():
    class Config(LlamaConfig):
        def __init__(self, needed, **fields):
            super().__init__(**fields)

    model = LlamaForCausalLM(
        Config(1, vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert 3 in entrgi.CallableDenoiser(model, tiny.tokenizer()).end_token_ids


@pytest.mark.parametrize("given", [4, [3, 4], "[SEP]", ["[SEP]"]])
def test_ends_that_cannot_be(given):
    with pytest.raises(ValueError, match=r"denoiser: eos_token_id (4|'\[SEP\]') is"):
        entrgi.MaskedLM(tiny.denoiser().model, tiny.tokenizer(), eos_token_id=given)


def test_the_users_own_end_in_a_text_to_be_infilled():
    """What stands behind it is the user's, too."""
    denoiser = tiny.denoiser()
    options = {**SIZES, "infill": True, "max_new_tokens": 0}
    output = generate("the [MASK] [SEP] movie was [MASK] bad", denoiser, None, **options)
    assert all(text.endswith(" bad") and " movie was " in text for text in output.texts[0])
    early = generate("the [MASK] [SEP] movie was [MASK] bad", denoiser, None, early_exit=True, **options)
    assert early.texts == output.texts
