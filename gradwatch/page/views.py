"""A recording and a range of steps in, the values of a page out.

run, layer, card, comparison, ranks  ->  what their template shows, and their figures
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from gradwatch.page.colours import THEMES
from gradwatch.page.columns import MOST_ROWS, Columns, Heat, by_rank, heat_of, run_columns, short
from gradwatch.page.embedding import columns_json, figures_json, for_script
from gradwatch.page.figures import run_figures
from gradwatch.page.grid import Grid
from gradwatch.page.layer import layer_columns, neighbours_of
from gradwatch.page.more_figures import RANKS, compared, layer_figures, rank_figure
from gradwatch.page.plots import Drawn
from gradwatch.page.watched import Seen, Watched
from gradwatch.page.words import query
from gradwatch.recording.cards import Card
from gradwatch.report.card import detail_lines, printable, told
from gradwatch.report.findings import ORDER, listed
from gradwatch.report.moments import utc
from gradwatch.report.standing import Stands

__all__ = [
    "Steps",
    "card_page",
    "comparison",
    "environment_of",
    "layer_news",
    "layer_page",
    "of_run",
    "ranks_page",
    "run_news",
    "run_page",
    "run_tables",
]

Steps = tuple[int | None, int | None]
"""The range that was asked for: the first and the last step; None where it was not said."""

MOST_FINDINGS = 50
AROUND = 200
"""Steps on either side of a card."""


def run_page(name: str, watched: Watched, ranks: Mapping[int, str], asked: Steps) -> dict[str, Any]:
    seen = watched.look()
    stands = seen.stands
    more = {"layers": _names(stands.info.layout.layers), "told_of": list(seen.told_of)}
    return {
        **of_run(name, seen, ranks),
        **_filled(watched, seen, name, asked, seen.told_of, more),
        "environment": environment_of(stands),
    }


def run_news(name: str, watched: Watched, asked: Steps, version: int) -> dict[str, Any] | None:
    """What has changed since a version; None where nothing has.

    A page that asks for another range gives version 0.
    """
    seen = watched.look()
    if seen.version == version:
        return None
    start, stop = within(seen, asked)
    grid = watched.grid(start, stop)
    news: dict[str, Any] = {
        "version": seen.version, "first": seen.first, "last": seen.last,
        "live": seen.stands.state == "running", "told_of": list(seen.told_of),
    }  # fmt: skip
    if grid is not None:
        news |= _shown(grid, seen)
    return news


def layer_page(name: str, watched: Watched, place: int, asked: Steps) -> dict[str, Any]:
    seen = watched.look()
    start, stop = within(seen, asked)
    info = seen.stands.info
    layer = info.layout.layers[place]
    shown = neighbours_of(info, place)
    columns = layer_columns(watched.path, info, place, start, stop)
    names = [info.layout.layers[i] for i in shown]
    drawn = layer_figures(columns, layer, names, (start, stop - 1))
    tensors = [p for p, of in zip(info.layout.parameters, info.layout.layer_of, strict=True)
               if of == place]  # fmt: skip
    return {
        **_embedded(drawn, seen, name, asked, {"layer": place}),
        "heading": layer,
        "way": [(info.run, f"run?{query({'r': name})}")],
        "lines": [
            ("run", info.run),
            ("tensors", ", ".join(f"{short(p.name)} {list(p.shape)}" for p in tensors[:12])),
            ("module", ", ".join(sorted({p.module for p in tensors if p.module})) or "not known"),
        ],
        "links": [
            (f"{'previous' if i < place else 'next'}: {short(info.layout.layers[i])}",
             f"layer?{query({'r': name, 'layer': i})}")
            for i in shown if abs(i - place) == 1
        ],
        "text": "",
    }  # fmt: skip


def layer_news(watched: Watched, place: int, asked: Steps, version: int) -> dict[str, Any] | None:
    seen = watched.look()
    if seen.version == version:
        return None
    start, stop = within(seen, asked)
    columns = layer_columns(watched.path, seen.stands.info, place, start, stop)
    return {
        "version": seen.version, "first": seen.first, "last": seen.last,
        "live": seen.stands.state == "running", "columns": columns_json(columns),
    }  # fmt: skip


def card_page(name: str, watched: Watched, card: Card, asked: Steps) -> dict[str, Any]:
    """What is known of one finding, and the steps around it."""
    seen = watched.look()
    if asked == (None, None):
        asked = max(card.step - AROUND, seen.first), card.step + AROUND
    start, stop = within(seen, asked)
    info = seen.stands.info
    told_of = [name for name in seen.told_of if name != "noise"]
    where = card.layer or (card.culprit.module if card.culprit else None)
    links = []
    if where in info.layout.layers:
        place = info.layout.layers.index(where)
        range_ = {"from": start, "to": stop - 1}
        links.append(
            (f"layer {short(where)}", f"layer?{query({'r': name, 'layer': place} | range_)}")
        )
    in_ = f" in {printable(card.layer)}" if card.layer else ""
    return {
        **_filled(watched, seen, name, asked, told_of, {"layers": _names(info.layout.layers)}),
        "heading": f"Step {card.step}: {card.level} {card.kind}{in_}",
        "way": [(info.run, f"run?{query({'r': name})}")],
        "lines": [("when", f"{utc(card.time)}, found in step {card.step}"), *told(card)],
        "links": links,
        "text": "\n".join(detail_lines(card, 110, len(info.layout.layers))),
    }


def comparison(runs: Mapping[str, Watched], asked: Steps) -> dict[str, Any]:
    """The figures of several runs over each other."""
    seen = {name: watched.look() for name, watched in runs.items()}
    columns, labels, start, stop = _side_by_side(runs, seen, asked)
    drawn = compared(columns, (start, stop - 1)) if columns else []
    first = next(iter(seen.values()))
    return {
        **_embedded(drawn, first, "", asked, {"last": stop - 1, "live": False}),
        "heading": "Comparison",
        "way": [],
        "lines": [(label, seen[name].stands.verdict.headline) for name, label in labels.items()],
        "links": [(label, f"run?{query({'r': name})}") for name, label in labels.items()],
        "text": "",
    }


def ranks_page(runs: Mapping[int, tuple[str, Watched]], asked: Steps) -> dict[str, Any]:
    """The ranks of one run side by side."""
    seen = {rank: watched.look() for rank, (_, watched) in runs.items()}
    start = min(within(one, asked)[0] for one in seen.values())
    stop = max(within(one, asked)[1] for one in seen.values())
    grids = {rank: watched.grid(start, stop) for rank, (_, watched) in runs.items()}
    of_ranks = {what: by_rank(grids, what) for what in RANKS}
    drawn = [
        rank_figure(what, columns, (start, stop - 1))
        for what, columns in of_ranks.items()
        if what == "duration_seconds" or any(len(of_rank["x"]) for of_rank in columns.values())
    ]
    name, _ = next(iter(runs.values()))
    first = next(iter(seen.values()))
    return {
        **_embedded(drawn, first, "", asked, {"last": stop - 1, "live": False}),
        "heading": f"Ranks of {short(first.stands.info.run)}",
        "way": [(first.stands.info.run, f"run?{query({'r': name})}")],
        "lines": [
            (f"rank {rank}", f"{one.stands.state}, step {one.stands.known.step}; "
             f"{one.stands.verdict.headline}")
            for rank, one in seen.items()
        ],
        "links": [
            (f"rank {rank}", f"run?{query({'r': other})}") for rank, (other, _) in runs.items()
        ],
        "text": "",
    }  # fmt: skip


def within(seen: Seen, asked: Steps) -> tuple[int, int]:
    """The range that is shown, its end not included: what was asked for, in so far as it is."""
    first, last = seen.first, max(seen.last, seen.first)
    start = first if asked[0] is None else min(max(asked[0], first), last)
    end = last if asked[1] is None else min(max(asked[1], start), last)
    return start, end + 1


def run_tables(name: str, seen: Seen, ranks: Mapping[int, str]) -> dict[str, Any]:
    known = seen.stands.known
    return {
        "name": name,
        "seen": seen,
        "stands": seen.stands,
        "ranks": ranks,
        "order": ORDER,
        "findings": listed(known.anomalies, known.cards, MOST_FINDINGS),
    }


def environment_of(stands: Stands) -> list[tuple[str, str]]:
    info = stands.info
    facts = {
        "run": info.run, "rank": str(info.rank), "host": info.host, "process": str(info.pid),
        "framework": info.framework, "device": info.device, "model": info.model,
        "gradwatch": info.version, "mode": info.mode, "policy sha256": info.policy_sha256,
        "layers": str(len(info.layout.layers)), "tensors": str(len(info.layout.parameters)),
    }  # fmt: skip
    return [(label, value) for label, value in facts.items() if value]


def of_run(name: str, seen: Seen, ranks: Mapping[int, str]) -> dict[str, Any]:
    card = seen.stands.verdict.card
    return {
        **run_tables(name, seen, ranks),
        "card_link": card_link(name, card) if card is not None else None,
    }


def card_link(name: str, card: Card) -> str:
    return f"card?{query({'r': name, 'step': card.step, 'kind': card.kind})}"


@lru_cache(maxsize=16)
def _figures_of(
    layers: tuple[str, ...], rules: tuple[str, ...], told_of: tuple[str, ...]
) -> tuple[Sequence[Drawn], Markup]:
    """The figures of a run without its steps, which the page fills in: Bokeh takes most of the time
    of a page to make them."""
    columns = run_columns(None, (), rules)
    heat = Heat(columns["heat"], -1.0, 0.0, -(-len(layers) // MOST_ROWS))
    drawn = run_figures(columns, heat, layers, rules, (0, 1), told_of)
    return drawn, for_script(figures_json(drawn))


def _filled(
    watched: Watched, seen: Seen, name: str, asked: Steps, told_of: Sequence[str],
    more: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The figures of a run, and what they show of the steps that were asked for."""
    start, stop = within(seen, asked)
    grid, info = watched.grid(start, stop), seen.stands.info
    if grid is None:
        return _embedded([], seen, name, asked, more)
    drawn, bokeh = _figures_of(info.layout.layers, info.rules, tuple(told_of))
    filled = {**_shown(grid, seen), "steps": [start, max(stop - 1, start + 1)]}
    found = _embedded([], seen, name, asked, {**more, "filled": filled})
    return {**found, "drawn": drawn, "bokeh": bokeh}


