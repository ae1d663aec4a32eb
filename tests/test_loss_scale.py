"""Mixed precision of float16, as people use it."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

from kaccum import GradientAccumulationCallback, accumulate
from tests.backends import EXECUTIONS, compile_options
from tests.profiles import at_night

RNG = np.random.default_rng(0)
X = 3.0 * RNG.normal(size=(64, 32)).astype("float32")
Y = 8.0 * RNG.normal(size=(64, 4)).astype("float32")
WAYS = [(8, {"steps": 4}), (32, {"micro_batch_size": 5})]


@pytest.fixture(autouse=True)
def mixed():
    """The policy, whose `compile` wraps the optimizer."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def build(loss="mse", execution="graph"):
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(64, "relu", kernel_regularizer="l2")
    model = keras.Sequential([keras.Input((32,)), hidden, layers.Dense(4)])
    model.compile(
        keras.optimizers.SGD(1e-3), loss, **compile_options(execution)
    )
    return model


def trained(batch_size, loss="mse", execution="graph", **arguments):
    """Updates, scale and weights after a fit, whose scale begins too large."""
    model = build(loss, execution)
    ours = [GradientAccumulationCallback(**arguments)] if arguments else []
    model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=ours,
    )
    return state_of(model)


def state_of(model):
    scale = float(ops.convert_to_numpy(model.optimizer.dynamic_scale))
    updates = int(model.optimizer.inner_optimizer.iterations)
    weights = np.concatenate([np.ravel(v) for v in model.get_weights()])
    return updates, scale, weights


CASES = itertools.product(["mean", "sum"], EXECUTIONS, WAYS)
#: One of each by day; XLA compiles long.
BY_DAY = [
    *itertools.product(["mean"], EXECUTIONS, WAYS[:1]),
    *itertools.product(["mean", "sum"], EXECUTIONS[-1:], WAYS[1:]),
    ("sum", EXECUTIONS[-1], WAYS[0]),
]


@pytest.mark.parametrize(
    "loss, execution, way",
    [*BY_DAY, *at_night([each for each in CASES if each not in BY_DAY])],
)
def test_overflows_are_those_of_the_large_batch(loss, execution, way):
    """Some updates are left out until the scale fits: the same ones."""
    batch_size, arguments = way
    loss = keras.losses.MeanSquaredError(
        reduction="sum" if loss == "sum" else "sum_over_batch_size"
    )
    updates, scale, weights = trained(32, loss)
    assert updates < 4
    ours = trained(batch_size, loss, execution, **arguments)
    assert ours[:2] == (updates, scale)
    # To the last digits of float16.
    np.testing.assert_allclose(ours[2], weights, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_overflow_does_not_count_as_an_update(execution):
    """Where windows go by updates."""
    large, tried = build(), 0
    for _ in range(2):
        start = 0
        while start < len(X):
            made = int(large.optimizer.inner_optimizer.iterations)
            stop = start + 8 * (2 if made < 1 else 3)
            large.train_on_batch(X[start:stop], Y[start:stop])
            start, tried = stop, tried + 1
    truth = state_of(large)
    assert 0 < truth[0] < tried
    arguments = {"steps": {0: 2, 1: 3}, "by": "update"}
    ours = trained(8, "mse", execution, **arguments)
    assert ours[:2] == truth[:2]
    np.testing.assert_allclose(ours[2], truth[2], atol=1e-5)


def test_a_scale_that_fits_loses_no_update():
    """A part of a batch is scaled as such: it does not overflow earlier."""
    ours, large = build(), build()
    for each in (ours, large):
        each.compile(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(1e-3), initial_scale=2.0**12
            ),
            "mse",
            **compile_options(),
        )
    large.fit(X, Y, 32, epochs=2, shuffle=False, verbose=0)
    with accumulate(ours, 4):
        for _ in range(2):
            for i in range(0, 64, 8):
                ours.train_on_batch(X[i : i + 8], Y[i : i + 8])
    assert state_of(ours)[:2] == state_of(large)[:2] == (4, 2.0**12)
    np.testing.assert_allclose(state_of(ours)[2], state_of(large)[2], atol=1e-5)


def test_a_sum_overflows_example_by_example():
    """Of a sum each example's own numbers are those of the large batch."""
    # The gradients of the weights stay small.
    x = 1e-4 * X
    loss = keras.losses.MeanSquaredError(reduction="sum")
    states = []
    for batch_size, steps in ((32, 1), (8, 4)):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(4, use_bias=False)
        model = keras.Sequential([keras.Input((32,)), dense])
        model.compile(
            keras.optimizers.SGD(1e-3), loss, **compile_options("eager")
        )
        callback = GradientAccumulationCallback(steps)
        model.fit(
            x,
            np.full_like(Y, 64.0),
            batch_size=batch_size,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[callback] if steps > 1 else [],
        )
        states.append(state_of(model))
    assert states[0][:2] == states[1][:2]
    assert states[0][1] < 2.0**15
