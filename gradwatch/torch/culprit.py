"""Clues of a step that is not finite, as a torch model has them.

weights, gradients in backward order, forward passes that were kept or are run again  ->  Clues
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gradwatch.policy import Culprits
from gradwatch.records import Evidence
from gradwatch.rules.culprit import Clues, Forward, Pass
from gradwatch.rules.culprit_forward import MASKED, Call, Flag
from gradwatch.rules.culprit_weights import BadWeight
from gradwatch.torch.layers import COMPILED, inner_model
from gradwatch.torch.order import BackwardOrder
from gradwatch.torch.passes import ForwardPasses, Seen, SeenPass
from gradwatch.torch.replay import calls_of
from gradwatch.torch.shares import local
from gradwatch.torch.spans import flags_of, spans_of, tensors_in
from gradwatch.torch.tracing import Trace, known, read

__all__ = ["ClueFinder", "SeenStep"]


@dataclass(frozen=True, slots=True)
class SeenStep:
    """What was kept of a step that is due."""

    passes: Seen | None = None
    """None where nobody looked."""

    own_is_bad: torch.Tensor | None = None
    """0-d, of the gradient of this process alone; None where that is not known."""


@dataclass(slots=True)
class Usual:
    """What was bad in a step that was finite."""

    weights: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Spans by `id`."""

    weights_are_known: bool = False
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Spans of the last pass of the last such step."""

    trace: Trace | None = None

    def has_bad_inputs(self) -> bool:
        return flags_of([self.inputs])[0] is Flag.BAD

    def without_usual(self, passes: Sequence[Sequence[Call]]) -> list[Sequence[Call]]:
        """Calls whose outputs are bad as they were then say nothing."""
        if self.trace is None:
            return list(passes)
        usual = {call.module for call in read([self.trace])[0] if call.outputs is Flag.BAD}
        return [
            [replace(c, outputs=Flag.UNKNOWN) if c.module in usual else c for c in calls]
            for calls in passes
        ]


class ClueFinder:
    """One model's; what it keeps of a step is forgotten when that is over."""

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Sequence[torch.nn.Parameter],
        how: Culprits,
        on_error: Callable[[str], None],
        is_amid: Callable[[], bool] = bool,
    ) -> None:
        """
        Args:
            is_amid: whether gradients of earlier backward passes are kept elsewhere than in `grad`.
        """
        self._model = weakref.ref(model)
        self._parameters = list(parameters)
        self._watched = frozenset(map(id, parameters))
        self._is_amid = is_amid
        self._order = BackwardOrder(() if how == "none" else parameters)
        self._usual = Usual()
        self._passes: ForwardPasses | None = None
        self._evidence: Evidence = "live" if how == "always" else "replay"
        if how in ("replay", "always"):
            everywhere = how == "always"
            self._passes = ForwardPasses(
                model,
                everywhere=everywhere,
                holds_gradients=self._holds_gradients,
                on_error=on_error,
            )

    @property
    def order(self) -> tuple[int, ...]:
        """Places of parameters in the order of a backward pass; empty before the first step."""
        return self._order.places

    def seen(self, own_is_bad: torch.Tensor | None = None) -> SeenStep:
        """What was kept of the step that is due."""
        self._order.take()
        passes = None if self._passes is None else self._passes.take()
        return SeenStep(passes, own_is_bad)

    def clues(self, step: SeenStep, *, is_over: bool) -> Clues:
        """
        Args:
            step: what `seen()` gave in that step.
            is_over: whether the update was made, so that weights are no longer what they were.
        """
        model, seen = self._model(), step.passes
        own_is_bad = None if step.own_is_bad is None else bool(step.own_is_bad)
        if model is None:
            return Clues(order=self.order, own_is_bad=own_is_bad)
        bad, foreign = ((), ()) if is_over else self._bad_weights(model)
        self._usual.weights_are_known = self._usual.weights_are_known and not bad
        return Clues(
            bad_weights=None if is_over else bad,
            foreign=() if is_over else foreign,
            forward=None if seen is None else self._forward(model, seen, is_over),
            order=self.order,
            is_order_sure=self._order.is_sure,
            own_is_bad=own_is_bad,
            batch="" if seen is None else _fingerprint(seen),
        )

    def was_finite(self, step: SeenStep) -> None:
        """What is bad in a finite step is no fault in another one."""
        model = self._model()
        if model is not None and not self._usual.weights_are_known:
            weights = inner_model(model).parameters()
            self._usual.weights = {id(p): spans_of(local(p.detach())) for p in weights}
            self._usual.weights_are_known = True
        if step.passes is not None and step.passes.passes:
            newest = step.passes.passes[-1]
            self._usual.inputs, self._usual.trace = newest.inputs, newest.trace

    def remove(self) -> None:
        self._order.remove()
        if self._passes is not None:
            self._passes.remove()

    def _holds_gradients(self) -> bool:
        if self._is_amid():
            return True
        held = [p.grad for p in self._parameters if p.grad is not None]
        if not held or held[0].device.type != "cpu":
            return bool(held)
        # Where a loop sets them to 0 instead; elsewhere than on the CPU reading would wait.
        return bool(local(min(held, key=torch.Tensor.numel)).to_dense().any())

    def _forward(self, model: torch.nn.Module, seen: Seen, is_over: bool) -> Forward:
        inputs = flags_of([one.inputs for one in seen.passes])
        outputs = flags_of([one.outputs for one in seen.passes])
        if self._usual.has_bad_inputs():
            inputs = [Flag.UNKNOWN if flag is Flag.BAD else flag for flag in inputs]
        traces = [one.trace for one in seen.passes if one.trace is not None]
        calls: list[Sequence[Call]] = list(read(traces)) or [()] * len(seen.passes)
        calls = self._usual.without_usual(calls)
        passes = [
            Pass(known(flag, one.opaque[0]), known(out, one.opaque[1]), of_one, _handed(one))
            for one, flag, out, of_one in zip(seen.passes, inputs, outputs, calls, strict=True)
        ]
        unknown, again = seen.unknown, None
        if passes and self._evidence == "replay":
            again = _to_repeat(seen.passes, passes)
            unknown = "the update was made before the host knew" if is_over else ""
            if not unknown and again is not None:
                repeated, unknown = self._repeated(model, seen.passes[again])
                passes[again] = replace(passes[again], calls=repeated)
            again = None if unknown else again
        return Forward(
            evidence=self._evidence,
            passes=passes,
            unseen=seen.unseen,
            ungraded=seen.ungraded,
            repeated=again,
            unknown=unknown,
        )

    def _bad_weights(self, model: torch.nn.Module) -> tuple[list[BadWeight], list[str]]:
        """Weights that hold NaN or inf and did not in a finite step, in the order of their names:
        those that are watched or frozen, and modules with some that something else updates."""
        modules: dict[torch.nn.Parameter, list[str]] = {}
        for name, parameter in inner_model(model).named_parameters(remove_duplicate=False):
            module = name.replace(COMPILED, "").rpartition(".")[0]
            modules.setdefault(parameter, []).append(module)
        now = flags_of([spans_of(local(parameter.detach())) for parameter in modules])
        before = flags_of([self._usual.weights.get(id(parameter), []) for parameter in modules])
        ours: dict[tuple[str, ...], bool] = {}
        foreign: dict[str, None] = {}
        for (parameter, held_by), flag, usual in zip(modules.items(), now, before, strict=True):
            is_mask = flag in MASKED and not parameter.requires_grad
            if flag is Flag.FINE or is_mask or flag is usual:
                continue
            if id(parameter) in self._watched or not parameter.requires_grad:
                names = tuple(dict.fromkeys(held_by))
                ours[names] = ours.get(names, False) or _is_used(parameter)
            else:
                foreign[held_by[0]] = None
        return [BadWeight(*one) for one in ours.items()], list(foreign)

    def _repeated(self, model: torch.nn.Module, one: SeenPass) -> tuple[Sequence[Call], str]:
        """The calls of a pass that is run again, or why that was not possible."""
        assert one.batch is not None
        if not one.batch.is_unchanged():
            return (), "its batch was written to since, so that it was not run again"
        ForwardPasses.off = True
        try:
            return calls_of(model, one.batch), ""
        except Exception as error:
            return (), f"running it again failed ({type(error).__name__}: {error})"
        finally:
            ForwardPasses.off = False


def _handed(one: SeenPass) -> list[Flag]:
    return [Flag.FINE if flag is Flag.FINE else Flag.BAD for flag in flags_of(one.handed)]


def _to_repeat(seen: Sequence[SeenPass], passes: Sequence[Pass]) -> int | None:
    """The first bad pass whose batch was kept, else the last one."""
    kept = [i for i, one in enumerate(seen) if one.batch is not None]
    bad = [i for i in kept if Flag.BAD in (passes[i].inputs, passes[i].outputs)]
    return next(iter(bad), kept[-1] if kept else None)


@torch.no_grad()
def _is_used(parameter: torch.nn.Parameter) -> bool:
    """Whether its gradient is not 0 where it is not finite."""
    if parameter.grad is None:
        return False
    gradient = local(parameter.grad)
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return bool((~torch.isfinite(local(parameter)) & (gradient != 0)).any())


def _fingerprint(seen: Seen) -> str:
    """Of the batch that was kept, from its values; empty where there is none."""
    kept = [one.batch for one in seen.passes if one.batch is not None]
    if not kept or not kept[0].is_unchanged():
        return ""
    tensors = [t for t in tensors_in((kept[0].args, kept[0].kwargs)) if not t.is_nested]
    if not tensors:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
