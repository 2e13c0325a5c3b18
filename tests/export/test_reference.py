"""docs/metrics.md, and every series that a document names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch.dashboards.promql import metric_of
from gradwatch.export.metrics import METRICS, PREFIX
from gradwatch.export.reference import reference_text

REPOSITORY = Path(__file__).parents[2]


def _documents() -> list[Path]:
    found = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    found += [p for p in (REPOSITORY / "deploy").rglob("*") if p.suffix in (".md", ".yml", ".yaml")]
    return sorted(found)


def test_the_page_of_metrics_is_the_written_one() -> None:
    assert (REPOSITORY / "docs" / "metrics.md").read_text() == reference_text()


@pytest.mark.parametrize("path", _documents(), ids=lambda path: path.name)
def test_every_series_that_a_document_names_is_exported(path: Path) -> None:
    for series in re.findall(r"(?<![\w:/.-])gradwatch_[a-z_]+\b(?![:(.*-])", path.read_text()):
        if series.removeprefix(PREFIX) not in METRICS:
            metric_of(series)
