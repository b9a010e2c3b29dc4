"""llm-compressor's AWQ, in its own process: a Hugging Face folder with its weights as floats again.

Runs on the Python of the rival's own environment (``_rivals.QUANTIZERS``).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any


def main() -> int:
    """Quantise a folder with AWQ's scales and clipped ranges, and write what the model then computes with."""
    options = arguments()
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    # It asks for pinned memory, which there is none of without a GPU.
    setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # noqa: B010
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = load_file(options.calibration)["input_ids"].long()
    rounding = QuantizationModifier(ignore=["lm_head"], config_groups=config_groups(options))
    oneshot(
        model=model,
        dataset=dataset(rows),
        recipe=[AWQModifier(duo_scaling="both"), rounding],
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        pipeline="sequential",
    )
    save(model, options.model, options.out)
    print(json.dumps({"method": "awq", "bits": options.bits, "group": options.group}))
    return 0


def arguments() -> argparse.Namespace:
    """The options that all workers of this kind take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="safetensors file with input_ids [windows, tokens]"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="columns to a scale; 0: one scale per output channel")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def config_groups(options: argparse.Namespace) -> dict[str, Any]:
    """Symmetric integer weights."""
    grouped = options.group > 0
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": options.group if grouped else None,
        "observer": "mse",
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def dataset(rows: Any) -> Any:
    """Calibration windows as llm-compressor takes them."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)})


def save(model: Any, source: Path, out: Path) -> None:
    """Write the weights that rounding leaves, in float32, beside the configuration and the tokenizer of the source."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for module in model.modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is None or scheme.weights is None:
                continue
            zero = getattr(module, "weight_zero_point", None)
            module.weight.copy_(fake_quantize(module.weight, module.weight_scale, zero, scheme.weights))
    kept: dict[str, Any] = {}
    seen: set[int] = set()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        extra = name.rpartition(".")[2].startswith(("weight_", "input_", "output_"))
        if name not in parameters or extra or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().to(torch.float32).contiguous()
    save_file(kept, str(out / "model.safetensors"), metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
