"""A request in, a page or its news out. Nothing leaves `answer` but a response.

    /  run  layer  card  compare  ranks    pages
    news                                   what a page asks for when its range or its run changes
    list                                   the table of runs
    static/                                style, scripts and BokehJS, from this machine

Every link is relative, so that a proxy may put the page anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from gradwatch.errors import GradwatchError
from gradwatch.export.messages import Request, Response
from gradwatch.page import views
from gradwatch.page.catalogue import Catalogue
from gradwatch.page.embedding import bokeh_script
from gradwatch.page.watched import Watched
from gradwatch.page.words import environment, query

__all__ = ["Pages"]

HTML = "text/html; charset=utf-8"
HEADERS = {
    # No script but ours, nothing from anywhere else, in nobody's frame. Bokeh sets styles itself.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}
STATIC = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
LONG_BYTES = 16 * 10**6
"""Of a recording that is said to be read, not waited for in front of an empty page."""

FEWEST_COMPARED, MOST_COMPARED = 2, 6

Query = Mapping[str, list[str]]


class NotThere(Exception):
    """What was asked for is not here; the message says what and why."""


class Pages:
    """The live page over a directory. Any thread may ask."""

    def __init__(self, directory: Path, on_error: Callable[[Exception], None]) -> None:
        """
        Args:
            on_error: told of what nobody expected.
        """
        self._catalogue = Catalogue(directory)
        self._templates = environment()
        for name in self._templates.list_templates():
            self._templates.get_template(name)  # compiled now, not while somebody waits
        self._on_error = on_error
        self._pages: dict[str, Callable[[Query], Response]] = {
            "/": self._list,
            "/list": self._table,
            "/run": self._run,
            "/news": self._news,
            "/layer": self._layer,
            "/card": self._card,
            "/compare": self._compare,
            "/ranks": self._ranks,
        }

    def knows(self, path: str) -> bool:
        return path in self._pages or path.startswith("/static/")

    def answer(self, request: Request) -> Response:
        try:
            if request.path.startswith("/static/"):
                return self._static(request.path.removeprefix("/static/"))
            asked = parse_qs(request.query, errors="surrogatepass", max_num_fields=20)
            return self._pages[request.path](asked)
        except NotThere as error:
            return self._refused(404, "Not here", str(error))
        except GradwatchError as error:
            return self._refused(422, "This recording cannot be read", str(error))
        except ValueError as error:
            return self._refused(400, "This address says nothing", str(error))
        except Exception as error:
            self._on_error(error)
            return self._refused(500, "gradwatch failed", f"{type(error).__name__}: {error}")

    def _list(self, _: Query) -> Response:
        entries, left_out = self._catalogue.entries()
        return self._html(
            "list.html",
            entries=entries,
            left_out=left_out,
            directory=str(self._catalogue.directory),
            version="",
        )

    def _table(self, _: Query) -> Response:
        entries, left_out = self._catalogue.entries()
        return self._html("list_table.html", entries=entries, left_out=left_out)

    def _run(self, asked: Query) -> Response:
        name, watched = self._named(asked)
        unread = watched.unread_bytes
        if unread > LONG_BYTES and "whole" not in asked:
            values = {key: some[0] for key, some in asked.items()}
            later = f"run?{query({**values, 'whole': 1})}"
            return self._html("reading.html", later=later, size=unread // 10**6)
        ranks = self._catalogue.ranks(name)
        return self._html("run.html", **views.run_page(name, watched, ranks, _steps(asked)))

    def _news(self, asked: Query) -> Response:
        name, watched = self._named(asked)
        since, steps = _number(asked, "version") or 0, _steps(asked)
        if "layer" in asked:
            news = views.layer_news(watched, self._place(asked, watched), steps, since)
        else:
            news = views.run_news(name, watched, steps, since)
        if news is None:
            return Response(status=204, headers=HEADERS)
        if "layer" not in asked:
            values = views.of_run(name, watched.look(), self._catalogue.ranks(name))
            news["now"] = self._templates.get_template("run_now.html").render(values)
            news["tables"] = self._templates.get_template("run_tables.html").render(values)
        text = json.dumps(news, separators=(",", ":"))
        return Response(body=text.encode(), content_type="application/json", headers=HEADERS)

    def _layer(self, asked: Query) -> Response:
        name, watched = self._named(asked)
        place = self._place(asked, watched)
        return self._html("figures.html", **views.layer_page(name, watched, place, _steps(asked)))

    def _card(self, asked: Query) -> Response:
        name, watched = self._named(asked)
        step, kind = _number(asked, "step"), asked.get("kind", [""])[0]
        cards = [card for card in watched.look().stands.known.cards if card.step == step]
        card = next((card for card in cards if card.kind == kind), None)
        if card is None:
            raise NotThere(f"no card of that kind at step {step}")
        return self._html("figures.html", **views.card_page(name, watched, card, _steps(asked)))

    def _compare(self, asked: Query) -> Response:
        names = list(dict.fromkeys(asked.get("r", [])))
        if not FEWEST_COMPARED <= len(names) <= MOST_COMPARED:
            raise ValueError(f"choose {FEWEST_COMPARED} to {MOST_COMPARED} runs in the list")
        runs = {name: self._watched(name) for name in names}
        return self._html("figures.html", **views.comparison(runs, _steps(asked)))

    def _ranks(self, asked: Query) -> Response:
        name, _ = self._named(asked)
        runs = {
            rank: (other, self._watched(other))
            for rank, other in list(self._catalogue.ranks(name).items())[:MOST_RANKS]
        }
        return self._html("figures.html", **views.ranks_page(runs, _steps(asked)))

    def _named(self, asked: Query) -> tuple[str, Watched]:
        name = asked.get("r", [""])[0]
        return name, self._watched(name)

    def _watched(self, name: str) -> Watched:
        watched = self._catalogue.watched(name)
        if watched is None:
            raise NotThere("no such recording in this directory; it may have been removed")
        return watched

    @staticmethod
    def _place(asked: Query, watched: Watched) -> int:
        place = _number(asked, "layer")
        if place is None or not 0 <= place < len(watched.info.layout.layers):
            raise NotThere("no such layer in this run")
        return place

    def _static(self, name: str) -> Response:
        if name == "bokeh.js":
            body, kind = self._bokeh, STATIC["page.js"]
        elif name in STATIC:
            body, kind = _file(name), STATIC[name]
        else:
            raise NotThere("no such file")
        return Response(body=body, content_type=kind, headers={**HEADERS, **FOR_EVER})

    @cached_property
    def _bokeh(self) -> bytes:
        return bokeh_script()

    @cached_property
    def _stamp(self) -> str:
        """Another one for other files, since browsers keep them."""
        files = b"".join(_file(name) for name in STATIC) + version("bokeh").encode()
        return hashlib.sha256(files).hexdigest()[:12]

    def _html(self, template: str, **values: Any) -> Response:
        text = self._templates.get_template(template).render(stamp=self._stamp, **values)
        body = text.encode("utf-8", "replace")
        return Response(body=body, content_type=HTML, headers=HEADERS)

    def _refused(self, status: int, heading: str, reason: str) -> Response:
        page = self._html("refused.html", heading=heading, reason=reason)
        return Response(status=status, body=page.body, content_type=HTML, headers=HEADERS)


MOST_RANKS = 16


def _file(name: str) -> bytes:
    return Path(__file__).with_name("static").joinpath(name).read_bytes()


def _steps(asked: Query) -> views.Steps:
    return _number(asked, "from"), _number(asked, "to")


def _number(asked: Query, name: str) -> int | None:
    """
    Raises:
        ValueError: it is no whole number that SQLite knows.
    """
    text = asked.get(name, [""])[0]
    if not text:
        return None
    if len(text) > 20 or not -(2**62) < int(text) < 2**62:
        raise ValueError(f"{name} must be a step")
    return int(text)
