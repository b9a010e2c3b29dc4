"""Programs on the Triton kernels, interpreted: values, gradients, what runs, decoding, and what is refused."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from tests.backends.triton.oracle import check, random
from tests.frontends.decoders import generate, greedy, make
from torch import nn

import graphwright as gw
from graphwright.backends.reference.session import ReferenceSession
from graphwright.backends.triton import TritonBackend
from graphwright.backends.triton import memory as triton_memory
from graphwright.backends.triton import status as triton_status_module
from graphwright.backends.triton.kernels import nbits_weight
from graphwright.backends.triton.lowering import lower
from graphwright.backends.triton.nodes import linears as nodes_linears
from graphwright.backends.triton.nodes.attention import Append
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.program import Program

CPU = TritonBackend("cpu")


class Block(nn.Module):
    """A gated feed-forward block with its residual and norms."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.last = nn.RMSNorm(64, eps=1e-6), nn.LayerNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        total: torch.Tensor = self.last(x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y)))
        return total


@functools.cache
def quantised(bits: int = 4, activations: str | None = None) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = random(2, 3, 64)
    quantise = (
        gw.QuantizeLinears(bits=bits, group_size=32)
        if activations is None
        else gw.QuantizeLinears(bits=8, activations="int8", group_size=None)
    )
    passes = [gw.Cleanup(), gw.FuseAll(), quantise]
    return gw.optimize(Block().eval(), passes, example_inputs=(x,), target=CPU, verify=False), x


def test_values_and_what_runs() -> None:
    small, x = quantised()
    with torch.no_grad():
        check(small(x), small.body(x)[0], roundings=20)
    uses = {use.op: use.kernel for use in small.explain()}
    assert uses["graphwright.linear_nbits"].startswith("triton linear_nbits W4")
    assert "linear_nbits [" in uses["graphwright.linear_nbits"]
    assert "4 warps" in uses["graphwright.linear_nbits"]
    assert uses["graphwright.gated_activation"].startswith(("triton gated_activation", "epilogue of"))
    assert uses["aten.add.Tensor"].startswith(("epilogue of", "part of"))
    assert "reference" not in uses.values()
    assert uses["aten.layer_norm"].startswith("triton layer_norm: norm [")


def test_gradients_are_those_of_the_reference() -> None:
    small, x = quantised()
    x = x.clone().requires_grad_()
    slope = random(2, 3, 64, seed=5)
    (found,) = torch.autograd.grad(small._executable(x)[0], x, slope)
    (wanted,) = torch.autograd.grad(small.body(x)[0], x, slope)
    check(found, wanted, roundings=40)


def test_8_bit_activations() -> None:
    small, x = quantised(8, "int8")
    with torch.no_grad():
        check(small(x), small.body(x)[0], roundings=1000)
    assert any(use.kernel.startswith("triton linear_int8 W8A8 per_token") for use in small.explain())


def test_what_has_no_kernel_runs_in_torch_and_says_why() -> None:
    x = random(2, 64).double()
    small = gw.optimize(Block(torch.float64).eval(), [gw.FuseAll()], example_inputs=(x,), target=CPU, verify=False)
    assert torch.equal(small(x), small.body(x)[0])
    (use,) = (use for use in small.explain() if use.op == "graphwright.rms_norm")
    assert (use.kernel, use.reason) == (
        "reference",
        "the kernels compute in float16, bfloat16 and float32, not float64",
    )


PROMPTS = [[5, 17, 30, 44, 3], [22, 71, 8]]


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    model = make(name)
    return model, load_decoder(model)


@functools.cache
def lowered(name: str) -> Any:
    return gw.optimize(traced(name)[1], [gw.Cleanup(), gw.FuseAll()], target=CPU, verify=False)


@pytest.mark.parametrize("name", ["llama"])
def test_decodes_like_transformers(name: str) -> None:
    session = lowered(name)._executable.session(slots=3, capacity=12)
    assert greedy(session, PROMPTS, [2, 0], 2) == generate(traced(name)[0], PROMPTS, 2)


