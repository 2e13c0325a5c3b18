"""Gradients in, norms out: one pass over the data.

    gradients [Q tensors]  ->  norms_Q on the host, or on the device that holds them all

One copy for each device that holds gradients. torch's own CPU kernel accumulates
float32 naively, which is 2.7e-3 off at 38 million elements; tensors above 64 Ki elements are
therefore measured in rows of 1024 (4e-7, faster). Up to 64 Ki elements the norm is torch's own,
to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Buckets", "measure", "refined", "smallest_trusted", "tensor_norms"]

CPU = torch.device("cpu")
LARGE = 65536
ROW = 1024

HALF = (torch.float16, torch.bfloat16)


def measure(
    gradients: Sequence[torch.Tensor],
    norm_type: float = 2.0,
    device: torch.device = CPU,
    buckets: Buckets | None = None,
) -> torch.Tensor:
    """The p-norm of each gradient [Q] on one device: float32, or float64 if any gradient is.

    Half-precision gradients are accumulated in float32, so that a norm above 65504 is finite.
    """
    norms = tensor_norms(gradients, norm_type, buckets)
    if buckets is not None and buckets.is_one_call:
        return torch.stack(norms).to(device)
    by_device: dict[torch.device, list[int]] = {}
    for i, norm in enumerate(norms):
        by_device.setdefault(norm.device, []).append(i)
    if len(by_device) == 1:
        return _stacked(norms).to(device)
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    out = torch.zeros(len(norms), dtype=dtype, device=device)
    for members in by_device.values():
        out[members] = _stacked([norms[i] for i in members]).to(device, dtype)
    return out


@dataclass(frozen=True, slots=True)
class Buckets:
    """Which gradients are measured together, by position; the same in each step that has gradients
    of the same parameters, so that sorting a thousand of them is paid for once."""

    together: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    """One foreach call each."""

    in_rows: tuple[int, ...]
    complex: tuple[int, ...]

    @property
    def is_one_call(self) -> bool:
        """Whether all of them are of one device and dtype, and small."""
        return len(self.together) == 1 and not self.in_rows and not self.complex

    @classmethod
    def of(cls, gradients: Sequence[torch.Tensor], norm_type: float) -> Buckets:
        # torch's L2 norm is good up to 64 Ki elements; its other norms are not.
        in_one_call = LARGE if norm_type == 2.0 else ROW
        together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        in_rows, of_complex = [], []
        for i, gradient in enumerate(gradients):
            if gradient.is_complex():
                of_complex.append(i)
            elif gradient.numel() > in_one_call and gradient.device.type == "cpu":
                in_rows.append(i)
            else:
                together.setdefault((gradient.device, gradient.dtype), []).append(i)
        calls = tuple((dtype, tuple(members)) for (_, dtype), members in together.items())
        return cls(calls, tuple(in_rows), tuple(of_complex))


def tensor_norms(
    gradients: Sequence[torch.Tensor], norm_type: float = 2.0, buckets: Buckets | None = None
) -> list[torch.Tensor]:
    """The p-norm of each gradient, 0-d on its own device, in the order given."""
    if norm_type == math.inf:
        return [_largest(gradient) for gradient in gradients]
    buckets = buckets or Buckets.of(gradients, norm_type)
    norms: list[torch.Tensor] = [_UNSET] * len(gradients)
    for i in buckets.complex:
        norms[i] = _rows_norm(_real(gradients[i], norm_type), norm_type)
    for i in buckets.in_rows:
        norms[i] = _rows_norm(gradients[i], norm_type)
    for dtype, members in buckets.together:
        everything = len(members) == len(gradients)
        measured = torch._foreach_norm(
            list(gradients) if everything else [gradients[i] for i in members],
            norm_type,
            dtype=torch.float32 if dtype in HALF else None,
        )
        if everything:
            return list(measured)
        for i, norm in zip(members, measured, strict=True):
            norms[i] = norm
    return norms


def smallest_trusted(norm_type: float) -> float:
    """Below it the p-th powers of float32 elements are subnormal or 0 and the norm is not accurate.

    1e-15 for the L2 norm.
    """
    return 0.0 if norm_type == math.inf else float(1e-30 ** (1 / norm_type))


def refined(
    gradients: Sequence[torch.Tensor], norms_Q: torch.Tensor, norm_type: float = 2.0
) -> torch.Tensor:
    """The same norms in float64, measured again where float32 cannot hold them. Reads the host.

    A norm that is not finite or is nearly 0 may come from powers that over- or underflowed. Where
    the elements themselves are finite and not all 0, their norm is taken in float64 after division
    by the largest of them.
    """
    found = {}
    for i, norm in enumerate(norms_Q.tolist()):
        if smallest_trusted(norm_type) <= norm < math.inf:
            continue
        elements = gradients[i]
        largest = _largest(elements).to(torch.float64)
        if largest == 0 or not torch.isfinite(largest):
            if norm != float(largest) and not math.isnan(norm):
                found[i] = largest
            continue
        wide = elements.to(torch.complex128 if elements.is_complex() else torch.float64)
        found[i] = torch.linalg.vector_norm(wide / largest, norm_type) * largest
    if not found:
        return norms_Q  # in its own dtype: a tensor of zeros changes no bit of what follows
    out = norms_Q.to(torch.float64, copy=True)
    for i, norm in found.items():
        out[i] = norm
    return out


def _rows_norm(gradient: torch.Tensor, norm_type: float) -> torch.Tensor:
    """The norms of rows of 1024, and the norm of those in float64."""
    values = _flat(gradient)
    dtype = torch.float32 if values.dtype in HALF else None
    num_rows = values.numel() // ROW
    split = num_rows * ROW
    rows = torch.linalg.vector_norm(
        values[:split].view(num_rows, ROW), norm_type, dim=1, dtype=dtype
    )
    rest = torch.linalg.vector_norm(values[split:], norm_type, dtype=dtype)
    parts = torch.cat((rows, rest.view(1)))
    norm: torch.Tensor = torch.linalg.vector_norm(parts.to(torch.float64), norm_type)
    return norm.to(parts.dtype)


def _real(gradient: torch.Tensor, norm_type: float) -> torch.Tensor:
    """Real values with the same norm as the absolute values of complex ones."""
    # A conjugation that is only noted down has no real parts to look at.
    resolved = gradient.resolve_conj().resolve_neg()
    return torch.view_as_real(resolved) if norm_type == 2.0 else resolved.abs()


def _largest(gradient: torch.Tensor) -> torch.Tensor:
    """max |x_i|, NaN where any is; 0 for no elements. `aminmax` takes a tenth of the inf-norm."""
    if gradient.numel() == 0:
        return torch.zeros((), device=gradient.device)
    if gradient.is_complex():
        return gradient.abs().max()
    low, high = torch.aminmax(gradient)
    largest = torch.maximum(-low, high)
    return largest.float() if largest.dtype in HALF else largest


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    """All elements as one vector, in any order; without a copy where memory is dense."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    if _is_dense(gradient):
        return gradient.as_strided((gradient.numel(),), (1,))
    return gradient.reshape(-1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, as in channels_last."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _stacked(norms: list[torch.Tensor]) -> torch.Tensor:
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.to(torch.float64) for norm in norms]
    return torch.stack(norms)


_UNSET = torch.empty(0)
