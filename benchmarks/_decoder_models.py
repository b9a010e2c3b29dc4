"""The model of the decoder benchmark: TinyLlama's shape and random weights, kept under build/rivals/models.

What it says is known beforehand, so that a system which computes something else is found out, and so that there is
text in which the next token can be looked up: every token is followed by the next one, and the last of 64 by the first
of them. The head's rows are those of the embeddings for this, which are large beside what the layers add.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _rivals import FOLDER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, FEED_FORWARD, LAYERS = 2048, 5632, 22
HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 32, 4, 64
VOCABULARY, POSITIONS = 32000, 2048
END, CYCLE = 2, 64
MODELS = FOLDER / "models"
# Of the linears, the head among them: what is read for every token. The table of embeddings is not.
WEIGHTS = VOCABULARY * HIDDEN + LAYERS * (
    2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE_HEADS * HEAD_SIZE + 3 * HIDDEN * FEED_FORWARD
)
# A row of the cache: keys and values of all layers.
CACHE_ROW = LAYERS * 2 * KEY_VALUE_HEADS * HEAD_SIZE


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """A file or folder, made now if it is not there; one that is only half made never has its name."""
    if not target.exists():
        print(f"making {target.relative_to(FOLDER)}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"part-{target.name}")
        if part.is_dir():
            shutil.rmtree(part)
        make(part)
        part.rename(target)
    return target


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens; no prompt begins like another, which some systems would remember."""
    return [int(token) for token in np.random.default_rng([seed, length]).integers(CYCLE, VOCABULARY, length)]


def follower(token: int) -> int:
    """What the model says after a token of those that are in prompts."""
    return token + 1 if (token + 1) % CYCLE else token + 1 - CYCLE


def folder(width: int = HIDDEN, layers: int = LAYERS) -> Path:
    """The original, as transformers saves it, in bfloat16, with a tokenizer of as many tokens.

    With another width, a model of as many layers that holds next to nothing.
    """
    name = f"llama-{width}-{transformers.__version__}" + (f"-{layers}-layers" if layers != LAYERS else "")
    return made(MODELS / name, lambda target: _save(target, width, layers))


def expected(tokens: list[int]) -> np.ndarray:
    """The original's logits after the last of some tokens."""

    def save(target: Path) -> None:
        model = transformers.LlamaForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16)
        with torch.no_grad(), target.open("wb") as file:
            np.save(file, model(torch.tensor([tokens])).logits[0, -1].float().numpy())

    found: np.ndarray = np.load(made(MODELS / f"{folder().name}-logits.npy", save))
    return found


def packed_bytes(path: Path) -> int:
    """What a packed file of ours holds besides the table of embeddings."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for entry in tensors
        if entry["shape"] != [VOCABULARY, HIDDEN]
    )


def _save(target: Path, width: int, layers: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=FEED_FORWARD if width == HIDDEN else width,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=KEY_VALUE_HEADS if width == HIDDEN else 1,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        head_dim=HEAD_SIZE,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    causal: Any = transformers.AutoModelForCausalLM
    model = causal.from_config(config, dtype=torch.bfloat16)
    embeddings, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embeddings *= 50
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    cycles = embeddings[CYCLE:].unflatten(0, (-1, CYCLE))
    head[CYCLE:] = cycles.roll(1, dims=1).flatten(0, 1) * 0.02
    # The largest of so many logits is never 0: no system stops before it has generated what it was asked for.
    head[END] = 0
    model.save_pretrained(target)
    _save_tokenizer(target)


def _save_tokenizer(target: Path) -> None:
    special = ["<pad>", "<s>", "</s>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"unused{index}" for index in range(len(names), VOCABULARY)]
    bytes_only = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made_of: Any = transformers.PreTrainedTokenizerFast
    marks = dict(zip(("pad_token", "bos_token", "eos_token"), special))
    made_of(tokenizer_object=bytes_only, **marks).save_pretrained(target)
