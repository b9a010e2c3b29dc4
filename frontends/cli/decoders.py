"""The MODEL argument of ``generate`` and ``chat``, and the options that both have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from graphwright.frontends.generation.decoder import Decoder

# option -> name in Decoder.generate
_OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
    "cache",
    "draft_tokens",
    "pipeline",
)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How answers are made, and what runs them."""
    group = parser.add_argument_group("how answers are made")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of each answer (default: 128)")
    group.add_argument("--temperature", type=float, help="0 takes the likeliest token (default)")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    group.add_argument("--seed", type=int, help="of sampling: the same seed gives the same answer")
    group.add_argument("--draft", metavar="WHAT", help="guess ahead: prompt-lookup, or a smaller MODEL")
    group.add_argument("--draft-tokens", type=int, metavar="N", help="guessed at a time")
    group.add_argument(
        "--pipeline", action="store_true", default=None, help="decode repeated layers as a pipeline; same answers"
    )
    adapters = group.add_mutually_exclusive_group()
    adapters.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        metavar="NAME[=WEIGHT]",
        help="which of the model's switched adapters answers; repeatable: their weighted sum",
    )
    adapters.add_argument("--base", action="store_true", help="answer without the switched adapters")
    group = parser.add_argument_group("what runs them")
    caches = ("float32", "bfloat16", "float16", "int8")
    group.add_argument("--cache", choices=caches, help="how keys and values are stored; float16 on a GPU only")
    group.add_argument("--tokenizer", metavar="FOLDER", help="of the model (default: MODEL's own)")
    targets = ("cpu", "cuda", "cuda:compile", "reference")
    group.add_argument("--target", choices=targets, help="default: cpu where its kernels are installed")
    group.add_argument("--dtype", help="dtype of a Hugging Face folder's weights (default: as stored)")


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for :meth:`Decoder.generate`."""
    given = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
    if options.draft == "prompt-lookup":
        given["draft"] = options.draft
    elif options.draft is not None:
        given["draft"] = open_decoder(options.draft, options)
    if options.base:
        given["adapters"] = None
    elif options.adapter is not None:
        given["adapters"] = dict(options.adapter)
    return given


def _adapter(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} is no weight of adapter {name!r}") from None


def open_decoder(path: str, options: argparse.Namespace) -> Decoder:
    """A decoder: a folder that ``optimize`` wrote, a packed file, a saved Program, or a Hugging Face folder.

    Raises:
        InputError: it is none of them, or generates no text.
    """
    from graphwright.frontends.cli.output import working
    from graphwright.frontends.generation.decoder import Decoder
    from graphwright.frontends.generation.facts import PACKED

    place = Path(path)
    with working(f"loading {place.name}"):
        is_packed = place.is_file() or (place / PACKED).is_file()
        made = _packed(place) if is_packed else _lowered(place, options)
    if not isinstance(made, Decoder):
        raise InputError("is no decoder: it generates no text", where=path, hint="optimize a language model's folder")
    return made


def is_language_model_folder(folder: Path) -> bool:
    """Whether it is a Hugging Face folder that names an architecture that generates text from text."""
    if (folder / "program.json").is_file():
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = list(config.get("architectures") or [])
    except (OSError, ValueError, AttributeError):
        return False  # whoever loads it says what is wrong
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS
    except ImportError:
        return False
    return bool(names) and names[0] in set(MODELS.values())


def _packed(place: Path) -> Any:
    from graphwright.frontends.generation.packed import load_packed

    return load_packed(place)


def _lowered(place: Path, options: argparse.Namespace) -> Any:
    from graphwright.frontends.api import optimize
    from graphwright.frontends.generation.facts import DecoderFacts
    from graphwright.frontends.huggingface import load_decoder
    from graphwright.ir.decoder import DecoderLayout
    from graphwright.ir.program import Program

    if (place / "program.json").is_file():
        program = Program.load(place)
        if DecoderLayout.find(program) is None:
            return None
        program.origin = DecoderFacts.of_folder(place)
    else:
        program = load_decoder(place, dtype=options.dtype)
    return optimize(program, target=options.target or default_target(), verify=False)


def default_target() -> str:
    """``cpu`` where its kernels are installed, else ``reference``."""
    from graphwright.backends.cpu import features

    return "cpu" if features().selected is not None else "reference"
