"""A Lightning Trainer and a DataLoader of one's own around a method of this package.

    python examples/own_trainer.py [steps]

Trains EDM on scikit-learn's handwritten digits and draws a row to own_trainer.png: rough after 300
steps of a small network. The config's own network, steps and average make the README's digits.
"""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import genmodels
from genmodels.images import to_uint8, write_png


def main(steps: int = 300) -> torch.Tensor:
    """Train, draw and return ten digits, (10, 1, 8, 8) in [-1, 1]."""
    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 to [-1, 1]
    labels = torch.tensor(digits.target)
    batches = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)

    # The config says what the model is; data.shape and data.classes are those of data.name=digits.
    model = genmodels.build(
        "edm_digits",
        "network.channels=[32,32]",
        "network.norm_groups=8",
        f"trainer.max_steps={steps}",
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)

    drawn = model.eval().sample(range(10), labels=range(10))
    write_png("own_trainer.png", torch.cat(list(to_uint8(drawn)), dim=-1))
    return drawn


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
