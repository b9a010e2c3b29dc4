"""``export_genai``: a decoder as a folder that onnxruntime-genai loads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphwright.backends.onnx.comparison import ExampleInputs
from graphwright.backends.onnx.decoder import PAST, PRESENT
from graphwright.backends.onnx.export import export_onnx
from graphwright.backends.onnx.report import OnnxExport
from graphwright.backends.onnx.writing import check_folder, publish_folder, write_failure
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ExportError, InputError, ProgramError
from graphwright.ir.program import Program

MODEL = "model.onnx"
CONFIG = "genai_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Any of these holds a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Decoders that onnxruntime-genai knows by name; all others are "decoder", which is fed the same way.
_KNOWN = frozenset(
    {
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama", "mistral"),
        *("nemotron", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3"),
    }
)
# What families call the same number.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_SEARCH: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
}


def export_genai(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    context_length: int | None = None,
    tokenizer: bool = True,
    accuracy_level: int = 1,
    logits: str = "last",
    external_data: bool = True,
    check: bool = True,
    example_inputs: ExampleInputs | None = None,
    tolerance: float | None = None,
    vnni: bool = False,
) -> OnnxExport:
    """Write a decoding step as a folder for onnxruntime-genai: model, ``genai_config.json`` and tokenizer.

    The folder is written beside its target and takes its place when everything is in it and the model has been
    checked, see :func:`~graphwright.backends.onnx.export_onnx`. Run ``PrepareDecoder`` on the program before: what it
    leaves is what the runtime has kernels for.

    Args:
        program: a decoding step; it is not changed.
        folder: folder to write. An earlier export there is replaced; any other folder must be empty.
        source: the model's Hugging Face folder: ``config.json``, ``generation_config.json`` where there is one, and the
            tokenizer are read there.
        context_length: tokens that a sequence can hold; when left out, as many as ``config.json`` says and the program
            has positions for. The caches of a generator are as long as its ``max_length``, which is this where it
            sets none.
        tokenizer: copy the tokenizer's files; without them the model is driven by token ids.
        accuracy_level: 4 rounds activations of quantised linears to int8, see ``export_onnx``.
        logits: ``"last"`` suffices to generate; ``"all"`` for speculative decoding.
        external_data: weights in ``model.onnx.data``, which the runtime maps instead of reading.
        check: compare the model with the program, step by step.
        example_inputs: of the program; their tokens are used for the check.
        tolerance: largest absolute difference; measured when left out.
        vnni: for processors with VNNI (or Arm) only, see ``export_onnx``.

    Raises:
        InputError: an option does not fit, or files of the source are missing or unusable.
        ExportError: the program is not a decoding step, its layers differ in their caches, an operator has no
            translation, the check fails, or the folder cannot be written. Nothing is written then.
    """
    if logits == "rows":
        raise InputError("onnxruntime-genai does not feed rows", where="option 'logits'", hint="use 'last' or 'all'")
    target, origin = Path(folder).absolute(), Path(source)
    config = _read(origin / "config.json")
    chosen = _read(origin / "generation_config.json") if (origin / "generation_config.json").is_file() else {}
    copied = _tokenizer_files(origin) if tokenizer else ()
    check_folder(target, mark=CONFIG)
    description = genai_config(program, config, chosen, context_length=context_length)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise write_failure(target, error) from error
    try:
        # mkdtemp's own folder is private; what is published has the permissions that the user's folders have.
        made = staging / target.name
        made.mkdir()
        result = export_onnx(
            program,
            made / MODEL,
            accuracy_level=accuracy_level,
            external_data=external_data,
            check=check,
            example_inputs=example_inputs,
            tolerance=tolerance,
            logits=logits,
            vnni=vnni,
            context_length=description["model"]["context_length"],
        )
        try:
            (made / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            for each in copied:
                shutil.copyfile(each, made / each.name)
        except OSError as error:
            raise write_failure(target, error) from error
        publish_folder(made, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files = tuple(sorted(target.iterdir(), key=lambda each: (each.name == MODEL, each.name)))
    return dataclasses.replace(result, path=target / MODEL, files=files)


def genai_config(
    program: Program,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    context_length: int | None = None,
) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    Args:
        program: a decoding step.
        config: the model's ``config.json``; the text part of a larger one is used where there is one.
        generation: its ``generation_config.json``, which goes before ``config.json``.
        context_length: instead of that of ``config.json``.

    Raises:
        InputError: the context length or the end token is nowhere to be found, or the former is too long.
        ExportError: the program is not a decoding step, or its layers differ in their caches.
    """
    try:
        layout = DecoderLayout.of(program)
    except ProgramError as error:
        raise ExportError(
            "has no cache: onnxruntime-genai runs decoding steps",
            where=f"program {program.title!r}",
            hint="trace a causal language model with load_decoder",
        ) from error
    if layout.adapters:
        raise ExportError(
            "switches adapters by an input, which onnxruntime-genai does not give",
            where=f"program {program.title!r}",
            hint="merge one adapter, or use export_onnx and feed the model yourself",
        )
    shapes = sorted({*layout.keys, *layout.values})
    if len(shapes) != 1:
        raise ExportError(
            f"the caches of its layers differ, (heads, head dim) are {shapes}; onnxruntime-genai makes all alike",
            where=f"program {program.title!r}",
            hint="use export_onnx and feed the model yourself",
        )
    (heads, width) = shapes[0]
    text = config.get("text_config")
    own: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    chosen = {key: value for key, value in (generation or {}).items() if value is not None}
    ends = _first(("eos_token_id",), chosen, own, config)
    if ends is None:
        raise InputError("has no 'eos_token_id'", where="config.json", hint="write it there")
    end = ends[0] if isinstance(ends, list) else ends
    start, filler = (_first((name,), chosen, own, config) for name in ("bos_token_id", "pad_token_id"))
    kind, length = str(own.get("model_type", "decoder")), _context_length(layout, own, context_length)
    return {
        "model": {
            "type": kind if kind in _KNOWN else "decoder",
            "bos_token_id": end if start is None else start,
            "eos_token_id": ends,
            "pad_token_id": end if filler is None else filler,
            "context_length": length,
            "vocab_size": layout.vocabulary,
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": _first(_HIDDEN, own) or heads * width,
                "head_size": width,
                "num_attention_heads": _first(_HEADS, own) or heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layout.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": PAST["keys"].format("%d"),
                    "past_value_names": PAST["values"].format("%d"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": PRESENT["keys"].format("%d"),
                    "present_value_names": PRESENT["values"].format("%d"),
                },
            },
        },
        "search": {
            **{key: chosen.get(key, plain) for key, plain in _SEARCH.items()},
            "early_stopping": True,
            "min_length": 0,
            "max_length": length,
            "past_present_share_buffer": True,
        },
    }


def _context_length(layout: DecoderLayout, config: Mapping[str, Any], wanted: int | None) -> int:
    stated = _first(_CONTEXT, config)
    known = [int(each) for each in (stated, layout.length) if each is not None]
    if wanted is None and not known:
        raise InputError(
            f"has no context length: none of {', '.join(_CONTEXT)}", where="config.json", hint="give context_length"
        )
    if wanted is not None and stated is not None and wanted > stated:
        raise InputError(f"{wanted} is more than the model's {stated}", where="option 'context_length'")
    return min(known) if wanted is None else wanted


def _first(names: tuple[str, ...], *places: Mapping[str, Any]) -> Any:
    return next((place[name] for place in places for name in names if place.get(name) is not None), None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            "there is no such file", where=str(path), hint="name the model's Hugging Face folder as source"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"should hold a JSON object, not a {type(value).__name__}", where=str(path))
    return value


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    found = tuple(folder / name for name in _TOKENIZER if (folder / name).is_file())
    if not any(each.name in _VOCABULARIES for each in found):
        raise InputError(
            f"has no tokenizer: none of {', '.join(_VOCABULARIES)}",
            where=str(folder),
            hint="save it there with tokenizer.save_pretrained(folder), or pass tokenizer=False",
        )
    return found
