"""The METRICS table: every series that gradwatch exports, in one place.

The exporter, the alert rules, the dashboards and the docs import this table or are tested
against it. Names are API: base units, `_total` on counters only, `run` and `rank` on all but those
of a node agent about itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AGENT_METRICS", "END_METRICS", "METRICS", "PREFIX", "MetricSpec"]

PREFIX = "gradwatch_"
Type = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    name: str
    """Without prefix; as exposed, so counters end in `_total`."""

    type: Type
    help: str
    labels: tuple[str, ...] = ()
    """Beside `run` and `rank`."""

    unit: str = "none"
    """Grafana unit of a panel that shows it."""

    needs: str = ""
    """What a run must have for it to have a series; empty where each run that trains has one."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def family(self) -> str:
        """The name in OpenMetrics, whose counters and infos put their suffix on samples only."""
        suffix = {"counter": "_total", "info": "_info"}.get(self.type, "")
        return self.full_name.removesuffix(suffix)


_SPECS = (
    MetricSpec("steps_total", "counter", "Optimizer steps that were due, skipped ones included."),
    MetricSpec("step", "gauge", "Index of the last optimizer step."),
    MetricSpec("micro_batches_total", "counter", "Forward-backward passes seen."),
    MetricSpec("accumulation_steps", "gauge", "Micro-batches in the last optimizer step."),
    MetricSpec("total_norm", "gauge", "L2 norm of the whole gradient before clipping."),
    MetricSpec("total_norm_clipped", "gauge", "L2 norm of the whole gradient after clipping."),
    MetricSpec(
        "total_norm_window_max",
        "gauge",
        "Largest finite total_norm of the last 60 seconds, so that a one-step spike is scraped.",
    ),
    MetricSpec(
        "total_norm_distribution", "histogram", "Distribution of the finite pre-clip total_norm."
    ),
    MetricSpec(
        "grad_norm", "gauge", "L2 norm of one layer's gradient before clipping.", ("layer",)
    ),
    MetricSpec(
        "clip_coef",
        "gauge",
        "Multiplier that clipping applied to one layer's gradient, 1 when untouched.",
        ("layer",),
        needs="a policy",
    ),
    MetricSpec(
        "update_ratio",
        "gauge",
        "Norm of one layer's update over that of its weights, in the last step that was sampled: "
        "each tenth one, or as detect.every says.",
        ("layer",),
        needs="sampling of updates, which detect: none switches off",
    ),
    MetricSpec(
        "clipped_steps_total",
        "counter",
        "Steps in which a rule clipped; in shadow mode, in which it would have.",
        ("rule",),
        needs="a policy with a clip rule",
    ),
    MetricSpec(
        "skipped_steps_total",
        "counter",
        "Steps dropped, by reason; in shadow mode, those that a policy would have dropped, too.",
        ("reason",),
        needs="a policy or a loss scaler",
    ),
    MetricSpec("events_total", "counter", "Anomalies, by kind and level.", ("event", "level")),
    MetricSpec(
        "last_event_timestamp_seconds",
        "gauge",
        "Unix time of the last step of an ALERT episode of this kind, 0 when there was none.",
        ("event",),
        "dateTimeAsIso",
    ),
    MetricSpec(
        "anomaly_active", "gauge", "1 while an ALERT episode of this kind is open.", ("event",)
    ),
    MetricSpec("anomalous_layers", "gauge", "Layers in an open episode of this kind.", ("event",)),
    MetricSpec("loss", "gauge", "Last loss given to watch.log.", needs="watch.log(loss=loss)"),
    MetricSpec(
        "loss_scale",
        "gauge",
        "Loss scale of mixed precision, when one is known.",
        needs="a loss scaler",
    ),
    MetricSpec("learning_rate", "gauge", "Learning rate of the first parameter group."),
    MetricSpec(
        "noise_scale",
        "gauge",
        "Batch size at which noise and signal are equal, in micro-batches or the unit of weights.",
        needs="accumulation: two micro-batches in a step or more",
    ),
    MetricSpec(
        "local_norm",
        "gauge",
        "L2 norm of this rank's own gradient before it is averaged with others; sampled.",
        needs="two ranks under DistributedDataParallel",
    ),
    MetricSpec("limit", "gauge", "Limit in force.", ("rule",), needs="a policy with a clip rule"),
    MetricSpec(
        "enforcing",
        "gauge",
        "1 while the policy's decisions are applied, 0 while they are not.",
    ),
    MetricSpec("records_dropped_total", "counter", "Steps the recorder could not keep up with."),
    MetricSpec("recording_bytes", "gauge", "Size of the recording on disk.", (), "bytes"),
    MetricSpec(
        "last_step_timestamp_seconds",
        "gauge",
        "Unix time of the last optimizer step.",
        (),
        "dateTimeAsIso",
    ),
    MetricSpec(
        "step_duration_seconds", "histogram", "Time from one optimizer step to the next.", (), "s"
    ),
    MetricSpec(
        "overhead_seconds_total", "counter", "Time gradwatch took on the training thread.", (), "s"
    ),
    MetricSpec("hook_errors_total", "counter", "Errors of gradwatch itself.", ("component",)),
    MetricSpec(
        "series_dropped", "gauge", "Layers that the cap leaves without series of their own."
    ),
    MetricSpec("run_state", "gauge", "1 for the state the run is in.", ("state",)),
    MetricSpec(
        "info",
        "info",
        "What runs: always 1.",
        ("version", "framework", "mode", "policy", "model"),
    ),
)

METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _SPECS}
"""By name without the prefix."""

_AGENT_SPECS = (
    MetricSpec(
        "agent_recordings",
        "gauge",
        "Recordings that the node agent follows, by the state of their runs; reading: it has not "
        "read all of it yet, hidden: another one has the same run and rank.",
        ("state",),
        needs="a node agent: gradwatch serve",
    ),
    MetricSpec(
        "agent_unreadable_files",
        "gauge",
        "Files in the directory of the node agent that are recordings by name only.",
        needs="a node agent: gradwatch serve",
    ),
    MetricSpec(
        "agent_errors_total",
        "counter",
        "Errors of the node agent itself.",
        needs="a node agent: gradwatch serve",
    ),
)

AGENT_METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _AGENT_SPECS}
"""What a node agent (`gradwatch serve`) says of itself, without `run` and `rank`."""

PUSHED = "a Pushgateway, and a run that has ended"

_END_SPECS = (
    MetricSpec(
        "end_state", "gauge", "1 for the state that the run ended in.", ("state",), needs=PUSHED
    ),
    MetricSpec(
        "end_timestamp_seconds",
        "gauge",
        "Unix time at which the run ended.",
        (),
        "dateTimeAsIso",
        needs=PUSHED,
    ),
    MetricSpec(
        "end_steps", "gauge", "Optimizer steps of the run, skipped ones included.", needs=PUSHED
    ),
    MetricSpec(
        "end_skipped_steps",
        "gauge",
        "Steps of the run that were dropped; in shadow mode, would have been.",
        ("reason",),
        needs=PUSHED,
    ),
    MetricSpec(
        "end_clipped_steps", "gauge", "Steps in which a rule clipped.", ("rule",), needs=PUSHED
    ),
    MetricSpec("end_events", "gauge", "Anomalies of the run.", ("event", "level"), needs=PUSHED),
    MetricSpec("end_total_norm", "gauge", "Pre-clip total_norm of the last step.", needs=PUSHED),
    MetricSpec(
        "end_total_norm_max",
        "gauge",
        "Largest finite pre-clip total_norm of the run.",
        needs=PUSHED,
    ),
    MetricSpec("end_loss", "gauge", "Last loss given to watch.log.", needs=PUSHED),
)

END_METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _END_SPECS}
"""What a run that has ended leaves at a Pushgateway, beside `last_event_timestamp_seconds`. Gauges
under names of their own: what was pushed stays, and would be a run that stands still for the rules
that ask how runs are."""
