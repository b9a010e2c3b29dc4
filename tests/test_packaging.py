"""Source distribution, wheel and editable installation, with and without a compiler. One native build is shared."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import graphwright

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOUSES = ["backends", "frontends", "ir", "passes"]
PURE_MESSAGE = "this is the pure-Python installation"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ["c++", "g++", "clang++"])), reason="needs a C++ compiler, to build the extension"
)


@dataclass(frozen=True)
class Built:
    """A file made by the build backend, what the build printed, and the folder it was made in."""

    file: Path
    output: str
    source: Path


def run(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; stdout and stderr together in ``stdout``."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("GRAPHWRIGHT_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**outer, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(kind: str, source: Path, out: Path, **environment: str) -> Built:
    """Call the build backend as pip does; ``kind`` is ``sdist``, ``wheel`` or ``editable``."""
    code = f"from scikit_build_core.build import build_{kind} as b; print('made', b({str(out)!r}))"
    done = run(code, cwd=source, **environment)
    assert done.returncode == 0, done.stdout
    return Built(out / done.stdout.rsplit("made ", 1)[1].strip(), done.stdout, source)


def in_installation(site: Path, code: str) -> str:
    """What ``code`` prints where graphwright is installed in ``site`` (its .pth files at work) and nowhere else.

    -S keeps away the .pth files of this environment, among them the editable graphwright that the tests run from.
    """
    libraries = sysconfig.get_paths()["purelib"]
    prologue = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({libraries!r})\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", prologue + code], cwd=site, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def unpack(wheel: Path, site: Path) -> Path:
    """Install a wheel by unpacking it, which is all that installing one of ours amounts to."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", repository, tmp_path_factory.mktemp("sdist")).file


@pytest.fixture(scope="module")
def fresh_source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Unpacks the source distribution into a new folder at each call."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("source")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        return next(folder.iterdir())

    return make


@pytest.fixture(scope="module")
def native_wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built in the clone, where set-up has left the objects: compiling them again would take a minute and a half."""
    return build("wheel", repository, tmp_path_factory.mktemp("native"), GRAPHWRIGHT_REQUIRE_NATIVE="1")


@pytest.fixture(scope="module")
def pure_wheel(fresh_source: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built where the compiler is not there."""
    return build("wheel", fresh_source(), tmp_path_factory.mktemp("pure"), CXX="/nonexistent/c++")


def expected_modules(source: Path) -> set[str]:
    """What a wheel built in ``source`` holds under graphwright/, the extension aside."""
    modules = {
        f"graphwright/{path.relative_to(source).as_posix()}"
        for house in HOUSES
        for path in (source / house).rglob("*.py*")
        if path.suffix in {".py", ".pyi"} and "_public" not in path.parts
    }
    return modules | {"graphwright/__init__.py", "graphwright/py.typed"}


def modules_in(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if name.startswith("graphwright/") and name.endswith((".py", ".pyi", ".typed"))}


# ------------------------------------------------------------------------------------------------- distributions


def test_the_sdist_holds_the_sources_and_nothing_built(sdist: Path, repository: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"pyproject.toml", "LICENSE", "README.md", "PKG-INFO", "frontends/_public/py.typed"}
    wanted |= {
        path.relative_to(repository).as_posix()
        for pattern in ("*/**/*.py", "*/**/*.pyi", "backends/cpu/csrc/**/*.*", "backends/cpu/CMakeLists.txt")
        for path in repository.glob(pattern)
        if path.relative_to(repository).parts[0] in {*HOUSES, "tests"}
    }
    assert not wanted - names
    assert not {name for name in names if re.match(r"\.venv|build/|dist/|.*\.so$|.*__pycache__", name)}


