"""What the verifier looks at: sizes of 1, conditions on sizes, every row of a table, stored constants, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.passes.verification import precise
from graphwright.passes.verification.local import check_locally
from graphwright.passes.verification.sampling import small_sizes


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Lookup(nn.Module):
    def __init__(self, rows: int = 5000) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.table(ids).relu()
        return result


@dataclass(frozen=True, kw_only=True)
class ChangeTable(gw.Pass):
    """Look up in another table."""

    name: ClassVar[str] = "change-table"
    change: Callable[[torch.Tensor], torch.Tensor]

    def run(self, program: gw.Program) -> bool:
        with program.edit() as rewriter:
            (lookup,) = (node for node in program.nodes if gw.op_name(node) == "aten.embedding")
            table = self.change(program.tensor(lookup.args[0]).detach().clone())
            made = rewriter.weight("other", table, like=lookup)
            rewriter.replace(lookup, rewriter.call("aten.embedding", made, lookup.args[1], like=lookup))
        return True


def verified(program: gw.Program, item: gw.Pass, *inputs: torch.Tensor) -> gw.Report:
    return gw.run_passes(program, [item], [gw.Verifier(list(inputs))])


def test_one_variant_has_sizes_of_one() -> None:
    program = gw.trace(Lookup(), torch.randint(0, 9, (2, 5)))
    assert small_sizes(program, 0) == {"batch": 2, "sequence": 9}
    assert small_sizes(program, 1) == {"batch": 1, "sequence": 1}


def test_sizes_meet_the_conditions() -> None:
    program = gw.trace(Applied(lambda x: x.reshape(x.shape[0], -1, 2, 8).sum(2)), torch.randn(2, 6, 8))
    assert program.symbols.conditions
    for variant in range(3):
        sizes = small_sizes(program, variant)
        assert sizes["sequence"] % 2 == 0
        program(torch.randn(sizes["batch"], sizes["sequence"], 8))


def test_every_row_of_a_table_is_compared() -> None:
    """The probes hold some tens of the 5000 rows."""

    def spoil(table: torch.Tensor) -> torch.Tensor:
        table[4321, 3] += 1e-3
        return table

    ids = torch.randint(0, 100, (2, 5))
    program = gw.trace(Lookup(), ids)
    with pytest.raises(gw.ContractViolation, match="change-table"):
        verified(program, ChangeTable(change=spoil), ids)
    assert verified(program, ChangeTable(change=lambda table: table), ids).rows[0].changed


def test_rows_may_be_added_to_a_table() -> None:
    ids = torch.randint(0, 100, (2, 5))
    program = gw.trace(Lookup(100), ids)
    pad = ChangeTable(change=lambda table: torch.cat([table, torch.zeros(28, 8)]))
    assert verified(program, pad, ids).rows[0].changed


def test_a_stored_constant_is_compared_with_what_the_program_computes() -> None:
    """sin of large numbers in float32 is far from its float64 value; folding it changes nothing all the same."""
    program = gw.trace(Applied(lambda x: x + torch.sin(torch.arange(8) * 12345.678)), torch.randn(2, 5, 8))
    x = torch.randn(2, 5, 8)
    report = verified(program, gw.FoldConstants(), x)
    assert report.rows[0].changed
    assert report.rows[0].outputs["output_0"]["previous"]["worst"] == 0.0


def test_a_constant_that_was_stored_rounded_is_read_as_it_is_stored() -> None:
    """A pass that reads the stored √48 gets float32 digits; beside the exact root of before it would look wrong."""

    @dataclass(frozen=True, kw_only=True)
    class ReadDivisor(gw.Pass):
        name: ClassVar[str] = "read-divisor"

        def run(self, program: gw.Program) -> bool:
            divided = next(node for node in program.nodes if gw.op_name(node) == "aten.div.Tensor")
            factor = 1 / float(program.tensor(divided.args[1]))
            with program.edit() as rewriter:
                rewriter.replace(divided, rewriter.call("aten.mul.Tensor", divided.args[0], factor, like=divided))
            return True

    x = torch.randn(2, 5, 8)
    model = Applied(lambda x: x / torch.sqrt(torch.tensor(48.0)))
    small = gw.optimize(model, [gw.Cleanup(), ReadDivisor()], example_inputs=x)
    error = small.report.rows[-1].local_error
    assert error is not None
    assert error < 1e-12


def test_a_stored_value_that_an_input_influences_is_caught() -> None:
    @dataclass(frozen=True, kw_only=True)
    class StoreMean(gw.Pass):
        name: ClassVar[str] = "store-mean"

        def run(self, program: gw.Program) -> bool:
            mean = program.node("mean")
            with program.edit() as rewriter:
                rewriter.replace(mean, rewriter.weight("mean_folded", torch.tensor(0.25), like=mean))
            return True

    x = torch.randn(2, 5, 8)
    program = gw.trace(Applied(lambda x: x * x.mean()), x)
    with pytest.raises(gw.ContractViolation, match="store-mean"):
        verified(program, StoreMean(), x)


def test_the_default_epsilon_of_rms_norm_is_that_of_the_dtype() -> None:
    """In float64 torch would take another one, and a right fusion would look wrong."""
    x = torch.randn(2, 5, 8) * 1e-3
    program = gw.trace(Applied(lambda x: functional.rms_norm(x, (8,))), x)
    values = precise.run(program, [x])
    before = program.snapshot()
    gw.FuseRMSNorm()(program)
    worst = check_locally(before, values, program).worst()
    assert worst is not None
    assert worst.difference.worst < 1e-14
    eps = torch.finfo(torch.float32).eps
    exact = functional.rms_norm(x.double(), (8,), None, eps)
    assert torch.allclose(next(iter(values.values())) if len(values) == 1 else values["rms_norm"], exact, atol=1e-14)
