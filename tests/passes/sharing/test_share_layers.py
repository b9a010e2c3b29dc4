"""Layers share their weights: the function of a model that was built so, one storage everywhere, and clear refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.frontends.decoders import greedy
from tests.ir.test_stacks import named
from tests.passes.sharing.models import llama, step_of, texts, traced

import graphwright as gw
from graphwright.backends.cpu import native_status
from graphwright.backends.reference import ReferenceBackend
from graphwright.ir.program import Program
from graphwright.ir.repetitions import repetition_of
from graphwright.ir.stages import cut_stage
from graphwright.passes.sharing.orders import layer_order


def tied_by_hand(order: Sequence[int], chosen: Sequence[int]) -> torch.nn.Module:
    """The Llama whose layer ``i`` has the weights of layer ``chosen[order[i]]``."""
    model = llama(len(order))
    states = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in model.model.layers]
    for layer, unique in zip(model.model.layers, order, strict=True):
        layer.load_state_dict(states[chosen[unique]])
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("cycle", (0, 1, 0, 1, 0, 1)), ("sequence", (0, 0, 0, 1, 1, 1)), ("cycle-reversed", (0, 1, 0, 1, 1, 0))],
)
def test_orders(order: str, wanted: tuple[int, ...]) -> None:
    assert layer_order(2, 3, order) == wanted


@pytest.mark.parametrize("order", ["cycle", "sequence", "cycle-reversed"])
@pytest.mark.parametrize("start", ["first", "every-kth"])
def test_computes_what_a_model_with_these_weights_does(order: str, start: str) -> None:
    program = traced()
    assert gw.ShareLayers(groups=2, order=order, start=start)(program)
    numbers = layer_order(2, 2, order)
    chosen = [numbers.index(unique) for unique in range(2)] if start == "first" else [0, 2]
    model = tied_by_hand(numbers, chosen)
    with torch.no_grad():
        torch.testing.assert_close(program(**texts()).logits, model(**texts()).logits, rtol=0, atol=1e-5)
    assert not gw.ShareLayers(groups=2, order=order, start=start)(program)


def test_text_before_and_after() -> None:
    program = named(ash=16, birch=16)
    assert '"birch.up.weight"' in str(program)
    gw.ShareLayers(groups=1)(program)
    after = str(program)
    assert 'alias "birch.up.weight" = "ash.up.weight"' in after
    assert 'weight "birch.up.weight"' not in after
    assert gw.structurally_equal(gw.parse(after), program)


def test_the_mean_of_the_layers() -> None:
    program, model = traced(), llama()
    gw.ShareLayers(groups=2, start="mean")(program)
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        a, b = (model.model.layers[number].get_parameter(name) for number in (1, 3))
        wanted = ((a.double() + b.double()) / 2).float()
        assert torch.equal(program.tensor(f"model.layers.1.{name}"), wanted)
        assert program.tensor(f"model.layers.3.{name}") is program.tensor(f"model.layers.1.{name}")


def test_least_squares_is_the_minimum() -> None:
    """Held against the same problem solved by rows, with the damping as further rows."""
    model, batches = llama(), [texts(4, 16)]
    program = traced()
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given, number=number: seen.__setitem__(number, given[0].detach().flatten(0, 1).double())
        )
    with torch.no_grad():
        model(**batches[0])
    gw.ShareLayers(groups=2, start="least-squares", calibration=batches)(program)
    weights = [layer.mlp.down_proj.weight.detach().double() for layer in model.model.layers]
    for unique in (0, 1):
        pair = (unique, unique + 2)
        ones = [torch.cat((seen[each], torch.ones(len(seen[each]), 1).double()), 1) for each in pair]
        read = torch.cat(ones)
        given = torch.cat([seen[each] @ weights[each].T for each in pair])
        damping = (1e-4 * (read**2).sum(0).mean()).sqrt() * torch.eye(read.shape[1]).double()
        mean = torch.cat(((weights[pair[0]] + weights[pair[1]]) / 2, torch.zeros(32, 1).double()), 1)
        wanted = torch.linalg.lstsq(torch.cat((read, damping)), torch.cat((given, damping @ mean.T))).solution.T
        found = program.tensor(f"model.layers.{unique}.mlp.down_proj.weight").double()
        torch.testing.assert_close(found, wanted[:, :-1], rtol=0, atol=1e-5)
        error = (seen[pair[0]] @ found.T - given[: len(seen[pair[0]])]).norm()
        assert 0 < error < (seen[pair[0]] @ mean[:, :-1].T - given[: len(seen[pair[0]])]).norm() * 1.5


@pytest.mark.parametrize(
    ("part", "shared"), [("attention", ("self_attn", "input_layernorm")), ("feed-forward", ("mlp", "post_attention"))]
)
def test_parts(part: str, shared: tuple[str, ...]) -> None:
    program = step_of()
    gw.ShareLayers(groups=2, part=part)(program)
    names = [name for name in program.tensors() if name.startswith(("model.layers.2", "model.layers.3"))]
    assert names
    assert not any(any(word in name for word in shared) for name in names)
    assert program.records["sharing"] == {"groups": 2, "repeats": 2, "order": "cycle", "part": part}


def test_parts_that_stand_beside_each_other() -> None:
    """In GPT-NeoX attention and feed-forward read the same value and are added together."""
    from tests.frontends.decoders import make

    program = gw.load_decoder(make("gpt-neox", num_hidden_layers=2), check=False)
    gw.ShareLayers(groups=1, part="feed-forward")(program)
    left = {name.split(".", 3)[3] for name in program.tensors() if name.startswith("gpt_neox.layers.1.")}
    assert left
    assert not any("mlp" in name for name in left)
    assert "attention.dense.weight" in left


# -- where the repetitions are -----------------------------------------------------------------------------------------


def prepared_step(groups: int = 2, layers: int = 4) -> Program:
    program = step_of(layers)
    gw.run_passes(program, [gw.ShareLayers(groups=groups), gw.PrepareDecoder(length=64)])
    return program


def test_repetitions_are_found_after_other_passes(tmp_path: Path) -> None:
    program = prepared_step()
    gw.run_passes(program, [gw.QuantizeLinears(bits=8, group_size=16)])
    program.save(tmp_path / "saved")
    for each in (program, Program.load(tmp_path / "saved")):
        found = gw.repetitions_of(each)
        assert [len(item.layers) for item in found] == [2, 2]
        assert found[0].exit is found[1].entry
        numbers = {item.number: {repetition_of(n) for layer in item.layers for n in layer.nodes} for item in found}
        assert numbers == {0: {0}, 1: {1}}
        inputs = [{str(node.target) for layer in item.layers for node in layer.inputs} for item in found]
        caches = [sorted(name for name in names if "_" in name) for names in inputs]
        assert caches == [["keys_0", "keys_1", "values_0", "values_1"], ["keys_2", "keys_3", "values_2", "values_3"]]
    assert repetition_of(program.output) is None


def test_a_stage_of_the_pipeline_is_one_repetition() -> None:
    stage = cut_stage(prepared_step())
    assert (stage.layers, stage.repeats) == (2, 2)


def test_programs_without_repetitions() -> None:
    program = step_of(2)
    with pytest.raises(gw.ProgramError, match="no layers that share"):
        gw.repetitions_of(program)


# -- one storage -------------------------------------------------------------------------------------------------------


def sizes(program: Program) -> dict[str, int]:
    """Bytes of the layers' weights."""
    return {name: tensor.nbytes for name, tensor in program.tensors().items() if ".layers." in name}


