"""When a window closes. Counts micro-batches, knows nothing of gradients."""

from __future__ import annotations


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
