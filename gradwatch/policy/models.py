"""The policy as typed values: one frozen model for each section of the file.

Defaults that depend on other keys (`guard.on_error`, a rule's `eps` and `name`) are resolved when
a policy is made, so readers of a `Policy` never meet a default that is still to be decided.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    field_validator,
)
from pydantic import ValidationInfo as Info

from gradwatch.policy.accumulate import Accumulate
from gradwatch.policy.clip import ClipRule, default_name
from gradwatch.policy.detect import Detect
from gradwatch.policy.forms import BudgetText
from gradwatch.policy.locating import Origin
from gradwatch.policy.values import Count, Section, refuse
from gradwatch.records import Grouping

__all__ = ["OBSERVE", "Depth", "Guard", "Policy"]

MOST_RULES = 63
"""What fits into the bits of one integer of a recording."""

Mode = Literal["enforce", "shadow", "observe"]


class Depth(Section):
    """Layers by the first parts of a parameter's name."""

    depth: Count
    """How many parts: at 1, `a.b.weight` is in layer `a`."""


class Guard(Section):
    """What comes first: steps that must not reach the optimizer, and when enough is enough."""

    nonfinite: Literal["skip", "zero", "stop", "none"] = "skip"
    """What happens to a step whose gradient holds inf or NaN. Without a policy: `none`."""

    patience: Count | None = None
    """Consecutive skips, for any reason, that are tolerated before the run is stopped. Left out:
    as many as come."""

    budget: BudgetText | None = None
    """Skips that are tolerated within so many steps, such as `50/1000`. Left out: as many as
    come."""

    on_error: Literal["stop", "observe"] = "stop"
    """What happens after 3 failures in a row to decide or to apply. In shadow mode: `observe`."""


def _layers_form(value: Any) -> str | None:
    if isinstance(value, (dict, Depth)):
        return "<depth>"
    return "<word>" if value in ("parameter", "module") else None


def _version(value: object) -> object:
    if isinstance(value, bool) or value != 1:
        refuse("must be 1, the only version of the format")
    return value


def _mode(value: object) -> object:
    if value not in ("enforce", "shadow"):
        refuse("must be enforce or shadow")
    return value


class Policy(Section):
    """What may happen to a gradient between `backward()` and `step()`."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """The version of the format."""

    mode: Annotated[
        Mode,
        BeforeValidator(_mode),
        WithJsonSchema({"enum": ["enforce", "shadow"]}),
    ] = "enforce"
    """`enforce` acts; `shadow` measures and reports what it would do, and touches nothing: what is
    recorded as clipped or skipped would have been."""

    layers: Annotated[
        Annotated[Literal["parameter", "module"], Tag("<word>")] | Annotated[Depth, Tag("<depth>")],
        Discriminator(
            _layers_form,
            custom_error_type="policy",
            custom_error_message="must be parameter, module or {depth: 2}",
        ),
    ] = "module"
    """How parameters are grouped and named: by parameter, by owning module, or by depth."""

    accumulate: Accumulate | None = None
    """Left out: the loop's own windows are counted and nothing is changed."""

    guard: Annotated[Guard, Field(validate_default=True)] = Guard()
    """Comes first: non-finite gradients, and how many skips are tolerated."""

    clip: tuple[ClipRule, ...] = ()
    """The rules, in order; each sees what the one above left."""

    detect: Detect = Detect()
    """The detectors; every one is on with its defaults unless it says `none`."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where it was written."""
        return self._origin

    @property
    def source(self) -> str:
        """The file that the policy came from, or a word in angle brackets."""
        return self._origin.source

    @property
    def grouping(self) -> Grouping:
        """How the records group parameters into layers."""
        return self.layers.depth if isinstance(self.layers, Depth) else self.layers

    @property
    def decides(self) -> bool:
        """Whether anything in it could change what the optimizer sees."""
        return (
            self.accumulate is not None
            or self.guard.nonfinite != "none"
            or any(rule.then != "warn" for rule in self.clip)
            or any(detector.then == "stop" for _, detector in self.detect.kinds())
        )

    def who(self, then: str) -> tuple[str, ...]:
        """Names of the rules that skip, zero, stop, ...; `guard.nonfinite` among them."""
        guard = ("guard.nonfinite",) if self.guard.nonfinite == then else ()
        return (*guard, *(rule.name for rule in self.clip if rule.then == then))

    @property
    def enforcing(self) -> bool:
        """Whether its decisions are meant to be applied, and there are any."""
        return self.mode == "enforce" and self.decides

    @property
    def effective_mode(self) -> Mode:
        """The mode; `observe` where there is nothing to enforce."""
        return "observe" if self.mode == "enforce" and not self.decides else self.mode

    def canonical_yaml(self) -> str:
        """The policy without its defaults, in the order of the format; empty without a policy.

        Files that mean the same have the same canonical form, and it parses to an equal policy.
        """
        if self.mode == "observe":
            return ""
        return yaml.safe_dump(self.written(), sort_keys=False, allow_unicode=True, width=1000)

    def written(self, **defaults: Any) -> dict[str, Any]:
        guard = _guard_in(self.mode, Guard())
        entries = super().written(guard=guard, **defaults)
        if "guard" in entries:
            entries["guard"] = self.guard.written(**dict(guard))
        return entries

    @property
    def sha256(self) -> str:
        """Of the canonical form, in hexadecimal; empty without a policy."""
        text = self.canonical_yaml()
        return hashlib.sha256(text.encode()).hexdigest() if text else ""

    def located(self, origin: Origin) -> Self:
        """The same policy, knowing where it and its rules were written."""
        self._origin = origin
        for index, rule in enumerate(self.clip):
            rule.located(replace(origin, part=("clip", index)))
        return self

    @field_validator("guard", mode="after")
    @classmethod
    def _guard_of_the_mode(cls, guard: Guard, info: Info) -> Guard:
        return _guard_in(info.data.get("mode", "enforce"), guard)

    @field_validator("clip", mode="after")
    @classmethod
    def _with_unique_names(cls, rules: tuple[ClipRule, ...]) -> tuple[ClipRule, ...]:
        if len(rules) > MOST_RULES:
            refuse(f"must hold at most {MOST_RULES} rules (here {len(rules)})")
        names = Counter(rule.name for rule in rules if "name" in rule.model_fields_set)
        if names and (most := names.most_common(1)[0])[1] > 1:
            refuse(f"must have unique names, {most[0]!r} is used {most[1]} times")
        taken = set(names)
        return tuple(_named(rule, taken) for rule in rules)


def _guard_in(mode: Mode, guard: Guard) -> Guard:
    """A guard that does not say what happens on errors never stops a run in shadow mode."""
    if mode == "enforce" or "on_error" in guard.model_fields_set:
        return guard
    return guard.model_copy(update={"on_error": "observe"})


def _named(rule: ClipRule, taken: set[str]) -> ClipRule:
    """The rule, its default name made unique with `-2`, `-3`, ..."""
    if "name" in rule.model_fields_set:
        return rule
    default = name = default_name(rule)
    number = 1
    while name in taken:
        number += 1
        name = f"{default}-{number}"
    taken.add(name)
    return rule if name == rule.name else rule.model_copy(update={"name": name})


OBSERVE = Policy(version=1).model_copy(
    update={"mode": "observe", "guard": Guard(nonfinite="none", on_error="observe")}
)
"""What None means: measure, detect and record, and touch nothing."""
OBSERVE.located(Origin("<none>"))
