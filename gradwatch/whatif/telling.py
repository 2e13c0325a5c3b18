"""A replay in, a table and a picture for a terminal out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rich.table import Table

from gradwatch.chart import columns, log_chart, span
from gradwatch.policy.sentences import rule_sentence
from gradwatch.whatif.replay import Outcome, Replay

__all__ = ["picture", "rule_table", "summary"]

BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 8
MOST_LISTED = 10


def summary(found: Replay) -> Iterator[str]:
    """What there is to say about the run as a whole, a line each."""
    outcomes = found.outcomes
    steps = len(outcomes)
    did = "did" if found.is_the_one_that_ran else "would have done"
    what = "the policy that ran" if found.is_the_one_that_ran else "another policy than the run's"
    yield f"run {found.info.run}: {steps} steps, {len(found.info.layout.layers)} layers"
    yield f"{found.policy.source}: {what} (sha256 {found.policy.sha256[:12]}); what it {did}:"
    yield f"  clipped {_share(found.clipped, steps)}"
    skipped = ", ".join(f"{reason} {count}" for reason, count in found.skipped.most_common())
    yield f"  skipped {_share(sum(found.skipped.values()), steps)}" + (
        f": {skipped}" if skipped else ""
    )
    yield f"  total norm {_percentiles([o.total_norm for o in outcomes])}"
    after = [outcome.total_norm_clipped for outcome in outcomes if outcome.skipped is None]
    lost = sum(math.isnan(norm) for norm in after)
    told = f" ({lost} steps not known: elements or units were clipped)" if lost else ""
    yield f"  after it   {_percentiles(after)}{told}"
    if (stop := found.stop) is not None:
        yield f"  stops the run before the update of step {stop.step}: {stop.stop}"
    kinds = Counter((anomaly.kind, anomaly.level) for anomaly in found.anomalies)
    firsts = {(a.kind, a.level): a.step for a in reversed(found.anomalies)}
    for (kind, level), count in kinds.most_common():
        yield f"  {level} {kind}: {count}, first at step {firsts[kind, level]}"
    if not kinds:
        yield "  no anomaly"
    yield from (f"  note: {note}" for note in found.notes)
    yield from _differences(found)


def _differences(found: Replay) -> Iterator[str]:
    if not found.is_the_one_that_ran:
        yield (
            "Norms are those of the run as it went: had this policy changed a step, later ones "
            "would have differed."
        )
        return
    near = [difference for difference in found.differences if difference.is_near]
    far = [difference for difference in found.differences if not difference.is_near]
    if not found.differences:
        yield "Computed again, every step is decided as it was recorded."
        return
    yield (
        f"Computed again, {len(found.differences)} decisions differ from those recorded: "
        f"{len(near)} within 1e-6 of a limit, {len(far)} further away."
    )
    for one in [*far, *near][:MOST_LISTED]:
        recorded = "over" if one.recorded else "not over"
        yield (
            f"  step {one.step}, {one.rule}: recorded {recorded} its limit; "
            f"{one.distance:.2g} away from it when computed again"
        )


def rule_table(found: Replay) -> Table:
    """A line for each rule: what it is, its limits, how often it was exceeded."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("rule", "limit", "over its limit", "meaning"):
        table.add_column(heading, justify="left", overflow="fold")
    fired, steps = found.fired, len(found.outcomes)
    for rule in found.policy.clip:
        meaning = rule_sentence(rule)
        if rule.name in found.unknown:
            table.add_row(rule.name, "", found.unknown[rule.name], meaning)
            continue
        limits = [outcome.limits[rule.name] for outcome in found.outcomes]
        table.add_row(rule.name, _span(limits), _share(fired[rule.name], steps), meaning)
    return table


def picture(found: Replay, width: int) -> Iterator[str]:
    """The total norm over the run, the lowest limit in force as a line, and what was done."""
    outcomes, count = found.outcomes, len(found.outcomes)
    if not count:
        return
    width = max(10, min(width - 12, count))
    norms = columns([outcome.total_norm for outcome in outcomes], count, width)
    limits = [_lowest(outcome, found) for outcome in outcomes]
    bounds = span(norms)
    chart = [list(line) for line in log_chart(norms, HEIGHT)]
    if bounds is not None:
        for column in range(width):
            row = _row(limits[min(count - 1, (2 * column + 1) * count // (2 * width))], bounds)
            if row is not None and chart[row][column] == " ":
                chart[row][column] = "─"
    labels = ["" if bounds is None else f"{bounds[1]:.3g}", *[""] * (HEIGHT - 2)]
    labels.append("" if bounds is None else f"{bounds[0]:.3g}")
    for label, line in zip(labels, chart, strict=True):
        yield f"{label:>10} {''.join(line)}"
    yield f"{'clipped':>10} {_shares([o.clipped for o in outcomes], width)}"
    yield f"{'skipped':>10} {_shares([o.skipped is not None for o in outcomes], width)}"
    alarms = {anomaly.step for anomaly in found.anomalies if anomaly.level == "alert"}
    yield f"{'alerts':>10} {_shares([o.step in alarms for o in outcomes], width)}"
    first, last = outcomes[0].step, outcomes[-1].step
    yield f"{'step':>10} {first}{str(last).rjust(width - len(str(first)))}"


def _lowest(outcome: Outcome, found: Replay) -> float:
    """The least limit of rules that compare the L2 norm of everything."""
    whole = [r.name for r in found.policy.clip if r.per == "all" and r.measure == "l2"]
    return min((outcome.limits.get(name, math.inf) for name in whole), default=math.inf)


def _row(limit: float, bounds: tuple[float, float]) -> int | None:
    least, largest = bounds
    if not least <= limit <= largest or least == largest:
        return None
    level = (math.log(limit) - math.log(least)) / (math.log(largest) - math.log(least))
    return HEIGHT - 1 - min(HEIGHT - 1, int(level * HEIGHT))


def _shares(flags: Sequence[bool], width: int) -> str:
    """A block for each column, as high as the share of its steps; one step is always visible."""
    count = len(flags)
    cells = []
    for column in range(width):
        start = column * count // width
        part = flags[start : max((column + 1) * count // width, start + 1)]
        share = sum(part) / len(part) if part else 0.0
        cells.append(BLOCKS[math.ceil(share * (len(BLOCKS) - 1))])
    return "".join(cells)


def _share(count: int, of: int) -> str:
    return f"{count} of {of} steps ({count / of:.1%})" if of else "none of 0 steps"


def _span(limits: Sequence[float]) -> str:
    finite = [limit for limit in limits if math.isfinite(limit)]
    if not finite:
        return "none yet"
    low, high = min(finite), max(finite)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _percentiles(norms: Sequence[float]) -> str:
    finite = [norm for norm in norms if math.isfinite(norm)]
    if not finite:
        return "never finite"
    median, high, most = np.quantile(finite, (0.5, 0.99, 1.0))
    return f"median {median:.4g}, p99 {high:.4g}, largest {most:.4g}"
