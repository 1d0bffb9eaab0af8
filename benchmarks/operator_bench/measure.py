"""One case: every implementation checked, then timed together with its floors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from entrgi.matmul import onednn_matmul

from .cases import CHECKED_LR, CHECKED_SGD_LR, PRODUCT_OF, TIMED_LR, WHOLE_STEP, Case, Inputs
from .correctness import Truth, WrongResult
from .registry import COMPILED, COMPOSED, OURS, PUBLISHED, Implementation, registry
from .results import Row, beside, rounded
from .timing import Calls, Limits, PeakMemory, Times, measure, measuring_stream, sets_beyond_cache, time_limit

LARGEST_COPY = 512 << 20  # bytes of each of the two buffers; a larger copy takes proportionally longer
BY_EVENTS = "entrgi by events"  # beside what no graph can hold


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        compile: which torch.compile baselines: ``all``, ``step`` (of the whole step, and on CUDA the pass before the
            plain product) or ``none``.
        compile_seconds: an implementation whose first call takes longer is left out.
        only: the implementations that are measured, all of them where empty.
    """

    device: torch.device
    limits: Limits = field(default_factory=Limits)
    compile: str = "step"
    compile_seconds: float = 120.0
    only: tuple[str, ...] = ()

    def wants(self, case: Case, name: str, implementation: Implementation) -> bool:
        if self.only and name not in self.only:
            return False
        if not implementation.compiled or self.compile == "all":
            return True
        part_of_step = case.operator == WHOLE_STEP or (name != COMPILED and self.device.type == "cuda")
        return self.compile == "step" and part_of_step


def measure_case(case: Case, settings: Settings) -> list[Row]:
    """A row for each implementation.

    Raises:
        WrongResult: this package's implementation is wrong; nothing was timed.
    """
    with measuring_stream(settings.device):
        return _Measurement(case, settings).rows()


