"""``graphwright generate MODEL "prompt"``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.frontends.generation.result import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.decoders import add_generation_options

    parser.add_argument("model", metavar="MODEL", help="what optimize wrote, a packed file, or a Hugging Face folder")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="one or several (default: what stdin holds)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer as it comes; one prompt")
    form.add_argument("--json", action="store_true", help="print answers, tokens, counts and times as JSON")
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.decoders import generation_options, open_decoder
    from graphwright.ir.errors import InputError

    if options.stream and len(options.prompt) > 1:
        raise InputError("takes one prompt", where="option --stream")
    decoder = open_decoder(options.model, options)
    if options.tokenizer is not None:
        decoder.tokenizer = options.tokenizer
    if decoder.tokenizer is None:
        raise InputError("has no tokenizer", where=options.model, hint="give --tokenizer FOLDER")
    given = generation_options(options)
    prompts = options.prompt or [sys.stdin.read()]
    if options.stream:
        with decoder.stream(prompts[0], **given) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print()
        result = stream.result
    else:
        result = decoder.generate(prompts, **given)
        _print(result, options.json)
    if sys.stderr.isatty() and not options.json:
        print(result.summary, file=sys.stderr)
    return 0


def _print(result: Generation, as_json: bool) -> None:
    if not as_json:
        print(*(result.texts or ()), sep="\n")
        return
    import json

    print(json.dumps(result.as_json(), indent=2))
