"""State of NumPy arrays to state of tensors and back, so that `torch.load` needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["as_arrays", "as_tensors"]


def as_tensors(value: Any) -> Any:
    """The same, with a tensor for each array, of its own memory."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    return _each(value, as_tensors)


def as_arrays(value: Any) -> Any:
    """The same, with an array for each tensor."""
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else _each(value, as_arrays)


def _each(value: Any, convert: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: convert(one) for key, one in value.items()}
    return [convert(one) for one in value] if isinstance(value, list) else value
