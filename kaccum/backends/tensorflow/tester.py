"""The compiled functions of a test step, whose batches are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from kaccum.backends.runner import AssigningRunner
from kaccum.backends.tensorflow.calls import CompiledCall, on_replicas
from kaccum.backends.tester import AssigningTester, TestOfParts


class TensorFlowTester(AssigningTester):
    """Compiles, and distributes, as Keras does: for batches of any size."""

    def __init__(
        self, model: keras.Model, test: TestOfParts, runner: AssigningRunner
    ) -> None:
        super().__init__(model, test, runner)
        self._hear = self._compiled(on_replicas(model, self._hear_on_replica))
        self._run = self._compiled(self._made(self._run_on_replica))

    def hear(self, data: Any) -> Any:
        with self._test.overheard():
            return self._hear(data)

    def run(self, data: Any, parts: Sequence[Any]) -> Any:
        with self._test.overheard():
            return self._run((data, list(parts)))

    def _made(self, test_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What Keras makes of a `test_step`, for a single batch."""
        model, plain = self.model, self.model.test_function
        try:
            with self._test.instead_of(test_step):
                model.make_test_function(force=True)
            run = model.test_function
            return lambda data: run(iter([data]))
        finally:
            model.test_function = plain

    def _run_on_replica(self, data_and_parts: Any) -> Any:
        data, parts = data_and_parts
        return self._test.run(data, parts, self._test_step)

    def _hear_on_replica(self, data: Any) -> Any:
        return self._test.hear(data, self._test_step)

    def _compiled(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if self.model.run_eagerly:
            return function
        return CompiledCall(function, knows_sizes=False)
