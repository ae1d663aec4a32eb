"""Training steps of a user's own: what they read, keep and change meanwhile."""

import functools
import gc

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback, GradientAccumulator
from kaccum.step.recording import Recording
from tests.backends import BACKEND, eagerly, only_on, tf

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype("float32")
Y = RNG.normal(size=(22, 2)).astype("float32")
WEIGHTS = RNG.uniform(0.5, 2.0, 22).astype("float32")
on_torch = only_on("torch", reason="nothing changes in place")
on_jax = only_on("jax", reason="steps return nothing")
not_on_jax = only_on("tensorflow", "torch", reason="steps are functions")


def squared(y, y_pred):
    return ops.mean(ops.square(y_pred - y))


def gradients_of(model, compute):
    """What `compute` returns, and the gradients of that (not on JAX)."""
    variables = model.trainable_variables
    if BACKEND == "tensorflow":
        with tf.GradientTape() as tape:
            loss = compute()
        return loss, tape.gradient(loss, variables)
    model.zero_grad()
    loss = compute()
    loss.backward()
    return loss, [v.value.grad for v in variables]


def apply(model, gradients, variables=None):
    if BACKEND == "tensorflow":
        return model.optimizer.apply(gradients, variables)
    import torch

    with torch.no_grad():
        return model.optimizer.apply(gradients, variables)


class Own(keras.Model):
    """A model with a tracker of its own, as Keras's guides write it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tracker = keras.metrics.Mean(name="total")

    @property
    def metrics(self):
        return [*super().metrics, self.tracker]

    def train_step(self, *arguments):
        return self.of_jax(*arguments) if len(arguments) == 2 else self.of(
            *arguments
        )

    def of(self, data):
        x, y, *_ = data
        loss, gradients = gradients_of(
            self, lambda: squared(y, self(x, training=True))
        )
        apply(self, gradients, self.trainable_variables)
        return self.after(loss)

    def after(self, loss):
        self.tracker.update_state(loss)
        result = self.tracker.result()
        return {"loss": result, "perplexity": ops.exp(result)}

    def of_jax(self, state, data):
        import jax

        trainable, others, optimizer, metrics = state
        x, y, *_ = data

        def compute(trainable, others):
            y_pred, others = self.stateless_call(
                trainable, others, x, training=True
            )
            return squared(y, y_pred), others

        (loss, others), gradients = jax.value_and_grad(compute, has_aux=True)(
            trainable, others
        )
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        logs, metrics = self.after_on_jax(metrics, loss)
        return logs, (trainable, others, optimizer, metrics)

    def after_on_jax(self, metrics, loss):
        place = len(metrics) - len(self.tracker.variables)
        own = self.tracker.stateless_update_state(metrics[place:], loss)
        result = self.tracker.stateless_result(own)
        logs = {"loss": result, "perplexity": ops.exp(result)}
        return logs, [*metrics[:place], *own]


class ChangesInPlace(Own):
    """Uses a loss, or a list of values, again for something else."""

    def after(self, loss):
        self.tracker.update_state(loss)
        loss = loss.detach()
        loss += 100.0
        return {"loss": self.tracker.result()}

    def after_on_jax(self, metrics, loss):
        place = len(metrics) - len(self.tracker.variables)
        metrics[place:] = self.tracker.stateless_update_state(
            metrics[place:], loss
        )
        return {"loss": self.tracker.stateless_result(metrics[place:])}, metrics


class AddsToLogs(keras.Model):
    """Goes on with the logs of Keras's step."""

    def train_step(self, *arguments):
        logs = super().train_step(*arguments)
        logs, *state = logs if isinstance(logs, tuple) else (logs,)
        logs["twice"] = 2.0 * logs["loss"]
        # Nor is this the tracker's any more.
        logs["accuracy"] = ops.ones(())
        return (logs, *state) if state else logs


class LooksAfterwards(Own):
    """Computes the loss of `compile` when the gradients are applied."""

    def of(self, data):
        logs = super().of(data)
        x, y, weights = data
        self.compute_loss(x, y, self(x, training=False), weights)
        return logs


class AppliesLazily(Own):
    """Hands an iterator of variables on."""

    def of(self, data):
        x, y = data
        loss, gradients = gradients_of(
            self, lambda: squared(y, self(x, training=True))
        )
        apply(self, gradients, iter(self.trainable_variables))
        return self.after(loss)


class KeepsItsGradient(Own):
    """Makes a function of JAX's once, and keeps it."""

    def of_jax(self, state, data):
        import jax

        if not hasattr(self, "derived"):
            vars(self)["derived"] = jax.value_and_grad(
                functools.partial(self.compute_loss_and_updates, training=True),
                has_aux=True,
            )
        trainable, others, optimizer, metrics = state
        x, y, weights = data
        (loss, aux), gradients = self.derived(
            trainable,
            others,
            metrics,
            x,
            y,
            weights,
            optimizer_variables=optimizer,
        )
        _, _, others, metrics = aux
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        logs, metrics = self.after_on_jax(metrics, loss)
        return logs, (trainable, others, optimizer, metrics)


def built(model_class, loss="mse", **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2)(inputs)
    model = model_class(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, batch_size, *callbacks, weights=None, epochs=2):
    return model.fit(
        X,
        Y,
        sample_weight=weights,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    ).history


WAYS = {
    "steps": (4, GradientAccumulationCallback, {"steps": 3}),
    "cut": (12, GradientAccumulationCallback, {"micro_batch_size": 4}),
    "whole": (12, GradientAccumulationCallback, {"micro_batch_size": 12}),
    "skips": (
        4,
        GradientAccumulationCallback,
        {"steps": 3, "skip_nonfinite": True},
    ),
}


