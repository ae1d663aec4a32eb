"""What training steps assign to Keras variables, to take it back."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from kaccum.backend import engine
from kaccum.patches import SharedPatch

# Taken at import: Keras's own.
assign = keras.Variable.assign
_hearing = threading.local()


def _tell_or_assign(variable: Any, value: Any) -> Any:
    told = getattr(_hearing, "told", None)
    return assign(variable, value) if told is None else told(variable, value)


#: A context in which assignments are told to who hears them.
telling = SharedPatch(keras.Variable, "assign", _tell_or_assign)


@contextlib.contextmanager
def heard_by(told: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Calls `told` with each variable and value instead of assigning them.

    What is not to be left out, it assigns by `assign`.
    """
    previous = getattr(_hearing, "told", None)
    _hearing.told = told
    try:
        yield
    finally:
        _hearing.told = previous


class MicroBatchState:
    """What variables held before a micro-batch, known inside of its step."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}

    def hear(self, variable: Any) -> None:
        """Remembers a variable that is about to be assigned."""
        if id(variable) not in self._before:
            before = ops.copy(ops.convert_to_tensor(variable))
            self._before[id(variable)] = (variable, before)

    def restore_unless(self, is_kept: Any) -> None:
        """Takes all assignments back where `is_kept` (scalar bool) is false."""
        for variable, before in self._before.values():
            # What a `tf.function` of the user's own assigned is out of reach.
            if engine().is_reachable(before):
                variable.assign(ops.where(is_kept, variable, before))


class BatchState:
    """What variables held before a batch, known outside of its steps.

    A step that is compiled tells what it assigns only while it is traced, so
    the variables are remembered for good, and their values for one batch.
    """

    def __init__(self) -> None:
        self._variables: dict[int, Any] = {}
        self._before: dict[int, Any] | None = None

    def hear(self, variable: Any) -> None:
        """Remembers a variable that is about to be assigned."""
        if id(variable) in self._variables:
            return
        if self._before is not None:
            # In a trace: none of this batch's steps has assigned it yet.
            self._before[id(variable)] = engine().outside_of_traces(
                functools.partial(engine().copy, variable)
            )
        self._variables[id(variable)] = variable

    def remember(self) -> None:
        """Remembers the values at the start of a batch."""
        copy = engine().copy
        self._before = {id(v): copy(v) for v in self._variables.values()}

    def restore(self) -> None:
        """Takes back all assignments since `remember`."""
        for key, before in (self._before or {}).items():
            engine().restore(self._variables[key], before)

    def forget(self) -> None:
        """Forgets the values."""
        self._before = None
