"""`log_gradients`: the norm of gradients, and the gradient noise scale."""

import csv
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from keras import layers, ops

from kaccum import GradientAccumulationCallback
from kaccum.backends import backend
from kaccum.sums.gradients import GradientSums
from kaccum.sums.noise import DECAY
from tests import reference
from tests.backends import BACKEND, EXECUTIONS, compile_options, only_on
from tests.profiles import at_night, drawn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(62, 5)).astype("float32")
Y = (X @ RNG.normal(size=(5, 2)) + RNG.normal(size=(62, 2))).astype("float32")
SIZE = 4
NAMES = ["gradient_norm", "noise_scale"]


# By the definition, from the gradient of each micro-batch by itself.


def of_equal(b, gradients):
    """Signal and noise as McCandlish et al. write them."""
    B = b * len(gradients)
    s = np.mean([np.sum(g**2) for g in gradients])
    l = np.sum(np.mean(gradients, axis=0) ** 2)  # noqa: E741
    return (B * l - b * s) / (B - b), (s - l) / (1 / b - 1 / B)


def of_weights(weights, examples, gradients):
    """The same, where micro-batches differ in weight."""
    weights = np.asarray(weights, "float64")
    mean = np.average(gradients, axis=0, weights=weights)
    spread = sum(
        w * np.sum((g - mean) ** 2) for w, g in zip(weights, gradients)
    )
    each = spread / (len(gradients) - 1) / weights.sum()
    return np.sum(mean**2) - each, each * sum(examples)


@functools.cache
def sums_of_one_variable():
    """Sums that measure, and the variable."""
    variable = keras.Variable(np.zeros(3, "float32"))
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build([variable])
    square_of = functools.partial(backend().squared_norm, is_xla=False)
    sums = GradientSums(optimizer, optimizer.apply, square_of=square_of)
    return sums, variable


def measured(weights, examples, gradients):
    """What kaccum says of a window: square, signal, noise, whether."""
    sums, variable = sums_of_one_variable()
    for weight, count, gradient in zip(weights, examples, gradients):
        gradient = ops.convert_to_tensor(gradient, "float32")
        weight = float(weight)
        sums.add([gradient], [variable], weight, examples=float(count))
    found = sums.close(backend().sum_over_replicas(sums.parts()))
    sums.empty()
    return [float(value) for value in found]


GRADIENTS = st.lists(
    st.lists(st.integers(-8, 8), min_size=3, max_size=3),
    min_size=2,
    max_size=6,
)


@drawn(100)
@hypothesis.given(GRADIENTS, st.integers(1, 9))
def test_equal_micro_batches_are_measured_as_the_paper_does(gradients, b):
    """Of whole numbers: to rounding of the last steps only."""
    gradients = np.array(gradients, "float64")
    signal, noise = of_equal(b, gradients)
    counts = [b] * len(gradients)
    square, *found, is_known = measured(counts, counts, gradients)
    assert is_known == 1.0
    size = np.sum(gradients**2) + 1e-9
    mean = np.mean(gradients, axis=0)
    np.testing.assert_allclose(square, np.sum(mean**2), atol=1e-6 * size)
    np.testing.assert_allclose(found[0], signal, atol=1e-6 * size)
    np.testing.assert_allclose(found[1], noise, atol=1e-6 * size * b * 6)


@drawn(50)
@hypothesis.given(GRADIENTS, st.data())
def test_unequal_micro_batches_are_measured_by_their_weights(gradients, draw):
    """As the spread around the window's gradient."""
    gradients = np.array(gradients, "float64")
    sizes = st.lists(
        st.integers(1, 9), min_size=len(gradients), max_size=len(gradients)
    )
    weights, examples = draw.draw(sizes), draw.draw(sizes)
    found = measured(weights, examples, gradients)[1:3]
    size = np.sum(gradients**2) + 1e-9
    np.testing.assert_allclose(
        found,
        of_weights(weights, examples, gradients),
        atol=1e-6 * size * sum(examples),
    )


