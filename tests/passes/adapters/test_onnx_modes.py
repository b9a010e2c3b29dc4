"""Adapters in ONNX files: merged, as side branches, and as inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.passes.adapters.cases import Net, X, stirred

import graphwright as gw

LORA = gw.LoRA(rank=4, alpha=8)


def close(found: Any, wanted: torch.Tensor, eps: float = 1e-5) -> bool:
    return bool((torch.as_tensor(found) - wanted).detach().norm() <= eps * wanted.detach().norm())


def adapted(seed: int = 0, kind: gw.AdapterKind = LORA) -> gw.Program:
    insert = gw.InsertAdapters(kind, where="blocks.*")
    return stirred(gw.optimize(Net(), [insert], example_inputs=X), seed)


def session(file: Path) -> Any:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(file)


def initializers(file: Path) -> set[str]:
    onnx: Any = pytest.importorskip("onnx")
    return {each.name for each in onnx.load(file).graph.initializer}


def run(file: Path, **inputs: np.ndarray[Any, Any]) -> Any:
    runner = session(file)
    names = [each.name for each in runner.get_inputs()]
    return runner.run(None, {names[0]: X.numpy(), **inputs})[0]


def test_merged(tmp_path: Path) -> None:
    program = adapted()
    gw.optimize(program, [gw.MergeAdapters()], example_inputs=X).export_onnx(tmp_path / "merged.onnx")
    assert close(run(tmp_path / "merged.onnx"), program(X))
    gw.optimize(Net(), [], example_inputs=X).export_onnx(tmp_path / "bare.onnx")
    onnx: Any = pytest.importorskip("onnx")
    ops = [[node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node] for name in ("merged", "bare")]
    assert ops[0] == ops[1]


def test_as_side_branches_under_their_names(tmp_path: Path) -> None:
    program = adapted()
    gw.optimize(program, [], example_inputs=X).export_onnx(tmp_path / "beside.onnx")
    assert close(run(tmp_path / "beside.onnx"), program(X))
    assert set(gw.adapter_tensors(program, "default")) <= initializers(tmp_path / "beside.onnx")


@pytest.mark.parametrize("quantized", [False, True])
def test_one_file_serves_many_adapters(tmp_path: Path, quantized: bool) -> None:
    passes = [*([gw.QuantizeLinears(bits=8, group_size=16)] if quantized else []), gw.AdaptersAsInputs()]
    program = gw.optimize(adapted(), passes, example_inputs=X)
    assert program.report.rows[-1].contract == "exact"
    assert not any("lora" in name for name in program.tensors())
    program.export_onnx(tmp_path / "inputs.onnx")
    names = {each.name for each in session(tmp_path / "inputs.onnx").get_inputs()}
    assert set(gw.adapter_tensors(adapted(), "default")) < names
    for seed in (1, 2):
        other = adapted(seed)
        gw.save_adapter(other, tmp_path / str(seed))
        inputs = gw.adapter_inputs(program, tmp_path / str(seed))
        assert close(program(X, **inputs), other(X), 0.05 if quantized else 2e-6)
        found = run(tmp_path / "inputs.onnx", **{name: tensor.numpy() for name, tensor in inputs.items()})
        assert close(found, program(X, **inputs))
    assert torch.equal(
        program(*program.examples[:1], **gw.adapter_tensors(adapted(), "default")), program.body(*program.examples)[0]
    )


def test_with_gates_too(tmp_path: Path) -> None:
    passes = [
        gw.InsertAdapters(gw.LoRA(rank=2), where="blocks.*", adapter_name="second"),
        gw.GateAdapters(),
        gw.AdaptersAsInputs(),
    ]
    program = gw.optimize(adapted(), passes, example_inputs=X)
    program.export_onnx(tmp_path / "both.onnx")
    tensors = gw.adapter_tensors(adapted(), "default")
    zeros = {
        key: torch.zeros(node.meta["val"].shape)
        for node in program.inputs
        if (key := program.signature.keyword_of(str(node.target))).endswith(".second")
    }
    rows = gw.adapter_weights(program, ["default", None, "second", "default", None, None, "default"])
    inputs = {"adapter_weights": rows, **tensors, **zeros}
    found = run(tmp_path / "both.onnx", **{name: value.detach().numpy() for name, value in inputs.items()})
    assert close(found, program(X, **inputs))
    wanted = torch.where(rows[:, :1] > 0, adapted()(X), Net()(X))
    assert close(found, wanted)


def test_an_adapter_that_does_not_fit_is_described(tmp_path: Path) -> None:
    program = gw.optimize(adapted(), [gw.AdaptersAsInputs()], example_inputs=X)
    gw.save_adapter(adapted(kind=gw.LoRA(rank=2, alpha=8)), tmp_path / "thin")
    with pytest.raises(gw.InputError, match="does not fit the inputs") as caught:
        gw.adapter_inputs(program, tmp_path / "thin")
    assert "blocks.0.q.lora_A: torch.float32[2, 24], not torch.float32[4, 24]" in str(caught.value)
    with pytest.raises(gw.InputError, match="no inputs for an adapter 'other'"):
        gw.adapter_inputs(program, tmp_path / "thin", "other")
    with pytest.raises(gw.InputError, match="has no tensors of its own"):
        gw.MergeAdapters(adapters=("default",))(program)
    with pytest.raises(gw.SelectionError, match="there is no adapter"):
        gw.AdaptersAsInputs()(program)
    with pytest.raises(gw.InputError, match="calls bring an adapter 'default' already"):
        gw.InsertAdapters(LORA, where="blocks.*")(program)


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = gw.optimize(adapted(), [gw.AdaptersAsInputs()], example_inputs=X)
    program.save(tmp_path)
    loaded = gw.Program.load(tmp_path)
    tensors = gw.adapter_tensors(adapted(), "default")
    assert close(loaded(X, **tensors), program(X, **tensors), 2e-6)
    with pytest.raises(gw.InputError, match="is missing"):
        loaded(X)
