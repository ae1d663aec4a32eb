"""Laws 3 to 10: what happens inside a window, at its end, and afterwards."""

import subprocess
import sys

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

from kaccum import GradientAccumulationCallback
from kaccum.fit.session import Session
from kaccum.fit.window import Window
from tests import reference
from tests.backends import (
    BACKEND,
    EXECUTIONS,
    holds_memory,
    needs_compiling,
    needs_graphs,
    only_on,
    tf,
)
from tests.profiles import at_night, drawn
from tests.recorders import Recorder, Stop, is_equal
from tests.reference import Problem, build_model, data, fit_micro
from tests.strategies import problems, runs_of


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nothing_changes_inside_a_window(execution):
    """Law 3: bit for bit equal inside, changed at the end."""
    problem = Problem(
        execution=execution,
        optimizer="AdamW",
        options=(("use_ema", True), ("weight_decay", 0.1)),
        constraint="unit_norm",
        epochs=1,
    )
    recorder = Recorder()
    callbacks = [GradientAccumulationCallback(3), recorder]
    fit_micro(problem, callbacks=callbacks)
    for i in range(1, len(recorder.batches)):
        before, after = recorder.batches[i - 1], recorder.batches[i]
        assert is_equal(before, after) == ((i + 1) % 3 != 0), i


def test_overflow_skips_one_update_and_halves_the_scale_once():
    """Law 3: an overflow in any micro-batch counts once a window."""
    problem = Problem(loss_scale=1024.0, epochs=1, examples=24)
    x, y, _ = data(problem)
    x[5] = np.inf
    model, twin = build_model(problem), build_model(problem.truth)
    recorder = Recorder()
    model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=[recorder, GradientAccumulationCallback(3)],
    )
    twin.fit(x, y, batch_size=12, shuffle=False, verbose=0)
    assert float(model.optimizer.dynamic_scale.numpy()) == 512.0
    assert float(twin.optimizer.dynamic_scale.numpy()) == 512.0
    assert int(model.optimizer.iterations) == 1
    assert int(twin.optimizer.iterations) == 1
    assert is_equal(recorder.batches[0], recorder.batches[4])
    np.testing.assert_allclose(
        model.get_weights()[0], twin.get_weights()[0], rtol=1e-5
    )


