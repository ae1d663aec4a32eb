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
    new_sum,
    outside_of_traces,
    positive,
    release,
    take_larger,
    use_full_precision,
    value_of,
    zero_unless,
)
from kaccum.tensorflow.engine import Engine

__all__ = [
    "Engine",
    "add_weighted",
    "after",
    "all_finite",
    "copy",
    "empty",
    "gradients_of",
    "increase",
    "is_eager",
    "is_reachable",
    "new_sum",
    "outside_of_traces",
    "positive",
    "release",
    "take_larger",
    "use_full_precision",
    "value_of",
    "zero_unless",
]
