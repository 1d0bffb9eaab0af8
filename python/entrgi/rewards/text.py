"""Texts as a reward model reads them: its chat template around the messages, or special tokens around plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from entrgi.messages import Prompt, as_prompt, begun_turn
from entrgi.prompts import Completion, Options, check_all_shown, first_not_none, render_chat, split_chat
from entrgi.tokenizing import frame_ids, named_id, plain_ids


def as_completions(texts: Sequence[Completion | str | tuple[Prompt, str]] | str) -> list[Completion]:
    """What is to be scored, as :class:`Completion`.

    Args:
        texts: any of a :class:`Completion`; a text, which is a response to an empty prompt; a pair of a prompt (text or
            messages) and a response. Where both are read as one plain text, they are joined as they stand. A single
            text or completion is one of them.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(texts, str | Completion):
        texts = [texts]
    if isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        raise ValueError(
            "completions: a tuple of two texts may be a pair or two texts, expected [(prompt, response)] or "
            f"[text, text], got {texts!r:.80}"
        )
    if not isinstance(texts, Sequence):
        raise ValueError(f"completions: expected texts, pairs (prompt, response) or Completions, got {texts!r:.80}")
    completions = []
    for index, item in enumerate(texts):
        if isinstance(item, str):
            item = "", item
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], str):
            prompt, response = as_prompt(item[0], f"completions[{index}]"), item[1]
            continued = prompt if isinstance(prompt, str) else begun_turn(prompt) or ""
            item = Completion(prompt, continued + response, response)
        elif isinstance(item, Completion):
            item = replace(item, prompt=as_prompt(item.prompt, f"completions[{index}]"))
        else:
            raise ValueError(
                f"completions[{index}]: expected a text, a pair (prompt, response) or a Completion, got {item!r:.80}"
            )
        completions.append(item)
    return completions


@dataclass(frozen=True)
class TextFormat:
    """How one reward reads prompts and responses.

    Attributes:
        name: of the reward model, for errors.
        tokenizer: its tokenizer. With a chat template the response is the assistant's turn after the prompt's
            messages; without one the text stands between the tokenizer's special tokens.
        include_prompt: without a chat template, whether the text begins with the prompt.
        options: of the chat template, see :func:`entrgi.prompts.check_template_options`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    include_prompt: bool
    options: Options | None = None

    @property
    def is_chat(self) -> bool:
        return self.tokenizer.chat_template is not None or "chat_template" in (self.options or {})

    @property
    def reads_prompt(self) -> bool:
        return self.include_prompt and not self.is_chat

    @property
    def _template(self) -> str:
        return f"reward: the chat template of {self.name}"

    @property
    def special_ids(self) -> tuple[list[int], list[int]]:
        """Ids before and after a plain text; a chat template brings its own."""
        if self.is_chat:
            return [], []
        start, end, bos = (named_id(self.tokenizer, name) for name in ("cls", "sep", "bos"))
        if start is None and frame_ids(self.tokenizer) == [bos]:
            start = bos  # Llama-type tokenizers that begin every text with it
        return [] if start is None else [start], [] if end is None else [end]

    @property
    def empty_id(self) -> int | None:
        """What a text without a single token is read as: the end-of-sequence token alone."""
        return first_not_none(*(named_id(self.tokenizer, name) for name in ("eos", "sep", "pad")))

    def frame(self, prompt: Prompt, before: list[int]) -> tuple[list[int], list[int]]:
        """Ids before and after the response.

        Args:
            prompt: text or messages, as :func:`entrgi.messages.as_prompt` gives them.
            before: ids of the plain text before the response.

        Raises:
            ValueError: for messages that cannot be rendered, or a template that hides the assistant's turn.
        """
        if self.is_chat:
            check_all_shown(self.tokenizer, prompt, self.options, turn="...")
            head, tail = split_chat(self.tokenizer, prompt, self.options, self._template)
            return plain_ids(self.tokenizer, head), plain_ids(self.tokenizer, tail)
        if self.reads_prompt and not isinstance(prompt, str):
            raise ValueError(
                f"reward: got chat messages, and the tokenizer of {self.name} has no chat template to render them; "
                "pass include_prompt=False to have the response read alone"
            )
        start, end = self.special_ids
        return start + (before if self.reads_prompt else []), end

    def whole(self, completion: Completion) -> tuple[list[int], int]:
        """Ids of prompt and response with their frame, and how many of the last ones are the frame's.

        Raises:
            ValueError: for an empty text where the tokenizer has no token to stand for it.
        """
        if self.is_chat:
            text = render_chat(self.tokenizer, completion.prompt, completion.turn, self.options)
            return plain_ids(self.tokenizer, text), 0
        start, end = self.special_ids
        ids = [*start, *plain_ids(self.tokenizer, self.plain(completion)), *end]
        return ids or [self.for_empty()], len(end)

    def plain(self, completion: Completion) -> str:
        """The text that is read: the response, after its prompt where there is no template to put it in."""
        return completion.text if self.reads_prompt else completion.response

    def split(self, completion: Completion) -> tuple[list[int], list[int]]:
        """Ids before the response (its frame's first part included) and of the response alone, never empty.

        A token that straddles the two counts to the response.
        """
        if self.is_chat and begun_turn(completion.prompt) is None:
            before, response = self.frame(completion.prompt, [])[0], plain_ids(self.tokenizer, completion.response)
        elif self.is_chat:
            whole, _ = split_chat(self.tokenizer, completion.prompt, self.options, self._template, completion.turn)
            before, response = _parted(plain_ids(self.tokenizer, whole), self.frame(completion.prompt, [])[0])
        elif self.reads_prompt:
            ids = plain_ids(self.tokenizer, completion.text)
            before, response = _parted(ids, plain_ids(self.tokenizer, completion.text[: _boundary(completion)]))
            before = [*self.special_ids[0], *before]
        else:
            before, response = self.special_ids[0], plain_ids(self.tokenizer, completion.response)
        return before, response or [self.for_empty()]

    def for_empty(self) -> int:
        if self.empty_id is None:
            raise ValueError(
                f"reward: an empty text is no token at all to {self.name}, whose tokenizer has no end-of-sequence "
                "and no padding token to stand for it"
            )
        return self.empty_id


def _parted(ids: list[int], before: list[int]) -> tuple[list[int], list[int]]:
    """``ids`` up to where they differ from ``before``, and from there on."""
    pairs = enumerate(zip(ids, before, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(before)))
    return ids[:same], ids[same:]


def _boundary(completion: Completion) -> int:
    """Where the response begins in the text of prompt and response.

    Decoders glue: a word piece loses its mark, a first token its space. So it is the longest common ending.
    """
    text, response = completion.text, completion.response
    length = 0
    while length < min(len(text), len(response)) and text[-1 - length] == response[-1 - length]:
        length += 1
    return len(text) - length
