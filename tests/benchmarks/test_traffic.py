"""What the CUDA kernels ask of the memory system, counted in a simulator: ``benchmarks/simulated.py`` on few shapes."""

import copy
import csv
import sys

import pytest

from support.build_simulated import ROOT, Unavailable

sys.path.insert(0, str(ROOT / "benchmarks"))
from simulated_traffic import checks, counting, tables
from simulated_traffic.shapes import FP16, FP32, MIXED, Shape, adam
from simulated_traffic.shapes import SHAPES as ALL_SHAPES

SHAPES = [
    Shape("logit_statistics", 1, 61_440),
    Shape("logit_statistics", 150, 4096),
    Shape("logit_statistics", 8, 20_001, **MIXED),
    Shape("sample_tokens", 8, 16_384),
    Shape("sample_tokens", 4, 20_000, **FP16),
    Shape("gumbel_perturb", 4, 20_000),
    Shape("logit_statistics_backward", 4, 20_000, **FP16),
    Shape("relaxed_embedding", 16, 8192, 256),
    Shape("relaxed_embedding", 130, 4096, 256),
    Shape("relaxed_embedding", 17, 4095, 264),
    Shape("relaxed_embedding", 16, 4096, 256, **FP32),
    Shape("logit_gradient", 64, 4096, 256),
    Shape("relaxed_embedding", 16, 4096, 256, **FP16),
    adam(16, 8192, 256),
    adam(16, 4096, 256, **FP16),
    adam(130, 4096, 256, step=1),
    adam(130, 4096, 256, last=True),
    adam(17, 4095, 264),
    adam(16, 4096, 256, **MIXED),
    Shape("sgd_step_", 16, 4096, 256),
]


@pytest.fixture(scope="module", params=counting.BUILDS)
def counted(request):
    """Every shape, run on one build."""
    try:
        simulator = counting.Simulator(request.param)
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    results = [simulator.count(shape) for shape in SHAPES]
    simulator.ask(results)
    simulator.close()
    return {str(each.shape): each for each in results}


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_issued_is_what_is_planned(counted, shape):
    each = counted[str(shape)]
    if (shape.operator, each.plan["kernel"]) in checks.DEPENDS_ON_DATA:
        pytest.skip("what the filter reads again depends on the data")
    assert each.planned["plan"] == each.plan
    assert checks.against_the_plan(each) == []


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_are_touched_once(counted, shape):
    assert checks.once(counted[str(shape)]) == []


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accesses_suit_the_hardware(counted, shape):
    assert checks.hardware(counted[str(shape)]) == []


LAUNCH = {
    "kernel": "_ZN6entrgi12_GLOBAL__N_124logit_update_sm90_kernelI13__nv_bfloat16EEvi",
    "grid": [4, 1, 1],
    "warp_inst": {"alu_int": 1000},
    "global_load_bytes": 600_000,
    "global_load_sectors": 18_750,
    "global_load_efficiency": 1.0,
    "global_store_bytes": 655_360,
    "global_store_sectors": 20_480,
    "global_store_efficiency": 1.0,
    "cp_async_bytes": 0,
    "cp_async_sectors": 0,
    "tma_load_bytes": 4_300_000,
    "tma_store_bytes": 0,
    "shared_load_wavefronts": 1000,
    "shared_load_conflict_degree": 1.0,
    "shared_store_wavefronts": 1000,
    "shared_store_conflict_degree": 1.0,
    "ldmatrix_conflict_degree": 1.0,
    "mma_flop": 0,
    "ex2_count": 65_536,
    "lane_instructions": 6_553_600,
    "wgmma_flop": 268_435_456,
}
PLANNED = {"load_bytes": 600_000, "bulk_bytes": 4_300_000, "store_bytes": 655_360, "flops": 268_435_456}


def made_up(**changes):
    """An Adam step, N = 8, V = 8192, d = 256, all as it should be."""
    plan = {"kernel": "logit_update_sm90", "tile": (64, 256, 64), "splits": 1}
    launch = {**copy.deepcopy(LAUNCH), **changes}
    return counting.Counted(adam(8, 8192, 256), "compute_90a", plan, [launch], PLANNED, {"bytes": 1, "flops": 1})


