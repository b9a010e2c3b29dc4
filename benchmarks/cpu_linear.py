"""One linear on integer weights: our CPU kernels beside other runtimes' and the machine's limits.

The rivals are onnxruntime and torch, in this process, and OpenVINO and torchao, each in one of its own; one that cannot
be installed or run, or that gives another answer, is a row that says why. Weights are larger than the cache: several
copies of them take turns. Systems take turns too, and the bounds (a plain read loop, a loop of dot products in
registers) are measured between them, because what the machine gives changes with its neighbours. A pause before each
lets the other's idle threads, which spin for a while, go to sleep. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _bounds import COLD_BYTES, Bounds
from _linear_systems import CHECKED_ROWS, ORT, PAUSE, TORCH, System, here, isa, linear_model, nbits_model, onnx_session
from _rivals import FOLDER, Rival, RivalError, save, when_needed
from _rows import Rows, parser
from onnx import helper

from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_int8, pack_nbits
from graphwright.ir.ops.quantization import pack

THREADS = 2
# Seconds: until a machine that slept is awake again, and of each block that counts.
WARM, TIMED = 0.05, 0.08
OPENVINO = ["openvino==2026.4.1", "nncf==3.4.0"]
TORCHAO = ["torch==2.13.0", "torchao==0.18.0", "numpy"]
SHAPES = [(2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = [1, 4, 32, 128, 512]
# Relative, against the product in float64 of what the weights stand for: activations in 7 bits stay within it.
ERROR = 0.04


@dataclass
class Process:
    """Another process, a rival's, and its name."""

    name: str
    get: Callable[[], Rival]


def main() -> int:
    """Run the comparison."""
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    onnxruntime.set_global_thread_pool_sizes(THREADS, 1)
    torch.manual_seed(0)
    rows, bounds = Rows(), Bounds(THREADS)
    openvino = Process(OPENVINO[0], when_needed("openvino", OPENVINO, "_rival_openvino_linear.py"))
    torchao = Process(TORCHAO[1], when_needed("torchao", TORCHAO, "_rival_torchao_linear.py"))
    for shape in [(4096, 4096)] if arguments.quick else SHAPES:
        for form in ("int4 g128", "int8") if arguments.quick else ("int4 g32", "int4 g128", "int8"):
            everyone = systems(*shape, form, openvino, torchao)
            for count in [1, 4, 128] if arguments.quick else ROWS:
                measure(rows, bounds, shape, form, count, everyone, rounds=4 if arguments.quick else 5)
            for system in everyone:
                system.drop()
            everyone.clear()
    return int(rows.finish(arguments.json))


def measure(
    rows: Rows,
    bounds: Bounds,
    shape: tuple[int, int],
    form: str,
    count: int,
    everyone: Sequence[System],
    rounds: int,
) -> None:
    """Median milliseconds of every system, ours first, in turns, with a pause before each."""
    read, dots, one_row = [], [], list[float]()
    for system in everyone:
        system.times.clear()
    for _ in range(rounds):
        time.sleep(PAUSE)
        read.append(bounds.read_gb_per_s() or float("nan"))
        dots.append(bounds.int8_tops(8 if form == "int8" else 4) or float("nan"))
        for system in everyone:
            if system.fault:
                continue
            time.sleep(PAUSE)
            try:
                system.times.extend(system.time(count, WARM, TIMED))
            except RivalError as error:
                system.fault = str(error)
        if count == 4:
            time.sleep(PAUSE)
            one_row.extend(everyone[0].time(1, WARM, TIMED))
    case = f"{shape[0]}x{shape[1]} {form}, {count} rows"
    bandwidth, peak = statistics.median(read), statistics.median(dots)
    operations = 2.0 * count * shape[0] * shape[1]
    for system in everyone:
        if system.fault:
            rows.add(case, system.name, error=system.fault)
            continue
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
    ours, *rivals = everyone
    mine = statistics.median(ours.times)
    fastest = min(statistics.median(system.times) for system in rivals if not system.fault)
    if count == 1:
        share = ours.bytes / mine / 1e9 / bandwidth
        rows.require(share >= 0.92, f"{case}: {share:.0%} of the read bandwidth, 92 % wanted")
        rows.require(fastest >= 1.3 * mine, f"{case}: {fastest / mine:.2f} x the fastest rival here, 1.3 wanted")
    elif count == 4:
        ratio = mine / statistics.median(one_row)
        rows.add(case, f"{ours.name} over its time of one row", ratio=ratio)
        rows.require(ratio <= 1.15, f"{case}: {ratio:.2f} x the time of one row, 1.15 allowed")
    elif count >= 32:
        least = 0.75 if form == "int8" else 0.65
        share = operations / mine / 1e12 / peak
        rows.require(share >= least, f"{case}: {share:.0%} of the INT8 peak, {least:.0%} wanted")
        wanted = 1.05 if form == "int8" else 1.3
        rows.require(
            fastest >= wanted * mine, f"{case}: {fastest / mine:.2f} x the fastest rival here, {wanted} wanted"
        )


