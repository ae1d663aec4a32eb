"""Runs training steps, one after the other, and updates."""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import keras

if TYPE_CHECKING:
    from kaccum.backends.base import Backend


class Ran(NamedTuple):
    """What a call of a train function did.

    Args:
        logs: The last step's logs.
        micro_batches: How many there were before the data came to its end.
        updates: How many updates were made.
    """

    logs: Any
    micro_batches: int
    updates: int


class Step(Protocol):
    """What a runner asks of the step that it is given.

    Args:
        skips: Whether a window may leave micro-batches out.
        skipped: How many it did.
        sums: What the open window holds.
        assigned: The variables that it was heard to assign, by their `id`.
        differences: What it does else than the large batch.
        whole: Its passes, where the loss is that of the whole batch.
        version: What `update` depends on, if it is compiled.
    """

    skips: bool
    sums: Any
    assigned: dict[int, Any]
    differences: Any
    whole: Any

    @property
    def skipped(self) -> int: ...

    @property
    def version(self) -> int: ...

    def overheard(self) -> AbstractContextManager[None]:
        """A context around whatever calls `run`."""

    def run(
        self,
        data: Any,
        train_step: Callable[[Any], tuple[Any, dict[int, Any]]],
        tell_assigned: Callable[[Any], None],
        whole_state: Callable[[], AbstractContextManager[Any]] = ...,
    ) -> Any:
        """Runs a `train_step` on a micro-batch, which is added to the sums."""

    def instead_of(
        self, train_step: Callable[[Any], Any]
    ) -> AbstractContextManager[None]:
        """A context in which `train_step` is that of the model."""

    def update(self) -> bool:
        """Makes the update of the open window. `empty` is to come next.

        Returns:
            Whether there is one.
        """

    def empty(self) -> None:
        """Makes the sums of the window zero."""

    def count_skipped_from(self, number: int) -> None:
        """Counts on from a number."""


