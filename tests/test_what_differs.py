"""What is not the large batch's is told, once, with what to do instead."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kaccum import GradientAccumulationCallback, accumulate
from tests.backends import (
    BACKEND,
    EXECUTIONS,
    compile_options,
    needs_graphs,
    only_on,
    own_step,
    tf,
)

not_on_jax = only_on("tensorflow", "torch", reason="steps are functions")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = RNG.normal(size=(16, 3)).astype("float32")
WORDS = RNG.integers(1, 5, (16, 7)).astype("int32")
WORDS *= np.arange(7) < RNG.integers(1, 8, 16)[:, None]
CLASSES = RNG.integers(0, 3, 16)
MOVED = "A layer or `train_step` must leave it to the update to move state"
PROPORTIONS = "Losses that divide by numbers of their own"


def told(record, text):
    """The warnings that begin with a text."""
    return [w for w in record if str(w.message).startswith(text)]


def fit(model, *, steps=2, x=X, y=Y, **options):
    return model.fit(
        x,
        y,
        batch_size=4,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[GradientAccumulationCallback(steps)],
        **options,
    )


class Centre(layers.Layer):
    """Moves the centre of what it sees, as a center loss does."""

    def build(self, shape):
        self.centre = self.add_weight(
            shape=shape[1:], trainable=False, name="centre"
        )

    def call(self, inputs):
        mean = ops.mean(inputs, 0)
        self.centre.assign(0.9 * self.centre + 0.1 * mean)
        return inputs


def model_of(*parts, kind=keras.Model, loss="mse", **options):
    keras.utils.set_random_seed(0)
    x = y = keras.Input((6,))
    for part in [*parts, layers.Dense(4, "tanh"), layers.Dense(3)]:
        y = part(y)
    model = kind(x, y)
    model.compile("sgd", loss, **{**compile_options(), **options})
    return model


def test_state_that_a_layer_moves_is_told():
    """Once, and by the variable's path."""
    with pytest.warns(UserWarning, match=MOVED) as record:
        model = model_of(Centre(name="its"))
        fit(model)
        fit(model)
    (warning,) = told(record, MOVED)
    assert str(warning.message).endswith(
        "Received: 'its/centre', assigned once a micro-batch. Move them in "
        "`on_update`; averages of weights are the optimizer's `use_ema`."
    )


def test_what_may_move_is_not_told(recwarn):
    """Metrics, random numbers, averages of a `BatchNormalization`."""
    parts = [layers.Dropout(0.5), layers.BatchNormalization()]
    fit(model_of(*parts, metrics=["mae"]))
    assert not told(recwarn, MOVED)


def test_state_that_moves_once_an_update_is_not_told(recwarn):
    """Where each micro-batch is a window it is that of the large batch."""
    fit(model_of(Centre()), steps={0: 1})
    model_of(Centre()).fit(
        X,
        Y,
        verbose=0,
        callbacks=[GradientAccumulationCallback(micro_batch_size="auto")],
    )
    assert not told(recwarn, MOVED)


@only_on("torch", reason="no modules of PyTorch to wrap")
def test_statistics_of_a_wrapped_module_are_told():
    """They are no variables of Keras."""
    import torch

    wrapped = keras.layers.TorchModuleWrapper(
        torch.nn.BatchNorm1d(6), output_shape=(None, 6)
    )
    with pytest.warns(UserWarning, match="running_mean") as record:
        fit(model_of(wrapped))
    assert len(told(record, MOVED)) == 1


@needs_graphs
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_variables_of_tensorflow_are_told(execution):
    """They are none of Keras's."""

    class Counts(layers.Layer):
        def __init__(self):
            super().__init__(name="counts")
            self.seen = tf.Variable(0.0)
            self.still = tf.Variable(1.0)

        def call(self, inputs):
            self.seen.assign_add(1.0)
            return inputs * self.still

    model = model_of(Counts(), **compile_options(execution))
    with pytest.warns(UserWarning, match="'counts/seen', assigned once a"):
        fit(model)


