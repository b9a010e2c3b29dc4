"""compressed-tensors checkpoints, as llm-compressor writes them.

For a linear ``M`` of the format ``pack-quantized``: ``M.weight_packed`` int32 ``[out, in · bits / 32]`` (signed codes
plus ``2**(bits - 1)``), ``M.weight_scale`` ``[out, G]``, ``M.weight_zero_point`` int32 ``[out · bits / 32, G]`` packed
down the columns likewise, ``M.weight_shape`` and ``M.weight_g_idx``. Of ``int-quantized``: ``M.weight`` int8
``[out, in]``, ``M.weight_scale`` and ``M.weight_zero_point`` int8.

Activations of 8 bits are rounded by our own grid, which is asymmetric, where the checkpoint asks for ranges of every
token; see :func:`graphwright.ir.ops.quantization.quantize_activations`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from graphwright.frontends.huggingface.quantized.modules import GroupedWeight, IntegerWeight
from graphwright.frontends.huggingface.quantized.reader import FLOATS, Reader, check_scales
from graphwright.frontends.huggingface.quantized.words import unpack_whole, unpack_words, words_for
from graphwright.ir.errors import InputError

PACKED, INTEGER = "pack-quantized", "int-quantized"
_EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_EIGHT_BITS = (torch.int8, *_EIGHT_BIT_FLOATS)
_STRATEGIES = ("tensor", "channel", "group")


class CompressedTensorsReader(Reader):
    """Reads compressed-tensors checkpoints with integer weights."""

    method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point"),
    )

    def modules(self) -> list[str]:
        """Modules with a packed weight, or one of 8 bits and its scale."""
        self._refuse_what_is_not_read()
        found = []
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            scaled = f"{module}.weight_scale" in self.tensors
            if leaf == "weight_packed" or (leaf == "weight" and (scaled or self.tensors[name].dtype in _EIGHT_BITS)):
                found.append(module)
        return found

    def consumed(self, module: str) -> list[str]:
        """See :meth:`Reader.consumed`; its ``weight`` holds codes."""
        return [*super().consumed(module), *([name] if (name := f"{module}.weight") in self.tensors else [])]

    def read(self, module: str, inputs: int, outputs: int) -> GroupedWeight | IntegerWeight:
        """See :meth:`Reader.read`."""
        group = self._group_of(module)
        where = f"{self.where}, module {module!r}"
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        if group.get("output_activations") is not None:
            raise InputError("quantises outputs, which is not read", where=where)
        name = f"{module}.weight"
        if weights.get("type", "int") != "int" or (
            name in self.tensors and self.tensors[name].dtype in _EIGHT_BIT_FLOATS
        ):
            raise InputError(
                "stores its weights as floats of a few bits, which are not read yet",
                where=where,
                hint="start from the original weights",
            )
        if weights.get("strategy", "channel") not in _STRATEGIES:
            raise InputError(
                f"has the strategy {weights.get('strategy')!r}, which is not read; only {', '.join(_STRATEGIES)} are",
                where=where,
            )
        bits = self.number(weights, "num_bits", 8)
        self.check_bits(bits)
        size = self.check_group(module, bits, self._columns(weights, inputs), inputs)
        if activations is not None:
            return self._with_activations(module, weights, activations, bits, size, inputs, outputs)
        order_name = f"{module}.weight_g_idx"
        order = self.order_of(order_name, inputs, size) if order_name in self.tensors else None
        codes = self._codes(module, bits, inputs, outputs)
        scales = self._scales(module, weights, outputs, -(-inputs // size))
        zeros = self._zeros(module, bits, scales.shape, bool(weights.get("symmetric", True)))
        if order is not None:
            codes = codes[:, order]
        return GroupedWeight.of_codes(codes, scales, zeros, bits, size, order)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _codes(self, module: str, bits: int, inputs: int, outputs: int) -> torch.Tensor:
        """uint8 ``[out, in]``, the signed codes plus half of the range."""
        name, because = f"{module}.weight_packed", f"{bits} bits, {inputs} inputs, {outputs} outputs"
        if name not in self.tensors:
            stored = self.tensors.require(f"{module}.weight", shape=[outputs, inputs], dtypes=(torch.int8,))
            half: int = 2 ** (bits - 1)
            if bits < 8 and bool(((stored < -half) | (stored >= half)).any()):
                raise InputError(f"holds codes beyond {bits} bits", where=self.tensors.place(f"{module}.weight"))
            return (stored.to(torch.int16) + half).to(torch.uint8)
        self._check_shape(module, inputs, outputs)
        whole = -(-inputs // (32 // bits))
        if list(self.tensors[name].shape) == [outputs, whole] and whole != words_for(inputs, bits):
            return unpack_whole(self.tensors[name], bits, inputs)
        shape = [outputs, words_for(inputs, bits)]
        return unpack_words(
            self.tensors.require(name, shape=shape, dtypes=(torch.int32,), because=because), bits, inputs
        )

    def _check_shape(self, module: str, inputs: int, outputs: int) -> None:
        name = f"{module}.weight_shape"
        if name in self.tensors and self.tensors[name].tolist() != [outputs, inputs]:
            raise InputError(
                f"says {self.tensors[name].tolist()}, the configuration asks for {[outputs, inputs]}",
                where=self.tensors.place(name),
                hint="config.json and the weights belong to different models",
            )

    def _scales(self, module: str, weights: Mapping[str, Any], outputs: int, groups: int) -> torch.Tensor:
        name, strategy = f"{module}.weight_scale", weights.get("strategy", "channel")
        found = self.tensors.get(name)
        if found is not None and strategy == "tensor" and found.numel() == 1:
            scales = found.reshape(1, 1).expand(outputs, groups).contiguous()
        elif found is not None and strategy == "channel" and list(found.shape) == [outputs]:
            scales = found.unsqueeze(1)
        else:
            because = f"strategy {strategy!r}"
            scales = self.tensors.require(name, shape=[outputs, groups], dtypes=FLOATS, because=because)
        return check_scales(self.tensors, name, scales)

    def _zeros(self, module: str, bits: int, shape: torch.Size, symmetric: bool) -> torch.Tensor | None:
        name, (outputs, groups) = f"{module}.weight_zero_point", shape
        if name not in self.tensors and symmetric:
            return None
        if name in self.tensors and self.tensors[name].dtype == torch.int32:
            packed = [words_for(outputs, bits), groups]
            words = self.tensors.require(name, shape=packed, dtypes=(torch.int32,), because=f"{bits} bits")
            return unpack_words(words.T, bits, outputs).T.contiguous()
        if name in self.tensors and self.tensors[name].numel() == 1:
            found = self.tensors[name].reshape(1, 1).expand(outputs, groups)
        else:
            found = self.tensors.require(name, shape=[outputs, groups], dtypes=(torch.int8,))
        half: int = 2 ** (bits - 1)
        return (found.to(torch.int16) + half).to(torch.uint8).contiguous()

    # -- activations -----------------------------------------------------------------------------------------------

    def _with_activations(
        self,
        module: str,
        weights: Mapping[str, Any],
        activations: Mapping[str, Any],
        bits: int,
        size: int,
        inputs: int,
        outputs: int,
    ) -> IntegerWeight:
        where = f"{self.where}, module {module!r}"
        scales = self._scales(module, weights, outputs, -(-inputs // size))
        zeros = self._zeros(module, bits, scales.shape, bool(weights.get("symmetric", True)))
        symmetric = zeros is None or bool((zeros == 2 ** (bits - 1)).all())
        fits = activations.get("type", "int") == "int" and activations.get("num_bits", 8) == 8
        if bits != 8 or size != inputs or not symmetric or not fits:
            raise InputError(
                "quantises activations in a way that is not read: only to 8-bit integers, with symmetric weights of 8 "
                "bits and one scale to a channel",
                where=where,
                hint="start from the original weights",
            )
        codes = (self._codes(module, bits, inputs, outputs).to(torch.int16) - 128).to(torch.int8)
        factors = scales.squeeze(1).to(torch.float32)
        strategy, dynamic = activations.get("strategy", "token"), activations.get("dynamic", False)
        if dynamic is True and strategy in ("token", "tensor"):
            return IntegerWeight(codes, factors, f"per_{strategy}")
        if dynamic is False and strategy == "tensor":
            name = f"{module}.input_scale"
            found = self.tensors.require(name, shape=list(self._shape(name)), dtypes=FLOATS)
            if found.numel() != 1 or not bool((check_scales(self.tensors, name, found) > 0).all()):
                raise InputError("must be one positive number", where=self.tensors.place(name))
            zero_name = f"{module}.input_zero_point"
            zero = int(self.tensors[zero_name].reshape(-1)[0]) if zero_name in self.tensors else 0
            scale = found.reshape(()).to(torch.float32)
            return IntegerWeight(codes, factors * scale, "static", scale.expand(inputs).contiguous(), zero + 128)
        raise InputError(
            f"quantises activations with the strategy {strategy!r}, dynamic={dynamic!r}, which is not read",
            where=where,
            hint="per token and per tensor are, when dynamic, and per tensor when static",
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape) if name in self.tensors else (1,)

    # -- settings --------------------------------------------------------------------------------------------------

    def _columns(self, weights: Mapping[str, Any], inputs: int) -> int:
        if weights.get("strategy", "channel") != "group":
            return inputs
        return self.number(weights, "group_size")

    def _group_of(self, module: str) -> Mapping[str, Any]:
        """The config group of a module: by its name, by a pattern, or by its class, in this order."""
        groups = self.settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(each, Mapping) for each in groups.values()):
            raise InputError("has no 'config_groups' that say how weights are stored", where=self.where)
        for kind in ("name", "pattern", "class"):
            for group in groups.values():
                if any(_matches(str(target), module, kind) for target in group.get("targets") or ()):
                    return dict(group)
        raise InputError(
            f"no config group targets {module!r}, which is stored quantised",
            where=self.where,
            hint="its 'targets' should name the module or its class, Linear",
        )

    def _refuse_what_is_not_read(self) -> None:
        for name, reason in (
            ("kv_cache_scheme", "it quantises the cache of keys and values"),
            ("sparsity_config", "it stores weights sparse"),
            ("transform_config", "it transforms activations as the model runs"),
        ):
            value = self.settings.get(name)
            if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise InputError(
                    f"{reason} ({name!r}), which is not read", where=self.where, hint="start from the original weights"
                )


def _matches(target: str, module: str, kind: str) -> bool:
    if target.startswith("re:"):
        return kind == "pattern" and re.match(target[3:], module) is not None
    if kind == "class":
        return target in ("Linear", "Conv1D")
    return kind == "name" and (target == module or module.endswith(f".{target}"))
