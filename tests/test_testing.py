"""`kaccum.testing`: it lets right fits pass, and no wrong ones."""

import contextlib
import dataclasses
import sys

import hypothesis
import keras
import numpy as np
import pytest

from kaccum import testing
from kaccum.backends import backend
from kaccum.testing import Run, assert_same, assert_same_fit, runs
from tests.backends import BACKEND, tf
from tests.profiles import drawn

X, Y = np.random.default_rng(0).normal(size=(2, 40, 3)).astype("float32")


def build(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    return model


@drawn(8 if BACKEND != "jax" else 2)
@hypothesis.given(runs())
def test_a_model_of_ones_own(run):
    """Law 1, as a user would test it."""
    assert_same_fit(run, build, X, Y, sample_weight=np.abs(Y[:, 0]))


@drawn(200)
@hypothesis.given(runs(max_examples=5, max_micro_batch=4, max_steps=3))
def test_runs_are_within_their_limits(run):
    """What is drawn, and what follows from it."""
    assert 1 <= run.examples <= 5
    assert 1 <= run.micro_batch <= 4
    assert 2 <= run.steps <= 3
    assert 1 <= run.epochs <= 2
    assert run.large_batch == run.micro_batch * run.steps
    assert run.batch == (run.large_batch if run.cut else run.micro_batch)


@pytest.mark.parametrize("cut", [False, True], ids=["steps", "cut"])
def test_a_model_for_which_the_law_does_not_hold(cut):
    """Batches are normalised each by itself."""

    def build_normalised():
        keras.utils.set_random_seed(0)
        normal = keras.layers.BatchNormalization()
        layers = [keras.Input((3,)), normal, keras.layers.Dense(3)]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        return model

    run = Run(examples=8, micro_batch=2, steps=4, cut=cut)
    with pytest.raises(AssertionError, match="^weights: off by"):
        assert_same_fit(run, build_normalised, X, Y)


def test_models_must_begin_alike():
    """Otherwise fits differ whatever accumulates."""
    seeds = iter(range(2))
    message = (
        r"^`build` must return models with the same weights: call "
        r"`keras.utils.set_random_seed` in it. Received: models whose first "
        r"weights of shape \(3, 3\) differ\.$"
    )
    with pytest.raises(ValueError, match=message):
        assert_same_fit(Run(8, 2, 2), lambda: build(next(seeds)), X, Y)


def test_models_must_be_two():
    """One that is trained twice is not compared with anything."""
    model = build()
    message = (
        "^`build` must return a new model each time. Received: one that "
        "returned the same.$"
    )
    with pytest.raises(ValueError, match=message):
        assert_same_fit(Run(8, 2, 2), lambda: model, X, Y)


def test_there_must_be_as_many_examples_as_a_run_has():
    """Fewer would be another run."""
    message = (
        "^The data must have as many examples as the run. Received: 3 for "
        r"Run\(examples=8, "
    )
    with pytest.raises(ValueError, match=message):
        assert_same_fit(Run(8, 2, 2), build, X[:3], Y[:3])


@pytest.fixture(scope="module")
def result():
    """What a fit ended with."""
    return testing.fit_large(Run(8, 2, 2), build(), X, Y)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"iterations": 3}, "^3 updates, not 2$"),
        ({"weights": []}, "^weights are not as many$"),
        ({"state": []}, "^state are not as many$"),
        ({"history": {"other": [1.0]}}, "^history of .*other.*, not .*loss"),
        ({"history": {"loss": [1e3]}}, "^history: off by"),
        ({"history": {"loss": [1.0, 1.0]}}, "^history: off by inf"),
        ({"history": {"loss": [np.nan]}}, "^history: off by inf"),
    ],
    ids=["updates", "weights", "state", "names", "logs", "epochs", "nan"],
)
def test_what_differs_is_named(result, change, message):
    """One thing at a time."""
    other = dataclasses.replace(result, **change)
    with pytest.raises(AssertionError, match=message):
        assert_same(other, result, 1e-3)
    assert_same(result, result, 0.0)


def test_a_weight_that_differs_by_more_than_the_bound(result):
    """Relative to the largest of its array."""
    weights = [w + 1e-3 * np.max(np.abs(w)) for w in result.weights]
    other = dataclasses.replace(result, weights=weights)
    assert_same(other, result, 1.1e-3)
    with pytest.raises(AssertionError, match="^weights: off by 1.0e-03 > "):
        assert_same(other, result, 0.9e-3)


def test_nans_must_be_in_the_same_places():
    """Two fits that diverge alike are one; what is finite is compared."""

    def result(*weights):
        arrays = [np.array(each) for each in weights]
        return testing.Result(None, {"loss": [np.nan]}, arrays, [], 1)

    large = result([1.0, np.nan], [np.inf, 2.0])
    assert_same(large, large, 0.0)
    for other in (
        result([1.5, np.nan], [np.inf, 2.0]),
        result([1.0, np.nan], [np.inf, 2.5]),
        result([np.nan, 1.0], [np.inf, 2.0]),
        result([1.0, np.nan], [-np.inf, 2.0]),
    ):
        with pytest.raises(AssertionError, match="^weights: off by"):
            assert_same(other, large, 0.1)


def test_callbacks_are_those_of_both_fits():
    """Beside what accumulates."""
    updates = []
    count = keras.callbacks.LambdaCallback(
        on_train_end=lambda logs: updates.append(count.model.optimizer)
    )
    assert_same_fit(Run(8, 2, 2), build, X, Y, callbacks=[count])
    assert [int(optimizer.iterations) for optimizer in updates] == [2, 2]


def precision():
    """What a GPU multiplies float32 in; PyTorch tells convolutions apart."""
    if BACKEND == "tensorflow":
        return tf.config.experimental.tensor_float_32_execution_enabled()
    framework = sys.modules[BACKEND]
    if BACKEND == "jax":
        return framework.config.jax_default_matmul_precision
    backends = framework.backends
    kinds = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    return [kind.fp32_precision for kind in kinds]


def round_products():
    """As a user's program may have a GPU do."""
    if BACKEND == "tensorflow":
        tf.config.experimental.enable_tensor_float_32_execution(True)
    elif BACKEND == "jax":
        framework = sys.modules[BACKEND]
        return framework.default_matmul_precision("tensorfloat32")
    else:
        backends = sys.modules[BACKEND].backends
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = "tf32"
    return contextlib.nullcontext()


def test_both_fits_multiply_in_full_precision():
    """Also where the program has a GPU round products (TF32)."""
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(precision())
    )
    full = {"tensorflow": False, "jax": "highest", "torch": ["ieee"] * 3}[
        BACKEND
    ]
    # The tests' own.
    assert precision() == full
    with backend().full_precision(), round_products():
        rounded = precision()
        assert rounded != full
        assert_same_fit(Run(8, 2, 2), build, X, Y, callbacks=[look])
        assert seen == [full, full]
        assert precision() == rounded
    assert precision() == full


def test_the_optimizer_is_as_before_afterwards():
    """Gradients are made dense only while the large batches train."""
    model = build()
    testing.fit_large(Run(8, 2, 2), model, X, Y)
    assert "apply" not in vars(model.optimizer)
