"""Recipes: TOML to passes and back, and what is said of a mistyped one."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphwright as gw
from graphwright.frontends.recipes import Recipe, format_recipe, load_recipe, parse_recipe, save_recipe
from graphwright.frontends.toml import to_toml
from graphwright.ir.errors import InputError, RecipeError
from graphwright.ir.program import Program
from graphwright.passes import registry
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantization import QuantizeLinears
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.selection import Select
from graphwright.passes.verification import Verification

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Corner:
    x: int = 0
    y: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ShrinkThings(Pass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "shrink-things"
    contract: ClassVar[Contract] = Approximate()
    bits: Literal[2, 4, 8] = 8
    group: int | None = 128
    scale: float = 1.0
    label: str = ""
    asymmetric: bool = False
    ranges: tuple[int, ...] = ()
    per_layer: Mapping[str, int] = dataclasses.field(default_factory=dict)
    corner: Corner = Corner()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and self.group % 2:
            raise InputError(f"must be even, not {self.group}", where="shrink-things: group", hint="try 32")

    def run(self, program: Program) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class KeepThings(Pass):
    name: ClassVar[str] = "keep-things"

    def run(self, program: Program) -> bool:
        return False


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of the tests' own, so that these tests speak of recipes alone."""
    passes: dict[str, type[Pass]] = {"shrink-things": ShrinkThings, "keep-things": KeepThings}
    original = registry.get
    monkeypatch.setattr(registry, "get", lambda name: passes[name] if name in passes else original(name))
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda: sorted([*names(), *passes]))


