"""On JAX a step is a function of arrays: what it changes, it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend.core import get_opaque_trace_state

from kaccum.backends import arrays
from kaccum.backends.base import Backend, SumSpec
from kaccum.backends.jax.batches import is_on_devices, part_of
from kaccum.backends.jax.runner import JaxRunner
from kaccum.backends.jax.sums import Sum
from kaccum.backends.jax.tester import JaxTester
from kaccum.backends.runner import Runner, Step
from kaccum.backends.tester import Tester, TestOfParts

# A GPU's, and that of a compiled step on the processor (JAX 0.10).
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
# Taken at import: JAX's own.
_value_and_grad, _grad = jax.value_and_grad, jax.grad
with jax.ensure_compile_time_eval():
    _NO_TRACE = get_opaque_trace_state()


class Second:
    """The gradient of another number that the loss of a step is made of."""

    def __init__(self) -> None:
        self._loss: Any = 0.0
        self._gradients: list[Any] = []

    def __call__(self, loss: Any, variables: Sequence[Any]) -> list[Any]:
        """Says of what; in the list there are gradients when it is taken."""
        self._loss = loss
        return self._gradients

    def value_and_grad(self, function: Callable[..., Any]) -> Callable:
        """As JAX's, with respect to the first argument, and `has_aux`."""

        def derived(first: Any, *args: Any, **kwargs: Any) -> Any:
            def both(first: Any) -> Any:
                value, aux = function(first, *args, **kwargs)
                return (value, jnp.asarray(self._loss, value.dtype)), aux

            (value, _), pull, aux = jax.vjp(both, first, has_aux=True)
            one, zero = jnp.ones_like(value), jnp.zeros_like(value)
            (gradient,) = pull((one, zero))
            (self._gradients[:],) = pull((zero, one))
            return (value, aux), gradient

        return derived


