"""``graphwright inspect MODEL``."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("--depth", type=int, default=2, help="parts of the module path to sum costs by (default: 2)")
    parser.add_argument("--at", metavar="SIZES", help="sizes for the costs, such as batch=1,sequence=128")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print the whole program as text instead")
    form.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.cli.output import parse_sizes
    from graphwright.ir.errors import InputError

    sizes = parse_sizes(options.at)
    if options.depth < 1:
        raise InputError(f"must be 1 or more, not {options.depth}", where="option --depth")
    program, _ = open_model(options.model, options, quiet=options.json)
    if options.text:
        print(program, end="")
        return 0
    summary = summarize(program, sizes, options.depth)
    if options.json:
        import json

        print(json.dumps(summary, indent=2))
    else:
        _print(summary)
    return 0


def summarize(program: Any, sizes: dict[str, int], depth: int) -> dict[str, Any]:
    """What a program consists of, as JSON values.

    Raises:
        InputError: a size for a dimension the program does not have.
    """
    from graphwright.ir.cost import cost_of
    from graphwright.ir.names import op_name
    from graphwright.passes.pipeline import weight_bytes

    cost = cost_of(program, sizes)
    operators = Counter(op_name(node) for node in program.nodes if node.op == "call_function")
    modules: dict[str, dict[str, int]] = {}
    for name, tensor in program.tensors().items():
        entry = modules.setdefault(".".join(name.split(".")[:-1][:depth]) or "(root)", _blank())
        entry["parameters"] += tensor.numel() if _is_parameter(tensor) else 0
        entry["bytes"] += tensor.numel() * tensor.element_size()
    for path, work in cost.by_module(depth).items():
        modules.setdefault(path, _blank())["macs"] += work.macs
    return {
        "title": program.title,
        "nodes": len(program.nodes),
        "inputs": {str(node.target): str(program.type_of(node)) for node in program.inputs},
        "outputs": _outputs(program),
        "dimensions": {dim.name: {"min": dim.min, "max": dim.max} for dim in program.dims.values()},
        "conditions": list(program.symbols.conditions),
        "parameters": sum(tensor.numel() for tensor in program.tensors().values() if _is_parameter(tensor)),
        "bytes": weight_bytes(program),
        "macs": cost.total.macs,
        "sizes": dict(cost.sizes),
        "tied": dict(program.aliases),
        "operators": dict(operators.most_common()),
        "modules": modules,
        "journal": [
            {"pass": entry.pass_name, "options": dict(entry.options), "changed": entry.changed, **entry.details}
            for entry in program.journal
        ],
    }


def _is_parameter(tensor: Any) -> bool:
    """Learnt numbers, quantised ones included; not tables of positions and masks."""
    return tensor.element_size() == 1 if not tensor.is_floating_point() else True


def _blank() -> dict[str, int]:
    return {"parameters": 0, "bytes": 0, "macs": 0}


def _outputs(program: Any) -> dict[str, str]:
    results = program.output.args[0]
    types = [str(program.type_of(item)) if hasattr(item, "meta") else repr(item) for item in results]
    return dict(zip(program.signature.output_names(), types, strict=True))


def _print(summary: dict[str, Any]) -> None:
    from graphwright.frontends.cli.output import console

    out = console()
    sizes = ", ".join(f"{name} = {size}" for name, size in summary["sizes"].items()) or "fixed sizes"
    weights = f"{summary['parameters']:,} parameters, {_size(summary['bytes'])}"
    print(f"{summary['title']}: {summary['nodes']} nodes, {weights}")
    print(f"{summary['macs']:,} multiply-accumulates with {sizes}")
    for name, kind in summary["inputs"].items():
        print(f"  input   {name}: {kind}")
    for name, kind in summary["outputs"].items():
        print(f"  output  {name}: {kind}")
    for name, limits in summary["dimensions"].items():
        print(f"  size    {name}: {limits['min']} to {limits['max'] or 'any'}")
    for condition in summary["conditions"]:
        print(f"  where   {condition}")
    for alias, name in summary["tied"].items():
        print(f"  tied    {alias} = {name}")
    out.print(_table("operator", ("count",), {name: (str(n),) for name, n in summary["operators"].items()}))
    rows: dict[str, tuple[str, ...]] = {
        path: (f"{entry['parameters']:,}", _size(entry["bytes"]), f"{entry['macs']:,}")
        for path, entry in summary["modules"].items()
        if any(entry.values())
    }
    out.print(_table("module", ("parameters", "bytes", "MACs"), rows))
    for number, entry in enumerate(summary["journal"], 1):
        options = ", ".join(f"{key} = {value}" for key, value in entry["options"].items())
        what = entry["pass"] + (f" ({options})" if options else "")
        print(f"  {number}. {what}{'' if entry['changed'] else ': no change'}")


def _table(first: str, others: tuple[str, ...], rows: dict[str, tuple[str, ...]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for key, cells in rows.items():
        table.add_row(key, *cells)
    return table


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
