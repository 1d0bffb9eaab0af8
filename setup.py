"""Builds the compiled half of entrgi with CMake and Ninja; everything else is in pyproject.toml.

Environment: ``ENTRGI_CUDA=0|1|auto`` (default auto: where nvcc and a CUDA build of torch are found),
``MAX_JOBS`` (parallel compilations; default: all cores), ``ENTRGI_WERROR=1`` (warnings are errors; default: 0).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def remove_libraries(folder: Path) -> None:
    """Delete what an earlier build left: without CUDA now, its CUDA operators must not stay behind."""
    for library in folder.glob("lib*.so"):
        library.unlink()


class CMakeBuild(build_ext):
    """One CMake run produces all shared libraries of ``entrgi_ext``."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DENTRGI_OUTPUT={output}",
            f"-DENTRGI_CUDA={os.environ.get('ENTRGI_CUDA', 'auto')}",
            f"-DENTRGI_WERROR={os.environ.get('ENTRGI_WERROR', '0')}",
            f"-DENTRGI_LAUNCHERS={int(self.editable_mode)}",  # a source tree has the tests
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        remove_libraries(output)
        start = time.perf_counter()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        print(f"entrgi: compiled in {time.perf_counter() - start:.0f} s with {jobs} jobs")

    def copy_extensions_to_source(self) -> None:
        """An editable installation needs the operator libraries beside the bindings, too."""
        super().copy_extensions_to_source()
        remove_libraries(ROOT / "entrgi_ext")
        for library in Path(self.build_lib, "entrgi_ext").glob("lib*.so"):
            self.copy_file(str(library), str(ROOT / "entrgi_ext" / library.name))


class WheelWithNotices(bdist_wheel):
    """The licences of what is compiled into the libraries, which they want beside binaries."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        add_notices(Path(distinfo_path), with_kernels=any(Path(self.bdist_dir).glob("entrgi_ext/libentrgi_kernels.so")))


def add_notices(dist_info: Path, with_kernels: bool) -> None:
    names = ["pybind11.txt", *(["CUTLASS.txt"] if with_kernels else [])]
    folder = dist_info / "licenses" / "third_party"
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(ROOT / "licenses" / name, folder / name)
    metadata = dist_info / "METADATA"
    fields = "".join(f"License-File: third_party/{name}\n" for name in names)
    head, separator, rest = metadata.read_text().partition("License-File: LICENSE\n")
    metadata.write_text(f"{head}{separator}{fields}{rest}")


setup(
    packages=["entrgi_ext", "entrgi", *(f"entrgi.{name}" for name in find_packages(str(ROOT / "python" / "entrgi")))],
    package_dir={"entrgi_ext": "entrgi_ext", "entrgi": "python/entrgi"},
    package_data={
        "entrgi": ["py.typed", "*.pyi"],
        "entrgi.demo": ["*.json", "*.md", "denoiser/*", "reward/*"],
        "entrgi.trace": ["viewer/*"],
        "entrgi_ext": ["py.typed", "*.pyi"],
    },
    ext_modules=[Extension("entrgi_ext._bindings", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": WheelWithNotices},
)
