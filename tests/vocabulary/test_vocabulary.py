"""Which reward token stands for each token of the denoiser: hand-written maps, and properties of whole texts."""

import copy
import json
import time
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from typer.testing import CliRunner

from entrgi import SequenceClassifierReward, cli, demo, generate
from entrgi.vocabulary import align, align_embedding, coverage, undecodable
from support import tiny
from support import tokenizer_kinds as kinds

pytestmark = pytest.mark.filterwarnings("ignore:reward. .* have a counterpart:UserWarning")

TEXTS = [
    "The movie was good, and the actors were better than the story.",
    "the end of the film: nobody moved; everybody (all of us) cried!",
    "Un café, s'il vous plaît. Die Straße führt über die Brücke.",
    "numbers 12 and 345,  two spaces\nand a new line\tand a tab",
    "a 😀 face, 日本語 and русский текст",
]


def token_map(denoiser, reward):
    """token -> token of the reward, or None."""
    ids = align(denoiser, len(denoiser), reward).ids.tolist()
    return {
        denoiser.convert_ids_to_tokens(i): None if j < 0 else reward.convert_ids_to_tokens(j) for i, j in enumerate(ids)
    }


# ---------------------------------------------------------------------------------------------- hand-written maps


def test_byte_level_to_sentence_piece():
    ours = kinds.byte_level(["Ġthe", "the", "Ċ", "â", "Ã©", "Ã", "A", "ĠĠ", "▁", "\xa0", "<0x41>", "xyz"])
    theirs = kinds.sentence_piece(["\xa0", "<0x0A>", "<0xE2>", "<0xC3>", "<0x41>", "▁the", "the", "é", "A", "▁▁", "xy"])
    assert token_map(ours, theirs) == {
        "Ġthe": "▁the",
        "the": "the",
        "Ċ": "<0x0A>",
        "â": "<0xE2>",  # the alphabet's letter for byte E2, not the letter itself
        "Ã©": "é",
        "Ã": "<0xC3>",
        "A": "A",  # rather than the byte token
        "ĠĠ": "▁▁",
        "▁": None,  # outside of the alphabet: a literal U+2581, which the reward cannot spell
        "\xa0": "\xa0",  # likewise, and not the byte A0
        "<0x41>": None,  # six characters here
        "xyz": None,
    }


def test_sentence_piece_to_byte_level():
    ours = kinds.sentence_piece(["▁the", "the", "é", "A", "<0x41>", "<0xC3>", "▁", "▁▁", "▁é", "Ġ"])
    theirs = kinds.byte_level(["Ġthe", "Ã©", "A", "Ã", "Ġ", "ĠĠ", "é"])
    assert token_map(ours, theirs) == {
        "▁the": "Ġthe",
        "the": None,
        "é": "Ã©",  # not "é", which is the byte E9
        "A": "A",
        "<0x41>": "A",  # two ids with the same bytes
        "<0xC3>": "Ã",
        "▁": "Ġ",
        "▁▁": "ĠĠ",
        "▁é": None,
        "Ġ": None,
    }


def test_a_unigram_model_without_byte_tokens():
    ours = kinds.unigram(["<unk>", "▁the", "ing", "<0x41>"], unk="<unk>")
    theirs = kinds.sentence_piece(["A", "<0x41>", "▁the", "ing"])
    assert token_map(ours, theirs) == {"<unk>": None, "▁the": "▁the", "ing": "ing", "<0x41>": None}


def test_word_piece_to_byte_level():
    ours = kinds.word_piece(["the", "##the", "only", "##ing", ".", "...", "(", "café", "##é", "##q"])
    theirs = kinds.byte_level(["the", "Ġthe", "only", "ing", ".", "Ġ.", "...", "(", "Ġ(", "ĠcafÃ©", "Ã©", "Ġq"])
    assert token_map(ours, theirs) == {
        "[UNK]": None,
        "the": "Ġthe",  # a word's start carries the space before it
        "##the": "the",
        "only": "only",  # without it, where the reward has only that
        "##ing": "ing",
        ".": ".",  # decoding attaches it
        "...": "...",
        "(": "Ġ(",
        "café": "ĠcafÃ©",
        "##é": "Ã©",
        "##q": None,  # the space is not implied there, so none may be added
    }


def test_without_clean_up_full_stops_keep_their_space():
    ours = kinds.word_piece([".", ",", "x"], cleanup=False)
    theirs = kinds.byte_level([".", "Ġ.", ",", "Ġx"])
    assert token_map(ours, theirs) == {"[UNK]": None, ".": "Ġ.", ",": ",", "x": "Ġx"}


