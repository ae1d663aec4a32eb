"""Law 2: models, losses and optimizers of the user's own."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback
from kaccum.step import weights
from tests.backends import (
    BACKEND,
    eagerly,
    graph,
    needs_graphs,
    only_on,
    own_step,
    tf,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype("float32")
Y = RNG.normal(size=(22, 2)).astype("float32")


def assert_same_training(build, x=X, y=Y, logs=True, **options):
    """Trains `build()` in windows of 3 x 4 and in batches of 12."""
    runs = []
    for size, callbacks in ((4, [GradientAccumulationCallback(3)]), (12, [])):
        keras.utils.set_random_seed(0)
        model = build() if callbacks else eagerly(build())
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
    states = [[*m.variables, *m.optimizer.variables] for m in (micro, large)]
    for a, b in zip(*states, strict=True):
        a, b = a.numpy(), b.numpy()
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))
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

    train_step = own_step(lambda y, y_pred: ops.mean(ops.abs(y_pred - y)))


class BareApply(OwnStep):
    """Calls `optimizer.apply` without the variables."""

    train_step = own_step(
        lambda y, y_pred: ops.mean(ops.square(y_pred - y)), has_variables=False
    )


class TwoCalls(keras.Model):
    """Applies the gradients of two groups of variables one after the other."""

    groups = (slice(0, 2), slice(2, None))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        pairs = list(zip(gradients, variables))
        for group in self.groups:
            self.optimizer.apply_gradients(pairs[group])
        return self.compute_metrics(x, y, y_pred)


class Decorated(keras.Model):
    """A training step that is a `tf.function`."""

    @graph
    def train_step(self, data):
        return super().train_step(data)


class TwoLosses(keras.Model):
    """Goes on adding to gradients in place that it has applied (PyTorch)."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(x, y, y_pred)
        weights = self.trainable_weights
        loss.backward(retain_graph=True)
        self.apply(weights[:2])
        # Goes into the gradients of all weights.
        ops.mean(ops.abs(y - y_pred)).backward()
        self.apply(weights[2:])
        return self.compute_metrics(x, y, y_pred)

    def apply(self, weights):
        gradients = [weight.value.grad for weight in weights]
        self.optimizer.apply(
            [gradient.detach() for gradient in gradients], weights
        )


class Subset(TwoCalls):
    """Trains the second layer only."""

    groups = (slice(2, None),)


class MeanOfSuper(keras.Model):
    """Reduces Keras's loss by itself."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return ops.mean(loss)


class OwnLoss(keras.Model):
    """A `compute_loss` that hides its denominator."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.abs(y - y_pred)) + sum(self.losses)


class OwnCompiledLoss(keras.Model):
    """A `compute_loss` inside a `tf.function` of its own."""

    @graph
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
            [(ops.sign(g) * ops.sqrt(ops.abs(g)), v) for g, v in grads_and_vars]
        )


@pytest.mark.parametrize(
    "model_class",
    [
        OwnStep,
        OwnLoss,
        *(
            pytest.param(each, marks=needs_graphs)
            for each in (TwoCalls, Decorated, Subset, OwnCompiledLoss)
        ),
        pytest.param(
            TwoLosses, marks=only_on("torch", reason="gradients do not change")
        ),
    ],
    ids=lambda c: c.__name__,
)
def test_custom_steps_and_losses_count_examples(model_class):
    """Law 2: where the loss is hidden, the number of examples."""

    def build():
        model = small(model_class)
        if model_class is not Subset:
            # Keras builds an optimizer for what it is first called with.
            model.optimizer.build(model.trainable_variables)
        return model

    # A step that returns its own logs has Keras show the last batch's.
    logs = not issubclass(model_class, OwnStep)
    assert_same_training(build, logs=logs)


def test_a_bare_apply_updates_what_the_optimizer_was_built_for():
    """Law 1, for `optimizer.apply(gradients)`."""

    def build():
        model = small(BareApply)
        model.optimizer.build(model.trainable_variables)
        return model

    assert_same_training(build, logs=False)


EACH = keras.losses.MeanSquaredError(reduction="none")
TOTAL = keras.losses.MeanSquaredError(reduction="sum")


class Doubled(keras.losses.Loss):
    """A loss that calls another."""

    def call(self, y_true, y_pred):
        return EACH(y_true, y_pred) * 2


def mean_of_each(y_true, y_pred):
    return ops.mean(EACH(y_true, y_pred))


def mean_of_total(y_true, y_pred):
    return TOTAL(y_true, y_pred) / ops.cast(ops.shape(y_true)[0], "float32")


@pytest.mark.parametrize(
    "loss",
    [Doubled(), lambda t, p: EACH(t, p), mean_of_each, mean_of_total],
    ids=["class", "vector", "mean-of-none", "mean-of-sum"],
)
def test_losses_within_losses_are_not_heard(loss):
    """Law 2: only what the compiled loss itself divides by counts."""
    assert_same_training(lambda: small(loss=lambda t, p: loss(t, p)))


