"""One sentence for whatever transformers, peft, safetensors, tokenizers and the hub raise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch

REMOTE_CODE = "it needs code from its repository, which is never run"
# What libraries advise and we refuse, or their reports, which are not shown.
_USELESS = re.compile(
    "use_safetensors|ignore_mismatched_sizes|weights_only|from_tf|from_flax|allow_all_kernels|report|"
    "double-check|this error is a bug|open an issue",
    re.IGNORECASE,
)
# Types whose messages say little without their name.
_TERSE = (KeyError, IndexError, AttributeError, TypeError, AssertionError, RecursionError, NotImplementedError)
_LONGEST = 400


@contextmanager
def loading(argument: str, name: str | Path) -> Iterator[None]:
    """Turn any exception raised inside into ``ValueError("<argument>: cannot load '<name>': <reason>")``.

    Errors that name the argument already, and those of memory, go on as they are.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{argument}:"):
            raise
        raise cannot_load(argument, name, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust extensions; not an Exception
            raise
        raise cannot_load(argument, name, error) from error


def cannot_load(argument: str, name: str | Path, error: BaseException) -> ValueError:
    """The error that :func:`loading` raises in place of ``error``."""
    place = "" if _exists(name) else ", no folder here"
    return ValueError(f"{argument}: cannot load {str(name)!r}{place}: {reason_of(error)}")


def reason_of(error: BaseException) -> str:
    """The first sentence of an error that is of use to who passed a checkpoint, without its full stop."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return REMOTE_CODE
    sentences = [sentence.rstrip(".!") for sentence in re.split(r"(?<=[.!?]) ", text)]
    reason = next((sentence for sentence in sentences if sentence and not _USELESS.search(sentence)), "")
    if not reason or isinstance(error, _TERSE):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} ..."


def refuse_unknown(argument: str, options: Iterable[str], known: Iterable[str], near: Iterable[str] = ()) -> None:
    """Raise ValueError for an option that is not ``known``, with the nearest of these and of ``near``."""
    known = list(dict.fromkeys(known))
    for option in options:
        if option not in known:
            closest = get_close_matches(option, [*near, *known], n=1)
            meant = f"; did you mean {closest[0]!r}?" if closest else ""
            raise ValueError(f"{argument}: unknown option {option!r}, expected one of {', '.join(known)}{meant}")


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
