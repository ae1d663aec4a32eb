"""What only JAX can do to a training step."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback
from tests.backends import IS_NEW, only_on
from tests.test_custom import X, Y, assert_same_training, small

pytestmark = only_on("jax", reason="of JAX")


def fit(model, x=X, y=Y, **options):
    callback = GradientAccumulationCallback(2, **options)
    return model.fit(x, y, 4, verbose=0, callbacks=[callback])


@pytest.mark.parametrize("is_compiled", [True, False])
def test_weights_that_a_step_changes_itself_are_refused(is_compiled):
    """Only the optimizer is seen: they would be lost without a word."""

    class Clipping(keras.Model):
        def train_step(self, state, data):
            logs, (trainable, *others) = super().train_step(state, data)
            trainable = [ops.clip(v, -0.1, 0.1) for v in trainable]
            return logs, (trainable, *others)

    model = small(Clipping, run_eagerly=not is_compiled)
    with pytest.raises(
        RuntimeError,
        match="The model's `train_step` must change weights and the "
        "optimizer's variables by `self.optimizer` only, for its gradients to "
        "be accumulated on JAX. Received: one that returned other values for "
        "them.",
    ):
        fit(model)
    fit(small())


def test_a_step_that_is_compiled_by_its_author_is_refused():
    """It is traced once, and would be so for plain fits."""
    import jax

    class Compiled(keras.Model):
        def train_step(self, state, data):
            return jax.jit(super().train_step)(state, data)

    with pytest.raises(
        RuntimeError,
        match="The model's `train_step` must apply gradients outside of a "
        "`tf.function` or `jax.jit` of its own: they are accumulated there, "
        "and what was traced would stay. Received: a `train_step` of Compiled "
        "that did not.",
    ):
        fit(small(Compiled))


def test_losses_that_are_compiled_by_their_author_count_examples():
    """What cannot be heard is not."""
    import jax

    class Compiled(keras.Model):
        def compute_loss(self, x, y, y_pred, *args, **options):
            real = super().compute_loss
            return jax.jit(lambda y, p: real(None, y, p))(y, y_pred)

    assert_same_training(lambda: small(Compiled))


def test_gradients_are_asked_for_in_any_way():
    """By name, and compiled with the names of arguments."""
    import jax

    class Own(keras.Model):
        def train_step(self, state, data):
            trainable, non_trainable, optimizer, metrics = state
            x, y = data

            def loss(trainable, training):
                y_pred, _ = self.stateless_call(
                    trainable, non_trainable, x, training=bool(training)
                )
                return ops.mean(ops.square(y_pred - y))

            compiled = jax.jit(jax.grad(loss), static_argnames="training")
            compiled(trainable, True)
            derive = jax.value_and_grad(fun=loss)
            value, gradients = derive(trainable, True)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            state = trainable, non_trainable, optimizer, metrics
            return {"own": value}, state

    assert_same_training(lambda: small(Own), logs=False)


def test_gradients_that_are_asked_for_unheard_count_examples():
    """By a `value_and_grad` that was imported before."""
    from jax import value_and_grad

    class Own(keras.Model):
        def train_step(self, state, data):
            trainable, non_trainable, optimizer, metrics = state
            x, y = data
            derive = value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (_, aux), gradients = derive(
                trainable,
                non_trainable,
                metrics,
                x,
                y,
                None,
                training=True,
                optimizer_variables=optimizer,
            )
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            return {"own": aux[0]}, (trainable, aux[2], optimizer, aux[3])

    assert_same_training(lambda: small(Own), logs=False)


@pytest.mark.parametrize("skips", [False, True])
def test_memory_that_really_runs_out(skips):
    """More than any machine has: XLA itself says so."""

    class Vast(keras.layers.Layer):
        def compute_output_spec(self, inputs):
            return keras.KerasTensor(inputs.shape, inputs.dtype)

        def call(self, inputs):
            if inputs.shape[0] <= 4:
                return inputs
            vast = ops.reshape(ops.arange(2**30, dtype="float32"), (-1, 1))
            vast = ops.sort(vast * ops.arange(2**12) * inputs[0, 0])
            return inputs + 0.0 * ops.max(vast)

    def trained(size):
        keras.utils.set_random_seed(0)
        first = keras.Input((4,))
        model = keras.Model(first, keras.layers.Dense(2)(Vast()(first)))
        model.compile("sgd", "mse")
        callback = GradientAccumulationCallback(
            micro_batch_size=size, skip_nonfinite=skips
        )
        model.fit(X, Y, 16, verbose=0, shuffle=False, callbacks=[callback])
        return callback.micro_batch_size, model.get_weights()

    size, weights = trained("auto")
    assert size == 4
    for mine, other in zip(weights, trained(4)[1], strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_model_that_is_let_go_of_is_freed():
    """JAX keeps for good what a trace that raises has seen (0.10)."""
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")

    def train():
        stack = [keras.Input((4,)), keras.layers.Dense(1)]
        model = keras.Sequential(stack)
        model.compile("sgd", "mse")
        callbacks = [GradientAccumulationCallback(2)]
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)

    def objects():
        keras.utils.clear_session()
        for _ in range(3):
            gc.collect()
        return len(gc.get_objects())

    train()
    train()
    before = objects()
    for _ in range(3):
        train()
    assert objects() - before < 3 * 50


@pytest.mark.skipif(not IS_NEW, reason="Keras stacks no batches")
def test_a_stack_runs_in_one_call_a_window(monkeypatch):
    """Windows of three in stacks of six, and of four that span two stacks."""
    from kaccum.backends.jax.runner import JaxRunner

    calls, traces = [], []
    moving = JaxRunner._moving

    def counted(self, function, data):
        calls.append("adds" if function is self._adds else "add")
        return moving(self, function, data)

    monkeypatch.setattr(JaxRunner, "_moving", counted)

    def loss(y, y_pred):
        traces.append(len(calls))
        return ops.square(y - y_pred)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", loss, steps_per_execution=6)
    x = np.ones((48, 4), "float32")
    for steps, expected in ((3, 4), (4, 4)):
        before = len(traces)
        for _ in range(2):
            calls.clear()
            model.fit(
                x,
                x[:, :1],
                batch_size=4,
                verbose=0,
                callbacks=[GradientAccumulationCallback(steps)],
            )
            assert calls == ["adds"] * expected
    # For windows of another length, and in a second fit, nothing is traced.
    assert len(traces) == before
