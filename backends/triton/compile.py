"""Compile kernels ahead of time for GPUs that need not be there, and read what the compiler made of them.

``python -m graphwright.backends.triton.compile`` compiles every kernel in every configuration for sm_80 and sm_90 (for
sm_89 those that sm_80 has not), and in the first of each for gfx942. It prints registers, shared memory and spills, and
fails where something spills.

``--json`` keeps the table with a digest of the kernels, and ``--check`` says at once, without compiling, whether such a
table is still about these kernels and these launches. So tests know of every one of them that nothing spills.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphwright.backends.triton.cases import CASES, Case
from graphwright.backends.triton.configurations import candidates, take_tuned
from graphwright.backends.triton.launching import Launch, recorded
from graphwright.backends.triton.status import AMD, triton_status
from graphwright.ir.errors import BackendError

TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
# What one block of threads may have of shared memory, in bytes.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        case: what was launched.
        kernel: its name.
        config: blocks, warps and stages.
        target: such as ``sm_90``.
        registers: of a thread.
        shared: bytes of a block of threads.
        spilled: bytes of each thread that did not fit its registers; 0 where nothing spills.
        seconds: that it took; little where triton's cache had it.
        key: digest of what was compiled but for the kernels' text: signature, constants, configuration.
    """

    case: str
    kernel: str
    config: str
    target: str
    registers: int
    shared: int
    spilled: int
    seconds: float
    key: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing spills and the shared memory is there."""
        return self.spilled == 0 and self.shared <= SHARED_LIMITS[self.target]

    def __str__(self) -> str:
        """One line of the table."""
        mark = "" if self.fits else "  DOES NOT FIT"
        return (
            f"{self.target:7} {self.case:34} {self.kernel:26} {self.config:44} {self.registers:4} registers"
            f" {self.shared:7} bytes shared {self.spilled:4} spilled{mark}"
        )


def compiled(launch: Launch, case: str, target: str) -> Compiled:
    """Compile what a launch would run, specialised as triton does it: on ones, and on multiples of 16.

    Args:
        launch: as :func:`graphwright.backends.triton.launching.recorded` notes it.
        case: for the result.
        target: one of :data:`TARGETS`.

    Raises:
        BackendError: kernels are interpreted in this process, or the kernel has an operand of an unknown dtype.
    """
    if triton_status().interpreted:
        raise BackendError("TRITON_INTERPRET is set, so there is nothing to compile", hint="unset it", where="compile")
    signature, constants, attributes = _specialized(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    started = time.perf_counter()
    result = triton.compile(source, target=_gpu(target), options=options)
    seconds = time.perf_counter() - started
    registers, spilled = _resources(result)
    shared = int(result.metadata.shared)
    return Compiled(case, launch.name, str(launch.config), target, registers, shared, spilled, seconds, key_of(launch))


def launches_of(case: Case, target: str, *, every: bool) -> Iterator[Launch]:
    """What a case launches on a target, in its first configuration or in all."""
    arch = int(target[3:]) if target.startswith("sm_") else AMD
    seen: set[str] = set()
    choices = candidates(case.table, arch) if case.table is not None and every else (None,)
    for choice in choices:
        try:
            if case.table is not None:
                take_tuned(case.table, arch, choice)
            with recorded(dry=True, arch=arch) as launches:
                case.run()
        finally:
            if case.table is not None:
                take_tuned(case.table, arch, None)
        for each in launches:
            key = key_of(each)
            if key not in seen:
                seen.add(key)
                yield each


def every_launch(
    targets: Sequence[str], *, first: bool = False, only: Sequence[str] = ("",)
) -> Iterator[tuple[str, str, Launch]]:
    """Target, name of the case and launch of all that is compiled; AMD's in their first configuration."""
    for target in targets:
        for case in CASES:
            if any(text in case.name for text in only) and case.runs_on(target):
                for each in launches_of(case, target, every=not first and target.startswith("sm_")):
                    yield target, case.name, each


def key_of(launch: Launch) -> str:
    """A digest of what a launch is compiled from but for the kernel's text."""
    return hashlib.sha256(f"{launch.name} {launch.config} {_specialized(launch)}".encode()).hexdigest()[:16]


def digest_of_kernels(folder: Path | None = None) -> str:
    """A digest of the text of all kernels and their parts; comments, docstrings and what launches them do not count."""
    found = hashlib.sha256()
    for path in sorted((folder or Path(__file__).parent / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            marks = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            if not any(isinstance(mark, ast.Name) and mark.id in ("kernel", "part") for mark in marks):
                continue
            assert isinstance(node, ast.FunctionDef)
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            found.update(ast.unparse(node).encode())
    return found.hexdigest()[:16]


def objections(table: Mapping[str, Any]) -> list[str]:
    """What speaks against a table that ``--json`` has kept: other kernels, other launches, or something that spills."""
    rows = [Compiled(**row) for row in table["rows"]]
    kept = {(row.target, row.key) for row in rows}
    wanted = {(target, key_of(launch)): f"{target} {case} {launch}" for target, case, launch in every_launch(TARGETS)}
    found = [f"is not in the table: {name}" for key, name in wanted.items() if key not in kept]
    found += [f"is launched no more: {row}" for row in rows if (row.target, row.key) not in wanted]
    found += [str(row) for row in rows if not row.fits]
    return [*(["the kernels have changed"] if table["kernels"] != digest_of_kernels() else []), *found]


def _specialized(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = _kind(value)
        if parameter.is_constexpr or value is None or (kind == "i32" and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if value.dtype not in _TYPES:
            raise BackendError(f"no kernel takes {value.dtype}", where="compile")
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else str(value)


def _gpu(target: str) -> Any:
    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _resources(result: Any) -> tuple[int, int]:
    """Registers and spills: from the binary (CUDA) or the assembly's notes (AMD)."""
    if "cubin" not in result.asm:
        notes = dict(re.findall(r"\.(\w+):\s+(\d+)", result.asm["amdgcn"]))
        # Scalar registers that do not fit lie in lanes of vector registers; only the stack is memory.
        return int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    if found is None:
        raise BackendError("cuobjdump does not say what a kernel uses", where="compile", context=shown.splitlines())
    # Whatever a thread has on its stack did not fit its registers.
    return int(found[1]), max(int(found[2]), int(found[3]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where something spills or does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare such a table with the kernels, first")
    options = parser.parse_args(arguments)
    if options.check is not None:
        against = objections(json.loads(options.check.read_text(encoding="utf-8")))
        if against:
            print("\n".join(against), f"{options.check}: compile all kernels again with `make kernels`", sep="\n")
            return 1
    rows: list[Compiled] = []
    for target, case, launch in every_launch(
        options.target or TARGETS, first=options.first, only=options.only or ("",)
    ):
        rows.append(compiled(launch, case, target))
        print(rows[-1], flush=True)
    if options.json is not None:
        lines = ",\n".join(f"    {json.dumps(asdict(row) | {'seconds': round(row.seconds, 2)})}" for row in rows)
        head = f'"triton": {json.dumps(triton.__version__)},\n  "kernels": "{digest_of_kernels()}"'
        options.json.write_text(f'{{\n  {head},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    bad = [row for row in rows if not row.fits]
    print(f"{len(rows)} kernels, {len(bad)} that spill or need more shared memory than there is")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
