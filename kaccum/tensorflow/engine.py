"""The compiled steps: *add*, and *update*, which also applies the sums.

Told which step to run, and leaves the counting of micro-batches to others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from kaccum.backend import Ran
from kaccum.engine import AssigningEngine
from kaccum.patches import Patch, patched
from kaccum.tensorflow.arithmetic import after
from kaccum.tensorflow.calls import CompiledCall, is_dataset
from kaccum.tensorflow.replicas import scope_of

if TYPE_CHECKING:
    from kaccum.step import TrainingStep

# How the end of the data reaches a train function.
END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


class Engine(AssigningEngine):
    """Compiled versions of a training step.

    The model's own `make_train_function` makes what runs on a batch, so that it
    compiles and distributes as the plain one does. It is traced once, for *add*
    and *update* alike. Around it stands a graph that pulls the batch, runs it,
    and makes the update where a window closes.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
        step: What its training step becomes.
    """

    end_of_data = END_OF_DATA

    def __init__(self, model: keras.Model, step: TrainingStep) -> None:
        super().__init__(model, step)
        self._plain_step = self._make(model.train_step)
        self._add_step = self._make(step.run)
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._applies: dict[Any, Callable[[], Any]] = {}

    def start(self) -> None:
        """Makes ready for training: all sums are empty."""
        with scope_of(self.model):
            super().start()

    def run(self, iterator: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        """Runs one training step for each entry of `closes`.

        Args:
            iterator: The batches: what `fit` gives a `train_function`.
            closes: For each micro-batch, whether it closes its window.
            is_plain: Whether to run the model's own step, which updates.

        Raises:
            StopIteration, tf.errors.OutOfRangeError: If there was no data.
        """
        if is_plain and len(closes) == 1:
            return Ran(self._plain(iterator), 1, 1)
        # Under a strategy TensorFlow loses an operand of such loops (2.21).
        has_loop = len(closes) > 1 and isinstance(iterator, tf.data.Iterator)
        if has_loop and not self.model.run_eagerly:
            loop = self._compiled(self._run_many, is_plain=is_plain)
            logs, ran, updates = loop((iterator, tf.constant(closes)))
            return Ran(logs, int(ran), int(updates))
        pulls = is_dataset(iterator)
        sources = itertools.repeat(iterator) if pulls else iterator
        logs, ran, updates = None, 0, 0
        try:
            for is_last, source in zip(closes, sources):
                # Where some may be left out the host asks whether to update:
                # replicas must not meet inside of a conditional.
                is_asked = is_last and self._step.skips
                options = {"closes": is_last and not is_asked}
                options["is_plain"] = is_plain
                logs, made = self._compiled(self._run_one, **options)(source)
                ran, updates = ran + 1, updates + int(made)
                if is_asked:
                    updates += self.update()
        except tf.errors.OutOfRangeError:
            if ran == 0 or not pulls:
                raise
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
        self._apply()
        return 1

    def stop(self) -> None:
        """Frees the sums' memory, and lets go of the data."""
        for function in self._functions.values():
            if isinstance(function, CompiledCall):
                function.forget()
        super().stop()

    def _make(self, train_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What Keras makes of a `train_step`, for a single batch."""
        model = self.model
        shadow = Patch(model, "train_step", train_step)
        try:
            with patched([shadow]):
                model.make_train_function(force=True)
            run = model.train_function
            return lambda data: run(iter([data]))
        finally:
            model.train_function = self._plain

    def _compiled(
        self, function: Callable[..., Any], **options: Any
    ) -> Callable[..., Any]:
        """A function of this class, its options known beforehand."""
        # What may apply the sums is compiled anew when there are others.
        version = self._step.version if options.get("closes", True) else None
        key = (function.__name__, *options.values(), version)
        if key not in self._functions:
            run = functools.partial(function, **options)
            is_eager = self.model.run_eagerly
            self._functions[key] = run if is_eager else CompiledCall(run)
        return self._functions[key]

    def _apply(self) -> None:
        """Makes the update, compiled as the model is."""
        version = self._step.version
        if self.model.run_eagerly:
            self._update(compiled=lambda apply: apply)
            return
        if version not in self._applies:
            compiled = functools.partial(
                tf.function,
                autograph=False,
                jit_compile=self.model.jit_compile,
            )
            update = functools.partial(self._update, compiled=compiled)
            self._applies[version] = tf.function(
                update, autograph=False
            ).get_concrete_function()
        self._applies[version]()

    def _update(self, compiled: Callable[..., Callable[[], Any]]) -> None:
        run = self.model.distribute_strategy.run
        compiled(lambda: run(self._step.apply))()
        # XLA would hold the sums and their zeros at the same time.
        run(self._step.empty)

    def _run_one(
        self, source: Any, *, is_plain: bool, closes: Any
    ) -> tuple[Any, Any]:
        """One step on a batch, or the next one, and how many updates it made.

        Not compiled by XLA: the conditional stands outside of what is.
        """
        data = source.get_next() if is_dataset(source) else source
        if is_plain:
            return self._plain_step(data), 1
        # Around all replicas, which are threads.
        with self._step.in_place():
            logs = self._add_step(data)
        if closes is False:
            return logs, 0
        if self._step.skips:
            closes = tf.logical_and(closes, ~self._step.is_empty())

        def apply() -> Any:
            # Found exhausted, a data set runs what does not depend on it.
            with after(data):
                self._apply()
            return 1

        if closes is True:
            return logs, apply()
        return logs, tf.cond(closes, apply, lambda: 0)

    def _run_many(
        self, iterator_and_closes: Any, *, is_plain: bool
    ) -> tuple[Any, Any, Any]:
        """`run` as one graph, for `steps_per_execution` above one."""
        iterator, closes = iterator_and_closes
        count = tf.size(closes)

        def following(i: Any, current: Any) -> Any:
            return tf.cond(
                i < count, iterator.get_next_as_optional, lambda: current
            )

        def condition(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            return tf.logical_and(i < count, batch.has_value())

        def body(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            logs, made = self._run_one(
                batch.get_value(), is_plain=is_plain, closes=closes[i]
            )
            return i + 1, updates + made, logs, following(i + 1, batch)

        logs, updates = self._run_one(
            iterator, is_plain=is_plain, closes=closes[0]
        )
        batch = iterator.get_next_as_optional()
        ran, updates, logs, _ = tf.while_loop(
            condition, body, (tf.constant(1), updates, logs, batch)
        )
        return logs, ran, updates
