"""Which process made a step bad: from what each of them knows to one culprit.

After gradients were averaged all processes have the same NaN. Before that only its own process had
it, and only that one can say where it began.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradwatch.records import Culprit

__all__ = ["RankWord", "of_ranks"]


@dataclass(frozen=True, slots=True)
class RankWord:
    """What one process tells the others of a step that is not finite."""

    culprit: Culprit
    loss: float | None = None
    """As it was logged before the step."""

    own_is_bad: bool | None = None
    """Whether its own gradient was not finite before it was averaged; None where that is not
    known."""

    @property
    def is_producer(self) -> bool:
        if self.own_is_bad is not None:
            return self.own_is_bad
        if self.loss is not None:
            return not math.isfinite(self.loss)
        return self.culprit.origin in ("input", "forward")

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> RankWord:
        data = json.loads(text)
        culprit: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in data["culprit"].items()
        }
        return cls(Culprit(**culprit), data["loss"], data["own_is_bad"])


def of_ranks(words: Sequence[RankWord | None], rank: int) -> Culprit:
    """
    Args:
        words: by process; None of one that did not answer in time.
        rank: of this process, which has answered.
    """
    ours = words[rank]
    assert ours is not None
    producers = [i for i, word in enumerate(words) if word is not None and word.is_producer]
    silent = [str(i) for i, word in enumerate(words) if word is None]
    if not producers:
        if ours.culprit.module is not None and ours.culprit.origin in ("weight", "gradient"):
            return ours.culprit  # weights are the same everywhere, and so are averaged gradients
        said = f"rank {', '.join(silent)} did not answer" if silent else "of no rank is it known"
        return replace(
            ours.culprit, origin=None, module=None,
            message="not determined: which rank's own gradient was bad before it was averaged is "
            f"not known ({said})",
        )  # fmt: skip
    word = words[producers[0]]
    assert word is not None
    if len(producers) == len(words):
        where = "every rank"
    else:
        where = f"rank {', '.join(map(str, producers))} of {len(words)}"
    found = ours.culprit if rank in producers else word.culprit
    return replace(found, ranks=tuple(producers), message=f"on {where}: {found.message}")
