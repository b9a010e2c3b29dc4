"""Which adapters answer a prompt, where calls switch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.gating import adapter_weights

if TYPE_CHECKING:
    from graphwright.frontends.generation.decoder import Decoder

# A name, several with their weights, or the base alone.
Adapters: TypeAlias = str | Mapping[str, float] | None

# What stands for "nothing was said", where saying nothing and saying "none" must differ.
UNSAID: tuple[()] = ()


@dataclass(frozen=True)
class Choice:
    """The adapters of one prompt.

    Attributes:
        weights: of every adapter that is switched, in order; none where none is.
        names: those that take part, with their weights.
    """

    weights: tuple[float, ...] = ()
    names: Mapping[str, float] = field(default_factory=dict)


BASE = Choice()


def read_choices(decoder: Decoder, given: Any, count: int) -> list[Choice]:
    """The choice of each prompt.

    Args:
        decoder: answers.
        given: one choice for all prompts, or a list of one for each; :data:`UNSAID` where calls switch none.
        count: of prompts.

    Raises:
        InputError: nothing is said where adapters are switched, something is where none is, there are not as many
            choices as prompts, or there is no adapter of a name.
    """
    where = "argument 'adapters'"
    if isinstance(given, tuple) and given == UNSAID:
        if decoder.adapters:
            raise InputError(
                f"does not say which of {_listed(decoder.adapters)} answer",
                where=where,
                hint="give a name, several with weights, a list of one for each prompt, or None for the base alone",
            )
        return [Choice()] * count
    if not decoder.adapters:
        raise InputError(
            "the decoder has no adapters that calls switch",
            where=where,
            hint="insert them and run GateAdapters when it is optimised; others are on for every prompt",
        )
    rows = [given] * count if given is None or isinstance(given, str | Mapping) else given
    if not isinstance(rows, list | tuple):
        raise InputError(
            f"cannot be a {type(given).__name__}",
            where=where,
            hint="give a name, several with weights, None, or a list of one of these for each prompt",
        )
    if len(rows) != count:
        raise InputError(f"has {len(rows)} choices for {count} prompts", where=where, hint="give one for each")
    return [choice_of(decoder, row) for row in rows]


def choice_of(decoder: Decoder, row: Adapters) -> Choice:
    """One choice.

    Raises:
        InputError: there is no adapter of a name, or a weight is no finite number.
    """
    program = decoder.step
    assert program is not None  # it has adapters, so it has a program
    (weights,) = adapter_weights(program, [row]).tolist()
    names = {} if row is None else {row: 1.0} if isinstance(row, str) else dict(row)
    return Choice(tuple(weights), names)


def choice_alike(decoder: Decoder, names: Mapping[str, float]) -> Choice:
    """The choice of a draft that follows its model's: those adapters that it has under the same names."""
    if not decoder.adapters:
        return Choice()
    return choice_of(decoder, {name: weight for name, weight in names.items() if name in decoder.adapters})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
