"""``graphwright passes [NAME]``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this pass in full")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.passes import registry

    names = [options.name] if options.name else registry.names()
    described = [describe(name) for name in names]
    if options.json:
        import json

        print(json.dumps(described[0] if options.name else described, indent=2))
    elif options.name:
        _print_one(described[0])
    else:
        _print_all(described)
    return 0


def describe(name: str) -> dict[str, Any]:
    """A pass as JSON values: options with types and defaults, contract, docstring.

    Raises:
        InputError: there is no such pass.
    """
    from graphwright.frontends.options import describe_type, field_types
    from graphwright.passes import registry

    kind = registry.get(name)
    types = field_types(kind)
    text = inspect.getdoc(kind) or ""
    return {
        "name": name,
        "summary": text.splitlines()[0].replace("``", "") if text else "",
        "contract": _contract(kind),
        "needs": list(kind.needs),
        "after": list(kind.after),
        "before": list(kind.before),
        "not_after": dict(kind.not_after),
        "respects": sorted(kind.respects),
        "options": [
            {"name": item.name, "type": describe_type(types[item.name]), "default": _default(item)}
            for item in dataclasses.fields(kind)
            if item.init
        ],
        "text": text,
    }


def _contract(kind: Any) -> str:
    contract = kind.__dict__.get("contract", kind.contract)
    if isinstance(contract, property):
        return "depends on its options"
    return "exact, bit for bit" if getattr(contract, "bitwise", False) else str(contract.kind)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        default: Any = item.default
    elif item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    else:
        return "(required)"
    if isinstance(default, tuple) and default and all(hasattr(entry, "options") for entry in default):
        return ", ".join(entry.name for entry in default)
    return "none" if default is None else repr(default)


def _print_all(described: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from graphwright.frontends.cli.output import console

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("pass", no_wrap=True)
    table.add_column("contract", no_wrap=True)
    table.add_column("options")
    table.add_column("what it does")
    inherited = {"where", "ignore", "max_error"}
    for entry in described:
        own = [option["name"] for option in entry["options"] if option["name"] not in inherited]
        table.add_row(entry["name"], entry["contract"], ", ".join(own), entry["summary"])
    console().print(table)
    print("Every pass takes where, ignore and, if approximate, max_error. `graphwright passes NAME` shows one in full.")


def _print_one(entry: dict[str, Any]) -> None:
    print(f"{entry['name']} ({entry['contract']})\n")
    print(entry["text"].rstrip())
    print("\nOptions in a recipe:")
    width = max(len(option["name"]) for option in entry["options"])
    for option in entry["options"]:
        print(f"  {option['name'].ljust(width)}  {option['type']}; default {option['default']}")
    for key, label in (("needs", "Needs"), ("after", "Runs after"), ("before", "Runs before")):
        if entry[key]:
            print(f"{label}: {', '.join(entry[key])}")
    for name, reason in entry["not_after"].items():
        print(f"Not after {name}: {reason}")
