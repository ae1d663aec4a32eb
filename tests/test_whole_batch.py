"""`whole_batch_loss=True`: any loss, of the whole batch, in three passes.

The truth is the plain large batch; where layers draw random numbers, or have
statistics of their own, the run without the option.
"""

import gc
import itertools
import re

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

from kaccum import GradientAccumulationCallback
from kaccum.testing import Run, fit_large
from tests.backends import (
    BACKEND,
    COMPILED,
    EXECUTIONS,
    compile_options,
    needs_compiling,
    needs_sparse,
    needs_strategies,
    only_on,
    tf,
)
from tests.layers import Hungry, Watched, stateful
from tests.profiles import at_night, drawn
from tests.reference import (
    Problem,
    assert_same,
    check,
    result_of,
    strategy_of,
)
from tests.strategies import ARCHITECTURES, problems, runs_of

RNG = np.random.default_rng(0)
EXAMPLES = 44
X = RNG.normal(size=(EXAMPLES, 6)).astype("float32")
Y = RNG.integers(0, 3, EXAMPLES)
# Uneven, so that micro-batches differ from their batch.
UNEVEN = np.linspace(0.02, 0.98, EXAMPLES)[:, None]
SEGMENTS = (RNG.uniform(size=(EXAMPLES, 3)) < UNEVEN).astype("float32")
WEIGHTS = (RNG.uniform(size=EXAMPLES) * UNEVEN[:, 0]).astype("float32")
TOKENS = RNG.integers(1, 4, (EXAMPLES, 5))
TOKENS *= RNG.uniform(size=TOKENS.shape) < UNEVEN
# Two full windows and a short one.
BATCH, MICRO, STEPS = 16, 4, 4
WAYS = ["steps", 5, "auto"]


def contrast(y, y_pred):
    """Supervised contrastive loss: each example against all others."""
    y_pred = y_pred / ops.sqrt(ops.sum(y_pred**2, -1, keepdims=True) + 1e-6)
    near = ops.matmul(y_pred, ops.transpose(y_pred)) / 0.5
    y = ops.reshape(y, (-1, 1))
    alike = ops.cast(ops.equal(y, ops.transpose(y)), near.dtype)
    rest = near - ops.logsumexp(near, -1, keepdims=True)
    return -ops.sum(alike * rest) / ops.sum(alike)


def masked_mean(y, y_pred):
    """The loss of text tutorials, of one number."""
    counts = ops.cast(ops.not_equal(y, 0), y_pred.dtype)
    loss = keras.losses.sparse_categorical_crossentropy(y, y_pred)
    return ops.sum(loss * counts) / ops.sum(counts)


def largest(y, y_pred):
    """A metric that is no mean over examples."""
    return ops.max(y_pred) - ops.min(y_pred)


class Adds(keras.layers.Layer):
    """Adds a term to the loss, that a function makes of its inputs."""

    def __init__(self, term):
        super().__init__()
        self.term = term

    def call(self, inputs):
        self.add_loss(0.1 * self.term(inputs))
        return inputs


def mlp(activation=None, units=3, layers=(), term="l2"):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(
                8, "tanh", kernel_regularizer="l2", activity_regularizer=term
            ),
            *layers,
            keras.layers.Dense(units, activation),
        ]
    )


