"""Law 2: models, losses and optimizers of the user's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kaccum import GradientAccumulationCallback

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype("float32")
Y = RNG.normal(size=(22, 2)).astype("float32")


def assert_same_training(build, x=X, y=Y, logs=True, **options):
    """Trains `build()` in windows of 3 x 4 and in batches of 12."""
    runs = []
    for size, callbacks in ((4, [GradientAccumulationCallback(3)]), (12, [])):
        keras.utils.set_random_seed(0)
        model = build()
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        history = model.fit(
            x,
            y,
            batch_size=size,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
            **options,
        ).history
        runs.append((model, history))
    (micro, micro_history), (large, large_history) = runs
    assert int(micro.optimizer.iterations) == int(large.optimizer.iterations)
    for a, b in zip(micro.get_weights(), large.get_weights(), strict=True):
        scale = np.max(np.abs(b))
        assert np.max(np.abs(a - b)) <= 1e-5 * scale
    if logs:
        assert micro_history.keys() == large_history.keys()
        for name, values in large_history.items():
            np.testing.assert_allclose(micro_history[name], values, rtol=1e-5)
    return micro


def small(model_class=keras.Model, optimizer=None, **options):
    """A two-layer model of 4 inputs and 2 outputs."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation="tanh")(inputs)
    model = model_class(inputs, keras.layers.Dense(2)(hidden))
    options.setdefault("loss", "mse")
    model.compile(optimizer or keras.optimizers.Adam(0.02), **options)
    return model


class OwnStep(keras.Model):
    """A training step with a loss of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.abs(self(x, training=True) - y))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply(gradients, variables)
        return {"own": loss}


class BareApply(OwnStep):
    """Calls `optimizer.apply` without the variables."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients)
        return {"own": loss}


class TwoCalls(keras.Model):
    """Applies the gradients of two groups of variables one after the other."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        pairs = list(zip(gradients, variables))
        self.optimizer.apply_gradients(pairs[:2])
        self.optimizer.apply_gradients(pairs[2:])
        return self.compute_metrics(x, y, y_pred)


class OwnLoss(keras.Model):
    """A `compute_loss` that hides its denominator."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return tf.reduce_mean(tf.abs(y - y_pred)) + sum(self.losses)


class OwnCompiledLoss(keras.Model):
    """A `compute_loss` inside a `tf.function` of its own."""

    @tf.function
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return 2 * super().compute_loss(x, y, y_pred, sample_weight)


class OwnOptimizer(keras.optimizers.Optimizer):
    """Momentum, written by a user."""

    def build(self, variables):
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate):
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, 0.9 * momentum + gradient)
        self.assign_sub(variable, learning_rate * momentum)


class Normalizing(keras.optimizers.SGD):
    """Changes the gradients before they are applied, not linearly."""

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients(
            [(tf.sign(g) * tf.sqrt(tf.abs(g)), v) for g, v in grads_and_vars]
        )


@pytest.mark.parametrize(
    "model_class",
    [OwnStep, BareApply, TwoCalls, OwnLoss, OwnCompiledLoss],
    ids=lambda c: c.__name__,
)
def test_custom_steps_and_losses_count_examples(model_class):
    """Law 2: where the loss is hidden, the number of examples."""
    # A step that returns its own logs has Keras show the last batch's.
    logs = not issubclass(model_class, OwnStep)
    assert_same_training(lambda: small(model_class), logs=logs)


@pytest.mark.parametrize("optimizer", [OwnOptimizer, Normalizing])
def test_custom_optimizers_see_one_window(optimizer):
    """Law 3: whatever an optimizer does, it does to the whole gradient."""
    assert_same_training(lambda: small(optimizer=optimizer(learning_rate=0.02)))


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="newer Keras only"
)
def test_multi_optimizer_trains_as_the_large_batch():
    """Law 1, for an optimizer made of several."""

    def build():
        optimizers = keras.optimizers
        return small(
            optimizer=optimizers.MultiOptimizer(
                optimizers.OptimizerMap(
                    optimizers.SGD(0.02), {".*bias": optimizers.Adam(0.02)}
                )
            )
        )

    assert_same_training(build)


def two_outputs(losses, **options):
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    both = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = {
        "p": keras.layers.Dense(2, name="p")(both),
        "q": keras.layers.Dense(2, name="q")(both),
    }
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.02), losses, **options)
    return model


@pytest.mark.parametrize("losses", [{"p": "mse", "q": "huber"}, "sum"])
def test_several_outputs_train_as_the_large_batch(losses):
    """Law 2: dict inputs, two outputs, `loss_weights`."""
    if losses == "sum":
        losses = {
            "p": keras.losses.MeanSquaredError(reduction="sum"),
            "q": keras.losses.Huber(reduction="sum"),
        }
    assert_same_training(
        lambda: two_outputs(losses, loss_weights={"p": 1.0, "q": 0.3}),
        {"a": X, "b": X[::-1].copy()},
        {"p": Y, "q": Y[::-1].copy()},
        # Keras averages each output's loss over batches, not examples.
        logs=False,
    )


def test_tuple_inputs_train_as_the_large_batch():
    """Law 1, for a model called with a tuple."""

    def build():
        inputs = (keras.Input((4,)), keras.Input((4,)))
        outputs = keras.layers.Dense(2)(keras.layers.Add()(list(inputs)))
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.Adam(0.02), "mse")
        return model

    assert_same_training(build, (X, X[::-1].copy()))


def test_sums_and_means_in_one_model_are_refused():
    """Law 2: no single weight serves both."""
    losses = {"p": "mse", "q": keras.losses.MeanAbsoluteError(reduction="sum")}
    with pytest.raises(
        ValueError,
        match="The losses of one model must either all be means or all be "
        "sums for their gradients to be accumulated exactly. Received: 1 "
        'losses with a mean reduction and 1 with `reduction="sum"`.',
    ):
        two_outputs(losses).fit(
            {"a": X, "b": X},
            {"p": Y, "q": Y},
            verbose=0,
            callbacks=[GradientAccumulationCallback(2)],
        )


def test_a_step_that_updates_by_itself_is_refused():
    """A step that never calls the optimizer has nothing to accumulate."""

    class ByHand(keras.Model):
        def train_step(self, data):
            self.trainable_variables[0].assign_add(
                tf.ones_like(self.trainable_variables[0])
            )
            return {}

    with pytest.raises(
        RuntimeError,
        match="The model's `train_step` must update its weights by "
        "`self.optimizer.apply_gradients` or `self.optimizer.apply`: there is "
        "nothing to accumulate. Received: a `train_step` of ByHand that called "
        "neither.",
    ):
        small(ByHand).fit(
            X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)]
        )


def test_a_model_without_trainable_weights_does_not_update():
    """Nothing to train is a warning of Keras's, with or without kaccum."""

    def fit():
        model = small()
        model.trainable = False
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)])

    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        fit()
