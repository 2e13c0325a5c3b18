"""What a policy asks for and a graph, this optimizer or this strategy cannot give: refused when a
watch is attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradwatch.contradictions import refuse_second_clipper
from gradwatch.errors import AttachError, PolicyError
from gradwatch.policy import ClipRule, Policy, StatisticLimit
from gradwatch.policy.locating import Mistake, policy_error
from gradwatch.tensorflow.frameworks import inner_of, is_keras, is_optimizer

__all__ = [
    "refuse_clipping_optimizer",
    "refuse_for_torch",
    "refuse_in_graph",
    "refuse_to_skip",
    "told_apart",
    "windows_of_keras",
    "windows_of_loop",
]

CLIPPERS = {
    "clipnorm": "{{per: tensor, limit: {value:g}}}",
    "global_clipnorm": "{{limit: {value:g}}}",
    "clipvalue": "{{per: element, limit: {value:g}}}",
}
"""Arguments of an optimizer of Keras that clip, and the rule of a policy that is the same."""


def told_apart(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Model and optimizer, of which either may be missing.

    Raises:
        AttachError: neither is one.
    """
    if is_optimizer(model):
        if optimizer is not None:
            raise AttachError("expected attach(model, optimizer). Received two optimizers")
        return None, model
    if optimizer is None:
        compiled = getattr(model, "optimizer", None)
        return model, compiled if is_optimizer(compiled) else None
    if not is_optimizer(optimizer):
        raise AttachError(
            f"expected an optimizer of Keras. Received: {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}. Attach the model alone and call "
            "watch.process(gradients, variables) before the update"
        )
    return model, optimizer


def refuse_clipping_optimizer(policy: Policy, optimizer: Any) -> None:
    """
    Raises:
        TwoClippersError: the optimizer clips, and so does the policy.
    """
    inner = inner_of(optimizer)
    for name, rule in CLIPPERS.items():
        value = getattr(inner, name, None)
        if value is not None:
            refuse_second_clipper(
                policy, f"{type(inner).__name__}({name}={value:g})",
                f"{name}=None (the rule {rule.format(value=value)} means the same)",
            )  # fmt: skip


def refuse_for_torch(**arguments: Any) -> None:
    """
    Raises:
        AttachError: an argument of `attach` that means something in torch only.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise AttachError(
            f"attach({given[0]}=...) is for torch. Leave it out: in TensorFlow the loss scale and "
            "the strategy are known from the optimizer and its variables"
        )


def refuse_in_graph(policy: Policy) -> None:
    """
    Raises:
        PolicyError: a rule needs what a graph does not know.
    """
    mistakes = [mistake for rule in policy.clip for mistake in _ungraphed(rule)]
    if mistakes:
        raise policy_error(policy.source, mistakes)


def _ungraphed(rule: ClipRule) -> Iterator[Mistake]:
    mistake = rule.origin.mistake
    if rule.measure == "update":
        yield mistake(
            ("measure",), ": update is not supported in TensorFlow, where optimizers do not tell "
            "their second moments. Leave the rule out",
        )  # fmt: skip
    if rule.measure == "loss":
        yield mistake(
            ("measure",), ": loss is not supported in TensorFlow, where a rule runs in the graph, "
            "which the optimizer is not told the loss of. Leave the rule out; detectors see a loss "
            "that is logged",
        )  # fmt: skip
    if rule.groups:
        yield mistake(
            ("groups",), ": an optimizer of Keras has no parameter groups. Select by params or "
            "types",
        )  # fmt: skip
    if isinstance(rule.limit, StatisticLimit) and rule.limit.window == "all":
        yield mistake(
            ("limit", "window"), ": all grows without end, and a variable of a graph does not. "
            "Give a number of steps",
        )  # fmt: skip


def refuse_to_skip(policy: Policy) -> None:
    """Of gradients that are handed back, where the update is somebody else's.

    Raises:
        PolicyError: the policy drops steps.
    """
    who = (*policy.who("skip"), *policy.who("stop"))
    if policy.enforcing and who:
        raise PolicyError(
            f"{policy.source}: {who[0]} drops steps, and watch.process only hands gradients back. "
            "Use watch.apply_gradients(optimizer, zip(gradients, variables)), attach the "
            "optimizer, or let the policy say guard: {nonfinite: zero} or none"
        )


def windows_of_keras(policy: Policy, optimizer: Any, *, replicas: int) -> int | None:
    """Sets Keras' own accumulation as the policy says; how many micro-batches it counts, or None.

    Raises:
        PolicyError: Keras accumulates in another way.
        AttachError: its variables for that were not made, or it would fail under a strategy.
    """
    steps = _accumulation_of(optimizer)
    accumulate = policy.accumulate if policy.mode == "enforce" else None
    if accumulate is None:
        return steps
    if not is_keras(optimizer):
        raise _unlike(policy, "accumulate", "needs Keras 3 under fit")
    if accumulate.drive == "loop":
        return steps
    if not isinstance(accumulate.steps, int):
        raise _unlike(policy, "accumulate.steps", "must be one number, as in Keras")
    if accumulate.weigh != "mean":
        raise _unlike(policy, "accumulate.weigh", "must be mean, as Keras weighs all alike")
    if accumulate.partial != "carry":
        raise _unlike(
            policy, "accumulate.partial", "must be carry: Keras leaves a short last window to the "
            "next epoch, and drops that of the last one",
        )  # fmt: skip
    if replicas > 1:
        raise AttachError(
            f"{policy.source}: accumulate under fit is Keras' own, which fails with {replicas} "
            "replicas. Use watch.accumulator in a loop of your own, or one device"
        )
    if steps not in (None, accumulate.steps):
        raise _unlike(
            policy, "accumulate.steps", "must be the optimizer's own gradient_accumulation_steps="
            f"{steps}, or one of the two must go. Received: {accumulate.steps}",
        )  # fmt: skip
    if accumulate.steps == 1:
        return steps
    if steps is None:
        _set(optimizer, accumulate.steps)
    return accumulate.steps


def _accumulation_of(optimizer: Any) -> int | None:
    steps = getattr(inner_of(optimizer), "gradient_accumulation_steps", None)
    return None if steps is None else int(steps)


def _set(optimizer: Any, steps: int) -> None:
    inner = inner_of(optimizer)
    if inner.built:
        raise AttachError(
            f"accumulate.steps: {steps} needs variables that {type(inner).__name__} makes when it "
            "is built, and it is built already. Attach before the first fit, or give it "
            f"gradient_accumulation_steps={steps} when it is made"
        )
    inner.gradient_accumulation_steps = steps


def _unlike(policy: Policy, entry: str, said: str) -> PolicyError:
    return PolicyError(f"{policy.source}: {entry} {said}")


def windows_of_loop(policy: Policy, every: int | None) -> tuple[int, str, str]:
    """Micro-batches in a step, how they weigh, and what becomes of a last, shorter window.

    Raises:
        PolicyError: nobody says how many, or in two ways.
    """
    accumulate = policy.accumulate
    if accumulate is None:
        if every is None or every < 1:
            raise PolicyError(
                "watch.accumulator needs every >= 1, or a policy with accumulate. "
                f"Received: every={every}"
            )
        return every, "weight", "step"
    steps = accumulate.steps
    if not isinstance(steps, int):
        raise _unlike(policy, "accumulate.steps", "must be one number for watch.accumulator")
    if every not in (None, steps):
        raise PolicyError(
            f"{policy.source}: accumulate.steps is {steps}, and watch.accumulator was given "
            f"every={every}. Leave one of them out"
        )
    return steps, accumulate.weigh, accumulate.partial
