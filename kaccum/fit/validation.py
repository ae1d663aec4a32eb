"""Validates in micro-batches, with the results of whole batches."""

from __future__ import annotations

import itertools
from typing import Any

import keras

from kaccum.backends import Runner, Tester, backend
from kaccum.fit.micro_batches import MicroBatchSize, in_parts, out_of_memory
from kaccum.fit.plan import advice_for_validation
from kaccum.step.test_step import TestStep
from kaccum.step.training_step import TrainingStep


class Validation:
    """The validation inside of a `fit`, whose batches are cut.

    Args:
        model: A compiled `keras.Model`.
        runner: What runs its training step.
        step: What its training step becomes.
    """

    def __init__(
        self, model: keras.Model, runner: Runner, step: TrainingStep
    ) -> None:
        self._model = model
        self._test = TestStep(model, step.kinds, step.differences)
        self._tester: Tester = backend().tester(model, self._test, runner)
        self._is_first = True

    def begin(self) -> None:
        """Begins the validation of another `fit`."""
        self._is_first = True

    def test(self, size: MicroBatchSize, *arguments: Any) -> Any:
        """Does what the model's test function does.

        Args:
            size: Says how to cut a batch.
            *arguments: Those of the test function.
        """
        return self._tester.called(
            lambda batches: self._run(batches, size), *arguments
        )

    def _run(self, batches: Any, size: MicroBatchSize) -> Any:
        """The logs of the last of the next batches."""
        logs = None
        count = self._model.steps_per_execution
        for batch in itertools.islice(batches, count):
            logs = self._run_batch(batch, size)
            if self._is_first:
                self._wait(batch)
        if logs is None:
            raise StopIteration
        return logs

    def _run_batch(self, batch: Any, size: MicroBatchSize) -> Any:
        if not self._can_be_cut(batch, size):
            return self._run_whole(batch, [])
        heard = _Heard(self._tester, self._test, batch)
        try:
            logs = in_parts(batch, size, self._tester, heard.run_in)
        except Exception as error:
            if out_of_memory(error, None) is None and heard.is_cut:
                # A loss may need more examples: what it was is not needed.
                self._test.leave_whole(error)
                return self._run_whole(batch, [])
            if not size.is_auto:
                self._advise(error, batch)
            raise
        return self._run_whole(batch, heard.parts) if heard.is_cut else logs

    def _run_whole(self, batch: Any, parts: list[Any]) -> Any:
        try:
            return self._tester.run(batch, parts)
        except Exception as error:
            self._advise(error, batch)
            raise

    def _wait(self, batch: Any) -> None:
        """Has errors told now: later batches need as much memory."""
        self._is_first = False
        try:
            self._tester.wait()
        except Exception as error:
            self._advise(error, batch)
            raise

    def _advise(self, error: Exception, batch: Any) -> None:
        """Raises the error again, with what to write where memory runs out."""
        origin = out_of_memory(error, None)
        if origin is not None:
            examples = sum(backend().examples_in(batch))
            sentence = advice_for_validation(examples)
            raise backend().out_of_memory(origin, sentence) from error

    def _can_be_cut(self, batch: Any, size: MicroBatchSize) -> bool:
        try:
            examples = backend().examples_in(batch)
        except ValueError:
            # A batch of graphs, say.
            return False
        may_be_cut = size.is_auto or len(size.parts_of(examples)) > 1
        if not may_be_cut or sum(examples) < 2:
            return True
        one = backend().of_one_replica(batch)
        return self._test.can_be_cut(one, self._tester.look)


class _Heard:
    """What is heard of the micro-batches of a batch, if it is cut.

    Args:
        tester: What runs them.
        test: The test step.
        batch: The batch.
    """

    def __init__(self, tester: Tester, test: TestStep, batch: Any) -> None:
        self._tester = tester
        self._test = test
        self._batch = batch
        self.is_cut = False
        self.parts: list[Any] = []

    def run_in(self, sizes: list[list[int]]) -> Any:
        """Runs micro-batches; the logs where that is the batch itself."""
        self.is_cut = len(sizes) > 1
        if not self.is_cut:
            return self._tester.run(self._batch, [])
        model = self._tester.model
        heard = [
            self._tester.hear(micro_batch)
            for micro_batch in backend().cut(self._batch, sizes, model)
        ]
        self.parts = self._test.joinable(heard, sizes)
        return None
