"""Codes of a few bits in the 32-bit words of other tools' files.

All of them are little-endian bit strings: code ``i`` of a row lies at bit ``i · bits``, and may go on in the next word.
AWQ shuffles the eight codes of a word.
"""

from __future__ import annotations

import math

import torch

# Column of a word's eight that each of its nibbles holds, the lowest first (AWQ's "gemm" version), and the inverse.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_NIBBLES = tuple(AWQ_COLUMNS.index(column) for column in range(8))


def words_for(count: int, bits: int) -> int:
    """Words that so many codes fill."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes of rows of words.

    Args:
        words: int32 ``[rows, words_for(count, bits)]``.
        bits: of a code, 1 to 8.
        count: codes in a row.

    Returns:
        uint8 ``[rows, count]``.
    """
    octets: torch.Tensor = words.contiguous().view(torch.uint8)
    unit, width = _unit(bits)
    octets = _padded(octets, width).unflatten(1, (-1, width))
    codes = octets.new_empty(*octets.shape[:2], unit)
    for column in range(unit):
        octet, shift = divmod(column * bits, 8)
        code = octets[..., octet] >> shift
        if shift + bits > 8:
            code = code | (octets[..., octet + 1] << (8 - shift))
        codes[..., column] = code & (2**bits - 1)
    result: torch.Tensor = codes.flatten(1)[:, :count]
    return result


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`unpack_words`; bits left over in the last word are 0.

    Args:
        codes: uint8 ``[rows, count]``.
        bits: of a code, 1 to 8.

    Returns:
        int32 ``[rows, words_for(count, bits)]``.
    """
    unit, width = _unit(bits)
    units = _padded(codes, unit).unflatten(1, (-1, unit))
    octets = units.new_zeros(*units.shape[:2], width)
    for column in range(unit):
        octet, shift = divmod(column * bits, 8)
        octets[..., octet] |= units[..., column] << shift
        if shift + bits > 8:
            octets[..., octet + 1] |= units[..., column] >> (8 - shift)
    size = 4 * words_for(codes.shape[1], bits)
    filled: torch.Tensor = _padded(octets.flatten(1), size)[:, :size].contiguous().view(torch.int32)
    return filled


def unpack_whole(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes of words that hold ``32 // bits`` each and leave the rest unused, as old compressed-tensors has 3 bits."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :count]


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes these are."""
    unit = 8 // math.gcd(bits, 8)
    return unit, unit * bits // 8


def _padded(values: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -values.shape[1] % multiple if values.shape[1] else multiple
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
