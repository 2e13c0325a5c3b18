"""The warnings and alerts of a recording as annotations of Grafana.

Text is HTML there, so that names from outside are escaped; tags are text, of the form that Grafana
keeps: of `a:b:c` it would keep `a:b`, and a value beyond 100 bytes is an error of its database.
"""

from __future__ import annotations

import hashlib
import html

from gradwatch.grafana.adapter import Annotation
from gradwatch.recording.reader import Recording
from gradwatch.records import Anomaly
from gradwatch.report.card import printable
from gradwatch.saying import one_line

__all__ = ["annotations_of"]

MOST_BYTES = 100
MOST_SAID = 500


def annotations_of(recording: Recording) -> list[Annotation]:
    """One for each finding, in the order they were found; two of one time and kind are one."""
    info = recording.info
    whose = ("gradwatch", _tag("run", info.run), _tag("rank", str(info.rank)))
    steps, times = recording.series("time")
    time_of = dict(zip(steps.tolist(), times.tolist(), strict=True))
    found: dict[tuple[int, frozenset[str]], Annotation] = {}
    for anomaly in recording.anomalies():
        if anomaly.level == "event" or anomaly.step not in time_of:
            continue
        made = Annotation(
            time_ms=round(time_of[anomaly.step] * 1000),
            tags=(*whose, _plain(anomaly.kind)),
            text=_text(anomaly, info.run),
        )
        found.setdefault(made.key, made)
    return list(found.values())


def _text(anomaly: Anomaly, run: str) -> str:
    where = f" in {printable(anomaly.layer)}" if anomaly.layer else ""
    said = (
        f"{printable(run)}, step {anomaly.step}: {anomaly.level}{where}. "
        f"{printable(anomaly.message, MOST_SAID)}"
    )
    return html.escape(said)


def _tag(name: str, value: str) -> str:
    kept = _plain(value)
    raw = kept.encode()
    if len(raw) > MOST_BYTES:
        mark = f"-{hashlib.sha256(raw).hexdigest()[:8]}"
        kept = raw[: MOST_BYTES - len(mark)].decode(errors="ignore") + mark
    return f"{name}:{kept}"


def _plain(text: str) -> str:
    shown = one_line(text)
    return shown.replace(":", "_").strip()
