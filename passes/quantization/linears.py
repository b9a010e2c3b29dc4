"""The pass that quantises linears."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.ops.codebook import NAMES, codebook
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.pruned import is_masked
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.activations import GridChoice
from graphwright.passes.quantization.checks import (
    ACTIVATIONS,
    check_activations,
    check_codes,
    check_format,
    check_grid,
    checked_block,
    local_limit,
)
from graphwright.passes.quantization.compensation import Compensation, LoftQ
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss, report_entries
from graphwright.passes.quantization.overrides import Override, checked, first_match, mix
from graphwright.passes.quantization.rounding import BlockRounding, InputRounding, Rounding, rounding_of
from graphwright.passes.quantization.schedule import Quantized, Schedule, weight_name
from graphwright.passes.quantization.storing import channel_linear, packed_linear, stem, store
from graphwright.passes.quantization.targets import LinearTarget, half_shared, is_head, linear_target
from graphwright.passes.quantization.weights import PackedWeight
from graphwright.passes.quantization.zeros import keep_mask


@dataclass(frozen=True, kw_only=True)
class QuantizeLinears(Pass):
    """Store the weights of linears in 2 to 8 bits, optionally with activations quantised on the fly.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = graphwright.linear_nbits(%x, %qweight, %scales, %zero_points, %b, 4, 128)      activations="none"
        %y = graphwright.linear_codebook(%x, %qweight, %scales, %b, "nf4", 64)              dtype="nf4"
        %y = graphwright.linear_nbits_dynamic(%x, %qweight, …, 4, 128, 8, "per_group")      the same, with bits=4
        %y = graphwright.linear_nbits_dynamic(%x, %qweight, …, 8, 128, 8, "per_group")      "int8", in groups
        %y = graphwright.linear_fp8_dynamic(%x, %qweight, %scales, %b, 128, "per_group")    dtype="fp8_e4m3", "fp8"
        %y = graphwright.linear_int8_dynamic(%x, %qweight, %scales, %b, "per_token")        activations="int8"
        %y = graphwright.linear_int8_static(%x, %qweight, %scales, %b, %input_scales, 131)  the same, with calibration

    Linears spelled ``addmm``, ``mm`` or ``matmul`` with a constant weight (GPT-2) count. A weight that several linears
    share is quantised once and stays shared. The new weights are named after the old one: ``….q_proj.weight`` becomes
    ``….q_proj.qweight``, ``….q_proj.scales``, ``….q_proj.zero_points`` and ``….q_proj.input_scales``.

    The report names the weights that lost most, with their signal-to-noise ratio: of the weight itself, or with GPTQ of
    the outputs on the calibration data.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag; a
    weight that is computed, not a floating matrix, of another dtype than the input, or that something else reads which
    stays in floating point (a tied embedding: it would be stored twice); ``addmm`` with factors; a pruned weight with
    ``float_zero_points``. Other pruned weights (tagged ``masked``) keep their zeros, exactly, with every rounding.

    Attributes:
        bits: 2, 3, 4 or 8; those of the dtype's codes where that is not ``"int"``.
        dtype: what a code stands for. ``"int"``: a step. ``"nf4"`` (QLoRA's quantiles of the normal distribution),
            ``"fp4"`` (E2M1), ``"fp8_e4m3"`` and ``"fp8_e5m2"``: a value of that table, times the scale.
        group_size: columns to a scale: 16, 32, 64, 128, 256 or any larger multiple of 16; ``None`` for one scale per
            output channel. The last group of a row may be shorter.
        block: instead of a group size: rows and columns that share a scale, such as ``(128, 128)``. Scales are stored
            for every row, as with groups: one scale of 2 bytes for that many columns.
        symmetric: zero point fixed at the middle code. Asymmetric grids are a little larger and more exact.
        float_zero_points: zero points of asymmetric grids lie between codes too, as HQQ's do, and take 2 bytes instead
            of one. With few bits they are a good deal closer; but kernels, ONNX and the layouts of other libraries have
            none, so it runs in PyTorch.
        clip_search: choose the range with the least squared error instead of the full one.
        even_range: without the search, symmetric grids as torchao, GPTQModel and compressed-tensors have them: as many
            steps on either side of 0, so that the largest weights miss by half a step. Ours are finer, and have a code
            for the largest weight of each group.
        activations: ``"none"`` computes in floating point; ``"int8"`` quantises activations too, with symmetric 8-bit
            weights per channel or group, or 4-bit weights of any kind; ``"int4"`` to 4 bits, with 4-bit weights
            (Ashkboos et al. 2023, "QUIK"; :class:`SplitOutlierColumns` keeps out the features that 4 bits cannot hold);
            ``"fp8"`` to E4M3, with weights of ``dtype="fp8_e4m3"``: for GPUs, others run it in PyTorch.
        activation_ranges: with INT8 activations, where their range comes from. ``"per_token"`` and ``"per_tensor"``:
            from the data, as the model runs. ``"static"``: from the calibration data, with a scale for each feature
            moved into the weights (SmoothQuant); the fastest. ``"auto"``: static where the linear's outputs on the
            calibration data then err by 2 % at most, or by no more than per token; per token elsewhere, and without
            such data. 4-bit weights have ``"per_token"`` (asymmetric, QUIK's; with INT4 the default) and
            ``"per_group"`` (symmetric, for each row and group of the weights, which CPU kernels compute in INT8; with
            INT8 the default). 8-bit weights in groups have ``"per_group"``; FP8 both, ``"per_group"`` by default where
            weights are in groups.
        rounding: how codes are chosen: the name of a method of :mod:`graphwright.passes.quantization.rounding` or one
            with options, such as ``Gptq(damping=0.1)``. By default GPTQ when there is calibration data, else nearest.
        calibration: typical inputs: batches, each as the model is called, a ``DataLoader`` of such, or
            :class:`CalibrationData`. Every linear is rounded for the inputs it gets from those rounded before it.
        compensation: what is put beside each linear for a part of what rounding lost: ``LowRank(rank=8)`` or
            ``LoftQ(rank=16)``, see :mod:`graphwright.passes.quantization.compensation`.
        lm_head: quantise the output head too.
        checkpoint: folder in which every weight is kept as soon as it is done. A run that was killed and is started
            again with the same things goes on there, with the same result to the last bit.
        overrides: options of single linears: ``{"model.layers.0.mlp.*": {"bits": 8}, "re:.*o_proj": None}``. A key is a
            selection as ``where`` takes it or the name of a weight; the first that fits a linear counts. Its ``bits``,
            ``dtype``, ``group_size``, ``symmetric``, ``float_zero_points``, ``clip_search`` and ``even_range`` stand in
            place of the pass's own; ``None`` leaves the linear in floating point.
    """

    name: ClassVar[str] = "quantize-linears"
    contract: ClassVar[Contract] = Approximate()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "compensation", "outlier", "quantized"})

    bits: int = 8
    dtype: str = "int"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    float_zero_points: bool = False
    clip_search: bool = True
    even_range: bool = False
    activations: str = "none"
    activation_ranges: str = "auto"
    rounding: str | Rounding | None = None
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    compensation: Compensation | None = None
    lm_head: bool = False
    checkpoint: str | os.PathLike[str] | None = field(default=None, compare=False)
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype in NAMES:
            object.__setattr__(self, "bits", codebook(self.dtype).bits)
        check_format(self.name, self.bits, self.group_size)
        check_codes(self.name, self.dtype, self.symmetric)
        if self.block is not None:
            object.__setattr__(self, "block", checked_block(self.name, self.block, self.group_size))
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
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
                    hint="give calibration=[batch, ...], on the command line --calibration FILE",
                )
        check_grid(self.name, self, whole=isinstance(chosen, BlockRounding))
        check_activations(self.name, self)
        object.__setattr__(self, "overrides", checked(self.name, self.overrides))
        for key in self.overrides:
            self._variant(key)

    def _rounded_activations(self) -> tuple[int, str] | None:
        """Bits and ranges of activations that meet weights packed in a few bits; ``None`` where there are none."""
        if self.activations == "none" or self._integer_products():
            return None
        if self.activations == "fp8":
            usual = "per_token" if self.form().group_size is None else "per_group"
        else:
            usual = "per_group" if self.activations == "int8" else "per_token"
        ranges = usual if self.activation_ranges == "auto" else self.activation_ranges
        return ACTIVATIONS[self.activations], ranges

    def effective_contract(self) -> Contract:
        """Approximate, with the limit of the coarsest format; ``run`` notes each linear's own."""
        variants = [self._variant(key) for key in self.overrides]
        base = Approximate(max_local_error=max(each._local_limit() for each in (self, *variants) if each is not None))
        return base if self.max_error is None else dataclasses.replace(base, max_relative_error=float(self.max_error))

    def _integer_products(self) -> bool:
        """Whether products are those of bytes, one scale to a channel."""
        return self.activations == "int8" and self.bits == 8 and self.group_size is None

    def _local_limit(self) -> float:
        if self._rounding().pattern_of_zeros() is not None:
            return 2.0  # as for pruning alone
        return local_limit(self.dtype, self.bits, self.clip_search, self.activations)

    def _variant(self, key: str | None) -> QuantizeLinears | None:
        """The pass as it is for the linears of one override; ``None`` where they stay in floating point."""
        options = self.overrides[key] if key is not None else {}
        if options is None:
            return None
        try:
            return with_options(self, options) if key is not None else self
        except InputError as error:
            raise InputError(error.what, where=f"{error.where} in overrides[{key!r}]", hint=error.hint) from error

    def _rounding(self) -> Rounding:
        usual = "nearest" if self.calibration is None else "gptq"
        return rounding_of(self.rounding or usual, where=f"{self.name}: rounding")

    def run(self, program: Program) -> bool:
        """Quantise every linear that is selected and can be.

        Raises:
            InputError: a weight or the calibration data holds NaN or infinity, the calibration data is too short, the
                checkpoint is of another run, or linears that share a weight have other overrides.
            SelectionError: ``where`` or an override selects nothing.
        """
        key_of = first_match(program, tuple(self.overrides))
        targets = self._targets(program, key_of)
        variants = self._variants(targets, key_of)
        losses: dict[str, Loss] = {}
        limits: dict[str, float] = {}
        static = 0
        adapters: list[fx.Node] = []
        with program.edit() as rewriter:
            masked = {weight_name(target) for target in targets if is_masked(target.node)}
            forms = {
                name: dataclasses.replace(variant.form(), keep_zeros=name in masked)
                for name, variant in variants.items()
            }
            schedule = Schedule(
                program, targets, forms, self._rounding(), self._grids(), self.checkpoint, self.compensation
            )
            for found in schedule.run(self.calibration):
                name = weight_name(found.target)
                losses[name] = found.result.packed.loss
                static += found.result.grid is not None
                new = variants[name]._rewrite(rewriter, found)
                limits[new.name] = variants[name]._local_limit()
                if found.result.branch is not None and found.result.branch.tag == "adapter":
                    adapters.append(new)
            if adapters:
                from graphwright.passes.adapters.adoption import adopt_branches  # that package imports this one

                adopt_branches(program, adapters, LoftQ.method)
            program.notes["linears"] = len(targets)
            if self.overrides:
                program.notes["local_limits"] = limits
                program.notes["formats"] = mix((*forms.values(), *[None] * program.notes.pop("left")))
            if self._integer_products():
                program.notes["static_ranges"] = static
            if losses:
                program.notes.update(report_entries(losses))
            return rewriter.changed

    def targets(self, program: Program) -> list[LinearTarget]:
        """The linears that it would quantise, in order; the program is not changed.

        Raises:
            SelectionError: ``where`` or an override selects nothing.
        """
        notes, program.notes = program.notes, {}
        try:
            return self._targets(program, first_match(program, tuple(self.overrides)))
        finally:
            program.notes = notes

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _targets(self, program: Program, key_of: Callable[[LinearTarget], str | None]) -> list[LinearTarget]:
        chosen = self.selected(program)
        targets: list[LinearTarget] = []
        reasons: dict[fx.Node, str] = {}
        left: set[str] = set()
        for node in program.nodes:
            found = linear_target(program, node) if node.op == "call_function" else None
            if found is None:
                continue
            reason = found if isinstance(found, str) else self._refuse(program, node, chosen(node))
            if reason is None and isinstance(found, LinearTarget):
                key = key_of(found)
                if key is not None and self.overrides[key] is None:
                    reason = f"it is left in floating point by overrides[{key!r}]"
                    left.add(weight_name(found))
            if reason is not None:
                reasons[node] = reason
            elif isinstance(found, LinearTarget):
                targets.append(found)
        if self.overrides:
            program.notes["left"] = len(left)
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
        if self.float_zero_points and is_masked(node):
            return "it was pruned, and with zero points between codes (float_zero_points=True) none stands for 0"
        return None

    # -- quantising ----------------------------------------------------------------------------------------------------

    def _variants(
        self, targets: Sequence[LinearTarget], key_of: Callable[[LinearTarget], str | None]
    ) -> dict[str, QuantizeLinears]:
        """By weight, the pass with the options that hold for it."""
        made = {key: self._variant(key) for key in (None, *self.overrides)}
        found: dict[str, QuantizeLinears] = {}
        for target in targets:
            name, variant = weight_name(target), made[key_of(target)]
            assert variant is not None
            if found.setdefault(name, variant).form() != variant.form():
                raise InputError(
                    "is shared by linears with other overrides",
                    where=f"weight {name!r}",
                    hint=f"give overrides[{name!r}] first: it counts for all of them",
                )
        return found

    def form(self) -> Format:
        """How weights are stored."""
        return Format(
            self.bits,
            self.group_size if self.block is None else self.block[1],
            self.symmetric,
            self.clip_search,
            integer_products=self._integer_products(),
            codebook=None if self.dtype == "int" else self.dtype,
            block_rows=1 if self.block is None else self.block[0],
            even_range=self.even_range,
            float_zeros=self.float_zero_points,
        )

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

    def _rewrite(self, rewriter: Rewriter, found: Quantized) -> fx.Node:
        target, packed, branch = self._now(rewriter.program, found.target), found.result.packed, found.result.branch
        base = stem(weight_name(target))
        if isinstance(packed, PackedWeight):
            operands = store(rewriter, packed, base, target.node)
            new = packed_linear(rewriter, target, packed, operands, self._rounded_activations())
        else:
            new = channel_linear(rewriter, target, packed, found.result.grid, self.activation_ranges)
        keep_mask(rewriter.program, target, packed, new, self._rounding().pattern_of_zeros())
        if branch is not None:
            new = branch.add(rewriter, base, target.x, new, like=target.node)
        rewriter.replace(target.node, new)
        return new


def with_options(item: QuantizeLinears, options: Mapping[str, Any]) -> QuantizeLinears:
    """The pass as it is for linears with options of their own.

    Raises:
        InputError: they do not go together, or bits are given that the dtype's codes do not have.
    """
    made = dataclasses.replace(item, overrides={}, **options)
    if options.get("bits", made.bits) != made.bits:
        raise InputError(
            f"codes of {made.dtype!r} have {made.bits} bits, not {options['bits']!r}",
            where=f"{item.name}: bits",
            hint="leave bits out, or give dtype='int' too",
        )
    return made
