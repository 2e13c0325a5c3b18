"""`docs/policy.md` from the models: every key with what it takes, its default and its meaning.

python -m gradwatch.policy.reference > docs/policy.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gradwatch.policy.presets import PRESETS
from gradwatch.policy.schema import REF, policy_schema

__all__ = ["reference_text"]

Schema = dict[str, Any]
WORDS = {
    "^(l": "`l1`, `l2`, `linf`, `l<p>`, `rms`, `weight`, `update`, `loss`",
    "^(<": "text or whole number",
}
"""What a pattern of the schema stands for, by how it begins."""

BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}
TEMPLATE = Path(__file__).with_name("reference.md")
"""The prose, with `{keys Guard}` where the keys of a model go."""

TITLES = {
    "Guard": "guard",
    "ClipRule": "clip",
    "PresetRule": "presets",
    "StatisticLimit": "limits that learn",
    "Accumulate": "accumulate",
    "SampleTarget": "accumulate.steps: {target: ...}",
    "Depth": "layers: {depth: ...}",
    "Detect": "detect",
}
"""Of the sections that explain a model; a detector's is `detect.` and its kind."""


def reference_text() -> str:
    """The whole page."""
    schema = policy_schema()
    parts = {"Policy": schema, **schema["$defs"]}
    text = re.sub(r"\{keys (\w+)\}", lambda m: _keys(parts[m[1]]), TEMPLATE.read_text("utf-8"))
    text = text.replace("{detectors}", "\n\n".join(_detectors(parts)))
    return text.replace("{presets}", "\n".join(_presets()).rstrip())


def _detectors(parts: Schema) -> Iterator[str]:
    for kind, entry in parts["Detect"]["properties"].items():
        for form in entry.get("anyOf", ()):
            if "$ref" in form:
                yield f"### detect.{kind}\n\n{_keys(parts[form['$ref'].removeprefix(REF)])}"


def _keys(part: Schema) -> str:
    required = part.get("required", ())
    lines = [
        f"{part['description']}",
        "",
        "| key | takes | left out | |",
        "| --- | --- | --- | --- |",
    ]
    for key, entry in part["properties"].items():
        default = "required" if key in required else _default(entry)
        lines.append(f"| `{key}` | {_takes(entry)} | {default} | {_cell(entry['description'])} |")
    return "\n".join(lines)


def _presets() -> Iterator[str]:
    for name, rules in PRESETS.items():
        text = yaml.dump(
            list(rules), Dumper=_Plain, sort_keys=False, default_flow_style=None, width=120
        )
        yield f"`use: {name}`\n\n```yaml\n{text}```\n"


def _default(entry: Schema) -> str:
    if "default" not in entry:
        return ""
    default = entry["default"]
    shown = default[0] if isinstance(default, list) and len(default) == 1 else default
    return f"`{shown}`"


def _takes(entry: Schema) -> str:
    forms = entry.get("anyOf") or entry.get("oneOf")
    if "pattern" in entry and (words := WORDS.get(entry["pattern"][:3])):
        return words
    if forms:
        return " or ".join(dict.fromkeys(_takes(form) for form in forms))
    if "$ref" in entry:
        name = entry["$ref"].removeprefix(REF)
        title = TITLES.get(name) or f"detect.{_snake(name)}"
        return f"[{_short(title)}](#{_anchor(title)})"
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{word}`" for word in entry["enum"])
    if entry["type"] == "array":
        return f"a list of {_takes(entry['items'])}"
    if entry["type"] == "object":
        (value,) = entry["patternProperties"].values()
        return f"`{{step: {_takes(value)}}}`"
    return _number_or_text(entry)


def _number_or_text(entry: Schema) -> str:
    kind = {"integer": "whole number", "number": "number", "string": "text"}[entry["type"]]
    bounds = [
        f"{sign} {entry[key]:g}"
        for key, sign in BOUNDS.items()
        if key in entry and entry[key] < 10**15
    ]
    return " ".join([kind, ", ".join(bounds)]).strip()


class _Plain(yaml.SafeDumper):
    """Without anchors for what stands there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _short(title: str) -> str:
    """`{target: ...}` of `accumulate.steps: {target: ...}`"""
    return re.sub(r"^[a-z.]+: ", "", title)


def _anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_text(), end="")
