"""Prompts that are more than a text, or less: parts, missing contents, tools, begun turns, surrogates, mask tokens."""

import json

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from typer.testing import CliRunner

import entrgi
from entrgi import cli, generate
from entrgi.messages import as_prompt, begun_turn
from entrgi.prompts import Completion, check_all_shown, encode_prompt, render_chat
from support import official_layouts as official
from support import tiny
from support import tokenizer_kinds as kinds

CHAT = official.CHATML
TOOL_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {"max_new_tokens": 4, "steps": 4, "seed": 0, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    fields = {**official.DREAM, "max_position_embeddings": 200}
    return official.write_checkpoint(tmp_path_factory.mktemp("dream"), fields, official.dream_weights(fields))


@pytest.fixture(scope="module")
def denoiser(dream):
    return entrgi.load_denoiser(dream)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def byte_level(chat, **roles):
    tok = kinds.byte_level([*official.PIECES, *official.SPECIAL, "<user>", "<assistant>", "</>"], **roles)
    tok.add_special_tokens({"additional_special_tokens": official.SPECIAL})
    tok.chat_template = chat
    return tok


# ------------------------------------------------------------------------------------------------------- contents

SAME = [
    ([{"type": "text", "text": "the movie"}], "the movie"),
    ([{"type": "text", "text": "the "}, {"type": "text", "text": "movie"}], "the movie"),
    (["the ", "movie"], "the movie"),
    ([{"text": "the movie"}], "the movie"),
    ([{"type": "input_text", "text": "the"}, " movie"], "the movie"),
    ([{"type": "text", "text": ""}], ""),
    ([], ""),
    (({"type": "text", "text": "the"},), "the"),
]


@pytest.mark.parametrize(("content", "text"), SAME, ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_parts_are_one_text(denoiser, content, text, place):
    chat, plain = [user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]
    chat[place]["content"], plain[place]["content"] = content, text
    assert denoiser.encode(chat) == denoiser.encode(plain)
    assert generate(chat, denoiser, None, guidance="none", **SIZES).texts == (
        generate(plain, denoiser, None, guidance="none", **SIZES).texts
    )


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([user(None)], r"prompts: message 0 \(role 'user'\) has the content None, expected text"),
        ([user("a"), assistant(None)], r"message 1 \(role 'assistant'\) has the content None"),
        ([user("a"), {"role": "tool", "content": None}], r"message 1 \(role 'tool'\) has the content None"),
        ([user([{"type": "image", "url": "x"}])], r"message 0 .* has the part \{'type': 'image'"),
        ([user([{"type": "text", "text": None}])], "has the part .* expected"),
        ([user([3])], "has the part 3"),
        ([user(3)], "has the content 3, expected text or a list of text parts"),
        ([user({"text": "a"})], "has the content {'text': 'a'}"),
        ([{"role": None, "content": "a"}], "has the role None, expected text such as 'user'"),
        ([{"role": "user"}], "expected text or messages with 'role' and 'content'"),
        ([], "expected text or messages"),
    ],
    ids=str,
)
def test_contents_that_are_none(denoiser, chat, message):
    with pytest.raises(ValueError, match=message):
        denoiser.encode(chat)


SURROGATES = ["the \ud83d movie", "\udc80", "a" * 100 + "\ud800"]


@pytest.mark.parametrize("text", SURROGATES, ids=ascii)
def test_half_a_surrogate_pair(denoiser, text):
    """In a text, a content, a part, an answer to score, and a tokenizer's own text."""
    place = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    reward = tiny.bert_reward()
    for prompt in (text, [user(text)], [user([{"type": "text", "text": text}])]):
        with pytest.raises(ValueError, match=rf"prompts.*: character {place} of .* half of a surrogate pair"):
            generate(prompt, denoiser, None, guidance="none", **SIZES)
    for completion in (Completion("the", text, text), Completion("the", "the", text)):
        if completion.text == text:
            with pytest.raises(ValueError, match="half of a surrogate pair"):
                reward.score([completion])
    assert render_chat(denoiser.tokenizer, "the \U0001f600") == "<|im_start|>user\nthe \U0001f600<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )


# ------------------------------------------------------------------------------- messages that a template leaves out


