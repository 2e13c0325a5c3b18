"""Small real training tasks, each determined by its name and a seed."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
WIDTH = 32


@dataclass
class Task:
    """A model and where its batches come from."""

    model: nn.Module
    batch: Callable[[], Batch]

    def loss(self, batch: Batch) -> torch.Tensor:
        inputs, target = batch
        out = self.model(inputs)
        out = out.transpose(1, 2) if out.ndim == 3 else out
        return nn.functional.cross_entropy(out.float(), target)


@functools.cache
def _digits() -> Batch:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@functools.cache
def _cancer() -> Batch:
    data = load_breast_cancer()
    values = torch.tensor(data.data, dtype=torch.float32)
    return (values - values.mean(0)) / values.std(0), torch.tensor(data.target)


@functools.cache
def _text() -> torch.Tensor:
    text = inspect.getsource(argparse)
    alphabet = sorted(set(text))
    return torch.tensor([alphabet.index(character) for character in text])


def rows_of(data: Batch, draw: torch.Generator, size: int = 32) -> Callable[[], Batch]:
    inputs, target = data

    def batch() -> Batch:
        chosen = torch.randint(0, len(inputs), (size,), generator=draw)
        return inputs[chosen], target[chosen]

    return batch


def windows_of(codes: torch.Tensor, draw: torch.Generator) -> Callable[[], Batch]:
    def batch() -> Batch:
        starts = torch.randint(0, len(codes) - 33, (8,), generator=draw)
        window = torch.stack([codes[start : start + 33] for start in starts])
        return window[:, :-1], window[:, 1:]

    return batch


def _stack(inputs: int, depth: int, activation: type[nn.Module], outputs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(inputs, WIDTH)]
    for _ in range(depth):
        layers += [activation(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, activation(), nn.Linear(WIDTH, outputs))


class Block(nn.Module):
    """x + linear(gelu(norm(x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(nn.functional.gelu(self.norm(x)))


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(64, WIDTH), *(Block() for _ in range(12)), nn.Linear(WIDTH, 10))


class Reader(nn.Module):
    """An LSTM over characters."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, 16)
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.head = nn.Linear(64, letters)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(codes))[0])


class GPT(nn.Module):
    """Two blocks of causal attention over characters."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(letters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(32, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1])
        x = self.tokens(codes) + self.positions[: codes.shape[1]]
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (lambda: _stack(64, 2, nn.ReLU, 10), "digits"),
    "cancer": (lambda: _stack(30, 1, nn.ReLU, 2), "cancer"),
    "deep": (deep, "digits"),
    "tanh": (lambda: _stack(64, 4, nn.Tanh, 10), "digits"),
    "cnn": (cnn, "digits"),
    "gpt": (lambda: GPT(int(_text().max()) + 1), "text"),
    "lstm": (lambda: Reader(int(_text().max()) + 1), "text"),
    "sigmoid20": (lambda: _stack(64, 20, nn.Sigmoid, 10), "digits"),
}


def task(name: str, seed: int) -> Task:
    torch.manual_seed(seed)
    make, data = MODELS[name]
    model = make()
    draw = torch.Generator().manual_seed(seed + 1)
    if data == "text":
        return Task(model, windows_of(_text(), draw))
    return Task(model, rows_of(_digits() if data == "digits" else _cancer(), draw))
