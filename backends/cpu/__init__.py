"""The CPU backend: C++ kernels, one set of files per instruction set, chosen when the program runs.

``native_status()`` says whether the C++ extension is in this installation, ``features()`` what this CPU can run and
which instruction set is used; ``python -m graphwright.backends.cpu`` prints both. Without the extension PyTorch runs
everything.
"""

from graphwright.backends.cpu.executable import CpuBackend, CpuExecutable
from graphwright.backends.cpu.features import ISA_VARIABLE, CpuFeatures, InstructionSet, features
from graphwright.backends.cpu.native import NativeStatus, native_status
from graphwright.backends.cpu.packed_file import PackedModel, load_packed, save_packed

__all__ = [
    "ISA_VARIABLE",
    "CpuBackend",
    "CpuExecutable",
    "CpuFeatures",
    "InstructionSet",
    "NativeStatus",
    "PackedModel",
    "features",
    "load_packed",
    "native_status",
    "save_packed",
]
