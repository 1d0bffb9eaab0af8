"""Launch plans, floors and requests, from the bindings as they are built (with or without CUDA), forced plans, and what
the kernels that leave nothing to choose request in the simulator."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from support.build_simulated import ROOT, Unavailable, build_bindings, simulator_command
from support.raw_kernels import NAMES, RawKernels

OPERATORS = [
    "logit_statistics",
    "logit_statistics_backward",
    "sample_tokens",
    "gumbel_perturb",
    "relaxed_embedding",
    "logit_gradient",
    "adam_step_",
    "sgd_step_",
    "commit_",
]
SHAPES = [(1, 152_064, 1024), (8, 151_937, 2048), (64, 30_522, 768), (512, 152_064, 2048), (2048, 152_064, 4096)]


DTYPES = [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), ("float32", "float32")]
DEVICES = {80: ((80, 108), (80, 28)), 90: ((90, 132), (90, 78), (90, 14)), 100: ((100, 148),)}
SHARED_BYTES = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # of a CTA: what every device from sm_80 on has, and Hopper


# Rows on both sides of every tile's height; vocabularies of one id, of BERT, Qwen (odd and padded), and beyond 2^22.
ROWS = [0, 1, 7, 8, 16, 17, 64, 65, 128, 129, 512, 2048, 100_000]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 30_522, 151_937, 152_064, 2**23])
def test_every_plan_can_be_launched(bindings, op, vocab):
    devices = (*DEVICES[80], *DEVICES[90], *DEVICES[100])
    for n, dim, dtypes, aligned in itertools.product(ROWS, (1, 96, 2048, 4096), DTYPES, (True, False)):
        for arch, num_sms in devices:
            where = {"arch": arch, "num_sms": num_sms, "logits_aligned": aligned, "embedding_aligned": aligned}
            check_launchable(bindings.plan(op, n, vocab, dim, *dtypes, **where), n, vocab, arch)


def check_launchable(plan: dict, n: int, vocab: int, arch: int) -> None:
    cluster = plan["cluster"][0] * plan["cluster"][1]
    assert 0 <= plan["grid"] < 2**31
    assert plan["grid"] > 0 or n == 0
    assert plan["grid"] % cluster == 0
    assert 1 <= cluster <= 8  # what every device takes without asking for more
    assert arch >= 90 or cluster == 1
    by_hopper_alone = plan["kernel"].endswith("_sm90") and plan["kernel"] != "vocab_pass_sm90"
    assert arch == 90 or not by_hopper_alone
    assert arch >= 90 or not plan["kernel"].endswith("_sm90")
    assert 0 < plan["threads"] <= 1024
    assert plan["threads"] % 32 == 0
    assert 0 <= plan["shared_bytes"] <= SHARED_BYTES[arch]
    assert 1 <= plan["splits"] <= max(vocab, 1)
    assert plan["workspace_bytes"] >= 0
    assert all(size >= 0 for size in plan["tile"])


def test_tiles_and_splits_cover_the_work(bindings):
    """On sm_80, where every CTA has one tile of one split."""
    for op in ("relaxed_embedding", "logit_gradient", "adam_step_"):
        for n, vocab, dim in SHAPES:
            plan = bindings.plan(op, n, vocab, dim, arch=80, num_sms=108)
            block_m, block_n, _ = plan["tile"]
            columns = dim if op == "relaxed_embedding" else vocab
            assert plan["grid"] == -(-n // block_m) * -(-columns // block_n) * plan["splits"]


@pytest.mark.parametrize(("arch", "num_sms"), [(80, 108), (90, 132)])
def test_few_rows_fill_the_device(bindings, arch, num_sms):
    where = {"arch": arch, "num_sms": num_sms}
    for n in (1, 8, 32):
        # Hopper: a cluster of eight CTAs holds a row, however few rows there are (docs/kernels/vocab_pass.md).
        least = 8 * n if arch == 90 else 32
        assert bindings.plan("logit_statistics", n, 152_064, **where)["grid"] >= least
        assert bindings.plan("relaxed_embedding", n, 152_064, 2048, **where)["grid"] >= 0.9 * num_sms
        assert bindings.plan("adam_step_", n, 152_064, 2048, **where)["grid"] >= 0.9 * num_sms


def test_more_rows_never_mean_more_parts(bindings):
    rows = [1, 2, 8, 16, 64, 128, 256, 512, 1024, 2048]
    for op in ("logit_statistics", "sample_tokens", "relaxed_embedding"):
        plans = [bindings.plan(op, n, 152_064, 2048) for n in rows]
        for kernel in {plan["kernel"] for plan in plans}:
            splits = [plan["splits"] * plan["cluster"][1] for plan in plans if plan["kernel"] == kernel]
            assert splits[0] >= splits[-1]
    assert bindings.plan("logit_statistics", 512, 152_064, arch=80, num_sms=108)["splits"] == 1


@pytest.mark.parametrize(("n", "vocab", "dim"), SHAPES)
def test_splits_can_be_asked_for(bindings, n, vocab, dim):
    for splits in (1, 3, 17):
        plan = bindings.plan("relaxed_embedding", n, vocab, dim, splits=splits)
        assert plan["splits"] == splits
        assert plan["workspace_bytes"] == splits * n * dim * 4


def test_floors(bindings):
    n, vocab, dim = 512, 152_064, 2048
    logits, scores, table = n * vocab * 2, n * vocab * 4, vocab * dim * 2
    floor = bindings.floor("adam_step_", n, vocab, dim)
    assert floor["flops"] == 2 * n * vocab * dim
    assert floor["bytes"] == pytest.approx(2 * logits + 4 * scores + table, rel=0.01)
    first, last = (bindings.floor("adam_step_", n, vocab, dim, **kw)["bytes"] for kw in ({"step": 1}, {"last": True}))
    assert first == last == floor["bytes"] - 2 * scores
    assert bindings.floor("adam_step_", n, vocab, dim, step=1, last=True)["bytes"] == floor["bytes"] - 4 * scores
    assert bindings.floor("logit_statistics", n, vocab)["bytes"] == pytest.approx(logits, rel=1e-3)
    assert bindings.floor("gumbel_perturb", n, vocab)["bytes"] == pytest.approx(logits + scores, rel=1e-3)
    assert bindings.floor("relaxed_embedding", 8, vocab, dim)["bytes"] == pytest.approx(table, rel=0.01)


def test_bad_arguments_are_named(bindings):
    with pytest.raises(ValueError, match=r"op must be one of .* got nothing"):
        bindings.plan("nothing", 1, 1)
    with pytest.raises(ValueError, match=r"logits_dtype must be one of .* got float64"):
        bindings.plan("sample_tokens", 1, 1, logits_dtype="float64")
    for wrong in ({"n": -1, "vocab": 1}, {"n": 1, "vocab": 0}, {"n": 1, "vocab": 1, "dim": 0}):
        with pytest.raises(ValueError, match=r"must be >= "):
            bindings.floor("relaxed_embedding", **wrong)


# --- overrides --------------------------------------------------------------------------------------------------


def plan_or_refusal(bindings, shape: tuple, overrides: dict) -> dict | str:
    try:
        return bindings.plan(*shape, **overrides)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("op", OPERATORS)
def test_overrides_are_followed_or_refused(bindings, op):
    """By name: whatever a plan cannot take up raises, and what it takes up is in the plan."""
    shape = (op, 64, 152_064, 2048)
    own = bindings.plan(*shape)
    place = {"block_m": ("tile", 0), "block_n": ("tile", 1), "block_k": ("tile", 2)}
    place |= {"cluster_m": ("cluster", 0), "cluster_n": ("cluster", 1)}

    def read(plan: dict, field: str) -> object:
        return plan[place[field][0]][place[field][1]] if field in place else plan[field]

    for field in ("block_m", "block_n", "block_k", "stages", "cluster_m", "cluster_n", "kernel"):
        if read(own, field):
            same = bindings.plan(*shape, **{field: read(own, field)})
            assert read(same, field) == read(own, field)
        for asked in ("vocab_pass_sm99",) if field == "kernel" else (1, 2, 3, 5, 8, 64, 100_003):
            answer = plan_or_refusal(bindings, shape, {field: asked})
            if isinstance(answer, str):
                assert field in answer
                assert str(asked) in answer
            else:
                assert read(answer, field) == asked
    with pytest.raises(ValueError, match=r"block_n.* got 100003"):
        bindings.plan(*shape, block_n=100_003)
    with pytest.raises(ValueError, match=r"kernel must be .* got nothing"):
        bindings.plan(*shape, kernel="nothing")
    with pytest.raises(ValueError, match=r"stages must be >= 0, got -1"):
        bindings.plan(*shape, stages=-1)
    with pytest.raises(TypeError, match="unknown keyword argument tile"):
        bindings.plan(*shape, tile=3)
    with pytest.raises(TypeError, match="splits cannot be 'many'"):
        bindings.plan(*shape, splits="many")


def test_splits_are_for_kernels_that_have_them(bindings):
    """Parts of V, or the clusters of a persistent grid; elsewhere more than one is refused, not passed over."""
    for op, kernel in (("logit_statistics", "vocab_pass_sm90"), ("sample_tokens", "vocab_pass_sm90")):
        with pytest.raises(ValueError, match=rf"splits must be 1 for {kernel}, got 3"):
            bindings.plan(op, 8, 152_064, kernel=kernel, splits=3)
        assert bindings.plan(op, 8, 152_064, kernel=kernel, splits=1)["kernel"] == kernel
        assert bindings.plan(op, 8, 152_064, splits=3)["kernel"] == "vocab_pass"
    for op in ("commit_", "gumbel_perturb", "logit_statistics_backward"):
        with pytest.raises(ValueError, match=r"splits must be 1 for \w+, got 2"):
            bindings.plan(op, 8, 152_064, splits=2)
    for op in ("adam_step_", "sgd_step_", "logit_gradient"):
        plan = bindings.plan(op, 64, 152_064, 2048, splits=7)
        assert plan["grid"] == 7 * plan["cluster"][0] * plan["cluster"][1]
        for other in ({"arch": 80}, {"embedding_dtype": "float32"}):
            with pytest.raises(ValueError, match=r"splits must be 1 for logit_update_\w+, got 7"):
                bindings.plan(op, 64, 152_064, 2048, splits=7, **other)


MATMUL = [("relaxed_embedding", "relaxed_embedding"), ("adam_step_", "logit_update")]


@pytest.mark.parametrize(("op", "family"), MATMUL)
def test_many_rows_of_fp32_embeddings_are_the_callers_product(bindings, op, family):
    """From 128 rows on, in chunks of the vocabulary that take 64 MiB at most; either kernel can be asked for."""
    fp32 = {"logits_dtype": "bfloat16", "embedding_dtype": "float32"}
    vocab, dim = 152_064, 2048
    for n in (1, 64, 127):
        assert bindings.plan(op, n, vocab, dim, **fp32)["kernel"] == f"{family}_simt"
        assert bindings.plan(op, n, vocab, dim, **fp32, kernel=f"{family}_matmul")["kernel"] == f"{family}_matmul"
    for n in (128, 200, 512, 2048):
        plan = bindings.plan(op, n, vocab, dim, **fp32)
        ids = plan["tile"][1]
        assert plan["kernel"] == f"{family}_matmul"
        assert 32 << 20 < n * ids * 4 <= 64 << 20
        rest = plan["workspace_bytes"] - n * ids * 4  # partial sums, or the gathered gradient and inner products
        assert n * dim * 4 <= rest <= n * (dim + 8) * 4 + 128
        assert bindings.plan(op, n, vocab, dim, **fp32, kernel=f"{family}_simt")["kernel"] == f"{family}_simt"
        assert bindings.plan(op, n, vocab, dim, **fp32, block_n=1024)["tile"] == (0, 1024, 0)
    many = bindings.plan(op, 2**20, vocab, 1, **fp32)  # a chunk is never less than 256 ids
    assert many["tile"] == (0, 256, 0)


@pytest.mark.parametrize(("op", "family"), MATMUL)
def test_what_the_callers_product_has_no_choice_of(bindings, op, family):
    shape = (op, 128, 1000, 64, "float32", "float32")
    with pytest.raises(ValueError, match=rf"block_n must be a multiple of 4 for {family}_matmul, got 6"):
        bindings.plan(*shape, block_n=6)
    for field, own in (("splits", 1), ("block_m", 0), ("block_k", 0), ("stages", 0), ("cluster_m", 1)):
        with pytest.raises(ValueError, match=rf"{field} must be {own} for {family}_matmul, got 3"):
            bindings.plan(*shape, **{field: 3})
    with pytest.raises(ValueError, match=rf"kernel must be .* got {family}_matmul"):
        bindings.plan(op, 128, 1000, 64, kernel=f"{family}_matmul")


def test_hopper_kernels_need_hopper(bindings):
    for op in OPERATORS:
        shape = (op, 64, 152_064, 2048)
        kernel = bindings.plan(*shape)["kernel"]
        if kernel.endswith("_sm90"):
            with pytest.raises(ValueError, match=f"kernel must be .* got {kernel}"):
                bindings.plan(*shape, arch=80, kernel=kernel)


def test_a_floor_has_no_overrides(bindings):
    with pytest.raises(TypeError, match="unknown keyword argument splits"):
        bindings.floor("relaxed_embedding", 8, 1000, 64, splits=3)


PROGRAM = """
import json, sys
from dataclasses import asdict
from entrgi_ext import plans
answers = []
for arguments, options in json.loads(sys.argv[1]):
    try:
        answers.append(asdict(plans.launch_plan(*arguments, **options)))
    except ValueError as error:
        answers.append(str(error))
