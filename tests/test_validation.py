"""Validation inside of `fit`, cut: the results are those of whole batches.

The truth is Keras's own `evaluate` of the same weights, after the fit.
"""

import gc
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback
from kaccum.fit.micro_batches import MicroBatchSize
from tests.backends import (
    BACKEND,
    EXECUTIONS,
    IS_NEW,
    attempts,
    compile_options,
    needs_graphs,
    needs_sparse,
    needs_strategies,
    of_unknown_length,
    only_on,
    out_of_memory,
    tf,
)
from tests.layers import Hungry
from tests.profiles import at_night
from tests.reference import strategy_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 6)).astype("float32")
Y = RNG.integers(0, 3, 23)
ONE_HOT = np.eye(3, dtype="float32")[Y]
# Uneven: parts of a batch are to differ from it.
UNEVEN = np.linspace(0.02, 0.98, 23)[:, None]
TOKENS = RNG.integers(1, 4, (23, 5)) * (RNG.uniform(size=(23, 5)) < UNEVEN)
SEGMENTS = (RNG.uniform(size=(23, 3)) < UNEVEN).astype("float32")
WEIGHTS = (RNG.uniform(size=23) * UNEVEN[:, 0]).astype("float32")


class Seen(keras.layers.Layer):
    """Notes how many examples are validated at a time: where shapes are known.

    (Eagerly, or where each shape is compiled for itself.)
    """

    sizes = []

    def call(self, inputs, training=None):
        if training is False and inputs.shape[0] is not None:
            Seen.sizes.append(int(inputs.shape[0]))
        return inputs


class Adds(keras.layers.Layer):
    """Adds a term to the loss, that a function makes of its inputs."""

    def __init__(self, term):
        super().__init__()
        self.term = term

    def call(self, inputs):
        self.add_loss(self.term(inputs))
        return inputs


def largest(y, y_pred):
    """A metric that is no mean over examples."""
    return ops.max(y_pred) - ops.min(y_pred)


def contrast(y, y_pred):
    """A loss that is none either: examples against each other."""
    return ops.logsumexp(ops.matmul(y_pred, ops.transpose(y_pred)))


def built(outputs, inputs=None, loss="mse", metrics=("mae",), **options):
    keras.utils.set_random_seed(0)
    if inputs is None:
        inputs = keras.Input((6,))
        outputs = outputs(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss, metrics=list(metrics) or None, **options)
    return model


