"""The hook that holds every pass to its contract."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.completion import completed
from graphwright.ir.errors import ContractViolation, InputError
from graphwright.ir.mapped import give_back_freed, streaming
from graphwright.ir.program import Program, Snapshot
from graphwright.ir.types import DTYPE_NAMES, TensorType
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract, Exact, Retrain
from graphwright.passes.hooks import Hook
from graphwright.passes.report import PassRecord, Report
from graphwright.passes.verification import precise
from graphwright.passes.verification.comparison import Difference, compare, compare_logits, is_logits
from graphwright.passes.verification.local import LocalResult, check_locally
from graphwright.passes.verification.sampling import sample, small_sizes

# An exact rewrite may round differently, but on the whole no more than this many times worse than the original itself
# does.
_ROUNDING_FACTOR = 16.0

# Single elements have heavy tails (a near-cancelled value, a padded position): the probe sees few of them, the examples
# many.
_TAIL_FACTOR = 256.0

# A weight that is rounded anew moves each product by half an epsilon; sums that nearly cancel show it enlarged.
_STORED_FACTOR = 32.0


@dataclass(frozen=True)
class Noise:
    """A program's own rounding error in its native dtype, against float64.

    Attributes:
        worst: largest difference over the root mean square of the output.
        relative: root mean square of the difference over that of the output.
    """

    worst: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """How thoroughly to verify.

    Attributes:
        fresh: how many random input sets to check end to end beside the example inputs.
        local: whether to check replaced values in float64.
        seed: seed of the random inputs.
    """

    fresh: int = 2
    local: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fresh < 0:
            raise InputError(f"must be 0 or more, not {self.fresh}", where="Verification.fresh")


@dataclass
class _Case:
    """One input set with the outputs it should give."""

    label: str
    inputs: list[torch.Tensor]
    original: list[Any]
    previous: list[Any]


class Verifier(Hook):
    """Checks each pass against the program before it and the original, and raises when its contract does not hold.

    Args:
        examples: flat example inputs.
        settings: how thoroughly.
    """

    def __init__(self, examples: list[torch.Tensor], settings: Verification | None = None) -> None:
        self.examples = [value.detach() for value in examples]
        self.settings = settings or Verification()
        self.cases: list[_Case] = []
        self.names: list[str] = []
        self.inputs: list[str] = []
        self.noise = Noise(0.0, 0.0)
        self._probe: list[torch.Tensor] = []
        self._values: dict[str, Any] | None = None
        self._rounding: float | None = None

    # -- the hook ------------------------------------------------------------------------------------------------------

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        """Record what the original computes, and how well it does so in its own dtype."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.names = program.signature.output_names()
        self.inputs = [node.name for node in program.inputs]
        self._probe = sample(program, self.examples, small_sizes(program), generator)
        self.cases = [_case(program, "example inputs", self.examples)]
        for index in range(self.settings.fresh):
            inputs = (
                self._probe if index == 0 else sample(program, self.examples, small_sizes(program, index), generator)
            )
            self.cases.append(_case(program, f"random inputs {index + 1}", inputs))
        self._values = None
        self._refresh(program)
        self._rounding = self.noise.relative

    def after_pass(self, program: Program, item: Pass, before: Snapshot, record: PassRecord) -> None:
        """Check one pass by its contract.

        Raises:
            ContractViolation: it does not hold.
        """
        self._check_weights_untouched(item, before)
        if not record.changed:
            return
        start = time.perf_counter()
        contract = item.effective_contract()
        if isinstance(contract, Retrain) and self._is_called_otherwise(program):
            self._values = None  # other inputs or outputs: there is no value to compare each new one with
        elif self.settings.local:
            if self._values is None:
                self._refresh(program.at(before))
            assert self._values is not None
            self._complete(program)
            local = check_locally(before, self._values, program)
            self._note_local(record, contract, local)
            self._hold_locally(program, item, contract, local, record.notes.get("local_limits", {}))
            # After an approximate pass, or with weights rounded anew, the old values are not what is computed now.
            kept = isinstance(contract, Exact) and not contract.stored
            self._values = local.values if kept else None
            del local
            give_back_freed()
        self._complete(program)
        self._check_outputs(program, item, contract, record)
        record.verify_seconds = time.perf_counter() - start

    def finished(self, program: Program, report: Report) -> None:
        """Put the original's own rounding error into the report, and let go of the stored values."""
        report.rounding_error = self._rounding
        self._values = None
        give_back_freed()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _refresh(self, program: Program) -> None:
        """Compute the float64 values anew, and from them the program's own rounding error."""
        if not self.settings.local:
            epsilon = max((_epsilon(value) for value in _flat(program, self._probe)), default=0.0)
            self.noise = Noise(epsilon, epsilon)
            return
        self._values = precise.run(program, self._probe)
        truth = [
            precise.wide(program.tensor(item))
            if _is_weight(item)
            else self._values.get(getattr(item, "name", ""), item)
            for item in _output_items(program)
        ]
        native = _flat(program, self._probe)
        worst = relative = 0.0
        for value, exact in zip(native, truth, strict=True):
            difference, floor = compare(value, exact), _epsilon(value)
            comparable = difference.worst != float("inf")
            worst = max(worst, floor, difference.worst if comparable else floor)
            relative = max(relative, floor, difference.relative if comparable else floor)
        self.noise = Noise(worst, relative)

    def _is_called_otherwise(self, program: Program) -> bool:
        inputs = [node.name for node in program.inputs]
        return inputs != self.inputs or program.signature.output_names() != self.names

    def _complete(self, program: Program) -> None:
        """Give inputs that the pass has added the values that make no difference, and let go of those it took away."""
        names = [node.name for node in program.inputs]
        if names == self.inputs:
            return
        known = self.inputs
        self._probe = completed(program, self._probe, known)
        self.examples = completed(program, self.examples, known)
        for case in self.cases:
            case.inputs = completed(program, case.inputs, known)
        for name, value in zip(names, self._probe, strict=True):
            if self._values is not None and name not in known:
                self._values[name] = precise.wide(value)
        self.inputs = names

    def _check_weights_untouched(self, item: Pass, before: Snapshot) -> None:
        written = Program.overwritten(before)
        if written:
            raise ContractViolation(
                f"the pass {item.name!r} wrote into the weight {written[0]!r}, which the original model shares",
                pass_name=item.name,
                hint="make a new tensor and bind it with rewriter.weight(...)",
            )

    def _note_local(self, record: PassRecord, contract: Contract, local: LocalResult) -> None:
        exact = isinstance(contract, Exact)
        worst = local.worst() if exact else local.loosest()
        if worst is not None:
            record.local_error = worst.difference.worst if exact else worst.difference.relative
            record.local_where = f"%{worst.node}" + (f" in {worst.path}" if worst.path else "")
        loose = sorted(local.nodes, key=lambda entry: -entry.difference.relative)[:5]
        record.notes["worst_values"] = [
            {"node": entry.node, "path": entry.path, **entry.difference.as_json()}
            for entry in loose
            if entry.difference.worst > 0
        ]

    def _hold_locally(
        self, program: Program, item: Pass, contract: Contract, local: LocalResult, limits: Mapping[str, float]
    ) -> None:
        """Hold every replaced value to the contract; an approximate pass may note tighter limits for single nodes."""
        if isinstance(contract, Exact):
            worst, limit = local.worst(), contract.tolerance
            if contract.stored and worst is not None:
                kind = program.type_of(program.node(worst.node))
                if isinstance(kind, TensorType) and kind.dtype.is_floating_point:
                    limit = max(limit, _STORED_FACTOR * torch.finfo(kind.dtype).eps)
            error = worst.difference.worst if worst is not None else 0.0
        elif isinstance(contract, Approximate):
            most = contract.max_local_error
            allowed = {entry.node: min(most, limits.get(entry.node, most)) for entry in local.nodes}
            worst = max(local.nodes, key=lambda entry: entry.difference.relative / allowed[entry.node], default=None)
            error, limit = (worst.difference.relative, allowed[worst.node]) if worst is not None else (0.0, most)
        else:
            return
        if worst is None or error <= limit:
            return
        reason = worst.difference.reason or f"relative error {error:.3g}, the contract allows {limit:.3g}"
        raise ContractViolation(
            f"the pass {item.name!r} promises {contract.kind}, but %{worst.node} does not compute what "
            f"%{worst.stands_for} did: {reason}",
            pass_name=item.name,
            where=worst.path or None,
            hint="the program was rolled back; run the pass with DumpIR to see what it wrote",
        )

    def _follow_outputs(self, program: Program, item: Pass) -> None:
        """Go along with outputs that the pass has added behind the others or taken from there (taps)."""
        names = program.signature.output_names()
        both = min(len(names), len(self.names))
        if names == self.names or names[:both] != self.names[:both]:
            return
        self.names = names
        for case in self.cases:
            added = _run(program, case.inputs, item, case.label)[both:]
            case.original, case.previous = [*case.original[:both], *added], [*case.previous[:both], *added]

    def _check_outputs(self, program: Program, item: Pass, contract: Contract, record: PassRecord) -> None:
        self._follow_outputs(program, item)
        names = program.signature.output_names()
        for case in self.cases:
            outputs = _run(program, case.inputs, item, case.label)
            # A pass that is trained afterwards may add outputs, or take some away; the others are compared.
            before = dict(zip(self.names, zip(case.original, case.previous, strict=True), strict=True))
            if names != self.names:
                self._require_same_outputs(item, contract)
                case.original = [before.get(name, (value,))[0] for name, value in zip(names, outputs, strict=True)]
            for name, value in zip(names, outputs, strict=True):
                if name not in before:
                    continue
                original, previous = before[name]
                to_previous, to_original = compare(value, previous), compare(value, original)
                self._hold_output(item, contract, case, name, value, previous, to_previous, to_original)
                self._note_output(record, name, value, original, to_previous, to_original)
            case.previous = outputs
        self.names = names

    @staticmethod
    def _require_same_outputs(item: Pass, contract: Contract) -> None:
        if not isinstance(contract, Retrain):
            raise ContractViolation(
                f"the pass {item.name!r} promises {contract.kind}, but the program has other outputs",
                pass_name=item.name,
                hint="the program was rolled back; only a pass whose contract is Retrain may change them",
            )

    def _hold_output(
        self,
        item: Pass,
        contract: Contract,
        case: _Case,
        name: str,
        value: Any,
        previous: Any,
        to_previous: Difference,
        to_original: Difference,
    ) -> None:
        def broken(text: str) -> ContractViolation:
            return ContractViolation(
                f"the pass {item.name!r} promises {contract.kind}, but {text}",
                pass_name=item.name,
                where=f"output {name!r}, {case.label}",
                hint="the program was rolled back",
            )

        if isinstance(value, torch.Tensor) and value.dtype != previous.dtype and not isinstance(contract, Retrain):
            raise broken(f"the output is {value.dtype} instead of {previous.dtype}")
        if to_previous.reason and not isinstance(contract, Approximate):
            raise broken(to_previous.reason)
        if isinstance(contract, Exact):
            epsilon = _epsilon(previous)
            limits = {
                "root mean square": (to_previous.relative, _ROUNDING_FACTOR * max(self.noise.relative, epsilon)),
                "largest": (to_previous.worst, _TAIL_FACTOR * max(self.noise.worst, epsilon)),
            }
            for label, (moved, limit) in limits.items():
                allowed = 0.0 if contract.bitwise else limit
                if moved > allowed:
                    raise broken(f"the output moved by {moved:.3g} of its size ({label}; allowed: {allowed:.3g})")
        elif isinstance(contract, Approximate):
            if to_original.reason and isinstance(value, torch.Tensor) and value.is_floating_point():
                raise broken(to_original.reason)
            budget = contract.max_relative_error
            if budget is not None and to_original.relative > budget:
                raise broken(f"the relative error is {to_original.relative:.4g}, the budget {budget:.4g}")

    def _note_output(
        self, record: PassRecord, name: str, value: Any, original: Any, to_previous: Difference, to_original: Difference
    ) -> None:
        entry = record.outputs.setdefault(name, {})
        for key, difference in (("previous", to_previous), ("original", to_original)):
            if key not in entry or difference.relative >= float(entry[key]["relative"]):
                entry[key] = difference.as_json()
        if is_logits(name, value) and to_original.worst != float("inf"):
            found = compare_logits(value, original)
            known = entry.setdefault("logits", found)
            known["kl"], known["top1_agreement"] = (
                max(known["kl"], found["kl"]),
                min(known["top1_agreement"], found["top1_agreement"]),
            )


