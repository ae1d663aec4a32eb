"""`GradientAccumulationCallback`: its arguments and Keras hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import keras

from kaccum import callers
from kaccum.backends import backend
from kaccum.checks import (
    Weight,
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
from kaccum.fit.window import Schedule, Steps, Window, check_by
from kaccum.step.training_step import Options
from kaccum.sums.noise import NOTHING, GradientNoise


class GradientAccumulationCallback(keras.callbacks.Callback):
    """Trains as with a large batch, in the memory of a small one.

    Gradients of micro-batches are added up; after a window of them the
    optimizer makes one update with the gradient of their union. Weights,
    optimizer variables, the number of updates and the history equal those of
    the large-batch fit, to rounding.

    With `steps`, each batch that `fit` takes from the data is a micro-batch,
    and an epoch's last window may be shorter; it is scaled by its own size.
    With `micro_batch_size`, each batch is a window, which is cut.

    Under a `tf.distribute.MirroredStrategy`, or a `keras.distribution` on JAX,
    it is the large batch of a single device, too. Replicas of a strategy keep
    sums of their own, which are added up once an update.

    Unless `verbose=0`, a fit says in one line how examples are cut. It warns,
    once, of what it does else than the large batch: losses that are neither a
    mean nor a sum over examples (they are measured in the first fit of a
    model), outputs whose denominators are not in proportion, state that moves
    once a micro-batch; and of arguments that are seldom meant.

    Args:
        steps: How many batches make one update: int >= 1; a dict of them by
            first epoch, as `{0: 1, 5: 4}`; or a function of the epoch (an int,
            from 0 on) that returns one. 1 is a plain fit, but with another
            argument that a plain fit knows nothing of.
        by: "epoch"; or "update", if the keys of the dict, and what the function
            is called with, are numbers of updates that the optimizer has made
            (its `iterations`, those of earlier fits, too). The length of a
            window is fixed when it opens. With `steps_per_execution`, all
            windows of an execution count as updates until it is over.
        micro_batch_size: How many examples a micro-batch has at most: int >= 1,
            or "auto". A batch is cut into as few micro-batches as that needs,
            as equal as possible; each device that has a part of it cuts that.
            "auto" starts with the whole batch; when memory runs out it takes
            back all that the attempt changed in Keras variables, halves the
            size and trains on the same batch again. It keeps the size for the
            rest of this fit, and for the next ones of the same model, and
            prints it. Validation inside of `fit` is cut, too, with the results
            of whole batches; "auto" halves by itself there.
        skip_nonfinite: Whether to leave a micro-batch with a NaN or infinite
            gradient out of its window, as if it had never come: its gradient,
            its metrics, and all else that the step assigned (Keras variables,
            say moving averages). A window of nothing but such micro-batches
            makes no update. The log of each epoch gets an entry
            `skipped_micro_batches`.
        weight: "sum", if the loss is a sum over the batch; or a function of
            `(x, y, sample_weight)` that returns what a micro-batch's mean loss
            divides by, a scalar (its number of tokens that count, say). By
            default it is heard and measured in Keras's losses: this is for a
            loss or a `train_step` of your own that hides it.
        whole_batch_loss: Whether the loss is computed of the whole window, for
            losses that are neither a mean nor a sum over examples: contrastive
            ones, Dice, outputs with different masks. Each micro-batch runs
            forward twice; the outputs of the window are kept in memory. The log
            is that of whole windows, and stands still inside of one.
        log_gradients: Whether each epoch's log has `gradient_norm`, the norm of
            the window's gradient as the optimizer gets it, before it clips,
            mean over the epoch's updates; and `noise_scale`, the gradient noise
            scale, in examples, of the last 100 updates or so (McCandlish et al.
            2018, arXiv:1812.06162, appendix A). It is NaN where micro-batches
            tell none: if the epoch had windows of one only, with
            `whole_batch_loss`, where one loss is a mean and another one a sum,
            or where the estimate of the gradient's signal is not positive. See
            `gradients`.
        on_update: Function called with the number of updates (int) that this
            fit made so far, after each one. With `steps_per_execution` it is
            called after each execution, once for each update in it.

    Raises:
        TypeError: If an argument is of another type, or a function that takes
            other arguments; at the start of an epoch, if the function `steps`
            returns something else than an integer.
        ValueError: If not exactly one of `steps` and `micro_batch_size` is
            given, either is below 1, `steps` is a dict without epoch (or
            update) 0, `micro_batch_size` another string than "auto", or `by`
            another one than "epoch" and "update"; if `by="update"` is given
            with an int, or without `steps`. When
            `fit` starts: if the model has no optimizer, or one with
            `gradient_accumulation_steps`, or, with `skip_nonfinite`, a
            `LossScaleOptimizer`, or, with `whole_batch_loss`, a `train_step`
            of its own. With `whole_batch_loss`: if `weight` or `skip_nonfinite`
            is given, too; in the first step, if outputs have not the examples
            along their first axis. At the start of an epoch: if the function
            `steps` returns less than 1. In the first step: if `weight` returns
            no scalar, or some losses are means and others sums in a
            `train_step` or `compute_loss` of the model's own.
        RuntimeError: When `fit` starts: if another callback accumulates
            already, the hook is called outside of the `fit` of its model, the
            model's `tf.distribute` strategy is neither a `MirroredStrategy` nor
            a `OneDeviceStrategy`, or XLA would compile several replicas; if
            there are several, with `whole_batch_loss`. In the
            first step: if the model's `train_step` never applies gradients,
            does so inside of a `tf.function` or `jax.jit` of its own, or
            applies some by another optimizer. In a callback that calls `fit` on
            the same model. At once: if Keras runs on another backend than
            TensorFlow, JAX or PyTorch.

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
        steps: Steps | None = None,
        *,
        by: Literal["epoch", "update"] = "epoch",
        micro_batch_size: int | Literal["auto"] | None = None,
        skip_nonfinite: bool = False,
        weight: Weight = None,
        whole_batch_loss: bool = False,
        log_gradients: bool = False,
        on_update: Callable[[int], Any] | None = None,
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
    def micro_batch_size(self) -> int | str | None:
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
