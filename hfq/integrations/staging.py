"""Files that appear in a folder all together or not at all.

    out/.hfq-save/new/    everything is written here first
    out/.hfq-save/old/    what it replaces waits here while the new files move in
    out/config.json       leaves first and comes last: without it nobody loads the folder

The staging folder lies inside of the target because a rename is only possible within one file
system, and the target may be a mount point (a container's volume) whose parent is another file
system or not writable.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..core.errors import HfqError

__all__ = ["STAGING", "SaveError", "files_of", "staged", "stale_weights"]

STAGING = ".hfq-save"

_CONFIG = "config.json"

# model.safetensors, model-00001-of-00002.safetensors, model.safetensors.index.json; with a variant
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json.
_WEIGHTS = re.compile(
    r"model(\.(?P<variant>[\w-]+?))?(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(\.(?P<indexed>[\w-]+))?\.json"
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class SaveError(HfqError, OSError):
    """A model could not be written; the target folder is as it was before.

    Attributes:
        errno: of the failed call, or None where the writer did not tell.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder to write into; when the block ends, its files replace those of `target`.

    Other files of `target` stay, except weight files that an older save left behind. If the block
    or the move fails, or is interrupted, `target` keeps its old files and nothing else. One save
    into a folder at a time.

    Raises:
        SaveError: nothing could be written, or not all of it.
    """
    target = Path(os.path.realpath(target))
    existed = target.exists()
    staging = target / STAGING
    try:
        new = _fresh_staging(staging)
        yield new
        _flush(new)
        _exchange(new, staging / "old", target)
    except (OSError, SafetensorError) as err:
        code = _errno(err)
        raise SaveError(
            f"could not save the model to {target}: {err}. "
            f"{_state(target, existed)} {_remedy(code)}",
            code,
        ) from err
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def files_of(folder: Path) -> list[str]:
    """Files below `folder` as relative POSIX paths, sorted, hidden files and folders left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)
    )


def stale_weights(present: Iterable[str], written: Collection[str]) -> list[str]:
    """Weight files among `present` that a save of `written` leaves without meaning.

    They do harm: a loader takes an old ``model.safetensors`` before it looks for new shards.
    """
    variants = {_variant(match) for match in map(_WEIGHTS.fullmatch, written) if match}
    matches = ((name, _WEIGHTS.fullmatch(name)) for name in present if name not in written)
    return [name for name, match in matches if match and _variant(match) in variants]


def _variant(match: re.Match[str]) -> str | None:
    return match["variant"] or match["indexed"]


def _fresh_staging(staging: Path) -> Path:
    # What lies there is from a save that was killed.
    shutil.rmtree(staging, ignore_errors=True)
    new = staging / "new"
    new.mkdir(parents=True)
    return new


def _flush(folder: Path) -> None:
    """Force the files to the disk: some file systems tell only now that they are full."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _exchange(new: Path, old: Path, target: Path) -> None:
    """Move the files of `new` into `target`.

    What they replace goes to `old`, and comes back if a move fails.
    """
    written = _config_last(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    present = [path.name for path in target.iterdir() if path.is_file()]
    stale = [Path(name) for name in stale_weights(present, {path.as_posix() for path in written})]
    replaced = _config_last([*stale, *(path for path in written if (target / path).exists())])
    try:
        for path in reversed(replaced):
            _move(target / path, old / path)
        for path in written:
            _move(new / path, target / path)
    except BaseException:
        for path in written:
            if not (new / path).exists():
                _move(target / path, new / path)
        for path in replaced:
            if (old / path).exists():
                _move(old / path, target / path)
        raise


def _config_last(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.as_posix() == _CONFIG, path))


def _move(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, destination)


def _errno(err: Exception) -> int | None:
    """The error number; safetensors has it in its text only."""
    if isinstance(err, OSError):
        return err.errno
    found = re.search(r"os error (\d+)", str(err))
    return int(found[1]) if found else None


def _state(target: Path, existed: bool) -> str:
    return "Its old files are untouched." if existed and target.is_dir() else "Nothing was written."


def _remedy(code: int | None) -> str:
    if code in _FULL:
        return "Free space there (old and new files exist side by side), or choose another folder."
    if code in _FORBIDDEN:
        return "Choose a folder that you may write to."
    if code in _NO_FOLDER:
        return "A file stands where a folder is expected: move it, or choose another folder."
    return "Remove the cause and save again."
