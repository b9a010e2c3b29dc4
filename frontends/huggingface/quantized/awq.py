"""AWQ checkpoints as AutoAWQ writes them, of the version ``gemm``.

For a linear ``M``: ``M.qweight`` int32 ``[in, out / 8]``, codes of 4 bits packed along the rows, the columns of a word
in the order that :data:`~graphwright.frontends.huggingface.quantized.words.AWQ_COLUMNS` names; ``M.qzeros`` int32
``[G, out / 8]`` likewise; ``M.scales`` ``[G, out]``.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from graphwright.frontends.huggingface.quantized.modules import GroupedWeight
from graphwright.frontends.huggingface.quantized.reader import FLOATS, Reader, check_scales, in_columns
from graphwright.frontends.huggingface.quantized.words import AWQ_NIBBLES, unpack_words
from graphwright.ir.errors import InputError

BITS = 4
_PER_WORD = 8


class AwqReader(Reader):
    """Reads AWQ checkpoints."""

    method: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def modules(self) -> list[str]:
        """Modules that have a ``qweight``."""
        version = str(self.settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise InputError(
                f"AWQ weights of the version {version!r} are not read, only of 'gemm'",
                where=self.where,
                hint="quantise with version='gemm', or start from the original weights",
            )
        self.check_bits(self._bits(), (BITS,))
        return [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def read(self, module: str, inputs: int, outputs: int) -> GroupedWeight:
        """See :meth:`Reader.read`."""
        given = self.number(self.settings, "group_size", self.settings.get("q_group_size", 128))
        group = self.check_group(module, BITS, given, inputs)
        groups, because = -(-inputs // group), f"group_size={group}, {inputs} inputs, {outputs} outputs"
        if outputs % _PER_WORD:
            raise InputError(
                f"has {outputs} outputs, which do not fill whole words of {_PER_WORD} codes",
                where=self.tensors.place(f"{module}.qweight"),
                hint="config.json and the weights belong to different models",
            )
        require, words = self.tensors.require, outputs // _PER_WORD
        packed = require(f"{module}.qweight", shape=[inputs, words], dtypes=(torch.int32,), because=because)
        scales = require(f"{module}.scales", shape=[groups, outputs], dtypes=FLOATS, because=because)
        check_scales(self.tensors, f"{module}.scales", scales)
        zeros = require(f"{module}.qzeros", shape=[groups, words], dtypes=(torch.int32,), because=because)
        codes = torch.empty(outputs, inputs, dtype=torch.uint8)
        for span in in_columns(outputs, inputs):
            codes[span] = _unpack(packed[:, span.start // _PER_WORD : -(-span.stop // _PER_WORD)]).T
        return GroupedWeight.of_codes(codes, scales.T, _unpack(zeros).T.contiguous(), BITS, group)

    def _bits(self) -> int:
        return self.number(self.settings, "bits", self.settings.get("w_bit"))


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[rows, 8 · words]`` in the order of their columns."""
    count = words.shape[1] * _PER_WORD
    nibbles: torch.Tensor = unpack_words(words, BITS, count).unflatten(1, (-1, _PER_WORD))
    return nibbles[..., list(AWQ_NIBBLES)].flatten(1)
