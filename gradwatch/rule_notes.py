"""What is said of rules while a run goes on: once, not in each step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gradwatch.due_step import DueStep
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import NO_LOSS
from gradwatch.rules.reading import Reading
from gradwatch.saying import say

__all__ = ["RuleNotes", "say_anew"]


class RuleNotes:
    """One run's."""

    def __init__(self) -> None:
        self._warning: set[str] = set()
        self._told_no_loss = False

    def loss(self, chain: Chain, step: DueStep) -> float:
        """What was logged for the step before it; says once where a rule misses it."""
        if step.loss is not None:
            return step.loss
        if chain.compares_loss and not self._told_no_loss:
            self._told_no_loss = True
            say(
                logging.WARNING, "step %d: a rule compares the loss, and none was logged: call "
                "watch.log(loss=loss) before optimizer.step()", step.number,
            )  # fmt: skip
        return NO_LOSS

    def warn(self, step: DueStep, reading: Reading) -> None:
        """One line when a `then: warn` rule goes over its limit, not one for each step."""
        for rule, limit, is_over in zip(step.rules, reading.limits, reading.over, strict=False):
            if rule.then == "warn" and is_over and rule.name not in self._warning:
                say(
                    logging.WARNING,
                    "step %d: rule %s is over its limit %g (total norm %.4g)",
                    step.number, rule.name, limit, reading.total_norm,
                )  # fmt: skip
            (self._warning.add if is_over else self._warning.discard)(rule.name)


def say_anew(rules: Sequence[str]) -> None:
    """That histories could not go on."""
    if rules:
        say(
            logging.WARNING, "the histories of %s were not saved, or learn in another way "
            "now: they begin anew", ", ".join(rules),
        )  # fmt: skip