def test_a_recipe() -> None:
    recipe = parse_recipe("""
        target = "reference"
        [verification]
        fresh = 3
        [[pass]]
        name = "keep-things"
        [[pass]]
        name = "shrink-things"
        bits = 4
        group = "none"
        scale = 2
        where = ["encoder.*", { op = "aten.linear", shape = ["none", 8] }]
        ranges = [1, 2]
        per_layer = { "layer.0" = 8 }
        corner = { x = 1 }
        max_error = 0.1
    """)
    assert recipe == Recipe(
        (
            KeepThings(),
            ShrinkThings(
                bits=4,
                group=None,
                scale=2.0,
                where=("encoder.*", Select(op="aten.linear", shape=(None, 8))),
                ranges=(1, 2),
                per_layer={"layer.0": 8},
                corner=Corner(1),
                max_error=0.1,
            ),
        ),
        "reference",
        Verification(fresh=3),
    )
    assert parse_recipe('verify = false\n[[pass]]\nname = "keep-things"') == Recipe((KeepThings(),), None, False)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe((KeepThings(),)),
        Recipe(
            (ShrinkThings(bits=2, group=None, label='a "b"\n\\c', where="re:.*\\.q"), KeepThings()), "reference", False
        ),
        Recipe((ShrinkThings(scale=1e-9, asymmetric=True, ignore=("a", Select(path="b", shape=(None, 3)))),)),
        Recipe((ShrinkThings(per_layer={"a.b": 1, "c": 2}, corner=Corner(3, 0.5)),), verify=Verification(0, False, 7)),
        Recipe((Pipeline(passes=(KeepThings(), ShrinkThings(bits=4)), fixed_point=True), KeepThings())),
    ],
)
def test_what_is_saved_is_loaded_again(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    save_recipe(recipe, file)
    assert load_recipe(file) == recipe
    assert os.listdir(tmp_path) == ["r.toml"]


def test_a_pipeline_is_saved_as_its_passes() -> None:
    text = format_recipe(Pipeline(passes=(KeepThings(), ShrinkThings(bits=4))))
    assert text == '[[pass]]\nname = "keep-things"\n\n[[pass]]\nname = "shrink-things"\nbits = 4\n'
    assert parse_recipe(text).passes == (KeepThings(), ShrinkThings(bits=4))


def test_every_pass_of_ours_round_trips() -> None:
    for name in registry.BUILT_IN:
        passes = (registry.get(name)(),)
        assert parse_recipe(format_recipe(passes)).passes == passes


GOOD = '[[pass]]\nname = "keep-things"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[pass]\n", ["not valid TOML", "line 1"]),
        ("", ["lists no pass", "[[pass]]"]),
        ("pass = 3", ["written as [[pass]]", "line 1"]),
        (GOOD + "[[passes]]\nname = 'x'", ["unknown key 'passes'", "line 3", "did you mean 'pass'?"]),
        (GOOD + "[[pass]]\nbits = 4", ["has no name", "line 3", "pass 2", "keep-things"]),
        (GOOD + "[[pass]]\nname = 4", ["is a string", "line 4"]),
        (
            GOOD + "[[pass]]\nname = 'shrink-thing'",
            ["no pass 'shrink-thing'", "line 4", "did you mean 'shrink-things'?"],
        ),
        (GOOD + "[[pass]]\nname = 'shrink-things'\n\nbit = 4", ["no option 'bit'", "line 6", "did you mean 'bits'?"]),
        (GOOD + "[[pass]]\nname = 'shrink-things'\nbits = 3", ["'bits' must be 2 or 4 or 8, not 3", "line 5"]),
        ("[[pass]]\nname = 'shrink-things'\nbits = '4'", ["'bits' must be 2 or 4 or 8, not '4'", "line 3"]),
        ("[[pass]]\nname = 'shrink-things'\ngroup = 1.5", ["'group' must be an integer or \"none\", not 1.5"]),
        ("[[pass]]\nname = 'shrink-things'\ngroup = true", ["'group' must be an integer", "True"]),
        ("[[pass]]\nname = 'shrink-things'\ngroup = 33", ["must be even, not 33", "line 3", "try 32"]),
        ("[[pass]]\nname = 'shrink-things'\nasymmetric = 1", ["'asymmetric' must be true or false, not 1"]),
        ("[[pass]]\nname = 'shrink-things'\nranges = [1, 'a']", ["'ranges' must be a list, not 'a'"]),
        ("[[pass]]\nname = 'shrink-things'\nwhere = 3", ["'where' must be a glob", "not 3"]),
        ("[[pass]]\nname = 'shrink-things'\nwhere = 're:('", ["not a regular expression", "line 3"]),
        (
            "[[pass]]\nname = 'shrink-things'\nwhere = { pth = 'a' }",
            ["no property 'pth'", "mean 'path'?", "line 3"],
        ),
        ("[[pass]]\nname = 'shrink-things'\ncorner = { z = 1 }", ["no option 'z'", "line 3"]),
        ("[[pass]]\nname = 'keep-things'\nmax_error = 0.1", ["max_error", "line 3"]),
        ("target = 3\n" + GOOD, ["must be a string", "line 1"]),
        ("verify = 'no'\n" + GOOD, ["must be true or false", "line 1"]),
        ("[verification]\nfrsh = 1\n" + GOOD, ["no option 'frsh'", "line 2", "did you mean 'fresh'?"]),
        ("[verification]\nfresh = -1\n" + GOOD, ["must be 0 or more"]),
        ("verify = false\n[verification]\nfresh = 1\n" + GOOD, ["switched off and set up"]),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    for word in [*words, str(file)]:
        assert word in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.toml")
    with pytest.raises(RecipeError, match="cannot be written"):
        save_recipe([KeepThings()], tmp_path / "nowhere" / "r.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match="cannot be written"):
        save_recipe([KeepThings()], tmp_path / "folder.toml")
    assert sorted(os.listdir(tmp_path)) == ["binary.toml", "folder.toml"]


def test_functions_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    passes: Any = [ShrinkThings(where=lambda node: True)]
    with pytest.raises(RecipeError, match="shrink-things: where") as caught:
        save_recipe(passes, file)
    assert "glob" in str(caught.value)
    assert not file.exists()


_PLAIN = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text())
_VALUES = st.recursive(
    _PLAIN, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(min_size=1), inner)), max_leaves=8
)


@given(_VALUES)
def test_any_value_is_written_so_that_it_reads_back(value: Any) -> None:
    assert tomllib.loads(f"value = {to_toml(value, 'here')}")["value"] == value


# -- rounding methods and calibration data ----------------------------------------------------------------------------


