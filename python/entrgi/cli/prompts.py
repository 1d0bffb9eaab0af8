"""The prompts named on a command line."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi.cli.options import Option
from entrgi.messages import as_messages, as_prompt

if TYPE_CHECKING:
    from entrgi.messages import Message, Prompt

EMBEDDED_PROMPT = "The movie was"
PANEL = "Prompts"
STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHATS = "a list of messages with 'role' and 'content', or a list of such lists"

PROMPTS = (
    Option("prompt", list[str], "Text to continue, or to answer in a chat; repeat for several.", "-p", panel=PANEL),
    Option(
        "prompts_file",
        Path,
        "One prompt a line; .jsonl: a text, a chat, or an object with 'prompt' or 'messages'; - is standard input.",
        panel=PANEL,
    ),
    Option(
        "messages",
        Path,
        "Chat messages as JSON: one chat, a list of chats, or a chat a line; - is standard input.",
        panel=PANEL,
    ),
    Option("system", str, "System message before every prompt, which makes it a chat.", panel=PANEL),
)


def read_prompts(options: dict[str, Any], is_embedded: bool) -> list[Prompt]:
    """All prompts, in the order of the options; the embedded pair has a default, and reads chats as plain text.

    Args:
        options: values of :data:`PROMPTS`' options, by name; others are passed over.
        is_embedded: whether the denoiser is the embedded pair's.

    Raises:
        ValueError: without any prompt, for files that cannot be read, and for a second system message.
    """
    result: list[Prompt] = list(options["prompt"] or [])
    file, messages = options["prompts_file"], options["messages"]
    if file is not None and messages is not None and str(file) == str(messages) == STDIN:
        raise ValueError("--messages: standard input is read by --prompts-file already, expected a file")
    if file is not None:
        result += read_lines(file)
    if messages is not None:
        result += read_chats(messages)
    if not result and file is None and messages is None and is_embedded:
        result = [EMBEDDED_PROMPT]
    if not result:
        raise ValueError("--prompt: expected at least one prompt")
    system = options["system"]
    if system is not None:
        result = [with_system(prompt, system) for prompt in result]
    return [as_text(prompt) for prompt in result] if is_embedded else result


def read_lines(file: Path) -> list[Prompt]:
    """The prompts of a file, a line each; empty lines are passed over."""
    option, text = "--prompts-file", _read("--prompts-file", file)
    # Not splitlines: a prompt may hold characters that it takes for line ends.
    lines = [(i, line) for i, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if file.suffix.lower() not in JSON_LINES:
        return [line for _, line in lines]
    result = []
    for number, line in lines:
        place = f"{str(file)!r}, line {number}"
        prompt = parse_json(option, place, line)
        if isinstance(prompt, dict):
            for key in ("tools", "system", "documents"):
                if prompt.get(key):
                    raise ValueError(f"{option}: {place}: {key!r} is not read, expected 'prompt' or 'messages' alone")
            prompt = next((prompt[key] for key in ("prompt", "messages") if key in prompt), None)
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"{option}: {place}: expected a text, a list of messages, or an object with either as 'prompt' or "
                f"'messages', got {line!r:.80}"
            )
        result.append(as_prompt(prompt, f"{option}: {place}"))
    return result


def read_chats(file: Path) -> list[Prompt]:
    """The chats of a JSON file: ``[{"role": ..., "content": ...}, ...]``, a list of such lists, or such a list a line.

    An object with the list as ``messages`` stands for it.
    """
    option, text = "--messages", _read("--messages", file)
    lines = [line for line in text.split("\n") if line.strip()]
    if file.suffix.lower() in JSON_LINES or (len(lines) > 1 and _is_json(lines[0])):
        data: object = [parse_json(option, f"{str(file)!r}, line {i}", line) for i, line in enumerate(lines, 1)]
    else:
        data = parse_json(option, repr(str(file)), text)
    if isinstance(data, dict) and "messages" in data:
        data = [data]
    if isinstance(data, list):
        data = [item["messages"] if isinstance(item, dict) and "messages" in item else item for item in data]
    chats = [data] if isinstance(data, list) and all(isinstance(item, dict) for item in data) else data
    if not isinstance(chats, list) or not chats or not all(isinstance(chat, list) and chat for chat in chats):
        raise ValueError(f"{option}: expected {CHATS}, in {str(file)!r}")
    return [as_prompt(chat, f"{option}: {str(file)!r}, chat {i}") for i, chat in enumerate(chats)]


def with_system(prompt: Prompt, system: str) -> list[Message]:
    """The prompt as a chat that begins with a system message. Raises ValueError where it has one."""
    chat = as_messages(prompt)
    if chat[0]["role"] == "system":
        raise ValueError(f"--system: a chat of --messages has a system message already: {chat[0]['content']!r:.80}")
    return [{"role": "system", "content": system}, *chat]


def as_text(prompt: Prompt) -> str:
    """A chat as the embedded pair reads it, which knows no turns: what was said, to be continued."""
    return prompt if isinstance(prompt, str) else " ".join(message["content"] or "" for message in prompt)


def parse_json(option: str, place: str, text: str, expected: str = CHATS) -> object:
    """What ``text``, found at ``place``, says. Raises ValueError where it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{option}: {place} is JSON nested too deep, expected {expected}") from error
    except ValueError as error:  # an integer of thousands of digits is no JSONDecodeError
        raise ValueError(f"{option}: {place} is not JSON: {error}") from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read(option: str, file: Path) -> str:
    """The text of a file, a pipe or standard input: UTF-8, unless a mark of byte order says otherwise."""
    if "\0" in str(file):
        raise ValueError(f"{option}: expected a file's name without NUL, got {str(file)!r:.80}")
    try:
        if str(file) == STDIN:
            if sys.stdin is None:
                raise ValueError(f"{option}: standard input is closed, expected a file")
            data = sys.stdin.buffer.read()
        elif not file.exists():
            raise ValueError(f"{option}: no file {str(file)!r}")
        elif file.is_dir():
            raise ValueError(f"{option}: {str(file)!r} is a folder, expected a file")
        else:
            data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{option}: {str(file)!r:.300} cannot be read: {error.strerror or error}") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {str(file)!r} cannot be read as text: {error}") from error
