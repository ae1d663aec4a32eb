"""What a model's `test_step` becomes where its batches are cut.

The layers that it calls run on micro-batches, one after the other; it gets
their outputs as of the whole batch, so that losses and metrics are those of
that. Knows no framework.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from kaccum.backends import backend
from kaccum.backends.arrays import joined
from kaccum.patches import patched
from kaccum.step import hooks
from kaccum.step.kinds import MEAN, SUM
from kaccum.step.outputs import Alone, Call, Given, Heard

if TYPE_CHECKING:
    from kaccum.step.differences import Differences
    from kaccum.step.kinds import Kinds

TestFunction = Callable[[Any], Any]

#: The most examples that a step of the user's own is tried on.
MOST = 8
#: What rounding explains, of the largest number.
ROUNDING = 1e-3


class TestStep:
    """A model's test step, on a batch that is cut.

    Args:
        model: A compiled `keras.Model`.
        kinds: What is known of the terms that its layers add to the loss.
        differences: What is told.
    """

    # No class of tests, for pytest.
    __test__ = False

    def __init__(
        self, model: keras.Model, kinds: Kinds, differences: Differences
    ) -> None:
        self.model = model
        self._kinds = kinds
        self._differences = differences
        self._hooks = hooks.of_test_steps(model)
        step = getattr(model.test_step, "__func__", None)
        # Whether its batches may be cut; `None` if that is to be tried.
        is_keras = step is keras.Model.test_step and all(
            getattr(type(model), name) is getattr(keras.Model, name)
            for name in ("compute_loss", "compute_metrics")
        )
        self._can_be_cut = True if is_keras else None
        # The calls that are not of examples, by their order.
        self._alone: set[int] = set()

    @contextlib.contextmanager
    def overheard(self) -> Iterator[None]:
        """Around whatever calls `hear` or `run`, and not inside."""
        with patched(self._hooks):
            yield

    def instead_of(
        self, test_step: TestFunction
    ) -> contextlib.AbstractContextManager[None]:
        """A context in which `test_step` is that of the model."""
        return hooks.replacing_step(self.model, "test_step", test_step)

    def hear(self, data: Any, test_step: TestFunction) -> list[Call]:
        """Runs the step for what its layers return, and for nothing else.

        Args:
            data: A micro-batch.
            test_step: Function of `data`.
        """
        heard = Heard(data)
        with heard.running():
            test_step(data)
        return heard.calls

    def run(
        self,
        data: Any,
        parts: Sequence[Sequence[Call | None]],
        test_step: TestFunction,
    ) -> Any:
        """Runs the step on a batch.

        Args:
            data: The batch.
            parts: Of each of its micro-batches what `hear` returned; `None`
                stands for calls that are to run. Without any all of them do.
            test_step: Function of `data` that returns logs.

        Returns:
            The logs.
        """
        if not parts:
            with Alone().running():
                return test_step(data)
        with Given(parts, self._is_sum, backend().joined).running():
            return test_step(data)

    def can_be_cut(self, batch: Any, look: Callable[..., Any]) -> bool:
        """Whether the step calls layers on the examples of its batch only.

        One of the user's own is tried, on some examples and on two parts of
        them: random numbers that it draws, say, would be other ones.

        Args:
            batch: What it gets, on one replica, of 2 examples at least.
            look: As of `Tester.look`.
        """
        if self._can_be_cut is None:
            self._can_be_cut = self._try_on(batch, look)
        return self._can_be_cut

    def _try_on(self, batch: Any, look: Callable[..., Any]) -> bool:
        try:
            few = backend().first_of(batch, MOST, self.model)
            count = sum(backend().examples_in(few))
            halves = [[count // 2], [count - count // 2]]
            parts = list(backend().cut(few, halves, self.model))
            with self.overheard():
                differences = look(self._differing, (few, parts))
            if all(float(each) <= ROUNDING for each in differences):
                return True
        except Exception as error:
            # What cannot be tried can still be run as it is.
            self.leave_whole(error)
            return False
        self.leave_whole()
        return False

    def leave_whole(self, error: Exception | None = None) -> None:
        """Says that batches cannot be cut, and why not."""
        self._can_be_cut = False
        reason = "that calls a layer on other numbers for the same examples"
        if error is not None:
            text = str(error).splitlines() or [""]
            reason = f"that cannot be tried ({type(error).__name__}: {text[0]})"
        self._differences.tell(
            "test_step",
            "A `test_step` must call layers on the examples of its batch, and "
            "on nothing that is random, for validation to be cut into "
            "micro-batches with the results of whole batches. Received: a "
            f"`test_step` of {type(self.model).__name__} {reason}. Validation "
            "is not cut. If it does not fit in memory, write a smaller "
            "`validation_batch_size`.",
        )

    def _differing(self, test_step: TestFunction, batches: Any) -> list[Any]:
        """How much the arguments of layers differ: scalars."""
        few, parts = batches
        heard = []
        for part in parts:
            heard.append(Heard(part))
            with heard[-1].running():
                test_step(part)
        sizes = [backend().examples_in(part) for part in parts]
        calls = joinable([each.calls for each in heard], sizes)
        given = Given(calls, self._is_sum, joined)
        with given.running():
            test_step(few)
        if any(len(h.arguments) != len(given.arguments) for h in heard):
            return [ops.convert_to_tensor(float("inf"))]
        rows = list(zip(given.arguments, *(h.arguments for h in heard)))
        self._alone = {
            i for i, row in enumerate(rows) if len(set(map(_shapes, row))) == 1
        }
        return [
            difference
            for whole, *others in rows
            for difference in _differences_of(whole, others)
        ]

    def joinable(
        self, heard: Sequence[Sequence[Call]], sizes: Sequence[list[int]]
    ) -> list[list[Call | None]]:
        """What `run` gets, of what was heard of parts of these sizes."""
        return joinable(heard, sizes, self._alone)

    def _is_sum(self, layer: keras.Layer, place: int) -> bool:
        is_model = layer is self.model
        kind = self._kinds.of_added(place) if is_model else None
        if kind not in (MEAN, SUM):
            self._differences.tell(
                "terms of validation",
                "A term that a layer adds to the loss must be known to be a "
                "mean or a sum over examples for validation to be cut exactly. "
                f"Received: one of {layer.name!r} that is taken for a mean, as "
                "activity regularizers are. If it is none, write "
                "`validation_batch_size` as small as `micro_batch_size`.",
            )
        return kind == SUM


def joinable(
    parts: Sequence[Sequence[Call]],
    sizes: Sequence[list[int]],
    alone: Collection[int] = (),
) -> list[list[Call | None]]:
    """The calls of each micro-batch, `None` for those that are not of examples.

    Args:
        parts: What was heard of each.
        sizes: How many examples each has, for each replica.
        alone: Others that are not, by their order.
    """
    rows = [
        [
            call if _has(call.outputs, size) else None
            for call, size in zip(calls, sizes)
        ]
        for calls in zip(*parts)
    ]
    rows = [
        [None] * len(row) if None in row or i in alone else row
        for i, row in enumerate(rows)
    ]
    return [list(column) for column in zip(*rows)]


def _has(outputs: Any, size: list[int]) -> bool:
    try:
        return backend().examples_in(outputs) == size
    except ValueError:
        return False


def _differences_of(whole: Any, parts: Sequence[Any]) -> list[Any]:
    rows = zip(*(_tensors(argument) for argument in (whole, *parts)))
    found = []
    for tensor, *others in rows:
        joined = [tensor] * len(others)
        if tuple(others[0].shape) != tuple(tensor.shape):
            joined, others = [tensor], [ops.concatenate(others)]
        for mine, other in zip(joined, others):
            mine, other = (ops.cast(each, "float32") for each in (mine, other))
            largest = ops.max(ops.abs(mine)) + 1e-30
            found.append(ops.max(ops.abs(mine - other)) / largest)
    return found


def _shapes(argument: Any) -> tuple[Any, ...]:
    return tuple(tuple(tensor.shape) for tensor in _tensors(argument))


def _tensors(argument: Any) -> list[Any]:
    leaves = keras.tree.flatten(argument)
    return [leaf for leaf in leaves if hasattr(leaf, "shape")]
