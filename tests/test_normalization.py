"""Batch normalisation: moving statistics advance once an update."""

import contextlib
import functools
import itertools
import subprocess
import sys

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from kaccum import GradientAccumulationCallback, accumulate
from kaccum.patches import Patch
from kaccum.sums.moments import LayerMoments, Moments
from tests.backends import (
    BACKEND,
    eagerly,
    needs_compiling,
    needs_graphs,
    needs_strategies,
    of_unknown_length,
    only_on,
    tf,
)
from tests.layers import Hungry
from tests.profiles import at_night, drawn
from tests.recorders import Stop, is_equal
from tests.reference import set_values, strategy_of, values_of

BatchNormalization = keras.layers.BatchNormalization
FEATURES = 3
# Where Keras takes a variance for the mean of squares less the squared mean
# (3.15), that of a batch loses digits if its mean is large.
LARGE_MEAN = 50 if BACKEND == "tensorflow" else 2


def data(examples, shape=(FEATURES,), seed=0):
    """Features whose means are much larger than their deviations."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, *shape)) * [0.5, 1.0, 2.0]
    x += [LARGE_MEAN, 0, -LARGE_MEAN / 5]
    return x.astype("float32"), rng.normal(size=(examples, 1)).astype("float32")


def model_of(first, shape=(FEATURES,), **options):
    """A compiled model that begins with the given layers."""
    keras.utils.set_random_seed(0)
    layers = [*first, keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input(shape), *layers])
    model.compile(keras.optimizers.SGD(1e-3), "mse", **options)
    return model


def fit(model, x, y, batch_size, *callbacks, epochs=2, **options):
    """Trains without shuffling; returns the model."""
    model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    )
    return model


def statistics_of(model):
    """The moving means and variances of all layers."""
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalization):
            found += [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
    return found


def assert_close(model, truth):
    """To rounding: a mean of 50 is known to 3e-6 in float32."""
    mine, true = statistics_of(model), statistics_of(truth)
    assert len(mine) == len(true) > 0
    for m, t in zip(mine, true):
        np.testing.assert_allclose(m, t, rtol=2e-5, atol=2e-5)


# How a layer may be compiled; those of another shape, momentum or options.
LAYERS = [
    (0.0, (FEATURES,), {}),
    (0.9, (2, 4, FEATURES), {"run_eagerly": True}),
    (1.0, (FEATURES,), {"run_eagerly": True}),
    *{
        "tensorflow": [
            (0.5, (2, 4, FEATURES), {"jit_compile": True}),
            (0.99, (FEATURES,), {"steps_per_execution": 3}),
        ],
        "jax": [(0.99, (FEATURES,), {"steps_per_execution": 3})],
        "torch": [(0.5, (2, 4, FEATURES), {}), (0.99, (FEATURES,), {})],
    }[BACKEND],
]


WAYS = {
    "tensorflow": ["jit_compile", "run_eagerly", "steps_per_execution"],
    "jax": ["run_eagerly", "steps_per_execution"],
    "torch": [],
}[BACKEND]
EVERY_LAYER = itertools.product(
    [0.0, 0.5, 0.9, 0.99, 1.0],
    [(FEATURES,), (2, 4, FEATURES)],
    [{}, *({way: 3 if "steps" in way else True} for way in WAYS)],
)


@functools.cache
def lent(role, momentum, shape, options=()):
    """A model that is lent again and again in a role, and its first state."""
    layer = BatchNormalization(momentum=momentum)
    model = model_of([layer], shape, **dict(options))
    model.optimizer.build(model.trainable_variables)
    return model, values_of(model)


@pytest.mark.parametrize(
    "momentum, shape, options", [*LAYERS, *at_night(EVERY_LAYER)], ids=str
)
@drawn({"tensorflow": 5, "jax": 3, "torch": 20}[BACKEND])
@hypothesis.given(
    examples=st.integers(1, 30),
    micro_batch=st.integers(1, 6),
    steps=st.integers(2, 6),
    is_cut=st.booleans(),
)
def test_statistics_of_a_first_layer_are_the_large_batchs(
    momentum, shape, options, examples, micro_batch, steps, is_cut
):
    """For every data set size, window and momentum."""
    x, y = data(examples, shape)
    large = micro_batch * steps
    model, first = lent("model", momentum, shape, tuple(options.items()))
    truth, _ = lent("truth", momentum, shape, (("run_eagerly", True),))
    for each in (model, truth):
        set_values(each, first)
    if is_cut:
        ours = GradientAccumulationCallback(micro_batch_size=micro_batch)
        fit(model, x, y, large, ours)
    else:
        fit(model, x, y, micro_batch, GradientAccumulationCallback(steps))
    assert_close(model, fit(truth, x, y, large))


class Subclass(BatchNormalization):
    """Leaves the statistics as they are."""

    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training, mask=mask)


class Twice(keras.layers.Layer):
    """Calls a layer on its inputs and on their squares."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs) + self.layer(inputs * inputs)


