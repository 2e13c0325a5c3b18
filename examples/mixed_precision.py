"""float16 with a GradScaler: limits in true units, and a schedule that waits for dropped steps.

Give the scaler to `attach`, and every norm and limit is that of the unscaled gradient, whether you
call `scaler.unscale_` or not.

python examples/mixed_precision.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
labels = torch.tensor(digits.target, device=device)

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10))
model = model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=50)  # too large at first

policy = {
    "version": 1,
    # The scaler drops the steps in which its scale is too large. Forty in a row are a fault.
    "guard": {"nonfinite": "skip", "patience": 40},
    "clip": [{"limit": {"z": 4, "warmup": 30, "until": 1.0}}],
}
watch = gradwatch.attach(model, optimizer, policy, run="mixed-precision", scaler=scaler)

for _ in range(steps):
    chosen = torch.randint(0, len(images), (64,), device=device)
    with torch.autocast(device, dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    watch.log(loss=loss)
    scaler.step(optimizer)
    scaler.update()
    if watch.skipped is None:
        scheduler.step()

print(watch)
watch.close()