class OwnLoss(keras.Model):
    """Couples outputs and inputs, and has centres that the loss trains."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(3, "tanh")]
        )
        self.centres = self.add_weight(shape=(3, 3), name="centres")
        self.have_more()
        self.build((None, 6))

    def have_more(self):
        """Makes more layers."""

    def build(self, shape):
        self.built = True

    def call(self, inputs):
        return self.body(inputs)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        near = ops.take(self.centres, ops.cast(y, "int32"), axis=0)
        spread = ops.std(y_pred, axis=0)
        weights = ops.softmax(sample_weight * ops.sum(x, -1))
        away = ops.sum(weights[:, None] * (y_pred - near) ** 2)
        return away + ops.sum(spread)


def two_headed():
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(4, 3, mask_zero=True)(inputs)
    tokens = keras.layers.Dense(2, name="tokens")(hidden)
    summed = keras.layers.GlobalAveragePooling1D()(hidden)
    classes = keras.layers.Dense(3, name="classes")(summed)
    return keras.Model(inputs, {"tokens": tokens, "heads": [classes]})


def tagger():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(4, 3),
            keras.layers.Dense(4, "softmax"),
        ]
    )


def adding(term):
    return lambda: mlp(layers=[Adds(term)])


TARGETS = RNG.normal(size=(EXAMPLES, 3)).astype("float32")
TWO = {
    "tokens": RNG.normal(size=(EXAMPLES, 5, 2)).astype("float32"),
    "heads": [TARGETS],
}
# What is trained, by which losses, on what data.
CASES = {
    "contrastive": (mlp, contrast, [largest], (X, Y)),
    "dice": (lambda: mlp("sigmoid"), keras.losses.Dice(), [], (X, SEGMENTS)),
    "tversky": (
        lambda: mlp("sigmoid"),
        keras.losses.Tversky(),
        [largest],
        (X, SEGMENTS),
    ),
    "sum": (
        mlp,
        keras.losses.MeanSquaredError(reduction="sum"),
        ["mae"],
        (X, TARGETS),
    ),
    "weighted": (
        mlp,
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        [],
        (X, TARGETS, WEIGHTS),
    ),
    "own": (OwnLoss, None, [], (X, Y, WEIGHTS)),
    "masked mean": (tagger, masked_mean, [], (TOKENS, TOKENS)),
    "outputs": (
        two_headed,
        {
            "tokens": "mse",
            "heads": [keras.losses.MeanSquaredError(reduction="sum")],
        },
        [],
        (TOKENS, TWO),
    ),
    "mean added": (adding(lambda x: ops.mean(x**2)), "mse", [], (X, TARGETS)),
    "sum added": (adding(lambda x: ops.sum(x**2)), "mse", [], (X, TARGETS)),
    "added for each": (
        adding(lambda x: ops.sum(x**2, -1)),
        "mse",
        [],
        (X, TARGETS),
    ),
}
if BACKEND == "tensorflow":
    # (Keras itself fails for lists in dicts there.)
    TWO = {**TWO, "heads": TARGETS}

    def two_headed_flat():
        model = two_headed()
        outputs = dict(model.output)
        return keras.Model(
            model.input, {**outputs, "heads": outputs["heads"][0]}
        )

    losses = CASES["outputs"][1]
    CASES["outputs"] = (
        two_headed_flat,
        {**losses, "heads": losses["heads"][0]},
        [],
        (TOKENS, TWO),
    )


@pytest.fixture(autouse=True)
def fed():
    """Lets the next test begin with enough memory."""
    Hungry.feed(None)
    gc.freeze()
    yield
    gc.unfreeze()
    Hungry.feed(None)


def compiled(make, loss, metrics=(), optimizer=None, **options):
    keras.utils.set_random_seed(0)
    model = make()
    optimizer = optimizer or keras.optimizers.Adam(0.01, epsilon=1e-3)
    model.compile(optimizer, loss, metrics=list(metrics) or None, **options)
    return model


def fit(model, data, way, *, whole=True, epochs=2, **options):
    """A fit, by `steps`, by a size, or as plain large batches."""
    batch_size, callbacks = BATCH, []
    if way == "steps":
        batch_size = MICRO
        callbacks = [
            GradientAccumulationCallback(STEPS, whole_batch_loss=whole)
        ]
    elif way is not None:
        callbacks = [
            GradientAccumulationCallback(
                micro_batch_size=way, whole_batch_loss=whole
            )
        ]
    x, y, weights = (*data, None)[:3]
    run = Run(len(x), MICRO, STEPS, epochs)
    callbacks += options.pop("callbacks", [])
    if not callbacks:
        return fit_large(run, model, x, y, sample_weight=weights, **options)
    history = model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        **{"verbose": 0, **options},
    ).history
    return result_of(model, history)


# Laws 1 to 4, and 10, for all that the other tests know.


@drawn({"tensorflow": 16, "jax": 3, "torch": 60}[BACKEND])
@hypothesis.given(problems(execution=EXECUTIONS[-1], whole_batch_loss=True))
# A single micro-batch, whose mask metrics of JAX must not see.
@hypothesis.example(
    Problem(
        examples=2,
        micro_batch=4,
        kind="mask",
        whole_batch_loss=True,
        execution=EXECUTIONS[-1],
    )
)
def test_whole_losses_train_as_the_large_batch(problem):
    """Laws 1 to 4, for whole problems drawn at random."""
    check(problem)


FEW = {"tensorflow": 4, "jax": 6, "torch": 1}[BACKEND]


@needs_compiling
@pytest.mark.parametrize(
    ("name", "execution"),
    [
        *itertools.product(list(ARCHITECTURES)[1::FEW], COMPILED[:1]),
        *itertools.product(["sum-regularized"], COMPILED[1:]),
        *at_night(itertools.product(ARCHITECTURES, COMPILED)),
    ],
)
@drawn({"tensorflow": 4, "jax": 1, "torch": 1}[BACKEND])
@hypothesis.given(data=st.data())
def test_compiled_whole_losses_train_as_the_large_batch(name, execution, data):
    """Laws 1 and 10: compiled once for all runs."""
    fields = {**ARCHITECTURES[name], "execution": execution}
    check(data.draw(runs_of(fields, whole_batch_loss=True)))


# Losses that micro-batches alone cannot have.

# Each in some way, all in all ways at night.
SOME = [
    (name, EXECUTIONS[i % len(EXECUTIONS)], WAYS[i % 2])
    for i, name in enumerate(CASES)
]
SOME += at_night(itertools.product(CASES, EXECUTIONS, WAYS))


@pytest.mark.parametrize(("name", "execution", "way"), SOME)
def test_any_loss_is_that_of_the_large_batch(name, execution, way):
    """Weights, optimizer state and all numbers of the log."""
    make, loss, metrics, data = CASES[name]
    options = compile_options(execution)
    mine = fit(compiled(make, loss, metrics, **options), data, way)
    truth = fit(compiled(make, loss, metrics, **options), data, None)
    assert_same(Problem(steps=STEPS), mine, truth)


@pytest.mark.filterwarnings("ignore:A loss must be", "ignore:Losses that")
def test_micro_batches_alone_are_not():
    """What the option is for."""
    for name in ("contrastive", "dice", "tversky", "masked mean"):
        make, loss, metrics, data = CASES[name]
        model = compiled(make, loss, metrics, run_eagerly=True)
        parts = fit(model, data, 5, whole=False)
        model = compiled(make, loss, metrics, run_eagerly=True)
        with pytest.raises(AssertionError):
            assert_same(Problem(steps=STEPS), parts, fit(model, data, None))


LOSSES = sorted(
    name
    for name, kind in vars(keras.losses).items()
    if isinstance(kind, type)
    and issubclass(kind, keras.losses.Loss)
    and name not in ("Loss", "CTC")
)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_keras(name):
    """One update of each, eagerly."""
    targets = np.abs(TARGETS) if name != "CategoricalHinge" else SEGMENTS
    if "Sparse" in name or name in (
        "Circle",
        "CategoricalGeneralizedCrossEntropy",
    ):
        targets = Y
    elif "entropy" in name.lower() or name in ("Dice", "Tversky"):
        targets = SEGMENTS
    loss = getattr(keras.losses, name)()
    results = []
    for way in (6, None):
        model = compiled(lambda: mlp("sigmoid"), loss, run_eagerly=True)
        results.append(fit(model, (X[:16], targets[:16]), way, epochs=1))
    assert_same(Problem(steps=STEPS), *results)


def test_no_warning_is_given(recwarn):
    """Of a loss that is exact so; and the other warnings name the option."""
    make, loss, metrics, data = CASES["contrastive"]
    fit(compiled(make, loss, metrics, run_eagerly=True), data, 5)
    assert not [w for w in recwarn if "loss" in str(w.message)]
    with pytest.warns(UserWarning, match="With `whole_batch_loss=True` it is"):
        model = compiled(make, loss, metrics, run_eagerly=True)
        fit(model, data, 5, whole=False)


@only_on("tensorflow", "torch", reason="nothing of float16 on its processor")
def test_half_precision_is_scaled_as_the_large_batch():
    """Under `mixed_float16` with its own `LossScaleOptimizer`."""
    results = []
    for way in (4, None):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            # (Keras on TensorFlow cannot add terms of float16.)
            model = compiled(
                lambda: mlp(term=None),
                "mse",
                optimizer=keras.optimizers.SGD(0.1),
            )
        finally:
            keras.config.set_dtype_policy("float32")
        results.append(fit(model, (X, TARGETS), way))
    problem = Problem(steps=STEPS, policy="mixed_float16")
    assert_same(problem, *results)


# What a model draws and moves: as without the option.


@pytest.mark.parametrize(
    ("execution", "way"),
    [(EXECUTIONS[0], "steps"), (EXECUTIONS[-1], 5)],
)
def test_what_layers_draw_and_move_is_as_without(execution, way):
    """Dropout, averages of `BatchNormalization`, a counter, seeds: once."""
    results = []
    for whole in (True, False):
        model = compiled(
            lambda: mlp(layers=stateful()), "mse", **compile_options(execution)
        )
        with pytest.warns(UserWarning, match="assigned once a micro-batch"):
            results.append(fit(model, (X, TARGETS), way, whole=whole))
    assert_same(Problem(steps=STEPS), *results)


@only_on("torch", reason="modules of PyTorch")
def test_modules_of_pytorch_draw_the_same_again():
    """Their generator and their buffers are set back, too."""
    import torch

    class Wrapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = keras.layers.TorchModuleWrapper(
                torch.nn.Sequential(
                    torch.nn.Linear(6, 8),
                    torch.nn.Dropout(0.4),
                    torch.nn.BatchNorm1d(8),
                    torch.nn.Linear(8, 3),
                )
            )

        def call(self, inputs, training=None):
            return self.body(inputs, training=training)

    results = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = compiled(Wrapped, "mse")
        with pytest.warns(UserWarning, match="assigned once a micro-batch"):
            result = fit(model, (X, TARGETS), 4, whole=whole, epochs=1)
        buffers = dict(model.named_buffers())
        results.append((result, {k: v.clone() for k, v in buffers.items()}))
    (mine, of_mine), (truth, of_truth) = results
    assert_same(Problem(steps=STEPS), mine, truth)
    assert of_mine
    for name, buffer in of_mine.items():
        assert torch.allclose(buffer, of_truth[name], rtol=1e-5), name


# "auto", and what is left behind.


@pytest.mark.parametrize(
    ("execution", "fails_in"),
    [
        (EXECUTIONS[0], "backward"),
        (EXECUTIONS[-1], "forward"),
        *at_night(itertools.product(EXECUTIONS, ["forward", "backward"])),
    ],
)
def test_auto_finds_a_size_and_takes_back(execution, fails_in):
    """Nothing that a failed attempt touched is seen in the result."""
    if (BACKEND, execution) == ("tensorflow", "xla"):
        pytest.skip("XLA runs no functions of the host")

    def model():
        layers = [Hungry(), *stateful()]
        return compiled(
            lambda: mlp(layers=layers),
            contrast,
            [largest],
            **compile_options(execution),
        )

    Hungry.feed(4, fails_in)
    callback = GradientAccumulationCallback(
        micro_batch_size="auto", whole_batch_loss=True
    )
    results = []
    data = (X, Y.astype("float32"))
    with pytest.warns(UserWarning, match="assigned once a micro-batch"):
        results.append(fit(model(), data, None, callbacks=[callback]))
        assert callback.micro_batch_size == 4
        Hungry.feed(None)
        results.append(fit(model(), data, 4))
    assert_same(Problem(steps=STEPS), *results)


def test_an_error_leaves_nothing_behind():
    """The next window, and the next fit, start anew."""

    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 5:
                raise KeyboardInterrupt

    make, loss, metrics, data = CASES["contrastive"]
    model = compiled(make, loss, metrics, **compile_options(EXECUTIONS[0]))
    model.optimizer.build(model.trainable_variables)
    weights = model.get_weights()
    state = [v.numpy() for v in model.optimizer.variables]
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, "steps", callbacks=[Fails()])
    model.set_weights(weights)
    for variable, value in zip(model.optimizer.variables, state):
        variable.assign(value)
    twin = compiled(make, loss, metrics, **compile_options(EXECUTIONS[0]))
    assert_same(
        Problem(steps=STEPS),
        fit(model, data, "steps"),
        fit(twin, data, None),
    )


def test_the_log_stands_still_inside_of_a_window():
    """It has whole windows only; before the first one of an epoch, nothing."""
    seen = []

    class Sees(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(dict(logs or {}))

    make, loss, metrics, data = CASES["contrastive"]
    model = compiled(make, loss, metrics, **compile_options(EXECUTIONS[-1]))
    result = fit(model, data, "steps", epochs=2, callbacks=[Sees()])
    assert seen[:3] == seen[11:14] == [{}] * 3
    assert seen[3] == seen[4] != {}
    assert seen[7].keys() == result.history.keys()
    # An epoch that is one short window.
    few = tuple(array[:6] for array in data)
    history = fit(model, few, "steps", epochs=1).history
    assert history.keys() == result.history.keys()


def test_updates_and_plain_fits():
    """`on_update` counts; `steps=1` is Keras's own; a copy keeps the option."""
    updates = []
    callback = GradientAccumulationCallback(
        {0: 1, 1: 4}, whole_batch_loss=True, on_update=updates.append
    )
    assert "whole_batch_loss=True" in repr(callback)
    make, loss, metrics, data = CASES["contrastive"]
    model = compiled(make, loss, metrics, run_eagerly=True)
    model.fit(
        *data, batch_size=MICRO, epochs=2, verbose=0, callbacks=[callback]
    )
    assert updates == list(range(1, 15))
    assert int(model.optimizer.iterations) == 14


