"""``optimize``: the one call most people need."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.backends.executable import Backend, Executable, KernelUse
from graphwright.frontends.huggingface.decoders import is_language_model, load_decoder
from graphwright.frontends.torch import trace
from graphwright.frontends.torch.dynamic import DynamicSpec
from graphwright.frontends.torch.tracing import ExampleInputs, bind_examples
from graphwright.ir.completion import completed
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.program import Program
from graphwright.passes.base import Pass
from graphwright.passes.hooks import Hook
from graphwright.passes.pipeline import run_passes
from graphwright.passes.report import Report
from graphwright.passes.verification import Verification, Verifier
from graphwright.passes.verification.sampling import sample, small_sizes


class OptimizedModel(Program):
    """A Program that has been through a pipeline and lowered to a target.

    Attributes:
        report: what each pass did and how exact it was.
        target: name of the backend that runs it.
        examples: flat example inputs, used again to check exports.
    """

    def __init__(self, program: Program, report: Report, backend: Backend, examples: list[torch.Tensor]) -> None:
        super().__init__(
            program.body,
            program.signature,
            program.symbols,
            title=program.title,
            aliases=program.aliases,
            journal=tuple(program.journal),
            records=program.records,
            kept=program.kept,
        )
        self.origin = program.origin
        self.report = report
        self.target = backend.name
        self.examples = examples
        self._executable: Executable = backend.lower(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the target with the original's arguments and output type."""
        flat = self.signature.flatten(args, kwargs)
        self.check_inputs(flat)
        return self.signature.unflatten(self._executable(*flat))

    def explain(self) -> list[KernelUse]:
        """Which kernel runs for every node."""
        return self._executable.explain()

    def lowering_error(self) -> list[float]:
        """What the target's rounding costs, on the example inputs.

        Returns:
            for each floating output, the root mean square of its difference from the same program in PyTorch, relative
            to the root mean square of the latter.

        Raises:
            ProgramError: the weights have been let go of.
        """
        self.require_values()
        with torch.no_grad():
            inputs = [each.to(self._executable.device) for each in self.examples]
            found, wanted = self._executable(*inputs), self.body(*self.examples)
        pairs = [
            (a.cpu().double(), b.double()) for a, b in zip(found, wanted, strict=True) if torch.is_floating_point(b)
        ]
        return [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]

    def save_packed(self, path: str | os.PathLike[str]) -> None:
        """Write what runs on the ``cpu`` target, packed weights included, into one file for :func:`load_packed`.

        Raises:
            BackendError: the target is not ``cpu``.
            SerializationError: the file cannot be written; one that stood there before is still whole.
        """
        from graphwright.backends.cpu import CpuExecutable, save_packed

        if not isinstance(self._executable, CpuExecutable):
            raise BackendError(
                f"runs on {self.target}, which packs no weights",
                where="save_packed",
                hint="optimize with target='cpu', or save the Program with save()",
            )
        save_packed(self._executable, path)

    def export_onnx(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Write an ONNX file and check it in onnxruntime; see :func:`graphwright.backends.onnx.export_onnx`."""
        from graphwright.backends.onnx import export_onnx

        self.require_values()
        options.setdefault("example_inputs", self.examples)
        return export_onnx(self, Path(path), **options)

    def save_quantized(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Write a Hugging Face folder in another tool's layout and check it; see :func:`graphwright.save_quantized`."""
        from graphwright.frontends.huggingface.quantized import save_quantized

        options.setdefault("example_inputs", self.examples)
        return save_quantized(self, folder, **options)


def optimize(
    model: nn.Module | Program | str | os.PathLike[str],
    passes: Sequence[Pass] = (),
    *,
    example_inputs: ExampleInputs | None = None,
    target: str | Backend = "reference",
    dynamic: DynamicSpec | str = "auto",
    verify: bool | Verification = True,
    hooks: Sequence[Hook] = (),
) -> OptimizedModel:
    """Trace a model, run passes on it, check each numerically, and lower the result.

    The model passed in is left as it was. The result shares the weights no pass has replaced. Where the program is a
    decoding step, it is an :class:`OptimizedDecoder`, which generates text. Weights that are mapped from files, as
    those of a folder are, pass through memory a piece at a time.

    Args:
        model: an ``nn.Module``, or a Program (which is not changed either), or the folder of a language model.
        passes: in the order in which they run.
        example_inputs: keyword arguments, positional arguments or one tensor. Without them a transformers model that
            generates text, or the folder of one, becomes a decoding step (:func:`graphwright.load_decoder`); they are
            needed for any other module.
        target: what runs the result: ``"reference"`` (plain PyTorch), ``"cpu"`` (C++ kernels; inference only), the same
            computing otherwise (``"cpu:int8"``, ``"cpu:bfloat16"``, see :class:`CpuBackend`), ``"onnx"`` (onnxruntime;
            inference only), ``"cuda"`` (Triton kernels; inputs lie on the GPU), ``"cuda:compile"`` (the same, and what
            no kernel takes through ``torch.compile``), or a backend, such as ``CpuBackend(compute="int8")``. For a
            folder ``"cpu"`` keeps no weights that have been packed (``CpuBackend(keep_weights=False)``): the folder
            still has them.
        dynamic: which sizes may vary, see :func:`graphwright.trace`.
        verify: ``False`` to check structure only, or how thoroughly to verify.
        hooks: called around each pass, such as ``DumpIR(folder)``.

    Raises:
        InputError: example inputs, passes or target do not fit.
        BackendError: this machine cannot run the target; nothing was done.
        TraceError: the model cannot be traced.
        OrderError: the passes cannot run in this order; nothing was run.
        ContractViolation: a pass changed what it promised to keep; it is named.
    """
    backend = find_backend(target)
    backend.check()
    if isinstance(model, str | os.PathLike):
        if example_inputs is not None:
            raise InputError(
                "a folder is taken for a decoding step, whose inputs are made",
                where="argument 'example_inputs'",
                hint="use optimize(load_huggingface(folder), ...) for other models",
            )
        backend = find_backend(target, keep_weights=False)
        model = load_decoder(model)
    elif example_inputs is None and not isinstance(model, Program) and is_language_model(model):
        model = load_decoder(model)
    if isinstance(model, Program):
        model.require_values()
        program = model.clone()
        examples = flat_examples(program, example_inputs)
    else:
        if example_inputs is None:
            raise InputError("are needed to trace a module", where="argument 'example_inputs'")
        program = trace(model, example_inputs, dynamic=dynamic)
        args, kwargs, _ = bind_examples(model, example_inputs)
        examples = program.signature.flatten(args, kwargs)
    all_hooks = list(hooks)
    if verify is not False:
        all_hooks.insert(0, Verifier(examples, verify if isinstance(verify, Verification) else None))
    names = [node.name for node in program.inputs]
    report = run_passes(program, list(passes), all_hooks)
    examples = completed(program, examples, names)
    if DecoderLayout.find(program) is None:
        return OptimizedModel(program, report, backend, examples)
    from graphwright.frontends.generation.optimized import OptimizedDecoder

    return OptimizedDecoder(program, report, backend, examples)


def flat_examples(program: Program, example_inputs: ExampleInputs | None) -> list[torch.Tensor]:
    """Flat inputs of a program from the caller's examples, or random ones of small sizes when there are none."""
    if example_inputs is None:
        blank = [torch.ones(_concrete(program, node), dtype=program_dtype(program, node)) for node in program.inputs]
        return sample(program, blank, small_sizes(program), torch.Generator().manual_seed(0))
    if isinstance(example_inputs, torch.Tensor):
        return program.signature.flatten((example_inputs,), {})
    if isinstance(example_inputs, Sequence):
        return program.signature.flatten(tuple(example_inputs), {})
    return program.signature.flatten((), dict(example_inputs))


def program_dtype(program: Program, node: Any) -> torch.dtype:
    """dtype of an input."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _concrete(program: Program, node: Any) -> list[int]:
    sizes = small_sizes(program)
    kind: Any = program.type_of(node)
    return [size if isinstance(size, int) else sizes[size] for size in kind.shape]


def _reference() -> Backend:
    from graphwright.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _cpu(compute: str = "float32", *, keep_weights: bool = True) -> Backend:
    from graphwright.backends.cpu import CpuBackend

    return CpuBackend(compute=compute, keep_weights=keep_weights)


def _onnx() -> Backend:
    from graphwright.backends.onnx import OnnxBackend

    return OnnxBackend()


def _cuda(*, compile_rest: bool = False) -> Backend:
    from graphwright.backends.triton import TritonBackend

    return TritonBackend(compile_rest=compile_rest)


# target name -> how to make its backend
BACKENDS: dict[str, Callable[..., Backend]] = {
    "reference": _reference,
    "cpu": _cpu,
    "cpu:bfloat16": partial(_cpu, "bfloat16"),
    "cpu:int8": partial(_cpu, "int8"),
    "cuda": _cuda,
    "cuda:compile": partial(_cuda, compile_rest=True),
    "onnx": _onnx,
}


def find_backend(target: str | Backend, *, keep_weights: bool = True) -> Backend:
    """The backend of a target.

    Args:
        target: its name, or a backend, which is taken as it is.
        keep_weights: for ``cpu``, see :class:`graphwright.backends.cpu.CpuBackend`.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(target, Backend):
        return target
    if target not in BACKENDS:
        raise InputError(
            f"there is no target {target!r}", where="argument 'target'", hint=f"targets: {', '.join(BACKENDS)}"
        )
    options = {"keep_weights": keep_weights} if target.partition(":")[0] == "cpu" else {}
    return BACKENDS[target](**options)
