"""`GradientAccumulator`: sums of weighted gradients, and the update they make.

Counts no micro-batches and listens to no loss: it is told both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops

from kaccum.backend import engine
from kaccum.checks import check_optimizer, with_inner
from kaccum.keras_private import variables_of


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

    Raises:
        TypeError: If `optimizer` is none of Keras's.
        ValueError: If it has `gradient_accumulation_steps` of its own.
        RuntimeError: If Keras runs on another backend than TensorFlow, JAX or
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
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self._engine = engine()
        self._apply = apply or optimizer.apply
        self._variables: dict[int, Any] = {}
        self._dtypes: dict[int, Any] = {}
        self._sums: dict[int, Any] = {}
        # Variables with a gradient: in some compiled step, so perhaps in this
        # window; and in this window, as eager execution knows.
        self._compiled: set[int] = set()
        self._in_window: set[int] = set()
        self._is_divided: bool | None = None
        self._once: list[Callable[[], Any]] = []
        self._patches = self._engine.patches_for_whole_gradients(
            with_inner(optimizer)
        )
        self._weight = self._engine.new_sum((), "float32")
        self._count = self._engine.new_sum((), "int32")

    @property
    def count(self) -> Any:
        """The number of micro-batches in the open window, a scalar int32."""
        return self._engine.value_of(self._count)

    @property
    def number_of_sums(self) -> int:
        """The number of variables that ever had a gradient."""
        return len(self._sums)

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
            ValueError: If there are more or fewer gradients than variables, the
                optimizer does not know a variable, or a `weight` of `None`
                follows another.
            RuntimeError: If a variable is to be overwritten by its gradient (a
                scale of float8), under a strategy of several replicas; inside
                of what JAX traces.
        """
        gradients, variables = list(gradients), list(variables)
        self._check(gradients, variables, weight)
        self._variables.update({id(v): v for v in variables})
        self._is_divided = weight is not None
        if where is not None:
            gradients = self._engine.zero_unless(where, gradients)
        kept = 1 if where is None else ops.cast(where, "int32")
        self._engine.increase(self._count, kept)
        weight = 1.0 if weight is None else weight
        if where is not None:
            weight = ops.where(where, weight, 0.0)
        self._engine.increase(self._weight, weight)
        is_eager = self._engine.is_eager()
        in_window = self._in_window if is_eager else self._compiled
        sums, added = [], []
        for gradient, variable in zip(gradients, variables):
            if gradient is None:
                continue
            in_window.add(id(variable))
            total = self._sum_of(variable, gradient.dtype)
            if _is_overwritten(variable):
                _check_replicas(variable, self._engine.replicas())
                self._engine.take_larger(total, gradient)
            else:
                sums.append(total)
                added.append(gradient)
        self._engine.add_weighted(sums, added, weight)

    def take(self, *, releases: bool = False) -> list[Any]:
        """Takes out what the replicas of a strategy add up for an update.

        Args:
            releases: Whether the sums lose their memory to what is taken, so
                that it can be divided in place. XLA must not compile that.
        """
        take = self._engine.take if releases else self._engine.value_of
        numbers = [self._weight, self._count]
        return [
            *(self._engine.value_of(number) for number in numbers),
            *(take(total) for total in self._sums.values()),
        ]

    def apply(self, parts: list[Any] | None = None) -> None:
        """Makes one update of the window's gradient and empties the sums.

        Args:
            parts: For kaccum's own use: the sums of all replicas. Defaults to
                those of this accumulator.

        Raises:
            RuntimeError: If nothing was added since the last update. What is
                compiled raises `tf.errors.InvalidArgumentError` (under XLA it
                checks nothing).
        """
        self.update(parts)
        self.reset()

    def update(self, parts: list[Any] | None = None) -> None:
        """`apply`, but for the sums: what they hold then is of no use."""
        if not self._variables:
            raise RuntimeError(_NOTHING_ADDED)
        if parts is None:
            parts = self._engine.sum_over_replicas(self.take())
        weight, count, *sums = parts
        with self._engine.positive(count, _NOTHING_ADDED):
            variables = list(self._variables.values())
            gradients = self._window_gradients(weight, count, sums)
            with contextlib.ExitStack() as stack:
                if self._engine.replicas() > 1:
                    for patch in self._patches:
                        stack.enter_context(patch)
                self._apply(gradients, variables)

    def reset(self, *, releases: bool = False) -> None:
        """Empties the sums: the open window is forgotten.

        Args:
            releases: For kaccum's own use: whether what they hold loses its
                memory before there are zeros. XLA must not compile that.
        """
        for number in (self._weight, self._count):
            self._engine.empty(number)
        for key, total in self._sums.items():
            after = self._variables.get(key) if releases else None
            self._engine.empty(total, after=after)
        if self._engine.is_eager():
            self._in_window.clear()

    def release(self) -> None:
        """Frees the memory of the sums. `reset` takes it again."""
        for total in self._sums.values():
            self._engine.release(total)
        self._in_window.clear()
        if not self._compiled:
            # Until the next fit, eager code may freeze some of them.
            self._variables.clear()

    def count_once(self, terms: list[Callable[[], Any]]) -> None:
        """Says which terms of the loss do not depend on the data.

        Means count them once by themselves; sums would count them once a
        micro-batch.

        Args:
            terms: Functions that return a term of the loss.
        """
        self._once = terms

    def _check(
        self, gradients: list[Any], variables: list[Any], weight: Any
    ) -> None:
        if len(gradients) != len(variables):
            raise ValueError(
                "`gradients` must be as many as `variables`. Received: "
                f"{len(gradients)} gradients and {len(variables)} variables."
            )
        build_optimizer(self.optimizer, variables)
        known = {id(v) for v in variables_of(self.optimizer)}
        for variable in variables:
            if id(variable) not in known:
                name = getattr(variable, "path", variable.name)
                raise ValueError(
                    "`variables` must be those that the optimizer was built "
                    f"for. Received: {name!r}, which is not among them. Use "
                    "another optimizer, in a `GradientAccumulator` of its own."
                )
        if self._is_divided not in (None, weight is not None):
            raise ValueError(
                "`weight` must be `None` for all micro-batches or for none: "
                "losses are sums or means. Received: both."
            )

    def _sum_of(self, variable: Any, dtype: Any) -> Any:
        key = id(variable)
        if key not in self._sums:
            dtype = keras.backend.standardize_dtype(dtype)
            self._dtypes[key] = dtype
            self._sums[key] = self._engine.new_sum(
                variable.shape,
                "float32" if dtype in ("float16", "bfloat16") else dtype,
                beside=variable,
            )
        return self._sums[key]

    def _window_gradients(
        self, weight: Any, count: Any, sums: list[Any]
    ) -> list[Any]:
        totals = dict(zip(self._sums, sums))
        if self._is_divided:
            divided = [
                key
                for key, variable in self._variables.items()
                if key in totals and not _is_overwritten(variable)
            ]
            means = self._engine.divided([totals[k] for k in divided], weight)
            totals.update(zip(divided, means))
        has_gradient = self._compiled | self._in_window
        gradients = [
            totals[key] if key in has_gradient else None
            for key in self._variables
        ]
        if not self._is_divided and self._once:
            self._subtract_repetitions(gradients, count - 1)
        return [
            g if g is None else ops.cast(g, self._dtypes[key])
            for g, key in zip(gradients, self._variables)
        ]

    def _subtract_repetitions(
        self, gradients: list[Any], repetitions: Any
    ) -> None:
        """Takes out all but one of the terms that every micro-batch added."""

        def loss() -> Any:
            return sum(ops.sum(term()) for term in self._once)

        variables = list(self._variables.values())
        once = self._engine.gradients_of(loss, variables)
        for i, term in enumerate(once):
            if term is not None and gradients[i] is not None:
                dtype = gradients[i].dtype
                term = ops.cast(repetitions, dtype) * ops.cast(term, dtype)
                gradients[i] -= term


_NOTHING_ADDED = (
    "`apply` must follow an `add`: a window without micro-batches has no "
    "gradient. Received: nothing since the last `apply`."
)


def build_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[Any]
) -> None:
    """Makes an optimizer's variables, also while a function is traced."""
    if not optimizer.built:
        engine().outside_of_traces(
            functools.partial(_build, optimizer, list(variables))
        )


def _build(
    optimizer: keras.optimizers.Optimizer, variables: list[Any]
) -> None:
    with keras.name_scope(optimizer.name):
        optimizer.build(variables)
    optimizer.built = True


def _check_replicas(variable: Any, replicas: int) -> None:
    if replicas > 1:
        raise RuntimeError(
            "Variables that are overwritten by their gradients must be on one "
            f"device to be accumulated. Received: {variable.path!r}, on "
            f"{replicas} replicas."
        )


def _is_overwritten(variable: Any) -> bool:
    # The "gradients" of float8 scales are their new values (Keras 3.15).
    return getattr(variable, "overwrite_with_gradient", False)