@drawn(16)
@hypothesis.given(
    problems(execution=EXECUTIONS[-1], validation=True, kind="mean")
    | runs_of({"execution": EXECUTIONS[0]}, validation=True)
)
def test_an_epoch_ends_with_no_open_window(problem):
    """Law 4: the short window is applied before validation and callbacks."""
    recorder = Recorder()
    fit_micro(problem, callbacks=[recorder, problem.callback])
    window = problem.micro_batch * problem.steps
    updates = -(-problem.examples // window)
    expected = [updates * (e + 1) for e in range(problem.epochs)]
    assert recorder.epochs == expected
    assert recorder.validations == expected


def test_a_stopped_epoch_ends_with_no_open_window():
    """Law 4: also where a callback stops the epoch inside a window."""
    recorder = Recorder()
    callbacks = [recorder, Stop(3), GradientAccumulationCallback(3)]
    fit_micro(Problem(validation=True), callbacks=callbacks)
    assert recorder.validations == recorder.epochs == [2]


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_steps_per_epoch_ends_a_window(steps_per_execution):
    """Law 4: an endless generator is cut by `steps_per_epoch`."""
    problem = Problem(steps_per_execution=steps_per_execution, examples=8)
    x, y, _ = data(problem)

    def endless(size):
        while True:
            yield x[:size], y[:size]

    model, twin = build_model(problem), build_model(problem)
    model.fit(
        endless(4),
        steps_per_epoch=4,
        epochs=2,
        verbose=0,
        callbacks=[GradientAccumulationCallback(3)],
    )
    assert int(model.optimizer.iterations) == 4
    # Windows of 12 and 4 of the same examples: all updates are equal.
    twin.fit(endless(4), steps_per_epoch=2, epochs=2, verbose=0)
    np.testing.assert_allclose(
        model.get_weights()[0], twin.get_weights()[0], rtol=1e-5
    )


def test_a_py_dataset_trains_as_the_large_batch():
    """Laws 1 and 4, for Keras's own data sets."""
    problem = Problem()
    x, y, _ = data(problem)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return -(-len(x) // 4)

        def __getitem__(self, i):
            return x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    model = build_model(problem)
    history = model.fit(
        Batches(),
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[GradientAccumulationCallback(3)],
    ).history
    micro = reference.result_of(model, history)
    reference.assert_same(problem, micro, reference.fit_large(problem))


@pytest.mark.parametrize(
    ("is_first", "error"),
    [
        (True, ValueError("mine")),
        (False, KeyboardInterrupt()),
        *at_night([(False, ValueError("mine")), (True, KeyboardInterrupt())]),
    ],
)
def test_an_interrupted_fit_leaves_nothing_behind(error, is_first):
    """Law 5: the next uses of the model know nothing of the open window."""
    problem = Problem(epochs=1)
    x, y, _ = data(problem)
    model = build_model(problem)
    callbacks = [GradientAccumulationCallback(3), Stop(4, error)]
    with pytest.raises(type(error)):
        fit_micro(problem, model, callbacks[:: 1 if is_first else -1])
    before = model.get_weights()
    model.evaluate(x, y, verbose=0)
    assert is_equal(before, model.get_weights())
    twin = build_model(problem)
    twin.optimizer.build(twin.trainable_variables)
    twin.set_weights(before)
    for mine, other in zip(model.optimizer.variables, twin.optimizer.variables):
        other.assign(mine.numpy())
    for plain in (model, twin):
        plain.train_on_batch(x[:4], y[:4])
        plain.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert is_equal(model.get_weights(), twin.get_weights())
    micro, large = fit_micro(problem, model), reference.fit_large(problem, twin)
    reference.assert_same(problem, micro, large)


def test_an_error_inside_the_step_gives_the_model_back_at_once():
    """Law 5: an exception from the model's own code."""

    class Failing(keras.layers.Layer):
        def call(self, inputs, training=None):
            if training:
                raise ValueError("from the layer")
            return inputs

    model = keras.Sequential([Failing(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="from the layer"):
        model.fit(
            np.ones((4, 2)),
            np.ones((4, 1)),
            verbose=0,
            callbacks=[GradientAccumulationCallback(2)],
        )
    assert "make_train_function" not in vars(model)


# Of PyTorch, where it begins to compile (2.13).
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@only_on("torch", reason="the other backends compile what they trace")
def test_a_step_that_would_be_compiled_is_exact():
    """Law 1: with `jit_compile=True`, where a step is heard uncompiled."""

    class Traced(keras.layers.Layer):
        """Keeps whether PyTorch compiles the step."""

        seen = set()

        def call(self, inputs, training=None):
            if training:
                self.seen.add(sys.modules["torch"].compiler.is_compiling())
            return inputs

    problem = Problem(kind="mean_with_sample_weight")
    x, y, weights = data(problem)
    trained = []
    for batch_size, jit, callbacks in (
        (problem.large_batch, False, []),
        (problem.batch, True, [problem.callback]),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input(x.shape[1:]), Traced(), keras.layers.Dense(1)]
        )
        loss = keras.losses.MeanSquaredError("mean_with_sample_weight")
        model.compile("sgd", loss, jit_compile=jit)
        model.fit(
            x,
            y,
            sample_weight=weights,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        trained.append(model.get_weights())
    assert Traced.seen == {False}
    for ours, large in zip(*reversed(trained)):
        np.testing.assert_allclose(ours, large, rtol=1e-5, atol=1e-7)


def test_a_callback_may_train_on_a_batch_of_its_own():
    """Law 5: `train_on_batch` in a callback is plain, and fit goes on."""
    problem = Problem(epochs=1)
    x, y, _ = data(problem)

    class Trains(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.train_on_batch(x[:4], y[:4])
            self.model.train_on_batch(x[:4], y[:4])

    problem = Problem(epochs=2)
    callbacks = [GradientAccumulationCallback(3), Trains()]
    result = fit_micro(problem, callbacks=callbacks)
    assert result.iterations == 2 * (2 + 2)


def test_a_fit_inside_of_a_fit_is_refused():
    """It would end the accumulation; without kaccum it trains."""
    problem = Problem(epochs=2)
    x, y, _ = data(problem)
    nested = []

    class Fits(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if not nested:
                nested.append(True)
                self.model.fit(x[:4], y[:4], verbose=0)

    message = (
        "^`fit` must not be called on a model inside its own `fit` while "
        "gradients accumulate. Received: a `fit` from a callback, say. Call "
        "`train_on_batch`, or `fit` another model with the same layers.$"
    )
    model = build_model(problem)
    with pytest.raises(RuntimeError, match=message):
        fit_micro(
            problem, model, callbacks=[GradientAccumulationCallback(3), Fits()]
        )
    nested.clear()
    fit_micro(problem, model, callbacks=[Fits()])
    assert nested


def test_the_fit_of_a_subclass_is_not_one_inside_of_another():
    """It calls Keras's, twice here: the second without the callback."""
    problem = Problem(epochs=1)

    class Fitted(keras.Sequential):
        def fit(self, *arguments, callbacks=(), **options):
            first = super().fit(*arguments, callbacks=callbacks, **options)
            super().fit(*arguments, **options)
            return first

    model = build_model(problem)
    twice = Fitted(model.layers)
    twice.compile(keras.optimizers.SGD(0.1), model.loss)
    callbacks = [GradientAccumulationCallback(3)]
    result = fit_micro(problem, twice, callbacks=callbacks)
    batches = -(-problem.examples // problem.micro_batch)
    assert result.iterations == -(-batches // 3) + batches


def test_a_callback_may_remake_the_train_function():
    """Law 5: without force nothing happens, with force it compiles anew."""
    problem = Problem()

    class Remakes(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.make_train_function(force=epoch == 1)

    callbacks = [GradientAccumulationCallback(3), Remakes()]
    micro = fit_micro(problem, callbacks=callbacks)
    reference.assert_same(problem, micro, reference.fit_large(problem))


def test_metrics_asked_for_after_an_interruption_update_nothing():
    """Law 5: only the model's own `fit` closes a window."""
    model = build_model(Problem())
    with pytest.raises(KeyboardInterrupt):
        callback = GradientAccumulationCallback(3)
        fit_micro(Problem(), model, [callback, Stop(0, KeyboardInterrupt())])
    before = model.get_weights()

    class Trainer:
        def fit(self):
            return model.get_metrics_result()

    Trainer().fit()
    assert is_equal(before, model.get_weights())
    model.make_train_function()


def test_saved_models_are_plain(tmp_path):
    """Law 6: files saved while and after accumulating hold nothing of it."""
    path = str(tmp_path / "{epoch}.keras")
    problem = Problem()
    callbacks = [
        keras.callbacks.ModelCheckpoint(path),
        GradientAccumulationCallback(3),
    ]
    result = fit_micro(problem, callbacks=callbacks)
    program = f"""
import sys, warnings
sys.modules["kaccum"] = None  # importing it would fail
import keras, numpy
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")
loaded = keras.saving.load_model({path.format(epoch=2)!r})
variables = [*loaded.variables, *loaded.optimizer.variables]
numpy.savez({str(tmp_path / "loaded.npz")!r}, *[v.numpy() for v in variables])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    loaded = np.load(tmp_path / "loaded.npz")
    saved = [*result.weights, *result.state]
    assert is_equal(saved, [loaded[name] for name in loaded.files])


def test_steps_of_one_is_a_plain_fit():
    """Law 7: bit for bit."""
    problem = Problem(steps=1)
    plain = fit_micro(problem, callbacks=[])
    result = fit_micro(problem)
    assert is_equal(plain.weights, result.weights)
    assert plain.history == result.history


@only_on("tensorflow", "torch", reason="JAX has zeros for no gradient")
def test_a_variable_gets_the_gradients_there_are():
    """Law 8: some micro-batches, or all, have no gradient for a variable."""

    class Sometimes(keras.Model):
        def __init__(self):
            super().__init__()
            self.always = keras.layers.Dense(1)
            self.sometimes = keras.layers.Dense(1)

        def build(self, shape):
            self.always.build(shape)
            self.sometimes.build(shape)

        def call(self, x):
            out = self.always(x)
            if isinstance(x, keras.KerasTensor) or float(ops.max(x)) > 5:
                out = out + self.sometimes(x)
            return out

    def trained(batch_size, callbacks):
        keras.utils.set_random_seed(0)
        model = Sometimes()
        model.build((None, 2))
        model.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=True)
        model.optimizer.build(model.trainable_variables)
        weights = []
        log = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: weights.append(
                model.get_weights()
            )
        )
        model.fit(
            x,
            np.ones((8, 1)),
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[log, *callbacks],
        )
        return weights

    # Half of the first window has a gradient for `sometimes`, the second none:
    # Adam's momentum would move it on a gradient of zero.
    x = np.linspace(0.1, 1, 16).reshape(8, 2)
    x[2:4] = 6.0
    weights = trained(2, [GradientAccumulationCallback(2)])
    assert not np.array_equal(weights[0][2], weights[1][2])
    assert np.array_equal(weights[1][2], weights[3][2])
    x[:] = 6.0
    np.testing.assert_allclose(
        trained(2, [GradientAccumulationCallback(2)])[-1][2],
        trained(4, [])[-1][2],
        rtol=1e-5,
    )


@needs_compiling
def test_nothing_is_compiled_twice():
    """Law 10: not in a second fit, not with other steps, nor a short window."""
    traces = []

    class Counting(keras.Model):
        def train_step(self, *arguments):
            traces.append(1)
            return super().train_step(*arguments)

    inputs = keras.Input((reference.FEATURES,))
    model = Counting(inputs, keras.layers.Dense(reference.CLASSES)(inputs))
    model.compile("adam", "sparse_categorical_crossentropy")
    # (Keras 3.16 compiles once more for a short micro-batch: there are none.)
    x, y, _ = data(Problem(examples=20))

    def fit(callback, n=20):
        options = {"batch_size": 4, "verbose": 0, "callbacks": [callback]}
        model.fit(x[:n], y[:n], epochs=2, **options)

    ours = GradientAccumulationCallback
    by_epoch = ours(lambda epoch: [1, 3][epoch])
    fit(by_epoch)
    first = len(traces)
    fit(by_epoch)
    fit(ours({0: 4, 1: 1}))
    fit(ours(2))
    fit(ours(5), 16)
    assert len(traces) == first
    model.compile("adam", "sparse_categorical_crossentropy")
    by_update = ours({0: 1, 1: 2, 2: 3}, by="update")
    fit(by_update, 4)
    # Windows of one micro-batch are made as longer ones are.
    grown = len(traces)
    fit(by_update)
    assert len(traces) == grown < 2 * first
    traces[grown:] = traces[first:grown] = []
    model.compile("adam", "sparse_categorical_crossentropy")
    fit(by_epoch)
    # (JAX knows a plain step again that Keras compiles anew.)
    again = 1 if BACKEND == "jax" else 0
    assert len(traces) == 2 * first - again


def test_the_sums_are_freed_after_fit():
    """The sums take memory only while a fit runs."""
    result = fit_micro(Problem(), build_model(Problem()))
    session = Session.of(result.model)
    assert [len(a._totals) for a in session._step.sums.gradients] == [6]
    for accumulator in session._step.sums.gradients:
        for total in accumulator._totals:
            assert not holds_memory(total)


@needs_graphs
def test_a_step_holds_no_conditional(monkeypatch):
    """XLA copies every variable that a conditional might write."""
    real = keras.Model.train_step
    counts = []

    def train_step(self, data):
        logs = real(self, data)
        graph = tf.compat.v1.get_default_graph()
        kinds = [op.type for op in graph.get_operations()]
        counts.append(sum(kind in ("If", "StatelessIf") for kind in kinds))
        return logs

    monkeypatch.setattr(keras.Model, "train_step", train_step)

    def conditionals(callbacks, **fields):
        counts.clear()
        problem = Problem(optimizer="SGD", **fields)
        fit_micro(problem, build_model(problem), callbacks)
        return set(counts)

    assert conditionals([GradientAccumulationCallback(3)]) == {0}
    # Keras's own loss scaling has some, so this test can fail.
    assert 0 not in conditionals([], loss_scale=64.0)


@drawn(300)
@hypothesis.given(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=9))
def test_windows_close_every_so_many_micro_batches(steps, executions):
    """Law 4: however the micro-batches are taken."""
    window, closed = Window(steps), []
    for count in executions:
        closed += window.closes(count)
        window.advance(count, 0)
    assert [i for i, c in enumerate(closed) if c] == list(
        range(steps - 1, len(closed), steps)
    )
    assert window.is_open == (len(closed) % steps != 0)
