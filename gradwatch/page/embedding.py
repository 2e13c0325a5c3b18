"""Figures and columns to JSON: what a page embeds at first, and what it asks for later.

Arrays go as Bokeh's own serializer has them, so that a page can hand them to Bokeh as they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bokeh
from bokeh.core.serialization import Serializer
from bokeh.document import Document
from bokeh.embed.util import standalone_docs_json_and_render_items
from markupsafe import Markup

from gradwatch.page.columns import Columns
from gradwatch.page.plots import Drawn

__all__ = ["bokeh_script", "columns_json", "figures_json", "for_script"]

SCRIPT = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"


def bokeh_script() -> bytes:
    """BokehJS, as the installed Bokeh brings it along."""
    return SCRIPT.read_bytes()


def figures_json(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """All figures as one document, each to be drawn in the element `<id of its model>-at`."""
    document = Document()
    for one in drawn:
        document.add_root(one.model)
    docs, items = standalone_docs_json_and_render_items([one.model for one in drawn])
    (item,) = items
    found: dict[str, Any] = item.to_json()
    found["roots"] = {one.model.id: f"{one.model.id}-at" for one in drawn}
    return {"docs": docs, "items": [found]}


def columns_json(columns: Mapping[str, Columns]) -> dict[str, Any]:
    """By source, its data in Bokeh's notation."""
    # Without references to buffers, which only a websocket could bring.
    return {name: Serializer(deferred=False).encode(data) for name, data in columns.items()}


def for_script(value: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it ends that."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
