"""Patterns: what matches, what is bound, why it does not, and rules applied all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from graphwright.ir.errors import TypeMismatch
from graphwright.ir.names import op_name
from graphwright.ir.parser import parse
from graphwright.ir.pattern import (
    Match,
    Matcher,
    Outcome,
    Rule,
    any_,
    apply_rules,
    const,
    either,
    match_at,
    maybe,
    op,
    weight,
    where,
)
from graphwright.ir.program import Program
from graphwright.ir.provenance import add_tags, path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.text import print_program
from graphwright.ir.verifier import verify


def program_of(body: str, result: str = "%y") -> Program:
    """A program over x and z, both f32[n, 4], and a weight w."""
    return parse(
        f"""program P(n: 1..) {{
          %w = weight "layer.w" : f32[4]
          %x = input "x" : f32[n, 4]
          %z = input "z" : f32[n, 4]
          {body}
          return {result}, %w
        }}""",
        {"layer.w": torch.ones(4)},
    )


def matched(pattern: Matcher, program: Program, at: str = "y") -> Match:
    found = match_at(program, pattern, program.node(at))
    assert isinstance(found, Match), found
    return found


def missed(pattern: Matcher, program: Program, at: str = "y") -> tuple[int, str]:
    found = match_at(program, pattern, program.node(at))
    assert not isinstance(found, Match)
    return found


def test_nodes_constants_and_weights_are_bound_by_name() -> None:
    program = program_of("%a = aten.mul.Tensor(%x, %w)\n%y = aten.add.Tensor(%a, 3, alpha=2)")
    pattern = op(
        "aten.add.Tensor", op("aten.mul.Tensor", any_("x"), weight("w"), name="product"), const("c"), alpha=const("k")
    )
    found = matched(pattern, program)
    assert found.root is program.node("y")
    assert found.node("x") is program.node("x")
    assert found.node("w") is program.node("w")
    assert found.node("product") is program.node("a")
    assert (found["c"], found["k"]) == (3, 2)
    assert found.get("missing", 7) == 7
    assert found.inner == [program.node("a"), program.node("y")]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (op("aten.mul.Tensor", any_(), any_()), "%y = aten.add.Tensor stands where aten.mul.Tensor is needed"),
        (op(("aten.sub.Tensor", "aten.mul.Tensor")), "stands where aten.sub.Tensor or aten.mul.Tensor is needed"),
        (op("aten.add.Tensor", weight(), any_()), "%x is not a weight"),
        (op("aten.add.Tensor", any_(), any_()), "2 stands where a computed value is needed"),
        (op("aten.add.Tensor", any_(), const("c", str)), "2 stands where the constant c is needed"),
        (op("aten.add.Tensor", const("c"), any_()), "%x stands where the constant c is needed"),
        (op("aten.add.Tensor", any_(), 3), "the constant is 2, not 3"),
        (op("aten.add.Tensor", 3, any_()), "%x stands where the constant 3 is needed"),
        (op("aten.add.Tensor", any_(), 2, alpha=2), "the constant is 1, not 2"),
        (op("aten.add.Tensor", any_("same"), const("same")), "two places for 'same' hold different values"),
        (op("aten.add.Tensor", any_(), any_(), any_(), any_()), "%y has 3 operands, not 4"),
        (where(op("aten.add.Tensor"), lambda node: False, "it is too late"), "it is too late"),
        (op("aten.add.Tensor", where(any_(), lambda node: False, "not this one"), 2), "not this one"),
    ],
)
def test_a_miss_says_why(pattern: Matcher, reason: str) -> None:
    assert reason in missed(pattern, program_of("%y = aten.add.Tensor(%x, 2)"))[1]


def test_the_deepest_miss_is_told() -> None:
    program = program_of("%a = aten.mul.Tensor(%x, %z)\n%b = aten.tanh(%a)\n%y = aten.add.Tensor(%b, %x)")
    pattern = op(
        "aten.add.Tensor", op("aten.tanh", op("aten.mul.Tensor", any_("x"), any_("x"))), any_(), commutative=True
    )
    assert missed(pattern, program) == (3, "two places for 'x' hold different values")


@pytest.mark.parametrize(
    ("written", "value", "same"),
    [
        (0.5, "0.5", True),
        (0.5, "0.50000001", True),
        (0.5, "0.5001", False),
        (2, "2.0", True),
        (2.0, "2", True),
        (1, "True", False),
        (True, "1", False),
        (True, "True", True),
        (float("inf"), "inf", True),
        (float("-inf"), "inf", False),
        (float("-inf"), "-10000.0", False),
        (1.0, "inf", False),
        (1.0, "nan", False),
        (0.0, "1e-30", False),
        (1e-12, "1e-12", True),
        (1e-12, "2e-12", False),
    ],
)
def test_constants_match_by_value(written: Any, value: str, same: bool) -> None:
    program = program_of(f"%y = aten.add.Tensor(%x, {value})")
    assert isinstance(match_at(program, op("aten.add.Tensor", any_(), written), program.node("y")), Match) is same


def test_lists_and_none_and_dtypes_match() -> None:
    program = program_of("%a = aten.to.dtype(%x, f64)\n%y = aten.sum.dim_IntList(%a, [-1], True)")
    matched(op("aten.sum.dim_IntList", op("aten.to.dtype", any_(), torch.float64), [-1], True), program)
    matched(op("aten.sum.dim_IntList", any_(), (-1,), keepdim=True, dtype=None), program)
    assert "the constant is [-1], not [1]" in missed(op("aten.sum.dim_IntList", any_(), [1]), program)[1]


def test_bool_constants_are_not_numbers() -> None:
    program = program_of("%y = aten.sum.dim_IntList(%x, [1], True)")
    assert missed(op("aten.sum.dim_IntList", any_(), any_(), const("k")), program)
    assert matched(op("aten.sum.dim_IntList", any_(), [1], const("k", bool)), program)["k"] is True


def test_one_matcher_in_two_places_is_one_node() -> None:
    shared = op("aten.tanh", any_("x"))
    pattern = op("aten.mul.Tensor", shared, op("aten.neg", shared))
    once = program_of("%t = aten.tanh(%x)\n%n = aten.neg(%t)\n%y = aten.mul.Tensor(%t, %n)")
    assert matched(pattern, once).inner == [once.node(name) for name in ("t", "n", "y")]
    twice = program_of("%t = aten.tanh(%x)\n%u = aten.tanh(%x)\n%n = aten.neg(%u)\n%y = aten.mul.Tensor(%t, %n)")
    assert missed(pattern, twice)[1] == "%u is not %t, which it should be"


@pytest.mark.parametrize("swapped", [False, True])
def test_commutative_operands(swapped: bool) -> None:
    operands = "%x, %w" if swapped else "%w, %x"
    program = program_of(f"%y = aten.mul.Tensor({operands})")
    assert matched(op("aten.mul.Tensor", weight("w"), any_("x"), commutative=True), program).node("x").name == "x"
    plain = match_at(program, op("aten.mul.Tensor", weight("w"), any_("x")), program.node("y"))
    assert isinstance(plain, Match) is not swapped


def test_an_order_that_fits_inside_but_not_outside_is_given_up() -> None:
    """The inner product matches in its first order; only the second one agrees with the outer operand."""
    program = program_of("%a = aten.mul.Tensor(%x, %z)\n%y = aten.sub.Tensor(%a, %x)")
    pattern = op("aten.sub.Tensor", op("aten.mul.Tensor", any_("p"), any_("q"), commutative=True), any_("q"))
    found = matched(pattern, program)
    assert (found.node("p").name, found.node("q").name) == ("z", "x")
    assert found.inner == [program.node("a"), program.node("y")]


def test_a_choice_that_fits_inside_but_not_outside_is_given_up() -> None:
    program = program_of("%a = aten.neg(%x)\n%y = aten.mul.Tensor(%a, %x)")
    pattern = op("aten.mul.Tensor", either(any_("v"), op("aten.neg", any_("v"))), any_("v"))
    found = matched(pattern, program)
    assert found.node("v").name == "x"
    assert [node.name for node in found.inner] == ["a", "y"]


def test_nothing_is_left_bound_by_what_did_not_match() -> None:
    program = program_of("%a = aten.mul.Tensor(%x, 2)\n%y = aten.add.Tensor(%a, %z)")
    pattern = op(
        "aten.add.Tensor",
        either(op("aten.mul.Tensor", any_("left"), 3), op("aten.mul.Tensor", any_("right"), 2)),
        any_(),
    )
    assert set(matched(pattern, program).bound) == {"right"}


def test_optional_casts() -> None:
    pattern = op("aten.neg", maybe("aten.to.dtype", any_("x")))
    cast = program_of("%c = aten.to.dtype(%x, f64)\n%y = aten.neg(%c)")
    assert matched(pattern, cast).node("x").name == "x"
    assert matched(pattern, program_of("%y = aten.neg(%x)")).node("x").name == "x"


def test_named_operands_are_compared_with_their_defaults() -> None:
    program = program_of("%y = aten.gelu(%x)")
    matched(op("aten.gelu", any_(), approximate="none"), program)
    assert "the constant is 'none', not 'tanh'" in missed(op("aten.gelu", any_(), approximate="tanh"), program)[1]


def test_values_that_escape() -> None:
    program = program_of("%a = aten.neg(%x)\n%y = aten.tanh(%a)\n%b = aten.exp(%a)", "%y, %b")
    assert matched(op("aten.tanh", op("aten.neg", any_())), program).escapes() is program.node("a")
    alone = program_of("%a = aten.neg(%x)\n%y = aten.tanh(%a)")
    assert matched(op("aten.tanh", op("aten.neg", any_())), alone).escapes() is None


def test_patterns_over_python_functions() -> None:
    program = parse(
        """program P(n: 1..) {
          %x = input "x" : f32[n, 4]
          %s = aten.split.Tensor(%x, 2, 1)
          %y = py.getitem(%s, 1)
          return %y
        }"""
    )
    assert matched(op("py.getitem", op("aten.split.Tensor", any_("x"), 2), const("place")), program)["place"] == 1


# -- rules -------------------------------------------------------------------------------------------------------------


class NegateTwice(Rule):
    """neg(neg(x)) -> x"""

    name = "negate-twice"
    pattern = op("aten.neg", op("aten.neg", any_("x"), name="inner"))

    def check(self, match: Match) -> str | None:
        return "the first negation is used elsewhere" if match.escapes() is not None else None

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        return match.node("x")


class DoubleByAdding(Rule):
    """mul(x, 2) -> add(x, x)"""

    name = "double"
    pattern = op("aten.mul.Tensor", any_("x"), 2)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        return rewriter.call("aten.add.Tensor", match["x"], match["x"], like=match.root)


CHAIN = "%a = aten.neg(%x)\n%b = aten.neg(%a)\n%c = aten.mul.Tensor(%b, 2)\n%y = aten.tanh(%c)"


def test_rules_rewrite_everything_they_match() -> None:
    program = program_of(CHAIN)
    outcome = apply_rules(program, [NegateTwice(), DoubleByAdding()])
    assert (outcome.rewrites, outcome.changed, outcome.touched) == (2, True, ("b", "c"))
    assert [op_name(node) for node in program.nodes if node.op == "call_function"] == ["aten.add.Tensor", "aten.tanh"]
    assert program(torch.ones(2, 4), torch.ones(2, 4))[0].tolist() == torch.full((2, 4), 2.0).tanh().tolist()
    verify(program)
    again = apply_rules(program, [NegateTwice(), DoubleByAdding()])
    assert again == Outcome(0, ())
    assert not again.changed


def test_the_first_rule_that_matches_wins() -> None:
    class Other(DoubleByAdding):
        name = "other"

        def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
            return rewriter.call("aten.neg", match["x"], like=match.root)

    program = program_of(CHAIN)
    apply_rules(program, [Other(), DoubleByAdding()])
    assert "aten.add.Tensor" not in print_program(program)


def test_refusals_carry_their_reasons() -> None:
    program = program_of(f"{CHAIN}\n%d = aten.exp(%a)", "%y, %d")
    outcome = apply_rules(program, [NegateTwice()])
    (refusal,) = outcome.refusals
    assert (refusal.rule, refusal.node) == ("negate-twice", "b")
    assert str(refusal) == "negate-twice: %b: the first negation is used elsewhere"
    assert not outcome.changed


def test_near_misses_are_refusals_too() -> None:
    class Three(Rule):
        pattern = op("aten.tanh", op("aten.mul.Tensor", any_(), 3))

        def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
            raise AssertionError("does not match")

    program = program_of(CHAIN)
    (refusal,) = apply_rules(program, [Three()]).refusals
    assert (refusal.rule, refusal.node, refusal.reason, refusal.depth) == ("Three", "y", "the constant is 2, not 3", 2)
    assert apply_rules(program, [Three()], near_miss=3).refusals == ()


def test_selection_and_respected_tags() -> None:
    program = program_of(CHAIN)
    program.node("c").meta["path"] = "layer"
    add_tags(program.node("a"), ["adapter"])
    text = print_program(program)
    outcome = apply_rules(
        program, [NegateTwice(), DoubleByAdding()], lambda node: path_of(node) == "", respects=frozenset({"adapter"})
    )
    assert not outcome.changed
    assert [refusal.reason for refusal in outcome.refusals] == [
        "%a is tagged adapter, which this pass leaves alone",
        "not selected by where= / ignore=",
    ]
    assert print_program(program) == text


def test_several_patterns_of_one_rule() -> None:
    class Both(Rule):
        pattern = (op("aten.neg", any_("x")), op("aten.exp", any_("x")))

        def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
            return rewriter.call("aten.tanh", match["x"], like=match.root, tags=("bounded",))

    program = program_of("%a = aten.neg(%x)\n%y = aten.exp(%a)")
    assert apply_rules(program, [Both()]).rewrites == 2
    assert tags_of(program.node("tanh_1")) == {"bounded"}


def test_a_rule_that_fails_undoes_them_all() -> None:
    class Wrong(Rule):
        pattern = op("aten.tanh", any_("x"))

        def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
            return rewriter.call("aten.sum", match["x"], like=match.root)

    program = program_of(CHAIN)
    text = print_program(program)
    with pytest.raises(TypeMismatch, match=r"the replacement is f32\[\], the replaced value f32\[n, 4\]"):
        apply_rules(program, [NegateTwice(), Wrong()])
    assert print_program(program) == text


def test_a_rule_may_replace_by_itself() -> None:
    class Itself(Rule):
        pattern = op("aten.neg", any_("x"), name="node")

        def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
            rewriter.replace(match.node("node"), rewriter.call("aten.abs", match["x"], like=match.root))
            return None

    program = program_of("%y = aten.neg(%x)")
    assert apply_rules(program, [Itself()]).rewrites == 1
    assert nn.Module.__call__(program, torch.full((1, 4), -2.0), torch.ones(1, 4))[0].tolist() == [[2.0] * 4]