@pytest.mark.parametrize(("name", "cache"), [("llama", "bfloat16"), ("llama", "float16"), ("llama", "int8")])
def test_logits_agree_with_the_reference(name: str, cache: str) -> None:
    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    slot, rows = torch.tensor([1]), torch.arange(9).unsqueeze(0)
    wanted = ReferenceSession(traced(name)[1], slots=2, capacity=12).step(tokens, slot, torch.tensor([0]), rows)
    session = lowered(name)._executable.session(slots=2, capacity=12, cache=cache)
    first = session.step(tokens[:, :8], slot, torch.tensor([0]), rows[:, :8]).clone()
    session.copy(1, 0, 8)
    last = session.step(tokens[:, 8:], torch.tensor([0]), torch.tensor([8]), torch.tensor([[0]]))
    found = torch.cat((first, last), 1)
    # Of one rounding of keys and values, through a few layers of random weights.
    limit = {"bfloat16": 3e-2, "float16": 4e-3, "int8": 4e-2}[cache]
    assert float((found - wanted).norm() / wanted.norm()) < limit


def test_sessions_that_cannot_be() -> None:
    executable = lowered("llama")._executable
    with pytest.raises(InputError, match="needs slots and capacity"):
        executable.session(slots=0)
    with pytest.raises(InputError, match="must be one of float32, bfloat16, int8, float16"):
        executable.session(cache="float8")
    one, tokens = torch.tensor([0]), torch.zeros(1, 5, dtype=torch.int64)
    session = executable.session(capacity=4)
    with pytest.raises(InputError, match="do not fit a cache of 4"):
        session.step(tokens, one, one, tokens[:, :1])


@pytest.mark.parametrize("target", [CPU, "cpu", "onnx"], ids=["triton", "cpu", "onnx"])
def test_inputs_elsewhere_are_refused(target: Any) -> None:
    x = random(2, 64)
    small = gw.optimize(nn.Linear(64, 8).eval(), example_inputs=(x,), target=target, verify=False)
    with pytest.raises(InputError, match=r"is on meta, the program runs on cpu \(at input 'input'\)"):
        small(x.to("meta"))


def test_launches_are_planned_before_they_are_made() -> None:
    x = random(3, 64)
    small = gw.optimize(
        Block().eval(),
        [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=4, group_size=32)],
        example_inputs=(x,),
        target=CPU,
        verify=False,
    )
    shown = {use.op: use.kernel for use in small.explain()}
    assert " (planned: linear_nbits [" in shown["graphwright.linear_nbits"]
    assert " (planned: norm [1] ROWS=16 BLOCK=64" in shown["graphwright.rms_norm"]
    planned = shown["graphwright.rms_norm"].partition("planned: ")[2].removesuffix(")")
    small(x)
    shown = {use.op: use.kernel for use in small.explain()}
    assert shown["graphwright.rms_norm"] == f"triton rms_norm: {planned}"
    assert not any("planned" in kernel for kernel in shown.values())


def test_a_decoder_plans_its_launches_too() -> None:
    shown = {use.op: use.kernel for use in lowered("llama").explain()}
    assert "cached_attention [" in shown["graphwright.cached_attention"]
    assert "append [" in shown["graphwright.cache_append"]
    assert "rotary [" in shown["graphwright.rotary_embedding"]


