"""A YAML text in, plain data out, with the line and column of every entry.

Scalars mean what a plain `yaml.safe_load` makes of them, but for YAML's booleans, dates, octal and
sexagesimal numbers: those stay text, and are then refused wherever a number is due. No tag builds
anything, and neither depth, size nor aliases can make reading expensive.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from gradwatch.policy.locating import Mistake, Path, Position, path_text, shown
from gradwatch.policy.plain import MAX_DEPTH, MAX_VALUES, Document, Unreadable, is_text

__all__ = ["read_text"]

NULL = re.compile(r"(?:~|null|Null|NULL)?")
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,99})")
FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)"
)
EMPTY = "the file is empty. The smallest policy is `version: 1`"


def read_text(text: str) -> Document:
    """Plain dicts, lists, text, numbers and nulls, and where each entry stands.

    Raises:
        Unreadable: the text is not one YAML document of a bearable size.
    """
    document = Document()
    root = _composed(text, document)
    if root is None or (isinstance(root, ScalarNode) and _scalar(root) is None):
        raise Unreadable(Mistake(EMPTY, (1, 1)))
    document.positions[()] = _position(root)
    document.data = _Walk(document).value(root, (), _position(root))
    return document


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's stages up to the node graph, bounded in depth and in size."""

    def __init__(self, text: str, document: Document) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._document = document
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        where = _position(event)
        if (tag := getattr(event, "tag", None)) is not None:
            message = f"tags are not part of the format. Received: {shown(tag)}"
            self._document.mistakes.append(Mistake(message, where))
        self._depth += 1
        self._nodes += 1
        _check_bounds(self._depth, self._nodes, where)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _composed(text: str, document: Document) -> Node | None:
    try:
        loader = _Loader(text, document)
    except ReaderError as error:
        before = text[: error.position]
        where = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"the text holds a character that YAML does not allow: U+{error.character:04X}"
        raise Unreadable(Mistake(message, where)) from None
    try:
        loader.get_event()  # type: ignore[no-untyped-call]
        if loader.check_event(yaml.StreamEndEvent):
            return None
        node = loader.compose_document()
        if not loader.check_event(yaml.StreamEndEvent):
            where = _position(loader.peek_event())  # type: ignore[no-untyped-call]
            raise Unreadable(Mistake("a policy is one document, here begins a second one", where))
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_unparsed(error, loader)) from None
    except (ValueError, OverflowError):
        # PyYAML converts escapes and version numbers without looking at their size.
        message = "the YAML does not parse: a code point or a version is out of range"
        raise Unreadable(Mistake(message, _mark(loader.get_mark()))) from None
    return node


def _unparsed(error: yaml.MarkedYAMLError, loader: _Loader) -> Mistake:
    parts = " ".join(part for part in (error.context, error.problem) if part)
    said = parts if parts.isprintable() else ascii(parts)
    mark = error.problem_mark or error.context_mark or loader.get_mark()
    return Mistake(f"the YAML does not parse: {said}", _mark(mark))


class _Walk:
    """From nodes to plain data. Aliases are expanded, so their cost is counted here."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0

    def value(self, node: Node, path: Path, where: Position) -> Any:
        self._values += 1
        _check_bounds(len(path), self._values, where)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return self._sequence(node, path)
        assert isinstance(node, ScalarNode)
        value = _scalar(node)
        if isinstance(value, str) and not is_text(value):
            said = f"holds what is not text. Received: {shown(value)}"
            self._mistake(where, f"{path_text(path)} {said}")
            self._document.left_out.append(path)
        return value

    def _sequence(self, node: SequenceNode, path: Path) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            where = self._document.positions[(*path, index)] = _position(child)
            items.append(self.value(child, (*path, index), where))
        return items

    def _mapping(self, node: MappingNode, path: Path) -> dict[str | int, Any]:
        entries: dict[str | int, Any] = {}
        for key_node, child in node.value:
            where = _position(key_node)
            key = self._key(key_node, path, where)
            if key is None:
                continue
            child_path = (*path, key)
            if key in entries:
                line, column = self._document.positions[child_path]
                said = f"{path_text(child_path)} is given twice, first at {line}:{column}"
                self._mistake(where, said)
                continue
            self._document.positions[child_path] = where
            entries[key] = self.value(child, child_path, where)
        return entries

    def _key(self, node: Node, path: Path, where: Position) -> str | int | None:
        if not isinstance(node, ScalarNode):
            self._mistake(where, f"{path_text(path)}: a key must be a word or a whole number")
            return None
        key = _scalar(node)
        if key == "<<" and node.style is None:
            self._mistake(where, f"{path_text(path)}: merge keys (<<) are not part of the format")
        elif isinstance(key, int) or (isinstance(key, str) and is_text(key)):
            return key
        else:
            said = f"a key must be a word or a whole number. Received: {shown(key)}"
            self._mistake(where, f"{path_text(path)}: {said}")
        return None

    def _mistake(self, where: Position, message: str) -> None:
        self._document.mistakes.append(Mistake(message, where))


def _scalar(node: ScalarNode) -> str | int | float | None:
    text: str = node.value
    if node.style is not None:
        return text
    if NULL.fullmatch(text):
        return None
    if INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if FLOAT.fullmatch(text):
        digits = text.replace("_", "").lower()
        return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _check_bounds(depth: int, values: int, where: Position) -> None:
    if depth > MAX_DEPTH:
        raise Unreadable(Mistake(f"nested deeper than {MAX_DEPTH} levels", where))
    if values > MAX_VALUES:
        message = f"a policy must hold at most {MAX_VALUES} values, aliases expanded"
        raise Unreadable(Mistake(message, where))


def _position(node: Any) -> Position:
    return _mark(node.start_mark)


def _mark(mark: yaml.Mark) -> Position:
    return mark.line + 1, mark.column + 1
