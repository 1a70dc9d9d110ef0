"""Questions about an installation and a model: what is there, which kernel runs, and why not another."""

from .doctor import Check, Diagnosis, doctor
from .explain import Explanation, PackedWeight, explain

__all__ = ["Check", "Diagnosis", "Explanation", "PackedWeight", "doctor", "explain"]
