"""What a checkpoint folder holds, from the headers of its safetensors files and its JSON files alone.

No tensor is read and no pickle is ever opened. Damage raises `CheckpointError`: files that are missing or cut off,
packed weights without their companions, shapes that do not fit the quantization_config.
"""

from .inspect import inspect_checkpoint
from .summary import CheckpointSummary, StoredWeight

__all__ = ["CheckpointSummary", "StoredWeight", "inspect_checkpoint"]