@needs_compiler
def test_the_native_wheel_maps_the_folders_and_ships_the_extension(native_wheel: Built) -> None:
    assert modules_in(native_wheel.file) == expected_modules(native_wheel.source)
    with zipfile.ZipFile(native_wheel.file) as archive:
        names = archive.namelist()
        public = native_wheel.source / "frontends" / "_public" / "__init__.py"
        assert archive.read("graphwright/__init__.py") == public.read_bytes()
        metadata = archive.read("graphwright-0.1.0.dist-info/METADATA").decode()
    extensions = [name for name in names if name.endswith((".so", ".pyd"))]
    assert len(extensions) == 1
    assert extensions[0].startswith("graphwright/backends/cpu/_native.")
    tag = native_wheel.file.name.split("-", 2)[2]
    if sys.version_info >= (3, 12):
        assert tag.startswith("cp312-abi3-")
        assert ".abi3." in extensions[0]
    else:
        assert tag.startswith(f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-")
    assert not [name for name in names if "csrc" in name or "CMake" in name or "_public" in name]
    assert "graphwright-0.1.0.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert PURE_MESSAGE not in native_wheel.output


@needs_compiler
def test_the_native_wheel_works(native_wheel: Built, tmp_path: Path) -> None:
    site = unpack(native_wheel.file, tmp_path)
    code = (
        "import graphwright, graphwright.backends.cpu as c; f = c.features(); print(graphwright.__file__, f.selected)"
    )
    file, selected = in_installation(site, code).split()
    assert Path(file) == site / "graphwright" / "__init__.py"
    assert selected != "None"


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, to list symbols")
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF object files")
def test_code_compiled_for_one_instruction_set_cannot_stand_in_elsewhere(native_wheel: Built) -> None:
    """A weak symbol is one the linker may take from any object: from one with AVX-512 code, say, for every machine."""
    objects = list((native_wheel.source / "build" / "native").rglob("graphwright_*.dir/**/*.o"))
    assert len(objects) >= 1
    for path in objects:
        listing = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r" [VWuvw] ", line)]
        assert not weak, (path.name, weak)
        assert "_GLOBAL__sub_I" not in listing, f"{path.name} runs code before main"


def test_without_a_compiler_the_wheel_is_pure_and_says_so_once(pure_wheel: Built) -> None:
    assert pure_wheel.file.name == "graphwright-0.1.0-py3-none-any.whl"
    assert modules_in(pure_wheel.file) == expected_modules(pure_wheel.source)
    assert not [name for name in zipfile.ZipFile(pure_wheel.file).namelist() if name.endswith((".so", ".pyd"))]
    assert pure_wheel.output.count(PURE_MESSAGE) == 1


def test_the_pure_wheel_works_and_reports_that_there_is_no_extension(pure_wheel: Built, tmp_path: Path) -> None:
    site = unpack(pure_wheel.file, tmp_path)
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in modules_in(pure_wheel.file)
        if name.endswith(".py") and not name.endswith("__main__.py") and "/triton/" not in name
    )
    assert len(modules) > 5
    code = f"""
import importlib, graphwright.backends.cpu as cpu
for name in {modules!r}:
    importlib.import_module(name)
print(cpu.native_status().available, cpu.features().selected, cpu.native_status().message)
"""
    answer = in_installation(site, code)
    assert answer.startswith("False None The C++ kernels are not in this installation")


def test_native_can_be_declined_and_then_no_cmake_is_asked_for(
    fresh_source: Callable[[], Path], tmp_path: Path
) -> None:
    source = fresh_source()
    wheel = build("wheel", source, tmp_path, GRAPHWRIGHT_NO_NATIVE="1")
    assert wheel.file.name == "graphwright-0.1.0-py3-none-any.whl"
    assert wheel.output.count("pure-Python installation, as asked for") == 1
    code = "from scikit_build_core.build import get_requires_for_build_wheel as g; print(g())"
    assert run(code, cwd=source, GRAPHWRIGHT_NO_NATIVE="1", PATH="/nonexistent").stdout.strip() == "[]"


