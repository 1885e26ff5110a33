"""Train the in-tree feature net for colour images and write cifar_net.safetensors.

    python -m benchmarks.cifar_net [out=FILE] [work=runs/cifar_net] [epochs=16]
    python -m benchmarks.cifar_net controls [out=FILE.json]

Needs GENMODELS_DATA with cifar10/cifar10_jpeg_full.npz (all 60,000 pictures of CIFAR-10 as JPEG at
a quality of about 75: `train_jpeg`, `train_offsets`, `train_labels`) and cifar10_exact_subset.npz
(exact pixels of 8,068 training and 1,017 test pictures, with their indices). It is trained on the
50,000 training pictures, 8,068 of them exact, the others JPEG. Accuracy is measured on the 1,017
exact test pictures, once, and on the 10,000 JPEG ones. The recipe was not tuned: one run, seed 0.

About 40 minutes of CPU time with bfloat16 instructions. Stopped, the command goes on at the last
finished epoch. Prints accuracies and the sha256 that colour_nets.py must name; a new file makes all
older FD(cifar) figures void.

controls: how FD(cifar), FD(pixels) and the FD of an Inception with random weights (seed 0) rank
spoiled copies of the 1,017 exact test pictures, as multiples of what the untouched ones get against
2,000 exact training pictures; benchmarks/results/cifar_net.json. About 25 minutes of one core.
"""

import hashlib
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch.nn import functional as F

from benchmarks import record
from benchmarks.feature_nets import noisy
from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.config.words import split_words
from genmodels.metrics.features import Features, extract, inception, load_features
from genmodels.metrics.features.colour_nets import ColourNet, cifar_file, folded
from genmodels.metrics.frechet import Moments, frechet_distance

SEED, BATCH, LR, MOMENTUM, DECAY, SMOOTHING, SHIFT = 0, 128, 0.2, 0.9, 5e-4, 0.1, 4


def pictures(split):
    """Return uint8 pictures (N, 3, 32, 32) and labels (N,), JPEG; and (indices, exact pictures)."""
    folder = Path(os.environ.get("GENMODELS_DATA", "data")) / "cifar10"
    with np.load(folder / "cifar10_jpeg_full.npz") as file:
        data, offsets = file[f"{split}_jpeg"].tobytes(), file[f"{split}_offsets"]
        labels = torch.from_numpy(file[f"{split}_labels"].astype(np.int64))
    rows = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows[i] = np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
    with np.load(folder / "cifar10_exact_subset.npz") as file:
        indices = torch.from_numpy(file[f"{split}_indices"].astype(np.int64))
        exact = torch.from_numpy(file[f"{split}_images"])
    return torch.from_numpy(rows).permute(0, 3, 1, 2), labels, indices, exact.permute(0, 3, 1, 2)


