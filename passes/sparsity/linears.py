"""The pass that prunes linears."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.pruned import is_masked, pruned_weights
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes import selection
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.checks import one_of
from graphwright.passes.quantization.overrides import first_match
from graphwright.passes.quantization.targets import LinearTarget, is_head, linear_target
from graphwright.passes.sparsity.allocation import ALLOCATIONS, LossDriven, by_loss, erk, ranked
from graphwright.passes.sparsity.calibrated import PruningRun, Task
from graphwright.passes.sparsity.costs import costs_of
from graphwright.passes.sparsity.methods import Magnitude, PruningMethod, method_of, scored
from graphwright.passes.sparsity.targets import check_unpacked, matrix_of, other_reader, stored_as
from graphwright.passes.sparsity.writing import write_pruned

_USUAL = 0.5
_PER_LINEAR = ("sparsity", "pattern")
# Linears named in the report as those that lost most.
_NAMED = 3

Override = Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class PruneLinears(Pass):
    """Set weights of linears to 0, in a pattern that hardware can use or in none.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = aten.linear(%x, %w, %b)      tagged "masked"; the values of %w are 0 where they were pruned

    The weight keeps its name, dtype and layout; the base model's own tensor is not written into. Exact zeros are the
    mask: :class:`HoldMasks` keeps them through training, quantisation keeps them as codes that stand for exactly 0, and
    adapters are only merged into them when told. What was pruned before goes first, so masks only grow.

    The report says the sparsity of every weight, and what it lost: of its outputs on the calibration data with
    SparseGPT, of its values elsewhere.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag; a
    weight that is computed, not a floating matrix, of another dtype than the input, or that something else reads which
    is not pruned (a tied embedding). A weight that is packed, whose mask is held, or that a pattern does not divide is
    an error: nothing is padded.

    Attributes:
        sparsity: fraction of weights that become 0, from 0 to below 1. ``None``: what an N:M pattern says, else 0.5.
        pattern: ``"unstructured"``; N:M, such as ``"2:4"``: N of every M neighbouring inputs stay; or blocks of rows
            (outputs) and columns (inputs) that go as a whole, such as ``"1x4"``, ``"16x1"`` or ``"32x32"``.
        method: ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``, or one with options, such as
            ``SparseGpt(damping=0.1)``. By default SparseGPT when there is calibration data, else magnitude.
        allocation: how the sparsity is shared out. ``"uniform"``: every linear alike. ``"erk"``: large ones more (Evci
            et al. 2020). ``"global"``: all weights are compared with each other, by magnitude. ``"loss"``: so that the
            model loses least (see :class:`LossDriven`), by the integer programme that allocates bits.
        calibration: typical inputs: batches, each as the model is called, a ``DataLoader`` of such, or
            :class:`CalibrationData`. Linears are pruned for the inputs they get from the layers pruned before theirs.
        sequential: prune the linears of a layer one after another, each for what those before it in the layer give once
            they are pruned; else for what the whole layer gives, as published. Of a small Llama it lost less at 70 %
            and a little more at 50 % (``benchmarks/sparsity_quality.py``).
        lm_head: prune the output head too.
        checkpoint: folder in which every weight is kept as soon as it is done. A run that was killed and is started
            again with the same things goes on there, with the same result to the last bit.
        overrides: a ``sparsity`` and a ``pattern`` of single linears, ``None`` to leave them whole; the first key that
            fits counts, as in :class:`QuantizeLinears`. A linear whose sparsity is given takes no part in the
            allocation.
    """

    name: ClassVar[str] = "prune-linears"
    # Most of a linear may go, and sums of inputs that nearly cancel show it enlarged.
    contract: ClassVar[Contract] = Approximate(max_local_error=2.0)
    after: ClassVar[tuple[str, ...]] = ("rotate-hidden-states",)  # which mixes columns, zeros with all others
    before: ClassVar[tuple[str, ...]] = ("quantize-linears", "insert-fake-quantize")
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize-linears": "the weights are packed by then, and zeros are chosen before codes: prune first, then "
        "quantise, which keeps the zeros",
        "insert-fake-quantize": "the weights are rounded by then, and zeros are chosen before codes",
    }
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "compensation", "outlier", "quantized"})

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str | PruningMethod | None = None
    allocation: str | LossDriven = "uniform"
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    sequential: bool = False
    lm_head: bool = False
    checkpoint: str | os.PathLike[str] | None = field(default=None, compare=False)
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))
        wanted = (self.sparsity, self.pattern)
        object.__setattr__(self, "pattern", str(SparsityPattern.of(self.pattern, where=f"{self.name}: pattern")))
        self._goal(None)
        if not isinstance(self.allocation, LossDriven):
            one_of(self.name, "allocation", self.allocation, ALLOCATIONS)
        chosen = self._method()
        if self.allocation == "global" and not isinstance(chosen, Magnitude):
            raise InputError(
                "compares magnitudes, which is not what this method goes by",
                where=f"{self.name}: allocation='global' with method={chosen.method!r}",
                hint="use method='magnitude', or another allocation",
            )
        if self.allocation != "uniform" and self._goal(None)[0].implied is not None:
            raise InputError(
                f"{wanted[1]} has one sparsity for every linear",
                where=f"{self.name}: allocation={self.allocation!r}",
                hint="use allocation='uniform', or a pattern that leaves the sparsity open",
            )
        needy = {"method": chosen.method} if chosen.needs != "nothing" else {}
        needy |= {"allocation": "loss"} if self._way() is not None else {}
        for option, value in needy.items():
            if self.calibration is None:
                raise InputError(
                    "needs calibration data",
                    where=f"{self.name}: {option}={value!r}",
                    hint="give calibration=[batch, ...], on the command line --calibration FILE",
                )
        object.__setattr__(self, "overrides", self._checked_overrides())

    def run(self, program: Program) -> bool:
        """Prune every linear that is selected and can be.

        Raises:
            InputError: a weight is packed, held, of a shape that the pattern does not divide, sparser already, or not
                finite; the calibration data does not serve; or the checkpoint is of another run.
            SelectionError: ``where`` or an override selects nothing.
        """
        tasks = self._tasks(program)
        sparsities: dict[str, float] = {}
        losses: dict[str, float] = {}
        pruned, total = 0.0, 0
        with program.edit() as rewriter:
            plan = PruningRun(program.clone(), tasks, self._method(), self.checkpoint, self.sequential)
            for task, found in plan.run(self.calibration):
                stored = stored_as(task.targets[0], found.weight)
                sparsities[task.name] = write_pruned(rewriter, task.targets, stored, task.pattern)
                losses[task.name] = found.loss.relative
                pruned, total = pruned + sparsities[task.name] * stored.numel(), total + stored.numel()
            worst = sorted(losses, key=lambda name: -losses[name])[:_NAMED]
            program.notes.update(
                linears=sum(len(task.targets) for task in tasks),
                sparsity=pruned / total if total else 0.0,
                least_exact=", ".join(f"{name} {losses[name]:.3f}" for name in worst),
                weights={
                    task.name: {
                        "sparsity": sparsities[task.name],
                        "pattern": str(task.pattern),
                        "relative": losses[task.name],
                    }
                    for task in tasks
                },
            )
            return rewriter.changed

    # -- options -------------------------------------------------------------------------------------------------------

    def _method(self) -> PruningMethod:
        usual = "magnitude" if self.calibration is None or self.allocation == "global" else "sparsegpt"
        return method_of(self.method or usual, where=f"{self.name}: method")

    def _way(self) -> LossDriven | None:
        if isinstance(self.allocation, LossDriven):
            return self.allocation
        return LossDriven() if self.allocation == "loss" else None

    def _goal(self, key: str | None) -> tuple[SparsityPattern, float]:
        """Pattern and sparsity of the linears of one override, or of the others.

        Raises:
            InputError: they do not go together.
        """
        given = self.overrides[key] or {} if key is not None else {}
        place = self.name if key is None else f"{self.name}: overrides[{key!r}]"
        pattern = SparsityPattern.of(given.get("pattern", self.pattern), where=f"{place}: pattern")
        sparsity = given.get("sparsity", None if "pattern" in given and pattern.implied else self.sparsity)
        if sparsity is None:
            return pattern, _USUAL if pattern.implied is None else pattern.implied
        wrong = isinstance(sparsity, bool) or not isinstance(sparsity, int | float)
        if wrong or not 0 <= sparsity < 1:
            raise InputError(f"must be at least 0 and below 1, not {sparsity!r}", where=f"{place}: sparsity")
        if pattern.implied is not None and abs(sparsity - pattern.implied) > 1e-9:
            raise InputError(
                f"{pattern} has a sparsity of {pattern.implied:g}, not {sparsity!r}",
                where=f"{place}: sparsity",
                hint="leave sparsity out, or use another pattern",
            )
        return pattern, float(sparsity)

    def _checked_overrides(self) -> dict[str, Override]:
        if not isinstance(self.overrides, Mapping):
            raise InputError(
                f"must map linears to options, not {self.overrides!r}",
                where=f"{self.name}: overrides",
                hint='write overrides={"model.layers.0.*": {"sparsity": 0.3}, "re:.*o_proj": None}',
            )
        for key, given in self.overrides.items():
            place = f"{self.name}: overrides[{key!r}]"
            if not isinstance(key, str):
                raise InputError("is no glob, 're:<regex>' or weight name", where=place)
            selection.check(key, "overrides")
            if given is None:
                continue
            if not isinstance(given, Mapping) or any(option not in _PER_LINEAR for option in given):
                raise InputError(
                    f"must be a sparsity and a pattern, or None to leave linears whole, not {given!r}", where=place
                )
            self._goal(key)
        return dict(self.overrides)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _tasks(self, program: Program) -> list[Task]:
        key_of = first_match(program, tuple(self.overrides))
        found: dict[str, list[LinearTarget]] = {}
        for target in self._targets(program, key_of):
            found.setdefault(str(target.weight.target), []).append(target)
        open_to: list[Task] = []
        tasks: list[Task] = []
        for name, targets in found.items():
            key = key_of(targets[0])
            pattern, sparsity = self._goal(key)
            if any(self._goal(key_of(each)) != (pattern, sparsity) for each in targets):
                raise InputError(
                    "is shared by linears with other overrides",
                    where=f"weight {name!r}",
                    hint=f"give overrides[{name!r}] first: it counts for all of them",
                )
            reason = pattern.objection(matrix_of(program, targets[0]).shape)
            if reason is not None:
                raise InputError(
                    f"cannot be pruned to {pattern}: {reason}",
                    where=f"weight {name!r}",
                    hint="use another pattern, or leave the linear out with ignore= or overrides",
                )
            task = Task(tuple(targets), pattern, sparsity)
            tasks.append(task)
            if "sparsity" not in (self.overrides[key] or {} if key is not None else {}):
                open_to.append(task)
        shares = self._shares(program, [task for task in open_to if task.pattern.implied is None])
        tasks = [Task(task.targets, task.pattern, shares.get(task.name, task.sparsity)) for task in tasks]
        for task in tasks:
            self._check_growth(program, task)
        return tasks

    def _shares(self, program: Program, tasks: list[Task]) -> dict[str, float]:
        """Sparsities by weight, where they are not all alike."""
        sparsity, way = self._goal(None)[1], self._way()
        if not tasks or self.allocation == "uniform":
            return {}
        weights = {task.name: matrix_of(program, task.targets[0]) for task in tasks}
        if self.allocation == "erk":
            return erk({name: (each.shape[0], each.shape[1]) for name, each in weights.items()}, sparsity)
        if way is None:
            fixed = {task.name: task.fixed for task in tasks}
            scores = {name: scored(each.float(), None, fixed=fixed[name]) for name, each in weights.items()}
            return ranked({task.name: task.pattern.blocks(scores[task.name]) for task in tasks}, sparsity)
        assert isinstance(self.calibration, CalibrationData)
        levels = way.tried(sparsity)
        costs = costs_of(program, tasks, self.calibration, way, levels)
        sizes = {name: each.numel() for name, each in weights.items()}
        return by_loss(sizes, levels, lambda name: costs[name], sparsity)

    def _check_growth(self, program: Program, task: Task) -> None:
        """Refuse to prune a weight to fewer zeros than it has.

        Raises:
            InputError: it has more.
        """
        entry = pruned_weights(program).get(task.name)
        if entry is None or not task.fixed or self.allocation != "uniform" or task.pattern.among:
            return
        weight = matrix_of(program, task.targets[0])
        slack = task.pattern.rows * task.pattern.columns * len(weight)  # what counts are rounded by
        if task.sparsity * weight.numel() + slack < entry.sparsity * weight.numel():
            raise InputError(
                f"is pruned to {entry.sparsity:.3g} already, and {task.sparsity:g} is less: what was pruned stays so",
                where=f"weight {task.name!r}",
                hint="give the sparsity that it is to have in all, or start from the program before",
            )

    def _targets(self, program: Program, key_of: Callable[[LinearTarget], str | None]) -> list[LinearTarget]:
        chosen = self.selected(program)
        targets: list[LinearTarget] = []
        reasons: dict[fx.Node, str] = {}
        for node in program.nodes:
            if node.op != "call_function":
                continue
            if chosen(node) and not tags_of(node) & frozenset({"adapter"}):
                check_unpacked(self.name, node)
            found = linear_target(program, node)
            if found is None:
                continue
            reason = found if isinstance(found, str) else self._refuse(program, node, chosen(node))
            if reason is None and isinstance(found, LinearTarget):
                key = key_of(found)
                if key is not None and self.overrides[key] is None:
                    reason = f"it is left whole by overrides[{key!r}]"
            if reason is not None:
                reasons[node] = reason
            elif isinstance(found, LinearTarget):
                targets.append(found)
        reasons.update(other_reader(program, targets))
        refusals = [Refusal(self.name, node.name, path_of(node), reason, 1) for node, reason in reasons.items()]
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return [target for target in targets if target.node not in reasons]

    def _refuse(self, program: Program, node: fx.Node, selected: bool) -> str | None:
        if not selected:
            return "not selected by where= / ignore="
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if not self.lm_head and is_head(program, node) and not is_masked(node):
            return "it is the output head, which is left whole (set lm_head=True to prune it)"
        return None
