"""A recording in, one file out that tells of it without gradwatch: HTML, or text for a tracker.

The verdict is first, then what went wrong first, then the figures around each finding.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from gradwatch.chart import columns, log_chart
from gradwatch.page import views
from gradwatch.page.colours import THEMES
from gradwatch.page.columns import heat_of, run_columns, short
from gradwatch.page.embedding import bokeh_script, figures_json, for_script
from gradwatch.page.figures import run_figures
from gradwatch.page.plots import Drawn
from gradwatch.page.watched import Seen, Watched
from gradwatch.page.words import environment, number, share, shown
from gradwatch.records import Anomaly
from gradwatch.report.card import detail_lines
from gradwatch.report.findings import ORDER, Listed, listed

__all__ = ["html_report", "markdown_report"]

MOST_ROWS, ROWS_AROUND = 128, 64
AROUND = 100
"""Steps on either side of a finding."""

MOST_AROUND = 6
MOST_LISTED = 50
CHART_WIDTH = 80
STATIC = Path(__file__).with_name("static")


def html_report(path: Path, *, still: bool = False) -> str:
    """One file that needs nothing else, neither a network nor gradwatch.

    Args:
        still: nobody can press anything, since a picture is taken of it.

    Raises:
        RecordingError: the recording cannot be read.
    """
    watched = Watched(path)
    seen = watched.look()
    drawn = _figures(watched, seen, (seen.first, seen.last + 1), MOST_ROWS)
    around = [
        (title, _renamed(_leading(_figures(watched, seen, steps, ROWS_AROUND)), f"around {place}"))
        for place, (title, steps) in enumerate(_windows(seen))
    ]
    for one in drawn if still else ():
        one.model.toolbar_location = None
    everything = [*drawn, *(one for _, some in around for one in some)]
    scripts = [_script(bokeh_script().decode()), _script((STATIC / "page.js").read_text("utf-8"))]
    card, num_layers = seen.stands.verdict.card, len(seen.stands.info.layout.layers)
    facts = {
        "name": "", "version": 0, "first": seen.first, "last": seen.last, "live": False,
        "from": None, "to": None, "themes": THEMES,
        "findings": sorted({one.step for one in seen.stands.known.anomalies}),
        "layers": [short(name, 80) for name in seen.stands.info.layout.layers],
    }  # fmt: skip
    return (
        environment()
        .get_template("report.html")
        .render(
            **views.run_tables("", seen, {}),
            style=Markup((STATIC / "page.css").read_text("utf-8")),
            scripts=[Markup(text) for text in scripts],
            hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in scripts),
            drawn=_leading(drawn),
            others=drawn[len(_leading(drawn)) :],
            around=around,
            bokeh=for_script(figures_json(everything) if everything else None),
            page=for_script(facts),
            card="\n".join(detail_lines(card, 110, num_layers)) if card is not None else "",
            environment=views.environment_of(seen.stands),
            stamp="",
        )
    )


def markdown_report(path: Path) -> str:
    """For an issue tracker: short, and nothing in it that a name can turn into markup.

    Raises:
        RecordingError: the recording cannot be read.
    """
    watched = Watched(path)
    seen = watched.look()
    return "\n".join(_markdown(watched, seen)) + "\n"


def _markdown(watched: Watched, seen: Seen) -> Iterator[str]:
    stands = seen.stands
    info, known = stands.info, stands.known
    yield f"## {_text(stands.verdict.headline)}"
    yield ""
    for label, text in stands.verdict.lines:
        yield f"- **{label}**: {_text(text)}"
    yield ""
    yield "| run | rank | state | step | total norm | loss | clipped, last 50 | skipped | mode |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    latest = stands.latest
    cells = [
        _code(info.run), str(info.rank), stands.state, number(known.step),
        number(latest.total_norm if latest else None),
        number(latest.scalars.get("loss") if latest else None),
        share(stands.clipped), str(seen.skipped), _code(info.mode),
    ]  # fmt: skip
    yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{stands.span[0].upper()}{stands.span[1:]}"
    yield ""
    grid = watched.grid(seen.first, seen.last + 1)
    if grid is not None:
        norms = grid.numbers["total_norm"].tolist()
        width = min(CHART_WIDTH, len(norms))
        chart = log_chart(columns(norms, len(norms), width), 3)
        yield f"Total norm before clipping, steps {seen.first} to {seen.last}, logarithmic:"
        yield from _block(chart)
    if (card := stands.verdict.card) is not None:
        yield f"The steps before step {card.step}:"
        yield from _block(detail_lines(card, 100, len(info.layout.layers)))
    yield from _listed(listed(known.anomalies, known.cards, MOST_LISTED))
    if stands.policy:
        yield from _folded("policy", stands.policy.splitlines())
    yield from _folded("environment", (f"{k}: {v}" for k, v in views.environment_of(stands)))


def _listed(findings: Listed) -> Iterator[str]:
    events = findings.said_of_events
    if not findings.all:
        if events:
            yield from (f"Findings: none but {_text(events)}", "")
        return
    yield f"Findings, {ORDER}:"
    yield ""
    for place, one in enumerate(findings.all):
        if findings.left_out and place == len(findings.first):
            yield f"- ... {findings.left_out} more ..."
        said = _text(shown(one.message, 400))
        yield f"- step {one.step}, {one.level} {_text(one.kind)}: {said}"
    if events:
        yield f"- {_text(events)}"
    yield ""


def _leading(drawn: Sequence[Drawn]) -> list[Drawn]:
    """What explains a verdict: all up to the layers."""
    names = [one.name for one in drawn]
    return list(drawn[: names.index("heat") + 1]) if "heat" in names else list(drawn)


def _figures(watched: Watched, seen: Seen, steps: tuple[int, int], rows: int) -> list[Drawn]:
    grid = watched.grid(*steps)
    if grid is None:
        return []
    info = seen.stands.info
    columns = run_columns(grid, seen.stands.known.anomalies, info.rules, rows, seen.first)
    heat = heat_of(grid, rows, seen.first)
    layers, range_ = info.layout.layers, (steps[0], steps[1] - 1)
    return run_figures(columns, heat, layers, info.rules, range_, seen.told_of)


def _windows(seen: Seen) -> list[tuple[str, tuple[int, int]]]:
    """Around findings; those that are near each other share one. The first, and the newest."""
    groups: list[list[Anomaly]] = []
    for one in seen.stands.known.anomalies:
        if one.level == "event":
            continue
        if groups and one.step - groups[-1][0].step <= AROUND:
            groups[-1].append(one)
        else:
            groups.append([one])
    chosen = groups if len(groups) <= MOST_AROUND else [groups[0], *groups[-MOST_AROUND + 1 :]]
    return [
        (
            f"Around step {some[0].step}: {', '.join(dict.fromkeys(one.kind for one in some))}",
            (max(some[0].step - AROUND, seen.first), min(some[0].step + AROUND, seen.last + 1)),
        )
        for some in chosen
        if seen.first <= some[0].step <= seen.last
    ]


def _renamed(drawn: Sequence[Drawn], prefix: str) -> list[Drawn]:
    """Names are found once in a document."""
    for one in drawn:
        for model in one.model.references():
            if model.name and not model.name.startswith(prefix):
                model.name = f"{prefix} {model.name}"
    return list(drawn)


def _script(text: str) -> str:
    """As an inline script: nothing in it may end it."""
    return re.sub(r"</(script)", r"<\\/\1", text, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: str) -> str:
    """Words in Markdown: nothing in them is markup, a mention or a reference. Brackets are escaped
    and so parentheses need not be; an underscore within a word is none of its marks."""
    safe = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    safe = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", safe)
    return safe.replace("@", "@\N{ZERO WIDTH NON-JOINER}").replace(
        "#", "#\N{ZERO WIDTH NON-JOINER}"
    )


def _code(text: str) -> str:
    """A name as code in a table."""
    return f"`{shown(text).replace('`', chr(0x2019)).replace('|', chr(0xA6))}`"


def _block(lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """A fence that is longer than any in the text."""
    listed = list(lines)
    longest = max((len(run) for run in re.findall(r"`+", "\n".join(listed))), default=0)
    fence = "`" * max(3, longest + 1)
    yield from ("", f"{fence}text", *listed, fence, "")


def _folded(title: str, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    yield f"<details><summary>{title}</summary>"
    yield from _block([shown(line, 400) for line in lines])
    yield "</details>"
    yield ""
