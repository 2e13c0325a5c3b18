"""The engine's verbs on torch tensors: gather, measure, scale, drop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradwatch.records import Float32s
from gradwatch.rules.arrays import Arrays
from gradwatch.torch.arrays import TorchArrays
from gradwatch.torch.gradients import Gradients, drop, gather, scale
from gradwatch.torch.measure import measure, refined, smallest_trusted

__all__ = ["TorchBackend"]


class TorchBackend:
    """Over a fixed list of parameters; decides on the host, after one copy of the norms."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self.xp: Arrays = TorchArrays(torch.device("cpu"))

    def gather(self) -> Gradients:
        return gather(self._parameters)

    def measure(self, gradients: Gradients, norm_type: float) -> torch.Tensor:
        """[Q] norms; float64 where float32 would over- or underflow."""
        norms_Q = measure(gradients.values, norm_type)
        if norms_Q.numel() == 0:
            return norms_Q
        total = self.xp.norm(norms_Q, norm_type)
        smallest, total = torch.stack((norms_Q.min(), total)).tolist()
        if smallest >= smallest_trusted(norm_type) and total < math.inf:
            return norms_Q
        return refined(gradients.values, norms_Q, norm_type)

    def host(self, vector: torch.Tensor) -> Float32s:
        host: Float32s = vector.to(torch.float32).numpy()
        return host

    def scale(self, gradients: Gradients, coefs_Q: torch.Tensor, on_host_Q: Float32s) -> None:
        scale(gradients, coefs_Q, on_host_Q)

    def drop(self) -> None:
        drop(self._parameters)
