"""What is measured: operators, shapes, their order, and random inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from entrgi_ext import _bindings
from entrgi_ext.plans import launch_plan

TEMPERATURE, TOP_P, BETAS, EPS = 0.7, 0.95, (0.9, 0.999), 1e-8
STEP = 2  # of a middle Adam step
# Plain ascent moves a logit by lr times a gradient of 1e-7.
CHECKED_LR, CHECKED_SGD_LR = 0.5, 1e6
# Timed steps hardly move the logits, or hundreds of them would sharpen the distribution whose draw is timed.
TIMED_LR = 1e-6
MOMENT = 2e-7  # about the size of a gradient here


@dataclass(frozen=True)
class Operator:
    """One line of the benchmark.

    Attributes:
        parts: arguments of ``_bindings.floor``, summed: (name, options).
        has_vocabulary: whether V, the dtypes and, with ``products``, d matter.
    """

    parts: tuple[tuple[str, dict], ...]
    has_vocabulary: bool = True

    @property
    def products(self) -> tuple[str, ...]:
        """Which matrix products it holds: ``embed`` q E and ``update`` G E^T."""
        return tuple(PRODUCT_OF[name] for name, _ in self.parts if name in PRODUCT_OF)


STATISTICS, DRAW = ("logit_statistics", {}), ("sample_tokens", {})
EMBED, MIDDLE = ("relaxed_embedding", {}), ("adam_step_", {"step": STEP})
WHOLE_STEP = "adam_iteration"
PRODUCT_OF = {"relaxed_embedding": "embed", "logit_gradient": "update", "adam_step_": "update", "sgd_step_": "update"}
OPERATORS = {
    WHOLE_STEP: Operator((DRAW, EMBED, MIDDLE)),
    "logit_statistics": Operator((STATISTICS,)),
    "sample_tokens": Operator((DRAW,)),
    "greedy": Operator((DRAW,)),
    "relaxed_embedding": Operator((EMBED,)),
    "logit_gradient": Operator((("logit_gradient", {}),)),
    "adam_step_first": Operator((("adam_step_", {"step": 1}),)),
    "adam_step_middle": Operator((MIDDLE,)),
    "adam_step_last": Operator((("adam_step_", {"step": STEP, "last": True}),)),
    "sgd_step": Operator((("sgd_step_", {}),)),
    "gumbel_perturb": Operator((("gumbel_perturb", {}),)),
    "commit": Operator((("commit_", {}),), has_vocabulary=False),
}


@dataclass(frozen=True)
class Case:
    """An operator at a shape. V and d are 0 where they do not matter, dtypes then float32."""

    operator: str
    N: int
    V: int
    d: int
    logits: str
    embedding: str

    @property
    def key(self) -> tuple:
        return tuple(asdict(self).values())

    @property
    def what(self) -> Operator:
        return OPERATORS[self.operator]

    @property
    def trajectories(self) -> int:
        return max(1, self.N // 128)

    def floors(self) -> list[dict[str, int]]:
        """Of each part, the bytes and FLOPs that no implementation can avoid."""
        return [
            _bindings.floor(
                *(name, self.N, max(self.V, 1), max(self.d, 1), self.logits, self.embedding),
                trajectories=self.trajectories,
                **options,
            )
            for name, options in self.what.parts
        ]

    def floor(self) -> tuple[int, int]:
        """The sum of them."""
        floors = self.floors()
        return sum(floor["bytes"] for floor in floors), sum(floor["flops"] for floor in floors)

    def workspace(self) -> int:
        """Bytes of scratch on this GPU: of the part that takes most, for one after the other takes it."""
        shape = (self.N, max(self.V, 1), max(self.d, 1), self.logits, self.embedding)
        return max(launch_plan(name, *shape).workspace_bytes for name, _ in self.what.parts)

    def __str__(self) -> str:
        shape = f"N={self.N}"
        if self.what.has_vocabulary:
            shape += f" V={self.V}" + (f" d={self.d}" if self.d else "") + f" {self.logits}"
        return f"{self.operator} {shape}"


@dataclass(frozen=True)
class Selection:
    """Cases of a run: all combinations.

    Attributes:
        dtypes: of the embedding, and of the logits where ``logits_dtypes`` is empty.
        operators: empty means all.
    """

    rows: tuple[int, ...]
    vocabularies: tuple[int, ...]
    widths: tuple[int, ...]
    dtypes: tuple[str, ...]
    operators: tuple[str, ...] = ()
    logits_dtypes: tuple[str, ...] = ()

    def cases(self) -> Iterator[Case]:
        for vocabulary, width, dtype in product(self.vocabularies, self.widths, self.dtypes):
            for logits in self.logits_dtypes or (dtype,):
                for rows, name in product(self.rows, self.operators or OPERATORS):
                    what = OPERATORS[name]
                    if what.products:
                        yield Case(name, rows, vocabulary, width, logits, dtype)
                    elif what.has_vocabulary:
                        yield Case(name, rows, vocabulary, 0, logits, logits)
                    else:
                        yield Case(name, rows, 0, 0, "float32", "float32")


def cases_of(selections: Iterable[Selection]) -> list[Case]:
    """Every case once, in the order of the selections."""
    return list(dict.fromkeys(case for selection in selections for case in selection.cases()))


EVERY_N = (1, 4, 16, 64, 128, 256, 512, 2048)
CUDA = Selection(EVERY_N, (152_064, 126_464), (2048, 1024, 4096), ("bfloat16", "float32"))
CPU = Selection((1, 16, 64), (152_064, 126_464), (1024,), ("float32", "bfloat16"), operators=(WHOLE_STEP,))
# The most telling cases first: a run that ends early has measured those.
SELECTIONS = {
    "cuda": (replace(CUDA, operators=(WHOLE_STEP,)), CUDA),
    "cpu": (CPU, replace(CPU, vocabularies=CPU.vocabularies[:1], operators=())),
}
# Part of the above, to compare with committed results.
QUICK = {
    "cuda": (Selection((1, 64, 512), (152_064,), (2048,), ("bfloat16",)),),
    "cpu": (
        Selection((16,), (152_064,), (1024,), ("float32",)),
        Selection((1,), (152_064,), (1024,), ("bfloat16",)),
    ),
}


@lru_cache(maxsize=1)
def embedding_table(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype)


class Inputs:
    """Random inputs of a case, in ``sets`` of their own logits, so that calls in turn do not find them in a cache.

    Logits of spread 3 leave some thousand ids in the nucleus. What an operator takes from the one before it (logsumexp,
    tokens, weight, soft embedding) is computed here in plain PyTorch.
    """

    def __init__(self, case: Case, device: torch.device, sets: int = 1, lr: float = CHECKED_LR):
        self.case, self.device, self.sets, self.lr = case, device, sets, lr
        self.generator = torch.Generator(device).manual_seed(0)
        self.logits_dtype, self.embedding_dtype = getattr(torch, case.logits), getattr(torch, case.embedding)
        self.copied_bytes = 0
        if case.what.has_vocabulary:
            shape = (sets, case.N, case.V)
            self.logits = torch.randn(shape, generator=self.generator, device=device, dtype=self.logits_dtype).mul_(3.0)
        if case.d:
            self.embedding = embedding_table(case.V, case.d, self.embedding_dtype, device)
            grad = torch.randn(case.N, case.d, generator=self.generator, device=device).mul_(1e-3)
            self.grad = grad.to(self.embedding_dtype)

    def own_logits(self, s: int) -> Tensor:
        """A copy that its user may write; not counted as memory of the user's."""
        self.copied_bytes += self.logits[s].nbytes
        return self.logits[s].clone()

    def moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Adam's first and second moments as an earlier step may have left them, the same at every call."""
        generator = torch.Generator(self.device).manual_seed(2)
        shape = (self.case.N, self.case.V)
        first = torch.randn(shape, generator=generator, device=self.device, dtype=dtype).mul_(MOMENT)
        second = torch.rand(shape, generator=generator, device=self.device, dtype=dtype).add_(0.5)
        return first, second.mul_(MOMENT**2)

    @cached_property
    def keys(self) -> Tensor:
        keys = torch.zeros(self.case.N, 4, dtype=torch.long)
        keys[:, 3] = torch.arange(self.case.N)
        return keys.to(self.device)

    @cached_property
    def tokens(self) -> Tensor:
        return torch.randint(self.case.V, (self.case.N,), generator=self.generator, device=self.device)

    @cached_property
    def logsumexp(self) -> Tensor:
        """[sets, N] of z / tau."""
        rows = self.logits.view(-1, self.case.V).split(64)
        return torch.cat([(z.float() / TEMPERATURE).logsumexp(dim=1) for z in rows]).view(self.sets, -1)

    @cached_property
    def weight(self) -> Tensor:
        """[N] in (0, 1), as entropies over log V are."""
        return torch.rand(self.case.N, generator=self.generator, device=self.device)

    @cached_property
    def soft(self) -> Tensor:
        """[N, d] fp32, of the first set: only E smaller than a cache would need more."""
        result = torch.zeros(self.case.N, self.case.d, device=self.device)
        for ids in self.chunks():
            q = (self.logits[0, :, ids].float() / TEMPERATURE - self.logsumexp[0, :, None]).exp()
            result += q @ self.embedding[ids].float()
        return result

    def chunks(self) -> Iterator[slice]:
        """The vocabulary in parts whose fp64 embeddings fit in memory."""
        return (slice(start, start + 16_384) for start in range(0, self.case.V, 16_384))

    @cached_property
    def commit(self) -> dict[str, Tensor]:
        """Arguments of ``commit_``: one window of 128 or fewer positions for each trajectory, a quarter committed."""
        n, p = self.case.N, self.case.trajectories
        splits = torch.linspace(0, n, p + 1).long()
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(splits.tolist())])
        result = {
            "tokens": torch.full((p, int(splits.diff().max())), -5),
            "candidates": torch.randint(1000, (n,), generator=torch.Generator().manual_seed(3)),
            "confidence": torch.randperm(n, generator=torch.Generator().manual_seed(4)) / n,
            "positions": positions,
            "splits": splits,
            "counts": splits.diff() // 4 + 1,
        }
        return {name: tensor.to(self.device) for name, tensor in result.items()}

    @property
    def log_vocabulary(self) -> float:
        return math.log(self.case.V)
