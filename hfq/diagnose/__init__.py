"""Questions about an installation and a model: what is there, which kernel runs, and why not another."""

from .installation import Check, Diagnosis, doctor
from .kernels import Explanation, PackedWeight, explain

__all__ = ["Check", "Diagnosis", "Explanation", "PackedWeight", "doctor", "explain"]
