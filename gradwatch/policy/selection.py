"""A rule and a layout in, the parameters that the rule is about out."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from gradwatch.policy.clip import ClipRule, split_ndim
from gradwatch.policy.detectors import Detector
from gradwatch.policy.locating import Mistake, policy_error, shown
from gradwatch.policy.models import Policy
from gradwatch.records import Bools, Indices, Layout, Parameter, layer_name

__all__ = ["check_against", "layers_of", "select"]

COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "": operator.eq,
}
NEAR_NAMES = 5


def select(rule: ClipRule, layout: Layout) -> Indices:
    """Indices into `layout.parameters` of what a rule is about, ascending.

    A glob matches a parameter by any of its names, or by the path of its layer, in full and with
    regard to case: `head` and `head.*` both select `head.weight`.

    Raises:
        PolicyError: a selector matches nothing, with names near to it.
    """
    selected, mistakes = _selected(rule, layout)
    if mistakes:
        raise policy_error(rule.origin.source, mistakes)
    return np.flatnonzero(selected)


def check_against(policy: Policy, layout: Layout) -> None:
    """Sees that every rule of a policy finds the parameters that it is about.

    Raises:
        PolicyError: with a line for each selector that matches nothing.
    """
    mistakes = [mistake for rule in policy.clip for mistake in _selected(rule, layout)[1]]
    mistakes += _unmatched(policy, layout)
    if mistakes:
        raise policy_error(policy.source, mistakes)


def layers_of(detector: Detector, layout: Layout) -> Bools | None:
    """[L] the layers that a detector looks at; None where that is all of them."""
    chosen, left_out = getattr(detector, "layers", ("*",)), getattr(detector, "exclude", ())
    if tuple(chosen) == ("*",) and not left_out:
        return None
    return _mask(
        any(fnmatchcase(layer, glob) for glob in chosen)
        and not any(fnmatchcase(layer, glob) for glob in left_out)
        for layer in layout.layers
    )


def _unmatched(policy: Policy, layout: Layout) -> Iterator[Mistake]:
    """The globs of detectors that match no layer."""
    for kind, detector in policy.detect.kinds():
        for key in ("layers", "exclude"):
            for glob in getattr(detector, key, ()):
                if not any(fnmatchcase(layer, glob) for layer in layout.layers):
                    near = _near(glob, list(layout.layers))
                    said = f": no layer matches {shown(glob)}. {near}"
                    yield policy.origin.mistake(("detect", kind, key), said)
        mask = layers_of(detector, layout)
        if mask is not None and not mask.any():
            yield policy.origin.mistake(("detect", kind), ": its globs match no layer together")


def _selected(rule: ClipRule, layout: Layout) -> tuple[Bools, list[Mistake]]:
    """[P] whether each parameter is selected, and the selectors that match nothing."""
    selected = np.ones(len(layout.parameters), dtype=np.bool_)
    mistakes = []
    for key, find in FINDERS.items():
        entries = getattr(rule, key)
        if not entries:
            continue
        listed = entries if isinstance(entries, tuple) else (entries,)
        found = [find(entry, layout) for entry in listed]
        for index, (entry, mask) in enumerate(zip(listed, found, strict=True)):
            if not mask.any():
                path = (key, index) if len(listed) > 1 else (key,)
                mistakes.append(rule.origin.mistake(path, NOTHING[key](entry, layout)))
        either = np.logical_or.reduce(found)
        selected &= ~either if key == "exclude" else either
    if not mistakes and not selected.any():
        mistakes.append(rule.origin.mistake((), ": its selectors match no parameter together"))
    return selected, mistakes


def _named(glob: str, layout: Layout) -> Bools:
    return _mask(
        any(fnmatchcase(name, glob) for name in _names(parameter, layout.layers[layer]))
        for parameter, layer in zip(layout.parameters, layout.layer_of, strict=True)
    )


def _typed(name: str, layout: Layout) -> Bools:
    return _mask(parameter.module == name for parameter in layout.parameters)


def _grouped(group: int, layout: Layout) -> Bools:
    return _mask(parameter.group == group for parameter in layout.parameters)


def _dimensioned(ndim: str, layout: Layout) -> Bools:
    sign, number = split_ndim(ndim)
    compare = COMPARISONS[sign]
    return _mask(compare(len(parameter.shape), number) for parameter in layout.parameters)


def _mask(values: Iterable[bool]) -> Bools:
    return np.fromiter(values, dtype=np.bool_)


def _names(parameter: Parameter, layer: str) -> list[str]:
    """Whatever a glob may call a parameter: its names, their modules, its layer."""
    names = (parameter.name, *parameter.aliases)
    return [*names, *(layer_name(name, "module") for name in names), layer]


def _no_name(glob: str, layout: Layout) -> str:
    return f": no parameter matches {shown(glob)}. {_near(glob, _all_names(layout))}"


def _no_type(name: str, layout: Layout) -> str:
    types = dict.fromkeys(parameter.module for parameter in layout.parameters)
    return f": no module of type {shown(name)} owns a parameter. {_near(name, list(types))}"


def _no_group(group: int, layout: Layout) -> str:
    groups = sorted({parameter.group for parameter in layout.parameters})
    return f": there is no parameter group {group}. There are: {shown(groups)}"


def _no_dimensions(ndim: str, layout: Layout) -> str:
    found = sorted({len(parameter.shape) for parameter in layout.parameters})
    return f": no parameter has ndim {ndim}. There are: {shown(found)}"


def _all_names(layout: Layout) -> list[str]:
    pairs = zip(layout.parameters, layout.layer_of, strict=True)
    names = (_names(parameter, layout.layers[layer]) for parameter, layer in pairs)
    return list(dict.fromkeys(name for several in names for name in several))


def _near(wanted: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=NEAR_NAMES, cutoff=0.5)
    if near:
        return f"Near names: {', '.join(near)}"
    rest = f" and {len(names) - NEAR_NAMES} more" if len(names) > NEAR_NAMES else ""
    return f"There are: {', '.join(names[:NEAR_NAMES])}{rest}"


FINDERS: dict[str, Callable[[Any, Layout], Bools]] = {
    "params": _named,
    "exclude": _named,
    "types": _typed,
    "groups": _grouped,
    "ndim": _dimensioned,
}
NOTHING: dict[str, Callable[[Any, Layout], str]] = {
    "params": _no_name,
    "exclude": _no_name,
    "types": _no_type,
    "groups": _no_group,
    "ndim": _no_dimensions,
}
"""What is said where a selector finds nothing."""
