"""`GradientAccumulationCallback`: its arguments and Keras hooks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from kaccum.keras_private import callbacks_of_fit
from kaccum.session import Session
from kaccum.window import Window


class GradientAccumulationCallback(keras.callbacks.Callback):
    """Trains as a batch `steps` times as large would, in the memory of one.

    Each batch that `fit` takes from the data is a micro-batch: its gradient is
    added to a sum. After `steps` of them (a window), the optimizer makes one
    update with the gradient of their union. Weights, optimizer variables, the
    number of updates and the history equal those of the large-batch fit, to
    rounding. An epoch's last window may be shorter; it is scaled by its own
    size.

    Args:
        steps: int >= 1, the number of batches that make one update.
            1 is a plain fit.

    Raises:
        TypeError: If `steps` is not an integer.
        ValueError: If `steps` is below 1. When `fit` starts: if the model has
            no optimizer, or one with `gradient_accumulation_steps`. In the
            first step: if some losses are means and others sums.
        RuntimeError: When `fit` starts: if another callback accumulates
            already, Keras runs on another backend than TensorFlow, or a
            `tf.distribute` strategy has several replicas. In the first step:
            if the model's `train_step` never applies gradients, or applies
            some by another optimizer.

    Example:

    ```python
    import keras
    import numpy as np

    from kaccum import GradientAccumulationCallback

    x, y = np.ones((64, 4)), np.ones((64, 1))
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, y, batch_size=8, callbacks=[GradientAccumulationCallback(4)])
    print(int(model.optimizer.iterations))  # 2: 64 examples, 32 an update
    ```
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = _checked_steps(steps)
        self._session: Session | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes the training step of the model over."""
        _check_callbacks(callbacks_of_fit())
        _check_model(self.model)
        if self.steps > 1:
            self._session = Session.of(self.model)
            self._session.take_over(Window(self.steps))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Gives the training step back."""
        if self._session is not None:
            self._session.give_back()
            self._session = None


def _checked_steps(steps: Any) -> int:
    received = f"Received: steps={steps!r} ({type(steps).__name__})."
    rule = "`steps` must be an integer >= 1."
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"{rule} {received}")
    if steps < 1:
        raise ValueError(f"{rule} {received}")
    return int(steps)


def _check_callbacks(callbacks: list[keras.callbacks.Callback]) -> None:
    kind = GradientAccumulationCallback
    count = sum(isinstance(callback, kind) for callback in callbacks)
    if count > 1:
        raise RuntimeError(
            "Only one callback of a `fit` must accumulate gradients. "
            f"Received: {count} of `{kind.__name__}`. Keep one."
        )


def _check_model(model: keras.Model) -> None:
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`GradientAccumulationCallback` must run on Keras's TensorFlow "
            f"backend. Received: backend={keras.backend.backend()!r}. Set the "
            "environment variable `KERAS_BACKEND=tensorflow`."
        )
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise RuntimeError(
            "The model must train on one device for its gradients to be "
            f"accumulated exactly. Received: a {replicas}-replica "
            f"{type(model.distribute_strategy).__name__}. Build the model "
            "outside of a strategy's scope."
        )
    if model.optimizer is None:
        raise ValueError(
            "The model must have an optimizer to accumulate gradients for. "
            "Received: optimizer=None. Pass one to `compile`."
        )
    for optimizer in _with_inner(model.optimizer):
        steps = getattr(optimizer, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                "The optimizer must not accumulate gradients itself. Received: "
                f"{type(optimizer).__name__} with gradient_accumulation_steps="
                f"{steps}. Leave that argument out."
            )


def _with_inner(optimizer: Any) -> list[Any]:
    """An optimizer and those it wraps."""
    inner = list(getattr(optimizer, "optimizers", []))
    if hasattr(optimizer, "inner_optimizer"):
        inner.append(optimizer.inner_optimizer)
    return [optimizer, *(o for i in inner for o in _with_inner(i))]