class Mixed(nn.Module):
    """Kernels with torch's operators between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(self.first(x)).sigmoid() * 2
        z = self.second(y)
        return z.cos() + y, z.flatten(1).sum(-1)


def test_the_rest_through_torch_compile() -> None:
    x = random(2, 3, 64)
    backend = TritonBackend("cpu", compile_rest="aot_eager")
    small = gw.optimize(Mixed().eval(), [gw.FuseAll()], example_inputs=(x,), target=backend, verify=False)
    plain = gw.optimize(Mixed().eval(), [gw.FuseAll()], example_inputs=(x,), target=CPU, verify=False)
    plain.load_state_dict(small.state_dict())
    for given in (x, random(4, 5, 64)):
        with torch.no_grad():
            for found, wanted in zip(small(given), plain(given), strict=True):
                check(found, wanted)
    shown = {use.op: use.kernel for use in small.explain()}
    assert shown["graphwright.rms_norm"].startswith("triton rms_norm: norm [")
    assert {shown[f"aten.{op}"] for op in ("linear", "sigmoid", "cos", "flatten.using_ints")} == {
        "torch.compile aot_eager"
    }
    executable: Any = small._executable
    parts = [node for node in executable.lowered.body.graph.nodes if str(node.target).startswith("rest_")]
    assert len(parts) == 2  # between the norms, and after them
    leaf, slope = x.clone().requires_grad_(), random(2, 3, 64, seed=4)
    (found,) = torch.autograd.grad(small(leaf)[0], leaf, slope)
    (wanted,) = torch.autograd.grad(plain(leaf)[0], leaf, slope)
    check(found, wanted, roundings=20)


def test_compilers_by_name() -> None:
    from graphwright.frontends.api import find_backend

    assert TritonBackend("cpu").compiler is None
    compiled: Any = find_backend("cuda:compile")
    assert (compiled.compiler, compiled.device.type) == ("inductor", "cuda")
    with pytest.raises(InputError, match=r"torch.compile has no backend 'nvcc' \(at TritonBackend: compile_rest\)"):
        TritonBackend("cpu", compile_rest="nvcc")


def test_caches_stay_out_of_what_is_compiled() -> None:
    """A session gives them as objects that torch.compile would not know."""
    backend = TritonBackend("cpu", compile_rest="eager")
    small: Any = gw.optimize(traced("llama")[1], [gw.Cleanup(), gw.FuseAll()], target=backend, verify=False)
    body = small._executable.lowered.body
    parts = [node for node in body.graph.nodes if str(node.target).startswith("rest_")]
    appended = {node for node in body.graph.nodes if isinstance(body._modules.get(str(node.target)), Append)}
    caches = {append.args[0] for append in appended}
    assert len(appended) == 4
    assert parts
    assert not any({*part.all_input_nodes} & (appended | caches) for part in parts)


def test_no_gpu_and_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised()[0]
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"(is built without CUDA|sees no GPU) \(at device 'cuda'\)"):
            TritonBackend().lower(program)
        with pytest.raises(BackendError, match="take target='cpu' on this machine"):
            gw.optimize(nn.Linear(2, 2), target="cuda")  # before the missing inputs are looked for
    with pytest.raises(BackendError, match="they do not run on meta"):
        TritonBackend("meta").lower(program)
    with pytest.raises(InputError, match="there is no device 'gpu'"):
        TritonBackend("gpu")
    missing = triton_status_module.TritonStatus(False, False, "")
    monkeypatch.setattr(triton_status_module, "triton_status", lambda: missing)
    with pytest.raises(BackendError, match="need triton, which is not installed"):
        CPU.lower(program)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(BackendError, match=r"Tesla T4 has compute capability 7.5, the kernels need 8.0"):
        TritonBackend().lower(quantised()[0])
    with pytest.raises(BackendError, match="there are 1 GPUs"):
        TritonBackend("cuda:3").lower(quantised()[0])


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised()[0]
    monkeypatch.setattr(triton_memory, "free_bytes", lambda device: 100)
    with pytest.raises(BackendError, match=r"the weights need 0.00 GiB, cpu has 0.00 GiB left"):
        CPU.lower(program)
    monkeypatch.undo()
    with pytest.raises(BackendError, match="which cpu has not: no room"), triton_memory.room_for(program, CPU.device):
        raise torch.OutOfMemoryError("no room. Tried everything")


def test_what_had_been_loaded_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised()[0]
    made: list[weakref.ref[torch.Tensor]] = []
    original = nbits_weight.repack

    def repack(*given: Any) -> Any:
        if made:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        weight = original(*given)
        made.append(weakref.ref(weight.packed))
        return weight

    monkeypatch.setattr(nodes_linears, "repack", repack)
    with pytest.raises(BackendError, match="room to pack them, which cpu has not: CUDA out of memory"):
        CPU.lower(program)
    assert [each() for each in made] == [None]


def test_caches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = lowered("llama")._executable
    for cache in ("int8", "float16"):
        monkeypatch.undo()
        needed = executable.session(slots=2, capacity=12, cache=cache).cache_bytes
        monkeypatch.setattr(triton_memory, "free_bytes", lambda device, needed=needed: needed - 1)
        with pytest.raises(BackendError, match="the caches of 2 sequences of 12 tokens need"):
            executable.session(slots=2, capacity=12, cache=cache)
        monkeypatch.setattr(triton_memory, "free_bytes", lambda device, needed=needed: needed)
        executable.session(slots=2, capacity=12, cache=cache)


def test_weights_that_are_copied_to_the_device_do_not_train() -> None:
    program = gw.trace(nn.Linear(4, 3), (random(2, 4),))
    body = lower(program, torch.device("meta")).body
    assert not body(torch.empty(2, 4, device="meta"))[0].requires_grad
    assert lower(program, torch.device("cpu")).body(random(2, 4))[0].requires_grad


def test_what_is_created_lies_on_the_device() -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[1]) + torch.zeros_like(x)

    program = gw.trace(Counting(), (random(2, 3),))
    body = lower(program, torch.device("meta")).body
    devices = [node.kwargs.get("device") for node in body.graph.nodes if "arange" in str(node.target)]
    assert devices == [torch.device("meta")]
    assert body(torch.empty(2, 3, device="meta"))[0].device.type == "meta"
