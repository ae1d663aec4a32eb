"""The engine on TensorFlow. Only here is tensorflow imported."""

from kaccum.tensorflow.arithmetic import (
    add_weighted,
    after,
    all_finite,
    copy,
    empty,
    gradients_of,
    increase,
    is_eager,
    is_reachable,
    making_variables_outside,
    new_sum,
    outside_of_traces,
    positive,
    release,
    take_larger,
    use_full_precision,
    value_of,
    zero_unless,
)
from kaccum.tensorflow.batches import cut, examples_in
from kaccum.tensorflow.engine import Engine
from kaccum.tensorflow.memory import is_out_of_memory, out_of_memory

__all__ = [
    "Engine",
    "add_weighted",
    "after",
    "all_finite",
    "copy",
    "cut",
    "empty",
    "examples_in",
    "gradients_of",
    "increase",
    "is_eager",
    "is_out_of_memory",
    "is_reachable",
    "making_variables_outside",
    "new_sum",
    "out_of_memory",
    "outside_of_traces",
    "positive",
    "release",
    "take_larger",
    "use_full_precision",
    "value_of",
    "zero_unless",
]
