"""One clear error for each bad call, and a model left as it was."""

import re
import types

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback

RULE = (
    "`steps` must be an integer >= 1, a dict of them by first epoch, or a "
    "function of the epoch. Received: "
)


@pytest.mark.parametrize(
    "steps, error, received",
    [
        (0, ValueError, "steps=0 (int)."),
        (-1, ValueError, "steps=-1 (int)."),
        (np.int64(0), ValueError, "steps=np.int64(0) (int64)."),
        (2.5, TypeError, "steps=2.5 (float)."),
        (4.0, TypeError, "steps=4.0 (float)."),
        (True, TypeError, "steps=True (bool)."),
        ("4", TypeError, "steps='4' (str)."),
        (None, TypeError, "steps=None (NoneType)."),
        ([4], TypeError, "steps=[4] (list)."),
    ],
    ids=repr,
)
def test_bad_steps(steps, error, received):
    """`steps` is checked before training."""
    with pytest.raises(error, match=f"^{re.escape(RULE + received)}$"):
        GradientAccumulationCallback(steps)


def test_numpy_integers_are_integers():
    """`steps` may come out of an array."""
    steps = GradientAccumulationCallback(np.int32(4)).steps
    assert steps == 4 and type(steps) is int


def fit(optimizer, callbacks):
    """Fits a model that must be left as it was."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    before = model.get_weights()
    try:
        model.fit(x, y, verbose=0, callbacks=callbacks)
    finally:
        assert "make_train_function" not in vars(model)
        assert "get_metrics_result" not in vars(model)
        assert model.train_function.__name__ == "function"
        np.testing.assert_array_equal(before[0], model.get_weights()[0])


def own_accumulation(name, **options):
    return getattr(keras.optimizers, name)(
        gradient_accumulation_steps=2, **options
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: own_accumulation("SGD"),
        lambda: keras.optimizers.LossScaleOptimizer(own_accumulation("SGD")),
        pytest.param(
            lambda: keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(own_accumulation("SGD"))
            ),
            marks=pytest.mark.skipif(
                not hasattr(keras.optimizers, "MultiOptimizer"),
                reason="newer Keras only",
            ),
        ),
    ],
    ids=["plain", "loss-scale", "multi"],
)
def test_an_optimizer_that_accumulates_itself(optimizer):
    """The message names the argument."""
    with pytest.raises(
        ValueError,
        match=r"^The optimizer must not accumulate gradients itself\. "
        r"Received: SGD with gradient_accumulation_steps=2\. "
        r"Leave that argument out\.$",
    ):
        fit(optimizer(), [GradientAccumulationCallback(2)])


@pytest.mark.parametrize("first", [1, 2])
def test_two_accumulating_callbacks(first):
    """One `fit`, one window."""
    callbacks = [GradientAccumulationCallback(n) for n in (first, 3)]
    with pytest.raises(
        RuntimeError,
        match=r"^Only one callback of a `fit` must accumulate gradients\. "
        r"Received: 2 of `GradientAccumulationCallback`\. Keep one\.$",
    ):
        fit("sgd", callbacks)


def test_a_model_without_an_optimizer():
    """There is nothing to take over."""
    with pytest.raises(
        ValueError,
        match=r"^The model must have an optimizer to accumulate gradients "
        r"for\. Received: optimizer=None\. Pass one to `compile`\.$",
    ):
        fit(None, [GradientAccumulationCallback(2)])


def test_another_backend(monkeypatch):
    """TensorFlow only, for now."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        RuntimeError,
        match=r"^Gradients are accumulated on Keras's TensorFlow backend "
        r"only\. Received: backend='jax'\. Set the environment variable "
        r"`KERAS_BACKEND=tensorflow`\.$",
    ):
        GradientAccumulationCallback(2).on_train_begin()


def test_several_replicas():
    """Refused, not computed wrongly."""

    class Mirrored(keras.Sequential):
        distribute_strategy = types.SimpleNamespace(num_replicas_in_sync=2)

    model = Mirrored()
    model.compile("sgd", "mse")
    callback = GradientAccumulationCallback(2)
    callback.set_model(model)
    with pytest.raises(
        RuntimeError,
        match=r"^The model must train on one device for its gradients to be "
        r"accumulated exactly\. Received: a 2-replica SimpleNamespace\. Build "
        r"the model outside of a strategy's scope\.$",
    ):
        callback.on_train_begin()
