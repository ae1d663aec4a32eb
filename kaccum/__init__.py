"""Gradient accumulation for Keras that is exactly the large batch."""

from kaccum.accumulator import GradientAccumulator
from kaccum.callback import GradientAccumulationCallback
from kaccum.loops import accumulate

__all__ = ["GradientAccumulationCallback", "GradientAccumulator", "accumulate"]
__version__ = "0.1.0"