def systems(outputs: int, columns: int, form: str, openvino: Process, torchao: Process) -> list[System]:
    """Ours and the rivals on the same random weights of a format, all of them checked."""
    x = np.random.default_rng(0).standard_normal((max(ROWS), columns)).astype(np.float32)
    given = FOLDER / "linear.npz"
    if form == "int8":
        weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
        scales = torch.rand(outputs) * 0.01
        meant = weight.double() * scales.double()[:, None]
        size, copies = weight.numel(), max(2, COLD_BYTES // weight.numel())
        save(given, {"x": x, "codes": weight.numpy(), "scales": scales.numpy()})
        kernels = [ByteLinear(pack_int8(weight, scales), isa(), "shifted") for _ in range(copies)]
        dynamic = [onnx_session(dynamic_model(weight, scales)) for _ in range(copies)]
        made = [
            here(f"graphwright {kernels[0].isa}", kernels[0].packed.nbytes, x, [_ours(kernel) for kernel in kernels]),
            here(f"{ORT} DynamicQuantizeMatMul", size, x, dynamic),
            here(f"{TORCH} dynamic", size, x, torch_dynamic(weight, scales, copies)),
            there(openvino, ", a scale to a row", size, copies, group=columns),
            # With many rows it takes two thirds of the time with such groups.
            there(openvino, ", a scale to 128 columns", size, copies, group=128),
        ]
    else:
        group = int(form.removeprefix("int4 g"))
        codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8)
        scales = (torch.rand(outputs, columns // group) * 0.01 + 0.001).half()
        meant = (codes.double() - 8) * scales.double().repeat_interleave(group, 1)
        packed = pack(codes, 4, group, None)
        size, copies = packed.numel() + 4 * scales.numel(), max(2, COLD_BYTES // packed.numel())
        save(given, {"x": x, "codes": packed.numpy(), "scales": scales.numpy()})
        kernels = [ByteLinear(pack_nbits(packed, scales, None, 4, columns), isa(), "symmetric") for _ in range(copies)]
        sessions = [onnx_session(nbits_model(packed, scales, columns, group)) for _ in range(copies)]
        made = [
            here(f"graphwright {kernels[0].isa}", kernels[0].packed.nbytes, x, [_ours(kernel) for kernel in kernels]),
            here(f"{ORT} MatMulNBits accuracy 4", size, x, sessions),
            there(openvino, "", size, copies, group=group),
            there(torchao, " bfloat16 activations", size, copies, dynamic=False),
            there(torchao, " int8 activations", size, copies, dynamic=True),
        ]
    check(made, x[:CHECKED_ROWS].astype(np.float64) @ meant.numpy().T)
    return made


def check(made: Sequence[System], expected: np.ndarray) -> None:
    """That all compute the same linear: a rival that does not has a fault.

    Raises:
        ValueError: it is ours.
    """
    for system in made:
        if system.fault:
            continue
        try:
            error = np.linalg.norm(system.answer(CHECKED_ROWS) - expected) / np.linalg.norm(expected)
        except RivalError as raised:
            system.fault = str(raised)
            continue
        if not error <= ERROR:
            system.fault = f"its answer is off by {error:.2%}"
    if made[0].fault:
        raise ValueError(f"{made[0].name}: {made[0].fault}")


def there(process: Process, what: str, size: int, copies: int, **settings: Any) -> System:
    """A system in a rival's process, on the weights last saved."""
    name = process.name + what
    try:
        rival = process.get()
        rival.ask("load", name, weights=str(FOLDER / "linear.npz"), copies=copies, threads=THREADS, **settings)
    except RivalError as error:
        fault = str(error)
        return System(name, size, lambda *_: [], lambda _: np.empty(0), fault=fault)

    def time_it(rows: int, warm: float, seconds: float) -> list[float]:
        found: list[float] = rival.times(name, warm, seconds, rows=rows)
        return found

    def answer(rows: int) -> np.ndarray:
        found: np.ndarray = rival.answer(name, rows=rows)
        return found

    return System(name, size, time_it, answer, lambda: _drop(rival, name))


def _drop(rival: Rival, name: str) -> None:
    with contextlib.suppress(RivalError):  # a process that is gone holds nothing
        rival.ask("drop", name)


def _ours(kernel: ByteLinear) -> Callable[[np.ndarray], Any]:
    return lambda x: kernel(torch.from_numpy(x))


def dynamic_model(weight: torch.Tensor, scales: torch.Tensor) -> onnx.ModelProto:
    """What onnxruntime's dynamic quantisation runs."""
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    weights = {"w": np.ascontiguousarray(weight.t().numpy()), "s": scales.numpy()}
    made: onnx.ModelProto = linear_model([node], weights, weight.shape[1], weight.shape[0])
    return made


def torch_dynamic(weight: torch.Tensor, scales: torch.Tensor, copies: int) -> list[Callable[[np.ndarray], Any]]:
    """torch's own dynamic INT8 linear (fbgemm), one scale per output channel."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
    return [_torch_call(torch.ops.quantized.linear_prepack(quantized, None)) for _ in range(copies)]


def _torch_call(held: object) -> Callable[[np.ndarray], Any]:
    return lambda x: torch.ops.quantized.linear_dynamic(torch.from_numpy(x), held, True)


if __name__ == "__main__":
    raise SystemExit(main())
