"""Tries a model's losses on parts of a micro-batch, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kaccum.backends.arrays import joined, masks_of, with_masks
from kaccum.step import weights
from kaccum.step.hearing import OF_LOSSES
from kaccum.step.kinds import CERTAIN_OF_MODEL, Measured, Numbers
from kaccum.step.outputs import added_by
from kaccum.step.recording import heard_by
from kaccum.step.weights import Reduction

if TYPE_CHECKING:
    from kaccum.step.training_step import TrainingStep

#: The most examples that losses are tried on: of fewer, parts differ more.
MOST = 8
#: How often losses that do not tell what they are are tried after the first
#: window, to warn.
MOST_TRIES = 8


class Trials:
    """The trials of a model's losses, until they are known.

    Args:
        step: The training step.
    """

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        #: Whether there is nothing more to learn.
        self.are_over = step.options.weight is not None
        self._count = 0
        # A micro-batch of one example that losses were tried on.
        self._single: list[Any] = []

    def try_on(
        self,
        batches: list[Any],
        look: Callable[..., Measured],
        *,
        is_late: bool,
    ) -> None:
        """Tries them on the next micro-batches.

        Args:
            batches: Those, as a `train_step` of one replica gets them.
            look: As of `Runner.look`.
            is_late: Whether the first window is over: they are tried to warn.
        """
        self._count += 1
        if is_late and self._count > MOST_TRIES:
            self.are_over = True
            return
        tried = [*self._single, *batches]
        # A single example is tried beside itself, and then beside another.
        is_single = weights.examples_in(tried[0]) == 1
        tried = (tried * 2)[:2] if is_single else tried[:1]
        self._single = [] if not is_single or self._single else tried[:1]
        is_known = measure(self._step, tried, look)
        self.are_over = is_known and not self._single


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
        with_masks(y_pred, _copied(masks_of(y_pred)))
        with heard_by(self):
            total = self.step.model._compute_loss(
                x, y, y_pred, sample_weight, training=True
            )
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
        step.kinds.obstacle = "The model is not built yet."
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

    def of(part: Any) -> Any:
        if isinstance(part, (list, Numbers, Measured)):
            parts = [of(each) for each in part]
            return parts if isinstance(part, list) else type(part)(*parts)
        return None if part is None else float(part)

    floats: Measured = of(measured)
    return floats


def _few_of(step: TrainingStep, batch: Any) -> Any:
    """Some examples of a batch; all of one that cannot be cut."""
    try:
        return step.backend.first_of(batch, MOST, step.model)
    except ValueError:
        # A batch of graphs, say.
        return batch


def _tried(step: TrainingStep, data: Any, losses: list[Any]) -> Measured:
    """The numbers of all losses; `losses` gets those of `compile`."""
    model = step.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    is_own = type(model).compute_loss is not keras.Model.compute_loss
    # Once: layers may draw random numbers. Only an own one may use `x`.
    y_pred = _outputs(model, x)
    added = added_by(model, model.losses)
    if step.whole is not None:
        # Of the loss, only what layers add is of parts.
        return Measured([], _tried_terms(step, x, added))
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
    masks = masks_of(batch)
    (examples,) = step.backend.examples_in((batch, masks))

    def cut(*sizes: int) -> list[Any]:
        all_sizes = [[size] for size in (*sizes, examples - sum(sizes)) if size]
        parts = step.backend.cut((batch, masks), all_sizes, step.model)
        return [with_masks(*part) for part in parts][: len(sizes)]

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
    masks = joined([masks_of(batch) for batch in batches])
    return with_masks(joined(batches), masks)


def _weight(reduction: Reduction, examples: Any) -> Any:
    if reduction.kind in weights.SUMS:
        return None
    return examples if reduction.kind == "hidden" else reduction.denominator


def _weight_of_all(reductions: Sequence[Reduction], examples: Any) -> Any:
    known = [each.denominator for each in reductions if each.kind == "mean"]
    return known[0] if known else examples
