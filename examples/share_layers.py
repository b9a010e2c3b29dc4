"""Train a language model whose layers are shared, from scratch, and decode it at full and at less depth.

Two layers, each used three times, are trained on bytes of text so that the classifier works after every repetition
(Hooper et al., SPEED). Takes under 15 minutes on two cores; ``--quick`` shows every step of the way in seconds.

    python examples/share_layers.py [--quick] [TEXT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw

REPOSITORY = Path(__file__).resolve().parent.parent
# WikiText-2's validation text, if it lies beside the repository; else what the repository says of itself.
TEXTS = (REPOSITORY.parent / "shared" / "data" / "wikitext2" / "valid.txt", REPOSITORY / "README.md")
QUICK = "--quick" in sys.argv
LENGTH, BATCH = (48, 4) if QUICK else (128, 16)
STEPS = 12 if QUICK else 900


def main() -> None:
    """Share, train, measure, decode."""
    train, held_out = bytes_of_text()
    model = small_llama()
    program = gw.trace(model, {"input_ids": train[:2], "labels": train[:2], "use_cache": False})
    gw.ShareLayers(groups=2)(program)
    print(*gw.find_stacks(program), "of which", program.records["sharing"]["groups"], "are distinct")

    classified = program.clone()  # shares the weights: what trains is the program itself
    gw.ClassifyRepetitions()(classified)  # its loss is now the weighted sum over the repetitions
    optimizer = torch.optim.AdamW(classified.parameters(), lr=2e-3, weight_decay=0.01)
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 1.05 - step / STEPS)
        rows = train[torch.randint(0, len(train), (BATCH,), generator=generator)]
        loss = classified(input_ids=rows, labels=rows)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (STEPS // 4) == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")

    for kept in (1, 2, 3):
        small = program.clone()
        gw.TruncateDepth(repetitions=kept)(small)
        with torch.no_grad():
            loss = small(input_ids=held_out, labels=held_out).loss
        print(f"after {kept} of 3 repetitions: {loss.item() / 0.6931:.3f} bits a byte on held-out text")

    step_program = gw.load_decoder(model, check=False)  # the same weights' names, with a cache for every repetition
    gw.ShareLayers(groups=2)(step_program)
    step_program.load_state_dict(program.state_dict(), strict=False)
    step_program.save("shared")
    whole = sum(each.numel() for each in model.parameters())
    kept = sum(each.numel() for each in step_program.parameters())
    print(f"{kept} numbers instead of {whole}; {Path('shared/model.safetensors').stat().st_size} bytes on disk")

    decoder = gw.optimize(step_program, [gw.PrepareDecoder(length=256)], target="cpu")
    assert isinstance(decoder, gw.OptimizedDecoder)
    prompt = [list(b"The ")]
    text = bytes(decoder.generate(prompt, max_new_tokens=60).tokens[0]).decode(errors="replace")
    print(f"\nThe {text}")


def small_llama() -> LlamaForCausalLM:
    """Six layers, bytes for tokens."""
    torch.manual_seed(0)
    width = 64 if QUICK else 192
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def bytes_of_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on, and 32 others, int64 ``[rows, LENGTH]``."""
    given = [Path(each) for each in sys.argv[1:] if not each.startswith("-")]
    text = next(path for path in (*given, *TEXTS) if path.exists()).read_bytes()
    rows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).reshape(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[32:]], rows[order[:32]]


if __name__ == "__main__":
    main()
