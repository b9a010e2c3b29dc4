"""What this machine offers: whether triton is there, whether it interprets, and which GPU there is.

Nothing here imports triton before it is asked for, and nothing imports CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import BackendError

# The oldest GPU whose tensor cores take bfloat16 and asynchronous copies, which the kernels are written for.
OLDEST = 80
# AMD's Instinct MI300, whose numbers are not NVIDIA's, in the tables of configurations.
AMD = 942
# Kernels under the interpreter, and those that are only compiled, take the choices of this architecture.
STAND_IN = 90


@dataclass(frozen=True)
class TritonStatus:
    """Whether kernels can be made.

    Attributes:
        available: triton can be imported.
        interpreted: kernels run under triton's interpreter, on CPU tensors.
        message: for people.
    """

    available: bool
    interpreted: bool
    message: str


@functools.cache
def triton_status() -> TritonStatus:
    """Whether triton is in this installation, and how it runs kernels."""
    if importlib.util.find_spec("triton") is None:
        return TritonStatus(False, False, "triton is not installed: pip install 'graphwright[triton]' (Linux)")
    triton: Any = importlib.import_module("triton")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    return TritonStatus(True, interpreted, f"triton {triton.__version__}{', interpreted' if interpreted else ''}")


def architecture(device: torch.device) -> int:
    """Compute capability as one number, such as 90; that of :data:`STAND_IN` where no GPU is meant."""
    if device.type != "cuda":
        return STAND_IN
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def need_triton() -> TritonStatus:
    """The status, where triton is installed.

    Raises:
        BackendError: it is not.
    """
    status = triton_status()
    if not status.available:
        raise BackendError(
            "the Triton kernels need triton, which is not installed",
            where="target 'cuda'",
            hint="pip install 'graphwright[triton]' (Linux), or take target='cpu'",
        )
    return status


def need_gpu(device: torch.device) -> None:
    """Check that a GPU can run the kernels.

    Args:
        device: a CUDA device.

    Raises:
        BackendError: this torch has no CUDA, there is no such GPU, or it is too old.
    """
    where = f"device {str(device)!r}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "sees no GPU" if built else "is built without CUDA"
        raise BackendError(f"torch {torch.__version__} {why}", where=where, hint="take target='cpu' on this machine")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise BackendError(f"there are {count} GPUs, counted from 0", where=where, hint="take one of those")
    if torch.version.hip is None and architecture(device) < OLDEST:
        name, capability = torch.cuda.get_device_name(device), architecture(device)
        raise BackendError(
            f"{name} has compute capability {capability / 10:.1f}, the kernels need {OLDEST / 10:.1f}",
            where=where,
            hint="use an Ampere GPU or later, or target='reference' with the model on this GPU",
        )
