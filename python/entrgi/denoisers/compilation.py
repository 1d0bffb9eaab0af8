"""torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each transformer block of ``model`` in place, on its first call.

    All blocks run the same code, so one compilation serves them all, in a fraction of the time that the
    unrolled model takes.

    Raises:
        ValueError: for a model without a list of blocks.
    """
    blocks = list(_blocks(model.base_model))
    if not blocks:
        raise ValueError(f"compile=True: {type(model).__name__} has no list of transformer blocks to compile")
    for block in blocks:
        block.compile()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules; a list of lists counts as its members do."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and not any(isinstance(member, nn.ModuleList) for member in child):
            yield from child
        else:
            yield from _blocks(child)
