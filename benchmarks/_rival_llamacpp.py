"""llama.cpp, in its own process: a Llama in GGUF, quantised by llama.cpp itself."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from _rival_worker import serve

TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Decoder:
    """A model with a context for so many sequences at once as were last asked for."""

    def __init__(self, model: str, threads: int, capacity: int) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self._threads, self._capacity = threads, capacity
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"{model} cannot be loaded")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy continuations: ``tokens``, and the ``seconds`` from the start until each is known."""
        count, length = len(prompts), len(prompts[0])
        context = self._context(count)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        first = _batch(prompts, 0)
        start = time.perf_counter()
        last = self._next(context, first, range(length - 1, count * length, length))
        seconds, said = [time.perf_counter() - start], [last]
        step = _batch([[0]] * count, 0)
        for position in range(length, length + tokens - 1):
            for sequence, token in enumerate(last):
                step.token[sequence] = token
                step.pos[sequence] = position
            last = self._next(context, step, range(count))
            seconds.append(time.perf_counter() - start)
            said.append(last)
        for batch in (first, step):
            llama_cpp.llama_batch_free(batch)
        return {"seconds": seconds, "tokens": list(zip(*said))}

    def logits(self, prompt: list[int]) -> list[float]:
        """After a prompt."""
        context, batch = self._context(1), _batch([prompt], 0)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        self._next(context, batch, [len(prompt) - 1])
        found: list[float] = self._logits(context, len(prompt) - 1).tolist()
        return found

    def _next(self, context: Any, batch: Any, rows: Sequence[int]) -> list[int]:
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gives {status}")
        return [int(self._logits(context, row).argmax()) for row in rows]

    def _logits(self, context: Any, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (self._vocabulary,))

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = self._capacity * sequences
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = self._threads
            self._contexts[sequences] = llama_cpp.llama_init_from_model(self._model, parameters)
        return self._contexts[sequences]


def _batch(prompts: list[list[int]], position: int) -> Any:
    """Sequences of tokens; logits are wanted after the last of each."""
    count = sum(len(prompt) for prompt in prompts)
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    row = 0
    for sequence, prompt in enumerate(prompts):
        for index, token in enumerate(prompt):
            batch.token[row] = token
            batch.pos[row] = position + index
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = index == len(prompt) - 1
            row += 1
    return batch


def load(request: dict[str, Any]) -> Decoder:
    """``model``, ``threads`` and the ``capacity`` of the cache."""
    return Decoder(request["model"], request["threads"], request["capacity"])


def make(request: dict[str, Any]) -> None:
    """From a Hugging Face folder ``source`` of a Llama in bfloat16 to the GGUF file ``target`` of a ``type``."""
    target = Path(request["target"])
    whole = target.with_name(f"{target.name}.bf16")
    try:
        _write(Path(request["source"]), whole)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = TYPES[request["type"]]
        # The head too, as the other systems have it.
        parameters.pure = True
        parameters.nthread = os.cpu_count() or 1
        status = llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), ctypes.byref(parameters))
        if status != 0:
            raise RuntimeError(f"llama_model_quantize gives {status}")
    finally:
        whole.unlink(missing_ok=True)


def _write(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, bits in _tensors(source / "model.safetensors"):
        if bits.ndim == 1:
            writer.add_tensor(_renamed(name), (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = _pairs(bits, heads if "q_proj" in name else shared)
        raw = bits.view(np.uint8)
        writer.add_tensor(_renamed(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Of a safetensors file in bfloat16, which numpy does not know: its bits."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offset, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        yield name, np.memmap(path, np.uint16, "r", offset, shape)


def _renamed(name: str) -> str:
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in known:
        return known[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Its rotary embedding turns neighbours; that of transformers, a head's first half with the second."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


if __name__ == "__main__":
    serve(load, make)
