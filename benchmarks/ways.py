"""The ways to train on large batches, each for as many micro-batches."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from benchmarks import bare
from benchmarks.networks import Network
from kaccum import GradientAccumulationCallback

PLAIN = "plain fit"
KERAS = "Keras's own"
STEPS = "steps"
CUT = "micro_batch_size"
LARGE = "large batch"
BARE = "bare loop"
AGAIN = "plain fit again"
WHOLE_STEPS = "whole, steps"
WHOLE_CUT = "whole, cut"
LOGGED = "steps, log_gradients"
#: Whether XLA compiles: on JAX always, on PyTorch never.
KINDS = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}
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
        name: One of `WAYS`, or another one of these.
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
        model = network.build()
        if name == BARE:
            self._bare = bare.loop(model, self._loss, is_xla)
        else:
            # Keras accumulates over two or more.
            steps = window if name == KERAS and window > 1 else None
            model.compile(
                keras.optimizers.Adam(gradient_accumulation_steps=steps),
                self._loss,
                jit_compile=is_xla,
                # Keras has no other on PyTorch.
                steps_per_execution=(
                    1
                    if keras.backend.backend() == "torch"
                    else network.steps_per_execution
                ),
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
        is_at_once = self.name in (PLAIN, LARGE, CUT, WHOLE_CUT)
        return self._run(1 if is_at_once else self.window)

    def run(self) -> Run:
        """Trains on all micro-batches of the network."""
        return self._run(None)

    def _run(self, batches: int | None) -> Run:
        size = self._network.micro_batch
        size *= self.window if self.name in (LARGE, CUT, WHOLE_CUT) else 1
        data = _batches(self._network.examples(), size, batches)
        before, started = self.traces, time.perf_counter()
        if self.name == BARE:
            seconds = self._bare.train(data, self.window)
        else:
            seconds = self._fit(data)
        ended = time.perf_counter()
        self.is_new = False
        return Run(seconds, ended - started, self.traces - before)

    def _fit(self, data: Any) -> float:
        stopwatch = Stopwatch()
        callbacks: list[keras.callbacks.Callback] = [stopwatch]
        ours = functools.partial(
            GradientAccumulationCallback,
            whole_batch_loss=self.name in (WHOLE_STEPS, WHOLE_CUT),
            log_gradients=self.name == LOGGED,
        )
        if self.name in (STEPS, WHOLE_STEPS, LOGGED):
            callbacks.append(ours(self.window))
        elif self.name in (CUT, WHOLE_CUT):
            size = self._network.micro_batch
            callbacks.append(ours(micro_batch_size=size))
        self._model.fit(data, verbose=0, shuffle=False, callbacks=callbacks)
        return stopwatch.seconds


class Again:
    """The plain fit once more: how far from 1 is the ratio of two alike?

    Args:
        way: The plain fit.
    """

    name = AGAIN

    def __init__(self, way: Way) -> None:
        self.run = way.run


class _Batches(keras.utils.PyDataset):
    """Batches that lie in memory."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]


def _batches(
    examples: tuple[np.ndarray, np.ndarray], size: int, count: int | None
) -> Any:
    """A data set, as each backend likes it best."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices(examples)
        data = data.batch(size, drop_remainder=True).prefetch(2)
        return data.take(-1 if count is None else count)
    x, y = (keras.ops.convert_to_tensor(array) for array in examples)
    most = len(x) // size
    count = most if count is None else min(count, most)
    starts = range(0, count * size, size)
    return _Batches([(x[i : i + size], y[i : i + size]) for i in starts])


def in_turn(ways: Sequence[Way | Again], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way by name, round after round: A B C A B C ..."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            seconds[way.name].append(way.run().seconds)
    return seconds


def ratio(mine: list[float], others: list[float]) -> float:
    """Median of pairwise ratios."""
    return float(np.median(np.divide(mine, others)))
