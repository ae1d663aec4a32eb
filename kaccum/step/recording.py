"""What one micro-batch did, and what of that the open window keeps.

While a training step runs, or is traced, Keras is overheard in the places that
`hooks` lists. Each calls one of the functions `on_...` here, which appends to a
list. When the step is over, `commit` adds what was heard to the sums.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops

from kaccum import callers
from kaccum.step import weights
from kaccum.step.weights import Reduction
from kaccum.sums.gradients import build_optimizer, variables_of
from kaccum.sums.log_means import LogNumber
from kaccum.sums.moments import LayerMoments

if TYPE_CHECKING:
    from kaccum.step.training_step import TrainingStep

SKIPPED = "skipped_micro_batches"


class Applied(NamedTuple):
    """A call of the optimizer's `apply`, and what it was given."""

    apply: Callable[..., Any]
    gradients: Sequence[Any]
    variables: Sequence[Any]


_thread = threading.local()


def current() -> Recording | None:
    """That of the step which this thread runs, or traces."""
    return getattr(_thread, "recording", None)


def telling(
    heard: Callable[..., Any], also_inside: bool, original: Callable[..., Any]
) -> Callable[..., Any]:
    """What stands in for a function of Keras, as of a row of `hooks.HOOKS`."""

    def tell(*args: Any, **kwargs: Any) -> Any:
        recording = getattr(_thread, "recording", None)
        if recording is None or not (also_inside or recording.is_here):
            return original(*args, **kwargs)
        return heard(recording, original, *args, **kwargs)

    return tell


