"""RunInfo to JSON and back: what a recording must hold to be read without the run."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from gradwatch.errors import RecordingError
from gradwatch.records import Layout, Parameter, RunInfo

__all__ = ["info_from_json", "info_to_json"]


def info_to_json(info: RunInfo) -> str:
    return json.dumps(asdict(info))


def info_from_json(text: str | bytes) -> RunInfo:
    """
    Raises:
        RecordingError: the text is not what `info_to_json` writes.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(RunInfo)} - {"layout", "rules", "multiplying"}
        return RunInfo(
            layout=_layout(data["layout"]),
            rules=tuple(str(rule) for rule in data["rules"]),
            multiplying=tuple(str(rule) for rule in data["multiplying"]),
            **{name: value for name, value in data.items() if name in known},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"the description of the run cannot be read ({error})") from error


def _layout(data: dict[str, Any]) -> Layout:
    parameters = tuple(
        Parameter(
            name=str(entry["name"]),
            shape=tuple(int(size) for size in entry["shape"]),
            module=str(entry["module"]),
            group=int(entry["group"]),
            aliases=tuple(str(alias) for alias in entry["aliases"]),
        )
        for entry in data["parameters"]
    )
    layers = tuple(str(layer) for layer in data["layers"])
    layer_of = tuple(int(index) for index in data["layer_of"])
    if len(layer_of) != len(parameters) or any(not 0 <= i < len(layers) for i in layer_of):
        raise ValueError("the layers do not fit the parameters")
    return Layout(parameters, layers, layer_of)
