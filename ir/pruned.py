"""Which weights of a program were pruned: a tag on the nodes that read them, and a record that says with which zeros.

The zeros of a pruned weight are its mask: a weight is masked where it is exactly 0. What must be known besides (the
pattern they keep to, and a digest by which they are known again) is JSON in ``Program.records["sparsity"]``, by the
weight's name, and is saved with the program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of

MASKED = "masked"
RECORD = "sparsity"
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class PrunedWeight:
    """A weight with a mask, as the records have it.

    Attributes:
        name: of the weight; of its codes, where it is packed, of its mask, where it is compressed.
        pattern: that its zeros keep to, such as ``"2:4"``.
        sparsity: fraction of zeros.
        digest: of which weights are not 0, in the order in which they are stored.
    """

    name: str
    pattern: str
    sparsity: float
    digest: str


def is_masked(node: fx.Node) -> bool:
    """Whether a node reads a pruned weight."""
    return MASKED in tags_of(node)


def pruned_weights(program: Program) -> dict[str, PrunedWeight]:
    """The pruned weights that a program has, by name."""
    present = program.tensors()
    return {
        name: PrunedWeight(name, str(entry["pattern"]), float(entry["sparsity"]), str(entry["digest"]))
        for name, entry in program.records.get(RECORD, {}).items()
        if name in present
    }


def note_pruned(program: Program, name: str, mask: torch.Tensor, pattern: str) -> None:
    """Write down which weights stay, bool ``[rows, columns]`` as they are stored."""
    sparsity = 1 - int(mask.sum()) / max(1, mask.numel())
    table = program.records.setdefault(RECORD, {})
    table[name] = {"pattern": pattern, "sparsity": sparsity, "digest": mask_digest(mask)}


def follow(program: Program, old: Sequence[str], new: str, values: torch.Tensor) -> None:
    """Let the records know a weight by another name; nothing where it was not pruned.

    Args:
        program: whose records.
        old: names of the weights that have become it.
        new: its name.
        values: the weight, or a mask of what is not 0 in it; looked at only where it was pruned.
    """
    table = program.records.get(RECORD, {})
    patterns = {str(table.pop(name)["pattern"]) for name in old if name in table}
    if patterns:
        note_pruned(program, new, values.detach() != 0, patterns.pop() if len(patterns) == 1 else "unstructured")


def mask_digest(mask: torch.Tensor) -> str:
    """A digest of a mask's shape and bits."""
    found = hashlib.blake2b(str(list(mask.shape)).encode(), digest_size=_DIGEST_BYTES)
    found.update(np.packbits(mask.detach().cpu().contiguous().numpy()).data)
    return found.hexdigest()
