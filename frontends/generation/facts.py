"""What is known of a decoder besides its graph: where answers end, its longest context, where its tokenizer lies."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphwright.ir.errors import InputError, SerializationError

FILE = "decoder.json"
PACKED = "packed.safetensors"  # in the folder of a packed decoder
_FORMAT = "graphwright decoder"


@dataclass(frozen=True)
class DecoderFacts:
    """What the model's configuration says.

    Attributes:
        stop_tokens: that end an answer.
        context: tokens that the model takes at most, prompt and answer; ``None`` where it is not known.
        folder: where its tokenizer lies; ``None`` where there is none.
    """

    stop_tokens: tuple[int, ...] = ()
    context: int | None = None
    folder: Path | None = None

    @staticmethod
    def of_folder(folder: str | os.PathLike[str]) -> DecoderFacts:
        """Of a folder: ``decoder.json``, or ``config.json`` and ``generation_config.json``.

        Raises:
            InputError: one of them holds something else than it should.
        """
        path = Path(folder)
        if (path / FILE).is_file():
            document = _read(path / FILE)
            stop, context = document.get("stop_tokens"), document.get("context")
            fits = isinstance(stop, list) and all(isinstance(each, int) for each in stop)
            if document.get("format") != _FORMAT or not fits or not isinstance(context, int | None):
                raise InputError("does not hold what save wrote", where=str(path / FILE), hint="save the decoder again")
            return DecoderFacts(tuple(stop or ()), context, path)
        config, generation = _read(path / "config.json"), _read(path / "generation_config.json")
        text = config.get("text_config", config)
        return DecoderFacts(
            _ids(generation.get("eos_token_id", text.get("eos_token_id"))),
            _context(text.get("max_position_embeddings", text.get("n_positions"))),
            path if path.is_dir() else None,
        )

    @staticmethod
    def of_model(model: Any) -> DecoderFacts:
        """Of a live transformers model; of anything else nothing is known."""
        config = getattr(model, "config", None)
        if config is None:
            return DecoderFacts()
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        generation = getattr(model, "generation_config", None)
        stop = getattr(generation, "eos_token_id", None)
        name = str(getattr(model, "name_or_path", "") or "")
        return DecoderFacts(
            _ids(stop if stop is not None else getattr(text, "eos_token_id", None)),
            _context(getattr(text, "max_position_embeddings", None)),
            Path(name) if name and Path(name).is_dir() else None,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``decoder.json``, atomically.

        Raises:
            SerializationError: it cannot be written.
        """
        path = Path(folder) / FILE
        document = {"format": _FORMAT, "stop_tokens": list(self.stop_tokens), "context": self.context}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise SerializationError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def with_stop_tokens(self, more: Iterable[int | None]) -> DecoderFacts:
        """The same, and these end an answer too."""
        known = dict.fromkeys([*self.stop_tokens, *(each for each in more if each is not None)])
        return replace(self, stop_tokens=tuple(known))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"should hold a JSON object, not a {type(value).__name__}", where=str(path))
    return value


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(each for each in values if isinstance(each, int))


def _context(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
