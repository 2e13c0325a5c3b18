"""The nouns: what is watched (Parameter, Layout) and what one step left behind (StepRecord).

Values only. Whatever crosses from the training thread to detection, recording, metrics and
dashboards is one of these, so that each of them can be replayed from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "POLICY",
    "SAMPLES",
    "Anomaly",
    "Culprit",
    "Evidence",
    "Grouping",
    "Layout",
    "Level",
    "Origin",
    "Parameter",
    "RunInfo",
    "Status",
    "StepRecord",
    "layer_name",
]

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

Level = Literal["event", "warning", "alert"]
Origin = Literal["input", "weight", "forward", "loss", "gradient"]
Evidence = Literal["flags", "replay", "live"]
Grouping = Literal["parameter", "module"] | int
"""How parameters form layers: one each, by owning module, or by the first n parts of its path."""

ROOT = "(root)"

POLICY = "policy"
"""The kind of event that tells of a policy file that was written while the run goes on."""


SAMPLES = ("zero_share", "flushed_share", "unchanged_share", "update_norm", "weight_norm")
"""What is known of each parameter in a step that was sampled:

* zero_share: of the elements of its gradient those that are 0
* flushed_share: those that are 0 or that float16 makes 0 at the present loss scale: where it was
  computed in float16 the two cannot be told apart
* unchanged_share: of the weights whose element is not 0 those that the step left as they were
* update_norm, weight_norm: L2 norms of what the step has added to its weights, and of these
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter tensor as the policy and the reader know it."""

    name: str
    """Its first name in `named_parameters()`."""

    shape: tuple[int, ...] = ()

    module: str = ""
    """Class name of the module that owns it, e.g. `Embedding`."""

    group: int = 0
    """Index of the optimizer's parameter group."""

    aliases: tuple[str, ...] = ()
    """Further names of a tied parameter; a selector may use any of them."""

    trainable: bool = True
    """Whether it asked for a gradient when the watch began."""

    unit_axis: int = 0
    """The axis along which its output units lie: 0 in torch, another one where a layer keeps its
    weights transposed."""

    unit_groups: int = 1
    """Groups of a transposed convolution: the units of each are behind one another."""

    @property
    def num_units(self) -> int:
        """Output units; a tensor of fewer than 2 dimensions is one unit as a whole."""
        return self.shape[self.unit_axis] * self.unit_groups if len(self.shape) > 1 else 1

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def layer_name(parameter: str, grouping: Grouping) -> str:
    """The layer of a parameter name: `a.b.weight` is in `a.b`, at depth 1 in `a`."""
    if grouping == "parameter":
        return parameter
    path = parameter.split(".")[:-1]
    if grouping != "module":
        path = path[:grouping]
    return ".".join(path) or ROOT