@not_on_jax
def test_an_average_that_a_step_keeps_is_told():
    """As examples of diffusion do."""

    class Averaging(keras.Model):
        average = None

        def train_step(self, data):
            logs = super().train_step(data)
            if self.average is not None:
                self.average.assign(0.9 * self.average + 0.1)
            return logs

    model = model_of(kind=Averaging)
    model.average = keras.Variable(0.0, trainable=False, name="average")
    with pytest.warns(UserWarning, match="'average', assigned once"):
        fit(model)


@not_on_jax
def test_several_applies_to_the_same_weights_are_told():
    """The second one would see what the first one moved."""

    class Twice(keras.Model):
        def train_step(self, data):
            own_step(squared)(self, data)
            return own_step(squared)(self, data)

    with pytest.warns(UserWarning, match="must apply gradients to each weight"):
        fit(model_of(kind=Twice))


def squared(y, y_pred):
    return ops.mean(ops.square(ops.convert_to_tensor(y) - y_pred))


def of_words(reduction="sum_over_batch_size"):
    keras.utils.set_random_seed(0)
    x = keras.Input((7,))
    h = layers.Embedding(5, 6, mask_zero=True)(x)
    words = layers.Dense(5, name="words")(h)
    classes = layers.GlobalAveragePooling1D()(h)
    classes = layers.Dense(3, name="classes")(classes)
    model = keras.Model(x, {"words": words, "classes": classes})
    loss = keras.losses.SparseCategoricalCrossentropy
    losses = {
        name: loss(from_logits=True, reduction=reduction)
        for name in model.output
    }
    model.compile("sgd", losses, **compile_options())
    return model


def test_outputs_of_other_denominators_are_told():
    """A masked output beside another one, once, at the end of an epoch."""
    y = {"words": WORDS, "classes": CLASSES}
    with pytest.warns(UserWarning, match=PROPORTIONS) as record:
        model = of_words()
        fit(model, x=WORDS, y=y)
        fit(model, x=WORDS, y=y)
    (warning,) = told(record, PROPORTIONS)
    assert "proportions that differ by up to" in str(warning.message)


def test_outputs_of_other_denominators_are_told_in_a_loop():
    """When the block ends."""
    model = of_words()
    with pytest.warns(UserWarning, match=PROPORTIONS):
        with accumulate(model, 2):
            for i in range(0, 16, 4):
                part = slice(i, i + 4)
                y = {"words": WORDS[part], "classes": CLASSES[part]}
                model.train_on_batch(WORDS[part], y)


@pytest.mark.parametrize("case", ["sums", "equal", "alone", "windows"])
def test_denominators_in_proportion_are_not_told(case, recwarn):
    """Sums have none; and sentences of one length are in proportion."""
    words = np.where(np.arange(7) < 5, np.abs(WORDS) + 1, 0) % 5
    words[:, :5] = np.maximum(words[:, :5], 1)
    x = WORDS if case in ("sums", "alone") else words
    if case == "windows":
        # Each window by itself is in proportion.
        x = x.copy()
        x[8:, 3:] = 0
    model = of_words("sum" if case == "sums" else "sum_over_batch_size")
    y = {"words": x, "classes": CLASSES}
    fit(model, steps=1 if case == "alone" else 2, x=x, y=y)
    assert not told(recwarn, PROPORTIONS)


