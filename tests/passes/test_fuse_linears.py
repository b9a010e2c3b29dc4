"""Linears of one input become one: same values, one weight, names that tell where it came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.names import op_name
from graphwright.ir.provenance import add_tags, path_of, tags_of
from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.fusion.linears import FuseGateUp, FuseQKV
from graphwright.passes.verification import precise

Listing = Callable[[gw.Program], list[str]]
WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Self-attention with grouped queries; ``biased`` names the projections with a bias."""

    def __init__(self, biased: str = "") -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias="q" in biased)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias="k" in biased)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias="v" in biased)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        split: torch.Tensor = x.unflatten(-1, (-1, WIDTH // HEADS))
        return split.transpose(1, 2)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        other = x if memory is None else memory
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        q, k, v = self.heads(q), functional.normalize(self.heads(k), dim=-1), self.heads(v)
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: torch.Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class Gated(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 24, bias=biased)
        self.up_proj = nn.Linear(WIDTH, 24, bias=biased)
        self.down_proj = nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Model(nn.Module):
    """Layers of attention and a gated block, the same one twice if ``shared``."""

    def __init__(self, biased: str = "", shared: bool = False) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"attn": Attention(biased), "mlp": Gated(bool(biased))}) for _ in range(2)]
        self.layers = nn.ModuleList([layers[0], layers[0]] if shared else layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["attn"](x)
            x = x + layer["mlp"](x)
        return x


def x_of(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH)


def traced(model: nn.Module, *inputs: torch.Tensor) -> gw.Program:
    return gw.trace(model.eval(), inputs or (x_of(),), check=False)


@lru_cache
def _traced_once(biased: str) -> gw.Program:
    return traced(Model(biased))


def plain(biased: str = "") -> gw.Program:
    """The program of a model nobody has changed, a new one each time."""
    return _traced_once(biased).clone(copy_weights=True)


def count(program: gw.Program, name: str) -> int:
    return sum(gw.op_name(node) == name for node in program.nodes)


def assert_equivalent(before: gw.Program, after: gw.Program) -> None:
    for batch, length in ((2, 5), (1, 7), (3, 1)):
        x = x_of(batch, length)
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)
        exact, found = (precise.run(item, [x])[item.output.args[0][0].name] for item in (before, after))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def refusals(item: gw.Pass, program: gw.Program) -> str:
    return "\n".join(map(str, item.refusals(program)))


def weight_node(program: gw.Program, name: str) -> fx.Node:
    (node,) = [node for node in program.nodes if node.op == "get_attr" and node.target == name]
    return node