@pytest.mark.parametrize("weights", [[2, 2, 2], [1, 4, 2], [8, 1, 1, 1]])
def test_the_estimate_is_unbiased(weights):
    """On average over all signs of the chance it is the truth, exactly."""
    gradient, noise = np.array([1.0, -2.0, 0.5]), 3.0
    directions = RNG.normal(size=(len(weights), 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = []
    for signs in itertools.product([-1, 1], repeat=len(weights)):
        chance = [
            sign * np.sqrt(noise / weight) * direction
            for sign, weight, direction in zip(signs, weights, directions)
        ]
        found.append(measured(weights, weights, gradient + chance)[1:3])
    np.testing.assert_allclose(
        np.mean(found, axis=0), [np.sum(gradient**2), noise], rtol=1e-5
    )


def test_micro_batches_of_nothing_do_not_count():
    """One that is all masked has no gradient, and says nothing."""
    gradients = [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    found = measured([2, 2, 2.0**-40], [2, 2, 0], gradients)
    expected = of_equal(2, np.array(gradients[:2]))
    np.testing.assert_allclose(found[1:3], expected, rtol=1e-5)


@pytest.mark.parametrize("is_xla", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_the_squared_norm_is_that_of_all_elements(kind, is_xla):
    """Whatever is faster: of large and small ones, in odd shapes."""
    shapes = [(), (3,), (300, 301), (2, 3, 4), (1 << 17,), (75_001,)]
    arrays = [RNG.normal(size=shape).astype(kind) for shape in shapes]
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    tensors.append(ops.transpose(tensors[2]))
    arrays.append(arrays[2])
    truth = sum(np.sum(array.astype("float64") ** 2) for array in arrays)
    found = backend().squared_norm(tensors, is_xla=is_xla)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(float(found), truth, rtol=1e-5)
    assert float(backend().squared_norm([], is_xla=is_xla)) == 0.0


@only_on("tensorflow", "torch", reason="JAX needs the scope of a step")
def test_half_precision_beside_terms_that_count_once():
    """Of a sum: the gradient is rounded, and what is taken from it is not."""
    variable = keras.Variable(np.ones(3), dtype="bfloat16")
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build([variable])
    square_of = functools.partial(backend().squared_norm, is_xla=False)
    sums = GradientSums(optimizer, optimizer.apply, square_of=square_of)
    gradient = ops.convert_to_tensor([3.0, 4.0, 2.0], "bfloat16")
    for _ in range(2):
        # The gradient of the term is 2 everywhere, in each of them.
        once = [lambda: ops.sum(ops.square(variable))]
        sums.add([gradient], [variable], None, once=once, examples=1.0)
    found = sums.close(backend().sum_over_replicas(sums.parts()))
    # Of data 1, 2, 0 each: there is no noise; the term counts once.
    square, signal, noise, _ = (float(value) for value in found)
    np.testing.assert_allclose(square, 4.0**2 + 6.0**2 + 2.0**2)
    np.testing.assert_allclose([signal, noise], [square / 4.0, 0.0], atol=1e-6)


# In `fit`, at weights that do not move.


@functools.cache
def build(loss="mse", regularizer=None, execution="graph", count=1):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(3, "tanh", kernel_regularizer=regularizer),
            layers.Dense(2),
        ]
    )
    # What the optimizer clips is measured before.
    model.compile(
        keras.optimizers.SGD(0.0, clipnorm=1e-3),
        loss,
        **compile_options(execution, count),
    )
    return model


def fit(model, size=SIZE, epochs=2, x=X, callbacks=(), **arguments):
    callback = GradientAccumulationCallback(log_gradients=True, **arguments)
    log = model.fit(
        x,
        Y[: len(x)],
        size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback, *callbacks],
    ).history
    return log, callback


def gradient_of(model, rows):
    """That of the loss of some examples, by a step of Keras's own."""
    twin = keras.models.clone_model(model)
    twin.compile(keras.optimizers.SGD(1.0), model.loss)
    twin.set_weights(model.get_weights())
    twin.train_on_batch(X[rows], Y[rows])
    pairs = zip(model.get_weights(), twin.get_weights())
    return np.concatenate([np.ravel(a - b) for a, b in pairs]).astype("f8")


@functools.cache
def expected(loss, regularizer, steps, size=SIZE):
    """Mean norm, and the averages of signal and noise, after two epochs."""
    model = build(loss, regularizer)
    norms, signal, noise = [], 0.0, 0.0
    is_sum = loss is SUM
    for start in range(0, len(X), size * steps):
        rows = np.arange(len(X))[start : start + size * steps]
        parts = np.split(rows, range(size, len(rows), size))
        whole = gradient_of(model, rows)
        norms.append(np.linalg.norm(whole))
        counts = [len(part) for part in parts]
        gradients = [gradient_of(model, part) for part in parts]
        if is_sum:
            first, *others = model.get_weights()
            share = 2.0 * WEIGHT if regularizer else 0.0
            shared = [share * first, *(0.0 * other for other in others)]
            shared = np.concatenate([np.ravel(each) for each in shared])
            gradients = [(g - shared) / n for g, n in zip(gradients, counts)]
            whole = whole / len(rows)
        if len(parts) > 1:
            _, found = of_weights(counts, counts, gradients)
            norms_of = np.sum(whole**2) - found / len(rows)
            signal += (1 - DECAY) * (norms_of - signal)
            noise += (1 - DECAY) * (found - noise)
    return np.mean(norms), noise / signal if steps > 1 else np.nan


# Of a sum, each micro-batch has it whole: it must be of some size to be seen.
WEIGHT = 3.0
REGULARIZER = keras.regularizers.L2(WEIGHT)
SUM = keras.losses.MeanSquaredError(reduction="sum")


def assert_expected(log, loss="mse", regularizer=None, steps=4):
    norm, scale = expected(loss, regularizer, steps)
    np.testing.assert_allclose(log["gradient_norm"], [norm] * 2, rtol=1e-4)
    # After the second epoch the averages are other ones, their ratio is not.
    first = log["noise_scale"][0]
    np.testing.assert_allclose(first, scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("execution", "count"),
    [
        *((each, 1) for each in EXECUTIONS),
        (EXECUTIONS[0], 3),
        *at_night(itertools.product(EXECUTIONS, [3])),
    ],
)
def test_the_log_has_norm_and_noise_scale(execution, count):
    """Of each epoch, the last window of which is short; whatever is clipped."""
    model = build(execution=execution, count=count)
    log, callback = fit(model, steps=4)
    assert_expected(log)
    assert sorted(log) == sorted(["loss", *NAMES])
    now = callback.gradients
    np.testing.assert_allclose(now.scale, now.noise / now.signal)
    np.testing.assert_allclose(now.scale, log["noise_scale"][-1], rtol=1e-5)


@pytest.mark.parametrize("loss", ["mse", SUM])
def test_a_regularizer_is_signal(loss):
    """It is in the gradient of each micro-batch, or once in that of a sum."""
    log, _ = fit(build(loss, REGULARIZER), steps=4)
    assert_expected(log, loss, REGULARIZER)


def test_a_batch_that_is_cut_is_measured_alike():
    """With `micro_batch_size`; the cut is even here."""
    log, _ = fit(build(), 4 * SIZE, x=X[:48], micro_batch_size=SIZE)
    other, _ = fit(build(), x=X[:48], steps=4)
    for name in NAMES:
        np.testing.assert_allclose(log[name], other[name], rtol=1e-4)


def test_windows_of_one_micro_batch_have_no_scale():
    """Their norm is logged, also where all windows are such ones."""
    log, callback = fit(build(), steps=1)
    norm, _ = expected("mse", None, 1)
    np.testing.assert_allclose(log["gradient_norm"], norm, rtol=1e-4)
    assert np.isnan(log["noise_scale"]).all()
    assert np.isnan(callback.gradients).all()


def test_an_epoch_of_such_windows_has_no_scale_of_earlier_ones():
    """Nor one that a short window of one micro-batch ends takes it away."""
    log, callback = fit(build(), x=X[:36], steps={0: 4, 1: 1})
    assert np.isfinite(log["noise_scale"][0])
    assert np.isnan(log["noise_scale"][1])
    assert np.isfinite(callback.gradients.scale)


def test_a_fixed_scale_of_the_loss_is_undone():
    """`loss_scale_factor` of an optimizer."""
    logs = []
    for factor in (None, 8.0):
        model = keras.models.clone_model(build())
        model.set_weights(build().get_weights())
        optimizer = keras.optimizers.SGD(0.0, loss_scale_factor=factor)
        model.compile(optimizer, "mse", **compile_options())
        logs.append(fit(model, steps=4)[0])
    for name in NAMES:
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-5)


