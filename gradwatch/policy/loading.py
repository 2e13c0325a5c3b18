"""A file, a dict or a text in, a policy out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gradwatch.errors import PolicyError
from gradwatch.policy.decoding import decode
from gradwatch.policy.locating import Mistake, policy_error, shown
from gradwatch.policy.models import OBSERVE, Policy
from gradwatch.policy.plain import Unreadable, read_mapping
from gradwatch.policy.reading import read_text

__all__ = ["load_policy", "parse_policy", "read_policy"]

MAX_BYTES = 2**20
TOO_LARGE = Mistake("a policy must be smaller than 1 MiB", (1, 1))


def load_policy(source: str | os.PathLike[str] | Mapping[str, Any] | Policy | None) -> Policy:
    """The policy that is meant.

    Args:
        source: the path of a YAML file, its content as a dict, or a `Policy`, which is returned as
            it is. None only observes.

    Raises:
        PolicyError: one line for each mistake, `policy.yaml:7:5: clip[0].limit must be > 0`.
    """
    if source is None:
        return OBSERVE
    if isinstance(source, Policy):
        return _checked(source)
    if isinstance(source, Mapping):
        return _from_mapping(source, "<dict>")
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        return read_policy(name, shown(name))
    raise PolicyError(
        f"a policy must be a path, a dict, a Policy or None. Received: {shown(source)}"
    )


def read_policy(path: str, source: str) -> Policy:
    """The policy in a file; `source` is what its errors call it.

    Raises:
        PolicyError: as `load_policy`.
    """
    return parse_policy(_text(path, source), source)


def parse_policy(text: str, source: str = "<string>") -> Policy:
    """The policy that a YAML text means; `source` is what its errors call it.

    Raises:
        PolicyError: as `load_policy`.
    """
    if len(text) > MAX_BYTES:
        raise policy_error(source, [TOO_LARGE])
    try:
        return decode(read_text(text), source)
    except Unreadable as error:
        raise policy_error(source, [error.mistake]) from None


def _from_mapping(mapping: Mapping[str, Any], source: str) -> Policy:
    try:
        return decode(read_mapping(mapping), source)
    except Unreadable as error:
        raise policy_error(source, [error.mistake]) from None


def _checked(policy: Policy) -> Policy:
    """A policy that was put together in Python is held to what works, like any other."""
    if policy.mode != "observe":
        _from_mapping(policy.written(), policy.source)
    return policy


def _text(path: str, source: str) -> str:
    if "\n" in path:
        raise PolicyError("a policy must be a path, not its text: for a text use parse_policy")
    content = _content(path, source)
    if len(content) > MAX_BYTES:
        raise policy_error(source, [TOO_LARGE])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        where = (before.count(b"\n") + 1, column)
        message = f"the file must be UTF-8. Received: byte 0x{content[error.start]:02x}"
        raise policy_error(source, [Mistake(message, where)]) from None


def _content(path: str, source: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        said = "there is no such file. The smallest policy is `version: 1`"
    except IsADirectoryError:
        said = "this is a directory, a policy is a YAML file"
    except (OSError, ValueError) as error:
        said = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    raise policy_error(source, [Mistake(said)])
