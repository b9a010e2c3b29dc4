"""Entry point: the parser, one clear message for every error, and exit codes.

Exit code 0: done. 1: a check failed (a contract, a verification, an export's proof). 2: bad input. 130: interrupted.
Nothing heavy is imported before a command runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from graphwright.ir.errors import ContractViolation, ExportError, GenerationError, GraphwrightError, PassError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# command -> what it does, in one line; each is the module of that name in this package
COMMANDS: dict[str, str] = {
    "optimize": "run a recipe on a model, checking every pass, and save the result",
    "auto-quantize": "search for the smallest quantisation that loses no more than allowed",
    "inspect": "what a model consists of: operators, parameters, bytes, MACs, dimensions, journal",
    "diff": "how two programs differ",
    "verify": "compare two models on random inputs",
    "export": "write a model as ONNX, or quantised in another tool's layout, and check what was written",
    "why": "why a pass did not match, nearest misses first",
    "passes": "the passes there are, and their options",
    "generate": "continue a text",
    "chat": "talk to a model, line by line",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="graphwright",
        description="Compiler passes for PyTorch and ONNX models, each one checked numerically the moment it has run.",
        epilog="MODEL is a folder: a saved Program, or a Hugging Face model (config.json and safetensors).",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module = _module(name)
        module.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = _module(options.command).run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("graphwright: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (GraphwrightError, OSError, MemoryError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"graphwright: error: {message_of(error)}", file=sys.stderr)
        return exit_code_of(error)
    return code


def exit_code_of(error: BaseException) -> int:
    """1 for a check that failed, 2 for input that cannot be used."""
    if isinstance(error, ContractViolation | ExportError | GenerationError):
        return FAILED
    if isinstance(error, PassError):
        from graphwright.ir.errors import OrderError

        return BAD_INPUT if isinstance(error, OrderError) else FAILED
    return BAD_INPUT


def message_of(error: BaseException) -> str:
    """What is wrong, where, and what to do."""
    if isinstance(error, OSError):
        place = f" (at {error.filename})" if error.filename else ""
        return f"{error.strerror or error}{place}"
    if not isinstance(error, GraphwrightError):
        return str(error) or type(error).__name__
    lines = [f"{error.where}: {error.what}" if error.where else error.what]
    lines += [f"    {line}" for line in error.context]
    return "\n".join(lines + ([f"  -> {error.hint}"] if error.hint else []))


def _module(command: str) -> Any:
    return importlib.import_module(f"graphwright.frontends.cli.{command.replace('-', '_')}")


class _Version(argparse.Action):
    """Reads the installed version only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **options: Any) -> None:
        from importlib.metadata import version

        print(f"graphwright {version('graphwright')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
