"""Gradient accumulation for Keras that is exactly the large batch.

The rooms, each of which knows those below it only:

- `callback`, `accumulate`, `accumulator`: what users call.
- `fit`: takes a model's training step over, and knows when a window closes.
- `step`: what a step becomes. `step.hooks` lists what is replaced in Keras,
  `step.hearing` tells what a micro-batch does, and `step.recording` adds that
  to the sums.
- `sums`: what the open window holds, and what an update makes of it.
- `backends`: how TensorFlow, JAX and PyTorch do all that.

`versions` says how old what they need may be.
`docs/life-of-a-micro-batch.rst` follows a micro-batch through them.
"""

from kaccum import versions

# In a sentence, before what is too old fails in another way.
versions.check()

from kaccum.accumulate import accumulate
from kaccum.accumulator import GradientAccumulator
from kaccum.callback import GradientAccumulationCallback

__all__ = ["GradientAccumulationCallback", "GradientAccumulator", "accumulate"]
__version__ = "0.1.0"
