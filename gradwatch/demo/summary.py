"""Findings in, the end screen out: what happened, who moved first, what was done, what next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradwatch.demo.findings import FAR, SMOOTHED, Findings, LossStory
from gradwatch.records import Anomaly
from gradwatch.report.kinds import name_of

__all__ = ["Setting", "further", "one_line", "showed", "summary"]

MOST_LISTED = 5
RECOVERED = 1.1
"""The loss at the end, at most that many times the one before."""

PARTLY = 0.5
"""The share of the loss's rise that must be gone to speak of recovery at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the demo itself knows about its run."""

    fault: str | None
    """What was done at `fault_step`, or None: the healthy twin."""

    expects: str | None
    """The kind of anomaly that shows it."""

    fault_step: int
    policy: str
    recording: Path
    stopped: str | None = None
    """Why the policy ended the run, if it did."""


def showed(findings: Findings, setting: Setting) -> bool:
    """Whether gradwatch found what was broken and nothing else: the demo's promise."""
    early = any(alert.step < setting.fault_step for alert in findings.alerts)
    if setting.fault is None:
        return not findings.alerts
    return not early and any(alert.kind == setting.expects for alert in findings.alerts)


def summary(findings: Findings, setting: Setting) -> Iterator[tuple[str, list[str]]]:
    """Headings, each with its lines of prose."""
    yield "What happened", list(_happened(findings, setting))
    if findings.movers and findings.alerts[0].kind == "exploding":
        yield "Which layer moved first", list(_moved(findings))
    elif findings.alerts and findings.alerts[0].kind == "nonfinite":
        yield "Which layer moved first", ["none: within a step, one NaN reaches every gradient"]
    yield f"What the policy did ({setting.policy})", list(_done(findings, setting))
    if findings.alerts:
        yield "Did training recover", list(_recovery(findings))


def one_line(findings: Findings, setting: Setting) -> str:
    """For a run among many."""
    found = ", ".join(f"{name_of(alert.kind)} at step {alert.step}" for alert in findings.alerts)
    broken = f"broken at step {setting.fault_step}" if setting.fault else "nothing broken"
    return f"{setting.recording.stem}: {findings.num_steps} steps, {broken}; {found or 'no alert'}"


def _happened(findings: Findings, setting: Setting) -> Iterator[str]:
    if setting.fault is None:
        yield "nothing was broken: this is the healthy twin"
    elif findings.num_steps > setting.fault_step:
        yield f"step {setting.fault_step}  the demo broke it: {setting.fault}"
    else:
        yield "the run ended before anything was broken"
    if not findings.alerts:
        yield f"gradwatch raised no alert in {findings.num_steps} steps"
    for alert in findings.alerts[:MOST_LISTED]:
        when = _when(alert, setting)
        yield f"step {alert.step}  gradwatch, {when}: {alert.level.upper()} {alert.message}"
    if len(findings.alerts) > MOST_LISTED:
        yield f"... and {len(findings.alerts) - MOST_LISTED} more"
    if findings.events:
        kinds = ", ".join(sorted({name_of(event.kind) for event in findings.events}))
        yield f"events of one step each, none an alert: {len(findings.events)} ({kinds})"
    if setting.stopped:
        yield f"the policy {setting.stopped}"


def _when(alert: Anomaly, setting: Setting) -> str:
    if setting.fault is None:
        return "a false alarm"
    delay = alert.step - setting.fault_step
    if delay < 0:
        return "before anything was broken, a false alarm"
    return "in the same step" if delay == 0 else f"{delay} step{'s' * (delay > 1)} later"


def _moved(findings: Findings) -> Iterator[str]:
    name = max(max(len(mover.layer) for mover in findings.movers[:MOST_LISTED]), 5)
    yield f"{'layer':<{name}}  since step  its median    at worst"
    for mover in findings.movers[:MOST_LISTED]:
        ratio = mover.worst / mover.usual
        yield (
            f"{mover.layer:<{name}}  {mover.step:>10}  {mover.usual:>10.3g}  {mover.worst:>10.4g}"
            f"  ({ratio:,.0f}x)"
        )
    if len(findings.movers) > MOST_LISTED:
        yield f"... and {len(findings.movers) - MOST_LISTED} more"


def _done(findings: Findings, setting: Setting) -> Iterator[str]:
    clipped = len(findings.clipped)
    if findings.alerts and clipped:
        before = sum(step < findings.alerts[0].step for step in findings.clipped)
        yield (
            f"clipped {clipped} of {findings.num_steps} steps: {before} before the alert, "
            f"{clipped - before} since"
        )
    else:
        yield f"clipped {clipped} of {findings.num_steps} steps"
    if findings.hardest is not None:
        hardest = findings.hardest
        yield (
            f"hardest clip at step {hardest.step}: total norm {hardest.total_norm:.4g} -> "
            f"{hardest.total_norm_clipped:.4g}"
        )
    for reason, count in findings.skipped.items():
        yield f"skipped {count} step{'s' * (count > 1)} ({reason}): parameters stayed as they were"


def _recovery(findings: Findings) -> Iterator[str]:
    far = f"{FAR:g} times its median {findings.usual_total_norm:.3g}"
    loss = findings.loss
    if loss is None:
        yield "too few steps since to tell"
        return
    yield (
        f"{_verdict(loss)}: loss {loss.before:.3g} before, {loss.worst:.3g} at worst, "
        f"{loss.end:.3g} at the end (means of {SMOOTHED} steps)"
    )
    if findings.calm_since is None:
        yield f"total norm still above {far}"
    else:
        yield f"total norm below {far} since step {findings.calm_since}"


def _verdict(loss: LossStory) -> str:
    if loss.end <= RECOVERED * loss.before:
        return "yes"
    return "not fully" if loss.made_good > PARTLY else "no"


def further(findings: Findings, setting: Setting) -> list[str]:
    """The recording, and what to type next, as it can be pasted into a shell here."""
    recording = str(setting.recording)
    folder = str(setting.recording.parent)
    code = (
        f"import gradwatch; print(*gradwatch.open_recording({recording!r}).anomalies(), sep='\\n')"
    )
    return [
        f"{recording}  {findings.num_steps} steps, every norm and every decision",
        f"{_program()} top {shlex.quote(recording)}",
        f"{_program()} serve {shlex.quote(folder)}",
        f"{_program()} report {shlex.quote(recording)}",
        f"{_program()} export {shlex.quote(recording)} --format csv -o steps.csv",
        f"{_python()} -c {_quoted(code)}",
    ]


def _quoted(code: str) -> str:
    """In double quotes where the shell would change nothing in them: that reads better."""
    return shlex.quote(code) if set(code) & set('"$`!') else f'"{code}"'


def _program() -> str:
    script = Path(sys.executable).with_name("gradwatch")
    return _shortest(script) if script.exists() else f"{_python()} -m gradwatch"


def _python() -> str:
    return _shortest(Path(sys.executable))


def _shortest(program: Path) -> str:
    """Its name where a shell would find it, else its path as seen from here."""
    if shutil.which(program.name) == str(program):
        return program.name
    return min(os.path.relpath(program), str(program), key=len)
