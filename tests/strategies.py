"""Strategies that draw whole problems."""

import keras
from hypothesis import strategies as st

from kaccum.testing import runs
from tests.backends import EXECUTIONS
from tests.reference import Problem

# Every optimizer of the installed Keras but those that wrap others.
OPTIMIZERS = sorted(
    name
    for name, value in vars(keras.optimizers).items()
    if isinstance(value, type)
    and issubclass(value, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
)
KINDS = [
    "mean",
    "sample_weight",
    "class_weight",
    "mask",
    "mask_mean_with_sample_weight",
    "mean_with_sample_weight",
    "sum",
    "sum_of_tokens",
]
OPTIONS = [
    (),
    (("clipnorm", 0.05),),
    (("clipvalue", 0.01),),
    (("global_clipnorm", 0.05),),
    (("weight_decay", 0.1),),
    (("use_ema", True), ("ema_momentum", 0.8)),
    (("use_ema", True), ("ema_overwrite_frequency", 2)),
    (("loss_scale_factor", 8.0),),
]


@st.composite
def optimizers(draw):
    """An optimizer and its options.

    Adam and RMSprop divide by the size of a gradient: where its terms cancel,
    rounding becomes visible in any two orders of adding them. With a larger
    epsilon the comparison stays sharp.
    """
    name = draw(st.sampled_from(["Adam", "SGD", "RMSprop"]))
    options = draw(st.sampled_from(OPTIONS))
    if name != "SGD":
        options += (("epsilon", 1e-3),)
    return {"optimizer": name, "options": options}


@st.composite
def problems(draw, **fixed):
    """A whole problem; `fixed` fields are not drawn."""
    drawn = {
        **vars(draw(runs())),
        "kind": draw(st.sampled_from(KINDS)),
        "token_weights": draw(st.booleans()),
        "frozen": draw(st.booleans()),
        "unused": draw(st.booleans()),
        "built": draw(st.sampled_from([True, True, False])),
        "loss_scale": draw(st.sampled_from([0.0, 0.0, 64.0])),
        **draw(optimizers()),
        "schedule": draw(st.booleans()),
        "regularizer": draw(st.sampled_from([None, "l2"])),
        "constraint": draw(st.sampled_from([None, "unit_norm"])),
        "execution": draw(st.sampled_from(EXECUTIONS[:1] + EXECUTIONS)),
        "steps_per_execution": draw(st.sampled_from([1, 1, 2, 5])),
        "unknown_length": draw(st.booleans()),
        "validation": draw(st.booleans()),
        "replicas": 0,
        "seed": draw(st.integers(0, 3)),
    }
    return Problem(**{**drawn, **fixed})