def test_byte_level_to_word_piece():
    tokens = ["The", "the", "##the", "##ing", ",", "##,", "##q", "run", "中", "##中", "##国"]
    theirs = kinds.word_piece(tokens)
    ours = kinds.byte_level(["ĠThe", "Ġthe", "the", "ing", ",", "Ġ,", "Ġq", "run", "ä¸Ń", "åĽ½", "),", "Ġ"])
    assert token_map(ours, theirs) == {
        "ĠThe": "The",
        "Ġthe": "the",
        "the": "##the",
        "ing": "##ing",
        ",": ",",  # BERT splits before punctuation: its "##," is never used
        "Ġ,": ",",
        "Ġq": None,  # "##q" would read as the end of the word before
        "run": "run",  # where there is no "##run"
        "ä¸Ń": "中",  # and around Chinese characters
        "åĽ½": "##国",
        "),": None,
        "Ġ": None,
    }


def test_an_uncased_reward_reads_lower_case_without_accents():
    theirs = kinds.word_piece(["the", "The", "cafe", "##e", "##É", "i"], lowercase=True)
    ours = kinds.byte_level(["ĠThe", "Ġthe", "ĠTHE", "ĠcafÃ©", "Ã©", "Ãī", "Ã", "ĠI"])
    assert token_map(ours, theirs) == {
        "ĠThe": "the",  # not "The", which an uncased tokenizer never gives its model
        "Ġthe": "the",
        "ĠTHE": "the",
        "ĠcafÃ©": "cafe",
        "Ã©": "##e",
        "Ãī": "##e",
        "Ã": None,
        "ĠI": "i",
    }


def test_an_uncased_denoiser_gives_lower_case_only():
    ours = kinds.word_piece(["the", "i", "##e"], lowercase=True)
    theirs = kinds.byte_level(["ĠThe", "ĠI", "Ġthe", "e", "E"])
    assert token_map(ours, theirs) == {"[UNK]": None, "the": "Ġthe", "i": None, "##e": "e"}


def test_cased_to_uncased_word_pieces():
    """Spelled alike is not enough where the reward's normaliser never lets it through."""
    ours = kinds.word_piece(["The", "the", "##S", "NASA"])
    theirs = kinds.word_piece(["The", "the", "##s", "##S"], lowercase=True)
    assert token_map(ours, theirs) == {"[UNK]": "[UNK]", "The": "the", "the": "the", "##S": "##s", "NASA": None}


def test_unicode_forms():
    theirs = kinds.byte_level(["Ã©", "e", "âĦ¦", "Î©"], normalizer=normalizers.NFC())
    ours = kinds.sentence_piece(["e\u0301", "é", "\u2126", "Ω", "e"])
    assert token_map(ours, theirs) == {"e\u0301": "Ã©", "é": "Ã©", "\u2126": "Î©", "Ω": "Î©", "e": "e"}


def test_words():
    ours = kinds.word_level(["good", "bad", "##ly", "odd"])
    assert token_map(ours, kinds.word_piece(["good", "##bad", "##ly"])) == {
        "[UNK]": "[UNK]",
        "good": "good",
        "bad": "##bad",  # as for any reward that has the word without its space only
        "##ly": None,  # a word of four characters here
        "odd": None,
    }
    assert token_map(kinds.byte_level(["Ġgood", "bad", "Ġodd"]), ours) == {"Ġgood": "good", "bad": "bad", "Ġodd": "odd"}


def test_without_a_decoder_the_other_parts_tell():
    """Decoding then joins tokens with spaces, unless a prefix, a marker or an alphabet says what they are."""
    theirs = kinds.byte_level(["Ġgood", "good", "ly", "Ã©", "é"])
    pieces = kinds.word_piece(["good", "##ly"])
    pieces.backend_tokenizer.decoder = None
    assert token_map(pieces, theirs) == {"[UNK]": None, "good": "Ġgood", "##ly": "ly"}
    words = kinds.wrapped(Tokenizer(models.BPE({"good": 0, "##ly": 1}, [], continuing_subword_prefix="")))
    assert token_map(words, theirs) == {"good": "Ġgood", "##ly": None}
    marked = kinds.unigram(["<unk>", "▁good", "good"], unk="<unk>")
    marked.backend_tokenizer.decoder = None
    assert token_map(marked, theirs) == {"<unk>": None, "▁good": "Ġgood", "good": "good"}
    bytewise = kinds.byte_level(["Ã©", "é", "Ġgood"])
    bytewise.backend_tokenizer.decoder = None
    assert token_map(bytewise, theirs) == {"Ã©": "Ã©", "é": "é", "Ġgood": "Ġgood"}
    assert align(bytewise, 3, kinds.sentence_piece(["▁good", "é"])).ids.tolist() == [1, -1, 0]


@pytest.mark.parametrize("tokens", [[" a", "▁a", "b"], ["▁a", " a", "b"]])
def test_the_lowest_id_of_those_with_the_same_bytes(tokens):
    assert align(kinds.byte_level(["b", "Ġa"]), 2, kinds.sentence_piece(tokens)).ids.tolist() == [2, 0]


