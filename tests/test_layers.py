"""The house rules of the repository, read off the files themselves: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

CORE = frozenset({"torch", "numpy", "networkx", "safetensors"})
ONNX = frozenset({"onnx", "onnx_ir", "onnxscript", "onnxruntime"})
EVERYTHING = CORE | ONNX | {"transformers", "tokenizers", "rich", "tomli", "triton"}

# house -> (parts of graphwright it may import, packages it may import)
HOUSES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "ir": (frozenset({"ir"}), CORE),
    "passes": (frozenset({"ir", "passes"}), CORE),
    "backends": (frozenset({"ir", "backends"}), CORE),
    "frontends": (frozenset({"ir", "passes", "backends", "frontends"}), EVERYTHING),
}
# What a folder inside a house may import besides.
FOLDERS: dict[str, frozenset[str]] = {
    "backends/onnx": ONNX,
    "backends/triton": frozenset({"triton"}),
    "frontends/autoquantize": frozenset({"matplotlib"}),
}
# What a single file may import besides, and why.
FILES: dict[str, frozenset[str]] = {
    "passes/progress.py": frozenset({"rich"}),  # draws the progress bar in a terminal
    "passes/rendering/terminal.py": frozenset({"rich"}),  # draws the report table in a terminal
    "passes/quantization/allocation.py": frozenset({"scipy"}),  # solves the integer programme, when it is asked for
}
# Backends do not know each other. What they share lies in backends/ itself, or is the reference.
BACKENDS = frozenset({"cpu", "onnx", "triton"})


def python_files(*folders: str) -> list[Path]:
    """The Python files of these folders of the repository, stubs included."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py*") if path.suffix in {".py", ".pyi"}]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def repository_files() -> list[Path]:
    """Every text file that belongs to the repository: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout to know which files belong to the repository")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:1024]]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, wherever in the file; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).parent.parts
                base = ".".join(["graphwright", *package[: len(package) - node.level + 1]])
                base = f"{base}.{node.module}" if node.module else base
            else:
                base = node.module or ""
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def refusal(path: str, imported: str) -> str | None:
    """Why the file at ``path`` may not import ``imported``, or ``None`` where it may."""
    house = path.split("/", 1)[0]
    parts, packages = HOUSES[house]
    top, _, rest = imported.partition(".")
    if top in sys.stdlib_module_names:
        return None
    if top == "graphwright":
        if path == "frontends/_public/__init__.py":
            return None
        part = rest.split(".")[0]
        if part not in parts:
            return f"{house}/ may not import {imported}"
        if house == "backends" and part == "backends":
            mine, theirs = path.split("/")[1], rest.split(".")[1] if "." in rest else ""
            if theirs in BACKENDS - {mine}:
                return f"backends/{mine} may not import {imported}"
        return None
    extra = FILES.get(path, frozenset()).union(
        *(names for folder, names in FOLDERS.items() if path.startswith(f"{folder}/"))
    )
    return None if top in packages | extra else f"{house}/ may not import {top}"


def test_every_house_imports_only_what_it_may() -> None:
    files = python_files(*HOUSES)
    assert {name_of(path).split("/")[0] for path in files} == set(HOUSES)
    bad = [
        f"{name_of(path)}:{line}: {reason}"
        for path in files
        for line, imported in imports_of(path)
        if (reason := refusal(name_of(path), imported)) is not None
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("path", "imported", "allowed"),
    [
        ("ir/program.py", "graphwright.ir.types", True),
        ("ir/program.py", "graphwright.passes.base", False),
        ("ir/program.py", "graphwright", False),
        ("ir/program.py", "rich.table", False),
        ("ir/program.py", "ir.types", False),
        ("passes/base.py", "graphwright.ir.program", True),
        ("passes/base.py", "graphwright.backends.reference", False),
        ("passes/base.py", "onnx", False),
        ("backends/cpu/lower.py", "graphwright.ir.program", True),
        ("backends/cpu/lower.py", "graphwright.passes.base", False),
        ("backends/cpu/lower.py", "graphwright.backends.reference.run", True),
        ("backends/cpu/lower.py", "graphwright.backends.base.Backend", True),
        ("backends/cpu/lower.py", "graphwright.backends.onnx.export", False),
        ("backends/cpu/lower.py", "onnx", False),
        ("backends/onnx/export.py", "onnx", True),
        ("backends/onnx/export.py", "triton", False),
        ("backends/triton/kernels.py", "triton.language", True),
        ("frontends/cli/main.py", "graphwright.backends.onnx.export", True),
        ("frontends/cli/main.py", "rich.progress", True),
        ("frontends/cli/main.py", "requests", False),
    ],
)
def test_the_reader_of_imports_can_refuse(path: str, imported: str, allowed: bool) -> None:
    assert (refusal(path, imported) is None) == allowed


def test_relative_and_nested_imports_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "ir" / "ops").mkdir(parents=True)
    file = tmp_path / "ir" / "ops" / "x.py"
    file.write_text("from ..types import T\nfrom . import y\ndef f():\n    import passes.base\n")
    assert sorted(imports_of(file)) == [
        (1, "graphwright.ir.types.T"),
        (2, "graphwright.ir.ops.y"),
        (4, "passes.base"),
    ]


def test_examples_use_the_public_api_only() -> None:
    bad = [
        f"{name_of(path)}:{line}: examples may import names of `graphwright` itself, not {imported}"
        for path in python_files("examples")
        for line, imported in imports_of(path)
        if (imported.startswith("graphwright.") and (imported.count(".") > 1 or imported.split(".")[1] in HOUSES))
    ]
    assert not bad, "\n".join(bad)


def test_no_file_imports_a_house_by_its_folder_name() -> None:
    """From the root of the repository ``import passes`` works, and makes a second copy of every class in it."""
    bad = [
        f"{name_of(path)}:{line}: import graphwright.{imported}"
        for path in python_files(*HOUSES, "tests", "examples", "benchmarks", "scripts")
        for line, imported in imports_of(path)
        if imported.split(".")[0] in HOUSES
    ]
    assert not bad, "\n".join(bad)


def test_modules_are_short() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix in {".py", ".pyi", ".cpp", ".h"} and path.relative_to(ROOT).parts[0] != "tests"
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_modules_are_named_after_what_they_hold() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    bad = [
        name_of(path)
        for path in python_files(*HOUSES, "examples", "benchmarks", "scripts")
        if {path.stem, *path.relative_to(ROOT).parts[:-1]} & vague
    ]
    assert not bad


def test_nothing_is_pickled() -> None:
    """Loading a pickle runs what it says. Programs are JSON and safetensors."""
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    bad = []
    for path in python_files(*HOUSES, "examples", "benchmarks", "scripts"):
        bad += [f"{name_of(path)}:{line}" for line, name in imports_of(path) if name.split(".")[0] in picklers]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                bad.append(f"{name_of(path)}:{node.lineno}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                bad.append(f"{name_of(path)}:{node.value.lineno}")
    assert not bad


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("an absolute path of one machine", r"(?<![\w.])/(?:work|home|Users|root|tmp/gw)/[\w.]"),
        ("the address of a package index", r"--(?:extra-)?index-url|https?://\S*(?:pypi\.org/simple|/whl/)"),
        ("a merge conflict", r"^(?:<{7}|>{7}) "),
    ],
)
def test_no_file_holds(what: str, pattern: str) -> None:
    expression = re.compile(pattern, re.MULTILINE)
    bad = []
    for path in repository_files():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        bad += [f"{name_of(path)}: {match.group()!r}" for match in expression.finditer(text)]
    assert not bad, f"{what}: {bad}"


def test_importing_the_package_imports_no_library() -> None:
    """``import graphwright`` stays instant: names are looked up when they are used."""
    code = "import sys, graphwright; print(*sorted({'torch', 'numpy', 'transformers', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
