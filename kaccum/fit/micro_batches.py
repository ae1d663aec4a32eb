"""Runs a batch in micro-batches, in smaller ones when memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, Final, Literal, Union

from kaccum.backends import Runner, Tester, backend
from kaccum.checks import checked_integer, received
from kaccum.fit.plan import say

AUTO: Final = "auto"


class MicroBatchSize:
    """The largest number of examples that a micro-batch may have.

    Args:
        size: int >= 1; or "auto": as many as the batch has, half as many after
            each `halve`.

    Raises:
        TypeError, ValueError: If `size` is neither.
    """

    def __init__(self, size: int | str) -> None:
        rule = f"`micro_batch_size` must be an integer >= 1 or {AUTO!r}."
        got = received("micro_batch_size", size)
        if isinstance(size, str) and size != AUTO:
            raise ValueError(f"{rule} {got}")
        self.is_auto = size == AUTO
        self._most: int | None = None
        if not self.is_auto:
            self._most = checked_integer(size, rule, got)
        self._found: int | None = None
        self._of_validation: MicroBatchSize | None = None
        #: What it is a number of, in messages.
        self.what = "examples"
        #: As of `fit`: 0 to be silent.
        self.verbose: Any = 1

    @property
    def size(self) -> int | Literal["auto"]:
        """int, or "auto" as long as no batch went through."""
        known = self._found if self.is_auto else self._most
        return AUTO if known is None else known

    def parts_of(self, examples: list[int]) -> list[list[int]]:
        """The sizes of the micro-batches of a batch, the larger ones first.

        They are as few as possible, then as equal as possible.

        Args:
            examples: How many the batch has, for each replica.

        Returns:
            For each micro-batch how many it has, for each replica.
        """
        largest = max(examples)
        count = 1 if self._most is None else -(-largest // self._most)
        count = max(count, 1)
        by_replica = []
        for each in examples:
            size, larger = divmod(each, count)
            by_replica.append([size + 1] * larger + [size] * (count - larger))
        return [list(sizes) for sizes in zip(*by_replica)]

    def halve(self, failed: int) -> bool:
        """Asks for less from now on.

        Args:
            failed: The number of examples that was too large.

        Returns:
            Whether less is possible.
        """
        self._found = None
        self._most = max(1, -(-failed // 2))
        return failed > 1

    def fits(self, largest: int) -> bool:
        """Says that a micro-batch went through.

        Args:
            largest: Its number of examples.

        Returns:
            Whether it is the first one, also since the last `halve`.
        """
        is_first = self._found is None
        self._found = max(largest, self._found or 0)
        return is_first

    def forget(self) -> None:
        """Starts anew: what fits one model may not fit another."""
        if self.is_auto:
            self._most = self._found = self._of_validation = None

    def of_validation(self) -> MicroBatchSize:
        """That of validation: it starts with this, and halves by itself."""
        if not self.is_auto:
            return self
        if self._of_validation is None:
            self._of_validation = MicroBatchSize(AUTO)
            self._of_validation.what = "examples of validation"
            self._of_validation._most = self._found
            # It needs less memory than training: that it fits is no news.
            self._of_validation._found = self._found
        self._of_validation.verbose = self.verbose
        return self._of_validation


def in_parts(
    batch: Any,
    size: MicroBatchSize,
    runner: Union[Runner, Tester],
    run: Callable[[list[list[int]]], Any],
) -> Any:
    """Runs a batch of `fit` in micro-batches.

    Args:
        batch: What Keras gives a `train_step`, or a `test_step`.
        size: Says how to cut. When memory runs out and it may halve, all that
            the attempt changed is taken back and *the same batch* cut again.
        runner: What the attempts run on.
        run: Function of their sizes, as of `Backend.cut`, that runs steps on
            them. It must make no update.

    Returns:
        What `run` returns.

    Raises:
        ValueError: If the batch cannot be cut.
        Exception: Of the framework's kind for that, if a single example is too
            large.
    """
    examples = backend().examples_in(batch)
    if not size.is_auto:
        return run(size.parts_of(examples))
    runner.remember()
    try:
        return _in_parts_that_fit(examples, size, runner, run)
    finally:
        runner.forget()


def _in_parts_that_fit(
    examples: list[int],
    size: MicroBatchSize,
    runner: Union[Runner, Tester],
    run: Callable[[list[list[int]]], Any],
) -> Any:
    already = sys.exc_info()[1]
    while True:
        parts = size.parts_of(examples)
        try:
            result = run(parts)
            runner.wait()
        except Exception as error:
            origin = out_of_memory(error, already)
            if origin is None:
                raise
            runner.restore()
            if not size.halve(max(parts[0])):
                raise backend().out_of_memory(origin, _TOO_LARGE) from error
            halved = max(size.parts_of(examples)[0])
            say(_HALVED.format(max(parts[0]), size.what, halved), size.verbose)
        else:
            if size.fits(max(parts[0])):
                say(_FOUND.format(size.size, size.what), size.verbose)
            return result
        # The frames of the failed attempt may hold its tensors in a cycle.
        gc.collect()


def out_of_memory(
    error: BaseException | None, already: BaseException | None
) -> BaseException | None:
    """The error that says that memory ran out, if that caused `error`.

    Args:
        error: What was raised. Keras wraps what a layer raises, `from None`.
        already: What was handled before, which has nothing to do with it.
    """
    while error is not None and error is not already:
        if backend().is_out_of_memory(error):
            return error
        error = error.__cause__ or error.__context__
    return None


_FOUND = "kaccum: micro-batches of {} {} fit in memory."
_HALVED = "kaccum: no memory for {} {}; trying micro-batches of {}."
_TOO_LARGE = (
    "A single example does not fit in memory, so that no smaller micro-batch "
    "is left to try."
)
