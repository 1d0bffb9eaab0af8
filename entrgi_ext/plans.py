"""Launch plans, floors and requests of the CUDA operators: arithmetic on shapes, without a GPU and without torch.

Operators are named as in ``torch.ops.entrgi``; a shape is N rows of V logits and, where the operator has one, an
embedding [V, d].

For experiments, :func:`force` replaces parts of the plans of a process, here and in every launch. The environment
variable ``ENTRGI_FORCE_PLAN`` does the same from outside; it is read when this module is imported, as every CUDA launch
from Python has it. It holds the same dictionary as JSON, or in short::

    ENTRGI_FORCE_PLAN='{"relaxed_embedding": {"kernel": "relaxed_embedding_sm80", "splits": 4}}'
    ENTRGI_FORCE_PLAN="relaxed_embedding:kernel=relaxed_embedding_sm80,splits=4;sample_tokens:cluster_n=8"

Where it cannot be understood, every plan and every CUDA launch is refused, with the piece and what is expected there.
The CPU operators have no plan and do not read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from . import _bindings

OPERATORS = (
    *("logit_statistics", "logit_statistics_backward", "sample_tokens", "gumbel_perturb", "relaxed_embedding"),
    *("logit_gradient", "adam_step_", "sgd_step_", "commit_"),
)
OVERRIDES = ("kernel", "splits", "block_m", "block_n", "block_k", "stages", "cluster_m", "cluster_n")
_TYPICAL_SMS = {80: 108, 90: 132, 100: 148}


class Target(NamedTuple):
    """What plans are made for.

    Attributes:
        arch: of the code that runs there: 90 for sm_90a, 100 for the PTX of compute_90 on newer GPUs (clusters, but no
            ``wgmma``), 80 for everything else.
        num_sms: multiprocessors.
        clusters_of_2, clusters_of_4, clusters_of_8: how many clusters of so many CTAs, each alone on a multiprocessor,
            run at once, as the driver counts them; None: as many as a whole GPU of that kind typically holds.
    """

    arch: int
    num_sms: int
    clusters_of_2: int | None = None
    clusters_of_4: int | None = None
    clusters_of_8: int | None = None

    def options(self) -> dict[str, int]:
        """What is known, as keyword arguments of :func:`launch_plan`."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class LaunchPlan:
    """How the main kernel of an operator is launched.

    Attributes:
        kernel: its name.
        tile: (m, n, k) of the output and of the reduction; 0 where there is none.
        stages: depth of the pipeline of asynchronous copies, 0 without one.
        threads: of a CTA.
        cluster: (m, n) CTAs along rows and columns of the output.
        splits: parts of the vocabulary, reduced in a fixed order afterwards.
        grid: CTAs.
        shared_bytes: dynamic shared memory of a CTA.
        workspace_bytes: scratch in device memory.
    """

    kernel: str
    tile: tuple[int, int, int]
    stages: int
    threads: int
    cluster: tuple[int, int]
    splits: int
    grid: int
    shared_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class Floor:
    """The least that an operator must do: every input and output crosses the memory bus once.

    Attributes:
        bytes: to and from device memory.
        flops: of the matrix product, 2 N V d, or 0.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Requests:
    """What an operator's kernels ask of the memory system, before any cache.

    All 0 where it depends on the data (``commit_``). A word that all threads of a CTA read counts once for each.

    Attributes:
        load_bytes: read by threads.
        bulk_bytes: read by TMA and bulk copies.
        store_bytes: written by threads.
        flops: issued to the matrix product, tile padding included.
        plan: the plan under which they run.
    """

    load_bytes: int
    bulk_bytes: int
    store_bytes: int
    flops: int
    plan: LaunchPlan

    @property
    def bytes(self) -> int:
        return self.load_bytes + self.bulk_bytes + self.store_bytes


def target(arch: int | None = None, num_sms: int | None = None) -> Target:
    """The current GPU where nothing is given and one can be used, else a typical one: an H200 (90, 132), an A100 (80,
    108) or a B200 (100, 148).

    Raises:
        ValueError: for an architecture other than 80, 90 and 100.
    """
    if arch is None and (device := _bindings.device()) is not None:
        here = Target(**device)
        if here.arch in _TYPICAL_SMS:
            return here if num_sms is None else Target(here.arch, num_sms)
    arch = 90 if arch is None else arch
    if arch not in _TYPICAL_SMS:
        raise ValueError(f"arch must be 80, 90 or 100, got {arch}")
    return Target(arch, _TYPICAL_SMS[arch] if num_sms is None else num_sms)


def launch_plan(
    op: str,
    n: int,
    vocab: int,
    dim: int = 1,
    logits_dtype: object = "bfloat16",
    embedding_dtype: object = "bfloat16",
    *,
    arch: int | None = None,
    num_sms: int | None = None,
    **options: Any,
) -> LaunchPlan:
    """How an operator is launched for a shape.

    Args:
        op: one of :data:`OPERATORS`.
        n, vocab, dim: N, V and d; operators without an embedding ignore d. ``commit_``: N candidates.
        logits_dtype, embedding_dtype: bfloat16, float16 or float32, as torch's dtypes or their names.
        arch, num_sms: of :func:`target`.
        options: any of :data:`OVERRIDES`, which replace the plan's choices (``splits`` within what the shape allows);
            ``logits_aligned`` (updates: of moments and gradient too), ``embedding_aligned`` (True): whether rows
            start at 16-byte boundaries;
            ``clusters_of_2``, ``clusters_of_4``, ``clusters_of_8`` of :class:`Target`;
            ``trajectories`` (1) of ``commit_``.

    Raises:
        ValueError: naming what is unknown, out of range, or cannot serve the shape.
        TypeError: for an option that does not exist or is of another type.

    Example:
        >>> launch_plan("relaxed_embedding", 8, 152_064, 2048, arch=80).kernel
        'relaxed_embedding_sm80'
    """
    where = target(arch, num_sms).options() | options
    return LaunchPlan(**_bindings.plan(op, n, vocab, dim, *_names(logits_dtype, embedding_dtype), **where))


def floor(
    op: str,
    n: int,
    vocab: int,
    dim: int = 1,
    logits_dtype: object = "bfloat16",
    embedding_dtype: object = "bfloat16",
    **options: Any,
) -> Floor:
    """The least memory traffic and arithmetic of an operator; arguments as for :func:`launch_plan`.

    Args:
        options: ``trajectories``; of ``adam_step_`` ``step`` (2; 1 reads no moments) and ``last`` (False; True writes
            none).
    """
    return Floor(**_bindings.floor(op, n, vocab, dim, *_names(logits_dtype, embedding_dtype), **options))


def requests(
    op: str,
    n: int,
    vocab: int,
    dim: int = 1,
    logits_dtype: object = "bfloat16",
    embedding_dtype: object = "bfloat16",
    *,
    arch: int | None = None,
    num_sms: int | None = None,
    **options: Any,
) -> Requests:
    """What an operator's kernels ask of the memory system, and their plan; arguments as for both functions above."""
    where = target(arch, num_sms).options() | options
    found = _bindings.requests(op, n, vocab, dim, *_names(logits_dtype, embedding_dtype), **where)
    return Requests(**{**found, "plan": LaunchPlan(**found["plan"])})


