import numpy as np
import numpy.typing as npt

class Isa:
    """An instruction set that kernels are written for."""

    @property
    def name(self) -> str: ...
    @property
    def compiled(self) -> bool:
        """Whether this build holds kernels for it."""
    @property
    def missing(self) -> list[str]:
        """The CPU or system features this machine lacks for it; empty where it can run."""

def isas() -> list[Isa]:
    """Every instruction set graphwright knows, from the plainest to the most able."""

def cpu_name() -> str:
    """The CPU's own name for itself, or an empty string."""

def dot_u8s8(isa: str, a: npt.NDArray[np.uint8], b: npt.NDArray[np.int8]) -> int:
    """The exact sum of ``a[i] * b[i]`` by the kernel of one instruction set.

    Raises:
        ValueError: lengths differ or exceed 65536, or the instruction set is unknown or cannot run here.
    """
