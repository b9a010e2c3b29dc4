"""``export_onnx``: write a Program as ONNX, and prove that the file does what the Program does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from graphwright.backends.onnx.comparison import Difference, ExampleInputs, check_calls, compare
from graphwright.backends.onnx.kernels import ATTENTION, KernelTable, kernels_of
from graphwright.backends.onnx.model import BuiltModel, build
from graphwright.backends.onnx.options import DEFAULT_OPSET, ExportOptions
from graphwright.backends.onnx.proof import prove_attention, prove_quantized
from graphwright.backends.onnx.report import OnnxExport
from graphwright.backends.onnx.runtime import open_session
from graphwright.backends.onnx.sparse_file import store_sparse
from graphwright.backends.onnx.steps import compare_steps, make_conversations
from graphwright.backends.onnx.writing import check_target, publish, staged, write
from graphwright.ir.errors import ExportError, InputError
from graphwright.ir.program import Program

_PORTABLE_HINT = (
    "onnxruntime fuses standard operators only where no two linears share a weight: use mode='runtime', or check=False "
    "if the file is for another runtime"
)
_VNNI_HINT = (
    "signed INT8 weights (vnni=True) overflow in onnxruntime's products on x86 without VNNI, as this machine may be: "
    "leave vnni out, or use check=False if the file is for another machine; nothing was written"
)


@dataclass(frozen=True)
class _Findings:
    """What the check found; empty when there was none."""

    quantized: Mapping[str, str] = field(default_factory=dict)
    kernels: KernelTable | None = None
    differences: tuple[Difference, ...] = ()


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    mode: str = "runtime",
    opset: int = DEFAULT_OPSET,
    accuracy_level: int = 1,
    external_data: bool | None = None,
    check: bool = True,
    example_inputs: ExampleInputs | None = None,
    tolerance: float | None = None,
    logits: str = "last",
    context_length: int | None = None,
    sparse: bool = False,
    vnni: bool = False,
) -> OnnxExport:
    """Write a program as an ONNX file.

    The file is written beside its target, opened in onnxruntime, compared with the program on the example inputs and
    at other sizes, and its optimised graph is read to see that every quantised linear runs on quantised weights. Only
    then it takes its place; on any failure nothing is left, and a file that stood there before stays.

    Initialisers keep the names of the weights (rearranged ones with a suffix such as ``.transposed``), tied weights
    are stored once, and dynamic axes carry the names of the program's dimensions.

    A decoding step is written with the signature that generation libraries feed (``input_ids``, ``attention_mask``,
    ``past_key_values.{i}.key``, … to ``logits``, ``present.{i}.key``, …; see :mod:`graphwright.backends.onnx.decoder`),
    its attention as ``GroupQueryAttention``. It is compared with the program step by step: prompts of different
    lengths together, single tokens after them, and a prompt in two pieces.

    Args:
        program: what to export; it is not changed.
        path: file to write.
        mode: ``"runtime"`` uses contrib operators of onnxruntime where it has kernels for them; ``"portable"`` uses
            standard ONNX only and is checked by onnx's checker.
        opset: 21 to 26; from 23 on attention is one operator.
        accuracy_level: 1 lets weight-only quantised linears compute on float activations, exactly as the program; 4
            lets onnxruntime round activations to int8, faster on few rows. The report says which.
        external_data: weights in ``<name>.onnx.data`` beside the file; ``None`` does so above 2 GB only.
        check: open, compare and prove; ``False`` only writes.
        example_inputs: keyword arguments of the model, one tensor, or flat tensors in the program's order; made up from
            the types when left out.
        tolerance: largest absolute difference from the program; measured from its own rounding error when left out.
        logits: of a decoding step: ``"last"`` gives ``[batch, 1, V]``, the logits of each row's last token, and
            saves the others' time; ``"all"`` gives ``[batch, sequence, V]``; ``"rows"`` gives ``[batch, selected, V]``
            and has a further input ``rows`` int64 ``[batch, selected]``: the tokens whose logits are wanted.
        context_length: of a decoding step: tokens that a row can hold; when left out, as many as the program has
            positions for. Rotary embedding then happens inside of the attention, with stored angles; where there is no
            limit, angles are computed at each step.
        sparse: store float weights that are mostly zeros as sparse initialisers where that takes fewer bytes. The file
            is smaller, and no faster: onnxruntime makes dense weights of them as it opens it. Not for ``"portable"``.
        vnni: the file is for processors with VNNI (or Arm): INT8 weights are stored signed, for onnxruntime's faster
            kernel there. Without VNNI an x86 processor computes such a file wrongly, and the check refuses it.

    Raises:
        InputError: an option or the example inputs are unusable.
        ExportError: an operator has no translation, the file cannot be written, its outputs differ, or a quantised
            linear would run in float; each names the node and module path, or the file.
        BackendError: onnxruntime is not installed, or fails on the inputs.
    """
    options = ExportOptions(mode, opset, accuracy_level, logits, context_length, vnni)
    if sparse and mode == "portable":
        raise InputError(
            "standard operators take no sparse tensors; onnxruntime does",
            where="option 'sparse'",
            hint="use mode='runtime', or leave sparse out",
        )
    target = Path(path).absolute()
    check_target(target)
    built = build(program, options)
    with staged(target) as temporary:
        files = write(built, temporary, external_data=external_data)
        stored = store_sparse(temporary) if sparse else ()
        if mode == "portable":
            _check_standard(temporary)
        findings = _check(program, built, temporary, options, example_inputs, tolerance) if check else _Findings()
        written = publish(files, target)
    return OnnxExport(
        path=target,
        files=written,
        mode=mode,
        opset=opset,
        accuracy_level=accuracy_level,
        input_names=built.input_names,
        output_names=built.output_names,
        quantized=findings.quantized,
        kernels=findings.kernels,
        differences=findings.differences,
        sparse=stored,
        vnni=vnni,
    )


def _check(
    program: Program,
    built: BuiltModel,
    path: Path,
    options: ExportOptions,
    examples: ExampleInputs | None,
    tolerance: float | None,
) -> _Findings:
    if built.decoder is not None:
        return _check_decoder(program, built, path, options, examples, tolerance)
    calls = check_calls(program, examples)
    session = open_session(path, accuracy_level=options.accuracy_level, keep_optimized=True)
    assert session.optimized is not None
    hint = "" if options.has_contrib else _PORTABLE_HINT
    quantized = prove_quantized(session.optimized, built.quantized, hint=hint)
    rounded = options.accuracy_level == 4
    with _overflow_explained(options):
        differences = compare(program, session, calls, int8_activations=rounded, tolerance=tolerance)
    return _Findings(quantized, kernels_of(session.optimized), tuple(differences))


def _check_decoder(
    program: Program,
    built: BuiltModel,
    path: Path,
    options: ExportOptions,
    examples: ExampleInputs | None,
    tolerance: float | None,
) -> _Findings:
    talks = make_conversations(program, examples)
    session = open_session(path, accuracy_level=options.accuracy_level, keep_optimized=True)
    assert session.optimized is not None
    prove_attention(session.optimized, built.output_names[1:], ATTENTION)
    quantized = prove_quantized(session.optimized, built.quantized)
    with _overflow_explained(options):
        differences = compare_steps(program, session, talks, options, tolerance=tolerance)
    return _Findings(quantized, kernels_of(session.optimized), tuple(differences))


@contextmanager
def _overflow_explained(options: ExportOptions) -> Iterator[None]:
    try:
        yield
    except ExportError as error:
        if not options.vnni:
            raise
        raise ExportError(error.what, where=error.where, hint=_VNNI_HINT, context=error.context) from error


def _check_standard(path: Path) -> None:
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(f"the file is not valid ONNX: {first}", where=str(path.name)) from error
