"""What the pages say of Keras's own `gradient_accumulation_steps`."""

import dataclasses
import functools

import keras
import numpy as np
import pytest

from kaccum import testing
from tests.backends import eagerly, needs_strategies, only_on
from tests.reference import (
    Problem,
    build_model,
    check,
    data,
    differences,
    fit_large,
    fit_micro,
    tolerance,
)

#: Two full windows of equal micro-batches, twice.
FULL = Problem(examples=24, micro_batch=4, steps=3, optimizer="SGD")


def build_own(problem):
    """The model of a problem, whose optimizer accumulates by itself."""
    steps = ("gradient_accumulation_steps", problem.steps)
    options = (*problem.options, steps)
    return build_model(dataclasses.replace(problem, options=options))


def own_differences(problem):
    """Of weights and of logs, from the large-batch fit's."""
    own = fit_micro(problem, eagerly(build_own(problem)), callbacks=[])
    large = fit_large(problem)
    # It has sums beside the state.
    own.state = large.state
    weights, _, logs = differences(own, large)
    return weights, logs


def test_keras_own_is_the_large_batch_in_full_windows():
    """Equal batches, means over examples."""
    weights, logs = own_differences(FULL)
    assert weights <= tolerance(FULL)
    assert logs <= 4 * tolerance(FULL)


@pytest.mark.parametrize(
    "fields",
    [
        {"examples": 18},
        {"kind": "mask"},
        {"kind": "mean_with_sample_weight"},
        {"schedule": True},
        {"options": (("use_ema", True), ("ema_momentum", 0.8))},
    ],
    ids=["short", "mask", "sample-weight", "schedule", "ema"],
)
def test_keras_own_is_another_run(fields):
    """Where kaccum's is the large batch."""
    problem = dataclasses.replace(FULL, **fields)
    weights, _ = own_differences(problem)
    assert weights > 100 * tolerance(problem)
    check(problem)


@pytest.mark.parametrize("kind", ["mask", "mean_with_sample_weight"])
def test_keras_own_logs_another_loss(kind):
    """A mean of means."""
    problem = dataclasses.replace(FULL, kind=kind, epochs=1, seed=1)
    _, logs = own_differences(problem)
    assert logs > 50 * tolerance(problem)


def test_keras_own_sums_are_of_half_precision():
    """As the weights are."""
    model = build_own(dataclasses.replace(FULL, policy="bfloat16"))
    model.optimizer.build(model.trainable_variables)
    sums = [
        variable
        for variable in model.optimizer.variables
        if "gradient_accumulator" in variable.path
    ]
    assert {variable.dtype for variable in sums} == {"bfloat16"}


def test_keras_own_is_spoilt_by_a_nan():
    """There is nothing to leave a micro-batch out with."""
    x, y, _ = data(FULL)
    x[5] = np.nan
    model = eagerly(build_own(FULL))
    model.fit(x, y, FULL.micro_batch, shuffle=False, verbose=0)
    assert np.isnan(model.get_weights()[0]).any()


@only_on("tensorflow", reason="others have dense gradients")
@pytest.mark.parametrize(
    "make, is_wrong",
    [
        (keras.optimizers.Adam, True),
        (keras.optimizers.RMSprop, True),
        (keras.optimizers.Adagrad, True),
        (functools.partial(keras.optimizers.SGD, global_clipnorm=0.1), True),
        (functools.partial(keras.optimizers.SGD, momentum=0.9), False),
        (keras.optimizers.SGD, False),
    ],
    ids=["adam", "rmsprop", "adagrad", "clipping", "momentum", "sgd"],
)
def test_keras_is_wrong_for_repeated_rows(make, is_wrong):
    """Squares are wrong, without accumulation; a dense gradient is right."""
    x, y = np.array([[1, 1, 2], [1, 2, 3]] * 4), np.arange(8.0)

    def build():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Embedding(4, 2), keras.layers.Flatten()]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile(make(0.1), "mse", run_eagerly=True)
        model.build((None, 3))
        return model

    plain, ours = build(), build()
    run = testing.Run(8, 4, 2, epochs=3)
    plain.fit(x, y, 8, epochs=3, verbose=0, shuffle=False)
    dense = testing.fit_large(run, build(), x, y).weights
    off = [
        np.max(np.abs(one - other)) / np.max(np.abs(other))
        for one, other in (
            (plain.get_weights()[0], dense[0]),
            (testing.fit_micro(run, ours, x, y).weights[0], dense[0]),
        )
    ]
    assert off[1] < 1e-5
    assert off[0] > 1e-3 if is_wrong else off[0] < 1e-5


@needs_strategies
def test_keras_own_fails_on_replicas():
    """In a graph, as Keras compiles by default."""
    problem = dataclasses.replace(FULL, replicas=2)
    with pytest.raises(Exception, match="merge_call"):
        fit_micro(problem, build_own(problem), callbacks=[])
