"""A small GPT on sentences of uneven length, accumulated over micro-batches by their tokens.

The gradient of a window is the mean over all of its tokens, as if it were one big batch: a mean of
the micro-batches' means would count the tokens of short sentences for more.

python examples/gpt.py [STEPS]
"""

import argparse
import inspect
import sys

import torch
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
torch.manual_seed(0)

lines = [line.strip() for line in inspect.getsource(argparse).splitlines() if len(line) > 20]
text = "\n".join(lines)
alphabet = ["", *sorted(set(text))]  # 0 is padding
encoded = [torch.tensor([alphabet.index(c) for c in line[:64]]) for line in lines]


class GPT(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.tokens = nn.Embedding(len(alphabet), width)
        self.positions = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(alphabet))

    def forward(self, codes):
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.tokens(codes) + self.positions(torch.arange(length))
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def batches():
    for _ in range(steps * 4):
        chosen = [encoded[i] for i in torch.randint(0, len(encoded), (8,))]
        yield nn.utils.rnn.pad_sequence(chosen, batch_first=True)


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

policy = {
    "version": 1,
    "accumulate": {"steps": 4, "weigh": "weight"},
    "clip": [{"limit": 0.5}],
}
watch = gradwatch.attach(model, optimizer, policy, run="gpt")

for micro in watch.micro_batches(batches()):
    with micro:
        codes = micro.batch
        logits, target = model(codes[:, :-1]), codes[:, 1:]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=0)
        micro.scale(loss, weight=int((target != 0).sum())).backward()
        watch.log(loss=loss)
    if micro.last:
        optimizer.step()
        optimizer.zero_grad()

print(watch)
watch.close()
