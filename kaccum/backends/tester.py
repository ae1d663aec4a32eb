"""Runs a model's test step on batches that are cut."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras

from kaccum.backends.runner import AssigningRunner

TestFunction = Callable[[Any], Any]


class TestOfParts(Protocol):
    """What a tester asks of the test step that it is given."""

    def overheard(self) -> AbstractContextManager[None]:
        """A context around whatever calls `hear` or `run`."""

    def instead_of(
        self, test_step: TestFunction
    ) -> AbstractContextManager[None]:
        """A context in which `test_step` is that of the model."""

    def hear(self, data: Any, test_step: TestFunction) -> Any:
        """What the layers return that a `test_step` calls, nested tensors."""

    def run(
        self, data: Any, parts: Sequence[Any], test_step: TestFunction
    ) -> Any:
        """The logs of a `test_step` whose layers have returned that."""


class Tester(abc.ABC):
    """Runs the test step of a model.

    Args:
        model: A compiled `keras.Model`.
        test: What its test step becomes.
    """

    def __init__(self, model: keras.Model, test: TestOfParts) -> None:
        self.model = model
        self._test = test

    @abc.abstractmethod
    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        """Runs something as the model's test function.

        Args:
            run: Function of an iterator of batches that returns logs.
            *arguments: What Keras calls a test function with.

        Returns:
            What Keras's test function returns.
        """

    @abc.abstractmethod
    def hear(self, data: Any) -> Any:
        """What the layers return that the step calls, of a micro-batch."""

    @abc.abstractmethod
    def run(self, data: Any, parts: Sequence[Any]) -> Any:
        """The logs of the step on a batch, of whose parts that was heard."""

    @abc.abstractmethod
    def look(self, function: Callable[..., Any], data: Any) -> Any:
        """What a function returns that may change no variable.

        Args:
            function: Function of the test step, itself a function of a batch,
                and of `data`. It returns nested scalars.
            data: Nested tensors.
        """

    # An attempt to run on a batch, which may run out of memory.

    @abc.abstractmethod
    def remember(self) -> None:
        """Remembers what an attempt may change."""

    def wait(self) -> None:
        """Waits for what was run: it has failed where this raises."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Takes a failed attempt back."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Forgets what was remembered."""


class AssigningTester(Tester):
    """A tester of steps that assign to variables as they run.

    Args:
        model: As of `Tester`.
        test: As of `Tester`.
        runner: What runs the model's training step.
    """

    def __init__(
        self, model: keras.Model, test: TestOfParts, runner: AssigningRunner
    ) -> None:
        super().__init__(model, test)
        self._runner = runner
        # A `tf.function` is traced by itself, and cannot be overheard.
        step = model.test_step
        self._test_step = getattr(step, "python_function", step)
        self._before: list[tuple[Any, Any]] = []

    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        return self._runner.called(run, *arguments)

    def look(self, function: Callable[..., Any], data: Any) -> Any:
        return self._runner.look(
            lambda data: function(self._test_step, data), data
        )

    def remember(self) -> None:
        variables = [
            *self.model.non_trainable_variables,
            *self.model.metrics_variables,
        ]
        self._before = [(v, self._runner.copied(v)) for v in variables]

    def restore(self) -> None:
        for variable, before in self._before:
            self._runner.put_back(variable, before)

    def forget(self) -> None:
        self._before = []
