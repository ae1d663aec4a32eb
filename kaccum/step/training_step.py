"""What a model's training step becomes, and the update that ends a window.

Knows no framework, and not when a window closes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from kaccum.backends import backend
from kaccum.checks import is_scaling_losses, scale_of_losses
from kaccum.patches import patched
from kaccum.step import hooks
from kaccum.step.differences import Differences, normalizations_of
from kaccum.step.kinds import MEAN, SUM, Kinds
from kaccum.step.recording import Recording
from kaccum.step.trial import Trials
from kaccum.step.weights import SUMS, Reduction
from kaccum.step.whole_batch import WholeBatch
from kaccum.sums.moments import warn_about
from kaccum.sums.noise import GradientAverages
from kaccum.sums.open_window import Sums


class Options(NamedTuple):
    """What a user asks of a model's training step.

    Args:
        skip_nonfinite: Whether a micro-batch with a NaN or infinite gradient
            is left out.
        weight: "sum", for a loss that is one; or a function of `(x, y,
            sample_weight)` that returns the denominator of a micro-batch's
            loss. With `None` it is heard.
        whole_batch_loss: Whether the loss is that of the whole window.
        log_gradients: Whether the log has norm and noise of gradients.
    """

    skip_nonfinite: bool = False
    weight: Any = None
    whole_batch_loss: bool = False
    log_gradients: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells apart two steps of a model."""
        is_function = callable(self.weight)
        weight = id(self.weight) if is_function else self.weight
        return self._replace(weight=weight)

    @property
    def are_of_keras(self) -> bool:
        """Whether Keras's own step does all that is asked of windows of one."""
        return not self.skip_nonfinite and not self.log_gradients