def augment(x, random):
    """Return pictures (B, 3, 32, 32) mirrored at random and shifted by up to 4 pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
    x = F.pad(x, (SHIFT,) * 4, mode="reflect")
    moved = torch.randint(2 * SHIFT + 1, (len(x), 2), generator=random)
    rows = moved[:, 0, None] + torch.arange(32)
    columns = moved[:, 1, None] + torch.arange(32)
    image = torch.arange(len(x))[:, None, None]
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(x, labels, epochs, work):
    """Return (trained net, CPU seconds); one file of the state after each epoch."""
    torch.manual_seed(SEED)
    net, steps = ColourNet(norms=True), len(x) // BATCH
    optimizer = torch.optim.SGD(
        net.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps * epochs)
    state, path = {"epoch": 0, "seconds": 0.0}, work / "state.pt"
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(state["epoch"], epochs):
        started, random = time.process_time(), torch.Generator().manual_seed(SEED + epoch)
        order, total = torch.randperm(len(x), generator=random), 0.0
        net.train()
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            with torch.autocast("cpu", torch.bfloat16):
                features = net.features(augment(x[rows].float() / 127.5 - 1, random))
            scores = net.head(features.float())
            loss = F.cross_entropy(scores, labels[rows], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        state["seconds"] += time.process_time() - started
        state |= {"epoch": epoch + 1} | {name: part.state_dict() for name, part in parts.items()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(path, buffer.getvalue())
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, {state['seconds']:.0f} s", flush=True)
    return net.eval(), state["seconds"]


@torch.no_grad()
def rows_of(net, images):
    """Return the features of uint8 images, in parts."""
    return torch.cat([net(part) for part in images.split(500)])


def accuracy(net, images, labels):
    """Return the share of images whose class is found."""
    with torch.no_grad():
        found = net.logits(rows_of(net, images)).argmax(dim=1)
    return round(float((found == labels).double().mean()), 4)


def spoiled(real, labels):
    """Yield (name, pictures) of what a generator may get wrong, made of real (N, 3, 32, 32)."""
    random = np.random.default_rng(0)
    yield from noisy(real, random)
    kernel = torch.tensor([1.0, 2, 1]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    padded = F.pad(real.float(), (1,) * 4, mode="reflect")
    yield "blur 1 2 1", F.conv2d(padded, kernel, groups=3).round().to(torch.uint8)
    for quality in (75, 30):
        yield f"JPEG of quality {quality}", torch.stack([_jpeg(x, quality) for x in real])
    rest = (labels != 3).nonzero()[:, 0]
    pick = torch.from_numpy(random.integers(len(rest), size=len(real)))
    yield "class 3 missing", real[rest[pick]]
    few = torch.from_numpy(random.choice(len(real), 100, replace=False))
    yield "100 pictures over and over", real[few].repeat(11, 1, 1, 1)[: len(real)]


def _jpeg(image, quality):
    """Return a picture (3, 32, 32) as it comes out of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def controls(out):
    """Measure spoiled pictures, print the table and write the JSON."""
    started = time.monotonic()
    *_, reference = pictures("train")
    _, labels, indices, real = pictures("test")
    labels, reference = labels[indices], reference[:2000]
    random_net = inception.from_state(inception.random_state(0)).eval().requires_grad_(False)
    random_net.to(memory_format=torch.channels_last)
    nets = {
        "cifar": load_features("cifar"),
        "pixels": load_features("pixels"),
        "random Inception": Features(
            "random", None, "tf1", 2048, random_net, batch=16, outputs=("features", "logits")
        ),
    }
    result = {}
    for name, net in nets.items():
        target = Moments().update(extract(net, reference))
        floor = None
        for what, images in spoiled(real, labels):
            value = float(frechet_distance(Moments().update(extract(net, images)), target))
            floor = floor or value
            result.setdefault(what, {})[name] = {"fd": value, "times_untouched": value / floor}
    rows = [
        (what, *(f"{v['fd']:.3f} = {v['times_untouched']:.2f} x" for v in entry.values()))
        for what, entry in result.items()
    ]
    cli.print_table("1,017 exact test pictures against 2,000 for training", ("", *nets), rows)
    seconds = round(time.monotonic() - started, 1)
    command = "python -m benchmarks.cifar_net controls"
    record.write(out, command, seed=0, seconds=seconds, rows=result)


def make(argv):
    """Train, judge and write the net; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    if positionals == ["controls"] and not words.keys() - {"out"}:
        return controls(words.get("out", "benchmarks/results/cifar_net.json"))
    if positionals or flags or words.keys() - {"out", "work", "epochs"}:
        print(__doc__.strip())
        return
    out, work = Path(words.get("out", cifar_file())), Path(words.get("work", "runs/cifar_net"))
    epochs = int(words.get("epochs", "16"))
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    x, labels, indices, exact = pictures("train")
    x = x.contiguous()
    x[indices] = exact
    trained, seconds = train(x, labels, epochs, work)
    net = folded(trained)
    with torch.no_grad():
        net.scale.copy_(rows_of(net, x[::5]).var(dim=0).mean().sqrt())
    half = ColourNet()  # judged as it is shipped, rounded to half precision
    half.load_state_dict({name: value.half().float() for name, value in net.state_dict().items()})
    half.eval()
    test, test_labels, test_indices, test_exact = pictures("test")
    card = {
        "what": "classifier of 32x32 colour images, features = 128 values before the last layer",
        "data": "CIFAR-10 (Krizhevsky 2009), the 50000 training images: 8068 exact, 41932 JPEG of "
        "quality about 75",
        "command": "python -m benchmarks.cifar_net",
        "config": {"epochs": epochs, "batch": BATCH, "lr": LR, "weight_decay": DECAY},
        "seed": SEED,
        "accuracy_exact_1017_test": accuracy(half, test_exact, test_labels[test_indices]),
        "accuracy_jpeg_10000_test": accuracy(half, test, test_labels),
        "cpu_seconds": round(seconds),
        "machine": record.machine(),
        "versions": {"torch": torch.__version__},
    }
    state = {name: value.half() for name, value in half.state_dict().items()}
    data = save(state, metadata={"card": json.dumps(card)})
    write_bytes(out, data)
    print(json.dumps(card, indent=1))
    print(f"{out}: {len(data)} bytes\nsha256 {hashlib.sha256(data).hexdigest()}")


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(make, argv)


if __name__ == "__main__":
    sys.exit(main())
