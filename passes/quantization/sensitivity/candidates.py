"""Candidates for a linear's format, and what a weight becomes with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.linears import QuantizeLinears, with_options
from graphwright.passes.quantization.overrides import Override, checked, described
from graphwright.passes.quantization.rounding.base import BlockRounding, Codes, InputRounding, Rounding, WeightRounding


def candidate_list(given: Sequence[Override]) -> tuple[Override, ...]:
    """Candidates as they are kept.

    Raises:
        InputError: there is none, one occurs twice, or has options that no format has.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise InputError(
            f"must be a list of formats, not {given!r}",
            where="candidates",
            hint='give candidates=[{"bits": 3, "group_size": 128}, {"bits": 4, "group_size": 128}, None]',
        )
    found: list[Override] = []
    for index, options in enumerate(given):
        options = checked("sensitivities", {f"candidate {index + 1}": options})[f"candidate {index + 1}"]
        format_of(options)
        if options in found:
            raise InputError(f"{named(options)} occurs twice", where="candidates")
        found.append(options)
    return tuple(found)


def format_of(options: Override) -> Format | None:
    """The format that options stand for; ``None`` for floating point.

    Raises:
        InputError: they do not go together, or are none of a format.
    """
    if options is None:
        return None
    try:
        return with_options(QuantizeLinears(), options).form()
    except InputError as error:
        where = str(error.where).replace(QuantizeLinears.name, "candidates")
        raise InputError(error.what, where=where, hint=error.hint) from error


def named(options: Override) -> str:
    """A candidate in words."""
    form = format_of(options)
    return "float" if form is None else described(form)


def rounded(
    weight: torch.Tensor, form: Format, rounding: Rounding, inputs: Observed | None
) -> tuple[torch.Tensor, int]:
    """What a weight becomes.

    Args:
        weight: ``[out, in]``, floating, finite.
        form: the format.
        rounding: not one of blocks.
        inputs: what the linear sees; for methods that look at inputs.

    Returns:
        the values that the codes stand for, ``[out, in]`` float32, and the bytes of codes, scales and zero points.
    """
    group = form.columns_per_group(weight.shape[1])
    wide = weight.detach().to(torch.float32)
    if isinstance(rounding, InputRounding):
        assert inputs is not None
        found = rounding.codes(wide, form, inputs.copy())  # it may use them up, and other candidates need them
    elif isinstance(rounding, WeightRounding):
        found = rounding.codes(wide, form)
    else:
        found = _nearest(wide, form, group)
    values = torch.cat(
        [
            form.values(codes.to(torch.float32), scales, zeros).flatten(1)
            for codes, scales, zeros in _grouped(found, group)
        ],
        dim=1,
    )
    rows, groups = found.scales.shape
    scales = form.stored(found.scales)
    stored = rows * groups * -(-group * form.bits // 8) + scales.numel() * scales.element_size()
    zeros = 0 if form.symmetric else form.stored_zeros(found.zeros).nbytes
    return values, stored + zeros


def check_rounding(rounding: Rounding) -> None:
    """Check that a method rounds a weight by itself.

    Raises:
        InputError: it rounds whole blocks.
    """
    if isinstance(rounding, BlockRounding):
        raise InputError(
            "rounds whole blocks, and sensitivities are of single linears",
            where=f"rounding={rounding.method!r}",
            hint="use 'nearest' or 'gptq' here, and the method of your choice when you quantise",
        )


def _nearest(weight: torch.Tensor, form: Format, group: int) -> Codes:
    parts = []
    for columns in weight.split(weight.shape[1] // group * group or weight.shape[1], dim=1):
        pieces = columns.reshape(len(weight), -1, min(group, columns.shape[1]))
        scales, zeros = form.fit(pieces)
        parts.append((form.round(pieces, scales, zeros).flatten(1), scales, zeros))
    codes, all_scales, all_zeros = (torch.cat(items, dim=1) for items in zip(*parts, strict=True))
    return Codes(codes, all_scales, all_zeros)


def _grouped(found: Codes, group: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Codes ``[rows, groups, columns]`` with their scales and zero points: the whole groups, then the last, shorter."""
    rows, columns = found.codes.shape
    whole = columns // group
    parts = []
    if whole:
        codes = found.codes[:, : whole * group].reshape(rows, whole, group)
        parts.append((codes, found.scales[:, :whole], found.zeros[:, :whole]))
    if whole * group < columns:
        parts.append((found.codes[:, whole * group :].unsqueeze(1), found.scales[:, whole:], found.zeros[:, whole:]))
    return parts
