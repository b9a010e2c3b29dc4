"""``graphwright optimize MODEL --recipe r.toml -o OUT``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.calibration import add_calibration_options
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="TOML file that lists the passes")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write: Program and reports")
    parser.add_argument("--target", help="such as cpu or cuda (default: the recipe's, else reference)")
    parser.add_argument("--no-verify", action="store_true", help="check the structure only, not the numbers")
    parser.add_argument("--force", action="store_true", help="replace a Program saved at OUT before")
    parser.add_argument(
        "--no-cache", action="store_true", help="take a language model as one call over whole texts, not as a decoder"
    )
    parser.add_argument(
        "--keep-program", action="store_true", help="of a decoder for the cpu, write the Program too, to optimize again"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_calibration_options(parser)
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.calibration import as_inputs, read_windows
    from graphwright.frontends.cli.output import check_new_folder, new_folder
    from graphwright.frontends.recipes import load_recipe

    output = Path(options.output)
    windows = read_windows(options)
    recipe = load_recipe(options.recipe, calibration=windows)  # what is wrong with it is said before minutes of work
    check_new_folder(output, force=options.force)

    from graphwright.frontends.api import find_backend, optimize
    from graphwright.frontends.cli.decoders import is_language_model_folder
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import console, pass_progress, working
    from graphwright.frontends.generation.facts import FILE as DECODER
    from graphwright.frontends.generation.facts import DecoderFacts
    from graphwright.frontends.generation.optimized import OptimizedDecoder
    from graphwright.frontends.huggingface import load_decoder
    from graphwright.ir.errors import InputError

    target = options.target or recipe.target or "reference"
    find_backend(target).check()
    if not options.no_cache and options.task is None and is_language_model_folder(Path(options.model)):
        if options.attention is not None:
            raise InputError("is not for decoders", where="option --attention", hint="add --no-cache, or leave it out")
        with working(f"tracing {Path(options.model).name}", quiet=options.json):
            program, examples = load_decoder(options.model, dtype=options.dtype), None
    else:
        program, examples = open_model(options.model, options, quiet=options.json)
        if (Path(options.model) / DECODER).is_file():
            program.origin = DecoderFacts.of_folder(options.model)
    if windows is not None:
        recipe = load_recipe(options.recipe, calibration=as_inputs(windows, program))
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
        is_packed = isinstance(optimized, OptimizedDecoder) and optimized.target == "cpu"
        if is_packed:
            optimized.save_packed(folder)
        if not is_packed or options.keep_program:
            optimized.save(folder)
        (folder / "report.json").write_text(optimized.report.to_json(), encoding="utf-8")
        (folder / "report.html").write_text(optimized.report.to_html(), encoding="utf-8")
    if options.json:
        print(optimized.report.to_json())
    else:
        console().print(optimized.report)
        print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return 0
