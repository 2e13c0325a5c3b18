"""Values to what templates show: numbers, times, names that cannot act on a page."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from urllib.parse import urlencode

import jinja2

from gradwatch.page.columns import short
from gradwatch.report.moments import duration, utc

__all__ = ["environment", "number", "query"]


def environment() -> jinja2.Environment:
    """Everything is escaped, and a name that is missing in a template is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gradwatch.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "short": shown, "when": utc, "ago": ago, "share": share}
    made.filters |= {"query": query, "block": block}
    return made


def query(values: Mapping[str, object]) -> str:
    """A query string; file names may hold bytes that are no text."""
    return urlencode({k: str(v) for k, v in values.items()}, errors="surrogatepass")


def number(value: float | None) -> str:
    """Four digits; nothing where it is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def shown(text: str | None, most: int = 60) -> str:
    """A name from outside: surrogates, control characters and what turns text around replaced."""
    safe = (text or "").encode("utf-8", "replace").decode("utf-8")
    return short(safe, most)


def block(text: str, most: int = 20_000) -> str:
    """Lines from outside, as they are but for what would act on a page."""
    return "\n".join(shown(line, 400) for line in text[:most].split("\n"))


def ago(seconds: float) -> str:
    return duration(max(0.0, time.time() - seconds))


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
