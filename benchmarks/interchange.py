"""Quantised checkpoints through the real libraries, both ways: compressed-tensors with transformers, and GPTQModel.

    python benchmarks/interchange.py [--quick] [--json FILE] [--gptqmodel PYTHON]

Out: tinylm is quantised here, saved in each layout, and read by the library that the layout is from: the weights that
its own linears make of the tensors, and where it runs on a CPU the logits of the folder, against ours. In: the
library packs codes that are known, and our reader must give exactly these. compressed-tensors is taken from the running
environment; GPTQModel (which packs AWQ as well) needs one of its own, whose Python is named, made by::

    python -m venv build/rivals/gptqmodel
    build/rivals/gptqmodel/bin/pip install torch==2.13.0 transformers setuptools
    build/rivals/gptqmodel/bin/pip install --no-build-isolation gptqmodel
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from _rows import REPOSITORY
from safetensors.torch import load_file, save_file

import graphwright as gw
from graphwright.frontends.huggingface.folder import ModelFolder
from graphwright.frontends.huggingface.loading import load_model
from graphwright.frontends.huggingface.quantized.awq import AwqReader
from graphwright.frontends.huggingface.quantized.compressed_tensors import CompressedTensorsReader
from graphwright.frontends.huggingface.quantized.gptq import GptqReader
from graphwright.frontends.huggingface.quantized.modules import GroupedWeight, StoredLinear
from graphwright.frontends.huggingface.quantized.reader import Reader
from graphwright.frontends.huggingface.quantized.tensors import FolderTensors
from graphwright.ir.ops.quantization import BITS, unpack

TINYLM = REPOSITORY.parent / "shared" / "models" / "tinylm"
IDS = torch.randint(3, 4000, (2, 48), generator=torch.Generator().manual_seed(0))
WORKER = Path(__file__).with_name("_rival_gptqmodel.py")


def main() -> int:
    """Run the comparisons and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 4 bits")
    parser.add_argument("--json", type=Path, help="where results are written")
    parser.add_argument("--gptqmodel", type=Path, help="a Python that has GPTQModel")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = gw.load_decoder(TINYLM, dtype="float32", check=False)
        for bits, symmetric, group in _formats(quick=options.quick):
            _out(program, Path(folder), bits, symmetric, group, options.gptqmodel, rows)
        _in(Path(folder), options.gptqmodel, rows, quick=options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["failed"] for row in rows) else 0


def _formats(*, quick: bool) -> list[tuple[int, bool, int | None]]:
    chosen = [4] if quick else [bits for bits in BITS if bits in (2, 3, 4, 8)]
    return [(bits, symmetric, group) for bits in chosen for symmetric, group in ((True, 64), (False, 64), (True, None))]


def _report(rows: list[dict[str, Any]], what: str, error: float | None, limit: float, note: str = "") -> None:
    failed = error is not None and not error <= limit
    rows.append({"what": what, "error": error, "limit": limit, "note": note, "failed": failed})
    shown = note if error is None else f"{error:.2e} (limit {limit:.0e}){' FAILED' if failed else ''} {note}"
    print(f"{what:76} {shown}", flush=True)


# -- out -------------------------------------------------------------------------------------------------------------


def _out(
    program: gw.Program,
    folder: Path,
    bits: int,
    symmetric: bool,
    group: int | None,
    python: Path | None,
    rows: list[dict[str, Any]],
) -> None:
    made = program.clone()
    gw.run_passes(made, [gw.QuantizeLinears(bits=bits, group_size=group, symmetric=symmetric, clip_search=False)])
    kind = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, group {group}"
    for layout in ("compressed-tensors", "gptq", *(("awq",) if bits == 4 else ())):
        target = folder / f"{layout}-{bits}-{symmetric}-{group}"
        saved = gw.save_quantized(made, target, layout=layout, source=TINYLM)
        ours = load_model(target, dtype="float32")
        scales = [tensor for name, tensor in ours.named_buffers() if name.endswith(".scales")]
        negative = sum(int((tensor < 0).sum()) for tensor in scales)
        _report(rows, f"{layout}: {kind}: read again by us", saved.error, 1e-6, f"{negative} negative scales")
        if layout == "compressed-tensors":
            _read_by_compressed_tensors(target, ours, kind, symmetric, rows)
        elif python is not None:
            _read_by_gptqmodel(python, folder, target, ours, f"{layout}: {kind}", rows)


