"""`steps` by epoch, and what is told of updates and skipped micro-batches."""

import dataclasses
import functools
import itertools
import warnings

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback
from tests import reference
from tests.backends import (
    EXECUTIONS,
    compile_options,
    needs_graphs,
    only_on,
    tf,
)
from tests.layers import Counted
from tests.profiles import at_night
from tests.reference import MODELS, Problem, build_model, data

BY_EPOCH = {0: 1, 1: 3, 3: 2}
LENGTHS = [1, 3, 3, 2]


def fit_large(problem, lengths, first=0):
    """The truth: one plain fit an epoch, each with its own batch size."""
    model = build_model(problem.truth)
    model.optimizer.build(model.trainable_variables)
    x, y, _ = data(problem)
    history = {}
    for epoch, steps in enumerate(lengths):
        logs = model.fit(
            x,
            y,
            problem.micro_batch * steps,
            initial_epoch=first + epoch,
            epochs=first + epoch + 1,
            shuffle=False,
            verbose=0,
        ).history
        for name, values in logs.items():
            history.setdefault(name, []).extend(values)
    return reference.result_of(model, history)


def fit_micro(problem, steps, model=None, **options):
    callback = GradientAccumulationCallback(steps, **options)
    return reference.fit_micro(problem, model, [callback])


@pytest.mark.parametrize(
    ("execution", "steps_per_execution"),
    [
        (EXECUTIONS[0], 1),
        (EXECUTIONS[0], 3),
        (EXECUTIONS[-1], 1),
        *at_night(itertools.product(EXECUTIONS, [1, 3])),
    ],
)
def test_steps_by_epoch_train_as_large_batches(execution, steps_per_execution):
    """Law 1, epoch by epoch, for a dict and the same as a function."""
    problem = Problem(
        execution=execution, epochs=4, steps_per_execution=steps_per_execution
    )
    large = fit_large(problem, LENGTHS)
    for steps in (BY_EPOCH, LENGTHS.__getitem__):
        micro = fit_micro(problem, steps)
        reference.assert_same(problem, micro, large)


def test_the_first_epoch_is_respected():
    """A fit that starts at epoch 2 starts in the middle of the schedule."""
    problem, asked = Problem(epochs=4), []

    def steps(epoch):
        asked.append(epoch)
        return np.int64(LENGTHS[epoch])

    large = fit_large(problem, LENGTHS[2:], first=2)
    for each in (BY_EPOCH, steps):
        model = build_model(problem)
        x, y, _ = data(problem)
        history = model.fit(
            x,
            y,
            problem.micro_batch,
            initial_epoch=2,
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=[GradientAccumulationCallback(each)],
        ).history
        micro = reference.result_of(model, history)
        reference.assert_same(problem, micro, large)
    assert asked == [2, 3]


BY_UPDATE = {0: 1, 2: 3, 5: 2}


def length_at(updates):
    """What `BY_UPDATE` says, as a function."""
    return 1 if updates < 2 else 3 if updates < 5 else 2


class Windows(keras.utils.PyDataset):
    """The large batches of one epoch, whose windows have these lengths."""

    def __init__(self, problem, updates):
        super().__init__()
        x, y, _ = data(problem)
        self.batches, start = [], 0
        while start < len(x):
            steps = length_at(updates + len(self.batches))
            stop = start + steps * problem.micro_batch
            self.batches.append((x[start:stop], y[start:stop]))
            start = stop

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def fit_windows(problem, updates=0):
    """The truth: one plain fit an epoch, whose batches are the windows."""
    model = build_model(problem.truth)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(updates)
    history = {}
    for epoch in range(problem.epochs):
        batches = Windows(problem, updates)
        logs = model.fit(
            batches,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=0,
        ).history
        updates += len(batches)
        for name, values in logs.items():
            history.setdefault(name, []).extend(values)
    return reference.result_of(model, history)


@pytest.mark.parametrize(
    ("execution", "steps_per_execution"),
    [
        (EXECUTIONS[0], 1),
        (EXECUTIONS[0], 3),
        (EXECUTIONS[-1], 1),
        *at_night(itertools.product(EXECUTIONS, [1, 3])),
    ],
)
def test_steps_by_update_train_as_large_batches(execution, steps_per_execution):
    """Law 1, window by window, for a dict and the same as a function."""
    problem = Problem(
        examples=42,
        execution=execution,
        epochs=3,
        steps_per_execution=steps_per_execution,
    )
    large = fit_windows(problem)
    assert large.iterations == 5 + 6 + 6
    for steps in (BY_UPDATE, length_at):
        micro = fit_micro(problem, steps, by="update")
        reference.assert_same(problem, micro, large)


