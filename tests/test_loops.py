"""Training loops without `fit`: `accumulate` and `GradientAccumulator`."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulator, accumulate
from tests import reference
from tests import test_interrupts as interrupted
from tests.backends import (
    BACKEND,
    error_in_a_step,
    needs_errors_at_once,
    needs_graphs,
    only_on,
    tf,
)
from tests.layers import Failing
from tests.recorders import is_equal
from tests.reference import Problem, build_model, data, set_values, values_of

PROBLEM = Problem(examples=18)
X, Y, _ = data(PROBLEM)


def train(model, size):
    for start in range(0, len(X), size):
        model.train_on_batch(X[start : start + size], Y[start : start + size])


def result(model):
    return reference.result_of(model, {"loss": [1.0]})


def large(size=12):
    """The truth: a model that trained on large batches."""
    model = build_model(PROBLEM.truth)
    model.optimizer.build(model.trainable_variables)
    train(model, size)
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
    assert is_equal(model.get_weights(), before)


def test_two_models_have_a_window_each():
    """As the two models of a GAN, which train in turn."""
    one, two = build_model(PROBLEM), build_model(PROBLEM)
    with accumulate(one, 3), accumulate(two, 2):
        for start in range(0, len(X), 4):
            for model in (one, two):
                model.train_on_batch(X[start : start + 4], Y[start : start + 4])
    reference.assert_same(PROBLEM, result(one), result(large()))
    reference.assert_same(PROBLEM, result(two), result(large(8)))


def test_an_error_in_a_step_drops_the_open_window():
    """Law 5: a caught one, too; the block goes on with an empty window."""
    needs_errors_at_once()
    model, twin = interrupted.built(), interrupted.built()
    with accumulate(model, 3):
        train(model, 4)
        Failing.error = ValueError("mine")
        try:
            with pytest.raises(error_in_a_step(ValueError), match="mine"):
                model.train_on_batch(X[:4], Y[:4])
        finally:
            Failing.error = None
        assert int(model.optimizer.iterations) == 1
        set_values(twin, values_of(model))
        train(model, 6)
    with accumulate(twin, 3):
        train(twin, 6)
    assert is_equal(model.get_weights(), twin.get_weights())


def test_a_model_compiled_anew_in_the_block_goes_on():
    """The open window is the old optimizer's; the next is the new one's."""
    model, twin = build_model(PROBLEM), build_model(PROBLEM.truth)
    with accumulate(model, 3):
        train(model, 4)
        model.compile(reference.build_optimizer(PROBLEM), model.loss)
        train(model, 4)
    for _ in range(2):
        twin.optimizer.build(twin.trainable_variables)
        train(twin, 12)
        last = result(twin)
        optimizer = reference.build_optimizer(PROBLEM)
        twin.compile(optimizer, twin.loss, run_eagerly=twin.run_eagerly)
    reference.assert_same(PROBLEM, result(model), last)


def test_a_block_of_one_is_plain():
    """Law 7, bit for bit."""
    model, twin = build_model(PROBLEM), build_model(PROBLEM)
    with accumulate(model, 1):
        train(model, 4)
    train(twin, 4)
    assert is_equal(model.get_weights(), twin.get_weights())


def test_a_block_in_a_callback_of_a_plain_fit():
    """The fit goes on plainly."""
    model, twin = build_model(PROBLEM), build_model(PROBLEM)

    def accumulated(epoch, logs):
        with accumulate(model, 3):
            train(model, 4)

    for each, between in [
        (model, accumulated),
        (twin, lambda epoch, logs: train(twin, 12)),
    ]:
        each.optimizer.build(each.trainable_variables)
        callback = keras.callbacks.LambdaCallback(on_epoch_end=between)
        options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
        each.fit(X, Y, 4, epochs=2, **options)
    reference.assert_same(PROBLEM, result(model), result(twin))


class Gan:
    """A generator, trained through a discriminator that is still."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        layers = keras.layers
        self.generator = keras.Sequential(
            [keras.Input((2,)), layers.Dense(4, activation="tanh")]
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(5, activation="tanh"),
                layers.Dense(1),
            ]
        )
        self.both = keras.Sequential([self.generator, self.discriminator])
        for model in (self.discriminator, self.both):
            loss = keras.losses.BinaryCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(0.05, epsilon=1e-3), loss)
        # As many write it: to be switched on only where it trains.
        self.discriminator.trainable = False

    def train(self, real, noise, size):
        """One update of each, in batches of `size`."""
        self.discriminator.trainable = True
        for start in range(0, len(real), size):
            rows = slice(start, start + size)
            made = ops.convert_to_numpy(self.generator(noise[rows]))
            x = np.concatenate([real[rows], made])
            y = np.repeat([1.0, 0.0], len(x) // 2)[:, None]
            self.discriminator.train_on_batch(x, y)
        self.discriminator.trainable = False
        for start in range(0, len(noise), size):
            rows = noise[start : start + size]
            self.both.train_on_batch(rows, np.ones((len(rows), 1)))


def test_a_gan_trains_as_with_large_batches():
    """Two models in turn, each with its own window and optimizer."""
    gan, twin = Gan(), Gan()
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(size=(12, 4)).astype("float32"), rng.normal(size=(12, 2)))
        for _ in range(3)
    ]
    with accumulate(gan.discriminator, 3), accumulate(gan.both, 3):
        for real, noise in batches:
            gan.train(real, noise, 4)
    for real, noise in batches:
        twin.train(real, noise, 12)
    for part in ("discriminator", "both"):
        micro, large = (result(getattr(each, part)) for each in (gan, twin))
        assert large.iterations == 3
        reference.assert_same(PROBLEM, micro, large)


