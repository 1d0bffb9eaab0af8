"""Prompts, plain or chat, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Encoded:
    """One prompt as the denoiser reads it: ``prefix + body + [response] + suffix``, lists of ids.

    Attributes:
        prefix: special tokens before the text, such as [CLS].
        body: the prompt's own tokens (a rendered chat template, or plain text).
        suffix: special tokens after the response, such as [SEP].
        is_text: the body is plain text that the response continues, not a rendered chat.
    """

    prefix: list[int]
    body: list[int]
    suffix: list[int]
    is_text: bool


@dataclass(frozen=True)
class Completion:
    """A finished text, to be scored.

    Attributes:
        prompt: text or messages, as the user gave it.
        text: prompt and response decoded as one plain text; the response alone where the denoiser rendered a chat.
        response: the decoded response alone.
    """

    prompt: Prompt
    text: str
    response: str


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool | None = None) -> Encoded:
    """Token ids of a prompt: its chat template rendered, or plain text between [CLS] and [SEP].

    Args:
        prompt: text, or chat messages (dicts with ``role`` and ``content``).
        chat: force or forbid the chat template; None: where the tokenizer has one.

    Raises:
        ValueError: for a prompt that is neither, or messages without a template to render them.
    """
    check_prompt(prompt)
    use_template = tokenizer.chat_template is not None if chat is None else chat
    if use_template:
        if tokenizer.chat_template is None:
            raise ValueError("chat=True: the tokenizer has no chat template")
        return Encoded([], plain_ids(tokenizer, render_chat(tokenizer, prompt)), [], is_text=False)
    if not isinstance(prompt, str):
        raise ValueError("prompts: got chat messages, expected text: the denoiser's tokenizer has no chat template")
    start = first_id(tokenizer.cls_token_id, tokenizer.bos_token_id)
    end = tokenizer.sep_token_id if tokenizer.cls_token_id is not None else None
    as_list = [[] if token is None else [token] for token in (start, end)]
    return Encoded(as_list[0], plain_ids(tokenizer, prompt), as_list[1], is_text=True)


def render_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str | None = None) -> str:
    """The prompt through the chat template: open for an answer, or followed by it as the assistant's turn.

    Raises:
        ValueError: for a prompt that is neither text nor messages, or that the template refuses.
    """
    check_prompt(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    except TemplateError as error:
        raise ValueError(f"prompts: the chat template refuses {prompt!r:.80}: {error}") from error


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` without added special tokens; special tokens spelled out in it are recognised."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_prompt(prompt: object) -> None:
    """Raise ValueError unless ``prompt`` is text or a non-empty list of chat messages."""
    if isinstance(prompt, str):
        return
    is_list = isinstance(prompt, list) and len(prompt) > 0
    if not is_list or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise ValueError(f"prompts: expected text or messages with 'role' and 'content', got {prompt!r:.80}")


def first_id(*ids: int | None) -> int | None:
    """The first of ``ids`` that is not None (0 is an id), or None."""
    return next((token_id for token_id in ids if token_id is not None), None)
