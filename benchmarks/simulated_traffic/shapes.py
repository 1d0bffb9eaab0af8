"""The calls whose traffic is counted."""

from __future__ import annotations

from dataclasses import dataclass

STEP = 2  # of Adam, where nothing else is said
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """One call of an operator; ``options`` are step and last of ``adam_step_``."""

    operator: str
    N: int
    V: int
    d: int = 1
    logits: str = "bfloat16"
    embedding: str = "bfloat16"
    options: tuple[tuple[str, object], ...] = ()

    @property
    def aligned(self) -> bool:
        """Whether rows of z and E start at 16-byte boundaries."""
        return self.V * SIZES[self.logits] % 16 == 0 and (self.d == 1 or self.d * SIZES[self.embedding] % 16 == 0)

    def __str__(self) -> str:
        last = dict(self.options)
        extra = "".join(f" {name}={value}" for name, value in last.items())
        return f"{self.operator}{extra} N={self.N} V={self.V} d={self.d} {self.logits}/{self.embedding}"


def adam(n: int, v: int, d: int, step: int = STEP, last: bool = False, **dtypes: str) -> Shape:
    return Shape("adam_step_", n, v, d, **dtypes, options=(("step", step), ("last", last)))


FP32 = {"logits": "float32", "embedding": "float32"}
MIXED = {"logits": "float32"}
FP16 = {"logits": "float16", "embedding": "float16"}
SHAPES = (
    *(Shape("logit_statistics", n, v) for n, v in ((1, 61_440), (8, 61_440), (8, 20_001), (150, 16_384))),
    *(Shape("sample_tokens", n, v) for n, v in ((1, 61_440), (8, 61_440), (150, 16_384))),
    *(Shape(op, 4, 20_000) for op in ("gumbel_perturb", "logit_statistics_backward")),
    *(Shape("logit_statistics", 8, 20_000, **dtypes) for dtypes in (MIXED, FP16)),
    *(Shape(op, 4, 20_000, **FP16) for op in ("sample_tokens", "gumbel_perturb", "logit_statistics_backward")),
    Shape("logit_statistics_backward", 4, 20_000, **MIXED),
    *(Shape("relaxed_embedding", n, v, d) for n, v, d in ((1, 16_384, 256), (16, 16_384, 256), (64, 8192, 512))),
    *(Shape("relaxed_embedding", n, v, d) for n, v, d in ((128, 8192, 256), (300, 4096, 512), (17, 8191, 264))),
    *(Shape("relaxed_embedding", 64, 8192, 256, **dtypes) for dtypes in (MIXED, FP16)),
    Shape("relaxed_embedding", 16, 4096, 256, **FP32),
    *(Shape("logit_gradient", n, v, d) for n, v, d in ((8, 8192, 256), (300, 4096, 256))),
    *(adam(n, 8192, 256) for n in (1, 16, 64)),
    *(adam(300, 4096, 512, step, last) for step, last in ((1, False), (2, False), (2, True), (1, True))),
    adam(17, 8191, 264),
    *(adam(64, 8192, 256, **dtypes) for dtypes in (MIXED, FP16)),
    adam(16, 4096, 256, **FP32),
    Shape("sgd_step_", 64, 8192, 256),
)
