"""Small random decoders whose layers share their weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from tests.frontends.decoders import make

import graphwright as gw
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.program import Program

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def shared_model(order: Sequence[int], family: str = "llama", **changes: Any) -> Any:
    """A model of one layer for each number in ``order``; equal numbers share all of their weights."""
    model = _make(len(order), family, **changes)
    layers = next(module for path, module in model.named_modules() if path.endswith((".layers", ".h")))
    for place, number in enumerate(order):
        for path, parameter in layers[order.index(number)].named_parameters():
            owner, _, leaf = path.rpartition(".")
            setattr(layers[place].get_submodule(owner), leaf, parameter)
    return model


def shared_decoder(order: Sequence[int], family: str = "llama", *, prepared: bool = False) -> Program:
    """The decoding step of such a model: made from one of as many different layers, which is traced once."""
    program = _decoder(len(order), family, prepared).clone()
    kept: dict[str, Any] = {}
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        found = _LAYER.search(name)
        if found is not None:
            name = f"{name[: found.start()]}{order.index(order[int(found.group())])}{name[found.end() :]}"
        first = kept.setdefault(name, node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
    program.body.recompile()
    program.drop_unused_tensors()
    return program


def cycle(layers: int, repeats: int) -> list[int]:
    """The order 1 2 1 2 for two layers repeated twice."""
    return [*range(layers)] * repeats


def _make(layers: int, family: str, **changes: Any) -> Any:
    name = "n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers"
    return make(family, **{name: layers, **changes})


@functools.cache
def _decoder(layers: int, family: str, prepared: bool) -> Program:
    if prepared:
        return gw.optimize(_decoder(layers, family, False), [gw.PrepareDecoder(length=64)], verify=False)
    return load_decoder(_make(layers, family), check=False)
