"""Tests, by Hypothesis, that micro-batches train as their large batch does.

For a model or an optimizer of one's own; kaccum's own tests are built on it.
Needs `hypothesis`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st

from kaccum.backends import backend
from kaccum.backends.arrays import examples_in, part_of
from kaccum.callback import GradientAccumulationCallback
from kaccum.patches import patched
from kaccum.step.hooks import replacing

__all__ = [
    "Result",
    "Run",
    "assert_same",
    "assert_same_fit",
    "differences",
    "fit_large",
    "fit_micro",
    "result_of",
    "runs",
    "tolerance",
]


@dataclasses.dataclass(frozen=True)
class Run:
    """How examples are trained on.

    Args:
        examples: How many there are.
        micro_batch: How many of them a micro-batch has at most.
        steps: How many micro-batches make an update.
        epochs: How often all of them are seen.
        cut: Whether `fit` is asked for large batches, which kaccum cuts
            (`micro_batch_size`), and not for micro-batches (`steps`).
        whole_batch_loss: Whether the loss is that of the whole large batch.
    """

    examples: int
    micro_batch: int
    steps: int
    epochs: int = 1
    cut: bool = False
    whole_batch_loss: bool = False

    @property
    def large_batch(self) -> int:
        """Examples in a full window."""
        return self.micro_batch * self.steps

    @property
    def batch(self) -> int:
        """Examples in a batch of `fit`, with kaccum."""
        return self.large_batch if self.cut else self.micro_batch

    @property
    def callback(self) -> GradientAccumulationCallback:
        """What makes an update of each large batch."""
        whole = self.whole_batch_loss
        if self.cut:
            return GradientAccumulationCallback(
                micro_batch_size=self.micro_batch, whole_batch_loss=whole
            )
        return GradientAccumulationCallback(self.steps, whole_batch_loss=whole)


@dataclasses.dataclass
class Result:
    """What a fit ended with.

    Args:
        model: The trained model.
        history: Lists of floats by name, one for each epoch.
        weights: All variables of the model, as float64 arrays.
        state: All variables of the optimizer, as float64 arrays.
        iterations: How many updates the optimizer counts.
    """

    model: keras.Model
    history: dict[str, list[float]]
    weights: list[np.ndarray]
    state: list[np.ndarray]
    iterations: int


@st.composite
def runs(
    draw: st.DrawFn,
    *,
    max_examples: int = 40,
    max_micro_batch: int = 6,
    max_steps: int = 6,
    max_epochs: int = 2,
    whole_batch_loss: bool = False,
) -> Run:
    """A strategy of runs: full windows, short ones, batches of one example.

    Args:
        max_examples: The largest `Run.examples`; the least is 1.
        max_micro_batch: The largest `Run.micro_batch`; the least is 1.
        max_steps: The largest `Run.steps`; the least is 2.
        max_epochs: The largest `Run.epochs`; the least is 1.
        whole_batch_loss: The `Run.whole_batch_loss` of all.
    """
    return Run(
        examples=draw(st.integers(1, max_examples)),
        micro_batch=draw(st.integers(1, max_micro_batch)),
        steps=draw(st.integers(2, max_steps)),
        epochs=draw(st.integers(1, max_epochs)),
        cut=draw(st.booleans()),
        whole_batch_loss=whole_batch_loss,
    )


def tolerance(steps: int, dtype: str = "float32") -> float:
    """How far rounding may move a weight, relative to its array's largest.

    Every micro-batch rounds its gradient, and optimizers such as Adam divide by
    a gradient that may be small: a fixed number of rounding units, times the
    square root of how often there is a sum, as errors of random signs grow.

    Args:
        steps: How many micro-batches make an update.
        dtype: What variables and layers compute in; "float64" is taken for
            "float32", in which Keras computes losses all the same.
    """
    units = {"float16": 4 * 2.0**-11, "bfloat16": 4 * 2.0**-8}
    return units.get(dtype, 64 * 2.0**-24) * math.sqrt(steps)


def result_of(model: keras.Model, history: dict[str, list[float]]) -> Result:
    """Reads everything that `assert_same` compares.

    Args:
        model: A trained model.
        history: What its `fit` returned, the `History.history`.
    """

    def values(variables: list[keras.Variable]) -> list[np.ndarray]:
        return [
            np.asarray(keras.ops.convert_to_numpy(v), "float64")
            for v in variables
        ]

    iterations = keras.ops.convert_to_numpy(model.optimizer.iterations)
    return Result(
        model,
        history,
        values(model.variables),
        values(model.optimizer.variables),
        int(iterations),
    )


def fit_large(
    run: Run,
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> Result:
    """Trains on one batch an update, without kaccum: the truth.

    Sparse gradients are made dense: of those with repeated rows Keras takes
    wrong squares (3.15).

    Args:
        run: How to train.
        model: A compiled model.
        x: Inputs as arrays, at least `run.examples` of them.
        y: Targets, as many.
        callbacks: As in `fit`.
        **options: More of `fit`'s; an array `sample_weight` is cut as well.
    """
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    with _dense_gradients(model.optimizer):
        return _fit(run, model, x, y, run.large_batch, callbacks, options)


def fit_micro(
    run: Run,
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    **options: Any,
) -> Result:
    """Trains in micro-batches.

    Args:
        run: How to train.
        model: A compiled model.
        x: Inputs as arrays, at least `run.examples` of them.
        y: Targets, as many.
        callbacks: As in `fit`, what accumulates among them. By default
            `run.callback` alone.
        **options: More of `fit`'s; an array `sample_weight` is cut as well.
    """
    if callbacks is None:
        callbacks = [run.callback]
    return _fit(run, model, x, y, run.batch, callbacks, options)


def differences(micro: Result, large: Result) -> tuple[float, float, float]:
    """Largest difference of weights, of optimizer state, and of logs.

    Each relative to the largest finite number in its array; infinite where a
    NaN or an infinity of one is none, or another one, in the other.
    """
    return (
        max(map(_difference, micro.weights, large.weights), default=0.0),
        max(map(_difference, micro.state, large.state), default=0.0),
        max(
            _difference(np.array(micro.history[k]), np.array(large.history[k]))
            for k in large.history
        ),
    )


def assert_same(micro: Result, large: Result, bound: float) -> None:
    """Asserts that two fits are one, up to rounding.

    Args:
        micro: What one ended with.
        large: What the other did.
        bound: How far weights may differ, as of `tolerance`. The optimizer's
            state may by 8 times as much (it holds squares, and squares of
            differences), logs by 4 times.

    Raises:
        AssertionError: If their updates, weights, optimizer state or history
            differ.
    """
    if micro.iterations != large.iterations:
        raise AssertionError(
            f"{micro.iterations} updates, not {large.iterations}"
        )
    for name in ("weights", "state", "history"):
        if len(getattr(micro, name)) != len(getattr(large, name)):
            raise AssertionError(f"{name} are not as many")
    if micro.history.keys() != large.history.keys():
        raise AssertionError(
            f"history of {list(micro.history)}, not {list(large.history)}"
        )
    found = differences(micro, large)
    bounds = bound, 8 * bound, 4 * bound
    for name, by, most in zip(("weights", "state", "history"), found, bounds):
        if not by <= most:
            raise AssertionError(f"{name}: off by {by:.1e} > {most:.1e}")


def assert_same_fit(
    run: Run,
    build: Callable[[], keras.Model],
    x: Any,
    y: Any = None,
    *,
    dtype: str = "float32",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **options: Any,
) -> None:
    """Asserts that a model trains in micro-batches as on large batches.

    Both fits multiply float32 in full: a GPU that rounds products to 10 bits
    of the mantissa (TF32) would differ between batches of two sizes.

    Args:
        run: How to train, as of `runs`.
        build: Function that returns a compiled model, always with the same
            weights.
        x: Inputs as arrays, at least `run.examples` of them.
        y: Targets, as many.
        dtype: What the model computes in, for `tolerance`.
        callbacks: More callbacks, of both fits, the one in micro-batches first.
        **options: More of `fit`'s.

    Raises:
        AssertionError: If the fits differ by more than rounding.
        ValueError: If `build` returns the same model, or other weights.
        ValueError: If there are fewer examples than `run` has.

    Example:

    ```python
    import keras
    import numpy as np
    from hypothesis import given, settings
    from kaccum.testing import assert_same_fit, runs

    x, y = np.random.default_rng(0).normal(size=(2, 40, 3))

    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    @settings(max_examples=5, deadline=None)
    @given(runs())
    def test_my_model(run):
        assert_same_fit(run, build, x, y)

    test_my_model()
    print("passed")  # passed: no run was found that differs
    ```
    """
    models = build(), build()
    if models[0] is models[1]:
        raise ValueError(
            "`build` must return a new model each time. Received: one that "
            "returned the same."
        )
    for one, other in zip(*(model.get_weights() for model in models)):
        if not np.array_equal(one, other, equal_nan=True):
            raise ValueError(
                "`build` must return models with the same weights: call "
                "`keras.utils.set_random_seed` in it. Received: models whose "
                f"first weights of shape {one.shape} differ."
            )
    both = [run.callback, *callbacks]
    micro = fit_micro(run, models[0], x, y, callbacks=both, **options)
    large = fit_large(run, models[1], x, y, callbacks=callbacks, **options)
    assert_same(micro, large, tolerance(run.steps, dtype))


def _fit(
    run: Run,
    model: keras.Model,
    x: Any,
    y: Any,
    batch_size: int,
    callbacks: Sequence[keras.callbacks.Callback],
    options: dict[str, Any],
) -> Result:
    weights = options.pop("sample_weight", None)
    arrays = x, y, weights
    if examples_in(arrays) < run.examples:
        raise ValueError(
            "The data must have as many examples as the run. Received: "
            f"{examples_in(arrays)} for {run}."
        )
    x, y, weights = part_of(arrays, 0, run.examples)
    with backend().full_precision(), warnings.catch_warnings():
        # Drawn runs have such windows on purpose.
        for mistake in ("`steps` must not be more", "`micro_batch_size` must"):
            warnings.filterwarnings("ignore", mistake)
        history = model.fit(
            x,
            y,
            sample_weight=weights,
            batch_size=batch_size,
            callbacks=list(callbacks),
            **{"verbose": 0, "shuffle": False, "epochs": run.epochs, **options},
        ).history
    return result_of(model, history)


def _dense_gradients(
    optimizer: keras.optimizers.Optimizer,
) -> AbstractContextManager[None]:
    def stand_in(apply: Callable[..., Any]) -> Callable[..., Any]:
        def dense_apply(grads: Any, trainable_variables: Any = None) -> Any:
            dense = [g if g is None else backend().dense(g) for g in grads]
            return apply(dense, trainable_variables)

        return dense_apply

    owner = "the oracle's optimizer"
    return patched([replacing(owner, "apply", optimizer, stand_in)])


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return math.inf
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    a, b = a[finite], b[finite]
    gap = np.max(np.abs(a - b), initial=0.0)
    return 0.0 if gap == 0 else float(gap / max(np.max(np.abs(b)), 1e-30))