try:
    answers.append(plans.forced())
except ValueError as error:
    answers.append(str(error))
print(json.dumps(answers))
"""


def under(forced: str, *calls: tuple) -> list:
    """What ``launch_plan`` answers, and then ``forced``, in a process with that ENTRGI_FORCE_PLAN."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
    environment = {**os.environ, "ENTRGI_FORCE_PLAN": forced}
    return json.loads(subprocess.run(command, capture_output=True, check=True, env=environment, cwd=ROOT).stdout)


EMBEDDING = ("relaxed_embedding", 8, 152_064, 2048)


FORCED = {
    "relaxed_embedding": {"kernel": "relaxed_embedding_sm80", "splits": 3},
    "gumbel_perturb": {"block_n": 2048},
}


@pytest.mark.parametrize(
    "spelled",
    [
        " relaxed_embedding : kernel=relaxed_embedding_sm80 , splits = 3;gumbel_perturb:block_n=2048",
        " " + json.dumps(FORCED),
    ],
)
def test_forced_plans(bindings, spelled):
    calls = [(EMBEDDING, {}), (EMBEDDING, {"splits": 5}), (("sample_tokens", 8, 152_064), {})]
    made, explicit, other, plans = under(spelled, *calls)
    assert (made["kernel"], made["splits"]) == ("relaxed_embedding_sm80", 3)
    assert (explicit["kernel"], explicit["splits"]) == ("relaxed_embedding_sm80", 5)
    assert other == json.loads(json.dumps(bindings.plan("sample_tokens", 8, 152_064)))
    assert plans == FORCED
    assert under(" ")[0] == {}


