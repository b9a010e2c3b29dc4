"""Adapters at blocks against their formulas, written with hooks on the original's modules."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tests.passes.adapters.cases import stirred
from tests.passes.adapters.families import BATCH, FAMILIES, traced
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.passes.adapters.inserted import adapters_of

Tensors = dict[str, torch.Tensor]
Branch = Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor]

# of every family, by the number of a layer: modules that read a block's input, and those that give its value
FORWARD = {
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.down_proj"),
    "t5": ("encoder.block.{}.layer.1.DenseReluDense.wi", "encoder.block.{}.layer.1.DenseReluDense.wo"),
}
ATTENTION = {
    "bert": ("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    "llama": ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"),
    "t5": ("encoder.block.{}.layer.0.SelfAttention.q", "encoder.block.{}.layer.0.SelfAttention.o"),
}


def kron(x: torch.Tensor, y: torch.Tensor, t: Tensors) -> torch.Tensor:
    return y + 16 * x @ torch.kron(t["krona_A"], t["krona_B"]).t()


def kron_residual(x: torch.Tensor, y: torch.Tensor, t: Tensors) -> torch.Tensor:
    inner = (x + t["krona_b"]) @ torch.kron(t["krona_A"], t["krona_B"]).t() + t["krona_c"]
    return y + 4 * inner + t["krona_res"] * x


def parallel(x: torch.Tensor, y: torch.Tensor, t: Tensors) -> torch.Tensor:
    hidden = torch.relu(x @ t["parallel_down"].t() + t["parallel_down_bias"])
    return y + 4 * (hidden @ t["parallel_up"].t() + t["parallel_up_bias"])


def houlsby(x: torch.Tensor, y: torch.Tensor, t: Tensors) -> torch.Tensor:
    hidden = F.gelu(y @ t["houlsby_down"].t() + t["houlsby_down_bias"])
    return y + hidden @ t["houlsby_up"].t() + t["houlsby_up_bias"]


KINDS: dict[str, tuple[gw.AdapterKind, Branch, list[dict[str, tuple[str, str]]]]] = {
    "krona-b": (gw.KronABlock((8, 4)), kron, [FORWARD]),
    "krona-b-res": (gw.KronABlock((4, 8), scale=4.0, biases=2, residual=True), kron_residual, [FORWARD]),
    "parallel": (gw.ParallelAdapter(bottleneck=5), parallel, [FORWARD]),
    "houlsby": (gw.HoulsbyAdapter(bottleneck=5), houlsby, [FORWARD, ATTENTION]),
    "houlsby-attention": (gw.HoulsbyAdapter(bottleneck=5, places=("attention",)), houlsby, [ATTENTION]),
}


def hooked(model: nn.Module, program: gw.Program, branch: Branch, places: list[tuple[str, str]]) -> torch.Tensor:
    """The model's first output, with a branch at blocks."""
    tensors = {name: value.detach() for name, value in program.named_parameters()}
    handles = []
    for reader, giver in places:
        own = {
            name.removeprefix(f"{giver}.").removesuffix(".default"): value
            for name, value in tensors.items()
            if name.startswith(f"{giver}.") and name.endswith(".default")
        }
        assert own
        seen: list[torch.Tensor] = []

        def watch(module: nn.Module, args: tuple[torch.Tensor], seen: list[torch.Tensor] = seen) -> None:
            seen.append(args[0])

        def change(
            module: nn.Module,
            args: tuple[torch.Tensor],
            y: torch.Tensor,
            seen: list[torch.Tensor] = seen,
            own: Tensors = own,
        ) -> torch.Tensor:
            return branch(seen.pop(), y, own)

        handles.append(model.get_submodule(reader).register_forward_pre_hook(watch))
        handles.append(model.get_submodule(giver).register_forward_hook(change))
    with torch.no_grad():
        found: torch.Tensor = model(**BATCH)[0]
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_computes_its_formula(kind: str, family: str) -> None:
    given, branch, tables = KINDS[kind]
    model = FAMILIES[family]()
    program = traced(family)
    gw.InsertAdapters(given)(program)
    assert sum(len(site.exits) for site in adapters_of(program)["default"].sites.values()) == 2 * len(tables)
    stirred(program)
    places = [(x.format(i), y.format(i)) for table in tables for x, y in [table[family]] for i in range(2)]
    wanted = hooked(model, program, branch, places)
    with torch.no_grad():
        found = program(**BATCH)[0]
        bare = model(**BATCH)[0]
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert float((bare - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_bitfit_takes_biases_of_norms_and_merges_into_them() -> None:
    model = FAMILIES["bert"]()
    program = gw.optimize(traced("bert"), [gw.Cleanup(), gw.InsertAdapters(gw.BitFit())], example_inputs=BATCH)
    wanted = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert sum(p.numel() for p in program.parameters() if p.requires_grad) == wanted
    stirred(program)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=BATCH)
    with torch.no_grad():
        assert float((merged(**BATCH)[0] - program(**BATCH)[0]).abs().max()) <= 1e-5
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
    for name, p in model.named_parameters():
        same = torch.equal(p, merged.tensor(name))
        assert same != name.endswith("bias"), name


def test_bitfit_says_what_it_leaves_alone() -> None:
    program = traced("t5")
    with pytest.raises(gw.SelectionError, match=r"it has no bias \(missing=True gives it one\)"):
        gw.InsertAdapters("bitfit")(program)
    assert gw.InsertAdapters(gw.BitFit(missing=True))(program)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: gw.KronABlock(biases=3), r"must be 0, 1 or 2, not 3 \(at krona-block: biases"),
        (lambda: gw.HoulsbyAdapter(bottleneck=0), r"1 or more, not 0 \(at houlsby: bottleneck"),
        (lambda: gw.HoulsbyAdapter(activation="swish"), "must be one of gelu, .*not 'swish'"),
        (lambda: gw.ParallelAdapter(places=("head",)), "must be 'feed_forward', 'attention' or both"),
        (lambda: gw.ParallelAdapter(scale=float("nan")), "must be a finite number"),
        (lambda: gw.LoDA(outer="relu"), r"not 'relu' \(at loda: outer"),
    ],
)
def test_options_that_are_wrong(made: Callable[[], object], words: str) -> None:
    with pytest.raises(gw.InputError) as caught:
        made()
    assert re.search(words, str(caught.value))


def test_a_bottleneck_as_wide_as_its_block_is_refused() -> None:
    program = traced("bert")
    before = str(program)
    with pytest.raises(gw.InputError, match="bottleneck 32 is not narrower than its block of 32"):
        gw.InsertAdapters(gw.HoulsbyAdapter(bottleneck=32))(program)
    assert str(program) == before
