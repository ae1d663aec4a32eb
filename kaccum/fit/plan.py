"""What a fit is going to do, in one line, and what may be meant otherwise."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import keras

# What `fit` itself prints by: to the screen, or to the log (Keras 3.0 to 3.15).
from keras.src.utils import io_utils

from kaccum import callers
from kaccum.backends import backend

#: Keras's own; above it a user has chosen a batch size.
DEFAULT_BATCH_SIZE = 32


class Data(NamedTuple):
    """What is known of the batches of a fit.

    Args:
        batches: How many an epoch has, or `None`.
        batch_size: How many examples a batch has, or `None`.
        last: How many the last one of an epoch has, or `None`.
        epochs: How many there are.
        devices: How many of them share a batch.
    """

    batches: int | None = None
    batch_size: int | None = None
    last: int | None = None
    epochs: int = 1
    devices: int = 1

    @classmethod
    def of_fit(cls, model: keras.Model, params: dict[str, Any]) -> Data:
        """That of the running `fit` of a model, whose callbacks have `params`.

        Its adapter of the data is not shown to callbacks (Keras 3.5 to 3.15).
        """
        iterator = callers.variable_of_fit(model, "epoch_iterator")
        adapter: Any = getattr(iterator, "data_adapter", None)
        batches = params.get("steps")
        size = _batch_size_of(adapter)
        last = size
        if size and batches == adapter.num_batches:
            last = adapter.partial_batch_size or size
        epochs = params.get("epochs") or 1
        return cls(batches, size, last, epochs, backend().shares_of(model))


def _batch_size_of(adapter: Any) -> int | None:
    try:
        size = getattr(adapter, "batch_size", None)
    except IndexError:
        # Of a data set whose first part is a scalar (Keras 3.15).
        return None
    return int(size) if size else None


def line_of_steps(steps: int, data: Data) -> str:
    """What `steps` makes of the data."""
    examples = f"{steps} {_plural('micro-batch', steps)}"
    if data.batch_size:
        together = f"{steps * data.batch_size} examples"
        examples = f"{together} an update = {examples} of {data.batch_size}"
    else:
        examples += " an update"
    if data.devices > 1:
        examples += f", shared by {data.devices} devices{_share(data)}"
    return f"kaccum: {examples}{_updates_of_steps(steps, data)}."


def _share(data: Data) -> str:
    if not data.batch_size:
        return ""
    most = "" if data.batch_size % data.devices == 0 else " at most"
    return f", {-(-data.batch_size // data.devices)} on each{most}"


def line_of_updates(
    steps: int, change: tuple[int, int] | None, data: Data
) -> str:
    """The same, where windows differ in length by update.

    Args:
        steps: How many micro-batches the next one has.
        change: The number of updates from which on it is another number of
            them, and that, or `None` where it is not known.
        data: What is known of the data.
    """
    line = line_of_steps(steps, data._replace(batches=None))[:-1]
    if change is not None:
        updates, others = change
        line += (
            f"; {others} {_plural('micro-batch', others)} from update "
            f"{updates} on"
        )
    return f"{line}."


def _updates_of_steps(steps: int, data: Data) -> str:
    if not data.batches:
        return ""
    updates = -(-data.batches // steps)
    rest = data.batches - (updates - 1) * steps
    size = f"{rest} {_plural('micro-batch', rest)}"
    is_short = rest < steps
    if data.batch_size and data.last:
        examples = (rest - 1) * data.batch_size + data.last
        size = f"{examples} {_plural('example', examples)}"
        is_short = examples < steps * data.batch_size
    return _updates(updates, size if is_short else None)


def line_of_size(size: int | str, data: Data) -> str:
    """What `micro_batch_size` makes of the data."""
    one = "the batch" if not data.batch_size else f"{data.batch_size} examples"
    if size == "auto":
        parts = ", in the largest micro-batches that fit in memory"
    elif data.batch_size:
        share = -(-data.batch_size // data.devices)
        count = -(-share // int(size))
        largest = -(-share // count)
        are_equal = data.batch_size % (count * data.devices) == 0
        most = "" if are_equal else " at most"
        parts = f" = {count} {_plural('micro-batch', count)} of {largest}{most}"
    else:
        parts = f" = micro-batches of {size} at most"
    if data.devices > 1:
        parts += f" on each of {data.devices} devices"
    text = f"kaccum: {one} an update{parts}"
    if data.batches:
        is_short = data.last and data.last != data.batch_size
        last = f"{data.last} {_plural('example', data.last or 0)}"
        text += _updates(data.batches, last if is_short else None)
    return f"{text}."


OF_ITS_OWN = (
    " The model's own `train_step` runs for each micro-batch, with all that it "
    "does beside the update."
)


def advice(steps: int, size: int | None, data: Data) -> str:
    """What to write where memory runs out, a sentence."""
    auto = '`micro_batch_size="auto"` finds what fits.'
    if size is not None:
        return (
            f"kaccum: micro-batches of {size} examples did not fit in memory. "
            f"Write `micro_batch_size={max(1, size // 2)}`; {auto}"
        )
    if not data.batch_size:
        return (
            "kaccum: a micro-batch did not fit in memory. Halve the batches of "
            f"the data, and write `steps={2 * steps}`."
        )
    return (
        f"kaccum: micro-batches of {data.batch_size} examples did not fit in "
        f"memory. Write `batch_size={max(1, data.batch_size // 2)}` and "
        f"`steps={2 * steps}`; or `batch_size={steps * data.batch_size}` and "
        f"{auto}"
    )


def advice_for_validation(examples: int) -> str:
    """The same for a batch of so many examples of validation."""
    return (
        f"kaccum: the validation of {examples} examples at a time did not fit "
        "in memory. Write "
        f"`validation_batch_size={max(1, examples // 2)}` into `fit`."
    )


def say(message: str, verbose: Any) -> None:
    """Prints a line as `fit` does, unless it is to be silent."""
    if verbose != 0:
        io_utils.print_msg(message)


def updates_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many updates an optimizer has made."""
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def warn_of_mistakes(
    steps: int, data: Data, optimizer: keras.optimizers.Optimizer
) -> None:
    """Warns of what `steps` is seldom meant to be."""
    if not data.batches or steps == 1:
        return
    updates = -(-data.batches // steps)
    if steps > data.batches:
        _warn(
            "`steps` must not be more than the batches of an epoch, or an "
            f"epoch is one short window. Received: steps={steps}, and "
            f"{data.batches} batches an epoch. Write a smaller `batch_size`, "
            "which is that of a micro-batch, or less `steps`."
        )
    elif updates <= 2 and (size := data.batch_size or 0) > DEFAULT_BATCH_SIZE:
        _warn(
            "`batch_size` must be that of a micro-batch where `steps` is "
            f"given. Received: batch_size={size} and steps={steps}, "
            f"which make {updates} {_plural('update', updates)} an epoch. If "
            f"{size} examples are meant to make an update, write "
            f"`batch_size={max(1, size // steps)}`, or "
            "`micro_batch_size` instead of `steps`."
        )
    name, end = _end_of_schedule(optimizer)
    if updates_of(optimizer) > 0:
        # It is another fit that the schedule is of, too.
        return
    total, batches = updates * data.epochs, data.batches * data.epochs
    if total < end <= 1.1 * batches:
        _warn(
            "A schedule of the learning rate must count updates, of which a "
            f"window of micro-batches makes one. Received: `{name}` up to "
            f"{end}, and {total} updates in this `fit`. A schedule that is for "
            f"this `fit` alone must end at {total}."
        )


def warn_of_uncut(size: int, examples: int) -> None:
    """Warns of a batch that is no larger than a micro-batch."""
    _warn(
        "`micro_batch_size` must be less than the examples of a batch for "
        f"anything to be cut. Received: micro_batch_size={size}, and a batch "
        f"of {examples} examples. Write the `batch_size` of an update into "
        "`fit`."
    )


def _end_of_schedule(optimizer: Any) -> tuple[str, int]:
    """Where a schedule that counts steps ends, and by which argument."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    # The schedule has no public name (Keras 3.0 to 3.15).
    schedule = getattr(optimizer, "_learning_rate", None)
    if not isinstance(
        schedule, keras.optimizers.schedules.LearningRateSchedule
    ):
        return "", 0
    warmup = getattr(schedule, "warmup_steps", None) or 0
    # These only get slower and slower.
    endless = (
        keras.optimizers.schedules.ExponentialDecay,
        keras.optimizers.schedules.InverseTimeDecay,
    )
    for name in ("decay_steps", "first_decay_steps"):
        steps = getattr(schedule, name, None)
        if isinstance(steps, int) and not isinstance(schedule, endless):
            return name, steps + int(warmup)
    boundaries = getattr(schedule, "boundaries", None)
    if isinstance(boundaries, (list, tuple)) and boundaries:
        return "boundaries", int(boundaries[-1])
    return "", 0


def _updates(count: int, last: str | None) -> str:
    if last is None:
        return f"; {count} {_plural('update', count)} an epoch"
    if count == 1:
        return f"; 1 update an epoch, of {last}"
    return f"; {count} updates an epoch, the last of {last}"


def _plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("h") else f"{noun}s"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