@dataclass(frozen=True)
class Layout:
    """Which parameters are watched, in which order, and which layer each one belongs to.

    P parameters in `named_parameters()` order, L layers in order of their first parameter.
    """

    parameters: tuple[Parameter, ...]
    layers: tuple[str, ...]
    layer_of: tuple[int, ...]
    """[P] index into `layers`."""

    @classmethod
    def of(cls, parameters: Sequence[Parameter], grouping: Grouping = "module") -> Layout:
        names = [layer_name(parameter.name, grouping) for parameter in parameters]
        layers = tuple(dict.fromkeys(names))
        index = {layer: i for i, layer in enumerate(layers)}
        return cls(tuple(parameters), layers, tuple(index[name] for name in names))

    @cached_property
    def layer_of_P(self) -> Indices:
        return np.asarray(self.layer_of, dtype=np.intp)

    def layer_norms(self, tensor_norms_P: npt.NDArray[np.floating]) -> Float64s:
        """L2 norm of each layer [L] from the L2 norms of its tensors [P], in float64."""
        squares = np.square(np.asarray(tensor_norms_P, dtype=np.float64))
        return np.sqrt(np.bincount(self.layer_of_P, squares, minlength=len(self.layers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """One detector's finding. An episode of consecutive steps is one anomaly."""

    kind: str
    """A kind of the detectors: `exploding`, `nonfinite`, ..."""

    level: Level
    step: int

    layer: str | None = None
    """The worst layer, or None where no single layer is meant."""

    layers: tuple[str, ...] = ()
    """The affected layers, worst first; at most a handful, `message` counts the rest."""

    value: float = float("nan")
    expected: float = float("nan")
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """What went bad first in a step that is not finite, as far as that is known."""

    origin: Origin | None = None
    """What went bad first; None where it was not determined."""

    module: str | None = None
    """Path of the module where it began: whose weight it is, whose forward pass has made it from
    inputs that were fine, or whose gradient is the first bad one in the backward pass. None where
    no module is meant or it was not determined."""

    near: tuple[str, ...] = ()
    """Modules between which it began, or that are suspected where none is named."""

    evidence: Evidence = "flags"
    """Norms and weights of the step; its forward pass run again; or the flags of the pass itself.
    """

    message: str = ""
    batch: str = ""
    """Hash of what the model was called with; empty where that was not kept."""

    same_batch: tuple[int, ...] = ()
    """Earlier steps that were bad with the same batch."""

    ranks: tuple[int, ...] = ()
    """Where several processes average their gradients: those whose own was bad before."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What stays the same for the whole of one run on one rank."""

    run: str
    layout: Layout
    rank: int = 0
    rules: tuple[str, ...] = ()
    """Names of the clip rules, in the order of the policy."""

    multiplying: tuple[str, ...] = ()
    """Those of them that change a gradient, by scaling or zeroing."""

    measures: tuple[str, ...] = ()
    """What is recorded of each tensor beside its L2 norm, since a rule compares it: `l1`, `linf`,
    `weight`, `update`, or `unit:` and the name of a rule."""

    mode: str = "observe"
    """`enforce`, `shadow` or `observe` (no policy)."""

    policy: str = ""
    """The policy in force as canonical YAML; empty without one."""

    policy_sha256: str = ""
    framework: str = ""
    """E.g. `torch 2.13.0`."""

    device: str = ""
    """That the parameters were on at first, e.g. `cpu`."""

    model: str = ""
    version: str = ""
    """Of gradwatch."""

    host: str = ""
    """The name of the machine, since hardware can be the culprit."""

    started: float = 0.0
    """Unix time in seconds."""

    pid: int = 0
    process_table: str = ""
    """Which boot and pid namespace `pid` is a number of; empty where that is not known."""

    @property
    def is_shadow(self) -> bool:
        """Whether decisions are recorded that are not applied."""
        return self.mode == "shadow"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every reason for which a step may be skipped."""
        return ("nonfinite", "overflow", *self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What no record tells of a run."""

    enforcing: bool
    """Whether the policy's decisions are applied."""

    records_dropped: int
    hook_errors: Mapping[str, int]
    """Errors of gradwatch itself, by component."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step left behind; skipped steps have one too.

    Norms are L2, pre-clip, unscaled and of the gradient that the optimizer was due to see.
    A parameter without a gradient has norm 0, coef 1 and `present_P` false.
    """

    step: int
    """Optimizer steps that were due before this one, skipped ones included."""

    time: float
    """Unix time in seconds."""

    layout: Layout
    total_norm: float
    total_norm_clipped: float
    """The same norm after the policy; equal to `total_norm` where nothing was clipped."""

    clip_coef: float = 1.0
    """total_norm_clipped / total_norm; 1 where the norm is 0 or not finite."""

    fired: tuple[str, ...] = ()
    """Names of the clip rules whose limit was exceeded."""

    clipped: bool = False
    """Whether any multiplier was below 1."""

    skipped: str | None = None
    """Why the step was dropped (`nonfinite`, `overflow` by a loss scaler, or a rule's name); in
    shadow mode, why it would have been, but for an `overflow`, which is the scaler's."""

    tensor_norms_P: Float32s
    tensor_coefs_P: Float32s
    present_P: Bools
    limits: Mapping[str, float] = field(default_factory=dict)
    """The limit in force, by rule name."""

    measures: Mapping[str, Float32s] = field(default_factory=dict)
    """[P] what the rules compared beside the L2 norm, by the names of `RunInfo.measures`; 0 where
    there was nothing to measure."""

    samples: Mapping[str, Float32s] = field(default_factory=dict)
    """[P] by `SAMPLES`, NaN where there is nothing to say; empty in a step that was not sampled."""

    micro_batches: int = 1
    weight: float = 1.0
    loss_scale: float = float("nan")
    learning_rate: float = float("nan")
    local_norm: float = float("nan")
    """L2 norm of the gradient of this process alone, before it was averaged with those of others;
    NaN where it was not sampled, or is not known."""

    noise_scale: float = float("nan")
    """Batch size at which noise and signal are equal (B_simple), in micro-batches, or in the unit
    of the weights where they have some; NaN while it is not known."""

    duration_seconds: float = float("nan")
    """Since the step before; NaN for the first."""

    overhead_seconds: float = 0.0
    """Spent by gradwatch on the training thread in this step."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    """What `watch.log` was given for this step; `loss` among them."""

    anomalies: tuple[Anomaly, ...] = ()
    culprit: Culprit | None = None
    """What went bad first, in a step where that was looked for; a recording keeps it on the card of
    the step."""

    @property
    def layers(self) -> tuple[str, ...]:
        return self.layout.layers

    @cached_property
    def present_L(self) -> Bools:
        """[L] whether any parameter of the layer had a gradient."""
        layer_of = self.layout.layer_of_P
        return np.bincount(layer_of, self.present_P, minlength=len(self.layers)) > 0

    @cached_property
    def grad_norms(self) -> Float32s:
        """[L] L2 norm of each layer's gradient before clipping."""
        return self.layout.layer_norms(self.tensor_norms_P).astype(np.float32)

    @cached_property
    def update_ratios(self) -> Float32s:
        """[L] norm of each layer's update over that of its weights, NaN where it is not known;
        empty in a step that was not sampled."""
        if not self.samples:
            return np.empty(0, dtype=np.float32)
        with np.errstate(all="ignore"):
            update_L, weight_L = (
                self.layout.layer_norms(self.samples[name])
                for name in ("update_norm", "weight_norm")
            )
            ratio_L: Float64s = update_L / weight_L
        return ratio_L.astype(np.float32)

    @cached_property
    def coefs(self) -> Float32s:
        """[L] post-clip norm over pre-clip norm of each layer, 1 where that is 0 or not finite."""
        before = self.layout.layer_norms(self.tensor_norms_P)
        with np.errstate(invalid="ignore"):
            after = self.layout.layer_norms(self.tensor_norms_P * self.tensor_coefs_P)
        usable = np.isfinite(before) & (before > 0)
        return np.divide(after, before, out=np.ones_like(before), where=usable).astype(np.float32)
