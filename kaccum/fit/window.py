"""When a window closes. Counts micro-batches, knows nothing of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

from kaccum.checks import check_calls, checked_integer, received

Steps = Union[int, dict[int, int], Callable[[int], int]]


class Window:
    """The position inside the open window.

    Args:
        steps: int >= 1, the number of micro-batches of a full window.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._position = 0

    @property
    def is_open(self) -> bool:
        """Whether micro-batches were added since the last update."""
        return self._position > 0

    def closes(self, count: int) -> list[bool]:
        """Tells which of the next `count` micro-batches close a window."""
        return [
            (self._position + i + 1) % self.steps == 0 for i in range(count)
        ]

    def advance(self, count: int) -> None:
        """Moves on by `count` micro-batches."""
        self._position = (self._position + count) % self.steps

    def reset(self) -> None:
        """Starts an empty window."""
        self._position = 0


class Schedule:
    """How many micro-batches make a window, epoch by epoch.

    Args:
        steps: int >= 1; a dict of them by the first epoch of each, which starts
            at epoch 0; or a function of the epoch (int >= 0).

    Raises:
        TypeError, ValueError: If `steps` is none of these.
    """

    def __init__(self, steps: Steps) -> None:
        self._function: Callable[[int], int] | None = None
        self._by_epoch: dict[int, int] = {}
        if isinstance(steps, dict):
            self._by_epoch = _checked_dict(steps)
        elif callable(steps):
            check_calls("steps", steps, 0)
            self._function = steps
        else:
            rule = (
                "`steps` must be an integer >= 1, a dict of them by first "
                "epoch, or a function of the epoch."
            )
            steps = checked_integer(steps, rule, received("steps", steps))
            self._by_epoch = {0: steps}
        self.steps = steps

    @property
    def is_always_one(self) -> bool:
        """Whether every micro-batch is a window."""
        return set(self._by_epoch.values()) == {1}

    def at(self, epoch: int) -> int:
        """The number of micro-batches of a full window in an epoch.

        Raises:
            TypeError, ValueError: If the user's function returns something
                else than an integer >= 1. What it raises itself is passed on.
        """
        if self._function is None:
            return self._by_epoch[max(e for e in self._by_epoch if e <= epoch)]
        steps = self._function(epoch)
        return checked_integer(
            steps,
            "The function `steps` must return an integer >= 1.",
            f"Received: {steps!r} ({type(steps).__name__}) for epoch {epoch}.",
        )


def checked_steps(steps: Any) -> int:
    """`steps` where there are no epochs: an integer >= 1.

    Raises:
        TypeError, ValueError: If it is something else.
    """
    rule = "`steps` must be an integer >= 1."
    return checked_integer(steps, rule, received("steps", steps))


def _checked_dict(steps: dict[Any, Any]) -> dict[int, int]:
    for epoch, value in steps.items():
        kind = type(epoch).__name__
        checked_integer(
            epoch,
            "The keys of `steps` must be epochs, integers >= 0.",
            f"Received: {epoch!r} ({kind}) in steps={steps!r}.",
            least=0,
        )
        checked_integer(
            value,
            "The values of `steps` must be integers >= 1.",
            f"Received: {value!r} ({type(value).__name__}) for epoch {epoch}.",
        )
    if 0 not in steps:
        raise ValueError(
            "A dict of `steps` must start at epoch 0. "
            f"{received('steps', steps)}"
        )
    return {int(epoch): int(value) for epoch, value in steps.items()}
