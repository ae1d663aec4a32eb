"""Sums of weighted gradients, and the update that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from kaccum.backends import backend
from kaccum.sums.totals import chosen


class GradientSums:
    """The weighted gradients of the open window, for one optimizer.

    Holds their weight (scalar float32), their number (scalar int32), and for
    each variable that ever had a gradient a sum of the variable's shape: in
    float32 where the gradient is of half precision, else in its dtype.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that makes the updates.
        apply: Function of `(gradients, variables)` that makes one.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        apply: Callable[..., Any],
    ) -> None:
        self._optimizer = optimizer
        self._apply = apply
        self._variables: dict[int, Any] = {}
        self._dtypes: dict[int, Any] = {}
        self._sums: dict[int, Any] = {}
        # Variables with a gradient: in some compiled step, so perhaps in this
        # window; and in this window, as eager execution knows.
        self._compiled: set[int] = set()
        self._in_window: set[int] = set()
        self._is_divided: bool | None = None
        self._once: Sequence[Callable[[], Any]] = ()
        self._weight = backend().new_sum((), "float32")
        self._count = backend().new_sum((), "int32")

    @property
    def sums(self) -> list[Any]:
        """All of them."""
        return [self._weight, self._count, *self._sums.values()]

    @property
    def count(self) -> Any:
        """The number of micro-batches in the open window, a scalar int32."""
        return backend().value_of(self._count)

    def add(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        weight: Any,
        *,
        kept: Any = True,
        once: Sequence[Callable[[], Any]] = (),
    ) -> None:
        """Adds the gradients of one micro-batch.

        Args:
            gradients: Tensors of the variables' shapes, sparse ones, or `None`.
            variables: The variables, in the same order.
            weight: Scalar, the micro-batch's weight, or `None` for a loss that
                is a sum.
            kept: `True`, or a scalar bool: whether the window keeps it.
            once: Functions that return the terms of a sum that do not depend on
                the data. They count once a window.

        Raises:
            ValueError: As `GradientAccumulator.add`.
            RuntimeError: If a variable is to be overwritten by its gradient,
                and there are several replicas.
        """
        self._check(gradients, variables, weight)
        self._variables.update({id(v): v for v in variables})
        self._is_divided = weight is not None
        self._once = once
        weight = 1.0 if weight is None else weight
        if kept is not True:
            gradients = backend().zero_unless(kept, gradients)
        backend().increase(self._count, chosen(kept, 1, 0))
        backend().increase(self._weight, chosen(kept, weight, 0.0))
        is_eager = backend().is_eager()
        in_window = self._in_window if is_eager else self._compiled
        sums, added = [], []
        for gradient, variable in zip(gradients, variables):
            if gradient is None:
                continue
            in_window.add(id(variable))
            total = self._sum_of(variable, gradient.dtype)
            if _is_overwritten(variable):
                _check_replicas(variable)
                larger = ops.maximum(backend().value_of(total), gradient)
                backend().assign(total, larger)
            else:
                sums.append(total)
                added.append(gradient)
        backend().add_weighted(sums, added, chosen(kept, weight, 0.0))

    def parts(self, *, releases: bool = False) -> list[Any]:
        """What the replicas of a strategy add up for an update.

        Args:
            releases: Whether the sums lose their memory to what is returned, so
                that it can be divided in place. XLA must not compile that.
        """
        take = backend().take if releases else backend().value_of
        numbers = [backend().value_of(s) for s in (self._weight, self._count)]
        return numbers + [take(total) for total in self._sums.values()]

    def close(self, parts: list[Any]) -> None:
        """Makes one update of the window's gradient.

        Args:
            parts: `parts`, each summed over all replicas. What the sums hold
                then is of no use: they are to be emptied next.

        Raises:
            RuntimeError: If nothing was added. In a graph of TensorFlow it is
                `tf.errors.InvalidArgumentError` (under XLA nothing is checked).
        """
        if not self._variables:
            raise RuntimeError(NOTHING_ADDED)
        weight, count, *sums = parts
        with backend().positive(count, NOTHING_ADDED):
            gradients = self._window_gradients(weight, count, sums)
            self._apply(gradients, list(self._variables.values()))

    def empty(self, *, releases: bool = False) -> None:
        """Makes the sums zero: the open window is forgotten.

        Args:
            releases: Whether what they hold loses its memory before there are
                zeros. XLA must not compile that.
        """
        for number in (self._weight, self._count):
            backend().empty(number)
        for key, total in self._sums.items():
            after = self._variables.get(key) if releases else None
            backend().empty(total, after=after)
        if backend().is_eager():
            self._in_window.clear()

    def release(self) -> None:
        """Frees the memory of the sums. `empty` takes it again."""
        for total in self._sums.values():
            backend().release(total)
        self._in_window.clear()
        if not self._compiled:
            # Until the next fit, eager code may freeze some of them.
            self._variables.clear()

    def _check(
        self, gradients: Sequence[Any], variables: Sequence[Any], weight: Any
    ) -> None:
        if len(gradients) != len(variables):
            raise ValueError(
                "`gradients` must be as many as `variables`. Received: "
                f"{len(gradients)} gradients and {len(variables)} variables."
            )
        build_optimizer(self._optimizer, variables)
        known = {id(v) for v in variables_of(self._optimizer)}
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
            self._sums[key] = backend().new_sum(
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
            means = backend().divided([totals[k] for k in divided], weight)
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
        once = backend().gradients_of(loss, variables)
        for i, term in enumerate(once):
            if term is not None and gradients[i] is not None:
                dtype = gradients[i].dtype
                term = ops.cast(repetitions, dtype) * ops.cast(term, dtype)
                gradients[i] -= term


NOTHING_ADDED = (
    "`apply` must follow an `add`: a window without micro-batches has no "
    "gradient. Received: nothing since the last `apply`."
)


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that a bare `optimizer.apply(gradients)` updates.

    They are kept since `build` and have no public name (Keras 3.5 to 3.15).
    """
    return list(optimizer._trainable_variables)


def build_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[Any]
) -> None:
    """Makes an optimizer's variables, also while a function is traced."""
    if not optimizer.built:
        backend().outside_of_traces(
            functools.partial(_build, optimizer, list(variables))
        )


def _build(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> None:
    with keras.name_scope(optimizer.name):
        optimizer.build(variables)
    optimizer.built = True


def _check_replicas(variable: Any) -> None:
    if backend().replicas() > 1:
        raise RuntimeError(
            "Variables that are overwritten by their gradients must be on one "
            f"device to be accumulated. Received: {variable.path!r}, on "
            f"{backend().replicas()} replicas."
        )


def _is_overwritten(variable: Any) -> bool:
    # The "gradients" of float8 scales are their new values (Keras 3.15).
    return getattr(variable, "overwrite_with_gradient", False)