def test_an_added_token_before_an_ordinary_one_with_the_same_bytes():
    """A tokenizer looks for its added tokens first."""
    theirs = kinds.sentence_piece(["▁▁", "a"])
    theirs.add_tokens(["  "])
    assert align(kinds.byte_level(["ĠĠ", "a"]), 2, theirs).ids.tolist() == [2, 1]


def test_a_tokenizer_written_in_python(tmp_path):
    """BERT's own, of which there is no other part to look into than its attributes."""
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##the", ",", "##,", "e", "##e"]))
    kind = transformers.BertTokenizer  # in transformers 4; in 5 that is one of the tokenizers library
    if hasattr(kind(str(file)), "backend_tokenizer"):
        kind = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy").BertTokenizerLegacy
    theirs = kind(str(file), do_lower_case=True)
    ours = kinds.byte_level(["Ġthe", "ĠThe", "the", ",", "Ã©"])
    assert token_map(ours, theirs) == {"Ġthe": "the", "ĠThe": "the", "the": "##the", ",": ",", "Ã©": "##e"}
    assert align(theirs, 11, ours).ids.tolist() == [-1, -1, -1, -1, -1, 0, 2, 3, 3, -1, -1]


def test_tokens_of_an_unknown_kind():
    """ByT5's token "é" is the byte E9: not taken for the letter, as its tokenizer does not take it for that."""
    theirs = transformers.ByT5Tokenizer()
    assert token_map(kinds.byte_level(["A", "Ċ", "Ã©"]), theirs) == {"A": "A", "Ċ": "\n", "Ã©": None}


# ------------------------------------------------------------------------------------------ special and added tokens


def test_roles():
    ours = kinds.word_piece(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"],
        pad="[PAD]",
        cls="[CLS]",
        sep="[SEP]",
        mask="[MASK]",
    )
    roles = {"unk": "<unk>", "pad": "<pad>", "bos": "<s>", "eos": "</s>"}
    theirs = kinds.unigram(["<unk>", "▁the", "<pad>", "</s>", "<s>", "[PAD]", "<mask>"], **roles)
    assert token_map(ours, theirs) == {
        "[PAD]": "<pad>",  # a special token is never an ordinary one of the same spelling
        "[UNK]": "<unk>",
        "[CLS]": "<s>",
        "[SEP]": "</s>",
        "[MASK]": None,  # "<mask>" is not the reward's mask token
        "the": "▁the",
    }
    back = token_map(theirs, ours)
    assert back == {
        "<unk>": "[UNK]",
        "▁the": "the",
        "<pad>": "[PAD]",
        "</s>": "[SEP]",
        "<s>": "[CLS]",
        "[PAD]": None,
        "<mask>": None,
    }


def test_spelling_goes_before_role():
    """Qwen's base and chat models: the end of text of one is the padding of the other."""
    ours = kinds.byte_level(["Ġa", "<|endoftext|>", "<|im_end|>"], eos="<|endoftext|>", pad="<|endoftext|>")
    theirs = kinds.byte_level(["Ġa", "b", "<|im_end|>", "<|endoftext|>"], eos="<|im_end|>", pad="<|endoftext|>")
    assert token_map(ours, theirs)["<|endoftext|>"] == "<|endoftext|>"
    other = kinds.byte_level(["Ġa", "</s>", "<pad>"], eos="</s>", pad="<pad>")
    assert token_map(ours, other)["<|endoftext|>"] == "</s>", "eos before pad"
    assert token_map(ours, other)["<|im_end|>"] is None


def test_added_tokens():
    """Added tokens that are no special tokens are text; special ones are not, whatever they spell."""
    ours = kinds.byte_level(["Ġa", "<b>"])
    ours.add_tokens(["<think>", "à é"])
    ours.add_tokens([AddedToken("<i>", special=True)], special_tokens=True)
    theirs = kinds.sentence_piece(["▁a", "<b>", "<i>", "<", "à▁é"])
    theirs.add_tokens(["<think>"])
    theirs.add_tokens([AddedToken("<b>", special=True)], special_tokens=True)
    assert token_map(ours, theirs) == {
        "Ġa": "▁a",
        "<b>": None,
        "<think>": "<think>",
        "à é": "à▁é",  # taken literally, not through the alphabet
        "<i>": None,
    }


def test_an_added_token_is_not_spelled_in_the_alphabet():
    """Added as the letter; the reward's ordinary "é" is the byte E9."""
    ours = kinds.byte_level(["a"])
    ours.add_tokens(["é"])
    assert align(ours, 2, kinds.byte_level(["é", "a"])).ids.tolist() == [1, -1]
    assert align(ours, 2, kinds.byte_level(["a", "é", "Ã©"])).ids.tolist() == [0, 2]


