"""``graphwright diff A B``: exit code 1 when they differ, as ``diff`` does."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("first", metavar="A", help="a saved Program or a Hugging Face folder")
    parser.add_argument("second", metavar="B", help="another")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.models import open_model
    from graphwright.ir.diff import diff

    first, _ = open_model(options.first, options)
    second, _ = open_model(options.second, options)
    difference = diff(first, second)
    print(difference)
    return 1 if difference else 0
