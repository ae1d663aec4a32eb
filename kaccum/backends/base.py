"""What kaccum asks of a framework: a class, of which each has a subclass.

Knows none of them, and nothing of the rest of kaccum. What is right for most
frameworks stands here; a subclass replaces what is not.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
from keras import ops

from kaccum.backends import arrays
from kaccum.backends.runner import Runner, Step
from kaccum.backends.tester import Tester, TestOfParts


class SumSpec(NamedTuple):
    """A sum that is to be made.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        beside: A variable whose device, or layout, it shares, or `None`.
    """

    shape: Any
    dtype: str
    beside: Any = None


class Backend(abc.ABC):
    """How sums are kept, gradients added, batches cut and steps run."""

    # Sums: variables of kaccum's own, which Keras does not know of.

    @abc.abstractmethod
    def new_sums(self, specs: Sequence[SumSpec]) -> list[Any]:
        """Sums of zeros, made outside of what is being traced.

        Which variables have gradients is first known inside of a trace. Each
        replica has sums of its own.
        """

    @abc.abstractmethod
    def values_of(self, sums: Sequence[Any]) -> list[Any]:
        """What sums hold now, on all replicas where none asks."""

    @abc.abstractmethod
    def take(self, sums: Sequence[Any]) -> list[Any]:
        """What sums hold, whose memory is then no longer theirs.

        What is computed of it next can be computed in place. Until `empty` the
        sums must not be used.
        """

    @abc.abstractmethod
    def assign(self, sums: Sequence[Any], values: Sequence[Any]) -> None:
        """`total = value`, for each."""

    @abc.abstractmethod
    def increase(self, sums: Sequence[Any], values: Sequence[Any]) -> None:
        """`total += value`, for each."""

    @abc.abstractmethod
    def add_weighted(
        self, sums: Sequence[Any], gradients: Sequence[Any], weight: Any
    ) -> None:
        """`total += weight * gradient`, each in one pass over memory.

        Args:
            sums: The sums.
            gradients: Tensors, also sparse ones.
            weight: Scalar, or a float 1.0, by which nothing is multiplied.
        """

    def lend(self, sums: Sequence[Any]) -> None:
        """Has the next gradients of Keras's own step be added as they arise.

        Args:
            sums: Those that `add_weighted` gets next, by 1.0. Where a framework
                adds to them by itself, it is what they hold then that
                `add_weighted` gets as the gradients.
        """
        return None

    @abc.abstractmethod
    def divided(self, tensors: Sequence[Any], by: Any) -> list[Any]:
        """The tensors divided by a scalar, zeros where that is zero.

        In their own memory, where they were taken.
        """

    @abc.abstractmethod
    def empty(self, sums: Sequence[Any], after: Sequence[Any] = ()) -> None:
        """Makes sums zero, also those that were released.

        Args:
            sums: The sums.
            after: Where given, for each sum a variable, or `None`. Its last
                assignment comes first, and its update is not to take memory at
                the same time as what the sum holds and its zeros.
        """

    @abc.abstractmethod
    def release(self, sums: Sequence[Any]) -> None:
        """Frees the memory of sums."""

    def check_add(self) -> None:
        """Checks that sums can be changed here, in a loop of the user's own.

        Raises:
            RuntimeError: In a function that JAX traces.
        """
        return None

    # Gradients.

    def gradients_of(
        self, loss: Callable[[], Any], variables: Sequence[Any]
    ) -> list[Any]:
        """The gradients of what `loss` returns, a tensor or `None` each."""

        def function(_: Sequence[Any]) -> tuple[Any, Any]:
            return loss(), ()

        _, found, _ = self.gradients_through(function, variables, [])
        return [g if g is None else self.dense(g) for g in found]

    def squared_norm(self, gradients: Sequence[Any], *, is_xla: bool) -> Any:
        """The sum of the squares of all elements, a scalar float32.

        Args:
            gradients: Tensors, also sparse ones.
            is_xla: Whether XLA compiles it.
        """
        total = ops.zeros((), "float32")
        for gradient in gradients:
            squares = ops.square(ops.cast(self.dense(gradient), "float32"))
            # On a processor XLA is twice as fast along the first axes.
            first = tuple(range(len(squares.shape) - 1))
            total = total + ops.sum(ops.sum(squares, first or None))
        return total

    #: Whether variables that a step changes are those of a scope.
    is_stateless = False

    @abc.abstractmethod
    def gradients_through(
        self,
        function: Callable[[Sequence[Any]], tuple[Any, Any]],
        variables: Sequence[Any],
        tensors: Sequence[Any],
    ) -> tuple[Any, list[Any], list[Any]]:
        """The gradients of what a function of tensors returns.

        Args:
            function: It returns a scalar, and nested tensors beside.
            variables: Variables that it uses, perhaps.
            tensors: What it is called with.

        Returns:
            What it returned beside; the gradients with respect to `variables`,
            and with respect to `tensors`, a tensor or `None` each.
        """

    def dense(self, gradient: Any) -> Any:
        """A gradient as a tensor: repeated rows of a sparse one add up."""
        return gradient

    def all_finite(self, gradients: Sequence[Any]) -> Any:
        """Whether no gradient holds a NaN or an infinity, a scalar bool."""
        finite = [ops.all(ops.isfinite(g)) for g in gradients if g is not None]
        return ops.all(ops.stack(finite))

    def zero_unless(self, where: Any, gradients: Sequence[Any]) -> list[Any]:
        """The gradients, or zeros of their shapes where `where` is false."""
        return [
            g if g is None else ops.where(where, g, ops.zeros_like(g))
            for g in gradients
        ]

    @abc.abstractmethod
    def differentiating_twice(
        self,
    ) -> AbstractContextManager[Callable[..., list[Any]]]:
        """A context of a step, in which a second gradient can be taken.

        Of another number than its loss, from the same forward pass. It is
        entered before that, with a function of `(loss, variables)`.
        """

    def difference(self, gradient: Any, other: Any) -> Any:
        """A gradient without another one, which may be `None`."""
        if other is None:
            return gradient
        return self.dense(gradient) - self.dense(other)

    def snapshot(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """The gradients as they are now, whatever a step makes of them next."""
        return gradients

    # Traces: functions that a framework records once, to compile them.

    #: Whether it ever does.
    traces = True

    @abc.abstractmethod
    def is_eager(self) -> bool:
        """Whether what is called now is run now."""

    @abc.abstractmethod
    def trace(self) -> Any:
        """What is being traced, to be compared by `==`; `None` for nothing.

        What a user's own compiled function does is another trace than that of
        the step: it is traced once, and outlives the step.
        """

    def outside_of_traces(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, called where nothing is traced.

        What it makes is for all replicas.
        """
        return make()

    def making_variables_outside(self) -> AbstractContextManager[None]:
        """A context that makes variables outside of what is being traced.

        They hold their first value at once, and the function, which does not
        own them, need not be traced a second time.
        """
        return contextlib.nullcontext()

    def knows_shapes(self) -> bool:
        """Whether Keras knows the size of a batch while a step runs."""
        return True

    def after(self, data: Any) -> AbstractContextManager[None]:
        """A context whose operations wait for every tensor in `data`."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def positive(
        self, total: Any, message: str
    ) -> AbstractContextManager[None]:
        """A context that is entered only where `total > 0`.

        Raises:
            RuntimeError: Elsewhere; in a graph of TensorFlow,
                `tf.errors.InvalidArgumentError`.
        """

    # Several devices.

    def check_devices(self, model: keras.Model) -> None:
        """Checks that gradients can be accumulated where a model trains.

        Raises:
            RuntimeError: If it trains under a strategy that is not supported,
                or would be compiled by XLA for several replicas.
        """

    @abc.abstractmethod
    def devices(self, count: int) -> Any:
        """What makes a model train on so many GPUs, or parts of the processor.

        To be called before anything is computed.

        Raises:
            RuntimeError: Where models train on one device only.
        """

    def replicas_of(self, model: keras.Model) -> int:
        """The number of replicas that a model trains on."""
        return 1

    def shares_of(self, model: keras.Model) -> int:
        """How many devices of this process share each batch of a `fit`."""
        return 1

    def replicas(self) -> int:
        """The number of replicas at work."""
        return 1

    def may_be_empty(self, data: Any) -> bool:
        """Whether a replica's batch may have no examples.

        Args:
            data: What its `train_step` gets.
        """
        return False

    def scope_of(self, model: keras.Model) -> AbstractContextManager[Any]:
        """A context in which variables are made for all replicas of a model."""
        return contextlib.nullcontext()

    def sum_over_replicas(self, tensors: Sequence[Any]) -> list[Any]:
        """The tensors, each summed over the replicas, in a single all-reduce.

        To be called by every replica.

        Raises:
            RuntimeError: If processes have different ones.
        """
        return list(tensors)

    def meeting(self, group: Any) -> Any:
        """What `together` takes, of a group of processes, or of `None`.

        Raises:
            RuntimeError: Where no processes train together so.
        """
        if group is not None:
            raise RuntimeError(
                "`process_group` must be left out where Keras runs on "
                f"{keras.backend.backend()}. Received: {group!r}."
            )
        return None

    def together(self, meeting: Any) -> AbstractContextManager[None]:
        """A context in which processes train together, each a replica."""
        return contextlib.nullcontext()

    def are_sums_aligned(self) -> bool:
        """Whether replicas must have sums of the same variables.

        Where each knows of its own gradients only.
        """
        return False

    def shown(self, value: Any) -> Any:
        """What of a number of one replica Keras shows as it is."""
        return value

    def as_row(self, value: Any) -> Any:
        """A tensor with a row for each replica: this one's value, and zeros.

        Summed over the replicas it holds the values of all.
        """
        return ops.convert_to_tensor(value)[None]

    def rows_of(self, tensor: Any) -> list[Any]:
        """The values of all replicas, of a sum of what `as_row` returned."""
        return [tensor[0]]

    def of_whole_gradients(self, optimizer: Any) -> dict[str, Callable]:
        """What an optimizer does where each replica has the whole gradient.

        Returns:
            By their names, functions that stand in for methods of `optimizer`.
        """
        return {}

    # Batches.

    @abc.abstractmethod
    def examples_in(self, batch: Any) -> list[int]:
        """The number of examples of a batch of `fit`, for each replica.

        Args:
            batch: Nested tensors (or, under a strategy, the replicas' own
                ones), each with the examples along its first axis.

        Raises:
            ValueError: If they have not.
        """

    @abc.abstractmethod
    def cut(
        self, batch: Any, sizes: list[list[int]], model: keras.Model
    ) -> Iterator[Any]:
        """The micro-batches of a batch, one after the other.

        Args:
            batch: As in `examples_in`.
            sizes: How many examples each of them has, for each replica.
            model: What trains on them.
        """

    def logits_of(self, tensor: Any) -> Any:
        """The logits that Keras's losses use instead of an output, or `None`.

        Its activations leave them in an attribute.
        """
        return None

    def joined(self, parts: Sequence[Any]) -> Any:
        """What was cut, in one piece again, while a step of a replica runs."""
        return arrays.joined(parts)

    def first_of(self, batch: Any, most: int, model: keras.Model) -> Any:
        """So many examples of a batch of one replica at most."""
        examples = sum(self.examples_in(batch))
        if examples <= most:
            return batch
        return next(self.cut(batch, [[most], [examples - most]], model))

    def of_one_replica(self, batch: Any) -> Any:
        """The part of a batch of `fit` that the first replica trains on."""
        return batch

    # Memory.

    @abc.abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that memory ran out."""

    @abc.abstractmethod
    def out_of_memory(
        self, error: BaseException, sentence: str
    ) -> BaseException:
        """The error again, with a sentence more.

        Args:
            error: One that `is_out_of_memory`.
            sentence: What to add to its message.
        """

    def peak_memory(self) -> int | None:
        """The most bytes that the device held, or `None` if it does not tell.

        Since `forget_peak_memory`, where it can forget.
        """
        return None

    def forget_peak_memory(self) -> None:
        """Starts to measure anew."""

    # Steps.

    def before(self, variable: Any) -> Any:
        """What a variable holds before a step assigns it.

        `None` where the step returns its changes, and assigns nothing.
        """
        return ops.copy(ops.convert_to_tensor(variable))

    def differentiating(self) -> Sequence[Any]:
        """The module whose `grad` and `value_and_grad` steps call, if any.

        They are called as JAX's are.
        """
        return ()

    def differentiated(
        self,
        function: Callable[..., Any],
        lists: Sequence[list[Any]],
        traced_further: Callable[[], AbstractContextManager[None]],
        second: Any,
        *,
        argnums: Any,
        has_aux: bool,
        returns_value: bool,
        **options: Any,
    ) -> Callable[..., Any]:
        """A function that computes the gradient of another one.

        What is heard while that is traced is of use outside of it only if it
        leaves it as auxiliary output.

        Args:
            function: The function.
            lists: What `function` appends tensors to, in tuples.
            traced_further: A context in which to call it.
            second: What `differentiating_twice` gave, or `None`.
            argnums: With respect to which arguments.
            has_aux: Whether it returns more than a value.
            returns_value: Whether its value is wanted, too.
            **options: More of the framework's own.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def runner(self, model: keras.Model, step: Step) -> Runner:
        """What runs a training step.

        Args:
            model: A compiled `keras.Model` whose `train_function` is made.
            step: What its training step becomes.
        """

    @abc.abstractmethod
    def tester(
        self, model: keras.Model, test: TestOfParts, runner: Any
    ) -> Tester:
        """What runs a test step on batches that are cut.

        Args:
            model: A compiled `keras.Model`.
            test: What its test step becomes.
            runner: What `runner` returned.
        """

    # Tests and benchmarks.

    @abc.abstractmethod
    def full_precision(self) -> AbstractContextManager[None]:
        """A context in which products are as precise as their dtypes.

        GPUs multiply float32 by 10 bits of the mantissa (TF32) where they may:
        then batches of other sizes differ in the third digit.
        """

    @abc.abstractmethod
    def device_name(self) -> str:
        """The device that is computed on by default."""