# -- query, key and value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", ["", "qkv", "qv"])
def test_query_key_and_value_become_one_linear(biased: str) -> None:
    program = plain(biased)
    before, state = program.clone(), dict(program.state_dict())
    assert FuseQKV()(program)
    assert count(program, "aten.linear") == count(before, "aten.linear") - 4
    assert_equivalent(before, program)
    assert not FuseQKV()(program)
    fused = program.state_dict()
    names = [f"layers.0.attn.{name}_proj" for name in "qkv"]
    assert torch.equal(fused["layers.0.attn.qkv_proj.weight"], torch.cat([state[f"{name}.weight"] for name in names]))
    assert not any(f"{name}.weight" in fused for name in names)
    if not biased:
        assert "layers.0.attn.qkv_proj.bias" not in fused
        return
    sizes = (WIDTH, WIDTH // 2, WIDTH // 2)
    biases = [state.get(f"{name}.bias", torch.zeros(size)) for name, size in zip(names, sizes, strict=True)]
    assert torch.equal(fused["layers.0.attn.qkv_proj.bias"], torch.cat(biases))


def test_text(listing: Listing) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v = self.attn.q_proj(x), self.attn.k_proj(x), self.attn.v_proj(x)
            return functional.scaled_dot_product_attention(q[:, None, :, :8], k[:, None], v[:, None]), q

    program = traced(Single())
    lines = [line for line in listing(program) if "slice" not in line and "unsqueeze" not in line]
    assert lines[:3] == [
        "%linear = aten.linear(%x, %attn_q_proj_weight)",
        "%linear_1 = aten.linear(%x, %attn_k_proj_weight)",
        "%linear_2 = aten.linear(%x, %attn_v_proj_weight)",
    ]
    FuseQKV()(program)
    lines = [line for line in listing(program) if "slice" not in line and "unsqueeze" not in line]
    assert lines[:2] == [
        "%qkv_proj = aten.linear(%x, %attn_qkv_proj_weight)",
        "%split_with_sizes = aten.split_with_sizes(%qkv_proj, [16, 8, 8], -1)",
    ]
    assert sorted(lines[2:5]) == [
        "%getitem = py.getitem(%split_with_sizes, 0)",
        "%getitem_1 = py.getitem(%split_with_sizes, 1)",
        "%getitem_2 = py.getitem(%split_with_sizes, 2)",
    ]
    assert path_of(program.node("qkv_proj")) == "attn.qkv_proj"


def test_layers_that_share_weights_share_the_stacked_ones() -> None:
    program = traced(Model("qkv", shared=True))
    before = program.clone()
    assert FuseQKV()(program)
    assert FuseGateUp()(program)
    names = [f"{name}.{leaf}" for name in ("attn.qkv_proj", "mlp.gate_up_proj") for leaf in ("weight", "bias")]
    assert [name for name in program.tensors() if "qkv" in name or "up" in name] == [f"layers.0.{n}" for n in names]
    # The block has two names in the model, and so has what it holds now.
    assert {f"layers.{k}.{name}" for k in range(2) for name in names} <= set(program.state_dict())
    assert_equivalent(before, program)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention("qkv")

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attn(x, memory)  # type: ignore[no-any-return]


def test_cross_attention_merges_key_and_value() -> None:
    x, memory = x_of(), x_of()
    program = traced(Cross(), x, memory)
    before = program.clone()
    assert FuseQKV()(program)
    assert {"attn.kv_proj.weight", "attn.kv_proj.bias", "attn.q_proj.weight"} <= set(program.state_dict())
    torch.testing.assert_close(program(x, memory), before(x, memory), rtol=1e-5, atol=1e-6)
    assert not FuseQKV()(program)


def test_spelled_out_attention_once_it_is_fused() -> None:
    class Spelled(Attention):
        def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            return torch.softmax(q @ k.mT * 0.5, -1) @ v

    program = traced(Spelled())
    before = program.clone()
    assert not FuseQKV()(program)
    FuseAttention()(program)
    assert FuseQKV()(program)
    assert_equivalent(before, program)
    with pytest.raises(gw.OrderError, match="fuse-attention"):
        gw.optimize(Spelled(), [FuseQKV(), FuseAttention()], example_inputs=(x_of(),))


def test_parameters_stay_trainable_and_originals_are_let_go() -> None:
    program = plain("qkv")
    FuseQKV()(program)
    parameter = dict(program.named_parameters())["layers.1.attn.qkv_proj.weight"]
    assert parameter.requires_grad
    program(x_of()).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0
    frozen = traced(Model("qkv").requires_grad_(False))
    FuseQKV()(frozen)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_names_that_are_taken_get_a_number() -> None:
    model = Model()
    model.layers[0]["attn"].qkv_proj = nn.Linear(WIDTH, WIDTH)
    program = traced(WithExtra(model))
    FuseQKV()(program)
    assert {"model.layers.0.attn.qkv_proj.weight", "model.layers.0.attn.qkv_proj_1.weight"} <= set(program.state_dict())


class WithExtra(nn.Module):
    """Uses a module that has the name the merged one would get."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.model(self.model.layers[0]["attn"].qkv_proj(x))
        return y


# -- gate and up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["spelled out", "one operator"])
@pytest.mark.parametrize("biased", ["", "qkv"])
def test_gate_and_up_become_one_linear(biased: str, fused: bool) -> None:
    program = plain(biased)
    state = dict(program.state_dict())
    if fused:
        gw.FuseGatedActivation()(program)
    before = program.clone()
    assert FuseGateUp()(program)
    assert count(program, "aten.linear") == count(before, "aten.linear") - 2
    found = program.state_dict()["layers.1.mlp.gate_up_proj.weight"]
    assert torch.equal(found, torch.cat([state["layers.1.mlp.gate_proj.weight"], state["layers.1.mlp.up_proj.weight"]]))
    assert_equivalent(before, program)
    assert not FuseGateUp()(program)


def test_text_of_gate_and_up(listing: Listing) -> None:
    program = traced(Gated())
    gw.FuseGatedActivation()(program)
    FuseGateUp()(program)
    lines = listing(program)
    assert lines[:2] == [
        "%gate_up_proj = aten.linear(%x, %gate_up_proj_weight)",
        "%split_with_sizes = aten.split_with_sizes(%gate_up_proj, [24, 24], -1)",
    ]
    assert sorted(lines[2:4]) == [
        "%getitem = py.getitem(%split_with_sizes, 0)",
        "%getitem_1 = py.getitem(%split_with_sizes, 1)",
    ]
    assert lines[4] == "%gated_activation = graphwright.gated_activation(%getitem, %getitem_1, 'silu')"


# -- what is not merged, and why ---------------------------------------------------------------------------------------


def tie(model: Model) -> None:
    model.layers[0]["attn"].k_proj.weight = model.layers[1]["attn"].k_proj.weight


def tie_within(model: Model) -> None:
    model.layers[0]["attn"].k_proj.weight = model.layers[0]["attn"].v_proj.weight


def tie_to_what_is_not_used(model: Model) -> None:
    model.layers[0]["attn"].spare = nn.Linear(WIDTH, WIDTH // 2)
    model.layers[0]["attn"].spare.weight = model.layers[0]["attn"].k_proj.weight


def freeze(model: Model) -> None:
    model.layers[0]["attn"].q_proj.weight.requires_grad_(False)


def narrow(model: Model) -> None:
    layer = model.layers[0]["attn"]
    layer.q_proj.weight = nn.Parameter(layer.q_proj.weight.detach().clone().double())
    layer.q_proj.forward = lambda x: functional.linear(x.double(), layer.q_proj.weight).float()


def compute(model: Model) -> None:
    layer = model.layers[0]["attn"].v_proj
    layer.forward = lambda x: functional.linear(x, layer.weight * 2)


def adapt(model: Model) -> None:
    layer = model.layers[0]["attn"].q_proj
    layer.down, layer.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
    layer.forward = lambda x: functional.linear(x, layer.weight) + layer.up(layer.down(x))


def shift(model: Model) -> None:
    layer = model.layers[0]["attn"].q_proj
    layer.forward = lambda x: functional.linear(torch.sin(x), layer.weight)


NOT_MERGED: dict[str, tuple[Callable[[Model], None], str]] = {
    "tied across layers": (tie, "is also read by %linear_8"),
    "tied within": (tie_within, "is tied to a weight of another name"),
    "tied to an unused one": (tie_to_what_is_not_used, "k_proj.weight is tied to a weight of another name"),
    "one frozen": (freeze, "one weight is trainable and another is not"),
    "computed weight": (compute, "the weight %mul is computed"),
    "a branch beside it": (adapt, "depends on 2 linears, not on one"),
}


@pytest.mark.parametrize("name", NOT_MERGED)
def test_left_alone(name: str) -> None:
    change, reason = NOT_MERGED[name]
    model = Model()
    change(model)
    program = traced(model)
    before = program.clone()
    FuseQKV()(program)
    assert "layers.0.attn.qkv_proj.weight" not in program.state_dict()
    assert reason in refusals(FuseQKV(), before)
    assert_equivalent(before, program)


def test_other_inputs_are_left_alone() -> None:
    model = Model()
    shift(model)
    program = traced(model)
    FuseQKV()(program)
    assert {"layers.0.attn.kv_proj.weight", "layers.0.attn.q_proj.weight"} <= set(program.state_dict())

    class Apart(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = functional.silu(self.gate_proj(x)) * self.up_proj(torch.sin(x))
            return out

    program = traced(Apart())
    assert not FuseGateUp()(program)
    assert "gate and up read different values" in refusals(FuseGateUp(), program)


def test_query_key_and_value_of_three_inputs_are_left_alone() -> None:
    class Apart(Attention):
        def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
            q, k, v = self.q_proj(x), self.k_proj(torch.sin(x)), self.v_proj(torch.cos(x))
            return functional.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v), enable_gqa=True)

    program = traced(Apart())
    assert not FuseQKV()(program)
    assert "query, key and value read different values" in refusals(FuseQKV(), program)


def test_weights_read_elsewhere_are_left_alone() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.model(x) + self.model.layers[0]["attn"].k_proj.weight.sum()
            return y

    program = traced(Read())
    FuseQKV()(program)
    assert "model.layers.0.attn.k_proj.weight" in program.state_dict()
    assert "model.layers.1.attn.qkv_proj.weight" in program.state_dict()
    assert "k_proj.weight is also read by %sum_1" in refusals(FuseQKV(), traced(Read()))


def test_other_dtypes_are_left_alone() -> None:
    program = plain()
    weight = weight_node(program, "layers.0.attn.q_proj.weight")
    program.set_tensor(str(weight.target), nn.Parameter(program.tensor(weight).detach().double()))
    assert "the weights differ in dtype or device" in refusals(FuseQKV(), program)


def test_quantised_linears_are_left_alone() -> None:
    program = plain()
    gw.QuantizeLinears(bits=8)(program)
    assert not FuseQKV()(program)
    assert not FuseGateUp()(program)
    for item in (FuseQKV(), FuseGateUp()):
        assert "quantised or compressed already: merge linears before that" in refusals(item, program)
        with pytest.raises(gw.OrderError, match="quantize-linears"):
            gw.optimize(Model().eval(), [gw.QuantizeLinears(bits=8), item], example_inputs=(x_of(),))


def test_tags_and_selection() -> None:
    program = plain()
    (query, *_) = [node for node in program.nodes if path_of(node) == "layers.0.attn.q_proj"]
    add_tags(query, ["adapter"])
    assert FuseQKV()(program)
    assert "layers.0.attn.q_proj.weight" in program.state_dict()
    assert "is tagged adapter" in refusals(FuseQKV(), program)
    program = plain()
    (query, *_) = [node for node in program.nodes if path_of(node) == "layers.0.attn.q_proj"]
    add_tags(query, ["masked"])
    assert "the linears carry different tags" in refusals(FuseQKV(), program)
    program = plain()
    assert FuseQKV(where="layers.1")(program)
    assert {"layers.0.attn.q_proj.weight", "layers.1.attn.qkv_proj.weight"} <= set(program.state_dict())
    assert "is not selected by where= / ignore=" in refusals(FuseQKV(where="layers.1"), plain())


@pytest.mark.parametrize("kind", [gw.LoRA(rank=2, alpha=4), gw.KronA()])
def test_adapters_go_on_reading_their_part(kind: Any) -> None:
    program = plain()
    gw.InsertAdapters(kind, where=["*.q_proj", "*.v_proj"])(program)
    with torch.no_grad():
        for each in gw.adapter_tensors(program, "default").values():
            each.normal_(0, 0.1, generator=torch.Generator().manual_seed(each.numel()))
    before = program.clone()
    assert FuseQKV()(program)
    assert "layers.0.attn.qkv_proj.weight" in program.state_dict()
    assert_equivalent(before, program)
    (part, *_) = [node for node in program.nodes if op_name(node) == "py.getitem" and node.args[1] == 0]
    (adapted,) = [user for user in part.users if "adapter/default/exit" in tags_of(user)]
    assert list(part.users) == [adapted]
    gw.RemoveAdapters()(program)
    bare = plain()
    FuseQKV()(bare)
    assert_equivalent(bare, program)
