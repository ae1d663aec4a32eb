"""On PyTorch a step runs as it is: nothing is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch

from kaccum.backends import arrays
from kaccum.backends.base import SumSpec
from kaccum.backends.runner import Step
from kaccum.backends.tester import Tester, TestOfParts
from kaccum.backends.torch.processes import Processes
from kaccum.backends.torch.runner import TorchRunner, TorchTester, is_on_gpu
from kaccum.backends.torch.sums import Sum, add, lend


class TorchBackend(Processes):
    """Sums hold tensors, to which `backward` adds."""

    def new_sums(self, specs: Sequence[SumSpec]) -> list[Sum]:
        return [Sum(*spec) for spec in specs]

    def values_of(self, sums: Sequence[Sum]) -> list[torch.Tensor]:
        return [total.copy() for total in sums]

    def take(self, sums: Sequence[Sum]) -> list[torch.Tensor]:
        return [total.take() for total in sums]

    def assign(self, sums: Sequence[Sum], values: Sequence[Any]) -> None:
        for total, value in zip(sums, values):
            total.value = total.zeros().copy_(value.detach())

    def increase(self, sums: Sequence[Sum], values: Sequence[Any]) -> None:
        for total, value in zip(sums, values):
            if isinstance(value, torch.Tensor):
                value = value.detach().to(total.device, total.dtype)
            held = total.zeros() if total.value is None else total.value
            total.value = held + value

    def add_weighted(
        self, sums: Sequence[Sum], gradients: Sequence[Any], weight: Any
    ) -> None:
        add(sums, gradients, weight)

    def lend(self, sums: Sequence[Sum]) -> None:
        lend(sums)

    def divided(self, tensors: Sequence[Any], by: Any) -> list[Any]:
        for dtype in {tensor.dtype for tensor in tensors}:
            share = torch.where(by == 0, 0, 1 / by.to(dtype))
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            torch._foreach_mul_(alike, share)
        return list(tensors)

    def empty(self, sums: Sequence[Sum], after: Sequence[Any] = ()) -> None:
        for total in sums:
            total.clear()

    def release(self, sums: Sequence[Sum]) -> None:
        self.empty(sums)

    @torch.no_grad()
    def squared_norm(
        self, gradients: Sequence[Any], *, is_xla: bool
    ) -> torch.Tensor:
        if not gradients:
            return keras.ops.zeros((), "float32")
        gradients = [gradient.float() for gradient in gradients]
        device = gradients[0].device
        if device.type == "cpu":
            squares = [torch.dot(flat, flat) for flat in map(_flat, gradients)]
            return torch.stack(squares).sum()
        norms = torch._foreach_norm(gradients)
        return torch.stack([n.to(device) for n in norms]).square().sum()

    @contextlib.contextmanager
    def differentiating_twice(self) -> Iterator[Callable[..., list[Any]]]:
        # The step goes on from the same forward pass.
        yield lambda loss, variables: _gradients(
            loss, [variable.value for variable in variables], retain_graph=True
        )

    @torch.enable_grad()
    def gradients_through(
        self,
        function: Callable[[Sequence[Any]], tuple[Any, Any]],
        variables: Sequence[Any],
        tensors: Sequence[Any],
    ) -> tuple[Any, list[Any], list[Any]]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        value, beside = function(leaves)
        sources = [variable.value for variable in variables]
        found = _gradients(value, [*sources, *leaves])
        beside = keras.tree.map_structure(_detached, beside)
        return beside, found[: len(sources)], found[len(sources) :]

    def snapshot(self, gradients: Sequence[Any]) -> Sequence[Any]:
        # The next `backward` adds to them in place.
        return [g if g is None else g.clone() for g in gradients]

    traces = False

    def is_eager(self) -> bool:
        return True

    def trace(self) -> None:
        return None

    @contextlib.contextmanager
    def positive(self, total: Any, message: str) -> Iterator[None]:
        if not int(total) > 0:
            raise RuntimeError(message)
        yield

    def examples_in(self, batch: Any) -> list[int]:
        return [arrays.examples_in(batch)]

    def cut(
        self, batch: Any, sizes: list[list[int]], model: keras.Model
    ) -> Iterator[Any]:
        start = 0
        for (size,) in sizes:
            yield arrays.part_of(batch, start, start + size)
            start += size

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        # The processor's allocator has no error of its own (PyTorch 2.13).
        is_of_torch = isinstance(error, RuntimeError)
        return is_of_torch and "DefaultCPUAllocator" in str(error)

    def out_of_memory(
        self, error: BaseException, sentence: str
    ) -> BaseException:
        return torch.OutOfMemoryError(f"{error}\n{sentence}")

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if is_on_gpu() else None

    def forget_peak_memory(self) -> None:
        if is_on_gpu():
            torch.cuda.reset_peak_memory_stats()

    def runner(self, model: keras.Model, step: Step) -> TorchRunner:
        return TorchRunner(model, step, self)

    def tester(
        self, model: keras.Model, test: TestOfParts, runner: Any
    ) -> Tester:
        return TorchTester(model, test, runner)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        # Those of convolutions are not the ones of products of matrices.
        backends: Any = torch.backends
        cudnn = backends.cudnn
        kinds = [backends.cuda.matmul, cudnn.conv, cudnn.rnn]
        before = [kind.fp32_precision for kind in kinds]
        try:
            for kind in kinds:
                kind.fp32_precision = "ieee"
            yield
        finally:
            for kind, precision in zip(kinds, before):
                kind.fp32_precision = precision

    def device_name(self) -> str:
        device = keras.ops.zeros(()).device
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return device.type if device.type != "cpu" else "CPU (not run on a GPU)"


def _gradients(value: Any, sources: list[Any], **options: Any) -> list[Any]:
    if not value.requires_grad or not sources:
        # What a layer adds of its inputs alone, say.
        return [None] * len(sources)
    return list(
        torch.autograd.grad(value, sources, allow_unused=True, **options)
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in some order, without a copy where there need be none."""
    is_transposed = tensor.dim() == 2 and not tensor.is_contiguous()
    return (tensor.T if is_transposed else tensor).reshape(-1)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


BACKEND = TorchBackend()
