"""What kind of number a loss is: a mean, a sum, or neither. It is measured.

A loss that returns one number hides what it divides by. The loss of a
micro-batch is compared with those of its parts: those of a mean average, and
those of a sum add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MEAN, SUM, NEITHER = "mean", "sum", "neither"

#: A difference that rounding explains in float32, and one that it does not, as
#: parts of the largest number that is compared. The second one is larger where
#: the model ran on each part: terms that cancel have larger errors.
ROUNDING, CERTAIN, CERTAIN_OF_MODEL = 1e-5, 5e-5, 1e-2
#: How much nearer one kind must be to be taken for it all the same.
NEARER = 20.0


class Numbers(NamedTuple):
    """What a loss is on a micro-batch, and on parts of it: scalars.

    Args:
        values: Of the whole, of the whole again, and of its parts, two by two,
            which are the whole.
        weights: Its denominators, in the same order: the numbers of examples
            where it hides them, and `None`s where it is a sum.
        twice: Of a batch that has all examples twice; `None` for a loss that
            has no terms without data.
        unit: How precise the values are: that of the dtype.
        certain: As of `CERTAIN`.
    """

    values: list[Any]
    weights: list[Any]
    twice: Any = None
    unit: float = 2.0**-23
    certain: float = CERTAIN

    @property
    def constant(self) -> float:
        """Of a sum, the terms without data: a batch has them once."""
        if self.twice is None:
            return 0.0
        return float(2.0 * self.values[0] - self.twice)


class Measured(NamedTuple):
    """The numbers of all losses of a model.

    Args:
        losses: Those of each loss of `compile`.
        added: Those of each term that layers add, `None` for one that is no
            scalar.
        total: Those of an own `compute_loss`, or `None`.
        terms: The terms of the loss that have no data, as Keras has them.
    """

    losses: list[Numbers]
    added: list[Numbers | None]
    total: Numbers | None = None
    terms: Any = 0.0


class Kinds:
    """The kinds of the losses of a model. Unknown ones are taken for means.

    Args:
        tell: As of `Differences.tell`.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell = tell
        #: Of an own `compute_loss`.
        self.total: str | None = None
        #: What that makes of the terms that have no data: so many times them.
        self.share = 1.0
        #: Of the terms that layers add, in order; `None` if that is not known.
        self.added: list[str | None] = []
        #: Whether it is to be seen that a step has as many terms.
        self.awaits_terms = False
        #: Whether some are means and others sums.
        self.are_mixed = False
        #: What kept them from being measured, an error's name and message.
        self.obstacle: str | None = None
        self._of: dict[int, str] = {}
        # Losses that are neither, before a step uses them, and their numbers.
        self._warnings: dict[int, str] = {}
        self._used: set[int] = set()

    def of(self, loss: Any) -> str | None:
        """That of a loss of `compile`, which a step uses."""
        self._used.add(id(loss))
        self._warn(id(loss))
        return self._of.get(id(loss))

    def tell_of_sum(self, loss: Any) -> None:
        """Says of a sum in a `train_step` of the user's own what it counts."""
        self._tell(
            f"sum {id(loss)}",
            "What a `train_step` of the model's own makes of a loss that is a "
            "sum is not heard: it is taken for a mean over examples. Received: "
            f"{loss.name!r}. If the step takes the gradient of the sum pass "
            '`weight="sum"`, else a function that computes what it divides by.',
        )

    def tell_of_hidden(self, loss: Any) -> None:
        """Says of a loss that returns one number if it was not measured."""
        if self.obstacle is None:
            return
        self._tell(
            "hidden",
            "A loss that returns one number hides whether it is a mean or a "
            "sum, and is taken for a mean over examples where it cannot be "
            f"tried on parts of a micro-batch. Received: {loss.name!r}, and "
            f"this obstacle: {self.obstacle.splitlines()[0]} Pass `weight`.",
        )

    def of_added(self, call: int) -> str | None:
        """That of a term that layers added, by their order."""
        return self.added[call] if call < len(self.added) else None

    def learn(
        self, losses: Sequence[Any], measured: Measured, *, warns: bool
    ) -> bool:
        """Decides what each loss is.

        Args:
            losses: The losses of `compile`.
            measured: Their numbers.
            warns: Whether to say which are neither.

        Returns:
            Whether the numbers tell.
        """
        known = []
        for loss, numbers in zip(losses, measured.losses):
            kind = kind_of(numbers)
            known.append(kind is not None)
            taken = self._of.setdefault(id(loss), _taken_for(kind, numbers))
            if warns and kind not in (None, taken):
                self._warnings[id(loss)] = _message(f"{loss.name!r}", numbers)
                if id(loss) in self._used:
                    self._warn(id(loss))
        known += self._learn_added(measured.added, warns)
        self.awaits_terms = measured.total is None
        total = measured.total
        if total is not None:
            kind = kind_of(total)
            known.append(kind is not None)
            if self.total is None and kind in (MEAN, SUM):
                self.total = kind
                self.share = _share(total, measured.terms)
            if warns and kind not in (None, self.total):
                self.total = self.total or NEITHER
                self._tell("total", _message("`compute_loss`", total))
        kinds = {*self._of.values(), *self.added} - {None}
        self.are_mixed = SUM in kinds and len(kinds) > 1
        return all(known)

    def _learn_added(
        self, terms: Sequence[Numbers | None], warns: bool
    ) -> list[bool]:
        # One number an example is summed by Keras.
        kinds = [SUM if term is None else kind_of(term) for term in terms]
        if not self.added:
            self.added = [
                kind if term is None else _taken_for(kind, term)
                for kind, term in zip(kinds, terms)
            ]
        for kind, term, taken in zip(kinds, terms, self.added):
            if warns and term is not None and kind not in (None, taken):
                what = "a term of `add_loss`"
                self._tell("term", _message(what, term, is_term=True))
        return [kind is not None for kind in kinds]

    def _warn(self, key: int) -> None:
        message = self._warnings.pop(key, None)
        if message is not None:
            self._tell(f"neither {key}", message)


