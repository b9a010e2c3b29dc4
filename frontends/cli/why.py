"""``graphwright why MODEL PASS``: what the pass would change, and why it leaves the rest alone."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from graphwright.frontends.cli.models import add_model_options

    parser.add_argument("model", metavar="MODEL", help="a saved Program or a Hugging Face folder")
    parser.add_argument("name", metavar="PASS", help="a pass name, see `graphwright passes`")
    parser.add_argument("--where", metavar="PATH", help="only places whose module path matches this glob or re:regex")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the pass, in TOML; repeatable"
    )
    parser.add_argument(
        "--after", action="append", default=[], metavar="PASS", help="run this pass first, unverified; repeatable"
    )
    parser.add_argument("--limit", type=int, default=20, help="reasons to show (default: 20; 0 for all)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from graphwright.frontends.cli.models import open_model
    from graphwright.frontends.options import read_pass
    from graphwright.passes import selection

    item = read_pass({"name": options.name, **_options(options.option)}, lambda key: f"option --option {key}")
    before = [read_pass({"name": name}, lambda key: "option --after") for name in options.after]
    selection.check(options.where, "--where")
    program, _ = open_model(options.model, options, quiet=options.json)
    for earlier in before:
        earlier(program)
    answer = explain(program, item, options.where)
    if options.json:
        import json

        print(json.dumps(answer, indent=2))
    else:
        _print(item.name, answer, options.limit)
    return 0


def explain(program: Any, item: Any, where: str | None) -> dict[str, Any]:
    """What the pass would rewrite, and its refusals with reasons, nearest misses first, as JSON values.

    Raises:
        SelectionError: ``where`` is malformed or selects nothing.
    """
    from graphwright.passes.pipeline import changed_nodes
    from graphwright.passes.selection import predicate

    chosen = predicate(program, where)
    names = {node.name for node in program.nodes if chosen(node)}
    refusals = [refusal for refusal in item.refusals(program) if refusal.node in names]
    trial = program.clone()
    changed = item(trial)
    notes = {key: value for key, value in trial.notes.items() if key != "refusals"}
    return {
        "pass": item.name,
        "changed": changed,
        "nodes_changed": changed_nodes(program.graph, trial.graph),
        "rewrites": notes.get("rewrites"),
        "refusals": [
            {"rule": r.rule, "node": r.node, "path": r.path, "reason": r.reason, "matched": r.depth} for r in refusals
        ],
    }


def _options(given: list[str]) -> dict[str, Any]:
    """``bits=4`` as a TOML value; text that is none of TOML's values stands for itself."""
    import sys

    from graphwright.ir.errors import InputError

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{text!r} is not NAME=VALUE", where="option --option")
        try:
            options[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[name.strip()] = value
    return options


def _print(name: str, answer: dict[str, Any], limit: int) -> None:
    count = answer["rewrites"]
    done = f"rewrites {count} places" if count is not None else f"changes {answer['nodes_changed']} nodes"
    print(f"{name} {done}" if answer["changed"] else f"{name} changes nothing")
    refusals = answer["refusals"]
    if not refusals:
        print("It refused nothing: no other place looks like what it rewrites.")
        return
    shown = refusals if limit <= 0 else refusals[:limit]
    print(f"It left {len(refusals)} places alone, nearest misses first:")
    for refusal in shown:
        path = f" in {refusal['path']}" if refusal["path"] else ""
        print(f"  {refusal['rule']}: %{refusal['node']}{path} ({refusal['matched']} operators matched)")
        print(f"      {refusal['reason']}")
    if len(shown) < len(refusals):
        print(f"  … and {len(refusals) - len(shown)} more (--limit 0 shows all)")
