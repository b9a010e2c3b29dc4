"""What sparse and dense linears cost for each weight, and so from which share of zeros on sparse ones are faster.

Nanoseconds for 64 weights on one core, measured on an AMD EPYC of family 25 (Zen 4); ``benchmarks/sparse.py`` measures
the linears anew. What counts are ratios, which differ less between CPUs than the numbers do. A linear takes as long as
its arithmetic or as reading its weights from memory, whichever is longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A core's share of the memory's bandwidth: 19.5 GB/s.
_NS_PER_BYTE = 0.051
_FEW_ROWS = {"avx512_vbmi2": 4, "avx512": 4, "avx2": 1}
# Floats of many rows whose zeros are skipped: of the dense kernel's time so much, and so much for the share that is not
# zero; weights that are not stored in the order for it take time of their own, each.
_SKIP_ROWS, _SKIP_LEAST, _SKIP_SHARE, _NS_PER_ENTRY = 32, 0.19, 1.25, 2.5
# Gathered columns. Of the dense kernel's products that many are made: of a window of 64 columns, outputs that have none
# left in it wait. (Counted: random zeros of 4096 columns, 5 to 50 % not zeros.) Each picks its bytes of the row first.
_LEAST_SLOTS, _SLOTS, _PICK = 0.047, 0.955, 1.4
_SLOT_BYTES = 2
# Blocks of four columns, for many rows: of the dense kernel's time so much, and so much for the share of blocks that is
# stored, rows counted by vectors. (Measured on family 26, Zen 5.) They are taken where their share is not above that of
# weights by more than what outputs wait for each other otherwise.
_BLOCK_LEAST, _BLOCK_SHARE, _BLOCK_ROWS, _WAITING = 0.11, 1.57, 16, 0.045
_BLOCK_BYTES = 5


@dataclass(frozen=True)
class Arithmetic:
    """Nanoseconds for 64 weights.

    Attributes:
        least, row: of a sparse linear with a few rows, whose weights are expanded in registers: at least, and by row.
        expand: of making dense weights of sparse ones in the cache.
        dense_least, dense_row: of the dense linear.
        dense_bytes: of a dense weight.
        value_bytes: of a value that is stored.
    """

    least: float
    row: float
    expand: float
    dense_least: float
    dense_row: float
    dense_bytes: float
    value_bytes: float

    def dense(self, rows: int) -> float:
        """Of the dense linear."""
        return max(64 * self.dense_bytes * _NS_PER_BYTE, self.dense_least, rows * self.dense_row)

    def sparse(
        self, rows: int, density: float, few: int, *, skips: bool, gathers: bool = False, blocks: bool = False
    ) -> float:
        """Of the sparse one, of whose weights a share of ``density`` is stored."""
        memory = (8 + 64 * density * self.value_bytes) * _NS_PER_BYTE
        if rows <= few:
            return max(memory, self.least, rows * self.row)
        expanded = max(memory, self.expand + rows * self.dense_row)
        if skips:
            skipped = (_SKIP_LEAST + _SKIP_SHARE * density) * rows * self.dense_row
            listed = 0.0 if gathers else 64 * density * _NS_PER_ENTRY
            return min(expanded, skipped + listed) if rows >= _SKIP_ROWS else expanded
        if gathers and blocks:
            whole = -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS
            read = 16 * density * _BLOCK_BYTES * _NS_PER_BYTE
            return max(read, (_BLOCK_LEAST + _BLOCK_SHARE * density) * whole * self.dense_row)
        if gathers:
            slots = _LEAST_SLOTS + _SLOTS * density
            return slots * max(64 * _SLOT_BYTES * _NS_PER_BYTE, rows * self.dense_row * _PICK)
        return expanded


# By the kernels' instruction set and the kind of values. 4-bit values of two words share bytes, which fills them less.
_TABLE: dict[tuple[str, str], Arithmetic] = {
    ("avx512_vbmi2", "int8"): Arithmetic(0.95, 0.5, 2.0, 0.62, 0.15, 1.0, 1.0),
    ("avx512_vbmi2", "int4"): Arithmetic(0.95, 0.5, 2.0, 0.9, 0.17, 0.53, 0.54),
    ("avx512", "float32"): Arithmetic(3.6, 1.7, 4.0, 2.5, 1.14, 4.0, 4.0),
    ("avx512", "bfloat16"): Arithmetic(3.6, 1.7, 4.0, 2.0, 0.63, 2.0, 2.0),
    ("avx2", "float32"): Arithmetic(6.2, 6.2, 6.0, 2.5, 1.2, 4.0, 4.0),
    ("avx2", "bfloat16"): Arithmetic(6.2, 6.2, 6.0, 2.5, 1.2, 2.0, 2.0),
    ("avx2", "int8"): Arithmetic(7.0, 7.0, 7.0, 1.4, 1.1, 1.0, 1.0),
    ("avx2", "int4"): Arithmetic(7.0, 7.0, 7.0, 1.5, 1.1, 0.53, 0.54),
}
_BYTES = {
    "avx_vnni": "avx2",
    "avx512": "avx2",
    "avx512_vnni": "avx2",
    "avx512_bf16": "avx512_vbmi2",
    "amx": "avx512_vbmi2",
}
_FLOAT_KINDS = ("float32", "bfloat16")
_FLOATS = {"avx_vnni": "avx2", **dict.fromkeys(("avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx"), "avx512")}


def can_gather(isa: str, kind: str, rows: int) -> bool:
    """Whether an instruction set has a kernel for so many rows that takes each output's own columns."""
    if kind in _FLOAT_KINDS:
        return rows >= _SKIP_ROWS
    own = _BYTES.get(isa, isa)
    return own == "avx512_vbmi2" and rows > _FEW_ROWS[own]


def stored_blocks(bits: torch.Tensor) -> int:
    """Blocks of four columns with a weight that is stored; ``bits`` are uint8, a bit for each column."""
    return int((bits & 15).count_nonzero()) + int((bits >> 4).count_nonzero())


def come_in_blocks(density: float, blocks: float) -> bool:
    """Whether many rows are faster on blocks of four columns than on gathered ones, by the shares that are stored."""
    return blocks < density + _WAITING


def least_sparsity(isa: str, kind: str, rows: int, *, gathers: bool = False, blocks: bool = False) -> float | None:
    """The share of zeros from which on a sparse linear is faster than the dense one on the same values.

    Args:
        isa: instruction set that is used.
        kind: of the values: ``float32``, ``bfloat16``, ``int8`` or ``int4`` (the last two with activations rounded to
            8 bits).
        rows: of the input.
        gathers: whether each output's weights may be stored one after another a second time; codes have one scale for
            each output then, and no zero points.
        blocks: whether zeros of codes come in blocks of four columns (:func:`come_in_blocks`).

    Returns:
        a share in whole per cent, or ``None`` where no share is enough.
    """
    floats = kind in _FLOAT_KINDS
    own = (_FLOATS if floats else _BYTES).get(isa, isa)
    costs = _TABLE.get((own, kind))
    if costs is None:
        return None
    few = _FEW_ROWS[own] if own != "avx2" or floats else 0
    gathers = gathers and can_gather(isa, kind, rows)
    for percent in range(101):
        if costs.sparse(rows, 1 - percent / 100, few, skips=floats, gathers=gathers, blocks=blocks) < costs.dense(rows):
            return percent / 100
    return None
