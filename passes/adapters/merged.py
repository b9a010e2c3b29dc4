"""Adapters that became part of the weights: what they were, and what the weights were without them.

A program remembers in its records, which are saved, a digest of every weight before and after. In memory it keeps the
tensors themselves: those of the base are shared with the model it came from, and cost something only once that is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.passes.adapters.files import SavedAdapter, SavedSite, captured
from graphwright.passes.adapters.inserted import MERGED, Inserted, described
from graphwright.passes.adapters.kinds import kind_of

_DIGEST_BYTES = 16
_PIECE = 1 << 24


@dataclass(frozen=True)
class Kept:
    """What is in memory of a merge.

    Attributes:
        base: by weight, its tensor before.
        merged: by weight, the tensor that was made.
        adapter: with its tensors.
    """

    base: Mapping[str, torch.Tensor]
    merged: Mapping[str, torch.Tensor]
    adapter: SavedAdapter


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged, as the records have it.

    Attributes:
        name: its name.
        weights: by name of the weight, the digests before and after.
        sites: by path, the digests of the adapter's tensors, by the names that the kind gives them.
        added: names of weights that the merge brought, such as a bias where there was none.
        rounded: weights were packed, and rounded anew.
        kept: what is in memory; ``None`` after a load, or where it was let go of.
    """

    name: str
    weights: Mapping[str, tuple[str, str]]
    sites: Mapping[str, Mapping[str, str]]
    added: tuple[str, ...]
    rounded: bool
    kept: Kept | None


def merged_adapters(program: Program) -> dict[str, MergedAdapter]:
    """The adapters of a program that are part of its weights, by name, in the order in which they were merged."""
    kept = program.kept.get(MERGED, {})
    return {
        name: MergedAdapter(
            name,
            {weight: (before, after) for weight, (before, after) in record["weights"].items()},
            {path: site["tensors"] for path, site in record["sites"].items()},
            tuple(record["added"]),
            record["rounded"],
            kept.get(name),
        )
        for name, record in program.records.get(MERGED, {}).items()
    }


def note_merged(
    program: Program, adapter: Inserted, before: Mapping[str, torch.Tensor], *, rounded: bool, keep: bool
) -> None:
    """Write down what a merge did; the adapter's own tensors are still in the program.

    Args:
        program: after the merge.
        adapter: as it was.
        before: all the tensors as they were.
        rounded: weights were packed, and rounded anew.
        keep: keep the tensors in memory.
    """
    after = program.tensors()
    changed = [name for name, tensor in before.items() if name in after and after[name] is not tensor]
    saved = captured(program, adapter)
    sites: dict[str, Any] = {}
    for path, site in saved.sites.items():
        sites[path] = {**site.shapes, "tensors": {key: digest(tensor) for key, tensor in site.tensors.items()}}
        if site.kind != saved.kind:
            sites[path]["kind"] = described(site.kind)
    program.records.setdefault(MERGED, {})[adapter.name] = {
        "kind": described(saved.kind),
        "title": saved.title,
        "rounded": rounded,
        "added": [name for name in after if name not in before],
        "sites": sites,
        "weights": {name: [digest(before[name]), digest(after[name])] for name in changed},
    }
    if keep:
        found = Kept({name: before[name] for name in changed}, {name: after[name] for name in changed}, saved)
        program.kept[MERGED] = {**program.kept.get(MERGED, {}), adapter.name: found}


def forget_merged(program: Program, name: str) -> None:
    """Strike a merged adapter from records and memory."""
    for table in (program.records, program.kept):
        left = {key: value for key, value in table.get(MERGED, {}).items() if key != name}
        table.pop(MERGED, None)
        if left:
            table[MERGED] = left


def checked_tensors(merged: MergedAdapter, program: Program, given: SavedAdapter) -> SavedAdapter:
    """An adapter that was read again, once it is seen to be the one that was merged.

    Raises:
        InputError: it is another one; says which tensors are missing or differ.
    """
    wrong: list[str] = []
    sites: dict[str, SavedSite] = {}
    for path, tensors in merged.sites.items():
        site = given.sites.get(path)
        if site is None:
            wrong.append(f"{path}: missing")
            continue
        for key, wanted in tensors.items():
            found = site.tensors.get(key)
            if found is None or digest(found) != wanted:
                wrong.append(f"{path}.{key}: {'missing' if found is None else 'has other values'}")
        sites[path] = site
    wrong.extend(f"{path}: was not merged" for path in given.sites if path not in merged.sites)
    if wrong:
        raise InputError(
            f"is not the adapter that was merged as {merged.name!r}: {len(wrong)} differences",
            where=given.source,
            hint="give the folder that save_adapter wrote before the merge",
            context=[*wrong[:8], *(["…"] if len(wrong) > 8 else [])],
        )
    record = program.records[MERGED][merged.name]
    kind = kind_of(record["kind"], where=f"merged adapter {merged.name!r}")
    return SavedAdapter(given.source, given.title, kind, sites)


def digest(tensor: torch.Tensor) -> str:
    """A digest of dtype, shape and values."""
    found = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=_DIGEST_BYTES)
    for piece in _bytes_of(tensor):
        found.update(piece)
    return found.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]
        release(flat[start : start + _PIECE])