def _shown(grid: Grid, seen: Seen) -> dict[str, Any]:
    """What the figures of a run are filled with."""
    heat = heat_of(grid, begun=seen.first)
    known, rules = seen.stands.known, seen.stands.info.rules
    columns = run_columns(grid, known.anomalies, rules, begun=seen.first)
    encoded = columns_json({**columns, "heat": heat.columns})
    return {"columns": encoded, "absolute": [heat.low, heat.high]}


def _embedded(
    drawn: Sequence[Drawn], seen: Seen, name: str, asked: Steps, more: Mapping[str, Any]
) -> dict[str, Any]:
    facts = {
        "name": name, "version": seen.version, "first": seen.first, "last": seen.last,
        "live": seen.stands.state == "running", "from": asked[0], "to": asked[1],
        "findings": sorted({a.step for a in seen.stands.known.anomalies if a.level != "event"}),
        "themes": THEMES, **more,
    }  # fmt: skip
    return {
        "drawn": drawn,
        "bokeh": for_script(figures_json(drawn) if drawn else None),
        "page": for_script(facts),
    }


def _names(layers: Sequence[str]) -> list[str]:
    return [short(name, 80) for name in layers]


def _side_by_side(
    runs: Mapping[str, Watched], seen: Mapping[str, Seen], asked: Steps
) -> tuple[dict[str, dict[str, Columns]], dict[str, str], int, int]:
    start = min(within(one, asked)[0] for one in seen.values())
    stop = max(within(one, asked)[1] for one in seen.values())
    columns, labels = {}, {}
    for number, (name, watched) in enumerate(runs.items(), 1):
        info = seen[name].stands.info
        labels[name] = f"{number}: {short(info.run)}, rank {info.rank}"
        grid = watched.grid(start, stop)
        columns[labels[name]] = run_columns(grid, (), info.rules)
    return columns, labels, start, stop
