"""The prompts named on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from entrgi.cli.options import Option

if TYPE_CHECKING:
    from entrgi.prompts import Prompt

EMBEDDED_PROMPT = "The movie was"
PANEL = "Prompts"

PROMPTS = (
    Option("prompt", list[str], "Text to continue, or to answer in a chat; repeat for several.", "-p", panel=PANEL),
    Option("prompts_file", Path, "Text file with one prompt a line.", panel=PANEL),
    Option("messages", Path, "JSON file with chat messages: one chat, or a list of chats.", panel=PANEL),
    Option("system", str, "System message before every prompt, which makes it a chat.", panel=PANEL),
)


def read_prompts(options: dict[str, object], is_embedded: bool) -> list[Prompt]:
    """All prompts, in the order of the options; the embedded pair has a default.

    Args:
        options: values of :data:`PROMPTS`' options, by name; others are passed over.
        is_embedded: whether the denoiser is the embedded pair's.

    Raises:
        ValueError: without any prompt, for files that cannot be read, and for a second system message.
    """
    result: list[Prompt] = list(options["prompt"] or [])
    file, messages = options["prompts_file"], options["messages"]
    if file is not None:
        result += [line for line in _read("--prompts-file", file).splitlines() if line.strip()]
    if messages is not None:
        result += read_chats(messages)
    if not result and file is None and messages is None and is_embedded:
        result = [EMBEDDED_PROMPT]
    if not result:
        raise ValueError("--prompt: expected at least one prompt")
    system = options["system"]
    return result if system is None else [with_system(prompt, system) for prompt in result]


def read_chats(file: Path) -> list[list[dict[str, str]]]:
    """The chats of a JSON file: ``[{"role": ..., "content": ...}, ...]``, or a list of such lists."""
    try:
        data = json.loads(_read("--messages", file))
    except json.JSONDecodeError as error:
        raise ValueError(f"--messages: {str(file)!r} is not JSON: {error}") from error
    chats = [data] if isinstance(data, list) and all(isinstance(item, dict) for item in data) else data
    if not isinstance(chats, list) or not chats or not all(_is_chat(chat) for chat in chats):
        raise ValueError(
            f"--messages: expected a list of messages with the texts 'role' and 'content', or a list of such lists, "
            f"in {str(file)!r}"
        )
    return chats


def with_system(prompt: Prompt, system: str) -> list[dict[str, str]]:
    """The prompt as a chat that begins with a system message. Raises ValueError where it has one."""
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if chat[0]["role"] == "system":
        raise ValueError(f"--system: a chat of --messages has a system message already: {chat[0]['content']!r:.80}")
    return [{"role": "system", "content": system}, *chat]


def _is_chat(chat: object) -> bool:
    def is_message(item: object) -> bool:
        return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))

    return isinstance(chat, list) and len(chat) > 0 and all(is_message(item) for item in chat)


def _read(option: str, file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{option}: no file {str(file)!r}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {str(file)!r} cannot be read as text: {error}") from error
