"""What one micro-batch did, and what of that the open window keeps."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from kaccum.checks import scale_of_losses
from kaccum.step import weights
from kaccum.step.weights import Reduction
from kaccum.sums.log_means import LogMean, LogNumber
from kaccum.sums.moments import LayerMoments
from kaccum.sums.totals import chosen

if TYPE_CHECKING:
    from kaccum.step.training_step import TrainingStep

SKIPPED = "skipped_micro_batches"


class Applied(NamedTuple):
    """A call of the optimizer's `apply`, and what it was given.

    Args:
        apply: The function that would have made an update.
        gradients: Tensors, or `None`s.
        variables: Theirs.
        reductions: Of which reductions their weight is: those before the call.
        undivided: The gradients of those losses that are sums, beside others
            that are means, or `None`.
    """

    apply: Callable[..., Any]
    gradients: Sequence[Any]
    variables: Sequence[Any]
    reductions: slice
    undivided: Sequence[Any] | None


class Recording:
    """What is heard of one step on one replica.

    `hearing` appends to its lists while the step runs, or is traced; `commit`
    adds them to the sums when it is over.

    Args:
        step: The step.
        data: The micro-batch, as a `train_step` gets it.
        tell_assigned: Called with each variable that is assigned for the first
            time.
        whole_state: Makes a context that knows the value of every variable of
            the model.
    """

    def __init__(
        self,
        step: TrainingStep,
        data: Any,
        tell_assigned: Callable[[Any], None],
        whole_state: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.step = step
        self.backend = step.backend
        self._data = data
        self._tell_assigned = tell_assigned
        self._whole_state = whole_state
        #: What is traced with the step, or runs with it. What a user's own
        #: compiled function does, does not: it is traced once, and outlives
        #: the step.
        self.trace = self.backend.trace()
        #: Whether it may be as if this micro-batch had never come. A replica
        #: without examples has done nothing.
        self.may_be_left_out = step.skips or self.backend.may_be_empty(data)
        self.applied: list[Applied] = []
        self.reductions: list[Reduction] = []
        #: Of losses that are sums, beside others that are means: their terms of
        #: the loss, and what computes a gradient of them, if it is wanted.
        self.undivided: list[Any] = []
        self.undivided_gradients: Sequence[Any] | None = None
        self.second_gradients: Any = None
        self.log_numbers: list[LogNumber] = []
        self.moments: list[LayerMoments] = []
        #: Variables that the step assigned, and what they held before.
        self.before: dict[int, tuple[Any, Any]] = {}
        #: The model's metrics as the step was shown them, and who shows them.
        self.shown: list[dict[str, Any]] = []
        self.show: Callable[[], dict[str, Any]] = dict
        #: How the step scales its loss.
        self.scale: Callable[[Any], Any] = lambda loss: loss
        #: Whether it multiplies its loss by its share of the window, if any,
        #: and so its gradients.
        self.weighs_loss = False
        # Where the step is now: in a function whose gradient JAX takes; in the
        # losses of `compile`, in so many calls of a loss, of which this is the
        # outermost; how often it called a metric or layer; what one of these is
        # about to assign, and an update assigns instead.
        self.is_in_gradient = False
        self.is_in_loss = False
        self.depth = 0
        self.loss: Any = None
        self.calls: collections.Counter[Any] = collections.Counter()
        self.still: set[int] = set()
        self._weight: Any = None
        # What sums held before their numbers were added.
        self._added: list[tuple[LogMean, list[Any]]] = []

    def running(self) -> AbstractContextManager[None]:
        """A context in which this is the recording of this thread."""
        return heard_by(self)

    @contextlib.contextmanager
    def traced_further(self) -> Iterator[None]:
        """A context in which what is being traced counts as the step."""
        outer = self.trace, self.is_in_gradient
        self.trace, self.is_in_gradient = self.backend.trace(), True
        try:
            yield
        finally:
            self.trace, self.is_in_gradient = outer

    def hears(self, handler: Callable[..., Any]) -> bool:
        """Whether it is to be told what a handler is called for: of all."""
        return True

    def drops(self, variable: Any) -> bool:
        """Whether the step assigns to a variable in vain."""
        return False

    def reduced(self, value: Any) -> None:
        """Is told what number a loss of `compile` is."""
        if self.step.is_mixed and self.reductions[-1].kind in weights.SUMS:
            call = self.calls[id(self.loss)]
            self.calls[id(self.loss)] += 1
            share = self.step.loss_weight(self.loss, call)
            self.undivided.append(share * ops.sum(value))

    @property
    def undivided_loss(self) -> Any:
        """The part of the loss that is a sum beside means: a scalar."""
        return sum(self.undivided, 0.0)

    def commit(self, logs: Any) -> Any:
        """Adds what was heard to the sums of the open window.

        A micro-batch that is left out has done nothing: what it assigned is
        undone, with the log numbers that were added while it ran; what was to
        be added now (gradients, the other log numbers, moments) counts as
        nothing; and what waits for the update (optimizer, moving statistics)
        was never assigned.

        Args:
            logs: What the step returned.

        Returns:
            The logs, those of the window so far.
        """
        sums = self.step.sums
        kept, is_skipped = self._decided()
        if is_skipped is not None:
            sums.count_skipped(is_skipped)
        # Before anything changes that is to stay.
        self._undo_unless(kept)
        for call, each in enumerate(self.applied):
            weight = self.weight(each.reductions)
            once = self._regularizers if weight is None else []
            share = weight
            if weight is not None and self.step.weighs_losses:
                share = sums.share_of(weight, kept)
            sums.of_call(call, each.apply).add(
                each.gradients,
                each.variables,
                share,
                is_weighted=self.weighs_loss,
                kept=kept,
                once=once,
                undivided=each.undivided,
                **(self._of_measuring if sums.averages else {}),
            )
        is_shown_late = bool(self.log_numbers)
        self.add_log_numbers(kept)
        for moments in self.moments:
            sums.moments(moments).add(moments, kept)
        denominators = weights.proportions(self.reductions, self._data)
        if denominators and self.step.options.weight is None:
            sums.proportions(len(denominators)).add(denominators, kept)
        return self._logs(logs, kept, is_shown_late)

    def add_log_numbers(self, kept: Any = True) -> None:
        """Adds the numbers for the log that were heard since the last call.

        That is at once, for the step may read a metric; but what is heard while
        JAX takes a gradient waits for the commit.
        """
        for number in self.log_numbers:
            weight = self.weight(number.reductions)
            is_sum = weight is None
            has_part = is_sum and number.has_regularizers
            part = self._counted_once() if has_part else 0.0
            log_mean = self.step.sums.log_mean(number, is_sum=is_sum)
            if self.may_be_left_out and kept is True:
                values = self.backend.values_of(log_mean.sums)
                self._added.append((log_mean, values))
            log_mean.add(number, weight, part, kept)
        self.log_numbers.clear()

    def weight(self, of: slice | None) -> Any:
        """That of the micro-batch, by some of its reductions.

        By `None` it is the number of examples.
        """
        if of is None:
            return weights.examples_in(self._data)
        if self.step.is_sum:
            return None
        if callable(self.step.options.weight):
            return self._said()
        return weights.weight_of(
            self.step.counted(self.reductions[of]),
            self._data,
            are_added_up=self.step.adds_losses_up,
            are_mixed=self.step.is_mixed,
        )

    def _said(self) -> Any:
        """What the user's function says: it is called once."""
        if self._weight is not None:
            return self._weight
        weight = weights.said(self.step.options.weight, self._data)
        if not self.is_in_gradient:
            # Else it would not leave the gradient that JAX takes.
            self._weight = weight
        return weight

    def _decided(self) -> tuple[Any, Any]:
        """Whether the window keeps the micro-batch, and counts it as skipped.

        Returns:
            `True` or a scalar bool; a scalar bool, or `None` for no.
        """
        if not self.may_be_left_out:
            return True, None
        has_examples = ops.greater(weights.examples_in(self._data), 0.0)
        gradients = [g for each in self.applied for g in each.gradients]
        if not self.step.skips or all(g is None for g in gradients):
            return has_examples, None
        is_finite = self.backend.all_finite(gradients)
        return (
            ops.logical_and(has_examples, is_finite),
            ops.logical_and(has_examples, ops.logical_not(is_finite)),
        )

    def _undo_unless(self, kept: Any) -> None:
        """Takes back what the step assigned, and what was added meanwhile."""
        if kept is True:
            return
        for variable, before in self.before.values():
            now = ops.convert_to_tensor(variable)
            variable.assign(ops.where(kept, now, before))
        for log_mean, old in reversed(self._added):
            new = self.backend.values_of(log_mean.sums)
            self.backend.assign(log_mean.sums, chosen(kept, new, old))

    @property
    def _of_measuring(self) -> dict[str, Any]:
        scale = scale_of_losses(self.step.optimizer)
        return {"examples": self.weight(None), "scale": scale}

    @property
    def _regularizers(self) -> list[Callable[[], Any]]:
        """Functions that return the terms of the loss that have no data."""

        # Not of `self`, which would outlive the step with all it holds.
        scale, share = self.scale, self.step.kinds.share

        def term(variable: Any) -> Any:
            return scale(share * variable.regularizer(variable))

        regularized = self.step.regularized
        return [functools.partial(term, variable) for variable in regularized]

    def _counted_once(self) -> Any:
        with self._whole_state():
            terms = [v.regularizer(v) for v in self.step.regularized]
            total = sum(ops.sum(term) for term in terms)
            return self.step.kinds.share * total

    def _logs(self, logs: Any, kept: Any, is_shown_late: bool) -> Any:
        sums = self.step.sums
        if not isinstance(logs, dict):
            return logs
        if is_shown_late or kept is not True:
            with self.running():
                now = self.show()
            logs = {
                key: now[key] if self._is_shown(key, value, now) else value
                for key, value in logs.items()
            }
        if self.step.skips:
            skipped = self.backend.shown(self.step.sums.skipped)
            logs = {**logs, SKIPPED: skipped}
        if sums.averages is not None:
            logs = {**logs, **sums.averages.shown()}
        return logs

    def _is_shown(self, key: str, value: Any, now: dict[str, Any]) -> bool:
        """Whether an entry of the step's logs is one of the model's metrics."""
        return key in now and any(value is s.get(key) for s in self.shown)

    def note_assigned(self, variable: Any) -> None:
        """Says what steps assign, for the first time only."""
        self.step.assigned[id(variable)] = variable
        self.step.warn_about(variable)
        self._tell_assigned(variable)


class _Thread(threading.local):
    """What a thread, which may be a replica, runs."""

    recording: Any = None


thread = _Thread()


@contextlib.contextmanager
def heard_by(recording: Any) -> Iterator[None]:
    """A context in which what this thread does is told to a recording."""
    thread.recording = recording
    try:
        yield
    finally:
        thread.recording = None