def test_a_step_with_entries_of_its_own_logs_all_updates():
    """`fit` then shows what the last step returned."""

    class Own(keras.Model):
        def compute_metrics(self, *arguments, **options):
            super().compute_metrics(*arguments, **options)
            return {"mine": ops.ones(())}

    inputs = keras.Input((5,))
    model = Own(inputs, build()(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", **compile_options())
    model.layers[-1].trainable = True
    log, _ = fit(model, steps=4)
    assert "mine" in log
    assert_expected(log)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
def test_a_model_without_weights_has_no_numbers():
    """There is no gradient."""
    model = keras.Sequential([keras.Input((5,)), layers.Dense(2)])
    model.trainable = False
    model.compile(keras.optimizers.SGD(0.0), "mse", **compile_options())
    log, _ = fit(model, steps=4)
    assert np.isnan(log["gradient_norm"]).all()


@pytest.mark.parametrize("policy", ["float64", "bfloat16"])
def test_other_precisions_are_measured_in_float32(policy):
    """Whatever Keras's own numbers are in."""
    if BACKEND == "jax" and policy == "float64":
        pytest.skip("JAX has no float64 by default")
    # Keras adds losses of two dtypes up, which TensorFlow refuses (3.15).
    is_refused = BACKEND == "tensorflow" and policy == "bfloat16"
    regularizer = None if is_refused else REGULARIZER
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(2, kernel_regularizer=regularizer),
            ]
        )
        for loss in ("mse", keras.losses.MeanSquaredError(reduction="sum")):
            model.compile(keras.optimizers.SGD(0.0), loss, **compile_options())
            log, callback = fit(model, steps=4)
            assert np.isfinite(log["gradient_norm"]).all()
            assert np.isfinite(callback.gradients[:2]).all()
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def test_a_signal_that_is_not_positive_gives_no_scale():
    """Pure chance: not a wrong number, and not an infinite one."""
    callback = GradientAccumulationCallback(2, log_gradients=True)
    model = keras.Sequential(
        [keras.Input((1,)), layers.Dense(1, "linear", False, "zeros")]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    y = np.array([[1.0], [-1.0]])
    options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
    log = model.fit(np.ones((2, 1)), y, 1, **options).history
    assert log["gradient_norm"] == [0.0] and np.isnan(log["noise_scale"][0])
    now = callback.gradients
    # Gradients of 2 and -2.
    np.testing.assert_allclose(now[:2], [-4.0, 8.0], rtol=1e-6)
    assert np.isnan(now.scale)


def test_what_a_window_leaves_out_is_not_measured():
    """`skip_nonfinite`: as if it had never come."""
    x, y = X, Y
    bad = np.full_like(x[:SIZE], np.nan)
    logs = []
    for steps, rows in (
        (3, np.concatenate([x[:8], bad, x[8:12]])),
        (2, x[:12]),
    ):
        targets = np.concatenate([y[:8], y[: len(rows) - 12], y[8:12]])
        callback = GradientAccumulationCallback(
            steps, log_gradients=True, skip_nonfinite=True
        )
        options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
        logs.append(build().fit(rows, targets, SIZE, **options).history)
    assert logs[0].pop("skipped_micro_batches") == [1]
    for name in NAMES:
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-5)


