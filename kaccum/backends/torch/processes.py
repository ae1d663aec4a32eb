"""Several processes that train one model, each on its part of the data.

From Keras 3.16 on a model is wrapped into `DistributedDataParallel` where
`torch.distributed` is initialised. That takes the mean of the processes' means;
here they add up their sums, once an update.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import torch
from torch import distributed

from kaccum.backends.base import Backend


class Meeting:
    """What processes tell each other beside their sums.

    Args:
        group: Which processes they are.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = distributed.get_world_size(group)
        #: Whether they were seen to have the same sums.
        self.is_checked = False
        #: Whether this one has no more data in its epoch.
        self.is_over = False
        #: Whether a callback in this one ended the training.
        self.stops = False
        # As of the last all-reduce.
        #: Whether no process has more data.
        self.are_all_over = False
        #: Whether one of them ended the training.
        self.has_stopped = False


class _Thread(threading.local):
    meeting: Meeting | None = None


_thread = _Thread()


class Processes(Backend):
    """What the processes of a model have, and what they do together."""

    def check_devices(self, model: keras.Model) -> None:
        distribution = keras.distribution.distribution()
        if isinstance(distribution, keras.distribution.ModelParallel):
            raise RuntimeError(
                "Each process must hold the whole model for its gradients to "
                "be accumulated on PyTorch. Received: a "
                f"{type(distribution).__name__}. Use "
                "`keras.distribution.DataParallel`."
            )
        wraps = distributed.is_initialized() and "ddp_model" in vars(model)
        if wraps and not model.built:
            raise RuntimeError(
                "A model must be built before several processes train it by "
                "`train_on_batch`: Keras wraps it then. Received: one that is "
                "not. Give it a `keras.Input`, or call it once."
            )

    def devices(self, count: int) -> Any:
        raise RuntimeError(
            "A process trains on one device where Keras runs on torch. "
            f"Received: {count} replicas. Start as many processes, with "
            "`torchrun`."
        )

    def group_of(self, model: keras.Model) -> Any:
        """The processes that train a model together, if several do."""
        wrapped = vars(model).get("ddp_model")
        if wrapped is None or wrapped.process_group.size() == 1:
            return None
        return wrapped.process_group

    def replicas_of(self, model: keras.Model) -> int:
        group = self.group_of(model)
        return 1 if group is None else int(group.size())

    def replicas(self) -> int:
        return 1 if _thread.meeting is None else _thread.meeting.size

    def meeting(self, group: Any) -> Meeting | None:
        return None if group is None else Meeting(group)

    @contextlib.contextmanager
    def together(self, meeting: Meeting | None) -> Iterator[None]:
        """A context in which some processes train together."""
        outer, _thread.meeting = _thread.meeting, meeting
        try:
            yield
        finally:
            _thread.meeting = outer

    def are_sums_aligned(self) -> bool:
        return self.replicas() > 1

    @torch.no_grad()
    def sum_over_replicas(
        self, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        meeting = _thread.meeting
        if meeting is None:
            return list(tensors)
        is_double = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if is_double else torch.float32
        # Counts are the host's; what has most numbers is where gradients are.
        device = max(tensors, key=torch.numel).device
        told = torch.tensor([float(meeting.is_over), float(meeting.stops)])
        flat = [t.detach().reshape(-1).to(device, dtype) for t in tensors]
        if not meeting.is_checked:
            _check_alike(
                len(flat), sum(map(torch.numel, flat)), meeting, device
            )
            meeting.is_checked = True
        packed = torch.cat([*flat, told.to(device, dtype)])
        distributed.all_reduce(packed, group=meeting.group)
        *parts, told = packed.split([*(t.numel() for t in tensors), 2])
        over, stopping = told.tolist()
        meeting.are_all_over = over == meeting.size
        meeting.has_stopped = stopping > 0
        return [
            part.reshape(t.shape).to(t.device, t.dtype)
            for part, t in zip(parts, tensors)
        ]

    def as_row(self, value: Any) -> torch.Tensor:
        meeting = _thread.meeting
        value = keras.ops.convert_to_tensor(value)
        if meeting is None:
            return value[None]
        rows = value.new_zeros((meeting.size, *value.shape))
        rows[distributed.get_rank(meeting.group)] = value
        return rows

    def rows_of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(tensor.unbind())


def _check_alike(
    count: int, elements: int, meeting: Meeting, device: torch.device
) -> None:
    """Checks that each process has as many sums, and as large ones.

    Raises:
        RuntimeError: In all processes, if not.
    """
    own = torch.tensor([count, -count, elements, -elements], device=device)
    distributed.all_reduce(own, distributed.ReduceOp.MAX, group=meeting.group)
    most, least, largest, smallest = own.tolist()
    if (most, largest) != (-least, -smallest):
        raise RuntimeError(
            "Each process must have trained on a micro-batch before the first "
            "update, and run the same layers and losses in it, for their "
            f"gradients to be added up. Received: {-least} sums in one process "
            f"and {most} in another. Give each process data, and the same "
            "model."
        )
