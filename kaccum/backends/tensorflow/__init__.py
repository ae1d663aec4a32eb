"""On TensorFlow a step is traced, and replicas of a strategy run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.runner import Runner, Step
from kaccum.backends.tensorflow.arithmetic import Arithmetic
from kaccum.backends.tensorflow.batches import Batches
from kaccum.backends.tensorflow.runner import TensorFlowRunner
from kaccum.backends.tensorflow.tester import TensorFlowTester
from kaccum.backends.tester import Tester, TestOfParts


class TensorFlowBackend(Arithmetic, Batches):
    """Sums, batches and replicas, and what little else there is."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
            return True
        is_of_tensorflow = isinstance(error, tf.errors.OpError)
        return is_of_tensorflow and "RESOURCE_EXHAUSTED" in str(error)

    def out_of_memory(
        self, error: BaseException, sentence: str
    ) -> tf.errors.ResourceExhaustedError:
        message = getattr(error, "message", str(error))
        return tf.errors.ResourceExhaustedError(
            getattr(error, "node_def", None),
            getattr(error, "op", None),
            f"{message}\n{sentence}",
        )

    def runner(self, model: keras.Model, step: Step) -> Runner:
        return TensorFlowRunner(model, step, self)

    def tester(
        self, model: keras.Model, test: TestOfParts, runner: Any
    ) -> Tester:
        return TensorFlowTester(model, test, runner)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        config = tf.config.experimental
        before = config.tensor_float_32_execution_enabled()
        config.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            config.enable_tensor_float_32_execution(before)

    def peak_memory(self) -> int | None:
        if not tf.config.list_logical_devices("GPU"):
            return None
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])

    def forget_peak_memory(self) -> None:
        if tf.config.list_logical_devices("GPU"):
            tf.config.experimental.reset_memory_stats("GPU:0")

    def device_name(self) -> str:
        gpus = tf.config.list_logical_devices("GPU")
        return gpus[0].name if gpus else "CPU (not run on a GPU)"


BACKEND = TensorFlowBackend()
