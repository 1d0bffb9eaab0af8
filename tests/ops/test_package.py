"""What is installed: declared dependencies, licences of what is compiled in, no traces of the building machine."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import entrgi_ext

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted(Path(entrgi_ext.__file__).parent.glob("*.so"))

in_a_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


# ---- dependencies --------------------------------------------------------------------------------------------


def imported_modules() -> dict[str, str]:
    """Top-level names imported anywhere in the packages, each with one place; literal import_module calls, too."""
    found = {}
    for path in [*ROOT.glob("python/entrgi/**/*.py"), *ROOT.glob("entrgi_ext/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
                names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            for name in names:
                found.setdefault(name.split(".")[0], f"{path.relative_to(ROOT)}:{node.lineno}")
    return {name: place for name, place in found.items() if name and name not in sys.stdlib_module_names}


def declared(text: str, name: str) -> set[str]:
    """The distributions of a list of pyproject.toml (read without a parser, which Python 3.10 lacks)."""
    (body,) = re.findall(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    return {re.split(r"[<>=!\[; ]", item)[0].lower().replace("_", "-") for item in re.findall(r'"([^"]+)"', body)}


@in_a_checkout
def test_what_is_imported_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    wanted = declared(text, "dependencies") | declared(text, "plot") | declared(text, "lora")
    distributions = importlib.metadata.packages_distributions()
    for module, place in imported_modules().items():
        if module in ("entrgi", "entrgi_ext"):
            continue
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert names & wanted, f"{place} imports {module}, which pyproject.toml does not declare"


@in_a_checkout
def test_what_is_declared_is_imported():
    text = (ROOT / "pyproject.toml").read_text()
    imported = {module.lower().replace("_", "-") for module in imported_modules()}
    assert declared(text, "dependencies") <= imported
    assert declared(text, "plot") | declared(text, "lora") <= imported


# ---- licences ------------------------------------------------------------------------------------------------


@in_a_checkout
@pytest.mark.parametrize("with_kernels", [False, True])
def test_wheels_hold_the_notices_of_what_is_compiled_in(tmp_path, with_kernels):
    """CUTLASS's where there are kernels, pybind11's always; built around empty libraries."""
    pytest.importorskip("setuptools", "77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "licenses", tmp_path / "licenses")
    for package in ("python/entrgi", "entrgi_ext"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    built = tmp_path / "built" / "entrgi_ext"
    built.mkdir(parents=True)
    for library in ("cpu", "kernels", "cuda") if with_kernels else ("cpu",):
        (built / f"libentrgi_{library}.so").touch()
    (tmp_path / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--skip-build", "--bdist-dir", "wheel", "-d", "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        notices = [name.rpartition("/")[2] for name in names if "/licenses/third_party/" in name]
        assert sorted(notices) == (["CUTLASS.txt", "pybind11.txt"] if with_kernels else ["pybind11.txt"])
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        for notice in notices:
            assert f"\nLicense-File: third_party/{notice}\n" in metadata
            (path,) = (name for name in names if name.endswith(f"/{notice}"))
            assert b"Redistribution and use in source and binary forms" in archive.read(path)
        assert "\nLicense-File: LICENSE\n" in metadata


@in_a_checkout
def test_the_notice_is_that_of_the_headers_in_use():
    try:
        files = importlib.metadata.files("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cutlass is not installed")
    (licence,) = (file for file in files if file.name == "LICENSE.txt")
    assert (ROOT / "licenses" / "CUTLASS.txt").read_text() == licence.read_text()


# ---- paths ---------------------------------------------------------------------------------------------------

# The source tree; the environment (torch's and CUTLASS's headers).
TRACES = [str(ROOT).encode(), sys.prefix.encode(), b"site-packages", str(Path(torch.__file__).parent).encode()]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_hold_no_paths_of_the_building_machine(library):
    data = library.read_bytes()
    for trace in TRACES:
        assert trace not in data, f"{trace} at {data.find(trace)}"


def disassembler() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    beside_triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside_triton) if beside_triton.exists() else None


def test_compressed_kernels_hold_none_either(tmp_path):
    library = Path(entrgi_ext.__file__).parent / "libentrgi_kernels.so"
    if not library.exists() or disassembler() is None:
        pytest.skip("needs the CUDA kernels and cuobjdump")
    for what in ("-xelf", "-xptx"):
        subprocess.run([disassembler(), what, "all", library], cwd=tmp_path, check=True, capture_output=True)
    extracted = list(tmp_path.iterdir())
    assert extracted
    for path in extracted:
        data = path.read_bytes()
        assert not any(trace in data for trace in TRACES), path.name
