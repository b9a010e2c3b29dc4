"""``auto_quantize``: from a model, a measure of quality and a target to a recipe."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from graphwright.frontends.api import OptimizedModel, flat_examples, optimize
from graphwright.frontends.autoquantize.goals import Absolute, Limits, Relative, Target
from graphwright.frontends.autoquantize.journal import Journal, digest_of_batches, digest_of_program
from graphwright.frontends.autoquantize.result import AutoQuantizeResult
from graphwright.frontends.autoquantize.space import Choice, SearchSpace
from graphwright.frontends.autoquantize.strategy import MODES, Plan, is_better
from graphwright.frontends.autoquantize.trials import Bench, Evaluate, Trial, latency
from graphwright.frontends.recipes import Recipe
from graphwright.frontends.torch.tracing import ExampleInputs
from graphwright.ir.errors import GraphwrightError, InputError
from graphwright.ir.program import Program
from graphwright.passes.base import Pass, as_json
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.cleanup import Cleanup
from graphwright.passes.fusion import FuseAll
from graphwright.passes.pipeline import weight_bytes
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.sensitivity import Sensitivities, sensitivities
from graphwright.passes.report import Report
from graphwright.passes.verification import Verification


def auto_quantize(
    model: nn.Module | Program | str | os.PathLike[str],
    evaluate: Evaluate,
    *,
    higher_is_better: bool,
    target: Target | None = None,
    calibration: Iterable[Any] | None = None,
    example_inputs: ExampleInputs | None = None,
    limits: Limits | None = None,
    space: SearchSpace | None = None,
    mode: str = "first",
    journal: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    verify: bool | Verification = True,
) -> AutoQuantizeResult:
    """Search for the smallest recipe of quantisation that loses no more than allowed.

    Every trial quantises the model, lowers it to the target, lets ``evaluate`` judge what really runs, measures a call
    and notes which kernel runs each quantised linear. Recipes are tried from the smallest to the largest, cheap
    roundings first; those that the sensitivities of the linears foretell to lose far too much come last. Where a format
    loses a little too much, its most sensitive linears get a finer one (with INT8 activations, those with the highest
    kurtosis of the input stay in floating point), and how many is bisected.

    A trial that fails, because ``evaluate`` raises or gives NaN for instance, stands in the journal with its error, and
    the search goes on. The model passed in is left as it was.

    Args:
        model: as :func:`graphwright.optimize` takes it.
        evaluate: judges a model, which is called as the original is: gives one number.
        higher_is_better: whether it is an accuracy rather than a loss.
        target: ``Relative(0.01)``, which is the default, or ``Absolute(0.3)``: how much worse the score may be.
        calibration: typical inputs, as :class:`QuantizeLinears` takes them. Without, only roundings that need none.
        example_inputs: as :func:`graphwright.optimize` takes them.
        limits: on bytes and latency; what runs the model.
        space: recipes that may be tried.
        mode: ``"first"`` stops at the first recipe that meets the target; ``"pareto"`` tries all and mixtures of their
            formats, for the front of bytes and loss.
        journal: folder for the journal, from which a search that was killed goes on, without running a trial again;
            ``search.html``, the plot and ``recipe.toml`` are written there at the end.
        time_limit: seconds after which no further trial starts, those of earlier runs of the journal counted in.
        verify: how thoroughly every pass of every trial is checked.

    Returns:
        the best that was found, also where it does not meet the target: see ``met`` and ``message``.

    Raises:
        InputError: an option does not serve, ``evaluate`` fails on the original model, or the journal is of another
            problem.
        TraceError: the model cannot be traced.
    """
    if not callable(evaluate):
        raise InputError(f"must be a function of a model, not {evaluate!r}", where="evaluate")
    if not isinstance(higher_is_better, bool):
        raise InputError(f"must be True or False, not {higher_is_better!r}", where="higher_is_better")
    if mode not in MODES:
        raise InputError(f"must be one of {', '.join(map(repr, MODES))}, not {mode!r}", where="mode")
    if time_limit is not None and not (isinstance(time_limit, int | float) and time_limit > 0):
        raise InputError(f"must be a positive number of seconds, not {time_limit!r}", where="time_limit")
    goal = target if target is not None else Relative()
    if not isinstance(goal, Relative | Absolute):
        raise InputError(f"must be Relative(...) or Absolute(...), not {goal!r}", where="target")
    within, choices = limits or Limits(), space or SearchSpace()
    data = CalibrationData.of(calibration) if calibration is not None else None
    runs_on = within.target if within.target is not None else _usual_target()
    base = tuple(choices.passes) if choices.passes is not None else (Cleanup(), FuseAll())
    prepared = optimize(model, base, example_inputs=example_inputs, verify=verify)
    timed = flat_examples(prepared, within.inputs) if within.inputs is not None else prepared.examples
    bench = Bench(prepared, prepared.examples, timed, runs_on, verify, evaluate)
    name = runs_on if isinstance(runs_on, str) else type(runs_on).__name__
    settings = dataclasses.replace(within, target=None, inputs=None)
    book = Journal(
        Path(journal) if journal is not None else None,
        {
            "model": digest_of_program(prepared),
            "calibration": digest_of_batches(prepared, data),
            "target": f"{goal}, {'higher' if higher_is_better else 'lower'} is better",
            "limits": f"{settings}, on {name}",
            "space": as_json(choices),
            "mode": mode,
        },
    )
    search = _Search(bench, goal, higher_is_better, within, choices, data, book, base)
    result = search.run(mode, time_limit)
    if journal is not None:
        result.save(journal)
    return result


@dataclasses.dataclass
class _Search:
    bench: Bench
    goal: Target
    higher_is_better: bool
    limits: Limits
    space: SearchSpace
    data: CalibrationData | None
    journal: Journal
    base: Sequence[Pass]

    def run(self, mode: str, time_limit: float | None) -> AutoQuantizeResult:
        """Go through the strategy's choices; those in the journal are not run again."""
        original = self._original()
        plan = self._plan()
        strategy = MODES[mode](plan)
        trials: list[Trial] = []
        best: tuple[Trial, Choice, OptimizedModel | None] | None = None
        spent, stopped = 0.0, False
        choice = next(strategy, None)
        while choice is not None:
            if time_limit is not None and spent >= time_limit:
                stopped = True
                break
            trial, model = self._try(len(trials) + 1, choice, float(original["score"]))
            trials.append(trial)
            spent += trial.seconds
            if not trial.error and is_better(trial, best[0] if best else None, most=self.goal.most):
                best = (trial, choice, model)
            model = None
            try:
                choice = strategy.send(trial)
            except StopIteration:
                choice = None
        return self._result(original, trials, best, stopped, plan)

    def _original(self) -> dict[str, Any]:
        if self.journal.original is None:
            start = time.perf_counter()
            model = self.bench.lowered([])
            try:
                score = self.bench.score(model)
            except GraphwrightError:
                raise
            except Exception as error:
                raise InputError(
                    f"raised {type(error).__name__} on the original model: {error}", where="evaluate"
                ) from error
            facts = {"score": score, "bytes": weight_bytes(model), "latency_ms": latency(model, self.bench.timed)}
            self.journal.add_original({**facts, "seconds": time.perf_counter() - start})
        found = self.journal.original
        assert found is not None
        self.goal.check(float(found["score"]))
        return found

    def _plan(self) -> Plan:
        has_data = self.data is not None
        families = self.space.families(has_data=has_data)
        formats: list[Override] = [*(family.form for family in families), self.space.finer, None]
        candidates = [each for index, each in enumerate(formats) if each not in formats[:index]]
        text = self.journal.read_table()
        if text is None:
            table = sensitivities(
                self.bench.program,
                self.data,
                candidates=candidates,
                measure="fisher" if has_data else "sqnr",
                where=self.space.where,
                ignore=self.space.ignore,
                lm_head=self.space.lm_head,
            )
            self.journal.write_table(table.to_json())
        else:
            table = Sensitivities.from_json(text)
        exact = table.candidates.index(None)
        rest = weight_bytes(self.bench.program) - sum(row.stored[exact] for row in table.linears)
        return Plan(self.space, table, self.goal.most, self.limits, rest, has_data)

    def _try(self, index: int, choice: Choice, original: float) -> tuple[Trial, OptimizedModel | None]:
        known = self.journal.find(choice.as_dict())
        if known is not None:
            trial = dataclasses.replace(known, index=index)
            _say(f"{index:3}  {choice.label}: from the journal, {self._words(trial)}")
            return trial, None
        passes = self.space.passes_of(choice, self.data)
        trial, model = self.bench.run(index, choice.as_dict(), choice.label, passes)
        if trial.score is not None:
            loss = self.goal.loss(trial.score, original, higher_is_better=self.higher_is_better)
            trial = dataclasses.replace(trial, loss=loss)
            trial = dataclasses.replace(trial, met=not self.obstacles(trial))
        self.journal.add(trial)
        _say(f"{index:3}  {choice.label}: {self._words(trial)}")
        return trial, model

    def obstacles(self, trial: Trial) -> list[str]:
        """What keeps a trial from meeting target and limits, in words."""
        found: list[str] = []
        if trial.error or trial.loss is None:
            return [trial.error.splitlines()[0] if trial.error else "it was not judged"]
        if trial.loss > self.goal.most:
            found.append(f"it loses {self.goal.shown(trial.loss)}, {self.goal.shown(self.goal.most)} allowed")
        if self.limits.bytes is not None and (trial.bytes or 0) > self.limits.bytes:
            found.append(f"it takes {trial.bytes} bytes, {self.limits.bytes} allowed")
        if self.limits.latency_ms is not None and (trial.latency_ms or 0.0) > self.limits.latency_ms:
            found.append(f"a call takes {trial.latency_ms:.3g} ms, {self.limits.latency_ms:.3g} allowed")
        if self.limits.kernels and trial.unproven:
            found.append(f"{len(trial.unproven)} quantised linears run in no kernel of the target")
        return found

    def _words(self, trial: Trial) -> str:
        if trial.error or trial.loss is None:
            return f"failed: {self.obstacles(trial)[0]}"
        return (
            f"score {trial.score:.6g}, loses {self.goal.shown(trial.loss)}, {(trial.bytes or 0) / 1e6:.2f} MB, "
            f"{trial.latency_ms or 0.0:.2f} ms{' – met' if trial.met else ''}"
        )

    def _result(
        self,
        original: dict[str, Any],
        trials: Sequence[Trial],
        best: tuple[Trial, Choice, OptimizedModel | None] | None,
        stopped: bool,
        plan: Plan,
    ) -> AutoQuantizeResult:
        why = "the time limit was reached" if stopped else "no recipe of the space is left"
        if best is None:
            reason = (
                f"every trial failed, the first with: {trials[0].error}" if trials else self._nothing(plan, stopped)
            )
            return AutoQuantizeResult(False, reason, None, None, None, tuple(trials), self.goal, original)
        trial, choice, model = best
        passes = self.space.passes_of(choice, self.data)
        if model is None:  # it was tried by a run before this one
            model = self.bench.lowered(passes)
        report = _joined(self.bench.program, model)
        if trial.met:
            message = f"{trial.label} meets the target: it loses {self.goal.shown(trial.loss or 0.0)}"
        else:
            obstacles = "; ".join(self.obstacles(trial))
            message = f"not met: the best of {len(trials)} trials is {trial.label}; {obstacles} ({why})"
        name = self.bench.target if isinstance(self.bench.target, str) else None
        recipe = Recipe((*self.base, *passes), name, self.bench.verify)
        return AutoQuantizeResult(trial.met, message, model, recipe, trial, tuple(trials), self.goal, original, report)

    def _nothing(self, plan: Plan, stopped: bool) -> str:
        if stopped:
            return "not met: the time limit was reached before the first trial"
        least = min(plan.bytes_of(each) for each in self.space.families(has_data=plan.has_data))
        return f"not met: no recipe of the space fits {self.limits.bytes} bytes; the least one takes {least}"


def _joined(prepared: Program, model: OptimizedModel) -> Report:
    """The report of the passes before every recipe and of those after."""
    if not isinstance(prepared, OptimizedModel):
        return model.report
    first, then = prepared.report, model.report
    return Report(first.title, [*first.rows, *then.rows], first.total_seconds + then.total_seconds, then.rounding_error)


def _usual_target() -> str:
    from graphwright.backends.cpu import features

    return "cpu" if features().selected is not None else "reference"


def _say(text: str) -> None:
    """One line per trial where somebody is looking."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, markup=False)
