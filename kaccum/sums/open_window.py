"""All that the open window holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import keras
from keras import ops

from kaccum.backends import SumSpec, backend
from kaccum.sums.gradients import OF_NOTHING, GradientSums
from kaccum.sums.log_means import LogMean, LogNumber
from kaccum.sums.moments import LayerMoments, Moments
from kaccum.sums.noise import GradientAverages
from kaccum.sums.proportions import Proportions
from kaccum.sums.totals import chosen


class Sums:
    """What micro-batches add to, and an update takes out.

    For each call of the optimizer's `apply` in a step (mostly one):

    - the weight of its micro-batches, `()`, float32, and their number, `()`,
      int32;
    - for each variable that ever had a gradient, the sum of the weighted ones:
      of the variable's shape and the gradient's dtype, at least float32.

    For each number that a step gives a `Mean` metric, and that is not a mean
    over examples: total, weight, size, and the part that counts once, `()`
    each, of the metric's dtype.

    For each call of a `BatchNormalization` in a step: calls and elements, `()`,
    mean and variance, `(features,)`, of the statistics' dtype, at least
    float32.

    Where several losses divide by numbers of their own: those of the window's
    first micro-batch, and how far the proportions of others were from theirs,
    `()` each, float32.

    Where losses are weighed: the weight of the window's first micro-batch,
    `()`, float32.

    Under a `LossScaleOptimizer`: by how much the loss of a micro-batch is
    scaled down, `()`, float32.

    For the epoch: how many micro-batches were left out, `()`, int32. And, where
    gradients are measured, what updates were (`GradientAverages`).

    Each replica has its own, which an update adds up in one all-reduce.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that makes the updates.
        averages: Those of what updates measure, if they do.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        averages: GradientAverages | None = None,
    ) -> None:
        self._optimizer = optimizer
        #: What updates measured, or `None`.
        self.averages = averages
        #: By the order of the calls.
        self.gradients: list[GradientSums] = []
        # By metric, or layer, and call: a step may use one more than once.
        self._log_means: dict[tuple[int, int], LogMean] = {}
        self._moments: dict[tuple[int, int], Moments] = {}
        self._proportions: Proportions | None = None
        self._backend = backend()
        self._skipped = self._backend.new_sums([SumSpec((), "int32")])
        # Zero for not at all.
        self._parts = self._backend.new_sums([SumSpec((), "float32")])
        self._known_parts = 0.0
        # Zero until the window has one. Where nothing is traced that can be a
        # number of the host: it is `_first_weight`, which is `None` elsewhere.
        self._reference = self._backend.new_sums([SumSpec((), "float32")])
        self._first_weight: Any = None if self._backend.traces else 0.0

    def share_of(self, weight: Any, kept: Any = None) -> Any:
        """A weight, as a multiple of that of the window's first micro-batch.

        Those of one size have a share of 1: multiplied by it, losses and their
        gradients are what they were. `OF_NOTHING` stays what it is.

        Args:
            weight: Scalar.
            kept: `True`, or a scalar bool: whether the window keeps the
                micro-batch, if it is to be remembered.

        Returns:
            Scalar float32 tensor; a float where nothing is traced, and the
            weights were floats so far.
        """
        before = self._first_weight
        if before is None:
            (before,) = self._backend.values_of(self._reference)
        are_floats = isinstance(weight, float) and isinstance(before, float)
        if are_floats and (kept is None or kept is True):
            is_some = abs(weight) > OF_NOTHING
            first = weight if is_some and before == 0.0 else before
            share = weight / first if is_some else OF_NOTHING
        else:
            weight = ops.cast(weight, "float32")
            is_some = ops.greater(ops.abs(weight), OF_NOTHING)
            is_first = ops.logical_and(is_some, ops.equal(before, 0.0))
            first = ops.where(is_first, weight, before)
            share = ops.divide_no_nan(weight, first)
            share = ops.where(is_some, share, OF_NOTHING)
        if kept is not None:
            self._remember_first(*chosen(kept, [first], [before]))
        return share

    def _remember_first(self, weight: Any) -> None:
        if self._first_weight is None:
            self._backend.assign(self._reference, [weight])
        else:
            self._first_weight = weight

    def of_call(self, call: int, apply: Callable[..., Any]) -> GradientSums:
        """Those of a call of `apply` in a step, told apart by their order."""
        if call == len(self.gradients):
            square_of = self.averages.square_of if self.averages else None
            self.gradients.append(
                GradientSums(self._optimizer, apply, square_of=square_of)
            )
        return self.gradients[call]

    def log_mean(self, number: LogNumber, *, is_sum: bool) -> LogMean:
        """Those of a number that a step gives a `Mean`, as of `LogMean`."""
        key = (id(number.metric), number.call)
        if key not in self._log_means:
            self._log_means[key] = LogMean(number, is_sum)
        return self._log_means[key]

    def moments(self, moments: LayerMoments) -> Moments:
        """Those of a call of a `BatchNormalization` in a step."""
        key = (id(moments.layer), moments.call)
        if key not in self._moments:
            self._moments[key] = Moments(moments.layer)
        return self._moments[key]

    def proportions(self, count: int) -> Proportions:
        """Those of the denominators of so many losses."""
        if self._proportions is None:
            self._proportions = Proportions(count)
        return self._proportions

    @property
    def disproportion(self) -> float:
        """How far proportions were from those of their window, at most."""
        return 0.0 if self._proportions is None else self._proportions.largest

    @property
    def lasting(self) -> list[Any]:
        """What earlier windows told, and this one's end leaves."""
        return [
            *(self._proportions.kept if self._proportions else []),
            *(self.averages.sums if self.averages else []),
        ]

    @property
    def all(self) -> list[Any]:
        """Every sum there is."""
        return [
            *self._skipped,
            *self._parts,
            *self._reference,
            *self.lasting,
            *(total for member in self._members for total in member.sums),
            *(self._proportions.sums if self._proportions else []),
        ]

    @property
    def skipped(self) -> Any:
        """How many micro-batches were left out, a scalar int32."""
        return self._backend.values_of(self._skipped)[0]

    @property
    def parts_of_loss(self) -> Any:
        """By how much the loss of a micro-batch is scaled down, a scalar."""
        # From outside each replica is given its share.
        own = self._backend.values_of(self._parts)[0]
        return ops.maximum(own * self._backend.replicas(), 1.0)

    def set_parts_of_loss(self, count: int) -> None:
        """Says how many micro-batches a window is meant to have.

        A power of two near it changes no digit of a number.
        """
        parts = 2.0 ** round(math.log2(count))
        if parts != self._known_parts:
            self._known_parts = parts
            value = ops.convert_to_tensor(parts, "float32")
            self._backend.assign(self._parts, [value])

    def count_skipped(self, is_skipped: Any) -> None:
        """Counts a micro-batch that is left out where that is true."""
        self._backend.increase(self._skipped, [ops.cast(is_skipped, "int32")])

    def empty_skipped(self) -> None:
        """Counts what is left out from now on."""
        self._backend.empty(self._skipped)

    def is_empty(self) -> Any:
        """Whether the window holds no micro-batch: scalar bool."""
        return ops.equal(sum(each.count for each in self.gradients), 0)

    def close(
        self,
        *,
        releases: bool,
        scales: bool,
        scale: Any = None,
        halves: Collection[int] = (),
    ) -> bool:
        """Makes the update of the open window, on each replica.

        The sums are to be emptied next.

        Args:
            releases: As of `GradientSums.parts`.
            scales: Whether the losses were scaled down.
            scale: What the optimizer multiplies them by, or `None`.
            halves: The `id`s of variables whose gradient would have been of
                float16.

        Returns:
            Whether there is one: processes may find that none had a
            micro-batch.
        """
        for each in self.gradients:
            each.factor = self.parts_of_loss if scales else None
            each.scale = scale
            each.halves = halves
        groups = [each.parts(releases=releases) for each in self.gradients]
        groups += [each.parts() for each in [*self._others, *self._compared]]
        flat = [tensor for group in groups for tensor in group]
        parts = iter(self._backend.sum_over_replicas(flat))
        summed = [[next(parts) for _ in group] for group in groups]
        if self._backend.are_sums_aligned() and not sum(
            each.count_in(group) for each, group in zip(self.gradients, summed)
        ):
            return False
        measured: list[Any] = []
        for each, group in zip(self.gradients, summed):
            measured += filter(None, [each.close(group)])
        others = [*self._others, *self._compared]
        for other, group in zip(others, summed[len(self.gradients) :]):
            other.close(group)
        if self.averages is not None:
            self.averages.add(measured)
        return True

    def empty(self, *, releases: bool) -> None:
        """Makes all sums of the window zero. XLA must not compile that.

        Args:
            releases: As of `GradientSums.empty`.
        """
        for each in self.gradients:
            each.empty(releases=releases)
        for other in [*self._others, *filter(None, [self._proportions])]:
            other.empty()
        self._backend.empty(self._reference)
        if self._first_weight is not None:
            self._first_weight = 0.0

    def renew(self) -> None:
        """Makes zero what `empty` leaves, after an error: on JAX it is lost."""
        self._known_parts = 0.0
        self._backend.empty(self._parts)
        if self._proportions is not None:
            self._backend.empty(self._proportions.kept)

    def release(self) -> None:
        """Frees the memory of the gradients. `empty` takes it again."""
        for each in self.gradients:
            each.release()

    @property
    def _others(self) -> list[LogMean | Moments]:
        return [*self._log_means.values(), *self._moments.values()]

    @property
    def _members(self) -> list[GradientSums | LogMean | Moments]:
        return [*self.gradients, *self._others]

    @property
    def _compared(self) -> list[Proportions]:
        """What processes compare, beside what they add up."""
        if self._proportions is None or not self._backend.are_sums_aligned():
            return []
        return [self._proportions]
