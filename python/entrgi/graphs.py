"""The guidance loop as CUDA graphs: captured once for every shape, replayed with new numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from threading import Lock

import torch
from torch import Tensor

from entrgi.guidance import GuidanceOutput
from entrgi.timing import span
from entrgi_ext import warm_up

Optimize = Callable[..., GuidanceOutput]
WRITTEN = ("logits", "error_flag")  # what the loop changes
WARM_UP = 2  # runs before a capture, in which libraries allocate what they keep
_capturing = Lock()  # one capture at a time in the process


@dataclass(frozen=True)
class _Captured:
    """A captured call.

    Attributes:
        optimize: the function, kept because the graph reads tensors that it refers to.
        inputs: its arguments by name, which replays read and change.
        output: what it returned, which replays overwrite.
    """

    optimize: Optimize
    inputs: dict[str, Tensor]
    output: GuidanceOutput
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
        self.storage: dict[str, Tensor] = {}
        warm_up(device)  # a kernel's first launch loads it, which no capture may hold

    def __call__(self, optimize: Optimize, tensors: dict[str, Tensor], trajectories: tuple[int, ...]) -> GuidanceOutput:
        """``optimize(**tensors)``, which changes the tensors ``logits`` and ``error_flag``.

        Args:
            optimize: must depend on ``tensors`` and on the set of trajectories alone.
            trajectories: the set, beside the shapes the key of the graph.
        """
        key = (trajectories, *((tuple(t.shape), t.dtype) for t in tensors.values()))
        if key not in self.captured:
            inputs = {name: self.static(name, tensor) for name, tensor in tensors.items()}
            self.captured[key] = _Captured(optimize, inputs, *self.capture(optimize, inputs))
        graph = self.captured[key]
        for name, tensor in tensors.items():
            graph.inputs[name].copy_(tensor)
        with span("guidance graph"):
            graph.replay()
        for name in WRITTEN:
            tensors[name].copy_(graph.inputs[name])
        return GuidanceOutput(*(getattr(graph.output, field.name).clone() for field in fields(GuidanceOutput)))

    def static(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the argument ``name`` in storage that the graphs share: rows only become fewer.

        Its strides are kept: rows of the logits have room between them (:mod:`entrgi.rows`).
        """
        if 0 in tensor.stride():  # an expanded tensor cannot be written
            tensor = tensor.contiguous()
        size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        storage = self.storage.get(name)
        if storage is None or storage.dtype != tensor.dtype or storage.numel() < size:
            self.storage[name] = storage = tensor.new_empty(size)
        return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def capture(self, optimize: Optimize, inputs: dict[str, Tensor]) -> tuple[GuidanceOutput, Callable[[], object]]:
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
                    optimize(**inputs)
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            try:
                # What other threads do meanwhile, such as to allocate, is no part of the capture and must not end it.
                with (
                    _capturing,
                    torch.cuda.graph(graph, pool=self.pool, stream=beside, capture_error_mode="thread_local"),
                ):
                    output = optimize(**inputs)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                what = "the reward model cannot be captured in a CUDA graph"
                raise RuntimeError(f"cuda_graphs: {what}: {error}") from error
            self.pool = graph.pool()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return output, replay
