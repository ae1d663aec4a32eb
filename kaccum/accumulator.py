"""`GradientAccumulator`: for a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras

from kaccum.backends import backend
from kaccum.checks import check_gradient, check_optimizer
from kaccum.patches import patched
from kaccum.step.hooks import whole_gradients
from kaccum.sums.gradients import GradientSums


class GradientAccumulator:
    """Sums of weighted gradients, for a training loop of your own.

    Add the gradients of each micro-batch with its weight; `apply` makes one
    update with the gradient of their union,
    `sum(weight * gradient) / sum(weight)`. It works eagerly and inside a
    `tf.function`. On JAX it is called with what compiled functions return, not
    inside of them.

    The sums are float32 where gradients are half precision. Repeated rows of a
    `tf.IndexedSlices` add up.

    Under a `tf.distribute.MirroredStrategy`, make it in the strategy's scope,
    and call `add` and `apply` in `strategy.run`: each replica adds its own
    micro-batch with its own weight, not divided by the number of replicas, and
    `apply` adds up the replicas' sums in one all-reduce.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that makes the updates.
        apply: Function of `(gradients, variables)` that makes an update.
            Defaults to the optimizer's own `apply`.
        process_group: On PyTorch, the `torch.distributed` processes that train
            the model together, each on its part of the data, as
            `torch.distributed.group.WORLD`. Each adds the gradients of its own
            micro-batches, which `DistributedDataParallel.no_sync` leaves
            alone, and `apply`, which all of them call, adds up the sums in
            one all-reduce. `None` for this process by itself.

    Raises:
        TypeError: If `optimizer` is none of Keras's.
        ValueError: If it has `gradient_accumulation_steps` of its own.
        RuntimeError: If there is a `process_group` on another backend than
            PyTorch.

    Example:

    ```python
    import keras
    import tensorflow as tf

    from kaccum import GradientAccumulator

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    accumulator = GradientAccumulator(keras.optimizers.Adam())
    data = tf.data.Dataset.from_tensor_slices((tf.ones((32, 4)), tf.ones(32)))
    for i, (x, y) in enumerate(data.batch(8)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x)[:, 0] - y))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        accumulator.add(gradients, variables, weight=len(x))
        if i % 4 == 3:
            accumulator.apply()
    print(int(accumulator.optimizer.iterations))  # 1: of 4 micro-batches
    ```
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        *,
        apply: Callable[..., Any] | None = None,
        process_group: Any = None,
    ) -> None:
        check_optimizer(optimizer)
        self._meeting = backend().meeting(process_group)
        self.optimizer = optimizer
        self._sums = GradientSums(optimizer, apply or optimizer.apply)
        self._patches = whole_gradients(optimizer)

    @property
    def count(self) -> Any:
        """The number of micro-batches in the open window, a scalar int32."""
        return self._sums.count

    def add(
        self,
        gradients: Iterable[Any],
        variables: Iterable[Any],
        weight: Any,
        *,
        where: Any = None,
    ) -> None:
        """Adds the gradients of one micro-batch to the sums.

        Args:
            gradients: Tensors of the variables' shapes, `tf.IndexedSlices`, or
                `None` where a variable has no gradient.
            variables: The variables, in the same order: those that the
                optimizer was built for, or some of them. An optimizer that is
                not built yet is built for those of the first `add`.
            weight: Scalar, the denominator of the micro-batch's mean loss: its
                number of examples, of unmasked elements, or its sum of
                weights. `None` for a loss that is a sum.
            where: Scalar bool; where false the micro-batch is left out, as if
                it had never come. Defaults to true.

        Raises:
            TypeError: If gradients and variables are swapped.
            ValueError: If there are more or fewer gradients than variables.
            ValueError: If a gradient has another shape than its variable.
            ValueError: If the optimizer does not know a variable.
            ValueError: If a `weight` of `None` follows another one.
            RuntimeError: Inside of what JAX traces.
            RuntimeError: If a variable is to be overwritten by its gradient (a
                scale of float8), under a strategy of several replicas.
        """
        backend().check_add()
        kept = True if where is None else where
        gradients, variables = list(gradients), list(variables)
        for pair in zip(gradients, variables):
            check_gradient(*pair)
        self._sums.add(gradients, variables, weight, kept=kept)

    def apply(self) -> None:
        """Makes one update of the window's gradient and empties the sums.

        Raises:
            RuntimeError: If nothing was added since the last update.
            tf.errors.InvalidArgumentError: For the same, in what TensorFlow
                compiles (under XLA it checks nothing).
        """
        backend().check_add()
        with patched(self._patches), backend().together(self._meeting):
            self._sums.close(backend().sum_over_replicas(self._sums.parts()))
        self.reset()

    def reset(self) -> None:
        """Empties the sums: the open window is forgotten."""
        backend().check_add()
        self._sums.empty()
