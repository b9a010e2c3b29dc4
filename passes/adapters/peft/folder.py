"""What all layouts of PEFT have in common: options that must not be ignored, names of tensors, patterns of modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import InputError, SerializationError
from graphwright.passes.adapters.base import AdapterKind

PREFIX = "base_model.model."

# Options that say nothing about the function that the saved tensors give, or only about training.
_SILENT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "module_dropout",
        "peft_type",
        "peft_version",
        "rank_dropout",
        "rank_dropout_scale",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as PEFT has it on disk.

    Attributes:
        config: what ``adapter_config.json`` says.
        tensors: by the names that PEFT has in ``adapter_model.safetensors``.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that PEFT saved.

    Attributes:
        source: its path, for messages.
        config: what ``adapter_config.json`` says.
        tensors: by the names that PEFT gave them.
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def check_options(self, known: Collection[str]) -> None:
        """Refuse options that are set and that a layout does not know: they could change the function.

        Args:
            known: names of those that the layout reads, or that mean nothing for it.

        Raises:
            InputError: names the first one.
        """
        for name, value in sorted(self.config.items()):
            if name in known or name in _SILENT or not value or (name == "bias" and value == "none"):
                continue
            hint = "merge it with PEFT (merge_and_unload) and load the merged model"
            if name == "modules_to_save":
                hint = "these modules are copies of the base's; save them into the base model and the adapter without"
            elif name == "bias":
                hint = "biases of the base were trained with it; train with bias='none', or merge it with PEFT"
            raise self.refused(name, hint)

    def refused(self, name: str, hint: str) -> InputError:
        """The error for an option whose value is not supported."""
        return InputError(
            f"PEFT's option {name}={self.config.get(name)!r} is not supported for peft_type "
            f"{self.config.get('peft_type')}",
            where=self.source,
            hint=hint,
        )

    def by_module(self, leaves: Mapping[str, str]) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors by module path and our name.

        Args:
            leaves: what stands behind the module path in PEFT's names -> our name.

        Raises:
            SerializationError: there is a tensor of another name, or none at all.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            leaf = next((leaf for leaf in leaves if name.startswith(PREFIX) and name.endswith("." + leaf)), None)
            if leaf is None:
                if name in self.base_names():
                    continue
                raise self.unknown(name)
            path = name.removeprefix(PREFIX).removesuffix("." + leaf)
            found.setdefault(path, {})[leaves[leaf]] = tensor
        if not found:
            raise SerializationError("the adapter has no tensors", where=self.source)
        return dict(sorted(found.items()))

    def base_names(self) -> dict[str, str]:
        """Tensors of the base that PEFT saves along where embeddings are adapted -> the names of these weights."""
        return {
            name: name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer") + ".weight"
            for name in self.tensors
            if name.startswith(PREFIX) and name.endswith(".weight") and "lora_" not in name
        }

    def base(self) -> dict[str, torch.Tensor]:
        """The weights of :meth:`base_names` by name."""
        return {weight: self.tensors[name] for name, weight in self.base_names().items()}

    def unknown(self, name: str) -> SerializationError:
        """The error for a tensor that the adapter's type does not have."""
        return SerializationError(
            f"tensor {name!r} is none of peft_type {self.config.get('peft_type')}",
            where=self.source,
            hint="the file is another adapter's, or was saved with an option that is not supported",
        )

    def matched(self, option: str, path: str, otherwise: Any) -> Any:
        """The value that a pattern option (``rank_pattern``, ``alpha_pattern``) has for a module path."""
        patterns: Mapping[str, Any] = self.config.get(option) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return otherwise


def wanted(source: str, path: str, tensors: Mapping[str, torch.Tensor], *names: str) -> None:
    """Check that a module has all the tensors it needs.

    Raises:
        SerializationError: one is missing.
    """
    for name in names:
        if name not in tensors:
            hint = "the file may be truncated; copy it again"
            raise SerializationError(f"{path} has no {name}", where=source, hint=hint)


def targets(paths: Iterable[str]) -> str:
    """``target_modules`` for module paths: a pattern, because a list would mean every path that ends so too."""
    return "|".join(re.escape(path) for path in sorted(paths))


def usual(kinds: Mapping[str, AdapterKind], read: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and by pattern those of the others."""
    values = {path: read(kind) for path, kind in kinds.items()}
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {f"^{re.escape(path)}": value for path, value in values.items() if value != most}


def alpha_of(alpha: float | None, per_alpha: float) -> float:
    """PEFT's ``alpha`` for ours; where we have none, the one that gives a scale of 1. Whole where it can be.

    Args:
        alpha: ours.
        per_alpha: the scale that an ``alpha`` of 1 gives.
    """
    found = alpha if alpha is not None else 1 / per_alpha
    return int(found) if float(found).is_integer() else found
