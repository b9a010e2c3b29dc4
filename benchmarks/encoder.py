"""A BERT-base encoder on our CPU kernels, beside onnxruntime, OpenVINO, DeepSparse and torch.compile.

Sequence 128, two threads, in fp32 and with INT8 linears. The weights are random (seed 0): this measures speed, and each
system's agreement with PyTorch only says that it computes the same network. onnxruntime and torch run in this process,
the other rivals each in one of their own; all take turns, with a pause before each in which the idle threads of the one
before go to sleep. A rival that cannot be installed or run is a row that says why. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from _bounds import Bounds
from _deepsparse_models import integer_products
from _rival_worker import timed
from _rivals import FOLDER, save, when_needed
from _rows import Rows, parser
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions

import graphwright as gw

THREADS = 2
LENGTH = 128
BATCHES = (1, 8)
SAMPLES = 8
# Seconds: between systems, until a machine that slept is awake again, and of each block that counts.
PAUSE, WARM, TIMED = 0.1, 0.05, 0.2
OURS = "graphwright"
ORT = f"onnxruntime {version('onnxruntime')}"
TORCH = f"torch {version('torch')}"
OPENVINO = ["openvino==2026.4.1", "nncf==3.4.0"]
# The last release before it reached its end of life; it wants numpy 1.
DEEPSPARSE = ["deepsparse==1.8.0", "numpy<2"]
# Against the fastest rival.
FP32_TARGET, INT8_TARGET = 1.0, 1.2

Inputs = dict[str, np.ndarray]


@dataclass
class System:
    """One way to run the encoder: ``open`` prepares it for inputs and gives what times it and what it answers."""

    name: str
    precision: str
    open: Callable[[Inputs], tuple[Callable[[float, float], list[float]], Callable[[], np.ndarray]]]
    times: list[float] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether it is graphwright."""
        return self.name.startswith(OURS)


def main() -> int:
    """Run the comparison."""
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = bert("sdpa")
    rows, bounds, made = Rows(), Bounds(THREADS), systems(model, arguments.quick)
    for batch in BATCHES[:1] if arguments.quick else BATCHES:
        measure(rows, bounds, model, made, batch, rounds=3 if arguments.quick else 7)
    return int(rows.finish(arguments.json))


def bert(attention: str) -> torch.nn.Module:
    """BERT-base without its pooler."""
    config = transformers.BertConfig()
    config._attn_implementation = attention
    model: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval()