def test_known_noise_is_found():
    """A linear model, whose scale is known: to a few parts in a hundred."""
    features, sigma = 4, 2.0
    rng = np.random.default_rng(1)
    away = np.array([[1.0], [0.5], [-1.0], [0.0]])
    x = rng.normal(size=(40_000, features)).astype("float32")
    y = (sigma * rng.normal(size=(len(x), 1)) - x @ away).astype("float32")
    model = keras.Sequential(
        [keras.Input((features,)), layers.Dense(1, "linear", False, "zeros")]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    # The gradient of an example is 2 r x, with r = x.away + chance.
    square = float(np.sum(away**2))
    signal = 4 * square
    noise = 4 * ((features + 1) * square + features * sigma**2)
    callback = GradientAccumulationCallback(10, log_gradients=True)
    model.fit(x, y, 20, verbose=0, callbacks=[callback])
    found = callback.gradients
    np.testing.assert_allclose(found.signal, signal, rtol=0.05)
    np.testing.assert_allclose(found.noise, noise, rtol=0.05)
    np.testing.assert_allclose(found.scale, noise / signal, rtol=0.05)


def test_a_scaled_loss_is_measured_unscaled():
    """`LossScaleOptimizer`; and an update that overflows is none."""
    logs = []
    for scale in (None, 2.0**10, 2.0**127):
        model = keras.models.clone_model(build())
        model.set_weights(build().get_weights())
        optimizer = keras.optimizers.SGD(0.0)
        if scale:
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=scale
            )
        model.compile(optimizer, "mse", **compile_options())
        log, callback = fit(model, x=X[:48], steps=4, epochs=8)
        logs.append([*(log[name][-1] for name in NAMES), *callback.gradients])
        assert (scale == 2.0**127) == (int(model.optimizer.iterations) < 24)
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-4)
    # The last of its epochs had no overflow any more.
    np.testing.assert_allclose(logs[2][0], logs[0][0], rtol=1e-4)
    np.testing.assert_allclose(logs[2][1], logs[0][1], rtol=0.3)


