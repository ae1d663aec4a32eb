"""Runs a training step eagerly, and the update where a window closes.

Told which step to run, and leaves the counting of micro-batches to others.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from kaccum.backend import Ran
from kaccum.engine import AssigningEngine


class Engine(AssigningEngine):
    """Runs a training step.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
    """

    end_of_data = StopIteration

    def restore(self) -> None:
        """Takes a failed attempt back, and what its gradients hold."""
        self.model.zero_grad()
        super().restore()

    def run(self, iterator: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        """Runs one training step for each entry of `closes`.

        Args:
            iterator: The batches.
            closes: For each micro-batch, whether it closes its window.
            is_plain: Whether to run the model's own step, which updates.

        Raises:
            StopIteration: If there was no data.
        """
        logs, ran, updates = None, 0, 0
        # Once for all of them: an update is not a step.
        place = contextlib.nullcontext() if is_plain else self._step.in_place()
        with place:
            for is_last, batch in zip(closes, iterator):
                if is_plain:
                    logs, made = self._plain([batch]), 1
                else:
                    logs = self._step.run(batch)
                    made = self.update() if is_last else 0
                ran, updates = ran + 1, updates + made
        if ran == 0:
            raise StopIteration
        return Ran(logs, ran, updates)

    @torch.no_grad()
    def update(self) -> int:
        """Makes an update of what was added, without another micro-batch.

        Returns:
            The number of updates: 0 where all micro-batches were left out.
        """
        if self._step.skips and bool(self._step.is_empty()):
            return 0
        self._step.apply()
        self._step.empty()
        return 1