def inputs_of(batch: int, seed: int = 0) -> Inputs:
    """Random tokens, nothing padded."""
    ids = np.random.default_rng(seed).integers(1000, 30000, (batch, LENGTH), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def measure(rows: Rows, bounds: Bounds, model: torch.nn.Module, made: list[System], batch: int, rounds: int) -> None:
    """Median milliseconds of every system, in turns, with a pause before each."""
    inputs, case = inputs_of(batch), f"BERT-base, batch {batch}, sequence {LENGTH}"
    with torch.no_grad():
        expected = model(**tensors(inputs)).last_hidden_state.numpy()
    running: list[tuple[System, Callable[[float, float], list[float]], float]] = []
    for system in made:
        system.times.clear()
        try:
            time_it, answer = system.open(inputs)
            agreement = cosine(answer(), expected)
        except Exception as error:  # whatever keeps a rival from running is told
            if system.ours:
                raise
            rows.add(case, system.name, precision=system.precision, error=last_line(error))
            continue
        running.append((system, time_it, agreement))
        least = 0.99999 if system.precision == "fp32" else 0.98
        if system.ours:
            rows.require(agreement >= least, f"{case}: {system.name} agrees to {agreement:.5f}, {least} wanted")
    peaks: dict[str, list[float]] = {"int8": [], "fp32": []}
    for _ in range(rounds):
        time.sleep(PAUSE)
        peaks["int8"].append(bounds.int8_tops(8) or float("nan"))
        peaks["fp32"].append(bounds.float32_tflops() or float("nan"))
        for system, time_it, _ in running:
            time.sleep(PAUSE)
            system.times.extend(time_it(WARM, TIMED))
    peak = {precision: 1e12 * statistics.median(values) for precision, values in peaks.items()}
    linears, attention = operations(batch)
    best: dict[tuple[str, bool], float] = {}
    for system, _, agreement in running:
        median = 1e3 * statistics.median(system.times)
        bound = 1e3 * (linears / peak[system.precision] + attention / peak["fp32"])
        found = {"median_ms": median, "bound_ms": bound, "cosine": agreement}
        rows.add(case, system.name, precision=system.precision, **found)
        key = system.precision, system.ours
        best[key] = min(best.get(key, float("inf")), median)
    for precision, wanted in (("fp32", FP32_TARGET), ("int8", INT8_TARGET)):
        ratio = best.get((precision, False), float("nan")) / best[precision, True]
        rows.add(case, f"{OURS} {precision} over the fastest rival", speedup=ratio)
        rows.require(ratio >= wanted, f"{case}: {precision} {ratio:.2f} x the fastest rival, {wanted} wanted")


def operations(batch: int) -> tuple[float, float]:
    """Multiplications and additions of the linears, and of attention's two products, which stay in fp32."""
    config = transformers.BertConfig()
    hidden, tokens = config.hidden_size, batch * LENGTH
    linears = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    attention = 2 * LENGTH * hidden
    return 2.0 * tokens * linears * config.num_hidden_layers, 2.0 * tokens * attention * config.num_hidden_layers


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Of all states together."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def systems(model: torch.nn.Module, quick: bool) -> list[System]:
    """Ours and every rival."""
    files = rival_files(model)
    made = [
        *_ours(model, quick),
        System(f"{ORT} exported", "fp32", _ort(files["plain"])),
        System(f"{ORT} transformers.optimizer", "fp32", _ort(files["fused"])),
        System(f"{ORT} dynamic", "int8", _ort(files["dynamic"])),
        System(f"{ORT} dynamic, transformers.optimizer", "int8", _ort(files["dynamic fused"])),
        System(f"{ORT} static QDQ", "int8", _ort(files["static"])),
        System(f"{TORCH} compile", "fp32", _compiled(model)),
    ]
    samples = FOLDER / "samples.npz"
    save(samples, _samples())
    openvino = process("openvino", OPENVINO, "_rival_openvino.py")
    plain, quantized = str(files["plain"]), str(files["plain"].with_name("openvino-int8.xml"))
    int8 = {"model": plain, "int8": quantized, "samples": str(samples)}
    deepsparse = process("deepsparse", DEEPSPARSE, "_rival_deepsparse.py", {"NM_DISABLE_ANALYTICS": "1"})
    return [
        *made,
        System(OPENVINO[0], "fp32", openvino({"model": plain, "hint": "f32"})),
        System(f"{OPENVINO[0]} NNCF", "int8", openvino({**int8, "hint": "f32"})),
        # What is not INT8 in bfloat16, where the CPU has it: OpenVINO's default.
        System(f"{OPENVINO[0]} NNCF, default precision", "int8", openvino(int8)),
        System(DEEPSPARSE[0], "fp32", deepsparse({"model": plain})),
        System(f"{DEEPSPARSE[0]} static", "int8", deepsparse({"model": str(files["integer"])})),
    ]


def _samples() -> Inputs:
    return inputs_of(SAMPLES, seed=1)


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _here(call: Callable[[], Any], answer: Callable[[Any], np.ndarray]) -> Any:
    return lambda warm, seconds: timed(call, warm, seconds), lambda: answer(call())


def _ours(model: torch.nn.Module, quick: bool) -> list[System]:
    # Nothing is verified here, for time's sake: each system's answer is compared with the model's.
    example = tensors(inputs_of(2))
    fused = gw.optimize(model, [gw.Cleanup(), gw.FuseAll()], example_inputs=example, verify=False)
    calibration = [tensors({name: value[i : i + 1] for name, value in _samples().items()}) for i in range(SAMPLES)]
    recipes: dict[str, tuple[str, list[gw.Pass]]] = {
        "fp32": ("fp32", []),
        "int8 dynamic": ("int8", [gw.QuantizeLinears(bits=8, activations="int8")]),
    }
    if not quick:  # calibrating takes more than a minute
        static = gw.QuantizeLinears(bits=8, activations="int8", calibration=calibration)
        recipes["int8 static"] = "int8", [static]
    made = []
    for name, (precision, passes) in recipes.items():
        small = gw.optimize(fused, passes, example_inputs=example, verify=False, target="cpu")
        made.append(System(f"{OURS} {name}", precision, executed(small)))
    return made


def executed(small: gw.OptimizedModel) -> Any:
    def start(inputs: Inputs) -> Any:
        given = tensors(inputs)
        return _here(lambda: small(**given), lambda output: output.last_hidden_state.numpy())

    return start


def _ort(path: Path) -> Any:
    def start(inputs: Inputs) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        types = {item.name: np.int32 if "int32" in item.type else np.int64 for item in session.get_inputs()}
        feeds = {name: value.astype(types[name]) for name, value in inputs.items()}
        return _here(lambda: session.run(["last_hidden_state"], feeds), lambda output: output[0])

    return start


def _compiled(model: torch.nn.Module) -> Any:
    def start(inputs: Inputs) -> Any:
        compiled, given = torch.compile(model, dynamic=False), tensors(inputs)

        def call() -> Any:
            with torch.no_grad():
                return compiled(**given)

        return _here(call, lambda output: output.last_hidden_state.numpy())

    return start


def process(name: str, requirements: list[str], worker: str, environment: dict[str, str] | None = None) -> Any:
    """What opens systems in a rival's process, which is started when it is first needed."""
    get = when_needed(name, requirements, worker, environment)

    def start(what: dict[str, Any], inputs: Inputs) -> Any:
        rival = get()
        given = FOLDER / f"{name}-inputs.npz"
        save(given, inputs)
        key = str(sorted(what.items()))
        rival.ask("load", key, inputs=str(given), threads=THREADS, **what)
        return lambda warm, seconds: rival.times(key, warm, seconds), lambda: rival.answer(key)

    return lambda what: lambda inputs: start(what, inputs)


NAMES = ("plain", "fused", "dynamic", "dynamic fused", "static", "static per tensor", "integer")


def rival_files(model: torch.nn.Module, names: Sequence[str] = NAMES, label: str = "") -> dict[str, Path]:
    """What onnxruntime's tools make of the same model; kept under build/rivals.

    Args:
        model: of :func:`bert`.
        names: which of them, each behind what it is made from.
        label: tells models apart whose weights differ.
    """
    folder = FOLDER / f"bert-base-{version('torch')}-{version('transformers')}-{version('onnxruntime')}{label}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace(' ', '-')}.onnx" for name in names}
    steps: dict[str, Callable[[Path], object]] = {
        "plain": lambda target: _export(model, target),
        "fused": lambda target: _fuse(files["plain"], target),
        "dynamic": lambda target: _quantize(files["plain"], target),
        "dynamic fused": lambda target: _quantize(files["fused"], target),
        "static": lambda target: _quantize_static(files["plain"], target, per_channel=True),
        "static per tensor": lambda target: _quantize_static(files["plain"], target, per_channel=False),
        "integer": lambda target: integer_products(files["static per tensor"], target),
    }
    for name in names:
        if not files[name].exists():
            part = files[name].with_suffix(".part")
            steps[name](part)
            part.rename(files[name])
    return files


