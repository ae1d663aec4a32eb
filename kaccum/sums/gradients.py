"""Sums of weighted gradients, and the update that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from kaccum.backends import SumSpec, backend
from kaccum.sums.noise import Measured, measured_of_means, measured_of_sums
from kaccum.sums.totals import chosen

# The weight of a micro-batch whose mean is of nothing, say all masked. Its loss
# still has the terms that do not depend on the data, which a window of such
# micro-batches must not lose. Beside any other weight it is below rounding.
OF_NOTHING = 2.0**-40


class _Entry:
    """What the sums know of a variable."""

    def __init__(self, variable: Any) -> None:
        self.variable = variable
        # Whether it was added in this window, or fit: with or without gradient.
        self.is_used = True
        # Whether it has a gradient: in some compiled step, so perhaps in this
        # window; and in this window, as eager execution knows.
        self.is_compiled = False
        self.is_in_window = False
        # From its first gradient on: that one's dtype, and their sum; and the
        # sum of those parts that count undivided, if there ever was one.
        self.dtype: Any = None
        self.total: Any = None
        self.undivided: Any = None

    @property
    def is_overwritten(self) -> bool:
        """Whether its "gradient" is its new value (scales of float8, 3.15)."""
        return getattr(self.variable, "overwrite_with_gradient", False)


class GradientSums:
    """The weighted gradients of the open window, for one optimizer.

    Holds their weight (scalar float32), their number (scalar int32), and for
    each variable that ever had a gradient a sum of the variable's shape: in
    float32 where the gradient is of half precision, else in its dtype. Where
    they are measured, also: the weighted sum of the squared norms of the
    micro-batches' gradients, their examples, and how many have some that count
    (scalars, float32).

    Args:
        optimizer: The `keras.optimizers.Optimizer` that makes the updates.
        apply: Function of `(gradients, variables)` that makes one.
        square_of: Function of tensors that returns the squared norm of all of
            them, a scalar, if gradients are measured.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        apply: Callable[..., Any],
        *,
        square_of: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._apply = apply
        self._norm_of = square_of
        # By the `id` of their variables.
        self._entries: dict[int, _Entry] = {}
        self._is_divided: bool | None = None
        self._once: Sequence[Callable[[], Any]] = ()
        #: What their sum is multiplied by, a scalar, or `None`.
        self.factor: Any = None
        #: What the loss is multiplied by in an update's gradient, or `None`.
        self.scale: Any = None
        #: The `id`s of variables whose gradient would have been of float16.
        self.halves: Collection[int] = ()
        self._backend = backend()
        # Their weight, and how many they are.
        specs = [SumSpec((), "float32"), SumSpec((), "int32")]
        specs += [SumSpec((), "float32")] * (3 if square_of else 0)
        self._numbers = self._backend.new_sums(specs)

    @property
    def sums(self) -> list[Any]:
        """All of them."""
        return [*self._numbers, *self._totals]

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
        is_weighted: bool = False,
        kept: Any = True,
        once: Sequence[Callable[[], Any]] = (),
        undivided: Sequence[Any] | None = None,
        examples: Any = None,
        scale: Any = None,
    ) -> None:
        """Adds the gradients of one micro-batch.

        Args:
            gradients: Tensors of the variables' shapes, sparse ones, or `None`.
            variables: The variables, in the same order.
            weight: Scalar, the micro-batch's weight, or `None` for a loss that
                is a sum.
            is_weighted: Whether they were multiplied by it.
            kept: `True`, or a scalar bool: whether the window keeps it.
            once: Functions that return the terms of a sum that do not depend on
                the data. They count once a window.
            undivided: The parts of the gradients that add up as they are, in
                the same order.
            examples: Scalar, how many examples they are of, or `None` where
                they are no gradient of a loss that a micro-batch has by itself.
            scale: Scalar, what the loss was multiplied by, or `None`.

        Raises:
            ValueError: As `GradientAccumulator.add`.
            RuntimeError: If a variable is to be overwritten by its gradient,
                and there are several replicas.
        """
        self._check(gradients, variables, weight)
        self._is_divided = weight is not None
        self._once = once
        numbers = [1.0 if weight is None else weight, 1]
        numbers = chosen(kept, numbers, [0.0, 0])
        if kept is not True:
            gradients = self._backend.zero_unless(kept, gradients)
            if undivided is not None:
                undivided = self._backend.zero_unless(kept, undivided)
        if self._norm_of is not None:
            told = None if undivided is not None else examples
            new = self._measured_of(
                gradients, variables, weight, told, scale, is_weighted
            )
            numbers += chosen(kept, new, [0.0, 0.0, 0.0])
        self._backend.increase(self._numbers, numbers)
        if undivided is not None:
            gradients = self._add_undivided(gradients, variables, undivided)
        entries = [self._entry_of(variable) for variable in variables]
        pairs = [
            (gradient, entry)
            for gradient, entry in zip(gradients, entries)
            if gradient is not None
        ]
        self._make_totals(pairs)
        is_eager = self._backend.is_eager()
        for _, entry in pairs:
            entry.is_in_window |= is_eager
            entry.is_compiled |= not is_eager
        added = [pair for pair in pairs if not pair[1].is_overwritten]
        self._backend.add_weighted(
            [entry.total for _, entry in added],
            [gradient for gradient, _ in added],
            1.0 if is_weighted else numbers[0],
        )
        self._overwrite([pair for pair in pairs if pair[1].is_overwritten])

    def lend(self) -> None:
        """Has the framework add the next gradients by itself, if it can."""
        self._backend.lend([e.total for e in self._with_totals])

    def parts(self, *, releases: bool = False) -> list[Any]:
        """What the replicas of a strategy add up for an update.

        Args:
            releases: Whether the sums lose their memory to what is returned, so
                that it can be divided in place. XLA must not compile that.
        """
        backend = self._backend
        if backend.are_sums_aligned():
            return self._aligned_parts()
        take = backend.take if releases else backend.values_of
        numbers = backend.values_of(self._numbers)
        return [*numbers, *self._scaled(take(self._totals))]

    def _scaled(self, totals: list[Any]) -> list[Any]:
        """What the sums hold, as if no loss had been scaled down."""
        if self.factor is None:
            return totals
        entries = [*self._with_totals, *self._with_undivided]
        return [
            (
                total
                if entry.is_overwritten
                else total * ops.cast(self.factor, total.dtype)
            )
            for total, entry in zip(totals, entries)
        ]

    def _aligned_parts(self) -> list[Any]:
        """The same, with a sum for every variable, and which have gradients.

        Another replica may have had a gradient for another variable.
        """
        known = self._entries
        variables = variables_of(self._optimizer)
        new = [v for v in variables if id(v) not in known]
        for variable in new:
            self._entry_of(variable).is_used = False
        self._entries = {id(v): known[id(v)] for v in variables}
        missing = [e for e in self._entries.values() if e.total is None]
        for entry in missing:
            entry.dtype = keras.backend.standardize_dtype(entry.variable.dtype)
            (entry.total,) = self._backend.new_sums(
                [_spec_of(entry.variable, entry.variable)]
            )
        numbers = self._backend.values_of(self._numbers)
        totals = self._scaled(self._backend.values_of(self._totals))
        flags = [[e.is_used, e.is_in_window] for e in self._entries.values()]
        # What a process knows that has added something.
        flags.append([self._is_divided is True, self._is_divided is False])
        return [*numbers, *totals, ops.convert_to_tensor(flags, "float32")]

    def count_in(self, parts: list[Any]) -> int:
        """The number of micro-batches in what `parts` returned, summed."""
        return int(parts[1])

    def close(self, parts: list[Any]) -> Measured | None:
        """Makes one update of the window's gradient.

        Args:
            parts: `parts`, each summed over all replicas. What the sums hold
                then is of no use: they are to be emptied next.

        Returns:
            What the gradients are, if they are measured.

        Raises:
            RuntimeError: If nothing was added. In a graph of TensorFlow it is
                `tf.errors.InvalidArgumentError` (under XLA nothing is checked).
        """
        if self._backend.are_sums_aligned():
            *parts, flags = parts
            *flags, (means, sums) = flags.tolist()
            if means and sums:
                raise ValueError(
                    "`weight` must be `None` in all processes or in none: "
                    "losses are sums or means. Received: both."
                )
            self._is_divided = means > 0
            for entry, (is_used, is_in_window) in zip(
                self._entries.values(), flags
            ):
                entry.is_used = is_used > 0
                entry.is_in_window = is_in_window > 0
        used = self._used
        if not used:
            raise RuntimeError(NOTHING_ADDED)
        count, totals = parts[1], parts[len(self._numbers) :]
        with self._backend.positive(count, NOTHING_ADDED):
            gradients = self._window_gradients(parts[0], count, totals)
            once: Sequence[Any] = []
            if not self._is_divided and self._once:
                once = self._counted_once(gradients, count - 1)
            gradients = self._rounded(gradients)
            measured = None
            if self._norm_of is not None:
                numbers = [parts[0], *parts[2:5]]
                measured = self._measured(gradients, once, *numbers)
            self._apply(gradients, [entry.variable for entry in used])
        return measured

    def empty(self, *, releases: bool = False) -> None:
        """Makes the sums zero: the open window is forgotten.

        Args:
            releases: Whether what they hold loses its memory before there are
                zeros. XLA must not compile that.
        """
        self._backend.empty(self._numbers)
        entries = [*self._with_totals, *self._with_undivided]
        after = [entry.variable for entry in entries]
        self._backend.empty(self._totals, after if releases else ())
        if self._backend.is_eager():
            self._forget_window()

    def release(self) -> None:
        """Frees the memory of the sums. `empty` takes it again."""
        self._backend.release(self._totals)
        self._forget_window()
        if not any(entry.is_compiled for entry in self._entries.values()):
            # Until the next fit, eager code may freeze some of them.
            for entry in self._entries.values():
                entry.is_used = False

    @property
    def _used(self) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.is_used]

    @property
    def _with_totals(self) -> list[_Entry]:
        entries = self._entries.values()
        return [entry for entry in entries if entry.total is not None]

    @property
    def _totals(self) -> list[Any]:
        """Those of the entries, in order, and then those of undivided parts."""
        return [
            *(entry.total for entry in self._with_totals),
            *(entry.undivided for entry in self._with_undivided),
        ]

    @property
    def _with_undivided(self) -> list[_Entry]:
        return [e for e in self._with_totals if e.undivided is not None]

    def _entry_of(self, variable: Any) -> _Entry:
        entry = self._entries.setdefault(id(variable), _Entry(variable))
        entry.is_used = True
        return entry

    def _forget_window(self) -> None:
        for entry in self._entries.values():
            entry.is_in_window = False

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

    def _add_undivided(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        undivided: Sequence[Any],
    ) -> list[Any]:
        """Adds parts of the gradients, and returns the rest of these."""
        backend = self._backend
        rest = list(gradients)
        for i, (part, variable) in enumerate(zip(undivided, variables)):
            if part is None or rest[i] is None:
                continue
            rest[i] = backend.difference(rest[i], part)
            entry = self._entry_of(variable)
            if entry.undivided is None:
                spec = _spec_of(part, variable)
                (entry.undivided,) = backend.new_sums([spec])
            part = backend.dense(part)
            backend.add_weighted([entry.undivided], [part], 1.0)
        return rest

    def _make_totals(self, pairs: Sequence[tuple[Any, _Entry]]) -> None:
        """For gradients that there are for the first time, in pairs."""
        new = [(g, entry) for g, entry in pairs if entry.total is None]
        specs = [_spec_of(gradient, entry.variable) for gradient, entry in new]
        for gradient, entry in new:
            entry.dtype = keras.backend.standardize_dtype(gradient.dtype)
        totals = self._backend.new_sums(specs) if specs else []
        for (_, entry), total in zip(new, totals):
            entry.total = total

    def _overwrite(self, pairs: Sequence[tuple[Any, _Entry]]) -> None:
        """Keeps the largest of "gradients" that are values, in pairs."""
        for gradient, entry in pairs:
            _check_replicas(entry.variable, self._backend.replicas())
            (largest,) = self._backend.values_of([entry.total])
            largest = ops.maximum(largest, gradient)
            self._backend.assign([entry.total], [largest])

    def _window_gradients(
        self, weight: Any, count: Any, totals: list[Any]
    ) -> list[Any]:
        total_of = dict(zip(self._with_totals, totals))
        undivided = zip(self._with_undivided, totals[len(total_of) :])
        used = self._used
        if self._is_divided:
            divided = [
                entry
                for entry in used
                if entry in total_of and not entry.is_overwritten
            ]
            means = self._backend.divided(
                [total_of[e] for e in divided], weight
            )
            total_of.update(zip(divided, means))
            for entry, part in undivided:
                total_of[entry] = total_of[entry] + part
        gradients = [
            total_of[entry] if entry.is_compiled or entry.is_in_window else None
            for entry in used
        ]
        return gradients

    def _rounded(self, gradients: list[Any]) -> list[Any]:
        """The gradients of the used, in the dtypes that they came in."""
        used = self._used
        gradients = [
            _overflown(g) if id(entry.variable) in self.halves else g
            for g, entry in zip(gradients, used)
        ]
        return [
            g if g is None else ops.cast(g, entry.dtype)
            for g, entry in zip(gradients, used)
        ]

    def _counted_once(
        self, gradients: list[Any], repetitions: Any
    ) -> list[Any]:
        """Takes out all but one of the terms that every micro-batch added.

        Returns:
            The gradients of what stays of these terms, or `None`s.
        """
        variables = [entry.variable for entry in self._used]
        once = self._gradients_of_terms(variables, gradients)
        for i, term in enumerate(once):
            if term is not None:
                if self.factor is not None:
                    once[i] = term = term * ops.cast(self.factor, term.dtype)
                gradients[i] -= ops.cast(repetitions, term.dtype) * term
        return once

    def _gradients_of_terms(
        self, variables: Sequence[Any], beside: Sequence[Any]
    ) -> list[Any]:
        """Those of the terms that count once, in the dtypes of others."""

        def loss() -> Any:
            return sum(ops.sum(term()) for term in self._once)

        found = self._backend.gradients_of(loss, variables)
        return [
            None if g is None or like is None else ops.cast(g, like.dtype)
            for g, like in zip(found, beside)
        ]

    def _measured_of(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        weight: Any,
        examples: Any,
        scale: Any,
        is_weighted: bool,
    ) -> list[Any]:
        """What a micro-batch adds to the last three numbers."""
        if examples is None:
            return [0.0, 0.0, 0.0]
        if weight is None and self._once:
            dense = [
                g if g is None else self._backend.dense(g) for g in gradients
            ]
            once = self._gradients_of_terms(variables, dense)
            gradients = _without(dense, once)
        examples = ops.cast(examples, "float32")
        counts = examples if weight is None else ops.cast(weight, "float32")
        is_counted = ops.cast(ops.greater(counts, OF_NOTHING), "float32")
        square = self._square_of(gradients, variables, scale)
        if weight is None:
            return [ops.divide_no_nan(square, examples), examples, is_counted]
        if is_weighted:
            return [square / counts, examples, is_counted]
        return [square * counts, examples, is_counted]

    def _measured(
        self,
        gradients: Sequence[Any],
        once: Sequence[Any],
        weight: Any,
        squares: Any,
        examples: Any,
        count: Any,
    ) -> Measured:
        """What the gradients of the window are, as if no loss was scaled."""
        variables = [entry.variable for entry in self._used]
        if self.factor is not None:
            squares = squares * ops.square(self.factor)
        square = self._square_of(gradients, variables, self.scale)
        if self._is_divided:
            return measured_of_means(square, squares, weight, examples, count)
        of_data = square
        if once:
            rest = _without(gradients, once)
            of_data = self._square_of(rest, variables, self.scale)
        return measured_of_sums(square, of_data, squares, examples, count)

    def _square_of(
        self, gradients: Sequence[Any], variables: Sequence[Any], scale: Any
    ) -> Any:
        """The squared norm of gradients, as if no loss was multiplied."""
        found = [
            gradient
            for gradient, variable in zip(gradients, variables)
            if gradient is not None
            and not getattr(variable, "overwrite_with_gradient", False)
        ]
        if scale is not None:
            # Before they are squared: a large scale would overflow.
            dense = [self._backend.dense(gradient) for gradient in found]
            share = 1.0 / ops.cast(scale, "float32")
            found = [ops.cast(each, "float32") * share for each in dense]
        assert self._norm_of is not None
        return self._norm_of(found)


def _without(gradients: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
    return [
        (
            gradient
            if part is None
            else ops.cast(gradient, "float32") - ops.cast(part, "float32")
        )
        for gradient, part in zip(gradients, parts)
    ]


def _overflown(gradient: Any) -> Any:
    """A gradient with infinities where one of float16 would have them."""
    if gradient is None:
        return None
    is_too_large = ops.greater_equal(ops.abs(gradient), 65520.0)
    return ops.where(is_too_large, float("inf"), gradient)


def _spec_of(gradient: Any, variable: Any) -> SumSpec:
    """The sum that a variable's gradients need."""
    dtype = keras.backend.standardize_dtype(gradient.dtype)
    is_half = dtype in ("float16", "bfloat16")
    return SumSpec(variable.shape, "float32" if is_half else dtype, variable)


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
