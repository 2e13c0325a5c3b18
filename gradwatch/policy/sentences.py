"""A policy in, what it means in words out: one sentence for each thing that it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradwatch.policy.accumulate import Accumulate, SampleTarget
from gradwatch.policy.clip import ClipRule
from gradwatch.policy.detect import KINDS
from gradwatch.policy.forms import Schedule
from gradwatch.policy.models import Depth, Guard, Policy
from gradwatch.policy.statistic import StatisticLimit

__all__ = ["rule_sentence", "sentences"]

MODES = {
    "enforce": "Its decisions are applied.",
    "shadow": "Shadow: it is reported what it would do, and nothing is touched.",
    "observe": "It decides nothing: gradients are only observed.",
}

UNITS = {
    "all": "as one vector",
    "group": "each parameter group as one vector",
    "layer": "each layer as one vector",
    "tensor": "each tensor by itself",
    "unit": "each output unit by itself",
    "element": "each element by itself",
}

ACTIONS = {
    "scale": "it is scaled down to that",
    "zero": "it is made 0",
    "skip": "the step is skipped",
    "stop": "the run is stopped before the update",
    "warn": "a warning is logged",
}

MEASURES = {
    "rms": "the root mean square",
    "weight": "the L2 norm over that of its weights (at least {floor:g})",
    "update": "the root mean square of the update, before the learning rate,",
    "loss": "the loss that was logged for the step",
}

NONFINITE = {
    "skip": "A step with NaN or inf in a gradient is skipped.",
    "zero": "A tensor with NaN or inf in its gradient is made 0.",
    "stop": "NaN or inf in a gradient stops the run before the update.",
    "none": "NaN and inf are let through to the optimizer.",
}

WEIGH = {
    "mean": "their mean",
    "sum": "their sum",
    "weight": "their mean by the weight that is given with each loss",
}

SYNC = {"boundary": "once a window", "every": "with every micro-batch"}

DRIVE = {
    "hook": "gradwatch makes the windows; the loop must not divide the loss.",
    "loop": "the loop makes the windows and divides the loss by the micro-batches of a full one; "
    "gradwatch counts, and multiplies the gradients of a shorter window so that they are the mean "
    "of what came.",
}

ONLY_COUNTED = "the loop makes the windows; gradwatch only counts."

PARTIAL = {
    "step": "a step of its own, exact for what arrived",
    "drop": "dropped",
    "carry": "the beginning of the next one",
}


def sentences(policy: Policy) -> list[str]:
    """The policy as it is understood, in the order in which it acts.

    Which parameters a selector matches depends on the model, and is checked where it is attached.
    """
    return [
        MODES[policy.effective_mode],
        _layers(policy),
        *([] if policy.accumulate is None else _accumulate(policy.accumulate)),
        *_guard(policy.guard),
        *(f"clip {rule.name}: {rule_sentence(rule)}" for rule in policy.clip),
        _detectors(policy),
        *_cost(policy),
    ]


def _layers(policy: Policy) -> str:
    if isinstance(policy.layers, Depth):
        parts = policy.layers.depth
        return (
            f"Layers are named by the first {parts} part{'s' * (parts > 1)} of a parameter's name."
        )
    unit = "parameter is a layer" if policy.layers == "parameter" else "module is a layer"
    return f"Each {unit}."


def _accumulate(accumulate: Accumulate) -> Iterator[str]:
    steps = accumulate.steps
    count = (
        ", then ".join(f"{value:g} from step {step}" for step, value in steps.points)
        if isinstance(steps, Schedule)
        else str(steps)
    )
    if isinstance(steps, SampleTarget):
        count = f"micro-batches of {steps.target} samples together"
    else:
        count = f"{count} micro-batches"
    yield f"accumulate: {count} make one step, {WEIGH[accumulate.weigh]}."
    is_only_counted = accumulate.drive == "loop" and accumulate.weigh == "sum"
    yield f"accumulate: {ONLY_COUNTED if is_only_counted else DRIVE[accumulate.drive]}"
    yield f"accumulate: a shorter last window is {PARTIAL[accumulate.partial]}."
    if accumulate.sync is not None:
        yield f"accumulate: gradients are reduced over ranks {SYNC[accumulate.sync]}."


def _guard(guard: Guard) -> Iterator[str]:
    yield f"guard: {NONFINITE[guard.nonfinite]}"
    if guard.patience is not None:
        yield f"guard: {guard.patience} skipped steps in a row stop the run."
    if guard.budget is not None:
        yield f"guard: {guard.budget.skips} skipped steps within {guard.budget.steps} stop the run."
    after = "stop the run" if guard.on_error == "stop" else "end the enforcing; the run goes on"
    yield f"guard: 3 failures of gradwatch itself in a row {after}."


def rule_sentence(rule: ClipRule) -> str:
    """On what, above what, and what happens then."""
    if rule.measure == "loss":
        return f"where {_measure(rule)} exceeds {_limit(rule)}, {ACTIONS[rule.then]}."
    return (
        f"on {_selection(rule)}, {UNITS[rule.per]}, where {_measure(rule)} exceeds "
        f"{_limit(rule)}, {ACTIONS[rule.then]}."
    )


def _measure(rule: ClipRule) -> str:
    if rule.per == "element":
        return "its absolute value"
    if rule.measure in MEASURES:
        return MEASURES[rule.measure].format(floor=rule.floor)
    return f"the {rule.measure.upper()} norm"


def _selection(rule: ClipRule) -> str:
    chosen = "all parameters" if rule.params == ("*",) else f"parameters {_listed(rule.params)}"
    if rule.types:
        chosen += f" of {_listed(rule.types)}"
    if rule.groups:
        chosen += f" in group {_listed([str(group) for group in rule.groups])}"
    if rule.ndim is not None:
        chosen += f" with ndim {rule.ndim}"
    if rule.exclude:
        chosen += f" except {_listed(rule.exclude)}"
    return chosen


def _limit(rule: ClipRule) -> str:
    if isinstance(rule.limit, StatisticLimit):
        return _statistic(rule.limit)
    if not isinstance(rule.limit, Schedule):
        return f"{rule.limit:g}"
    points = [f"{value:g} at step {step}" for step, value in rule.limit.points]
    return f"a limit of {', then '.join(points)} (linear between)"


def _statistic(limit: StatisticLimit) -> str:
    if limit.z is not None:
        of = "logarithm" if limit.space == "log" else "value"
        said = f"its mean by {limit.z:g} standard deviations of the {of}"
    elif limit.ratio is not None:
        said = f"{limit.ratio:g} times its moving average"
    else:
        said = f"the {limit.quantile:g} quantile of its history"
    until = "not limited" if limit.until is None else f"limited to {limit.until:g}"
    said += f", {until} for the first {limit.warmup}"
    if limit.min is not None:
        said += f", at least {limit.min:g}"
    return said if limit.max is None else f"{said}, at most {limit.max:g}"


def _detectors(policy: Policy) -> str:
    detect = policy.detect
    off = [kind for kind in KINDS if detect[kind] is None]
    if len(off) > len(KINDS) // 2:
        on = ", ".join(kind for kind, _ in detect.kinds())
        said = f"detect: {on or 'nothing'}."
    else:
        said = f"detect: all {len(KINDS)} kinds{' but ' if off else ''}{', '.join(off)}."
    stops = [kind for kind, detector in detect.kinds() if detector.then == "stop"]
    return f"{said} {', '.join(stops)} stops the run." if stops else said


def _cost(policy: Policy) -> Iterator[str]:
    """What a decision costs, where it is not on CPU."""
    if not policy.enforcing:
        return
    host = policy.who("stop") + policy.who("zero")
    skips = policy.who("skip")
    if host:
        yield f"cost: an accelerator is read once a step, for {host[0]}."
    elif skips:
        yield (
            f"cost: an accelerator is read once a step, for {skips[0]}; with a fused optimizer "
            "(fused=True) it is not read."
        )
    else:
        yield "cost: an accelerator is not read in the step."


def _listed(words: Sequence[str]) -> str:
    return " or ".join(words)
