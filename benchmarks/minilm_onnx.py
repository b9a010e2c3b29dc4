"""all-MiniLM-L6-v2 in onnxruntime: our exports beside onnxruntime's own optimiser and quantiser.

Speed at sequence 128, batch 1 and 8, everything in one process and in turns; quality on the STS benchmark's dev set
(cosine to the fp32 embeddings, Spearman to the human scores); size of the weights that were quantised. Exit code 1 when
a target is missed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _rows import Rows, parser
from _stsb import correlation, minilm_folder, stored_share, sts
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from transformers import AutoModel, AutoTokenizer

import graphwright as gw
from graphwright.backends.cpu.features import features

OURS = "graphwright"
RIVAL = f"onnxruntime {version('onnxruntime')}"
SIGNED = "int8 vnni=True"
CALIBRATION_SENTENCES = 512
# Signed INT8 weights, which onnxruntime multiplies exactly on these processors alone.
VNNI = any(each.usable for each in features().instruction_sets if each.name in ("avx_vnni", "avx512_vnni", "neon"))


def main() -> int:
    """Run the benchmark."""
    arguments = parser(__doc__).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    folder, rows = minilm_folder(), Rows()
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        files, reports = our_files(model, tokenizer, Path(scratch))
        files.update(rival_files(folder, Path(scratch)))
        sizes(rows, reports)
        quality(rows, files, model, tokenizer, 200 if arguments.quick else None)
        for batch in (1, 8):
            speed(rows, files, batch, 128, rounds=6 if arguments.quick else 25)
    return int(rows.finish(arguments.json))


def encode(tokenizer: Any, sentences: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and padding mask."""
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def our_files(model: torch.nn.Module, tokenizer: Any, out: Path) -> tuple[dict[str, Path], dict[str, gw.Program]]:
    """fp32, INT8 and INT4 exports."""
    sentences = sts("sts-train.csv", CALIBRATION_SENTENCES)[0]
    calibration = [encode(tokenizer, sentences[start : start + 32]) for start in range(0, len(sentences), 32)]
    example = encode(tokenizer, sentences[:4])
    quantize = gw.QuantizeLinears
    recipes: dict[str, list[gw.Pass]] = {
        "fp32": [],
        "int8": [quantize(bits=8, activations="int8", calibration=calibration)],
        "int8 weights": [quantize(bits=8, group_size=128)],
        "int4 g32": [quantize(bits=4, group_size=32, symmetric=False, calibration=calibration)],
        "int4 g32 nearest": [quantize(bits=4, group_size=32, symmetric=False)],
    }
    files: dict[str, Path] = {}
    programs: dict[str, gw.Program] = {}
    for name, passes in recipes.items():
        small = gw.optimize(model, [gw.Cleanup(), gw.FuseAll(), *passes], example_inputs=example)
        files[f"{OURS}/{name}"] = out / f"ours-{name.replace(' ', '-')}.onnx"
        small.export_onnx(files[f"{OURS}/{name}"])
        programs[name] = small
        if VNNI and name == "int8":
            files[f"{OURS}/{SIGNED}"] = out / "ours-int8-vnni.onnx"
            small.export_onnx(files[f"{OURS}/{SIGNED}"], vnni=True)
    return files, programs


def rival_files(folder: Path, out: Path) -> dict[str, Path]:
    """What onnxruntime's tools make of the same model: transformers.optimizer, and quantize_dynamic on both exports."""
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return states

    plain, fused = out / "rival-plain.onnx", out / "rival-fused.onnx"
    ids = torch.randint(1000, 20000, (2, 16))
    axes = {0: "batch", 1: "sequence"}
    # The TorchScript exporter: its graph is the one the optimiser's patterns were written for.
    torch.onnx.export(
        States(),
        (ids, torch.ones_like(ids)),
        str(plain),
        dynamo=False,
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys(("input_ids", "attention_mask", "last_hidden_state"), axes),
    )
    optimizer.optimize_model(
        str(plain),
        model_type="bert",
        num_heads=12,
        hidden_size=384,
        optimization_options=FusionOptions("bert"),
        opt_level=0,
        use_gpu=False,
    ).save_model_to_file(str(fused))
    files = {f"{RIVAL}/fp32 exported": plain, f"{RIVAL}/fp32 transformers.optimizer": fused}
    for name, source in (("exported", plain), ("transformers.optimizer", fused)):
        made = out / f"rival-int8-{name}.onnx"
        quantize_dynamic(
            str(source),
            str(made),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},
        )
        files[f"{RIVAL}/int8 quantize_dynamic of {name}"] = made
    return files


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Two threads, every optimisation."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sizes(rows: Rows, programs: dict[str, gw.Program]) -> None:
    """Bytes of the weights that were quantised, relative to fp32, as stored."""
    limits = {"int8": 0.26, "int8 weights": 0.26, "int4 g32": 0.15}
    for name, program in programs.items():
        if name == "fp32":
            continue
        share = stored_share(programs["fp32"], program)
        rows.add("size of quantised weights", f"{OURS}/{name}", of_fp32=share)
        if name in limits:
            rows.require(share <= limits[name], f"{name}: weights {share:.1%} of fp32, target {limits[name]:.0%}")


