"""One case: every implementation checked, then timed together with its floors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from entrgi.matmul import fast_products

from .cases import CHECKED_LR, CHECKED_SGD_LR, PRODUCT_OF, TIMED_LR, WHOLE_STEP, Case, Inputs
from .correctness import Truth
from .registry import COMPILED, COMPOSED, OURS, PUBLISHED, Implementation, registry
from .results import Row, rounded
from .timing import Calls, Limits, PeakMemory, Times, measure, measuring_stream, sets_beyond_cache, time_limit

LARGEST_COPY = 512 << 20  # bytes of each of the two buffers; a larger copy takes proportionally longer
FAILURES = (TimeoutError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        compile: which torch.compile baselines: ``all``, ``step`` (of the whole step, and on CUDA the pass before the
            plain product) or ``none``.
        compile_seconds: an implementation whose first call takes longer is left out.
    """

    device: torch.device
    limits: Limits = field(default_factory=Limits)
    compile: str = "step"
    compile_seconds: float = 120.0

    def wants(self, case: Case, name: str, implementation: Implementation) -> bool:
        if not implementation.compiled or self.compile == "all":
            return True
        part_of_step = case.operator == WHOLE_STEP or (name != COMPILED and self.device.type == "cuda")
        return self.compile == "step" and part_of_step


def measure_case(case: Case, settings: Settings) -> list[Row]:
    """A row for each implementation.

    Raises:
        WrongResult: an implementation is wrong; nothing was timed.
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
                with time_limit(self.settings.compile_seconds) if implementation.compiled else nullcontext():
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
        """Others than ours may run out of time or memory."""
        try:
            yield
        except FAILURES as failure:
            if name == OURS:
                raise
            self.status[name] = "out of memory" if isinstance(failure, torch.OutOfMemoryError) else str(failure)
            gc.collect()

    # ---- timed ----------------------------------------------------------------------------------------------

    def _time(self) -> dict[str, Times]:
        work, _ = self.case.floor()
        x = Inputs(self.case, self.device, sets_beyond_cache(work, self.device), TIMED_LR)
        calls: dict[str, Calls] = {}
        for name, implementation in self.implementations.items():
            if name in self.status:
                continue
            with self._may_fail(name):
                built = [implementation.build(x, s) for s in range(x.sets)]
                for call in built:  # warms up
                    call()
                calls[name] = built
        for name, each in self._floors(x, work).items():
            for call in each:
                call()
            calls[name] = each
        captured = {n: self.implementations[n].captured if n in self.implementations else True for n in calls}
        return measure(calls, captured, self.device, self.settings.limits)

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
            with fast_products(self.device):
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
        median, graphs = times[name].median, self.device.type == "cuda"
        row |= {
            "median_ms": rounded(median),
            "noise": rounded(times[name].noise, 2),
            "timing": ("graph" if self.implementations[name].captured else "events") if graphs else "host",
            "over_floor": rounded(median / floor, 3),
            "error": rounded(self.errors.get(name), 2),
        }
        if self.peaks.get(name) is not None:
            row["peak_MiB"] = round(self.peaks[name] / 2**20, 2)
        if name == OURS:
            for other in (PUBLISHED, COMPILED, COMPOSED):
                row[f"over_{other}"] = rounded(times[other].median / median, 3) if other in times else None
        return row
