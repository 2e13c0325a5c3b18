"""Output units of tensors: their norms, and multiplying each by a number of its own.

An output unit is what one neuron or one channel is fed by: a row of a linear layer, a filter of a
convolution, the vector of one token in an embedding. Tensors of fewer than 2 dimensions are one
unit as a whole, as in the published implementations of adaptive gradient clipping.
"""

from __future__ import annotations

import torch

from gradwatch.rules.clipping import UnitSlice

__all__ = ["scale_units", "unit_norms"]

LONG = 65536
"""Elements of a unit from which torch's float32 sum on CPU is not accurate."""

HALF = (torch.float16, torch.bfloat16)


def unit_norms(
    value: torch.Tensor, of: UnitSlice, norm_type: float, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """[count] p-norm of each unit: float32, or float64 if the tensor is.

    Args:
        rows: which row of the whole each row of the tensor is, where only some are held.
    """
    if value.is_complex():
        value = value.abs()
    if of.count == 1 and rows is None:
        grouped, dims = value.reshape(1, -1), [1]
    else:
        grouped, dims = _grouped(value, of, rows)
    length = grouped.numel() // max(1, of.count)
    wide = length > LONG and value.device.type == "cpu"
    dtype = torch.float64 if wide else torch.float32 if value.dtype in HALF else None
    norms: torch.Tensor = torch.linalg.vector_norm(grouped, norm_type, dim=dims, dtype=dtype)
    norms = norms.reshape(-1).to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    if rows is None:
        return norms
    return norms.new_zeros(of.count).index_copy_(0, rows, norms)


def scale_units(
    value: torch.Tensor, of: UnitSlice, by_U: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """Multiplies each unit in place; 0 makes it 0, whatever it holds."""
    by_U = by_U.to(value.device, value.dtype if not value.is_complex() else None)
    if rows is not None:
        by_U = by_U[rows]
    if of.count == 1 and rows is None:
        factors = by_U.reshape(())
    else:
        grouped, dims = _grouped(value, of, rows)
        shape = [1 if axis in dims else size for axis, size in enumerate(grouped.shape)]
        factors = by_U.reshape(shape)
        value = grouped
    value.mul_(factors)
    value.masked_fill_(factors == 0, 0.0)


def _grouped(
    value: torch.Tensor, of: UnitSlice, rows: torch.Tensor | None
) -> tuple[torch.Tensor, list[int]]:
    """A view in which units lie along whole axes, and the axes within a unit."""
    if rows is None and of.groups > 1:
        # A transposed convolution holds (in, out / groups, ...): its groups are behind one another.
        value = value.unflatten(0, (of.groups, -1))  # type: ignore[no-untyped-call]
        return value, [axis for axis in range(value.ndim) if axis not in (0, 2)]
    axis = of.axis if rows is None else 0
    return value, [other for other in range(value.ndim) if other != axis]
