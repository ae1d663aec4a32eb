"""What kind of number a loss is: a mean, a sum, or neither. It is measured.

A loss that returns one number hides what it divides by. The loss of a
micro-batch is compared with those of its parts: those of a mean average, and
those of a sum add up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops
from keras.src import backend

from kaccum.backends.arrays import joined
from kaccum.step import weights
from kaccum.step.hearing import OF_LOSSES
from kaccum.step.recording import thread
from kaccum.step.weights import Reduction

if TYPE_CHECKING:
    from kaccum.step.training_step import TrainingStep

MEAN, SUM, NEITHER = "mean", "sum", "neither"

#: A difference that rounding explains in float32, and one that it does not, as
#: parts of the largest number that is compared. The second one is larger where
#: the model ran on each part: terms that cancel have larger errors.
ROUNDING, CERTAIN, CERTAIN_OF_MODEL = 1e-5, 5e-5, 1e-2
#: How much nearer one kind must be to be taken for it all the same.
NEARER = 20.0
#: The most examples that losses are tried on: of fewer, parts differ more.
MOST = 8


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
        return 2.0 * float(self.values[0]) - float(self.twice)


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
    """The kinds of the losses of a model. Unknown ones are taken for means."""

    def __init__(self) -> None:
        #: Of an own `compute_loss`.
        self.total: str | None = None
        #: What that makes of the terms that have no data: so many times them.
        self.share = 1.0
        #: Of the terms that layers add, in order; `None` if that is not known.
        self.added: list[str | None] = []
        #: Whether they were tried, and whether their number was told.
        self.are_tried = self.is_told_of_terms = False
        #: Whether they were measured, or need not be.
        self.are_known = False
        #: What kept them from being measured, an error's name and message.
        self.obstacle: str | None = None
        self._of: dict[int, str] = {}
        # Losses that are neither, before a step uses them, and their numbers.
        self._warnings: dict[int, str] = {}
        self._used: set[int] = set()
        self._told: set[int] = set()

    def of(self, loss: Any) -> str | None:
        """That of a loss of `compile`, which a step uses."""
        self._used.add(id(loss))
        self._warn(id(loss))
        return self._of.get(id(loss))

    def warn_of_sum(self, loss: Any) -> None:
        """Says of a sum in a `train_step` of the user's own what it counts."""
        if id(loss) not in self._told:
            self._told.add(id(loss))
            _warn(
                "What a `train_step` of the model's own makes of a loss that "
                "is a sum is not heard: it is taken for a mean over examples. "
                f"Received: {loss.name!r}. If the step takes the gradient of "
                'the sum pass `weight="sum"`, else a function that computes '
                "what it divides by."
            )

    def warn_of_hidden(self, loss: Any) -> None:
        """Says of a loss that returns one number if it was not measured."""
        if self.obstacle is not None:
            reason, self.obstacle = self.obstacle, None
            _warn(
                "A loss that returns one number hides whether it is a mean or "
                "a sum, and is taken for a mean over examples where it cannot "
                f"be tried on parts of a micro-batch. Received: {loss.name!r}, "
                f"and this obstacle: {reason.splitlines()[0]} Pass `weight`."
            )

    def of_added(self, call: int) -> str | None:
        """That of a term that layers added, by their order."""
        return self.added[call] if call < len(self.added) else None

    @property
    def are_mixed(self) -> bool:
        """Whether some are means and others sums."""
        kinds = {*self._of.values(), *self.added} - {None}
        return SUM in kinds and len(kinds) > 1

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
        self.are_tried = measured.total is None
        total = measured.total
        if total is not None:
            kind = kind_of(total)
            known.append(kind is not None)
            if self.total is None and kind in (MEAN, SUM):
                self.total = kind
                self.share = _share(total, float(measured.terms))
            if warns and kind not in (None, self.total):
                self.total = self.total or NEITHER
                _warn(_message("`compute_loss`", total))
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
                _warn(_message("a term of `add_loss`", term))
        return [kind is not None for kind in kinds]

    def _warn(self, key: int) -> None:
        message = self._warnings.pop(key, None)
        if message is not None:
            _warn(message)


