"""CPU detection, the choice of an instruction set, and the first kernel against its specification."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graphwright.backends.cpu import ISA_VARIABLE, CpuFeatures, InstructionSet, features, native, native_status
from graphwright.ir.errors import BackendError, InputError

ISAS = ["scalar", "neon", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx"]
# The shortest, around each vector width, and long enough for several rounds of the widest loop.
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]

needs_native = pytest.mark.skipif(not native_status().available, reason=native_status().message)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)


def usable() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def test_the_extension_is_there_wherever_it_can_be_built() -> None:
    """The pure-Python fallback must not hide a broken build from those who work on the C++."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.environ.get("GRAPHWRIGHT_NO_NATIVE"):
        pytest.skip("no C++ compiler on this machine, or GRAPHWRIGHT_NO_NATIVE is set: pure Python is what is wanted")
    assert native_status().available, f"{native_status()} (there is a compiler: {compiler})"


@needs_native
def test_scalar_is_always_usable_and_the_best_is_selected() -> None:
    found = features()
    assert [isa.name for isa in found.instruction_sets] == ISAS
    assert found.instruction_sets[0] == InstructionSet("scalar", compiled=True, missing=())
    assert found.selected == usable()[-1]
    assert not found.forced


@needs_native
@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="needs an x86-64 /proc/cpuinfo"
)
def test_detection_agrees_with_the_operating_system() -> None:
    """Linux lists a flag only where CPU and system both support it: an answer by another road."""
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":", 1)[1].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    vbmi2 = avx512 | {"avx512_vnni", "avx512vbmi", "avx512_vbmi2"}
    bf16 = vbmi2 | {"avx512_bf16"}
    needed = {
        "scalar": set[str](),
        "neon": {"neon"},
        "avx2": avx2,
        "avx_vnni": avx2 | {"avx_vnni"},
        "avx512": avx512,
        "avx512_vnni": avx512 | {"avx512_vnni"},
        "avx512_vbmi2": vbmi2,
        "avx512_bf16": bf16,
        "amx": bf16 | {"amx_tile", "amx_int8", "amx_bf16"},
    }
    missing = {isa.name: set(isa.missing) for isa in features().instruction_sets}
    for name in ISAS:
        assert {flag for flag in missing[name] if not flag.startswith("os_")} == needed[name] - flags, name
        assert bool(missing[name]) == bool(needed[name] - flags), name


@needs_native
def test_every_usable_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in usable():
        monkeypatch.setenv(ISA_VARIABLE, name)
        found = features()
        assert (found.selected, found.forced) == (name, True)
        assert f"In use: {name} (forced by {ISA_VARIABLE})" in found.explain()


@needs_native
@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2,avx512", "native"])
def test_forcing_an_unknown_instruction_set_is_an_error_that_lists_the_known(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, name)
    with pytest.raises(InputError, match=f"{ISA_VARIABLE}={name} names no instruction set") as caught:
        features()
    assert all(isa in str(caught.value) for isa in ISAS)


@needs_native
@pytest.mark.parametrize(
    ("isa", "reason"),
    [
        (InstructionSet("amx", compiled=True, missing=("os_amx",)), "this machine lacks os_amx"),
        (InstructionSet("amx", compiled=False, missing=()), "not compiled into this installation"),
    ],
)
def test_forcing_what_cannot_run_is_an_error_that_says_why(isa: InstructionSet, reason: str) -> None:
    from graphwright.backends.cpu.features import _forced

    scalar = InstructionSet("scalar", compiled=True, missing=())
    with pytest.raises(BackendError, match=reason) as caught:
        _forced("amx", (scalar, isa))
    assert "set it to one of scalar, or unset it" in str(caught.value)


@needs_native
def test_an_instruction_set_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [name for name in ISAS if name not in usable()]
    if not lacking:
        pytest.skip("this machine can run every instruction set")
    from graphwright.backends.cpu import _native

    for name in lacking:
        monkeypatch.setenv(ISA_VARIABLE, name)
        with pytest.raises(BackendError, match="cannot be used here"):
            features()
        with pytest.raises(ValueError, match="not supported by this machine|not compiled"):
            _native.dot_u8s8(name, np.zeros(1, np.uint8), np.zeros(1, np.int8))


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_EXTENSION", "graphwright.backends.cpu._no_such_extension")
    native_status.cache_clear()
    yield
    native_status.cache_clear()


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension_features_say_so_and_forcing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    status = native_status()
    assert not status.available
    assert "not in this installation" in str(status)
    assert "install a C++20 compiler" in str(status)
    assert features() == CpuFeatures(cpu="", instruction_sets=(), selected=None, forced=False, native=str(status))
    monkeypatch.setenv(ISA_VARIABLE, "scalar")
    with pytest.raises(BackendError, match="asks for C\\+\\+ kernels"):
        features()


def test_an_extension_that_cannot_be_loaded_is_reported_with_the_loader_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extension.py").write_text("raise ImportError('undefined symbol: xyz')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(native, "_EXTENSION", "broken_extension")
    native_status.cache_clear()
    try:
        assert not native_status().available
        assert "cannot be loaded (undefined symbol: xyz)" in str(native_status())
    finally:
        native_status.cache_clear()


@needs_native
@pytest.mark.parametrize("name", ISAS)
def test_dot_u8s8_equals_numpy_at_every_tail_and_alignment(name: str) -> None:
    if name not in usable():
        pytest.skip(f"this machine cannot run {name}")
    from graphwright.backends.cpu import _native

    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, 1100, dtype=np.uint8)
    b = rng.integers(-128, 128, 1100, dtype=np.int8)
    for n in LENGTHS:
        for shift in (0, 1, 5):
            x, y = a[shift : shift + n], b[2 * shift : 2 * shift + n]
            expected = int(np.dot(x.astype(np.int64), y.astype(np.int64)))
            assert _native.dot_u8s8(name, x, y) == expected, (n, shift)
    # The largest sum there is, with products that saturate 16-bit arithmetic.
    extreme = _native.dot_u8s8(name, np.full(65536, 255, np.uint8), np.full(65536, -128, np.int8))
    assert extreme == -65536 * 255 * 128


@needs_native
def test_dot_u8s8_refuses_what_it_cannot_compute() -> None:
    from graphwright.backends.cpu import _native

    one, two = np.zeros(1, np.uint8), np.zeros(2, np.int8)
    with pytest.raises(ValueError, match="differ in length"):
        _native.dot_u8s8("scalar", one, two)
    with pytest.raises(ValueError, match="more elements"):
        _native.dot_u8s8("scalar", np.zeros(65537, np.uint8), np.zeros(65537, np.int8))
    with pytest.raises(ValueError, match="no instruction set is called 'sse9'"):
        _native.dot_u8s8("sse9", one, np.zeros(1, np.int8))


@needs_native
def test_the_stub_declares_what_the_extension_has(repository: Path) -> None:
    from graphwright.backends.cpu import _native

    names = ("_native.pyi", "_native_executor.pyi", "_native_sparse.pyi")
    stubs = [repository / "backends" / "cpu" / name for name in names]
    nodes = [node for stub in stubs for node in ast.parse(stub.read_text()).body]
    declared = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    declared |= {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    assert declared == {name for name in dir(_native) if not name.startswith("_")}


@needs_native
@pytest.mark.parametrize(("isa", "code", "text"), [("scalar", 0, "In use: scalar"), ("sse9", 2, "no instruction set")])
def test_the_module_can_be_run(isa: str, code: int, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphwright.backends.cpu"],
        env={**os.environ, ISA_VARIABLE: isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr
