"""What engines do alike where a step assigns to variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import keras

from kaccum.assignments import BatchState

if TYPE_CHECKING:
    from kaccum.step import TrainingStep


class AssigningEngine:
    """Runs a training step; how, a subclass says by `run` and `update`.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
    """

    def __init__(self, model: keras.Model, step: TrainingStep) -> None:
        self.model = model
        self._step = step
        self._plain = model.train_function
        self._before = BatchState()
        step.on_assignment = self._before.hear

    def start(self) -> None:
        """Makes ready for training: all sums are empty."""
        self._step.start()

    def stop(self) -> None:
        """Frees the sums' memory."""
        self._step.release()

    def called(self, run: Callable[[Any], Any], batches: Any) -> Any:
        """Runs something as the model's train function.

        Args:
            run: Function of an iterator of batches that returns logs.
            batches: What Keras calls a train function with: such an iterator,
                or a list of batches.

        Returns:
            The logs.
        """
        return run(iter(batches) if isinstance(batches, list) else batches)

    def told(self, function: Callable[[int], Any], updates: int) -> None:
        """Calls a function of the user's own inside of the train function."""
        function(updates)

    def remember(self) -> None:
        """Remembers what an attempt to train on a batch may change."""
        self._step.remember_skipped()
        self._before.remember()

    def wait(self) -> None:
        """Waits for an attempt: it has failed where this raises."""

    def restore(self) -> None:
        """Takes a failed attempt back."""
        self._step.reset()
        self._step.restore_skipped()
        self._before.restore()

    def forget(self) -> None:
        """Forgets what was remembered."""
        self._before.forget()


def new_variable(shape: Any, dtype: Any, name: str) -> keras.Variable:
    """A Keras variable of zeros, of which each replica has its own."""
    return keras.Variable(
        "zeros",
        shape,
        dtype,
        trainable=False,
        # It may be read inside of a layer, which may compute in half.
        autocast=False,
        aggregation="sum",
        synchronization="on_read",
        name=name,
    )


def note(value: Any) -> Any:
    """A scalar of a step, for `noted`."""
    return value


def noted(note: Any) -> Any:
    """The scalar that was noted."""
    return note


def can_hear() -> bool:
    """Whether what is called now may use variables of ours."""
    return True


def whole_state() -> AbstractContextManager[None]:
    """A context that knows the value of every variable of the model."""
    return contextlib.nullcontext()
