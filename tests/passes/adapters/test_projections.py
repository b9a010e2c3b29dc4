"""R-LoDA's and S-LoDA's base: projections of attentions, approximated together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import stirred
from tests.passes.adapters.families import BATCH, FAMILIES, traced

import graphwright as gw
from graphwright.passes.adapters.inserted import adapters_of

PARTS = {
    "bert": [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")],
    "llama": [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
    "gpt2": ["transformer.h.0.attn.c_attn"],
}


def stacked(model: torch.nn.Module, family: str) -> torch.Tensor:
    weights = [model.get_parameter(f"{path}.weight").detach().double() for path in PARTS[family]]
    return weights[0].t() if family == "gpt2" else torch.cat(weights)


@pytest.mark.parametrize("family", sorted(PARTS))
def test_the_best_approximation_of_a_rank(family: str) -> None:
    model = FAMILIES[family]()
    whole = stacked(model, family)
    small = gw.optimize(traced(family), [gw.ReduceProjections(rank=7)], example_inputs=BATCH)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :7] * s[:7] @ v[:7]
    parent = PARTS[family][0].rpartition(".")[0]
    down = small.tensor(f"{parent}.low_rank.weight").double()
    found = torch.cat([small.tensor(f"{path}.up.weight").double() for path in PARTS[family]]) @ down
    assert down.shape == (7, 32)
    assert float((found - best).norm() / best.norm()) < 1e-6
    notes = small.report.rows[0].notes
    energy = float(best.square().sum() / whole.square().sum())
    assert abs(notes["kept_energy"][PARTS[family][0]] - energy) < 1e-9
    assert notes["products_per_token"] == 2 * 7 * sum(whole.shape)
    assert not gw.ReduceProjections(rank=7)(small)


def test_it_computes_what_the_original_does_on_such_weights() -> None:
    model = FAMILIES["bert"]()
    small = gw.optimize(traced("bert"), [gw.ReduceProjections(rank=9)], example_inputs=BATCH)
    with torch.no_grad():
        for layer in range(2):
            paths = [f"encoder.layer.{layer}.attention.self.{name}" for name in ("query", "key", "value")]
            weights = [model.get_parameter(f"{path}.weight") for path in paths]
            u, s, v = torch.linalg.svd(torch.cat(weights).double(), full_matrices=False)
            for weight, rows in zip(weights, (u[:, :9] * s[:9] @ v[:9]).split(32), strict=True):
                weight.copy_(rows)
        wanted, found = model(**BATCH)[0], small(**BATCH)[0]
    assert float((wanted - found).abs().max()) < 2e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("family", sorted(PARTS))
def test_the_largest_numbers_stay_and_zeros_stay_zeros(family: str) -> None:
    model = FAMILIES[family]()
    whole = stacked(model, family)
    passes = [gw.ReduceProjections(keep=0.4), gw.InsertAdapters(gw.LoDA(rank=2), where=f"re:{PARTS[family][0]}")]
    small = gw.optimize(traced(family), passes, example_inputs=BATCH)

    def present() -> torch.Tensor:
        weights = [small.tensor(f"{path}.weight").detach().double() for path in PARTS[family]]
        return weights[0].t() if family == "gpt2" else torch.cat(weights)

    mask = present() != 0
    assert int(mask.sum()) == round(0.4 * whole.numel())
    assert torch.equal(present()[mask], whole[mask])
    assert float(whole[mask].abs().min()) >= float(whole[~mask].abs().max())
    notes = small.report.rows[0].notes
    energy = float(whole[mask].square().sum() / whole.square().sum())
    assert abs(notes["kept_energy"][PARTS[family][0]] - energy) < 1e-9
    assert notes["products_per_token"] == 2 * int(mask.sum())
    stirred(small)
    optimizer = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        small(**BATCH)[0].square().mean().backward()
        optimizer.step()
    assert torch.equal(present() != 0, mask)
    assert torch.equal(present()[mask], whole[mask])
    assert not gw.ReduceProjections(keep=0.4)(small)


def test_loda_reads_the_input_of_the_whole_also_saved_and_beside_another() -> None:
    where = "re:.*(q_proj|v_proj|low_rank)"
    passes = [gw.ReduceProjections(rank=6), gw.InsertAdapters(gw.LoDA(rank=2, outer="norm"), where=where)]
    small = gw.optimize(traced("llama"), passes, example_inputs=BATCH)
    sites = adapters_of(small)["default"].sites
    assert {path.rpartition(".")[2] for path in sites} == {"q_proj", "v_proj"}
    assert sites["model.layers.0.self_attn.q_proj"].shapes["features"] == [32, 32]
    assert sites["model.layers.1.self_attn.v_proj"].shapes["features"] == [16, 32]
    again = gw.InsertAdapters(gw.LoDA(rank=3), where=where, adapter_name="second")
    assert again(small)
    assert small.tensor("model.layers.0.self_attn.q_proj.loda_A.second").shape == (3, 32)


def refused(program: gw.Program, words: str, **options: Any) -> None:
    before = str(program)
    with pytest.raises(gw.SelectionError, match="there are no projections") as caught:
        gw.ReduceProjections(**options)(program)
    assert words in str(caught.value)
    assert str(program) == before


def test_where_it_does_not_fire_it_says_why() -> None:
    program = traced("bert")
    refused(program, "is not selected by where=", keep=0.5, where="*.query")
    gw.InsertAdapters("lora", where="*.key")(program)
    refused(program, "an adapter lies beside %linear_1: this goes before adapters", keep=0.5)
    packed = gw.optimize(
        traced("bert"), [gw.Cleanup(), gw.QuantizeLinears(bits=8, group_size=16)], example_inputs=BATCH
    )
    refused(packed, "is packed: this goes before quantisation", rank=4)


def test_weights_that_others_read_are_left_alone() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return y @ self.v.weight

    refused(gw.trace(Tied(), torch.randn(1, 5, 8)), "the weight is also read by %matmul", keep=0.5)

    class Crossed(Tied):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x + 1), self.v(x + 1))

    refused(gw.trace(Crossed(), torch.randn(1, 5, 8)), "query, key and value read different values", rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3, "keep": 0.5}, "takes one of rank= and keep="),
        ({"rank": 0}, "must be an integer, 1 or more"),
        ({"keep": 1.0}, "must be less than 1"),
        ({"keep": 0.0}, "must be a positive number"),
        ({"keep": float("nan")}, "must be a positive number"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.ReduceProjections(**options)


def test_a_rank_that_saves_nothing_is_an_error() -> None:
    program = traced("bert")
    with pytest.raises(
        gw.InputError, match=r"rank 24 takes 3072 products a token, the weight \[96, 32\] 3072"
    ) as caught:
        gw.ReduceProjections(rank=24)(program)
    assert "rank=23 or less" in str(caught.value)


def test_the_wrong_order_is_an_error_before_anything_runs() -> None:
    with pytest.raises(gw.GraphwrightError, match="reduce-projections"):
        gw.optimize(FAMILIES["bert"](), [gw.InsertAdapters("loda"), gw.ReduceProjections(rank=4)], example_inputs=BATCH)
