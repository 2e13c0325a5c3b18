"""The vector operations of `gradwatch.rules.arrays` on torch tensors; none reads the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gradwatch.rules.arrays import NumPyArrays
from gradwatch.rules.rings import Rings

__all__ = ["HostArrays", "TorchArrays"]


class HostArrays(NumPyArrays):
    """NumPy on the host, several times faster than torch on short vectors, with torch's own norm:
    the total norm is torch's to the bit, and the rest is the same arithmetic."""

    def norm(self, x: Any, norm_type: float = 2.0) -> Any:
        return (
            torch.linalg.vector_norm(torch.from_numpy(x), norm_type).numpy() if x.size else x.sum()
        )


class TorchArrays(Rings):
    """On `device`, the one that holds the vector of norms."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    lib: Any = torch

    def doubles(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64).to(self.device)

    def to_doubles(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float64)

    def sorted(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(dim=-1).values

    def may_be_true(self, x: torch.Tensor) -> bool:
        return self.device.type != "cpu" or bool(x.any())

    def norm(self, x: torch.Tensor, norm_type: float = 2.0) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(x, norm_type) if x.numel() else x.sum()
        return norm

    def segment_norm(
        self, x: torch.Tensor, segment_of: Any, num_segments: int, norm_type: float = 2.0
    ) -> torch.Tensor:
        out = x.new_zeros(num_segments)
        if norm_type == math.inf:
            return out.scatter_reduce_(0, segment_of, x, "amax")
        return out.index_add_(0, segment_of, x.pow(norm_type)).pow_(1 / norm_type)

    def indices(self, index: Any) -> torch.Tensor:
        return torch.as_tensor(index, dtype=torch.int64).to(self.device)

    def floats(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32).to(self.device)

    def ones_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)

    def full_like(self, x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.full_like(x, value)

    def concat(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        return torch.cat([part.to(dtype).reshape(-1) for part in parts])

    def quotient(self, a: Any, x: torch.Tensor) -> torch.Tensor:
        quotient: torch.Tensor = a / x
        return quotient

    def at_most_one(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, max=1.0)

    def where(self, condition: torch.Tensor, x: torch.Tensor, y: float) -> torch.Tensor:
        return torch.where(condition, x, y)

    def isfinite(self, x: torch.Tensor) -> torch.Tensor:
        return torch.isfinite(x)

    def scaled_at(self, x: torch.Tensor, index: Any, by: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[index] *= by
        return out
