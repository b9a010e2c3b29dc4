"""Finding the first pass of a pipeline that breaks something the user can test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphwright.ir.errors import InputError, PassError
from graphwright.ir.program import Program
from graphwright.passes.base import Pass
from graphwright.passes.pipeline import flatten, run_passes


@dataclass(frozen=True)
class Culprit:
    """The first bad pass.

    Attributes:
        index: its place in the flattened pipeline.
        item: the pass.
        error: what it raised itself, or ``None`` when it ran and the test failed after it.
    """

    index: int
    item: Pass
    error: PassError | None = None

    def __str__(self) -> str:
        reason = f": {self.error.what}" if self.error is not None else ""
        return f"pass {self.index + 1}, {self.item.name!r}{reason}"


def bisect(program: Program, passes: Sequence[Pass], is_good: Callable[[Program], bool]) -> Culprit | None:
    """The first pass after which ``is_good`` no longer holds; ``None`` when all is good.

    Binary search: the pipeline is run about ``log2(passes)`` times on clones, and ``program`` is not changed. It
    assumes, as every bisection does, that what one pass broke stays broken.

    Args:
        program: the starting point; must itself be good.
        passes: the pipeline.
        is_good: a test of a program, such as a comparison with the original above a tolerance.

    Raises:
        InputError: the program is not good before any pass.
    """
    flat = flatten(passes)
    if not is_good(program.clone()):
        raise InputError("the program is not good before any pass has run", where="bisect", hint="check is_good itself")

    def probe(count: int) -> Culprit | bool:
        trial = program.clone()
        for index in range(count):
            try:
                run_passes(trial, [flat[index]])
            except PassError as error:
                return Culprit(index, flat[index], error)
        return is_good(trial)

    good, bad = 0, len(flat)
    verdict = probe(bad)
    if verdict is True:
        return None
    if isinstance(verdict, Culprit):
        # The pipeline stops here by itself; what broke first may still lie before.
        raised, bad = verdict, verdict.index
        if probe(bad) is True:
            return raised
    while bad - good > 1:
        middle = (good + bad) // 2
        if probe(middle) is True:
            good = middle
        else:
            bad = middle
    return Culprit(bad - 1, flat[bad - 1])