def _read_by_compressed_tensors(
    target: Path, ours: Any, kind: str, symmetric: bool, rows: list[dict[str, Any]]
) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        _report(rows, f"compressed-tensors: {kind}", None, 0, "not installed")
        return
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = json.loads((target / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = QuantizationConfig(**settings).config_groups["group_0"]
    tensors, worst = load_file(target / "model.safetensors"), 0.0
    for name, module in ours.named_modules():
        if isinstance(module, StoredLinear):
            given = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            given["weight_scale"] = given["weight_scale"].float()
            worst = max(worst, _weight_error(module, PackedQuantizationCompressor.decompress(given, scheme)["weight"]))
    _report(rows, f"compressed-tensors: {kind}: weights by the library", worst, 0.0)
    if not symmetric:
        return  # transformers 5.23 makes room for zero points that are not packed, and refuses packed ones
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(target)
    _report(rows, f"compressed-tensors: {kind}: logits by transformers", _logits_error(theirs, ours), 1e-6)


def _read_by_gptqmodel(
    python: Path, folder: Path, target: Path, ours: Any, what: str, rows: list[dict[str, Any]]
) -> None:
    ids, out = folder / "ids.safetensors", folder / "theirs.safetensors"
    save_file({"ids": IDS}, ids)
    problem = _run(python, "read", target, ids, out)
    if problem is not None:
        _report(rows, f"{what}: by GPTQModel", None, 0, problem)
        return
    theirs = load_file(out)
    logits = theirs.pop("logits")
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, StoredLinear)}
    assert linears.keys() == theirs.keys()
    worst = max(_weight_error(module, theirs[name]) for name, module in linears.items())
    _report(rows, f"{what}: weights by GPTQModel", worst, 0.0)
    with torch.no_grad():
        wanted = ours(input_ids=IDS).logits
    _report(rows, f"{what}: logits by GPTQModel", _relative(logits, wanted), 1e-2, "it computes in half precision")


# -- in --------------------------------------------------------------------------------------------------------------


