"""How kernels are made and launched.

Every launch goes through :func:`launch`, which checks that the tensors lie where the kernel runs, leaves out empty
launches, and can note launches instead of making them: what is compiled ahead of time for a GPU that is not there is
exactly what would be launched on it (:mod:`graphwright.backends.triton.compile`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton

from graphwright.backends.triton.configurations import Config
from graphwright.backends.triton.status import architecture, triton_status
from graphwright.ir.errors import BackendError


def kernel(function: Callable[..., None]) -> Any:
    """A function in triton's language as a kernel, or as the part of one."""
    return triton.jit(function)


def part(function: Callable[..., Any]) -> Any:
    """A function in triton's language that kernels call."""
    return triton.jit(function)


def apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """An autograd function of operands; torch's own ``apply`` has no types."""
    typed: Any = function
    return typed.apply(*operands)


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: that was, or would be, launched.
        grid: programs along each axis.
        arguments: by name, constants included.
        config: sizes of blocks, warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """Of the kernel, without the underscore of a private name."""
        return str(self.kernel.__name__).lstrip("_")

    def __str__(self) -> str:
        """``linear_nbits [64 × 8] BN=64 splits=8, 4 warps, 3 stages``."""
        grid = " × ".join(map(str, self.grid))
        return f"{self.name} [{grid}] {self.config}"


@dataclass
class _Record:
    launches: list[Launch]
    is_dry: bool
    arch: int | None
    device: torch.device | None


_RECORD: ContextVar[_Record | None] = ContextVar("triton launches", default=None)


@contextmanager
def recorded(
    *, dry: bool = False, arch: int | None = None, device: torch.device | None = None
) -> Iterator[list[Launch]]:
    """Note the launches of the block.

    Args:
        dry: only note them. Tensors may then be on the ``meta`` device.
        arch: whose configurations are chosen, by default those of the device.
        device: that tensors on the ``meta`` device stand for.
    """
    record = _Record([], dry, arch, device)
    token = _RECORD.set(record)
    try:
        yield record.launches
    finally:
        _RECORD.reset(token)


def chosen_architecture(device: torch.device) -> int:
    """Whose configurations a launch on this device takes."""
    record = _RECORD.get()
    return record.arch if record is not None and record.arch is not None else architecture(meant(device))


def meant(device: torch.device) -> torch.device:
    """The device that a tensor's device stands for, see :func:`recorded`."""
    record = _RECORD.get()
    return record.device if record is not None and record.device is not None else device


def launch(kernel: Any, grid: tuple[int, ...], config: Config, /, **arguments: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: see :func:`kernel`.
        grid: programs along each axis; with none along one, nothing is launched.
        config: the sizes of blocks it names are constants of the kernel.
        arguments: tensors, numbers and further constants by name; tensors of one device.

    Raises:
        BackendError: tensors lie on several devices, or where the kernels do not run, or are of float64.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        if value.dtype == torch.float64:
            raise BackendError(
                f"{name} is float64, kernels compute in float16, bfloat16 and float32",
                where=f"kernel {str(kernel.__name__).lstrip('_')}",
                hint="convert it: x.float()",
            )
    values = {**arguments, **config.blocks}
    record = _RECORD.get()
    if record is not None:
        record.launches.append(Launch(kernel, grid, values, config))
        if record.is_dry:
            return
    check_devices(tensors, kernel)
    if 0 in grid:
        return
    kernel[grid](**values, num_warps=config.warps, num_stages=config.stages)


def check_devices(tensors: dict[str, torch.Tensor], kernel: Any) -> None:
    """Check that tensors lie where kernels run: on one GPU, or on the CPU under the interpreter.

    Raises:
        BackendError: they do not, naming one that does not.
    """
    wanted = "cpu" if triton_status().interpreted else "cuda"
    where = f"kernel {str(kernel.__name__).lstrip('_')}"
    devices = {tensor.device for tensor in tensors.values()}
    for name, tensor in tensors.items():
        if tensor.device.type != wanted:
            hint = "move it there: x.cuda()" if wanted == "cuda" else "unset TRITON_INTERPRET to run on a GPU"
            raise BackendError(f"{name} is on {tensor.device}, the kernel runs on {wanted}", where=where, hint=hint)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise BackendError(f"operands are on several devices: {places}", where=where, hint="move them to one")


def blocks_of(count: int, size: int) -> int:
    """How many blocks of a size cover so many."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1) -> int:
    """The least power of two that is not below either."""
    return max(least, 1 << max(0, count - 1).bit_length())
