"""`GradientAccumulationCallback`: its arguments and Keras hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import keras

from kaccum import callers
from kaccum.backends import backend
from kaccum.checks import (
    check_calls,
    check_flag,
    check_model,
    check_step_for_whole_batches,
    check_weight,
    check_whole_batch_loss,
    is_scaling_losses,
    received,
)
from kaccum.fit.micro_batches import MicroBatchSize
from kaccum.fit.plan import (
    OF_ITS_OWN,
    Data,
    advice,
    line_of_size,
    line_of_steps,
    line_of_updates,
    say,
    updates_of,
    warn_of_mistakes,
)
from kaccum.fit.session import Session, is_plain_fit
from kaccum.fit.window import Schedule, Window, check_by
from kaccum.step.training_step import Options
from kaccum.sums.noise import NOTHING, GradientNoise


class GradientAccumulationCallback(keras.callbacks.Callback):
    """Trains as with a large batch, in the memory of a small one.

    Adds up the gradients of some micro-batches, the window, and has the
    optimizer make one update of them. Weights, optimizer variables, the number
    of updates and the history equal those of the large-batch fit, to rounding.
    Unless `verbose=0`, a fit says in one line how it cuts the examples. It
    warns of whatever it does else than the large batch.

    Args:
        steps: How many batches of `fit` make one update: an int >= 1, a dict of
            them by first epoch, as `{0: 1, 5: 4}`, or a function of the epoch.
        by: "epoch"; or "update", if the keys of the dict, or what the function
            is called with, are numbers of updates (the optimizer's).
        micro_batch_size: Instead of `steps`: how many examples a micro-batch
            has at most, an int >= 1. Each batch of `fit` is a window, and is
            cut. "auto" starts with whole batches, and halves the size whenever
            memory runs out.
        skip_nonfinite: Whether to leave out a micro-batch whose gradient has a
            NaN or an infinity. Logs `skipped_micro_batches`.
        weight: What the loss of a micro-batch divides by, if a loss or a
            `train_step` of your own hides it: "sum" for nothing, or a function
            of `(x, y, sample_weight)` that returns a scalar.
        whole_batch_loss: Whether the loss is that of the whole window: for
            losses that compare examples, or divide sums over the batch. Each
            micro-batch then runs forward twice.
        log_gradients: Whether to log `gradient_norm` and `noise_scale`, the
            gradient noise scale in examples (McCandlish et al. 2018,
            arXiv:1812.06162, appendix A).
        on_update: Function called after each update, with how many of them (an
            int) this fit has made.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If not exactly one of `steps` and `micro_batch_size` is
            given.
        ValueError: If an argument has another value, or excludes another one.
        ValueError: In `fit`, if the optimizer has
            `gradient_accumulation_steps` of its own.
        ValueError: In `fit`, if `steps` or `weight` returns another value.
        RuntimeError: In `fit`, if another callback accumulates, too.
        RuntimeError: In `fit`, if the model's `train_step` or its strategy is
            one that cannot be accumulated exactly.

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

    def __init__(
        self,
        steps: int | dict[int, int] | Callable[[int], int] | None = None,
        *,
        by: Literal["epoch", "update"] = "epoch",
        micro_batch_size: int | Literal["auto"] | None = None,
        skip_nonfinite: bool = False,
        weight: Literal["sum"] | Callable[[Any, Any, Any], Any] | None = None,
        whole_batch_loss: bool = False,
        log_gradients: bool = False,
        on_update: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__()
        backend()
        if (steps is None) == (micro_batch_size is None):
            raise ValueError(
                "Exactly one of `steps` and `micro_batch_size` must be given. "
                f"Received: steps={steps!r}, "
                f"micro_batch_size={micro_batch_size!r}."
            )
        self._schedule: Schedule | None = None
        self._size: MicroBatchSize | None = None
        self._asked_size = micro_batch_size
        check_by(by, steps)
        if steps is not None:
            self._schedule = Schedule(steps, by)
        if micro_batch_size is not None:
            self._size = MicroBatchSize(micro_batch_size)
        check_flag("skip_nonfinite", skip_nonfinite)
        check_weight(weight)
        check_whole_batch_loss(whole_batch_loss, weight, skip_nonfinite)
        check_flag("log_gradients", log_gradients)
        if on_update is not None and not callable(on_update):
            raise TypeError(
                "`on_update` must be a function of the number of updates. "
                f"{received('on_update', on_update)}"
            )
        if on_update is not None:
            check_calls("on_update", on_update, 1)
        self.steps = steps if self._schedule is None else self._schedule.steps
        self.by = by
        self.skip_nonfinite = skip_nonfinite
        self.weight = weight
        self.whole_batch_loss = whole_batch_loss
        self.log_gradients = log_gradients
        self.on_update = on_update
        self._session: Session | None = None
        self._skipped = self._updates = 0
        self._gradients = NOTHING if log_gradients else None
        self._data = Data()
        self._said: int | None = None
        self._model_of_size: Any = None

    @property
    def micro_batch_size(self) -> int | Literal["auto"] | None:
        """The most examples of a micro-batch; "auto" until that is known.

        `None` where `steps` was given.
        """
        return None if self._size is None else self._size.size

    @property
    def skipped_micro_batches(self) -> int:
        """How many micro-batches this (or the last) fit left out so far."""
        return self._session.skipped if self._session else self._skipped

    @property
    def updates(self) -> int:
        """How many updates this (or the last) fit made so far."""
        return self._session.updates if self._session else self._updates

    @property
    def gradients(self) -> GradientNoise | None:
        """Signal, noise and their ratio in the gradients of the last updates.

        `None` without `log_gradients`. The numbers are NaN before the first
        update of the (last) fit whose window has several micro-batches.
        """
        return self._session.gradients if self._session else self._gradients

    def __repr__(self) -> str:
        arguments = {
            "steps": self.steps,
            "by": None if self.by == "epoch" else self.by,
            "micro_batch_size": self._asked_size,
            "skip_nonfinite": self.skip_nonfinite or None,
            "weight": self.weight,
            "whole_batch_loss": self.whole_batch_loss or None,
            "log_gradients": self.log_gradients or None,
            "on_update": self.on_update,
        }
        given = [f"{k}={v!r}" for k, v in arguments.items() if v is not None]
        return f"{type(self).__name__}({', '.join(given)})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy trains a model of its own.
        return {
            **vars(self),
            "_model": None,
            "_session": None,
            "_skipped": self.skipped_micro_batches,
            "_updates": self.updates,
            "_gradients": self.gradients,
            "_model_of_size": None,
        }

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes the training step of the model over."""
        _check_callbacks(callers.callbacks_of_fit())
        check_model(self.model)
        if not callers.is_called_in_fit(self.model):
            raise RuntimeError(
                "The hooks of a callback must be called by the `fit` of its "
                "model for gradients to be accumulated. Received: "
                "`on_train_begin` outside of it. In a training loop of your "
                "own write `with kaccum.accumulate(model, steps):` around it."
            )
        if self.skip_nonfinite and is_scaling_losses(self.model.optimizer):
            raise ValueError(
                "`skip_nonfinite` must not be used with a "
                "`LossScaleOptimizer`, which has to see an overflow to lower "
                "its scale. Received: skip_nonfinite=True and a "
                f"{type(self.model.optimizer).__name__}. Leave one of them out."
            )
        options = Options(
            self.skip_nonfinite,
            self.weight,
            self.whole_batch_loss,
            self.log_gradients,
        )
        if self.whole_batch_loss:
            check_step_for_whole_batches(self.model)
        self._skipped = self._updates = 0
        self._said = None
        self._data = Data.of_fit(self.model, self.params)
        is_plain = options.are_of_keras and self.on_update is None
        if is_plain and self._schedule and self._schedule.is_always_one:
            if is_plain_fit(self.model, 1):
                self._updates = -updates_of(self.model.optimizer)
                return
        if self._size is not None:
            known = self._model_of_size
            if known is None or known() is not self.model:
                self._size.forget()
                self._model_of_size = weakref.ref(self.model)
            self._size.verbose = self.params.get("verbose")
        self._session = Session.of(self.model)
        self._session.take_over(
            Window(1),
            is_for_fit=True,
            size=self._size,
            options=options,
            on_update=self.on_update,
        )

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Starts an empty window, of this epoch's length."""
        if self._session is not None:
            schedule = self._schedule
            if schedule and schedule.is_by_update:
                begin = self._session.begin_epoch
                steps = begin(schedule.at, is_by_update=True)
            else:
                steps = schedule.at(epoch) if schedule else 1
                self._session.begin_epoch(lambda updates: steps)
            self._session.batch_size = self._data.batch_size
            if self._size is None:
                self._session.advice = advice(steps, None, self._data)
            elif not self._size.is_auto:
                size = int(self._size.size)
                self._session.advice = advice(steps, size, self._data)
            self._say(steps)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Gives the training step back."""
        if self._session is not None:
            self._skipped = self._session.skipped
            self._updates = self._session.updates
            self._gradients = self._session.gradients
            self._session.give_back()
            self._session = None
        else:
            self._updates += updates_of(self.model.optimizer)

    def _say(self, steps: int) -> None:
        """Tells the user what is going to be, where that changes."""
        if steps == self._said or self._session is None:
            return
        self._said = steps
        if self._size is not None:
            line = line_of_size(self._size.size, self._data)
        elif self._schedule and self._schedule.is_by_update:
            updates = updates_of(self.model.optimizer)
            change = self._schedule.change_after(updates)
            line = line_of_updates(steps, change, self._data)
        else:
            line = line_of_steps(steps, self._data)
            warn_of_mistakes(steps, self._data, self.model.optimizer)
        if self._session.has_own_step:
            line += OF_ITS_OWN
        say(line, self.params.get("verbose"))


def _check_callbacks(callbacks: list[keras.callbacks.Callback]) -> None:
    kind = GradientAccumulationCallback
    count = sum(isinstance(callback, kind) for callback in callbacks)
    if count > 1:
        raise RuntimeError(
            "Only one callback of a `fit` must accumulate gradients. "
            f"Received: {count} of `{kind.__name__}`. Keep one."
        )
