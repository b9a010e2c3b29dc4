"""Calibration data on its way through a program: which values are kept, which rows count, what later calls read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.passes.calibration import Stream, blocks_of
from graphwright.passes.calibration import store as storing
from graphwright.passes.calibration.store import ValueStore
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.gptq import Gptq, gptq
from graphwright.passes.quantization.weights import PackedWeight, pack_codes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Encoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        pooled = (x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        y: torch.Tensor = self.head(pooled)
        return y


def padded(seed: int, batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, length // 2 :] = 0
    return {"ids": torch.randint(0, 50, (batch, length), generator=generator), "attention_mask": mask}


BATCHES = [padded(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(1)
    return gw.trace(Encoder(), padded(9, 3, 5))


def linears(program: gw.Program) -> list[Any]:
    return [node for node in program.nodes if gw.op_name(node) == "aten.linear"]


def by_path(program: gw.Program, path: str) -> Any:
    return next(node for node in linears(program) if gw.path_of(node) == path)


def test_values_are_those_of_the_program(program: gw.Program) -> None:
    model_values: list[torch.Tensor] = []
    target = by_path(program, "layers.1.up")
    for batch in BATCHES:
        values = dict(zip(program.inputs, batch.values(), strict=True))
        calls = [node for node in program.nodes if node.op == "call_function"]
        found = run_nodes(program, calls[: calls.index(target)], values)
        model_values.append(found[target.args[0]])
    with Stream(program, BATCHES) as stream:
        stream.advance(by_path(program, "layers.0.down"))
        stream.advance(target)
        assert all(torch.equal(stream.value(target.args[0], index), each) for index, each in enumerate(model_values))
        wanted = [each[batch["attention_mask"].bool()] for each, batch in zip(model_values, BATCHES, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(stream.rows(target.args[0]), wanted, strict=True))


def test_only_what_is_read_later_is_kept(program: gw.Program) -> None:
    with Stream(program, BATCHES) as stream:
        assert [node.name for node in stream.live()] == ["ids", "attention_mask"]
        up = by_path(program, "layers.1.up")
        stream.advance(up)
        live = stream.live()
        assert [node.name for node in live] == ["attention_mask", up.args[0].name]
        assert len(stream._values._entries) == len(BATCHES) * len(live)
        with pytest.raises(gw.ProgramError, match="not known"):
            stream.value(program.inputs[0], 0)
        stream.advance()
        assert stream.live() == []
        assert not stream._values._entries


def test_it_never_goes_back(program: gw.Program) -> None:
    with Stream(program, BATCHES) as stream:
        stream.advance(by_path(program, "layers.2.up"))
        before = [node.name for node in stream.live()]
        stream.advance(by_path(program, "layers.0.up"))
        assert [node.name for node in stream.live()] == before
        with pytest.raises(gw.ProgramError, match="already been moved"):
            stream.fork()
        with pytest.raises(gw.ProgramError, match="already been moved"):
            stream.digest()


def test_a_fork_sees_the_same_batches(program: gw.Program) -> None:
    """Also those of a loader that gives others each time."""

    class Shuffled:
        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter([padded(100 * self.times), padded(100 * self.times + 1)])

    data = Shuffled()
    with Stream(program, data) as stream, stream.fork() as other:
        assert data.times == 1
        assert stream.digest() == other.digest()
        target = by_path(program, "layers.1.up")
        stream.replace_weight("layers.0.up.weight", torch.zeros(24, 16))
        stream.advance(target)
        other.advance(target)
        changed, same = (next(each.rows(target.args[0])) for each in (stream, other))
        assert not torch.equal(changed, same)


def test_digests_tell_data_apart(program: gw.Program) -> None:
    def digest(batches: Any) -> str:
        with Stream(program, batches) as stream:
            return stream.digest()

    other = [dict(batch) for batch in BATCHES]
    other[2] = {**other[2], "ids": other[2]["ids"].clone()}
    other[2]["ids"][0, 0] += 1
    found = [digest(each) for each in (BATCHES, list(BATCHES), other, BATCHES[:2], BATCHES[::-1])]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_replaced_weight_is_read_by_all_its_nodes() -> None:
    """The same weight behind two nodes, the first of which is passed long before the second."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(torch.relu(self.a(x)))
            return y

    x = torch.randn(5, 8)
    program = gw.trace(Tied(), x)
    first, second = linears(program)
    with program.edit() as rewriter:  # a second node for the weight, as other passes may leave it
        again = rewriter.weight("again", program.tensor("a.weight"), like=second)
        again.target = "a.weight"
        second.update_arg(1, again)
    identity = torch.eye(8)
    with Stream(program, [x]) as stream:
        stream.replace_weight("a.weight", 2 * identity)
        stream.advance(second)
        torch.testing.assert_close(stream.value(second.args[0], 0), torch.relu(2 * x))
        assert "a.weight" in stream._weights
        stream.advance(program.output)
        torch.testing.assert_close(stream.value(second, 0), 2 * torch.relu(2 * x))
    assert first.args[1] is not second.args[1]