def layer_bytes(program: Program) -> int:
    return sum(sizes(program).values())


def test_saved_once(tmp_path: Path) -> None:
    program, whole = step_of(), step_of()
    gw.ShareLayers(groups=2)(program)
    assert layer_bytes(program) * 2 == layer_bytes(whole)
    program.save(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in names)
    loaded = Program.load(tmp_path / "saved")
    assert loaded.tensor("model.layers.3.mlp.up_proj.weight") is loaded.tensor("model.layers.1.mlp.up_proj.weight")
    # Under every name that the model has, so that one built with tied layers takes it.
    state = loaded.state_dict()
    assert set(state) >= set(whole.state_dict())
    traced_ = traced()
    gw.ShareLayers(groups=2)(traced_)
    traced_.load_state_dict(state, strict=False)
    assert torch.equal(traced_.tensor("model.layers.0.mlp.up_proj.weight"), state["model.layers.2.mlp.up_proj.weight"])


def test_quantised_once() -> None:
    program = prepared_step()
    assert {name for name in program.tensors() if "qkv_proj" in name} == {
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.1.self_attn.qkv_proj.weight",
    }
    gw.run_passes(program, [gw.QuantizeLinears(bits=4, group_size=16)])
    whole = step_of()
    gw.run_passes(whole, [gw.PrepareDecoder(length=64), gw.QuantizeLinears(bits=4, group_size=16)])
    assert layer_bytes(program) * 2 == layer_bytes(whole)


