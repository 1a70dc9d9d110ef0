"""What quantization cost and what it gained: perplexity, KL divergence, top-1 agreement, size, speed."""

from .report import Evaluation, Measurement
from .run import evaluate
from .size import WeightSize, weight_size

__all__ = ["Evaluation", "Measurement", "WeightSize", "evaluate", "weight_size"]