def nested():
    inner = keras.Sequential([BatchNormalization(momentum=0.7)])
    return [keras.Sequential([inner])]


@pytest.mark.parametrize(
    "first",
    [
        nested,
        lambda: [Subclass(momentum=0.6)],
        lambda: [Twice(BatchNormalization(momentum=0.5))],
        pytest.param(
            lambda: [BatchNormalization(synchronized=True)],
            marks=needs_strategies,
        ),
        lambda: [BatchNormalization(dtype="mixed_float16", momentum=0.5)],
        lambda: [BatchNormalization(scale=False, center=False, momentum=0.5)],
        lambda: [BatchNormalization(trainable=False)],
    ],
    ids="nested subclass shared synchronized half bare frozen".split(),
)
def test_every_kind_of_layer(first):
    """Wherever the layer stands, and however often it is called."""
    x, y = data(22)
    model = fit(model_of(first()), x, y, 4, GradientAccumulationCallback(3))
    # (Compiled, too: XLA may leave out that an input is rounded to float16.)
    assert_close(model, fit(model_of(first()), x, y, 12))


@only_on("tensorflow", "torch", reason="nothing depends on values")
def test_a_layer_that_is_not_called_keeps_its_statistics():
    """In a whole window: it saw nothing, not zeros."""

    class Sometimes(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalization = BatchNormalization(momentum=0.5)

        def build(self, shape):
            self.normalization.build(shape)

        def compute_output_shape(self, shape):
            return shape

        def call(self, inputs, training=None):
            is_symbolic = isinstance(inputs, keras.KerasTensor)
            if not is_symbolic and float(keras.ops.max(inputs)) > 1000:
                return inputs
            return self.normalization(inputs, training=training)

    x, y = data(24)
    # Not in the second window, nor in half of the third.
    x[8:20] = 2000.0
    kept = np.r_[0:8, 20:24]
    model = model_of([Sometimes()], run_eagerly=True)
    fit(model, x, y, 4, GradientAccumulationCallback(2), epochs=1)
    truth = eagerly(model_of([BatchNormalization(momentum=0.5)]))
    fit(truth, x[kept], y[kept], 8, epochs=1)
    assert_close(model, truth)


def test_one_axis_of_many():
    """Features along another axis than the last one."""
    x, y = data(22, (4, FEATURES))
    x = np.swapaxes(x, 1, 2)

    def build():
        return model_of([BatchNormalization(axis=1, momentum=0.5)], (3, 4))

    model = fit(build(), x, y, 4, GradientAccumulationCallback(3))
    assert_close(model, fit(eagerly(build()), x, y, 12))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"jit_compile": True}, marks=needs_compiling)],
)
def test_masked_elements_do_not_count(options):
    """Each micro-batch counts by its unmasked elements."""
    x, y = data(22, (5, FEATURES))
    lengths = np.random.default_rng(1).integers(0, 6, 22)
    x[np.arange(5) >= lengths[:, None]] = 0.0
    y = np.repeat(y[:, None], 5, axis=1)

    def build():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5, FEATURES))
        masked = keras.layers.Masking()(inputs)
        outputs = BatchNormalization(momentum=0.5)(masked)
        model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
        model.compile(keras.optimizers.SGD(1e-3), "mse", **options)
        return model

    model = fit(build(), x, y, 4, GradientAccumulationCallback(3))
    assert_close(model, fit(eagerly(build()), x, y, 12))


