"""RunInfo and Status to JSON and back: what a recording must hold to be read without the run."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from gradwatch.errors import RecordingError
from gradwatch.records import Layout, Parameter, RunInfo, Status

__all__ = ["info_from_json", "info_to_json", "status_from_json", "status_to_json"]

NAMES = ("rules", "multiplying", "measures")


def info_to_json(info: RunInfo) -> str:
    return json.dumps(asdict(info))


def info_from_json(text: str | bytes) -> RunInfo:
    """
    Raises:
        RecordingError: the text is not what `info_to_json` writes.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(RunInfo)} - {"layout", *NAMES}
        return RunInfo(
            layout=_layout(data["layout"]),
            rules=_names(data["rules"]),
            multiplying=_names(data["multiplying"]),
            measures=_names(data.get("measures", ())),
            **{name: value for name, value in data.items() if name in known},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"the description of the run cannot be read ({error})") from error


def status_to_json(status: Status) -> str:
    return json.dumps(asdict(status))


def status_from_json(text: str | bytes) -> Status:
    """
    Raises:
        RecordingError: the text is not what `status_to_json` writes.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        errors = data["hook_errors"].items()
        return Status(
            enforcing=bool(data["enforcing"]),
            records_dropped=int(data["records_dropped"]),
            hook_errors={str(component): int(count) for component, count in errors},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"the status of the run cannot be read ({error})") from error


def _names(names: list[Any]) -> tuple[str, ...]:
    return tuple(str(name) for name in names)


def _layout(data: dict[str, Any]) -> Layout:
    parameters = tuple(
        Parameter(
            name=str(entry["name"]),
            shape=tuple(int(size) for size in entry["shape"]),
            module=str(entry["module"]),
            group=int(entry["group"]),
            aliases=tuple(str(alias) for alias in entry["aliases"]),
            trainable=bool(entry.get("trainable", True)),
            unit_axis=int(entry.get("unit_axis", 0)),
            unit_groups=int(entry.get("unit_groups", 1)),
        )
        for entry in data["parameters"]
    )
    layers = tuple(str(layer) for layer in data["layers"])
    layer_of = tuple(int(index) for index in data["layer_of"])
    if len(layer_of) != len(parameters) or any(not 0 <= i < len(layers) for i in layer_of):
        raise ValueError("the layers do not fit the parameters")
    return Layout(parameters, layers, layer_of)
