"""Running passes one after another, each checked, timed, journaled and rolled back if it fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.cost import cost_of
from graphwright.ir.errors import ContractViolation, GraphwrightError, InputError, PassError
from graphwright.ir.program import JournalEntry, Program, Snapshot
from graphwright.ir.verifier import verify
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, weakest
from graphwright.passes.hooks import Hook
from graphwright.passes.ordering import check_order
from graphwright.passes.report import PassRecord, Report

_MOST_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Pipeline(Pass):
    """Several passes as one. Nested pipelines are run as if their passes stood in the list themselves.

    With ``fixed_point`` the passes are repeated until none of them changes anything, and count as one pass.

    Attributes:
        passes: in the order in which they run.
        fixed_point: repeat until nothing changes.
    """

    name: ClassVar[str] = "pipeline"
    passes: tuple[Pass, ...] = ()
    fixed_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if not isinstance(item, Pass):
                wrong = f"{item.__name__} is a class" if isinstance(item, type) else f"{item!r} is not a pass"
                raise InputError(
                    wrong, where=f"{self.name}: passes", hint="give pass objects, such as RemoveDeadCode()"
                )

    def effective_contract(self) -> Contract:
        """The weakest contract of the passes."""
        return weakest([item.effective_contract() for item in self.passes])

    def run(self, program: Program) -> bool:
        """Run the passes, unverified between them; hooks see a fixed-point pipeline as one pass."""
        changed = False
        for _ in range(_MOST_ROUNDS if self.fixed_point else 1):
            round_changed = False
            for item in self.passes:
                if item.run(program):
                    round_changed = True
                    program.notes.setdefault("changed_by", {})
                    counts: dict[str, int] = program.notes["changed_by"]
                    counts[item.name] = counts.get(item.name, 0) + 1
            changed |= round_changed
            if not round_changed:
                break
        return changed


@dataclass
class _Run:
    program: Program
    hooks: Sequence[Hook]
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.report = Report(self.program.title)


def flatten(passes: Sequence[Pass]) -> list[Pass]:
    """The passes a list comes down to: pipelines opened, unless they run to a fixed point."""
    flat: list[Pass] = []
    for item in passes:
        if isinstance(item, Pipeline) and not item.fixed_point:
            flat.extend(flatten(item.passes))
        else:
            flat.append(item)
    return flat


def run_passes(program: Program, passes: Sequence[Pass], hooks: Sequence[Hook] = ()) -> Report:
    """Run passes on a program, in place, with hooks around each.

    When a pass or a hook raises, the program is as it was before that pass; passes before it stay done.

    Raises:
        OrderError: the order cannot work; nothing was run.
        ContractViolation: a pass broke its contract.
        PassError: a pass failed; the cause is chained.
    """
    outer = Pipeline(passes=tuple(passes))
    flat = flatten(outer.passes)
    check_order(flat, [entry.pass_name for entry in program.journal if entry.changed])
    run = _Run(program, hooks)
    start = time.perf_counter()
    for hook in hooks:
        hook.started(program, flat)
    for item in flat:
        _run_one(run, item)
    run.report.total_seconds = time.perf_counter() - start
    for hook in hooks:
        hook.finished(program, run.report)
    return run.report


def _run_one(run: _Run, item: Pass) -> None:
    program = run.program
    before = program.snapshot()
    program.replacements, program.notes = {}, {}
    record = PassRecord(item.name, item.options(), item.effective_contract().kind, nodes_before=len(before.graph.nodes))
    cost = cost_of(program)
    record.bytes_before, record.macs_before = weight_bytes(program), cost.total.macs
    try:
        for hook in run.hooks:
            hook.before_pass(program, item)
        start = time.perf_counter()
        claimed = item.run(program)
        record.seconds = time.perf_counter() - start
        record.nodes_changed = changed_nodes(before.graph, program.graph)
        record.changed = _really_changed(item, claimed, before, program, record)
        if record.changed:
            program.body.recompile()
            verify(program, types=False)
            cost = cost_of(program)
        record.nodes_after = len(program.nodes)
        record.bytes_after, record.macs_after = weight_bytes(program), cost.total.macs
        record.notes.update(_plain_notes(program.notes))
        for hook in run.hooks:
            hook.after_pass(program, item, before, record)
    except GraphwrightError as error:
        program.restore(before)
        if isinstance(error, PassError | InputError):
            raise
        raise PassError(
            f"the pass {item.name!r} made a malformed program: {error}", hint="the program was rolled back"
        ) from error
    except Exception as error:  # a pass is foreign code: whatever it raises, the program must come back
        program.restore(before)
        raise PassError(
            f"the pass {item.name!r} failed: {type(error).__name__}: {error}", hint="the program was rolled back"
        ) from error
    except BaseException:
        program.restore(before)
        raise
    program.journal.append(JournalEntry(item.name, item.options(), record.changed, _journal_details(record)))
    run.report.rows.append(record)


def _really_changed(item: Pass, claimed: bool, before: Snapshot, program: Program, record: PassRecord) -> bool:
    tensors = program.tensors()
    same_tensors = len(tensors) == len(before.tensors) and all(
        before.tensors.get(name) is value for name, value in tensors.items()
    )
    changed = record.nodes_changed > 0 or not same_tensors
    if changed and not claimed:
        raise ContractViolation(
            f"the pass {item.name!r} says it changed nothing, but it changed the program",
            pass_name=item.name,
            hint="return True from run() when anything was changed; the program was rolled back",
        )
    return changed


def changed_nodes(before: fx.Graph, after: fx.Graph) -> int:
    """Nodes added, removed, or with another target or other operands."""

    def described(graph: fx.Graph) -> dict[str, str]:
        return {node.name: f"{node.op} {node.target} {node.args} {node.kwargs}" for node in graph.nodes}

    old, new = described(before), described(after)
    return sum(1 for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def weight_bytes(program: Program) -> int:
    """Bytes of all weights, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in program.tensors().values())


def _plain_notes(notes: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in notes.items() if key != "refusals"}
    if notes.get("refusals"):
        plain["refused"] = len(notes["refusals"])
    return plain


def _journal_details(record: PassRecord) -> dict[str, Any]:
    details: dict[str, Any] = {"seconds": round(record.seconds, 4), "nodes_changed": record.nodes_changed}
    if record.local_error is not None:
        details["local_error"] = record.local_error if record.local_error != float("inf") else "inf"
    error = record.worst_output_error()
    if error is not None:
        details["relative_error"] = error
    return details
