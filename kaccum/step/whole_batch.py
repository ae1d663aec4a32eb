"""The three passes of a window whose loss is that of the whole batch.

1. *Hear*: the outputs of each micro-batch, with nothing kept for a gradient.
2. *Finish*: the loss of all of them together, its gradient with respect to the
   outputs, and the log.
3. *Push*: each micro-batch forward again, and backward from its part of that
   gradient, into the sums.

In metric learning this is known as gradient caching (Gao et al. 2021,
arXiv:2101.06983). Knows no framework.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kaccum.backends.arrays import with_logits, with_masks
from kaccum.step import weights
from kaccum.step.hearing import on_assign, on_moments, stateless_apply
from kaccum.step.kinds import SUM
from kaccum.step.outputs import (
    Call,
    added_by,
    call_of,
    have_added,
    joined_terms,
)
from kaccum.step.recording import Recording
from kaccum.sums.gradients import GradientSums, build_optimizer

if TYPE_CHECKING:
    from kaccum.step.training_step import TrainingStep

Tell = Callable[[Any], None]


class _Pass(Recording):
    """What is heard of a forward pass: what it assigns, and moments."""

    def hears(self, handler: Callable[..., Any]) -> bool:
        return handler in (on_assign, on_moments)


class _Finish(Recording):
    """What is heard of the loss: what it assigns, once a window."""

    def hears(self, handler: Callable[..., Any]) -> bool:
        return handler is on_assign

    def note_assigned(self, variable: Any) -> None:
        self.step.assigned[id(variable)] = variable
        self._tell_assigned(variable)


class _Push(_Pass):
    """What is heard of the second forward pass, which moves no metric."""

    def drops(self, variable: Any) -> bool:
        metrics = self.step.model.metrics_variables
        return any(variable is metric for metric in metrics)


class WholeBatch:
    """The passes of a model's training step.

    Args:
        step: The step.
    """

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._model = step.model
        self._backend = step.backend
        # What layers assign: once a micro-batch.
        self._moved: dict[int, Any] = {}

    def hear(self, data: Any, tell_assigned: Tell) -> Call:
        """Computes the outputs of a micro-batch.

        Averages of `BatchNormalization` wait for the update.

        Args:
            data: The micro-batch, as a `train_step` gets it.
            tell_assigned: As of `TrainingStep.run`.
        """
        before = set(self._step.assigned)
        heard = self._pass(_Pass, data, tell_assigned)
        with heard.running():
            call = self._call(data)
        for moments in heard.moments:
            self._step.sums.moments(moments).add(moments, True)
        self._moved.update(
            (key, variable)
            for key, variable in self._step.assigned.items()
            if key not in before
        )
        self._step.differences.note_assigned(self._moved, {})
        return call

    def finish(
        self, window: tuple[list[Any], list[Call]], tell_assigned: Tell
    ) -> tuple[Any, list[Any]]:
        """Computes the loss of a window.

        Args:
            window: Its micro-batches, or the batch that was cut, in a list; and
                what was heard of its micro-batches.
            tell_assigned: As of `TrainingStep.run`.

        Returns:
            The logs; and for each micro-batch the gradient of the loss with
            respect to its outputs, and to the terms that layers added, in a
            list, `None` where there is none.
        """
        model, optimizer = self._model, self._step.optimizer
        batches, calls = window
        join = self._backend.joined
        data = join(batches)
        masks = join([call.masks for call in calls])
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        build_optimizer(optimizer, model.trainable_variables)
        leaves = [_floats_of(call) for call in calls]
        flat = [leaf for each in leaves for leaf in each]

        def scaled_loss(tensors: Sequence[Any]) -> tuple[Any, Any]:
            left = iter(tensors)
            given = [_with_floats(call, left) for call in calls]
            y_pred = with_masks(join([call.outputs for call in given]), masks)
            y_pred = with_logits(y_pred, join([call.logits for call in given]))
            have_added(model, joined_terms(given, self._is_sum, join))
            loss = model._compute_loss(
                x, y, y_pred, sample_weight, training=True
            )
            return optimizer.scale_loss(loss), (loss, y_pred)

        with self._pass(_Finish, data, tell_assigned).running():
            (loss, y_pred), of_weights, of_outputs = (
                self._backend.gradients_through(
                    scaled_loss, model.trainable_variables, flat
                )
            )
            if self._backend.is_stateless:
                # Keras's metrics see no masks, which do not leave the gradient
                # (3.15). Outputs of a single micro-batch still have theirs.
                masks = [None] * len(masks)
            y_pred = with_masks(y_pred, masks)
            first = next(t for t in keras.tree.flatten(x) if t is not None)
            model._loss_tracker.update_state(
                loss, sample_weight=ops.shape(first)[0]
            )
            logs = model.compute_metrics(x, y, y_pred, sample_weight)
        self._add(of_weights)
        found = iter(of_outputs)
        return logs, [[next(found) for _ in each] for each in leaves]

    def push(
        self, pushed: tuple[Any, list[Any], Call], tell_assigned: Tell
    ) -> Any:
        """Adds the gradients of a micro-batch to the sums.

        Args:
            pushed: The micro-batch; what `finish` returned for it; and what was
                heard of it.
            tell_assigned: As of `TrainingStep.run`.

        Returns:
            How far its outputs were from those that were heard, a scalar: a
            part of their size.
        """
        data, gradients, call = pushed
        heard = self._pass(_Push, data, tell_assigned)

        def product(_: Sequence[Any]) -> tuple[Any, Any]:
            with heard.traced_further():
                leaves = _floats_of(self._call(data))
            pairs = [
                (leaf, gradient)
                for leaf, gradient in zip(leaves, gradients)
                if gradient is not None
            ]
            terms = [
                ops.sum(_float(leaf) * ops.stop_gradient(_float(gradient)))
                for leaf, gradient in pairs
            ]
            again = [ops.stop_gradient(_float(leaf)) for leaf in leaves]
            return sum(terms, ops.zeros(())), again

        with heard.running():
            again, of_weights, _ = self._backend.gradients_through(
                product, self._model.trainable_variables, []
            )
        self._add(of_weights)
        off = size = ops.zeros(())
        for one, other in zip(again, _floats_of(call)):
            other = _float(other)
            off = off + ops.cast(ops.sum(ops.abs(one - other)), "float32")
            size = size + ops.cast(ops.sum(ops.abs(other)), "float32")
        return off / (size + 1e-30)

    def _pass(
        self, kind: type[Recording], data: Any, tell_assigned: Tell
    ) -> Recording:
        return kind(self._step, data, tell_assigned, contextlib.nullcontext)

    def _call(self, data: Any) -> Call:
        model = self._model
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        options = {"training": True} if model._call_has_training_arg else {}
        outputs = model(x, **options)
        return call_of(
            outputs, added_by(model, model.losses), weights.examples_in(data)
        )

    def _add(self, gradients: Sequence[Any]) -> None:
        # Of one loss: they add up as they are.
        self._sums.add(gradients, self._model.trainable_variables, None)

    @property
    def _sums(self) -> GradientSums:
        optimizer = self._step.optimizer
        apply = optimizer.apply
        if self._backend.is_stateless:
            apply = functools.partial(
                stateless_apply, optimizer, optimizer.stateless_apply
            )
        return self._step.sums.of_call(0, apply)

    def _is_sum(self, place: int) -> bool:
        return self._step.kinds.of_added(place) == SUM


def _floats_of(call: Call) -> list[Any]:
    """What of a call can have a gradient."""
    return [leaf for leaf in _leaves_of(call) if _is_float(leaf)]


def _with_floats(call: Call, floats: Any) -> Call:
    """The call, with the next of these instead of what `_floats_of` returns."""

    def instead(leaf: Any) -> Any:
        return next(floats) if _is_float(leaf) else leaf

    return call._replace(
        outputs=keras.tree.map_structure(instead, call.outputs),
        logits=[instead(each) for each in call.logits],
        terms=[instead(term) for term in call.terms],
    )


def _leaves_of(call: Call) -> list[Any]:
    return [*keras.tree.flatten(call.outputs), *call.logits, *call.terms]


def _is_float(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return False
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype))


def _float(tensor: Any) -> Any:
    # Half precision would overflow in a sum that nobody reads.
    if keras.backend.standardize_dtype(tensor.dtype) == "float64":
        return tensor
    return ops.cast(tensor, "float32")
