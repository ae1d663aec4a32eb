"""Sums of weighted gradients, and the update that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from kaccum.backends import SumSpec, backend
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
        self._backend = backend()
        # Their weight, and how many they are.
        self._numbers = self._backend.new_sums(
            [SumSpec((), "float32"), SumSpec((), "int32")]
        )

    @property
    def sums(self) -> list[Any]:
        """All of them."""
        return [*self._numbers, *self._sums.values()]

    @property
    def count(self) -> Any:
        """The number of micro-batches in the open window, a scalar int32."""
        return self._backend.values_of(self._numbers)[1]

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
        numbers = [1.0 if weight is None else weight, 1]
        numbers = chosen(kept, numbers, [0.0, 0])
        self._backend.increase(self._numbers, numbers)
        if kept is not True:
            gradients = self._backend.zero_unless(kept, gradients)
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(gradients, variables)
            if gradient is not None
        ]
        self._make_sums(pairs)
        is_eager = self._backend.is_eager()
        has_gradient = self._in_window if is_eager else self._compiled
        has_gradient.update(id(variable) for _, variable in pairs)
        added = [pair for pair in pairs if not _is_overwritten(pair[1])]
        self._backend.add_weighted(
            [self._sums[id(variable)] for _, variable in added],
            [gradient for gradient, _ in added],
            numbers[0],
        )
        self._overwrite([p for p in pairs if _is_overwritten(p[1])])

    def parts(self, *, releases: bool = False) -> list[Any]:
        """What the replicas of a strategy add up for an update.

        Args:
            releases: Whether the sums lose their memory to what is returned, so
                that it can be divided in place. XLA must not compile that.
        """
        backend = self._backend
        take = backend.take if releases else backend.values_of
        numbers = backend.values_of(self._numbers)
        return [*numbers, *take(list(self._sums.values()))]

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
        with self._backend.positive(count, NOTHING_ADDED):
            gradients = self._window_gradients(weight, count, sums)
            self._apply(gradients, list(self._variables.values()))

    def empty(self, *, releases: bool = False) -> None:
        """Makes the sums zero: the open window is forgotten.

        Args:
            releases: Whether what they hold loses its memory before there are
                zeros. XLA must not compile that.
        """
        self._backend.empty(self._numbers)
        after = [self._variables.get(key) for key in self._sums]
        sums = list(self._sums.values())
        self._backend.empty(sums, after if releases else ())
        if self._backend.is_eager():
            self._in_window.clear()

    def release(self) -> None:
        """Frees the memory of the sums. `empty` takes it again."""
        self._backend.release(list(self._sums.values()))
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

    def _make_sums(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """For gradients that there are for the first time, in pairs."""
        specs = {}
        for gradient, variable in pairs:
            if id(variable) in self._sums:
                continue
            dtype = keras.backend.standardize_dtype(gradient.dtype)
            self._dtypes[id(variable)] = dtype
            is_half = dtype in ("float16", "bfloat16")
            dtype = "float32" if is_half else dtype
            specs[id(variable)] = SumSpec(variable.shape, dtype, variable)
        if specs:
            sums = self._backend.new_sums(list(specs.values()))
            self._sums.update(zip(specs, sums))

    def _overwrite(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Keeps the largest of "gradients" that are values, in pairs."""
        for gradient, variable in pairs:
            _check_replicas(variable, self._backend.replicas())
            sums = [self._sums[id(variable)]]
            (largest,) = self._backend.values_of(sums)
            self._backend.assign(sums, [ops.maximum(largest, gradient)])

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
            means = self._backend.divided([totals[k] for k in divided], weight)
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
        once = self._backend.gradients_of(loss, variables)
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
