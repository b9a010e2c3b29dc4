"""The verifier accepts what is well formed and names everything that is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.ir.models import EVERYTHING, encoder_program, everything_tensors
from torch import nn

from graphwright.ir.errors import ProgramError
from graphwright.ir.memory import is_same_view, shared_memory
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType
from graphwright.ir.verifier import verify

ATEN = torch.ops.aten


@pytest.fixture
def program() -> Program:
    return parse(EVERYTHING, everything_tensors())


def refused(program: Program, *, types: bool = False) -> ProgramError:
    with pytest.raises(ProgramError, match="the program is malformed") as caught:
        verify(program, types=types)
    return caught.value


@pytest.mark.parametrize("types", [False, True])
def test_good_programs_pass_and_are_left_as_they_were(types: bool, program: Program) -> None:
    for good in (program, encoder_program()[1]):
        text, values = str(good), [node.meta["val"] for node in good.nodes if node.op != "output"]
        verify(good, types=types)
        assert str(good) == text
        assert [node.meta["val"] for node in good.nodes if node.op != "output"] == values


@pytest.mark.parametrize("name", ["minilm", "tinylm"])
def test_real_models_pass(name: str, request: pytest.FixtureRequest) -> None:
    verify(request.getfixturevalue(f"{name}_program"))


def test_inference_leaves_no_mark_on_the_programs_symbols(program: Program) -> None:
    before = (len(program.symbols.shape_env.guards), dict(program.symbols.shape_env.replacements))
    verify(program)
    assert (len(program.symbols.shape_env.guards), dict(program.symbols.shape_env.replacements)) == before


def _swap(program: Program) -> None:
    program.node("scaled").append(program.node("x"))


def _foreign(program: Program) -> None:
    other = parse(EVERYTHING)
    program.node("scaled")._input_nodes = {}
    program.node("scaled").args = (other.node("x"), program.node("scale"))


def _same_name(program: Program) -> None:
    program.node("kept").name = "line"


def _bad_name(program: Program) -> None:
    program.node("kept").name = "while"


def _no_output(program: Program) -> None:
    program.graph.erase_node(program.output)


def _nested_output(program: Program) -> None:
    program.output.args = ((program.node("split"), program.node("left"), program.node("logits")),)


def _list_output(program: Program) -> None:
    program.output.args = (program.node("logits"),)


def _short_output(program: Program) -> None:
    program.output.args = (program.output.args[0][:2],)


def _input(program: Program) -> None:
    program.node("scale").target = "factor"


def _condition(program: Program) -> None:
    program.symbols.conditions = ("batch < width",)


def _target(program: Program) -> None:
    program.node("kept").target = torch.relu


def _method(program: Program) -> None:
    node = program.node("kept")
    node.op, node.target = "call_method", "relu"


def _mutating(program: Program) -> None:
    program.node("scaled").target = ATEN.mul_.Tensor


def _too_many(program: Program) -> None:
    program.node("x").args = (*program.node("x").args, -1, False, False, 3)


def _unknown(program: Program) -> None:
    program.node("x").kwargs = {"weights": 1}


def _missing(program: Program) -> None:
    program.node("x").args = program.node("x").args[:1]


def _twice(program: Program) -> None:
    program.node("x").kwargs = {"weight": program.node("w")}


def _kind(program: Program) -> None:
    program.node("clamped").args = (program.node("shifted"), "low", 1.0)


def _node_kind(program: Program) -> None:
    program.node("twice").args = ([program.node("double"), program.node("split")],)


def _size_kind(program: Program) -> None:
    program.node("positions").args = (program.node("kept"),)


def _default(program: Program) -> None:
    program.node("line").args = (*program.node("line").args, None)


def _default_keyword(program: Program) -> None:
    program.node("shifted").kwargs = {"alpha": 1}


def _keyword(program: Program) -> None:
    node = program.node("line")
    node.args, node.kwargs = node.args[:1], {"weight": node.args[1]}


def _tags(program: Program) -> None:
    program.node("kept").meta["tags"] = {"quantized"}


def _path(program: Program) -> None:
    program.node("kept").meta["path"] = ("encoder", 0)


def _untyped(program: Program) -> None:
    del program.node("kept").meta["val"]


def _no_weight(program: Program) -> None:
    program.node("f").target = "gone"


def _two_readers(program: Program) -> None:
    with program.graph.inserting_before(program.node("ids")):
        node = program.graph.get_attr("frozen")
    node.meta["val"] = program.node("f").meta["val"]


def _unused(program: Program) -> None:
    program.set_tensor("spare.weight", torch.ones(3))


def _alias(program: Program) -> None:
    program.aliases["other"] = "nothing"


def _alias_of_itself(program: Program) -> None:
    program.aliases["mask"] = "embed.weight"


def _retyped(program: Program) -> None:
    program.set_tensor("state", torch.ones(5))


def _untied(program: Program) -> None:
    program.set_tensor("state", program.tensor("frozen").detach())
    program.node("t").meta["val"] = program.node("f").meta["val"]


def _one_parameter_twice(program: Program) -> None:
    program.set_tensor("spare", program.tensor("embed.weight"))


@pytest.mark.parametrize(
    ("damage", "says", "where"),
    [
        (_swap, "it reads %x, which is not computed before it", "%scaled in odd path #1"),
        (_foreign, "it reads %x, which is not in the graph", "%scaled in odd path #1"),
        (_same_name, "two nodes are named 'line'", "%line"),
        (_bad_name, "'while' cannot be a name", "%while"),
        (_no_output, "there must be exactly one output, at the end", None),
        (_nested_output, "the output split is not a single value", "%output"),
        (_list_output, "the output must return one flat tuple", "%output"),
        (_short_output, "the signature has 3 outputs, not 2", "%output"),
        (_input, "the inputs are ('ids', 'factor'), the signature has ('ids', 'scale')", None),
        (_condition, "the condition 'batch < width' speaks of 'width', which no input has", None),
        (_target, "cannot stand in a Program", "%kept"),
        (_method, "a call_method node has no place in a Program", "%kept"),
        (_mutating, "aten::mul_ writes into its operands", "%scaled in odd path #1"),
        (_too_many, "aten::embedding takes 5 positional operands, here are 6", "%x in embed"),
        (_unknown, "aten::embedding has no operand 'weights'", "%x in embed"),
        (_missing, "aten::embedding needs the operand 'indices'", "%x in embed"),
        (_twice, "the operand 'weight' is given twice", "%x in embed"),
        (_kind, "'min' takes number or None, not 'low'", "%clamped"),
        (_node_kind, "'tensors' takes a list of (Tensor), not [double, split]", "%twice"),
        (_size_kind, "'end' takes number, not %kept, which is FakeTensor", "%positions"),
        (_default, "it is not in the canonical spelling", "%line in inner.linear"),
        (_default_keyword, "it is not in the canonical spelling", "%shifted"),
        (_keyword, "it is not in the canonical spelling", "%line in inner.linear"),
        (_tags, "its tags are not a frozenset", "%kept"),
        (_path, "its path is not a string", "%kept"),
        (_untyped, "it has no type", "%kept"),
        (_no_weight, "there is no weight 'gone'", "%f in inner"),
        (_two_readers, "the weight 'frozen' has two get_attr nodes", "%frozen"),
        (_unused, "nothing reads the weight 'spare.weight'", None),
        (_alias, "the tied name 'other' stands for 'nothing', which does not exist", None),
        (_alias_of_itself, "the tied name 'mask' is also the name of a weight", None),
        (_retyped, "its recorded type is f32[4], the weight 'state' is f32[5]", "%t"),
        (_untied, "the weights 'frozen' and 'state' are one tensor; keep one and make the other an alias", None),
        (_one_parameter_twice, "nothing reads the weight 'spare'", None),
    ],
)
def test_every_kind_of_damage_is_found_without_inference(
    damage: Callable[[Program], None], says: str, where: str | None, program: Program
) -> None:
    damage(program)
    error = refused(program)
    assert says in str(error)
    assert where is None or where in str(error)


def test_one_tensor_under_two_names_is_found_though_torch_hides_it(program: Program) -> None:
    _one_parameter_twice(program)
    assert "'embed.weight' and 'spare' are one tensor" in str(refused(program))


def test_the_error_shows_the_lines_around_and_the_other_problems(program: Program) -> None:
    program.node("line").meta["tags"] = ["a"]
    program.node("kept").args = (program.node("b"), program.node("line"), "nan")
    error = refused(program)
    assert error.where == "%line in inner.linear"
    assert error.hint == "change programs only inside program.edit()"
    shown = "\n".join(error.context)
    assert "> %line = aten.linear(%clamped, %f) : f32[batch, sequence, 4]" in shown
    assert "    %clamped = aten.clamp" in shown
    assert "also: 'other' takes number, not 'nan' (at %kept)" in shown
    assert '> %kept = aten.where.ScalarOther(%b, %line, "nan")' in shown


def test_a_flood_of_problems_is_cut(program: Program) -> None:
    for node in program.nodes:
        node.meta["tags"] = []
    assert "and 14 more" in refused(program).context[-1]


# -- types -------------------------------------------------------------------------------------------------------------


def fake(program: Program, kind: TensorType) -> torch.Tensor:
    return program.symbols.fake(kind)


def test_a_recorded_type_that_is_not_the_computed_one(program: Program) -> None:
    program.node("line").meta["val"] = fake(program, TensorType(torch.float32, ("batch", "sequence", 5)))
    verify(program, types=False)
    error = refused(program, types=True)
    assert "its recorded type is f32[batch, sequence, 5], it computes f32[batch, sequence, 4]" in error.what
    assert error.where == "%line in inner.linear"
    assert not any("also" in line for line in error.context), "what follows from it is not another problem"


def test_operands_an_operator_does_not_take(program: Program) -> None:
    program.node("line").args = (program.node("clamped"), program.node("w"))
    assert (
        "its recorded type is f32[batch, sequence, 4], it computes f32[batch, sequence, 11]"
        in refused(program, types=True).what
    )
    program.node("line").args = (program.node("clamped"), program.node("t"))
    assert "it computes f32[batch, sequence]" in refused(program, types=True).what
    program.node("line").args = (program.node("clamped"), program.node("ids"))
    assert "does not accept these operands" in refused(program, types=True).what


def test_two_dimensions_that_are_only_equal_by_chance() -> None:
    program = parse(
        """program P(a: 1.., b: 1..) {
          %x = input "x" : f32[a, 4]
          %y = input "y" : f32[b, 4]
          %z = aten.relu(%x)
          return %z
        }"""
    )
    with program.edit() as rewriter:
        program.node("z").args = (program.node("y"),)
        rewriter.changed = True
    assert "its recorded type is f32[a, 4], it computes f32[b, 4]" in refused(program, types=True).what


def test_a_view_that_new_strides_forbid() -> None:
    program = parse(
        """program P(n: 1..) {
          %x = input "x" : f32[n, 4, 6]
          %y = aten.relu(%x) : f32[n, 4, 6]
          %z = aten.view(%y, [-1, 24]) : f32[n, 24]
          return %z
        }"""
    )
    turned = program.graph
    with turned.inserting_before(program.node("y")):
        a = turned.call_function(ATEN.transpose.int, (program.node("x"), 1, 2))
        b = turned.call_function(ATEN.clone.default, (a,), {"memory_format": torch.contiguous_format})
        c = turned.call_function(ATEN.transpose.int, (b, 1, 2))
    for node in (a, b, c):
        program.symbols.infer(node, program.tensor)
    program.node("y").args = (c,)
    verify(program, types=False)
    assert "does not accept these operands" in refused(program, types=True).what


def test_an_input_that_is_no_tensor(program: Program) -> None:
    program.node("scale").meta["val"] = 3
    assert "an input must be a tensor, its recorded type is int(3)" in refused(program, types=True).what


# -- memory ------------------------------------------------------------------------------------------------------------


def test_overlapping_views_are_reported_in_full_mode_only(program: Program) -> None:
    base = torch.arange(8.0)
    program.set_tensor("state", base[:4])
    program.set_tensor("frozen", nn.Parameter(base.as_strided((4, 4), (1, 1)), requires_grad=False))
    verify(program, types=False)
    assert "the weights 'state' and 'frozen' are views that share memory" in str(refused(program, types=True))


def test_shared_memory_is_exact() -> None:
    base = torch.arange(64.0).view(8, 8)
    assert shared_memory({"a": base[:4], "b": base[4:]}) == []
    assert shared_memory({"a": base[:, :4], "b": base[:, 4:]}) == [], "interleaved, not shared"
    assert shared_memory({"a": base[:, :5], "b": base[:, 4:]}) == [("a", "b")]
    assert shared_memory({"a": base[:5], "b": base[4:]}) == [("a", "b")]
    assert shared_memory({"a": base, "b": base[2], "c": base[3]}) == [("a", "b"), ("a", "c")]
    assert shared_memory({"a": base, "b": base.view(torch.int32)[7:]}) == [("a", "b")]
    assert shared_memory({"a": base[0, ::2], "b": base[0, 1::2]}) == []
    halves = torch.zeros(8, dtype=torch.bfloat16)
    assert shared_memory({"a": halves[::2], "b": halves[1::2]}) == []
    assert shared_memory({"a": halves[::2], "b": halves[2:5:2]}) == [("a", "b")]
    wide = torch.zeros(4, 4, dtype=torch.complex128)
    assert shared_memory({"a": wide.t(), "b": wide[1]}) == [("a", "b")]
    empty = torch.empty(0)
    meta = torch.empty(3, device="meta")
    assert shared_memory({"a": empty, "b": empty.view(0, 2), "c": meta, "d": meta.view(3, 1)}) == []


def test_same_view() -> None:
    base = torch.arange(6.0)
    assert is_same_view(base, base.view(6))
    assert not is_same_view(base, base.view(2, 3))
    assert not is_same_view(base, base[1:])
    assert not is_same_view(base, base.view(torch.int32))
    assert not is_same_view(base.view(2, 3), base.view(3, 2).t())
