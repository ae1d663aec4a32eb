"""The gradient noise scale: how much of a micro-batch's gradient is chance.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training"
(arXiv:1812.06162), appendix A, estimate it by the gradients of a small and of a
large batch. Here these are the micro-batch and the window.

Micro-batch i of n has the weight w_i (what its mean loss divides by) and the
gradient g_i = g + e_i, where g is the true gradient and e_i is chance: on
average nothing, independent, and of squared norm c / w_i on average. The
window's gradient is the mean of the g_i by their weights, of which W is the
sum, so on average

- l, the squared norm of the window's gradient, is |g|^2 + c / W;
- s, the mean of the squared norms of the g_i by their weights, is
  |g|^2 + n c / W.

So (s - l) / (n - 1) is c / W, on average, and l without that is |g|^2, the
signal. The noise is that of an example: B c / W, with B examples in the window.
Where b examples are in each micro-batch, and count alike, these are

    signal = (B l - b s) / (B - b),    noise = (s - l) / (1 / b - 1 / B).

What all g_i have in common, as the gradient of a regularizer, is no noise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from keras import ops

from kaccum.backends import SumSpec, backend

GRADIENT_NORM = "gradient_norm"
NOISE_SCALE = "noise_scale"

#: How much of the averages an update keeps: they are of some 100 updates.
DECAY = 0.99


class GradientNoise(NamedTuple):
    """What the gradients of the last updates say of the batch.

    Args:
        signal: Squared norm of the true gradient, a float.
        noise: Mean squared distance of an example's gradient from it, a float.
        scale: `noise / signal`, examples; NaN where `signal` is not positive.
    """

    signal: float
    noise: float
    scale: float


class Measured(NamedTuple):
    """What the gradients of a window are, scalars.

    Args:
        square: The squared norm of the window's gradient.
        signal: As of the module's text.
        noise: As of the module's text.
        is_known: Whether signal and noise are: 1.0 or 0.0.
    """

    square: Any
    signal: Any
    noise: Any
    is_known: Any


def measured_of_means(
    square: Any, squares: Any, weight: Any, examples: Any, count: Any
) -> Measured:
    """What a window of a loss that is a mean says.

    Args:
        square: Squared norm of its gradient.
        squares: Sum of the squared norms of the micro-batches' gradients, each
            times its weight.
        weight: Sum of the weights.
        examples: How many examples it has.
        count: How many of its micro-batches have any that count.
    """
    gap = ops.divide_no_nan(squares, weight) - square
    share = ops.divide_no_nan(gap, count - 1.0)
    is_known = ops.cast(ops.greater(count, 1.0), "float32")
    return Measured(square, square - share, share * examples, is_known)


def measured_of_sums(
    square: Any, square_of_data: Any, squares: Any, examples: Any, count: Any
) -> Measured:
    """What a window of a loss that is a sum says, for an example of it.

    Args:
        square: Squared norm of its gradient.
        square_of_data: The same, of what depends on the data.
        squares: Sum of the squared norms of what does in the micro-batches'
            gradients, each divided by its examples.
        examples: As of `measured_of_means`.
        count: As of `measured_of_means`.
    """
    each = ops.divide_no_nan(ops.ones((), "float32"), ops.square(examples))
    of_data = measured_of_means(
        square_of_data * each, squares, examples, examples, count
    )
    shared = (square - square_of_data) * each
    return of_data._replace(square=square, signal=of_data.signal + shared)


class GradientAverages:
    """What updates measured: norms of an epoch, signal and noise of a fit.

    Holds the sum of norms, how many they are, and how many updates of the epoch
    told of noise; and the averages of signal and noise, with what weights they
    have: two sums of shape `(3,)`, float32.

    Args:
        leaves_overflow_out: Whether an update whose gradient is not finite is
            none.
        is_xla: Whether XLA compiles the steps.
    """

    def __init__(self, *, leaves_overflow_out: bool, is_xla: bool) -> None:
        self._leaves_overflow_out = leaves_overflow_out
        self._backend = backend()
        #: As of `GradientSums`.
        self.square_of = functools.partial(
            self._backend.squared_norm, is_xla=is_xla
        )
        #: The sums. An update leaves them.
        self.sums = self._backend.new_sums(
            [SumSpec((3,), "float32"), SumSpec((3,), "float32")]
        )

    def add(self, parts: list[Measured]) -> None:
        """Counts an update.

        Args:
            parts: What each `apply` of a step measured. The gradient of the
                update is all of them together.
        """
        if not parts:
            # Of a model without trainable weights.
            return
        one = ops.ones((), "float32")
        square = sum(part.square for part in parts)
        counts = one
        if self._leaves_overflow_out:
            counts = ops.cast(ops.isfinite(square), "float32")
            square = ops.where(counts > 0, square, 0.0)
        is_known = counts
        for part in parts:
            is_known = is_known * part.is_known
        signal, noise = (
            ops.where(is_known > 0, sum(values), 0.0)
            for values in zip(*((part.signal, part.noise) for part in parts))
        )
        norms, averages = self._backend.values_of(self.sums)
        norms = norms + ops.stack([ops.sqrt(square), one, is_known]) * counts
        new = ops.stack([signal, noise, one])
        averages = averages + (1.0 - DECAY) * is_known * (new - averages)
        self._backend.assign(self.sums, [norms, averages])

    def begin_epoch(self) -> None:
        """Forgets the norms."""
        self._backend.empty(self.sums[:1])

    def begin_fit(self) -> None:
        """Forgets all."""
        self._backend.empty(self.sums)

    def take_over(self, others: GradientAverages) -> None:
        """Goes on with what others know."""
        values = self._backend.values_of(others.sums)
        self._backend.assign(self.sums, values)

    def shown(self) -> dict[str, Any]:
        """The entries of the epoch's log, scalars: NaN for no number."""
        # Ratios: they are right where all replicas are asked, too.
        norms, averages = self._backend.values_of(self.sums)
        signal, noise = averages[0], averages[1]
        has_scale = ops.logical_and(signal > 0.0, norms[2] > 0.0)
        return {
            GRADIENT_NORM: _ratio(norms[0], norms[1], norms[1] > 0.0),
            NOISE_SCALE: _ratio(noise, signal, has_scale),
        }

    @property
    def now(self) -> GradientNoise:
        """Signal, noise and their ratio: NaN before there are any."""
        (averages,) = self._backend.values_of(self.sums[1:])
        signal, noise, weight = map(float, ops.convert_to_numpy(averages))
        if not weight > 0.0:
            return NOTHING
        scale = noise / signal if signal > 0.0 else float("nan")
        return GradientNoise(signal / weight, noise / weight, scale)


NOTHING = GradientNoise(*[float("nan")] * 3)


def _ratio(of: Any, to: Any, where: Any) -> Any:
    return ops.where(where, of / ops.where(where, to, 1.0), float("nan"))