def test_linears_see_what_the_rounded_ones_before_them_give(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    program = gw.trace(nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)), torch.randn(40, 16))
    x = torch.randn(64, 16)

    seen: list[torch.Tensor] = []
    original = Gptq.codes

    def codes(self: Any, weight: torch.Tensor, form: Any, inputs: Any) -> Any:
        seen.append(inputs.moment.clone())
        return original(self, weight, form, inputs)

    monkeypatch.setattr(Gptq, "codes", codes)
    exact = program.tensor("1.weight").clone()
    small = gw.optimize(program, [gw.QuantizeLinears(bits=4, group_size=16, calibration=[x])], example_inputs=x)

    first = dequantize(small.tensor("0.qweight"), small.tensor("0.scales"), None, 4, 16, torch.float32)
    between = x @ first.T
    torch.testing.assert_close(seen[0], x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen[1], between.T @ between, rtol=1e-4, atol=1e-3)
    unrounded = x @ program.tensor("0.weight").T
    assert float((seen[1] - (unrounded.T @ unrounded).detach()).norm() / seen[1].norm()) > 1e-3
    assert torch.equal(program.tensor("1.weight"), exact)


# -- rows --------------------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Rows in one dimension, a weight stored ``[in, out]``: GPT-2's spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.weight = nn.Parameter(torch.randn(16, 12))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        rows = torch.addmm(self.bias, x.view(-1, 16), self.weight)
        return rows.view(*ids.shape, 12) * attention_mask.unsqueeze(-1)


def test_padding_is_left_out_of_flat_rows_too() -> None:
    program = gw.trace(Flat(), padded(9, 3, 5))
    node = next(node for node in program.nodes if gw.op_name(node) == "aten.addmm")
    with Stream(program, BATCHES) as stream:
        stream.advance(node)
        rows = list(stream.rows(node.args[1]))
        table = program.tensor("embed.weight").detach()
        for found, batch in zip(rows, BATCHES, strict=True):
            assert torch.equal(found, table[batch["ids"][batch["attention_mask"].bool()]])
    with Stream(program, BATCHES, mask_input=None) as stream:
        stream.advance(node)
        assert [len(rows) for rows in stream.rows(node.args[1])] == [12, 12, 12]


def test_transposed_weights_are_rounded_for_their_inputs() -> None:
    torch.manual_seed(5)
    program = gw.trace(Flat(), padded(9, 3, 5))
    data = [padded(seed, 4, 16) for seed in range(4)]
    item = gw.QuantizeLinears(bits=4, group_size=16, calibration=data)
    small = gw.optimize(program, [item], example_inputs=padded(9, 3, 5))

    table = program.tensor("embed.weight").detach()
    rows = torch.cat([table[batch["ids"][batch["attention_mask"].bool()]] for batch in data])
    wanted = pack_codes(gptq(program.tensor("weight").t(), rows.T @ rows, form := Format(4, 16, True, True)), form)
    assert isinstance(wanted, PackedWeight)
    found = dequantize(small.tensor("qweight"), small.tensor("scales"), None, 4, 16, torch.float32)
    assert float((found - wanted.dense()).norm() / wanted.dense().norm()) < 0.02


def test_pooled_values_have_no_padding(program: gw.Program) -> None:
    with Stream(program, BATCHES) as stream:
        head = by_path(program, "head")
        stream.advance(head)
        assert [rows.shape for rows in stream.rows(head.args[0])] == [(2, 16)] * 3


@pytest.mark.parametrize("kind", ["added", "square"])
def test_masks_of_other_kinds_do_not_tell_padding(kind: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            scores = self.linear(x) @ x.transpose(1, 2) + attention_mask
            return torch.softmax(scores, -1) @ x

    mask = torch.zeros(3, 1, 5) if kind == "added" else torch.zeros(5, 5)
    mask[..., -1] = float("-inf")
    batch = {"x": torch.randn(3, 5, 8), "attention_mask": mask}
    program = gw.trace(Masked(), batch, dynamic=None) if kind == "square" else gw.trace(Masked(), batch)
    with Stream(program, [batch]) as stream:
        assert [len(rows) for rows in stream.rows(program.inputs[0])] == [15]


def test_inputs_that_are_sources() -> None:
    x = torch.randn(64, 16)
    program = gw.trace(nn.Linear(16, 8), x)
    small = gw.optimize(program, [gw.QuantizeLinears(bits=4, group_size=16, calibration=[x])], example_inputs=x)
    assert small.report.rows[0].notes["weights"]["weight"]["relative"] < 0.15


def test_a_constant_that_is_a_source() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 16))
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x @ self.linear(self.table).T
            return y

    x = torch.randn(3, 16)
    small = gw.optimize(
        gw.trace(Table(), x), [gw.QuantizeLinears(bits=4, group_size=16, calibration=[x])], example_inputs=x
    )
    assert small.report.rows[0].notes["linears"] == 1


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_blocks_are_the_layers(program: gw.Program) -> None:
    blocks = blocks_of(program)
    assert [block.path for block in blocks] == ["", "layers.0", "layers.1", "layers.2", ""]
    assert [node for block in blocks for node in block.nodes] == [n for n in program.nodes if n.op == "call_function"]
    for block in blocks[1:-1]:
        assert {gw.path_of(node) for node in block.nodes if gw.op_name(node) == "aten.linear"} == {
            f"{block.path}.up",
            f"{block.path}.down",
        }


