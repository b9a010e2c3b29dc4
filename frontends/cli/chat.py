"""``graphwright chat MODEL``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.frontends.generation.chat import Chat

_HELP = "/reset forgets the conversation, /quit ends it, Ctrl-C cancels an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.decoders import add_generation_options

    parser.add_argument("model", metavar="MODEL", help="what optimize wrote, a packed file, or a Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first, where its template has a place")
    parser.add_argument("--capacity", type=int, metavar="N", help="tokens of a conversation (default: the model's)")
    parser.epilog = f"In the conversation, {_HELP}."
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.decoders import generation_options, open_decoder
    from graphwright.frontends.cli.main import message_of
    from graphwright.ir.errors import InputError

    decoder = open_decoder(options.model, options)
    given = generation_options(options)
    if options.tokenizer is not None:
        given["tokenizer"] = options.tokenizer
    chat = decoder.chat(system=options.system, capacity=options.capacity, **given)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_HELP, file=sys.stderr)
    for line in _lines(is_terminal):
        if line == "/quit":
            break
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            print(f"graphwright: there is no {line.split()[0]}; {_HELP}", file=sys.stderr)
        elif line:
            try:
                _answer(chat, line)
            except InputError as error:
                if not is_terminal:
                    raise
                print(f"graphwright: error: {message_of(error)}", file=sys.stderr)
    return 0


def _answer(chat: Chat, message: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it, and what has come stays in the conversation."""
    try:
        with chat.stream(message) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n[cancelled]", flush=True)


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if is_terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        yield line.strip()
