"""A small GPT that reads Python's standard library, character by character."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from gradwatch.demo.task import Task
from gradwatch.demo.text import ALPHABET, encode, stdlib_text

__all__ = ["TinyGPT", "gpt_task"]

BATCH = 16
CONTEXT = 64
WIDTH = 64
HEADS = 4
DEPTH = 3
LEARNING_RATE = 0.05


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attend(self.attention_norm(x))
        fed: torch.Tensor = self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return x + fed

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: torch.Tensor = self.projection(mixed.transpose(1, 2).reshape(x.shape))
        return attended


class TinyGPT(nn.Module):
    """Codes [B, T] to logits [B, V, T], as the cross entropy wants them."""

    def __init__(self, vocabulary: int = len(ALPHABET)) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        x = self.tokens(codes) + self.positions(places)
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


def gpt_task(seed: int) -> Task:
    """The model, SGD with momentum, and batches drawn with `seed`."""
    torch.manual_seed(seed)
    model = TinyGPT()
    middle = model.blocks[DEPTH // 2]
    assert isinstance(middle, Block)
    return Task(
        name="gpt",
        title="a small GPT on the source of Python's standard library",
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        batches=_batches(seed),
        entry=model.blocks,
        victim=middle.down,
    )


def _batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    codes = torch.tensor(encode(stdlib_text()))
    draw = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(codes) - CONTEXT - 1, (BATCH, 1), generator=draw)
        yield codes[starts + window], codes[starts + window + 1]
