"""Runs steps eagerly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from kaccum.backends import arrays
from kaccum.backends.runner import AssigningRunner, Ran, Step
from kaccum.backends.tester import AssigningTester
from kaccum.backends.torch.processes import Meeting, Processes


class TorchRunner(AssigningRunner):
    """Runs a training step eagerly."""

    def __init__(
        self, model: keras.Model, step: Step, backend: Processes
    ) -> None:
        super().__init__(model, step, backend)
        self._processes = backend
        self._meeting: Meeting | None = None
        # Of the last micro-batch that had examples.
        self._logs: Any = {}

    def start(self, *, is_for_fit: bool) -> None:
        super().start(is_for_fit=is_for_fit)
        group = self._processes.group_of(self.model)
        self._meeting = self._processes.meeting(group)

    def _add(self, data: Any) -> Any:
        with self._looking():
            return super()._add(data)

    @torch.no_grad()
    def look(self, function: Callable[[Any], Any], data: Any) -> Any:
        before = self.others()
        devices = [torch.cuda.current_device()] if is_on_gpu() else []
        # Neither what modules of PyTorch keep nor its random numbers move.
        with torch.random.fork_rng(devices):
            try:
                return super().look(function, data)
            finally:
                self.put_others_back(before)

    def others(self) -> dict[str, torch.Tensor]:
        return {name: each.clone() for name, each in self._buffers().items()}

    @torch.no_grad()
    def put_others_back(self, values: dict[str, torch.Tensor]) -> None:
        for name, buffer in self._buffers().items():
            buffer.copy_(values[name])

    def _buffers(self) -> dict[str, torch.Tensor]:
        """What modules of PyTorch keep: no variables of Keras."""
        return {
            f"{layer.name}/{name}": buffer
            for layer in self.model._flatten_layers()
            for name, buffer in layer.named_buffers()
        }

    def restore(self) -> None:
        # They hold memory.
        self.model.zero_grad()
        super().restore()

    def passed(self, name: str, data: Any) -> Any:
        run = getattr(self._step.whole, name)
        with self._step.overheard(), self._looking():
            if name != "hear":
                return run(data, self._hear)
            with torch.no_grad():
                return run(data, self._hear)

    def state(self) -> Any:
        # Modules of PyTorch draw random numbers by its own generators.
        generators = [torch.random.get_rng_state()]
        if is_on_gpu():
            generators.append(torch.cuda.get_rng_state())
        return super().state(), generators

    @torch.no_grad()
    def return_to(self, state: Any) -> None:
        others, generators = state
        super().return_to(others)
        torch.random.set_rng_state(generators[0])
        if len(generators) > 1:
            torch.cuda.set_rng_state(generators[1])

    def run(self, batches: Any, closes: list[bool], *, is_plain: bool) -> Ran:
        logs, ran, updates = None, 0, 0
        # Once for all of them: an update is not a step.
        place = contextlib.nullcontext() if is_plain else self._step.overheard()
        with place, self._processes.together(self._meeting):
            for is_last, batch in zip(closes, batches):
                if is_plain:
                    logs, made = self._plain([batch]), 1
                elif self.has_nothing(batch):
                    logs = self._logs
                    made = self.update() if is_last else 0
                else:
                    logs = self._logs = self._add(batch)
                    made = self.update() if is_last else 0
                ran, updates = ran + 1, updates + made
        if ran == 0:
            raise StopIteration
        return Ran(logs, ran, updates)

    @torch.no_grad()
    def _run_update(self) -> None:
        self._step.update()
        self._step.empty()

    def update(self) -> int:
        if self._meeting is None:
            return super().update()
        return self._update_together(self._meeting, is_over=False)

    def end_epoch(self, is_open: bool) -> int:
        meeting, updates = self._meeting, 0
        if meeting is None:
            return super().end_epoch(is_open)
        # Others may have more data: their updates are this process's, too.
        meeting.are_all_over = False
        while not meeting.are_all_over:
            updates += self._update_together(meeting, is_over=True)
        if meeting.has_stopped:
            # Else the others would wait for it in the next epoch.
            self.model.stop_training = True
        return updates

    @torch.no_grad()
    def _update_together(self, meeting: Meeting, *, is_over: bool) -> int:
        """Makes the update of all processes' sums, if any has some."""
        meeting.is_over, meeting.stops = is_over, self.model.stop_training
        with self._processes.together(meeting):
            is_made = self._step.update()
            self._step.empty()
        return int(is_made)

    def has_nothing(self, batch: Any) -> bool:
        if self._meeting is None:
            return False
        try:
            return arrays.examples_in(batch) == 0
        except ValueError:
            # A batch of graphs, say.
            return False

    def summed(self, number: int) -> int:
        with self._processes.together(self._meeting):
            (total,) = self._processes.sum_over_replicas(
                [keras.ops.convert_to_tensor(number, "int32")]
            )
        return int(total)

    def copied(self, variable: Any) -> torch.Tensor:
        return variable.value.detach().clone()

    @torch.no_grad()
    def put_back(self, variable: Any, before: torch.Tensor) -> None:
        variable.value.copy_(before)


class TorchTester(AssigningTester):
    """Runs a test step eagerly."""

    @torch.no_grad()
    def hear(self, data: Any) -> Any:
        with self._test.overheard():
            return self._test.hear(data, self._test_step)

    @torch.no_grad()
    def run(self, data: Any, parts: Sequence[Any]) -> Any:
        with self._test.overheard():
            return self._test.run(data, parts, self._test_step)


def is_on_gpu() -> bool:
    """Whether PyTorch computes on one now."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())
