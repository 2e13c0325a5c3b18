"""The dashboard of the policy: what it clips, skips and accumulates, and whether that is meant."""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.board import CLIPPING, board
from gradwatch.dashboards.layout import Line, Row, line
from gradwatch.dashboards.panels import (
    Json,
    heatmap,
    stat,
    state_timeline,
    styled,
    table,
    target,
    thresholds,
    timeseries,
)
from gradwatch.dashboards.trend import (
    accumulation,
    clipped,
    loss_scale,
    noise_scale,
    pace,
    skipped,
    spread,
    total_norm,
)
from gradwatch.dashboards.verdict import CLIPPED_SHARE, ENFORCING, MODES

__all__ = ["clipping_dashboard"]

_SKIPPED_SHARE = """max by (run) (
  sum by (run, rank) (increase(gradwatch_skipped_steps_total[$__range]))
  / (sum by (run, rank) (increase(gradwatch_steps_total[$__range])) > 0)
)"""

_LEFT = """max by (run) (gradwatch_total_norm_clipped)
/ (max by (run) (gradwatch_total_norm) > 0)"""

_OVER_LIMIT = """max by (run) (gradwatch_total_norm_window_max)
/ on (run) group_right () (max by (run, rule) (gradwatch_limit) > 0)"""


def clipping_dashboard(runbook_url: str) -> Json:
    return board(
        CLIPPING,
        "clipping and accumulation",
        "What the policy does to the gradient: limits, clipped and skipped steps, accumulation.",
        [
            Row(title="The policy now", lines=[_figures(), line(7, _rules(), _mode())]),
            Row(
                title="Clipping",
                lines=[
                    line(9, total_norm(), spread(), widths=(16, 8)),
                    line(7, clipped(), _left(), _over_limit()),
                    line(11, _coefs()),
                ],
            ),
            Row(
                title="Skipping and accumulation",
                lines=[
                    line(7, skipped(), loss_scale(), widths=(12, 12)),
                    line(7, noise_scale(), accumulation(), pace()),
                ],
            ),
        ],
        choose=("job", "run", "rank"),
        runbook_url=runbook_url,
    )


def _figures() -> Line:
    return line(
        4,
        stat(
            "Policy",
            "Whether the policy's decisions reach the gradient. Not enforcing: training goes on "
            "unclipped; see the hook errors of gradwatch / exporter and the log of the run.",
            ENFORCING,
            unit="none",
            mappings=MODES,
        ),
        stat(
            "Clipped share",
            "Share of the steps in the time range shown that the busiest rule changed. Near "
            "100 % the limit is the learning rate in disguise: raise it or lower the rate.",
            CLIPPED_SHARE,
            unit="percentunit",
            steps=thresholds((None, "green"), (THRESHOLDS.clipped_share, "orange")),
            decimals=1,
        ),
        stat(
            "Left by clipping",
            "Norm after clipping over norm before, at the last step. A small share for long: "
            "most of the gradient is thrown away, whatever the learning rate says.",
            _LEFT,
            unit="percentunit",
            decimals=1,
        ),
        stat(
            "Skipped share",
            "Share of the steps in the time range shown that were dropped. Above a few percent "
            "treat the reason: the data of these steps is lost to the model.",
            _SKIPPED_SHARE,
            unit="percentunit",
            steps=thresholds((None, "green"), (THRESHOLDS.skipped_share, "orange")),
            decimals=2,
        ),
        stat(
            "Micro-batches per step",
            "Micro-batches in the last optimizer step. Compare with the noise scale below: far "
            "below it, more of them would still pay.",
            "max by (run) (gradwatch_accumulation_steps)",
            unit="none",
            decimals=0,
        ),
        stat(
            "Micro-batches per second",
            "Forward-backward passes per second. What accumulation costs: steps per second are "
            "this divided by the micro-batches per step.",
            "max by (run) (rate(gradwatch_micro_batches_total[$__rate_interval]))",
            unit="none",
            decimals=2,
        ),
    )


def _rules() -> Json:
    return table(
        "Rules",
        "Each rule with a limit: the limit in force and how many steps of the time range it "
        "changed. A rule that never clips can go; one that always does is a normaliser.",
        target("max by (run, rule) (gradwatch_limit)", now=True, form="table"),
        target(
            "max by (run, rule) (increase(gradwatch_clipped_steps_total[$__range]))",
            now=True,
            form="table",
        ),
        unit="none",
        columns={
            "run": "Run",
            "rule": "Rule",
            "Value #A": "Limit",
            "Value #B": "Steps clipped",
        },
        sort_by="Steps clipped",
        overrides=(styled("Steps clipped", decimals=0),),
    )


def _mode() -> Json:
    return state_timeline(
        "Policy in force",
        "Green while decisions reach the gradient, red while they should and do not. Red: what "
        "was trained since then is not what was approved; see GradwatchNotEnforcing.",
        target(ENFORCING, "{{run}}"),
        mappings=MODES,
    )


def _left() -> Json:
    return timeseries(
        "Left by clipping",
        "Norm after clipping over norm before, at each scrape. It should touch 100 % most of the "
        "time: where it stays below, the limit decides the step size.",
        target(_LEFT, "{{run}}"),
        unit="percentunit",
        least=0,
        most=1,
    )


def _over_limit() -> Json:
    return timeseries(
        "Largest norm over limit",
        "Largest total norm of the last minute over the limit of each rule; the line is the "
        "limit. Just above 1 clips gently; 100 times is an accident that clipping hides.",
        target(_OVER_LIMIT, "{{run}} {{rule}}"),
        unit="none",
        log=True,
        marks=((1.0, "orange"),),
    )


def _coefs() -> Json:
    return heatmap(
        "Clip coefficient of every layer",
        "What clipping left of each layer's gradient; full colour is untouched. A dark row is a "
        "layer that a rule of its own holds back, a dark column a step that was clipped whole.",
        target("min by (layer) (gradwatch_clip_coef)", "{{layer}}"),
        unit="none",
        cell_unit="percentunit",
        hide_below=-1,
    )
