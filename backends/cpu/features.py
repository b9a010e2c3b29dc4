"""What this CPU can run, and which instruction set graphwright uses on it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from graphwright.backends.cpu.native import native_status
from graphwright.ir.errors import BackendError, InputError

ISA_VARIABLE = "GRAPHWRIGHT_CPU_ISA"


@dataclass(frozen=True)
class InstructionSet:
    """One instruction set kernels are written for.

    Attributes:
        name: ``scalar``, ``neon``, ``avx2``, ``avx_vnni``, ``avx512``, ``avx512_vnni``, ``avx512_vbmi2``,
            ``avx512_bf16`` or ``amx``.
        compiled: whether this installation holds kernels for it.
        missing: what the CPU or the operating system lacks for it (``os_...``: the system does not save its registers).
    """

    name: str
    compiled: bool
    missing: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether its kernels are here and this machine can run them."""
        return self.compiled and not self.missing

    def __str__(self) -> str:
        if not self.compiled:
            return f"{self.name}: not compiled into this installation"
        if self.missing:
            return f"{self.name}: this machine lacks {', '.join(self.missing)}"
        return f"{self.name}: yes"


@dataclass(frozen=True)
class CpuFeatures:
    """What :func:`features` found.

    Attributes:
        cpu: the CPU's own name for itself, or an empty string.
        instruction_sets: every one graphwright knows, from the plainest to the most able; empty without the extension.
        selected: the one whose kernels run, or ``None`` without the extension: PyTorch runs everything.
        forced: whether ``GRAPHWRIGHT_CPU_ISA`` chose it.
        native: the state of the native extension, in words.
    """

    cpu: str
    instruction_sets: tuple[InstructionSet, ...]
    selected: str | None
    forced: bool
    native: str

    def explain(self) -> str:
        """The findings as a few lines of text."""
        lines = [self.native]
        if self.selected is not None:
            lines.append(f"CPU: {self.cpu or 'unnamed'}")
            lines.extend(f"  {isa}" for isa in self.instruction_sets)
            lines.append(f"In use: {self.selected}" + (f" (forced by {ISA_VARIABLE})" if self.forced else ""))
        return "\n".join(lines)


def features() -> CpuFeatures:
    """Find out what this CPU can run. CPUID and the operating system are both asked; the environment is read each time.

    ``GRAPHWRIGHT_CPU_ISA=<name>`` forces an instruction set; otherwise the most able usable one is selected.

    Raises:
        InputError: ``GRAPHWRIGHT_CPU_ISA`` names no instruction set.
        BackendError: it names one that was not compiled or that this machine cannot run, or there is no extension.
    """
    status = native_status()
    wanted = os.environ.get(ISA_VARIABLE, "").strip()
    if not status.available:
        if wanted:
            raise BackendError(
                f"{ISA_VARIABLE}={wanted} asks for C++ kernels. {status.message}", hint=f"unset it, or {status.hint}"
            )
        return CpuFeatures(cpu="", instruction_sets=(), selected=None, forced=False, native=str(status))

    from graphwright.backends.cpu import _native  # not at the top: it may be absent

    found = tuple(InstructionSet(isa.name, isa.compiled, tuple(isa.missing)) for isa in _native.isas())
    return CpuFeatures(
        cpu=_native.cpu_name(),
        instruction_sets=found,
        selected=_forced(wanted, found) if wanted else [isa for isa in found if isa.usable][-1].name,
        forced=bool(wanted),
        native=str(status),
    )


def _forced(wanted: str, found: tuple[InstructionSet, ...]) -> str:
    by_name = {isa.name: isa for isa in found}
    usable = ", ".join(isa.name for isa in found if isa.usable)
    if wanted not in by_name:
        raise InputError(
            f"{ISA_VARIABLE}={wanted} names no instruction set; there are {', '.join(by_name)}",
            hint=f"on this machine, set it to one of {usable}, or unset it",
        )
    if not by_name[wanted].usable:
        raise BackendError(
            f"{ISA_VARIABLE}={wanted} cannot be used here: {by_name[wanted]}",
            hint=f"set it to one of {usable}, or unset it",
        )
    return wanted
