"""Text that every Python brings along: the sources of its standard library."""

from __future__ import annotations

import importlib.util
from importlib.abc import InspectLoader

__all__ = ["ALPHABET", "encode", "stdlib_text"]

MODULES = (
    "argparse", "ast", "calendar", "codecs", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "dis", "doctest", "enum", "fractions", "functools", "gettext",
    "heapq", "inspect", "ipaddress", "locale", "mailbox", "optparse", "pathlib", "pdb",
    "pickle", "pickletools", "platform", "random", "shutil", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "turtle",
    "typing", "warnings", "zipfile",
)  # fmt: skip
"""Long, well commented modules that every supported version has; about 2 MB."""

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
"""What the model can read; any other character becomes the last of these."""

_CODES = {character: code for code, character in enumerate(ALPHABET)}


def stdlib_text() -> str:
    """The sources, one after another; a module without source is left out.

    Raises:
        RuntimeError: this Python has none of them as source.
    """
    text = "\n".join(source for name in MODULES if (source := _source(name)))
    if not text:
        raise RuntimeError("this Python comes without the sources of its standard library")
    return text


def encode(text: str) -> list[int]:
    """One code below len(ALPHABET) for each character."""
    unknown = len(ALPHABET) - 1
    return [_CODES.get(character, unknown) for character in text]


def _source(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not isinstance(spec.loader, InspectLoader):
        return None
    return spec.loader.get_source(module)
