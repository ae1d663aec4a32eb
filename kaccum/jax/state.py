"""The variables of a model while a training step runs, or is traced.

Keras passes their values to a step and gets new ones from it. Here they stand
in a scope around the whole step, so that hooks find them as on other backends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import keras

from kaccum.jax import cells
from kaccum.jax.cells import Frame


class State(NamedTuple):
    """The values that Keras passes, each a list, or their variables."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]


def variables_of(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> State:
    """The variables whose values Keras passes."""
    return State(
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
        model.metrics_variables,
    )


class StepFrame(Frame):
    """The frame of a whole step, with the variables of its model.

    Args:
        variables: The variables.
        state: What they hold.
        values: What cells hold.
    """

    def __init__(
        self, variables: State, state: State, values: dict[Any, Any]
    ) -> None:
        super().__init__(values=values)
        self.variables = variables
        self._scope = keras.StatelessScope(_pairs(variables, state))

    @contextlib.contextmanager
    def in_scope(self) -> Iterator[None]:
        """Makes this the frame, and its values those of the variables."""
        with cells.entered(self), self._scope:
            yield

    @property
    def state(self) -> State:
        """What the variables hold now."""
        now = self._scope.get_current_value
        return State(*([now(v) for v in group] for group in self.variables))

    def assign(self, state: State) -> None:
        """Makes the variables hold something else."""
        for pair in _pairs(self.variables, state):
            self._scope.add_update(pair)


def _pairs(variables: State, state: State) -> list[tuple[Any, Any]]:
    groups = zip(variables, state)
    return [pair for group, held in groups for pair in zip(group, held)]


def step_frame() -> Any:
    """The `StepFrame` that this thread runs, `None` outside of steps."""
    frame = cells.frame()
    while frame is not None and not isinstance(frame, StepFrame):
        frame = frame.outer
    return frame


@contextlib.contextmanager
def whole_state(changes: Iterable[tuple[Any, Any]] = ()) -> Iterator[None]:
    """A context that knows the value of every variable of the model.

    Keras's own scopes know some of them only.

    Args:
        changes: Variables, and what they hold instead.
    """
    pairs = list(changes)
    frame = step_frame()
    if frame is not None:
        pairs = _pairs(frame.variables, frame.state) + pairs
    if not pairs:
        yield
        return
    with keras.StatelessScope(pairs):
        yield


def train_step_of(model: keras.Model) -> Callable[[Any], Any]:
    """A model's training step: a function of what `fit` gives it.

    It changes the variables of the frame, as on other backends.
    """

    def run(data: Any) -> Any:
        frame = step_frame()
        logs, state = model.train_step(tuple(frame.state), data)
        frame.assign(State(*state))
        return logs

    return run


class MicroBatchState:
    """What a step began with, known inside of it."""

    def __init__(self) -> None:
        self._frame = step_frame()
        self._state = self._frame.state
        self._cells = dict(self._frame.values)

    def hear(self, variable: Any) -> None:
        """Nothing is assigned: the old values are still there."""

    def restore_unless(self, is_kept: Any) -> None:
        """Takes all changes back where `is_kept` (scalar bool) is false."""

        def chosen(new: Any, old: Any) -> Any:
            return new if new is old else jnp.where(is_kept, new, old)

        frame = self._frame
        frame.assign(
            State(
                *(
                    [chosen(*pair) for pair in zip(new, old)]
                    for new, old in zip(frame.state, self._state)
                )
            )
        )
        for cell, value in list(frame.values.items()):
            if not cell.is_note:
                old = self._cells.get(cell, cell.now)
                frame.write(cell, chosen(value, old))
