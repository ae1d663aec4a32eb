"""The ways to train on large batches, each for as many micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from benchmarks.networks import Network
from kaccum import GradientAccumulationCallback

PLAIN = "plain fit"
KERAS = "Keras's own"
STEPS = "steps"
CUT = "micro_batch_size"
LARGE = "large batch"
BARE = "bare loop"
WAYS = (PLAIN, KERAS, STEPS, CUT, LARGE, BARE)


class Run(NamedTuple):
    """What training on some batches took.

    Args:
        seconds: Of the epoch alone: between its first batch and its last log.
        all_seconds: Of everything, also of what comes before the first batch.
        traces: How often the training step was traced.
    """

    seconds: float
    all_seconds: float
    traces: int


class CountingLoss(keras.losses.SparseCategoricalCrossentropy):
    """Counts how often it is traced."""

    traces = 0

    def __init__(self) -> None:
        super().__init__(from_logits=True)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        self.traces += 1
        return super().call(y_true, y_pred)


class Stopwatch(keras.callbacks.Callback):
    """Measures an epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._started


class Way:
    """One way to train a network with Adam.

    Args:
        name: One of `WAYS`.
        network: What to train.
        is_xla: Whether XLA compiles the steps.
        window: How many micro-batches make an update.
    """

    def __init__(
        self, name: str, network: Network, *, is_xla: bool, window: int
    ) -> None:
        self.name = name
        self._network = network
        self._is_xla = is_xla
        self._loss = CountingLoss()
        self._train: Callable[[tf.data.Dataset], float] = self._fit
        model = network.build()
        if name == BARE:
            self._train = BareLoop(model, self._loss, is_xla, self).train
        else:
            # Keras accumulates over two or more.
            steps = window if name == KERAS and window > 1 else None
            model.compile(
                keras.optimizers.Adam(gradient_accumulation_steps=steps),
                self._loss,
                jit_compile=is_xla,
                steps_per_execution=network.steps_per_execution,
            )
        self._model = model
        self.window = window
        self.is_new = True

    @property
    def variables(self) -> list[Any]:
        """The trainable variables."""
        return list(self._model.trainable_variables)

    @property
    def traces(self) -> int:
        """How often the training step was traced."""
        return self._loss.traces

    def of(self, window: int) -> Way:
        """The same way with other windows, compiled anew if it must be."""
        if self.name in (KERAS, LARGE) and window != self.window:
            return Way(
                self.name, self._network, is_xla=self._is_xla, window=window
            )
        self.window = window
        return self

    def first_update(self) -> Run:
        """Trains until there is an update."""
        is_at_once = self.name in (PLAIN, LARGE, CUT)
        return self._run(1 if is_at_once else self.window)

    def run(self) -> Run:
        """Trains on all micro-batches of the network."""
        return self._run(None)

    def _run(self, batches: int | None) -> Run:
        size = self._network.micro_batch
        size *= self.window if self.name in (LARGE, CUT) else 1
        data = tf.data.Dataset.from_tensor_slices(self._network.examples())
        data = data.batch(size, drop_remainder=True).prefetch(2)
        data = data.take(-1 if batches is None else batches)
        before, started = self.traces, time.perf_counter()
        seconds = self._train(data)
        ended = time.perf_counter()
        self.is_new = False
        return Run(seconds, ended - started, self.traces - before)

    def _fit(self, data: tf.data.Dataset) -> float:
        stopwatch = Stopwatch()
        callbacks: list[keras.callbacks.Callback] = [stopwatch]
        ours = GradientAccumulationCallback
        if self.name == STEPS:
            callbacks.append(ours(self.window))
        elif self.name == CUT:
            size = self._network.micro_batch
            callbacks.append(ours(micro_batch_size=size))
        self._model.fit(data, verbose=0, shuffle=False, callbacks=callbacks)
        return stopwatch.seconds


class BareLoop:
    """Accumulation by hand: the least work there is.

    No logs, no callbacks, micro-batches of one size and no short window.

    Args:
        model: What to train, with Adam.
        loss: Its loss.
        is_xla: Whether XLA compiles the steps.
        way: Says how many micro-batches make an update.
    """

    def __init__(
        self, model: keras.Model, loss: Any, is_xla: bool, way: Way
    ) -> None:
        self._model, self._loss, self._way = model, loss, way
        self._optimizer = keras.optimizers.Adam()
        self._variables = [v.value for v in model.trainable_variables]
        self._optimizer.build(model.trainable_variables)
        self._sums = [tf.Variable(tf.zeros_like(v)) for v in self._variables]
        add = tf.function(self._add, jit_compile=is_xla)
        update = tf.function(self._add_and_apply, jit_compile=is_xla)
        # The graph pulls its data, which XLA cannot.
        self._add_next = tf.function(lambda batches: add(*next(batches)))
        self._update_next = tf.function(
            lambda batches, share: update(*next(batches), share)
        )

    def train(self, data: tf.data.Dataset) -> float:
        """Trains on the batches.

        Returns:
            The seconds it took.
        """
        window = self._way.window
        share = tf.constant(1.0 / window)
        started = time.perf_counter()
        batches = iter(data)
        loss = None
        for i in range(len(data)):
            if (i + 1) % window:
                loss = self._add_next(batches)
            else:
                loss = self._update_next(batches, share)
        np.asarray(loss)
        return time.perf_counter() - started

    def _add(self, x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self._loss(y, self._model(x, training=True))
        gradients = tape.gradient(loss, self._variables)
        for total, gradient in zip(self._sums, gradients):
            if isinstance(gradient, tf.IndexedSlices):
                total.scatter_add(gradient)
            else:
                total.assign_add(gradient)
        return loss

    def _add_and_apply(self, x: Any, y: Any, share: Any) -> Any:
        loss = self._add(x, y)
        self._optimizer.apply(
            [total * share for total in self._sums],
            self._model.trainable_variables,
        )
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return loss


def in_turn(ways: list[Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way by name, round after round: A B C A B C ..."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            seconds[way.name].append(way.run().seconds)
    return seconds


def ratio(mine: list[float], others: list[float]) -> float:
    """Median of pairwise ratios."""
    return float(np.median(np.divide(mine, others)))