def assert_large_batch(build, way="steps", logs=True, weights=None):
    """Trains as the large batch does, and shows the same numbers."""
    size, callback, options = WAYS[way]
    micro, large = build(), eagerly(build())
    shown = fit(micro, size, callback(**options), weights=weights)
    true = fit(large, 12, weights=weights)
    for mine, theirs in zip(micro.get_weights(), large.get_weights()):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)
    shown.pop("skipped_micro_batches", None)
    if logs:
        assert shown.keys() == true.keys()
        for name, values in true.items():
            np.testing.assert_allclose(shown[name], values, rtol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_tracker_that_a_step_reads_is_the_windows(way, run_eagerly):
    """Law 1: also what the step makes of it, an exponential here."""
    build = functools.partial(built, Own, run_eagerly=run_eagerly)
    assert_large_batch(build, way)


@pytest.mark.parametrize("way", ["steps", "skips"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(ChangesInPlace, marks=only_on("jax", "torch", reason="none"))]
    + [AddsToLogs],
    ids=lambda kind: kind.__name__,
)
def test_what_a_step_changes_afterwards_is_its_own(kind, way):
    """What was heard is as it was then; logs are the step's to go on with."""
    size, callback, options = WAYS[way]
    if kind is ChangesInPlace:
        assert_large_batch(functools.partial(built, kind), way)
        return
    plain, model = (
        wrap(built(kind, metrics=["accuracy"]))
        for wrap in (eagerly, lambda model: model)
    )
    true = fit(plain, 12)
    shown = fit(model, size, callback(**options))
    assert shown["accuracy"] == [1.0, 1.0]
    np.testing.assert_allclose(shown["loss"], true["loss"], rtol=2e-5)


@not_on_jax
@pytest.mark.parametrize("reduction", ["mean_with_sample_weight", "sum"])
@pytest.mark.parametrize("way", ["steps", "skips"])
def test_a_loss_that_is_computed_later_is_no_weight(reduction, way):
    """Law 2: the gradients were applied before."""
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    build = functools.partial(built, LooksAfterwards, loss)
    assert_large_batch(build, way, weights=WEIGHTS, logs=False)


@not_on_jax
def test_variables_may_be_an_iterator():
    """As they may be in Keras."""
    assert_large_batch(functools.partial(built, AppliesLazily))


@on_jax
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_gradient_that_a_step_keeps_is_heard_again(run_eagerly):
    """Law 2: by the recording of each micro-batch."""
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    build = functools.partial(
        built, KeepsItsGradient, loss, run_eagerly=run_eagerly
    )
    assert_large_batch(build, weights=WEIGHTS, logs=False)


@on_torch
def test_a_step_of_one_model_may_change_gradients():
    """Also where it is an attribute of that model only."""

    def two_losses(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        kernel, bias = self.trainable_variables
        squared(y, y_pred).backward(retain_graph=True)
        apply(self, [kernel.value.grad.detach()], [kernel])
        # Goes into the gradient of the kernel, too.
        ops.mean(ops.abs(y - y_pred)).backward()
        apply(self, [bias.value.grad.detach()], [bias])
        return {}

    def build():
        model = built(keras.Model)
        vars(model)["train_step"] = two_losses.__get__(model)
        return model

    assert_large_batch(build, logs=False)


@only_on("tensorflow", "torch", reason="compiles it anew")
def test_an_optimizer_that_a_callback_replaces_is_refused():
    """It would not be the one whose sums are taken."""
    model = built(keras.Model, run_eagerly=True)

    class Replaces(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.optimizer = keras.optimizers.SGD(0.0)
                self.model.optimizer.build(self.model.trainable_variables)

    with pytest.raises(RuntimeError, match=r"by `self\.optimizer` only"):
        fit(model, 4, GradientAccumulationCallback(3), Replaces())


@only_on("tensorflow", reason="sizes are known")
def test_a_size_may_become_unknown():
    """TensorFlow forgets the size of batches when there is another one."""

    class Weighted(Own):
        def of(self, data):
            x, y, weights = data

            def compute():
                y_pred = self(x, training=True)
                return self.compute_loss(x, y, y_pred, weights)

            loss, gradients = gradients_of(self, compute)
            apply(self, gradients, self.trainable_variables)
            self.tracker.update_state(loss, sample_weight=x.shape[0])
            return {"loss": self.tracker.result()}

    # Whose weight is no number, so that the size is kept.
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    data = tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(10)
    ours = GradientAccumulationCallback(micro_batch_size=4)
    model = built(Weighted, loss)
    log = model.fit(data, shuffle=False, verbose=0, callbacks=[ours]).history
    assert np.isfinite(log["loss"]).all()


@on_jax
def test_sums_are_not_emptied_in_a_trace():
    """It would leave a tracer in them."""
    import jax

    accumulator = GradientAccumulator(keras.optimizers.SGD(0.1))
    with pytest.raises(
        RuntimeError, match="^Gradients must be accumulated outside of"
    ):
        jax.jit(accumulator.reset)()


def test_no_recording_outlives_its_step():
    """What a sum counts once holds no tensor of the micro-batch."""
    keras.utils.set_random_seed(0)
    regularized = keras.layers.Dense(2, kernel_regularizer="l2")
    model = keras.Sequential([keras.Input((4,)), regularized])
    loss = keras.losses.MeanSquaredError(reduction="sum")
    model.compile(keras.optimizers.SGD(0.01), loss)
    fit(model, 4, GradientAccumulationCallback(3))
    gc.collect()
    recordings = (o for o in gc.get_objects() if type(o) is Recording)
    assert not [each for each in recordings if each.step.model is model]