def test_nothing_is_lost_unseen():
    only_users = byte_level(
        "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [user("a"), {"role": "tool", "content": "b"}, user("c")]
    with pytest.raises(ValueError, match="message 1 has the role 'tool': the chat template leaves out it"):
        encode_prompt(only_users, chat)
    encode_prompt(only_users, [user("a"), user("c")])
    with pytest.raises(ValueError, match="message 0 has the role 'system'"):
        encode_prompt(only_users, [{"role": "system", "content": "s"}, user("c")])

    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    chat = [user("a"), assistant(None, tool_calls=calls), {"role": "tool", "content": "rain"}]
    with_tools = byte_level(TOOL_CHAT)
    shown = render_chat(with_tools, chat)
    assert shown == "<user>a</><assistant>[weather]</><tool>rain</><assistant>"
    check_all_shown(with_tools, chat)
    with pytest.raises(ValueError, match=r"message 1 .* leaves out its tool call 'weather'"):
        check_all_shown(byte_level(CHAT), chat)


CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
TOOL = {"role": "tool", "content": "rain"}


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        # As DeepSeek: calls are shown where there is no content.
        (
            "{% for m in messages %}{% if not m.content %}[{{ m.tool_calls[0].function.name }}]"
            "{% else %}<{{ m.role }}>{{ m.content }}</>{% endif %}{% endfor %}",
            [user("a"), assistant(None, tool_calls=CALLS), TOOL],
        ),
        (TOOL_CHAT, [user("a"), {"role": "assistant", "tool_calls": CALLS}, TOOL]),
        (TOOL_CHAT, [user("a"), assistant("", tool_calls=CALLS), TOOL]),
        # As Llama 3.1 and Mistral: the text beside a call is left out.
        (
            "{% for m in messages %}{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]"
            "{% else %}<{{ m.role }}>{{ m.content }}</>{% endif %}{% endfor %}",
            [user("a"), assistant("let me see", tool_calls=CALLS), TOOL],
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.thinking or '' }}{{ m.content or '' }}</>{% endfor %}",
            [user("a"), {"role": "assistant", "thinking": "hm"}, user("b")],
        ),
    ],
)
def test_calls_of_tools(template, chat):
    opened = template + "{% if add_generation_prompt %}<assistant>{% endif %}"
    encode_prompt(byte_level(opened), chat)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([user("a"), assistant(None, function_call={"name": "weather"}), user("b")], "its tool call 'weather'"),
        ([user("a"), assistant(None, reasoning_content="hm"), user("b")], "message 1 .* leaves out it"),
        ([user("a"), assistant("let me see", tool_calls=CALLS)], "message 1 has tool calls, expected text alone"),
    ],
)
def test_what_a_template_does_not_know(chat, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(byte_level(CHAT), chat)


def test_a_template_that_changes_a_begun_turn():
    """As DeepSeek: what stands before </think> is cut out of the assistant's turns."""
    cut = CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")
    with pytest.raises(ValueError, match="changes the turn that the last message has begun"):
        encode_prompt(byte_level(cut), [user("a"), assistant("<think>x</think> yo")])


def test_what_a_reward_reads_is_what_is_looked_at():
    """As Mistral: the system message is shown where the user has the last word, which a reward never sees."""
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{% if loop.last and messages[0].role == "
        "'system' %}{{ messages[0].content }}{% endif %}{{ m.content }}</>{% endif %}{% endfor %}"
    )
    once = template.replace("loop.last", "loop.last and m.role == 'user'")
    chat = [{"role": "system", "content": "s"}, user("a")]
    check_all_shown(byte_level(once), chat)
    with pytest.raises(ValueError, match="message 0 has the role 'system': the chat template leaves out it"):
        check_all_shown(byte_level(once), chat, turn="...")
    reward = entrgi.SequenceClassifierReward(tiny.qwen3_classifier(), tiny.tokenizer(chat=once))
    with pytest.raises(ValueError, match="message 0"):
        reward.reader.format.frame(chat, [])


def test_a_template_may_change_what_it_shows():
    """Reasoning that is cut out of earlier turns (Qwen3), and contents that are trimmed, are no loss."""
    template = (
        "{% for m in messages %}<user>{{ m.content.split('</think>')[-1] | trim | upper }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [user(" a "), assistant("<think>x</think> b"), user("c")]
    check_all_shown(byte_level(template), chat)
    template = "{% if messages[0].content != 'a' %}{{ raise_exception('first say a') }}{% endif %}" + CHAT
    check_all_shown(byte_level(template), [user("a")])  # what the marker cannot pass is not judged
    with pytest.raises(ValueError, match="first say a"):
        encode_prompt(byte_level(template), [user("b")])


# ------------------------------------------------------------------------------------------- a turn that has begun


@pytest.mark.parametrize("begun", ["the movie", "the movi", "", " the", "the\n"])
def test_a_begun_turn_is_continued(denoiser, begun):
    chat = [user("a"), assistant(begun)]
    encoded = denoiser.encode(chat)
    assert denoiser.tokenizer.decode(encoded.body) == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{begun}"
    assert denoiser.tokenizer.decode(encoded.begun) == begun
    output = generate(chat, denoiser, None, guidance="none", **SIZES)
    assert output.texts[0] == [begun + response for response in output.responses[0]]
    assert begun_turn(as_prompt(chat)) == begun
    assert begun_turn(as_prompt([user("a")])) is None


def test_a_begun_turn_is_read_as_one(denoiser):
    """Guidance and the final score see the assistant's turn whole: as if it had all been written."""
    reward = entrgi.SequenceClassifierReward(tiny.qwen3_classifier(), tiny.tokenizer(chat=tiny.CHAT))
    chat = [user("w1"), assistant("the movie")]
    completion = Completion(chat, "the movie was good", "was good")
    whole = Completion([user("w1")], "the movie was good", "the movie was good")
    assert reward.reader.format.whole(completion) == reward.reader.format.whole(whole)
    torch.testing.assert_close(reward.score([completion]), reward.score([whole]), rtol=0, atol=0)
    before, after = reward.reader.format.frame(chat, [])
    ids = tiny.tokenizer().convert_tokens_to_ids
    assert before == [ids(word) for word in ["user", ":", "w1", "[SEP]", "assistant", ":", "the", "movie"]]
    assert after == [ids("[SEP]")]
    assert reward.reader.format.split(completion) == (before, [ids("was"), ids("good")])
    # A token that straddles the two counts to the response.
    merging = entrgi.rewards.text.TextFormat("it", denoiser.tokenizer, True)
    chat = [user("a"), assistant("t")]
    left, right = merging.split(Completion(chat, "the", "he"))
    assert denoiser.tokenizer.decode(left).endswith("assistant\n")
    assert denoiser.tokenizer.decode(right) == "the"


def test_parts_are_scored_as_text():
    """In a completion as in a prompt, and in the turn that it continues."""
    reward = entrgi.SequenceClassifierReward(tiny.qwen3_classifier(), tiny.tokenizer(chat=tiny.CHAT))
    for end in ([], ["w2 "]):
        plain = [user("w1"), *map(assistant, end)]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
        scores = [reward.score([Completion(chat, "".join([*end, "w3"]), "w3")]) for chat in (plain, parts)]
        assert torch.equal(*scores)


def test_a_finished_turn_may_be_changed_by_the_template():
    """Only what is to be continued must be shown as it is."""
    trims = tiny.CHAT.replace("m['content']", "m['content'] | trim")
    words = entrgi.rewards.text.TextFormat("it", tiny.tokenizer(chat=trims), True)
    before, response = words.split(Completion([user("w1"), assistant("")], " the movie", " the movie"))
    assert tiny.tokenizer().decode([*before, *response]) == "user : w1 [SEP] assistant : the movie"


def test_a_turn_that_the_template_does_not_show():
    hidden = byte_level("<user>{{ messages[0].content }}</><assistant>")
    with pytest.raises(ValueError, match="does not show the assistant's turn exactly once"):
        encode_prompt(hidden, [user("a"), assistant("b")])


# ----------------------------------------------------------------------------------- prompts that speak of the mask


MASKS = {
    "byte_level": lambda: byte_level(CHAT, mask="<|mask|>", eos="<|endoftext|>"),
    "word_piece": lambda: kinds.word_piece(["[", "MASK", "]", "[MASK]", "[UNK]", "the"], mask="[MASK]", eos="[UNK]"),
    "demo": entrgi.demo.load_tokenizer,
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_token_that_is_meant_as_text(kind):
    tok = MASKS[kind]()
    text = f"the {tok.mask_token} the"
    denoiser = entrgi.CallableDenoiser(
        lambda ids, _mask: torch.randn(*ids.shape, len(tok), generator=torch.Generator().manual_seed(0)),
        tok,
        len(tok),
        chat=False,
    )
    options = {"guidance": "none", **SIZES}
    with pytest.raises(ValueError, match="pass infill=True to have it filled, or infill=False"):
        generate(text, denoiser, None, **options)
    output = generate(text, denoiser, None, infill=False, **options)
    start = output.windows[0][0]
    before = output.sequences[0, 0, :start].tolist()
    assert tok.mask_token_id not in before
    assert tok.decode(before).replace(" ", "").endswith(text.replace(" ", ""))
    filled = generate(text, denoiser, None, infill=True, **options)
    assert filled.windows[0][0] < start


def test_a_chat_may_speak_of_the_mask(denoiser):
    chat = [user("what does <|mask|> mean?")]
    output = generate(chat, denoiser, None, guidance="none", **SIZES)
    row = output.sequences[0, 0].tolist()
    assert official.MASK not in row
    assert denoiser.tokenizer.decode(row).startswith("<|im_start|>user\nwhat does <|mask|> mean?<|im_end|>")


def test_a_mask_token_without_another_spelling():
    """Whole words: "[MASK]" is the mask or unknown."""
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    with pytest.raises(ValueError, match="the tokenizer can write it in no other way"):
        generate("the [MASK]", denoiser, reward, infill=False, **SIZES)


# --------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_that_truncates_and_pads():
    """Its own settings neither cut a prompt nor are changed by one."""
    tok = tiny.tokenizer()
    expected = encode_prompt(tiny.tokenizer(), "the movie was good")
    tok(["the movie was good"] * 2, truncation=True, max_length=3, padding="max_length")
    before = tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding
    assert None not in before
    assert encode_prompt(tok, "the movie was good") == expected
    reward = entrgi.SequenceClassifierReward(tiny.qwen3_classifier(), tok)
    assert reward.reader.format.frame("the movie", [5, 6]) == ([5, 6] if tok.cls_token_id is None else [2, 5, 6], [3])
    assert (tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding) == before


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_parts_of_a_tokenizer_that_are_replaced(part):
    tok = kinds.trained_byte_level(["the movie was good"] * 5, 300)
    encode_prompt(tok, "THE MOVIE")
    new = {"normalizer": normalizers.Lowercase(), "pre_tokenizer": pre_tokenizers.Whitespace()}[part]
    setattr(tok.backend_tokenizer, part, new)
    assert encode_prompt(tok, "THE MOVIE").body == tok("THE MOVIE", add_special_tokens=False)["input_ids"]


def test_tokens_added_later_are_known():
    tok = tiny.tokenizer()
    assert encode_prompt(tok, "<new> the").body[0] == tok.unk_token_id
    tok.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert encode_prompt(tok, "<new> the").body[0] == tok.convert_tokens_to_ids("<new>") != tok.unk_token_id


# ------------------------------------------------------------------------------------------------- command line


def test_the_command_line_reads_them_alike(dream, denoiser, tmp_path):
    chats = [
        [user([{"type": "text", "text": "the "}, {"type": "text", "text": "movie"}])],
        [user("a"), assistant("the movie")],
        [user("what is <|mask|>?")],
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    expected = generate(chats, denoiser, None, guidance="none", **SIZES).responses
    for option, file in (("--messages", "chats.json"), ("--prompts-file", "lines.jsonl")):
        arguments = ["sample", "--model", str(dream), "--reward", "none", "--guidance", "none", "--seed", "0"]
        arguments += ["-k", "2", "-l", "4", "-t", "4", option, str(tmp_path / file), "--json", str(tmp_path / "out")]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        made = json.loads((tmp_path / "out").read_text())["runs"]["none"]["results"]
        assert [each["responses"] for each in made] == expected
        (tmp_path / "out").unlink()
    (tmp_path / "chats.json").write_text(json.dumps([[user(None)]]))
    result = CliRunner().invoke(cli.app, ["sample", "--messages", str(tmp_path / "chats.json")])
    assert result.exit_code == 2
    assert "has the content None, expected text" in " ".join(result.output.split())
