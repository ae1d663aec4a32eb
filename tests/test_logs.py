"""Numbers that Keras logs once a batch are those of whole windows."""

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback, accumulate
from tests.backends import EXECUTIONS, eagerly, needs_graphs, tf
from tests.reference import Problem, build_model, data, fit_large

RNG = np.random.default_rng(0)
X = RNG.normal(size=(26, 4)).astype("float32")
W = RNG.uniform(0, 2, 26).astype("float32")


def half(y_true, y_pred):
    """A metric function that returns a scalar, a mean over examples."""
    return ops.mean(ops.abs(ops.subtract(y_true, y_pred))) / 2


def two_outputs(execution, learning_rate=0.1):
    keras.utils.set_random_seed(0)
    first = keras.Input((4,))
    outputs = {
        name: keras.layers.Dense(2, name=name)(first) for name in ("a", "b")
    }
    model = keras.Model(first, outputs)
    mean = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    model.compile(
        keras.optimizers.SGD(learning_rate),
        {"a": mean, "b": "mae"},
        metrics={"a": half, "b": half},
        run_eagerly=execution == "eager",
        jit_compile=execution == "xla",
    )
    return model


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "batch, options",
    [(3, {"steps": 4}), (12, {"micro_batch_size": 3})],
    ids=["steps", "cut"],
)
def test_losses_of_outputs_and_scalar_metrics(execution, batch, options):
    """Each by its own denominator. (The weights of "a" are all ones.)

    Of batches of one size: of others Keras's own average depends on what it
    traced first (3.16 nightly).
    """
    x = X[:24]
    targets = {"a": x[:, :2], "b": x[:, 2:]}
    weights = {"a": np.ones(24, "float32"), "b": W[:24]}
    histories = []
    callback = GradientAccumulationCallback(**options)
    for size, callbacks in ((12, []), (batch, [callback])):
        model = two_outputs(execution)
        if not callbacks:
            eagerly(model)
        history = model.fit(
            x,
            targets,
            sample_weight=weights,
            batch_size=size,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        ).history
        histories.append(history)
    large, micro = histories
    assert large.keys() == micro.keys() >= {"loss", "a_loss", "b_half"}
    for name in large:
        assert micro[name] == pytest.approx(large[name], rel=1e-6), name


@pytest.mark.filterwarnings("ignore:Losses that divide by numbers")
@pytest.mark.parametrize("execution", ["graph", "eager"])
def test_each_output_has_its_own_denominator(execution):
    """Also where they are not in proportion, which no update can serve."""
    logs = []
    callback = GradientAccumulationCallback(micro_batch_size=3)
    for callbacks in ([], [callback]):
        history = (
            two_outputs(execution, learning_rate=0.0)
            .fit(
                X,
                {"a": X[:, :2], "b": X[:, 2:]},
                sample_weight={"a": W, "b": np.ones(26, "float32")},
                batch_size=13,
                shuffle=False,
                verbose=0,
                callbacks=callbacks,
            )
            .history
        )
        logs.append([history["a_loss"][0], history["b_loss"][0]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["mask", "sum", "mean_with_sample_weight"])
def test_a_log_inside_a_window_is_that_of_the_window_so_far(kind):
    """The mean or sum of the union of what was seen, not a mean of means."""
    problem = Problem(kind=kind, examples=10, epochs=1, regularizer="l2")
    x, y, w = data(problem)
    model, seen = build_model(problem), []
    model.optimizer.build(model.trainable_variables)
    expected = []
    for end in (4, 8, 10):
        part = slice(None, end)
        weights = None if w is None else w[part]
        loss = model.evaluate(
            x[part], y[part], sample_weight=weights, batch_size=99, verbose=0
        )[0]
        expected.append(loss)
    tell = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
    )
    callbacks = [tell, GradientAccumulationCallback(3)]
    model.fit(
        x,
        y,
        sample_weight=w,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    large = fit_large(problem).history["loss"]
    assert seen[-1] == pytest.approx(large[0], rel=1e-6)


@pytest.mark.parametrize("execution", ["graph", "eager"])
def test_metrics_that_are_reset_inside_a_window(execution):
    """As by `train_on_batch`: its numbers are those of its own batch."""
    model = two_outputs(execution)
    y = {"a": X[:, :2], "b": X[:, 2:]}
    with accumulate(model, 5):
        for start in range(0, 12, 3):
            part = slice(start, start + 3)
            batch = {name: array[part] for name, array in y.items()}
            model.reset_metrics()
            mine = model.train_on_batch(X[part], batch, return_dict=True)
            model.reset_metrics()
            truth = model.test_on_batch(X[part], batch, return_dict=True)
            for name in truth:
                assert mine[name] == pytest.approx(truth[name], rel=1e-6), name


@needs_graphs
@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_the_end_of_the_data_is_no_batch(steps_per_execution):
    """Law 4: TensorFlow runs what does not depend on a batch once more (2.21).

    As where a metric counts a batch whose size is known.
    """
    x, y, _ = data(Problem(examples=12))

    def batches(size):
        arrays = tf.data.Dataset.from_tensor_slices((x, y))
        # Its length is not known, the shapes of its batches are.
        arrays = arrays.filter(lambda x, y: True)
        return arrays.batch(size, drop_remainder=True)

    problem = Problem(steps_per_execution=steps_per_execution)
    model, twin = build_model(problem), build_model(problem.truth)
    options = {"verbose": 0, "shuffle": False}
    callbacks = [GradientAccumulationCallback(3)]
    mine = model.fit(batches(4), callbacks=callbacks, **options).history
    truth = twin.fit(x, y, 12, **options).history
    assert mine.keys() == truth.keys() >= {"accuracy"}
    for name in truth:
        assert mine[name] == pytest.approx(truth[name], rel=1e-6), name


@needs_graphs
def test_a_mean_of_arrays_is_kerass_own():
    """Only numbers are kept for the window."""
    seen = keras.metrics.Mean()

    class Tracking(keras.Model):
        def train_step(self, data):
            seen.update_state(data[0][:, 0])
            seen.update_state(ops.mean(data[0][:, 1]))
            return super().train_step(data)

    first = keras.Input((4,))
    model = Tracking(first, keras.layers.Dense(1)(first))
    model.compile("sgd", "mse")
    model.fit(
        X,
        X[:, :1],
        batch_size=5,
        shuffle=False,
        verbose=0,
        callbacks=[GradientAccumulationCallback(2)],
    )
    # Of 26 numbers one by one, and 3 of windows of at most 10 examples.
    windows = [X[:10, 1], X[10:20, 1], X[20:, 1]]
    total = X[:, 0].sum() + sum(part.mean() for part in windows)
    assert float(seen.count) == 26 + 3
    assert float(seen.total) == pytest.approx(total, rel=1e-5)
