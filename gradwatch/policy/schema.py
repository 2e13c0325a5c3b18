"""The policy format as a JSON Schema, for editors and for checks in other languages.

Made from the models, so that the words under a key in an editor are those of its docstring. What
this version refuses by name is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradwatch.policy.models import Policy
from gradwatch.policy.presets import PRESETS
from gradwatch.policy.values import OFF

__all__ = ["SCHEMA_FILE", "policy_schema", "schema_text"]

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
REF = "#/$defs/"
USE = "A published rule by its name; keys beside it go before its own."
SCHEMA_FILE = Path(__file__).with_name("policy.schema.json")
"""The checked-in schema, `schema_text()`."""


def policy_schema() -> Schema:
    """A JSON Schema (draft 2020-12) of what `load_policy` takes, but for what no schema can say.

    Unique names, relations between keys and selectors that match nothing are left to `load_policy`.
    """
    schema = Policy.model_json_schema(mode="validation")
    definitions = {name: _tidy(part) for name, part in schema.pop("$defs").items()}
    definitions["Detect"] = _with_off(definitions["Detect"])
    definitions |= _presets(definitions)
    root = _tidy(schema)
    forms = [{"$ref": f"{REF}{name}"} for name in ("ClipRule", "PresetRule")]
    root["properties"]["clip"]["items"] = {"anyOf": forms}
    used = _reachable(root, definitions)
    title = {"$schema": DIALECT, "title": "gradwatch policy"}
    return {**title, **root, "$defs": {name: definitions[name] for name in sorted(used)}}


def schema_text() -> str:
    """The schema as the file beside this module holds it."""
    return json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """No titles, no nulls, no defaults but plain ones, text on one line, no `1.0`."""
    if isinstance(node, str):
        return " ".join(node.split())
    if isinstance(node, list):
        return [_tidy(item) for item in node if item != {"type": "null"}]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if not isinstance(node, dict):
        return node
    kept = {key: _tidy(value) for key, value in node.items() if not _noise(key, value)}
    if "const" in kept:
        kept.pop("enum", None)
    for forms in ("allOf", "anyOf", "oneOf"):
        if len(kept.get(forms, ())) == 1:
            kept = {**kept.pop(forms)[0], **kept}
    return kept


def _noise(key: str, value: Any) -> bool:
    if key == "title":
        return isinstance(value, str)
    return key == "default" and (not value or isinstance(value, dict))


def _with_off(detect: Schema) -> Schema:
    """A detector is a mapping of its keys, or `none`."""
    entries = {
        kind: {
            "description": entry["description"],
            "anyOf": [{"$ref": entry["$ref"]}, {"const": OFF}],
        }
        if "$ref" in entry
        else entry
        for kind, entry in detect["properties"].items()
    }
    return {**detect, "properties": entries}


def _presets(definitions: Schema) -> Schema:
    """A rule that begins with a preset: no other key is required, and a part of a limit will do."""
    rule, statistic = definitions["ClipRule"], definitions["StatisticLimit"]
    use = {"description": USE, "enum": list(PRESETS)}
    limit = rule["properties"]["limit"]
    part = {"$ref": f"{REF}PartOfStatisticLimit"}
    forms = [part if "$ref" in form else form for form in limit["oneOf"]]
    properties = {"use": use, **rule["properties"], "limit": {**limit, "oneOf": forms}}
    return {
        "PresetRule": {
            **rule, "description": USE, "properties": properties, "required": ["use"],
        },
        "PartOfStatisticLimit": {
            **{key: value for key, value in statistic.items() if key != "oneOf"},
            "minProperties": 1,
        },
    }  # fmt: skip


def _reachable(node: Any, definitions: Schema) -> set[str]:
    """Names of the definitions that a schema refers to, directly or through another one."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
            name = str(node.get("$ref", "")).removeprefix(REF)
            if name in definitions and name not in found:
                found.add(name)
                waiting.append(definitions[name])
    return found
