"""The compiled steps: *add*, *update*, and an update by itself.

Told which step to run, and leaves the counting of micro-batches to others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from kaccum.patches import Patch, patched
from kaccum.tensorflow.replicas import replicas_of, scope_of

if TYPE_CHECKING:
    from kaccum.step import TrainingStep

# How the end of the data reaches a train function.
END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


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


class Engine:
    """Compiled versions of a training step: *add* and *update*.

    Both are made by the model's own `make_train_function`, so they pull data,
    compile and distribute as the plain one does.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
    """

    end_of_data = END_OF_DATA

    def __init__(self, model: keras.Model, step: TrainingStep) -> None:
        self._model = model
        self._step = step
        self._plain = model.train_function
        # An update must know whether a micro-batch was left out, and replicas
        # must know of each other's.
        self._updates_apart = step.skips or replicas_of(model) > 1
        self._plain_step = self._make(model.train_step)
        self._steps = {
            closes: self._make(functools.partial(step.run, closes=closes))
            for closes in (False, True)
        }
        self._execute = {
            is_plain: tf.function(
                functools.partial(self._run_in_graph, is_plain=is_plain),
                autograph=False,
            )
            for is_plain in (False, True)
        }
        self._applies: dict[Any, Callable[[], Any]] = {}

    def start(self) -> None:
        """Makes ready for training: all sums are empty."""
        with scope_of(self._model):
            self._step.start()

    def run(self, iterator: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        """Runs one training step for each entry of `closes`.

        Args:
            iterator: The batches: what `fit` gives a `train_function`.
            closes: For each micro-batch, whether it closes its window.
            is_plain: Whether to run the model's own step, which updates.

        Raises:
            StopIteration, tf.errors.OutOfRangeError: If there was no data.
        """
        if len(closes) == 1:
            logs, updates = self._run_one(iterator, closes[0], is_plain)
            return Ran(logs, 1, updates)
        # Under a strategy TensorFlow loses an operand of such loops (2.21).
        is_dataset = isinstance(iterator, tf.data.Iterator)
        if is_dataset and not self._model.run_eagerly:
            execute = self._execute[is_plain]
            with self._step.in_place():
                logs, ran, updates = execute(iterator, tf.constant(closes))
            return Ran(logs, int(ran), int(updates))
        ran = updates = 0
        for is_last, data in zip(closes, iterator):
            logs, made = self._run_one(iter([data]), is_last, is_plain)
            ran, updates = ran + 1, updates + made
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
        if self._model.run_eagerly:
            self._apply()
        else:
            self._compiled_apply()()
        return 1

    def stop(self) -> None:
        """Frees the sums' memory."""
        self._step.release()

    def _make(self, train_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        model = self._model
        shadow = Patch(model, "train_step", train_step)
        try:
            with patched([shadow]):
                model.make_train_function(force=True)
            return model.train_function
        finally:
            model.train_function = self._plain

    def _run_one(
        self, iterator: Any, closes: bool, is_plain: bool
    ) -> tuple[Any, int]:
        if is_plain:
            return self._plain(iterator), 1
        updates_at_once = closes and not self._updates_apart
        with self._step.in_place():
            logs = self._steps[updates_at_once](iterator)
        if closes and self._updates_apart:
            return logs, self.update()
        return logs, int(closes)

    def _apply(self) -> None:
        self._model.distribute_strategy.run(self._step.apply)

    def _compiled_apply(self) -> Callable[[], Any]:
        # Compiled anew only when another variable got a gradient since.
        version = self._step.version
        if version not in self._applies:
            self._applies[version] = tf.function(
                self._apply,
                autograph=False,
                jit_compile=self._model.jit_compile,
            ).get_concrete_function()
        return self._applies[version]

    def _step_in_graph(self, data: Any, closes: Any, is_plain: bool) -> Any:
        """One step, and how many updates it made. Not compiled by XLA.

        The conditionals stand outside of the compiled steps.
        """

        def run(step: Callable[[Any], Any]) -> Any:
            return step(iter([data]))

        if is_plain:
            return run(self._plain_step), 1
        if self._updates_apart:
            logs = run(self._steps[False])
            if self._step.skips:
                closes = closes & ~self._step.is_empty()

            def apply() -> int:
                self._compiled_apply()()
                return 1

            return logs, tf.cond(closes, apply, lambda: 0)
        logs = tf.cond(
            closes,
            lambda: run(self._steps[True]),
            lambda: run(self._steps[False]),
        )
        return logs, tf.cast(closes, tf.int32)

    def _run_in_graph(
        self, iterator: Any, closes: Any, *, is_plain: bool
    ) -> tuple[Any, Any, Any]:
        """`run` as one graph, for `steps_per_execution` above one."""
        count = tf.size(closes)

        def following(i: Any, current: Any) -> Any:
            return tf.cond(
                i < count, iterator.get_next_as_optional, lambda: current
            )

        def condition(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            return tf.logical_and(i < count, batch.has_value())

        def body(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            logs, made = self._step_in_graph(
                batch.get_value(), closes[i], is_plain
            )
            return i + 1, updates + made, logs, following(i + 1, batch)

        logs, updates = self._step_in_graph(
            iterator.get_next(), closes[0], is_plain
        )
        batch = iterator.get_next_as_optional()
        ran, updates, logs, _ = tf.while_loop(
            condition, body, (tf.constant(1), updates, logs, batch)
        )
        return logs, ran, updates
