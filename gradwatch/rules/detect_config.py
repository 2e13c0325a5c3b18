"""The `detect:` section in, typed parameters of each detector out.

A kind of anomaly has one frozen dataclass whose defaults are the measured ones; None stands for a
detector that is switched off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradwatch.rules.baseline import Band

__all__ = [
    "KINDS",
    "DetectionConfig",
    "ExplodingConfig",
    "KindConfig",
    "NonfiniteConfig",
    "OutlierConfig",
    "OverflowConfig",
    "SpikeConfig",
    "VanishingConfig",
    "detection_config",
]

KINDS: tuple[str, ...] = (
    "nonfinite",
    "exploding",
    "spike",
    "vanishing",
    "overflow",
)
"""Every kind of anomaly, most urgent first."""

ELSEWHERE = ("then",)
"""Parameters of a detector that others read: what a finding leads to is not for detection."""


def _require(holds: bool, rule: str, value: float) -> None:
    if not holds:
        raise ValueError(f"{rule}. Received: {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NonfiniteConfig:
    """A norm that is inf or NaN. There is nothing to set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverflowConfig:
    """A norm that is inf or NaN in a step that a loss scaler drops. There is nothing to set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierConfig:
    """A norm far above its own baseline; what `exploding` and `spike` share."""

    z: float = 6.0
    """Distance of ln(norm) from its median to be exceeded, in units of 1.4826 x MAD."""

    times: float = 4.0
    """How many times its median the norm must exceed as well."""

    need: int = 1
    """Steps out of the last `of` that must be abnormal."""

    of: int = 1
    """The number of last steps that are looked at."""

    floor: float = 0.25
    """Least scale of ln(norm), so that a very steady norm does not make every step abnormal."""

    warmup: int = 50
    """Accepted values before the baseline is trusted."""

    window: int = 128
    """Accepted values that median and MAD are taken from."""

    def __post_init__(self) -> None:
        _require(self.z > 0 and math.isfinite(self.z), "z must be > 0", self.z)
        _require(self.times >= 1 and math.isfinite(self.times), "times must be >= 1", self.times)
        _require(self.floor > 0 and math.isfinite(self.floor), "floor must be > 0", self.floor)
        _require(1 <= self.need <= self.of, f"need must be in 1..of={self.of}", self.need)
        within = f"warmup must be in 1..window={self.window}"
        _require(1 <= self.warmup <= self.window, within, self.warmup)

    @property
    def band(self) -> Band:
        return Band(
            z=self.z, times=self.times, floor=self.floor, warmup=self.warmup, window=self.window
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplodingConfig(OutlierConfig):
    """A norm that stays far above its own baseline."""

    need: int = 3
    """Steps out of the last `of` that must be abnormal."""

    of: int = 5
    """The number of last steps that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeConfig(OutlierConfig):
    """A norm that jumps far above its own baseline, be it for one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VanishingConfig:
    """A module whose norm stays a tiny share of the largest one's."""

    share: float = 1e-5
    """Norm of the module over the norm of the largest module, to stay below."""

    need: int = 20
    """Steps out of the last `of` that must be abnormal."""

    of: int = 25
    """The number of last steps that are looked at."""

    after: int = 20
    """Steps of the run that are passed over: a network may start with layers at rest."""

    def __post_init__(self) -> None:
        _require(0 < self.share < 1, "share must be in (0, 1)", self.share)
        _require(1 <= self.need <= self.of, f"need must be in 1..of={self.of}", self.need)
        _require(self.after >= 0, "after must be >= 0", self.after)


KindConfig = NonfiniteConfig | OverflowConfig | ExplodingConfig | SpikeConfig | VanishingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    """The parameters of every kind of `KINDS`; None switches a detector off."""

    nonfinite: NonfiniteConfig | None = NonfiniteConfig()
    overflow: OverflowConfig | None = OverflowConfig()
    exploding: ExplodingConfig | None = ExplodingConfig()
    spike: SpikeConfig | None = SpikeConfig()
    vanishing: VanishingConfig | None = VanishingConfig()

    def __getitem__(self, kind: str) -> KindConfig | None:
        if kind not in KINDS:
            raise KeyError(kind)
        found: KindConfig | None = getattr(self, kind)
        return found


def detection_config(mapping: Mapping[str, Mapping[str, object] | None]) -> DetectionConfig:
    """Reads the policy's `detect:` section: parameters by kind, None for off, left out for default.

    Raises:
        ValueError: an unknown kind, an unknown parameter, or a value that cannot be; each named
            by its path in the policy.
    """
    defaults = DetectionConfig()
    configs: dict[str, Any] = {}
    for kind, parameters in mapping.items():
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"detect.{kind}: no such detector. Expected one of {known}")
        configs[kind] = None if parameters is None else _made(kind, defaults[kind], parameters)
    return dataclasses.replace(defaults, **configs)


def _made(kind: str, default: Any, parameters: Mapping[str, object]) -> KindConfig:
    types = {
        field.name: type(getattr(default, field.name)) for field in dataclasses.fields(default)
    }
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in ELSEWHERE:
            continue
        if name not in types:
            known = ", ".join(types) or "none"
            raise ValueError(f"detect.{kind}.{name}: no such parameter. Expected: {known}")
        values[name] = _number(f"detect.{kind}.{name}", value, types[name])
    try:
        made: KindConfig = dataclasses.replace(default, **values)
    except ValueError as error:
        raise ValueError(f"detect.{kind}: {error}") from None
    return made


def _number(path: str, value: object, kind: type) -> float | int:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if float(value).is_integer():
            return int(value)
    expected = "a number" if kind is float else "a whole number"
    raise ValueError(f"{path} must be {expected}. Received: {value!r}")
