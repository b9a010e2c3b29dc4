"""What holds for every program, tried on random ones."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ir.models import EVERYTHING, assert_same_bits
from tests.ir.strategies import inputs_of, programs, reference

from graphwright.ir.cost import cost_of
from graphwright.ir.diff import diff
from graphwright.ir.equality import first_difference, structurally_equal
from graphwright.ir.errors import GraphwrightError, ProgramError
from graphwright.ir.names import op_name
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.text import print_program
from graphwright.ir.verifier import verify

few = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def assert_identical(found: Program, expected: Program) -> None:
    assert first_difference(found, expected, names=True, provenance=True, values=True) is None
    assert print_program(found) == print_program(expected)


@few
@given(programs())
def test_a_program_verifies_and_computes_what_its_operators_compute(program: Program) -> None:
    verify(program)
    flat = inputs_of(program)
    with torch.no_grad():
        assert_same_bits(list(program.body(*flat)), reference(program, flat))
    assert not diff(program, program)
    assert cost_of(program).parameters == sum(tensor.numel() for tensor in program.tensors().values())


@few
@given(programs())
def test_printed_and_parsed_it_is_the_same(program: Program) -> None:
    text = print_program(program)
    assert_identical(parse(text, program.tensors()), program)
    without = parse(text)
    assert print_program(without) == text
    assert structurally_equal(without, program, names=True, provenance=True)
    assert not diff(program, without)


@few
@given(programs())
def test_saved_and_loaded_it_is_the_same(program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program.save(folder)
        again = Program.load(folder)
        assert_identical(again, program)
        assert list(again.tensors()) == list(program.tensors())
        flat = inputs_of(program)
        assert_same_bits(list(again.body(*flat)), list(program.body(*flat)))
        again.save(Path(folder) / "again")
        assert (Path(folder) / "again" / "program.json").read_bytes() == (Path(folder) / "program.json").read_bytes()


@few
@given(programs(), st.booleans())
def test_a_clone_is_the_same_and_stands_alone(program: Program, copy_weights: bool) -> None:
    text = print_program(program)
    other = program.clone(copy_weights=copy_weights)
    assert_identical(other, program)
    shared = [other.tensor(name) is tensor for name, tensor in program.tensors().items()]
    assert all(shared) != copy_weights or not shared
    mutilate(other, 3)
    assert print_program(program) == text
    verify(program)


def mutilate(program: Program, seed: int) -> None:
    """Change a program inside of the rewriter in ways that types allow: new weights, replaced calls, dead results."""
    with program.edit() as rewriter:
        calls = [node for node in program.nodes if node.op == "call_function" and op_name(node) != "aten.split.Tensor"]
        for place, node in enumerate(calls):
            if node._erased or op_name(node) == "py.getitem":
                continue
            if (place + seed) % 3 == 0:
                made = rewriter.call("aten.neg", node, like=node, tags=("made",))
                rewriter.replace(node, made)
            elif (place + seed) % 3 == 1 and op_name(node) == "aten.linear":
                weight = node.args[1]
                doubled = rewriter.weight(f"{weight.target}_twice", program.tensor(weight).detach() * 2, like=node)
                rewriter.replace(node, rewriter.call("aten.linear", node.args[0], doubled, like=node))
            elif not node.users:
                rewriter.erase(node)


@few
@given(programs(), st.integers(0, 2))
def test_rewritten_programs_are_well_formed_and_survive_too(program: Program, seed: int) -> None:
    before = program.clone()
    mutilate(program, seed)
    verify(program)
    flat = inputs_of(program)
    with torch.no_grad():
        assert_same_bits(list(program.body(*flat)), reference(program, flat))
    assert_identical(parse(print_program(program), program.tensors()), program)
    assert bool(diff(before, program)) != structurally_equal(before, program, names=True, provenance=True)


@few
@given(programs(), st.integers(0, 2))
def test_restored_to_a_snapshot_it_is_what_it_was(program: Program, seed: int) -> None:
    text, tensors = print_program(program), program.tensors()
    snapshot = program.snapshot()
    mutilate(program, seed)
    program.restore(snapshot)
    assert print_program(program) == text
    assert list(program.tensors()) == list(tensors)
    assert all(program.tensors()[name] is tensor for name, tensor in tensors.items())
    verify(program)


@few
@given(programs(), st.integers(0, 2))
def test_an_edit_that_raises_leaves_no_trace(program: Program, seed: int) -> None:
    text, tensors, replacements = print_program(program), program.tensors(), dict(program.replacements)
    flat = inputs_of(program)
    expected = list(program.body(*flat))
    try:
        with program.edit():
            mutilate(program, seed)
            raise KeyError("a pass that fails")
    except KeyError:
        pass
    assert print_program(program) == text
    assert list(program.tensors()) == list(tensors)
    assert program.replacements == replacements
    assert_same_bits(list(program.body(*flat)), expected)
    verify(program)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_text_is_refused_with_our_error_or_means_something(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(EVERYTHING) - 1))
    length = data.draw(st.integers(0, 12))
    piece = data.draw(
        st.sampled_from(
            [
                "",
                "%",
                '"',
                "(",
                ")",
                "[",
                "{",
                "}",
                "\n",
                "1",
                "-",
                "@",
                "#",
                ":",
                "=",
                ",",
                "\0",
                "é",
                "x",
                "%x",
                "f32[2]",
                "None",
                "return",
            ]
        )
    )
    text = EVERYTHING[:start] + piece + EVERYTHING[start + length :]
    program = None
    with contextlib.suppress(ProgramError):
        program = parse(text)
    if program is not None:
        assert print_program(parse(print_program(program))) == print_program(program)


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_other_text_is_refused(text: str) -> None:
    try:
        parse(text)
    except GraphwrightError:
        return
    raise AssertionError("that was no program")
