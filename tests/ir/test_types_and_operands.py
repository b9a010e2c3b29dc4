"""Types with named sizes, operands by schema, the one spelling of a call, and the names of operators."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import fx

from graphwright.ir.arguments import argument, arguments_of, canonical_call, canonicalize, schema_of
from graphwright.ir.errors import GraphwrightError, InputError, ProgramError, TypeMismatch
from graphwright.ir.names import PYTHON_FUNCTIONS, check_weight_name, op_name, resolve_target, target_name
from graphwright.ir.operands import misfit
from graphwright.ir.parser import parse
from graphwright.ir.provenance import add_tags, describe, path_of, source_of, tags_of
from graphwright.ir.types import Dim, ScalarType, SymbolTable, TensorType, TupleType, fake_of, is_tensor

ATEN = torch.ops.aten
F32 = torch.float32


@pytest.fixture
def table() -> SymbolTable:
    return SymbolTable({"batch": Dim("batch", 1, None, 3), "length": Dim("length", 1, 512, 3)})


# -- types -------------------------------------------------------------------------------------------------------------


def test_types_as_text() -> None:
    assert str(TensorType(F32, ("batch", 3, "2*length"))) == "f32[batch, 3, 2*length]"
    assert str(TensorType(torch.bool, ())) == "bool[]"
    assert str(TensorType(torch.float8_e5m2, (1,))) == "torch.float8_e5m2[1]"
    assert str(ScalarType("int", "batch")) == "int(batch)"
    assert str(TupleType((TensorType(F32, (1,)), None))) == "(f32[1], None)"


def test_dimensions_admit_what_they_say() -> None:
    dim = Dim("n", 2, 5)
    assert [size for size in range(8) if dim.admits(size)] == [2, 3, 4, 5]
    assert Dim("n").admits(10**9)
    assert not Dim("n").admits(0)


def test_sizes_are_carried_through_operators(table: SymbolTable) -> None:
    with table.mode:
        x = table.fake(TensorType(F32, ("batch", "length", 4)))
        assert table.type_of_value(x) == TensorType(F32, ("batch", "length", 4))
        assert table.type_of_value(torch.cat([x, x])) == TensorType(F32, ("2*batch", "length", 4))
        assert table.type_of_value(x.transpose(1, 2)) == TensorType(F32, ("batch", 4, "length"))
        assert table.type_of_value(x[:, 1:]) == TensorType(F32, ("batch", "length - 1", 4))
        assert table.type_of_value(x.shape[0]) == ScalarType("int", "batch")
        assert table.type_of_value(x.split([1, 3], 2)) == TupleType(
            (TensorType(F32, ("batch", "length", 1)), TensorType(F32, ("batch", "length", 3)))
        )
        assert table.type_of_value(x.shape[0] > x.shape[1]) == ScalarType("bool", "batch > length")
        assert table.type_of_value(x.shape[0] / 2).kind == "float"
    for value, kind in ((3, "int(3)"), (True, "bool(True)"), (0.5, "float(0.5)"), (None, "None")):
        assert str(table.type_of_value(value)) == kind


def test_equal_traced_sizes_stay_two_dimensions(table: SymbolTable) -> None:
    with table.mode:
        x, y = (table.fake(TensorType(F32, (name,))) for name in ("batch", "length"))
        assert table.type_of_value(torch.outer(x, y)) == TensorType(F32, ("batch", "length"))


def test_dimensions_named_like_torchs_own_symbols() -> None:
    table = SymbolTable({"s1": Dim("s1"), "s0": Dim("s0"), "u0": Dim("u0")})
    for names in (("s0", "s1"), ("s1", "u0")):
        assert table.type_of_value(table.fake(TensorType(F32, names))) == TensorType(F32, names)


def test_concrete_sizes(table: SymbolTable) -> None:
    with table.mode:
        x = table.fake(TensorType(F32, ("batch", "length")))
        flat = x.view(-1)[1:]
    sizes = {"batch": 4, "length": 6}
    assert table.concrete(flat.shape[0], sizes) == 23
    assert table.concrete(7, {}) == 7
    assert table.concrete(flat.shape[0], {"batch": 4}) is None
    assert table.concrete(table.size("length"), sizes) == 6


def test_unknown_dimensions_are_named(table: SymbolTable) -> None:
    with pytest.raises(ProgramError, match=r"unknown dimension 'width'\n  -> the program declares batch, length"):
        table.fake(TensorType(F32, ("width",)))
    with pytest.raises(ProgramError, match="the program declares no dimensions"):
        SymbolTable({}).size("n")


def test_weights_are_typed_with_their_strides_and_not_kept(table: SymbolTable) -> None:
    weight = torch.ones(4, 6).t()
    fake = table.fake_weight(weight)
    assert fake.stride() == (1, 6)
    assert table.fake_weight(torch.ones(2, device="meta")).device == torch.device("cpu")


def test_inference_names_the_operands_it_fails_on() -> None:
    program = parse('program P(n: 1..) {\n %x = input "x" : f32[n, 4]\n %y = aten.relu(%x)\n return %y\n}')
    node = program.node("y")
    node.target, node.args = ATEN.mm.default, (program.node("x"), program.node("x"))
    with pytest.raises(TypeMismatch, match=r"aten.mm.default does not accept these operands") as caught:
        program.infer_types()
    assert caught.value.where == "%y"
    assert caught.value.context == ("%x : f32[n, 4]",)


def test_fakes_of_nodes() -> None:
    program = parse('program P(n: 1..) {\n %x = input "x" : f32[n, 4]\n %n = aten.sym_size.int(%x, 0)\n return %n\n}')
    assert is_tensor(program.node("x"))
    assert not is_tensor(program.node("n"))
    assert fake_of(program.node("x")).shape[1] == 4
    with pytest.raises(ProgramError, match=r"the value is not a typed tensor \(at %n\)"):
        fake_of(program.node("n"))


# -- operands ----------------------------------------------------------------------------------------------------------


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node in a graph of its own; strings stand for inputs of that name."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(item: Any) -> Any:
        if isinstance(item, str) and item.startswith("%"):
            return made.setdefault(item, graph.placeholder(item[1:]))
        return [value(part) for part in item] if isinstance(item, list) else item

    return graph.call_function(target, tuple(map(value, args)), {key: value(item) for key, item in kwargs.items()})


def test_arguments_by_name_with_defaults() -> None:
    node = call(ATEN.layer_norm.default, "%x", [4], None, eps=1e-3)
    found = arguments_of(node)
    assert list(found) == ["input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"]
    assert (found["eps"], found["bias"], found["cudnn_enable"]) == (1e-3, None, True)
    assert argument(node, "eps") == 1e-3
    assert schema_of(node) is not None


def test_arguments_without_a_schema() -> None:
    node = call(operator.getitem, "%x", 2)
    assert schema_of(node) is None
    assert list(arguments_of(node)) == ["0", "1"]


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "wanted_args", "wanted_kwargs"),
    [
        (ATEN.linear.default, (1, 2, None), {}, (1, 2), {}),
        (ATEN.linear.default, (1,), {"weight": 2}, (1, 2), {}),
        (ATEN.linear.default, (), {"bias": 3, "weight": 2, "input": 1}, (1, 2, 3), {}),
        (ATEN.add.Tensor, (1, 2), {"alpha": 1}, (1, 2), {}),
        (ATEN.add.Tensor, (1, 2), {"alpha": 2}, (1, 2), {"alpha": 2}),
        (ATEN.add.Tensor, (1, 2), {"alpha": 1.0}, (1, 2), {"alpha": 1.0}),
        (ATEN.gelu.default, (1,), {"approximate": "none"}, (1,), {}),
        (ATEN.softmax.int, (1, -1, None), {}, (1, -1), {}),
        (ATEN.conv2d.default, (1, 2, None, [1, 1], [0, 0], [1, 1], 1), {}, (1, 2), {}),
        (ATEN.conv2d.default, (1, 2), {"groups": 2}, (1, 2, None, [1, 1], [0, 0], [1, 1], 2), {}),
        (ATEN.slice.Tensor, (1, 0, None, None, 1), {}, (1,), {}),
        (ATEN.sum.dim_IntList, (1, [0]), {"keepdim": False, "dtype": F32}, (1, [0]), {"dtype": F32}),
        (ATEN.dropout.default, (1, 0.5, False), {}, (1, 0.5, False), {}),
        (operator.getitem, (1, 2), {}, (1, 2), {}),
    ],
)
def test_the_one_spelling_of_a_call(target: Any, args: Any, kwargs: Any, wanted_args: Any, wanted_kwargs: Any) -> None:
    found = canonical_call(target, args, kwargs)
    assert found == (wanted_args, wanted_kwargs)
    assert canonical_call(target, *found) == found, "it is its own canonical spelling"


def test_nodes_are_brought_into_it() -> None:
    node = call(ATEN.add.Tensor, "%x", "%y", alpha=1)
    canonicalize(node)
    assert dict(node.kwargs) == {}
    placeholder = node.args[0]
    assert isinstance(placeholder, fx.Node)
    canonicalize(placeholder)


@pytest.mark.parametrize(
    ("value", "target", "name", "fits"),
    [
        (3, ATEN.add.Tensor, "other", True),
        ("x", ATEN.add.Tensor, "other", False),
        (None, ATEN.add.Tensor, "other", False),
        (None, ATEN.linear.default, "bias", True),
        ([1, 2], ATEN.view.default, "size", True),
        ((1, 2), ATEN.view.default, "size", True),
        ([1, 2.5], ATEN.view.default, "size", False),
        (3, ATEN.view.default, "size", False),
        (3, ATEN.conv2d.default, "stride", True),
        (True, ATEN.sum.dim_IntList, "keepdim", True),
        (1, ATEN.sum.dim_IntList, "keepdim", False),
        (F32, ATEN.sum.dim_IntList, "dtype", True),
        (6, ATEN.sum.dim_IntList, "dtype", False),
        (2, ATEN.sum.dim_IntList, "dim", True),
        (1, ATEN.layer_norm.default, "eps", True),
        ("1", ATEN.layer_norm.default, "eps", False),
        ([None], ATEN.index.Tensor, "indices", True),
        ([3.5], ATEN.cat.default, "tensors", True),
        ([None], ATEN.cat.default, "tensors", False),
        (torch.device("cpu"), ATEN.arange.default, "device", True),
        (torch.strided, ATEN.arange.default, "layout", True),
        (torch.contiguous_format, ATEN.arange.default, "layout", False),
        (torch.contiguous_format, ATEN.clone.default, "memory_format", True),
        ("tanh", ATEN.gelu.default, "approximate", True),
        (1.5, ATEN.transpose.int, "dim0", False),
    ],
)
def test_operands_fit_their_place_or_not(value: Any, target: Any, name: str, fits: bool) -> None:
    place = next(item for item in target._schema.arguments if item.name == name)
    reason = misfit(value, place)
    assert (reason is None) is fits
    if reason is not None:
        assert repr(name) in reason


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (ATEN.linear.default, "aten.linear"),
        (ATEN.add.Tensor, "aten.add.Tensor"),
        (ATEN.__and__.Tensor, "aten.__and__.Tensor"),
        (operator.getitem, "py.getitem"),
        (math.ceil, "py.ceil"),
        (torch.sym_max, "py.sym_max"),
    ],
)
def test_names_of_operators_and_back(target: Any, name: str) -> None:
    assert target_name(target) == name
    assert resolve_target(name) is target


def test_every_python_function_comes_back() -> None:
    for name, function in PYTHON_FUNCTIONS.items():
        assert resolve_target(target_name(function)) is function, name


@pytest.mark.parametrize(
    "name", ["aten", "aten.", "aten.linear.other", "linear", "", "py.open", "graphwright.x", "a.b.c.d"]
)
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ProgramError, match=r"no operator is named|the dialect has no operator"):
        resolve_target(name)


def test_what_cannot_stand_in_a_program() -> None:
    for wrong in (torch.relu, ATEN.relu, len, print):
        with pytest.raises(ProgramError, match="cannot stand in a Program"):
            target_name(wrong)


def test_names_of_nodes() -> None:
    node = call(ATEN.relu.default, "%x")
    assert op_name(node) == "aten.relu"
    assert [op_name(other) for other in node.all_input_nodes] == ["placeholder"]


def test_names_of_weights() -> None:
    for good in ("w", "encoder.layer.0.weight", "a b.c-d", "größe"):
        check_weight_name(good)
    for bad in ("", ".", "a.", ".a", "a..b", 'a"', "a\\b", "a\tb", "a\x7f"):
        with pytest.raises(ProgramError, match="is not a weight's name"):
            check_weight_name(bad)


# -- provenance and errors ---------------------------------------------------------------------------------------------


def test_provenance() -> None:
    node = call(ATEN.relu.default, "%x")
    assert (path_of(node), source_of(node), tags_of(node)) == ("", "", frozenset())
    assert describe(node) == "%relu_default"
    node.meta.update(path="a.b", source="net.py:1")
    add_tags(node, ["x"])
    add_tags(node, ("y", "x"))
    assert tags_of(node) == frozenset("xy")
    assert describe(node) == "%relu_default in a.b"


def test_errors_say_what_where_and_what_to_do() -> None:
    error = InputError("is wrong", where="option 'bits'", hint="use 4", context=["a", "b"])
    assert isinstance(error, GraphwrightError)
    assert str(error) == "is wrong (at option 'bits')\n    a\n    b\n  -> use 4"
    assert (error.what, error.where, error.hint, error.context) == ("is wrong", "option 'bits'", "use 4", ("a", "b"))
    assert str(InputError("is wrong")) == "is wrong"