def test_a_program_without_layers_is_one_block() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.up(x))

    x = torch.randn(4, 8)
    program = gw.trace(Plain(), x)
    (block,) = blocks_of(program)
    assert block.path == ""
    assert len(block.nodes) == 2
    with Stream(program, [x]) as stream:
        stream.advance(program.output)
        assert torch.equal(stream.value(block.nodes[-1], 0), program(x))


def test_gradients_flow_through_a_stretch(program: gw.Program) -> None:
    block = blocks_of(program)[1]
    with Stream(program, BATCHES) as stream:
        stream.advance(block.nodes[0])
        weight = program.tensor("layers.0.up.weight").detach().clone().requires_grad_()
        values = {node: stream.value(node, 0) for node in stream.live()}
        twins = [stream.twin(node) for node in block.nodes]
        found = run_nodes(stream.program, twins, values, {"layers.0.up.weight": weight})
        found[twins[-1]].sum().backward()
        assert weight.grad is not None
        assert float(weight.grad.abs().sum()) > 0
        assert not any(value.requires_grad for value in values.values())


# -- where values lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_values_beyond_the_limit_lie_in_files(dtype: torch.dtype) -> None:
    store = ValueStore(limit=40_000)
    values = [torch.randn(40, 500).mul(3).to(dtype) for _ in range(4)]
    for index, value in enumerate(values):
        store.put(index, "x", value)
    folder = Path(store._folder.name)
    assert store.in_memory <= 40_000
    assert store.in_files == len(list(folder.iterdir())) >= 2
    assert all(torch.equal(store.get(index, "x"), value) for index, value in enumerate(values))
    for index in range(4):
        store.drop(index, "x")
    assert store.in_memory == 0
    assert not list(folder.iterdir())
    store.close()
    assert not folder.exists()


def test_small_things_and_nested_ones() -> None:
    store = ValueStore(limit=0)
    large = torch.randn(100, 100)
    store.put(0, "x", [7, torch.ones(3), (large.t(), None)])
    number, ones, (found, nothing) = store.get(0, "x")
    assert number == 7
    assert torch.equal(ones, torch.ones(3))
    assert torch.equal(found, large.t())
    assert nothing is None
    assert store.in_files == 1
    assert store.in_memory == 12
    store.put(0, "x", 3)
    assert store.get(0, "x") == 3
    assert store.in_files == 0
    assert store.in_memory == 0
    store.close()


def test_a_part_does_not_keep_the_whole() -> None:
    store = ValueStore()
    whole = torch.randn(1000, 100)
    store.put(0, "part", whole[:10])
    assert store.get(0, "part").untyped_storage().nbytes() == store.in_memory == 4000
    store.put(0, "wide", torch.zeros(()).expand(5000, 5000))
    assert store.in_memory == 4004
    assert store.in_files == 0
    assert store.get(0, "wide").shape == (5000, 5000)
    store.close()


def test_results_do_not_depend_on_where_values_lie(program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [padded(seed, 8, 20) for seed in range(3)]
    item = gw.QuantizeLinears(bits=4, group_size=16, ignore="head", calibration=data)
    first = gw.optimize(program, [item], example_inputs=padded(1), verify=False)
    monkeypatch.setattr(storing, "_LEAST", 1)
    monkeypatch.setattr(storing.ValueStore.__init__, "__defaults__", (0,))
    loads: list[Any] = []
    load = storing._Filed.load

    def counted(self: Any) -> torch.Tensor:
        loads.append(self.shape)
        return load(self)

    monkeypatch.setattr(storing._Filed, "load", counted)
    second = gw.optimize(program, [item], example_inputs=padded(1), verify=False)
    assert len(loads) > 10
    assert all(torch.equal(first.tensors()[name], value) for name, value in second.tensors().items())
