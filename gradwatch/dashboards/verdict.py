"""The first row: is this run well, and if not, since when?"""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.layout import Row, line
from gradwatch.dashboards.panels import mapping, stat, state_timeline, target, thresholds

__all__ = ["CLIPPED_SHARE", "ENFORCING", "MODES", "STATE", "STATES", "verdict"]

STATE = """1 * max by (run) (gradwatch_run_state{state="running"})
+ 2 * max by (run) (gradwatch_run_state{state="finished"})
+ 3 * max by (run) (gradwatch_run_state{state="stopped"})
+ 4 * max by (run) (gradwatch_run_state{state="crashed"})"""

CLIPPED_SHARE = """max by (run) (
  sum by (run, rule) (increase(gradwatch_clipped_steps_total[$__range]))
  / on (run) group_left ()
  sum by (run) (increase(gradwatch_steps_total[$__range]) > 0)
)"""

ENFORCING = """min by (run) (
  gradwatch_enforcing and on (job, instance, run, rank) gradwatch_info{mode="enforce"}
)
or 2 * max by (run) (gradwatch_info{mode="shadow"})
or 3 * max by (run) (gradwatch_info{mode="observe"})"""

STATES = mapping(
    _1=("running", "green"),
    _2=("finished", "blue"),
    _3=("stopped by the policy", "orange"),
    _4=("crashed", "red"),
)

MODES = mapping(
    _0=("NOT ENFORCING", "red"),
    _1=("enforcing", "green"),
    _2=("shadow", "blue"),
    _3=("observing", "text"),
)

_ALARM_AT_ONE = thresholds((None, "green"), (1, "red"))


def verdict() -> Row:
    figures = line(
        4,
        stat(
            "State",
            "What the run last said about itself. After a crash, open the recording: it holds "
            "every step up to the last.",
            STATE,
            unit="none",
            mappings=STATES,
        ),
        stat(
            "Open anomalies",
            "Kinds of anomaly whose ALERT episode is open now. Above 0: read the band below for "
            "the kind, then find the layer that moved first in the section Layers.",
            "sum by (run) (max by (run, event) (gradwatch_anomaly_active))",
            unit="none",
            steps=_ALARM_AT_ONE,
        ),
        stat(
            "Speed",
            "Optimizer steps per second. A drop without a change of the batch points at the data "
            "loader, a slow node or a checkpoint.",
            "max by (run) (rate(gradwatch_steps_total[$__rate_interval]))",
            unit="suffix: steps/s",
            decimals=2,
        ),
        stat(
            "Total norm",
            "L2 norm of the whole gradient at the last step, before clipping. NaN means that the "
            "last step was not finite: look for the layer and at the loss scale.",
            "max by (run) (gradwatch_total_norm)",
            unit="none",
            mappings=mapping(nan=("not finite", "red")),
        ),
        stat(
            "Clipped share",
            "Share of the steps in the time range shown that the busiest clip rule changed. Near "
            "100 % clipping acts as a normaliser: raise the limit or lower the learning rate.",
            CLIPPED_SHARE,
            unit="percentunit",
            steps=thresholds((None, "green"), (THRESHOLDS.clipped_share, "orange")),
            decimals=1,
        ),
        stat(
            "Skipped steps",
            "Steps in the time range shown whose gradients were dropped. A few under mixed "
            "precision are normal; if it grows, see the reason under Trend.",
            "sum by (run) (increase(gradwatch_skipped_steps_total[$__range]))",
            unit="none",
            steps=thresholds((None, "green"), (1, "orange")),
            decimals=0,
        ),
        stat(
            "Last step ago",
            "Time since the last optimizer step. If it grows while the state is running, the run "
            "hangs: take a stack dump of the process before you restart it.",
            "time() - max by (run) (gradwatch_last_step_timestamp_seconds > 0)",
            unit="s",
            steps=thresholds((None, "green"), (THRESHOLDS.stalled_seconds, "red")),
            decimals=0,
        ),
        stat(
            "Policy",
            "Whether the policy's decisions reach the gradient. Not enforcing: training goes on "
            "unclipped; see the hook errors in the last section and the log of the run.",
            ENFORCING,
            unit="none",
            mappings=MODES,
        ),
    )
    return Row(title="Verdict", lines=[figures, line(5, _episodes())])


def _episodes() -> dict[str, object]:
    return state_timeline(
        "Anomalies and alerts",
        "Red while an ALERT episode of that kind, or an alert of Prometheus, is open. The left "
        "edge is where to look: zoom in there and compare the layers.",
        target("max by (run, event) (gradwatch_anomaly_active)", "{{run}} {{event}}"),
        target(
            'max by (run, alertname) (ALERTS{alertname=~"Gradwatch.+",alertstate="firing"})',
            "{{run}} {{alertname}}",
        ),
        mappings=mapping(_0=("quiet", "transparent"), _1=("open", "red")),
    )