def quality(rows: Rows, files: dict[str, Path], model: torch.nn.Module, tokenizer: Any, limit: int | None) -> None:
    """Cosine to the original's embeddings, and Spearman correlation with the human scores."""
    left, right, scores = sts("sts-dev.csv", limit)
    sentences = [*left, *right]
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    batches = [
        (indices, encode(tokenizer, [sentences[index] for index in indices]))
        for indices in (order[start : start + 32] for start in range(0, len(order), 32))
    ]

    def embeddings(run: Any) -> torch.Tensor:
        found = torch.empty(len(sentences), 384)
        for indices, batch in batches:
            weights = batch["attention_mask"].unsqueeze(-1).float()
            found[indices] = (run(batch) * weights).sum(1) / weights.sum(1)
        return found

    with torch.no_grad():
        expected = embeddings(lambda batch: model(**batch).last_hidden_state)
    base = 100 * correlation(expected, scores)
    rows.add("sts-dev", "transformers fp32", spearman=base, cosine=1.0)
    targets = {"int8": (0.999, 0.2), SIGNED: (0.999, 0.2), "int8 weights": (0.999, 0.2), "int4 g32": (0.99, 1.0)}
    for name, path in files.items():
        session = open_session(path)
        found = embeddings(lambda batch, session=session: first_output(session, batch))
        cosine = float(torch.cosine_similarity(found, expected).mean())
        score = 100 * correlation(found, scores)
        rows.add("sts-dev", name, spearman=score, cosine=cosine)
        if name.removeprefix(f"{OURS}/") in targets:
            least, most = targets[name.removeprefix(f"{OURS}/")]
            rows.require(cosine >= least, f"{name}: cosine {cosine:.5f}, target {least}")
            rows.require(abs(score - base) <= most, f"{name}: Spearman {score:.2f} against {base:.2f}, target ±{most}")


def first_output(session: onnxruntime.InferenceSession, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token states."""
    names = {item.name: item.type for item in session.get_inputs()}
    feeds = {key: value.numpy().astype(np.int32 if "int32" in names[key] else np.int64) for key, value in batch.items()}
    return torch.from_numpy(session.run(["last_hidden_state"], feeds)[0])


def speed(rows: Rows, files: dict[str, Path], batch: int, length: int, rounds: int) -> None:
    """Median milliseconds per call.

    The sessions take turns, several calls each, with a pause before: a session's idle threads spin for a while after
    its last call and would take the next one's time.
    """
    ids = torch.randint(1000, 20000, (batch, length))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sessions = {name: open_session(path) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    calls = 8 if batch == 1 else 2
    for _ in range(rounds):
        for name, session in sessions.items():
            time.sleep(0.05)
            first_output(session, feeds)
            start = time.perf_counter()
            for _ in range(calls):
                first_output(session, feeds)
            times[name].append((time.perf_counter() - start) / calls)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    case = f"batch {batch}, sequence {length}"
    for name, value in medians.items():
        rows.add(case, name, median_ms=value)
    # The rival's weights are signed too.
    bars = {"fp32": "fp32 transformers.optimizer", SIGNED if VNNI else "int8": "int8 quantize_dynamic"}
    for ours, bar in bars.items():
        rivals = [value for name, value in medians.items() if name.startswith(f"{RIVAL}/{bar}")]
        mine = medians[f"{OURS}/{ours}"]
        rows.require(mine <= min(rivals), f"{case}: {ours} {mine:.2f} ms, rival {min(rivals):.2f} ms")


if __name__ == "__main__":
    raise SystemExit(main())
