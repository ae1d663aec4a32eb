"""What engines do alike where a step assigns to variables."""

from __future__ import annotations

from collections.abc import Callable
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
