# What `_native` has of sparse linears. There is no module of this name as the program runs: import from `_native`.
import numpy as np
import numpy.typing as npt

from graphwright.backends.cpu._native_executor import LinearInstruction

SPARSE_BEYOND: int
SPARSE_STEPS: int

def pack_sparse_masks(
    stored: npt.NDArray[np.uint8],
    columns: int,
    kind: str,
    group: int,
    masks: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    threads: int,
) -> None:
    """The bits of a sparse weight, ``[outputs, ceil(columns / 8)]``, into the flat layout that the kernels stream.

    Raises:
        ValueError: the sizes do not fit.
    """

def pack_sparse_values(
    stored: npt.NDArray[np.uint8],
    columns: int,
    kind: str,
    group: int,
    given: npt.NDArray[np.uint8],
    row_offsets: npt.NDArray[np.int32],
    masks: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    values: npt.NDArray[np.uint8],
    threads: int,
) -> None:
    """The values of a sparse weight, as bytes, in the order of ``masks``; ``SPARSE_BEYOND`` bytes follow.

    Raises:
        ValueError: the sizes do not fit, or there are not as many values as bits.
    """

class SparseLinear(LinearInstruction):
    """A linear on packed weights that are mostly zeros.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        outputs: int,
        columns: int,
        kind: str,
        group: int,
        compute: str,
        masks: npt.NDArray[np.uint64],
        values: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.uint64],
        scales: npt.NDArray[np.float16] | npt.NDArray[np.float32] | None,
        zeros: npt.NDArray[np.uint8] | None,
        bias: npt.NDArray[np.float32] | None,
        rounding: str,
        input_steps: npt.NDArray[np.float32] | None,
        input_zero: int,
        gather: str,
        threads: int,
    ) -> None: ...
    @property
    def gathered_steps(self) -> int:
        """Slots of the gathered weights, of all panels: what many rows take in place of dense steps; 0 without them."""
    @property
    def blocks(self) -> int:
        """Blocks of four columns of an output, of all outputs, that many rows take; 0 without them."""
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        x: npt.NDArray[np.float32],
        y: npt.NDArray[np.float32],
        threads: int,
        activation: str = "",
        factor: npt.NDArray[np.float32] | None = None,
        residual: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """``y = activation(x Wᵀ + b) * factor + residual`` for rows of floats.

        ``factor`` and ``residual`` have y's shape or one row; their rows may be any distance apart. Activations:
        ``""``, ``relu``, ``silu``, ``gelu``, ``gelu_tanh``, ``tanh``.

        Raises:
            ValueError: shapes do not fit, or there is no such activation.
        """
