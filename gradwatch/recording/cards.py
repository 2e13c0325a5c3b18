"""The card of an anomaly: all that is to be known of it, whole by itself.

    info, the last records, what was found  ->  Card  ->  one row of the recording

A card outlives the records that it was made of, and is there when the process dies right after.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gradwatch.errors import RecordingError
from gradwatch.records import Anomaly, Culprit, Level, RunInfo, StepRecord
from gradwatch.rules.guard import was_dropped

__all__ = [
    "BOUND_CARDS",
    "CARDS",
    "FIRST_KEPT",
    "HISTORY",
    "INSERT_CARD",
    "LAST_KEPT",
    "Card",
    "card_from",
    "card_of",
    "card_row",
    "write_card",
]

HISTORY = 20
"""Steps of the past that a card holds."""

BESIDE = 2
"""Layers of either side of the affected one."""

WAIT_SECONDS = 0.2
"""For the thread that writes records, at most."""

CARDS = "cards (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL, card TEXT)"
INSERT_CARD = "INSERT INTO cards (step, kind, card) VALUES (?, ?, ?)"

FIRST_KEPT = 50
"""Cards of a recording that are never taken away: how it began."""

LAST_KEPT = 450
"""Cards behind those; of a run that goes on badly the ones between are."""

BOUND_CARDS = (
    "DELETE FROM cards WHERE id IN (SELECT id FROM cards ORDER BY id "
    f"LIMIT max(0, (SELECT count(*) FROM cards) - {FIRST_KEPT + LAST_KEPT}) OFFSET {FIRST_KEPT})"
)

SERIES = ("total_norm", "total_norm_clipped", "loss", "learning_rate", "loss_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One anomaly and what surrounds it. Numbers may be NaN where they are not known."""

    kind: str
    level: Level
    step: int
    time: float
    message: str
    layer: str | None = None
    layers: tuple[str, ...] = ()
    culprit: Culprit | None = None

    skipped: str | None = None
    """As `StepRecord.skipped`; see `was_dropped`."""

    clip_coef: float = 1.0
    fired: tuple[str, ...] = ()
    limits: Mapping[str, float]
    """In force in that step, by rule."""

    micro_batches: int = 1
    weight: float = 1.0
    steps: tuple[int, ...]
    """[T] the step and those before it, oldest first."""

    series: Mapping[str, tuple[float, ...]]
    """[T] `total_norm`, `total_norm_clipped`, `loss`, `learning_rate`, `loss_scale`."""

    norms: Mapping[str, tuple[float, ...]]
    """[T] of the affected layer and its neighbours, in layout order."""

    environment: Mapping[str, str]
    """Run, rank, host, process, framework, device, model, policy."""

    @property
    def was_dropped(self) -> bool:
        """Whether the step was not taken. What a policy in shadow mode would have skipped was."""
        return was_dropped(self.skipped, self.environment.get("mode") == "enforce")

    @property
    def loss(self) -> float:
        return self.series["loss"][-1] if self.steps else math.nan


def card_of(
    info: RunInfo,
    anomaly: Anomaly,
    records: Sequence[StepRecord],
    culprit: Culprit | None = None,
) -> Card:
    """
    Args:
        records: oldest first; the last one is that of the anomaly.
    """
    record, past = records[-1], records[-HISTORY:]
    layer = anomaly.layer or (culprit.module if culprit is not None else None)
    shown = _around(info.layout.layers, layer, anomaly.layers)
    return Card(
        kind=anomaly.kind,
        level=anomaly.level,
        step=anomaly.step,
        time=record.time,
        message=anomaly.message,
        layer=anomaly.layer,
        layers=anomaly.layers,
        culprit=culprit,
        skipped=record.skipped,
        clip_coef=record.clip_coef,
        fired=record.fired,
        limits=dict(record.limits),
        micro_batches=record.micro_batches,
        weight=record.weight,
        steps=tuple(one.step for one in past),
        series={
            name: tuple(
                one.scalars.get(name, math.nan) if name == "loss" else getattr(one, name)
                for one in past
            )
            for name in SERIES
        },
        norms={
            info.layout.layers[i]: tuple(float(one.grad_norms[i]) for one in past) for i in shown
        },
        environment=_environment(info),
    )


def _around(layers: Sequence[str], layer: str | None, affected: Sequence[str]) -> list[int]:
    """Places of a layer and its neighbours; of the first affected ones where it is none."""
    if layer in layers:
        at = layers.index(layer)
        return list(range(max(0, at - BESIDE), min(len(layers), at + BESIDE + 1)))
    known = [layers.index(name) for name in affected if name in layers]
    return sorted(known) or list(range(min(len(layers), 2 * BESIDE + 1)))


def _environment(info: RunInfo) -> dict[str, str]:
    return {
        "run": info.run,
        "rank": str(info.rank),
        "host": info.host,
        "pid": str(info.pid),
        "framework": info.framework,
        "device": info.device,
        "model": info.model,
        "gradwatch": info.version,
        "mode": info.mode,
        "policy_sha256": info.policy_sha256,
    }


def card_row(card: Card) -> tuple[int, str, str]:
    """The values of `INSERT_CARD`."""
    return card.step, card.kind, json.dumps(asdict(card))


def card_from(text: str) -> Card:
    """
    Raises:
        RecordingError: the text is not a card.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(Card)}
        values = {name: _plain(value) for name, value in data.items() if name in known}
        if data.get("culprit") is not None:
            of_culprit = {field.name for field in fields(Culprit)}
            values["culprit"] = Culprit(
                **{k: _plain(value) for k, value in data["culprit"].items() if k in of_culprit}
            )
        return Card(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"a card cannot be read ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def write_card(path: Path, card: Card) -> None:
    """Adds a card to a recording that another thread writes to, and is back when it is there.

    Raises:
        sqlite3.Error: it is not, e.g. since the disk is full.
    """
    # Not made anew where somebody has deleted it.
    where = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(where, uri=True, timeout=WAIT_SECONDS, isolation_level=None)
    try:
        # As the store has it: a card survives the process, not a power loss.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(INSERT_CARD, card_row(card))
        connection.execute(BOUND_CARDS)
    finally:
        connection.close()