class Runner(abc.ABC):
    """Runs the training step of a model, and the update where a window closes.

    Is told which step to run, and leaves the counting of micro-batches to
    others.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
        backend: What cuts batches.
    """

    #: How the end of the data reaches a train function.
    end_of_data: Any = StopIteration

    def __init__(
        self, model: keras.Model, step: Step, backend: Backend
    ) -> None:
        self.model = model
        self._step = step
        self._backend = backend
        self._plain = model.train_function
        self._skipped_before = 0
        self._is_first_call = self._is_first_update = True

    @abc.abstractmethod
    def run(self, batches: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        """Runs one training step for each entry of `closes`.

        Args:
            batches: What `fit` gives a `train_function`: an iterator.
            closes: For each micro-batch, whether it closes its window.
            is_plain: Whether to run the model's own step, which updates.

        Raises:
            StopIteration, tf.errors.OutOfRangeError: If there was no data.
        """

    def run_parts(self, batch: Any, sizes: list[list[int]]) -> Any:
        """Runs one training step for each part of a batch; none updates.

        Args:
            batch: A batch of `fit`.
            sizes: As of `Backend.cut`.

        Returns:
            The last step's logs.
        """
        parts = self._backend.cut(batch, sizes, self.model)
        return self.run(parts, [False] * len(sizes), is_plain=False).logs

    def pulled(self, batches: Any, count: int) -> tuple[list[Any], Any]:
        """The next batches, which `run` is to get all the same.

        Args:
            batches: As of `run`.
            count: How many there are at most.

        Returns:
            The batches, and what `run` gets instead.

        Raises:
            StopIteration, tf.errors.OutOfRangeError: If there was no data.
        """
        pulled = list(itertools.islice(batches, count))
        if not pulled:
            raise StopIteration
        return pulled, iter(pulled)

    def look(self, function: Callable[[Any], Any], data: Any) -> Any:
        """What a function of `data` returns that may change no variable.

        Args:
            function: It finds the variables as a step would, and returns nested
                scalars.
            data: Nested tensors.
        """
        # Regularizers ask the scope (Keras 3.15).
        values = [(v, v.value) for v in self.model.trainable_variables]
        with keras.StatelessScope(values, collect_losses=True):
            return function(data)

    @abc.abstractmethod
    def passed(self, name: str, data: Any) -> Any:
        """What a pass of `Step.whole` returns.

        Args:
            name: Which one: "hear", "finish" or "push".
            data: What it gets.
        """

    @abc.abstractmethod
    def state(self) -> Any:
        """What variables hold that passes assign, but for metrics."""

    @abc.abstractmethod
    def return_to(self, state: Any) -> None:
        """Makes them hold what `state` returned."""

    def forget_states(self) -> None:
        """Says that no `state` is wanted any more."""

    def with_state(self) -> AbstractContextManager[None]:
        """A context in which passes can run: between train functions, too."""
        return contextlib.nullcontext()

    def update(self) -> int:
        """Makes an update of what was added, without another micro-batch.

        Returns:
            The number of updates: 0 where all micro-batches were left out.
        """
        is_first = self._is_first_update
        if is_first:
            # While weights are what they were.
            self.wait()
        if self._step.skips and bool(self._step.sums.is_empty()):
            return 0
        self._run_update()
        if is_first:
            self.wait()
            self._is_first_update = False
        return 1

    def iterations(self) -> int:
        """How many updates the optimizer has made, which the host waits for."""
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def end_epoch(self, is_open: bool) -> int:
        """Makes the update of a short window, if one is open.

        Returns:
            The number of updates.
        """
        return self.update() if is_open else 0

    def has_nothing(self, batch: Any) -> bool:
        """Whether a batch has no examples, since other processes have some."""
        return False

    def summed(self, number: int) -> int:
        """A number of this process, summed over all that train together."""
        return number

    @abc.abstractmethod
    def _run_update(self) -> None:
        """Makes an update, and empties the sums."""

    def start(self, *, is_for_fit: bool) -> None:
        """Makes ready for training: all sums are empty.

        Args:
            is_for_fit: Whether `fit` trains, not `train_on_batch`.
        """
        self._step.empty()
        self._step.count_skipped_from(0)
        self.wait_for_next()

    def wait_for_next(self) -> None:
        """Has the next call and the next update waited for.

        Those that follow need as much memory.
        """
        self._is_first_call = self._is_first_update = True

    def wait_if_first(self) -> None:
        """Waits for what was run, if that was the first call."""
        if self._is_first_call:
            self.wait()
            self._is_first_call = False

    def stop(self) -> None:
        """Frees the sums' memory."""
        self._step.sums.release()

    @abc.abstractmethod
    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        """Runs something as the model's train function.

        Args:
            run: Function of an iterator of batches that returns logs.
            *arguments: What Keras calls a train function with.

        Returns:
            What Keras's train function returns.
        """

    def told(self, function: Callable[[int], Any], updates: int) -> None:
        """Calls a function of the user's own inside of the train function."""
        function(updates)

    # An attempt to train on a batch, which may run out of memory.

    def remember(self) -> None:
        """Remembers what an attempt to train on a batch may change."""
        self._skipped_before = self._step.skipped if self._step.skips else 0

    def wait(self) -> None:
        """Waits for what was run: it has failed where this raises.

        JAX tells of an error where something is waited for, or read, and Keras
        hides it where it reads logs (3.15).
        """

    def wait_for(self, values: Any) -> None:
        """Waits for nested tensors, as of logs."""

    def restore(self) -> None:
        """Takes a failed attempt back."""
        self._step.empty()
        self._step.sums.renew()
        self._step.count_skipped_from(self._skipped_before)

    @abc.abstractmethod
    def forget(self) -> None:
        """Forgets what was remembered."""


class AssigningRunner(Runner):
    """A runner of steps that assign to variables as they run.

    A step that is compiled tells what it assigns only while it is traced, so
    the variables are remembered for good, and their values for one batch.
    """

    def __init__(
        self, model: keras.Model, step: Step, backend: Backend
    ) -> None:
        super().__init__(model, step, backend)
        step_of_model = model.train_step
        # A `tf.function` is traced by itself, and cannot be overheard.
        step_of_model = getattr(step_of_model, "python_function", step_of_model)
        self._train_step = step_of_model
        # What variables held that an attempt, or a pass, may assign.
        self._before: dict[int, Any] | None = None
        self._states: list[dict[int, Any]] = []
        self._lasting: list[Any] = []
        self._told: list[Any] = []
        self._has_looked = False

    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        (batches,) = arguments
        return run(iter(batches) if isinstance(batches, list) else batches)

    def remember(self) -> None:
        super().remember()
        self._before = {
            key: self.copied(variable)
            for key, variable in self._step.assigned.items()
        }
        self._lasting = list(self._step.sums.lasting)
        self._told = self._backend.values_of(self._lasting)

    def restore(self) -> None:
        super().restore()
        self._backend.assign(self._lasting, self._told)
        for key, before in (self._before or {}).items():
            self.put_back(self._step.assigned[key], before)

    def forget(self) -> None:
        self._before = None

    def _add(self, data: Any) -> Any:
        """Runs the step on a micro-batch."""
        return self._step.run(
            data, lambda data: (self._train_step(data), {}), self._hear
        )

    def _looking(self) -> AbstractContextManager[None]:
        """A context that notes what else the first micro-batch moves."""
        if self._has_looked:
            return contextlib.nullcontext()
        self._has_looked = True
        return self._noting_others()

    @contextlib.contextmanager
    def _noting_others(self) -> Iterator[None]:
        before = self.others()
        yield
        now = self.others()
        self._step.differences.note_moved(
            name
            for name, value in before.items()
            if not bool(keras.ops.all(keras.ops.equal(now[name], value)))
        )

    @abc.abstractmethod
    def others(self) -> dict[str, Any]:
        """Copies of what layers keep that no variable of Keras is."""

    @abc.abstractmethod
    def put_others_back(self, values: dict[str, Any]) -> None:
        """Makes layers hold what `others` returned."""

    def state(self) -> Any:
        metrics = {id(v) for v in self.model.metrics_variables}
        state = {
            key: self.copied(variable)
            for key, variable in self._step.assigned.items()
            if key not in metrics
        }
        self._states.append(state)
        return state, self.others()

    def return_to(self, state: Any) -> None:
        variables, others = state
        for key, value in variables.items():
            self.put_back(self._step.assigned[key], value)
        self.put_others_back(others)

    def _hear(self, variable: Any) -> None:
        metrics = self.model.metrics_variables
        is_metric = any(variable is each for each in metrics)
        holding = [] if is_metric else [*self._states]
        if self._before is not None:
            holding.append(self._before)
        if holding:
            # In a trace: until now it held what it holds.
            value = self._backend.outside_of_traces(
                functools.partial(self.copied, variable)
            )
            for each in holding:
                each[id(variable)] = value

    def forget_states(self) -> None:
        self._states = []

    @abc.abstractmethod
    def copied(self, variable: Any) -> Any:
        """What a variable holds now."""

    @abc.abstractmethod
    def put_back(self, variable: Any, before: Any) -> None:
        """Makes a variable hold what `copied` returned."""
