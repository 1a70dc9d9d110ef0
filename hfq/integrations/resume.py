"""What a long quantization has finished, on disk, so that a killed one goes on where it stood.

    out/.hfq-resume/state.json             fingerprint, blocks that are done, what was found about them
    out/.hfq-resume/block-00003.safetensors   packed tensors of a block, as the checkpoint will have them
    out/.hfq-resume/own_text.safetensors   calibration text, where the model sampled it
    out/.hfq-resume/streams-00003-00000.safetensors  hidden states behind that block, of each process its own
    out/.hfq-resume-bits/                  the same while costs of bits are measured (`target_bits`), and
    out/.hfq-resume-bits/gradients-00000-00003.safetensors  of each process, what an error behind that block costs

A block counts as done when ``state.json`` says so; that file is replaced in one step, after all others are complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..calibration.ranks import ALONE, Ranks
from ..core.errors import HfqError
from .staging import SaveError

__all__ = ["FOLDER", "MEASURED", "Resume", "ResumeError", "TensorFiles", "fingerprint_of_files"]

FOLDER = ".hfq-resume"
MEASURED = ".hfq-resume-bits"
_STATE = "state.json"

# Of each file, for its fingerprint.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class ResumeError(HfqError, ValueError):
    """The output folder holds the unfinished result of other inputs or settings."""


class Resume:
    """The state of one run in its output folder.

    Args:
        output: the folder that will hold the model.
        fingerprint: of all that determines the result, by name.
        batches: tokens that run through a block at a time, by kind of data.
        ranks: the processes of the run; each comes to each method. The first one writes all but the streams.
        folder: name of the folder in `output`.

    Attributes:
        batches: those of the unfinished run, where there is one: others would give other roundings.
        done: blocks that are finished.
        reports: what was found about their weights.

    Raises:
        ResumeError: there is a state of another fingerprint.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, str],
        batches: Mapping[str, int],
        ranks: Ranks = ALONE,
        folder: str = FOLDER,
    ) -> None:
        self.folder, self.ranks = output / folder, ranks
        self.fingerprint, self.batches = dict(fingerprint), dict(batches)
        self.done = 0
        self.reports: list[dict[str, Any]] = []
        state = ranks.from_first(self._state)
        if state is None:
            return
        changed = [
            name
            for name in {**self.fingerprint, **state["fingerprint"]}
            if self.fingerprint.get(name) != state["fingerprint"].get(name)
        ]
        if changed:
            raise ResumeError(
                f"{self.folder} holds an unfinished run of which {', '.join(sorted(changed))} was another: give the same "
                "again to go on, or start anew with resume=False (--no-resume), which deletes it"
            )
        self.done, self.reports = state["done"], state["reports"]
        self.batches = state["batches"]

    @staticmethod
    def forget(output: Path) -> None:
        """Delete what a run left, and the output folder if there is nothing else in it."""
        left = [output / name for name in (FOLDER, MEASURED) if (output / name).exists()]
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        if left and not any(output.iterdir()):
            output.rmdir()

    def block_file(self, index: int) -> Path:
        """Where the packed tensors of a block are."""
        return self.folder / f"block-{index:05d}.safetensors"

    def finish(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        streams: Mapping[str, Tensor],
        reports: Sequence[Mapping[str, Any]],
    ) -> None:
        """Block `index` is done.

        Args:
            tensors: of the block, under the names of the checkpoint.
            streams: hidden states behind it.
            reports: of all weights that are done.

        Raises:
            SaveError: they cannot be written, by any of the processes.
        """
        self.done, self.reports = index + 1, [dict(report) for report in reports]
        state = {
            "fingerprint": self.fingerprint,
            "batches": self.batches,
            "done": self.done,
            "reports": self.reports,
        }
        with self._writing(index):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.first and tensors:
                _write_tensors(self.block_file(index), tensors)
            _write_tensors(self._stream_file(index), streams)
        with self._writing(index):
            if self.ranks.first:
                _replace(self.folder / _STATE, json.dumps(state).encode())
        self._stream_file(index - 1).unlink(missing_ok=True)

    def streams(self) -> dict[str, Tensor]:
        """Hidden states behind the last block that is done.

        Raises:
            ResumeError: they are not there.
        """
        file = self._stream_file(self.done - 1)
        with self.ranks.together():
            if not file.is_file():
                raise ResumeError(
                    f"{file.name} is missing in {self.folder}: start anew with resume=False (--no-resume). Processes on "
                    "several machines need folders that keep their files between the runs"
                )
            return load_file(file)

    @contextmanager
    def _writing(self, done: int) -> Iterator[None]:
        with self.ranks.together():
            try:
                yield
            except (OSError, SafetensorError) as error:
                raise SaveError(
                    f"could not write to {self.folder}: {error}. {done} finished blocks stay there: free space or change "
                    "the folder's permissions and make the same call again to go on, or delete the folder"
                ) from error

    def _stream_file(self, index: int) -> Path:
        return self.folder / f"streams-{index:05d}-{self.ranks.rank:05d}.safetensors"

    def _state(self) -> dict[str, Any] | None:
        """What the state file says; without a usable one what it should tell about is deleted."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            state = None
        if isinstance(state, dict) and "fingerprint" in state:
            return state
        for file in (
            path
            for kind in ("block", "streams", "gradients")
            for path in self.folder.glob(f"{kind}-*")
        ):
            file.unlink()
        return None


class TensorFiles:
    """Tensors by number, one file for each; see `hfq.calibration.sensitivity.Kept`.

    Raises:
        SaveError: they cannot be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return load_file(self._file(index))

    def __setitem__(self, index: int, tensors: dict[str, Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_tensors(self._file(index), tensors)
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"could not write to {self.folder}: {error}. Free space or change the folder's permissions and make the "
                "same call again"
            ) from error

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.safetensors"


def fingerprint_of_files(files: Sequence[str]) -> str:
    """SHA-256 of names, sizes, headers and samples of the content; reading 100 GB to be sure would take minutes."""
    digest = hashlib.sha256()
    for file in files:
        size = os.stat(file).st_size
        digest.update(f"{os.path.basename(file)} {size}".encode())
        with open(file, "rb") as stream:
            length = stream.read(8)
            digest.update(length + stream.read(int.from_bytes(length, "little")))
            for part in range(_SAMPLES):
                stream.seek(size * part // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"}
    )
    _flush_and_rename(partial, path)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    _flush_and_rename(partial, path)


def _flush_and_rename(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