def test_a_tokenizer_that_changes_is_read_again():
    """Alignments are kept between generations."""
    ours, theirs = kinds.byte_level(["Ġa", "Ġb", "end"]), kinds.sentence_piece(["▁a", "▁b", "</s>"])
    first = align(ours, 3, theirs)
    assert align(ours, 3, theirs) is first
    assert first.ids.tolist() == [0, 1, -1]
    theirs.eos_token, ours.eos_token = "</s>", "end"
    assert align(ours, 3, theirs).ids.tolist() == [0, 1, 2]
    theirs.add_tokens([" b"])
    assert align(ours, 3, theirs).ids.tolist() == [0, 3, 2]
    assert align(ours, 2, theirs).ids.tolist() == [0, 3]


def test_id_zero_is_an_id():
    ours = kinds.byte_level(["<pad>", "Ġa"], pad="<pad>")
    theirs = kinds.sentence_piece(["▁a", "[PAD]"], pad="[PAD]")
    assert align(ours, 2, theirs).ids.tolist() == [1, 0]
    assert align(theirs, 2, ours).ids.tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------- whole texts


@pytest.fixture(scope="module")
def trained():
    return {
        "byte_level": kinds.trained_byte_level(TEXTS * 2, 400),
        "other_byte_level": kinds.trained_byte_level(TEXTS[1:4], 330),
        "sentence_piece": kinds.trained_sentence_piece(TEXTS[:4], 420),
        "word_piece": kinds.trained_word_piece(TEXTS, 300),
        "uncased": kinds.trained_word_piece(TEXTS, 300, lowercase=True),
    }


def mapped_text(denoiser, reward, ids, text):
    """What the reward reads of a text, over the tokens that it has, beside that part of the text itself."""
    tokens = [i for i in denoiser(text, add_special_tokens=False)["input_ids"] if ids[i] >= 0]
    return reward.decode([int(ids[i]) for i in tokens]), denoiser.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=20), st.lists(st.sampled_from(" ".join(TEXTS).split(" "))).map(" ".join)))
@pytest.mark.parametrize("direction", [("byte_level", "sentence_piece"), ("sentence_piece", "byte_level")])
def test_every_text_survives(trained, direction, text):
    """Both can spell all bytes: unmapped tokens are left out, the rest decodes to the same text."""
    ours, theirs = (trained[name] for name in direction)
    ids = align(ours, len(ours), theirs).ids
    tokens = ours(text, add_special_tokens=False)["input_ids"]
    # Leaving tokens out may cut characters in two, which decoders replace differently.
    if all(ids[i] >= 0 for i in tokens):
        read, written = mapped_text(ours, theirs, ids, text)
        assert read == written == text
    single = [i for i in tokens if ids[i] >= 0 and "\ufffd" not in ours.decode([i])]
    for i in single:
        assert theirs.decode([int(ids[i])]) == ours.decode([i])


def test_trained_vocabularies_overlap_enough_to_be_a_test(trained):
    for pair in (("byte_level", "sentence_piece"), ("sentence_piece", "byte_level"), ("byte_level", "uncased")):
        ours, theirs = (trained[name] for name in pair)
        assert int((align(ours, len(ours), theirs).ids >= 0).sum()) > 100


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from([w for text in TEXTS[:2] for w in text.split()]), min_size=1, max_size=8))
@pytest.mark.parametrize(
    "direction", [("word_piece", "byte_level"), ("byte_level", "word_piece"), ("byte_level", "uncased")]
)
def test_every_word_survives(trained, direction, words):
    """With word pieces on one side: the same characters in the same order; spaces as far as they are implied."""
    ours, theirs = (trained[name] for name in direction)
    ids = align(ours, len(ours), theirs).ids
    read, written = mapped_text(ours, theirs, ids, " " + " ".join(["the", *words]))
    if direction[1] == "uncased":
        written = written.lower()
    assert "".join(read.split()) == "".join(written.split())


def test_words_keep_their_spaces(trained):
    ours, theirs = trained["word_piece"], trained["byte_level"]
    ids = align(ours, len(ours), theirs).ids
    read, written = mapped_text(ours, theirs, ids, "the movie was good, and the actors were better than the story.")
    assert read.strip() == written
    assert len(written) > 20
    ids = align(theirs, len(theirs), ours).ids
    read, written = mapped_text(theirs, ours, ids, " the movie was good, and the actors were better than the story.")
    assert read == written.strip()
    assert len(written) > 20


# --------------------------------------------------------------------------------------------- the same vocabulary


