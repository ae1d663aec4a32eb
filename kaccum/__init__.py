"""Gradient accumulation for Keras that is exactly the large batch."""

from kaccum.callback import GradientAccumulationCallback

__all__ = ["GradientAccumulationCallback"]
__version__ = "0.1.0"
