"""What norms do not tell, from a sample: zeros, lost precision, and what a step does to weights.

    before(gradients)  ->  the optimizer's step  ->  after(): [S, P]

A row of a matrix holds at most `WIDTH` elements of each parameter, the same ones of its gradient
and of its weights before and after: one copy each for all of them, and a few passes over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradwatch.torch.gradients import Gradients

__all__ = ["Sampler"]

WIDTH = 1024
"""Elements of one parameter."""

BUDGET = 2**18
"""Elements of all of them; a model of very many tensors gets fewer of each, at least `LEAST`."""

LEAST = 64
FLUSHED = 2.0**-24
"""The least number above 0 of float16."""


class Sampler:
    """Over a fixed list of parameters on one device."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self._device = parameters[0].device
        exact = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        count = len(self._parameters)
        width = max(LEAST, min(WIDTH, BUDGET // count))
        sizes = [_elements(p) for p in self._parameters]
        # An odd stride passes through every column of a matrix whose rows are of even length.
        self._strides = [math.ceil(size / width) | 1 if size > width else 1 for size in sizes]
        counts = [math.ceil(n / k) for n, k in zip(sizes, self._strides, strict=True)]
        widest = max([1, *counts])
        dtype = torch.float64 if exact else torch.float32
        self._gradient, self._before, self._after = (
            torch.zeros(count, widest, dtype=dtype, device=self._device) for _ in range(3)
        )
        self._counts = counts
        self._is_plain = [_is_dense(p) and not p.is_complex() for p in self._parameters]
        self._counts_P = torch.tensor(counts, dtype=dtype, device=self._device).clamp_(min=1)
        sizes_P = torch.tensor(sizes, dtype=dtype, device=self._device)
        self._times_P = (sizes_P / self._counts_P).sqrt()
        self._rows = {
            id(matrix): [matrix[i, :n] for i, n in enumerate(counts)]
            for matrix in (self._gradient, self._before, self._after)
        }
        self._weights: list[torch.Tensor] = []
        self._places: list[int] = []
        self._copies: list[int] = []
        """Parameters whose samples are no views of them."""

        self._known_P: torch.Tensor | None = None
        self._mask: tuple[tuple[int, ...], torch.Tensor] = ((), torch.zeros(0))
        self._scale: float | torch.Tensor | None = None

    def of(self, parameters: Sequence[torch.Tensor]) -> None:
        """The same parameters, where they are tensors made anew."""
        self._parameters = list(parameters)

    @torch.no_grad()
    def before(self, gradients: Gradients, loss_scale: float) -> None:
        """Takes the sample of a step that is due.

        Args:
            loss_scale: what the loss was multiplied by; NaN without a scaler.
        """
        present = [i for i, there in enumerate(gradients.present) if there]
        # What was added to the model since has no row; sparse gradients have other elements.
        chosen = [
            (i, value)
            for q, (i, value) in enumerate(zip(present, gradients.values, strict=True))
            if i < len(self._parameters) and q not in gradients.rows and self._counts[i]
        ]
        self._known_P = None
        if not chosen:
            return
        rows = self._rows[id(self._gradient)]
        torch._foreach_copy_(
            [rows[i] for i, _ in chosen],
            [self._gradient_sample(value, i) for i, value in chosen],
        )
        torch._foreach_copy_(self._rows[id(self._before)], self._weight_samples())
        self._known_P = self._known(tuple(i for i, _ in chosen))
        self._scale = None
        if gradients.loss_scale is not None:
            self._scale = 1.0
        elif math.isfinite(loss_scale):
            self._scale = loss_scale

    def _known(self, chosen: tuple[int, ...]) -> torch.Tensor:
        """[P] as a mask; kept, since it is the same in most steps and has to go to the device."""
        if self._mask[0] != chosen:
            known_P = torch.zeros(len(self._parameters), dtype=torch.bool)
            known_P[list(chosen)] = True
            self._mask = (chosen, known_P.to(self._device))
        return self._mask[1]

    def forget(self) -> None:
        """The step was not taken."""
        self._known_P = None

    @torch.no_grad()
    def after(self) -> torch.Tensor | None:
        """[S, P] by the names of `records.SAMPLES`, NaN where there is nothing to say; None where
        no sample was taken."""
        known_P, self._known_P = self._known_P, None
        if known_P is None:
            return None
        torch._foreach_copy_(self._rows[id(self._after)], self._weight_samples())
        there = self._gradient != 0
        alive_P = there.sum(1)
        unchanged_P = (there & (self._before == self._after)).sum(1) / alive_P
        if self._scale is None:
            flushed_P = torch.full_like(unchanged_P, math.nan)
        else:
            kept = self._gradient.abs() * self._scale >= FLUSHED  # false where there is nothing
            flushed_P = 1 - kept.sum(1) / self._counts_P
        moved_P = torch.linalg.vector_norm(self._after - self._before, dim=1)
        weight_P = torch.linalg.vector_norm(self._before, dim=1)
        found = [
            1 - alive_P / self._counts_P,
            flushed_P,
            unchanged_P,
            moved_P * self._times_P,
            weight_P * self._times_P,
        ]
        found_SP = torch.stack([values.to(torch.float32) for values in found])
        return torch.where(known_P, found_SP, math.nan)

    def _weight_samples(self) -> list[torch.Tensor]:
        places = [parameter.data_ptr() for parameter in self._parameters]
        if places != self._places:
            self._places = places
            self._weights = [self._sample(p.detach(), i) for i, p in enumerate(self._parameters)]
            self._copies = [i for i, p in enumerate(self._parameters) if not _is_dense(p)]
        for i in self._copies:
            self._weights[i] = self._sample(self._parameters[i].detach(), i)
        return self._weights

    def _gradient_sample(self, value: torch.Tensor, i: int) -> torch.Tensor:
        if self._is_plain[i] and value.stride() == self._parameters[i].stride():
            return value.as_strided((self._counts[i],), (self._strides[i],))
        return self._sample(_as_laid_out(value, self._parameters[i]), i)

    def _sample(self, tensor: torch.Tensor, i: int) -> torch.Tensor:
        plain = tensor.resolve_conj().resolve_neg()
        flat = torch.view_as_real(plain) if plain.is_complex() else plain
        if not _is_dense(flat):
            return flat.reshape(-1)[:: self._strides[i]]
        return torch.as_strided(flat, (self._counts[i],), (self._strides[i],))


def _elements(parameter: torch.Tensor) -> int:
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _as_laid_out(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient whose elements lie where those of its weights do."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill the memory that it spans, in whatever order."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and span == tensor.numel()