def shuffled(tokenizer, seed, roles):
    """The same tokens with other ids."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    old = model["vocab"] if isinstance(model["vocab"], dict) else kinds.numbered(token for token, _ in model["vocab"])
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)).tolist()
    new = {token: order[i] for token, i in old.items()}
    if isinstance(model["vocab"], dict):
        model["vocab"] = new
    else:
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores[token]] for token in sorted(new, key=new.__getitem__)]
        model["unk_id"] = order[model["unk_id"]]
    for token in parts["added_tokens"]:
        token["id"] = new[token["content"]]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))
    named = {role: getattr(tokenizer, name) for role, name in kinds.ROLES.items() if role in roles}
    return kinds.wrapped(backend, **named), torch.tensor(order)


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece", "word_piece", "uncased", "demo", "unigram", "words"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shuffled_copy_maps_perfectly(trained, name, seed):
    """Also where tokens share their bytes ("A" and "<0x41>", "," and "##,") or no text could reach them."""
    tokenizer = {
        "demo": demo.load_tokenizer,
        "unigram": lambda: kinds.unigram(["<unk>", "▁the", "the", "▁", "a", "b"], unk="<unk>"),
        "words": tiny.tokenizer,
    }.get(name, lambda: trained[name])()
    roles = [role for role, attribute in kinds.ROLES.items() if getattr(tokenizer, attribute) is not None]
    copy, order = shuffled(tokenizer, seed, roles)
    alignment = align(tokenizer, len(tokenizer) + 3, copy)
    assert torch.equal(alignment.ids[: len(tokenizer)], order)
    assert alignment.ids[len(tokenizer) :].tolist() == [-1] * 3
    assert not alignment.identical


def test_the_same_vocabulary_is_the_identity():
    alignment = align(tiny.tokenizer(), 64, tiny.tokenizer())
    assert alignment.identical
    assert alignment.ids.dtype == torch.long
    assert alignment.ids.tolist() == [*range(60), -1, -1, -1, -1]
    assert align(tiny.tokenizer(), 10, tiny.tokenizer()).ids.tolist() == list(range(10))


def test_the_same_tokens_read_in_another_way():
    """One vocabulary file behind a cased and an uncased tokenizer, or with other rules for spaces."""
    tokens = ["The", "the", "##s", "##S", "##,", ","]
    cased, uncased = kinds.word_piece(tokens), kinds.word_piece(tokens, lowercase=True)
    alignment = align(cased, 7, uncased)
    assert not alignment.identical
    assert alignment.ids.tolist() == [0, 2, 2, 3, 3, 5, 6]
    assert not align(kinds.word_level(tokens), 7, cased).identical
    assert align(cased, 7, kinds.word_piece(tokens, cleanup=False)).identical, "clean-up concerns decoded texts"


def test_one_other_word():
    """Everything but that word."""
    alignment = align(tiny.tokenizer(), 64, tiny.tokenizer([*tiny.WORDS[:-1], "other"]))
    assert not alignment.identical
    assert alignment.ids.tolist() == [*range(59), *[-1] * 5]


# ---------------------------------------------------------------------------------------------- refusals, warnings


def test_nothing_shared():
    """One sentence that names both, before anything else happens; special tokens alone do not count."""
    ours = kinds.word_piece(["the", "movie"], pad="[UNK]")
    theirs = kinds.byte_level(["xx", "yy", "[UNK]"], unk="[UNK]")
    with pytest.raises(ValueError, match=r"3 tokens such as 'xx', 'yy'.*3 tokens such as 'the', 'movie'"):
        align(ours, 3, theirs)


def test_little_shared():
    ours = kinds.byte_level(["Ġa", "Ġb", "Ġc", "Ġd", "Ġe"])
    with pytest.warns(UserWarning, match=r"40\.0% of the denoiser's 5 tokens"):
        align(ours, 8, kinds.sentence_piece(["▁a", "▁b"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        align(ours, 8, kinds.sentence_piece(["▁a", "▁b", "▁c"]))
        align(ours, 2, kinds.sentence_piece(["▁a"]))  # ids beyond the logits do not count


def test_large_vocabularies_are_fast():
    """About half a second for 150,000 tokens on each side; a search for each token would take hours."""
    words = [f"{head}{i:x}" for i in range(30_000) for head in ("Ġ", "")]
    ours = kinds.byte_level(words, normalizer=normalizers.NFC())
    theirs = kinds.sentence_piece([word.replace("Ġ", "▁") for word in reversed(words)])
    start = time.process_time()
    ids = align(ours, len(words), theirs).ids
    assert time.process_time() - start < 5
    assert torch.equal(ids, torch.arange(len(words)).flip(0))


# ------------------------------------------------------------------------------------------------ embedding, forbidden


@pytest.mark.parametrize(("width", "rows"), [(60, 60), (64, 64), (64, 60), (60, 64), (70, 64)])
@pytest.mark.parametrize("unmapped", ["unk", "zero"])
def test_embedding_of_the_same_vocabulary(width, rows, unmapped):
    """Rows without a token, as padded output layers have, are the unknown token's or zeros."""
    weight = torch.randn(rows, 4)
    got = align_embedding(weight, align(tiny.tokenizer(), width, tiny.tokenizer()), unmapped, tiny.tokenizer())
    assert torch.equal(got[:60], weight[:60])
    assert got.shape == (width, 4)
    assert torch.equal(got[60:], (weight[1] if unmapped == "unk" else torch.zeros(4)).expand(width - 60, 4))
    if width == 60:
        assert got.data_ptr() == weight.data_ptr(), "nothing to change, nothing to copy"