def test_plans_forced_from_python():
    plans = pytest.importorskip("entrgi_ext.plans")
    own = plans.launch_plan(*EMBEDDING, arch=90)
    try:
        plans.force(FORCED)
        assert plans.launch_plan(*EMBEDDING, arch=90).kernel == "relaxed_embedding_sm80"
        assert plans.forced() == FORCED
        with pytest.raises(ValueError, match=r"force: expected an operator \(.*\), got 'matmul'"):
            plans.force({"matmul": {}})
        assert plans.forced() == FORCED  # what is refused changes nothing
        plans.force({"commit_": {"splits": 1}})  # in place of what was forced before
        assert plans.launch_plan(*EMBEDDING, arch=90) == own
    finally:
        plans.force({})
    assert plans.forced() == {}


def test_forced_plans_that_cannot_be_followed():
    for forced, field in (("gumbel_perturb:stages=3", "stages"), ("gumbel_perturb:kernel=commit", "kernel")):
        refused, fine, _ = under(forced, (("gumbel_perturb", 8, 1000), {}), (EMBEDDING, {}))
        assert refused.startswith(f"{field} must be ")
        assert refused.endswith("(ENTRGI_FORCE_PLAN or plans.force forces a plan of gumbel_perturb)")
        assert fine["kernel"].startswith("relaxed_embedding")


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("relaxed", "expected operator:field=value,..., got 'relaxed'"),
        ("sample_tokens:splits=1;", "expected operator:field=value,..., got ''"),
        ("matmul:splits=1", "expected an operator (logit_statistics, "),
        ("sample_tokens:", "expected field=value, got ''"),
        ("sample_tokens:splits", "expected field=value, got 'splits'"),
        ("sample_tokens:tiles=1", "cluster_m, cluster_n), got 'tiles'"),
        ("sample_tokens:kernel=fast", "logit_update_matmul, commit), got 'fast'"),
        ("sample_tokens:kernel=", "logit_update_matmul, commit), got ''"),
        ("sample_tokens:splits=x", "expected a whole number >= 1 for splits, got 'x'"),
        ("sample_tokens:splits=2.5", "expected a whole number >= 1 for splits, got '2.5'"),
        ("sample_tokens:splits=0", "expected a whole number >= 1 for splits, got '0'"),
        ("sample_tokens:block_m=4294967297", "expected a whole number >= 1 for block_m, got '4294967297'"),
        ("sample_tokens:splits=1,splits=1", "expected the field splits once, got 'splits=1,splits=1'"),
        ("sample_tokens:splits=1;sample_tokens:stages=1", "expected the operator sample_tokens once, got"),
        ('{"sample_tokens": ', "expected JSON (Expecting value: line 1"),
        ('{"a":' * 20_000, "expected JSON (maximum recursion depth"),
        ('{"sample_tokens": {"splits": 2}, "sample_tokens": {}}', "expected every operator and field once, got"),
        ('{"sample_tokens": {"splits": 2, "splits": 3}}', "expected every operator and field once, got"),
        ('{"sample_tokens": 3}', "expected fields and values of sample_tokens, got 3"),
        ('{"sample_tokens": {"tiles": 1}}', "cluster_m, cluster_n), got 'tiles'"),
        ('{"sample_tokens": {"splits": true}}', "expected a whole number >= 1 for splits, got 'True'"),
        ("\udcff", "expected UTF-8 text, got"),
    ],
    ids=lambda text: text[:60],
)
def test_bad_forced_plans_are_refused_at_every_call(forced, message):
    answers = under(forced, (EMBEDDING, {}), (EMBEDDING, {}))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].startswith("ENTRGI_FORCE_PLAN: expected ")
    assert message in answers[0]