@needs_graphs
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


@only_on("jax", "torch", reason="TensorFlow's is the test above")
def test_a_loop_of_ones_own_trains_so_on_other_backends():
    """Law 1, by JAX's functional gradients and by PyTorch's tapes."""
    model = build_model(PROBLEM)
    accumulator = GradientAccumulator(model.optimizer)

    def jax_gradients(x, y):
        import jax

        def loss(trainable, others):
            y_pred, _ = model.stateless_call(trainable, others, x)
            return model.loss(y, y_pred)

        variables = model.trainable_variables, model.non_trainable_variables
        values = [[v.value for v in group] for group in variables]
        return jax.jit(jax.grad(loss))(*values)

    def torch_gradients(x, y):
        model.zero_grad()
        model.loss(y, model(x)).backward()
        return [v.value.grad for v in model.trainable_variables]

    gradients = {"jax": jax_gradients, "torch": torch_gradients}[BACKEND]
    for start in (0, 4, 8, 12, 16):
        rows = slice(start, start + 4)
        x, y = ops.convert_to_tensor(X[rows]), ops.convert_to_tensor(Y[rows])
        variables = model.trainable_variables
        accumulator.add(gradients(x, y), variables, weight=len(x))
        if start in (8, 16):
            accumulator.apply()
    reference.assert_same(PROBLEM, result(model), result(large()))


def test_an_add_of_some_variables_keeps_the_others():
    """Law 8: a window holds the gradients of all that were added."""
    one, two = (keras.Variable([0.0], name=name) for name in ("one", "two"))
    accumulator = GradientAccumulator(keras.optimizers.SGD(1.0))
    accumulator.add([ops.ones(1), ops.ones(1)], [one, two], 1.0)
    accumulator.add([3 * ops.ones(1)], [one], 1.0)
    accumulator.apply()
    assert (one.numpy()[0], two.numpy()[0]) == (-2.0, -0.5)


@only_on("tensorflow", "torch", reason="Keras needs a gradient for each")
def test_layers_are_frozen_and_thawed_without_compiling():
    """Eagerly, Keras looks at `trainable` in each step, and so do we."""
    problem = Problem(examples=18, execution="eager", epochs=1)
    model, twin = build_model(problem), build_model(problem)
    for frozen in (False, True, False):
        for each in (model, twin):
            each.layers[0].trainable = not frozen
        with warnings.catch_warnings():
            # Of variables without a gradient: those that are frozen.
            warnings.filterwarnings("error", category=UserWarning)
            micro = reference.fit_micro(problem, model)
        large = reference.fit_large(problem, twin)
        reference.assert_same(problem, micro, large)
