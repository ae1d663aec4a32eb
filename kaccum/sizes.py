"""How a batch is cut: how many micro-batches, of how many examples each.

Plain numbers, knows nothing of models or memory.
"""

from __future__ import annotations

from kaccum.checks import checked_integer, received

AUTO = "auto"


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

    @property
    def size(self) -> int | str:
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
            self._most = self._found = None