def _export(model: torch.nn.Module, target: Path) -> None:
    eager = bert("eager")
    eager.load_state_dict(model.state_dict())

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = eager

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return states

    axes = {0: "batch", 1: "sequence"}
    # The TorchScript exporter: its graph is the one the optimiser's patterns were written for.
    torch.onnx.export(
        States(),
        tuple(tensors(inputs_of(2)).values()),
        str(target),
        dynamo=False,
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys(("input_ids", "attention_mask", "last_hidden_state"), axes),
    )


def _fuse(source: Path, target: Path) -> None:
    optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=12,
        hidden_size=768,
        optimization_options=FusionOptions("bert"),
        opt_level=0,
        use_gpu=False,
    ).save_model_to_file(str(target))


def _quantize(source: Path, target: Path) -> None:
    quantize_dynamic(
        str(source), str(target), per_channel=True, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1}
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        samples = _samples()
        self._left = [{name: value[i : i + 1] for name, value in samples.items()} for i in range(SAMPLES)]

    def get_next(self) -> Inputs | None:
        return self._left.pop() if self._left else None


def _quantize_static(source: Path, target: Path, per_channel: bool) -> None:
    # With one scale to a tensor it is for DeepSparse: activations are multiplied by each other in floats, and what
    # products give is not rounded again, as in SparseML's exports.
    options = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]}
    constant: dict[str, Any] = {} if per_channel else options
    quantize_static(
        str(source),
        str(target),
        _Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1, **constant},
    )


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
