"""Dashboards in a directory, as whoever checks or pushes them reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradwatch.errors import MonitoringError

__all__ = ["read_files"]


def read_files(directory: Path) -> Iterator[tuple[Path, Any]]:
    """Each JSON file with what it holds, by name.

    Raises:
        MonitoringError: there is none, or one is not JSON.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise MonitoringError(
            f"{directory}: no dashboard (*.json) here. Write them: gradwatch dashboards build DIR"
        )
    for path in paths:
        try:
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MonitoringError(f"{path}: not JSON ({error})") from None
