"""Casts that change nothing, and casts in a row."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import DTYPE_NAMES, fake_of, is_tensor

CASTS = frozenset(
    {"aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten._to_copy", "aten.type_as"}
)

# dtype -> bits of the integers it holds without a gap, bits of the exponent (0: integers only), whether negative too
_RANGES: dict[torch.dtype, tuple[int, int, bool]] = {
    torch.bool: (1, 0, False),
    torch.uint8: (8, 0, False),
    torch.int8: (7, 0, True),
    torch.int16: (15, 0, True),
    torch.int32: (31, 0, True),
    torch.int64: (63, 0, True),
    torch.float16: (11, 5, True),
    torch.bfloat16: (8, 8, True),
    torch.float32: (24, 8, True),
    torch.float64: (53, 11, True),
}


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether ``wide`` holds every value of ``narrow``."""
    if wide == narrow:
        return True
    if wide not in _RANGES or narrow not in _RANGES:
        return False
    bits, exponent, signed = _RANGES[wide]
    wanted_bits, wanted_exponent, wanted_signed = _RANGES[narrow]
    return bits >= wanted_bits and exponent >= wanted_exponent and (signed or not wanted_signed)


def _cast(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if op_name(node) in CASTS and node.args else None
    return source if isinstance(source, fx.Node) and is_tensor(source) and is_tensor(node) else None


def cast_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a cast to the dtype and device it already has."""
    source = _cast(node)
    if source is None:
        return None
    before, after = fake_of(source), fake_of(node)
    same = before.dtype == after.dtype and before.device == after.device and before.layout == after.layout
    return source if same else None


def double_cast(program: Program, node: fx.Node) -> fx.Node | str | None:
    """What a cast there and back again started from."""
    middle = _cast(node)
    source = _cast(middle) if middle is not None else None
    if middle is None or source is None or fake_of(source).device != fake_of(node).device:
        return None
    start, through, end = (fake_of(item).dtype for item in (source, middle, node))
    if start != end or start == through:
        return None
    if not holds(through, start):
        names = [DTYPE_NAMES.get(dtype, dtype) for dtype in (through, start)]
        return f"{names[0]} does not hold every value of {names[1]}, so the casts round"
    return source


def detach_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a detach, where there is no gradient to stop."""
    if op_name(node) != "aten.detach":
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    dtype = fake_of(source).dtype
    if dtype.is_floating_point or dtype.is_complex:
        return "it stops the gradient when the program is trained"
    return source


class CastChain(Rule):
    """Two casts, the first of which loses nothing, into one."""

    name = "remove-no-ops: casts in a row"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        middle = _cast(node)
        source = _cast(middle) if middle is not None else None
        if middle is None or source is None or len(middle.users) > 1:
            return -1, ""
        match = Match(program, node, {"source": source})
        match.inner = [middle, node]
        devices = {fake_of(item).device for item in (source, middle, node)}
        start, through, end = (fake_of(item).dtype for item in (source, middle, node))
        # Floats beyond an integer dtype's range convert to whatever the hardware gives, and not alike from every dtype.
        plain = end.is_floating_point or end == torch.bool
        laid_out = arguments_of(node).get("memory_format") is not None
        if len(devices) > 1 or not holds(through, start) or not plain or laid_out:
            return -1, ""
        return match

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        return rewriter.call("aten.to.dtype", match.node("source"), fake_of(match.root).dtype, like=match.root)
