"""Other tools' layouts, written: the tensors of a linear, and what ``config.json`` says of all of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from graphwright.frontends.huggingface.quantized.awq import BITS as AWQ_BITS
from graphwright.frontends.huggingface.quantized.gptq import V1, V2
from graphwright.frontends.huggingface.quantized.modules import GroupedWeight, IntegerWeight
from graphwright.frontends.huggingface.quantized.placing import PlacedLinear
from graphwright.frontends.huggingface.quantized.words import AWQ_COLUMNS, pack_words
from graphwright.ir.errors import ExportError
from graphwright.ir.ops.quantization import unpack


class Layout(ABC):
    """Writes one layout.

    Negative scales, which symmetric grids of ours have where the largest weight is positive, are written as they are:
    ``(code - zero point) · scale`` is what every reader computes, and the grid has no mirror image that is as exact.
    """

    method: ClassVar[str]

    def __init__(self, linears: Mapping[str, PlacedLinear], floats: Sequence[str]) -> None:
        """Prepare to write.

        Args:
            linears: the quantised ones by module.
            floats: modules of the linears that are not.

        Raises:
            ExportError: this layout cannot say how one of them is stored.
        """
        self.linears, self.floats = linears, tuple(floats)
        for name, linear in linears.items():
            reason = self.objection(linear)
            if reason is not None:
                raise ExportError(
                    f"{reason}, which the layout {self.method!r} cannot say",
                    where=f"module {name!r}",
                    hint="choose another layout, or quantise with other options",
                )
        if not linears:
            raise ExportError(
                "the program has no quantised linear", where=f"layout {self.method!r}", hint="run QuantizeLinears first"
            )

    @abstractmethod
    def objection(self, linear: PlacedLinear) -> str | None:
        """What of a linear this layout cannot say, in words, or ``None``."""

    @abstractmethod
    def tensors(self, linear: PlacedLinear) -> dict[str, torch.Tensor]:
        """Tensors of a linear by the last part of their names; without its bias."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The ``quantization_config``."""