def test_statistics_are_still_inside_a_window():
    """Bit for bit; they change with the update."""
    x, y = data(20)
    seen = []

    class Sees(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(statistics_of(self.model))

    model = model_of([BatchNormalization()])
    fit(model, x, y, 4, GradientAccumulationCallback(2), Sees(), epochs=1)
    same = [is_equal(a, b) for a, b in zip(seen, seen[1:])]
    assert same == [False, True, False, True]


def test_inference_leaves_statistics_alone():
    """`training=False`, as in fine-tuning."""

    class Frozen(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalization = BatchNormalization()

        def call(self, inputs):
            return self.normalization(inputs, training=False)

    model = model_of([Frozen()])
    before = statistics_of(model)
    fit(model, *data(20), 4, GradientAccumulationCallback(2))
    assert is_equal(before, statistics_of(model))


class Unbiased(BatchNormalization):
    """Has moments of its own."""

    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        return mean, 2.0 * variance


class Replaced(BatchNormalization):
    """Moves averages as it likes."""

    def call(self, inputs, training=None, mask=None):
        mean, _ = self._moments(inputs, mask)
        self.moving_mean.assign(0.5 * self.moving_mean + 0.5 * mean)
        return inputs - mean


@pytest.mark.parametrize(
    "make",
    [Unbiased, Replaced, lambda: BatchNormalization(renorm=True)],
    ids=["moments", "call", "renorm"],
)
def test_what_cannot_be_read_is_left_alone(make):
    """And said once."""
    try:
        model, plain = model_of([make()]), model_of([make()])
    except ValueError:
        pytest.skip("Keras 3.12 has no `renorm`.")
    x, y = data(20)
    sentence = "which moves its own. They advance once a micro-batch."
    with pytest.warns(UserWarning, match=sentence) as warned:
        fit(model, x, y, 4, GradientAccumulationCallback(2))
    fit(model, x, y, 4, GradientAccumulationCallback(2))
    assert len([w for w in warned if sentence in str(w.message)]) == 1
    fit(eagerly(plain), x, y, 4, epochs=4)
    assert_close(model, plain)


def test_a_batch_tried_again_counts_once():
    """A failed attempt of "auto" takes back what it pooled."""
    x, y = data(24)

    def build():
        options = {"run_eagerly": True}
        layers = [BatchNormalization(momentum=0.5), Hungry()]
        return model_of(layers, **options)

    auto = GradientAccumulationCallback(micro_batch_size="auto")
    model = build()
    Hungry.feed(6)
    fit(model, x, y, 12, auto, epochs=1)
    assert auto.micro_batch_size == 6
    Hungry.feed(None)
    assert_close(model, fit(eagerly(build()), x, y, 12, epochs=1))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}])
def test_a_nonfinite_micro_batch_is_not_pooled(options):
    """As if it had never come."""
    x, y = data(24)
    bad = np.concatenate([x[:8], np.full((4, FEATURES), np.nan), x[8:]])
    bad_y = np.concatenate([y[:8], y[:4], y[8:]])

    def build():
        return model_of([BatchNormalization(momentum=0.5)], **options)

    skips = GradientAccumulationCallback(7, skip_nonfinite=True)
    model = fit(build(), bad.astype("float32"), bad_y, 4, skips, epochs=1)
    assert skips.skipped_micro_batches == 1
    assert_close(model, fit(eagerly(build()), x, y, 24, epochs=1))


@needs_strategies
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_pool_their_statistics(replicas, synchronized):
    """Also where one has no examples in the last batch."""
    x, y = data(25)

    def build():
        layer = BatchNormalization(momentum=0.5, synchronized=synchronized)
        return model_of([layer])

    with strategy_of(replicas).scope():
        model = build()
    # (In Keras, synchronized moments of a replica without examples are NaN, and
    # lose digits where means are large.)
    n = 24 if synchronized else 25
    x = x - x.mean(axis=0) if synchronized else x
    truth = eagerly(model_of([BatchNormalization(momentum=0.5)]))
    fit(truth, x[:n], y[:n], 12)
    fit(model, x[:n], y[:n], 4, GradientAccumulationCallback(3))
    assert_close(model, truth)