def kind_of(numbers: Numbers) -> str | None:
    """Whether a loss is a mean, a sum, or neither.

    Returns:
        `None` where its values do not tell: it is random, or zero.
    """
    values = numbers.values
    # Of a part without pairs, say, some losses are 0 / 0.
    largest = max((abs(v) for v in values if np.isfinite(v)), default=0.0)
    coarse = max(1.0, numbers.unit / 2.0**-23 / 10.0)
    rounding, certain = ROUNDING * largest * coarse, numbers.certain * largest
    is_random = abs(values[0] - values[1]) > rounding
    if not np.isfinite(values[0]) or largest == 0.0 or is_random:
        return None
    from_mean, from_sum = _distances(numbers)
    if from_mean <= rounding:
        return None if from_sum <= rounding else MEAN
    if from_sum <= rounding:
        return SUM
    near, far = sorted((from_mean, from_sum))
    if near > max(certain, 5.0 * rounding):
        return NEITHER
    if near * NEARER < far:
        return MEAN if near == from_mean else SUM
    return None


def _distances(numbers: Numbers) -> tuple[float, float]:
    """How far it is from a mean, and from a sum, of its parts.

    Of those that are finite: infinitely far, where none are.
    """
    whole, _, *parts = numbers.values
    pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    finite = [i for i, pair in enumerate(pairs) if np.all(np.isfinite(pair))]
    from_mean = from_sum = 0.0 if finite else np.inf
    for i in finite:
        pair, of_pair = pairs[i], numbers.weights[2 * i + 2 : 2 * i + 4]
        from_sum = max(from_sum, abs(sum(pair) - numbers.constant - whole))
        mean = np.inf
        if None not in of_pair:
            mean = np.average(pair, weights=of_pair)
        from_mean = max(from_mean, abs(mean - whole))
    return from_mean, from_sum


def _taken_for(kind: str | None, numbers: Numbers) -> str:
    """What a loss is added up as."""
    if kind in (MEAN, SUM):
        return kind
    if kind == NEITHER:
        from_mean, from_sum = _distances(numbers)
        if from_sum * NEARER < from_mean < np.inf:
            return SUM
    return SUM if None in numbers.weights else MEAN


def _share(total: Numbers, terms: float) -> float:
    """How much of the terms that have no data is in an own loss."""
    share = total.constant / terms if terms else 1.0
    # It is a difference of rounded numbers.
    return round(share) if abs(share - round(share)) < 1e-3 else share


def _message(what: str, numbers: Numbers, *, is_term: bool = False) -> str:
    cure = "With `whole_batch_loss=True` it is; or"
    if is_term:
        cure = "Compute it in `compute_loss`, with `whole_batch_loss=True`; or"
    whole, _, first, second, *_ = numbers.values
    return (
        "A loss must be a mean or a sum over examples for micro-batches to be "
        f"exactly their large batch. Received: {what}, which is {whole:.6g} of "
        f"some examples, and {first:.6g} and {second:.6g} of their halves. "
        f"This run is not that of the large batch. {cure}, if the loss divides "
        "by something of its own, with `weight`, a function that computes that."
    )