def force(plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Forces parts of the plans of some operators, in place of what was forced before; ``{}`` forces nothing.

    Args:
        plans: by operator, what :func:`launch_plan` takes of :data:`OVERRIDES`. What is given there stands above it.

    Raises:
        ValueError: naming the operator, field or value that is unknown. What a shape cannot have is refused where it
            is asked for a plan: as ValueError here, as RuntimeError at a launch.

    Example:
        >>> force({"relaxed_embedding": {"kernel": "relaxed_embedding_sm80", "splits": 4}})
        >>> launch_plan("relaxed_embedding", 8, 152_064, 2048, arch=90).splits
        4
        >>> force({})
    """
    _bindings.force_plans({op: _checked(op, fields, "force") for op, fields in plans.items()})


def forced() -> dict[str, dict[str, Any]]:
    """What is forced, by operator and field; empty where nothing is.

    Raises:
        ValueError: where ``ENTRGI_FORCE_PLAN`` cannot be understood, with the piece and what is expected there.
    """
    return _bindings.forced_plans()


_VARIABLE = "ENTRGI_FORCE_PLAN"
_MOST = dict.fromkeys(OVERRIDES, 2**31 - 1) | {"splits": 2**63 - 1}


def _refuse(piece: object, expected: str, source: str = _VARIABLE) -> NoReturn:
    raise ValueError(f"{source}: expected {expected}, got {piece!r}")


def _checked(op: str, fields: Mapping[str, Any], source: str = _VARIABLE) -> dict[str, Any]:
    """The fields of an operator, where it and they are known and their values can be meant."""
    if op not in OPERATORS:
        _refuse(op, f"an operator ({', '.join(OPERATORS)})", source)
    if not isinstance(fields, Mapping):
        _refuse(fields, f"fields and values of {op}", source)
    for field, value in fields.items():
        if field not in OVERRIDES:
            _refuse(field, f"a field ({', '.join(OVERRIDES)})", source)
        if field == "kernel":
            if value not in _bindings.KERNELS:
                _refuse(value, f"a kernel ({', '.join(_bindings.KERNELS)})", source)
        elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[field]:
            _refuse(str(value), f"a whole number >= 1 for {field}", source)
    return dict(fields)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose names comes twice."""
    known = dict(pairs)
    if len(known) < len(pairs):
        names = [name for name, _ in pairs]
        _refuse(names, "every operator and field once")
    return known


def _parse(text: str) -> dict[str, dict[str, Any]]:
    """Plans as the environment spells them."""
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        _refuse(text, "UTF-8 text")
    if text.lstrip().startswith("{"):
        try:
            plans = json.loads(text, object_pairs_hook=_once)
        except (json.JSONDecodeError, RecursionError) as error:
            _refuse(f"{text:.80}", f"JSON ({error})")
        return {op: _checked(op, fields) for op, fields in plans.items()}
    plans = {}
    for piece in text.split(";") if text.strip() else ():
        op, colon, rest = (part.strip() for part in piece.partition(":"))
        if not colon:
            _refuse(piece.strip(), "operator:field=value,...")
        fields = {}
        for assignment in rest.split(","):
            field, equals, value = (part.strip() for part in assignment.partition("="))
            if not equals:
                _refuse(assignment.strip(), "field=value")
            if field in fields:
                _refuse(rest, f"the field {field} once")
            fields[field] = int(value) if field != "kernel" and value.isascii() and value.isdigit() else value
        if op in plans:
            _refuse(text, f"the operator {op} once")
        plans[op] = _checked(op, fields)
    return plans


def _read_environment() -> None:
    try:
        _bindings.force_plans(_parse(os.environ.get(_VARIABLE, "")))
    except ValueError as error:
        _bindings.force_plans({}, str(error))


_read_environment()


def _names(*dtypes: object) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]
