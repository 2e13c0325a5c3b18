"""Where a mistake stands, and how it is said: `policy.yaml:7:5: clip[0].limit must be > 0`.

An `Origin` remembers where each entry of a policy was written, so that a mistake can name its line
also long after the file was read, when the policy meets a model that it does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradwatch.errors import PolicyError

__all__ = [
    "ABSENT",
    "Mistake",
    "Origin",
    "Path",
    "at",
    "one_of",
    "path_text",
    "policy_error",
    "shown",
]

Path = tuple[str | int, ...]
"""The way to an entry, from the root of the policy: `("clip", 0, "limit")`."""

Position = tuple[int, int]
"""Line and column, both counted from 1."""

SHOWN_CHARACTERS = 60
SHOWN_MISTAKES = 25
ABSENT = object()


@dataclass(frozen=True)
class Mistake:
    """One sentence about one entry."""

    message: str
    position: Position | None = None
    """None where the policy did not come from a text."""

    def line(self, source: str) -> str:
        if self.position is None:
            return f"{source}: {self.message}"
        line, column = self.position
        return f"{source}:{line}:{column}: {self.message}"


@dataclass(frozen=True)
class Origin:
    """Where a policy, or one part of it, was written. It never makes two policies unequal."""

    source: str = field(default="<policy>", compare=False)
    """The file, or a word in angle brackets."""

    positions: Mapping[Path, Position] = field(default_factory=dict, compare=False)
    """Of each entry of the text; empty where there was no text."""

    part: Path = field(default=(), compare=False)
    """The part of the policy that paths start from."""

    written: tuple[int, ...] = field(default=(), compare=False)
    """By clip rule the item of the text that it comes from; empty where they are the same."""

    def mistake(self, path: Path, message: str) -> Mistake:
        """A mistake in the entry, or in what should hold it where the entry is missing."""
        full = self._as_written((*self.part, *path))
        return Mistake(f"{path_text(full)}{message}", self._position(full))

    def _as_written(self, path: Path) -> Path:
        if not self.written or path[:1] != ("clip",) or len(path) < 2:
            return path
        index = path[1]
        assert isinstance(index, int)
        return ("clip", self.written[index], *path[2:])

    def _position(self, path: Path) -> Position | None:
        while path and path not in self.positions:
            path = path[:-1]
        return self.positions.get(path)


def policy_error(source: str, mistakes: Iterable[Mistake]) -> PolicyError:
    """All mistakes in the order of the text, one line each."""
    ordered = sorted(dict.fromkeys(mistakes), key=lambda mistake: mistake.position or (0, 0))
    lines = [mistake.line(source) for mistake in ordered[:SHOWN_MISTAKES]]
    if more := ordered[SHOWN_MISTAKES:]:
        lines.append(Mistake(f"and {len(more)} more", more[0].position).line(source))
    return PolicyError("\n".join(lines))


def path_text(path: Path) -> str:
    """`("clip", 0, "limit")` as `clip[0].limit`; the root is `the policy`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{shown(part)}]"
        else:
            text += f".{_word(part)}" if text else _word(part)
    return text or "the policy"


def shown(value: object) -> str:
    """A value as a message quotes it: on one line, short, words without quotes."""
    if value is None:
        text = "null"
    elif isinstance(value, str):
        text = _word(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{shown(k)}: {shown(v)}" for k, v in _few(value.items())) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(item) for item in _few(value)) + "]"
    else:
        text = _repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def at(data: Any, path: Path) -> Any:
    """The value at a path of plain data, or `ABSENT`."""
    for part in path:
        if not isinstance(data, (dict, list)):
            return ABSENT
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return data


def one_of(words: Iterable[str]) -> str:
    """`all, group or layer`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _few(items: Iterable[Any]) -> list[Any]:
    return [item for item, _ in zip(items, range(SHOWN_CHARACTERS), strict=False)]


def _word(text: str) -> str:
    """Text as it is where it is plain, else quoted and escaped; so is text that looks a number."""
    text = text[: SHOWN_CHARACTERS + 1]
    plain = text.isprintable() and text == text.strip() and text.strip("+-._0123456789")
    return text if plain else repr(text)


def _repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if text.isprintable() else ascii(text)
