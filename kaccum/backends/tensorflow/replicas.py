"""Several devices at once: the replicas of a `tf.distribute` strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.base import Backend

_SUPPORTED = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    type(tf.distribute.get_strategy()),
)


class Replicas(Backend):
    """What the replicas of a model have, and what they do together."""

    def check_devices(self, model: keras.Model) -> None:
        strategy = model.distribute_strategy
        name = type(strategy).__name__
        if type(strategy) not in _SUPPORTED:
            raise RuntimeError(
                "The model must train on one device, or under a "
                "`tf.distribute.MirroredStrategy`, for its gradients to be "
                f"accumulated. Received: a {name}."
            )
        if self.replicas_of(model) > 1 and model.jit_compile:
            raise RuntimeError(
                "XLA compiles for one device only (TensorFlow 2.21). Received: "
                f"jit_compile=True and a {name} of {self.replicas_of(model)} "
                "replicas. Leave `jit_compile` out of `compile`."
            )

    def devices(self, count: int) -> tf.distribute.MirroredStrategy:
        kind = "GPU"
        if len(tf.config.list_physical_devices(kind)) < count:
            kind = "CPU"
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices(kind)[0],
                [tf.config.LogicalDeviceConfiguration()] * count,
            )
        devices = [f"{kind}:{i}" for i in range(count)]
        return tf.distribute.MirroredStrategy(devices)

    def replicas_of(self, model: keras.Model) -> int:
        return int(model.distribute_strategy.num_replicas_in_sync)

    def shares_of(self, model: keras.Model) -> int:
        return self.replicas_of(model)

    def replicas(self) -> int:
        return int(tf.distribute.get_strategy().num_replicas_in_sync)

    def scope_of(self, model: keras.Model) -> AbstractContextManager[Any]:
        scope: AbstractContextManager[Any] = model.distribute_strategy.scope()
        return scope

    def outside_of_traces(self, make: Callable[[], Any]) -> Any:
        strategy = tf.distribute.get_strategy()

        def run() -> Any:
            with strategy.scope():
                return make()

        return in_a_thread(run)

    def sum_over_replicas(self, tensors: Sequence[Any]) -> list[Any]:
        if self.replicas() == 1:
            return list(tensors)
        is_double = any(t.dtype == tf.float64 for t in tensors)
        dtype = tf.float64 if is_double else tf.float32
        flat = [tf.reshape(tf.cast(t, dtype), [-1]) for t in tensors]
        packed = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, tf.concat(flat, axis=0)
        )
        parts = tf.split(packed, [tf.size(part) for part in flat])
        return [
            tf.cast(tf.reshape(part, tf.shape(t)), t.dtype)
            for part, t in zip(parts, tensors)
        ]

    def shown(self, value: Any) -> Any:
        # It shows the mean over replicas.
        return value * self.replicas()

    def as_row(self, value: Any) -> tf.Tensor:
        value = tf.convert_to_tensor(value)
        if self.replicas() == 1:
            return value[None]
        own = tf.distribute.get_replica_context().replica_id_in_sync_group
        is_own = tf.equal(tf.range(self.replicas()), own)
        is_own = tf.reshape(is_own, [-1] + [1] * len(value.shape))
        return tf.where(is_own, value[None], tf.zeros([], value.dtype))

    def rows_of(self, tensor: tf.Tensor) -> list[tf.Tensor]:
        return tf.unstack(tensor, num=self.replicas())

    def of_whole_gradients(self, optimizer: Any) -> dict[str, Callable]:
        overwrite = functools.partial(_overwrite_with_averages, optimizer)
        return {
            # It would be summed again.
            "_all_reduce_sum_gradients": lambda pairs: pairs,
            # Keras has replicas wait for each other in a conditional, which
            # TensorFlow refuses (3.15, 2.21).
            "_overwrite_model_variables_with_average_value": overwrite,
        }


# AutoGraph, in a user's own `tf.function`, could not read it, and warn.
@tf.autograph.experimental.do_not_convert
def in_a_thread(run: Callable[[], Any]) -> Any:
    """What `run` returns, called in a thread of its own.

    Made in a trace, or in `tf.init_scope`, a variable would belong to the
    function that is traced, and have it traced a second time.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


def local_values(value: Any) -> tuple[Any, ...]:
    """A value's parts, one for each replica of this process."""
    if isinstance(value, tf.distribute.DistributedValues):
        return tuple(value.values)
    return (value,)


def handles(total: Any) -> list[Any]:
    """The resources of a variable: this replica's, or else all replicas'."""
    if tf.distribute.has_strategy() and tf.distribute.get_replica_context():
        return [total.handle]
    return [part.handle for part in local_values(total)]


def _overwrite_with_averages(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]
) -> None:
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(variables, averages):
        if average is not None:
            for handle in handles(variable.value):
                tf.raw_ops.AssignVariableOp(
                    resource=handle, value=tf.convert_to_tensor(average)
                )
