"""Small vectors from an accelerator to the host, a step late and without waiting.

    send(vector, what)  ->  pinned buffer and event  ->  arrived(): (array, what), in order

Asked from the training thread only: querying an event from another thread would break a capture of
a CUDA graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch

__all__ = ["Readback"]

MOST_UNDER_WAY = 16
"""Steps that the host may run ahead; then it waits for the oldest."""


class _Event(Protocol):
    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Readback:
    """One run's copies to the host, in the order in which they were sent."""

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        """
        Args:
            lag: steps after which a vector is handed out, no sooner and no later; None as it comes.
        """
        self._device = device
        self._lag = lag
        self._free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self._under_way: deque[tuple[_Event, torch.Tensor, Any]] = deque()

    def send(self, vector: torch.Tensor, what: Any) -> None:
        """Begins a copy behind what the device was told before; `what` comes back with it."""
        buffer = self._buffer(vector)
        buffer.copy_(vector, non_blocking=True)
        event = self._event()
        event.record()
        self._under_way.append((event, buffer, what))

    def arrived(self, *, wait: bool) -> Iterator[tuple[Any, Any]]:
        """What has come since, oldest first.

        Args:
            wait: for all that was sent.
        """
        while self._under_way:
            event, buffer, what = self._under_way[0]
            if self._lag is not None and not wait:
                # A process may send more beside its steps than another one.
                if sum(not callable(sent) for _, _, sent in self._under_way) <= self._lag:
                    return
                event.synchronize()
            elif wait or len(self._under_way) > MOST_UNDER_WAY:
                event.synchronize()
            elif not event.query():
                return
            self._under_way.popleft()
            array = buffer.numpy().copy()
            self._free.setdefault((buffer.dtype, buffer.numel()), []).append(buffer)
            yield array, what

    def _buffer(self, vector: torch.Tensor) -> torch.Tensor:
        free = self._free.get((vector.dtype, vector.numel()))
        if free:
            return free.pop()
        return torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)

    def _event(self) -> _Event:
        event: _Event = torch.get_device_module(self._device).Event()
        return event
