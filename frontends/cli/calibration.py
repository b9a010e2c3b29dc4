"""Calibration data on the command line: a text file, in the tokens of the model's own tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    import torch

    from graphwright.ir.program import Program

_SAMPLES, _LENGTH = 128, 512


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what passes learn from."""
    group = parser.add_argument_group("calibration data, for passes that learn from typical inputs")
    group.add_argument("--calibration", metavar="FILE.txt", help="text, in the tokens of MODEL's tokenizer")
    group.add_argument(
        "--calibration-samples",
        type=int,
        metavar="N",
        help=f"pieces of the text, from its beginning (default: {_SAMPLES})",
    )
    group.add_argument(
        "--calibration-length", type=int, metavar="N", help=f"tokens of each, at most (default: {_LENGTH})"
    )


def read_windows(options: argparse.Namespace) -> list[torch.Tensor] | None:
    """The text as token ids, int64 ``[1, tokens]`` each; ``None`` where no file was named.

    For language models these are windows of the running text; for others each line by itself, with the tokens that mark
    beginning and end, as encoders are given sentences.

    Raises:
        InputError: the file cannot be read or is too short, the numbers make no sense, or there is no tokenizer.
    """
    samples = _positive(options.calibration_samples, "--calibration-samples", _SAMPLES)
    length = _positive(options.calibration_length, "--calibration-length", _LENGTH)
    if options.calibration is None:
        for name in ("samples", "length"):
            if getattr(options, f"calibration_{name}") is not None:
                raise InputError("goes with --calibration FILE.txt", where=f"option --calibration-{name}")
        return None
    return text_windows(Path(options.model), options.calibration, samples, length, option="--calibration")


def text_windows(folder: Path, file: str, samples: int, length: int, *, option: str) -> list[torch.Tensor]:
    """A text as token ids of the tokenizer of a model's folder, see :func:`read_windows`.

    Raises:
        InputError: the file cannot be read or is too short, there is no tokenizer, or a number makes no sense.
    """
    _positive(samples, "--windows", samples)
    where = f"option {option}: {file}"
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read as text: {error}", where=where) from error
    import torch

    from graphwright.frontends.cli.decoders import is_language_model_folder
    from graphwright.frontends.generation.facts import FILE
    from graphwright.frontends.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not (folder / FILE).is_file() and not is_language_model_folder(folder):
        sentences = [line for line in text.splitlines() if line.strip()][:samples]
        found = [tokenizer(line, truncation=True, max_length=length)["input_ids"] for line in sentences]
    else:
        # Far more characters than the tokens can take: a book need not be encoded for its first pages.
        ids = tokenizer(text[: 16 * samples * length], add_special_tokens=False, verbose=False)["input_ids"]
        found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:samples]
        if not found:
            raise InputError(
                f"holds {len(ids)} tokens, less than one window of {length}",
                where=where,
                hint="give a longer text" + (f", or a smaller {option}-length" if option == "--calibration" else ""),
            )
    if not found:
        raise InputError("holds no text", where=where)
    return [torch.tensor([ids], dtype=torch.int64) for ids in found]


def as_inputs(windows: list[torch.Tensor], program: Program, *, option: str = "--calibration") -> list[Any]:
    """Token ids as batches of a program.

    Raises:
        InputError: it takes no token ids, or inputs of other kinds.
    """
    import torch

    from graphwright.ir.decoder import DecoderLayout

    if DecoderLayout.find(program) is not None:
        return list(windows)
    makers = {"input_ids": torch.clone, "attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    names = program.signature.names
    unknown = [name for name in names if name not in makers]
    if unknown or "input_ids" not in names:
        raise InputError(
            f"the model takes {', '.join(names)}: text gives no data for it",
            where=f"option {option}",
            hint="use the Python API: graphwright.optimize with QuantizeLinears(calibration=...), or auto_quantize",
        )
    return [{name: makers[name](window) for name in names} for window in windows]


def _positive(value: int | None, option: str, default: int) -> int:
    if value is not None and value < 1:
        raise InputError(f"must be at least 1, not {value}", where=f"option {option}")
    return default if value is None else value
