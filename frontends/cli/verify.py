"""``graphwright verify A B``: two models on the same random inputs; exit code 1 when they are too far apart."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("reference", metavar="A", help="the reference: a saved Program or a Hugging Face folder")
    parser.add_argument("candidate", metavar="B", help="what is compared with it")
    parser.add_argument("--cases", type=int, default=3, help="random inputs to compare on (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="largest relative error of an output, root mean square (default: what rounding in its dtype may cause)",
    )
    parser.add_argument("--min-cosine", type=float, metavar="C", help="smallest cosine similarity of an output as well")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.models import open_model
    from graphwright.ir.errors import InputError

    if options.cases < 1:
        raise InputError(f"must be 1 or more, not {options.cases}", where="option --cases")
    for name in ("max_error", "min_cosine"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise InputError(f"must be 0 or more, not {value}", where=f"option --{name.replace('_', '-')}")
    reference, examples = open_model(options.reference, options, quiet=options.json)
    candidate, _ = open_model(options.candidate, options, quiet=options.json)
    rows = compare_programs(reference, candidate, examples, options.cases, options.seed)
    failed = [row for row in rows if _is_bad(row, options)]
    if options.json:
        import json

        print(json.dumps({"passed": not failed, "outputs": rows}, indent=2))
    else:
        _print(rows, failed)
    return 1 if failed else 0


def compare_programs(reference: Any, candidate: Any, examples: Any, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per case and output: relative error, cosine similarity, largest difference.

    Raises:
        InputError: the two take different inputs or give different outputs.
    """
    import torch

    from graphwright.frontends.api import flat_examples
    from graphwright.ir.errors import InputError
    from graphwright.passes.verification.comparison import compare
    from graphwright.passes.verification.sampling import sample, small_sizes

    ours, theirs = [_inputs_of(program) for program in (reference, candidate)]
    if ours != theirs:
        raise InputError(
            "the two take different inputs",
            where="verify",
            hint=f"A takes {', '.join(ours) or 'none'}; B takes {', '.join(theirs) or 'none'}",
        )
    names, other = reference.signature.output_names(), candidate.signature.output_names()
    if names != other:
        raise InputError(
            "the two give different outputs",
            where="verify",
            hint=f"A gives {', '.join(names)}; B gives {', '.join(other)}",
        )
    blank = flat_examples(reference, examples)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for case in range(cases):
        sizes = small_sizes(reference, case)
        inputs = sample(reference, blank, sizes, generator)
        with torch.no_grad():
            expected, found = reference.body(*inputs), candidate.body(*inputs)
        for name, a, b in zip(names, expected, found, strict=True):
            values = {"case": case + 1, "sizes": sizes, "output": name, "rounding": _rounding(a)}
            rows.append({**values, **compare(b, a).as_json()})
    return rows


def _inputs_of(program: Any) -> list[str]:
    return [str(node.target) for node in program.inputs]


def _rounding(value: Any) -> float:
    """The relative error that many operations in the output's dtype may add up to."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return 0.0
    return 256 * float(torch.finfo(value.dtype).eps)


def _is_bad(row: dict[str, Any], options: argparse.Namespace) -> bool:
    limit = row["rounding"] if options.max_error is None else options.max_error
    too_far = not float(row["relative"]) <= limit  # NaN is too far
    return too_far or (options.min_cosine is not None and not float(row["cosine"]) >= options.min_cosine)


def _print(rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from graphwright.frontends.cli.output import console

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("case", "sizes", "output"):
        table.add_column(name, no_wrap=True)
    for name in ("relative error", "largest", "cosine", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sizes = ", ".join(f"{name} = {size}" for name, size in row["sizes"].items())
        verdict = f"FAILED {row['reason']}".rstrip() if row in failed else "ok"
        numbers = [f"{float(row['relative']):.2e}", f"{float(row['worst']):.2e}", f"{float(row['cosine']):.7f}"]
        table.add_row(str(row["case"]), sizes, row["output"], *numbers, verdict)
    console().print(table)
    print(f"{len(rows) - len(failed)} of {len(rows)} outputs agree" if failed else "the outputs agree")
