"""What a model's training step becomes: its gradients go into sums.

Shadows the optimizer and listens to the losses while a step runs (or is
traced). Knows no framework, and not when a window closes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from kaccum import (
    assignments,
    means,
    second_optimizers,
    statistics,
    weights,
)
from kaccum.accumulator import GradientAccumulator, build_optimizer
from kaccum.backend import engine
from kaccum.keras_private import (
    compiled_loss,
    normalizations_of,
    variables_of,
)
from kaccum.patches import Patch, patched

SKIPPED = "skipped_micro_batches"


class _Run:
    """What one run (or trace) of a training step knows, on one replica."""

    def __init__(self, data: Any, may_be_left_out: bool) -> None:
        self.data = data
        self.trace = engine().trace()
        self.denominators: list[weights.Denominator] = []
        self.calls = 0
        self.is_scaled = False
        self.is_in_loss = False
        # How often each `Mean` metric was given a number.
        self.numbers: dict[int, int] = {}
        # How often each `BatchNormalization` was called, and the averages that
        # it is about to move.
        self.moments: dict[int, int] = {}
        self.still: set[int] = set()
        # If it may be left out: what waits for all gradients, and what to go
        # back to.
        self.may_be_left_out = may_be_left_out
        self.waiting: list[tuple[GradientAccumulator, Any, Any]] = []
        self.state = engine().MicroBatchState()


_running = threading.local()


class TrainingStep:
    """A model's training step whose optimizer adds to sums.

    Args:
        model: A compiled `keras.Model`.
        skip_nonfinite: Whether a micro-batch with a NaN or infinite gradient
            is left out.
    """

    def __init__(self, model: keras.Model, *, skip_nonfinite: bool) -> None:
        self.skips = skip_nonfinite
        self.accumulators: list[GradientAccumulator] = []
        #: Called with each variable that a step is about to assign.
        self.on_assignment: Callable[[Any], None] = lambda variable: None
        self._means = means.WindowMeans()
        self._statistics = statistics.WindowStatistics()
        self.model = model
        self._optimizer = model.optimizer
        self._engine = engine()
        self._train_step = self._engine.train_step_of(model)
        self._is_plain_step = type(model).train_step is keras.Model.train_step
        self._is_plain_loss = (
            type(model).compute_loss is keras.Model.compute_loss
        )
        self._real_apply = self._optimizer.apply
        self._real_apply_gradients = self._optimizer.apply_gradients
        self._real_stateless_apply = self._optimizer.stateless_apply
        self._real_scale_loss = self._optimizer.scale_loss
        self._hooks = self._make_hooks()
        self._skipped = self._engine.new_sum((), "int32")
        # Of them, those that the sum does not count.
        self._skipped_before = 0
        self._skipped_remembered = 0
        # Variables that steps assign.
        self._heard: set[int] = set()

    @property
    def skipped(self) -> int:
        """The number of micro-batches left out since `forget_skipped`."""
        return self._skipped_before + int(self._engine.value_of(self._skipped))

    def forget_skipped(self, but: int = 0) -> None:
        """Counts what is left out from `but` on."""
        self._engine.empty(self._skipped)
        self._skipped_before = but

    def remember_skipped(self) -> None:
        """Remembers how many were left out, for `restore_skipped`."""
        self._skipped_remembered = self.skipped if self.skips else 0

    def restore_skipped(self) -> None:
        """Forgets those that were left out since `remember_skipped`."""
        self.forget_skipped(but=self._skipped_remembered)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes the optimizer and the losses report to this step.

        Around a whole call, not inside the step: replicas are threads.
        """
        with contextlib.ExitStack() as stack:
            for context in (
                weights.hearing(),
                means.telling,
                statistics.telling,
                assignments.telling,
                second_optimizers.telling,
                patched(self._hooks),
            ):
                stack.enter_context(context)
            if not self.model.run_eagerly:
                stack.enter_context(self._engine.making_variables_outside())
            yield

    def start(self) -> None:
        """Makes ready for training: all sums are empty."""
        self.reset()
        self.forget_skipped()

    def run(self, data: Any) -> Any:
        """Runs the model's `train_step` on a micro-batch.

        Args:
            data: What the `train_step` gets.

        Returns:
            What the `train_step` returns.

        Raises:
            RuntimeError: If it applied no gradients.
        """
        # A replica without examples has done nothing.
        may_be_left_out = self.skips or self._engine.may_be_empty(data)
        run = _running.run = _Run(data, may_be_left_out)
        try:
            with contextlib.ExitStack() as stack:
                enter = stack.enter_context
                enter(weights.of_one_replica())
                told = functools.partial(self._on_assign, run)
                enter(assignments.heard_by(told))
                enter(means.heard_by(functools.partial(self._on_mean, run)))
                hear = functools.partial(self._on_moments, run)
                enter(statistics.heard_by(hear))
                enter(second_optimizers.refused_by(self._refuse_update))
                logs = self._train_step(data)
        finally:
            _running.run = None
        if run.calls == 0 and self.model.trainable_variables:
            raise RuntimeError(
                "The model's `train_step` must update its weights by "
                "`self.optimizer.apply_gradients` or `self.optimizer.apply`: "
                "there is nothing to accumulate. Received: a `train_step` of "
                f"{type(self.model).__name__} that called neither (inside a "
                "`tf.function` of its own they are not seen)."
            )
        return self._keep_or_skip(run, logs) if may_be_left_out else logs

    @property
    def version(self) -> tuple[int, ...]:
        """What `apply` depends on, if it is compiled."""
        sums = sum(a.number_of_sums for a in self.accumulators)
        return sums, len(self._means), len(self._statistics)

    def apply(self) -> None:
        """Makes the update of the open window, on each replica.

        The sums are to be emptied next.
        """
        releases = self._releases and not self.model.jit_compile
        groups = [a.take(releases=releases) for a in self.accumulators]
        groups += [self._means.parts, self._statistics.parts]
        flat = [tensor for group in groups for tensor in group]
        parts = iter(self._engine.sum_over_replicas(flat))
        *groups, means, moments = [
            [next(parts) for _ in group] for group in groups
        ]
        for accumulator, group in zip(self.accumulators, groups):
            accumulator.update(group)
        self._means.close(means)
        self._statistics.close(moments)

    def empty(self) -> None:
        """Empties the sums. XLA must not compile that."""
        for accumulator in self.accumulators:
            accumulator.reset(releases=self._releases)

    @property
    def _releases(self) -> bool:
        # Replicas copy their sums, for the all-reduce.
        return bool(self._engine.replicas() == 1)

    def is_empty(self) -> Any:
        """Whether every micro-batch of the window was left out: scalar bool."""
        return ops.equal(sum(a.count for a in self.accumulators), 0)

    def reset(self) -> None:
        """Forgets the open window."""
        self.empty()
        self._means.reset()
        self._statistics.reset()

    def release(self) -> None:
        """Frees the sums' memory."""
        for accumulator in self.accumulators:
            accumulator.release()

    def _make_hooks(self) -> list[Patch]:
        hooks = [
            Patch(self._optimizer, "apply", self._on_apply),
            Patch(self._optimizer, "apply_gradients", self._on_apply_gradients),
            Patch(self._optimizer, "stateless_apply", self._on_stateless_apply),
            Patch(self._optimizer, "scale_loss", self._on_scale_loss),
        ]
        loss = compiled_loss(self.model)
        if loss is not None:
            hooks.append(
                Patch(loss, "call", functools.partial(self._on_loss, loss.call))
            )
        return hooks

    def _on_assign(self, run: _Run, variable: Any, value: Any) -> Any:
        """Assigns, unless what the layer does is done once an update."""
        if id(variable) in run.still:
            run.still.remove(id(variable))
            return value
        if not variable.trainable and id(variable) not in self._heard:
            self._heard.add(id(variable))
            self._warn_about(variable)
        self.on_assignment(variable)
        if run.may_be_left_out:
            run.state.hear(variable)
        # Else what is counted by batches of a known size, as a metric may be,
        # would count the one that is not there: see `_on_apply`.
        with self._engine.after(run.data):
            return assignments.assign(variable, value)

    def _warn_about(self, variable: Any) -> None:
        for layer in normalizations_of(self.model):
            if variable is layer.moving_mean:
                statistics.warn_about(layer)

    def _on_moments(
        self, run: _Run, layer: Any, mean: Any, variance: Any, size: Any
    ) -> None:
        # A `tf.function` of the user's own is traced once, and outlives this.
        if not self._engine.is_traced_in(run.trace):
            return
        call = run.moments.get(id(layer), 0)
        run.moments[id(layer)] = call + 1
        self._statistics.update(
            layer,
            ops.stop_gradient(mean),
            ops.stop_gradient(variance),
            size,
            call=call,
        )
        run.still |= {id(layer.moving_mean), id(layer.moving_variance)}

    def _on_loss(
        self, real: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        run = getattr(_running, "run", None)
        if run is None:
            return real(*args, **kwargs)
        run.is_in_loss = True
        try:
            with weights.listen_to(run.denominators):
                return real(*args, **kwargs)
        finally:
            run.is_in_loss = False

    def _on_mean(self, run: _Run, metric: Any, value: Any, size: Any) -> Any:
        if not self._engine.is_traced_in(run.trace):
            return means.update_state(metric, value, size)
        call = run.numbers.get(id(metric), 0)
        run.numbers[id(metric)] = call + 1
        once: Any = 0.0
        if run.is_in_loss:
            # The loss of one of several outputs. Keras weights it by the number
            # of examples only where that is not traced (Keras 3.15).
            weight = self._weight(run, run.denominators[-1:])
            size = size if self._engine.knows_shapes() else None
        elif isinstance(metric, keras.metrics.MeanMetricWrapper):
            # What a metric function returned, a scalar of its own making.
            weight = weights.examples_in(run.data)
        else:
            weight = self._weight(run, run.denominators)
            if weight is None:
                # A metric's update does not know the model's variables.
                with self._engine.whole_state():
                    terms = [v.regularizer(v) for v in self._regularized]
                once = sum(ops.sum(term) for term in terms)
        if isinstance(weight, float) and _is_number(size, weight):
            # Keras's own mean over batches is that over all their examples.
            return means.update_state(metric, value, size)
        self._means.update(
            metric, value, size, call=call, weight=weight, once=once
        )
        return None

    def _refuse_update(self) -> None:
        raise RuntimeError(
            "The model's `train_step` must apply gradients by "
            "`self.optimizer` only, whose gradients are accumulated. Received: "
            f"a `train_step` of {type(self.model).__name__} that applied some "
            "by another optimizer."
        )

    def _on_scale_loss(self, loss: Any) -> Any:
        run = getattr(_running, "run", None)
        if run is not None:
            run.is_scaled = True
            if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
                # Until it is built it scales by a constant, which would be
                # compiled into the step (Keras 3.15).
                build_optimizer(
                    self._optimizer, self.model.trainable_variables
                )
        return self._real_scale_loss(loss)

    def _on_apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return self._accumulate(
            self._real_apply, list(grads), trainable_variables
        )

    def _on_apply_gradients(self, grads_and_vars: Any, **kwargs: Any) -> Any:
        def apply(gradients: Any, variables: Any) -> Any:
            pairs = list(zip(gradients, variables))
            return self._real_apply_gradients(pairs, **kwargs)

        gradients, variables = zip(*grads_and_vars)
        self._accumulate(apply, gradients, variables)
        return self._optimizer.iterations

    def _on_stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        """That of JAX's steps, which `LossScaleOptimizer` has its own of."""
        self._accumulate(self._apply_statelessly, list(grads), None)
        return trainable_variables, optimizer_variables

    def _apply_statelessly(self, gradients: Any, variables: Any) -> None:
        groups = (variables_of(self._optimizer), self._optimizer.variables)
        trainable, others = ([v.value for v in group] for group in groups)
        new = self._real_stateless_apply(others, gradients, trainable)
        for group, values in zip(groups, new):
            for variable, value in zip(group, values):
                variable.assign(value)

    def _accumulate(
        self, apply: Callable[..., Any], gradients: Any, variables: Any
    ) -> Any:
        run = getattr(_running, "run", None)
        if run is None:
            return apply(gradients, variables)
        if not gradients:
            # All weights are frozen: to Keras's optimizers that is nothing.
            return None
        if not self._engine.is_traced_in(run.trace):
            raise RuntimeError(
                "The model's `train_step` must apply gradients outside of a "
                "`tf.function` or `jax.jit` of its own: they are accumulated "
                "there, and what was traced would stay. Received: a "
                f"`train_step` of {type(self.model).__name__} that did not."
            )
        if variables is None:
            variables = variables_of(self._optimizer)
        # A step may apply gradients more than once, say for two groups of
        # variables: the calls are told apart by their order.
        if run.calls == len(self.accumulators):
            self.accumulators.append(
                GradientAccumulator(self._optimizer, apply=apply)
            )
        accumulator = self.accumulators[run.calls]
        run.calls += 1
        if run.may_be_left_out:
            run.waiting.append((accumulator, gradients, variables))
            return None
        # With a data set of unknown length, the call that finds it exhausted
        # still runs all that does not depend on the batch (TensorFlow 2.21):
        # it would count a micro-batch.
        with self._engine.after(run.data):
            self._add(run, accumulator, gradients, variables)
        return None

    def _add(
        self,
        run: _Run,
        accumulator: GradientAccumulator,
        gradients: Any,
        variables: Any,
        where: Any = None,
    ) -> None:
        weight = self._weight(run, run.denominators)
        accumulator.add(gradients, variables, weight, where=where)
        if weight is None:
            accumulator.count_once(self._regularizers(run))

    def _keep_or_skip(self, run: _Run, logs: Any) -> Any:
        """Adds the gradients, or undoes the step and leaves them out."""
        is_kept = ops.greater(weights.examples_in(run.data), 0.0)
        gradients = [g for _, gs, _ in run.waiting for g in gs]
        skips = self.skips and any(g is not None for g in gradients)
        if skips:
            is_finite = self._engine.all_finite(gradients)
            is_skipped = ops.logical_and(is_kept, ops.logical_not(is_finite))
            is_kept = ops.logical_and(is_kept, is_finite)
        # Before anything changes that is to stay.
        run.state.restore_unless(is_kept)
        if skips:
            self._engine.increase(self._skipped, ops.cast(is_skipped, "int32"))
        for accumulator, gradients, variables in run.waiting:
            self._add(run, accumulator, gradients, variables, is_kept)
        if not isinstance(logs, dict):
            return logs
        metrics = self.model.get_metrics_result()
        logs = metrics if metrics.keys() == logs.keys() else logs
        if not self.skips:
            return logs
        # Keras shows the mean over replicas.
        skipped = self._engine.value_of(self._skipped) * self._engine.replicas()
        return {**logs, SKIPPED: skipped}

    def _weight(self, run: _Run, denominators: list[Any]) -> Any:
        heard = [d for d in denominators if self._engine.is_reachable(d.value)]
        return weights.weight_of(
            heard,
            functools.partial(weights.examples_in, run.data),
            is_plain=self._is_plain_step and self._is_plain_loss,
        )

    def _regularizers(self, run: _Run) -> list[Callable[[], Any]]:
        scale = self._real_scale_loss if run.is_scaled else lambda loss: loss

        def term(variable: Any) -> Any:
            return scale(variable.regularizer(variable))

        return [functools.partial(term, v) for v in self._regularized]

    @property
    def _regularized(self) -> list[Any]:
        variables = self.model.trainable_variables
        return [v for v in variables if v.regularizer is not None]


def _is_number(size: Any, number: float) -> bool:
    return isinstance(size, (int, float)) and size == number
