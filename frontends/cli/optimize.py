"""``graphwright optimize MODEL --recipe r.toml -o OUT``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="TOML file that lists the passes")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write: Program and reports")
    parser.add_argument("--target", help="backend to lower to (default: the recipe's, else reference)")
    parser.add_argument("--no-verify", action="store_true", help="check the structure only, not the numbers")
    parser.add_argument("--force", action="store_true", help="replace a Program saved at OUT before")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.output import check_new_folder, new_folder
    from graphwright.frontends.recipes import load_recipe

    recipe = load_recipe(options.recipe)
    output = Path(options.output)
    check_new_folder(output, force=options.force)

    from graphwright.frontends.api import find_backend, optimize
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import console, pass_progress

    target = options.target or recipe.target or "reference"
    find_backend(target)
    program, examples = open_model(options.model, options, quiet=options.json)
    with pass_progress() as hooks:
        optimized = optimize(
            program,
            recipe.passes,
            example_inputs=examples,
            target=target,
            verify=False if options.no_verify else recipe.verify,
            hooks=hooks,
        )
    with new_folder(output) as folder:
        optimized.save(folder)
        (folder / "report.json").write_text(optimized.report.to_json(), encoding="utf-8")
        (folder / "report.html").write_text(optimized.report.to_html(), encoding="utf-8")
    if options.json:
        print(optimized.report.to_json())
    else:
        console().print(optimized.report)
        print(f"wrote {output}: program.json, model.safetensors, report.json, report.html")
    return 0
