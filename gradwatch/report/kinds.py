"""The kind of a finding in, what it is called in a sentence out.

Lists, headings and addresses have the kind itself: it is the key in a policy and in the documents.
"""

from __future__ import annotations

from gradwatch.saying import one_line

__all__ = ["MEANS", "name_of"]

NAMES = {
    "nonfinite": "nonfinite gradients (NaN or inf)",
    "diverging": "diverging loss",
    "clip_saturated": "saturated clipping",
}
"""Where it is not the kind, read as words."""

MEANS = {
    "spike": "a norm far above its median in that step",
    "overflow": "a gradient that the loss scaler dropped",
}
"""What an event is, for kinds whose name does not say it."""

WIDEST = 60


def name_of(kind: str) -> str:
    """`loss spike`, `nonfinite gradients (NaN or inf)`; a kind of another version as it is."""
    return NAMES.get(kind) or one_line(kind.replace("_", " "))[:WIDEST]