@pytest.mark.skipif(not native_status().available, reason=native_status().message)
def test_packed_once_and_decoded_alike(tmp_path: Path) -> None:
    passes = [gw.PrepareDecoder(length=64), gw.QuantizeLinears(bits=8, group_size=16)]
    shared = gw.optimize(step_of(), [gw.ShareLayers(groups=2), *passes], target="cpu", verify=False)
    whole = gw.optimize(step_of(), passes, target="cpu", verify=False)
    shared.save_packed(tmp_path / "shared")
    whole.save_packed(tmp_path / "whole")
    found = []
    for name in ("shared", "whole"):
        with safe_open(tmp_path / name, framework="pt") as file:
            found.append(sum(file.get_tensor(key).nbytes for key in file.keys()))  # noqa: SIM118
    assert found[1] - found[0] > 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)  # codes of two layers
    prompts = [[5, 17, 30, 44], [22, 71]]
    program = prepared_step()
    plain = ReferenceBackend().lower(program).session(slots=2, capacity=32)
    fast = gw.CpuBackend().lower(program).session(slots=2, capacity=32)
    assert greedy(fast, prompts, [1, 0], 8) == greedy(plain, prompts, [1, 0], 8)


def test_written_to_onnx_once(tmp_path: Path) -> None:
    files = {}
    for name, passes in {"shared": [gw.ShareLayers(groups=1)], "whole": []}.items():
        program = step_of(3)
        gw.run_passes(program, [*passes, gw.Cleanup(), gw.FuseAll()])
        gw.export_onnx(program, tmp_path / f"{name}.onnx", context_length=64)
        files[name] = sum(file.stat().st_size for file in tmp_path.glob(f"{name}.onnx*"))
    layer = layer_bytes(step_of(3)) / 3
    assert files["whole"] - files["shared"] > 1.9 * layer


def test_adapters_are_each_repetitions_own_over_one_base() -> None:
    program = traced()
    gw.ShareLayers(groups=2)(program)
    gw.InsertAdapters("lora", adapter_name="a")(program)
    whole = traced()
    gw.InsertAdapters("lora", adapter_name="a")(whole)
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (program, whole)]
    assert trained[0] == trained[1]
    base = [sum(n for key, n in sizes(each).items() if "lora" not in key) for each in (program, whole)]
    assert base[0] * 2 == base[1]


def test_gradients_of_all_repetitions_are_added() -> None:
    program = traced(labels=True)
    gw.ShareLayers(groups=2)(program)
    model = tied_by_hand((0, 1, 0, 1), (0, 1))
    program(**texts(labels=True)).loss.backward()
    model(**texts(labels=True)).loss.backward()
    name = "mlp.up_proj.weight"
    wanted = sum(model.model.layers[number].get_parameter(name).grad for number in (1, 3))
    found = program.tensor(f"model.layers.1.{name}").grad
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_through_optimize_it_is_reported_and_not_enforced() -> None:
    small = gw.optimize(traced(), [gw.ShareLayers(groups=2)], example_inputs=texts())
    (row,) = small.report.rows
    assert row.contract == "retrain"
    error = row.worst_output_error()
    assert error is not None
    assert error > 0.1


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_layers_that_do_not_divide() -> None:
    with pytest.raises(gw.InputError, match=r"4 layers are not 3 repeated 1 times(?s:.*)groups of 1, 2, 4"):
        gw.ShareLayers(groups=3)(step_of())


def test_layers_that_differ_in_shape() -> None:
    with pytest.raises(gw.InputError, match=r"ash.up.weight is .*\[16, 8\], birch.up.weight .*\[24, 8\]"):
        gw.ShareLayers(groups=1)(named(ash=16, birch=24))


def test_no_repeated_block() -> None:
    with pytest.raises(gw.InputError, match="no block is repeated: none of the 9 calls of 'Named'"):
        gw.ShareLayers(groups=1)(named(ash=16))


@pytest.mark.parametrize(
    "first", [gw.QuantizeLinears(bits=8, group_size=16), gw.InsertAdapters("lora", adapter_name="a")]
)
def test_too_late(first: gw.Pass) -> None:
    program = traced()
    with pytest.raises(gw.OrderError, match=f"after '{first.name}'.*\n.*works: share-layers, {first.name}"):
        gw.run_passes(program, [first, gw.ShareLayers(groups=2)])
    first(program)
    with pytest.raises(gw.InputError, match="cannot share weights any more.*\n.*share first"):
        gw.ShareLayers(groups=2)(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "at least 1"),
        ({"order": "spiral"}, "no order 'spiral'"),
        ({"start": "last"}, "no start 'last'"),
        ({"part": "norm"}, "no part 'norm'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.ShareLayers(**options)


def test_least_squares_without_data() -> None:
    with pytest.raises(gw.InputError, match="needs calibration data"):
        gw.ShareLayers(groups=2, start="least-squares")(step_of())


def test_what_is_tied_to_something_else() -> None:
    program = named(ash=16, birch=16)
    with program.edit() as rewriter:
        weight = next(node for node in program.nodes if node.target == "birch.norm.bias")
        last = program.output.args[0][0]
        rewriter.call("aten.add.Tensor", weight, weight, like=last)
        extra = max(weight.users)
        rewriter.call("aten.sum", extra, like=last)
    with pytest.raises(gw.InputError, match="birch.norm.bias is read outside of the layers"):
        gw.ShareLayers(groups=1)(program)
