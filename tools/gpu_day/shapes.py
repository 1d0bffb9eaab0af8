"""What is checked and measured, in order of importance: each list may be cut off by the clock."""

from __future__ import annotations

from dataclasses import dataclass

UPDATE, GRADIENT, EMBED = "adam_step_middle", "logit_gradient", "relaxed_embedding"
STATISTICS, DRAW, WHOLE_STEP = "logit_statistics", "sample_tokens", "adam_iteration"
SPREADS = (3.0, 4.0, 2.75, 2.5, 1.0)  # of the logits that are drawn from


def case(operator: str, n: int, vocabulary: int, d: int = 0, logits: str = "bfloat16", embedding: str = "") -> dict:
    """Fields of the benchmark's ``Case``."""
    embedding = embedding or ("bfloat16" if d else logits)
    return {"operator": operator, "N": n, "V": vocabulary, "d": d, "logits": logits, "embedding": embedding}


def title(case: dict) -> str:
    width = f" d={case['d']}" if case["d"] else ""
    dtypes = "" if case["logits"] == case["embedding"] == "bfloat16" else f" {case['logits']}/{case['embedding']}"
    return f"{case['operator']} N={case['N']}{width}{dtypes}"


@dataclass(frozen=True)
class Forced:
    """A plan by force against the one that is chosen: ``plan`` is an ENTRGI_FORCE_PLAN, empty for the chosen one."""

    case: dict
    plan: str

    @property
    def name(self) -> str:
        return f"{title(self.case)}: {self.plan.partition(':')[2] or 'chosen'}"


@dataclass(frozen=True)
class Shapes:
    """All of it for one machine.

    Attributes:
        copy_bytes: of each of the two buffers.
        products: (m, k, n, transposed) of the plain matrix products.
        main: cases and the kind of embedding.
        seconds: of measuring for an implementation.
    """

    small: bool
    copy_bytes: int
    products: tuple[tuple[int, int, int, bool], ...]
    main: tuple[tuple[dict, str], ...]
    bench: tuple[dict, ...]
    draws: tuple[tuple[dict, float, bool], ...]
    forced: tuple[Forced, ...]
    steps: tuple[tuple[dict, str, tuple[str, ...]], ...]
    counted: tuple[int, int]
    guided: tuple[str, int, tuple[str, ...]]
    seconds: float = 0.1


def _main(v: int, d: int, rows: tuple[int, int, int]) -> tuple[tuple[dict, str], ...]:
    few, some, many = rows
    plain = [case(DRAW, some, v), case(STATISTICS, some, v), case(STATISTICS, many, v)]
    products = [case(name, n, v, d) for n in (some, many, few) for name in (EMBED, UPDATE)]
    products += [
        case(EMBED, many, v, d, "float32", "bfloat16"),
        case(GRADIENT, many, v, d),
        case("sgd_step", some, v, d),
    ]
    checks = [(each, "random") for each in plain] + [(each, "random") for each in products]
    return (*checks, *((each, "positive") for each in products))


def real() -> Shapes:
    v = 152_064
    pairs = ((512, 2048), (64, 2048), (8, 2048), (256, 2048), (2048, 4096), (1, 1024), (64, 1024), (1, 2048))
    cluster = [Forced(case(EMBED, 512, v, 2048), f"{EMBED}:cluster_m={c}") for c in (1, 2, 4)]
    wide = [Forced(case(EMBED, 512, v, 2048, "float32", "bfloat16"), f"{EMBED}:cluster_m={c}") for c in (1, 2, 4)]
    tiles = [Forced(case(EMBED, 384, v, 2048), f"{EMBED}:block_m={m}") for m in (128, 192)]
    update = [Forced(case(UPDATE, 512, v, 2048), f"adam_step_:cluster_m={m},cluster_n=2") for m in (1, 2)]
    ampere = [
        Forced(case(EMBED, 512, v, 2048), f"{EMBED}:kernel=relaxed_embedding_sm80"),
        Forced(case(UPDATE, 512, v, 2048), "adam_step_:kernel=logit_update_sm80"),
    ]
    return Shapes(
        small=False,
        copy_bytes=2 << 30,
        products=((8192, 8192, 8192, False), *_both_ways(512, v, 2048), *_both_ways(2048, v, 4096)),
        main=_main(v, 2048, (8, 64, 512)),
        bench=(
            *(case(name, n, v, d) for n, d in pairs[:3] for name in (EMBED, UPDATE, GRADIENT)),
            *(case(STATISTICS, n, v) for n in (64, 512, 1, 16, 66, 132, 2048)),
            *(case(name, n, v, d) for n, d in pairs[3:] for name in (EMBED, UPDATE, GRADIENT)),
        ),
        draws=(
            *((case(DRAW, 64, v), spread, forbidden) for spread in SPREADS for forbidden in (False, True)),
            *((case(DRAW, n, v), *how) for n in (512, 1, 2048) for how in ((4.0, False), (4.0, True), (3.0, False))),
        ),
        forced=(*cluster, *update, *ampere, *tiles, *wide),
        steps=(
            *((case(WHOLE_STEP, n, v, 2048), "none", ()) for n in (64, 512, 8)),
            (case(WHOLE_STEP, 512, v, 2048), "step", ("entrgi", "compiled")),
            (case(EMBED, 2048, v, 2048), "step", ("entrgi", "two-pass")),
        ),
        counted=(v, 2048),
        guided=(
            "dream-7b",
            16,
            ("published", "entrgi", "entrgi cuda_graphs", "entrgi compile", "entrgi compile cuda_graphs"),
        ),
    )


def small() -> Shapes:
    """The same lists where a simulator or the CPU stands for the device."""
    v = 328
    return Shapes(
        small=True,
        copy_bytes=1 << 20,
        products=((64, 64, 64, False), *_both_ways(8, v, 72)),
        main=_main(v, 72, (3, 70, 130))[:8],
        bench=(*(case(name, n, v, 72) for n in (6, 70) for name in (EMBED, UPDATE)), case(STATISTICS, 6, v)),
        draws=tuple((case(DRAW, 6, v), spread, forbidden) for spread in SPREADS[:2] for forbidden in (False, True)),
        forced=(
            Forced(case(EMBED, 6, v, 72), f"{EMBED}:cluster_m=1"),
            Forced(case(UPDATE, 6, v, 72), "adam_step_:kernel=logit_update_sm80"),
        ),
        steps=((case(WHOLE_STEP, 70, v, 72), "none", ()),),
        counted=(v, 72),
        guided=("smoke", 2, ("published", "entrgi")),
        seconds=0.02,
    )


def _both_ways(n: int, vocabulary: int, d: int) -> tuple[tuple[int, int, int, bool], ...]:
    """q E and G E^T."""
    return (n, vocabulary, d, False), (n, d, vocabulary, True)
