"""The compiled functions: *add*, which runs a step, and *update*."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import keras

from kaccum.backends.arrays import Equal, equal_parts
from kaccum.backends.jax.batches import (
    Batches,
    batch_of,
    can_be_given_whole,
    length_of,
    part_of,
    uses_convolutions,
)
from kaccum.backends.jax.sums import Sum, constrained, placed
from kaccum.backends.runner import Ran, Runner, Step

if TYPE_CHECKING:
    from kaccum.backends.base import Backend


class State(NamedTuple):
    """The values that Keras passes to a step, or their variables, in lists."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]


class Values(Sequence[Any]):
    """Values of variables, as Keras's `fit` holds them between two steps.

    It keeps them in an attribute of the model, where it would look at each item
    of a list at every step (3.15).
    """

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


class _NewSums(Exception):
    """Says that what was traced needs more arguments."""

    def __init__(self, sums: list[Sum]) -> None:
        super().__init__()
        self.sums = sums


class JaxRunner(Runner):
    """Compiled versions of a training step.

    Between them, this holds what Keras passes as the state. While one is
    traced, a scope stands for the variables and the sums stand for themselves,
    so that a step finds them as on other backends. *Add* is not given the
    weights and the optimizer's variables to change, only to read.
    """

    def __init__(
        self, model: keras.Model, step: Step, backend: Backend
    ) -> None:
        super().__init__(model, step, backend)
        # The model may be compiled with another one before the last update.
        self._optimizer = model.optimizer
        # What the compiled functions get and return, in this order.
        self._sums: list[Sum] = list(step.sums.all)
        self._is_finding = self._has_found = False
        # Of a step that was found: whether it can run in a loop.
        self._can_loop = False
        # The shapes of batches whose parts do.
        self._looped_over: Any = None
        # A `State` while the train function runs.
        self._state: Any = None
        self._before: Any = None
        self._lasting: list[Any] = []
        # What is donated changes in its own memory. An error in *add* leaves
        # what it was called with, but for the sums.
        self._add = self._compiled(self._traced_add, donated=[1])
        self._adds = self._compiled(self._traced_adds, donated=[1])
        self._parts: dict[Equal, Any] = {}
        self._logs: Any = None
        self._may_stack = False
        # The state before the first window.
        self._first: Any = None
        self._update = self._compiled(self._traced_update, donated=[0, 1])
        self._passes: dict[str, Any] = {}

    def called(self, run: Callable[[Any], Any], *arguments: Any) -> Any:
        state, iterator = arguments
        self._state = State(
            *(
                each.values if isinstance(each, Values) else each
                for each in state
            )
        )
        before = self._state
        if self._is_first_call:
            self._first = before
        try:
            logs = run(Batches(iterator, self._may_stack))
        except BaseException:
            # An error may be told late: what was computed since then is not to
            # be had, nor what an update has taken the memory of.
            known = [self._state, before, self._first]
            self._state = next(filter(_is_sound, known), self._state)
            self._first = None
            # Keras has the state of before, whose memory may be used again.
            self._hand_over()
            raise
        finally:
            new, self._state = self._state, None
            if not self._is_first_update:
                self._first = None
        return logs, tuple(map(Values, new))

    def start(self, *, is_for_fit: bool) -> None:
        super().start(is_for_fit=is_for_fit)
        self._may_stack = is_for_fit and self.model.steps_per_execution > 1

    def pulled(self, batches: Any, count: int) -> tuple[list[Any], Any]:
        return batches.peek(count), batches

    def told(self, function: Callable[[int], Any], updates: int) -> None:
        # It may look at the model, and change it.
        if self._state is None:
            function(updates)
            return
        self._hand_over()
        self.model.jax_state_sync()
        self._state = None
        try:
            function(updates)
        finally:
            self._state = self._held_by_variables()
        self._hand_over()

    def remember(self) -> None:
        super().remember()
        self._before = self._state
        # What they hold is donated.
        self._lasting = [
            (total, jnp.copy(total.value)) for total in self._step.sums.lasting
        ]

    def look(self, function: Callable[[Any], Any], data: Any) -> Any:
        variables = self._variables
        state = self._state or self._held_by_variables()

        def traced(state: State, data: Any) -> Any:
            with _scope(variables, state, collect_losses=True):
                return function(data)

        return self._compiled(traced, donated=[])(state, data)

    def wait(self) -> None:
        held: Any = self._state
        if held is None:
            # Syncing could overwrite what the user has set since an error.
            is_synced = self.model._jax_state_synced
            variables = self._held_by_variables
            held = variables() if is_synced else self.model._jax_state
        self.wait_for([[total.value for total in self._sums], held])

    def wait_for(self, values: Any) -> None:
        jax.block_until_ready(values)

    def restore(self) -> None:
        super().restore()
        self._state = self._before
        for total, value in self._lasting:
            total.value = jnp.copy(value)

    def forget(self) -> None:
        self._before = None

    def run(self, batches: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        if not isinstance(batches, Batches):
            # What a batch was cut into.
            batches = Batches(batches, False)
        batches.pull()
        if self._is_stack(batches.stack, is_plain):
            return self._run_stack(batches.stack, closes, is_plain)
        logs, ran, updates = None, 0, 0
        for is_last in closes:
            batch = next(batches, self)
            if batch is self:
                break
            if is_plain:
                one = iter([batches.single(batch)])
                logs, state = self._plain(tuple(self._state), one)
                self._state = State(*state)
                updates += 1
            else:
                logs = self._run_add(batch)
                updates += self.update() if is_last else 0
            ran += 1
        if ran == 0:
            raise StopIteration
        return Ran(logs, ran, updates)

    def _run_stack(self, stack: Any, closes: list[bool], is_plain: bool) -> Ran:
        """Runs the micro-batches of each window of a stack in one call."""
        closes = closes[: length_of(stack)]
        if is_plain:
            logs, state = self._plain(tuple(self._state), iter([stack]))
            self._state = State(*state)
            return Ran(logs, len(closes), len(closes))
        logs, start, updates = None, 0, 0
        for stop, is_last in enumerate(closes, 1):
            if not is_last and stop < len(closes):
                continue
            logs = self._run_adds(stack, start, stop)
            updates += self.update() if is_last else 0
            start = stop
        return Ran(logs, len(closes), updates)

    def _is_stack(self, stack: Any, is_plain: bool) -> bool:
        """Whether it is one, which runs in one call."""
        if stack is None or not self._is_compiled:
            return False
        if is_plain:
            return True
        self._find_first(stack, lambda stack: batch_of(stack, 0))
        return self._can_loop

    def _run_adds(self, stack: Any, start: int, stop: int) -> Any:
        return self._moving(self._adds, (stack, start, stop, self._logs))

    def run_parts(self, batch: Any, sizes: list[list[int]]) -> Any:
        groups = equal_parts(sizes)
        if len(groups) == len(sizes) or not self._can_loop_over(batch):
            return super().run_parts(batch, sizes)
        _, size, _, replicas = groups[0]
        self._find_first(batch, lambda whole: part_of(whole, 0, size, replicas))
        if not self._can_loop:
            return super().run_parts(batch, sizes)
        logs = None
        for parts in groups:
            if parts not in self._parts:
                traced = functools.partial(self._traced_parts, parts)
                self._parts[parts] = self._compiled(traced, donated=[1])
            logs = self._moving(self._parts[parts], (batch, self._logs))
        return logs

    def _can_loop_over(self, batch: Any) -> bool:
        """Whether a loop over parts of a batch saves more than it costs."""
        if not self._is_compiled or not can_be_given_whole(batch):
            return False
        # Each length of a batch is compiled anew, and each size of a part.
        shapes = jax.tree.map(lambda array: array.shape, batch)
        if self._looped_over is None:
            self._looped_over = shapes
        return bool(self._looped_over == shapes)

    def _find_first(
        self, data: Any, first_of: Callable[[Any], Any] = lambda data: data
    ) -> None:
        """Finds what sums a step has, and what else is to be known of it.

        Args:
            data: Data.
            first_of: Function of the data that returns a micro-batch of them.
        """
        if self._has_found or not self._is_compiled:
            return

        def traced(state: State, held: list[Any], data: Any) -> Any:
            return self._traced_add(state, held, first_of(data))

        jaxpr, ((logs, _, _), _) = self._find_sums(traced, data)
        # There XLA leaves convolutions as they are, which on a processor takes
        # ten times as long (JAX 0.10).
        is_on_processor = jax.default_backend() == "cpu"
        is_slow = is_on_processor and uses_convolutions(jaxpr)
        # Others may be as long as a micro-batch.
        are_numbers = all(log.shape == () for log in jax.tree.leaves(logs))
        self._can_loop = are_numbers and not is_slow
        self._logs = jax.tree.map(
            lambda log: jnp.zeros(log.shape, log.dtype), logs
        )
        self._has_found = True

    def _run_add(self, data: Any) -> Any:
        self._find_first(data)
        return self._moving(self._add, data)

    def _moving(self, function: Any, data: Any) -> Any:
        """What a compiled function returns that may not update."""
        result, non_trainable, metrics = self._call(function, self._state, data)
        self._state = self._state._replace(
            non_trainable=non_trainable, metrics=metrics
        )
        return result

    @contextlib.contextmanager
    def with_state(self) -> Iterator[None]:
        if self._state is not None:
            yield
            return
        # Between two calls of the train function the variables have the state.
        self.model.jax_state_sync()
        self._state = self._held_by_variables()
        try:
            yield
            for variable, value in _pairs(self._variables, self._state):
                variable.assign(value)
        finally:
            self._state = None

    def passed(self, name: str, data: Any) -> Any:
        if name not in self._passes:
            run = getattr(self._step.whole, name)
            traced = functools.partial(self._traced_pass, run)
            self._passes[name] = self._compiled(traced, donated=[1])
            if self._is_compiled:
                self._find_sums(traced, data)
        return self._moving(self._passes[name], data)

    def state(self) -> list[Any]:
        state: list[Any] = self._state.non_trainable
        return state

    def return_to(self, state: list[Any]) -> None:
        self._state = self._state._replace(non_trainable=state)

    def iterations(self) -> int:
        if self._state is None:
            return super().iterations()
        iterations = self.model.optimizer.iterations
        optimizer = self._optimizer.variables
        places = [i for i, v in enumerate(optimizer) if v is iterations]
        return int(self._state.optimizer[places[0]])

    def _run_update(self) -> None:
        with self.with_state():
            self._update_state()

    def _update_state(self) -> None:
        trainable, non_trainable, optimizer, metrics = self._state
        new = self._call(
            self._update, (trainable, optimizer), (non_trainable, metrics)
        )
        self._state = State(*new)

    def _traced_add(self, state: State, held: list[Any], data: Any) -> Any:
        variables = self._variables

        def train_step(data: Any) -> tuple[Any, dict[int, Any]]:
            # In lists of its own, which it may change.
            given = tuple(list(group) for group in state)
            logs, new = self.model.train_step(given, data)
            assigned = {}
            before = _pairs(variables, state)
            for (variable, old), (_, value) in zip(
                before, _pairs(variables, State(*new))
            ):
                if value is not old:
                    assigned[id(variable)] = (variable, old)
                    scope.add_update((variable, value))
            return logs, assigned

        def whole_state() -> keras.StatelessScope:
            # Keras's own scopes know some of the variables only.
            return _scope(variables, _state_in(scope, variables))

        with self._holding(held), _scope(variables, state) as scope:
            with self._step.overheard():
                logs = self._step.run(
                    data, train_step, lambda variable: None, whole_state
                )
            new = _state_in(scope, variables)
            _check_still(state, new)
            _, non_trainable, _, metrics = self._placed(new)
            return (logs, non_trainable, metrics), self._held()

    def _traced_adds(self, state: State, held: list[Any], which: Any) -> Any:
        """Some micro-batches of a stack: one compiled loop for any number."""
        stack, start, stop, logs = which

        def add(i: Any, state: State, held: list[Any]) -> Any:
            return self._traced_add(state, held, batch_of(stack, i))

        return _loop(add, start, stop, state, held, logs)

    def _traced_parts(
        self, parts: Equal, state: State, held: list[Any], data: Any
    ) -> Any:
        """Parts of a batch."""
        batch, logs = data

        def add(i: Any, state: State, held: list[Any]) -> Any:
            start = parts.start + i * parts.size
            part = part_of(batch, start, parts.size, parts.replicas)
            return self._traced_add(state, held, part)

        return _loop(add, 0, parts.times, state, held, logs)

    def _traced_pass(
        self, run: Callable[..., Any], state: State, held: list[Any], data: Any
    ) -> Any:
        scope = _scope(self._variables, state, collect_losses=True)
        with self._holding(held), scope, self._step.overheard():
            result = run(data, lambda variable: None)
            new = _state_in(scope, self._variables)
            _, non_trainable, _, metrics = self._placed(new)
            return (result, non_trainable, metrics), self._held()

    def _traced_update(
        self, changing: Any, held: list[Any], others: Any
    ) -> Any:
        trainable, optimizer = changing
        non_trainable, metrics = others
        state = State(trainable, non_trainable, optimizer, metrics)
        variables = self._variables
        with self._holding(held), _scope(variables, state) as scope:
            self._step.update()
            self._step.empty()
            return self._placed(_state_in(scope, variables)), self._held()

    def _find_sums(self, traced: Callable[..., Any], data: Any) -> Any:
        """Finds the sums that what is traced has, before it is compiled.

        JAX would keep a trace that raises for good (0.10).

        Returns:
            What was traced, and the shapes and dtypes of what it returns.
        """
        self._is_finding = True
        held = [total.value for total in self._sums]
        try:
            return jax.make_jaxpr(
                lambda *arguments: traced(*arguments), return_shape=True
            )(self._state, held, data)
        finally:
            self._is_finding = False

    def _call(self, function: Any, first: Any, last: Any) -> Any:
        while True:
            held = [total.value for total in self._sums]
            try:
                result, held = function(first, held, last)
            except _NewSums as error:
                # Nothing has run. Which sums a step has is first known here.
                self._sums += error.sums
                continue
            except BaseException:
                # What they held was donated.
                for total in self._sums:
                    if total.value is not None and total.value.is_deleted():
                        total.fill()
                raise
            for total, value in zip(self._sums, held):
                total.value = value
            return result

    @contextlib.contextmanager
    def _holding(self, held: list[Any]) -> Iterator[None]:
        """A context in which the sums are those of the traced function."""
        before = [total.value for total in self._sums]
        for total, value in zip(self._sums, held):
            total.value = value
        try:
            yield
        finally:
            for total, value in zip(self._sums, before):
                total.value = value

    def _held(self) -> list[Any]:
        """What the sums hold at the end of a function.

        Raises:
            _NewSums: In a trace that made some: it starts anew, with them.
        """
        new = [t for t in self._step.sums.all if t not in self._sums]
        if new and self._is_compiled:
            for total in new:
                total.fill()
            if not self._is_finding:
                raise _NewSums(new)
        self._sums += new
        return [
            constrained(total.value, total.sharding) for total in self._sums
        ]

    def _placed(self, state: State) -> State:
        """What the variables hold at the end of a function."""
        return State(*map(placed, self._variables, state))

    @property
    def _is_compiled(self) -> bool:
        return self.model.jit_compile and not self.model.run_eagerly

    def _compiled(
        self, function: Callable[..., Any], donated: list[int]
    ) -> Callable[..., Any]:
        if not self._is_compiled:
            return function
        return jax.jit(function, donate_argnums=donated)

    @property
    def _variables(self) -> State:
        """The variables whose values Keras passes."""
        model = self.model
        return State(
            model.trainable_variables,
            model.non_trainable_variables,
            self._optimizer.variables,
            model.metrics_variables,
        )

    def _held_by_variables(self) -> State:
        return State(*([v.value for v in group] for group in self._variables))

    def _hand_over(self) -> None:
        """Makes the state what the variables get when they are synced.

        `fit` holds the values of variables, and gives them back where a
        callback or an error ends a step: those of the step before (Keras 3.15).
        """
        trainable, non_trainable, optimizer, metrics = self._state
        self.model._jax_state = {
            "trainable_variables": trainable,
            "non_trainable_variables": non_trainable,
            "optimizer_variables": optimizer,
            "metrics_variables": metrics,
        }
        self.model._jax_state_synced = False


def _is_sound(state: State | None) -> bool:
    """Whether it was computed without an error, and is still there."""
    if state is None:
        return False
    try:
        jax.block_until_ready(state)
    except Exception:
        return False
    return True


def _loop(
    add: Callable[[Any, State, list[Any]], Any],
    start: Any,
    stop: Any,
    state: State,
    held: list[Any],
    logs: Any,
) -> Any:
    """A compiled loop of `_traced_add`, which returns what the last one does.

    Args:
        add: Function of the number of a micro-batch, of the state, and of what
            sums hold.
        start: The number of the first one.
        stop: That after the last one.
        state: The state.
        held: What sums hold.
        logs: What logs are like.
    """

    def body(i: Any, carried: Any) -> Any:
        (_, non_trainable, metrics), held = carried
        now = state._replace(non_trainable=non_trainable, metrics=metrics)
        return add(i, now, held)

    first = ((logs, state.non_trainable, state.metrics), held)
    return jax.lax.fori_loop(start, stop, body, first)


def _pairs(variables: State, state: State) -> list[tuple[Any, Any]]:
    groups = zip(variables, state)
    return [pair for group, held in groups for pair in zip(group, held)]


def _scope(
    variables: State, state: State, **options: Any
) -> keras.StatelessScope:
    """A scope in which the variables hold the state."""
    return keras.StatelessScope(_pairs(variables, state), **options)


def _state_in(scope: keras.StatelessScope, variables: State) -> State:
    now = scope.get_current_value
    return State(*([now(v) for v in group] for group in variables))


def _check_still(before: State, after: State) -> None:
    """Checks that a step left to the optimizer what is the optimizer's."""
    for old, new in (
        (before.trainable, after.trainable),
        (before.optimizer, after.optimizer),
    ):
        if any(x is not y for x, y in zip(old, new)):
            raise RuntimeError(
                "The model's `train_step` must change weights and the "
                "optimizer's variables by `self.optimizer` only, for its "
                "gradients to be accumulated on JAX. Received: one that "
                "returned other values for them."
            )
