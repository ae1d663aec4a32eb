"""Strategies that draw whole problems."""

import keras
from hypothesis import strategies as st

from kaccum.testing import Run, runs
from tests.backends import BACKEND, EXECUTIONS
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
# What is compiled: each value of each field that matters to it, once or more.
ARCHITECTURES = {
    "adam": {},
    "weighted-clipped": {
        "kind": "sample_weight",
        "optimizer": "SGD",
        "options": (("clipnorm", 0.05),),
        "schedule": True,
    },
    "class-weights-decayed": {
        "kind": "class_weight",
        "optimizer": "RMSprop",
        "options": (("weight_decay", 0.1), ("epsilon", 1e-3)),
        "constraint": "unit_norm",
        "steps_per_execution": 2,
    },
    "mask-averaged": {
        "kind": "mask",
        "token_weights": True,
        "options": (
            ("use_ema", True),
            ("ema_momentum", 0.8),
            ("epsilon", 1e-3),
        ),
        "unused": True,
    },
    "mask-plain": {
        "kind": "mask",
        "optimizer": "SGD",
        "options": (("global_clipnorm", 0.05),),
        "regularizer": "l2",
        "steps_per_execution": 5,
    },
    "mask-weighted-mean": {
        "kind": "mask_mean_with_sample_weight",
        "token_weights": True,
        "options": (("clipvalue", 0.01), ("epsilon", 1e-3)),
    },
    "weighted-mean-scaled": {
        "kind": "mean_with_sample_weight",
        "optimizer": "RMSprop",
        "options": (("epsilon", 1e-3),),
        "loss_scale": 64.0,
    },
    "sum-regularized": {
        "kind": "sum",
        "optimizer": "SGD",
        "options": (("global_clipnorm", 0.05),),
        "regularizer": "l2",
        "frozen": True,
        "steps_per_execution": 2,
    },
    "sum-of-tokens": {
        "kind": "sum_of_tokens",
        "token_weights": True,
        "optimizer": "SGD",
        "options": (("loss_scale_factor", 8.0),),
        "frozen": True,
    },
    "averages-written-back": {
        "optimizer": "SGD",
        "options": (("use_ema", True), ("ema_overwrite_frequency", 2)),
        "loss_scale": 64.0,
        "schedule": True,
        "unused": True,
    },
    "added-loss": {
        "kind": "sample_weight",
        "options": (("epsilon", 1e-3),),
        "add_loss": True,
        "constraint": "unit_norm",
        "steps_per_execution": 5,
    },
    "everything-at-once": {
        "kind": "mean_with_sample_weight",
        "optimizer": "SGD",
        "options": (("clipnorm", 0.05),),
        "regularizer": "l2",
        "constraint": "unit_norm",
        "frozen": True,
        "unused": True,
        "schedule": True,
        "steps_per_execution": 2,
    },
}


def runs_here():
    """Runs, on JAX of few sizes of batches: each is compiled anew."""
    if BACKEND != "jax":
        return runs()
    return st.builds(
        Run,
        examples=st.integers(1, 18).map(lambda half: 2 * half),
        micro_batch=st.just(4),
        steps=st.integers(2, 3),
        epochs=st.integers(1, 2),
        cut=st.booleans(),
    )


@st.composite
def runs_of(draw, fields, **fixed):
    """A problem with given fields, of which only the run is drawn."""
    drawn = {
        **vars(draw(runs_here())),
        "unknown_length": draw(st.booleans()),
        "validation": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }
    return Problem(**{**drawn, **fields, **fixed})


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
        **vars(draw(runs_here())),
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
