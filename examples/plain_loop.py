"""A training loop of plain torch: loss(batch), backward(), step().

    python examples/plain_loop.py [steps]

Trains a denoiser on scikit-learn's handwritten digits, keeps a moving average of the weights and
draws a row to plain_loop.png: rough after 300 steps of a small network.
"""

import copy
import sys

import torch
from sklearn.datasets import load_digits

import genmodels
from genmodels.images import to_uint8, write_png


def main(steps: int = 300) -> torch.Tensor:
    """Train, draw and return ten digits, (10, 1, 8, 8) in [-1, 1]."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 to [-1, 1]
    labels = torch.tensor(digits.target)

    model = genmodels.build(
        "edm_digits", "network.channels=[32,32]", "network.norm_groups=8"
    ).train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(images), (64,))
        # Noise and noise levels are drawn anew at each call, from torch's generator.
        loss, logs = model.loss((images[rows], labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters()):
                kept.lerp_(new, max(0.01, 1 / (step + 1)))
        if step % 50 == 0:
            print(f"step {step}: loss {logs['loss'].item():.3f}")

    drawn = average.sample(range(10), labels=range(10))
    write_png("plain_loop.png", torch.cat(list(to_uint8(drawn)), dim=-1))
    return drawn


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
