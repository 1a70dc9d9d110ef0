"""Whether the CUDA kernels run on the GPUs of this machine.

Asked before each use of native code on CUDA, also by what is to work without it: once the library is loaded its operators are there,
and on a GPU that it has no code for they launch nothing.
"""

from __future__ import annotations

import warnings

import torch

from . import gpu_code, native

__all__ = ["no_native_code", "reason"]

# The tensor cores' product of bfloat16 with float32 sums, and asynchronous copies.
_CAPABILITY = (8, 0)

# The answer for what `native.load` gave.
_known: tuple[native.NativeStatus, str | None] | None = None


def no_native_code() -> str | None:
    """Why the kernels cannot run at all, or None. That models on GPUs are slow then is said once."""
    why = reason()
    if why is not None and not native.cuda_is_off():
        # `hfq doctor` has the remedy of each reason.
        warnings.warn(
            f"hfq runs without its CUDA kernels, on slower PyTorch code: {why}; see hfq doctor",
            RuntimeWarning,
            stacklevel=2,
        )
    return why


def reason() -> str | None:
    """The same, and nothing is said."""
    global _known
    status, known = native.load(), _known
    if known is None or known[0] is not status:
        known = _known = status, _reason(status)
    return known[1]


def _reason(status: native.NativeStatus) -> str | None:
    if not status.cuda:
        return f"native CUDA kernels are not loaded: {status.cuda_reason}"
    # A problem does not say which GPU: all have to run the kernels.
    gpus = range(torch.cuda.device_count())
    found = sorted({torch.cuda.get_device_capability(index) for index in gpus})
    if not found:
        return "PyTorch finds no GPU"
    if found[0] < _CAPABILITY:
        return f"needs GPUs of compute capability 8.0 or later, found {found[0][0]}.{found[0][1]}"
    archs = status.build.get("cuda", {}).get("archs", ())
    for capability in found:
        problem = gpu_code.gpu_problem(archs, capability, *status.cuda_versions)
        if problem is not None:
            return f"native CUDA kernels cannot run: {problem}"
    return None