@needs_sparse
def test_ragged_outputs():
    """They are joined as other arrays are."""
    lengths = RNG.integers(1, 4, EXAMPLES)
    x = tf.RaggedTensor.from_row_lengths(
        tf.range(int(lengths.sum())) % 5, lengths
    )

    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(5, 3)
            self.embedding.build((None,))

        def call(self, inputs):
            return {
                "mean": ops.mean(self.embedding(inputs), axis=1),
                "tokens": inputs,
            }

    y = {"mean": tf.constant(TARGETS), "tokens": tf.constant(TARGETS)}
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    results = []
    for callbacks in (
        [
            GradientAccumulationCallback(
                micro_batch_size=5, whole_batch_loss=True
            )
        ],
        [],
    ):
        model = compiled(
            Ragged,
            {"mean": "mse", "tokens": None},
            optimizer=keras.optimizers.SGD(0.1),
        )
        log = model.fit(batches, verbose=0, callbacks=callbacks).history
        results.append(result_of(model, log))
    assert_same(Problem(steps=STEPS), *results)


class Headed(OwnLoss):
    """Moves a centre, and statistics of a layer, in its loss: once a window."""

    def have_more(self):
        self.normalize = keras.layers.BatchNormalization()
        self.normalize.build((None, 3))
        self.centre = self.add_weight(shape=(3,), trainable=False, name="its")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        away = self.normalize(y_pred, training=training) - self.centre
        mean = ops.mean(y_pred, axis=0)
        self.centre.assign(0.9 * self.centre + 0.1 * ops.stop_gradient(mean))
        return ops.mean(away**4) + ops.sum(ops.std(y_pred, axis=0))