def _in(folder: Path, python: Path | None, rows: list[dict[str, Any]], *, quick: bool) -> None:
    """Codes packed by the libraries, read by us."""
    generator = torch.Generator().manual_seed(1)
    jobs: list[tuple[str, Path, Path, dict[str, torch.Tensor]]] = []
    for bits, _, group in [each for each in _formats(quick=quick) if not each[1] or each[2] is None]:
        outputs, inputs = 96, 256
        size = inputs if group is None else group
        codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator)
        zeros = torch.randint(1, 2**bits, (outputs, inputs // size), generator=generator)
        scales = (torch.rand(outputs, inputs // size, generator=generator) + 0.5).half().float()
        index = torch.arange(inputs) // size
        given = {"codes": codes, "zeros": zeros, "scales": scales, "g_idx": index.to(torch.int32)}
        given |= {"bits": torch.tensor(bits), "group": torch.tensor(size)}
        _pack_compressed(folder, given, rows)
        shuffled = given["g_idx"][torch.randperm(inputs, generator=generator)]
        for layout, order in (("gptq", index), ("gptq", shuffled), *((("awq", index),) if bits == 4 else ())):
            job = {**given, "g_idx": order.to(torch.int32), "weight": _dense(codes, zeros, scales, order)}
            file = folder / f"codes-{len(jobs)}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in job.items()}, file)
            jobs.append((layout, file, folder / f"packed-{len(jobs)}.safetensors", job))
    if python is None:
        return
    problem = _run(python, "pack", *(part for job in jobs for part in job[:3]))
    if problem is not None:
        _report(rows, "packed by GPTQModel", None, 0, problem)
        return
    for layout, _, file, job in jobs:
        bits, size = int(job["bits"]), int(job["group"])
        settings = {"bits": bits, "group_size": size, "checkpoint_format": "gptq_v2"}
        tensors = {f"m.{name}": tensor for name, tensor in load_file(file).items()}
        kind: type[Reader] = GptqReader if layout == "gptq" else AwqReader
        order = ", desc_act" if bool((job["g_idx"].diff() < 0).any()) else ""
        what = f"{layout}: {bits} bits, group {size}{order}: packed by GPTQModel"
        _compare(rows, what, _read(kind, settings, tensors, folder, *job["codes"].shape), job)


def _dense(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    groups = index.long()
    return (codes - zeros[:, groups]) * scales[:, groups]


def _pack_compressed(folder: Path, given: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        return
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codes, zeros, scales, bits, size = (given[name] for name in ("codes", "zeros", "scales", "bits", "group"))
    strategy = {"strategy": "channel"} if size == codes.shape[1] else {"strategy": "group", "group_size": int(size)}
    weights: dict[str, Any] = {"num_bits": int(bits), "type": "int", "symmetric": False, **strategy}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {"weight": _dense(codes, zeros, scales, given["g_idx"]), "weight_scale": scales}
    state["weight_zero_point"] = (zeros - 2 ** (int(bits) - 1)).to(torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    tensors = {f"m.{name}": tensor for name, tensor in packed.items()}
    settings = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    found = _read(CompressedTensorsReader, settings, tensors, folder, *codes.shape)
    _compare(rows, f"compressed-tensors: {int(bits)} bits, group {int(size)}: packed by the library", found, given)


def _read(
    kind: type[Reader],
    settings: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    folder: Path,
    outputs: int,
    inputs: int,
) -> GroupedWeight:
    file = folder / "read.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    reader = kind(settings, FolderTensors(ModelFolder(folder, {}, (file,))), "settings")
    assert reader.modules() == ["m"]
    found = reader.read("m", inputs, outputs)
    assert isinstance(found, GroupedWeight)
    return found


def _compare(rows: list[dict[str, Any]], what: str, found: GroupedWeight, given: dict[str, torch.Tensor]) -> None:
    """Count codes, zero points and scales that are not the same."""
    codes, zeros, scales, bits = (given[name] for name in ("codes", "zeros", "scales", "bits"))
    order = torch.arange(codes.shape[1]) if found.order is None else found.order
    wrong = (unpack(found.qweight, int(bits)).flatten(1)[:, : codes.shape[1]] != codes[:, order]).sum()
    points = torch.full_like(zeros, 2 ** (int(bits) - 1)) if found.zero_points is None else found.zero_points
    wrong += (points != zeros).sum() + (found.scales.float() != scales).sum()
    _report(rows, what, float(wrong), 0.0, "wrong numbers")


# -- what they share -------------------------------------------------------------------------------------------------


def _run(python: Path, *arguments: str | Path) -> str | None:
    """Run the worker; the last line it says if it fails."""
    command = [str(python), str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=WORKER.parent)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"cannot: {lines[-1] if lines else f'exit code {done.returncode}'}"


def _weight_error(module: StoredLinear, theirs: torch.Tensor) -> float:
    """Between the weights, as the largest difference."""
    with torch.no_grad():
        ours = module(torch.eye(module.in_features)).T - (0 if module.bias is None else module.bias.unsqueeze(1))
    return float((ours - theirs).abs().max())


def _logits_error(theirs: Any, ours: Any) -> float:
    with torch.no_grad():
        return _relative(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _machine() -> dict[str, str]:
    packages = ("torch", "transformers", "compressed-tensors")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"system": platform.platform(), "python": platform.python_version(), **found}


if __name__ == "__main__":
    raise SystemExit(main())
