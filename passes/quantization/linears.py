"""The pass that quantises linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.activations import GridChoice
from graphwright.passes.quantization.compensation import Compensation
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss, report_entries
from graphwright.passes.quantization.rounding import BlockRounding, InputRounding, Rounding, rounding_of
from graphwright.passes.quantization.schedule import Quantized, Schedule, weight_name
from graphwright.passes.quantization.targets import LinearTarget, half_shared, is_head, linear_target
from graphwright.passes.quantization.weights import PackedWeight

# Relative error (root mean square) of one linear's output beyond which its weights are taken for wrong, not for
# rounded. Rounding to nearest gives about 0.005 (INT8), 0.01 (INT8 with INT8 activations) and 0.1 (INT4) on normal
# weights.
_LOCAL_LIMITS = {(8, "none"): 0.05, (8, "int8"): 0.15, (4, "none"): 0.35}

_ACTIVATIONS = ("none", "int8")
_RANGES = ("auto", "static", "per_token", "per_tensor")


@dataclass(frozen=True, kw_only=True)
class QuantizeLinears(Pass):
    """Store the weights of linears as INT8 or INT4, optionally with activations quantised on the fly.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = graphwright.linear_nbits(%x, %qweight, %scales, %zero_points, %b, 4, 128)      activations="none"
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
        bits: 8 or 4.
        group_size: columns to a scale: 16, 32, 64, 128, 256 or any larger multiple of 16; ``None`` for one scale per
            output channel. The last group of a row may be shorter.
        symmetric: zero point fixed at the middle code. Asymmetric grids are a little larger and more exact.
        clip_search: choose the range with the least squared error instead of the full one.
        activations: ``"none"`` computes in floating point; ``"int8"`` quantises activations too (8 bits, per channel
            weights).
        activation_ranges: with INT8 activations, where their range comes from. ``"per_token"`` and ``"per_tensor"``:
            from the data, as the model runs. ``"static"``: from the calibration data, with a scale for each feature
            moved into the weights (SmoothQuant); the fastest. ``"auto"``: static where the linear's outputs on the
            calibration data then err by 2 % at most, or by no more than per token; per token elsewhere, and without
            such data.
        rounding: how codes are chosen: the name of a method of :mod:`graphwright.passes.quantization.rounding` or one
            with options, such as ``Gptq(damping=0.1)``. By default GPTQ when there is calibration data, else nearest.
        calibration: typical inputs: batches, each as the model is called, a ``DataLoader`` of such, or
            :class:`CalibrationData`. Every linear is rounded for the inputs it gets from those rounded before it.
        compensation: what is put beside each linear for a part of what rounding lost: ``LowRank(rank=8)`` or
            ``LoftQ(rank=16)``, see :mod:`graphwright.passes.quantization.compensation`.
        lm_head: quantise the output head too.
    """

    name: ClassVar[str] = "quantize-linears"
    contract: ClassVar[Contract] = Approximate()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "compensation", "masked", "quantized"})

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = True
    activations: str = "none"
    activation_ranges: str = "auto"
    rounding: str | Rounding | None = None
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    compensation: Compensation | None = None
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.name, self.bits, self.group_size)
        _one_of(self.name, "activations", self.activations, _ACTIVATIONS)
        _one_of(self.name, "activation_ranges", self.activation_ranges, _RANGES)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))
        if self.compensation is not None and not isinstance(self.compensation, Compensation):
            raise InputError(
                f"must be LowRank(...), LoftQ(...) or None, not {self.compensation!r}",
                where=f"{self.name}: compensation",
            )
        chosen = self._rounding()
        if isinstance(chosen, BlockRounding) and self.compensation is not None and self.compensation.turns > 1:
            raise InputError(
                f"rounds linears several times, which {chosen.method} does for whole blocks only",
                where=f"{self.name}: compensation={self.compensation.method!r}",
                hint="use another rounding, or steps=1",
            )
        needy = {"rounding": chosen.method} if isinstance(chosen, InputRounding | BlockRounding) else {}
        needy |= {"activation_ranges": "static"} if self.activation_ranges == "static" else {}
        for option, value in needy.items():
            if self.calibration is None:
                raise InputError(
                    "needs calibration data",
                    where=f"{self.name}: {option}={value!r}",
                    hint="give calibration=[batch, ...]",
                )
        if self.activations == "int8" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise InputError(
                "INT8 activations go with symmetric INT8 weights, one scale per channel",
                where=f"{self.name}: activations='int8'",
                hint="use bits=8, group_size=None, symmetric=True",
            )

    def effective_contract(self) -> Contract:
        """Approximate, with a limit for each linear by bits."""
        base = Approximate(max_local_error=_LOCAL_LIMITS[self.bits, self.activations])
        return base if self.max_error is None else dataclasses.replace(base, max_relative_error=float(self.max_error))

    def options(self) -> dict[str, Any]:
        """Options as JSON values; calibration data in words."""
        found = super().options()
        if isinstance(self.rounding, Rounding):
            found["rounding"] = {"method": self.rounding.method, **found["rounding"]}
        if self.compensation is not None:
            found["compensation"] = {"method": self.compensation.method, **found["compensation"]}
        if self.calibration is not None:
            found["calibration"] = str(self.calibration)
        return found

    def _rounding(self) -> Rounding:
        usual = "nearest" if self.calibration is None else "gptq"
        return rounding_of(self.rounding or usual, where=f"{self.name}: rounding")

    def run(self, program: Program) -> bool:
        """Quantise every linear that is selected and can be.

        Raises:
            InputError: a weight or the calibration data holds NaN or infinity.
        """
        targets = self._targets(program)
        losses: dict[str, Loss] = {}
        static = 0
        with program.edit() as rewriter:
            schedule = Schedule(
                program, targets, self._forms(targets), self._rounding(), self._grids(), self.compensation
            )
            for found in schedule.run(self.calibration):
                losses[weight_name(found.target)] = found.packed.loss
                static += found.grid is not None
                self._rewrite(rewriter, self._now(program, found.target), found)
            program.notes["linears"] = len(targets)
            if self.activations == "int8":
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
        products = self.activations == "int8"
        form = Format(self.bits, self.group_size, self.symmetric, self.clip_search, integer_products=products)
        return {weight_name(target): form for target in targets}

    def _grids(self) -> GridChoice | None:
        if self.activations != "int8" or self.calibration is None or self.activation_ranges not in ("auto", "static"):
            return None
        return GridChoice(always=self.activation_ranges == "static")

    @staticmethod
    def _now(program: Program, target: LinearTarget) -> LinearTarget:
        """The target as it stands: its input may be a linear that has been replaced since."""
        found = linear_target(program, target.node)
        assert isinstance(found, LinearTarget)
        return found

    def _rewrite(self, rewriter: Rewriter, target: LinearTarget, found: Quantized) -> None:
        node, base = target.node, stem(str(target.weight.target))
        new = self._linear(rewriter, target, found, base)
        if found.branch is not None:
            new = found.branch.add(rewriter, base, target.x, new, like=node)
        rewriter.replace(node, new)

    def _linear(self, rewriter: Rewriter, target: LinearTarget, found: Quantized, base: str) -> fx.Node:
        node, packed, tags = target.node, found.packed, ("quantized",)
        if isinstance(packed, PackedWeight):
            rest: tuple[Any, ...] = (target.bias, self.bits, packed.group_size)
            operands = (*store(rewriter, packed, base, node), *rest)
            return rewriter.call("graphwright.linear_nbits", target.x, *operands, like=node, tags=tags)
        codes = rewriter.weight(f"{base}qweight", packed.qweight, like=node, tags=tags)
        scales = rewriter.weight(f"{base}scales", packed.scales, like=node, tags=tags)
        if found.grid is None:
            mode = "per_tensor" if self.activation_ranges == "per_tensor" else "per_token"
            op, rest = "graphwright.linear_int8_dynamic", (mode,)
        else:
            factors = rewriter.weight(f"{base}input_scales", found.grid.scales, like=node, tags=tags)
            op, rest = "graphwright.linear_int8_static", (factors, found.grid.zero_point)
        return rewriter.call(op, target.x, codes, scales, target.bias, *rest, like=node, tags=tags)


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


def check_format(name: str, bits: int, group_size: int | None) -> None:
    """Check bits and group size.

    Raises:
        InputError: naming the option and what it may be.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise InputError(f"must be 4 or 8, not {bits!r}", where=f"{name}: bits")
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 16 or group_size % 16:
        raise InputError(
            f"must be a multiple of 16 (such as 32, 64, 128), or None for one scale per channel, not {group_size!r}",
            where=f"{name}: group_size",
        )


def _one_of(name: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"must be one of {', '.join(map(repr, choices))}, not {value!r}", where=f"{name}: {option}")