def test_updates_are_counted_from_those_of_the_optimizer():
    """A run that is resumed goes on in the middle of the schedule."""
    problem = Problem(examples=42, epochs=2)
    large = fit_windows(problem, updates=3)
    model = build_model(problem)
    model.optimizer.iterations.assign(3)
    asked = []

    def steps(updates):
        asked.append(updates)
        return length_at(updates)

    micro = fit_micro(problem, steps, model, by="update")
    reference.assert_same(problem, micro, large)
    # Each when its window opens, and not before.
    assert asked == list(range(3, large.iterations))


@only_on("tensorflow", "torch", reason="Keras loses its train function there")
def test_a_model_compiled_anew_counts_the_updates_of_its_new_optimizer():
    """Windows by update, in the middle of a fit."""
    problem = Problem(examples=40, epochs=1)
    x, y, _ = data(problem)
    asked = []

    def steps(updates):
        asked.append(updates)
        return 2

    def compile_anew(batch, logs):
        if batch == 4:
            model.compile(keras.optimizers.SGD(0.1), model.loss)
            model.make_train_function()

    model = build_model(problem)
    model.optimizer.iterations.assign(7)
    callback = GradientAccumulationCallback(steps, by="update")
    anew = keras.callbacks.LambdaCallback(on_train_batch_end=compile_anew)
    model.fit(x, y, 4, shuffle=False, verbose=0, callbacks=[callback, anew])
    # The window that was open is closed by the optimizer that it had.
    assert asked[:3] == [7, 8, 9] and 0 in asked[3:]


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_window_that_makes_no_update_does_not_count(steps_per_execution):
    """Windows by update where the first one is left out."""
    problem = Problem(examples=24, epochs=1)
    x, y, _ = data(problem)
    # All of an execution: within one, windows count as updates.
    bad = np.full_like(x[: 4 * steps_per_execution], np.nan)
    told = []
    callback = GradientAccumulationCallback(
        {0: 1, 1: 2},
        by="update",
        skip_nonfinite=True,
        on_update=lambda count: told.append(count),
    )
    problem = dataclasses.replace(
        problem, steps_per_execution=steps_per_execution
    )
    with MODELS.lent(problem) as model:
        model.fit(
            np.concatenate([bad, x]),
            np.concatenate([y[: len(bad)], y]),
            4,
            shuffle=False,
            verbose=0,
            callbacks=[callback],
        )
        # One of 1 micro-batch, two of 2, and the rest.
        assert told == [1, 2, 3, 4]
        assert int(model.optimizer.iterations) == 4


def test_a_fit_says_when_windows_grow(capsys):
    """In the line that it prints."""
    problem = Problem(epochs=1)
    x, y, _ = data(problem)
    callback = GradientAccumulationCallback({0: 1, 1000: 4}, by="update")
    with MODELS.lent(problem) as model:
        model.fit(x, y, 4, verbose=2, callbacks=[callback])
    assert (
        "kaccum: 4 examples an update = 1 micro-batch of 4; 4 micro-batches "
        "from update 1000 on.\n" in capsys.readouterr().out
    )


