"""Passes by name: explicit, lazy, open to other packages, and helpful about typos."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import ClassVar

import pytest

import graphwright as gw
from graphwright.passes import registry


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_built_in_pass_loads_and_documents_itself(name: str) -> None:
    kind = registry.get(name)
    assert kind.name == name
    assert kind.__doc__
    assert registry.create(name, {}) == kind()


def test_typos_are_met_with_the_nearest_name() -> None:
    with pytest.raises(gw.InputError, match="did you mean 'quantize-linears'"):
        registry.get("quantise-linears")
    with pytest.raises(gw.InputError, match="did you mean 'group_size'"):
        registry.create("quantize-linears", {"groupsize": 32})


@dataclass(frozen=True, kw_only=True)
class Foreign(gw.Pass):
    """A pass of another package."""

    name: ClassVar[str] = "foreign"

    def run(self, program: gw.Program) -> bool:
        return False


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINT_GROUP)


def test_third_party_passes_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [entry("foreign", f"{__name__}:Foreign")]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.ENTRY_POINT_GROUP else [])
    assert registry.get("foreign") is Foreign
    assert "foreign" in registry.names()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("foreign", "no_such_module:Foreign", "cannot be loaded"),
        ("foreign", "builtins:int", "is not a pass of that name"),
        ("cleanup", f"{__name__}:Foreign", "which graphwright already has"),
    ],
)
def test_broken_entry_points_name_the_package(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry(name, value)])
    with pytest.raises(gw.InputError, match=message):
        registry.get(name if name != "cleanup" else "anything")


def test_a_pass_name_is_kebab_case() -> None:
    with pytest.raises(gw.InputError, match="kebab-case"):
        type("Bad", (gw.Pass,), {"name": "Not_Kebab", "run": lambda self, program: False})
