"""`gradwatch tune`: thresholds from healthy recordings, as lines of a policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from gradwatch.errors import RecordingError
from gradwatch.policy import Detect, load_policy
from gradwatch.progress import shown_recording
from gradwatch.whatif.rates import upper_bound, upper_rate
from gradwatch.whatif.tuning import RunFindings, Tuned, observed, tuned

__all__ = ["tune_command"]

SHORT = 1000
"""Steps below which little can be said."""


def tune_command(
    recordings: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORDING...",
            help="Recordings of healthy runs; of a directory its newest.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", "-p", metavar="FILE", help="Whose detect: section to go from."),
    ] = None,
) -> None:
    """Sets the thresholds of detectors by runs that you know to be healthy.

    Prints a `detect:` section for a policy, with the false alarms to be expected of each line.
    """
    base = Detect() if policy is None else load_policy(policy).detect
    runs = list(_observed(recordings, base))
    if not runs:
        raise RecordingError("none of these runs is healthy: there is nothing to tune on")
    for line in _lines(runs, tuned(runs, base), base):
        print(line)


def _observed(recordings: Sequence[Path], base: Detect) -> Iterator[RunFindings]:
    for path in recordings:
        with shown_recording(path) as opened:
            run = observed(opened.path.stem, opened.info.layout, opened.records(), base)
        if run.unhealthy:
            print(f"{opened.path}: left out, {run.unhealthy}", file=sys.stderr)
        else:
            yield run


def _lines(runs: Sequence[RunFindings], found: Sequence[Tuned], base: Detect) -> Iterator[str]:
    steps = sum(run.steps for run in runs)
    yield f"# Tuned on {len(runs)} healthy run{'s' * (len(runs) != 1)}, {steps} steps."
    yield f"# What finds nothing in them is wrong in fewer than {1000 * upper_rate(steps):.2g} of"
    of_runs = f" and in {upper_bound(0, len(runs)):.0%} of runs" if len(runs) > 1 else ""
    yield f"# 1000 steps{of_runs} (95 % confidence)."
    if steps < SHORT:
        yield f"# That is little: with {SHORT} steps or more the bound is worth something."
    yield "detect:"
    given = base.model_dump(mode="json", exclude_defaults=True)
    changed = {one.kind: one for one in found if one.rung not in (None, one.default)}
    for key in [*given, *(kind for kind in changed if kind not in given)]:
        yield from _line(key, given.get(key, {}), changed.get(key))
    if not changed:
        yield f"  {'' if given else '{}  '}# the defaults are right for these runs"
    for one in found:
        if one.rung is None:
            yield f"  # {one.kind}: finds something in {one.blamed} however tolerant it is. Look at"
            yield f"  # that run (gradwatch report), or switch the kind off ({one.kind}: none)."
    kept = [one.kind for one in found if one.rung is not None and one.rung == one.default]
    if kept:
        yield f"  # as by default: {', '.join(kept)}"


def _line(key: str, given: Any, one: Tuned | None) -> Iterator[str]:
    """One key of the policy that was gone from, and what was found for it."""
    if one is None:
        yield f"  {key}: {_flow('none' if given is None else given)}"
        return
    assert one.rung is not None
    default = ", ".join(f"{key} {value:g}" for key, value in one.default.items())
    said = f"by default {default}: {one.by_default} false alarms"
    if one.elsewhere is not None:
        said += f"; chosen without each run in turn: {one.elsewhere} in that run"
    rung = {name: int(v) if float(v).is_integer() else v for name, v in one.rung.items()}
    yield f"  {key}: {_flow({**given, **rung})}  # {said}"


def _flow(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
