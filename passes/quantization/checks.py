"""What the options of quantisation may be, and how far a linear may move before its weights are taken for wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from graphwright.ir.errors import InputError
from graphwright.ir.ops.quantization import BITS
from graphwright.passes.quantization.formats import DTYPES

# Relative error (root mean square) of one linear's output beyond which its weights are taken for wrong, not for
# rounded; by dtype, bits, and whether the clip is searched. On normal weights, with one scale per channel, rounding to
# nearest gives 0.005 (INT8), 0.1 (INT4), 0.2 and 0.27 without the search (INT3), 0.39 and 0.62 (INT2), 0.11 (NF4), 0.12
# (FP4), 0.026 (E4M3), 0.053 (E5M2); 0.01 with INT8 weights and activations.
_LIMITS = {
    ("int", 8, True): 0.05,
    ("int", 8, False): 0.05,
    ("int", 4, True): 0.35,
    ("int", 4, False): 0.35,
    ("int", 3, True): 0.4,
    ("int", 3, False): 0.55,
    ("int", 2, True): 0.65,
    ("int", 2, False): 0.95,
    ("nf4", 4, True): 0.35,
    ("nf4", 4, False): 0.35,
    ("fp4", 4, True): 0.35,
    ("fp4", 4, False): 0.35,
    ("fp8_e4m3", 8, True): 0.1,
    ("fp8_e4m3", 8, False): 0.1,
    ("fp8_e5m2", 8, True): 0.15,
    ("fp8_e5m2", 8, False): 0.15,
}
# The same with activations rounded too, by bits of the weights and what the activations become.
_ROUNDED_ACTIVATIONS = {(8, "int8"): 0.15, (4, "int8"): 0.4, (4, "int4"): 0.8, (8, "fp8"): 0.2}


# Bits of activations.
ACTIVATIONS = {"none": 0, "int8": 8, "int4": 4, "fp8": 8}
RANGES = ("auto", "static", "per_token", "per_tensor", "per_group")


class Options(Protocol):
    """Options of the pass that quantises linears."""

    @property
    def bits(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def block(self) -> tuple[int, int] | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def clip_search(self) -> bool: ...
    @property
    def even_range(self) -> bool: ...
    @property
    def float_zero_points(self) -> bool: ...
    @property
    def activations(self) -> str: ...
    @property
    def activation_ranges(self) -> str: ...


def local_limit(dtype: str, bits: int, clip_search: bool, activations: str = "none") -> float:
    """The largest relative error (root mean square) of one linear's output that rounding may make."""
    return _ROUNDED_ACTIVATIONS.get((bits, activations), _LIMITS[dtype, bits, clip_search])


def check_activations(name: str, given: Options) -> None:
    """Check how activations are rounded.

    Raises:
        InputError: weights of that kind do not go with it.
    """
    one_of(name, "activations", given.activations, ACTIVATIONS)
    one_of(name, "activation_ranges", given.activation_ranges, RANGES)
    plain = given.dtype == "int" and given.block is None and given.symmetric
    narrow = given.dtype == "int" and given.bits == 4
    if given.activations == "int8" and not (narrow or (given.bits == 8 and plain)):
        raise InputError(
            "INT8 activations go with symmetric INT8 weights, one scale per channel or group, or with 4-bit weights",
            where=f"{name}: activations='int8'",
            hint="use bits=8, dtype='int', block=None, symmetric=True",
        )
    if given.activations == "fp8" and given.dtype != "fp8_e4m3":
        raise InputError(
            "FP8 activations go with FP8 weights",
            where=f"{name}: activations='fp8'",
            hint="use dtype='fp8_e4m3'",
        )
    if given.activations == "int4" and not narrow:
        raise InputError(
            "INT4 activations go with 4-bit integer weights",
            where=f"{name}: activations='int4'",
            hint="use bits=4, dtype='int'",
        )
    ranges = given.activation_ranges
    if ranges == "auto" or given.activations == "none":
        return
    grouped = given.activations == "int8" and not narrow and given.group_size is not None
    if narrow or given.activations == "fp8":
        allowed: tuple[str, ...] = ("per_token", "per_group")
    else:
        allowed = ("per_group",) if grouped else ("static", "per_token", "per_tensor")
    if ranges not in allowed:
        kind = "FP8" if given.activations == "fp8" else f"{given.bits}-bit"
        raise InputError(
            f"{kind} weights{' in groups' * grouped} do not have it",
            where=f"{name}: activation_ranges={ranges!r}",
            hint=f"use 'auto' or {', '.join(map(repr, allowed))}",
        )


def check_format(name: str, bits: int, group_size: int | None) -> None:
    """Check bits and group size.

    Raises:
        InputError: naming the option and what it may be.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"must be 2, 3, 4 or 8, not {bits!r}", where=f"{name}: bits")
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 16 or group_size % 16:
        raise InputError(
            f"must be a multiple of 16 (such as 32, 64, 128), or None for one scale per channel, not {group_size!r}",
            where=f"{name}: group_size",
        )


def check_codes(name: str, dtype: str, symmetric: bool) -> None:
    """Check what codes stand for.

    Raises:
        InputError: naming the option and what it may be.
    """
    one_of(name, "dtype", dtype, DTYPES)
    if dtype != "int" and not symmetric:
        raise InputError(
            f"codes of {dtype!r} have no zero points", where=f"{name}: symmetric=False", hint="use dtype='int'"
        )


def check_grid(name: str, given: Options, *, whole: bool) -> None:
    """Check that zero points may lie between codes, and that ranges may be even, if they are to.

    Args:
        name: of the pass.
        given: its options.
        whole: the rounding chooses whole zero points only.

    Raises:
        InputError: what they do not go with.
    """
    if given.even_range and (given.dtype != "int" or not given.symmetric or given.clip_search):
        raise InputError(
            "is the range of symmetric integer grids that are not searched for",
            where=f"{name}: even_range=True",
            hint="use dtype='int', symmetric=True, clip_search=False",
        )
    if given.even_range and given.activations == "int8" and given.bits == 8:
        raise InputError("INT8 products have a range of their own", where=f"{name}: even_range=True")
    if not given.float_zero_points:
        return
    place = f"{name}: float_zero_points=True"
    if given.dtype != "int" or given.symmetric:
        raise InputError("there are no zero points to choose", where=place, hint="use dtype='int', symmetric=False")
    if given.activations != "none":
        raise InputError("products with rounded activations have whole zero points", where=place)
    if whole:
        raise InputError("this rounding tunes whole zero points", where=place, hint="use 'hqq', 'gptq' or 'nearest'")


def checked_block(name: str, block: object, group_size: int | None) -> tuple[int, int]:
    """The rows and columns of a block; a recipe may give them as a list.

    Raises:
        InputError: naming the option and what it may be.
    """
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if len(sizes) != 2 or not whole or sizes[1] % 16:
        raise InputError(
            f"must be a number of rows and a multiple of 16 columns, such as (128, 128), not {block!r}",
            where=f"{name}: block",
        )
    if group_size not in (None, sizes[1]):
        raise InputError("is given besides a group size", where=f"{name}: block", hint="leave group_size out")
    return sizes[0], sizes[1]


def one_of(name: str, option: str, value: str, choices: Iterable[str]) -> None:
    """Check that a value is one of some.

    Raises:
        InputError: naming the option and what it may be.
    """
    if value not in choices:
        raise InputError(f"must be one of {', '.join(map(repr, choices))}, not {value!r}", where=f"{name}: {option}")
