"""One clip rule: on these parameters, per this unit, above this limit, do this."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic import ValidationInfo as Info

from gradwatch.policy.forms import Schedule, ScheduleMap, has_steps
from gradwatch.policy.locating import Origin
from gradwatch.policy.statistic import StatisticLimit, is_statistic
from gradwatch.policy.values import Groups, Name, Names, NotNegative, Positive, Section, refuse

__all__ = ["ClipRule", "default_eps", "default_name", "is_measure", "split_ndim"]

TORCH_EPS = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm."""

WEIGHT_FLOOR = 1e-3
"""What the paper on adaptive gradient clipping takes, arXiv:2102.06171."""

NDIM = re.compile(r"(<=|>=|==|<|>|)\s*([0-9]{1,2})")
MEASURE = re.compile(r"l1|l2|linf|l[0-9]+(\.[0-9]+)?|rms|weight|update|loss")


def is_measure(value: Any) -> bool:
    """Whether a word names a measure; `l0` would be a count."""
    return isinstance(value, str) and bool(MEASURE.fullmatch(value)) and value.strip("l0.") != ""


def _limit_form(value: Any) -> str | None:
    if is_statistic(value):
        return "<statistic>"
    if isinstance(value, dict):
        return "<schedule>" if not value or has_steps(value) else None
    if isinstance(value, Schedule):
        return "<schedule>"
    if isinstance(value, StatisticLimit):
        return "<statistic>"
    return None if isinstance(value, (list, tuple)) else "<number>"


def split_ndim(ndim: str) -> tuple[str, int]:
    """`>=2` as (">=", 2) and `2` as ("", 2)."""
    match = NDIM.fullmatch(ndim)
    assert match is not None
    return match[1].replace("==", ""), int(match[2])


def _ndim(value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not NDIM.fullmatch(text):
        refuse("must compare with a number of dimensions, such as <2, >=2 or 2")
    sign, number = split_ndim(text)
    return f"{sign}{number}"


def _measure(value: Any) -> Any:
    if not is_measure(value):
        refuse("must be l1, l2, linf, l<p>, rms, weight, update or loss")
    return value


class ClipRule(Section):
    """On these parameters, per this unit, if this measure exceeds this limit, then do this."""

    params: Names = ("*",)
    """A glob or a list of globs on parameter names or layer paths."""

    exclude: Names = ()
    """Globs that take parameters out of the selection again."""

    types: Names = ()
    """Class names of the owning modules, such as `Embedding`."""

    groups: Groups = ()
    """Numbers of the optimizer's parameter groups."""

    ndim: Annotated[
        str | None,
        BeforeValidator(_ndim),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "pattern": r"^(<=|>=|==|<|>)?\s*[0-9]{1,2}$"},
                    {"type": "integer", "minimum": 0, "maximum": 99},
                ]
            }
        ),
    ] = None
    """Number of dimensions, such as `<2` for biases and scales."""

    per: Literal["all", "group", "layer", "tensor", "unit", "element"] = "all"
    """What has a norm of its own: everything selected as one vector, or each parameter group,
    layer, tensor, output unit (such as a row of a linear layer) or element of it."""

    measure: Annotated[
        str,
        BeforeValidator(_measure),
        WithJsonSchema({"type": "string", "pattern": f"^({MEASURE.pattern})$"}),
    ] = "l2"
    """What is compared with the limit: the l1, l2, linf or any l<p> norm of the gradient, its root
    mean square (rms), its L2 norm over that of the weights (weight), the root mean square of the
    update that the optimizer is about to make, before the learning rate (update), or the loss that
    was logged for the step (loss)."""

    limit: Annotated[
        Annotated[Positive, Tag("<number>")]
        | Annotated[ScheduleMap, Tag("<schedule>")]
        | Annotated[StatisticLimit, Tag("<statistic>")],
        Discriminator(
            _limit_form,
            custom_error_type="policy",
            custom_error_message="must be a number, a schedule such as {0: 10, 2000: 1}, or a "
            "statistic such as {z: 4}",
        ),
    ]
    """The bound: a number, a schedule by optimizer step, linear between its points, or a statistic
    of the norm's own history."""

    then: Literal["scale", "skip", "zero", "stop", "warn"] = "scale"
    """What happens above the limit: scale down to it, skip the step, zero what has exceeded it,
    stop the run, or warn."""

    name: Name = ""
    """The label on every exported series. Left out: `global`, or `per-` and the unit."""

    eps: NotNegative = 0.0
    """Added to the norm before dividing. Left out: 1e-6, as in torch, for a rule that scales the
    L2 norm of everything selected to a number or a schedule; else 0."""

    floor: Positive | None = None
    """Least weight norm that `measure: weight` divides by. Left out there: 0.001."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def written(self, **defaults: Any) -> dict[str, Any]:
        floor = WEIGHT_FLOOR if self.measure == "weight" else None
        return super().written(
            name=default_name(self), eps=default_eps(self), floor=floor, **defaults
        )

    @property
    def origin(self) -> Origin:
        """Where the rule was written."""
        return self._origin

    def located(self, origin: Origin) -> None:
        self._origin = origin

    @field_validator("floor", mode="after")
    @classmethod
    def _floor_has_a_use(cls, floor: float | None, info: Info) -> float | None:
        if floor is not None and info.data.get("measure", "weight") != "weight":
            refuse("must be left out unless measure is weight")
        return floor

    @model_validator(mode="after")
    def _compares_what_has_a_meaning(self) -> Self:
        measure, per, then = self.measure, self.per, self.then
        if measure == "loss" and (per != "all" or then in ("scale", "zero")):
            refuse("must be per: all and then: skip, stop or warn where measure is loss")
        if measure == "update" and (per in ("unit", "element") or then == "scale"):
            refuse(
                "must be per: all, group, layer or tensor and not then: scale where measure is "
                "update"
            )
        if per == "element" and measure == "weight":
            refuse("must not be per: element where measure is weight")
        return self

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        # Not in `model_fields_set`: the policy may still give a default name another number.
        if "eps" not in self.model_fields_set:
            object.__setattr__(self, "eps", default_eps(self))
        if "name" not in self.model_fields_set:
            object.__setattr__(self, "name", default_name(self))
        if self.measure == "weight" and self.floor is None:
            object.__setattr__(self, "floor", WEIGHT_FLOOR)
        return self


def default_name(rule: ClipRule) -> str:
    return "global" if rule.per == "all" else f"per-{rule.per}"


def default_eps(rule: ClipRule) -> float:
    """torch's eps for the rule that means what torch does, else none."""
    plain = (rule.measure, rule.per, rule.then) == ("l2", "all", "scale")
    return TORCH_EPS if plain and not isinstance(rule.limit, StatisticLimit) else 0.0