class Trial:
    """What is heard of a loss that is tried on a part of a micro-batch.

    Stands for the `Recording` of a step.

    Args:
        step: The training step.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.backend = step.backend
        self.trace = self.backend.trace()
        self.is_in_loss = False
        self.depth = 0
        self.loss: Any = None
        self.reductions: list[Reduction] = []
        #: Losses of `compile`, and what numbers they were.
        self.values: list[tuple[Any, Any]] = []
        self.total: Any = None

    def run(self, x: Any, y: Any, sample_weight: Any, y_pred: Any) -> Trial:
        """Computes the losses of a model, of its outputs."""
        # Keras changes weights and masks in place (PyTorch, 3.15).
        sample_weight = _copied(sample_weight)
        for leaf in keras.tree.flatten(y_pred):
            mask = backend.get_keras_mask(leaf)
            if mask is not None:
                backend.set_keras_mask(leaf, ops.copy(mask))
        thread.recording = self
        try:
            total = self.step.model._compute_loss(
                x, y, y_pred, sample_weight, training=True
            )
        finally:
            thread.recording = None
        self.total = ops.sum(total)
        return self

    def hears(self, handler: Callable[..., Any]) -> bool:
        """Whether it is to be told what a handler is called for."""
        return handler in OF_LOSSES

    def reduced(self, value: Any) -> None:
        """Is told what number a loss of `compile` is."""
        self.values.append((self.loss, ops.sum(value)))


def measure(
    step: TrainingStep, batches: list[Any], look: Callable[..., Measured]
) -> bool:
    """Learns what kinds of numbers the losses of a model are.

    Args:
        step: The training step.
        batches: Micro-batches that together have 2 examples at least.
        look: As of `Runner.look`.

    Returns:
        Whether another micro-batch would tell no more.
    """
    if not step.model.built:
        # Its first step builds it; in a failed trial it would stay half built.
        step.kinds.obstacle = "the model is not built yet."
        return True
    losses: list[Any] = []
    is_single = len(batches) == 2 and batches[0] is batches[1]
    batches = [_few_of(step, batch) for batch in batches]
    try:
        with step.overheard():
            numbers = _floats(
                look(lambda parts: _tried(step, joined(parts), losses), batches)
            )
    except Exception as error:
        # What cannot be tried can still be trained: a `train_step` of the
        # user's own need not call the model, nor outputs hold examples.
        step.kinds.obstacle = f"{type(error).__name__}: {error}"
        return True
    # A single example beside itself shows what it is, if it is either.
    warns = not is_single
    return step.kinds.learn(losses, numbers, warns=warns)


def _floats(measured: Measured) -> Measured:
    """The same numbers on the host. An error of the device shows here."""

    def of(numbers: Numbers | None) -> Numbers | None:
        if numbers is None:
            return None
        values = [float(value) for value in numbers.values]
        weights = [None if w is None else float(w) for w in numbers.weights]
        twice = None if numbers.twice is None else float(numbers.twice)
        return Numbers(
            values, weights, twice, float(numbers.unit), float(numbers.certain)
        )

    losses = [each for each in map(of, measured.losses) if each is not None]
    added, total = [of(term) for term in measured.added], of(measured.total)
    return Measured(losses, added, total, float(measured.terms))


def _few_of(step: TrainingStep, batch: Any) -> Any:
    """Some examples of a batch; all of one that cannot be cut."""
    try:
        examples = sum(step.backend.examples_in(batch))
    except ValueError:
        # A batch of graphs, say.
        return batch
    if examples <= MOST:
        return batch
    sizes = [[MOST], [examples - MOST]]
    return next(step.backend.cut(batch, sizes, step.model))


def _tried(step: TrainingStep, data: Any, losses: list[Any]) -> Measured:
    """The numbers of all losses; `losses` gets those of `compile`."""
    model = step.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    is_own = type(model).compute_loss is not keras.Model.compute_loss
    # Once: layers may draw random numbers. Only an own one may use `x`.
    y_pred = _outputs(model, x)
    added = model.losses[: len(model.losses) - len(step.regularized)]
    terms = sum((ops.sum(term) for term in model.losses), 0.0)
    batch = (x if is_own else None, y, sample_weight, y_pred)
    batch, *parts = _cut(step, batch)
    pieces = [batch, batch, *parts]
    if is_own:
        pieces.append(_joined([batch, batch]))
    trials = [Trial(step).run(*piece) for piece in pieces]
    sizes = [weights.examples_in(piece[1:]) for piece in pieces]
    losses[:] = [loss for loss, _ in trials[0].values]
    of_losses = [
        Numbers(
            [trial.values[i][1] for trial in trials],
            [
                _weight(trial.reductions[i], size)
                for trial, size in zip(trials, sizes)
            ],
            unit=_unit(trials[0].values[i][1]),
        )
        for i in range(len(losses))
    ]
    if not is_own:
        return Measured(of_losses, _tried_terms(step, x, added))
    total = Numbers(
        [trial.total for trial in trials[:-1]],
        [
            _weight_of_all(trial.reductions, size)
            for trial, size in zip(trials[:-1], sizes)
        ],
        trials[-1].total,
        _unit(trials[0].total, model),
        CERTAIN_OF_MODEL,
    )
    return Measured([], [], total, terms)


def _tried_terms(
    step: TrainingStep, x: Any, whole: list[Any]
) -> list[Numbers | None]:
    """The numbers of the terms that layers add, `whole` to the whole."""

    def terms_of(x: Any) -> list[Any]:
        _outputs(step.model, x)
        return step.model.losses[: len(whole)]

    if not any(len(term.shape) == 0 for term in whole):
        return [None] * len(whole)
    few, *parts = _cut(step, x)
    pieces = [few, few, *parts]
    sizes = [weights.examples_in(piece) for piece in pieces]
    rows = zip(*(terms_of(piece) for piece in pieces))
    return [
        (
            Numbers(
                list(row),
                sizes,
                None,
                _unit(row[0], step.model),
                CERTAIN_OF_MODEL,
            )
            if len(row[0].shape) == 0
            else None
        )
        for row in rows
    ]


def _outputs(model: keras.Model, x: Any) -> Any:
    options = {"training": False} if model._call_has_training_arg else {}
    return model(x, **options)


def _cut(step: TrainingStep, batch: Any) -> list[Any]:
    """Some examples, their halves, and unequal parts, with masks of Keras."""
    masks = [backend.get_keras_mask(t) for t in keras.tree.flatten(batch)]
    (examples,) = step.backend.examples_in((batch, masks))

    def cut(*sizes: int) -> list[Any]:
        all_sizes = [[size] for size in (*sizes, examples - sum(sizes)) if size]
        parts = step.backend.cut((batch, masks), all_sizes, step.model)
        return [_masked(*part) for part in parts][: len(sizes)]

    most = min(examples, MOST)
    pieces = cut(most)
    # In this order, for a message shows the halves.
    for size in dict.fromkeys((most // 2, max(1, most // 4), 1)):
        pieces += cut(size, most - size)
    return pieces


def _copied(tensors: Any) -> Any:
    return keras.tree.map_structure(
        lambda tensor: None if tensor is None else ops.copy(tensor), tensors
    )


def _unit(value: Any, model: keras.Model | None = None) -> float:
    """How precise a value is, that a model may have computed."""
    dtypes = {keras.backend.standardize_dtype(value.dtype)}
    if model is not None:
        dtypes |= {
            str(getattr(layer, "compute_dtype", None))
            for layer in model._flatten_layers()
        }
    if "bfloat16" in dtypes:
        return 2.0**-7
    return 2.0**-10 if "float16" in dtypes else 2.0**-23


def _joined(batches: list[Any]) -> Any:
    """Batches together, with the masks of Keras."""
    masks = [
        [backend.get_keras_mask(t) for t in keras.tree.flatten(batch)]
        for batch in batches
    ]
    return _masked(joined(batches), joined(masks))


def _masked(batch: Any, masks: list[Any]) -> Any:
    for leaf, mask in zip(keras.tree.flatten(batch), masks):
        if mask is not None:
            backend.set_keras_mask(leaf, mask)
    return batch


def _share(total: Numbers, terms: float) -> float:
    """How much of the terms that have no data is in an own loss."""
    share = total.constant / terms if terms else 1.0
    # It is a difference of rounded numbers.
    return round(share) if abs(share - round(share)) < 1e-3 else share


def _weight(reduction: Reduction, examples: Any) -> Any:
    if reduction.kind in weights.SUMS:
        return None
    return examples if reduction.kind == "hidden" else reduction.denominator


def _weight_of_all(reductions: Sequence[Reduction], examples: Any) -> Any:
    known = [each.denominator for each in reductions if each.kind == "mean"]
    return known[0] if known else examples


def kind_of(numbers: Numbers) -> str | None:
    """Whether a loss is a mean, a sum, or neither.

    Returns:
        `None` where its values do not tell: it is random, or zero.
    """
    values = [float(value) for value in numbers.values]
    largest = max(map(abs, values))
    coarse = max(1.0, float(numbers.unit) / 2.0**-23 / 10.0)
    rounding, certain = ROUNDING * largest * coarse, numbers.certain * largest
    is_random = abs(values[0] - values[1]) > rounding
    if not np.isfinite(largest) or largest == 0.0 or is_random:
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
    """How far it is from a mean, and from a sum, of its parts."""
    whole, _, *parts = (float(value) for value in numbers.values)
    from_mean = from_sum = 0.0
    for i in range(0, len(parts), 2):
        pair, of_pair = parts[i : i + 2], numbers.weights[i + 2 : i + 4]
        from_sum = max(from_sum, abs(sum(pair) - numbers.constant - whole))
        mean = np.inf
        if None not in of_pair:
            mean = np.average(pair, weights=[float(w) for w in of_pair])
        from_mean = max(from_mean, abs(mean - whole))
    return from_mean, from_sum


def _taken_for(kind: str | None, numbers: Numbers) -> str:
    """What a loss is added up as."""
    if kind in (MEAN, SUM):
        return kind
    if kind is NEITHER:
        from_mean, from_sum = _distances(numbers)
        if from_sum * NEARER < from_mean < np.inf:
            return SUM
    return SUM if None in numbers.weights else MEAN


def _message(what: str, numbers: Numbers) -> str:
    whole, _, first, second, *_ = (float(v) for v in numbers.values)
    return (
        "A loss must be a mean or a sum over examples for micro-batches to be "
        f"exactly their large batch. Received: {what}, which is {whole:.6g} of "
        f"some examples, and {first:.6g} and {second:.6g} of their halves. "
        "If it divides by something of its own, pass `weight`, a function that "
        "computes that; if it compares examples with each other, this run is "
        "not that of the large batch."
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
