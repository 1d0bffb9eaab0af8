"""The guidance loop as CUDA graphs: captured once for every shape, replayed with new numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from threading import Lock

import torch
from torch import Tensor

from entrgi.guidance import GuidanceTrace
from entrgi.timing import span
from entrgi_ext import warm_up

Optimize = Callable[..., GuidanceTrace]
WARM_UP = 2  # runs before a capture, in which libraries allocate what they keep
_capturing = Lock()  # one capture at a time in the process


@dataclass(frozen=True)
class _Captured:
    """A captured call.

    Attributes:
        optimize: the function, kept because the graph reads tensors that it refers to.
        inputs: its arguments, which replays read and change.
        trace: what it returned, which replays overwrite.
    """

    optimize: Optimize
    inputs: list[Tensor]
    trace: GuidanceTrace
    replay: Callable[[], object]


class GuidanceGraphs:
    """Runs :func:`entrgi.guidance.optimize_logits` as CUDA graphs, one for each set of trajectories and shapes.

    The numbers are those of the plain call: the same kernels run in the same order. All graphs share one memory
    pool, since no two of them are ever in flight together.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured: dict[tuple, _Captured] = {}
        self.pool = None
        self.storage: dict[int, Tensor] = {}
        warm_up(device)  # a kernel's first launch loads it, which no capture may hold

    def __call__(self, optimize: Optimize, tensors: tuple[Tensor, ...], trajectories: tuple[int, ...]) -> GuidanceTrace:
        """``optimize(*tensors)``, which changes the first tensor (the logits) and the last (the error flag).

        Args:
            optimize: must depend on ``tensors`` and on the set of trajectories alone.
            trajectories: the set, beside the shapes the key of the graph.
        """
        key = (trajectories, *((tuple(t.shape), t.dtype) for t in tensors))
        if key not in self.captured:
            inputs = [self.static(place, tensor) for place, tensor in enumerate(tensors)]
            self.captured[key] = _Captured(optimize, inputs, *self.capture(optimize, inputs))
        graph = self.captured[key]
        for static, tensor in zip(graph.inputs, tensors, strict=True):
            static.copy_(tensor)
        with span("guidance graph"):
            graph.replay()
        tensors[0].copy_(graph.inputs[0])
        tensors[-1].copy_(graph.inputs[-1])
        return GuidanceTrace(*(getattr(graph.trace, field.name).clone() for field in fields(GuidanceTrace)))

    def static(self, place: int, tensor: Tensor) -> Tensor:
        """A copy of the argument at ``place`` in storage that the graphs share: rows only become fewer.

        Its strides are kept: rows of the logits have room between them (:mod:`entrgi.rows`).
        """
        if 0 in tensor.stride():  # an expanded tensor cannot be written
            tensor = tensor.contiguous()
        size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        storage = self.storage.get(place)
        if storage is None or storage.dtype != tensor.dtype or storage.numel() < size:
            self.storage[place] = storage = tensor.new_empty(size)
        return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def capture(self, optimize: Optimize, inputs: list[Tensor]) -> tuple[GuidanceTrace, Callable[[], object]]:
        """Warm up beside the current stream, which changes ``inputs``, then capture. What is returned, and the replay.

        Raises:
            RuntimeError: where a model does what a graph cannot hold, such as waiting for the device.
        """
        # Everything on the models' device: torch captures on the current one where it is left the choice.
        with torch.cuda.device(self.device):
            current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    optimize(*inputs)
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            try:
                # What other threads do meanwhile, such as to allocate, is no part of the capture and must not end it.
                with (
                    _capturing,
                    torch.cuda.graph(graph, pool=self.pool, stream=beside, capture_error_mode="thread_local"),
                ):
                    trace = optimize(*inputs)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                what = "the reward model cannot be captured in a CUDA graph"
                raise RuntimeError(f"cuda_graphs: {what}: {error}") from error
            self.pool = graph.pool()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return trace, replay