def _case(program: Program, label: str, inputs: list[torch.Tensor]) -> _Case:
    outputs = _flat(program, inputs)
    return _Case(label, inputs, outputs, outputs)


def _flat(program: Program, inputs: list[torch.Tensor]) -> list[Any]:
    program.check_inputs(inputs)
    with torch.no_grad(), streaming(program.tensors().values()):
        return [_detached(value) for value in program.body(*inputs)]


def _detached(value: Any) -> Any:
    # Clones: an output may be a view of an input or a weight, which a later pass may replace.
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _run(program: Program, inputs: list[torch.Tensor], item: Pass, label: str) -> list[Any]:
    try:
        return _flat(program, inputs)
    except Exception as error:  # whatever a wrong graph makes torch raise, it is this pass that made the graph
        reason = str(error).strip().splitlines()
        raise ContractViolation(
            f"after the pass {item.name!r} the program no longer runs: {reason[0] if reason else type(error).__name__}",
            pass_name=item.name,
            where=label,
            hint="the program was rolled back",
        ) from error


def _output_items(program: Program) -> list[Any]:
    items = program.output.args[0]
    assert isinstance(items, tuple | list)
    return list(items)


def _is_weight(item: Any) -> bool:
    return getattr(item, "op", "") == "get_attr"


def _epsilon(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype in DTYPE_NAMES:
        return float(torch.finfo(value.dtype).eps)
    return 0.0
