"""The pass that quantises linears."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.ops.codebook import NAMES, codebook
from graphwright.ir.ops.quantization import BITS
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.activations import GridChoice, StaticGrid
from graphwright.passes.quantization.formats import DTYPES, Format
from graphwright.passes.quantization.loss import Loss, report_entries
from graphwright.passes.quantization.rounding import BlockRounding, InputRounding, Rounding, rounding_of
from graphwright.passes.quantization.schedule import Schedule, weight_name
from graphwright.passes.quantization.targets import LinearTarget, half_shared, is_head, linear_target
from graphwright.passes.quantization.weights import ChannelWeight, PackedWeight

# Relative error (root mean square) of one linear's output beyond which its weights are taken for wrong, not for
# rounded; by dtype, bits, and whether the clip is searched. On normal weights, with one scale per channel, rounding to
# nearest gives 0.005 (INT8), 0.1 (INT4), 0.2 and 0.27 without the search (INT3), 0.39 and 0.62 (INT2), 0.11 (NF4), 0.12
# (FP4), 0.026 (E4M3), 0.053 (E5M2); 0.01 with INT8 weights and activations.
LOCAL_LIMITS = {
    ("int", 8, True): 0.05,
    ("int", 8, False): 0.05,
    ("int", 4, True): 0.35,
    ("int", 4, False): 0.35,
    ("int", 3, True): 0.4,
    ("int", 3, False): 0.55,
    ("int", 2, True): 0.65,
    ("int", 2, False): 0.95,
    ("nf4", 4, True): 0.35,
    ("nf4", 4, False): 0.35,
    ("fp4", 4, True): 0.35,
    ("fp4", 4, False): 0.35,
    ("fp8_e4m3", 8, True): 0.1,
    ("fp8_e4m3", 8, False): 0.1,
    ("fp8_e5m2", 8, True): 0.15,
    ("fp8_e5m2", 8, False): 0.15,
}
# The same with activations rounded too, by bits of the weights and what the activations become.
_ROUNDED_ACTIVATIONS = {(8, "int8"): 0.15, (4, "int8"): 0.4, (4, "int4"): 0.8}

# Bits of activations.
_ACTIVATIONS = {"none": 0, "int8": 8, "int4": 4}
_RANGES = ("auto", "static", "per_token", "per_tensor", "per_group")


@dataclass(frozen=True, kw_only=True)
class QuantizeLinears(Pass):
    """Store the weights of linears in 2 to 8 bits, optionally with activations quantised on the fly.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = graphwright.linear_nbits(%x, %qweight, %scales, %zero_points, %b, 4, 128)      activations="none"
        %y = graphwright.linear_codebook(%x, %qweight, %scales, %b, "nf4", 64)              dtype="nf4"
        %y = graphwright.linear_nbits_dynamic(%x, %qweight, …, 4, 128, 8, "per_group")      the same, with bits=4
        %y = graphwright.linear_int8_dynamic(%x, %qweight, %scales, %b, "per_token")        activations="int8"
        %y = graphwright.linear_int8_static(%x, %qweight, %scales, %b, %input_scales, 131)  the same, with calibration

    Linears spelled ``addmm``, ``mm`` or ``matmul`` with a constant weight (GPT-2) count. A weight that several linears
    share is quantised once and stays shared. The new weights are named after the old one: ``….q_proj.weight`` becomes
    ``….q_proj.qweight``, ``….q_proj.scales``, ``….q_proj.zero_points`` and ``….q_proj.input_scales``.

    The report names the weights that lost most, with their signal-to-noise ratio: of the weight itself, or with GPTQ of
    the outputs on the calibration data.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag; a
    weight that is computed, not a floating matrix, of another dtype than the input, or that something else reads which
    stays in floating point (a tied embedding: it would be stored twice); ``addmm`` with factors.

    Attributes:
        bits: 2, 3, 4 or 8; those of the dtype's codes where that is not ``"int"``.
        dtype: what a code stands for. ``"int"``: a step. ``"nf4"`` (QLoRA's quantiles of the normal distribution),
            ``"fp4"`` (E2M1), ``"fp8_e4m3"`` and ``"fp8_e5m2"``: a value of that table, times the scale.
        group_size: columns to a scale: 16, 32, 64, 128, 256 or any larger multiple of 16; ``None`` for one scale per
            output channel. The last group of a row may be shorter.
        block: instead of a group size: rows and columns that share a scale, such as ``(128, 128)``. Scales are stored
            for every row, as with groups: one scale of 2 bytes for that many columns.
        symmetric: zero point fixed at the middle code. Asymmetric grids are a little larger and more exact.
        clip_search: choose the range with the least squared error instead of the full one.
        activations: ``"none"`` computes in floating point; ``"int8"`` quantises activations too, with symmetric 8-bit
            weights per channel or 4-bit weights of any kind; ``"int4"`` to 4 bits, with 4-bit weights (Ashkboos et al.
            2023, "QUIK"; :class:`SplitOutlierColumns` keeps out the features that 4 bits cannot hold).
        activation_ranges: with INT8 activations, where their range comes from. ``"per_token"`` and ``"per_tensor"``:
            from the data, as the model runs. ``"static"``: from the calibration data, with a scale for each feature
            moved into the weights (SmoothQuant); the fastest. ``"auto"``: static where the linear's outputs on the
            calibration data then err by 2 % at most, or by no more than per token; per token elsewhere, and without
            such data. 4-bit weights have ``"per_token"`` (asymmetric, QUIK's; with INT4 the default) and
            ``"per_group"`` (symmetric, for each row and group of the weights, which CPU kernels compute in INT8; with
            INT8 the default).
        rounding: how codes are chosen: the name of a method of :mod:`graphwright.passes.quantization.rounding` or one
            with options, such as ``Gptq(damping=0.1)``. By default GPTQ when there is calibration data, else nearest.
        calibration: typical inputs: batches, each as the model is called, a ``DataLoader`` of such, or
            :class:`CalibrationData`. Every linear is rounded for the inputs it gets from those rounded before it.
        lm_head: quantise the output head too.
        checkpoint: folder in which every weight is kept as soon as it is done. A run that was killed and is started
            again with the same things goes on there, with the same result to the last bit.
    """

    name: ClassVar[str] = "quantize-linears"
    contract: ClassVar[Contract] = Approximate()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized", "outlier"})

    bits: int = 8
    dtype: str = "int"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    clip_search: bool = True
    activations: str = "none"
    activation_ranges: str = "auto"
    rounding: str | Rounding | None = None
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    lm_head: bool = False
    checkpoint: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype in NAMES:
            object.__setattr__(self, "bits", codebook(self.dtype).bits)
        check_format(self.name, self.bits, self.group_size)
        check_codes(self.name, self.dtype, self.symmetric)
        if self.block is not None:
            object.__setattr__(self, "block", _checked_block(self.name, self.block, self.group_size))
        _one_of(self.name, "activations", self.activations, _ACTIVATIONS)
        _one_of(self.name, "activation_ranges", self.activation_ranges, _RANGES)
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))
        chosen = self._rounding()
        needy = {"rounding": chosen.method} if isinstance(chosen, InputRounding | BlockRounding) else {}
        needy |= {"activation_ranges": "static"} if self.activation_ranges == "static" else {}
        for option, value in needy.items():
            if self.calibration is None:
                raise InputError(
                    "needs calibration data",
                    where=f"{self.name}: {option}={value!r}",
                    hint="give calibration=[batch, ...], on the command line --calibration FILE",
                )
        self._check_activations()

    def _check_activations(self) -> None:
        plain = self.dtype == "int" and self.group_size is None and self.block is None and self.symmetric
        narrow = self.dtype == "int" and self.bits == 4
        if self.activations == "int8" and not (narrow or (self.bits == 8 and plain)):
            raise InputError(
                "INT8 activations go with symmetric INT8 weights, one scale per channel, or with 4-bit weights",
                where=f"{self.name}: activations='int8'",
                hint="use bits=8, dtype='int', group_size=None, block=None, symmetric=True",
            )
        if self.activations == "int4" and not narrow:
            raise InputError(
                "INT4 activations go with 4-bit integer weights",
                where=f"{self.name}: activations='int4'",
                hint="use bits=4, dtype='int'",
            )
        ranges = self.activation_ranges
        if ranges == "auto" or self.activations == "none":
            return
        if (narrow and ranges in ("static", "per_tensor")) or (not narrow and ranges == "per_group"):
            raise InputError(
                f"{self.bits}-bit weights do not have it",
                where=f"{self.name}: activation_ranges={ranges!r}",
                hint="use 'per_token' or 'per_group'" if narrow else "use 'auto', 'static', 'per_token', 'per_tensor'",
            )

    def _activation_ranges(self) -> tuple[int, str] | None:
        """Bits and ranges of activations that meet weights packed in a few bits; ``None`` where there are none."""
        if self.activations == "none" or self.bits == 8:
            return None
        usual = "per_group" if self.activations == "int8" else "per_token"
        ranges = usual if self.activation_ranges == "auto" else self.activation_ranges
        return _ACTIVATIONS[self.activations], ranges

    def effective_contract(self) -> Contract:
        """Approximate, with a limit for each linear by bits."""
        limit = LOCAL_LIMITS[self.dtype, self.bits, self.clip_search]
        base = Approximate(max_local_error=_ROUNDED_ACTIVATIONS.get((self.bits, self.activations), limit))
        return base if self.max_error is None else dataclasses.replace(base, max_relative_error=float(self.max_error))

    def options(self) -> dict[str, Any]:
        """Options as JSON values; calibration data in words."""
        found = super().options()
        if isinstance(self.rounding, Rounding):
            found["rounding"] = {"method": self.rounding.method, **self.rounding.options()}
        if self.calibration is not None:
            found["calibration"] = str(self.calibration)
        return found

    def _integer_products(self) -> bool:
        """Whether products are those of bytes, one scale to a channel."""
        return self.activations == "int8" and self.bits == 8

    def _rounding(self) -> Rounding:
        usual = "nearest" if self.calibration is None else "gptq"
        return rounding_of(self.rounding or usual, where=f"{self.name}: rounding")

    def run(self, program: Program) -> bool:
        """Quantise every linear that is selected and can be.

        Raises:
            InputError: a weight or the calibration data holds NaN or infinity, the calibration data is too short, or
                the checkpoint is of another run.
        """
        targets = self._targets(program)
        losses: dict[str, Loss] = {}
        static = 0
        with program.edit() as rewriter:
            forms, method, grids = self._forms(targets), self._rounding(), self._grids()
            schedule = Schedule(program, targets, forms, method, grids, self.checkpoint)
            for found in schedule.run(self.calibration):
                losses[weight_name(found.target)] = found.packed.loss
                static += found.grid is not None
                self._rewrite(rewriter, self._now(program, found.target), found.packed, found.grid)
            program.notes["linears"] = len(targets)
            if self._integer_products():
                program.notes["static_ranges"] = static
            if losses:
                program.notes.update(report_entries(losses))
            return rewriter.changed

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _targets(self, program: Program) -> list[LinearTarget]:
        chosen = self.selected(program)
        targets: list[LinearTarget] = []
        reasons: dict[fx.Node, str] = {}
        for node in program.nodes:
            found = linear_target(program, node) if node.op == "call_function" else None
            if found is None:
                continue
            reason = found if isinstance(found, str) else self._refuse(program, node, chosen(node))
            if reason is not None:
                reasons[node] = reason
            elif isinstance(found, LinearTarget):
                targets.append(found)
        reasons.update(half_shared(program, targets))
        refusals = [Refusal(self.name, node.name, path_of(node), reason, 1) for node, reason in reasons.items()]
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return [target for target in targets if target.node not in reasons]

    def _refuse(self, program: Program, node: fx.Node, selected: bool) -> str | None:
        if not selected:
            return "not selected by where= / ignore="
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if not self.lm_head and is_head(program, node):
            return "it is the output head, which is left in floating point (set lm_head=True to quantise it)"
        return None

    # -- quantising ----------------------------------------------------------------------------------------------------

    def _forms(self, targets: Sequence[LinearTarget]) -> dict[str, Format]:
        form = Format(
            self.bits,
            self.group_size if self.block is None else self.block[1],
            self.symmetric,
            self.clip_search,
            integer_products=self._integer_products(),
            codebook=None if self.dtype == "int" else self.dtype,
            block_rows=1 if self.block is None else self.block[0],
        )
        return {weight_name(target): form for target in targets}

    def _grids(self) -> GridChoice | None:
        if not self._integer_products() or self.calibration is None or self.activation_ranges not in ("auto", "static"):
            return None
        return GridChoice(always=self.activation_ranges == "static")

    @staticmethod
    def _now(program: Program, target: LinearTarget) -> LinearTarget:
        """The target as it stands: its input may be a linear that has been replaced since."""
        found = linear_target(program, target.node)
        assert isinstance(found, LinearTarget)
        return found

    def _rewrite(
        self, rewriter: Rewriter, target: LinearTarget, packed: PackedWeight | ChannelWeight, grid: StaticGrid | None
    ) -> None:
        node, tags, base = target.node, ("quantized",), stem(str(target.weight.target))
        if isinstance(packed, PackedWeight):
            operands = store(rewriter, packed, base, node)
            rewriter.replace(node, packed_linear(rewriter, target, packed, operands, self._activation_ranges()))
            return
        codes = rewriter.weight(f"{base}qweight", packed.qweight, like=node, tags=tags)
        scales = rewriter.weight(f"{base}scales", packed.scales, like=node, tags=tags)
        rest: tuple[Any, ...]
        if grid is None:
            mode = "per_tensor" if self.activation_ranges == "per_tensor" else "per_token"
            op, rest = "graphwright.linear_int8_dynamic", (mode,)
        else:
            factors = rewriter.weight(f"{base}input_scales", grid.scales, like=node, tags=tags)
            op, rest = "graphwright.linear_int8_static", (factors, grid.zero_point)
        rewriter.replace(node, rewriter.call(op, target.x, codes, scales, target.bias, *rest, like=node, tags=tags))


def stem(weight: str) -> str:
    """What the names of new weights begin with: those of ``a.weight`` stand in ``a``, those of ``a.in_proj_weight``
    beside it."""
    return weight.removesuffix("weight") if weight.rpartition(".")[2] == "weight" else f"{weight}_"


def store(
    rewriter: Rewriter, packed: PackedWeight, base: str, like: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Weights of a packed matrix: codes, scales and zero points (``None`` when symmetric)."""
    tags = ("quantized",)
    codes = rewriter.weight(f"{base}qweight", packed.qweight, like=like, tags=tags)
    scales = rewriter.weight(f"{base}scales", packed.scales, like=like, tags=tags)
    zeros = packed.zero_points
    zero_points = rewriter.weight(f"{base}zero_points", zeros, like=like, tags=tags) if zeros is not None else None
    return codes, scales, zero_points


def packed_linear(
    rewriter: Rewriter,
    target: LinearTarget,
    packed: PackedWeight,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    activations: tuple[int, str] | None = None,
) -> fx.Node:
    """The linear on packed weights that stands for another.

    Args:
        rewriter: of the program.
        target: the linear.
        packed: its weight.
        operands: what :func:`store` gave.
        activations: bits that its inputs are rounded to as they come, and the ranges' name; ``None``: they stay floats.
    """
    codes, scales, zero_points = operands
    book, group = packed.form.codebook, packed.group_size
    op, rest = "graphwright.linear_codebook", [codes, scales, target.bias, book, group]
    if book is None:
        op, rest = "graphwright.linear_nbits", [codes, scales, zero_points, target.bias, packed.form.bits, group]
    return rewriter.call(op, target.x, *rest, like=target.node, tags=("quantized",))


def check_format(name: str, bits: int, group_size: int | None) -> None:
    """Check bits and group size.

    Raises:
        InputError: naming the option and what it may be.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"must be 2, 3, 4 or 8, not {bits!r}", where=f"{name}: bits")
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 16 or group_size % 16:
        raise InputError(
            f"must be a multiple of 16 (such as 32, 64, 128), or None for one scale per channel, not {group_size!r}",
            where=f"{name}: group_size",
        )


def check_codes(name: str, dtype: str, symmetric: bool) -> None:
    """Check what codes stand for.

    Raises:
        InputError: naming the option and what it may be.
    """
    _one_of(name, "dtype", dtype, DTYPES)
    if dtype != "int" and not symmetric:
        raise InputError(
            f"codes of {dtype!r} have no zero points", where=f"{name}: symmetric=False", hint="use dtype='int'"
        )


def _checked_block(name: str, block: object, group_size: int | None) -> tuple[int, int]:
    """The rows and columns of a block; a recipe may give them as a list."""
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if len(sizes) != 2 or not whole or sizes[1] % 16:
        raise InputError(
            f"must be a number of rows and a multiple of 16 columns, such as (128, 128), not {block!r}",
            where=f"{name}: block",
        )
    if group_size not in (None, sizes[1]):
        raise InputError("is given besides a group size", where=f"{name}: block", hint="leave group_size out")
    return sizes[0], sizes[1]


def _one_of(name: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"must be one of {', '.join(map(repr, choices))}, not {value!r}", where=f"{name}: {option}")
