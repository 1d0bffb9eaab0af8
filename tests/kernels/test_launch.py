"""The one way to launch: what is asked of the runtime how often, and what is left behind. In the simulator, with the
runtime's questions counted by a program of its own."""

import os
import subprocess
from collections import defaultdict

import pytest

from support.build_simulated import ROOT, SOURCES, Unavailable, find_nvcc, simulator_command
from support.compiled import compiled_once

pytestmark = pytest.mark.simulator
SUCCESS, INVALID_CONFIGURATION = 0, 9


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs the program for an environment; what it printed, by name."""
    try:
        command, environment = simulator_command()
        nvcc = find_nvcc()
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    sources = [ROOT / "tests" / "kernels" / name for name in ("launch_program.cu", "launch_attributes.cpp")]
    sources += [SOURCES / "kernels" / name for name in ("device.cu", "launch.cpp")]
    flags = ["-O1", "-std=c++20", "--no-compress", "-cudart", "shared", "-gencode", "arch=compute_90a,code=compute_90a"]
    flags += [f"-I{SOURCES}", '-DENTRGI_CUDA_ARCHITECTURES="compute_90a"', "-ldl"]

    def build(folder):
        subprocess.run([nvcc, *flags, *sources, "-o", folder / "program"], check=True)

    target = compiled_once(tmp_path_factory, "launch", build) / "program"

    def run(**more: str) -> dict[str, list[int]]:
        output = subprocess.run(
            [*command, target], env={**os.environ, **environment, **more}, capture_output=True, text=True, check=True
        ).stdout
        printed = defaultdict(list)
        for line in output.splitlines():
            name, value = line.split()
            printed[name].append(int(value))
        return printed

    return run


def test_attributes_are_set_once(program):
    printed = program()
    assert printed["launch"] == 5 * [SUCCESS]
    assert printed["sum"] == [5 * 2 * 3]
    assert printed["attributes_set_by_launches"] == [2]  # the memory, and what to carve out for it


def test_warm_up_leaves_nothing_to_set(program):
    printed = program(WARM="1")
    assert printed["warm_up"] == [SUCCESS]
    assert printed["attributes_set_by_launches"] == [0]


def test_grids_must_fit(program):
    printed = program()
    assert printed["no_ctas"] == printed["too_many_ctas"] == [INVALID_CONFIGURATION]


def test_no_error_is_left_behind(program):
    printed = program(EIGHTS="0")
    assert printed["too_much_memory"] == [1]
    assert printed["left_behind"] == [SUCCESS, SUCCESS, SUCCESS]


def test_the_device_is_asked_once(program):
    printed = program(FOURS="31")
    assert printed["device"] == 3 * [SUCCESS]
    assert printed["clusters_asked"] == [3]  # for 2, 4 and 8
    assert (printed["arch"], printed["clusters_of_4"], printed["clusters_of_8"]) == ([90], [31], [16])


def test_without_clusters_of_eight_a_device_is_an_older_one(program):
    printed = program(EIGHTS="0")
    assert printed["device"] == 3 * [SUCCESS]
    assert printed["arch"] == [80]


def test_kernels_in_clusters_need_their_shared_memory(program):
    """A GPU such as sm_120, with clusters and 99 KB: it must not be asked for what it cannot give."""
    printed = program(SHARED=str(99 * 1024))
    assert printed["device"] == 3 * [SUCCESS]
    assert printed["arch"] == [80]
    assert printed["clusters_asked"] == [0]
