"""What a transformers architecture consists of, from its configuration: names and shapes, without any values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LinearPlace:
    """A linear of the architecture.

    Attributes:
        name: of the module.
        inputs: features.
        outputs: features.
        has_bias: whether it adds one.
        transposed: its weight is stored ``[in, out]``, as GPT-2's ``Conv1D`` has it.
    """

    name: str
    inputs: int
    outputs: int
    has_bias: bool
    transposed: bool


@dataclass
class Architecture:
    """Modules and tensors of a model class.

    Attributes:
        linears: by module name.
        tensors: shape of every tensor that a checkpoint of it stores, tied ones under each of their names.
        prefix: what a model without its head leaves out of the names of one with it.
        tied: names of tensors that are another one's, where the configuration ties them.
    """

    linears: dict[str, LinearPlace] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = ""
    tied: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(kind: Any, config: Any) -> Architecture:
        """Of a model class and its configuration; the model is made without values."""
        with torch.device("meta"):
            model: nn.Module = kind(config)
        found = Architecture(prefix=str(getattr(model, "base_model_prefix", "") or ""))
        for name, module in model.named_modules():
            place = _place(name, module)
            if place is not None:
                found.linears[name] = place
        found.tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                found.tied[name] = owner
        if getattr(config, "tie_word_embeddings", False):
            for name, owner in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
                if name in found.tensors and owner in found.tensors and name not in found.tied:
                    found.tied[name] = owner
        return found

    def linear(self, name: str) -> LinearPlace | None:
        """The linear of this name in a checkpoint, which may be one of the model with another head, or of none."""
        for each in (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"):
            if each in self.linears:
                return self.linears[each]
        return None


def _place(name: str, module: nn.Module) -> LinearPlace | None:
    if type(module) is nn.Linear:
        return LinearPlace(name, module.in_features, module.out_features, module.bias is not None, False)
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight: Any = module.weight
        return LinearPlace(name, int(weight.shape[0]), int(weight.shape[1]), module.bias is not None, True)
    return None
