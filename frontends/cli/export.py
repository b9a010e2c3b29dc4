"""``graphwright export MODEL -o x.onnx``, or ``--layout gptq -o FOLDER`` for other tools' quantised checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the ONNX file or the folder to write")
    parser.add_argument(
        "--layout",
        choices=("compressed-tensors", "gptq", "awq"),
        help="write a quantised model as a Hugging Face folder in this layout instead of ONNX",
    )
    parser.add_argument("--source", metavar="FOLDER", help="with --layout: the original folder of a saved Program")
    parser.add_argument(
        "--mode",
        choices=("runtime", "portable"),
        default="runtime",
        help="runtime: onnxruntime's own operators where it has kernels for them (default); portable: standard ONNX",
    )
    parser.add_argument("--opset", type=int, help="ONNX opset, 21 or later")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        help="of weight-only quantised linears: 1 computes on float activations (default), 4 on int8 ones, faster",
    )
    parser.add_argument(
        "--vnni",
        action="store_true",
        help="for processors with VNNI (or Arm) only: INT8 weights stay signed, for onnxruntime's faster kernel there",
    )
    parser.add_argument("--external-data", action="store_true", help="weights in a file beside it (always above 2 GB)")
    parser.add_argument("--no-check", action="store_true", help="do not open the file in onnxruntime")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.api import flat_examples
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import working
    from graphwright.ir.errors import InputError

    output = Path(options.output)
    if not output.absolute().parent.is_dir():
        raise InputError("there is no such folder", where=str(output.absolute().parent), hint="make it first")
    if options.layout is not None:
        return _save_quantized(options, output)
    if options.source is not None:
        raise InputError("goes with --layout", where="option --source")
    try:
        from graphwright.backends.onnx import export_onnx
    except ModuleNotFoundError as error:
        raise InputError(f"export needs the package {error.name}", hint="pip install 'graphwright[onnx]'") from error
    program, examples = open_model(options.model, options, quiet=options.json)
    settings = {"opset": options.opset, "accuracy_level": options.accuracy_level}
    with working(f"exporting {output.name}", quiet=options.json):
        result = export_onnx(
            program,
            output,
            mode=options.mode,
            external_data=True if options.external_data else None,
            check=not options.no_check,
            vnni=options.vnni,
            example_inputs=flat_examples(program, examples) if examples is not None else None,
            **{name: value for name, value in settings.items() if value is not None},
        )
    if options.json:
        import json

        print(json.dumps(result.to_json(), indent=2))
    else:
        print(result)
    return 0


def _save_quantized(options: argparse.Namespace, output: Path) -> int:
    from graphwright.frontends.api import flat_examples
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import working
    from graphwright.frontends.huggingface.quantized import save_quantized

    program, examples = open_model(options.model, options, quiet=options.json)
    with working(f"writing {output.name}", quiet=options.json):
        result = save_quantized(
            program,
            output,
            layout=options.layout,
            source=options.source,
            check=not options.no_check,
            example_inputs=flat_examples(program, examples) if examples is not None else None,
        )
    if options.json:
        import json

        print(json.dumps(result.to_json(), indent=2))
    else:
        print(result)
    return 0
