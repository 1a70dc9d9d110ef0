"""hfq: quantized weights for Transformers models.

Importing it registers "hfq" with Transformers and nothing else: no device is touched, no kernel is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .integrations import registration

if TYPE_CHECKING:
    from .calibration.ranks import ProcessError as ProcessError
    from .config import HfqConfig as HfqConfig
    from .core.errors import CalibrationError as CalibrationError
    from .core.errors import CheckpointError as CheckpointError
    from .core.errors import ConfigError as ConfigError
    from .core.errors import HfqError as HfqError
    from .core.errors import KernelError as KernelError
    from .core.errors import UnknownNameError as UnknownNameError
    from .core.errors import VersionError as VersionError
    from .core.errors import WeightError as WeightError
    from .diagnose import doctor as doctor
    from .diagnose import explain as explain
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .inspection import inspect_checkpoint as inspect_checkpoint
    from .integrations.hub import push_to_hub as push_to_hub
    from .integrations.plan import plan as plan
    from .integrations.plan_report import Plan as Plan
    from .integrations.report import Report as Report
    from .integrations.resume import ResumeError as ResumeError
    from .integrations.staging import SaveError as SaveError
    from .integrations.streaming import quantize as quantize
    from .integrations.upload import PushError as PushError
    from .training.merge import merge_to_float as merge_to_float

# Public name -> the module that defines it; imported at first use.
_LAZY = {
    "HfqConfig": "config",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "explain": "diagnose",
    "doctor": "diagnose",
    "inspect_checkpoint": "inspection",
    "quantize": "integrations.streaming",
    "plan": "integrations.plan",
    "Plan": "integrations.plan_report",
    "Report": "integrations.report",
    "ResumeError": "integrations.resume",
    "push_to_hub": "integrations.hub",
    "ProcessError": "calibration.ranks",
    "SaveError": "integrations.staging",
    "PushError": "integrations.upload",
    "merge_to_float": "training.merge",
    "HfqError": "core.errors",
    "CalibrationError": "core.errors",
    "CheckpointError": "core.errors",
    "ConfigError": "core.errors",
    "KernelError": "core.errors",
    "UnknownNameError": "core.errors",
    "VersionError": "core.errors",
    "WeightError": "core.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


registration.register()
