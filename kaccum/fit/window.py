"""When a window closes. Counts micro-batches, knows nothing of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Union

from kaccum.checks import check_calls, checked_integer, received

Steps = Union[int, dict[int, int], Callable[[int], int]]


class _State(NamedTuple):
    """Where training is.

    Args:
        position: How many micro-batches the open window has.
        steps: How many it will have, or the next one, if none is open: 0 as
            long as that was not asked.
        updates: How many updates were made before it.
    """

    position: int
    steps: int
    updates: int


class Window:
    """The position inside the open window, whose length was fixed as it opened.

    Args:
        steps: int >= 1, the number of micro-batches of a full window.
    """

    def __init__(self, steps: int) -> None:
        self._length_of: Callable[[int], int] = lambda updates: steps
        self._state = _State(0, 0, 0)
        # Where it is after each of the next micro-batches.
        self._ahead: list[_State] = []

    @property
    def steps(self) -> int:
        """The length of the open window, or of the next one."""
        if self._state.steps == 0:
            steps = self._length_of(self._state.updates)
            self._state = self._state._replace(steps=steps)
        return self._state.steps

    @property
    def is_open(self) -> bool:
        """Whether micro-batches were added since the last update."""
        return self._state.position > 0

    def begin(self, length_of: Callable[[int], int], updates: int = 0) -> None:
        """Starts an empty window.

        Args:
            length_of: Function of the number of updates before a window that
                returns how many micro-batches it has.
            updates: How many there were.
        """
        self._length_of = length_of
        self._state = _State(0, 0, updates)

    def closes(self, count: int) -> list[bool]:
        """Tells which of the next `count` micro-batches close a window."""
        closes, self._ahead = [], []
        position, steps, updates = self._state
        for _ in range(count):
            # Not before it opens: what was measured till then may decide.
            steps = steps or self._length_of(updates)
            position += 1
            closes.append(position == steps)
            if closes[-1]:
                position, steps, updates = 0, 0, updates + 1
            self._ahead.append(_State(position, steps, updates))
        return closes

    def advance(self, count: int, updates: int) -> None:
        """Moves on by `count` of the micro-batches that `closes` told of.

        Args:
            count: How many.
            updates: How many updates they made: a window may make none.
        """
        if count:
            made = self._state.updates + updates
            self._state = self._ahead[count - 1]._replace(updates=made)

    def reset(self) -> None:
        """Starts an empty window, of the length that this one had."""
        self._state = self._state._replace(position=0)

    def count_from(self, updates: int) -> None:
        """Says how many updates the optimizer made, if no window is open."""
        if not self.is_open:
            self._state = _State(0, 0, updates)


class Schedule:
    """How many micro-batches make a window, by epoch or by update.

    Args:
        steps: int >= 1; a dict of them by the first epoch (or number of updates
            before the window) of each, which starts at 0; or a function of that
            number (int >= 0).
        by: "epoch" or "update".

    Raises:
        TypeError, ValueError: If `steps` or `by` is none of these.
    """

    def __init__(self, steps: Steps, by: str = "epoch") -> None:
        self._function: Callable[[int], int] | None = None
        self._by_first: dict[int, int] = {}
        self._by = by
        if isinstance(steps, dict):
            self._by_first = _checked_dict(steps, by)
        elif callable(steps):
            check_calls("steps", steps, 0)
            self._function = steps
        else:
            number = "epoch" if by == "epoch" else "number of updates"
            rule = (
                "`steps` must be an integer >= 1, a dict of them by first "
                f"{by}, or a function of the {number}."
            )
            steps = checked_integer(steps, rule, received("steps", steps))
            if by != "epoch":
                raise ValueError(
                    f'`by="{by}"` must be given with a dict, or a function, of '
                    f"the {number}. Received: steps={steps}, which is the "
                    "same for all. Leave `by` out."
                )
            self._by_first = {0: steps}
        self.steps = steps

    @property
    def is_always_one(self) -> bool:
        """Whether every micro-batch is a window."""
        return set(self._by_first.values()) == {1}

    @property
    def is_by_update(self) -> bool:
        """Whether windows may differ in length in an epoch."""
        return self._by == "update"

    def at(self, number: int) -> int:
        """The number of micro-batches of a full window.

        Args:
            number: The epoch, or the number of updates before the window.

        Raises:
            TypeError, ValueError: If the user's function returns something
                else than an integer >= 1. What it raises itself is passed on.
        """
        if self._function is None:
            return self._by_first[max(n for n in self._by_first if n <= number)]
        steps = self._function(number)
        kind = type(steps).__name__
        return checked_integer(
            steps,
            "The function `steps` must return an integer >= 1.",
            f"Received: {steps!r} ({kind}) for {self._by} {number}.",
        )

    def change_after(self, number: int) -> tuple[int, int] | None:
        """The next number with another length, and that, as far as is known."""
        later = sorted(n for n in self._by_first if n > number)
        return (later[0], self._by_first[later[0]]) if later else None


def check_by(by: Any, steps: Any) -> None:
    """Checks what `steps` is to be asked by.

    Raises:
        TypeError, ValueError: If it is neither "epoch" nor "update", or there
            are no `steps`.
    """
    rule = '`by` must be "epoch" or "update".'
    if not isinstance(by, str):
        raise TypeError(f"{rule} {received('by', by)}")
    if by not in ("epoch", "update"):
        raise ValueError(f"{rule} {received('by', by)}")
    if by == "update" and steps is None:
        raise ValueError(
            '`by="update"` must be given with `steps`. Received: none. With '
            "`micro_batch_size` each batch is a window: have the data change "
            "its size."
        )


def checked_steps(steps: Any) -> int:
    """`steps` where there are no epochs: an integer >= 1.

    Raises:
        TypeError, ValueError: If it is something else.
    """
    rule = "`steps` must be an integer >= 1."
    return checked_integer(steps, rule, received("steps", steps))


def _checked_dict(steps: dict[Any, Any], by: str) -> dict[int, int]:
    for first, value in steps.items():
        checked_integer(
            first,
            f"The keys of `steps` must be {by}s, integers >= 0.",
            f"Received: {first!r} ({type(first).__name__}) in steps={steps!r}.",
            least=0,
        )
        checked_integer(
            value,
            "The values of `steps` must be integers >= 1.",
            f"Received: {value!r} ({type(value).__name__}) for {by} {first}.",
        )
    if 0 not in steps:
        raise ValueError(
            f"A dict of `steps` must start at {by} 0. "
            f"{received('steps', steps)}"
        )
    return {int(first): int(value) for first, value in steps.items()}
