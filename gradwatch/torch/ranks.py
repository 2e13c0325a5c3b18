"""One process among several, on the training thread: its own gradient, and its word to the others.

backward: own gradient  ->  take (a step is due)  ->  sampled  ->  the thread behind
a step that is not finite  ->  confer  ->  what each process says
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradwatch.pipeline import Pipeline
from gradwatch.policy import Detect
from gradwatch.records import Anomaly, Layout
from gradwatch.rules.detect_ranks import DIVERGENCE, OUTLIER
from gradwatch.torch.mailbox import Mailbox
from gradwatch.torch.rank_watch import RankWatch, checksums
from gradwatch.torch.shares import Share

__all__ = ["Ranks", "ranks_of"]

CONFER_SECONDS = 2.0
"""For which a bad step waits for the words of other processes, at most."""

Send = Callable[[torch.Tensor, Callable[[Any], None]], None]


class Ranks:
    def __init__(
        self,
        share: Share,
        tensors: Sequence[torch.nn.Parameter],
        layout: Layout,
        detect: Detect,
        found: Callable[[Anomaly], None],
    ) -> None:
        """
        Args:
            found: takes what is found on the thread behind.
        """
        self._tensors = list(tensors)
        self._mailbox = Mailbox(share)
        self._every = detect.every
        self.watch = RankWatch(share, layout, detect, self._mailbox, found)
        self.took_norm: Callable[[int, float], None] = lambda step, norm: None
        """Takes the own norm of a step."""

    def samples(self, step: int) -> bool:
        """Whether the own norm of a step is wanted."""
        return step % self._every == 0

    def sampled(self, step: int, own_norm: torch.Tensor | None, scale: float, send: Send) -> None:
        """A step was handled: its samples go to the thread behind.

        Args:
            own_norm: 0-d, of the gradient of this process alone, if it was measured.
            scale: what the loss was multiplied by.
            send: a vector to the host, and what to do with it there.
        """
        if own_norm is not None:
            send(own_norm.double().reshape(1) / scale, functools.partial(self._norm_came, step))
        if (every := self.watch.sums_every) and step % every == 0:
            send(checksums(self._tensors), functools.partial(self._sums_came, step))

    def confer(self, step: int, word: bytes) -> Sequence[bytes | None]:
        if not self._mailbox.is_open:
            return ()
        self._mailbox.post("bad", step, word)
        return self._mailbox.answers("bad", step, CONFER_SECONDS)

    def _norm_came(self, step: int, norm: Any) -> None:
        value = float(norm[0])
        if math.isfinite(value):
            self.took_norm(step, value)
        if self.watch.compares_norms:
            self.watch.sampled(OUTLIER, step, [value])

    def _sums_came(self, step: int, sums: Any) -> None:
        self.watch.sampled(DIVERGENCE, step, sums)


def ranks_of(
    share: Share,
    tensors: Sequence[torch.nn.Parameter],
    layout: Layout,
    detect: Detect,
    pipeline: Pipeline,
) -> Ranks:
    """One process among several, its findings on the way that all findings take."""
    consumer, local_norms = pipeline.consumer, pipeline.recorder.local_norms
    ranks = Ranks(share, tensors, layout, detect, consumer.found)
    ranks.took_norm = lambda step, norm: local_norms.append((step, norm))
    consumer.active_elsewhere = ranks.watch.active
    consumer.chores.append(ranks.watch)
    return ranks