def test_nothing_is_said_where_all_is_well():
    assert checks.complaints(made_up()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tma_load_bytes": 4_400_000}, "bulk_bytes: issued 4400000, planned 4300000"),
        ({"wgmma_flop": 300_000_000}, "flops: issued"),
        ({"tma_load_bytes": 8_600_000}, "reads 9200000 bytes"),
        ({"global_store_bytes": 700_000}, "writes 700000 bytes"),
        ({"global_store_efficiency": 0.5}, "of the touched sectors' bytes"),
        ({"shared_load_conflict_degree": 4.0}, "4.0-way bank conflicts of shared_load"),
        ({"ldmatrix_conflict_degree": 8.0}, "8.0-way bank conflicts of ldmatrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_fault_is_found(changes, words):
    found = checks.complaints(made_up(**changes))
    assert any(words in complaint for complaint in found), found


def test_exemptions_have_limits():
    """A merge's conflicts pass in the kernel that is listed, up to its wavefronts; a re-read of a row does not."""
    shape, plan = Shape("logit_statistics", 4, 16_384), {"kernel": "vocab_pass", "tile": (0, 0, 0), "splits": 1}
    changes = {"kernel": "_ZN6entrgi10row_kernelEv", "shared_load_conflict_degree": 4.0, "wgmma_flop": 0}

    def found(**more) -> list[str]:
        return checks.hardware(counting.Counted(shape, "compute_80", plan, [{**LAUNCH, **changes, **more}]))

    assert found(shared_load_wavefronts=4 * 512) == []
    assert "4.0-way bank conflicts of shared_load" in found(shared_load_wavefronts=4 * 513)[0]
    assert "4.0-way bank conflicts of shared_load" in found(kernel="_ZN6entrgi5otherEv")[0]
    low = {"global_load_sectors": 10**7, "shared_load_wavefronts": 0}
    assert found(**low, global_load_efficiency=0.945) == []
    assert "of the touched sectors' bytes" in found(**low, global_load_efficiency=0.9)[0]


def test_a_draw_that_reads_its_row_twice_is_found():
    shape = Shape("sample_tokens", 8, 61_440)
    plan = {"kernel": "vocab_pass_sm90", "tile": (0, 0, 0), "splits": 1}
    for times, words in ((1, 0), (2, 1)):
        launch = {**LAUNCH, "global_load_bytes": 8192, "tma_load_bytes": times * 8 * 61_440 * 2}
        assert len(checks.once(counting.Counted(shape, "compute_90a", plan, [launch]))) == words


def test_the_committed_table_is_of_the_plans_kernels():
    """``make bench-simulated`` was run since the plan of a shape last took another kernel."""
    _bindings = pytest.importorskip("entrgi_ext._bindings")
    with (ROOT / "benchmarks" / "results" / "simulated.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["build"] == "compute_90a" and row["kernel"] == "all"]
    measured = {tuple(row[name] for name in ("operator", "N", "V", "d", "z", "E", "plan")) for row in rows}
    for s in ALL_SHAPES:
        aligned = {} if s.aligned else {"logits_aligned": False}
        plan = _bindings.plan(s.operator, s.N, s.V, s.d, s.logits, s.embedding, arch=90, num_sms=132, **aligned)
        row = *map(str, (s.operator, s.N, s.V, s.d, s.logits, s.embedding)), tables.plan_text(plan)
        assert row in measured, f"{row} is not in benchmarks/results/simulated.csv: run make bench-simulated"


def test_a_kernel_is_called_by_its_own_name():
    assert checks.kernel_name(LAUNCH["kernel"]) == "logit_update_sm90_kernel"


def test_the_table_has_a_line_for_each_kernel_and_their_sum():
    rows = tables.rows(made_up())
    assert [row["kernel"] for row in rows] == ["logit_update_sm90_kernel", "all"]
    assert rows[1]["planned_flops"] == PLANNED["flops"]
    assert "| 0.0% |" in tables.markdown(rows)
