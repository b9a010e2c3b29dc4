"""One linear on weights that are mostly zeros: our CPU kernels beside DeepSparse, onnxruntime, torch and dense ones.

The zeros are random, or random blocks of four along the input. Ours, dense and sparse, onnxruntime and torch's CSR run
in this process and DeepSparse in one of its own; a rival that cannot be installed or run, or that gives another answer,
is a row that says why. With one row copies of the weights, larger than the cache together, take turns, and so do the
systems, with a pause before each. Ratios, not times, are what a machine with neighbours gives. Exit code 1 when a
target is missed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _bounds import COLD_BYTES, Bounds
from _linear_systems import CHECKED_ROWS, ORT, PAUSE, TORCH, System, here, isa, nbits_model, onnx_session
from _rivals import FOLDER, RivalError, save, when_needed
from _rows import Rows, parser
from onnx import TensorProto, helper, numpy_helper

from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_nbits
from graphwright.backends.cpu.kernels.float_linear import FloatLinear, pack_floats
from graphwright.backends.cpu.kernels.sparse_cost import least_sparsity
from graphwright.backends.cpu.kernels.sparse_linear import SparseLinear
from graphwright.backends.cpu.kernels.sparse_packing import PackedSparse, pack_sparse
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.sparse import compress, pack_codes

THREADS = 2
WARM, TIMED = 0.05, 0.1
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = [1, 128, 512]
DEEPSPARSE = ["deepsparse==1.8.0", "numpy<2"]
# Relative, against the product in float64 of what the weights stand for, by what activations are rounded to.
ERRORS = {"fp32": 1e-5, "int8": 0.04, "int4": 0.04}
# (values, share of zeros, whether zeros come in blocks of four)
FORMS: list[tuple[str, float, bool]] = [
    *(("int8", share, False) for share in (0.5, 0.7, 0.8, 0.9)),
    ("int8", 0.8, True),
    ("int4", 0.5, False),
    ("int4", 0.7, False),
    *(("fp32", share, False) for share in (0.5, 0.7, 0.8, 0.9)),
    ("fp32", 0.8, True),
]
QUICK: list[tuple[str, float, bool]] = [("int8", 0.8, False), ("int4", 0.5, False), ("fp32", 0.8, False)]


def main() -> int:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="the first N of them")
    arguments = options.parse_args()
    torch.set_num_threads(THREADS)
    onnxruntime.set_global_thread_pool_sizes(THREADS, 1)
    torch.manual_seed(0)
    rows, bounds = Rows(), Bounds(THREADS)
    get = when_needed("deepsparse", DEEPSPARSE, "_rival_deepsparse.py", {"NM_DISABLE_ANALYTICS": "1"})
    for shape in SHAPES[: 1 if arguments.quick else arguments.shapes]:
        for form in QUICK if arguments.quick else FORMS:
            weights = Weights(shape[0], shape[1], form[0], form[1], form[2])
            for count in [1, 128] if arguments.quick else ROWS:
                measure(rows, bounds, weights, count, systems(weights, count, get), rounds=3 if arguments.quick else 7)
                rows.write(arguments.json)  # what has been measured outlives what ends the run
    for zeros in (0.8,) if arguments.quick else (0.7, 0.8):
        decode_step(rows, zeros, rounds=1 if arguments.quick else 5)
    return int(rows.finish(arguments.json))


# Linears of a decoding step of a 1.1 B Llama: outputs, columns, and how often. q, k and v are one, as are gate and up.
STEP = [(2560, 2048, 22), (2048, 2048, 22), (11264, 2048, 22), (2048, 5632, 22), (32000, 2048, 1)]


def decode_step(rows: Rows, zeros: float, rounds: int) -> None:
    """The linears of a step, each measured alone, added up: sparse INT8 beside dense fp32 and INT4."""
    totals: dict[str, float] = {}
    for outputs, columns, count in STEP:
        weights = Weights(outputs, columns, "int8", zeros, False)
        x, packed = np.random.default_rng(0).standard_normal((1, columns)).astype(np.float32), weights.sparse()
        floats = pack_floats(weights.meant.float())
        everyone = [
            ours("graphwright sparse int8", packed, x, lambda own: SparseLinear(own, isa(), "int8")),
            ours("graphwright dense fp32", floats, x, lambda own: FloatLinear(own, isa())),
            int4(weights, x)[0],
        ]
        for _ in range(rounds):
            for system in everyone:
                time.sleep(PAUSE)
                system.times.extend(system.time(1, WARM, TIMED))
        for system in everyone:
            totals[system.name] = totals.get(system.name, 0.0) + count * statistics.median(system.times)
    case = f"linears of a step, Llama 1.1 B, {zeros:.0%} zeros"
    for name, seconds in totals.items():
        rows.add(case, name, median_ms=1e3 * seconds)
    sparse, fp32, fours = totals.values()
    wanted = {0.7: 6.0, 0.8: 7.0}[zeros]
    rows.require(fp32 >= wanted * sparse, f"{case}: {fp32 / sparse:.2f} x dense fp32, {wanted} wanted")
    rows.require(fours >= sparse, f"{case}: {fours / sparse:.2f} x dense INT4, 1 wanted")


class Weights:
    """Random weights of a form, as every system takes them.

    Attributes:
        case: the form in words.
        values: ``fp32``, ``int8`` (a scale to a row) or ``int4`` (a scale to 32 columns).
        meant: what the weights stand for, float64 ``[outputs, columns]``.
        codes: uint8 of the shape of ``meant``, the middle code being 0; ``None`` for ``fp32``.
    """

    def __init__(self, outputs: int, columns: int, values: str, zeros: float, blocks: bool) -> None:
        self.values, self.zeros, self.blocks = values, zeros, blocks
        self.case = f"{outputs}x{columns} {values}, {zeros:.0%} zeros{' in blocks of 4' if blocks else ''}"
        if blocks:
            stored = (torch.rand(outputs, columns // 4) >= zeros).repeat_interleave(4, 1)
        else:
            stored = torch.rand(outputs, columns) >= zeros
        self.codes: torch.Tensor | None = None
        if values == "fp32":
            self.meant = (torch.randn(outputs, columns) * stored).double()
            return
        self.bits, self.group = int(values[3:]), columns if values == "int8" else 32
        middle = 2 ** (self.bits - 1)
        self.codes = torch.where(stored, torch.randint(1, 2 * middle, (outputs, columns)), middle).to(torch.uint8)
        self.scales = (torch.rand(outputs, columns // self.group) * 0.01 + 0.001).half()
        self.meant = (self.codes.double() - middle) * self.scales.double().repeat_interleave(self.group, 1)

    def sparse(self) -> PackedSparse:
        """For our sparse kernels."""
        columns = self.meant.shape[1]
        if self.codes is None:
            weight = self.meant.float()
            return pack_sparse(*compress(weight, weight != 0), None, None, "float", 0, columns)
        mask, values, offsets = compress(self.codes, self.codes != 2 ** (self.bits - 1))
        packed = pack_codes(values, self.values)
        return pack_sparse(mask, packed, offsets, self.scales, None, self.values, self.group, columns)


def systems(weights: Weights, count: int, deepsparse: Callable[[], Any]) -> list[System]:
    """Ours, sparse and dense, and the rivals, all of them checked."""
    columns = weights.meant.shape[1]
    x = np.random.default_rng(0).standard_normal((count, columns)).astype(np.float32)
    packed = weights.sparse()
    compute = "float32" if weights.codes is None else "int8"
    gather = weights.values != "int4" and count > 1
    made = [ours("graphwright sparse", packed, x, lambda own: SparseLinear(own, isa(), compute, gather=gather))]
    if weights.codes is None:
        plain = weights.meant.float()
        floats = pack_floats(plain)
        made.append(ours("graphwright dense fp32", floats, x, lambda own: FloatLinear(own, isa())))
        sparse = plain.to_sparse_csr()
        made.append(here(f"{TORCH} CSR", packed.nbytes, x, [lambda rows: (sparse @ torch.from_numpy(rows).t()).t()]))
    else:
        made.append(dense(weights, x))
        made.extend(int4(weights, x))
    made.append(rival(weights, x, deepsparse))
    for system in made:
        if system.fault:
            continue
        # Dense INT4 in place of INT8 is for its speed: its weights are other ones.
        if "random weights" in system.name:
            continue
        found, wanted = (
            system.answer(min(count, CHECKED_ROWS)),
            x[:CHECKED_ROWS].astype(np.float64) @ weights.meant.numpy().T,
        )
        error = np.linalg.norm(found[: len(wanted)] - wanted) / np.linalg.norm(wanted)
        if not error <= ERRORS[weights.values]:
            system.fault = f"its answer is off by {error:.2%}"
    if made[0].fault:
        raise ValueError(f"{made[0].name}: {made[0].fault}")
    return made


def ours(name: str, packed: Any, x: np.ndarray, make: Callable[[Any], Any]) -> System:
    """A kernel of ours on packed weights: copies of them take turns with one row, where they are what is read."""
    count = max(2, COLD_BYTES // packed.nbytes) if len(x) == 1 else 1
    kernels = [make(packed if index == 0 else _copy(packed)) for index in range(count)]
    calls = [lambda rows, own=kernel: own(torch.from_numpy(rows)).numpy() for kernel in kernels]
    return here(name, packed.nbytes, x, calls)


def dense(weights: Weights, x: np.ndarray) -> System:
    """Our dense kernel on the same codes."""
    assert weights.codes is not None
    columns = weights.meant.shape[1]
    packed = pack_nbits(
        pack(weights.codes, weights.bits, weights.group, None), weights.scales, None, weights.bits, columns
    )
    return ours(f"graphwright dense {weights.values}", packed, x, lambda own: ByteLinear(own, isa(), "symmetric"))


def int4(weights: Weights, x: np.ndarray) -> list[System]:
    """The fastest dense linears on 4 bits, which sparse ones must beat: ours and onnxruntime's."""
    outputs, columns = weights.meant.shape
    codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8)
    stored, scales = pack(codes, 4, 32, None), torch.rand(outputs, columns // 32).half()
    packed, made = pack_nbits(stored, scales, None, 4, columns), []
    if weights.values != "int4":
        name = "graphwright dense int4, random weights"
        made.append(ours(name, packed, x, lambda own: ByteLinear(own, isa(), "symmetric")))
    size = stored.numel() + 4 * scales.numel()
    sessions = [
        onnx_session(nbits_model(stored, scales, columns, 32)) for _ in range(COLD_BYTES // size if len(x) == 1 else 1)
    ]
    made.append(here(f"{ORT} MatMulNBits, random weights", size, x, sessions))
    return made


def _copy(packed: Any) -> Any:
    return type(packed)(
        **{name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in vars(packed).items()}
    )


def rival(weights: Weights, x: np.ndarray, get: Callable[[], Any]) -> System:
    """DeepSparse, on an ONNX file of the weights; of 8 bits with activations on a grid that is given."""
    name, path, given = DEEPSPARSE[0], FOLDER / "sparse.onnx", FOLDER / "sparse.npz"
    try:
        if weights.values == "int4":
            raise RivalError("it has no kernels for 4 bits")
        process = get()
        _save_model(weights, x, path)
        save(given, {"x": x})
        # It streams about what is not zero: as many copies as ours have, so that none is found in the cache.
        size = 4 if weights.codes is None else 1
        copies = max(2, COLD_BYTES // int(weights.meant.count_nonzero() * size + 1)) if len(x) == 1 else 1
        process.ask("load", name, model=str(path), inputs=str(given), threads=THREADS, copies=copies)
    except RivalError as error:
        return System(name, 0, lambda *_: [], lambda _: np.empty(0), fault=str(error))

    def time_it(_rows: int, warm: float, seconds: float) -> list[float]:
        found: list[float] = process.times(name, warm, seconds)
        return found

    def answer(rows: int) -> np.ndarray:
        found: np.ndarray = process.answer(name)
        return found[:rows]

    return System(name, 0, time_it, answer)


def _save_model(weights: Weights, x: np.ndarray, path: Path) -> None:
    outputs, columns = weights.meant.shape
    stored = {"w": weights.meant.float().t().contiguous().numpy()}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if weights.codes is not None:
        step = np.float32(2 * np.abs(x).max() / 255)
        # What SparseML writes for DeepSparse. Dequantised weights, whether transposed, with a bias or with a rounded
        # output, run in floats; with this the scales of all rows are applied at once, which costs it nothing.
        stored = {
            "w": (weights.codes.int() - 128).to(torch.int8).t().contiguous().numpy(),
            "zero": np.int8(0),
            "step": step,
            "middle": np.uint8(128),
            "scales": step * weights.scales.float().flatten().numpy(),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "step", "middle"], ["xq"]),
            helper.make_node("MatMulInteger", ["xq", "w", "middle", "zero"], ["p"]),
            helper.make_node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "scales"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x), columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def measure(rows: Rows, bounds: Bounds, weights: Weights, count: int, everyone: Sequence[System], rounds: int) -> None:
    """Median milliseconds of every system, in turns, with a pause before each, and the targets."""
    read, case = [], f"{weights.case}, {count} rows"
    for _ in range(rounds):
        time.sleep(PAUSE)
        read.append(bounds.read_gb_per_s() or float("nan"))
        for system in everyone:
            if system.fault:
                continue
            time.sleep(PAUSE)
            try:
                system.times.extend(system.time(count, WARM, TIMED))
            except RivalError as error:
                system.fault = str(error)
    bandwidth, found = statistics.median(read), dict[str, float]()
    for system in everyone:
        if system.fault:
            rows.add(case, system.name, error=system.fault)
            continue
        seconds = found[system.name] = statistics.median(system.times)
        more = {"gb_per_s": system.bytes / seconds / 1e9, "read_gb_per_s": bandwidth} if system.bytes else {}
        rows.add(
            case,
            system.name,
            median_ms=1e3 * seconds,
            least_ms=1e3 * min(system.times),
            bound_ms=1e3 * system.bytes / bandwidth / 1e9,
            **more,
        )
    mine = found["graphwright sparse"]
    kind = "float32" if weights.values == "fp32" else weights.values
    least = least_sparsity(isa(), kind, count, gathers=kind != "int4")
    own_dense = next(value for name, value in found.items() if name == f"graphwright dense {weights.values}")
    rows.add(
        case,
        "graphwright, as lowered",
        sparse=str(least is not None and weights.zeros >= least),
        dense_over_sparse=own_dense / mine,
        break_even_zeros=least,
    )
    if weights.zeros == 0.8 and weights.values != "int4":
        wanted = {"int8": 2.2, "fp32": 2.0}[weights.values] if count == 1 else 1.0
        theirs = found.get(DEEPSPARSE[0], float("nan"))
        rows.require(theirs >= wanted * mine, f"{case}: {theirs / mine:.2f} x DeepSparse, {wanted} wanted")
    if count == 1 and not weights.blocks:
        share = everyone[0].bytes / mine / 1e9 / bandwidth
        rows.require(share >= 0.85, f"{case}: {share:.0%} of the read bandwidth, 85 % wanted")
        fours = [value for name, value in found.items() if "int4" in name or "NBits" in name]
        least_gain = {("int8", 0.8): 1.5, ("int4", 0.5): 1.25}.get((weights.values, weights.zeros))
        if least_gain is not None:
            gain = min(fours) / mine
            rows.require(gain >= least_gain, f"{case}: {gain:.2f} x the best dense INT4, {least_gain} wanted")


if __name__ == "__main__":
    raise SystemExit(main())
