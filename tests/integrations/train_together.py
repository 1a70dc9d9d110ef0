"""One of two processes that train adapters on a packed model; `test_peft_training.py` starts them.

    train_together.py RANK CHECKPOINT FOLDER

FOLDER has ``ids.pt``, of which the process learns from the sequence RANK, and gets ``KIND-RANK.pt`` for each kind of adapter: gradients of
DistributedDataParallel. ``KIND-sharded-RANK.pt``: those of fully_shard (FSDP2), and the state dict put together again.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

# Where Python is told to be safe, a script's own folder is not on its path.
sys.path.append(str(Path(__file__).parent))
from peft_models import ADAPTED, gradients, packed_state, same

from hfq.nn.linear import QuantLinear


def main(rank: int, checkpoint: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ids = torch.load(folder / "ids.pt")[rank : rank + 1]
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(str(folder / "store"), 2),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    for kind, make in ADAPTED.items():
        model = make(checkpoint)
        before = packed_state(model)
        if rank == 1:
            # What is trained comes from process 0.
            for parameter in filter(lambda each: each.requires_grad, model.parameters()):
                parameter.data.zero_()
        found = gradients(nn.parallel.DistributedDataParallel(model), ids)
        assert same(packed_state(model), before)
        torch.save(found, folder / f"{kind}-{rank}.pt")
        # PEFT reads prompts' weight beside the forward that it is gathered for; PyTorch before 2.12 shares no integers out.
        if kind != "prompt" and Version(torch.__version__).release >= (2, 12):
            torch.save(sharded(make(checkpoint), ids), folder / f"{kind}-sharded-{rank}.pt")
    distributed.destroy_process_group()


def sharded(model: PeftModel, ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Gradients, logits and state dict, all whole, of a model of which each process holds half; the state dict is in process 0."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    layers = model.get_base_model().model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.shape[0] == 1 or parameter.to_local().numel() < parameter.numel()
    packed = [each for each in layers.modules() if isinstance(each, QuantLinear)]
    assert packed
    read = []
    for _ in range(2):
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        found = gradients(model, ids)
        read.append([module._prepared["weight"] for module in packed])
    # What kernels read is what was gathered, where it was gathered, and it is not there any more.
    assert all(first is second for first, second in zip(*read, strict=True))
    assert all(operands.codes.untyped_storage().size() == 0 for operands in read[0])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "gradients": {name: each.full_tensor() for name, each in found.items()},
        "logits": {"logits": logits},
        "state": get_model_state_dict(model, options=whole),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
