"""``load_huggingface``: a local folder or a live transformers model to a Program."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.huggingface.examples import make_examples
from graphwright.frontends.huggingface.folder import CONFIG, ModelFolder, open_folder
from graphwright.frontends.huggingface.quantized.loading import load_quantized, quantization_of
from graphwright.frontends.huggingface.quantized.modules import tag_quantized
from graphwright.frontends.torch.dynamic import DynamicSpec
from graphwright.frontends.torch.examples import ExampleInputs, unwrap
from graphwright.frontends.torch.tracing import trace
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program

# task -> class that makes a model for it from a configuration
TASKS: dict[str, str] = {
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def load_huggingface(
    source: Any,
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    example_inputs: ExampleInputs | None = None,
    attn_implementation: str | None = None,
    dynamic: DynamicSpec | str = "auto",
    check: bool = True,
) -> Program:
    """A Program of a Hugging Face model, encoder, decoder (without cache) or both.

    Args:
        source: a local folder (``config.json`` and safetensors, sharded or not), or a live ``PreTrainedModel``.
            Nothing is ever downloaded, and no code of the folder is run. Quantised linears of GPTQ, AWQ and
            compressed-tensors folders stay quantised, code for code.
        task: which head to load, such as ``"feature-extraction"``; what ``config.json`` names by default.
        dtype: of the weights; as stored by default.
        example_inputs: what to trace with; made from the configuration by default (:func:`make_examples`).
        attn_implementation: ``"sdpa"`` or ``"eager"``, as in transformers.
        dynamic: which sizes may vary, see :func:`graphwright.trace`.
        check: compare the Program with the model, see :func:`graphwright.trace`.

    Raises:
        InputError: not a model folder; weights missing, truncated or of other shapes; quantised weights that do not
            fit what the folder says of them, or of a format that is not read; an unknown task or dtype.
        TraceError: the model cannot be traced.
    """
    return load_with_examples(
        source,
        task=task,
        dtype=dtype,
        example_inputs=example_inputs,
        attn_implementation=attn_implementation,
        dynamic=dynamic,
        check=check,
    )[0]


def load_with_examples(
    source: Any,
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    example_inputs: ExampleInputs | None = None,
    attn_implementation: str | None = None,
    dynamic: DynamicSpec | str = "auto",
    check: bool = True,
) -> tuple[Program, Any]:
    """The Program and the example inputs it was traced with; see :func:`load_huggingface`."""
    also: tuple[str, ...] = ()
    if isinstance(source, str | os.PathLike):
        folder = open_folder(source)
        model = _load(folder, task=task, dtype=dtype, attn_implementation=attn_implementation)
        also = folder.tokenizer_inputs
    else:
        given = {"task": task, "dtype": dtype, "attn_implementation": attn_implementation}
        for name, value in given.items():
            if value is not None:
                raise InputError("is for folders; a live model has its own", where=f"argument {name!r}")
        model = unwrap(source)
        if not _is_pretrained(model):
            raise InputError(
                f"expected a folder or a transformers model, got {type(source).__name__}",
                where="argument 'source'",
                hint="use graphwright.trace(module, example_inputs) for other modules",
            )
    examples = make_examples(model, also=also) if example_inputs is None else example_inputs
    if example_inputs is not None and isinstance(example_inputs, Mapping):
        examples = _without_cache(model, example_inputs)
    program = trace(model, examples, dynamic=dynamic, check=check)
    tag_quantized(program)
    program.origin = DecoderFacts.of_model(model)
    return program, examples


def load_model(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """The transformers model of a local folder, in eval mode, every weight of it from the folder.

    Raises:
        InputError: see :func:`load_huggingface`.
    """
    return _load(open_folder(path), task=task, dtype=dtype, attn_implementation=attn_implementation)


def _load(folder: ModelFolder, *, task: str | None, dtype: Any, attn_implementation: str | None) -> Any:
    transformers = _transformers()
    where = str(folder.path / CONFIG)
    if folder.config.get("auto_map") and not folder.config.get("architectures"):
        raise InputError("needs Python code from the folder, which is never run", where=where)
    settings = quantization_of(folder)
    with _quiet(transformers):
        config = _config(transformers, folder)
        kind = _class_of(transformers, folder, config, task)
        options: dict[str, Any] = {"config": config, "dtype": _dtype(dtype), "attn_implementation": attn_implementation}
        if settings is None:
            model = _from_pretrained(kind, folder, options)
        else:
            model = _from_quantized(kind, folder, options, settings)
    model.eval()
    return model


def model_class(folder: ModelFolder, name: str) -> tuple[Any, Any]:
    """The class of this name, or else the one that a folder names, and the folder's configuration.

    Raises:
        InputError: transformers does not know the model.
    """
    transformers = _transformers()
    with _quiet(transformers):
        config = _config(transformers, folder)
        kind: Any = getattr(transformers, name, None)
        if isinstance(kind, type) and isinstance(config, getattr(kind, "config_class", None) or ()):
            return kind, config
        return _class_of(transformers, folder, config, None), config


def _config(transformers: Any, folder: ModelFolder) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(
            f"transformers {transformers.__version__} does not know this model: {_first_line(error)}",
            where=str(folder.path / CONFIG),
            hint=f"its model_type is {folder.config.get('model_type')!r}",
        ) from error


def _from_quantized(
    kind: Any, folder: ModelFolder, options: Mapping[str, Any], settings: tuple[Mapping[str, Any], str]
) -> Any:
    """The model of a quantised folder; transformers is kept from seeing that it is one."""
    config = options["config"]
    for name in ("quantization_config", "compression_config"):
        vars(config).pop(name, None)
    dtype = options["dtype"] if isinstance(options["dtype"], torch.dtype) else None

    def make(tensors: Mapping[str, torch.Tensor]) -> Any:
        return _from_pretrained(kind, folder, options, tensors)

    model: Any = load_quantized(kind, config, folder, settings, dtype, make)
    model.name_or_path = model.config.name_or_path = str(folder.path)
    if (folder.path / "generation_config.json").is_file():
        model.generation_config = _transformers().GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    return model


def _from_pretrained(
    kind: Any, folder: ModelFolder, options: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """The model and nothing that is not in the folder; without its pooling layer when only that is missing.

    ``tensors`` are taken instead of those in the folder's files.
    """
    missing: list[str] = []
    for extra in ({}, {"add_pooling_layer": False}):
        given = {} if tensors is None else {"state_dict": dict(tensors)}
        try:
            model, info = kind.from_pretrained(
                folder.path if tensors is None else None,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused below
                **options,
                **extra,
                **given,
            )
        except TypeError as error:
            if not extra:
                raise InputError(f"cannot be loaded: {_first_line(error)}", where=str(folder.path)) from error
            break  # a model whose pooling layer cannot be left out
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise InputError(f"cannot be loaded: {_first_line(error)}", where=str(folder.path)) from error
        mismatched = sorted(info.get("mismatched_keys", ()), key=str)
        if mismatched:
            name, stored, expected = mismatched[0]
            raise InputError(
                f"the tensor {name!r} has shape {list(stored)}, the configuration asks for {list(expected)}",
                where=str(folder.path),
                hint=f"{CONFIG} and the weights belong to different models",
            )
        missing = sorted(info.get("missing_keys", ()))
        if not missing:
            return model
        if not all(name.split(".")[-3:-2] == ["pooler"] or name.startswith("pooler.") for name in missing):
            break
    raise InputError(
        f"the weights lack {len(missing)} tensors of {kind.__name__}, such as {missing[0]!r}",
        where=", ".join(str(path) for path in folder.shards[:2]),
        hint="give a task= whose head the folder holds, or complete the weights; they would be random otherwise",
    )


def _class_of(transformers: Any, folder: ModelFolder, config: Any, task: str | None) -> Any:
    if task is not None:
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}", where="argument 'task'", hint=f"tasks: {', '.join(TASKS)}")
        auto = getattr(transformers, TASKS[task])
        if type(config) not in auto._model_mapping:
            raise InputError(f"{type(config).__name__} has no model for {task!r}", where="argument 'task'")
        found = auto._model_mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    architectures = folder.config.get("architectures") or []
    if not architectures:
        if type(config) not in transformers.AutoModel._model_mapping:
            raise InputError("names no architecture", where=str(folder.path / CONFIG), hint="give a task=")
        found = transformers.AutoModel._model_mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise InputError(
            f"names the architecture {architectures[0]!r}, which transformers {transformers.__version__} does not have",
            where=str(folder.path / CONFIG),
            hint="install a transformers that has it, or give a task=",
        )
    return kind


def _dtype(dtype: torch.dtype | str | None) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise InputError(f"{dtype!r} is not a weight dtype", where="argument 'dtype'", hint=f"one of {', '.join(DTYPES)}")


def _without_cache(model: Any, examples: Mapping[str, Any]) -> dict[str, Any]:
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {**examples, **({"use_cache": False} if takes_cache and "use_cache" not in examples else {})}


def _is_pretrained(model: Any) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "loading a Hugging Face folder needs the package transformers",
            hint="pip install 'graphwright[huggingface]'",
        ) from error
    return transformers


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings of what is checked here anyway."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