class TrainingStep:
    """A model's training step whose optimizer adds to sums.

    Args:
        model: A compiled `keras.Model`.
        options: What the user asks of it.
    """

    def __init__(self, model: keras.Model, options: Options) -> None:
        self.backend = backend()
        self.model = model
        self.optimizer = model.optimizer
        self.options = options
        #: Whether a window may leave micro-batches out.
        self.skips = options.skip_nonfinite
        step = getattr(model.train_step, "__func__", None)
        #: Whether the step is Keras's own.
        self.is_keras_step = step is keras.Model.train_step
        #: Whether nothing but Keras makes one loss of those of `compile`.
        self.adds_losses_up = self.is_keras_step and (
            type(model).compute_loss is keras.Model.compute_loss
        )
        #: What it does else than the large batch.
        self.differences = Differences(model)
        #: What kinds of numbers the losses are, and what tries them.
        self.kinds = Kinds(self.differences.tell)
        self.trials = Trials(self)
        #: Its passes, where the loss is that of the whole window.
        self.whole = WholeBatch(self) if options.whole_batch_loss else None
        #: Whether the optimizer scales losses.
        self.is_scaling = is_scaling_losses(self.optimizer)
        averages = None
        if options.log_gradients:
            averages = GradientAverages(
                leaves_overflow_out=self.is_scaling,
                is_xla=model.jit_compile and not model.run_eagerly,
            )
        self.sums = Sums(self.optimizer, averages)
        self._hooks = hooks.overhearing(self)
        self._whole_gradients = hooks.whole_gradients(self.optimizer)
        # Those that the sum does not count.
        self._skipped_earlier = 0
        #: Variables that steps assign, by their `id`.
        self.assigned: dict[int, Any] = {}
        #: Whether it scales the loss of a micro-batch as a part of its window.
        self.scales = False

    def expect(self, micro_batches: int) -> None:
        """Says how many micro-batches a window is meant to have."""
        if self.is_scaling and self.whole is None:
            self.sums.set_parts_of_loss(micro_batches)

    @property
    def is_sum(self) -> bool:
        """Whether the loss of a step is a sum, whatever its losses are."""
        return self.options.weight == "sum" or self.kinds.total == SUM

    @property
    def is_mixed(self) -> bool:
        """Whether sums beside means are kept apart: their gradients, too."""
        return self.adds_losses_up and self.kinds.are_mixed

    @property
    def weighs_losses(self) -> bool:
        """Whether a loss may be multiplied by its weight, not its gradients.

        A multiplication less for each weight. Not on replicas, which know only
        their own part of the window: a model may train on some later.
        """
        return self._can_weigh_losses and not self._has_replicas

    @functools.cached_property
    def _can_weigh_losses(self) -> bool:
        """Not where the weight would be rounded to half precision, where
        gradients are no derivatives (scales of float8), and where a user's code
        computes the loss."""
        if not self.adds_losses_up or self.is_scaling:
            return False
        # (On JAX.)
        of_loss = "compute_loss_and_updates"
        if getattr(type(self.model), of_loss, None) is not getattr(
            keras.Model, of_loss, None
        ):
            return False
        variables = self.model.trainable_variables
        dtypes = {
            *(each.dtype for each in variables),
            *(getattr(each, "dtype", None) for each in self._losses or []),
            *(
                getattr(layer, "compute_dtype", None)
                for layer in self.model._flatten_layers()
            ),
        }
        return dtypes.isdisjoint(("float16", "bfloat16")) and not any(
            getattr(each, "overwrite_with_gradient", False)
            for each in variables
        )

    def lend_sums(self) -> None:
        """Has the framework add gradients to the sums by itself, if it can."""
        if not self.skips and self.sums.averages is None:
            for each in self.sums.gradients:
                each.lend()

    def loss_weight(self, loss: Any, call: int) -> Any:
        """What Keras multiplies a loss of `compile` by.

        Args:
            loss: The loss.
            call: Tells apart several outputs that have it.
        """
        flat = self.model._compile_loss._flat_losses
        weights = [each.loss_weights for each in flat if each.loss is loss]
        weight = weights[call] if call < len(weights) else None
        return 1.0 if weight is None else weight

    def counted(self, reductions: Sequence[Reduction]) -> Sequence[Reduction]:
        """Those of the reductions that say what weight a micro-batch has."""
        if self.kinds.total != MEAN:
            return reductions
        # An own `compute_loss` has made a mean of them.
        return [each for each in reductions if each.kind not in SUMS]

    # A micro-batch.

    @contextlib.contextmanager
    def overheard(self) -> Iterator[None]:
        """Around whatever calls `run`, and not inside: replicas are threads."""
        with patched(self._hooks), contextlib.ExitStack() as stack:
            if not self.model.run_eagerly:
                stack.enter_context(self.backend.making_variables_outside())
            yield

    def run(
        self,
        data: Any,
        train_step: Callable[[Any], tuple[Any, dict[int, Any]]],
        tell_assigned: Callable[[Any], None],
        whole_state: Callable[
            [], contextlib.AbstractContextManager[Any]
        ] = contextlib.nullcontext,
    ) -> Any:
        """Runs a training step on a micro-batch, which is added to the sums.

        Args:
            data: What the model's `train_step` gets.
            train_step: Function of `data` that returns the logs, and what
                variables held that it assigned unheard.
            tell_assigned: Called with each variable that it is about to assign.
            whole_state: Makes a context that knows the value of every variable
                of the model, also inside of a scope of Keras's.

        Returns:
            The logs.

        Raises:
            RuntimeError: If it applied no gradients.
        """
        # With a data set of unknown length, the call that finds it exhausted
        # still runs all that does not depend on the batch (TensorFlow 2.21):
        # it would count a micro-batch.
        with self.backend.after(data):
            recording = Recording(self, data, tell_assigned, whole_state)
            with contextlib.ExitStack() as stack:
                stack.enter_context(recording.running())
                if self.is_mixed:
                    again = self.backend.differentiating_twice()
                    recording.second_gradients = stack.enter_context(again)
                logs, unheard = train_step(data)
            recording.before.update(unheard)
            self._check_applied(recording)
            self.differences.note_assigned(self.assigned, unheard)
            return recording.commit(logs)

    def instead_of(
        self, train_step: Callable[[Any], Any]
    ) -> contextlib.AbstractContextManager[None]:
        """A context in which `train_step` is that of the model."""
        return hooks.replacing_step(self.model, "train_step", train_step)

    @property
    def regularized(self) -> list[Any]:
        """The weights that have a regularizer."""
        variables = self.model.trainable_variables
        return [v for v in variables if v.regularizer is not None]

    def warn_about(self, variable: Any) -> None:
        """Says of an assigned variable if it was to wait for the update."""
        if variable.trainable:
            return
        for layer in normalizations_of(self.model):
            if variable is layer.moving_mean:
                warn_about(layer)

    def check_heard(self) -> None:
        """Checks that there was no reduction to hear of in the loss.

        Raises:
            RuntimeError: If Keras reduced one elsewhere.
        """
        own, losses = keras.losses.Loss.__call__, self._losses
        if losses is None or any(type(x).__call__ is own for x in losses):
            raise RuntimeError(
                "Losses must be reduced by Keras's `reduce_weighted_values`, "
                "where kaccum hears what they divide by, for a micro-batch to "
                "have its exact weight. Received: one that Keras "
                f"{keras.__version__} reduced elsewhere. Use a version of "
                "Keras that the documentation of kaccum names."
            )

    def check_means(self) -> None:
        """Checks that no loss is a sum where that cannot be heard.

        Raises:
            RuntimeError: If one is.
        """
        if any(loss.reduction == "sum" for loss in self._losses or []):
            raise RuntimeError(
                'A loss with `reduction="sum"` must be computed outside of '
                "a `tf.function`, `tf.cond` or `jax.jit` of the model's own, "
                "inside of which it is taken for a mean over examples. "
                f"Received: a {type(self.model).__name__} that computes it "
                "there."
            )

    @property
    def _losses(self) -> list[Any] | None:
        """Those of `compile`, as far as Keras tells.

        They have no public name (Keras 3.12 to 3.15).
        """
        flat = getattr(self.model._compile_loss, "_flat_losses", None)
        return None if flat is None else [each.loss for each in flat]

    # The open window.

    @property
    def version(self) -> int:
        """What `update` depends on, if it is compiled."""
        return len(self.sums.all)

    def update(self) -> bool:
        """Makes the update of the open window, on each replica.

        The sums are to be emptied next.

        Returns:
            As of `Sums.close`.
        """
        releases = self._releases and not self.model.jit_compile
        with patched(self._whole_gradients if self._has_replicas else []):
            return self.sums.close(
                releases=releases,
                scales=self.scales,
                scale=scale_of_losses(self.optimizer),
                halves=self._halves,
            )

    def empty(self) -> None:
        """Makes the sums of the window zero. XLA must not compile that."""
        self.sums.empty(releases=self._releases)

    @functools.cached_property
    def _halves(self) -> set[int]:
        """Of the weights that a `LossScaleOptimizer` is there for."""
        if not self.is_scaling:
            return set()
        return {
            id(variable)
            for layer in self.model._flatten_layers()
            if getattr(layer, "compute_dtype", None) == "float16"
            for variable in layer._trainable_variables
            # Else it is computed with in its own dtype (Keras 3.15).
            if variable._autocast
        }

    @property
    def _has_replicas(self) -> bool:
        return self.backend.replicas() > 1

    @property
    def _releases(self) -> bool:
        # Replicas copy their sums, for the all-reduce.
        return not self._has_replicas

    # The micro-batches that were left out.

    @property
    def skipped(self) -> int:
        """How many were since `count_skipped_from`."""
        return self._skipped_earlier + int(self.sums.skipped)

    def count_skipped_from(self, number: int) -> None:
        """Counts on from a number."""
        self.sums.empty_skipped()
        self._skipped_earlier = number

    def _check_applied(self, recording: Recording) -> None:
        if not recording.applied and self.model.trainable_variables:
            raise RuntimeError(
                "The model's `train_step` must update its weights by "
                "`self.optimizer.apply_gradients` or `self.optimizer.apply`: "
                "there is nothing to accumulate. Received: a `train_step` of "
                f"{type(self.model).__name__} that called neither (inside a "
                "`tf.function` of its own they are not seen)."
            )
        if self.kinds.awaits_terms and self.adds_losses_up:
            self.kinds.awaits_terms = False
            added = recording.calls["added"] - len(self.regularized)
            self.differences.tell_of_terms(added, len(self.kinds.added))
        if len(recording.applied) > 1:
            self.differences.tell_of_applies(
                [each.variables for each in recording.applied]
            )
