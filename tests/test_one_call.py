"""`micro_batch_size`: parts of one size run in one call of what is compiled.

That a loop of them trains as the large batch is in test_same_fit.py.
"""

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback
from tests.backends import BACKEND, needs_graphs, only_on

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype("float32")
IMAGES = RNG.normal(size=(16, 6, 6, 2)).astype("float32")


def dense(**options):
    """A compiled model of `X`."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse", **options)
    return model


def convolutional():
    """A compiled model of `IMAGES`, on JAX by XLA."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    model.compile("sgd", "mse")
    return model


@pytest.fixture
def calls(monkeypatch):
    """What is called while a model trains, update by update."""
    seen = []
    if BACKEND == "tensorflow":
        from kaccum.backends.tensorflow.calls import CompiledCall as owner

        name = "__call__"
    else:
        from kaccum.backends.jax.runner import JaxRunner as owner

        name = "_moving"
    real = getattr(owner, name)

    def counted(self, *arguments):
        seen.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, counted)
    return seen


def fit(model, x, batch_size, size):
    """Trains for an epoch, each batch a window."""
    y = np.ones((len(x), 3), "float32")
    callback = GradientAccumulationCallback(micro_batch_size=size)
    model.fit(x, y, batch_size, verbose=0, callbacks=[callback])


@needs_graphs
@pytest.mark.parametrize(
    "batch_size, size, expected",
    [
        # Five batches of four parts, of one example each.
        (4, 1, 5),
        # Two of 4, 3 and 3.
        (10, 4, 4),
        # Two of 8 (4, 4), and one of 4.
        (8, 4, 3),
        # A part that is the batch.
        (10, 10, 2),
    ],
)
def test_parts_of_one_size_are_one_call(batch_size, size, expected, calls):
    """However many they are."""
    model = dense()
    for _ in range(2):
        calls.clear()
        fit(model, X, batch_size, size)
        assert len(calls) == expected


@needs_graphs
def test_what_runs_eagerly_is_called_by_itself(monkeypatch, calls):
    """There is nothing to call but the step."""
    model = dense(run_eagerly=True)
    trained = []
    step = keras.Model.train_step

    def train_step(self, *arguments):
        trained.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(keras.Model, "train_step", train_step)
    fit(model, X, 10, 2)
    assert len(trained) == 10


@only_on("jax", reason="XLA leaves them as they are in loops")
def test_convolutions_are_in_no_loop_on_a_processor(monkeypatch, calls):
    """It takes ten times as long there; on a GPU, whose XLA does not."""
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    fit(convolutional(), IMAGES, 8, 2)
    assert len(calls) == 8
    calls.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fit(convolutional(), IMAGES, 8, 2)
    assert len(calls) == 2


@only_on("jax", reason="others are not compiled for each length")
def test_loops_are_of_batches_as_long_as_the_first(calls):
    """Each length would be compiled: parts of others are called."""
    model = dense()
    # Twelve in parts of three, and eight.
    fit(model, X, 12, 3)
    assert len(calls) == 1 + 3
    calls.clear()
    # Of another fit, too.
    fit(model, X, 10, 5)
    assert len(calls) == 2 * 2


@only_on("jax", reason="it would copy all of a batch to the device")
def test_large_batches_of_the_host_are_cut_there(monkeypatch, calls):
    """Where each part takes the device's memory by itself."""
    import jax

    from kaccum.backends.jax import batches

    # Elsewhere Keras has copied the batch already.
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(batches, "LARGE", 4)
    fit(dense(), X, 10, 2)
    assert len(calls) == 2 * 5


@only_on("jax", reason="a loop carries what logs are like")
def test_logs_that_are_no_numbers_are_in_no_loop(calls):
    """Those of an own step: their length may be that of a micro-batch."""

    class Showing(keras.Model):
        def train_step(self, state, data):
            logs, state = super().train_step(state, data)
            return {**logs, "first": data[0][:, 0]}, state

    inputs = keras.Input((4,))
    model = Showing(inputs, keras.layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    # Parts of four, three and three.
    fit(model, X, 10, 4)
    assert len(calls) == 2 * 3


@only_on("jax", reason="it is asked of what JAX traced")
def test_convolutions_are_found_inside_of_functions():
    """Of a user's own `jax.jit`, of a gradient, of a loop."""
    import jax

    from kaccum.backends.jax.batches import uses_convolutions

    def convolved(x):
        return keras.ops.sum(keras.ops.conv(x, np.ones((2, 2, 2, 3), "f4")))

    def in_a_loop(x):
        return jax.lax.fori_loop(0, 2, lambda i, y: y + convolved(x), 0.0)

    for function in (
        convolved,
        jax.jit(convolved),
        jax.grad(convolved),
        in_a_loop,
        jax.jit(in_a_loop),
    ):
        assert uses_convolutions(jax.make_jaxpr(function)(IMAGES))
    assert not uses_convolutions(jax.make_jaxpr(jax.jit(keras.ops.sum))(X))
