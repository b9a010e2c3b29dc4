"""Row selection and tables of positions in decoding steps: before and after, what stays, and the same results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir import ops
from graphwright.ir.decoder import DecoderLayout, draw_step
from graphwright.ir.names import op_name
from graphwright.passes.pipeline import run_passes

select = ops.get("select_rows").target
append, attend = ops.get("cache_append").target, ops.get("cached_attention").target

WIDTH, VOCABULARY = 8, 30


class Step(nn.Module):
    """The smallest decoding step: a value of the positions, one attention, and a tail on selected rows."""

    def __init__(self, positions: Callable[..., Any] | None = None, tail: Callable[..., Any] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.of_positions, self.tail = positions, tail
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, WIDTH, generator=generator), freeze=False)
        self.learned = nn.Embedding.from_pretrained(torch.randn(40, WIDTH, generator=generator), freeze=False)
        self.register_buffer("frequencies", torch.rand(WIDTH // 2, generator=generator))
        self.scale = nn.Parameter(torch.rand(WIDTH, generator=generator))
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self,
        input_ids: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> dict[str, Any]:
        batch, tokens = input_ids.shape
        x = self.embed(input_ids)
        if self.of_positions is not None:
            x = x + self.of_positions(self, starts.unsqueeze(1) + torch.arange(tokens), x)
        heads = x.view(batch, tokens, 2, WIDTH // 2).transpose(1, 2)
        keys, values = [append(keys[0], heads, slots, starts)], [append(values[0], heads, slots, starts)]
        mixed = attend(heads, keys[0], values[0], slots, starts, None, 0.5, 0, 0.0)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, WIDTH)
        hidden = x + mixed if self.tail is None else self.tail(self, x, mixed)
        return {"logits": self.head(select(hidden, rows)), "keys": keys, "values": values}


def step(positions: Callable[..., Any] | None = None, tail: Callable[..., Any] | None = None) -> gw.Program:
    example = {
        "input_ids": torch.randint(0, VOCABULARY, (2, 5)),
        "slots": torch.tensor([2, 0]),
        "starts": torch.tensor([3, 1]),
        "rows": torch.tensor([[0, 2, 4], [1, 3, 4]]),
        "keys": [torch.randn(4, 2, 11, WIDTH // 2)],
        "values": [torch.randn(4, 2, 11, WIDTH // 2)],
    }
    cache = {0: "slots", 2: "capacity"}
    dynamic: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "tokens"},
        "slots": {0: "batch"},
        "starts": {0: "batch"},
        "rows": {0: "batch", 1: "selected"},
        "keys.0": cache,
        "values.0": cache,
    }
    program = gw.trace(Step(positions, tail).eval(), example, dynamic=dynamic, check=False)
    run_passes(program, [gw.Cleanup()])
    assert DecoderLayout.find(program) is not None
    return program


def operators(program: gw.Program) -> list[str]:
    return [op_name(node) for node in program.nodes if node.op == "call_function"]


def verified(program: gw.Program, item: gw.Pass) -> gw.Program:
    """The program after the pass, which has been verified; a second run changes nothing."""
    small = gw.optimize(program, [item])
    assert small.report.rows[0].changed
    assert not item(small)
    return small


def inputs(program: gw.Program, **sizes: int) -> list[torch.Tensor]:
    wanted = {"batch": 2, "tokens": 6, "selected": 2, "slots": 3, "capacity": 12, **sizes}
    return draw_step(program, wanted, torch.Generator().manual_seed(3))


# -- rows ------------------------------------------------------------------------------------------------------------


def _block(m: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    first = x + mixed * m.scale
    hidden = nn.functional.gelu(m.up(nn.functional.layer_norm(first, (WIDTH,))))
    low, high = m.up(first).split(WIDTH, dim=-1)
    result: torch.Tensor = first + m.down(hidden) + torch.cat([low[..., :3], high[..., 3:]], dim=-1)
    return result


def test_selection_moves_over_the_last_block() -> None:
    program = step(tail=_block)
    small = verified(program, gw.HoistRowSelection())
    names = operators(small)
    chosen = [node for node in small.nodes if op_name(node) == "graphwright.select_rows"]
    assert {op_name(node.args[0]) for node in chosen} == {"aten.embedding", "aten.reshape"}
    assert len(chosen) == 2
    behind = names[names.index("graphwright.select_rows") :]
    assert behind.count("aten.linear") == 4
    given = inputs(program)
    for a, b in zip(small.body(*given), program.body(*given), strict=True):
        torch.testing.assert_close(a, b)
    shapes = {str(small.type_of(node)) for node in small.nodes if op_name(node) == "aten.linear"}
    assert all("selected" in shape for shape in shapes)


def test_a_selection_of_no_rows_is_run() -> None:
    small = verified(step(tail=_block), gw.HoistRowSelection())
    assert small.body(*inputs(small, selected=0))[0].shape == (2, 0, VOCABULARY)


ROWS_STAY: dict[str, tuple[Callable[..., Any], str]] = {
    "mixes rows": (lambda m, x, mixed: (x + mixed).cumsum(1), "none of the known operators"),
    "along the rows": (lambda m, x, mixed: torch.softmax(x + mixed, 1), "is along the rows"),
    "broadcast along rows": (lambda m, x, mixed: mixed + x.mean(1, keepdim=True), "broadcast along the rows"),
    "norm over rows too": (lambda m, x, mixed: nn.functional.layer_norm(mixed[:, :, :], (WIDTH,)).mT.mT, ""),
}


@pytest.mark.parametrize("name", ROWS_STAY)
def test_what_mixes_rows_stays(name: str) -> None:
    tail, reason = ROWS_STAY[name]
    program = step(tail=tail)
    item = gw.HoistRowSelection()
    given = inputs(program)
    before = program.body(*given)
    refusals = item.refusals(program)
    changed = item(program)
    assert changed == (reason == "")
    if reason:
        assert any(reason in refusal.reason for refusal in refusals)
    torch.testing.assert_close(program.body(*given)[0], before[0])


def test_what_is_read_for_other_rows_stays() -> None:
    def tail(m: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.relu(x + mixed)
        result: torch.Tensor = torch.tanh(hidden) + hidden.cumsum(1)
        return result

    program = step(tail=tail)
    item = gw.HoistRowSelection()
    assert any("reads its other rows too" in refusal.reason for refusal in item.refusals(program))
    assert item(program)  # over the sum and the tanh, not over the relu
    relu = next(node for node in program.nodes if op_name(node) == "aten.relu")
    assert "tokens" in str(program.type_of(relu))


def test_rows_respects_where() -> None:
    program = step(tail=_block)
    item = gw.HoistRowSelection(ignore=lambda node: op_name(node) == "aten.add.Tensor")
    assert not item(program)
    assert any("not selected" in refusal.reason for refusal in item.refusals(program))


# -- flattened rows --------------------------------------------------------------------------------------------------


def _flattened(m: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    flat = (x + mixed).reshape(-1, WIDTH)
    hidden = m.down(nn.functional.relu(m.up(nn.functional.layer_norm(flat, (WIDTH,)))))
    result: torch.Tensor = (flat + hidden * m.scale).view(x.shape)
    return result


def test_flattened_rows_are_told_apart() -> None:
    program = step(tail=_flattened)
    count = operators(program).count("aten.reshape")
    small = verified(program, gw.UnflattenRows())
    assert operators(small).count("aten.reshape") == count - 2
    given = inputs(program)
    for a, b in zip(small.body(*given), program.body(*given), strict=True):
        torch.testing.assert_close(a, b)
    assert gw.HoistRowSelection()(small)
    assert len([node for node in small.nodes if op_name(node) == "graphwright.select_rows"]) == 2


def _exit(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tail that flattens, does something, and tells rows apart again."""
    return lambda m, x, mixed: function(m, (x + mixed).reshape(-1, WIDTH)).view(x.shape)


