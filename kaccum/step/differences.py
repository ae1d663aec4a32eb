"""What a training step does else than the large batch: noted, and told once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras


class Differences:
    """Those of a model's training step.

    Args:
        model: A compiled `keras.Model`.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        #: The names of state that steps moved, and were to leave alone.
        self.moved: list[str] = []
        self._told: set[str] = set()
        self._noted = 0

    def tell(self, about: str, message: str) -> None:
        """Warns, once.

        Args:
            about: Tells apart what is told.
            message: The warning.
        """
        if about not in self._told:
            self._told.add(about)
            warnings.warn(message, stacklevel=2)

    def note_assigned(
        self, assigned: dict[int, Any], unheard: dict[int, Any]
    ) -> None:
        """Notes state that steps assigned, but for what may move with them.

        Args:
            assigned: The variables that they were heard to assign.
            unheard: Others, in pairs with what they held before.
        """
        if len(assigned) + len(unheard) == self._noted:
            return
        self._noted = len(assigned) + len(unheard)
        still = {id(v) for v in self._model.metrics_variables}
        for layer in normalizations_of(self._model):
            still |= {id(layer.moving_mean), id(layer.moving_variance)}
        others = [variable for variable, _ in unheard.values()]
        self.note_moved(
            variable.path
            for variable in [*assigned.values(), *others]
            if id(variable) not in still
            and variable.name != "seed_generator_state"
        )

    def note_moved(self, names: Iterable[str]) -> None:
        """Notes state by its names."""
        self.moved = [*dict.fromkeys([*self.moved, *names])]

    def tell_of_moved(self) -> None:
        """Warns of state that moves with each micro-batch."""
        if self.moved:
            self.tell(
                "moved",
                "A layer or `train_step` must leave it to the update to move "
                "state, but for metrics, random numbers and the averages of "
                "`BatchNormalization`, for a window to be its large batch. "
                f"Received: {', '.join(map(repr, self.moved))}, assigned once "
                "a micro-batch. Move them in `on_update`; averages of weights "
                "are the optimizer's `use_ema`.",
            )

    def tell_of_proportions(self, disproportion: float) -> None:
        """Warns of losses that one weight was not right for.

        Args:
            disproportion: As of `Sums`.
        """
        if disproportion > 1e-3:
            self.tell(
                "proportions",
                "Losses that divide by numbers of their own (of masks, or of "
                "weights under `mean_with_sample_weight`) must do so in the "
                "same proportion in all micro-batches of a window to be "
                "exactly their large batch. Received: proportions that differ "
                f"by up to {disproportion:.1%}. With `whole_batch_loss=True` "
                "the run is exact.",
            )

    def tell_of_added_sum(self) -> None:
        """Warns of a sum beside a mean in a step of the user's own."""
        self.tell(
            "added sum",
            "A term of `add_loss` that is a sum must not be beside a mean in a "
            "`train_step` of the model's own, where it gets the weight of the "
            "mean, for a window to be its large batch. Received: such a "
            f"{type(self._model).__name__}. Divide the term by the number of "
            "examples, or use Keras's `train_step`.",
        )

    def tell_of_unheard(self) -> None:
        """Warns of a denominator where it cannot be kept."""
        self.tell(
            "unheard",
            "A loss with a mask, or with weights under "
            "`mean_with_sample_weight`, must be computed where kaccum hears "
            "what it divides by: not in a `tf.function`, `tf.cond` or "
            "`jax.jit` of a step's own, and on JAX in `jax.grad` or "
            "`jax.value_and_grad` by these names (not imported by `from jax "
            f"import`). Received: a {type(self._model).__name__} that computes "
            "one there, whose micro-batches are weighted by their examples. "
            "Pass `weight`, a function that computes it.",
        )

    def tell_of_terms(self, in_training: int, in_trial: int) -> None:
        """Warns of terms that layers add in training only, or not there."""
        if in_training != in_trial:
            self.tell(
                "terms",
                "Layers must add as many terms by `add_loss` in training as in "
                "evaluation for kaccum to know which are means and which are "
                f"sums. Received: {in_training} and {in_trial}. Pass `weight` "
                "if they are sums.",
            )

    def tell_of_other_outputs(self, difference: float) -> None:
        """Warns of outputs that were others the second time.

        Args:
            difference: By how much, at most: a part of their size.
        """
        if difference > 1e-2:
            self.tell(
                "outputs",
                "Layers must compute the same outputs again for "
                "`whole_batch_loss`: their random numbers must be those of "
                "`keras.random` with a `SeedGenerator`. Received: outputs that "
                f"differ by {difference:.1%} of their size, so that this run "
                "is not that of the large batch.",
            )

    def tell_of_applies(self, variables: Sequence[Sequence[Any]]) -> None:
        """Warns of several applies to the same weights, given those of each."""
        applied = [id(v) for each in variables for v in each]
        if len(set(applied)) < len(applied):
            self.tell(
                "applies",
                "A `train_step` must apply gradients to each weight once for a "
                "window to be its large batch. Received: a `train_step` of "
                f"{type(self._model).__name__} that does so {len(variables)} "
                "times, all of which see the same weights here. Add the "
                "gradients up, and apply their sum.",
            )


def normalizations_of(model: keras.Model) -> list[Any]:
    """The `BatchNormalization` layers of a model, however deep."""
    # `model.layers` has the outermost only (Keras 3.5 to 3.15).
    kind = keras.layers.BatchNormalization
    layers = model._flatten_layers()
    return [each for each in layers if isinstance(each, kind) and each.built]
