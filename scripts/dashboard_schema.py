"""Validates dashboards against a JSON Schema made from the types that Grafana publishes on npm.

    python scripts/dashboard_schema.py [FILE...]     # without one: dashboards/*.json

The dashboard, the options of each panel and what each of its fields may have. Needs npm, once: the
schema, made from @grafana/schema (Apache-2.0), is kept in build/ and not part of this repository.

Exit codes: 0 valid, 1 not valid, each error on a line, 2 the schema could not be made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError, best_match

REPOSITORY = Path(__file__).parents[1]
TYPES = REPOSITORY / "scripts" / "grafana-types"
CACHE = REPOSITORY / "build" / "grafana-types"

SHA256 = "bcaa3ef1281cd9e641d59e7ba23b723c29ab3c2a484f36fd772bb6f656759f0a"
"""Of the schema that ACCEPTED was written for."""

PANELS = {
    "heatmap": "heatmap",
    "stat": "stat",
    "state-timeline": "statetimeline",
    "table": "table",
    "timeseries": "timeseries",
}
"""Type of a panel -> its directory among the published types."""

WITHOUT_FIELDS = {"stat"}
"""Panels whose fields have nothing of their own."""


@dataclass(frozen=True)
class Accepted:
    """Errors that are known, and why they are none."""

    where: str
    """A regular expression for the whole path."""

    names: frozenset[str]
    """Keys that are too many or missing."""

    reason: str


ACCEPTED = (
    Accepted(
        r"\$\.annotations\.list\[\d+\]",
        frozenset({"expr", "step", "tagKeys", "textFormat", "titleFormat", "useValueForTime"}),
        "keys of the Prometheus data source, which reads them there; its types are not published",
    ),
    Accepted(
        r"\$\.templating\.list\[\d+\]\.current",
        frozenset({"text", "value"}),
        "nothing is chosen yet: Grafana itself writes {} for it",
    ),
    Accepted(
        r"\$\.templating\.list\[\d+\]",
        frozenset({"definition"}),
        "Grafana itself writes it beside the query of a variable",
    ),
)


class CannotBeMade(Exception):
    """The schema, with the reason in a line or more."""


def main(arguments: Sequence[str]) -> int:
    files = [Path(name) for name in arguments] or sorted((REPOSITORY / "dashboards").glob("*.json"))
    try:
        schemas = kept_schemas()
    except CannotBeMade as error:
        print(error, file=sys.stderr)
        return 2
    met: set[Accepted] = set()
    errors = [
        f"{file}: {line}"
        for file in files
        for line in errors_of(json.loads(file.read_text()), schemas, met)
    ]
    if not arguments:
        errors += [
            f"accepted, but not met: {a.where}: {a.reason}" for a in ACCEPTED if a not in met
        ]
    print(*errors, f"{len(files)} dashboards, {len(errors)} errors", sep="\n")
    return 1 if errors else 0


def errors_of(dashboard: Any, schemas: dict[str, Any], met: set[Accepted]) -> Iterator[str]:
    """One line for each error that is not accepted; those that are go into `met`."""
    for error in Draft7Validator(schemas["dashboard"]).iter_errors(dashboard):
        known = _accepted(error)
        if known is None:
            deepest = best_match([error])
            yield f"{deepest.json_path}: {deepest.message}"
        else:
            met.add(known)
    for where, panel in _panels("$", dashboard.get("panels", ())):
        kind = panel.get("type")
        if kind == "row":
            continue
        if kind not in PANELS:
            yield f"{where}.type: {kind!r} is none of {', '.join(PANELS)}"
            continue
        parts = {"options": panel.get("options", {})}
        if kind not in WITHOUT_FIELDS:
            fields = panel.get("fieldConfig", {}).get("defaults", {})
            parts["custom"] = fields.get("custom", {})
        for error in Draft7Validator(schemas[kind]).iter_errors(parts):
            deepest = best_match([error])
            yield f"{where}({kind}){deepest.json_path.removeprefix('$')}: {deepest.message}"


def _accepted(error: ValidationError) -> Accepted | None:
    if error.validator == "additionalProperties":
        names = set(error.instance) - set(error.schema.get("properties", ()))
    elif error.validator == "required":
        names = set(re.findall(r"^'(\w+)' is a required", error.message))
    else:
        return None
    for known in ACCEPTED:
        if re.fullmatch(known.where, error.json_path) and names and names <= known.names:
            return known
    return None


def _panels(where: str, panels: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, panel in enumerate(panels):
        here = f"{where}.panels[{number}]"
        yield here, panel
        yield from _panels(here, panel.get("panels", ()))


def kept_schemas() -> dict[str, Any]:
    """By `dashboard` or the type of a panel; made where they are not kept.

    Raises:
        CannotBeMade: npm is missing or fails, or the schema is another one than expected.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / "schemas.json"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Several tests may want it at once.
        if not kept.is_file() or _sha256(kept.read_text()) != SHA256:
            kept.write_text(json.dumps(_made(), sort_keys=True))
        text = kept.read_text()
    if _sha256(text) != SHA256:
        raise CannotBeMade(
            f"the schema made from the published types has SHA-256 {_sha256(text)}, not {SHA256}: "
            "look at ACCEPTED again, then put it there"
        )
    return dict(json.loads(text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _made() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(TYPES / file, folder)
        _run(folder, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
        published = "node_modules/@grafana/schema/dist/types/raw"
        schemas = {"dashboard": _schema(
            folder, f"{published}/dashboard/x/types.gen.d.ts", "Dashboard"
        )}  # fmt: skip
        for kind, directory in PANELS.items():
            custom = "" if kind in WITHOUT_FIELDS else "custom: panel.FieldConfig;"
            source = f"./{published}/composable/{directory}/panelcfg/x/types.gen"
            (folder / f"{directory}.ts").write_text(
                f"import * as panel from '{source}';\n"
                f"export interface Parts {{ options: panel.Options; {custom} }}\n"
            )
            schemas[kind] = _schema(folder, f"{directory}.ts", "Parts")
        return schemas


def _schema(folder: Path, path: str, kind: str) -> Any:
    program = "node_modules/.bin/ts-json-schema-generator"
    said = _run(folder, program, "--path", path, "--type", kind, "--no-type-check")
    return json.loads(said)


def _run(folder: Path, program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBeMade(f"{program}: {error}") from None
    if done.returncode:
        raise CannotBeMade(f"{program} {arguments[0]} failed:\n{done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
