import numpy as np
import numpy.typing as npt

from graphwright.backends.cpu._native_executor import Arange as Arange
from graphwright.backends.cpu._native_executor import Cancelled as Cancelled
from graphwright.backends.cpu._native_executor import Executor as Executor
from graphwright.backends.cpu._native_executor import Instruction as Instruction
from graphwright.backends.cpu._native_executor import IntegerOperation as IntegerOperation
from graphwright.backends.cpu._native_executor import LinearInstruction as LinearInstruction
from graphwright.backends.cpu._native_executor import PythonCall as PythonCall
from graphwright.backends.cpu._native_executor import Runner as Runner
from graphwright.backends.cpu._native_executor import SelectRows as SelectRows
from graphwright.backends.cpu._native_executor import Where as Where
from graphwright.backends.cpu._native_sparse import SPARSE_BEYOND as SPARSE_BEYOND
from graphwright.backends.cpu._native_sparse import SPARSE_STEPS as SPARSE_STEPS
from graphwright.backends.cpu._native_sparse import SparseLinear as SparseLinear
from graphwright.backends.cpu._native_sparse import pack_sparse_masks as pack_sparse_masks
from graphwright.backends.cpu._native_sparse import pack_sparse_values as pack_sparse_values

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

def pack_codes(stored: npt.NDArray[np.uint8], bits: int, codes: npt.NDArray[np.uint8], threads: int) -> None:
    """Stored codes, ``[outputs, groups, bytes]``, into the flat layout that the kernels stream.

    Raises:
        ValueError: the sizes do not fit.
    """

class ByteLinear(LinearInstruction):
    """A linear on packed integer weights; activations are rounded to bytes.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        outputs: int,
        columns: int,
        bits: int,
        group: int,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16] | npt.NDArray[np.float32],
        zeros: npt.NDArray[np.uint8] | None,
        sums: npt.NDArray[np.int32] | None,
        bias: npt.NDArray[np.float32] | None,
        rounding: str,
        steps: npt.NDArray[np.float32] | None,
        zero: int,
    ) -> None: ...
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

        ``x`` is ``[rows, columns]``; ``y``, ``factor`` and ``residual`` are ``[rows, outputs]``, the latter two with
        rows that may lie apart, or with one row for all. ``activation`` is empty, ``relu``, ``silu``, ``gelu``,
        ``gelu_tanh`` or ``tanh``.
        """

class Norm(Instruction):
    """Layer (``centred``) or root-mean-square normalisation of rows.

    Raises:
        ValueError: the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        centred: bool,
        weight: npt.NDArray[np.float32] | None,
        bias: npt.NDArray[np.float32] | None,
        epsilon: float,
    ) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        x: npt.NDArray[np.float32],
        residual: npt.NDArray[np.float32] | None,
        y: npt.NDArray[np.float32],
        sum: npt.NDArray[np.float32] | None,
        threads: int,
    ) -> None:
        """``y = norm(x + residual)`` and ``sum = x + residual``, each ``[rows, columns]`` with contiguous rows."""

class Pointwise(Instruction):
    """An activation, a sum, a difference, a product or a slope, value by value.

    Args:
        combine: ``multiply``, ``add``, ``subtract``, or ``slope``: the activation's value where it is above 0,
            elsewhere its product with the other.
        number: the other value, instead of an array.

    Raises:
        ValueError: the activation, combination or instruction set is unknown, or cannot run here.
    """

    def __init__(self, isa: str, activation: str, combine: str = "multiply", number: float | None = None) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        x: npt.NDArray[np.float32],
        other: npt.NDArray[np.float32] | None,
        y: npt.NDArray[np.float32],
        threads: int,
    ) -> None:
        """``y = activation(x) * other`` or another combination, each ``[rows, columns]`` with contiguous rows."""

class Rotary(Instruction):
    """Rotary position embedding.

    Raises:
        ValueError: the instruction set is unknown or cannot run here.
    """

    def __init__(self, isa: str, interleaved: bool) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        x: npt.NDArray[np.float32],
        cos: npt.NDArray[np.float32],
        sin: npt.NDArray[np.float32],
        y: npt.NDArray[np.float32],
        threads: int,
    ) -> None:
        """``y = x * cos + turned(x) * sin``: ``[B, H, S, D]`` and ``[B or 1, S, R]``; features contiguous."""

class Table(Instruction):
    """Rows of bytes, ``[rows, bytes]``."""

    def __init__(self, table: npt.NDArray[np.uint8], bfloat16: bool = False) -> None: ...
    def run(self, indices: npt.NDArray[np.int64], y: npt.NDArray[np.uint8], threads: int) -> None:
        """``y[i] = table[indices[i]]``.

        Raises:
            IndexError: an index is not in the table.
        """

class PackedTable(Instruction):
    """Rows of integer codes that stand for floats.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        bits: int,
        columns: int,
        group: int,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float32] | None,
        zeros: npt.NDArray[np.uint8] | None,
    ) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(self, indices: npt.NDArray[np.int64], y: npt.NDArray[np.float32], threads: int) -> None:
        """``y[i] = (codes - zeros) * scales`` of row ``indices[i]``.

        Raises:
            IndexError: an index is not in the table.
        """

