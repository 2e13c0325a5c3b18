"""`use: NAME` of a clip item: published rules, written in the plain keys of the format.

Expanded on plain data, before anything is checked, so that nothing of a preset is left in a policy:
`gradwatch explain` prints what it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gradwatch.policy.forms import has_steps
from gradwatch.policy.locating import Path, one_of, shown
from gradwatch.policy.statistic import is_statistic

__all__ = ["PRESETS", "Expanded", "expanded"]

SIX_SIGMA = {"z": 6, "space": "raw", "window": 128, "warmup": 64, "floor": 0, "learn": "raw"}
STATISTIC = ("z", "ratio", "quantile")

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    # arXiv:2102.06171. The paper leaves the last linear layer out: `exclude` it by name.
    "agc": (
        {
            "ndim": ">=2", "per": "unit", "measure": "weight", "limit": 0.01, "floor": 1e-3,
            "name": "agc",
        },
    ),
    # arXiv:2504.02507.
    "zclip": (
        {
            "limit": {
                "z": 2.5, "space": "raw", "decay": 0.97, "warmup": 25, "floor": 0,
                "learn": "clipped", "to": "reciprocal",
            },
            "name": "zclip",
        },
    ),
    # arXiv:2007.14469, but for the norm of the step itself, which its code has in the history.
    "autoclip": (
        {
            "limit": {"quantile": 0.1, "window": "all", "warmup": 1, "learn": "raw"},
            "name": "autoclip",
        },
    ),
    # arXiv:2502.11034, but for its warm-up, which clips the whole gradient and keeps the smallest
    # norm of each tensor.
    "adagc": (
        {
            "per": "tensor",
            "limit": {
                "ratio": 1.04, "decay": 0.99, "warmup": 100, "until": 1.0, "learn": "clipped",
            },
            "name": "adagc",
        },
    ),
    # OLMo-core's SkipStepOptimizer: nothing is skipped before half of its window is there.
    "skipstep": (
        {"measure": "loss", "limit": SIX_SIGMA, "then": "skip", "name": "skipstep-loss"},
        {"measure": "l2", "limit": SIX_SIGMA, "then": "skip", "name": "skipstep-norm"},
    ),
    "keras-clipnorm": ({"per": "tensor", "limit": 1.0, "name": "keras-clipnorm"},),
    # optax.clip_by_block_rms.
    "block-rms": ({"per": "tensor", "measure": "rms", "limit": 1.0, "name": "block-rms"},),
}  # fmt: skip


@dataclass
class Expanded:
    """A policy's plain data without presets."""

    data: Any
    written: tuple[int, ...] = ()
    """By clip item which one of the file it comes from; empty where none was moved."""

    mistakes: list[tuple[Path, str]] = field(default_factory=list)
    """What is wrong with the use of presets, by the paths of the new data."""


def expanded(data: Any) -> Expanded:
    """The same data with each preset written out; keys beside `use` go before its own."""
    items = data.get("clip") if isinstance(data, dict) else None
    if not isinstance(items, list) or not any(_uses(item) for item in items):
        return Expanded(data)
    taken = {item["name"] for item in items if isinstance(item, dict) and _is_name(item)}
    found = Expanded({**data, "clip": []})
    written: list[int] = []
    for index, item in enumerate(items):
        rules = list(_rules(item, taken, len(written), found)) if _uses(item) else [item]
        found.data["clip"] += rules
        written += [index] * len(rules)
    found.written = tuple(written)
    return found


def _uses(item: Any) -> bool:
    return isinstance(item, dict) and item.get("use") is not None


def _is_name(item: dict[Any, Any]) -> bool:
    return isinstance(item.get("name"), str)


def _rules(item: dict[Any, Any], taken: set[str], at: int, found: Expanded) -> Iterator[Any]:
    name, beside = item["use"], {key: value for key, value in item.items() if key != "use"}
    rules = PRESETS.get(name) if isinstance(name, str) else None
    if rules is None:
        words = one_of(PRESETS)
        found.mistakes.append((("clip", at, "use"), f" must be {words}. Received: {shown(name)}"))
        yield item
        return
    if len(rules) > 1 and "measure" in beside:
        said = f" must be left out beside use: {name}, which is one rule for each of its measures"
        found.mistakes.append((("clip", at, "measure"), said))
        beside.pop("measure")
    for rule in rules:
        yield _merged(rule, beside, taken, alone=len(rules) == 1)


def _merged(
    rule: dict[str, Any], beside: dict[Any, Any], taken: set[str], *, alone: bool
) -> dict[Any, Any]:
    merged: dict[Any, Any] = {**rule, **beside}
    merged["limit"] = _limit(rule["limit"], beside.get("limit", rule["limit"]))
    if "measure" in beside and beside["measure"] != "weight" and "floor" not in beside:
        merged.pop("floor", None)
    if not _is_name(beside):
        if "name" not in beside:
            merged["name"] = _free(rule["name"], taken)
    elif not alone:
        merged["name"] = f"{beside['name']}-{rule['name'].rpartition('-')[2]}"
    return merged


def _limit(preset: Any, given: Any) -> Any:
    """A mapping is taken into the preset's own, key by key; anything else replaces it."""
    if not (isinstance(preset, dict) and is_statistic(given)) or has_steps(given):
        return given
    if any(key in given for key in STATISTIC):
        preset = {key: value for key, value in preset.items() if key not in STATISTIC}
    return {**preset, **given}


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free