class _Measurement:
    def __init__(self, case: Case, settings: Settings):
        self.case, self.settings, self.device = case, settings, settings.device
        self.implementations = {
            name: each for name, each in registry()[case.operator].items() if settings.wants(case, name, each)
        }
        self.status: dict[str, str] = {}
        self.errors: dict[str, float | None] = {}
        self.peaks: dict[str, int | None] = {}

    def rows(self) -> list[Row]:
        self._check()
        times = self._time()
        work, _ = self.case.floor()
        copy = times["copy"].median * self._copy_scale(work)
        products = {name: times[name].median for name in self.case.what.products}
        # The parts of the whole step run one after the other: for each the longer of its bytes and its product.
        floor = sum(
            max(copy * part["bytes"] / work, products.get(PRODUCT_OF.get(name), 0.0))
            for (name, _), part in zip(self.case.what.parts, self.case.floors(), strict=True)
        )
        gemm = sum(products.values()) if products else None
        return [self._row(name, times, copy, gemm, floor) for name in self.implementations]

    # ---- right ----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        x = Inputs(self.case, self.device, lr=CHECKED_SGD_LR if self.case.operator == "sgd_step" else CHECKED_LR)
        truth, memory = Truth(x), PeakMemory(self.device)
        for name, implementation in self.implementations.items():
            if why := implementation.missing(self.device):
                self.status[name] = why
                continue
            with self._may_fail(name):
                with self._limited(implementation):
                    results = implementation.build(x, 0)()
                self.errors[name] = truth.check(name, results)
                del results
                copied = x.copied_bytes
                memory.start()
                call = implementation.build(x, 0)
                call()
                peak = memory.bytes()
                self.peaks[name] = None if peak is None else peak - (x.copied_bytes - copied)
                del call

    @contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        """Others than ours may fail, each by itself: why becomes their status."""
        try:
            yield
        except Exception as failure:
            self._failed(name, failure)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device itself has failed

    def _failed(self, name: str, failure: Exception) -> None:
        if isinstance(failure, torch.OutOfMemoryError) and name in self.implementations:
            self.status[name] = "out of memory"
        elif name not in self.implementations or name == OURS:
            raise failure
        elif isinstance(failure, WrongResult):
            self.status[name] = f"wrong result: {failure}"
        else:
            self.status[name] = (str(failure).strip() or type(failure).__name__).splitlines()[0]

    def _limited(self, implementation: Implementation) -> AbstractContextManager:
        return time_limit(self.settings.compile_seconds) if implementation.compiled else nullcontext()

    # ---- timed ----------------------------------------------------------------------------------------------

    def _time(self) -> dict[str, Times]:
        work, _ = self.case.floor()
        x = Inputs(self.case, self.device, sets_beyond_cache(work, self.device), TIMED_LR)
        calls: dict[str, Calls] = {}
        for name, implementation in self.implementations.items():
            if name in self.status:
                continue
            with self._may_fail(name), self._limited(implementation):
                built = [implementation.build(x, s) for s in range(x.sets)]
                for call in built:  # warms up
                    call()
                calls[name] = built
        if self.device.type == "cuda" and OURS in calls:
            calls[BY_EVENTS] = calls[OURS]
        for name, each in self._floors(x, work).items():
            for call in each:
                call()
            calls[name] = each
        captured = {n: self.implementations[n].captured if n in self.implementations else True for n in calls}
        captured[BY_EVENTS] = False
        times = measure(calls, captured, self.device, self.settings.limits)
        for name, each in times.items():
            if each.failure is not None:
                self._failed(name, each.failure)
        return {name: each for name, each in times.items() if each.failure is None}

    def _floors(self, x: Inputs, work: int) -> dict[str, Calls]:
        """A copy of as many bytes, read and written ones together, and the plain matrix products."""
        count = max(1, min(work // 2, LARGEST_COPY) // 4)
        source = torch.randn(x.sets, count, generator=x.generator, device=self.device)
        target = source.clone()  # pages that were never touched would be timed
        calls: dict[str, Calls] = {"copy": [lambda a=a, b=b: b.copy_(a) for a, b in zip(source, target, strict=True)]}
        products: dict[str, Calls] = {}
        if "embed" in self.case.what.products:
            out = torch.empty_like(x.grad)
            products["embed"] = [lambda q=q: torch.mm(q, x.embedding, out=out) for q in x.logits.to(out.dtype)]
        if "update" in self.case.what.products:
            inner = torch.empty(x.logits[0].shape, dtype=x.embedding_dtype, device=self.device)
            products["update"] = [lambda: torch.mm(x.grad, x.embedding.T, out=inner)] * x.sets
        return calls | {name: [self._fast(call) for call in each] for name, each in products.items()}

    def _fast(self, call):
        def run() -> None:
            with onednn_matmul(self.device):
                call()

        return run

    @staticmethod
    def _copy_scale(work: int) -> float:
        return max(1.0, work / 2 / LARGEST_COPY)

    # ---- rows -----------------------------------------------------------------------------------------------

    def _row(self, name: str, times: dict[str, Times], copy: float, gemm: float | None, floor: float) -> Row:
        row = {**vars(self.case), "implementation": name, "status": self.status.get(name, "measured")}
        row |= {"copy_ms": rounded(copy), "gemm_ms": rounded(gemm), "floor_ms": rounded(floor)}
        row["bound"] = "product" if gemm is not None and gemm >= copy else "bytes"
        if name not in times:
            return row
        median = times[name].median
        row |= {
            "median_ms": rounded(median),
            "noise": rounded(times[name].noise, 2),
            "timing": times[name].how,
            "over_floor": rounded(median / floor, 3),
            "error": rounded(self.errors.get(name), 2),
        }
        if self.peaks.get(name) is not None:
            row["peak_MiB"] = round(self.peaks[name] / 2**20, 2)
        if name == OURS:
            if self.device.type == "cuda" and self.case.what.has_vocabulary:
                row["workspace_MiB"] = round(self.case.workspace() / 2**20, 2)
            if BY_EVENTS in times:
                row["events_ms"] = rounded(times[BY_EVENTS].median)
            for other in (PUBLISHED, COMPILED, COMPOSED):
                if other in times:
                    row[f"over_{other}"] = rounded(times[other].median / beside(row, times[other].how), 3)
        return row
