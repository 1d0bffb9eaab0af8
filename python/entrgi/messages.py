"""Prompts as people write them, in one form: text, or chat messages whose contents are texts."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]

ASSISTANT = "assistant"
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def as_prompt(value: Any, label: str = "prompts") -> Prompt:
    """``value`` as text or as messages with texts for contents.

    The parts of a content (``[{"type": "text", "text": ...}]``) are joined; where the message has something else to
    say (``tool_calls``), its content may be None or missing. What else a message holds is left to the chat template.

    Args:
        label: the beginning of an error.

    Raises:
        ValueError: for anything else: no messages, no role, contents that are no text, halves of a surrogate pair.
    """
    if isinstance(value, str):
        return check_text(value, label)
    is_chat = isinstance(value, list | tuple) and len(value) > 0
    if not is_chat or not all(isinstance(m, dict) and "role" in m and _says_something(m) for m in value):
        raise ValueError(f"{label}: expected text or messages with 'role' and 'content', got {value!r:.80}")
    return [_plain(message, f"{label}: message {i}") for i, message in enumerate(value)]


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt; a text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def begun_turn(prompt: Prompt) -> str | None:
    """What the assistant has said already, to be continued; None where its turn is yet to come."""
    if isinstance(prompt, str) or prompt[-1]["role"] != ASSISTANT:
        return None
    return prompt[-1].get("content") or ""


def check_text(text: str, label: str) -> str:
    """``text``; ValueError where it holds half a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label}: character {error.start} of {text!r:.60} is {text[error.start]!r}, half of a surrogate pair, "
            "expected text that UTF-8 can write"
        ) from None
    return text


def _plain(message: Message, label: str) -> Message:
    role = message["role"]
    if not isinstance(role, str):
        raise ValueError(f"{label} has the role {role!r:.60}, expected text such as 'user'")
    return {**message, "content": _content(message, f"{label} (role {role!r:.40})")}


def _says_something(message: Message) -> bool:
    return "content" in message or _says_more(message)


def _says_more(message: Message) -> bool:
    return any(message.get(name) for name in _BESIDE_CONTENT)


def _content(message: Message, label: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return check_text(content, label)
    if content is None:
        if _says_more(message):
            return None  # a template may ask whether it is
        raise ValueError(f"{label} has the content None, expected text")
    if not isinstance(content, list | tuple):
        raise ValueError(f"{label} has the content {content!r:.60}, expected text or a list of text parts")
    return "".join(_part(part, label) for part in content)


def _part(part: object, label: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else part
    if not isinstance(text, str):
        raise ValueError(f"{label} has the part {part!r:.60}, expected {{'type': 'text', 'text': ...}}")
    return check_text(text, label)
