"""Options that single linears have of their own: other bits here, floating point there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.program import Program
from graphwright.passes import selection
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.targets import LinearTarget, linear_target

# Options of a format that may differ from linear to linear; ``None`` in their place leaves the linear as it is.
Override = Mapping[str, Any] | None

PER_LINEAR = ("bits", "dtype", "group_size", "symmetric", "float_zero_points", "clip_search", "even_range")


def checked(name: str, given: Mapping[str, Override]) -> dict[str, Override]:
    """Overrides as a pass keeps them.

    Raises:
        InputError: a key is no selection, or an option none that a linear can have of its own.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"must map linears to options, not {given!r}",
            where=f"{name}: overrides",
            hint='write overrides={"model.layers.0.*": {"bits": 8}, "re:.*o_proj": None}',
        )
    found: dict[str, Override] = {}
    for key, options in given.items():
        place = f"{name}: overrides[{key!r}]"
        if not isinstance(key, str):
            raise InputError("is no glob, 're:<regex>' or weight name", where=place)
        selection.check(key, "overrides")
        if options is None:
            found[key] = None
            continue
        if not isinstance(options, Mapping):
            raise InputError(
                f"must be options such as {{'bits': 8}}, or None for floating point, not {options!r}", where=place
            )
        for option in options:
            if option not in PER_LINEAR:
                raise InputError(
                    f"{option!r} is no option that linears have of their own",
                    where=place,
                    hint=f"these are: {', '.join(PER_LINEAR)}; for others use a second pass with where=",
                )
        # TOML has no null, and group_size may be absent.
        found[key] = {option: None if value == "none" else value for option, value in options.items()}
    return found


def first_match(program: Program, keys: Sequence[str]) -> Callable[[LinearTarget], str | None]:
    """Which key holds for a linear: the first that is its weight's name, or selects its node as ``where=`` does.

    Raises:
        SelectionError: a key selects no linear of this program.
    """
    linears = [found for node in program.nodes if isinstance(found := _linear(program, node), LinearTarget)]
    names = program.tensors().keys()
    rules: list[tuple[str, Callable[[LinearTarget], bool]]] = []
    for key in keys:
        rule = _names(key) if key in names else _selects(program, key)
        if not any(rule(target) for target in linears):
            raise SelectionError(
                "selects no linear of this program",
                where=f"overrides[{key!r}]",
                hint="give a linear's module path, a glob, 're:<regex>' or the name of its weight",
            )
        rules.append((key, rule))
    return lambda target: next((key for key, rule in rules if rule(target)), None)


def _linear(program: Program, node: fx.Node) -> LinearTarget | str | None:
    return linear_target(program, node) if node.op == "call_function" else None


def _names(key: str) -> Callable[[LinearTarget], bool]:
    return lambda target: str(target.weight.target) == key


def _selects(program: Program, key: str) -> Callable[[LinearTarget], bool]:
    chosen = selection.predicate(program, key)
    return lambda target: chosen(target.node)


def described(form: Format) -> str:
    """A format in words: ``INT4 g128 asymmetric``, ``NF4 g64``."""
    kind = f"INT{form.bits}" if form.codebook is None else form.codebook.upper()
    group = "per channel" if form.group_size is None else f"g{form.group_size}"
    zeros = "" if form.symmetric else " float zero points" if form.float_zeros else " asymmetric"
    return f"{kind} {group}{zeros}{' even range' if form.even_range else ''}"


def mix(forms: Iterable[Format | None]) -> str:
    """How many weights have which format, most frequent first; ``None`` for floating point."""
    counts = Counter("float" if form is None else described(form) for form in forms)
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common())