def test_embedding_of_another_vocabulary():
    ours = kinds.byte_level(["x", "Ġthe", "the", "Ġa"])
    theirs = kinds.sentence_piece(["<unk>", "the", "▁the", "▁a"], unk="<unk>")
    weight = torch.randn(4, 3)
    alignment = align(ours, 6, theirs)
    got = align_embedding(weight, alignment, "unk", theirs)
    assert torch.equal(got, weight[[0, 2, 1, 3, 0, 0]])
    got = align_embedding(weight, alignment, "zero", theirs)
    assert torch.equal(got, torch.cat([weight, torch.zeros(1, 3)])[[4, 2, 1, 3, 4, 4]])


def test_missing_rows_fall_back_to_the_end_of_sequence():
    """Where there is no unknown token, as published; id 0 is an id."""
    ours = kinds.byte_level(["Ġthe", "Ġa", "x"])
    theirs = kinds.sentence_piece(["</s>", "▁the", "▁a"], eos="</s>")
    weight = torch.randn(3, 2)
    assert torch.equal(align_embedding(weight, align(ours, 3, theirs), "unk", theirs), weight[[1, 2, 0]])
    bare = kinds.sentence_piece(["</s>", "▁the", "▁a"])
    with pytest.raises(ValueError, match=r"unmapped='unk'.*no unknown and no end-of-sequence token"):
        align_embedding(weight, align(ours, 3, bare), "unk", bare)
    assert torch.equal(align_embedding(weight, align(ours, 3, bare), "zero", bare)[2], torch.zeros(2))


def test_refused_embeddings():
    alignment = align(tiny.tokenizer(), 64, tiny.tokenizer())
    with pytest.raises(ValueError, match="its embedding has 50 rows, its tokenizer ids up to 59"):
        align_embedding(torch.zeros(50, 4), alignment, "unk", tiny.tokenizer())
    theirs = kinds.sentence_piece(["▁a", "<unk>"], unk="<unk>")
    with pytest.raises(ValueError, match="unmapped='unk': the reward's embedding has 1 rows, its unknown id is 1"):
        align_embedding(torch.zeros(1, 4), align(kinds.byte_level(["Ġa", "Ġb"]), 2, theirs), "unk", theirs)
    with pytest.raises(ValueError, match="unmapped must be one of unk, zero, got 'mean'"):
        align_embedding(torch.zeros(64, 4), alignment, "mean", tiny.tokenizer())


def test_undecodable_ids():
    """Ids past the vocabulary, and gaps inside it: neither decodes to anything."""
    tokenizer = kinds.byte_level(["Ġa", "b"])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] = {"Ġa": 0, "b": 2, "c": 3, "d": 9}
    tokenizer = kinds.wrapped(type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)))
    forbidden = undecodable(tokenizer, 6)
    assert forbidden.tolist() == [False, True, False, False, True, True]
    assert [tokenizer.decode([i]) == "" for i in range(6)] == forbidden.tolist()
    assert undecodable(tiny.tokenizer(), 64).nonzero().flatten().tolist() == [60, 61, 62, 63]
    assert align(tokenizer, 6, tokenizer).ids.tolist() == [0, -1, 2, 3, -1, -1]


# ----------------------------------------------------------------------------------------------------------- coverage


@pytest.fixture(scope="module")
def partial_pair():
    ours = kinds.byte_level(["Ġthe", "Ã", "Ġa", "Ġb", "Ġc"])
    alignment = align(ours, 7, kinds.sentence_piece(["▁the", "▁a", "▁c"]))
    return ours, alignment


def test_coverage_of_a_sample(partial_pair):
    ours, alignment = partial_pair
    probabilities = torch.tensor([[0.5, 0.1, 0.1, 0.2, 0.0, 0.0, 0.1], [0.1, 0.2, 0.1, 0.3, 0.3, 0.0, 0.0]])
    report = coverage(alignment, ours, probabilities)
    assert (report.vocab_size, report.tokens, report.mapped, report.positions) == (7, 5, 3, 2)
    assert report.share == 3 / 5
    assert not report.identical
    assert report.mass == pytest.approx((0.6 + 0.2 + 0.3) / 2, abs=1e-6)
    found = [(token.id, token.token, token.text) for token in report.unmapped]
    assert found == [(3, "Ġb", " b"), (1, "Ã", "\\xc3"), (6, None, "")]
    assert [token.mass for token in report.unmapped] == pytest.approx([0.25, 0.15, 0.05], abs=1e-6)
    assert coverage(alignment, ours, probabilities, top=1).unmapped == report.unmapped[:1]