class JaxBackend(Backend):
    """Sums hold arrays, or what stands for them in a trace."""

    def new_sums(self, specs: Sequence[SumSpec]) -> list[Sum]:
        return [Sum(*spec) for spec in specs]

    def values_of(self, sums: Sequence[Sum]) -> list[jax.Array]:
        return [total.value for total in sums]

    def take(self, sums: Sequence[Sum]) -> list[jax.Array]:
        # The memory of what is donated is used again by itself.
        return [total.value for total in sums]

    def assign(self, sums: Sequence[Sum], values: Sequence[Any]) -> None:
        for total, value in zip(sums, values):
            total.value = jnp.asarray(value, total.dtype)
            if total.sharding is not None and self.is_eager():
                total.value = jax.device_put(total.value, total.sharding)

    def increase(self, sums: Sequence[Sum], values: Sequence[Any]) -> None:
        for total, value in zip(sums, values):
            total.value = total.value + jnp.asarray(value, total.dtype)

    def add_weighted(
        self, sums: Sequence[Sum], gradients: Sequence[Any], weight: Any
    ) -> None:
        for total, gradient in zip(sums, gradients):
            # XLA leaves out a product with a constant 1.
            weighted = jnp.asarray(weight, total.dtype) * gradient.astype(
                total.dtype
            )
            total.value = total.value + weighted

    def divided(self, tensors: Sequence[Any], by: Any) -> list[Any]:
        return [
            tensor * jnp.where(by == 0, 0, 1 / by.astype(tensor.dtype))
            for tensor in tensors
        ]

    def empty(self, sums: Sequence[Sum], after: Sequence[Any] = ()) -> None:
        for total in sums:
            if self.is_eager():
                total.fill()
            else:
                total.value = jnp.zeros(total.shape, total.dtype)

    def release(self, sums: Sequence[Sum]) -> None:
        for total in sums:
            total.value = None

    def check_add(self) -> None:
        if not self.is_eager():
            raise RuntimeError(
                "Gradients must be accumulated outside of functions that JAX "
                "traces (`jax.jit`, `jax.grad`). Received: a call inside of "
                "one. Return the gradients from it."
            )

    is_stateless = True

    def gradients_through(
        self,
        function: Callable[[Sequence[Any]], tuple[Any, Any]],
        variables: Sequence[Any],
        tensors: Sequence[Any],
    ) -> tuple[Any, list[Any], list[Any]]:
        scope = keras.src.backend.get_stateless_scope()
        before = dict(scope.state_mapping)

        def inside(values: list[Any], tensors: list[Any]) -> Any:
            for variable, value in zip(variables, values):
                scope.add_update((variable, value))
            given = dict(scope.state_mapping)
            try:
                value, beside = function(tensors)
                # What it assigned leaves the gradient as auxiliary output.
                assigned = {
                    key: now
                    for key, now in scope.state_mapping.items()
                    if now is not given.get(key)
                }
            finally:
                scope.state_mapping.clear()
                scope.state_mapping.update(before)
            return value, (beside, assigned)

        values = [scope.get_current_value(variable) for variable in variables]
        (_, (beside, assigned)), found = _value_and_grad(
            inside, (0, 1), has_aux=True
        )(values, list(tensors))
        scope.state_mapping.update(assigned)
        return beside, list(found[0]), list(found[1])

    def is_eager(self) -> bool:
        return bool(get_opaque_trace_state() == _NO_TRACE)

    def trace(self) -> Any:
        return get_opaque_trace_state()

    def outside_of_traces(self, make: Callable[[], Any]) -> Any:
        with jax.ensure_compile_time_eval():
            return make()

    @contextlib.contextmanager
    def positive(self, total: Any, message: str) -> Iterator[None]:
        if not isinstance(total, jax.core.Tracer) and not int(total) > 0:
            raise RuntimeError(message)
        yield

    def before(self, variable: Any) -> None:
        return None

    @contextlib.contextmanager
    def differentiating_twice(self) -> Iterator[Second]:
        yield Second()

    def differentiating(self) -> Sequence[Any]:
        return (jax,)

    def differentiated(
        self,
        function: Callable[..., Any],
        lists: Sequence[list[Any]],
        traced_further: Callable[[], AbstractContextManager[None]],
        second: Second | None,
        *,
        argnums: Any,
        has_aux: bool,
        returns_value: bool,
        **options: Any,
    ) -> Callable[..., Any]:
        starts = [len(each) for each in lists]
        leaves: list[Any] = []
        structures: list[Any] = []

        def inside(*args: Any, **kwargs: Any) -> Any:
            for each, start in zip(lists, starts):
                del each[start:]
            with traced_further():
                result = function(*args, **kwargs)
            value, beside = result if has_aux else (result, None)
            heard = [each[start:] for each, start in zip(lists, starts)]
            leaves[:], structure = jax.tree.flatten(heard)
            structures[:] = [structure]
            arrays = [x for x in leaves if isinstance(x, jax.Array)]
            return value, (beside, jax.lax.stop_gradient(arrays))

        def outside(*args: Any, **kwargs: Any) -> Any:
            if second is None:
                derived = _value_and_grad(inside, argnums, True, **options)
            else:
                derived = second.value_and_grad(inside)
            (value, (beside, arrays)), gradient = derived(*args, **kwargs)
            left = iter(arrays)
            outer = [
                next(left) if isinstance(x, jax.Array) else x for x in leaves
            ]
            heard = jax.tree.unflatten(structures[0], outer)
            for each, start, entries in zip(lists, starts, heard):
                each[start:] = entries
            if returns_value:
                return ((value, beside) if has_aux else value), gradient
            return (gradient, beside) if has_aux else gradient

        return outside

    def devices(self, count: int) -> keras.distribution.DataParallel:
        jax.config.update("jax_num_cpu_devices", count)
        return keras.distribution.DataParallel(devices=device_names(count))

    def shares_of(self, model: keras.Model) -> int:
        return self._shares

    @property
    def _shares(self) -> int:
        distribution = keras.distribution.distribution()
        if distribution is None:
            return 1
        return int(distribution.num_model_replicas)

    def examples_in(self, batch: Any) -> list[int]:
        parts = self._shares
        return [arrays.examples_in(batch) // parts] * parts

    def cut(
        self, batch: Any, sizes: list[list[int]], model: keras.Model
    ) -> Iterator[Any]:
        if len(sizes) == 1:
            yield batch
            return
        start = 0
        for each in sizes:
            yield _part_of(batch, start, each[0], len(each))
            start += each[0]

    def joined(self, parts: Sequence[Any]) -> Any:
        distribution = keras.distribution.distribution()
        if distribution is None:
            return arrays.joined(parts)
        count = self._shares
        return jax.tree.map(lambda *each: _joined_on(count, each), *parts)

    def is_out_of_memory(self, error: BaseException) -> bool:
        # What was called before raises the one, what is new the other
        # (JAX 0.10).
        if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)):
            return any(text in str(error) for text in _OUT_OF_MEMORY)
        return isinstance(error, MemoryError)

    def out_of_memory(
        self, error: BaseException, sentence: str
    ) -> BaseException:
        return jax.errors.JaxRuntimeError(f"{error}\n{sentence}")

    def full_precision(self) -> AbstractContextManager[None]:
        context: Any = jax.default_matmul_precision("highest")
        return context

    def device_name(self) -> str:
        device: Any = jnp.zeros(()).device
        if device.platform == "cpu":
            return "CPU (not run on a GPU)"
        return f"{device.platform.upper()}, {device.device_kind}"

    def peak_memory(self) -> int | None:
        # It cannot forget.
        device: Any = jnp.zeros(()).device
        stats: dict[str, int] = device.memory_stats() or {}
        return stats.get("peak_bytes_in_use")

    def runner(self, model: keras.Model, step: Step) -> Runner:
        return JaxRunner(model, step, self)

    def tester(
        self, model: keras.Model, test: TestOfParts, runner: Any
    ) -> Tester:
        return JaxTester(model, test)


def device_names(count: int) -> list[str]:
    """So many GPUs, or parts of the processor where there are fewer."""
    names: list[str] = keras.distribution.list_devices()
    if len(names) < count:
        names = keras.distribution.list_devices("cpu")
    return names[:count]


def _part_of(batch: Any, start: int, size: int, parts: int) -> Any:
    if is_on_devices(batch):
        return _compiled_part_of(batch, start, size, parts)
    return arrays.part_of(batch, start, start + size)


def _joined_on(count: int, arrays: Sequence[Any]) -> jax.Array:
    """The examples of several parts, each of which so many devices have."""
    shape = arrays[0].shape[1:]
    if any(len(array) % count for array in arrays):
        return jnp.concatenate(arrays)
    split = [array.reshape(count, -1, *shape) for array in arrays]
    whole = jnp.concatenate(split, axis=1).reshape(-1, *shape)
    layout = keras.distribution.distribution().get_data_layout(whole.shape)
    return jax.lax.with_sharding_constraint(whole, layout.backend_layout)


_compiled_part_of = jax.jit(part_of, static_argnums=(2, 3))


BACKEND = JaxBackend()
