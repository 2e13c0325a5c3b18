"""Plain data in, a policy out, or every mistake in it with its place.

Pydantic checks the types; what it says is translated here into one sentence for each entry.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from gradwatch.policy.clip import ClipRule
from gradwatch.policy.locating import ABSENT, Mistake, Origin, Path, at, policy_error, shown
from gradwatch.policy.models import Policy
from gradwatch.policy.plain import Document
from gradwatch.policy.presets import expanded
from gradwatch.policy.values import Section

__all__ = ["decode"]

SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _: "is required",
    "greater_than": lambda context: f"must be > {context['gt']:g}",
    "greater_than_equal": lambda context: f"must be >= {context['ge']:g}",
    "less_than": lambda context: f"must be < {context['lt']:g}",
    "less_than_equal": lambda context: f"must be <= {context['le']:g}",
    "tuple_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be a mapping",
    "model_type": lambda _: "must be a mapping of keys",
    "literal_error": lambda context: f"must be {context['expected'].replace(chr(39), '')}",
}
"""What an error of pydantic's own says; errors of ours carry their sentence with them."""

KEY = "[key]"
FORMS = {KEY, "<number>", "<schedule>", "<statistic>", "<target>", "<word>", "<depth>"}
"""What Pydantic puts into a location where an entry may take several forms."""


def decode(document: Document, source: str) -> Policy:
    """The policy that a document means.

    Raises:
        PolicyError: with one line for each mistake, in the order of the text.
    """
    plain = expanded(document.data)
    origin = Origin(source, document.positions, written=plain.written)
    data = plain.data
    told = [*((path, said, []) for path, said in plain.mistakes), *_beyond_types(data)]
    mistakes = [*document.mistakes, *(origin.mistake(path, said) for path, said, _ in told)]
    left_out = (moved for path in document.left_out for moved in _moved(path, plain.written))
    unknown = (path[:-1] for path, _ in plain.mistakes if path[-1] == "use")
    done = _Done(
        whole=[*left_out, *unknown, *(path for path, _, _ in told)],
        alone=[path for _, _, beside in told for path in beside],
    )
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        mistakes += _translated(error, data, origin, done)
    if mistakes:
        raise policy_error(source, mistakes)
    return policy.located(origin)


def _moved(path: Path, written: tuple[int, ...]) -> Iterator[Path]:
    """Where an entry of the text is once presets are written out."""
    if not written or path[:1] != ("clip",) or len(path) < 2:
        yield path
        return
    for index, item in enumerate(written):
        if item == path[1]:
            yield ("clip", index, *path[2:])


class _Done:
    """Entries of which nothing more need be said."""

    def __init__(self, whole: Iterable[Path], alone: Iterable[Path]) -> None:
        self._whole = set(whole)
        self._alone = set(alone)

    def __contains__(self, path: Path) -> bool:
        above = (path[: depth + 1] for depth in range(len(path)))
        return path in self._alone or any(part in self._whole for part in above)


def _beyond_types(data: Any) -> Iterator[tuple[Path, str, list[Path]]]:
    """What no type says: path, sentence, and paths that would only repeat it."""
    for path in _nulls(data, ()):
        yield path, " must not be null. Give it a value or leave the key out", []
    for path, first in _repeated_names(data):
        name = shown(at(data, path))
        yield path, f" must be unique. Received: {name}, as in clip[{first}]", [("clip",)]


def _nulls(data: Any, path: Path) -> Iterator[Path]:
    if data is None:
        yield path
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _nulls(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _nulls(value, (*path, index))


def _repeated_names(data: Any) -> Iterator[tuple[Path, int]]:
    first: dict[str, int] = {}
    rules = at(data, ("clip",))
    for index, rule in enumerate(rules if isinstance(rules, list) else ()):
        name = at(rule, ("name",))
        if isinstance(name, str) and first.setdefault(name, index) != index:
            yield ("clip", index, "name"), first[name]


def _translated(
    error: ValidationError, data: Any, origin: Origin, done: _Done
) -> Iterator[Mistake]:
    for details in error.errors(include_url=False):
        path = _path(details["loc"], data)
        if path in done:
            continue
        if details["type"] in ("extra_forbidden", "invalid_key"):
            yield origin.mistake(path, _unknown_key(path))
            continue
        said = _sentence(details, path)
        if details["loc"][-1:] == (KEY,):
            yield origin.mistake(path, f": a key {said}. Received: {shown(path[-1])}")
            continue
        value = at(data, path)
        received = "" if value is ABSENT else f". Received: {shown(value)}"
        yield origin.mistake(path, f" {said}{received}")


def _path(location: tuple[int | str, ...], data: Any) -> Path:
    """Pydantic's location without the names of forms and the index into a lone word."""
    path: list[str | int] = []
    for part in location:
        holder = at(data, tuple(path))
        lone = isinstance(part, int) and not isinstance(holder, (dict, list))
        if lone or (part in FORMS and at(holder, (part,)) is ABSENT):
            continue
        path.append(part)
    return tuple(path)


def _sentence(details: Any, path: Path) -> str:
    kind = details["type"]
    if kind in SENTENCES:
        return SENTENCES[kind](details.get("ctx", {}))
    said: str = details["msg"]
    return said


def _unknown_key(path: Path) -> str:
    *_, key = path
    known = sorted(_keys_at(path[:-1]))
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}"
    return f" is not a key of the format. {hint}"


def _keys_at(path: Path) -> set[str]:
    """The keys that work in the section at a path."""
    sections: set[type[Section]] = {Policy}
    for part in path:
        if isinstance(part, str):
            fields = [model.model_fields.get(part) for model in sections]
            sections = {
                model for field in fields if field for model in _sections_in(field.annotation)
            }
    keys = {key for model in sections for key in model.model_fields}
    if ClipRule in sections:
        keys.add("use")  # gone by the time that a rule is made
    return keys


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)