def test_coverage_of_logits_is_that_of_their_softmax(partial_pair):
    ours, alignment = partial_pair
    logits = 2 * torch.randn(150, 7, generator=torch.Generator().manual_seed(0))
    ours_of, theirs = (
        coverage(alignment, ours, **sample) for sample in ({"logits": logits}, {"probabilities": logits.softmax(-1)})
    )
    assert ours_of.mass == pytest.approx(theirs.mass, rel=1e-6)
    assert [t.id for t in ours_of.unmapped] == [t.id for t in theirs.unmapped]
    assert coverage(alignment, ours, logits=logits.bfloat16()).mass == pytest.approx(theirs.mass, rel=0.01)


def test_coverage_without_a_sample(partial_pair):
    ours, alignment = partial_pair
    report = coverage(alignment, ours)
    assert report.mass is None
    assert [(token.id, token.mass) for token in report.unmapped] == [(1, None), (3, None)]
    full = coverage(align(ours, 5, ours), ours)
    assert (full.identical, full.share, full.unmapped) == (True, 1.0, ())


def test_coverage_as_text_and_json(partial_pair):
    ours, alignment = partial_pair
    report = coverage(alignment, ours, torch.full((1, 7), 1 / 7))
    text = str(report)
    assert "3 of 5 have a counterpart (60.00%)" in text
    assert "42.8571% (mean of 1 positions)" in text
    assert "' b'" in text
    assert "(no token)" in text
    loaded = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert loaded["share"] == 0.6
    assert loaded["unmapped"][0] == {"id": 1, "token": "Ã", "text": "\\xc3", "mass": pytest.approx(1 / 7)}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"probabilities": torch.ones(7) / 7}, r"probabilities: expected \[n, 7\] with n > 0, got \[7\]"),
        ({"probabilities": torch.ones(2, 5) / 5}, r"got \[2, 5\]"),
        ({"logits": torch.zeros(0, 7)}, r"logits: expected \[n, 7\] with n > 0, got \[0, 7\]"),
        ({"probabilities": torch.ones(2, 7)}, "expected rows that are distributions, got sums of"),
        ({"probabilities": torch.full((1, 7), float("nan"))}, "expected rows that are distributions"),
        ({"probabilities": torch.ones(1, 7) / 7, "logits": torch.ones(1, 7)}, "one of probabilities and logits"),
        ({"top": -1}, "top must be >= 0, got -1"),
    ],
)
def test_refused_samples(partial_pair, sample, message):
    ours, alignment = partial_pair
    with pytest.raises(ValueError, match=message):
        coverage(alignment, ours, **sample)


# --------------------------------------------------------------------------------------------------- whole generations

RUN = {"num_return_sequences": 2, "max_new_tokens": 8, "steps": 6, "guidance_lr": 2.0, "seed": 3}
PROMPTS = ["the movie", "w1 was good w2"]


def test_undecodable_ids_are_never_drawn():
    """Gaps and padded rows that the model would always choose."""
    holes = [20, 21, 59]
    backend = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    backend["model"]["vocab"] = {word: i for word, i in backend["model"]["vocab"].items() if i not in holes}
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = kinds.wrapped(type(tiny.tokenizer().backend_tokenizer).from_str(json.dumps(backend)), **roles)
    denoiser = tiny.denoiser(tok=tokenizer)
    unwanted = [*holes, 60, 61, 62, 63]
    denoiser.model.get_output_embeddings().bias.data[unwanted] += 30
    output = generate(PROMPTS, denoiser, tiny.bert_reward(), **RUN)
    assert not torch.isin(output.sequences, torch.tensor(unwanted)).any()


def test_forbidden_ids_have_their_mass_in_the_soft_embedding_alone():
    """What may not be drawn still has its row: the reward's unknown token."""
    denoiser, reward = tiny.denoiser(), tiny.bert_reward(tok=tiny.tokenizer(list(reversed(tiny.WORDS))))
    alignment = align(denoiser.tokenizer, denoiser.vocab_size, reward.tokenizer)
    embedding = align_embedding(reward.weight, alignment, "unk", reward.tokenizer)
    assert torch.equal(embedding[:60], reward.weight[:60].flip(0))
    assert torch.equal(embedding[60:], reward.weight[reward.tokenizer.unk_token_id].expand(4, -1))


def renumbered(reward, words, rows, **options):
    """The same reward model under a tokenizer with ``words``: its row i is the old row ``rows[i]``."""
    model = copy.deepcopy(reward.model)
    table = model.get_input_embeddings().weight.data
    table[: len(rows)] = reward.weight[rows]
    tokenizer = tiny.tokenizer(words, chat=reward.tokenizer.chat_template)
    return SequenceClassifierReward(model, tokenizer, **options)


