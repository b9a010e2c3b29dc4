"""One linear on integer weights: our CPU kernels beside onnxruntime's and torch's, and beside the machine's limits.

Weights are larger than the cache: several copies of them take turns. Systems take turns too, and the bounds (a plain
read loop, a loop of dot products in registers) are measured between them, because what the machine gives changes with
its neighbours. A pause before each lets the other's idle threads, which spin for a while, go to sleep. Exit code 1 when
a target is missed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import torch
from _bounds import Bounds
from _rows import Rows, parser
from onnx import TensorProto, helper, numpy_helper

from graphwright.backends.cpu import features
from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_int8, pack_nbits
from graphwright.ir.ops.quantization import pack

THREADS = 2
COLD_BYTES = 160 << 20
# Seconds: between systems, until a machine that slept is awake again, and of each block that counts.
PAUSE, WARM, TIMED = 0.1, 0.05, 0.08
ORT = f"onnxruntime {version('onnxruntime')}"
TORCH = f"torch {version('torch')}"
SHAPES = [(2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = [1, 4, 32, 128, 512]


@dataclass
class System:
    """Something that multiplies: one callable for each copy of its weights."""

    name: str
    calls: list[Callable[[np.ndarray], object]]
    bytes: int
    times: list[float] = field(default_factory=list)


def main() -> int:
    """Run the comparison."""
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    onnxruntime.set_global_thread_pool_sizes(THREADS, 1)
    torch.manual_seed(0)
    rows, bounds = Rows(), Bounds(THREADS)
    for shape in [(4096, 4096)] if arguments.quick else SHAPES:
        for form in ("int4 g128", "int8") if arguments.quick else ("int4 g32", "int4 g128", "int8"):
            ours, rivals = systems(*shape, form)
            for count in [1, 4, 128] if arguments.quick else ROWS:
                measure(rows, bounds, shape, form, count, ours, rivals)
    return int(rows.finish(arguments.json))


def measure(
    rows: Rows, bounds: Bounds, shape: tuple[int, int], form: str, count: int, ours: System, rivals: list[System]
) -> None:
    """Median milliseconds of every system, in turns, with a pause before each."""
    x = np.random.default_rng(0).standard_normal((count, shape[1])).astype(np.float32)
    read, dots = [], []
    everyone = [ours, *rivals]
    for system in everyone:
        system.times.clear()
    for _ in range(5):
        time.sleep(PAUSE)
        read.append(bounds.read_gb_per_s() or float("nan"))
        dots.append(bounds.int8_tops() or float("nan"))
        for system in everyone:
            time.sleep(PAUSE)
            block(system, x, WARM)
            system.times.extend(block(system, x, TIMED))
    case = f"{shape[0]}x{shape[1]} {form}, {count} rows"
    bandwidth, peak = statistics.median(read), statistics.median(dots)
    operations = 2.0 * count * shape[0] * shape[1]
    mine = statistics.median(ours.times)
    for system in everyone:
        seconds = statistics.median(system.times)
        rows.add(
            case,
            system.name,
            median_ms=1e3 * seconds,
            bound_ms=1e3 * max(system.bytes / bandwidth / 1e9, operations / peak / 1e12),
            gb_per_s=system.bytes / seconds / 1e9,
            tops=operations / seconds / 1e12,
            read_gb_per_s=bandwidth,
            peak_tops=peak,
        )
    fastest = min(statistics.median(system.times) for system in rivals)
    if count == 1:
        share = ours.bytes / mine / 1e9 / bandwidth
        rows.require(share >= 0.92, f"{case}: {share:.0%} of the read bandwidth, 92 % wanted")
        rows.require(fastest >= 1.3 * mine, f"{case}: {fastest / mine:.2f} x the fastest rival here, 1.3 wanted")
    elif count >= 32:
        least = 0.75 if form == "int8" else 0.65
        share = operations / mine / 1e12 / peak
        rows.require(share >= least, f"{case}: {share:.0%} of the INT8 peak, {least:.0%} wanted")
        wanted = 1.05 if form == "int8" else 1.3
        rows.require(
            fastest >= wanted * mine, f"{case}: {fastest / mine:.2f} x the fastest rival here, {wanted} wanted"
        )


def block(system: System, x: np.ndarray, seconds: float) -> list[float]:
    """Seconds of calls made one after another, each on the next copy of the weights, for so long."""
    found: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found) < 3:
        call = system.calls[len(found) % len(system.calls)]
        start = time.perf_counter()
        call(x)
        found.append(time.perf_counter() - start)
    return found


def systems(outputs: int, columns: int, form: str) -> tuple[System, list[System]]:
    """Ours and the rivals on random weights of a format."""
    if form == "int8":
        weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
        scales = torch.rand(outputs) * 0.01
        copies = max(2, COLD_BYTES // (outputs * columns))
        kernels = [ByteLinear(pack_int8(weight, scales), isa(), "shifted") for _ in range(copies)]
        ours = System(f"graphwright {kernels[0].isa}", [_ours(kernel) for kernel in kernels], kernels[0].packed.nbytes)
        dynamic = [onnx_session(dynamic_model(weight, scales)) for _ in range(copies)]
        rivals = [System(f"{ORT} DynamicQuantizeMatMul", dynamic, weight.numel())]
        return ours, [*rivals, System(f"{TORCH} dynamic", torch_dynamic(weight, scales, copies), weight.numel())]
    group = int(form.removeprefix("int4 g"))
    codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8)
    scales = (torch.rand(outputs, columns // group) * 0.01 + 0.001).half()
    packed = pack(codes, 4, group, None)
    copies = max(2, COLD_BYTES // packed.numel())
    kernels = [ByteLinear(pack_nbits(packed, scales, None, 4, columns), isa(), "symmetric") for _ in range(copies)]
    ours = System(f"graphwright {kernels[0].isa}", [_ours(kernel) for kernel in kernels], kernels[0].packed.nbytes)
    sessions = [onnx_session(nbits_model(packed, scales, columns, group)) for _ in range(copies)]
    return ours, [System(f"{ORT} MatMulNBits accuracy 4", sessions, packed.numel() + 4 * scales.numel())]


def isa() -> str:
    """The instruction set in use."""
    found = features().selected
    assert found is not None, "the C++ kernels are not in this installation"
    return found


def _ours(kernel: ByteLinear) -> Callable[[np.ndarray], object]:
    return lambda x: kernel(torch.from_numpy(x))


def onnx_session(model: onnx.ModelProto) -> Callable[[np.ndarray], object]:
    """A call of an onnxruntime session."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # one pool for all copies, as one model would have
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def nbits_model(packed: torch.Tensor, scales: torch.Tensor, columns: int, group: int) -> onnx.ModelProto:
    """``MatMulNBits`` with int8 activations, symmetric."""
    outputs = len(packed)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=outputs,
        bits=4,
        block_size=group,
        accuracy_level=4,
    )
    weights = {"w": packed.numpy(), "s": scales.float().flatten().numpy()}
    return _model([node], weights, columns, outputs)


def dynamic_model(weight: torch.Tensor, scales: torch.Tensor) -> onnx.ModelProto:
    """What onnxruntime's dynamic quantisation runs."""
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    weights = {"w": np.ascontiguousarray(weight.t().numpy()), "s": scales.numpy()}
    return _model([node], weights, weight.shape[1], weight.shape[0])


def _model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], columns: int, outputs: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def torch_dynamic(weight: torch.Tensor, scales: torch.Tensor, copies: int) -> list[Callable[[np.ndarray], object]]:
    """torch's own dynamic INT8 linear (fbgemm), one scale per output channel."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
    return [_torch_call(torch.ops.quantized.linear_prepack(quantized, None)) for _ in range(copies)]


def _torch_call(held: object) -> Callable[[np.ndarray], object]:
    return lambda x: torch.ops.quantized.linear_dynamic(torch.from_numpy(x), held, True)


if __name__ == "__main__":
    raise SystemExit(main())