def dense(inputs, activation="softmax"):
    hidden = Seen()(inputs)
    hidden = keras.layers.Dense(
        5, "tanh", kernel_regularizer="l2", activity_regularizer="l2"
    )(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.Dropout(0.4)(hidden)
    return keras.layers.Dense(3, activation)(hidden)


def classifier(**options):
    loss = "sparse_categorical_crossentropy"
    metrics = ["accuracy", largest]
    return built(dense, loss=loss, **{"metrics": metrics, **options})


# Keras says so of every `LSTM` with a mask (3.16.0.dev2026102704, PyTorch).
loses_masks = pytest.mark.filterwarnings("ignore:Layer 'lstm")


def masked(**options):
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(4, 3, mask_zero=True)(inputs)
    outputs = keras.layers.LSTM(2, return_sequences=True)(hidden)
    return built(outputs, inputs, **options)


def two_headed(**options):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(4)(inputs)
    heads = {
        "a": keras.layers.Dense(1, name="a")(hidden),
        "b": keras.layers.Dense(2, name="b")(hidden),
    }
    return built(heads, inputs, {"a": "mse", "b": "mae"}, (), **options)


def adding(term):
    def make(**options):
        return built(
            lambda inputs: keras.layers.Dense(1)(Adds(term)(inputs)), **options
        )

    return make


TARGET = WEIGHTS[:, None]
CASES = {
    "means": (classifier, (X, Y, WEIGHTS)),
    "dice": (
        lambda **o: built(
            lambda inputs: dense(inputs, "sigmoid"),
            loss=keras.losses.Dice(),
            **o,
        ),
        (X, SEGMENTS),
    ),
    "contrast": (lambda **o: built(dense, loss=contrast, **o), (X, ONE_HOT)),
    "sum": (
        lambda **o: built(
            dense, loss=keras.losses.MeanSquaredError(reduction="sum"), **o
        ),
        (X, ONE_HOT),
    ),
    "weighted": (
        lambda **o: built(
            dense,
            loss=keras.losses.MeanSquaredError(
                reduction="mean_with_sample_weight"
            ),
            **o,
        ),
        (X, ONE_HOT, WEIGHTS),
    ),
    "masks": (masked, (TOKENS, RNG.normal(size=(23, 5, 2)).astype("float32"))),
    "outputs": (
        two_headed,
        (X, {"a": TARGET, "b": np.ones((23, 2), "float32")}),
    ),
    "mean added": (adding(lambda x: ops.mean(x**2)), (X, TARGET)),
    "sum added": (adding(lambda x: ops.sum(x**2)), (X, TARGET)),
    "added for each": (adding(lambda x: ops.sum(x**2, -1)), (X, TARGET)),
}
# Each in one way, all in all ways at night.
WAYS = [
    (name, EXECUTIONS[i % len(EXECUTIONS)], 1 + i % 2)
    for i, name in enumerate(CASES)
]
WAYS += at_night(
    (name, execution, steps)
    for name in CASES
    for execution in EXECUTIONS
    for steps in (1, 3)
)


@pytest.fixture(autouse=True)
def fed():
    """Lets the next test begin with enough memory."""
    Seen.sizes.clear()
    Hungry.feed(None)
    gc.freeze()
    yield
    gc.unfreeze()
    Hungry.feed(None)


def validated(model, data, size=4, batch_size=20, epochs=2, **options):
    """The last validation of a fit, and Keras's own of the same weights."""
    y = data[1] if len(data) > 1 else None
    callback = GradientAccumulationCallback(micro_batch_size=size)
    history = model.fit(
        data[0],
        y,
        batch_size=20,
        epochs=epochs,
        verbose=options.pop("verbose", 0),
        callbacks=[callback],
        validation_data=options.pop("validation_data", data),
        validation_batch_size=batch_size,
        **options,
    ).history
    mine = {
        key[len("val_") :]: values[-1]
        for key, values in history.items()
        if key.startswith("val_")
    }
    return callback, mine


def evaluated(model, data, batch_size=20):
    y, weights = (*data[1:], None, None)[:2]
    return model.evaluate(
        data[0],
        y,
        sample_weight=weights,
        batch_size=batch_size,
        verbose=0,
        return_dict=True,
    )


def assert_cut():
    """No layer saw a batch whole."""
    # Keras builds models with a whole batch, without computing. Losses, and
    # steps, are tried on 8 examples.
    assert all(size <= 8 for size in Seen.sizes[1:])


def assert_alike(mine, truth):
    assert mine.keys() == truth.keys()
    for key, value in truth.items():
        np.testing.assert_allclose(mine[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.filterwarnings("ignore:A loss must be a mean or a sum")
@loses_masks
@pytest.mark.parametrize(("name", "execution", "steps"), WAYS)
def test_results_are_those_of_whole_batches(name, execution, steps):
    """Whatever losses and metrics make of the outputs."""
    make, data = CASES[name]
    model = make(**compile_options(execution, steps))
    _, mine = validated(model, data)
    assert_cut()
    whole = evaluated(model, data)
    if IS_NEW and tf and execution == "graph":
        # (Keras 3.16.0.dev2026102704 weights the losses of outputs by their
        # examples in the batches that it traces, and by one in others.)
        for name in ("a_loss", "b_loss"):
            assert (name in mine) == (name in whole)
            mine.pop(name, None), whole.pop(name, None)
    assert_alike(mine, whole)


@loses_masks
def test_the_cases_show_what_is_not_whole():
    """Keras's own results of smaller batches are others."""
    names = ["dice", "contrast", "weighted", "sum"]
    # (Keras 3.16.0.dev2026102704 loses the masks.)
    names += [] if IS_NEW else ["masks"]
    for name in names:
        make, data = CASES[name]
        model = make(run_eagerly=True)
        whole, parts = (evaluated(model, data, n)["loss"] for n in (20, 4))
        assert abs(parts / whole - 1) > 1e-3, name


def test_layers_get_micro_batches_only():
    """Of those sizes, and no batch as a whole."""
    model = classifier(**compile_options(EXECUTIONS[-1]))
    validated(model, (X, Y), epochs=1)
    assert Seen.sizes[-6:] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("source", ["a generator", "a dataset", "one example"])
def test_whatever_validation_data_are(source):
    """Of unknown length, with an odd end, too small to cut."""
    if source == "a generator":

        def batches():
            for start in range(0, 23, 7):
                yield X[start : start + 7], Y[start : start + 7]

        data = of_unknown_length(batches)
    elif source == "a dataset":

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                return X[: 9 - 4 * i], Y[: 9 - 4 * i]

        data = Batches()
    else:
        data = (X[:1], Y[:1])
    model = classifier(metrics=["accuracy"])
    options = {"validation_data": data}
    if source != "one example":
        options["batch_size"] = None
    _, mine = validated(model, (X, Y), **options)
    truth = (
        evaluated(model, data)
        if source == "one example"
        else model.evaluate(data, verbose=0, return_dict=True)
    )
    assert_alike(mine, truth)


@needs_sparse
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_ragged_arrays_are_cut(kind):
    """Ragged outputs are joined again."""
    lengths = [2, 1, 3, 1, 1, 2, 2, 1, 1, 3]
    x = tf.RaggedTensor.from_row_lengths(tf.range(17) % 5, lengths)
    keras.utils.set_random_seed(0)
    first = keras.Input((None,), dtype="int32", ragged=True)
    hidden = keras.layers.Embedding(5, 3)(first)
    mean = keras.layers.Dense(1)(keras.ops.mean(hidden, axis=1))

    class Ragged(keras.Model):
        def call(self, inputs):
            return {"mean": self.body(inputs), "ragged": inputs}

    model = keras.Model(first, mean)
    targets = tf.range(10.0)[:, None]
    if kind == "outputs":
        body, model = model, Ragged()
        model.body = body

        targets, loss = {"mean": targets}, {"mean": "mse"}
    else:
        loss = "mse"
    model.compile("sgd", loss)
    batches = tf.data.Dataset.from_tensor_slices((x, targets)).batch(7)
    callback = GradientAccumulationCallback(micro_batch_size=3)
    history = model.fit(
        batches, verbose=0, callbacks=[callback], validation_data=batches
    ).history
    truth = model.evaluate(batches, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        history["val_loss"][-1], truth["loss"], rtol=1e-5
    )


@needs_strategies
@pytest.mark.parametrize("size", [2, "auto"])
def test_replicas_validate_in_parts(size):
    """Each one cuts what it has."""
    with strategy_of(2).scope():
        model = classifier(metrics=["accuracy"])
        if size == "auto":
            Hungry.feed(None)
        _, mine = validated(model, (X, Y), size)
        assert_alike(mine, evaluated(model, (X, Y)))


# A `test_step` of the user's own.


def own_test_step(noisy=False, sub_model=False):
    """A model that has one, written for the backend."""

    class Own(keras.Model):
        def parts_of(self, x):
            if noisy:
                return x + keras.random.normal(ops.shape(x), seed=self.noise)
            return x * 2.0

        def test_step(self, *arguments):
            if BACKEND != "jax":
                (data,) = arguments
                x, y = data
                layer = self.layers[-1] if sub_model else self
                y_pred = layer(self.parts_of(x))
                loss = self.compute_loss(x, y, y_pred)
                self._loss_tracker.update_state(
                    loss, sample_weight=ops.shape(x)[0]
                )
                return self.compute_metrics(x, y, y_pred)
            state, (x, y) = arguments
            trainable, others, metrics = state
            known = list(zip(self.others, others))
            with keras.StatelessScope(known) as scope:
                x = self.parts_of(x)
            others = [scope.get_current_value(v) for v in self.others]
            return super().test_step((trainable, others, metrics), (x, y))

        @property
        def others(self):
            return self.non_trainable_variables

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = Own(inputs, keras.layers.Dense(1)(Seen()(inputs)))
    model.noise = keras.random.SeedGenerator(1)
    model.compile("sgd", "mse", metrics=["mae", largest])
    return model


@pytest.mark.parametrize("sub_model", [False, True])
def test_a_test_step_of_ones_own_is_cut(sub_model, recwarn):
    """It gets whole outputs, as its layers get parts of the examples."""
    model = own_test_step(sub_model=sub_model)
    data = (X, TARGET)
    _, mine = validated(model, data)
    assert not [w for w in recwarn if "test_step" in str(w.message)]
    assert_cut()
    assert_alike(mine, evaluated(model, data))


def test_a_random_test_step_is_not_cut():
    """Its parts would be of other numbers: it runs as it is, with a word."""
    model = own_test_step(noisy=True)
    data = (X, TARGET)
    with pytest.warns(
        UserWarning,
        match=r"^A `test_step` must call layers on the examples of its batch, "
        r"and on nothing that is random, for validation to be cut into "
        r"micro-batches with the results of whole batches\. Received: a "
        r"`test_step` of Own that calls a layer on other numbers for the same "
        r"examples\. Validation is not cut\. If it does not fit in memory, "
        r"write a smaller `validation_batch_size`\.$",
    ) as told:
        _, mine = validated(model, data, epochs=1, shuffle=False)
    assert len([w for w in told if "test_step" in str(w.message)]) == 1
    history = (
        own_test_step(noisy=True)
        .fit(
            *data,
            batch_size=20,
            verbose=0,
            shuffle=False,
            validation_data=data,
            validation_batch_size=20,
        )
        .history
    )
    for key, value in mine.items():
        np.testing.assert_allclose(value, history[f"val_{key}"][-1], rtol=1e-4)


class OwnLoss(keras.Model):
    """Calls layers in its loss."""

    kind = "examples"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = keras.layers.Dense(1)
        self.head.build((None, 3))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if self.kind == "examples":
            return ops.max(self.head(y_pred))
        if self.kind == "coupled":
            return ops.max(self.head(y_pred - ops.mean(y_pred, axis=0)))
        if self.kind == "a table":
            # As many rows as a micro-batch.
            return ops.sum(self.head(ops.ones((4, 3)))) + ops.max(y_pred)
        return -ops.sum(ops.reshape(y_pred[:5, 0], (5,)))


@pytest.mark.filterwarnings("ignore:A loss")
@pytest.mark.parametrize("kind", ["examples", "coupled", "a table", "many"])
def test_layers_that_a_loss_calls(kind, recwarn):
    """Of examples, of whole batches, of none, and of more than there are."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = OwnLoss(inputs, keras.layers.Dense(3)(inputs))
    model.kind = kind
    model.compile("sgd")
    data = (X[:20], Y[:20])
    # (Trained on whole batches, for the loss is none of micro-batches.)
    callback = GradientAccumulationCallback(
        micro_batch_size=4, whole_batch_loss=True
    )
    history = model.fit(
        *data,
        batch_size=20,
        verbose=0,
        callbacks=[callback],
        validation_data=data,
        validation_batch_size=20,
    ).history
    assert_alike({"loss": history["val_loss"][-1]}, evaluated(model, data))
    is_told = [w for w in recwarn if "`test_step`" in str(w.message)]
    assert bool(is_told) == (kind in ("coupled", "many"))


def test_a_term_of_unknown_kind_is_told():
    """What a layer adds is not measured beside an own `compute_loss`."""

    class Own(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    added = Adds(lambda x: ops.sum(x**2))(inputs)
    model = Own(inputs, keras.layers.Dense(1)(added), name="its")
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.warns(
        UserWarning,
        match=r"^A term that a layer adds to the loss must be known to be a "
        r"mean or a sum over examples for validation to be cut exactly\. "
        r"Received: one of 'its' that is taken for a mean, as activity "
        r"regularizers are\. If it is none, write `validation_batch_size` as "
        r"small as `micro_batch_size`\.$",
    ):
        validated(model, (X, TARGET), epochs=1)


def test_a_callback_may_catch_an_error():
    """What it evaluates; the fit goes on as before."""

    class Evaluates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with pytest.raises(Exception, match="."):
                self.model.evaluate(np.ones((4, 9)), verbose=0)

    model = classifier(run_eagerly=True)
    callback = GradientAccumulationCallback(micro_batch_size=4)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[callback, Evaluates()])
    assert callback.updates == 3


# Memory that runs out.


class HungryInTests(Hungry):
    """The same, where a model is tested."""

    def call(self, inputs, training=None):
        if training is not False:
            return inputs
        return super().call(inputs, training=None)


def hungry_model(execution, *layers):
    keras.utils.set_random_seed(0)
    stack = [
        keras.Input((6,)),
        *layers,
        HungryInTests(),
        keras.layers.Dense(3, "softmax"),
    ]
    model = keras.Sequential(stack)
    model.compile(
        "sgd",
        "sparse_categorical_crossentropy",
        metrics=["accuracy", largest],
        **compile_options(execution),
    )
    return model


NOT_UNDER_XLA = [e for e in EXECUTIONS if e != "xla" or BACKEND != "tensorflow"]


@pytest.mark.parametrize("execution", NOT_UNDER_XLA)
def test_auto_halves_in_validation_too(execution, capsys):
    """For validation only; nothing is counted twice."""
    model = hungry_model(execution)
    Hungry.feed(4)
    callback, mine = validated(
        model, (X, Y), "auto", 20, validation_data=(X, Y), verbose=2
    )
    # (8: the losses were tried on so many, before the first step.)
    assert attempts([n for n in Hungry.failed if n != 8]) == [20, 10, 5]
    assert callback.micro_batch_size == 20
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("kaccum")
    ]
    assert lines[1:] == [
        "kaccum: micro-batches of 20 examples fit in memory.",
        "kaccum: no memory for 20 examples of validation; trying micro-batches "
        "of 10.",
        "kaccum: no memory for 10 examples of validation; trying micro-batches "
        "of 5.",
        "kaccum: no memory for 5 examples of validation; trying micro-batches "
        "of 3.",
        "kaccum: micro-batches of 3 examples of validation fit in memory.",
    ]
    Hungry.feed(None)
    assert_alike(mine, evaluated(model, (X, Y), 20))
    # What was found is known to the next fit.
    Hungry.feed(4)
    model.fit(X, Y, 20, verbose=0, callbacks=[callback], validation_data=(X, Y))
    assert Hungry.failed == []


class Counts(keras.layers.Layer):
    """Counts how often it is tested."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="calls"
        )

    def call(self, inputs, training=None):
        if training is False:
            self.calls.assign(self.calls + 1.0)
        return inputs


@pytest.mark.parametrize("execution", NOT_UNDER_XLA)
def test_a_failed_validation_leaves_nothing_behind(execution):
    """State that a layer had moved before memory ran out is taken back."""
    model = hungry_model(execution, Counts())
    Hungry.feed(4)
    validated(model, (X, Y), "auto", 20)
    # In each epoch 20 examples as seven micro-batches, and the last three.
    assert float(model.layers[0].calls.numpy()) == 2 * 8


def test_advice_for_validation():
    """Where no halving helps, or was asked for."""
    for size, ending in (
        (20, "Write `validation_batch_size=10` into `fit`."),
        ("auto", "so that no smaller micro-batch is left to try."),
    ):
        Hungry.feed(0)
        model = hungry_model(EXECUTIONS[-1])
        with pytest.raises(type(out_of_memory())) as told:
            validated(model, (X, Y), size, 20, validation_data=(X, Y))
        text = getattr(told.value, "message", str(told.value))
        assert text.endswith(ending)
        # The model is of use.
        Hungry.feed(None)
        evaluated(model, (X, Y))


def test_outputs_that_do_not_fit_are_told():
    """The loss needs those of the whole batch."""

    class Large(keras.metrics.Mean):
        fails = False

        def update_state(self, y, y_pred, sample_weight=None):
            if Large.fails and y_pred.shape[0] == 20:
                raise out_of_memory()
            return super().update_state(y_pred)

    model = classifier(run_eagerly=True, metrics=[Large()])
    Large.fails = True
    with pytest.raises(
        type(out_of_memory()),
        match=r"kaccum: the validation of 20 examples at a time did not fit in "
        r"memory\. Write `validation_batch_size=10` into `fit`\.",
    ):
        model.fit(
            X,
            Y,
            12,
            verbose=0,
            callbacks=[GradientAccumulationCallback(micro_batch_size="auto")],
            validation_data=(X[:20], Y[:20]),
            validation_batch_size=20,
        )


def test_validation_starts_with_what_training_found():
    """And halves by itself."""
    size = MicroBatchSize("auto")
    size.halve(20)
    size.fits(10)
    of_validation = size.of_validation()
    assert of_validation.parts_of([20]) == [[10], [10]]
    assert not of_validation.fits(10)
    of_validation.halve(10)
    assert size.of_validation() is of_validation
    assert (size.size, of_validation.fits(5), of_validation.size) == (10, 1, 5)
    size.forget()
    assert size.of_validation().size == "auto"
    fixed = MicroBatchSize(4)
    assert fixed.of_validation() is fixed


# Outside of a fit, and between two.


def test_evaluate_outside_of_a_fit_is_keras_own():
    """Also after a fit that was interrupted."""
    model = classifier(run_eagerly=True)
    validated(model, (X, Y), epochs=1)
    Seen.sizes.clear()
    evaluated(model, (X, Y))
    assert Seen.sizes == [20, 3]

    class Stop(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validated(model, (X, Y), epochs=1)
        model.fit(
            X,
            Y,
            20,
            verbose=0,
            callbacks=[
                GradientAccumulationCallback(micro_batch_size=4),
                Stop(),
            ],
            validation_data=(X, Y),
        )
    Seen.sizes.clear()
    evaluated(model, (X, Y))
    model.test_on_batch(X, Y)
    assert Seen.sizes == [20, 3, 23]
    model.fit(X, Y, 20, verbose=0)
    assert "__self__" not in dir(model.test_function)


def test_a_steps_fit_validates_as_keras_does():
    """Its batches are micro-batches already."""
    model = classifier(run_eagerly=True)
    model.fit(
        X,
        Y,
        5,
        verbose=0,
        callbacks=[GradientAccumulationCallback(2)],
        validation_data=(X, Y),
        validation_batch_size=20,
    )
    assert Seen.sizes[-2:] == [20, 3]


@needs_graphs
def test_a_second_fit_traces_nothing():
    """What was compiled for validation is used again."""
    traced = []

    class Traced(keras.layers.Layer):
        def call(self, inputs, training=None):
            traced.append(training)
            return inputs

    inputs = keras.Input((6,))
    model = built(keras.layers.Dense(1)(Traced()(inputs)), inputs)
    data = (X[:20], TARGET[:20])
    validated(model, data, epochs=1)
    traced.clear()
    validated(model, data, epochs=2)
    assert traced == []


PROGRAM = """
import os, resource, sys, keras, numpy as np
from kaccum import GradientAccumulationCallback

wide = [keras.layers.Dense(16384, "tanh"), keras.layers.Dense(1)]
model = keras.Sequential([keras.Input((8,)), *wide])
model.compile(keras.optimizers.SGD(1e-6), "mse")
x, y = np.ones((32768, 8), "float32"), np.ones((32768, 1), "float32")
model.fit(x[:8], y[:8], batch_size=4, verbose=0, validation_data=(x[:8], y[:8]))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + 900 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ours = [GradientAccumulationCallback(micro_batch_size="auto")]
log = model.fit(
    x[:64], y[:64], batch_size=64, verbose=0, callbacks=ours[:int(sys.argv[1])],
    validation_data=(x, y), validation_batch_size=32768,
)
print("val_loss", log.history["val_loss"][-1] >= 0)
"""


@only_on("jax", "torch", reason="it aborts where the processor's memory ends")
@pytest.mark.skipif(sys.platform != "linux", reason="no limit to set")
def test_auto_survives_validation_that_does_not_fit():
    """Memory that really is short, in a process of its own."""

    def run(is_ours):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(is_ours)],
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert run(0).returncode == 1
    ran = run(1)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "val_loss True" in ran.stdout
