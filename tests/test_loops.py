"""Training loops without `fit`: `accumulate` and `GradientAccumulator`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kaccum import GradientAccumulationCallback, GradientAccumulator, accumulate
from tests import reference
from tests.reference import Problem, build_model, data

PROBLEM = Problem(examples=18)
X, Y, _ = data(PROBLEM)


def train(model, size):
    for start in range(0, len(X), size):
        model.train_on_batch(X[start : start + size], Y[start : start + size])


def result(model):
    return reference.result_of(model, {"loss": [1.0]})


def large():
    model = build_model(PROBLEM)
    model.optimizer.build(model.trainable_variables)
    train(model, 12)
    return model


def test_train_on_batch_accumulates():
    """Laws 1 and 4: the end of the block applies the short window."""
    model = build_model(PROBLEM)
    with accumulate(model, 3):
        train(model, 4)
        assert int(model.optimizer.iterations) == 1
    reference.assert_same(PROBLEM, result(model), result(large()))
    model.train_on_batch(X, Y)
    assert int(model.optimizer.iterations) == 3


def test_an_exception_drops_the_open_window():
    """Law 5: what left the block by an error is forgotten."""
    model = build_model(PROBLEM)
    with pytest.raises(ZeroDivisionError), accumulate(model, 3):
        train(model, 4)
        raise ZeroDivisionError
    assert int(model.optimizer.iterations) == 1
    before = model.get_weights()
    with accumulate(model, 3):
        pass
    for mine, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_two_models_have_a_window_each():
    """As the two models of a GAN, which train in turn."""
    one, two = build_model(PROBLEM), build_model(PROBLEM)
    with accumulate(one, 3), accumulate(two, 2):
        for start in range(0, len(X), 4):
            for model in (one, two):
                model.train_on_batch(X[start : start + 4], Y[start : start + 4])
    twin = build_model(PROBLEM)
    twin.optimizer.build(twin.trainable_variables)
    train(twin, 8)
    reference.assert_same(PROBLEM, result(one), result(large()))
    reference.assert_same(PROBLEM, result(two), result(twin))


def test_a_fit_inside_the_block_is_refused():
    """One mechanism at a time; and the block goes on."""
    model = build_model(PROBLEM)
    with accumulate(model, 3):
        with pytest.raises(
            RuntimeError,
            match="^`fit` must not be called on a model inside its "
            "`accumulate`. Received: a `fit`. Pass it a "
            "`GradientAccumulationCallback` instead, outside of the `with` "
            "block.$",
        ):
            model.fit(
                X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)]
            )
        train(model, 4)
    reference.assert_same(PROBLEM, result(model), result(large()))


@pytest.mark.parametrize("compiled", [None, False, True])
def test_a_loop_of_ones_own_trains_as_the_large_batch(compiled):
    """Law 1, eagerly, in a `tf.function`, and under XLA."""
    model = build_model(PROBLEM)
    accumulator = GradientAccumulator(model.optimizer)

    def add(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=y, y_pred=model(x, training=True))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        accumulator.add(gradients, variables, weight=tf.shape(x)[0])

    apply = accumulator.apply
    if compiled is not None:
        add = tf.function(add, jit_compile=compiled)
        apply = tf.function(apply, jit_compile=compiled)
    x, y = tf.constant(X), tf.constant(Y)
    for start in (0, 4, 8, 12, 16):
        add(x[start : start + 4], y[start : start + 4])
        if start in (8, 16):
            apply()
    reference.assert_same(PROBLEM, result(model), result(large()))


def test_nothing_added_is_refused():
    """An empty window has no gradient."""
    variable = keras.Variable(np.ones(1, "float32"))
    accumulator = GradientAccumulator(keras.optimizers.SGD())
    message = (
        "^`apply` must follow an `add`: a window without micro-batches has no "
        "gradient. Received: nothing since the last `apply`.$"
    )
    with pytest.raises(RuntimeError, match=message):
        accumulator.apply()
    accumulator.add([tf.ones(1)], [variable], 1.0)
    accumulator.apply()
    with pytest.raises(RuntimeError, match=message):
        accumulator.apply()


def test_other_variables_are_refused():
    """The sums belong to the variables of the first `add`."""
    one, two = (keras.Variable(np.ones(1), name=n) for n in ("one", "two"))
    accumulator = GradientAccumulator(keras.optimizers.SGD())
    accumulator.add([tf.ones(1)], [one], 1.0)
    with pytest.raises(
        ValueError,
        match="^`variables` must be those of the first `add`. Received: 'two', "
        "which was not among them. Use a `GradientAccumulator` of its own for "
        "other variables.$",
    ):
        accumulator.add([tf.ones(1)], [two], 1.0)
    accumulator.apply()


def test_an_uncompiled_model_is_refused():
    """There is no optimizer to accumulate for."""
    with pytest.raises(
        ValueError,
        match="^The model must be compiled to accumulate gradients. Received: "
        "a Sequential that is not. Call `compile` first.$",
    ):
        with accumulate(keras.Sequential([keras.layers.Dense(1)]), 2):
            pass


@pytest.mark.parametrize(
    "steps, error, message",
    [
        ({}, ValueError, "A dict of `steps` must start at epoch 0. Received: "),
        ({1: 4}, ValueError, "A dict of `steps` must start at epoch 0. "),
        ({0: 0}, ValueError, "The values of `steps` must be integers >= 1. "),
        ({0: 2.5}, TypeError, "The values of `steps` must be integers >= 1. "),
        ({"0": 4}, TypeError, "The keys of `steps` must be epochs, integers "),
    ],
    ids=repr,
)
def test_bad_schedules(steps, error, message):
    """A dict is checked before training."""
    with pytest.raises(error, match=f"^{message}"):
        GradientAccumulationCallback(steps)


@pytest.mark.parametrize(
    "value, error",
    [(0, ValueError), (2.5, TypeError), (None, TypeError)],
    ids=repr,
)
def test_bad_values_of_a_function(value, error):
    """A function is checked at each epoch, and the model can go on."""
    model = build_model(PROBLEM)
    with pytest.raises(
        error,
        match="^The function `steps` must return an integer >= 1. Received: "
        rf"{value!r} \({type(value).__name__}\) for epoch 0.$",
    ):
        callback = GradientAccumulationCallback(lambda epoch: value)
        model.fit(X, Y, 4, verbose=0, callbacks=[callback])
    model.fit(X, Y, 4, verbose=0, callbacks=[GradientAccumulationCallback(2)])
    assert int(model.optimizer.iterations) == 3


def test_on_update_must_be_a_function():
    """Checked before training."""
    with pytest.raises(
        TypeError,
        match="^`on_update` must be a function of the number of updates. "
        r"Received: on_update=3 \(int\).$",
    ):
        GradientAccumulationCallback(2, on_update=3)
