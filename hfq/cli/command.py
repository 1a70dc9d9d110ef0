"""What every command shares: its result, wrong usage, loading a model, processes that a launcher started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError, HfqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Result", "UsageError", "add_loading", "launched", "load_model", "quiet_libraries"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command found.

    Attributes:
        data: JSON values, for ``--json``.
        text: the same for people.
        failed: the command ran, and what it found is a failure (exit code 1).
        silent: another process of the group tells it.
    """

    data: dict[str, Any]
    text: str
    failed: bool = False
    silent: bool = False


class UsageError(Exception):
    """The command line makes no sense: exit code 2."""


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that loads a model."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of float weights and activations (default: the checkpoint's)",
    )
    parser.add_argument(
        "--device", help="where to load the model: cpu, cuda, cuda:1, auto, ... (default: cpu)"
    )


def load_model(path: str, args: argparse.Namespace, **settings: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` with the flags of `add_loading`.

    Raises:
        CheckpointError: the model is missing, damaged or of a kind that Transformers cannot load as a causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    if args.device is not None:
        settings["device_map"] = args.device
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=args.dtype, **settings
        )
    except HfqError:
        raise
    # What Transformers raises for a missing model, an unknown architecture, damaged or ill-fitting tensors, a
    # device that is not there, a package that the model needs.
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    return model


@contextmanager
def launched() -> Iterator[int]:
    """Within, the process group that ``torchrun`` or ``accelerate launch`` started this process for; gives its rank."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        yield 0
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def quiet_libraries() -> None:
    """Failures come as one line of ours; progress bars are for terminals."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
