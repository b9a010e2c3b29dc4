"""Signatures: which calls they bind to the graph's inputs, and which they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from graphwright.ir.errors import InputError
from graphwright.ir.signature import Signature
from graphwright.ir.signature_text import default_signature

X, Y, Z = (torch.full((2,), float(value)) for value in (1, 2, 3))


def signature(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = 0, parameters: tuple[str, ...] = ()
) -> Signature:
    """The signature of a traced call; tensors are inputs, everything else is a constant."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    names = iter("abcdefg")
    return Signature(
        in_spec=spec,
        out_spec=pytree.tree_structure(output),
        inputs=tuple(next(names) if isinstance(leaf, torch.Tensor) else None for leaf in leaves),
        constants={index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)},
        parameters=parameters,
    )


def bound(sig: Signature, *args: Any, **kwargs: Any) -> list[float]:
    return [float(value[0]) for value in sig.flatten(args, kwargs)]


def test_positional_arguments_may_be_passed_by_name_and_back() -> None:
    positional = signature((X, Y), {}, parameters=("x", "y"))
    by_name = signature((), {"x": X, "y": Y}, parameters=("x", "y"))
    for sig in (positional, by_name):
        assert bound(sig, X, Y) == bound(sig, x=X, y=Y) == bound(sig, X, y=Y) == bound(sig, y=Y, x=X) == [1, 2]
        assert sig.names == ("a", "b")


def test_order_of_keywords_does_not_matter() -> None:
    sig = signature((), {"x": X, "y": Y})
    assert bound(sig, y=Y, x=X) == [1, 2]


def test_constants_may_be_left_out_or_repeated() -> None:
    sig = signature((X,), {"flag": True, "rest": None, "scale": 2.0}, parameters=("x", "flag", "rest", "scale"))
    assert bound(sig, X) == bound(sig, X, flag=True) == bound(sig, X, True, None, 2.0) == [1]


@pytest.mark.parametrize("value", [False, 1, None, "True", X])
def test_constants_may_not_differ(value: Any) -> None:
    sig = signature((X,), {"flag": True})
    with pytest.raises(
        InputError, match=r"traced with the constant True, this call passes .*\n  -> trace the model again"
    ):
        sig.flatten((X,), {"flag": value})


def test_arguments_the_trace_did_not_have_may_be_none_only() -> None:
    sig = signature((), {"x": X}, parameters=("x", "y"))
    assert bound(sig, x=X, y=None) == [1]
    with pytest.raises(
        InputError, match=r"was not among the traced arguments \(at argument 'y'\)\n  -> this program takes x"
    ):
        sig.flatten((), {"x": X, "y": Y})


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, r"is missing \(at argument 'x'\)"),
        ((X,), {}, r"is missing \(at argument 'y'\)"),
        ((X, Y, Z), {}, "takes at most 2 positional arguments, got 3"),
        (
            (X,),
            {"x": X, "y": Y},
            r"is passed both by position and by name \(at argument 'x'\)",
        ),
        (([X], Y), {}, "nested differently from the traced ones"),
        (((X, Z), Y), {}, "nested differently from the traced ones"),
        ((X, 3), {}, r"must be a tensor, not int \(at input 'b'\)"),
        ((X, Y), {"other": Z}, r"was not among the traced arguments \(at argument 'other'\)"),
    ],
)
def test_calls_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        signature((X, Y), {}, parameters=("x", "y")).flatten(args, kwargs)


def test_nested_arguments() -> None:
    sig = signature((), {"batch": {"x": X, "parts": [Y, (Z, None)]}})
    assert bound(sig, batch={"x": X, "parts": [Y, (Z, None)]}) == [1, 2, 3]
    with pytest.raises(InputError, match="nested differently"):
        sig.flatten((), {"batch": {"x": X, "parts": [Y, [Z, None]]}})


def test_results_get_their_type_back() -> None:
    sig = signature((X,), {}, {"a": 0, "rest": (0, [0])})
    assert sig.unflatten([1, 2, 3]) == {"a": 1, "rest": (2, [3])}


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (0, ["output_0"]),
        ((0, 0), ["output_0", "output_1"]),
        ({"last_hidden_state": 0, "pooler_output": 0}, ["last_hidden_state", "pooler_output"]),
        ({"layers": [0, {"k": 0}]}, ["layers_0", "layers_1_k"]),
        ([{"a": 0}], ["output_0_a"]),
    ],
)
def test_results_have_readable_names(output: Any, names: list[str]) -> None:
    assert signature((X,), {}, output).output_names() == names


def test_the_default_signature() -> None:
    one, two = default_signature(["x", "y"], 1), default_signature(["x"], 2)
    assert bound(one, X, Y) == bound(one, X, y=Y) == [1, 2]
    assert one.unflatten([7]) == 7
    assert two.unflatten([7, 8]) == (7, 8)
