"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them.

For a linear ``M``: ``M.qweight`` int32 ``[in · bits / 32, out]``, codes packed down the columns; ``M.qzeros`` int32
``[G, out · bits / 32]``, packed along the rows, one less than the zero point (modulo ``2**bits``) unless
``checkpoint_format`` is ``gptq_v2``; ``M.scales`` ``[G, out]``; ``M.g_idx`` int32 ``[in]``, the group of every column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from graphwright.frontends.huggingface.quantized.modules import GroupedWeight
from graphwright.frontends.huggingface.quantized.reader import FLOATS, Reader, check_scales, in_columns
from graphwright.frontends.huggingface.quantized.words import unpack_words, words_for
from graphwright.ir.errors import InputError

V1, V2 = "gptq", "gptq_v2"


class GptqReader(Reader):
    """Reads GPTQ checkpoints; other columns than neighbours in a group (``desc_act``) are exact, by an order."""

    method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def modules(self) -> list[str]:
        """Modules that have a ``qweight``."""
        version = self.settings.get("checkpoint_format") or V1
        if version not in (V1, V2):
            raise InputError(
                f"the checkpoint_format {version!r} is not read, only {V1!r} and {V2!r}",
                where=self.where,
                hint="GPTQModel converts others; or start from the original weights",
            )
        return [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def read(self, module: str, inputs: int, outputs: int) -> GroupedWeight:
        """See :meth:`Reader.read`."""
        settings = self._settings_of(module)
        bits = self.number(settings, "bits")
        self.check_bits(bits)
        group = self.check_group(module, bits, self.number(settings, "group_size", -1), inputs)
        groups, because = -(-inputs // group), f"bits={bits}, group_size={group}, {inputs} inputs, {outputs} outputs"
        words, zero_words = words_for(inputs, bits), words_for(outputs, bits)
        require = self.tensors.require
        packed = require(f"{module}.qweight", shape=[words, outputs], dtypes=(torch.int32,), because=because)
        scales = require(f"{module}.scales", shape=[groups, outputs], dtypes=FLOATS, because=because)
        check_scales(self.tensors, f"{module}.scales", scales)
        zeros = require(f"{module}.qzeros", shape=[groups, zero_words], dtypes=(torch.int32,), because=because)
        points = unpack_words(zeros, bits, outputs)
        if (self.settings.get("checkpoint_format") or V1) == V1:
            points = (points + 1) & (2**bits - 1)
        order = None
        if f"{module}.g_idx" in self.tensors:
            order = self.order_of(f"{module}.g_idx", inputs, group)
        elif settings.get("desc_act"):
            raise InputError(
                "lacks its g_idx, which desc_act=true needs",
                where=f"{self.where}, module {module!r}",
                hint="the checkpoint is incomplete; desc_act=false if its groups are neighbours (static groups)",
            )
        codes = torch.empty(outputs, inputs, dtype=torch.uint8)
        for span in in_columns(outputs, inputs):
            piece = unpack_words(packed[:, span].T, bits, inputs)
            codes[span] = piece if order is None else piece[:, order]
        return GroupedWeight.of_codes(codes, scales.T, points.T.contiguous(), bits, group, order)

    def _settings_of(self, module: str) -> Mapping[str, Any]:
        """The settings, with what ``dynamic`` says of a module: patterns, of which the first that matches counts."""
        dynamic = self.settings.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise InputError("'dynamic' must map patterns to settings", where=self.where)
        for pattern, change in dynamic.items():
            try:
                found = re.match(str(pattern).removeprefix("+:").removeprefix("-:"), module)
            except re.error as error:
                raise InputError(f"{pattern!r} in 'dynamic' is no pattern: {error}", where=self.where) from error
            if found and not str(pattern).startswith("-:"):
                return {**self.settings, **change}
            if found:
                raise InputError(
                    f"'dynamic' says by {pattern!r} that {module!r} is not quantised, but it is stored so",
                    where=self.where,
                )
        return self.settings
