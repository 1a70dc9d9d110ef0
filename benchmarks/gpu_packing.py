"""What quantizing while loading costs on a GPU: one weight, and a checkpoint."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_clock import Clock
from gpu_plan import Plan
from gpu_weights import KINDS, random_weight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfq.algorithms import ALGORITHMS
from hfq.nn.linear import QuantLinear

__all__ = ["packing"]


def packing(clock: Clock, plan: Plan) -> dict[str, Any]:
    """Each kind of weight alone; bfloat16 and the first two models from a checkpoint."""
    shape = {**plan.llama, "num_hidden_layers": plan.layers}
    return {
        "weights": _pack_weights(clock, plan.packed, plan.kinds, plan.rounds),
        "loading": _load_checkpoint(clock, shape, plan.models[:2], min(plan.rounds, 3)),
    }


class _Census(TorchDispatchMode):
    """Counts operators, and those among them that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        kwargs = kwargs or {}
        name, device = func.overloadpacket.__name__, kwargs.get("device")
        waits = name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        if name == "_to_copy" and device is not None:
            waits = torch.device(device).type != args[0].device.type
        self.waits += waits
        return func(*args, **kwargs)


def _pack_weights(
    clock: Clock, shape: tuple[int, int], kinds: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Each kind: seconds from a bfloat16 weight on the device to codes, and on to the kernel's layout."""
    k, n = shape
    weight = random_weight(n, k, clock.device)
    return [
        {"weights": name, "shape": list(shape), **_packed(clock, name, weight, rounds)}
        for name in kinds
    ]


def _packed(clock: Clock, kind: str, weight: Tensor, rounds: int) -> dict[str, Any]:
    packed_format, spec = KINDS[kind].format, KINDS[kind].spec
    rtn = ALGORITHMS.get("rtn")
    n, k = weight.shape
    module = QuantLinear(
        k, n, False, format=packed_format, spec=spec, dtype=weight.dtype, device=weight.device
    )

    def pack() -> None:
        module.restore()
        module.requantize("weight", weight, lambda rows: rtn.quantize(rows, spec, rtn.options))

    pack()
    with _Census() as census:
        pack()
    peak = clock.peak_bytes(pack)
    packing, layout = [], []
    for _ in range(rounds):
        module.restore()
        packing.append(clock.eager_seconds(pack, 1))
        layout.append(clock.eager_seconds(module.prepare, 1))
    error = (module.dequantize().float() - weight.float()).norm() / weight.float().norm()
    return {
        "operators": census.operators,
        "waits": census.waits,
        "peak_MiB": peak / 2**20,
        "pack_milliseconds": median(packing) * 1e3,
        "layout_milliseconds": median(layout) * 1e3,
        "GB_per_second": weight.nbytes / (median(packing) + median(layout)) / 1e9,
        "relative_error_of_weights": float(error),
    }


def _load_checkpoint(
    clock: Clock, shape: Mapping[str, int], kinds: Sequence[str], rounds: int
) -> dict[str, Any]:
    """GB of a bfloat16 checkpoint per second of `from_pretrained`, as it is and quantized on the way; files in the page cache."""
    # Here: Transformers takes seconds to import.
    from gpu_llama import random_model
    from transformers import AutoModelForCausalLM

    from hfq.config import HfqConfig

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(shape, None, clock.device)
        model.save_pretrained(folder)
        del model
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        seconds: dict[str, list[float]] = {name: [] for name in ("bfloat16", *kinds)}
        for _ in range(rounds + 1):  # the first one reads the files and imports modeling code
            for name, taken in seconds.items():
                settings: dict[str, Any] = {}
                if name in KINDS:
                    kind = KINDS[name]
                    settings["quantization_config"] = HfqConfig(format=kind.format, **kind.settings)
                start = time.perf_counter()
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, device_map={"": clock.device}, **settings
                )
                clock.seconds(lambda: None)  # waits for the device
                taken.append(time.perf_counter() - start)
                del model
                gc.collect()
    return {
        "checkpoint_GB": size / 1e9,
        "seconds": {name: taken[1:] for name, taken in seconds.items()},
        "GB_per_second": {name: size / 1e9 / median(taken[1:]) for name, taken in seconds.items()},
    }
