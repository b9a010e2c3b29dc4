"""The pass that quantises linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.activations import StaticGrid, per_token_error, static_grid
from graphwright.passes.quantization.calibration import Batch, Observations, Observed
from graphwright.passes.quantization.loss import report_entries
from graphwright.passes.quantization.targets import LinearTarget, half_shared, is_head, linear_target
from graphwright.passes.quantization.weights import (
    ChannelWeight,
    Format,
    PackedWeight,
    check_finite,
    quantize_weight,
    quantize_weight_gptq,
    quantize_weight_int8,
    quantize_weight_int8_gptq,
)

# Relative error (root mean square) of one linear's output beyond which its weights are taken for wrong, not for
# rounded. Rounding to nearest gives about 0.005 (INT8), 0.01 (INT8 with INT8 activations) and 0.1 (INT4) on normal
# weights.
_LOCAL_LIMITS = {(8, "none"): 0.05, (8, "int8"): 0.15, (4, "none"): 0.35}

# Error of a linear's outputs up to which static ranges are taken for granted: 8-bit rounding itself makes 1 to 2 %.
_SMALL_ERROR = 0.02

_ACTIVATIONS = ("none", "int8")
_RANGES = ("auto", "static", "per_token", "per_tensor")
_ROUNDINGS = ("nearest", "gptq")

_Packed: TypeAlias = tuple[PackedWeight | ChannelWeight, StaticGrid | None]


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
        rounding: ``"nearest"``, or ``"gptq"`` (Frantar et al. 2023), which needs ``calibration``. By default GPTQ when
            there is calibration data.
        calibration: batches of typical inputs, each as the model is called.
        damping: GPTQ: added to the second moments' diagonal, as a fraction of its mean.
        lm_head: quantise the output head too.
    """

    name: ClassVar[str] = "quantize-linears"
    contract: ClassVar[Contract] = Approximate()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized"})

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = True
    activations: str = "none"
    activation_ranges: str = "auto"
    rounding: str | None = None
    calibration: Sequence[Batch] | None = field(default=None, compare=False)
    damping: float = 0.01
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.name, self.bits, self.group_size)
        _one_of(self.name, "activations", self.activations, _ACTIVATIONS)
        _one_of(self.name, "activation_ranges", self.activation_ranges, _RANGES)
        if self.rounding is not None:
            _one_of(self.name, "rounding", self.rounding, _ROUNDINGS)
        if not 0.0 < self.damping < 10.0:
            raise InputError(f"must be above 0, not {self.damping!r}", where=f"{self.name}: damping")
        for option, value in (("rounding", "gptq"), ("activation_ranges", "static")):
            if getattr(self, option) == value and self.calibration is None:
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
        """Options as JSON values; calibration data as its number of batches."""
        found = super().options()
        if self.calibration is not None:
            found["calibration"] = f"{len(self.calibration)} batches"
        return found

    def run(self, program: Program) -> bool:
        """Quantise every linear that is selected and can be.

        Raises:
            InputError: a weight or the calibration data holds NaN or infinity.
        """
        targets = self._targets(program)
        inputs = self._inputs(program, targets)
        sources = _sources(targets)
        packed: dict[str, _Packed] = {}
        with program.edit() as rewriter:
            for target in targets:
                name = str(target.weight.target)
                if name not in packed:
                    packed[name] = self._quantize(program, target, inputs.get(target.x), len(sources[name]) == 1)
                    release(program.tensor(target.weight))
                self._rewrite(rewriter, self._now(program, target), *packed[name])
            program.notes["linears"] = len(targets)
            if self.activations == "int8":
                program.notes["static_ranges"] = sum(grid is not None for _, grid in packed.values())
            if packed:
                program.notes.update(report_entries({name: found.loss for name, (found, _) in packed.items()}))
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

    def _inputs(self, program: Program, targets: list[LinearTarget]) -> Mapping[fx.Node, Observed]:
        ranges = self.activations == "int8" and self.activation_ranges in ("auto", "static")
        if self.calibration is None or (self.rounding == "nearest" and not ranges):
            return {}
        return Observations(program, list(dict.fromkeys(target.x for target in targets)), self.calibration)

    # -- quantising ----------------------------------------------------------------------------------------------------

    def _quantize(self, program: Program, target: LinearTarget, inputs: Observed | None, one_source: bool) -> _Packed:
        weight, name = program.tensor(target.weight), str(target.weight.target)
        if target.transposed:
            weight = weight.t()
        moment = inputs.moment if inputs is not None and self.rounding != "nearest" else None
        if self.activations == "int8":
            grid = self._grid(weight, name, inputs, one_source)
            if grid is not None:
                weight = weight.detach().to(torch.float32) * grid.scales
                moment = moment / (grid.scales.unsqueeze(-1) * grid.scales) if moment is not None else None
            if moment is not None:
                return quantize_weight_int8_gptq(
                    weight, moment, clip_search=self.clip_search, damping=self.damping, name=name
                ), grid
            return quantize_weight_int8(weight, clip_search=self.clip_search, name=name), grid
        form = Format(self.bits, self.group_size, self.symmetric, self.clip_search)
        if moment is not None:
            return quantize_weight_gptq(weight, moment, form, damping=self.damping, name=name), None
        return quantize_weight(weight, form, name=name), None

    def _grid(self, weight: torch.Tensor, name: str, inputs: Observed | None, one_source: bool) -> StaticGrid | None:
        """The static grid of a linear's input; ``None`` for grids made as the data comes.

        A weight that linears with several inputs share holds no input's scales.
        """
        if inputs is None or not one_source or self.activation_ranges not in ("auto", "static"):
            return None
        check_finite(weight, name)
        try:
            grid = static_grid(inputs, weight)
        except InputError as error:
            raise InputError(error.what, where=f"the input of weight {name!r}", hint="look at the batches") from error
        if self.activation_ranges == "static" or grid.error <= _SMALL_ERROR:
            return grid
        return grid if grid.error <= per_token_error(inputs, weight) else None

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
            rest: tuple[Any, ...] = (target.bias, self.bits, packed.group_size)
            operands = (*store(rewriter, packed, base, node), *rest)
            new = rewriter.call("graphwright.linear_nbits", target.x, *operands, like=node, tags=tags)
            rewriter.replace(node, new)
            return
        codes = rewriter.weight(f"{base}qweight", packed.qweight, like=node, tags=tags)
        scales = rewriter.weight(f"{base}scales", packed.scales, like=node, tags=tags)
        if grid is None:
            mode = "per_tensor" if self.activation_ranges == "per_tensor" else "per_token"
            op, rest = "graphwright.linear_int8_dynamic", (mode,)
        else:
            factors = rewriter.weight(f"{base}input_scales", grid.scales, like=node, tags=tags)
            op, rest = "graphwright.linear_int8_static", (factors, grid.zero_point)
        rewriter.replace(node, rewriter.call(op, target.x, codes, scales, target.bias, *rest, like=node, tags=tags))


def _sources(targets: Sequence[LinearTarget]) -> dict[str, set[fx.Node]]:
    """The inputs that each weight meets."""
    found: dict[str, set[fx.Node]] = {}
    for target in targets:
        found.setdefault(str(target.weight.target), set()).add(target.x)
    return found


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