@pytest.mark.parametrize("execution", [EXECUTIONS[0], EXECUTIONS[-1]])
def test_what_a_loss_moves_it_moves_once_a_window(execution, recwarn):
    """As with the large batch."""
    results = [
        fit(compiled(Headed, None, **compile_options(execution)), (X, Y), way)
        for way in (5, None)
    ]
    assert_same(Problem(steps=STEPS), *results)
    assert not [w for w in recwarn if "micro-batch" in str(w.message)]


def test_a_metric_of_a_layer_counts_once():
    """The second forward pass moves none."""

    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.total = keras.metrics.Sum(name="total")

        def call(self, inputs):
            self.total.update_state(ops.ones((3,)))
            return inputs

    if BACKEND == "jax":
        pytest.skip("Keras keeps no metric of a layer's call there")
    model = compiled(lambda: mlp(layers=[Counts()]), "mse", run_eagerly=True)
    result = fit(model, (X[:16], TARGETS[:16]), 4, epochs=1)
    assert result.history["total"] == [12.0]


def test_random_numbers_that_cannot_be_drawn_again_are_told():
    """Those of no `SeedGenerator`, and of no generator of PyTorch."""

    class Noise(Watched):
        def call(self, inputs, training=None):
            noise = RNG.normal(size=tuple(inputs.shape))
            return inputs + ops.convert_to_tensor(noise, inputs.dtype)

    model = compiled(lambda: mlp(layers=[Noise()]), "mse", run_eagerly=True)
    with pytest.warns(
        UserWarning,
        match=r"^Layers must compute the same outputs again for "
        r"`whole_batch_loss`: their random numbers must be those of "
        r"`keras\.random` with a `SeedGenerator`\. Received: outputs that "
        r"differ by [\d.]+% of their size, so that this run is not that of the "
        r"large batch\.$",
    ):
        fit(model, (X, TARGETS), 4, epochs=1)