def test_a_loss_that_is_reduced_later_counts_examples():
    """Law 2: what a `compute_loss` makes of a vector is hidden."""
    assert_same_training(lambda: small(MeanOfSuper, loss=EACH))


@needs_graphs
def test_a_loss_without_reduction_adds_up():
    """Law 2: TensorFlow sums the gradient of a vector."""
    assert_same_training(
        lambda: small(optimizer=keras.optimizers.SGD(0.01), loss=EACH),
        logs=False,
    )


@needs_graphs
def test_the_first_array_counts_the_examples():
    """Law 2: a scalar beside the arrays is not an array of examples."""

    class Tagged(keras.Model):
        def train_step(self, data):
            return OwnStep.train_step(self, data[1])

    def batches(size):
        for i in range(0, len(X), size):
            yield np.int32(i), (X[i : i + size], Y[i : i + size])

    trained = []
    for size, callbacks in ((4, [GradientAccumulationCallback(3)]), (12, [])):
        keras.utils.set_random_seed(0)
        model = small(Tagged)
        data = tf.data.Dataset.from_generator(
            lambda size=size: batches(size),
            output_signature=(
                tf.TensorSpec((), tf.int32),
                (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 2))),
            ),
        )
        model.fit(data, verbose=0, callbacks=callbacks)
        trained.append(model.get_weights()[0])
    np.testing.assert_allclose(trained[0], trained[1], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    # Other backends' steps call `apply`.
    [OwnOptimizer, pytest.param(Normalizing, marks=needs_graphs)],
)
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


def test_a_step_that_updates_by_itself_is_refused():
    """A step that never calls the optimizer has nothing to accumulate."""

    class ByHand(keras.Model):
        def train_step(self, *arguments):
            if BACKEND == "jax":
                return {}, arguments[0]
            first = self.trainable_variables[0]
            first.assign(ops.ones(first.shape))
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


@needs_graphs
@pytest.mark.parametrize("place", ["model", "list", "other model"])
def test_a_second_optimizer_is_refused(place):
    """Its gradients would be applied every micro-batch."""
    other = small()
    pick = {
        "model": lambda model: model.second,
        "list": lambda model: model.more[0],
        "other model": lambda model: other.optimizer,
    }[place]

    class Two(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply(gradients[:2], variables[:2])
            pick(self).apply(gradients[2:], variables[2:])
            return {}

    model = small(Two)
    model.second, model.more = keras.optimizers.SGD(), [keras.optimizers.SGD()]
    with pytest.raises(
        RuntimeError,
        match="The model's `train_step` must apply gradients by "
        "`self.optimizer` only, whose gradients are accumulated. Received: a "
        "`train_step` of Two that applied some by another optimizer.",
    ):
        model.fit(X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)])


@needs_graphs
@needs_graphs
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_sum_that_cannot_be_heard_is_refused(run_eagerly):
    """It would be taken for a mean over examples."""
    model = small(OwnCompiledLoss)
    loss = keras.losses.MeanSquaredError(reduction="sum")
    model.compile("sgd", loss, run_eagerly=run_eagerly)
    with pytest.raises(
        RuntimeError,
        match=r"A loss with `reduction=\"sum\"` must be computed outside of a "
        r"`tf\.function`, `tf\.cond` or `jax\.jit` of the model's own, inside "
        r"of which it is taken for a mean over examples\. Received: a "
        r"OwnCompiledLoss that computes it there\.",
    ):
        model.fit(
            X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)]
        )


@needs_graphs
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_step_with_a_compiled_part_is_refused(run_eagerly):
    """Law 5: what it traced would add to the sums in a plain fit, too."""

    class Inside(keras.Model):
        def train_step(self, data):
            return self.compiled_part(*data)

        @tf.function
        def compiled_part(self, x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply(gradients, variables)
            return {"loss": loss}

    model = small(Inside)
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    with pytest.raises(
        RuntimeError,
        match="The model's `train_step` must apply gradients outside of a "
        "`tf.function` or `jax.jit` of its own: they are accumulated there, "
        "and what was traced would stay. Received: a `train_step` of Inside "
        "that did not.",
    ):
        model.fit(X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)])
    before = model.get_weights()[0]
    model.fit(X, Y, verbose=0)
    assert not np.array_equal(model.get_weights()[0], before)


def test_a_batch_without_arrays_is_refused():
    """There is nothing to count."""
    with pytest.raises(
        ValueError,
        match="A batch must hold an array whose first axis is the examples, "
        "to count them. Received: ",
    ):
        weights.examples_in((ops.array(1.0), None))


def test_a_model_without_trainable_weights_does_not_update():
    """Nothing to train is a warning of Keras's, with or without kaccum."""

    model = small()
    model.trainable = False
    model.compile("sgd", "mse")
    before = model.get_weights()
    # (Keras does not say so on JAX.)
    says = pytest.warns(UserWarning, match="not have any trainable weights")
    with contextlib.nullcontext() if BACKEND == "jax" else says:
        model.fit(X, Y, verbose=0, callbacks=[GradientAccumulationCallback(2)])
    for mine, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, other)
