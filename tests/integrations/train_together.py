"""One of two processes that train adapters on a packed model; `test_peft_training.py` starts them.

    train_together.py RANK CHECKPOINT FOLDER

FOLDER has ``ids.pt``, of which the process learns from the sequence RANK, and gets ``KIND-RANK.pt`` for each kind of adapter: gradients.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
from torch import distributed, nn

# Where Python is told to be safe, a script's own folder is not on its path.
sys.path.append(str(Path(__file__).parent))
from peft_models import ADAPTED, gradients, packed_state, same


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
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