def test_raw_launchers_follow_forced_plans():
    """What was forced is launched; what cannot be had raises, in the launchers' process."""
    try:
        command, environment = simulator_command()
        built = build_bindings("compute_80")
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    kernels, logits = RawKernels(built, command, environment), torch.randn(2, 1000)
    kernels.forced = {"logit_statistics": {"splits": 3}, "gumbel_perturb": {"stages": 2}}
    kernels.logit_statistics(logits, 1.0)
    assert kernels.plan["splits"] == 3
    kernels.logit_statistics(logits, 1.0, splits=5)
    assert kernels.plan["splits"] == 5
    with pytest.raises(RuntimeError, match=r"stages must be .* got 2 \(ENTRGI_FORCE_PLAN"):
        kernels.gumbel_perturb(logits, torch.zeros(2, 4, dtype=torch.long), 1.0)
    kernels.close()


# --- requests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["compute_90a", "compute_80"])
def counting(request, tmp_path_factory):
    """The raw launchers in the simulator, and the file of its counts."""
    torch.set_num_threads(1)
    counts = tmp_path_factory.mktemp("counts") / "launches.jsonl"
    try:
        command, environment = simulator_command()
        kernels = RawKernels(build_bindings(request.param), [*command, "--stats", str(counts)], environment)
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    yield kernels, counts
    kernels.close()


