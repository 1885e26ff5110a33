"""Train an in-tree feature net and write genmodels/metrics/NAME_net.safetensors.

    python -m benchmarks.feature_nets digits|fashion|mnist [out=FILE]
    python -m benchmarks.feature_nets controls [out=FILE.json]

digits: scikit-learn's digits (1,797 handwritten digits, 8x8, values 0..16; the test part of the UCI
set "Optical Recognition of Handwritten Digits", CC BY 4.0), 1,437 to train and 360 held out; about
5 seconds on one core. fashion, mnist: the 60,000 training and 10,000 test images of Fashion-MNIST
(MIT licence) and MNIST below GENMODELS_DATA; some minutes on one core.

Prints held-out accuracy, the floor of the distance it defines, and the sha256 that
genmodels/metrics/features/grey_nets.py must name. A new file makes all older FD(NAME) figures void.
Another processor or torch gives weights that differ in the last digits: the shipped file
is the definition.

controls: FD(fashion), FD(mnist) and FD(pixels) of spoiled held-out images against the training set,
as multiples of what the untouched ones get; benchmarks/results/feature_nets.json.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass

import numpy as np
import sklearn
import torch
from safetensors.torch import save
from torch.nn import functional as F

from benchmarks import record
from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.config import DataConfig
from genmodels.config.words import split_words
from genmodels.data import load_split
from genmodels.metrics.features import extract, load_features
from genmodels.metrics.features.grey_nets import GREY_NETS, GreyNet, weights_file
from genmodels.metrics.frechet import Moments, frechet_distance

SEED, BATCH = 0, 128


@dataclass(frozen=True)
class Recipe:
    """How one net is trained; what is not here is common to all."""

    data: str  # name in genmodels.data
    source: str  # what the header of the weights says
    command: str
    steps: int
    lr: float = 4e-3
    angle: float = 0.15  # radians
    zoom: float = 0.1
    shift: float = 0.5  # pixels
    noise: float = 0.1
    flip: bool = False


RECIPES = {
    # The command is part of the file's hash: this script's name when the file was made.
    "digits": Recipe(
        "digits",
        "scikit-learn digits (UCI optdigits test part, CC BY 4.0), 1437 of 1797 images: "
        "numpy.random.default_rng(0).permutation(1797)[:1437]",
        "python -m benchmarks.digits_net",
        660,
    ),
    "fashion": Recipe(
        "fashion_mnist",
        "Fashion-MNIST (Zalando SE, MIT licence), the 60000 training images",
        "python -m benchmarks.feature_nets fashion",
        3750,
        angle=0.05,
        zoom=0.05,
        noise=0.02,
        flip=True,
    ),
    "mnist": Recipe(
        "mnist",
        "MNIST (LeCun, Cortes, Burges; commonly stated as CC BY-SA 3.0), the 60000 training images",
        "python -m benchmarks.feature_nets mnist",
        2350,
        noise=0.02,
    ),
}


def augment(x, recipe, random):
    """Return x (B,1,H,H) shifted, turned, scaled, with a little noise.

    Mild: enough that training images lie in feature space as held-out ones do.
    """
    uniform = 2 * torch.rand(4, len(x), generator=random) - 1
    angle, scale = recipe.angle * uniform[0], 1 + recipe.zoom * uniform[1]
    shift = recipe.shift * uniform[2:] * 2 / x.shape[-1]  # the grid spans 2 over the image
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    if recipe.flip:
        rows[torch.rand(len(x), generator=random) < 0.5, 0] *= -1
    grid = F.affine_grid(rows, x.shape, align_corners=False)
    # Outside the image is black, which is -1.
    x = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return x + recipe.noise * torch.randn(x.shape, generator=random)


def train(name, pixels, labels):
    recipe, spec = RECIPES[name], GREY_NETS[name]
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    net = GreyNet(spec.side, spec.layers, spec.dim)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    for step in range(recipe.steps):
        pick = torch.randint(len(pixels), (BATCH,), generator=random)
        x = augment(pixels[pick] / 127.5 - 1, recipe, random)
        loss = F.cross_entropy(net.logits(net.body(x)), labels[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        net.scale.copy_(features(net, pixels).var(dim=0).mean().sqrt())
    return net.eval()


def features(net, pixels):
    return torch.cat([net(part) for part in pixels.split(2000)])


@torch.no_grad()
def evaluate(net, train_set, held_out, draws=200):
    """Return held-out accuracy and the mean and sd of FD(as many training images, held-out)."""
    rows, held = features(net, train_set[0]), features(net, held_out[0])
    right = net.logits(held).argmax(dim=1) == held_out[1]
    reference = Moments().update(held)
    random = np.random.default_rng(1)
    floor = []
    for _ in range(draws):
        pick = torch.from_numpy(random.permutation(len(rows))[: len(held)])
        floor.append(float(frechet_distance(Moments().update(rows[pick]), reference)))
    return float(right.double().mean()), float(np.mean(floor)), float(np.std(floor))


def card(name, accuracy):
    """Return what the header of the weights file says."""
    recipe, spec = RECIPES[name], GREY_NETS[name]
    kind = "digits" if name == "digits" else "images"
    text = {
        "what": f"classifier of {spec.side}x{spec.side} grey {kind}, "
        f"features = {spec.dim} values before the last layer",
        "data": recipe.source,
        "command": recipe.command,
        "seed": SEED,
        "heldout_accuracy": round(accuracy, 4),
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
    }
    if name != "digits":  # whose header, and with it the hash, is older
        text["config"] = {k: v for k, v in vars(recipe).items() if k not in ("source", "command")}
        text["config"] |= {"layers": spec.layers, "batch": BATCH}
        del text["versions"]["scikit-learn"]
    return text


def noisy(real, random):
    """Yield (name, images): real uint8 images, then with noise of a numpy Generator."""
    yield "untouched", real
    for sd in (5, 20):
        images = real + torch.from_numpy(random.normal(0, sd, real.shape))
        yield f"noise of sd {sd}", images.round().clamp(0, 255).to(torch.uint8)


def spoiled(real, labels):
    """Yield (name, images) of what a generator may get wrong, made of real images (N,1,H,W)."""
    random = np.random.default_rng(0)
    yield from noisy(real, random)
    kernel = torch.tensor([1.0, 2, 1]) / 4
    blurred = F.conv2d(real.float(), (kernel[:, None] * kernel)[None, None], padding=1)
    yield "blur 1 2 1", blurred.round().to(torch.uint8)
    flat = real.flatten(1).double().numpy()
    twin = random.multivariate_normal(flat.mean(0), np.cov(flat.T), len(flat), method="eigh")
    twin = torch.from_numpy(twin).round().clamp(0, 255).to(torch.uint8).view_as(real)
    yield "Gaussian with their mean and covariance", twin
    rest = (labels != 3).nonzero()[:, 0]
    yield (
        "class 3 missing",
        real[rest[torch.from_numpy(random.integers(len(rest), size=len(real)))]],
    )
    weight = np.where(np.isin(labels, (0, 1, 2, 3, 4)), 1.5, 0.5)
    pick = random.choice(len(real), len(real), p=weight / weight.sum())
    yield "classes 0-4 three times as frequent as 5-9", real[torch.from_numpy(pick)]
    half = real.shape[-1] // 2
    yield (
        "upper and lower halves of different images",
        torch.cat([real[:, :, :half], real.roll(1, 0)[:, :, half:]], dim=2),
    )
    yield "a 4x4 square blacked out", _square(real)


def _square(real):
    real = real.clone()
    real[:, :, 12:16, 12:16] = 0
    return real


def controls(out):
    """Measure spoiled images, print the table and write the JSON."""
    started, result = time.monotonic(), {}
    for data, name in (("fashion_mnist", "fashion"), ("mnist", "mnist")):
        cfg, result[name] = DataConfig(name=data), {}
        reference, (real, labels) = load_split(cfg, "train")[0], load_split(cfg, "test")
        for key in (name, "pixels"):
            extractor = load_features(key)
            target, floor = Moments().update(extract(extractor, reference)), None
            for what, pictures in spoiled(real, labels):
                moments = Moments().update(extract(extractor, pictures))
                value = float(frechet_distance(moments, target))
                floor = floor or value
                entry = result[name].setdefault(what, {})
                entry[key] = {"fd": value, "times_untouched": value / floor}
        rows = [
            (what, *(f"{v['fd']:.3f} = {v['times_untouched']:.1f} x" for v in entry.values()))
            for what, entry in result[name].items()
        ]
        title = f"10,000 held-out images of {data} against the 60,000 for training"
        cli.print_table(title, ("", f"FD({name})", "FD(pixels)"), rows)
    command, seconds = "python -m benchmarks.feature_nets controls", time.monotonic() - started
    record.write(out, command, seed=0, seconds=round(seconds, 1), rows=result)


def make(argv):
    """Train, judge and write one net, or measure; see the module's docstring."""
    positionals, words, _ = split_words(argv)
    torch.set_num_threads(1)  # sums in another order would give other weights
    if positionals == ["controls"] and not words.keys() - {"out"}:
        return controls(words.get("out", "benchmarks/results/feature_nets.json"))
    if len(positionals) != 1 or positionals[0] not in RECIPES or words.keys() - {"out"}:
        raise ValueError(f"usage: python -m benchmarks.feature_nets {'|'.join(RECIPES)} [out=FILE]")
    name = positionals[0]
    out = words.get("out", weights_file(name))
    cfg = DataConfig(name=RECIPES[name].data)
    train_set, held_out = load_split(cfg, "train"), load_split(cfg, "test")
    net = train(name, *train_set)
    accuracy, floor, spread = evaluate(net, train_set, held_out)
    # One entry: with several, safetensors writes them in random order and the hash moves.
    data = save(net.state_dict(), metadata={"card": json.dumps(card(name, accuracy))})
    write_bytes(out, data)
    print(f"held-out accuracy {accuracy:.4f}, FD({name}) floor {floor:.3f} +- {spread:.3f} (sd)")
    print(f"{out}: {len(data)} bytes\nsha256 {hashlib.sha256(data).hexdigest()}")


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(make, argv)


if __name__ == "__main__":
    sys.exit(main())