def test_native_can_be_required(fresh_source: Callable[[], Path], tmp_path: Path) -> None:
    code = f"from scikit_build_core.build import build_wheel; build_wheel({str(tmp_path)!r})"
    done = run(code, cwd=fresh_source(), GRAPHWRIGHT_REQUIRE_NATIVE="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "GRAPHWRIGHT_NO_NATIVE=1" in done.stdout
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- editable installation


def test_an_editable_installation_follows_the_files(fresh_source: Callable[[], Path], tmp_path: Path) -> None:
    source = fresh_source()
    site = unpack(build("editable", source, tmp_path / "out", GRAPHWRIGHT_NO_NATIVE="1").file, tmp_path / "site")
    where = "import graphwright, graphwright.ir.errors as e; print(graphwright.__file__, e.__file__)"
    assert in_installation(site, where).split() == [
        str(source / "frontends" / "_public" / "__init__.py"),
        str(source / "ir" / "errors.py"),
    ]

    def value(module: str) -> str:
        return in_installation(site, f"import graphwright.passes.{module} as m; print(m.VALUE, m.__file__)")

    new = source / "passes" / "brand_new"
    new.with_suffix(".py").write_text("VALUE = 1\n")
    assert value("brand_new") == f"1 {new}.py"
    new.with_suffix(".py").write_text("VALUE = 22\n")
    assert value("brand_new").startswith("22 ")
    new.with_suffix(".py").unlink()
    new.mkdir()
    (new / "__init__.py").write_text("VALUE = 333\n")
    assert value("brand_new") == f"333 {new / '__init__.py'}"
    (source / "ir" / "errors.py").rename(source / "ir" / "errors_renamed.py")
    assert in_installation(site, "import graphwright.ir.errors_renamed as e; print(e.__name__)").endswith("renamed")


@needs_compiler
def test_an_editable_installation_has_the_extension(native_wheel: Built, tmp_path: Path) -> None:
    built = build("editable", native_wheel.source, tmp_path / "out", GRAPHWRIGHT_REQUIRE_NATIVE="1")
    site = unpack(built.file, tmp_path / "site")
    code = "import graphwright.backends.cpu as c; print(c.__file__, c.features().selected)"
    file, selected = in_installation(site, code).split()
    assert Path(file) == native_wheel.source / "backends" / "cpu" / "__init__.py"
    assert selected != "None"


def test_the_tests_run_against_this_repository(repository: Path) -> None:
    assert graphwright.__file__ is not None
    assert Path(graphwright.__file__).resolve() == repository / "frontends" / "_public" / "__init__.py"


# ----------------------------------------------------------------------------------------------- the public names


def test_the_lazy_table_and_the_imports_for_type_checkers_agree(repository: Path) -> None:
    tree = ast.parse((repository / "frontends" / "_public" / "__init__.py").read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        (alias.asname, node.module)
        for node in ast.walk(guarded[0])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert imported == set(graphwright._EXPORTS.items())


def test_every_public_name_can_be_had() -> None:
    for name in graphwright._EXPORTS:
        assert getattr(graphwright, name).__name__ == name
        assert name in dir(graphwright)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", graphwright.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'Quantise'"):
        getattr(graphwright, "Quantise")  # noqa: B009


def test_the_console_script_leads_to_a_function() -> None:
    (script,) = entry_points(group="console_scripts", name="graphwright")
    assert script.value == "graphwright.frontends.cli.main:main"
    assert callable(script.load())


# --------------------------------------------------------------------------------------------------- the Makefile


def test_the_makefile_agrees_with_pyproject(repository: Path, pyproject: dict[str, Any]) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for requirement in pyproject["build-system"]["requires"]:
        assert f'"{requirement}"' in makefile
    pinned = re.search(r"^TORCH +\?= torch==(\S+)$", makefile, re.MULTILINE)
    (wanted,) = (r for r in map(Requirement, pyproject["project"]["dependencies"]) if r.name == "torch")
    assert pinned is not None
    assert pinned.group(1) in wanted.specifier
    extras = re.search(r"^EXTRAS := (\S+)$", makefile, re.MULTILINE)
    assert extras is not None
    assert set(extras.group(1).split(",")) == set(pyproject["project"]["optional-dependencies"])


def test_make_help_lists_every_target(repository: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "help"], cwd=repository, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z]+) ", done.stdout, re.MULTILINE)) == {
        "help", "setup", "lint", "test", "sanitize", "kernels", "demo", "bench", "clean",
    }  # fmt: skip


def test_ci_runs_make_test(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "exec make test"


def test_the_typing_overlay_has_the_wheel_s_layout(repository: Path, pyproject: dict[str, Any], tmp_path: Path) -> None:
    done = run("import typing_overlay as o; print(o.LINKS)", cwd=repository / "scripts")
    links = ast.literal_eval(done.stdout)
    wheel = pyproject["tool"]["scikit-build"]["wheel"]
    packages = {name.removeprefix("graphwright/"): folder for name, folder in wheel["packages"].items()}
    files = {name.removeprefix("graphwright/"): source for source, name in wheel["force-include"].items()}
    assert links == packages | files
    code = f"import pathlib, typing_overlay as o; p = pathlib.Path({str(tmp_path)!r}); o.lay_out(p); o.lay_out(p)"
    assert run(code, cwd=repository / "scripts").returncode == 0
    assert (tmp_path / "ir" / "errors.py").resolve() == repository / "ir" / "errors.py"