FLAT_STAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "mixes rows": (_exit(lambda m, flat: m.down(m.up(flat)).cumsum(0)), "none of the known operators"),
    "mixes rows first": (_exit(lambda m, flat: torch.relu(flat.cumsum(0))), "does not come from [batch"),
    "along rows": (_exit(lambda m, flat: torch.softmax(flat, 0)), "along the rows"),
    "read flat too": (
        _exit(lambda m, flat: (lambda y: y + y.sum())(torch.relu(flat))),
        "reads it without batch and tokens",
    ),
    "other rows": (lambda m, x, mixed: torch.relu(mixed.reshape(-1, 4)).view(x.shape), ""),
}


@pytest.mark.parametrize("name", FLAT_STAYS)
def test_what_needs_flat_rows_stays(name: str) -> None:
    tail, reason = FLAT_STAYS[name]
    program = step(tail=tail)
    item = gw.UnflattenRows()
    refusals = item.refusals(program)
    assert not item(program)
    assert any(reason in refusal.reason for refusal in refusals) if reason else not refusals


# -- positions -------------------------------------------------------------------------------------------------------


def _rotary(m: Any, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    angles = positions[..., None].float() * m.frequencies
    angles = torch.cat([angles, angles], dim=-1)
    result: torch.Tensor = (angles.cos() * x).sin() + (angles.cos() * 1.25).to(torch.float32) * x + angles.sin() * x
    return result


def test_rotary_values_become_tables() -> None:
    program = step(_rotary)
    small = verified(program, gw.TabulatePositions(length=20))
    tables = {name: tensor.shape for name, tensor in small.tensors().items() if name.endswith("_table")}
    assert list(tables.values()) == [(20, WIDTH)] * 3
    assert operators(small).count("aten.embedding") == 4
    assert not {"aten.cos", "aten.cat", "aten.to.dtype"} & set(operators(small))
    given = inputs(program)
    for a, b in zip(small.body(*given), program.body(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_position_behind_the_table_raises() -> None:
    small = verified(step(_rotary), gw.TabulatePositions(length=20))
    given = inputs(small, capacity=30)
    given[2] = torch.tensor([14, 15])
    with pytest.raises(IndexError):
        small.body(*given)
    given[2] = torch.tensor([14, 14])
    assert torch.isfinite(small.body(*given)[0]).all()


def test_tables_of_the_same_content_are_one() -> None:
    def twice(m: Any, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        column = positions.unsqueeze(-1)
        first = (column * m.frequencies[0]).cos()
        result: torch.Tensor = first * x + (column.float() * m.frequencies[:1]).cos() * x * 2
        return result

    program = step(twice)
    small = verified(program, gw.TabulatePositions(length=20))
    assert sum(name.endswith("_table") for name in small.tensors()) == 1


def test_learned_positions_lose_their_offset() -> None:
    program = step(lambda m, positions, x: m.learned(positions + 2))
    small = verified(program, gw.TabulatePositions())
    (name,) = (name for name in small.tensors() if name.endswith("_table"))
    assert torch.equal(small.tensor(name), program.tensor("learned.weight")[2:])
    assert isinstance(small.tensor(name), nn.Parameter)
    assert "learned.weight" not in small.tensors()


@dataclass(frozen=True, kw_only=True)
class _SpoiltTable(gw.TabulatePositions):
    """Gets one row wrong that no probe reaches."""

    name: ClassVar[str] = "spoilt-table"

    def run(self, program: gw.Program) -> bool:
        changed = super().run(program)
        name = next(name for name in program.tensors() if name.endswith("_table"))
        table = program.tensor(name).clone()
        table[900] += 1e-3
        program.set_tensor(name, table)
        return changed


def test_every_row_of_a_table_is_verified() -> None:
    with pytest.raises(gw.ContractViolation, match="spoilt-table"):
        gw.optimize(step(_rotary), [_SpoiltTable()])


POSITIONS_STAY: dict[str, tuple[Callable[..., Any], str]] = {
    "a lookup already": (lambda m, positions, x: m.learned(positions), ""),
    "integers": (lambda m, positions, x: (positions + 1).unsqueeze(-1) * x.long(), ""),
    "of the text": (lambda m, positions, x: (positions[..., None] * x).cos(), "it depends on %embedding too"),
    "of the length": (
        lambda m, positions, x: (positions[..., None].float() / torch.full((1,), 1.0 * positions.shape[1])).cos(),
        "too, not on positions alone",
    ),
    "over tokens": (lambda m, positions, x: positions.cumsum(1)[..., None].cos(), "none of the known operators"),
    "between tokens": (lambda m, positions, x: positions.unsqueeze(1).float().mT.cos(), "along the batch"),
    "of a parameter": (
        lambda m, positions, x: (positions[..., None] * m.scale).cos(),
        "it depends on the trainable parameter 'scale'",
    ),
}


@pytest.mark.parametrize("name", POSITIONS_STAY)
def test_what_depends_on_more_stays(name: str) -> None:
    positions, reason = POSITIONS_STAY[name]
    program = step(positions)
    item = gw.TabulatePositions()
    refusals = item.refusals(program)
    assert not item(program)
    assert any(reason in refusal.reason for refusal in refusals) if reason else True


def test_only_decoding_steps_have_positions() -> None:
    program = gw.trace(nn.Linear(3, 4), torch.ones(2, 3))
    assert not gw.TabulatePositions()(program)


@pytest.mark.parametrize("length", [0, -3, True, 2.5])
def test_length_is_a_number_of_positions(length: Any) -> None:
    with pytest.raises(gw.InputError, match="number of positions"):
        gw.TabulatePositions(length=length)