class Recording:
    """What is heard of one step on one replica.

    Args:
        step: The step.
        data: The micro-batch, as a `train_step` gets it.
        tell_assigned: Called with each variable that is about to be assigned.
    """

    def __init__(
        self,
        step: TrainingStep,
        data: Any,
        tell_assigned: Callable[[Any], None],
    ) -> None:
        self._step = step
        self._data = data
        self._tell_assigned = tell_assigned
        self._backend = step.backend
        self._trace = self._backend.trace()
        # A replica without examples has done nothing.
        self._may_be_left_out = step.skips or self._backend.may_be_empty(data)
        self.applied: list[Applied] = []
        self.reductions: list[Reduction] = []
        self.log_numbers: list[LogNumber] = []
        self.moments: list[LayerMoments] = []
        #: Variables that were assigned, and what they held before.
        self.assigned: dict[int, tuple[Any, Any]] = {}
        # The model's metrics, as the step was shown them, and who shows them.
        self._shown: dict[str, Any] = {}
        self._show: Callable[[], dict[str, Any]] = dict
        self._scale: Callable[[Any], Any] = lambda loss: loss
        self._is_in_loss = False
        self._depth = 0
        self._calls: collections.Counter[int] = collections.Counter()
        # Statistics that their layer is about to move.
        self._still: set[int] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context in which this is the `current` recording."""
        _thread.recording = self
        try:
            yield
        finally:
            _thread.recording = None

    @property
    def is_here(self) -> bool:
        """Whether what is called now is traced with the step, or run with it.

        What a user's own compiled function does is not: it is traced once, and
        outlives the step.
        """
        backend = self._backend
        return not backend.has_traces or bool(backend.trace() == self._trace)

    # What is left of it.

    def commit(self, logs: Any) -> Any:
        """Adds what was heard to the sums of the open window.

        Args:
            logs: What the step returned.

        Returns:
            The logs, those of the window so far.
        """
        sums = self._step.sums
        weight = self._weight(slice(None))
        kept = self._is_kept()
        if kept is not True:
            for variable, before in self.assigned.values():
                now = ops.convert_to_tensor(variable)
                variable.assign(ops.where(kept, now, before))
        once = self._regularizers if weight is None else []
        for call, each in enumerate(self.applied):
            sums.of_call(call, each.apply).add(
                each.gradients, each.variables, weight, kept=kept, once=once
            )
        for number in self.log_numbers:
            for variable in number.metric.variables:
                self._note_assigned(variable)
            of_number = self._weight(number.reductions)
            adds_up = of_number is None
            is_part = adds_up and number.has_regularizers
            once_of_number = self._counted_once() if is_part else 0.0
            log_mean = sums.log_mean(number, adds_up=adds_up)
            log_mean.add(number, of_number, once_of_number, kept)
        for moments in self.moments:
            sums.moments(moments).add(moments, kept)
        return self._logs(logs, kept)

    def _weight(self, of: slice) -> Any:
        return weights.weight_of(
            self.reductions[of], self._data, adds_up=self._step.adds_losses_up
        )

    def _is_kept(self) -> Any:
        """Whether the window keeps the micro-batch: `True`, or scalar bool."""
        if not self._may_be_left_out:
            return True
        has_examples = ops.greater(weights.examples_in(self._data), 0.0)
        gradients = [g for each in self.applied for g in each.gradients]
        if not self._step.skips or all(g is None for g in gradients):
            return has_examples
        is_finite = self._backend.all_finite(gradients)
        self._step.sums.count_skipped(
            ops.logical_and(has_examples, ops.logical_not(is_finite))
        )
        return ops.logical_and(has_examples, is_finite)

    @property
    def _regularizers(self) -> list[Callable[[], Any]]:
        """Functions that return the terms of the loss that have no data."""

        def term(variable: Any) -> Any:
            return self._scale(variable.regularizer(variable))

        regularized = self._step.regularized
        return [functools.partial(term, variable) for variable in regularized]

    def _counted_once(self) -> Any:
        terms = [v.regularizer(v) for v in self._step.regularized]
        return sum(ops.sum(term) for term in terms)

    def _logs(self, logs: Any, kept: Any) -> Any:
        if not isinstance(logs, dict):
            return logs
        if self.log_numbers or kept is not True:
            now, shown = self._show(), self._shown
            logs = {
                key: now[key] if key in shown and value is shown[key] else value
                for key, value in logs.items()
            }
        if not self._step.skips:
            return logs
        # Keras shows the mean over replicas.
        skipped = self._step.sums.skipped * self._backend.replicas()
        return {**logs, SKIPPED: skipped}

    # What is heard.

    def on_apply(
        self,
        original: Callable[..., Any],
        grads: Any,
        trainable_variables: Any = None,
    ) -> None:
        """The gradients of a step."""
        self._hear_gradients(original, list(grads), trainable_variables)

    def on_apply_gradients(
        self, original: Callable[..., Any], grads_and_vars: Any, **options: Any
    ) -> Any:
        """The same, by the older name."""

        def apply(gradients: Any, variables: Any) -> Any:
            return original(list(zip(gradients, variables)), **options)

        gradients, variables = zip(*grads_and_vars)
        self._hear_gradients(apply, gradients, variables)
        return self._step.optimizer.iterations

    def on_stateless_apply(
        self,
        original: Callable[..., Any],
        optimizer_variables: Any,
        grads: Any,
        trainable_variables: Any,
    ) -> Any:
        """The same in steps of JAX: `LossScaleOptimizer` has one of its own."""
        optimizer = self._step.optimizer

        def apply(gradients: Any, variables: Any) -> None:
            groups = (variables_of(optimizer), optimizer.variables)
            trainable, others = ([v.value for v in group] for group in groups)
            new = original(others, gradients, trainable)
            for group, values in zip(groups, new):
                for variable, value in zip(group, values):
                    variable.assign(value)

        self._hear_gradients(apply, list(grads), None)
        return trainable_variables, optimizer_variables

    def _hear_gradients(
        self, apply: Callable[..., Any], gradients: Any, variables: Any
    ) -> None:
        if not gradients:
            # All weights are frozen: to Keras's optimizers that is nothing.
            return
        if not self.is_here:
            raise RuntimeError(
                "The model's `train_step` must apply gradients outside of a "
                "`tf.function` or `jax.jit` of its own: they are accumulated "
                "there, and what was traced would stay. Received: a "
                f"`train_step` of {type(self._step.model).__name__} that did "
                "not."
            )
        if variables is None:
            variables = variables_of(self._step.optimizer)
        if not self._step.is_keras_step:
            gradients = self._backend.held(gradients)
        self.applied.append(Applied(apply, gradients, variables))

    def on_other_update(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> None:
        """An update by another optimizer."""
        raise RuntimeError(
            "The model's `train_step` must apply gradients by "
            "`self.optimizer` only, whose gradients are accumulated. Received: "
            f"a `train_step` of {type(self._step.model).__name__} that applied "
            "some by another optimizer."
        )

    def on_scale_loss(self, original: Callable[..., Any], loss: Any) -> Any:
        """The loss of a step."""
        self._scale = original
        optimizer = self._step.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            # Until it is built it scales by a constant, which would be
            # compiled into the step (Keras 3.15).
            build_optimizer(optimizer, self._step.model.trainable_variables)
        return original(loss)

    def on_compiled_loss(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        """The losses that `compile` was given."""
        heard = len(self.reductions)
        self._is_in_loss, self._depth = True, 0
        try:
            loss = original(*args, **options)
        finally:
            self._is_in_loss = False
        if len(self.reductions) == heard:
            self._step.check_heard()
        return loss

    def on_loss(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        """One of them, or one that it calls."""
        self._depth += 1
        try:
            return original(*args, **options)
        finally:
            self._depth -= 1

    def on_reduction(
        self,
        original: Callable[..., Any],
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        """How it becomes a number."""
        if self._is_in_loss and self._depth == 1:
            # Before Keras changes weights and masks in place (PyTorch, 3.15).
            self.reductions.append(
                weights.reduction_of(values, sample_weight, mask, reduction)
            )
        return original(values, sample_weight, mask, reduction, dtype)

    def on_scaling_for_replicas(
        self, original: Callable[..., Any], value: Any
    ) -> Any:
        """What Keras would divide, or multiply, by the number of replicas."""
        return value

    def on_mean(
        self,
        original: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """What a `Mean` is given."""
        size = sample_weight
        if any(len(getattr(v, "shape", ())) for v in (values, size)):
            return original(metric, values, size)
        call = self._calls[id(metric)]
        self._calls[id(metric)] += 1
        of = slice(None)
        has_regularizers = False
        if self._is_in_loss:
            # The loss of one of several outputs. Keras weights it by the number
            # of examples only where that is not traced (Keras 3.15).
            of = slice(len(self.reductions) - 1, len(self.reductions))
            size = size if self._backend.knows_shapes() else None
        elif isinstance(metric, keras.metrics.MeanMetricWrapper):
            # What a metric function returned, a scalar of its own making.
            of = slice(0)
        else:
            has_regularizers = True
        weight = self._weight(of)
        is_number = isinstance(size, (int, float))
        if isinstance(weight, float) and is_number and size == weight:
            # Keras's own mean over batches is that over all their examples.
            return original(metric, values, size)
        values = ops.stop_gradient(ops.convert_to_tensor(values))
        self.log_numbers.append(
            LogNumber(metric, call, values, size, of, has_regularizers)
        )
        return None

    def on_moments(
        self, original: Callable[..., Any], layer: Any, inputs: Any, mask: Any
    ) -> Any:
        """What a `BatchNormalization` normalises with."""
        mean, variance = original(layer, inputs, mask)
        if callers.is_keras_normalization():
            call = self._calls[id(layer)]
            self._calls[id(layer)] += 1
            self.moments.append(
                LayerMoments(
                    layer,
                    call,
                    ops.stop_gradient(mean),
                    ops.stop_gradient(variance),
                    _elements(layer, inputs, mask),
                )
            )
            self._still |= {id(layer.moving_mean), id(layer.moving_variance)}
        return mean, variance

    def on_assign(
        self, original: Callable[..., Any], variable: Any, value: Any
    ) -> Any:
        """What a step assigns, unless an update does that."""
        if id(variable) in self._still:
            self._still.remove(id(variable))
            return value
        self._note_assigned(variable)
        is_new = id(variable) not in self.assigned
        if self._may_be_left_out and is_new and self.is_here:
            before = self._backend.before(variable)
            if before is not None:
                self.assigned[id(variable)] = (variable, before)
        return original(variable, value)

    def _note_assigned(self, variable: Any) -> None:
        """Says so once: what steps assign, they assign again and again."""
        if id(variable) not in self._step.assigned:
            self._step.assigned[id(variable)] = variable
            self._step.warn_about(variable)
            self._tell_assigned(variable)

    def on_grad(
        self,
        original: Callable[..., Any],
        fun: Callable[..., Any],
        argnums: Any = 0,
        has_aux: bool = False,
        *,
        returns_value: bool = False,
        **options: Any,
    ) -> Callable[..., Any]:
        """A function whose gradient JAX takes: what it tells leaves it."""
        lists: list[list[Any]]
        lists = [self.reductions, self.log_numbers, self.moments]

        @functools.wraps(fun)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_here:
                derived = original(fun, argnums, has_aux, **options)
            else:
                derived = self._backend.differentiated(
                    fun,
                    lists,
                    self._traced_further,
                    argnums=argnums,
                    has_aux=has_aux,
                    returns_value=returns_value,
                    **options,
                )
            return derived(*args, **kwargs)

        return call

    def on_value_and_grad(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> Callable[..., Any]:
        """The same, where the value is wanted, too."""
        return self.on_grad(original, *args, returns_value=True, **options)

    @contextlib.contextmanager
    def _traced_further(self) -> Iterator[None]:
        """A context in which what is being traced counts as the step."""
        outer, self._trace = self._trace, self._backend.trace()
        try:
            yield
        finally:
            self._trace = outer

    def on_metrics(self, show: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The model's metrics, which a step asks for."""
        self._show, self._shown = show, show()
        return self._shown


def _elements(layer: Any, inputs: Any, mask: Any) -> Any:
    """How many elements the mean of a feature is of, a scalar."""
    shape = ops.shape(inputs)
    axis = layer.axis % len(shape)
    # A number, where the shape is known.
    size = math.prod(each for i, each in enumerate(shape) if i != axis)
    size = ops.cast(size, "float32")
    if mask is None:
        return size
    return size * ops.mean(ops.cast(mask, "float32"))