class GptqLayout(Layout):
    """AutoGPTQ's and GPTQModel's; see :mod:`graphwright.frontends.huggingface.quantized.gptq`."""

    method: ClassVar[str] = "gptq"

    def objection(self, linear: PlacedLinear) -> str | None:
        """See :meth:`Layout.objection`."""
        reason = _weight_only(linear, whole_words=True, half=True)
        if reason is None and linear.place.outputs * _grouped(linear).bits % 32:
            return f"its {linear.place.outputs} outputs do not fill whole words"
        return reason

    def tensors(self, linear: PlacedLinear) -> dict[str, torch.Tensor]:
        """See :meth:`Layout.tensors`."""
        weight, inputs = _grouped(linear), linear.place.inputs
        codes, zeros, groups = _codes(weight, inputs), _zeros(weight), _group_of_columns(weight, inputs)
        if self._version == V1:
            zeros = (zeros - 1) & (2**weight.bits - 1)
        return {
            "qweight": pack_words(codes, weight.bits).T.contiguous(),
            "qzeros": pack_words(zeros.T.contiguous(), weight.bits),
            "scales": _half(weight.scales).T.contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    @property
    def _version(self) -> str:
        # Readers of the older version add one to all zero points of a word at once, where a stored -1 would carry over;
        # GPTQModel refuses asymmetric weights in it.
        return V1 if all(_grouped(linear).zero_points is None for linear in self.linears.values()) else V2

    def settings(self) -> dict[str, Any]:
        """See :meth:`Layout.settings`; modules unlike most are named by patterns in ``dynamic``."""
        found = {name: _size_of(linear) for name, linear in self.linears.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        dynamic: dict[str, Any] = {
            f"+:^{re.escape(name)}$": {"bits": bits, "group_size": size}
            for name, (bits, size) in found.items()
            if (bits, size) != usual
        }
        head = {name for name in (*self.linears, *self.floats) if "." not in name}
        dynamic.update({f"-:^{re.escape(name)}$": {} for name in self.floats if name not in head})
        settings: dict[str, Any] = {
            "quant_method": self.method,
            "bits": usual[0],
            "group_size": usual[1],
            "desc_act": any(_grouped(linear).order is not None for linear in self.linears.values()),
            "sym": all(_grouped(linear).zero_points is None for linear in self.linears.values()),
            "lm_head": any(name in self.linears for name in head),
            "checkpoint_format": self._version,
            "pack_dtype": "int32",
        }
        return settings | ({"dynamic": dynamic} if dynamic else {})


class AwqLayout(Layout):
    """AutoAWQ's, of the version ``gemm``; see :mod:`graphwright.frontends.huggingface.quantized.awq`."""

    method: ClassVar[str] = "awq"

    def __init__(self, linears: Mapping[str, PlacedLinear], floats: Sequence[str]) -> None:
        super().__init__(linears, floats)
        sizes = {_size_of(linear): name for name, linear in linears.items()}
        if len(sizes) > 1:
            raise ExportError(
                f"has groups of {len(sizes)} sizes, and the layout 'awq' one for the whole model",
                where=", ".join(f"module {name!r}: group_size={size}" for (_, size), name in list(sizes.items())[:2]),
                hint="choose the layout 'gptq' or 'compressed-tensors'",
            )

    def objection(self, linear: PlacedLinear) -> str | None:
        """See :meth:`Layout.objection`."""
        reason = _weight_only(linear, half=True)
        if reason is not None:
            return reason
        weight = _grouped(linear)
        if weight.bits != AWQ_BITS:
            return f"it has {weight.bits} bits"
        if weight.order is not None:
            return "its groups are no neighbours (desc_act)"
        if linear.place.transposed:
            return "it is a Conv1D"
        return f"its {linear.place.outputs} outputs do not fill whole words" if linear.place.outputs % 8 else None

    def tensors(self, linear: PlacedLinear) -> dict[str, torch.Tensor]:
        """See :meth:`Layout.tensors`."""
        weight = _grouped(linear)

        def words(codes: torch.Tensor) -> torch.Tensor:
            return pack_words(codes.T.unflatten(1, (-1, 8))[..., list(AWQ_COLUMNS)].flatten(1), AWQ_BITS)

        return {
            "qweight": words(_codes(weight, linear.place.inputs)),
            "qzeros": words(_zeros(weight)),
            "scales": _half(weight.scales).T.contiguous(),
        }

    def settings(self) -> dict[str, Any]:
        """See :meth:`Layout.settings`."""
        _, size = _size_of(next(iter(self.linears.values())))
        return {
            "quant_method": self.method,
            "bits": AWQ_BITS,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.floats) or None,
        }


class CompressedTensorsLayout(Layout):
    """llm-compressor's; see :mod:`graphwright.frontends.huggingface.quantized.compressed_tensors`."""

    method: ClassVar[str] = "compressed-tensors"

    def objection(self, linear: PlacedLinear) -> str | None:
        """See :meth:`Layout.objection`."""
        if linear.place.transposed:
            return "it is a Conv1D"
        if isinstance(linear.weight, IntegerWeight):
            if linear.weight.input_scales is not None:
                return "its activations have a scale for every feature (static ranges)"
            return None
        return _weight_only(linear)

    def tensors(self, linear: PlacedLinear) -> dict[str, torch.Tensor]:
        """See :meth:`Layout.tensors`."""
        weight, inputs = linear.weight, linear.place.inputs
        if isinstance(weight, IntegerWeight):
            return {"weight": weight.qweight.contiguous(), "weight_scale": weight.scales.unsqueeze(1)}
        found = {
            "weight_packed": pack_words(_codes(weight, inputs), weight.bits),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor([linear.place.outputs, inputs]),
        }
        if weight.zero_points is not None:
            found["weight_zero_point"] = pack_words(weight.zero_points.T.contiguous(), weight.bits).T.contiguous()
        if weight.order is not None:
            found["weight_g_idx"] = _group_of_columns(weight, inputs).to(torch.int32)
        return found

    def settings(self) -> dict[str, Any]:
        """See :meth:`Layout.settings`; one config group for each way in which linears are stored."""
        members: dict[str, list[str]] = {}
        schemes: dict[str, dict[str, Any]] = {}
        for name, linear in self.linears.items():
            scheme = _scheme(linear)
            key = repr(scheme)
            schemes[key] = scheme
            members.setdefault(key, []).append(name)
        targets = {key: ["Linear"] if len(members) == 1 else names for key, names in members.items()}
        formats = {scheme["format"] for scheme in schemes.values()}
        return {
            "quant_method": self.method,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {
                f"group_{index}": {"targets": targets[key], **schemes[key]} for index, key in enumerate(members)
            },
            "ignore": list(self.floats),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


LAYOUTS: dict[str, type[Layout]] = {each.method: each for each in (GptqLayout, AwqLayout, CompressedTensorsLayout)}


def _scheme(linear: PlacedLinear) -> dict[str, Any]:
    plain = {"type": "int", "dynamic": False, "observer": "minmax"}
    if isinstance(linear.weight, IntegerWeight):
        strategy = linear.weight.activation.removeprefix("per_")
        return {
            "weights": {"num_bits": 8, "symmetric": True, "strategy": "channel", "group_size": None, **plain},
            # Our own grid of a token: from its least to its largest number.
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": False, "strategy": strategy, "dynamic": True,
            },
            "output_activations": None,
            "format": "int-quantized",
        }  # fmt: skip
    bits, size = _size_of(linear)
    order = {"actorder": "group"} if linear.weight.order is not None else {}
    grouping = {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    symmetric = linear.weight.zero_points is None
    return {
        "weights": {"num_bits": bits, "symmetric": symmetric, **grouping, **plain, **order},
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _weight_only(linear: PlacedLinear, *, whole_words: bool = False, half: bool = False) -> str | None:
    """What all layouts of weights alone have in common that they cannot say."""
    if isinstance(linear.weight, IntegerWeight):
        return "its activations are quantised"
    inputs, (bits, size) = linear.place.inputs, _size_of(linear)
    if size != -1 and inputs % size:
        return f"its {inputs} inputs are no multiple of the group size {size}"
    if whole_words and inputs * bits % 32:
        return f"its {inputs} inputs do not fill whole words"
    scales, zeros = linear.weight.scales, linear.weight.zero_points
    if zeros is not None and zeros.is_floating_point():
        return "its zero points lie between codes"
    if half and not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
        return "its scales are no numbers in half precision"
    return None


def _grouped(linear: PlacedLinear) -> GroupedWeight:
    assert isinstance(linear.weight, GroupedWeight)  # `objection` has refused others
    return linear.weight


def _size_of(linear: PlacedLinear) -> tuple[int, int]:
    """Bits, and columns to a group; -1 for a whole row."""
    weight = _grouped(linear)
    return weight.bits, -1 if weight.scales.shape[1] == 1 else weight.group_size


def _codes(weight: GroupedWeight, inputs: int) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` in the order of the input's features."""
    codes = unpack(weight.qweight, weight.bits).flatten(1)[:, :inputs]
    return codes if weight.order is None else codes[:, weight.order.argsort()]


def _zeros(weight: GroupedWeight) -> torch.Tensor:
    """Zero points uint8 ``[out, G]``, also where they all lie in the middle."""
    if weight.zero_points is not None:
        return weight.zero_points
    return torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)


def _group_of_columns(weight: GroupedWeight, inputs: int) -> torch.Tensor:
    groups = torch.arange(inputs) // weight.group_size
    return groups if weight.order is None else groups[weight.order.argsort()]


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.to(torch.float16)