QUANTIZE = '[[pass]]\nname = "quantize-linears"\nbits = 4\n'


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('"gptq"', "gptq"),
        ('{ method = "gptq" }', Gptq()),
        ('{ method = "gptq", damping = 0.1 }', Gptq(damping=0.1)),
        ('{ damping = 1, method = "gptq" }', Gptq(damping=1.0)),
    ],
)
def test_rounding_methods(written: str, expected: object, tmp_path: Path) -> None:
    text = f"{QUANTIZE}rounding = {written}\n"
    (item,) = parse_recipe(text, calibration=[{}]).passes
    assert isinstance(item, QuantizeLinears)
    assert item.rounding == expected
    save_recipe([item], tmp_path / "r.toml")
    again = load_recipe(tmp_path / "r.toml", calibration=[{}])
    assert again.passes == (item,)
    assert isinstance(again.passes[0], QuantizeLinears)
    assert again.passes[0].rounding == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('"gptp"', r"not 'gptp' \(at quantize-linears: rounding\) \(at recipe, line 4"),
        ('{ method = "gptp" }', "'gptp'.*line 4, pass 1.*\n.*did you mean 'gptq'"),
        ("{ damping = 0.1 }", "has no 'method'.*line 4, pass 1"),
        ('{ method = "gptq", dampnig = 0.1 }', "'gptq' has no option 'dampnig'.*line 4, pass 1.*\n.*'damping'"),
        ('{ method = "gptq", damping = "much" }', "'damping' must be a number, not 'much'.*line 4"),
        ('{ method = "gptq", damping = -1 }', "must be above 0.*line 4, pass 1"),
        ("3", "'rounding' must be"),
    ],
)
def test_rounding_methods_that_are_none(written: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"{QUANTIZE}rounding = {written}\n", calibration=[{}])


def test_options_of_rounding_methods_in_reports() -> None:
    assert QuantizeLinears(rounding=Gptq(), calibration=[{}]).options()["rounding"] == {"method": "gptq"}
    found = QuantizeLinears(rounding=Gptq(damping=0.5), calibration=[{}]).options()
    assert found["rounding"] == {"method": "gptq", "damping": 0.5}
    assert found["calibration"] == "1 batches"


def test_calibration_data_is_given_when_a_recipe_is_read(tmp_path: Path) -> None:
    """Also to passes inside others; what they make of it stays the same, and without it the recipe is refused."""
    inner = Pipeline(passes=(QuantizeLinears(bits=4, calibration=[{}]),), fixed_point=True)
    save_recipe([KeepThings(), inner], tmp_path / "r.toml")
    assert "calibration = true" in (tmp_path / "r.toml").read_text()
    data = [{"x": 1}]
    recipe = load_recipe(tmp_path / "r.toml", calibration=data)
    assert recipe.passes == (KeepThings(), inner)
    assert isinstance(recipe.passes[1], Pipeline)
    (item,) = recipe.passes[1].passes
    assert isinstance(item, QuantizeLinears)
    assert list(item.calibration or ()) == data
    with pytest.raises(RecipeError, match=r"made with calibration data \(at .*r.toml, line 1\)\n.*--calibration FILE"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        (QUANTIZE + 'rounding = "gptq"', None, "needs calibration data.*line 4, pass 1.*\n.*--calibration FILE"),
        (QUANTIZE + 'calibration = "text.txt"', None, "no part of a recipe.*line 4, pass 1"),
        (QUANTIZE + 'calibration = ["a"]', [{}], "no part of a recipe.*line 4, pass 1"),
        ('calibration = "text.txt"\n' + QUANTIZE, None, "no part of a recipe.*line 1"),
        ('[[pass]]\nname = "keep-things"', [{}], "no pass of the recipe can use"),
        (QUANTIZE, "text", "must be batches, not a str"),
    ],
)
def test_calibration_data_that_is_missing_or_misplaced(text: str, data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, calibration=data)


def test_kinds_of_adapters_are_tables() -> None:
    passes = (gw.InsertAdapters(gw.KronA((4, 2), scale=2.0), where="*.q"), gw.InsertAdapters("lora"))
    text = format_recipe(passes)
    assert 'adapter = { kind = "krona", a = [4, 2], scale = 2.0 }' in text
    assert parse_recipe(text).passes == passes
    wrong = '[[pass]]\nname = "insert-adapters"\nadapter = { kind = "lora", rnk = 4 }'
    with pytest.raises(gw.GraphwrightError, match="has no option 'rnk'"):
        parse_recipe(wrong)
