"""A window whose loss is that of its whole batch: kept until it closes."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from kaccum.backends import Runner, backend
from kaccum.step.differences import Differences
from kaccum.step.outputs import Call


class _Part(NamedTuple):
    """A micro-batch of the open window.

    Args:
        batch: What a `train_step` would get.
        heard: What the model returned for it.
        before: What variables held before, that the model assigns in its call.
    """

    batch: Any
    heard: Call
    before: Any


class WholeWindow:
    """The micro-batches of the open window, and their outputs.

    Args:
        runner: What runs the passes of the model's step.
        differences: What is told of that.
    """

    def __init__(self, runner: Runner, differences: Differences) -> None:
        self._runner = runner
        self._differences = differences
        self._parts: list[_Part] = []
        self._is_checked = False

    def add(self, batch: Any) -> None:
        """Hears a micro-batch.

        Raises:
            ValueError: If an output has another first axis than the examples.
        """
        before = self._runner.state()
        heard = self._runner.passed("hear", batch)
        _check_outputs(heard, batch)
        self._parts.append(_Part(batch, heard, before))

    def close(self, batch: Any = None) -> Any:
        """Computes the loss of the window, and adds its gradient to the sums.

        Args:
            batch: The batch that was cut, if one was.

        Returns:
            The logs.
        """
        runner, parts = self._runner, self._parts
        batches = [part.batch for part in parts] if batch is None else [batch]
        logs, gradients = runner.passed(
            "finish", (batches, [part.heard for part in parts])
        )
        # A loss may have moved state of its own.
        after = runner.state()
        differences = []
        for part, of_part in zip(parts, gradients):
            # With the random numbers of before.
            runner.return_to(part.before)
            pushed = (part.batch, of_part, part.heard)
            differences.append(runner.passed("push", pushed))
        runner.return_to(after)
        self.forget()
        if not self._is_checked:
            # A number of the device: once.
            self._is_checked = True
            self._differences.tell_of_other_outputs(
                max(map(float, differences))
            )
        return logs

    def forget(self) -> None:
        """Starts an empty window."""
        self._parts = []
        self._runner.forget_states()


def _check_outputs(heard: Call, batch: Any) -> None:
    examples = backend().examples_in(batch)
    try:
        found = backend().examples_in(heard.outputs)
    except ValueError:
        found = []
    if found != examples:
        shapes = keras.tree.map_structure(
            lambda leaf: tuple(leaf.shape), heard.outputs
        )
        raise ValueError(
            "The outputs of a model must have the examples along their first "
            "axis to be joined for `whole_batch_loss`. Received: outputs of "
            f"shapes {shapes} for {sum(examples)} examples."
        )
