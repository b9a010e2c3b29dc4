"""A Program as a module: calls, input checks, weights under their names, copies, states, training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.ir.models import (
    EVERYTHING,
    Encoder,
    assert_same_bits,
    encoder_inputs,
    encoder_program,
    everything_tensors,
)
from torch import nn

from graphwright.ir.copying import copy_graph
from graphwright.ir.errors import InputError, ProgramError
from graphwright.ir.parser import parse
from graphwright.ir.program import JournalEntry, Program, require_program
from graphwright.ir.text import print_program
from graphwright.ir.verifier import verify


@pytest.fixture
def traced() -> tuple[Encoder, Program]:
    return encoder_program()


def two_inputs() -> Program:
    return parse(
        """program P(batch: 2..6, length: 1..) {
          require "length % 2 == 0"
          %x = input "x" : f32[batch, length, 3]
          %m = input "m" : i64[batch, length]
          %y = aten.sum.dim_IntList(%x, [2])
          %z = aten.mul.Tensor(%y, %m)
          return %z
        }"""
    )


# -- calls -------------------------------------------------------------------------------------------------------------


def test_it_is_called_like_the_model(traced: tuple[Encoder, Program]) -> None:
    model, program = traced
    batch = encoder_inputs()
    expected = model(**batch)
    assert_same_bits(program(**batch), expected)
    assert_same_bits(program(batch["ids"], batch["mask"]), expected)
    assert_same_bits(program(batch["ids"], mask=batch["mask"]), expected)
    assert list(program(**batch)) == ["hidden", "logits"]
    for rows, length in ((1, 1), (2, 1), (1, 9), (7, 4)):
        ids, mask = torch.randint(0, 13, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
        torch.testing.assert_close(program(ids, mask), model(ids, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "m", "says"),
    [
        (
            torch.ones(3, 4, 3).double(),
            torch.ones(3, 4).long(),
            "has dtype torch.float64, the program takes torch.float32",
        ),
        (torch.ones(3, 4), torch.ones(3, 4).long(), "has shape [3, 4], the program takes f32[batch, length, 3]"),
        (torch.ones(3, 4, 2), torch.ones(3, 4).long(), "has 2 in dimension 2, the program takes f32[batch, length, 3]"),
        (torch.ones(1, 4, 3), torch.ones(1, 4).long(), "has 1 for 'batch', the program takes 2..6"),
        (torch.ones(7, 4, 3), torch.ones(7, 4).long(), "has 7 for 'batch', the program takes 2..6"),
        (torch.ones(3, 0, 3), torch.ones(3, 0).long(), "has 0 for 'length', the program takes 1.."),
        (torch.ones(3, 4, 3), torch.ones(3, 6).long(), "has 6 for 'length', but input 'x' has 4"),
        (
            torch.ones(3, 5, 3),
            torch.ones(3, 5).long(),
            "traced on a path for length % 2 == 0, and this call has batch = 3",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, m: torch.Tensor, says: str) -> None:
    with pytest.raises(InputError) as caught:
        two_inputs()(x, m)
    assert says in str(caught.value)


def test_inputs_that_fit_are_taken() -> None:
    assert two_inputs()(torch.ones(3, 4, 3), torch.full((3, 4), 2)).tolist() == [[6.0] * 4] * 3


# -- nodes and weights -------------------------------------------------------------------------------------------------


def test_nodes_by_name_and_kind(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    assert program.node("relu").name == "relu"
    with pytest.raises(ProgramError, match="no node is named 'gelu'"):
        program.node("gelu")
    assert [node.name for node in program.inputs] == ["ids", "mask"]
    assert program.output is program.nodes[-1]
    assert str(program.type_of(program.node("relu"))) == "f32[batch, sequence, 16]"
    assert repr(program) == f"<Program Encoder: {len(program.nodes)} nodes, 12 weights>"


def test_weights_under_every_name(traced: tuple[Encoder, Program]) -> None:
    model, program = traced
    assert program.tensor("layers.0.2.bias") is model.layers[0][2].bias
    assert program.tensor("head.weight") is program.tensor("embed.weight") is model.embed.weight
    reader = next(node for node in program.nodes if node.target == "gain")
    assert program.tensor(reader) is model.gain
    for wrong in ("nothing", "layers", "layers.0", "layers.9.weight", "", "graph", "embed.forward"):
        with pytest.raises(ProgramError, match="the program has no weight named"):
            program.tensor(wrong)
    with pytest.raises(ProgramError, match=r"the node is not a weight \(at %relu\)"):
        program.tensor(program.node("relu"))


def test_names_parameters_and_state_are_the_models(traced: tuple[Encoder, Program]) -> None:
    model, program = traced
    assert [name for name, _ in program.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert dict(program.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert program.state_dict().keys() == model.state_dict().keys()
    assert all(program.state_dict()[name].data_ptr() == value.data_ptr() for name, value in model.state_dict().items())


def test_state_dicts_load_both_ways(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    other = Encoder().eval()
    program.clone(copy_weights=True).load_state_dict(other.state_dict())
    clone = program.clone(copy_weights=True)
    clone.load_state_dict(other.state_dict())
    assert_same_bits(clone(**encoder_inputs()), other(**encoder_inputs()))
    fresh = Encoder().eval()
    fresh.load_state_dict(program.state_dict())
    assert_same_bits(fresh(**encoder_inputs()), program(**encoder_inputs()))
    # A checkpoint may name a tied weight by the name that is an alias here.
    state = {name: value for name, value in other.state_dict().items() if name != "embed.weight"}
    again = program.clone(copy_weights=True)
    again.load_state_dict(state)
    assert_same_bits(again(**encoder_inputs()), other(**encoder_inputs()))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({"gain": other.gain})


def test_names_that_no_weight_can_have() -> None:
    program = parse(EVERYTHING, everything_tensors())
    for name in ("", "a..b", ".a", 'a"b', "a\\b", "a\nb", "a\0"):
        with pytest.raises(ProgramError, match="is not a weight's name"):
            program.set_tensor(name, torch.ones(1))
    for name in ("graph", "forward", "embed"):
        with pytest.raises(ProgramError, match="is taken"):
            program.set_tensor(name, torch.ones(1))
    with pytest.raises(ProgramError, match="lies inside a weight"):
        program.set_tensor("frozen.scale", torch.ones(1))
    verify(program)


def test_unused_weights_are_dropped_with_their_modules_and_aliases(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    program.set_tensor("spare.deep.w", torch.ones(3))
    program.set_tensor("norm.extra", nn.Parameter(torch.ones(3)))
    program.aliases["spare.other"] = "spare.deep.w"
    assert sorted(program.drop_unused_tensors()) == ["norm.extra", "spare.deep.w"]
    assert "spare" not in dict(program.body.named_children())
    assert program.aliases == {"head.weight": "embed.weight"}
    assert program.drop_unused_tensors() == []
    verify(program)


def test_bound_tensors_keep_their_order(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    names = list(program.tensors())
    shuffled = {name: program.tensor(name) for name in reversed(names)}
    program.bind_tensors(shuffled)
    assert {name: id(value) for name, value in program.tensors().items()} == {k: id(v) for k, v in shuffled.items()}
    parameters = [name for name, _ in program.named_parameters()]
    assert parameters.index("norm.bias") < parameters.index("norm.weight")
    verify(program)


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_trains_as_the_model_does(traced: tuple[Encoder, Program]) -> None:
    model, program = traced
    program = program.clone(copy_weights=True)
    steps: list[list[torch.Tensor]] = []
    for module in (model, program):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            module(**encoder_inputs())["logits"].square().mean().backward()
            optimizer.step()
        steps.append([parameter.detach() for parameter in module.parameters()])
    for ours, theirs in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert program.tensor("head.weight") is program.tensor("embed.weight")


def test_train_and_eval_change_nothing_in_the_graph(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    assert not program.training
    text = print_program(program)
    expected = program(**encoder_inputs())
    assert_same_bits(program.train()(**encoder_inputs()), expected)
    assert print_program(program.eval()) == text


# -- copies and states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_weights", [False, True])
def test_clones(copy_weights: bool) -> None:
    program = parse(EVERYTHING, everything_tensors())
    program.journal = [JournalEntry("a", {}, True)]
    other = program.clone(copy_weights=copy_weights)
    assert print_program(other) == print_program(program)
    assert list(other.tensors()) == list(program.tensors())
    for name, tensor in program.tensors().items():
        copied = other.tensor(name)
        assert (copied is tensor) is not copy_weights
        assert type(copied) is type(tensor)
        assert copied.requires_grad == tensor.requires_grad
        assert copied.stride() == tensor.stride()
    other.aliases.clear()
    other.journal.clear()
    other.node("line").meta["path"] = "changed"
    assert program.aliases
    assert program.journal
    assert program.node("line").meta["path"] == "inner.linear"
    verify(other)


def test_deep_copies_stand_alone_and_pickles_are_refused() -> None:
    program = parse(EVERYTHING, everything_tensors())
    other = copy.deepcopy(program)
    with torch.no_grad():
        other.tensor("embed.weight").zero_()
    assert program.tensor("embed.weight").any()
    with pytest.raises(ProgramError, match=r"not pickled\n  -> use program.save"):
        pickle.dumps(program)


def test_snapshots_know_what_was_written_into() -> None:
    program = parse(EVERYTHING, everything_tensors())
    snapshot = program.snapshot()
    assert Program.overwritten(snapshot) == []
    with torch.no_grad():
        program.tensor("state").add_(1)
    assert Program.overwritten(snapshot) == ["state"]


def test_a_program_at_an_earlier_state_beside_the_present_one() -> None:
    program = parse(EVERYTHING, everything_tensors())
    snapshot = program.snapshot()
    text = print_program(program)
    with program.edit() as rewriter:
        node = program.node("kept")
        rewriter.replace(node, rewriter.call("aten.tanh", program.node("line"), like=node))
    assert "mask" not in program.tensors()
    earlier = program.at(snapshot)
    assert print_program(earlier) == text
    assert print_program(program) != text
    verify(earlier)
    verify(program)
    program.restore(snapshot)
    program.restore(snapshot)
    assert print_program(program) == text


def test_restoring_brings_back_order_aliases_and_journal(traced: tuple[Encoder, Program]) -> None:
    _, program = traced
    snapshot, names = program.snapshot(), list(program.tensors())
    first = program.tensor(names[0])
    program.set_tensor(names[0], nn.Parameter(torch.zeros_like(first)))
    program.aliases["more"] = names[0]
    program.journal.append(JournalEntry("a", {}, True))
    program.replacements["x"] = "y"
    program.restore(snapshot)
    assert list(program.tensors()) == names
    assert program.tensor(names[0]) is first
    assert program.aliases == {"head.weight": "embed.weight"}
    assert program.journal == []
    assert program.replacements == {}


def test_copied_graphs_keep_names_that_torch_would_change() -> None:
    program = parse(EVERYTHING)
    node = program.node("kept")
    node.name = "input"  # torch.fx keeps the names of builtins for itself
    copied = copy_graph(program.graph)
    assert [other.name for other in copied.nodes] == [other.name for other in program.nodes]
    assert all(one.meta is not other.meta for one, other in zip(copied.nodes, program.nodes))


def test_require_program() -> None:
    program = two_inputs()
    assert require_program(program) is program
    with pytest.raises(InputError, match=r"expected a Program, got Linear\n  -> make one with graphwright.trace"):
        require_program(nn.Linear(1, 1))


def test_types_are_inferred_again_from_the_inputs() -> None:
    program = parse(EVERYTHING)
    text = print_program(program)
    for node in program.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta.pop("val")
    program.infer_types()
    assert print_program(program) == text


def test_the_text_is_what_str_gives() -> None:
    program: Any = parse(EVERYTHING)
    assert str(program) == EVERYTHING
