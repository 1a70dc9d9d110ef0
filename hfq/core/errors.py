"""The errors that hfq raises. Each message says what was expected, what came and what to do.

HfqError
|-- ConfigError        (ValueError)    a setting is unknown, out of range or contradicts another
|-- UnknownNameError   (LookupError)   no method, format or kernel of that name
|-- WeightError        (ValueError)    a weight cannot be quantized: NaN, infinite, wrong shape
|-- CheckpointError    (ValueError)    stored tensors or metadata are damaged or do not fit
|   `-- VersionError                   the checkpoint was written in a newer format
|-- CalibrationError   (ValueError)    activations or calibration data that no statistics can be taken from
|-- KernelError        (RuntimeError)  no kernel can run this, or a kernel setting is refused
|-- EvaluationError    (RuntimeError)  logits that cannot be measured (hfq.evaluation.logits)
|-- ProcessError       (RuntimeError)  another process of a group failed or ended (hfq.calibration.ranks)
|-- SaveError          (OSError)       a folder was not written (hfq.integrations.staging)
|-- ResumeError        (ValueError)    an unfinished run of other inputs is in the way (hfq.integrations.resume)
`-- PushError          (RuntimeError)  an upload did not arrive (hfq.integrations.upload)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "HfqError",
    "KernelError",
    "UnknownNameError",
    "VersionError",
    "WeightError",
    "nearest",
]


class HfqError(Exception):
    """Base of every error that hfq raises on purpose."""


class ConfigError(HfqError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class UnknownNameError(HfqError, LookupError):
    """No method, format or kernel is registered under the name."""


class WeightError(HfqError, ValueError):
    """A weight cannot be quantized (NaN, infinite values, wrong shape)."""


class CheckpointError(HfqError, ValueError):
    """Stored tensors or metadata are damaged or do not fit the model."""


class VersionError(CheckpointError):
    """The checkpoint was written by a newer hfq in a format that this one cannot read."""


class CalibrationError(HfqError, ValueError):
    """Calibration data, or the activations that it causes, allow no statistics (NaN, infinite, nothing at all)."""


class KernelError(HfqError, RuntimeError):
    """No kernel can run the problem, or a kernel setting is refused."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean 'group_size'?``, or an empty string when nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
