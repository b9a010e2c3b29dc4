"""``graphwright auto-quantize MODEL --text valid.txt -o OUT``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    import torch

    from graphwright.ir.program import Program

_WINDOWS, _LENGTH = 64, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.calibration import add_calibration_options
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the search and what it found")
    judge = parser.add_argument_group("what judges a model").add_mutually_exclusive_group(required=True)
    judge.add_argument("--text", metavar="FILE.txt", help="of a language model, its perplexity on this text")
    judge.add_argument("--evaluate", metavar="FILE.py:NAME", help="a function of a model that gives one number")
    parser.add_argument("--higher-is-better", action="store_true", help="for --evaluate: an accuracy, not a loss")
    parser.add_argument("--windows", type=int, default=_WINDOWS, help=f"for --text: of {_LENGTH} tokens ({_WINDOWS})")
    parser.add_argument("--loss", type=float, default=0.01, help="what may be lost, as a part of the score (0.01)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="of all weights")
    parser.add_argument("--max-latency", type=float, metavar="MS", help="of a call, in milliseconds")
    parser.add_argument("--target", help="what runs the model (default: cpu where its kernels are installed)")
    parser.add_argument("--pareto", action="store_true", help="try everything, for the front of bytes and loss")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds after which no further trial starts")
    parser.add_argument("--json", action="store_true", help="print the trials as JSON")
    add_calibration_options(parser)
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0 when the target is met, 1 when nothing met it. Started again, it goes on where it ended.

    OUT holds the journal, ``search.html`` and ``recipe.toml``, and in ``model`` the best model.
    """
    import json

    from graphwright.frontends.cli.calibration import as_inputs, read_windows, text_windows

    if options.higher_is_better and options.text is not None:
        raise InputError("perplexity is better lower", where="option --higher-is-better", hint="leave it out")
    function = function_of(options.evaluate) if options.evaluate is not None else None
    windows = read_windows(options)
    text = None
    if options.text is not None:
        text = text_windows(Path(options.model), options.text, options.windows, _LENGTH, option="--text")

    from graphwright.frontends.api import find_backend
    from graphwright.frontends.autoquantize import Limits, Relative, auto_quantize
    from graphwright.frontends.cli.main import FAILED, OK
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import console

    if options.target is not None:
        find_backend(options.target)
    target = Relative(options.loss)
    limits = Limits(bytes=options.max_bytes, latency_ms=options.max_latency, target=options.target)
    program, examples = open_model(options.model, options, quiet=options.json)
    if function is None:
        assert text is not None
        function = perplexity_on(text, program)
    result = auto_quantize(
        program,
        function,
        higher_is_better=options.higher_is_better,
        target=target,
        calibration=as_inputs(windows, program) if windows is not None else None,
        example_inputs=examples,
        limits=limits,
        mode="pareto" if options.pareto else "first",
        journal=options.output,
        time_limit=options.time_limit,
    )
    if result.model is not None:
        result.model.save(Path(options.output) / "model")
    if options.json:
        print(json.dumps({"met": result.met, "message": result.message, "rows": result.rows()}, indent=2))
    else:
        console().print(result)
    return OK if result.met else FAILED


def function_of(given: str) -> Callable[[Any], float]:
    """The function that ``FILE.py:NAME`` names; the file is run.

    Raises:
        InputError: there is no such file or function, or the file cannot be run.
    """
    import importlib.util

    file, _, name = given.rpartition(":")
    place = f"option --evaluate: {given}"
    if not file or not Path(file).is_file():
        raise InputError("names no file", where=place, hint="write --evaluate FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise InputError("is no Python file", where=place)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"cannot be run: {type(error).__name__}: {error}", where=place) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"the file has no function {name!r}", where=place)
    function: Callable[[Any], float] = found
    return function


def perplexity_on(windows: list[torch.Tensor], program: Program) -> Callable[[Any], float]:
    """What gives a language model's perplexity on windows of tokens ``[1, n]``: of each token but the first.

    Raises:
        InputError: the program takes no tokens, or gives no logits.
    """
    import torch
    from torch.nn import functional

    from graphwright.frontends.cli.calibration import as_inputs

    batches = as_inputs(windows, program, option="--text")

    def perplexity(model: Any) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for window, batch in zip(windows, batches, strict=True):
                logits = getattr(model(**batch), "logits", None)
                if logits is None:
                    raise InputError("gives no logits", where="option --text", hint="judge it by --evaluate")
                losses = functional.cross_entropy(logits[0, :-1].float(), window[0, 1:], reduction="sum")
                total, count = total + float(losses), count + window.shape[1] - 1
        return math.exp(total / count)

    return perplexity
