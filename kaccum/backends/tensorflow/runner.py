"""The compiled functions: *add*, which runs a step, and *update*."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.arrays import equal_parts
from kaccum.backends.base import Backend
from kaccum.backends.runner import AssigningRunner, Ran, Step
from kaccum.backends.tensorflow.calls import (
    CompiledCall,
    is_dataset,
    iterator_like,
    on_replicas,
)
from kaccum.backends.tensorflow.replicas import local_values


class TensorFlowRunner(AssigningRunner):
    """Compiled versions of a training step.

    The model's own `make_train_function` makes what runs on a batch, so that it
    compiles and distributes as the plain one does: it is traced once. *Add*
    pulls a batch and runs that. *Update* closes a window: the host calls it, or
    an *add* ends with it, which saves a call.
    """

    # How the end of the data reaches a train function.
    end_of_data = (StopIteration, tf.errors.OutOfRangeError)

    def __init__(
        self, model: keras.Model, step: Step, backend: Backend
    ) -> None:
        super().__init__(model, step, backend)
        # By whether it is the model's own, which updates.
        self._steps = {
            True: self._made(model.train_step),
            False: self._overheard(self._made(self._add)),
        }
        self._calls: dict[Any, Callable[[Any], Any]] = {}
        self._updates: dict[int, Callable[[], Any]] = {}

    def start(self, *, is_for_fit: bool) -> None:
        with self._backend.scope_of(self.model):
            super().start(is_for_fit=is_for_fit)

    def stop(self) -> None:
        for call in self._calls.values():
            if isinstance(call, CompiledCall):
                call.forget()
        super().stop()

    def pulled(self, batches: Any, count: int) -> tuple[list[Any], Any]:
        pulled, given = super().pulled(batches, count)
        is_compiled = not tf.config.functions_run_eagerly()
        if isinstance(batches, tf.data.Iterator) and is_compiled:
            # So that nothing is traced for them alone.
            given = iterator_like(batches, pulled)
        return pulled, given

    def run(self, batches: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        if is_plain:
            return self._run(batches, closes, is_plain)
        with self._looking():
            return self._run(batches, closes, is_plain)

    def run_parts(self, batch: Any, sizes: list[list[int]]) -> Any:
        is_whole = len(sizes) == 1 or self.model.run_eagerly
        if is_whole or not _are_tensors(batch):
            return super().run_parts(batch, sizes)
        logs = None
        with self._looking():
            devices = tuple(_device_of(x) for x in keras.tree.flatten(batch))
            for start, size, times, _ in equal_parts(sizes):
                call = self._compiled_for_parts(size, devices)
                logs = call((batch, _bounds(start, times)))
        return logs

    def _compiled_for_parts(
        self, size: int, devices: tuple[str | None, ...]
    ) -> Callable[[Any], Any]:
        key = (self._run_equal.__name__, size, devices)
        if key not in self._calls:
            run = functools.partial(self._run_equal, size=size, devices=devices)
            self._calls[key] = CompiledCall(run, knows_sizes=False)
        return self._calls[key]

    def _run_equal(
        self,
        batch_and_bounds: Any,
        size: int,
        devices: tuple[str | None, ...],
    ) -> Any:
        """The last one's logs, of some steps on parts of one size."""
        batch, bounds = batch_and_bounds
        start, times = bounds[0], bounds[1]

        def run(i: Any) -> Any:
            parts = [
                _part_of(leaf, start + i * size, size, device)
                for leaf, device in zip(keras.tree.flatten(batch), devices)
            ]
            data = keras.tree.pack_sequence_as(batch, parts)
            return self._run_one(data, False, False)

        _, logs = tf.while_loop(
            lambda i, logs: i < times,
            lambda i, logs: (i + 1, run(i)),
            # The first one tells what logs are like.
            (tf.constant(1), run(0)),
            parallel_iterations=1,
        )
        return logs

    def others(self) -> dict[str, tf.Tensor]:
        return {
            name: tf.identity(local_values(variable)[0])
            for name, variable in self._unknown_variables()
        }

    def put_others_back(self, values: dict[str, tf.Tensor]) -> None:
        for name, variable in self._unknown_variables():
            for part in local_values(variable):
                part.assign(values[name])

    def _unknown_variables(self) -> list[tuple[str, tf.Variable]]:
        """Variables of TensorFlow's that layers keep: none of Keras."""
        return [
            (f"{layer.name}/{name}", value)
            for layer in self.model._flatten_layers()
            for name, value in vars(layer).items()
            if isinstance(value, tf.Variable)
        ]

    def _run(self, batches: Any, closes: list[bool], is_plain: bool) -> Ran:
        if is_plain and len(closes) == 1:
            return Ran(self._plain(batches), 1, 1)
        # Under a strategy TensorFlow loses an operand of such loops (2.21).
        has_loop = len(closes) > 1 and isinstance(batches, tf.data.Iterator)
        if has_loop and not self.model.run_eagerly:
            loop = self._compiled(self._run_many, is_plain, True)
            logs, ran, updates = loop((batches, tf.constant(closes)))
            return Ran(logs, int(ran), int(updates))
        pulls = is_dataset(batches)
        logs, ran, updates = None, 0, 0
        for is_last, source in zip(
            closes, itertools.repeat(batches) if pulls else batches
        ):
            # Where some may be left out the host asks whether to update:
            # replicas must not meet inside of a conditional.
            is_asked = is_last and self._step.skips
            call = self._compiled(
                self._run_one, is_plain, is_last and not is_asked
            )
            try:
                logs = call(source)
            except tf.errors.OutOfRangeError:
                if ran == 0 or not pulls:
                    raise
                break
            ran += 1
            updates += self.update() if is_asked else int(is_last)
        if ran == 0:
            raise StopIteration
        return Ran(logs, ran, updates)

    def passed(self, name: str, data: Any) -> Any:
        if name not in self._calls:

            def run(data: Any) -> Any:
                return getattr(self._step.whole, name)(data, self._hear)

            call = on_replicas(self.model, run)
            if not self.model.run_eagerly:
                # Keras's losses and metrics do not know how large a batch is.
                call = CompiledCall(call, knows_sizes=name != "finish")
            self._calls[name] = call
        with self._step.overheard(), self._looking():
            return self._calls[name](data)

    def _run_one(self, source: Any, is_plain: bool, closes: bool) -> Any:
        """The logs of a step on a batch, or on the next one."""
        data = source.get_next() if is_dataset(source) else source
        logs = self._steps[is_plain](data)
        if closes and not is_plain:
            # Found exhausted, a data set runs what does not depend on it.
            with self._backend.after(data):
                self._run_update()
        return logs

    def _run_many(
        self, batches_and_closes: Any, is_plain: bool, _: bool
    ) -> tuple[Any, Any, Any]:
        """The last one's logs, and how many steps and updates there were."""
        batches, closes = batches_and_closes

        def run(batch: Any, i: Any) -> tuple[Any, Any]:
            logs = self._run_one(batch, is_plain, False)
            if is_plain:
                return logs, 1
            is_last = closes[i]
            if self._step.skips:
                is_empty = self._step.sums.is_empty()
                is_last = tf.logical_and(is_last, tf.logical_not(is_empty))
            return logs, tf.cond(is_last, self._updated, lambda: 0)

        def following(i: Any, current: Any) -> Any:
            return tf.cond(
                i < tf.size(closes),
                batches.get_next_as_optional,
                lambda: current,
            )

        def condition(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            return tf.logical_and(i < tf.size(closes), batch.has_value())

        def body(i: Any, updates: Any, logs: Any, batch: Any) -> Any:
            logs, made = run(batch.get_value(), i)
            return i + 1, updates + made, logs, following(i + 1, batch)

        # The first one raises where there are no more batches.
        logs, updates = run(batches, 0)
        batch = batches.get_next_as_optional()
        ran, updates, logs, _ = tf.while_loop(
            condition, body, (tf.constant(1), updates, logs, batch)
        )
        return logs, ran, updates

    def _updated(self) -> int:
        self._run_update()
        return 1

    def _run_update(self) -> None:
        if self.model.run_eagerly:
            self._update(lambda update: update)
            return
        # It is compiled anew when there are other sums.
        version = self._step.version
        if version not in self._updates:
            options = {
                "autograph": False,
                "jit_compile": self.model.jit_compile,
            }
            self._updates[version] = tf.function(
                lambda: self._update(lambda f: tf.function(f, **options)),
                autograph=False,
            ).get_concrete_function()
        self._updates[version]()

    def _update(self, compiled: Callable[[Any], Any]) -> None:
        run = self.model.distribute_strategy.run
        compiled(lambda: run(self._step.update))()
        # XLA would hold the sums and their zeros at the same time.
        run(self._step.empty)

    def _made(self, train_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What Keras makes of a `train_step`, for a single batch."""
        model = self.model
        try:
            with self._step.instead_of(train_step):
                model.make_train_function(force=True)
            run = model.train_function
            return lambda data: run(iter([data]))
        finally:
            model.train_function = self._plain

    def _overheard(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(data: Any) -> Any:
            # Around all replicas, which are threads.
            with self._step.overheard():
                return step(data)

        return run

    def _compiled(
        self, function: Callable[..., Any], is_plain: bool, closes: bool
    ) -> Callable[[Any], Any]:
        """`_run_one` or `_run_many`, its options known beforehand."""
        # What may update is compiled anew when there are other sums.
        version = self._step.version if closes else None
        key = (function.__name__, is_plain, closes, version)
        if key not in self._calls:

            def call(argument: Any) -> Any:
                return function(argument, is_plain, closes)

            is_eager = self.model.run_eagerly
            self._calls[key] = call if is_eager else CompiledCall(call)
        return self._calls[key]

    def copied(self, variable: Any) -> list[tf.Tensor]:
        return [tf.identity(part) for part in local_values(variable.value)]

    def put_back(self, variable: Any, before: list[tf.Tensor]) -> None:
        for part, value in zip(local_values(variable.value), before):
            part.assign(value)


def _are_tensors(batch: Any) -> bool:
    """Whether it is of one replica, and can be cut in a graph."""
    leaves = keras.tree.flatten(batch)
    return all(leaf is None or isinstance(leaf, tf.Tensor) for leaf in leaves)


def _device_of(leaf: Any) -> str | None:
    return None if leaf is None else leaf.device


@functools.lru_cache(maxsize=1024)
def _bounds(start: int, times: int) -> tf.Tensor:
    with tf.device("CPU:0"):
        return tf.constant([start, times])


def _part_of(leaf: Any, start: Any, size: int, device: str | None) -> Any:
    if leaf is None:
        return None
    # Where it is, else all of it would go to the device that computes.
    with tf.device(device):
        part = leaf[start : start + size]
        return tf.ensure_shape(part, [size, *leaf.shape[1:]])
