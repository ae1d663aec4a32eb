"""What the layers return that a step calls: heard of parts, given for a whole.

Where a step calls a layer, or the model, that computes each example by itself.
What a step does with the outputs need not: it gets those of a whole batch,
which were computed in parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
from keras import ops

from kaccum.backends import backend
from kaccum.backends.arrays import masks_of, with_logits, with_masks
from kaccum.step import weights
from kaccum.step.hearing import (
    OF_CALLS,
    on_assign,
    on_metrics_of_processes,
)
from kaccum.step.recording import heard_by


class Call(NamedTuple):
    """What a layer returned that a step called.

    Args:
        outputs: Nested tensors.
        masks: Keras's masks of them, in a list, `None` for one without.
        logits: As of `Backend.logits_of`, in a list, too.
        terms: What the layer added to the loss, but for regularizers.
        examples: How many the step was given, a float or a float32 scalar.
    """

    outputs: Any
    masks: list[Any]
    logits: list[Any]
    terms: list[Any]
    examples: Any


class Outputs:
    """Is told of the layers that a step calls, not of those that they call.

    Stands for the `Recording` of a step.
    """

    def __init__(self) -> None:
        self.backend = backend()
        self.trace = self.backend.trace()
        # Whether a layer is called now.
        self.is_inside = False
        #: The arguments of each call.
        self.arguments: list[Any] = []

    def running(self) -> AbstractContextManager[None]:
        """A context in which this thread's calls are heard."""
        return heard_by(self)

    def hears(self, handler: Callable[..., Any]) -> bool:
        """Whether it is to be told what a handler is called for."""
        return not self.is_inside and handler in OF_CALLS

    def call(self, layer: keras.Layer, run: Callable[[], Any]) -> Any:
        """What a call of a layer returns.

        Args:
            layer: The layer.
            run: Calls it.
        """
        raise NotImplementedError

    def call_stateless(
        self, layer: keras.Layer, run: Callable[[], Any], state: Sequence[Any]
    ) -> Any:
        """The same for `stateless_call`.

        Args:
            layer: The layer.
            run: Calls it. Returns its losses, too.
            state: The values of its variables: trainable ones, and others.
        """
        raise NotImplementedError

    def _inside(self, run: Callable[[], Any]) -> Any:
        self.is_inside = True
        try:
            return run()
        finally:
            self.is_inside = False


class Alone(Outputs):
    """Is told of no layer: the metrics are those of this process, as else."""

    def hears(self, handler: Callable[..., Any]) -> bool:
        return handler is on_metrics_of_processes


class Heard(Outputs):
    """Hears what layers return. Else the step is to leave nothing behind.

    Args:
        data: What the step gets.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._examples = weights.examples_in(data)

    def call(self, layer: keras.Layer, run: Callable[[], Any]) -> Any:
        outputs = self._inside(run)
        self._note(outputs, added_by(layer, layer.losses))
        return outputs

    def call_stateless(
        self, layer: keras.Layer, run: Callable[[], Any], state: Sequence[Any]
    ) -> Any:
        outputs, others, losses = self._inside(run)
        self._note(outputs, added_by(layer, losses))
        return outputs, others, losses

    def hears(self, handler: Callable[..., Any]) -> bool:
        is_assigned = handler is on_assign and not self.is_inside
        return is_assigned or super().hears(handler)

    def drops(self, variable: Any) -> bool:
        """What the step assigns itself, and no layer, is dropped."""
        return True

    def _note(self, outputs: Any, terms: list[Any]) -> None:
        self.calls.append(call_of(outputs, terms, self._examples))


class Given(Outputs):
    """Gives what layers returned for the parts of a batch, as for all of it.

    Args:
        parts: For each part what was heard, `None` for a call that is to run.
        is_sum: Function of a layer and the place of a term that it adds to the
            loss: whether that is a sum over examples, no mean.
        join: Function of the parts of a batch that returns it.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Call | None]],
        is_sum: Callable[[keras.Layer, int], bool],
        join: Callable[[Sequence[Any]], Any],
    ) -> None:
        super().__init__()
        self._join = join
        self._calls = iter(list(zip(*parts)))
        self._is_sum = is_sum

    def call(self, layer: keras.Layer, run: Callable[[], Any]) -> Any:
        parts = next(self._calls, ())
        if None in parts or not parts:
            return self._inside(run)
        have_added(layer, self._terms(layer, parts))
        return self._outputs(parts)

    def call_stateless(
        self, layer: keras.Layer, run: Callable[[], Any], state: Sequence[Any]
    ) -> Any:
        parts = next(self._calls, ())
        if None in parts or not parts:
            return self._inside(run)
        trainable, others = state
        values = zip(layer.trainable_variables, trainable)
        with keras.StatelessScope(list(values)):
            once = [
                variable.regularizer(ops.convert_to_tensor(variable))
                for variable in _regularized(layer)
            ]
        return self._outputs(parts), others, self._terms(layer, parts) + once

    def _outputs(self, parts: Sequence[Call]) -> Any:
        masks = self._join([part.masks for part in parts])
        outputs = self._join([part.outputs for part in parts])
        logits = self._join([part.logits for part in parts])
        return with_logits(with_masks(outputs, masks), logits)

    def _terms(self, layer: keras.Layer, parts: Sequence[Call]) -> list[Any]:
        is_sum = functools.partial(self._is_sum, layer)
        return joined_terms(parts, is_sum, self._join)


def call_of(outputs: Any, terms: list[Any], examples: Any) -> Call:
    """A call that returned `outputs`."""
    logits = [backend().logits_of(leaf) for leaf in keras.tree.flatten(outputs)]
    return Call(outputs, masks_of(outputs), logits, terms, examples)


def added_by(layer: keras.Layer, losses: list[Any]) -> list[Any]:
    """The terms that a layer added to the loss, but for regularizers.

    Args:
        layer: The layer.
        losses: Its `losses`.
    """
    return losses[: len(losses) - len(_regularized(layer))]


def have_added(layer: keras.Layer, terms: list[Any]) -> None:
    """Makes a layer have added these terms, and no others."""
    layer._clear_losses()
    for term in terms:
        # A functional model refuses to be told by its own (Keras 3.15).
        keras.layers.Layer.add_loss(layer, term)


def joined_terms(
    parts: Sequence[Call],
    is_sum: Callable[[int], bool],
    join: Callable[[Sequence[Any]], Any],
) -> list[Any]:
    """The terms that a layer would have added for all parts together.

    Args:
        parts: Its calls.
        is_sum: Function of the place of a term: whether it is a sum over
            examples, no mean.
        join: Function of the parts of a batch that returns it.
    """
    sizes = [ops.cast(part.examples, "float32") for part in parts]

    def joined(place: int, values: Sequence[Any]) -> Any:
        if len(values[0].shape) > 0:
            # Keras sums its elements.
            return join(values)
        # A replica may have no examples in a part.
        values = [
            ops.where(ops.greater(size, 0), value, ops.zeros_like(value))
            for value, size in zip(values, sizes)
        ]
        if is_sum(place):
            return sum(values)
        total = sum(
            ops.cast(value, "float32") * size
            for value, size in zip(values, sizes)
        )
        return ops.cast(total / sum(sizes), values[0].dtype)

    rows = zip(*(part.terms for part in parts))
    return [joined(place, values) for place, values in enumerate(rows)]


def _regularized(layer: keras.Layer) -> list[Any]:
    weights = layer.trainable_weights
    return [weight for weight in weights if weight.regularizer is not None]
