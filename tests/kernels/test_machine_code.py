"""The machine code of the built library (registers, tensor-core, copy and local-memory instructions), and the build's
own refusals, on kernels that deserve them."""

import importlib.util
import subprocess
import sys

import pytest

from support.build_simulated import ROOT
from support.compiled import compile_command, compiled_once


def _load_tool():
    spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "tools" / "ptxas_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = _load_tool()

FIXTURE = r"""
#include "kernels/detail/hopper.cuh"

namespace entrgi {
namespace {
using Product = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,
                                                              cute::SM90::GMMA::Major::K>;

template <typename T>
__global__ void __launch_bounds__(kWarpgroup, 4) good_sm90_kernel(const __grid_constant__ CUtensorMap map, float* out) {
#ifdef ENTRGI_HOPPER
  __shared__ alignas(1024) char tile[16384];
  __shared__ alignas(8) char barrier_storage[sizeof(Barrier)];
  Barrier& barrier = *reinterpret_cast<Barrier*>(barrier_storage);
  if (threadIdx.x == 0) {
    barrier.init(1);
    barrier.arrive_and_expect_tx(16384);
    copy_box(map, barrier, tile, 0, 0, kKeepInL2);
  }
  __syncthreads();
  cutlass::arch::warpgroup_reg_alloc<160>();
  barrier.wait(0);
  float d[32] = {};
  const uint64_t a = operand(cute::cast_smem_ptr_to_uint(tile), 16, 1024);
  cute::warpgroup_arrive();
  wgmma<Product>(d, a, a, true);
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  for (int i = 0; i < 32; ++i) out[i * kWarpgroup + threadIdx.x] = d[i];
#endif
}

template <typename T, int kLength>
__global__ void lazy_sm90_kernel(T* out) {  // a Hopper kernel in name only, and everywhere
  out[threadIdx.x] += kLength;
}

__global__ void local_memory_kernel(int* out, int n) {
  int values[64];
  for (int i = 0; i < 64; ++i) values[i] = out[i];
  for (int i = 0; i < n; ++i) values[out[i] % 64] += i;
  for (int i = 0; i < 64; ++i) out[i] = values[(i + n) % 64];
}
}  // namespace

const void* instantiated[] = {reinterpret_cast<const void*>(&good_sm90_kernel<__nv_bfloat16>),
                              reinterpret_cast<const void*>(&lazy_sm90_kernel<float, 128>),
                              reinterpret_cast<const void*>(&local_memory_kernel)};

#ifdef SERIALISED
__global__ void serialised_kernel(float* out, uint64_t a, int n) {
#ifdef ENTRGI_HOPPER
  float d[32] = {};
  for (int i = 0; i < n; ++i) {
    cute::warpgroup_arrive();
    wgmma<Product>(d, a + i, a, true);
    cute::warpgroup_commit_batch();
    d[0] += out[i];  // before the wait
    cute::warpgroup_wait<0>();
  }
  for (int i = 0; i < 32; ++i) out[i * kWarpgroup + threadIdx.x] = d[i];
#endif
}
#endif
}  // namespace entrgi
"""


def disassembled(path) -> list:
    try:
        return tool.read(path)
    except tool.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The functions of FIXTURE by name and architecture."""

    def build(folder):
        (folder / "fixture.cu").write_text(FIXTURE)
        architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
        command = compile_command(
            *architectures, "-lineinfo", "-c", "-o", str(folder / "fixture.o"), str(folder / "fixture.cu")
        )
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout

    folder = compiled_once(tmp_path_factory, "machine_code", build)
    return {(f.name, f.arch): f for f in disassembled(folder / "fixture.o")}


def test_instructions_are_counted(fixture) -> None:
    assert len(fixture) == 6
    good = fixture["good_sm90<bf16>", "sm_90a"]
    assert good.source == "fixture.cu"
    assert good.counts["wgmma"] == 1
    assert good.counts["TMA"] == 1
    assert good.counts["mbarrier"] >= 3
    assert good.counts["local"] == 0
    assert 32 < good.registers <= 128
    assert good.moved == (160,)
    assert good.shared >= 16384 + 8
    assert fixture["good_sm90<bf16>", "sm_80"].instructions <= tool.EMPTY_BODY
    assert fixture["local_memory", "sm_80"].counts["local"] > 0


def test_problems_are_named(fixture) -> None:
    found = "\n".join(tool.problems(fixture.values()))
    assert "good_sm90" not in found
    for name in ("wgmma", "TMA", "mbarrier"):
        assert f"lazy_sm90<fp32, 128> (fixture.cu, sm_90a) has no {name} instruction" in found
    assert "lazy_sm90<fp32, 128> (fixture.cu, sm_80) left" in found
    for arch in ("sm_80", "sm_90a"):
        assert f"local_memory (fixture.cu, {arch}) uses local memory" in found


@pytest.mark.parametrize("strict", [True, False])
def test_serialised_wgmma_fails_our_build_and_warns_elsewhere(tmp_path, strict) -> None:
    (tmp_path / "fixture.cu").write_text(FIXTURE)
    options = ("-gencode=arch=compute_90a,code=sm_90a", "-DSERIALISED", "-cubin", "-o")
    command = compile_command(*options, strict=strict)
    command += [str(tmp_path / "fixture.cubin"), str(tmp_path / "fixture.cu")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == int(strict)
    assert f"{'error' if strict else 'warning'}: ptxas lost performance" in result.stdout
    assert "wgmma.mma_async instructions are serialized" in result.stdout


def test_report_is_reproducible(fixture) -> None:
    functions = list(fixture.values())
    text = tool.report(functions, "13.0", ["## Launches", ""])
    assert text == tool.report(functions, "13.0", ["## Launches", ""])
    assert "`lazy_sm90<fp32, 128>` | sm_80" in text
    assert "`good_sm90<bf16>` | sm_80" not in text
    assert "Empty on sm_80: 1 kernels." in text
    assert str(ROOT) not in text


@pytest.fixture(scope="module")
def built() -> list:
    return disassembled(tool.LIBRARY)


@pytest.mark.slow  # all of the library's code is disassembled
def test_built_kernels_are_what_they_should_be(built) -> None:
    assert tool.problems(built) == []
    kernels = {function.kernel for function in built}
    assert {"relaxed_embedding_sm80", "logit_update_sm80"} <= kernels
    assert {function.arch for function in built} == {"sm_80", "sm_90a"}


@pytest.mark.slow  # all of the library's code is disassembled
def test_uniform_values_are_known_to_be_uniform(built) -> None:
    """The update's loop over d was 107 instructions with 32 moves to uniform registers before."""
    update = [f for f in built if f.kernel == "logit_update_sm90" and f.arch == "sm_90a"]
    assert update
    assert max(f.product_loop for f in update) <= 70
    assert max(f.counts["R2UR"] for f in update) <= 30
    assert max(f.counts["BRA.DIV"] for f in update) == 0


@pytest.mark.slow  # all of the library's code is disassembled
def test_names_do_not_depend_on_the_build(built) -> None:
    assert not [f.name for f in built if "_GLOBAL__N" in f.name or "entrgi" in f.name or f.name.startswith("_Z")]