def test_epochs_of_one_micro_batch_are_plain_bit_for_bit():
    """Law 7, where the schedule says so."""
    problem = Problem(epochs=2)
    plain = reference.fit_micro(problem, callbacks=[])
    micro = fit_micro(problem, {0: 1, 7: 4})
    for mine, other in zip(micro.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert micro.history == plain.history


@pytest.mark.parametrize("steps_per_execution", [1, 2])
@pytest.mark.parametrize("unknown_length", [False, True])
@pytest.mark.parametrize(
    "steps, skips, expected",
    [(3, False, 2), (1, False, 5), (3, True, 2), (1, True, 5), (9, False, 1)],
)
def test_every_update_is_told(
    steps, skips, expected, unknown_length, steps_per_execution
):
    """`on_update` is called after each one, also of a short window."""
    problem = Problem(
        steps=steps,
        unknown_length=unknown_length,
        steps_per_execution=steps_per_execution,
    )
    told = []

    def on_update(count):
        told.append((count, int(callback.model.optimizer.iterations)))

    callback = GradientAccumulationCallback(
        steps, on_update=on_update, skip_nonfinite=skips
    )
    reference.fit_micro(problem, callbacks=[callback])
    counts = [count for count, _ in told]
    assert counts == list(range(1, 2 * expected + 1))
    if steps_per_execution == 1:
        # (Keras counts an update too many at the end of an epoch of unknown
        # length where nothing is accumulated.)
        exact = steps > 1 or skips or not unknown_length
        assert not exact or all(count == made for count, made in told)


def test_the_count_of_updates_starts_anew_with_each_fit():
    """`on_update` counts the updates of its own fit."""
    problem, told = Problem(epochs=1), []
    callback = GradientAccumulationCallback(3, on_update=told.append)
    model = build_model(problem)
    reference.fit_micro(problem, model, [callback])
    reference.fit_micro(problem, model, [callback])
    assert told == [1, 2, 1, 2]


def test_callbacks_are_still_dispatched_asynchronously():
    """No hook is called for each batch, with whatever options."""
    plain = keras.callbacks.Callback
    ours = GradientAccumulationCallback
    hooks = [name for name in dir(plain) if "batch" in name]
    assert len(hooks) >= 6
    for hook in hooks:
        assert getattr(ours, hook) is getattr(plain, hook)


def _with_bad(problem, place):
    """Windows of two good micro-batches, and a bad one in each of them."""
    x, y, _ = data(problem)
    size = problem.micro_batch
    bad = [np.nan, np.inf, -np.inf]
    xs, ys = [], []
    for i, start in enumerate(range(0, len(x), 2 * size)):
        rows = np.array(x[:size])
        rows[1, 2] = bad[i % 3]
        parts = [x[start : start + size], x[start + size : start + 2 * size]]
        parts.insert(place, rows)
        labels = [y[start : start + size], y[start + size : start + 2 * size]]
        labels.insert(place, y[:size])
        xs, ys = xs + parts, ys + labels
    return np.concatenate(xs), np.concatenate(ys)


@functools.cache
def _with_state(problem, role):
    """A model that has averages, random numbers and metrics; its first state.

    It is lent again and again, in each role.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((reference.FEATURES,)),
            keras.layers.BatchNormalization(),
            Counted(),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dropout(0.3, seed=1),
            keras.layers.Dense(reference.CLASSES),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **compile_options(problem.execution, problem.steps_per_execution),
    )
    model.optimizer.build(model.trainable_variables)
    return model, reference.values_of(model)


@pytest.mark.parametrize(
    ("execution", "steps_per_execution", "place"),
    [
        *itertools.product(EXECUTIONS[:1], [1], [0, 1, 2]),
        (EXECUTIONS[0], 4, 0),
        (EXECUTIONS[0], 4, 2),
        ("xla" if "xla" in EXECUTIONS else "eager", 1, 1),
        ("eager", 4, 2),
        *at_night(itertools.product(EXECUTIONS, [1, 4], [0, 1, 2])),
    ],
)
def test_a_nonfinite_micro_batch_is_as_if_it_had_never_come(
    execution, steps_per_execution, place
):
    """`skip_nonfinite`: gradients, metrics, averages and random numbers."""
    problem = Problem(
        examples=24,
        execution=execution,
        steps_per_execution=steps_per_execution,
    )
    x, y = _with_bad(problem, place)
    (model, first), (twin, _) = (
        _with_state(problem, role) for role in ("model", "twin")
    )
    for each in (model, twin):
        reference.set_values(each, first)
    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    callback = GradientAccumulationCallback(3, skip_nonfinite=True)
    log = model.fit(x, y, callbacks=[callback], **options).history
    assert callback.skipped_micro_batches == 6
    assert log.pop("skipped_micro_batches") == [3, 3]
    x, y, _ = data(problem)
    other = twin.fit(
        x, y, callbacks=[GradientAccumulationCallback(2)], **options
    ).history
    micro, large = (
        reference.result_of(model, log),
        reference.result_of(twin, other),
    )
    assert micro.iterations == large.iterations == 6
    for mine, theirs in zip(micro.weights, large.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    for name in other:
        np.testing.assert_allclose(log[name], other[name], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_window_of_nonfinite_micro_batches_makes_no_update(
    steps, steps_per_execution
):
    """`skip_nonfinite`: not even with a gradient of zero."""
    problem = Problem(steps_per_execution=steps_per_execution)
    x, y, _ = data(problem)
    with MODELS.lent(problem) as model:
        no_update_of(model, steps, x, y)


def no_update_of(model, steps, x, y):
    """The fit of NaNs, and the next one."""
    before, told = model.get_weights(), []
    callback = GradientAccumulationCallback(
        steps, skip_nonfinite=True, on_update=told.append
    )
    fit = {"batch_size": 4, "verbose": 0, "callbacks": [callback]}
    history = model.fit(np.full_like(x, np.nan), y, **fit).history
    assert history["skipped_micro_batches"] == [5]
    assert told == [] and int(model.optimizer.iterations) == 0
    for mine, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, other)
    # And the next fit counts from zero.
    model.fit(x, y, **fit)
    assert callback.skipped_micro_batches == 0
    assert len(told) == -(-5 // steps)


def test_frozen_models_skip_nothing():
    """There is no gradient that could be finite or not."""
    problem = Problem()
    x, y, _ = data(problem)
    model = build_model(problem)
    model.trainable = False
    model.compile("sgd", model.loss)
    callback = GradientAccumulationCallback(2, skip_nonfinite=True)
    with warnings.catch_warnings():
        # Keras warns of them, but on JAX.
        warnings.simplefilter("ignore")
        model.fit(x, y, 4, verbose=0, callbacks=[callback])
    assert callback.skipped_micro_batches == 0


def test_the_skipped_are_logged_for_every_callback(tmp_path):
    """The entry is there before validation, for callbacks before ours too."""
    problem = Problem(examples=24, epochs=2)
    x, y = _with_bad(problem, 1)
    model, seen = build_model(problem), []
    log = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            logs["skipped_micro_batches"]
        )
    )
    csv = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callback = GradientAccumulationCallback(3, skip_nonfinite=True)
    model.fit(
        x,
        y,
        4,
        epochs=2,
        validation_data=data(problem)[:2],
        verbose=0,
        shuffle=False,
        callbacks=[log, csv, callback],
    )
    assert seen == [3, 3]
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert "skipped_micro_batches" in rows[0].split(",")


@needs_graphs
def test_a_second_gradient_that_is_not_finite_counts_too():
    """A `train_step` that applies twice: both or none."""

    class Twice(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
                late = loss + tf.reduce_sum(tf.math.log(x[:, 0]))
            first, second = self.trainable_variables
            self.optimizer.apply([tape.gradient(loss, first)], [first])
            bad = tape.gradient(late, second) + 0.0 * tf.math.log(x[0, 0])
            self.optimizer.apply([bad], [second])
            return {"loss": loss}

    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    model = Twice(inputs, keras.layers.Dense(1)(inputs))
    model.compile(keras.optimizers.SGD(0.1))
    model.optimizer.build(model.trainable_variables)
    before = model.get_weights()
    x = np.ones((4, 2), "float32")
    x[:, 0] = 0.0
    callback = GradientAccumulationCallback(2, skip_nonfinite=True)
    model.fit(x, np.ones((4, 1)), 2, verbose=0, callbacks=[callback])
    assert callback.skipped_micro_batches == 2
    for mine, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_sparse_gradients_that_are_not_finite_are_skipped():
    """`skip_nonfinite` looks at the rows of an embedding's gradient."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Embedding(5, 2), keras.layers.Flatten()]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.array([[0], [1], [2], [3]])
    y = np.ones((4, 2))
    y[1] = np.nan
    callback = GradientAccumulationCallback(4, skip_nonfinite=True)
    before = keras.ops.convert_to_numpy(model(x))
    model.fit(x, y, 1, verbose=0, shuffle=False, callbacks=[callback])
    after = keras.ops.convert_to_numpy(model(x))
    moved = np.any(after != before, axis=(1, 2)[: before.ndim - 1])
    assert moved.tolist() == [True, False, True, True]
    assert callback.skipped_micro_batches == 1
