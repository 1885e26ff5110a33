"""Train the digits feature net and write genmodels/metrics/digits_net.safetensors.

    python -m benchmarks.digits_net [out=FILE]        about 5 seconds on one core

Data: scikit-learn's digits (1,797 handwritten digits, 8x8, values 0..16; the test part of the UCI
set "Optical Recognition of Handwritten Digits", CC BY 4.0), 1,437 to train and 360 held out.
Prints held-out accuracy, the floor of the distance it defines, and the sha256 that
genmodels/metrics/features.py must name. A new file makes all older FD(digits) figures void.
"""

import hashlib
import json
import sys

import numpy as np
import sklearn
import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch.nn import functional as F

from genmodels.metrics.features import DIGITS_WEIGHTS, DigitsNet
from genmodels.metrics.frechet import Moments, frechet_distance

SEED, STEPS, BATCH, LR = 0, 660, 128, 4e-3


def digits():
    """Return uint8 images (1797,1,8,8), labels (1797,), the training and the held-out indices."""
    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images, torch.from_numpy(data.target), order[:1437], order[1437:]


def augment(x, random):
    """Return x (B,1,8,8) shifted by at most half a pixel, turned, scaled, with a little noise.

    Mild: enough that training digits lie in feature space as held-out ones do.
    """
    uniform = 2 * torch.rand(4, len(x), generator=random) - 1
    angle, scale = 0.15 * uniform[0], 1 + 0.1 * uniform[1]
    shift = 0.5 * uniform[2:] * 2 / 8  # half a pixel; the grid spans 2 over 8 pixels
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, x.shape, align_corners=False)
    # Outside the image is black, which is -1.
    x = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return x + 0.1 * torch.randn(x.shape, generator=random)


def train(images, labels):
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    x = images / 127.5 - 1
    for _ in range(STEPS):
        pick = torch.randint(len(x), (BATCH,), generator=random)
        logits = net.logits(net.body(augment(x[pick], random)))
        loss = F.cross_entropy(logits, labels[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        net.scale.copy_(net(images).var(dim=0).mean().sqrt())
    return net.eval()


@torch.no_grad()
def evaluate(net, images, labels, fit, held, draws=200):
    """Return held-out accuracy and the mean and sd of FD(360 training digits, held-out digits)."""
    features = net(images)
    right = net.logits(features[held]).argmax(dim=1) == labels[held]
    reference = Moments().update(features[held])
    random = np.random.default_rng(1)
    floor = []
    for _ in range(draws):
        pick = fit[torch.from_numpy(random.permutation(len(fit))[: len(held)])]
        floor.append(float(frechet_distance(Moments().update(features[pick]), reference)))
    return float(right.double().mean()), float(np.mean(floor)), float(np.std(floor))


def main(argv=None):
    out = DIGITS_WEIGHTS
    for word in sys.argv[1:] if argv is None else argv:
        if not word.startswith("out="):
            print(f"unknown word {word!r}: the only one is out=FILE", file=sys.stderr)
            return 2
        out = word.removeprefix("out=")
    torch.set_num_threads(1)  # sums in another order would give other weights
    images, labels, fit, held = digits()
    net = train(images[fit], labels[fit])
    accuracy, floor, spread = evaluate(net, images, labels, fit, held)
    card = {
        "what": "classifier of 8x8 grey digits, features = 32 values before the last layer",
        "data": "scikit-learn digits (UCI optdigits test part, CC BY 4.0), 1437 of 1797 images: "
        "numpy.random.default_rng(0).permutation(1797)[:1437]",
        "command": "python -m benchmarks.digits_net",
        "seed": SEED,
        "heldout_accuracy": round(accuracy, 4),
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
    }
    # One entry: with several, safetensors writes them in random order and the hash moves.
    data = save(net.state_dict(), metadata={"card": json.dumps(card)})
    with open(out, "wb") as file:
        file.write(data)
    print(f"held-out accuracy {accuracy:.4f}, FD(digits) floor {floor:.3f} +- {spread:.3f} (sd)")
    print(f"{out}: {len(data)} bytes\nDIGITS_SHA256 = {hashlib.sha256(data).hexdigest()!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
