"""Two programs compared: equal or not, what differs first, and what changed between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tests.ir.models import EVERYTHING, Encoder, encoder_inputs, encoder_program, everything_tensors
from torch import nn

from graphwright.frontends.torch import trace
from graphwright.ir.diff import diff, general_paths
from graphwright.ir.equality import first_difference, same_bits, same_constant, structurally_equal
from graphwright.ir.names import op_name
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.provenance import add_tags

# -- equality ----------------------------------------------------------------------------------------------------------


def test_names_provenance_and_values_count_only_when_asked_for() -> None:
    first = parse(EVERYTHING, everything_tensors())
    renamed = parse(EVERYTHING.replace("%line", "%renamed"), everything_tensors())
    assert structurally_equal(first, renamed, provenance=True, values=True)
    assert first_difference(first, renamed, names=True) == "the names are %line and %renamed"
    moved = parse(EVERYTHING.replace("net.py:12", "net.py:13"), everything_tensors())
    assert structurally_equal(first, moved, names=True, values=True)
    assert "the provenance of %line in inner.linear" in str(first_difference(first, moved, provenance=True))
    other = {**everything_tensors(), "state": torch.zeros(4)}
    trained = parse(EVERYTHING, other)
    assert structurally_equal(first, trained, names=True, provenance=True)
    assert first_difference(first, trained, values=True) == "the values of the weight 'state' differ"


def test_traced_sizes_journal_and_title_do_not_count() -> None:
    first = parse(EVERYTHING)
    other = parse(EVERYTHING.replace("@3,", "@9,").replace("program Everything", "program Other"))
    assert structurally_equal(first, other)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("2..64@5", "2..65@5", "the dimension 'sequence' ranges over (2, 64) and (2, 65)"),
        ("batch != sequence", "batch != 9", "the conditions are"),
        ('alias "head.weight"', 'alias "tail.weight"', "the aliases are"),
        ('"flag": True', '"flag": False', "the signatures' constants are"),
        ('"flag": True', '"flag": 1', "the signatures' constants are"),
        ("forward ids, scale", "forward ids, factor", "the signatures' parameters are"),
        ('"parts": (*, [*])', '"parts": [*, [*]]', "the signatures' out_spec are"),
        ('buffer "mask" : bool[4]', 'weight "mask" : bool[4] frozen', "is buffer bool[4] and weight bool[4] frozen"),
        ("  frozen @inner", "  @inner", "'frozen' is weight f32[4, 4] frozen and weight f32[4, 4]"),
        ("f32[11, 4]", "f32[12, 4]", "'embed.weight' is weight f32[11, 4] and weight f32[12, 4]"),
        ("f32[batch, 1, 1]", "f32[1, 1, 1]", "%scale is f32[batch, 1, 1], %scale is f32[1, 1, 1]"),
        ("alpha=-0.5", "alpha=0.5", "have different operands"),
        ("-inf, 1e+30", "-inf, 1e+31", "have different operands"),
        ("nan)", "0.0)", "have different operands"),
        ("aten.mul.Tensor(%x, %scale)", "aten.div.Tensor(%x, %scale)", "are different operators"),
        ("aten.linear(%clamped, %f)", "aten.linear(%shifted, %f)", "have different operands"),
        ("return %logits, %left, %right", "return %logits, %right, %left", "have different operands"),
    ],
)
def test_every_part_counts(old: str, new: str, says: str) -> None:
    text = EVERYTHING.replace(" : f32[batch, 2, 11]", "")  # which changes with the size of a weight
    assert old in text
    other = parse(text.replace(old, new))
    assert says in str(first_difference(parse(text), other))
    assert not structurally_equal(parse(text), other)
    assert not structurally_equal(other, parse(text))


def test_a_node_more_counts() -> None:
    first, second = parse(EVERYTHING), parse(EVERYTHING.replace("  return", "  %more = aten.neg(%left)\n  return"))
    assert first_difference(first, second) is not None
    assert first_difference(second, first) is not None


def test_another_order_of_weights_does_not_count() -> None:
    lines = EVERYTHING.splitlines()
    weights = [index for index, line in enumerate(lines) if "= weight" in line or "= buffer" in line]
    lines[weights[0]], lines[weights[1]] = lines[weights[1]], lines[weights[0]]
    assert structurally_equal(parse("\n".join(lines)), parse(EVERYTHING))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (True, 1, False),
        (float("nan"), float("nan"), True),
        (0.0, -0.0, False),
        (complex(0, float("nan")), complex(0, float("nan")), True),
        ([1, (2, None)], (1, [2, None]), True),
        ([1], [1, 2], False),
        (None, 0, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, False),
        ("a", "b", False),
    ],
)
def test_same_constant(first: object, second: object, same: bool) -> None:
    assert same_constant(first, second) is same
    assert same_constant(second, first) is same


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))
    assert not same_bits(torch.ones(2, device="meta"), torch.ones(2, device="meta"))


# -- diff --------------------------------------------------------------------------------------------------------------


def quantize(program: Program) -> None:
    """Replace every linear below `layers` by one of other weights, as a quantiser does."""
    with program.edit() as rewriter:
        for node in program.nodes:
            if op_name(node) != "aten.linear" or not str(node.args[1].target).startswith("layers"):
                continue
            weight = rewriter.weight(
                f"{node.args[1].target}_q", program.tensor(node.args[1]).detach().half(), like=node
            )
            wide = rewriter.call("aten.to.dtype", weight, torch.float32, like=node)
            made = rewriter.call("aten.linear", node.args[0], wide, *node.args[2:], like=node, tags=("quantized",))
            rewriter.replace(node, made)


def test_no_difference() -> None:
    _, program = encoder_program()
    same = diff(program, program.clone())
    assert not same
    assert same.summary() == ["no difference"]
    assert str(same) == "no difference"
    assert not diff(program, parse(str(program)))


def test_a_pass_is_summed_up_and_shown_by_module() -> None:
    _, program = encoder_program()
    before = program.clone()
    quantize(program)
    found = diff(before, program)
    assert found
    assert found.summary() == [
        "4 x (linear -> linear, to) in layers.*.*",
        "4 nodes reading what took the place of a removed one",
        "4 weights added, 1,024 bytes",
        "4 weights removed, 2,048 bytes",
    ]
    lines = str(found).splitlines()
    place = lines.index("@@ layers.0.0 @@")
    assert lines[place + 1].startswith("- %linear = aten.linear(%mul, %layers_0_0_weight, %layers_0_0_bias) : f32[")
    assert lines[place + 2].startswith("+ %to = aten.to.dtype(%layers_0_0_weight_q, f32)")
    assert lines[place + 3].startswith("+ %linear_5 = aten.linear(%mul, %to, %layers_0_0_bias) : f32[")
    assert "#quantized" in lines[place + 3]
    assert lines[-2:] == ["+ layers.1.0.weight_q : buffer f16[16, 8]", "+ layers.1.2.weight_q : buffer f16[8, 16]"]
    assert "- layers.0.0.weight : weight f32[16, 8]" in lines
    assert [change.name for change in found.of_kind("removed")] == ["linear", "linear_1", "linear_2", "linear_3"]
    assert len(found.of_kind("added")) == 8
    assert {change.name for change in found.of_kind("redirected")} == {"relu", "add", "relu_1", "add_1"}
    backwards = diff(program, before)
    assert len(backwards.of_kind("added")) == 4
    assert backwards.summary()[0] == "4 x (linear, to -> linear) in layers.*.*"


def test_one_to_one_replacements_read_plainly() -> None:
    _, program = encoder_program()
    before = program.clone()
    with program.edit() as rewriter:
        for node in program.nodes:
            if op_name(node) == "aten.relu":
                rewriter.replace(node, rewriter.call("aten.silu", node.args[0], like=node))
    assert diff(before, program).summary()[0] == "2 relu -> silu in layers.*.1"


def test_nodes_taken_out_and_what_reads_through() -> None:
    _, program = encoder_program()
    before = program.clone()
    with program.edit() as rewriter:
        for node in program.nodes:
            if op_name(node) == "aten.relu":
                rewriter.replace(node, node.args[0])
    found = diff(before, program)
    assert found.summary() == [
        "2 relu removed in layers.*.1",
        "2 nodes reading what took the place of a removed one",
    ]


def test_a_wrong_operand_is_shown_as_a_change() -> None:
    _, program = encoder_program()
    before = program.clone()
    node = program.node("add")
    node.args = (node.args[1], node.args[0])
    found = diff(before, program)
    (change,) = found.nodes
    assert (change.kind, change.name) == ("changed", "add")
    assert change.op_before == change.op_after == "aten.add.Tensor"
    assert found.summary() == ["1 add changed in (root)"]
    assert change.before != change.after


@pytest.mark.parametrize(
    "change",
    [
        lambda program: add_tags(program.node("relu"), ["adapter"]),
        lambda program: program.node("relu").meta.update(path="elsewhere"),
        lambda program: setattr(program.node("add"), "kwargs", {"alpha": 2}),
        lambda program: setattr(program.node("relu"), "target", torch.ops.aten.silu.default),
        lambda program: program.node("relu").meta.update(val=program.node("linear_1").meta["val"]),
    ],
    ids=["tag", "path", "constant", "operator", "type"],
)
def test_small_changes_are_seen(change: Callable[[Program], None]) -> None:
    _, program = encoder_program()
    before = program.clone()
    change(program)
    found = diff(before, program)
    assert [item.kind for item in found.nodes] == ["changed"]
    assert len(str(found).splitlines()) == 5


def test_renamed_nodes_are_matched_by_what_they_compute() -> None:
    first = parse(EVERYTHING)
    renamed = EVERYTHING
    for name in ("line", "kept", "double", "twice", "split", "left", "right", "logits", "picked"):
        renamed = renamed.replace(f"%{name} ", f"%new_{name} ").replace(f"%{name},", f"%new_{name},")
        renamed = renamed.replace(f"%{name})", f"%new_{name})").replace(f"%{name}]", f"%new_{name}]")
        renamed = renamed.replace(f"%{name}\n", f"%new_{name}\n")
    assert not diff(first, parse(renamed))


def test_a_model_with_one_more_layer_differs_by_that_layer() -> None:
    class Deeper(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers.insert(1, nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))

    torch.manual_seed(0)
    first, second = trace(Encoder().eval(), encoder_inputs()), trace(Deeper().eval(), encoder_inputs())
    found = diff(first, second)
    assert not found.of_kind("removed")
    assert {"layers.2.0.weight", "layers.2.2.bias"} <= {weight.name for weight in found.weights}
    assert sum(change.op_after == "aten.linear" for change in found.of_kind("added")) == 2


def test_sizes_that_depend_on_values_are_no_difference_by_their_number() -> None:
    lines = ['%x = input "x" : f32[batch, 4]', "%n = aten.nonzero(%x)", "%r = aten.relu(%x)", "return %n, %r"]
    first = parse("program P(batch: 1..) {\n" + "\n".join(lines) + "\n}")
    lines[2:3] = ["%a = aten.abs(%x)", "%m = aten.nonzero(%a)", "%k = aten.neg(%m)", "%r = aten.relu(%x)"]
    second = parse("program P(batch: 1..) {\n" + "\n".join(lines) + "\n}")
    for _ in range(2):
        second.infer_types()
    found = diff(first, second)
    assert {change.name for change in found.nodes} == {"a", "m", "k"}
    assert not diff(second, second.clone())


def test_header_and_weights() -> None:
    other = parse(
        EVERYTHING.replace("2..64@5", "2..128@5")
        .replace('alias "head.weight" = "embed.weight"', 'alias "tail.weight" = "embed.weight"')
        .replace('weight "frozen" : f32[4, 4] strides (1, 4)  frozen', 'weight "frozen" : f32[4, 4]')
    )
    found = diff(parse(EVERYTHING), other)
    assert found.header[0] == "- program Everything(batch: 1..@3, sequence: 2..64@5) {"
    assert '+ alias "tail.weight" = "embed.weight"' in found.header
    (weight,) = found.weights
    assert (weight.kind, weight.before, weight.after) == ("retyped", "weight f32[4, 4] frozen", "weight f32[4, 4]")
    assert found.summary() == ["1 weight retyped, 64 -> 64 bytes", "4 header lines changed"]
    assert "@@ header @@" in str(found)


def test_long_diffs_can_be_cut() -> None:
    _, program = encoder_program()
    before = program.clone()
    quantize(program)
    text = diff(before, program).format(most_groups=1)
    assert text.count("@@ layers") == 1
    assert "... and 3 more modules" in text


@pytest.mark.parametrize(
    ("paths", "written"),
    [
        (["encoder.layer.0.a.b"], "encoder.layer.0.a.b"),
        (["encoder.layer.0.query", "encoder.layer.11.query"], "encoder.layer.*.query"),
        (["encoder.layer.0.query", "encoder.layer.1.key"], "encoder.layer.*"),
        (["encoder.layer.0.query", "pooler.dense"], "encoder.layer.0.query, pooler.dense"),
        (["model.embed", "model.layers.0.mlp"], "model.*"),
        (["layers.0", "layers.1.up"], "layers.*"),
        ([""], "(root)"),
        (["layers.0.1", "layers.3.1"], "layers.*.1"),
    ],
)
def test_paths_as_few_patterns(paths: list[str], written: str) -> None:
    assert general_paths(paths) == written


def test_diffs_are_values() -> None:
    found = diff(parse(EVERYTHING), parse(EVERYTHING))
    assert dataclasses.is_dataclass(found)
    assert found == diff(parse(EVERYTHING), parse(EVERYTHING))