def test_a_loss_of_the_whole_batch_has_a_norm_only():
    """Its micro-batches have no gradients of their own."""
    log, _ = fit(build(), steps=4, whole_batch_loss=True)
    norm, _ = expected("mse", None, 4)
    np.testing.assert_allclose(log["gradient_norm"], [norm] * 2, rtol=1e-4)
    assert np.isnan(log["noise_scale"]).all()
    log, _ = fit(build(), 16, micro_batch_size=4, whole_batch_loss=True)
    np.testing.assert_allclose(log["gradient_norm"], [norm] * 2, rtol=1e-4)


def test_a_mean_beside_a_sum_has_a_norm_only():
    """What is noise depends on the batch's size there."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    model = keras.Model(inputs, [layers.Dense(2)(inputs) for _ in range(2)])
    model.compile(keras.optimizers.SGD(0.0), ["mse", SUM], **compile_options())
    norms = []
    for size, steps in ((4, 4), (16, 1)):
        callback = GradientAccumulationCallback(steps, log_gradients=True)
        options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
        log = model.fit(X, (Y, Y), size, **options).history
        norms.append(log["gradient_norm"])
        assert np.isnan(log["noise_scale"]).all()
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_every_logger_gets_them(tmp_path, capsys):
    """The progress bar and `CSVLogger` do, before and after the callback."""
    path = tmp_path / "log.csv"
    logger = keras.callbacks.CSVLogger(str(path))
    callback = GradientAccumulationCallback(4, log_gradients=True)
    options = {"shuffle": False, "verbose": 2, "callbacks": [logger, callback]}
    log = build().fit(X, Y, SIZE, **options).history
    with path.open() as file:
        (row,) = csv.DictReader(file)
    shown = capsys.readouterr().out
    for name in NAMES:
        np.testing.assert_allclose(float(row[name]), log[name][0], rtol=1e-6)
        assert f"{name}: " in shown


def test_they_can_be_read_at_any_time():
    """`callback.gradients`, inside of a fit and after it."""
    callback = GradientAccumulationCallback(2, log_gradients=True)
    found = [callback.gradients]
    reads = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: found.append(callback.gradients)
    )
    options = {"shuffle": False, "verbose": 0, "callbacks": [callback, reads]}
    build().fit(X[:32], Y[:32], SIZE, **options)
    assert np.isnan(found[:2]).all()
    assert np.isfinite([each[:2] for each in found[2:]]).all()
    assert callback.gradients == found[-1]
    # The next fit starts anew.
    build().fit(X[:4], Y[:4], SIZE, **options)
    assert np.isnan(found[-1]).all() and np.isnan(callback.gradients).all()


@only_on("tensorflow", "torch", reason="Keras loses its train function there")
def test_a_model_compiled_anew_keeps_what_was_measured():
    """In the middle of an epoch: its norm is that of all its updates."""

    def compile_anew(batch, logs):
        if batch == 5:
            model.compile(keras.optimizers.SGD(0.0), "mse")
            model.make_train_function()

    anew = keras.callbacks.LambdaCallback(on_train_batch_end=compile_anew)
    logs = []
    for callbacks in ([], [anew]):
        model = keras.models.clone_model(build())
        model.set_weights(build().get_weights())
        model.compile(keras.optimizers.SGD(0.0), "mse", **compile_options())
        log, _ = fit(model, epochs=1, x=X[:48], steps=2, callbacks=callbacks)
        logs.append(log)
    for name in NAMES:
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-5)


def test_off_nothing_is_measured():
    """No entry, no sum, no number."""
    callback = GradientAccumulationCallback(4)
    model = build()
    options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
    assert list(model.fit(X, Y, SIZE, **options).history) == ["loss"]
    assert callback.gradients is None
    optimizer, square_of = keras.optimizers.SGD(0.0), lambda gradients: 0.0
    assert len(GradientSums(optimizer, None).sums) == 2
    assert len(GradientSums(optimizer, None, square_of=square_of).sums) == 5


@only_on("tensorflow", reason="of `tf.distribute`")
def test_each_replica_has_a_micro_batch():
    """Two replicas are two of them; what all of them measure is logged."""
    logs = []
    for replicas, size, steps in ((2, 2 * SIZE, 2), (1, SIZE, 4)):
        with reference.strategy_of(replicas).scope():
            keras.utils.set_random_seed(0)
            model = keras.models.clone_model(build())
            model.compile(keras.optimizers.SGD(0.0), "mse")
            model.set_weights(build().get_weights())
        logs.append(fit(model, size, x=X[:48], steps=steps)[0])
    for name in NAMES:
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-4)


@only_on("tensorflow", reason="the others have no sparse gradients")
def test_a_row_that_comes_twice_is_squared_as_one():
    """Of an `Embedding`, whose gradients are sparse."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(7, 4),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.array([[1, 1, 2], [2, 2, 2], [1, 3, 3], [1, 1, 1]], "int32")
    callback = GradientAccumulationCallback(4, log_gradients=True)
    options = {"shuffle": False, "verbose": 0, "callbacks": [callback]}
    model.fit(x, Y[:4], 1, **options)
    gradients = []
    for i in range(4):
        twin = keras.models.clone_model(model)
        twin.compile(keras.optimizers.SGD(1.0), "mse")
        twin.set_weights(model.get_weights())
        twin.train_on_batch(x[i : i + 1], Y[i : i + 1])
        pairs = zip(model.get_weights(), twin.get_weights())
        gradients.append(np.concatenate([np.ravel(a - b) for a, b in pairs]))
    signal, noise = of_equal(1, np.array(gradients, "float64"))
    now = callback.gradients
    np.testing.assert_allclose(now[:2], [signal, noise], rtol=1e-4)
