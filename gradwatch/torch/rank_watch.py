"""Comparing processes behind the training thread: what each has sampled, judged by the first one.

training thread: sampled(...)  ->  consumer thread: post, await, judge  ->  an anomaly
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradwatch.policy import Detect
from gradwatch.records import Anomaly, Layout
from gradwatch.rules.detect_ranks import DIVERGENCE, OUTLIER, DivergingRanks, OutlyingRank
from gradwatch.torch.mailbox import Mailbox
from gradwatch.torch.shares import Share, answer_roll, local

__all__ = ["RankWatch", "checksums"]

ROLL_SECONDS = 1.0
"""Between two looks for a process that misses others."""

MOST_AWAITED = 64
"""Samples that not every process has posted; older ones are given up."""


class RankWatch:
    """One run's. What is sampled comes from the training thread, all else is the consumer's."""

    def __init__(
        self,
        share: Share,
        layout: Layout,
        detect: Detect,
        mailbox: Mailbox,
        found: Callable[[Anomaly], None],
    ) -> None:
        self._mailbox = mailbox
        self._found = found
        self._sampled: deque[tuple[str, int, Any]] = deque(maxlen=4 * MOST_AWAITED)
        self._awaited: dict[str, deque[int]] = {OUTLIER: deque(), DIVERGENCE: deque()}
        self._outlying = self._diverging = None
        self.sums_every = 0
        """Steps between two checksums; 0 where there is nothing to compare."""

        if detect.rank_outlier is not None and mailbox.is_open:
            self._outlying = OutlyingRank(detect.rank_outlier, share.size)
        if (config := detect.rank_divergence) and mailbox.is_open and share.pieces.has_replicas:
            self._diverging = DivergingRanks(config, layout, share.pieces)
            self.sums_every = config.every
        self._group = share.group
        self._roll, self._next_roll = "", 0.0
        self._is_broken = False
        self.compares_norms = self._outlying is not None

    def sampled(self, kind: str, step: int, values: Any) -> None:
        """
        Args:
            values: of this process, on the host: its own norm, or checksums of its parameters.
        """
        self._sampled.append((kind, step, values))

    def active(self) -> Mapping[str, tuple[str, ...]]:
        """Kinds with an open alert."""
        judges = {OUTLIER: self._outlying, DIVERGENCE: self._diverging}
        return {kind: () for kind, judge in judges.items() if judge is not None and judge.is_open}

    def __call__(self) -> None:
        """Posts and judges what has come since; never waits.

        Raises:
            Exception: the store failed, which may be gone with its process; it is not asked again.
        """
        if self._is_broken:
            return
        try:
            self._round()
        except Exception:
            self._is_broken = True
            raise

    def _round(self) -> None:
        if self._mailbox.is_open and time.monotonic() > self._next_roll:
            self._next_roll = time.monotonic() + ROLL_SECONDS
            self._roll = answer_roll(self._group, self._roll)
        while self._sampled:
            kind, step, values = self._sampled.popleft()
            awaited = self._awaited[kind]
            self._mailbox.post(kind, step, np.asarray(values).tobytes())
            awaited.append(step)
            if len(awaited) > MOST_AWAITED:
                self._mailbox.forget(kind, awaited.popleft())
        if self._mailbox.rank == 0:
            for kind, awaited in self._awaited.items():
                self._judge(kind, awaited)

    def _judge(self, kind: str, awaited: deque[int]) -> None:
        for step in list(awaited):
            posted = self._mailbox.posted(kind, step)
            if posted is None:
                return  # in order; what some process never tells is given up when there is more
            awaited.remove(step)
            anomaly = self._judged(kind, step, posted)
            self._mailbox.forget(kind, step)
            if anomaly is not None:
                self._found(anomaly)

    def _judged(self, kind: str, step: int, posted: Sequence[bytes]) -> Anomaly | None:
        if kind == DIVERGENCE:
            assert self._diverging is not None
            return self._diverging.observe(step, [np.frombuffer(one, np.int64) for one in posted])
        assert self._outlying is not None
        norms_W = [float(np.frombuffer(one, np.float64)[0]) for one in posted]
        return self._outlying.observe(step, norms_W)


@torch.no_grad()
def checksums(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """[Q] int64: the sum of the bits of each, by elements; the same bits give the same sum."""
    return torch.stack([_checksum(local(parameter.detach())) for parameter in parameters])


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()]
    return plain.contiguous().view(bits).sum(dtype=torch.int64)
