"""Prompts, plain or chat, as token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast
from uuid import uuid4

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from entrgi.messages import ASSISTANT, Message, Prompt, as_messages, as_prompt, begun_turn
from entrgi.tokenizing import named_id, plain_ids, spelled_ids

__all__ = ["Completion", "Encoded", "Message", "Prompt", "encode_prompt", "first_not_none", "plain_ids", "render_chat"]

Options = Mapping[str, Any]
# Where a message may say something, beside its calls of tools.
_SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
# What ``apply_chat_template`` takes besides, and what is settled here.
_SETTLED = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation")
_SETTLED += ("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs")


@dataclass(frozen=True)
class Encoded:
    """One prompt as the denoiser reads it: ``prefix + body + [response] + suffix``, lists of ids.

    Attributes:
        prefix: special tokens before the text, such as [CLS].
        body: the prompt's own tokens (a rendered chat template, or plain text).
        suffix: special tokens after the response, such as [SEP].
        is_text: the body is plain text that the response continues, not a rendered chat.
        begun: of a rendered chat, what the assistant has said already and the response continues.
    """

    prefix: list[int]
    body: list[int]
    suffix: list[int]
    is_text: bool
    begun: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """A finished text, to be scored.

    Attributes:
        prompt: text or messages, as the user gave it.
        text: the response with what it continues, decoded as one: the prompt of plain text, or the turn that the
            prompt's last message has begun; the response alone where it answers a chat.
        response: the decoded response alone.
    """

    prompt: Prompt
    text: str
    response: str

    @property
    def turn(self) -> str:
        """The assistant's whole turn in a chat."""
        return self.response if begun_turn(self.prompt) is None else self.text


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool | None = None, options: Options | None = None
) -> Encoded:
    """Token ids of a prompt: its chat template rendered, or plain text between [CLS] and [SEP].

    Args:
        prompt: text, or chat messages (dicts with ``role`` and ``content``); where the last one is the assistant's,
            the response continues it.
        chat: force or forbid the chat template; None: where the tokenizer has one.
        options: of the template, see :func:`check_template_options`.

    Raises:
        ValueError: for a prompt that is neither, messages without a template to render them, or a template that
            leaves one of them out.
    """
    prompt, options = as_prompt(prompt), options or {}
    has_template = tokenizer.chat_template is not None or options.get("chat_template") is not None
    if has_template if chat is None else chat:
        if not has_template:
            raise ValueError("chat=True: the tokenizer has no chat template")
        check_all_shown(tokenizer, prompt, options)
        begun = plain_ids(tokenizer, begun_turn(prompt) or "")
        return Encoded([], plain_ids(tokenizer, render_chat(tokenizer, prompt, options=options)), [], False, begun)
    if not isinstance(prompt, str):
        raise ValueError("prompts: got chat messages, expected text: the denoiser's tokenizer has no chat template")
    start = first_not_none(named_id(tokenizer, "cls"), named_id(tokenizer, "bos"))
    end = named_id(tokenizer, "sep") if named_id(tokenizer, "cls") is not None else None
    as_list = [[] if token is None else [token] for token in (start, end)]
    return Encoded(as_list[0], plain_ids(tokenizer, prompt), as_list[1], is_text=True)


def with_spelled_masks(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> Encoded:
    """``encoded`` with the mask tokens of its body, which merely speaks of them, spelled as other text is.

    Itself where there are none, or where the tokenizer has no other ids for them.
    """
    spelled = spelled_ids(tokenizer, mask_token_id) if mask_token_id in encoded.body else None
    if spelled is None:
        return encoded
    body, begun = (
        [each for token_id in ids for each in (spelled if token_id == mask_token_id else [token_id])]
        for ids in (encoded.body, encoded.begun)
    )
    return replace(encoded, body=body, begun=begun)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, turn: str | None = None, options: Options | None = None
) -> str:
    """The prompt through the chat template, open for the assistant to answer or to go on, or with its turn closed.

    Args:
        prompt: as :func:`entrgi.messages.as_prompt` gives it.
        turn: the assistant's whole turn, in place of the one that the prompt's last message may have begun.

    Raises:
        ValueError: for a prompt that the template refuses, or whose begun turn it does not show.
    """
    messages, begun = as_messages(prompt), begun_turn(prompt)
    if turn is None and begun is None:
        return _render(tokenizer, prompt, messages, True, options)
    earlier = messages if begun is None else messages[:-1]
    last = {"role": ASSISTANT} if begun is None else messages[-1]
    if turn is not None:
        return _render(tokenizer, prompt, [*earlier, {**last, "content": turn}], False, options)
    return split_chat(tokenizer, prompt, options)[0]


