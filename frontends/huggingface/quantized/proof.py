"""Whether a folder that was written computes what the program computes that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphwright.frontends.huggingface.quantized.modules import IntegerLinear
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ExportError
from graphwright.ir.program import Program
from graphwright.passes.verification.precise import run, wide

# Relative error (root mean square) in float64. Models compute a few steps in float32 whatever their dtype; where
# activations are rounded, such differences move single codes.
_LIMIT, _LIMIT_ACTIVATIONS = 1e-4, 2e-3


def check_saved(program: Program, folder: Path, inputs: list[torch.Tensor] | None) -> float:
    """Load a folder as a model in float64 and compare its outputs with the program's.

    Args:
        program: what was written.
        folder: where.
        inputs: flat inputs of the program; random ones of small sizes when left out.

    Returns:
        the largest relative error of an output, root mean square.

    Raises:
        ExportError: it is larger than rounding can be.
    """
    from graphwright.frontends.api import flat_examples
    from graphwright.frontends.huggingface.loading import load_model

    model = load_model(folder, dtype=torch.float64)
    flat = flat_examples(program, None) if inputs is None else inputs
    values = run(program, flat)
    items: Any = program.output.args[0]
    wanted = [values[item.name] for item in items if isinstance(item, fx.Node) and item.name in values]
    with torch.no_grad():
        found = [item for item in pytree.tree_leaves(_call(program, model, flat)) if isinstance(item, torch.Tensor)]
    if len(found) != len(wanted):
        raise ExportError(
            f"the written model has {len(found)} outputs, the program {len(wanted)}",
            where=f"program {program.title!r}",
            hint="give the source that the program was loaded from",
        )
    error = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
    rounds = any(isinstance(module, IntegerLinear) for module in model.modules())
    limit = max(_LIMIT_ACTIVATIONS if rounds else _LIMIT, _own_rounding(program, flat, wanted))
    if not error <= limit:
        raise ExportError(
            f"the written model is off by {error:.2g} (relative), more than rounding explains ({limit:.2g})",
            where=f"program {program.title!r}",
            hint="a pass has changed the graph in a way that weights alone do not say; save before it",
        )
    return error


def _call(program: Program, model: Any, flat: list[torch.Tensor]) -> Any:
    """The model's outputs on a program's flat inputs."""
    from graphwright.frontends.huggingface.step.families import family_of
    from graphwright.frontends.huggingface.step.running import own_attention, step_model

    given, signature = iter(flat), program.signature
    leaves = [
        signature.constants.get(index) if name is None else wide(next(given))
        for index, name in enumerate(signature.inputs)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    if DecoderLayout.find(program) is None:
        return model(*args, **kwargs)
    family = family_of(model)
    stepped = step_model(model, family)
    with own_attention(model, family):
        return stepped(*args, **kwargs)


def _own_rounding(program: Program, flat: list[torch.Tensor], wanted: list[Any]) -> float:
    """What a program's dtype costs: constants that passes have calculated are rounded to it."""
    narrow = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in program.parameters())
    if not narrow:
        return 0.0
    with torch.no_grad():
        found = program.body(*flat)
    return max(_error(a, b) for a, b in zip(found, wanted, strict=True) if torch.is_floating_point(b))


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
