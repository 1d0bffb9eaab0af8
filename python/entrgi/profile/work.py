"""The least work of every span of a generation: bytes that must move and FLOPs that must be done.

A run is watched once, call by call, as torch dispatches it:

- *The operators of this package*: :func:`entrgi_ext.plans.floor` at the call's own N, V, d and dtypes: every input
  and output once, and the matrix product.
- *Models*: FLOPs of matrix products and attention by the formulas of :mod:`torch.utils.flop_counter`
  (attention in full, without a causal half), every parameter that takes part once (of an embedding table the rows
  looked up) and the result once. Activations in between are not counted: a fused model would keep them on the chip. Nor
  are reads of a key-value cache, which is small.

So a floor is a bound from below for the same mathematics; elementwise work and launches are not in it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from entrgi.timing import STEP, Recorder
from entrgi_ext import ops, plans  # noqa: F401  (ops: registers the operators)

LOOKUPS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


@dataclass(frozen=True)
class Call:
    """One call of an operator of this package; fields that it does not have are 0 or empty.

    Attributes:
        rows, vocabulary, width: N, V, d.
        logits, embedding: dtypes ("float32", ...).
    """

    name: str
    rows: int
    vocabulary: int = 0
    width: int = 0
    logits: str = ""
    embedding: str = ""


@dataclass
class Work:
    """The least work of one span, nested spans left out.

    Attributes:
        name: of the span.
        bytes: to be moved.
        flops: to be done, by dtype.
        calls: of this package's operators.
    """

    name: str
    bytes: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    calls: list[Call] = field(default_factory=list)


@dataclass
class _OpenSpan:
    work: Work
    read: dict[tuple[int, int], int] = field(default_factory=dict)  # bytes of a parameter, by address and size
    result: int = 0


class WorkCounter(Recorder):
    """A recorder that counts work in place of time; results of the run do not change.

    Attributes:
        counted: of every finished step, the work of its spans in the order in which they ended.
        parameter_bytes: of all parameters that took part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[list[Work]] = []
        self._spans: list[_OpenSpan] = []
        self._parameters: dict[int, int] = {}  # bytes, by address of the storage
        self._formulas = {**flop_registry, **_attention_formulas()}
        self._watch = _Watch(self)

    @property
    def parameter_bytes(self) -> int:
        return sum(self._parameters.values())

    def __enter__(self) -> WorkCounter:
        super().__enter__()
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.__exit__(*exception)
        super().__exit__(*exception)

    def begin(self, name: str) -> None:
        if name == STEP and not self._spans:
            self.counted.append([])
        self._spans.append(_OpenSpan(Work(name)))

    def end(self) -> None:
        span = self._spans.pop()
        if not span.work.calls:
            span.work.bytes += sum(span.read.values()) + span.result
        if span.work.name != STEP and self.counted:
            self.counted[-1].append(span.work)

    def call(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> object:
        """Carry out what torch dispatches, and count it."""
        result = function(*args, **kwargs)
        if self._spans and self._spans[-1].work.name != STEP:
            formula = self._formulas.get(function.overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
            self._count(self._spans[-1], function, [*args, *kwargs.values()], result, flops)
        return result

    def _count(
        self, span: _OpenSpan, function: torch._ops.OpOverload, args: list[object], result: object, flops: int
    ) -> None:
        tensors = [
            x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(x, Tensor)
        ]
        if function.namespace == "entrgi":
            call, work_bytes, call_flops = floor_of(function, args)
            span.work.calls.append(call)
            span.work.bytes += work_bytes
            if call_flops:
                span.work.flops[call.embedding] += call_flops
            return
        if flops:
            outputs = result if isinstance(result, tuple | list) else [result]
            span.work.flops[_name(next(x.dtype for x in outputs if isinstance(x, Tensor)))] += flops
        for tensor in tensors:
            if isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                self._parameters.setdefault(storage.data_ptr(), storage.nbytes())
        if function.is_view or not isinstance(result, Tensor):
            return
        span.result = result.nbytes
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() in self._parameters:
                looked_up = function.name().split(".")[0] in LOOKUPS
                read = result.nbytes if looked_up else tensor.nbytes
                span.read[tensor.data_ptr(), read] = read


class _Watch(TorchDispatchMode):
    def __init__(self, counter: WorkCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, function: torch._ops.OpOverload, _types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return self.counter.call(function, args, kwargs or {})


def floor_of(function: torch._ops.OpOverload, args: list[Any]) -> tuple[Call, int, int]:
    """The call of one of this package's operators, its bytes and its FLOPs. ``args`` are in the schema's order."""
    name = function.name().removeprefix("entrgi::").split(".")[0]
    arguments = function._schema.arguments
    # torch leaves defaults out
    given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
    given |= dict(zip(given, args, strict=False))
    if name == "commit_":
        rows, trajectories = given["candidates"].shape[0], given["counts"].shape[0]
        return Call(name, rows), plans.floor(name, rows, 1, trajectories=trajectories).bytes, 0
    logits, embedding = given["logits"], given.get("embedding")
    rows, vocabulary = logits.shape
    call = Call(name, rows, vocabulary, logits=_name(logits.dtype))
    width = 1
    if embedding is not None:
        width = embedding.shape[1]
        call = Call(name, rows, vocabulary, width, call.logits, _name(embedding.dtype))
    moments = {}
    if name == "adam_step_":
        moments = {"step": given["step"], "last": given["last"]}
        if given["exp_avg"] is None:
            moments = {"step": 1, "last": True}
    # The kernels have no float64, whose every element is twice as large as float32's.
    dtypes = ["float32" if x == "float64" else x for x in (call.logits, call.embedding or "float32")]
    operator = "relaxed_embedding" if name == "relaxed_embedding_" else name
    floor = plans.floor(operator, rows, vocabulary, width, *dtypes, **moments)
    return call, floor.bytes * (2 if call.logits == "float64" else 1), floor.flops


def _attention_formulas() -> dict[object, object]:
    """FLOPs of torch's fused attention operators: the ones that torch leaves out, and fewer key than query heads."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: Any) -> int:
        batch, heads, queries, width = query.shape
        return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])

    def backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: Any) -> int:
        # The scores again, then the gradients of queries, of keys, of the scores and of the values.
        batch, heads, queries, width = query.shape
        return 2 * batch * heads * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])

    formulas = {}
    for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
        for suffix, formula in (("", forward), ("_backward", backward)):
            packet = getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}", None)
            if packet is not None:
                formulas[packet] = formula
    return formulas


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