@pytest.mark.parametrize("guidance", ["entrgi", "aps"])
@pytest.mark.parametrize("make", [tiny.bert_reward, tiny.qwen3_reward])
def test_a_reward_with_shuffled_ids_changes_nothing(make, guidance):
    """The same tokens, rewards and history, bit for bit."""
    plain = make()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5)).tolist()
    reward = renumbered(plain, [tiny.WORDS[i] for i in order], order)
    expected, got = (generate(PROMPTS, tiny.denoiser(), each, guidance=guidance, **RUN) for each in (plain, reward))
    unguided = generate(PROMPTS, tiny.denoiser(), plain, guidance="none", **RUN)
    assert not torch.equal(expected.sequences, unguided.sequences), "guidance decides nothing here"
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.rewards, expected.rewards)
    assert got.history.reward == expected.history.reward


@pytest.mark.parametrize("unmapped", ["unk", "zero"])
def test_words_that_the_reward_lacks_read_as_unknown(unmapped):
    """As if their rows of a reward with all words held the unknown token's, or zeros."""
    plain, absent = tiny.bert_reward(), list(range(40, 60))
    kept = [i for i in range(60) if i not in absent]
    reward = renumbered(plain, [tiny.WORDS[i] for i in kept], kept, unmapped=unmapped)
    whole = renumbered(plain, tiny.WORDS, list(range(60)), unmapped=unmapped)
    unknown = plain.weight[1] if unmapped == "unk" else torch.zeros_like(plain.weight[1])
    whole.model.get_input_embeddings().weight.data[absent] = unknown
    expected, got = (generate(PROMPTS, tiny.denoiser(), each, **RUN) for each in (whole, reward))
    assert torch.isin(got.sequences, torch.tensor(absent)).any()
    assert torch.equal(got.sequences, expected.sequences)
    if unmapped == "unk":  # a text's unknown words are the unknown token, whatever the relaxed ones read
        assert torch.equal(got.rewards, expected.rewards)


def test_nothing_shared_ends_a_generation_before_it_starts():
    reward = tiny.bert_reward(tok=tiny.tokenizer([*tiny.SPECIAL, *(f"x{i}" for i in range(50))]))
    with pytest.raises(ValueError, match=r"reward: no token of its tokenizer \(55 tokens such as 'x0'"):
        generate(PROMPTS, tiny.denoiser(), reward, callback_on_step_end=pytest.fail, **RUN)


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A denoiser, a reward that lacks half of its words, and one that shares none."""
    folder = tmp_path_factory.mktemp("vocabulary")
    denoiser = tiny.denoiser()
    wrappers = {
        "denoiser": denoiser,
        "reward": tiny.bert_reward(tok=tiny.tokenizer(tiny.WORDS[:25])),
        "stranger": tiny.bert_reward(tok=tiny.tokenizer([*tiny.SPECIAL, "x"])),
    }
    for name, wrapper in wrappers.items():
        wrapper.model.save_pretrained(folder / name)
        wrapper.tokenizer.save_pretrained(folder / name)
    return folder, denoiser


def run_command(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["vocabulary", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_command_reports_the_mass_of_a_sample(checkpoints):
    folder, denoiser = checkpoints
    pair = ("--model", folder / "denoiser", "--reward", folder / "reward")
    arguments = (*pair, "--prompt", "the movie", "--prompt", "w1", "-l", "3", "--top", "4")
    report = json.loads(run_command(*arguments, "--json").stdout)
    assert (report["tokens"], report["mapped"], report["share"], report["positions"]) == (60, 25, 25 / 60, 6)
    rows = []
    for text in ("the movie", "w1"):
        body = denoiser.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[2, *body, 4, 4, 4, 3]])
        rows.append(denoiser.model(input_ids=ids).logits[0, 1 + len(body) : -1].detach().softmax(-1))
    mean = torch.cat(rows).mean(dim=0)
    assert report["mass"] == pytest.approx(float(mean[:25].sum()), abs=1e-6)
    order = [i for i in mean.argsort(descending=True).tolist() if i >= 25][:4]
    assert [token["id"] for token in report["unmapped"]] == order
    assert [token["mass"] for token in report["unmapped"]] == pytest.approx(mean[order].tolist(), rel=1e-4)
    text = run_command(*arguments).stdout
    assert "25 of 60 have a counterpart (41.67%)" in text
    assert f"{report['mass']:.4%} (mean of 6 positions)" in text


def test_command_without_a_prompt():
    """The embedded pair, whose vocabularies are the same."""
    assert "8192 of 8192 have a counterpart (100.00%), the vocabularies are the same" in run_command().stdout


def test_command_refuses_what_cannot_be(checkpoints):
    folder, _ = checkpoints
    result = run_command("--model", folder / "denoiser", "--reward", folder / "stranger", code=2)
    assert result.output.splitlines()[-1].startswith("error: reward: no token of its tokenizer")
    assert "no folder" in run_command("--reward", folder / "nowhere", code=2).output
    assert "--max-new-tokens: expected an integer >= 1, got '0'" in run_command("-p", "good", "-l", "0", code=2).output
