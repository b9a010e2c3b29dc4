"""Adapters whose tensors come with every call, so that one file serves all of one shape."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.program import Program
from graphwright.passes.adapters.files import SavedAdapter, load_adapter
from graphwright.passes.adapters.inserted import INPUTS, RECORD, adapter_of, adapters_of, checked_names, forget
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact


@dataclass(frozen=True, kw_only=True)
class AdaptersAsInputs(Pass):
    """Make the tensors of adapters inputs of the program.

    ::

        %lora_A = weight "layer.lora_A.default"
        %hidden = aten.linear(%x, %lora_A)
        ->
        %layer_lora_A_default = input                       given as **{"layer.lora_A.default": tensor}
        %hidden = aten.linear(%x, %layer_lora_A_default)

    Inputs are called what the tensors were, also in an exported file; :func:`adapter_inputs` gives those of a saved
    adapter. What a kind does not train, such as VeRA's projections, stays a constant. It does not fire where no adapter
    is left, which is an error.

    Attributes:
        adapters: names; ``None`` for all.
    """

    name: ClassVar[str] = "adapters-as-inputs"
    contract: ClassVar[Contract] = Exact(bitwise=True)
    after: ClassVar[tuple[str, ...]] = ("gate-adapters",)
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def run(self, program: Program) -> bool:
        """Replace the tensors; all or nothing.

        Raises:
            SelectionError: the program has no adapter.
            InputError: there is none of a name, or an argument of the program has the name of a tensor.
        """
        names = tuple(adapters_of(program)) if self.adapters is None else self.adapters
        if not names:
            raise SelectionError("there is no adapter", where=f"{self.name}: adapters", hint="insert one")
        weights: dict[str, str] = {}
        for name in names:
            for site in adapter_of(program, name).sites.values():
                weights |= dict.fromkeys(site.tensors.values(), name)
        with program.edit() as rewriter:
            for node in [node for node in program.nodes if node.op == "get_attr" and str(node.target) in weights]:
                tensor = program.tensor(node)
                if not isinstance(tensor, nn.Parameter):
                    continue
                values = tensor.detach()
                new = rewriter.add_input(str(node.target), values.shape, values.dtype, stand_in=values)
                new.meta.update({key: value for key, value in node.meta.items() if key not in new.meta})
                rewriter.replace(node, new, equivalent=False)
            for name in names:
                program.records.setdefault(INPUTS, {})[name] = program.records[RECORD][name]
                forget(program, name)
        program.notes["inputs"] = len(weights)
        return True


def adapter_inputs(
    program: Program, adapter: SavedAdapter | str | os.PathLike[str], name: str = "default"
) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter by the names of the inputs that they are given as.

    Args:
        program: with :class:`AdaptersAsInputs`.
        adapter: its folder or file, or what :func:`load_adapter` read.
        name: the adapter of the program that it takes the place of.

    Raises:
        InputError: the program has no inputs for an adapter of that name, or this one is of another kind or shape; says
            which tensors differ.
    """
    records = program.records.get(INPUTS, {})
    if name not in records:
        raise InputError(
            f"it has no inputs for an adapter {name!r}",
            where=f"program {program.title!r}",
            hint=f"there are some for {', '.join(map(repr, records))}" if records else "run AdaptersAsInputs on it",
        )
    saved = adapter if isinstance(adapter, SavedAdapter) else load_adapter(adapter)
    shapes = {program.signature.keyword_of(str(node.target)): node.meta["val"] for node in program.inputs}
    found: dict[str, torch.Tensor] = {}
    wrong = [f"{path}: the program has no adapter there" for path in saved.sites if path not in records[name]["sites"]]
    options = {key: value for key, value in records[name]["kind"].items() if key != "kind"}
    if saved.kind.kind != records[name]["kind"]["kind"] or _described(saved) != options:
        wrong.append(f"it is {saved.kind}, the program has {records[name]['kind']}")
    for path, site in records[name]["sites"].items():
        given = saved.sites[path].tensors if path in saved.sites else {}
        for key, weight in site["tensors"].items():
            like = shapes.get(weight)
            if like is None:
                continue  # a constant
            tensor = given.get(key)
            if tensor is None or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                there = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                wrong.append(f"{path}.{key}: {there}, not {like.dtype}{list(like.shape)}")
            else:
                found[weight] = tensor
    if wrong:
        raise InputError(
            f"does not fit the inputs for adapter {name!r} of {program.title!r}: {len(wrong)} differences",
            where=saved.source,
            hint="one program serves adapters of one kind, with the same options, at the same places",
            context=[*wrong[:8], *(["…"] if len(wrong) > 8 else [])],
        )
    return found


def _described(saved: SavedAdapter) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in saved.kind.options().items()}