class Attention:
    """Scaled dot-product attention. ``window`` 0 is none.

    Raises:
        ValueError: the instruction set is unknown or cannot run here.
    """

    def __init__(self, isa: str, scale: float, causal: bool, window: int) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        query: npt.NDArray[np.float32],
        key: npt.NDArray[np.float32] | npt.NDArray[np.int16] | npt.NDArray[np.int8],
        value: npt.NDArray[np.float32] | npt.NDArray[np.int16] | npt.NDArray[np.int8],
        out: npt.NDArray[np.float32],
        key_mask: npt.NDArray[np.bool_] | None,
        bias: npt.NDArray[np.float32] | npt.NDArray[np.bool_] | None,
        key_scales: npt.NDArray[np.float32] | None,
        value_scales: npt.NDArray[np.float32] | None,
        is_from_end: bool,
        threads: int,
    ) -> None:
        """``[B, H, S, D]``, ``[B, Hkv, T, D]``, ``[B, Hkv, T, Dv]`` to ``[B, H, S, Dv]``, of any strides but the last.

        Keys and values of 16 bits are bfloat16; of 8 bits they have scales ``[B, Hkv, T]``. Positions of causal limits
        and windows count from the last query and key (``is_from_end``) or from the first.

        Raises:
            ValueError: shapes, dtypes or strides do not fit.
        """

class DecoderAttention(Instruction):
    """A decoding step: queries and keys are turned, keys and values go into the caches, queries attend.

    ``window`` and ``softcap`` 0 are none; ``slopes`` are ``[Hq]``.

    Raises:
        ValueError: the instruction set is unknown or cannot run here, or window or softcap is negative.
    """

    def __init__(
        self,
        isa: str,
        scale: float,
        window: int,
        softcap: float,
        slopes: npt.NDArray[np.float32] | None,
        interleaved: bool,
    ) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(
        self,
        query: npt.NDArray[np.float32],
        key: npt.NDArray[np.float32],
        value: npt.NDArray[np.float32],
        cos: npt.NDArray[np.float32] | None,
        sin: npt.NDArray[np.float32] | None,
        keys: npt.NDArray[np.float32] | npt.NDArray[np.int16] | npt.NDArray[np.int8],
        values: npt.NDArray[np.float32] | npt.NDArray[np.int16] | npt.NDArray[np.int8],
        key_scales: npt.NDArray[np.float32] | None,
        value_scales: npt.NDArray[np.float32] | None,
        slots: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        out: npt.NDArray[np.float32],
        threads: int,
    ) -> None:
        """From ``[B, Hq, S, D]``, ``[B, Hkv, S, D]``, ``[B, Hkv, S, Dv]`` to ``[B, Hq, S, Dv]``; features contiguous.

        ``keys``, ``values`` ``[N, Hkv, C, D]`` and their scales ``[N, Hkv, C]`` are written; 16 bits are bfloat16.

        Raises:
            ValueError: shapes, dtypes or strides do not fit, or a slot or position is not in the caches.
        """

class Softmax:
    """Softmax over the last axis.

    Raises:
        ValueError: the instruction set is unknown or cannot run here.
    """

    def __init__(self, isa: str) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    def run(self, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], threads: int) -> None:
        """``y = softmax(x)``, both contiguous and of one shape.

        Raises:
            ValueError: the shapes differ.
        """

def pack_floats(stored: npt.NDArray[np.float32], bfloat16: bool, values: npt.NDArray[np.uint8], threads: int) -> None:
    """Weights, ``[outputs, columns]``, into the flat layout that the kernels stream, rounded to bfloat16 or not.

    Raises:
        ValueError: the sizes do not fit.
    """

def pack_bfloat16(stored: npt.NDArray[np.uint16], values: npt.NDArray[np.uint8], threads: int) -> None:
    """The same for bfloat16 weights, seen as uint16.

    Raises:
        ValueError: the sizes do not fit.
    """

class FloatLinear(LinearInstruction):
    """A linear on dense weights.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        outputs: int,
        columns: int,
        bfloat16: bool,
        values: npt.NDArray[np.uint8],
        bias: npt.NDArray[np.float32] | None,
    ) -> None: ...
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

MOST_NARROW: int

class NarrowLinear(LinearInstruction):
    """A linear of at most ``MOST_NARROW`` outputs on dense weights, ``[outputs, columns]`` as bytes.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        outputs: int,
        columns: int,
        bfloat16: bool,
        values: npt.NDArray[np.uint8],
        bias: npt.NDArray[np.float32] | None,
    ) -> None: ...
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

class KronLinear(LinearInstruction):
    """A linear on a Kronecker product: ``scale · A X Bᵀ``, ``b_columns`` being ``Bᵀ``, one product before the other.

    Raises:
        ValueError: a factor is empty, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        a: npt.NDArray[np.float32],
        b_columns: npt.NDArray[np.float32],
        scale: float,
        b_first: bool,
    ) -> None: ...
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

class NbitsLinear(LinearInstruction):
    """A linear on packed codes that computes in floats.

    Raises:
        ValueError: sizes do not fit, or the instruction set is unknown or cannot run here.
    """

    def __init__(
        self,
        isa: str,
        outputs: int,
        columns: int,
        coding: str,
        group_size: int,
        bfloat16: bool,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16] | npt.NDArray[np.float32],
        zeros: npt.NDArray[np.uint8] | None,
        table: npt.NDArray[np.float32] | None,
        bias: npt.NDArray[np.float32] | None,
    ) -> None: ...
    @property
    def isa(self) -> str:
        """The instruction set of the kernel that runs."""
    @property
    def exact_rows(self) -> int | None:
        """Beyond so many rows weights and activations are rounded to bfloat16; ``None``: never."""
    def run(
        self,
        x: npt.NDArray[np.float32],
        y: npt.NDArray[np.float32],
        threads: int,
        activation: str = "",
        factor: npt.NDArray[np.float32] | None = None,
        residual: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """As ``FloatLinear.run``."""
