"""Title, meaning and queries in, one Grafana panel out (classic JSON model, schemaVersion 39).

A panel here has no id, place, data source or selection of runs yet: `layout` gives it those.
Units are Grafana's.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "NOT_SCRAPED",
    "Json",
    "count",
    "heatmap",
    "mapping",
    "stat",
    "state_timeline",
    "styled",
    "table",
    "target",
    "thresholds",
    "timeseries",
]

Json = dict[str, Any]
"""A JSON object of Grafana's."""

NOT_SCRAPED = "run finished or not scraped"


def target(
    query: str,
    legend: str = "",
    *,
    now: bool = False,
    form: str = "time_series",
    exemplars: bool = False,
) -> Json:
    """One query over the dashboard's range or, with `now`, at its end only."""
    return {
        "editorMode": "code",
        "exemplar": exemplars,
        "expr": query,
        "format": form,
        "instant": now,
        "legendFormat": legend or "__auto",
        "range": not now,
    }


def thresholds(*steps: tuple[float | None, str]) -> Json:
    """Colours from a value upwards; the first step has None and holds below all others."""
    return {
        "mode": "absolute",
        "steps": [{"color": color, "value": value} for value, color in steps],
    }


def mapping(**texts: tuple[str, str]) -> list[Json]:
    """`_1=("running", "green")` shows 1 as a green "running"; `nan=` catches NaN."""
    mappings: list[Json] = []
    values: Json = {}
    for index, (key, (text, color)) in enumerate(texts.items()):
        shown = {"color": color, "index": index, "text": text}
        if key == "nan":
            mappings.append({"type": "special", "options": {"match": "nan", "result": shown}})
        else:
            values[key.removeprefix("_")] = shown
    if values:
        mappings.append({"type": "value", "options": values})
    return mappings


def styled(legend: str, *, regex: bool = False, **properties: object) -> Json:
    """An override for the series of that legend; `__` in a property's name stands for a dot."""
    return {
        "matcher": {"id": "byRegexp" if regex else "byName", "options": legend},
        "properties": [
            {"id": key.replace("__", "."), "value": value} for key, value in properties.items()
        ],
    }


def stat(
    title: str,
    description: str,
    query: str,
    *,
    unit: str,
    steps: Json | None = None,
    mappings: list[Json] | None = None,
    decimals: int | None = None,
    legend: str = "{{run}}",
) -> Json:
    """One figure per run, or whatever else `legend` tells apart, as it is now."""
    panel = _panel("stat", title, description, [target(query, legend, now=True)], unit)
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "thresholds"},
        "mappings": mappings or [],
        "thresholds": steps or thresholds((None, "text")),
    }
    if decimals is not None:
        panel["fieldConfig"]["defaults"]["decimals"] = decimals
    panel["options"] = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "center",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
    return panel


def count(title: str, description: str, query: str, steps: Json | None = None) -> Json:
    """One whole number for all that is chosen."""
    return stat(title, description, query, unit="none", steps=steps, legend=title, decimals=0)


def timeseries(
    title: str,
    description: str,
    *targets: Json,
    unit: str,
    log: bool = False,
    bars: bool = False,
    least: float | None = None,
    most: float | None = None,
    marks: tuple[tuple[float, str], ...] = (),
    overrides: tuple[Json, ...] = (),
) -> Json:
    """Lines or stacked bars over time; `log` makes the axis logarithmic to the base 10.

    Args:
        marks: values and their colours, each drawn as a dashed line across.
    """
    panel = _panel("timeseries", title, description, list(targets), unit)
    custom: Json = {
        "drawStyle": "bars" if bars else "line",
        "fillOpacity": 60 if bars else 0,
        "lineWidth": 1,
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if bars else "none"},
    }
    panel["fieldConfig"]["defaults"] |= {"color": {"mode": "palette-classic"}, "custom": custom}
    if marks:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        steps = thresholds((None, "transparent"), *sorted(marks))
        panel["fieldConfig"]["defaults"]["thresholds"] = steps
    for bound, value in (("min", least), ("max", most)):
        if value is not None:
            panel["fieldConfig"]["defaults"][bound] = value
    panel["fieldConfig"]["overrides"] = list(overrides)
    panel["options"] = {
        "legend": {
            "calcs": ["lastNotNull", "max"],
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def heatmap(
    title: str,
    description: str,
    query: Json,
    *,
    unit: str,
    cell_unit: str = "none",
    hide_below: float = 1e-9,
) -> Json:
    """Cells over time, one row per bucket or per series; `unit` is that of the row axis.

    Cells at or below `hide_below` stay empty: for counts that is zero, logarithms need less.
    """
    panel = _panel("heatmap", title, description, [query], unit)
    panel["fieldConfig"]["defaults"]["custom"] = {
        "hideFrom": {"legend": False, "tooltip": False, "viz": False},
        "scaleDistribution": {"type": "linear"},
    }
    panel["options"] = {
        "calculate": False,
        "cellGap": 0,
        "cellValues": {"unit": cell_unit},
        "color": {
            "exponent": 0.5,
            "fill": "dark-orange",
            "mode": "scheme",
            "reverse": False,
            "scale": "exponential",
            "scheme": "Turbo",
            "steps": 64,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": hide_below},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    return panel


def state_timeline(title: str, description: str, *targets: Json, mappings: list[Json]) -> Json:
    """One band per series, coloured by what its value stands for."""
    panel = _panel("state-timeline", title, description, list(targets), "none")
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "thresholds"},
        "custom": {"fillOpacity": 80, "lineWidth": 0},
        "mappings": mappings,
        "thresholds": thresholds((None, "transparent"), (1, "red")),
    }
    panel["options"] = {
        "alignValue": "left",
        "legend": {
            "calcs": [],
            "displayMode": "list",
            "placement": "bottom",
            "showLegend": False,
        },
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "never",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return panel


def table(
    title: str,
    description: str,
    *targets: Json,
    unit: str,
    columns: dict[str, str],
    sort_by: str,
    descending: bool = True,
    overrides: tuple[Json, ...] = (),
) -> Json:
    """The targets' instant vectors merged by their labels; `columns` gives field -> heading.

    A target's value is the field `Value #A`, `Value #B`, ..., or `Value` when it is alone.
    """
    panel = _panel("table", title, description, list(targets), unit)
    panel["fieldConfig"]["defaults"]["custom"] = {
        "align": "auto",
        "cellOptions": {"type": "auto"},
        "inspect": False,
    }
    panel["fieldConfig"]["overrides"] = list(overrides)
    panel["options"] = {
        "cellHeight": "sm",
        "frameIndex": 0,
        "showHeader": True,
        "sortBy": [{"desc": descending, "displayName": sort_by}],
    }
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "indexByName": {name: index for index, name in enumerate(columns)},
                "renameByName": columns,
            },
        },
    ]
    return panel


def _panel(kind: str, title: str, description: str, targets: list[Json], unit: str) -> Json:
    defaults: Json = {"noValue": NOT_SCRAPED, "unit": unit}
    return {
        "description": description,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
        "title": title,
        "type": kind,
    }
