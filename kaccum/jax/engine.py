"""The compiled steps: *add*, and *update*, which applies the sums.

Told which step to run, and leaves the counting of micro-batches to others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import keras

from kaccum.backend import Ran
from kaccum.jax.arithmetic import is_eager
from kaccum.jax.cells import Cell, leaving_gradients, sharding_of
from kaccum.jax.state import State, StepFrame, variables_of
from kaccum.keras_private import hand_over_state

if TYPE_CHECKING:
    from kaccum.step import TrainingStep


class _MissingCells(Exception):
    """Says that what was traced needs more arguments."""

    def __init__(self, missing: list[Cell]) -> None:
        super().__init__()
        self.missing = missing


class Engine:
    """Compiled versions of a training step.

    Between them, this holds what Keras passes as the state, and cells hold the
    sums: Keras does not know of them. *Add* is not given the weights and the
    optimizer's variables to change, only to read.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
    """

    end_of_data = StopIteration

    def __init__(self, model: keras.Model, step: TrainingStep) -> None:
        self.model = model
        self._step = step
        # The model may be compiled with another one before the last update.
        self._optimizer = model.optimizer
        self._plain = model.train_function
        self._cells: list[Cell] = []
        # A `State` while the train function runs.
        self._state: Any = None
        self._before: Any = None
        # What is donated changes in its own memory. An error in *add* leaves
        # what it was called with, but for the cells.
        self._add = self._compiled(self._traced_add, donated=[1])
        self._update = self._compiled(self._traced_update, donated=[0, 1])

    def start(self) -> None:
        """Makes ready for training: all sums are empty."""
        self._step.start()

    def stop(self) -> None:
        """Frees the sums' memory."""
        self._step.release()

    def called(
        self, run: Callable[[Any], Any], state: Any, iterator: Any
    ) -> Any:
        """Runs something as the model's train function.

        Args:
            run: Function of an iterator of batches that returns logs.
            state: What the model's variables hold, as Keras passes it.
            iterator: The batches.

        Returns:
            The logs and the new state.
        """
        self._state = State(*state)
        try:
            logs = run(iterator)
        except BaseException:
            # Keras has the state of before, whose memory may be used again.
            self._hand_over()
            raise
        finally:
            new, self._state = self._state, None
        return logs, tuple(new)

    def told(self, function: Callable[[int], Any], updates: int) -> None:
        """Calls a function of the user's own inside of the train function.

        It may look at the model, and change it.
        """
        if self._state is None:
            function(updates)
            return
        self._hand_over()
        self.model.jax_state_sync()
        function(updates)
        self._state = self._held_by_variables()
        self._hand_over()

    def remember(self) -> None:
        """Remembers what an attempt to train on a batch may change."""
        self._step.remember_skipped()
        self._before = self._state

    def wait(self) -> None:
        """Waits for an attempt: it has failed where this raises."""
        jax.block_until_ready([cell.now for cell in self._cells])

    def restore(self) -> None:
        """Takes a failed attempt back."""
        self._step.reset()
        self._step.restore_skipped()
        self._state = self._before

    def forget(self) -> None:
        """Forgets what was remembered."""
        self._before = None

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
        for is_last in closes:
            batch = next(iterator, self)
            if batch is self:
                break
            if is_plain:
                logs, state = self._plain(tuple(self._state), iter([batch]))
                self._state = State(*state)
                updates += 1
            else:
                logs = self._run_add(batch)
                updates += self.update() if is_last else 0
            ran += 1
        if ran == 0:
            raise StopIteration
        return Ran(logs, ran, updates)

    def update(self) -> int:
        """Makes an update of what was added, without another micro-batch.

        Returns:
            The number of updates: 0 where all micro-batches were left out.
        """
        if self._step.skips and bool(self._step.is_empty()):
            return 0
        if self._state is not None:
            self._run_update()
            return 1
        # Between two calls of the train function the variables have the state.
        self.model.jax_state_sync()
        self._state = self._held_by_variables()
        try:
            self._run_update()
            for group, values in zip(self._variables, self._state):
                for variable, value in zip(group, values):
                    variable.assign(value)
        finally:
            self._state = None
        return 1

    def _run_add(self, data: Any) -> Any:
        logs, non_trainable, metrics = self._call(self._add, self._state, data)
        self._state = self._state._replace(
            non_trainable=non_trainable, metrics=metrics
        )
        return logs

    def _run_update(self) -> None:
        trainable, non_trainable, optimizer, metrics = self._state
        new = self._call(
            self._update, (trainable, optimizer), (non_trainable, metrics)
        )
        self._state = State(new[0], new[1], new[2], metrics)

    def _traced_add(self, state: State, held: list[Any], data: Any) -> Any:
        with self._framed(state, held) as frame:
            with self._step.in_place(), contextlib.ExitStack() as stack:
                for patch in leaving_gradients:
                    stack.enter_context(patch)
                before = frame.state
                logs = self._step.run(data)
            _check_still(before, frame.state)
            _, non_trainable, _, metrics = self._new(frame)
        return (logs, non_trainable, metrics), self._held(frame)

    def _traced_update(
        self, changing: Any, held: list[Any], others: Any
    ) -> Any:
        trainable, optimizer = changing
        non_trainable, metrics = others
        state = State(trainable, non_trainable, optimizer, metrics)
        with self._framed(state, held) as frame:
            self._step.apply()
            self._step.empty()
            new = self._new(frame)
        return new[:3], self._held(frame)

    @contextlib.contextmanager
    def _framed(self, state: State, held: list[Any]) -> Iterator[StepFrame]:
        values = dict(zip(self._cells, held))
        frame = StepFrame(self._variables, state, values)
        with frame.in_scope():
            yield frame

    def _call(self, function: Any, first: Any, last: Any) -> Any:
        while True:
            held = [cell.now for cell in self._cells]
            try:
                result, held = function(first, held, last)
            except _MissingCells as error:
                # Nothing has run. Which cells a step has is first known here.
                self._cells += error.missing
                continue
            for cell, value in zip(self._cells, held):
                cell.now = value
            return result

    def _held(self, frame: StepFrame) -> list[Any]:
        """What the cells hold at the end of a function."""
        if frame.missing and not is_eager():
            raise _MissingCells(frame.missing)
        self._cells += frame.missing
        return [
            _placed(frame.values[cell], cell.sharding) for cell in self._cells
        ]

    def _new(self, frame: StepFrame) -> State:
        """What the variables hold at the end of a function."""
        if keras.distribution.distribution() is None:
            return frame.state
        return State(
            *(
                [_placed(x, sharding_of(v)) for v, x in zip(group, values)]
                for group, values in zip(frame.variables, frame.state)
            )
        )

    def _compiled(
        self, function: Callable[..., Any], donated: list[int]
    ) -> Callable[..., Any]:
        if self.model.run_eagerly or not self.model.jit_compile:
            return function
        return jax.jit(function, donate_argnums=donated)

    @property
    def _variables(self) -> State:
        return variables_of(self.model, self._optimizer)

    def _held_by_variables(self) -> State:
        return State(*([v.value for v in group] for group in self._variables))

    def _hand_over(self) -> None:
        hand_over_state(self.model, *self._state)


def _check_still(before: State, after: State) -> None:
    """Checks that a step left to the optimizer what is the optimizer's."""
    for old, new in (
        (before.trainable, after.trainable),
        (before.optimizer, after.optimizer),
    ):
        if any(x is not y for x, y in zip(old, new)):
            raise RuntimeError(
                "The model's `train_step` must change weights and the "
                "optimizer's variables by `self.optimizer` only, for its "
                "gradients to be accumulated on JAX. Received: one that "
                "returned other values for them."
            )


def _placed(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    return jax.lax.with_sharding_constraint(value, sharding)
