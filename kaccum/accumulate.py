"""`accumulate`: for training loops that call `train_on_batch`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import keras

from kaccum.backends import backend
from kaccum.checks import check_model, check_weight
from kaccum.fit.session import Session, is_plain_fit
from kaccum.fit.window import Window, checked_steps
from kaccum.step.training_step import Options


def accumulate(
    model: keras.Model,
    steps: int,
    *,
    weight: Literal["sum"] | Callable[[Any, Any, Any], Any] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Makes `model.train_on_batch` accumulate inside a `with` block.

    Every `steps` calls (a window) make one update, that of the union of their
    batches. At the end of the block a window that is still open is applied,
    scaled by its own size; if an exception leaves the block it is dropped. An
    error inside of `train_on_batch` that is caught in the block drops the open
    window too: how much of it was added is not known.

    Several models may accumulate at the same time, each with its own window.
    What `train_on_batch` returns is of its own batch.

    Args:
        model: A compiled `keras.Model`.
        steps: int >= 1, the number of calls that make one update. 1 changes
            nothing.
        weight: As of `GradientAccumulationCallback`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If `steps` is below 1.
        ValueError: If the model is not compiled, or has no optimizer.
        ValueError: If the optimizer has `gradient_accumulation_steps` of its
            own.
        RuntimeError: If the model accumulates already, or fits in the block.
        RuntimeError: If the model's `train_step` or its strategy is one that
            cannot be accumulated exactly.

    Example:

    ```python
    import keras
    import numpy as np

    from kaccum import accumulate

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    with accumulate(model, 4):
        for _ in range(10):
            model.train_on_batch(np.ones((8, 4)), np.ones((8, 1)))
    print(int(model.optimizer.iterations))  # 3: of 4, 4 and 2 micro-batches
    ```
    """
    if isinstance(steps, keras.Model):
        raise TypeError(
            "`accumulate` must be called with a model and then `steps`. "
            "Received: them the other way round. Write `accumulate(model, "
            "steps)`."
        )
    steps = checked_steps(steps)
    backend()
    check_model(model)
    check_weight(weight)
    options = Options(weight=weight)
    return _Accumulating(lambda: _accumulating(model, steps, options))


class _Accumulating(
    contextlib.ContextDecorator, contextlib.AbstractContextManager[None]
):
    """What `accumulate` returns: it does nothing until it is entered.

    As a decorator it is entered whenever the function is called.
    """

    def __init__(
        self, make: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._make = make
        self._inner = make()
        self._is_entered = False

    def __call__(self, function: Any) -> Any:
        self._is_entered = True
        return super().__call__(function)

    def _recreate_cm(self) -> _Accumulating:
        return _Accumulating(self._make)

    def __enter__(self) -> None:
        self._is_entered = True
        return self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._inner.__exit__(*error)

    def __del__(self) -> None:
        if not self._is_entered:
            warnings.warn(
                "`accumulate` must be entered for gradients to be accumulated. "
                "Received: a call without `with`. Write `with "
                "accumulate(model, steps):` around the training loop.",
                stacklevel=2,
            )


@contextlib.contextmanager
def _accumulating(
    model: keras.Model, steps: int, options: Options
) -> Iterator[None]:
    # It may have been compiled again since.
    check_model(model)
    # Also ends an earlier session that was interrupted.
    model.make_train_function()
    if Session.installed_on(model) is not None:
        raise RuntimeError(
            "`accumulate` must be given a model that does not accumulate yet. "
            "Received: one inside of another `accumulate`, or of a `fit` with "
            "a `GradientAccumulationCallback`."
        )
    if is_plain_fit(model, steps):
        yield
        return
    session = Session.of(model)
    try:
        session.take_over(Window(steps), is_for_fit=False, options=options)
        yield
        session.close_window()
        session.warn_of_proportions()
    finally:
        session.give_back()
