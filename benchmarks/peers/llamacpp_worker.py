"""llama.cpp with the same shape, measured on request. Needs llama-cpp-python and gguf.

    python benchmarks/peers/llamacpp_worker.py make MODEL OUT.gguf TYPE      TYPE: q4_0, q4_k_m, q8_0
    python benchmarks/peers/llamacpp_worker.py serve MODEL.gguf

The first writes the weights of a Llama checkpoint of Transformers as GGUF and quantizes them with llama.cpp's own code (head and
embeddings with the rest). Rows of q and k are not reordered, which changes the text and not the time.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from worker import PROMPT, serve

# The folder has files with the names of packages.
sys.path.pop(0)

import llama_cpp
import numpy as np

CONTEXT, MOST_SEQUENCES = 1024, 8
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def tensors(folder: Path) -> Any:
    """Name and float32 values of each tensor, read without torch: bfloat16 is the upper half of float32."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", entry
            begin, end = entry["data_offsets"]
            bits = data[begin:end].view(np.uint16).astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def make(folder: Path, out: Path, kind: str) -> None:
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    plain = out.with_suffix(".f16.gguf")
    writer = gguf.GGUFWriter(plain, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_F16)
    for name, values in tensors(folder):
        writer.add_tensor(
            gguf_name(name), values.astype(np.float32 if values.ndim == 1 else np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[kind]
    settings.nthread = os.cpu_count() or 1
    failed = llama_cpp.llama_model_quantize(
        str(plain).encode(), str(out).encode(), ctypes.byref(settings)
    )
    plain.unlink()
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


class Model:
    def __init__(self, path: Path) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = CONTEXT * MOST_SEQUENCES
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = MOST_SEQUENCES
        settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(self, tokens: list[int], positions: list[int], sequences: list[int]) -> None:
        """One pass; logits of the last token of each sequence in the batch."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        last = {sequence: i for i, sequence in enumerate(sequences)}
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = positions[i]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequences[i]
            batch.logits[i] = last[sequences[i]] == i
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")

    def best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def measure(self, task: str, batch: int, tokens: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        length = tokens if task == "prefill" else PROMPT
        prompt = np.random.default_rng(0).integers(self.vocabulary, size=(batch, length)).tolist()
        start = time.perf_counter()
        for sequence, row in enumerate(prompt):
            self.decode(row, list(range(length)), [sequence] * length)
            last = self.best(length - 1)
        if task == "prefill":
            return time.perf_counter() - start
        current, steps = [last] * batch, []
        for i in range(tokens - 1):
            start = time.perf_counter()
            self.decode(current, [length + i] * batch, list(range(batch)))
            current = [self.best(row) for row in range(batch)]
            steps.append(time.perf_counter() - start)
        return statistics.median(steps)


def serve_model(path: Path) -> None:
    model = Model(path)
    about = {
        "weights_MiB": llama_cpp.llama_model_size(model.model) / 2**20,
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    serve(model.measure, about)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        serve_model(Path(sys.argv[2]))