# What is refused.


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            TypeError,
            {"whole_batch_loss": 1},
            "`whole_batch_loss` must be True or False. Received: "
            "whole_batch_loss=1 (int).",
        ),
        (
            ValueError,
            {"whole_batch_loss": True, "weight": "sum"},
            "`weight` must not be given with `whole_batch_loss=True`, where "
            "the loss is computed of the whole batch and micro-batches have no "
            "weight. Received: weight='sum' (str).",
        ),
        (
            ValueError,
            {"whole_batch_loss": True, "skip_nonfinite": True},
            "`skip_nonfinite` must not be given with `whole_batch_loss=True`: "
            "a NaN in one micro-batch is in the one loss of the window, and so "
            "in all its gradients. Received: both. Leave one of them out.",
        ),
    ],
)
def test_arguments_that_exclude_each_other(error, arguments, message):
    """One sentence, and what was received."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        GradientAccumulationCallback(4, **arguments)


def test_a_step_of_ones_own_is_refused():
    """It cannot be taken apart."""

    class Own(keras.Model):
        def train_step(self, *arguments):
            return super().train_step(*arguments)

    inputs = keras.Input((6,))
    model = Own(inputs, keras.layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError,
        match=r"^`whole_batch_loss` must be used with Keras's own "
        r"`train_step`: one of your own cannot be taken apart into outputs and "
        r"loss\. Received: a Own with a `train_step`\. Move what it does into "
        r"`compute_loss`, which is called for the whole batch\.$",
    ):
        fit(model, (X, TARGETS), "steps")


@pytest.mark.parametrize("way", ["steps", 5])
def test_outputs_that_are_not_of_examples_are_refused(way):
    """They could not be joined."""

    class Mean(keras.layers.Layer):
        def call(self, inputs):
            return ops.mean(inputs, axis=0)

    model = compiled(
        lambda: keras.Sequential([mlp(), Mean()]), "mse", run_eagerly=True
    )
    weights = model.get_weights()
    with pytest.raises(
        ValueError,
        match=r"^The outputs of a model must have the examples along their "
        r"first axis to be joined for `whole_batch_loss`\. Received: outputs "
        r"of shapes \(3,\) for \d examples\.$",
    ):
        fit(model, (X, TARGETS), way)
    for mine, before in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(mine, before)


@needs_strategies
def test_several_replicas_are_refused():
    """Their outputs are not gathered."""
    with strategy_of(2).scope():
        model = compiled(mlp, contrast)
        with pytest.raises(
            RuntimeError,
            match=r"^`whole_batch_loss` must be used on one replica: outputs "
            r"are not gathered from several ones\. Received: a model of 2 "
            r"replicas\. Use one device, or `keras\.distribution` on JAX\.$",
        ):
            fit(model, (X, Y), "steps")


@only_on("jax", reason="`keras.distribution` is of JAX")
@pytest.mark.parametrize("way", ["steps", 4])
def test_devices_of_jax_have_the_whole_loss(way):
    """Of the examples of all devices."""
    make, loss, metrics, data = CASES["contrastive"]
    data = tuple(array[:32] for array in data)
    truth = fit(compiled(make, loss, metrics), data, None)
    from kaccum.backends.jax import device_names

    distribution = keras.distribution.DataParallel(devices=device_names(2))
    keras.distribution.set_distribution(distribution)
    try:
        mine = fit(compiled(make, loss, metrics), data, way)
    finally:
        keras.distribution.set_distribution(None)
    assert_same(Problem(steps=STEPS), mine, truth)