def split_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    options: Options | None = None,
    label: str = "denoiser: its chat template",
    turn: str | None = None,
) -> tuple[str, str]:
    """What the chat template puts before an answer (a begun turn included) and behind it.

    Args:
        prompt: as :func:`entrgi.messages.as_prompt` gives it.
        label: what an error calls the template.
        turn: what the assistant has said, in place of the turn that the prompt has begun.

    Raises:
        ValueError: as :func:`render_chat`, and for a template that does not show the assistant's turn exactly once.
    """
    # The place is found by a marker that no prompt can hold, not by a fixed placeholder.
    marker = uuid4().hex
    begun = begun_turn(prompt) if turn is None else turn
    head, found, tail = render_chat(tokenizer, prompt, (begun or "") + marker, options).rpartition(marker)
    if not found or marker in head:
        raise ValueError(f"{label} does not show the assistant's turn exactly once")
    if begun and turn is None and not head.endswith(begun):
        raise ValueError(f"{label} changes the turn that the last message has begun, expected {begun!r:.60} as it is")
    return head, tail


def check_all_shown(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    options: Options | None = None,
    turn: str | None = None,
) -> None:
    """Raise ValueError where the chat template leaves out what a message says, which would be lost unseen.

    What it leaves out of a message whose tool calls it shows is its own affair: many leave out the text beside them.

    Args:
        turn: the assistant's whole turn, where the template is to close it; None: as the denoiser reads the prompt.
    """
    messages, begun = as_messages(prompt), begun_turn(prompt)
    if begun is not None and messages[-1].get("tool_calls"):
        place = f"message {len(messages) - 1}"
        raise ValueError(f"prompts: {place} has tool calls, expected text alone in a turn that is to be continued")
    marks = [{name: uuid4().hex for name in _SPOKEN if message.get(name)} for message in messages]
    if begun is not None and turn is not None:
        marks[-1] = {}  # the turn stands in its place
    marked = [{**message, **own} for message, own in zip(messages, marks, strict=True)]
    try:  # a template may change the case of what it shows
        shown = render_chat(tokenizer, marked, (begun or "") + turn if turn is not None else None, options).lower()
    except ValueError:  # it reads what the contents say, and the real ones are rendered next
        return
    for i, (message, own) in enumerate(zip(messages, marks, strict=True)):
        lost = _left_out(message, own, shown)
        if lost:
            role = f"{message['role']!r:.40}"
            raise ValueError(f"prompts: message {i} has the role {role}: the chat template leaves out {lost}")


def check_template_options(
    label: str, tokenizer: PreTrainedTokenizerBase, options: Options | None
) -> dict[str, Any] | None:
    """Arguments of a chat template, checked: those of ``apply_chat_template`` and names that the template reads.

    ``chat_template`` is the name of one of several, or a template itself; ``enable_thinking``, ``date_string`` and
    the like are the template's own.

    Args:
        label: the beginning of an error.

    Raises:
        ValueError: for a name that the template does not read, or that is settled here; for the name of a template
            that is not there.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{label}: chat_template_kwargs is {options!r:.80}, expected a dict by name")
    for name in options:
        if name in _SETTLED:
            raise ValueError(f"{label}: chat_template_kwargs has {name!r}, which is not the caller's to choose")
    given = options.get("chat_template")
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {"default": own}
    if given is not None and (not isinstance(given, str) or (given not in named and "{" not in given)):
        raise ValueError(
            f"{label}: chat_template is {given!r:.60}, expected a template or the name of one: "
            f"{', '.join(named) or 'the tokenizer has none'}"
        )
    chosen = given or ("tool_use" if options.get("tools") and "tool_use" in named else "default")
    template = named.get(chosen, given) or ""
    for name in options:
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"{label}: chat_template_kwargs has {name!r}, which the chat template does not read")
    options = dict(options)
    if isinstance(own, str) and given == "default":
        del options["chat_template"]
    return options


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: list[Message],
    opens: bool,
    options: Options | None,
) -> str:
    """``messages``, made of ``prompt``, through the chat template, with the beginning of an answer if it ``opens``."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **(options or {}))
        return cast(str, text)  # not ids
    except TemplateError as error:
        raise ValueError(f"prompts: the chat template refuses {prompt!r:.80}: {error}") from error
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"prompts: the chat template cannot render {prompt!r:.80}: {error}") from error


def _left_out(message: Message, marks: Mapping[str, str], shown: str) -> str:
    """What ``shown`` lacks of a message, whose texts have ``marks`` in their place; nothing where it has all."""
    calls = [*(message.get("tool_calls") or ()), message.get("function_call")]
    names = [name for name in map(_function_name, calls) if name]
    for name in names:
        if name.lower() not in shown:
            return f"its tool call {name!r}"
    said = [marks["content"]] if "content" in marks else list(marks.values())
    return "it" if said and not names and not any(mark in shown for mark in said) else ""


def _function_name(call: object) -> str:
    function = call.get("function", call) if isinstance(call, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def first_not_none(*ids: int | None) -> int | None:
    """The first of ``ids`` that is not None (0 is an id), or None."""
    return next((token_id for token_id in ids if token_id is not None), None)
