"""Sensitivities: what each candidate format would cost at each linear, all others left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.calibration import Batch, CalibrationData, Observed, Stream
from graphwright.passes.calibration.batches import flatten
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.rounding import InputRounding, Rounding, rounding_of
from graphwright.passes.quantization.schedule import weight_name
from graphwright.passes.quantization.sensitivity.candidates import candidate_list, check_rounding, format_of, rounded
from graphwright.passes.quantization.sensitivity.gradients import (
    arguments_only,
    gradient_statistics,
    outputs_of,
    stretches,
)
from graphwright.passes.quantization.sensitivity.kurtosis import kurtosis
from graphwright.passes.quantization.sensitivity.losses import LossFunction, ModelLoss, OutputChange, model_loss
from graphwright.passes.quantization.sensitivity.table import LinearSensitivity, Sensitivities
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import check_finite
from graphwright.passes.selection import Where

# measure -> whether it needs calibration data
MEASURES: dict[str, bool] = {
    "fisher": True,
    "first_order": True,
    "loss": True,
    "output": True,
    "sqnr": False,
    "kurtosis": True,
}
_DEFAULT: tuple[Override, ...] = ({"bits": 8, "group_size": 128}, {"bits": 4, "group_size": 128})


def sensitivities(
    program: Program,
    calibration: Iterable[Batch] | None = None,
    *,
    candidates: Sequence[Override] = _DEFAULT,
    measure: str = "fisher",
    loss: LossFunction | None = None,
    labels: str | None = None,
    rounding: str | Rounding = "nearest",
    where: Where = None,
    ignore: Where = None,
    lm_head: bool = False,
) -> Sensitivities:
    """What each candidate format costs at each linear, all other linears being exact. The program is not changed.

    With ``Δ = W - Ŵ [out, in]`` the rounding error of a weight, ``L`` the loss and ``l`` that of one row (token):

    - ``"fisher"``: ``½ Σ F Δ²``, ``F = E (∂l/∂w)²`` the diagonal of the empirical Fisher matrix: the expected rise of
      the loss to second order.
    - ``"first_order"``: ``Σ |g Δ|``, ``g = ∂L/∂W`` over the calibration data (Li et al., *LLM-MQ: Mixed-precision
      Quantization for Efficient LLM Deployment*, 2023).
    - ``"loss"``: the rise of the loss when this linear alone is quantised, measured. Slow: the rest of the model runs
      once for every linear, candidate and batch.
    - ``"output"``: ``tr Δ H Δᵀ / tr W H Wᵀ``, ``H = Σ x xᵀ``: the squared error of the linear's output, relative.
    - ``"sqnr"``: ``|Δ|² / |W|²``: noise to signal of the weights; needs no data.
    - ``"kurtosis"``: of the inputs, whatever the candidate; see :func:`skip_by_kurtosis`.

    One batch at a time is in memory with all its activations (for the first two); of the weights' statistics no more
    than a gigabyte is.

    Args:
        program: whose linears they are; the passes that merge linears should have run.
        calibration: as :class:`QuantizeLinears` takes it; mappings may hold more than the model takes, for the loss.
        candidates: options of formats, as ``overrides`` takes them; ``None`` for floating point.
        measure: see above.
        loss: ``function(outputs, batch)`` that gives a scalar tensor, a mean over rows; by default next-token cross
            entropy where the program gives ``logits`` for ``input_ids``, else the squared relative change of all
            outputs (not with ``"first_order"``: its gradient is zero).
        labels: name of the labels in each batch, for the cross entropy of ``logits`` against them.
        rounding: how ``Ŵ`` is chosen, see :mod:`graphwright.passes.quantization.rounding`.
        where, ignore, lm_head: which linears, as in :class:`QuantizeLinears`.

    Raises:
        InputError: an option, the calibration data or the loss does not serve; or there is no linear to quantise.
    """
    if measure not in MEASURES:
        raise InputError(f"must be one of {', '.join(map(repr, MEASURES))}, not {measure!r}", where="measure")
    method = rounding_of(rounding, where="sensitivities: rounding")
    check_rounding(method)
    data = CalibrationData.of(calibration) if calibration is not None else None
    if data is None and (MEASURES[measure] or isinstance(method, InputRounding)):
        raise InputError("needs calibration data", where=f"measure={measure!r}", hint="give calibration=[batch, ...]")
    judged = model_loss(program, loss, labels)
    if measure == "first_order" and isinstance(judged, OutputChange):
        raise InputError("needs a loss", where="measure='first_order'", hint="give loss=, or use measure='fisher'")
    program = program.clone()
    users: dict[str, list[LinearTarget]] = {}
    for target in QuantizeLinears(where=where, ignore=ignore, lm_head=lm_head).targets(program):
        users.setdefault(weight_name(target), []).append(target)
    if not users:
        raise InputError("has no linear that can be quantised", where="sensitivities: program")
    task = _Task(program, users, candidate_list(candidates), measure, method, judged, data)
    return Sensitivities(measure, task.candidates, tuple(task.rows()))


@dataclass(frozen=True)
class _Task:
    program: Program
    users: Mapping[str, Sequence[LinearTarget]]
    candidates: tuple[Override, ...]
    measure: str
    rounding: Rounding
    loss: ModelLoss
    data: CalibrationData | None

    def rows(self) -> Iterator[LinearSensitivity]:
        """One row after another, in the program's order."""
        if self.data is None:
            for name in self.users:
                yield self._row(name, None, None, None, None)
            return
        needs_moment = self.measure == "output" or isinstance(self.rounding, InputRounding)
        source: fx.Node | None = None
        tails, observed = 0.0, None
        by_gradients = self.measure in ("fisher", "first_order")
        with Stream(self.program, (arguments_only(self.program, batch) for batch in self.data)) as stream:
            for names in stretches(self.program, self.users):
                targets = [target for name in names for target in self.users[name]]
                squared = self.measure == "fisher"
                statistics = (
                    gradient_statistics(self.program, targets, self.data, self.loss, squared=squared)
                    if by_gradients
                    else {}
                )
                for name in names:
                    target = self.users[name][0]
                    stream.advance(target.node)
                    if target.x is not source:  # several linears may read the same value
                        source, tails = target.x, kurtosis(stream.rows(target.x))
                        observed = Observed.over(stream.rows(target.x)) if needs_moment else None
                    yield self._row(name, tails, observed, statistics.pop(name, None), self._loss_with(name, stream))

    def _row(
        self,
        name: str,
        tails: float | None,
        observed: Observed | None,
        statistic: torch.Tensor | None,
        measured: Callable[[torch.Tensor], float] | None,
    ) -> LinearSensitivity:
        target = self.users[name][0]
        stored = self.program.tensor(target.weight).detach()
        check_finite(stored, name)
        weight = (stored.t() if target.transposed else stored).to(torch.float32)
        values: list[float] = []
        sizes: list[int] = []
        for options in self.candidates:
            form = format_of(options)
            if form is None:
                sizes.append(stored.numel() * stored.element_size())
                values.append(tails or 0.0 if self.measure == "kurtosis" else 0.0)
                continue
            try:
                new, size = rounded(weight, form, self.rounding, observed)
            except InputError as error:
                raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
            sizes.append(size)
            values.append(self._value(weight, new, tails, observed, statistic, measured))
        release(stored)
        return LinearSensitivity(name, path_of(target.node), stored.numel(), tails, tuple(values), tuple(sizes))

    def _value(
        self,
        weight: torch.Tensor,
        new: torch.Tensor,
        tails: float | None,
        observed: Observed | None,
        statistic: torch.Tensor | None,
        measured: Callable[[torch.Tensor], float] | None,
    ) -> float:
        error = weight - new
        if self.measure == "kurtosis":
            return tails or 0.0
        if self.measure == "loss":
            assert measured is not None
            return measured(new)
        if self.measure == "output":
            assert observed is not None
            return _power(error, observed.moment) / max(_power(weight, observed.moment), 1e-30)
        if self.measure == "sqnr":
            return float(error.square().sum() / weight.square().sum().clamp(min=1e-30))
        assert statistic is not None
        if self.measure == "fisher":
            return 0.5 * float((statistic * error.square()).sum())
        return float((statistic * error).abs().sum())

    def _loss_with(self, name: str, stream: Stream) -> Callable[[torch.Tensor], float]:
        """How much the loss rises with another weight; all batches stand before the first linear that reads it."""
        target = self.users[name][0]
        dtype = self.program.tensor(target.weight).dtype

        nodes = stream.program.nodes
        rest = [node for node in nodes[nodes.index(stream.twin(target.node)) :] if node.op == "call_function"]
        references: list[Any] = []

        def outputs(index: int, inputs: list[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
            values: dict[fx.Node, Any] = dict(zip(stream.program.inputs, inputs, strict=True))
            values |= {node: stream.value(node, index) for node in stream.live()}
            return outputs_of(stream.program, run_nodes(stream.program, rest, values, weights))

        def rise(weight: torch.Tensor) -> float:
            assert self.data is not None
            new = (weight.t() if target.transposed else weight).to(dtype)
            total = 0.0
            with torch.no_grad():
                for index, batch in enumerate(self.data):
                    inputs, _ = flatten(self.program, arguments_only(self.program, batch), index)
                    if index == len(references):
                        references.append(self.loss.reference(outputs(index, inputs, {}), inputs, batch))
                    changed = outputs(index, inputs, {name: new})
                    total += self.loss.rise(changed, references[index], inputs, batch)
            return total / len(references)

        return rise


def _power(matrix: torch.Tensor, moment: torch.Tensor) -> float:
    return max(0.0, float(((matrix @ moment) * matrix).sum()))
