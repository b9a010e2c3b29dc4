"""How a program is written as ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.errors import InputError

MODES = ("runtime", "portable")
# Enough for the conversations that a decoder is checked on.
MIN_CONTEXT = 16
LOGITS = ("last", "all", "rows")
MIN_OPSET = 21
# onnxruntime loads opset 26 at most; the operators used here have not changed since 23.
MAX_OPSET = 26
DEFAULT_OPSET = 23
# The accuracy levels of MatMulNBits: 0 leaves the choice to the runtime, which takes float.
ACCURACY_LEVELS = {0: "float activations", 1: "float activations", 4: "int8 activations"}


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export.

    Attributes:
        mode: ``"runtime"`` uses contrib operators of onnxruntime where it has kernels for them; ``"portable"`` uses
            standard ONNX only.
        opset: ONNX opset, 21 to 26. Below 23 attention, RMS norm and rotary embedding are written out.
        accuracy_level: for weight-only quantised linears: 1 computes on float activations, exactly as the program
            says; 4 lets the runtime round activations to int8, which is faster on few rows and adds an error.
        logits: of a decoder: ``"last"`` for each row's last token, ``"all"`` for every token of the step, ``"rows"``
            for those that a further input ``rows`` names.
        context_length: of a decoder: positions for which rotary angles are stored; ``None`` computes them at each step.
        vnni: the file is for processors with VNNI (or Arm): weights of integer products stay signed, onnxruntime's
            faster kernel there. On x86 without VNNI that kernel adds pairs of products up in 16 bits, which overflow;
            so by default weights are stored unsigned, and products are exact everywhere.
    """

    mode: str = "runtime"
    opset: int = DEFAULT_OPSET
    accuracy_level: int = 1
    logits: str = "last"
    context_length: int | None = None
    vnni: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"must be {' or '.join(MODES)}, not {self.mode!r}", where="option 'mode'")
        if self.logits not in LOGITS:
            raise InputError(f"must be one of {', '.join(LOGITS)}, not {self.logits!r}", where="option 'logits'")
        length = self.context_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < MIN_CONTEXT):
            what = f"must be a number of tokens, at least {MIN_CONTEXT}, not {length!r}"
            raise InputError(what, where="option 'context_length'")
        if not isinstance(self.vnni, bool):
            raise InputError(f"must be True or False, not {self.vnni!r}", where="option 'vnni'")
        if isinstance(self.opset, bool) or not isinstance(self.opset, int):
            raise InputError(f"must be a number, not {self.opset!r}", where="option 'opset'")
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InputError(
                f"{self.opset} is not supported",
                where="option 'opset'",
                hint=f"use {MIN_OPSET} to {MAX_OPSET}; {DEFAULT_OPSET} or later gives the fastest files",
            )
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise InputError(
                f"{self.accuracy_level!r} is not one of {', '.join(map(str, ACCURACY_LEVELS))}",
                where="option 'accuracy_level'",
                hint="1 = float activations (exact), 4 = int8 activations (faster on few rows)",
            )

    @property
    def has_contrib(self) -> bool:
        """Whether contrib operators may be used."""
        return self.mode == "runtime"

    @property
    def has_attention(self) -> bool:
        """Whether the opset has Attention, RMSNormalization and RotaryEmbedding."""
        return self.opset >= 23
