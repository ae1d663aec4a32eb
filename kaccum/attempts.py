"""Trains on a batch in micro-batches, in smaller ones when memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kaccum.backend import engine
from kaccum.sizes import MicroBatchSize


def train_in_parts(
    batch: Any,
    size: MicroBatchSize,
    runner: Any,
    train: Callable[[Iterator[Any], int], Any],
) -> Any:
    """Trains on a batch of `fit`, cut into micro-batches.

    Args:
        batch: What Keras gives a `train_step`.
        size: Says how to cut. When memory runs out and it may halve, all that
            the attempt changed is taken back and *the same batch* cut again.
        runner: The `Engine` that the attempts run on.
        train: Function of the micro-batches, an iterator, and how many they
            are, that runs training steps on them. It must make no update.

    Returns:
        What `train` returns.

    Raises:
        ValueError: If the batch cannot be cut.
        Exception: Of the framework's kind for that, if a single example is too
            large.
    """
    examples = engine().examples_in(batch)
    if not size.is_auto:
        parts = size.parts_of(examples)
        return train(engine().cut(batch, parts, runner.model), len(parts))
    runner.remember()
    try:
        return _train_in_parts_that_fit(batch, examples, size, runner, train)
    finally:
        runner.forget()


def _train_in_parts_that_fit(
    batch: Any,
    examples: list[int],
    size: MicroBatchSize,
    runner: Any,
    train: Callable[[Iterator[Any], int], Any],
) -> Any:
    already = sys.exc_info()[1]
    while True:
        parts = size.parts_of(examples)
        try:
            micro_batches = engine().cut(batch, parts, runner.model)
            result = train(micro_batches, len(parts))
            runner.wait()
        except Exception as error:
            origin = _out_of_memory(error, already)
            if origin is None:
                raise
            runner.restore()
            if not size.halve(max(parts[0])):
                raise engine().out_of_memory(origin, _TOO_LARGE) from error
        else:
            if size.fits(max(parts[0])):
                print(_FOUND.format(size.size), flush=True)
            return result
        # The frames of the failed attempt may hold its tensors in a cycle.
        gc.collect()


def _out_of_memory(
    error: BaseException | None, already: BaseException | None
) -> BaseException | None:
    """The error that says so, if one is the origin of `error`.

    Args:
        error: What was raised. Keras wraps what a layer raises, `from None`.
        already: What was handled before, which has nothing to do with it.
    """
    while error is not None and error is not already:
        if engine().is_out_of_memory(error):
            return error
        error = error.__cause__ or error.__context__
    return None


_FOUND = 'micro_batch_size="auto": micro-batches of {} examples fit in memory.'
_TOO_LARGE = (
    "A single example does not fit in memory, so that no smaller micro-batch "
    "is left to try."
)
