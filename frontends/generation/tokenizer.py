"""The tokenizer of a decoder: found beside it, checked against it, saved beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graphwright.ir.errors import InputError, SerializationError

# A folder that holds any of these has a tokenizer.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(source: Any) -> Any:
    """A tokenizer of transformers.

    Args:
        source: a local folder, a tokenizer of transformers, or one of the package tokenizers. Nothing is downloaded.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        return _wrapped(source)
    folder = Path(source)
    if not has_tokenizer(folder):
        raise InputError("holds no tokenizer", where=str(folder), hint=f"expected one of {', '.join(_FILES)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            "a tokenizer needs the package transformers", hint="pip install 'graphwright[huggingface]'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its Rust part raise anything here
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"its tokenizer cannot be read: {first}", where=str(folder)) from error


def check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Check that the model knows every token that the tokenizer gives.

    Raises:
        InputError: it does not.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise InputError(
            f"gives tokens up to {largest}, the model has a vocabulary of {vocabulary}",
            where="tokenizer",
            hint="it belongs to another model",
        )


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer's files into a folder.

    Raises:
        SerializationError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(os.fspath(folder))
    except OSError as error:
        raise SerializationError(
            f"the tokenizer cannot be written: {error.strerror or error}", where=str(folder)
        ) from error


def _wrapped(tokenizer: Any) -> Any:
    if type(tokenizer).__module__.split(".")[0] == "tokenizers":
        import transformers

        kind: Any = transformers.PreTrainedTokenizerFast
        return kind(tokenizer_object=tokenizer)
    for name in ("encode", "decode", "get_vocab"):
        if not callable(getattr(tokenizer, name, None)):
            raise InputError(
                f"a {type(tokenizer).__name__} is no tokenizer: it has no {name}()",
                where="argument 'tokenizer'",
                hint="give a tokenizer of transformers or tokenizers, or the folder of one",
            )
    return tokenizer