@pytest.mark.parametrize("vocab", [4096, 5001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise_requests_are_those_of_the_simulator(bindings, counting, vocab, dtype):
    kernels, counts = counting
    logits, vector = torch.randn(3, vocab).to(dtype), torch.ones(3)
    already = len(counts.read_text().splitlines()) if counts.exists() else 0
    kernels.gumbel_perturb(logits, torch.randint(0, 99, (3, 4)), 1.0)
    kernels.logit_statistics_backward((vector,) * 3, logits, vector, vector, vector, vector, 0.7)
    launches = [json.loads(line) for line in counts.read_text().splitlines()[already:]]
    for op, launch in zip(("gumbel_perturb", "logit_statistics_backward"), launches, strict=True):
        asked = bindings.requests(op, 3, vocab, 1, NAMES[dtype])
        assert asked["load_bytes"] == pytest.approx(launch["global_load_bytes"], rel=0.02)
        assert asked["store_bytes"] == pytest.approx(launch["global_store_bytes"], rel=0.001)
        assert asked["bulk_bytes"] == asked["flops"] == 0


def test_requests_come_with_their_plan(bindings):
    shape = ("gumbel_perturb", 64, 152_064, 1)
    assert bindings.requests(*shape, arch=80, num_sms=108)["plan"] == bindings.plan(*shape, arch=80, num_sms=108)
    assert bindings.requests("commit_", 64, 1)["load_bytes"] == 0  # its rows per trajectory are data


# --- the module -------------------------------------------------------------------------------------------------


def test_architectures(bindings):
    assert bindings.has_cuda == bool(bindings.compiled_architectures())
    assert bindings.has_cuda or bindings.device() is None


def test_bindings_import_without_torch(bindings):
    program = "import importlib.util, sys; s = importlib.util.spec_from_file_location('_bindings', sys.argv[1]); "
    program += "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); "
    program += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, bindings.__file__], check=False).returncode == 0