def test_batches_one_by_one():
    """Under `accumulate`."""
    x, y = data(22)
    model = model_of([BatchNormalization(momentum=0.5)])
    with accumulate(model, 3):
        for start in range(0, 22, 4):
            model.train_on_batch(x[start : start + 4], y[start : start + 4])
    truth = eagerly(model_of([BatchNormalization(momentum=0.5)]))
    assert_close(model, fit(truth, x, y, 12, epochs=1))


def test_an_interrupted_window_is_forgotten():
    """Law 5: what was pooled is not the next fit's."""
    x, y = data(24)
    model = model_of([BatchNormalization(momentum=0.5)])

    stops = Stop(1, KeyboardInterrupt())
    ours = GradientAccumulationCallback(3)
    with contextlib.suppress(KeyboardInterrupt):
        fit(model, 9 * x, y, 4, ours, stops)
    fit(model, x, y, 4, GradientAccumulationCallback(3))
    truth = eagerly(model_of([BatchNormalization(momentum=0.5)]))
    assert_close(model, fit(truth, x, y, 12))


def test_files_hold_the_layers_own_variables(tmp_path):
    """Law 6: saved inside a window, it loads without kaccum."""
    x, y = data(20)
    path = str(tmp_path / "{epoch}-{batch}.keras")
    saves = keras.callbacks.ModelCheckpoint(path, save_freq=1)
    model = model_of([BatchNormalization(momentum=0.5)])
    fit(model, x, y, 4, GradientAccumulationCallback(5), saves, epochs=1)
    program = f"""
import sys, warnings
sys.modules["kaccum"] = None
import keras
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")
for batch in (3, 5):
    model = keras.saving.load_model({path!r}.format(epoch=1, batch=batch))
    print(model.layers[0].moving_mean.numpy().tolist(), len(model.variables))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    inside, after = done.stdout.splitlines()
    assert inside == "[0.0, 0.0, 0.0] 6"
    assert not after.startswith("[0.0")


@needs_compiling
def test_nothing_listens_while_a_compiled_step_runs(monkeypatch):
    """A step that is compiled already pays nothing."""
    x, y = data(20)
    entered = []
    enter = Patch.__enter__
    monkeypatch.setattr(
        Patch,
        "__enter__",
        lambda self: entered.append(self._name) or enter(self),
    )
    model = model_of([BatchNormalization()])
    fit(model, x, y, 4, GradientAccumulationCallback(2), epochs=1)
    assert "_moments" in entered
    entered.clear()
    fit(model, x, y, 4, GradientAccumulationCallback(2), epochs=3)
    assert entered == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_an_update(dtype):
    """Also where more elements are counted than half precision can hold."""
    shape = (48, 48, FEATURES)
    x, y = data(48, shape)

    def build():
        layer = BatchNormalization(momentum=0.99, dtype=dtype)
        return model_of([layer], shape)

    def mean_of(model):
        return model.layers[0].moving_mean.numpy().astype("float32")

    model = fit(build(), x, y, 8, GradientAccumulationCallback(4), epochs=9)
    truth = mean_of(fit(eagerly(build()), x, y, 32, epochs=9))
    assert np.all(np.isfinite(truth)) and abs(truth[0]) > LARGE_MEAN / 10
    np.testing.assert_allclose(mean_of(model), truth, rtol=0.02)


def test_data_of_unknown_length_leaves_nothing_in_the_pool():
    """Keras runs a step once more than there are batches (TensorFlow 2.21)."""
    x, y = data(24)

    def dataset(size):
        if BACKEND != "tensorflow":
            parts = range(0, 24, size)
            return of_unknown_length(
                lambda: ((x[i : i + size], y[i : i + size]) for i in parts)
            )
        arrays = tf.data.Dataset.from_tensor_slices((x, y))
        # Its length is not known, the shapes of its batches are.
        arrays = arrays.filter(lambda x, y: True)
        return arrays.batch(size, drop_remainder=True)

    model, truth = (
        model_of([BatchNormalization(momentum=0.5)]) for _ in range(2)
    )
    options = {"epochs": 3, "verbose": 0, "shuffle": False}
    ours = GradientAccumulationCallback(3)
    model.fit(dataset(4), callbacks=[ours], **options)
    truth.fit(dataset(12), **options)
    assert_close(model, truth)


@needs_graphs
@pytest.mark.filterwarnings("ignore:The moving statistics of a layer")
def test_a_function_of_ones_own_is_left_alone():
    """It outlives the fit: its layers move averages after it, too."""

    class Compiled(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalization = BatchNormalization(momentum=0.5)
            self.run = tf.function(self.normalization)

        def build(self, shape):
            self.normalization.build(shape)

        def call(self, inputs, training=None):
            return self.run(inputs, training=bool(training))

    x, y = data(24)
    model, plain = model_of([Compiled()]), model_of([Compiled()])
    with pytest.warns(UserWarning, match="which moves its own"):
        fit(model, x, y, 4, GradientAccumulationCallback(3))
    fit(model, x, y, 4)
    fit(eagerly(plain), x, y, 4, epochs=4)
    assert_close(model, plain)


@needs_graphs
def test_a_layer_inside_of_a_conditional_moves_its_own():
    """What one branch computes cannot be kept outside of it."""

    class Chosen(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalization = BatchNormalization(momentum=0.5)

        def build(self, shape):
            self.normalization.build(shape)

        def call(self, inputs, training=None):
            return keras.ops.cond(
                keras.ops.mean(inputs) > -1000.0,
                lambda: self.normalization(inputs, training=training),
                lambda: inputs,
            )

    x, y = data(24)
    model, plain = model_of([Chosen()]), model_of([Chosen()])
    with pytest.warns(UserWarning, match="which moves its own"):
        fit(model, x, y, 4, GradientAccumulationCallback(3))
    fit(eagerly(plain), x, y, 4)
    assert_close(model, plain)


def mean_of_means(first, second):
    """Micro-batches count alike."""
    calls, _, mean, variance = first
    more, _, other, others = second
    share = keras.ops.divide_no_nan(more, calls + more)
    return [
        calls + more,
        calls + more,
        mean + (other - mean) * share,
        variance
        + (others - variance) * share
        + (other - mean) ** 2 * share * (1 - share),
    ]


def no_variance_of_means(first, second):
    """Only the mean of the variances."""
    calls, size, mean, variance = first
    more, other_size, other, others = second
    share = keras.ops.divide_no_nan(other_size, size + other_size)
    return [
        calls + more,
        size + other_size,
        mean + (other - mean) * share,
        variance + (others - variance) * share,
    ]


@pytest.mark.parametrize("wrong", [mean_of_means, no_variance_of_means])
def test_wrong_pools_are_caught(wrong, monkeypatch):
    """The law's test can fail."""
    monkeypatch.setattr("kaccum.sums.moments._pooled", wrong)
    x, y = data(14)
    model = model_of([BatchNormalization(momentum=0.5)])
    fit(model, x, y, 4, GradientAccumulationCallback(4), epochs=1)
    truth = eagerly(model_of([BatchNormalization(momentum=0.5)]))
    fit(truth, x, y, 16, epochs=1)
    with pytest.raises(AssertionError):
        assert_close(model, truth)


@drawn(100)
@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99)
)
def test_a_pool_has_the_moments_of_all_elements(sizes, seed):
    """However they are divided."""
    layer = BatchNormalization(momentum=0.0)
    layer.build((None, FEATURES))
    x, _ = data(sum(sizes), seed=seed)
    pool = Moments(layer)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        mean, variance = part.mean(axis=0), part.var(axis=0)
        pool.add(LayerMoments(layer, 0, mean, variance, len(part)), True)
    pool.close(pool.parts())
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    x = x.astype("float64")
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance, x.var(axis=0), rtol=1e-4, atol=1e-5)