@only_on("tensorflow", reason="Keras cannot build the loss (3.15)")
def test_the_targets_say_how_many_examples_there_are():
    """A batch of graphs has nodes, of which there are more."""

    class Graphs(layers.Layer):
        def build(self, shapes):
            self.scale = self.add_weight(shape=(4, 2), name="scale")

        def compute_output_spec(self, inputs):
            return keras.KerasTensor((None, 2), "float32")

        def call(self, inputs):
            nodes, graph_of = inputs
            outputs = ops.matmul(nodes, self.scale)
            is_of = ops.one_hot(graph_of, int(ops.max(graph_of)) + 1)
            return ops.matmul(ops.transpose(is_of), outputs)

    def mean(y, y_pred):
        return ops.mean(ops.square(y - y_pred))

    # Nodes in three graphs a micro-batch, of other sizes.
    sizes = [[1, 2, 1], [4, 3, 5], [2, 2, 2], [1, 5, 1]]
    nodes = [RNG.normal(size=(sum(s), 4)).astype("float32") for s in sizes]
    graphs = [np.repeat(np.arange(3), s).astype("int32") for s in sizes]
    targets = [RNG.normal(size=(3, 2)).astype("float32") for _ in sizes]

    def build():
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((4,)), keras.Input((), dtype="int32")]
        model = keras.Model(inputs, Graphs()(inputs))
        model.compile("sgd", mean, **compile_options("eager"))
        return model

    ours, large = build(), build()
    with accumulate(ours, 2):
        for x, graph_of, y in zip(nodes, graphs, targets):
            ours.train_on_batch([x, graph_of], y)
    for i in (0, 2):
        pair = slice(i, i + 2)
        graph_of = np.concatenate([graphs[i], graphs[i + 1] + 3])
        large.train_on_batch(
            [np.concatenate(nodes[pair]), graph_of],
            np.concatenate(targets[pair]),
        )
    for a, b in zip(ours.get_weights(), large.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


DEBUGGING = {
    "tensorflow": ["run_functions_eagerly", "check_numerics"],
    "jax": ["disable_jit", "checking_leaks"],
    "torch": ["anomaly"],
}[BACKEND]


@pytest.fixture
def debugging(request):
    """A framework that shows what it does."""
    if request.param == "run_functions_eagerly":
        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)
    elif request.param == "check_numerics":
        tf.debugging.enable_check_numerics()
        yield
        tf.debugging.disable_check_numerics()
    elif request.param == "anomaly":
        import torch

        with torch.autograd.set_detect_anomaly(True):
            yield
    else:
        import jax

        with getattr(jax, request.param)():
            yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
# Keras's own data sets do so.
@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental")
@pytest.mark.parametrize("steps_per_execution", [1, 3])
@pytest.mark.parametrize("debugging", DEBUGGING, indirect=True)
def test_debugging_is_the_large_batch(debugging, steps_per_execution):
    """What people turn on to find an error."""
    compiled = compile_options("graph", steps_per_execution)
    of = GradientAccumulationCallback
    runs = [(8, []), (4, [of(2)]), (8, [of(micro_batch_size=3)])]
    weights = []
    for batch_size, callbacks in runs:
        model = model_of(**compiled)
        model.fit(
            X,
            Y,
            batch_size,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        weights.append(model.get_weights())
    for ours in weights[1:]:
        for a, b in zip(ours, weights[0]):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@only_on("jax", reason="it hears gradients that steps take by any name")
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_denominator_that_is_not_heard_is_told(is_masked, recwarn):
    """A step that imported `value_and_grad` by that name."""
    from jax import value_and_grad

    class Own(keras.Model):
        def train_step(self, state, data):
            trainable, non_trainable, optimizer, metrics = state
            x, y, *_ = data

            def compute(trainable):
                y_pred, _ = self.stateless_call(
                    trainable, non_trainable, x, training=True
                )
                return self.compute_loss(x, y, y_pred)

            value, gradients = value_and_grad(compute)(trainable)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            state = trainable, non_trainable, optimizer, metrics
            return {"own": value}, state

    keras.utils.set_random_seed(0)
    x = keras.Input((7,))
    h = layers.Embedding(5, 6, mask_zero=is_masked)(x)
    model = Own(x, layers.Dense(5)(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, **compile_options())
    fit(model, x=WORDS, y=WORDS)
    unheard = "A loss with a mask, or with weights under"
    assert len(told(recwarn, unheard)) == is_masked
