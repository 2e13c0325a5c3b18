"""What one part of a trace leaves for a later one."""

from __future__ import annotations

import threading
from typing import Any

import tensorflow as tf

__all__ = ["NoteOfTrace"]


class NoteOfTrace:
    """Tensors for later in the trace that is going on, in the same graph and the same replica."""

    def __init__(self) -> None:
        self._here = threading.local()  # each replica is traced in a thread of its own

    def put(self, *tensors: Any) -> None:
        self._here.tensors = tensors
        self._here.graph = tf.compat.v1.get_default_graph() if _in_graph() else None

    def look(self) -> tuple[Any, ...] | None:
        """None where there are none of this trace."""
        tensors: tuple[Any, ...] | None = getattr(self._here, "tensors", None)
        if tensors is None:
            return None
        graph = tf.compat.v1.get_default_graph() if _in_graph() else None
        return tensors if self._here.graph is graph else None

    def take(self) -> tuple[Any, ...] | None:
        """The same, and they are gone."""
        tensors = self.look()
        self._here.tensors = None
        return tensors


def _in_graph() -> bool:
    return not tf.executing_eagerly()
