"""The compiled functions of a test step, whose batches are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from kaccum.backends.jax.batches import Batches
from kaccum.backends.jax.sums import placed
from kaccum.backends.tester import Tester, TestOfParts

# The values that Keras passes to a test step: of trainable variables, of
# others, and of metrics.
State = tuple[list[Any], list[Any], list[Any]]
_NOTHING: State = ([], [], [])


class JaxTester(Tester):
    """Holds what Keras passes as the state, while it tests a model."""

    def __init__(self, model: keras.Model, test: TestOfParts) -> None:
        super().__init__(model, test)
        self._state = self._before = _NOTHING
        self._heard: Any = None
        # Nothing is donated: an attempt leaves what it was called with.
        self._hear = self._compiled(self._traced_hear)
        self._run = self._compiled(self._traced_run)

    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        state, iterator = arguments
        self._state = tuple(state)
        try:
            # `evaluate` asks for the same as `fit`.
            stacks = self.model.steps_per_execution > 1
            logs = run(Batches(iterator, stacks))
            return logs, self._state
        except BaseException:
            # Keras has taken the values from the variables (3.15).
            trainable, others, metrics = self._state
            self.model._jax_state = {
                "trainable_variables": trainable,
                "non_trainable_variables": others,
                "metrics_variables": metrics,
            }
            self.model._jax_state_synced = False
            self.model.jax_state_sync()
            raise
        finally:
            self._state, self._heard = _NOTHING, None

    def hear(self, data: Any) -> Any:
        trainable, _, metrics = self._state
        self._heard, others = self._hear(self._state, data)
        self._state = (trainable, others, metrics)
        return self._heard

    def run(self, data: Any, parts: Sequence[Any]) -> Any:
        trainable, _, _ = self._state
        logs, others, metrics = self._run(self._state, data, list(parts))
        self._state = (trainable, others, metrics)
        self._heard = logs
        return logs

    def look(self, function: Callable[..., Any], data: Any) -> Any:
        def traced(state: State, data: Any) -> Any:
            def test_step(data: Any) -> Any:
                return self.model.test_step(_copied(state), data)

            return function(test_step, data)

        return self._compiled(traced)(self._state, data)

    def remember(self) -> None:
        self._before = self._state

    def wait(self) -> None:
        jax.block_until_ready(self._heard)

    def restore(self) -> None:
        self._state = self._before

    def forget(self) -> None:
        self._before = _NOTHING

    def _traced_hear(self, state: State, data: Any) -> Any:
        others: list[Any] = []

        def test_step(data: Any) -> Any:
            logs, (_, others[:], _) = self.model.test_step(_copied(state), data)
            return logs

        with self._test.overheard():
            heard = self._test.hear(data, test_step)
        return heard, placed(self.model.non_trainable_variables, others)

    def _traced_run(self, state: State, data: Any, parts: list[Any]) -> Any:
        others: list[Any] = []
        metrics: list[Any] = []

        def test_step(data: Any) -> Any:
            logs, new = self.model.test_step(_copied(state), data)
            _, others[:], metrics[:] = new
            return logs

        with self._test.overheard():
            logs = self._test.run(data, parts, test_step)
        return (
            logs,
            placed(self.model.non_trainable_variables, others),
            placed(self.model.metrics_variables, metrics),
        )

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.model.jit_compile or self.model.run_eagerly:
            return function
        return jax.jit(function)


def _copied(state: State) -> State:
    """In lists of its own, which a step may change."""
    trainable, others, metrics = state
    return list(trainable), list(others), list(metrics)
