"""Networks that are not one chain of modules with biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ODD", "Odd", "odd_task"]

WIDTH = 16


class Heads(nn.Module):
    """Two heads, whose losses are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x):
        hidden = self.norm(self.stem(x)).relu()
        return self.left(hidden), self.right(hidden)


class Tied(nn.Module):
    """No bias anywhere, and an embedding that is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.up, self.down = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, codes):
        hidden = self.embed(codes)
        return self.head(hidden + self.down(self.up(hidden).relu()))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: list[torch.Tensor]


class Wrapped(nn.Module):
    """Puts out an object, whose hidden states nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x):
        a = self.first(x).relu()
        b = self.second(a).relu()
        return Output(self.last(b), [a, b])


@dataclass
class Odd:
    model: nn.Module
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    def loss(self, batch):
        inputs, target = batch
        out = self.model(inputs)
        outs = out if isinstance(out, tuple) else (getattr(out, "logits", out),)
        return sum(nn.functional.cross_entropy(one, target) for one in outs)


ODD = {"heads": Heads, "tied": Tied, "wrapped": Wrapped}


def odd_task(name: str, seed: int) -> Odd:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)

    def batch():
        if name == "tied":
            return tuple(torch.randint(0, 12, (2, 32), generator=draw))
        return torch.randn(32, 8, generator=draw), torch.randint(0, 4, (32,), generator=draw)

    return Odd(ODD[name](), batch)
