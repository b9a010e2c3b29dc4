"""The rewriter: typed at once, in order, all or nothing, with a record of what stands for what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from graphwright.frontends.torch import trace
from graphwright.ir.errors import ProgramError, TypeMismatch
from graphwright.ir.names import op_name
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, source_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.text import print_program
from graphwright.ir.verifier import verify

TEXT = """\
program Net(n: 1..) {
  %w = weight "up.weight" : f32[8, 4]
  %x = input "x" : f32[n, 4]
  %late = weight "late.bias" : f32[8]
  %up = aten.linear(%x, %w, %late) : f32[n, 8]  @up #first "net.py:3"
  %act = aten.relu(%up) : f32[n, 8]  @act "net.py:4"
  %both = aten.add.Tensor(%act, %up) : f32[n, 8]  @sum
  return %both
}
"""


@pytest.fixture
def program() -> Program:
    generator = torch.Generator().manual_seed(0)
    return parse(
        TEXT, {"up.weight": torch.randn(8, 4, generator=generator), "late.bias": torch.randn(8, generator=generator)}
    )


def calls(program: Program) -> list[str]:
    return [node.name for node in program.nodes if node.op == "call_function"]


# -- making ------------------------------------------------------------------------------------------------------------


def test_a_call_is_typed_placed_and_knows_where_it_comes_from(program: Program) -> None:
    with program.edit() as rewriter:
        act = program.node("act")
        made = rewriter.call("aten.mul.Tensor", program.node("up"), 2.0, like=act, tags=("scaled",), name="doubled")
        assert str(program.type_of(made)) == "f32[n, 8]"
        assert (path_of(made), source_of(made), tags_of(made)) == ("act", "net.py:4", frozenset({"scaled"}))
        inherited = rewriter.call("aten.neg", made, like=program.node("up"))
        assert tags_of(inherited) == frozenset({"first"})
        rewriter.replace(act, inherited)
    assert calls(program) == ["up", "doubled", "neg", "both"]
    verify(program)


def test_calls_take_targets_names_and_the_canonical_spelling(program: Program) -> None:
    with program.edit() as rewriter:
        both = program.node("both")
        made = rewriter.call(
            torch.ops.aten.add.Tensor, self=program.node("act"), other=program.node("up"), alpha=1, like=both
        )
        assert made.args == (program.node("act"), program.node("up"))
        assert made.kwargs == {}
        norm = rewriter.call("graphwright.rms_norm", made, None, 1e-6, like=both)
        assert op_name(norm) == "graphwright.rms_norm"
        rewriter.replace(both, norm)
    verify(program)


def test_a_call_on_weights_and_inputs_comes_before_every_other(program: Program) -> None:
    with program.edit() as rewriter:
        first = rewriter.call("aten.neg", program.node("late"), like=program.node("act"))
        assert first < program.node("up"), "so that whatever reads it may stand anywhere"
        assert first > program.node("late")
        constant = rewriter.call("aten.full", [1], 2.0, like=program.node("act"))
        assert program.node("up") < constant < program.node("act")
        rewriter.erase(constant)
        rewriter.erase(first)
    verify(program)


def test_operands_that_do_not_fit_are_refused_and_leave_no_node(program: Program) -> None:
    with program.edit() as rewriter:
        with pytest.raises(TypeMismatch, match="aten.mm.default does not accept these operands") as caught:
            rewriter.call("aten.mm", program.node("x"), program.node("act"), like=program.node("act"))
        assert caught.value.context == ("%x : f32[n, 4]", "%act : f32[n, 8]")
        with pytest.raises(ProgramError, match="no operator is named 'aten.gelou'"):
            rewriter.call("aten.gelou", program.node("x"), like=program.node("act"))
    assert print_program(program) == TEXT


def test_weights_are_made_once_and_named_apart(program: Program) -> None:
    up = program.node("up")
    tensor, parameter = torch.ones(8), nn.Parameter(torch.ones(8, 4))
    with program.edit() as rewriter:
        scale = rewriter.weight("up.scale", tensor, like=up, tags=("quantized",))
        assert rewriter.weight("up.scale", tensor, like=up) is scale
        other = rewriter.weight("up.scale", torch.zeros(8), like=up)
        assert other.target == "up.scale_1"
        trained = rewriter.weight("up.weight", parameter, like=up)
        assert trained.target == "up.weight_1"
        assert tags_of(scale) == frozenset({"first", "quantized"})
        assert scale < program.node("x")
        made = rewriter.call("aten.linear", program.node("x"), trained, scale, like=up)
        rewriter.replace(program.node("both"), rewriter.call("aten.add.Tensor", made, other, like=up))
    assert dict(program.named_parameters()).keys() == {"up.weight_1"}
    assert dict(program.named_buffers()).keys() == {"up.scale", "up.scale_1"}
    assert program.tensor("up.weight_1") is parameter
    verify(program)


def test_a_tied_name_gives_the_node_of_its_weight(program: Program) -> None:
    program.aliases["down.weight"] = "up.weight"
    with program.edit() as rewriter:
        tensor = program.tensor("down.weight")
        assert rewriter.weight("down.weight", tensor, like=program.node("up")) is program.node("w")
        apart = rewriter.weight("down.weight", torch.ones(8, 4), like=program.node("up"))
        assert apart.target == "down.weight_1"
        rewriter.erase(apart)
    verify(program)


# -- changing ----------------------------------------------------------------------------------------------------------


def test_replacing_redirects_users_records_and_removes_what_is_dead(program: Program) -> None:
    with program.edit() as rewriter:
        made = rewriter.call("aten.sigmoid", program.node("up"), like=program.node("act"))
        rewriter.replace(program.node("act"), made)
        unequal = rewriter.call("aten.mul.Tensor", made, 1.5, like=program.node("both"))
        rewriter.replace(program.node("both"), unequal, equivalent=False)
        assert rewriter.changed
    assert calls(program) == ["up", "sigmoid", "mul"]
    assert program.replacements == {"act": "sigmoid"}
    verify(program)


def test_a_replacement_may_wrap_what_it_replaces(program: Program) -> None:
    with program.edit() as rewriter:
        act = program.node("act")
        rewriter.replace(act, rewriter.call("aten.neg", act, like=act))
    assert calls(program) == ["up", "act", "neg", "both"]
    assert program.node("both").args[0] is program.node("neg")
    verify(program)


def test_weights_nobody_reads_are_freed(program: Program) -> None:
    with program.edit() as rewriter:
        up = program.node("up")
        rewriter.replace(up, rewriter.call("aten.linear", program.node("x"), program.node("w"), like=up))
    assert list(program.tensors()) == ["up.weight"]
    assert "late" not in dict(program.body.named_children())
    verify(program)


def test_results_can_be_replaced_by_inputs_of_the_same_type() -> None:
    program = parse('program P() {\n %x = input "x" : f32[2]\n %y = aten.alias(%x)\n return %y\n}')
    with program.edit() as rewriter:
        rewriter.replace(program.node("y"), program.node("x"))
    assert program.output.args == ((program.node("x"),),)
    assert program(torch.ones(2)).tolist() == [1, 1]


def test_other_operands_for_a_node(program: Program) -> None:
    with program.edit() as rewriter:
        rewriter.set_arguments(program.node("both"), program.node("up"), program.node("up"), alpha=2)
        assert rewriter.changed
    assert calls(program) == ["up", "both"], "what lost its last user is gone"
    assert program.node("both").kwargs == {"alpha": 2}
    verify(program)


Misuse = Callable[[Rewriter, Program], object]


@pytest.mark.parametrize(
    ("misuse", "kind", "says"),
    [
        (lambda r, p: r.replace(p.node("act"), p.node("act")), ProgramError, "a node cannot replace itself"),
        (
            lambda r, p: r.replace(p.node("act"), p.node("x")),
            TypeMismatch,
            r"the replacement is f32\[n, 4\], the replaced value f32\[n, 8\] \(at %act in act\)",
        ),
        (
            lambda r, p: r.replace(p.node("up"), p.node("both")),
            ProgramError,
            r"%both is computed after %act, which needs it",
        ),
        (lambda r, p: r.erase(p.node("act")), ProgramError, "%act still has users: both"),
        (lambda r, p: r.erase(p.output), ProgramError, "the output cannot be removed"),
        (
            lambda r, p: r.set_arguments(p.node("act"), p.node("x")),
            TypeMismatch,
            r"the node would become f32\[n, 4\], it is f32\[n, 8\]",
        ),
        (lambda r, p: r.set_arguments(p.node("both"), p.node("x"), p.node("w")), TypeMismatch, "does not accept"),
        (lambda r, p: r.weight("up.weight.scale", torch.ones(1), like=p.node("up")), ProgramError, "inside a weight"),
    ],
)
def test_misuse_is_refused_and_leaves_everything_as_it_was(
    misuse: Misuse, kind: type[ProgramError], says: str, program: Program
) -> None:
    with program.edit() as rewriter, pytest.raises(kind, match=says):
        misuse(rewriter, program)
    assert print_program(program) == TEXT
    verify(program)
    with pytest.raises(kind, match=says), program.edit() as rewriter:
        misuse(rewriter, program)
    assert print_program(program) == TEXT
    verify(program)


# -- all or nothing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_everything_is_undone(error: type[BaseException], program: Program) -> None:
    program.replacements["earlier"] = "kept"
    tensors = program.tensors()

    def failing_edit() -> None:
        with program.edit() as rewriter:
            act = program.node("act")
            rewriter.replace(act, rewriter.call("aten.sigmoid", program.node("up"), like=act))
            rewriter.weight("up.more", torch.ones(3), like=act)
            program.aliases["a"] = "b"
            raise error

    with pytest.raises(error):
        failing_edit()
    assert print_program(program) == TEXT
    assert program.tensors() == tensors
    assert program.replacements == {"earlier": "kept"}
    assert program.aliases == {}
    assert program(torch.ones(1, 4)).shape == (1, 8)


def test_weights_come_back_in_their_order() -> None:
    """Buffers too: those of a module that holds nothing else, before those of one whose parameters come first."""
    linear = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3)).eval()
    program = trace(linear, torch.ones(2, 3))
    tensors = program.tensors()
    before = sorted(tensors, key=lambda name: (not isinstance(tensors[name], nn.Parameter), name))
    program.bind_tensors({name: tensors[name] for name in before}, modules=("0", "1"))
    assert list(program.tensors()) == before
    assert before[0] == "1.bias"
    assert before[2].startswith("0.")

    def edit() -> None:
        with program.edit() as rewriter:
            rewriter.weight("0.other", torch.ones(3), like=program.node("batch_norm"))
            raise KeyError

    with pytest.raises(KeyError):
        edit()
    assert list(program.tensors()) == before
    assert list(program.clone().tensors()) == before


def test_a_graph_broken_behind_the_rewriters_back_is_undone(program: Program) -> None:
    def disorder() -> None:
        with program.edit() as rewriter:
            program.node("act").append(program.node("up"))
            rewriter.changed = True

    with pytest.raises(ProgramError, match="the rewritten graph is not well formed"):
        disorder()
    assert print_program(program) == TEXT


def test_an_edit_that_cannot_be_compiled_is_undone(program: Program) -> None:
    def rename_the_input() -> None:
        with program.edit() as rewriter:
            program.node("x").target = "not a name"
            rewriter.changed = True

    with pytest.raises(SyntaxError):
        rename_the_input()
    assert print_program(program) == TEXT
    assert program(torch.ones(1, 4)).shape == (1, 8)


def test_an_edit_of_nothing_changes_nothing(program: Program) -> None:
    graph = program.graph
    with program.edit() as rewriter:
        pass
    assert not rewriter.changed
    assert program.graph is graph


def test_edits_nest(program: Program) -> None:
    with program.edit() as outer:
        act = program.node("act")
        outer.replace(act, outer.call("aten.sigmoid", program.node("up"), like=act))
        with contextlib.suppress(ValueError), program.edit() as inner:
            both = program.node("both")
            inner.replace(both, inner.call("aten.neg", both, like=both))
            raise ValueError("inner")
    assert calls(program) == ["up", "sigmoid", "both"]
    assert program.replacements == {"act": "sigmoid"}
    verify(program)


def test_the_new_program_runs_what_the_graph_says(program: Program) -> None:
    x = torch.randn(3, 4)
    up = nn.functional.linear(x, program.tensor("up.weight"), program.tensor("late.bias"))
    with program.edit() as rewriter:
        act = program.node("act")
        rewriter.replace(act, rewriter.call("aten.tanh", program.node("up"), like=act))
    torch.testing.assert_close(program(x), up.tanh() + up)


def test_new_names_never_collide(program: Program) -> None:
    names: list[str] = []
    with program.edit() as rewriter:
        node: fx.Node = program.node("act")
        for _ in range(5):
            node = rewriter.call("aten.neg", node, like=node, name="up")
            names.append(node.name)
        rewriter.replace(program.node("both"), node)
    assert len(set(names)) == 5
    assert "up" not in names
    restored = program.clone()
    with restored.edit() as rewriter:
        last = restored.node(names[-1])
        made = rewriter.call("aten.neg", last, like=last, name=names[0])
        rewriter.replace(last, made)
    verify(restored)


def test_values_of_other_shapes_are_put_in_where_that_is_said(program: Program) -> None:
    def lengthen(rewriter: Rewriter, *, retyped: bool) -> None:
        source = program.inputs[0]
        new = rewriter.call("aten.constant_pad_nd", source, [0, 0, 2, 0], like=program.output)
        rewriter.redirect(source, new, besides={new}, retyped=retyped)

    before = str(program)
    with pytest.raises(TypeMismatch), program.edit() as rewriter:
        lengthen(rewriter, retyped=False)
    assert str(program) == before
    with program.edit() as rewriter:
        lengthen(rewriter, retyped=True)
    assert str(program.type_of(program.node("both"))) == "f32[n + 2, 8]"


def test_a_limit_on_a_dimension_is_of_this_program_and_is_undone_with_the_rest(program: Program) -> None:
    other, before = program.clone(), program.dims["n"]

    def undone() -> None:
        with program.edit() as rewriter:
            rewriter.limit("n", 7)
            raise RuntimeError("undo")

    with pytest.raises(RuntimeError, match="undo"):
        undone()
    assert program.dims["n"] == before
    with program.edit() as rewriter:
        rewriter.limit("n", 7)
        rewriter.limit("n", 9)  # no wider again
        rewriter.retype()
    assert (program.dims["n"].max, other.dims["n"]) == (7, before)
    with program.edit() as rewriter:
        rewriter.lift("n", before.max, before.hint)
        rewriter.retype()
    assert program.dims["n"] == before
    with pytest.raises(ProgramError, match="no size left"), program.edit() as rewriter:
        rewriter.limit("n", 0)
    with pytest.raises(ProgramError, match="no dimension 'columns'"), program.edit() as rewriter:
        rewriter.limit("columns", 3)
    with pytest.raises(ProgramError, match="no dimension 'columns'"), program.edit() as rewriter:
        rewriter.lift("columns", None, 3)
