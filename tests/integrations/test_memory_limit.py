"""A model that is larger than the memory that its process may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 1 << 20

# Above what the interpreter and its libraries take.
ROOM = 256 * MIB

# RLIMIT_DATA counts private writable memory: the heap, and maps of files that may be written to (safetensors' are such),
# whether or not their pages are in use. RLIMIT_AS would count libraries as well. Both routes get the very same limit in
# processes forked from one that has imported everything; the reloading one inherits it.
PROGRAM = """
import json, os, resource, sys, torch, hfq
import transformers.models.llama.modeling_llama, hfq.integrations.streaming, hfq.kernels.dispatch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
source, output, room = sys.argv[1], sys.argv[2], int(sys.argv[3])

def private():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))

def load():
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return sum(parameter.nbytes for parameter in model.parameters())

def quantize():
    tokens = torch.randint(64, (12, 32), generator=torch.Generator().manual_seed(0))
    config = hfq.HfqConfig(overrides={"o_proj": {"method": "gptq"}}, dataset=tokens, num_samples=4)
    report = hfq.quantize(source, output, config, dtype="float32")
    return {"difference": report.logit_difference, "kl": report.held_out.kl, "before": report.bytes_before}

def limited(work, room):
    read, write = os.pipe()
    if os.fork() == 0:
        if room:
            resource.setrlimit(resource.RLIMIT_DATA, (private() + room,) * 2)
        try:
            said = {"result": work()}
        except (MemoryError, RuntimeError, OSError, hfq.HfqError) as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(said)[:4000].encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        return json.loads(file.read() or '{"error": "killed"}')

found = {"load": limited(load, room), "unlimited": limited(load, 0), "quantize": limited(quantize, room)}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what RLIMIT_DATA limits")
def test_a_model_larger_than_the_limit(tmp_path: Path) -> None:
    """327 MB of float32 weights in a process that may have 268 MB more."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(
        tmp_path / "float", max_shard_size="20MB"
    )
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "float"),
        str(tmp_path / "out"),
        str(ROOM),
    ]
    # One heap: glibc would reserve 64 MB for every thread that allocates.
    # One thread that loads: the limit must meet a weight, not a thread's stack.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The limit bites, and nothing else is wrong with the model.
    assert "can't allocate memory" in found["load"]["error"]
    assert found["unlimited"]["result"] > 1.2 * ROOM
    assert "error" not in found["quantize"], found["quantize"]
    result = found["quantize"]["result"]
    assert result["before"] == found["unlimited"]["result"]
    assert result["difference"] < 1e-4 and 0 < result["kl"] < 1
