"""Real images: uint8 in memory, and an endless training stream in which image n is fixed by n.

python -m genmodels.data info digits            shape, counts, mean and std of a data set
python -m genmodels.data info FOLDER resolution=64
"""

import difflib
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch

from genmodels import cli, images, seeding
from genmodels.config import DataConfig

SPLITS = ("train", "test")


def _digits(cfg, split):
    """Scikit-learn's copy of the UCI optical digits: 1,797 images 8x8; the last 360 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    order = order[:1437] if split == "train" else order[1437:]
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[order]
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target[order])


def _idx(folder):
    """Return a reader of the idx files of (Fashion-)MNIST, gzipped or not."""

    def read(cfg, split):
        where = data_root(cfg) / folder / "raw"
        stem = "train" if split == "train" else "t10k"
        if cfg.download and not _find(where / f"{stem}-labels-idx1-ubyte"):
            import torchvision

            getattr(torchvision.datasets, folder)(data_root(cfg), download=True)
        pixels = _read_idx(where / f"{stem}-images-idx3-ubyte")
        labels = _read_idx(where / f"{stem}-labels-idx1-ubyte")
        return pixels[:, None], labels.to(torch.int64)

    return read


def _find(path):
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def _read_idx(path):
    found = _find(path)
    if found is None:
        raise ValueError(
            f"data.root={path.parents[2]}: {path.name}[.gz] is not in {path.parent}; put the four "
            "idx files there (torchvision's layout), set data.root or GENMODELS_DATA to the folder "
            "above, or let data.download=true fetch them"
        )
    return images.read_idx(found)


def _cifar10(cfg, split):
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(data_root(cfg), train=split == "train", download=cfg.download)
    except RuntimeError:
        raise ValueError(
            f"data.root={data_root(cfg)}: no cifar-10-batches-py there; unpack "
            "cifar-10-python.tar.gz in it, or set data.download=true"
        ) from None
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def _imagefolder(cfg, split):
    """Pictures below a folder, cropped and resized; the folders right below it are the classes.

    Where there are train/ and test/ (or else val/) these are the splits; a lone train/ is split as
    any other folder. Classes are numbered by the training folders in order of name.
    """
    root = data_root(cfg)
    if cfg.resolution < 1:
        raise ValueError("data.resolution=0: imagefolder needs the side to crop and resize to")
    if not root.is_dir():
        raise ValueError(f"data.root={root}: no such folder")
    folder, held_out = images.split_folders(root)
    files = images.find_images(folder)
    if not files:
        raise ValueError(f"data.root={folder}: holds no picture")
    names = sorted({file.relative_to(folder).parts[0] for file in files})
    classed = all((folder / name).is_dir() for name in names)
    classes = {name: number for number, name in enumerate(names)} if classed else {}
    if held_out is None:
        files = [files[i] for i in _share(cfg, split, len(files))]
    elif split == "test":
        folder, files = held_out, images.find_images(held_out)
    labels = [_label(file.relative_to(folder), folder, classes, cfg.labels) for file in files]
    channels, side = cfg.channels or 3, cfg.resolution
    pixels = torch.empty(len(files), channels, side, side, dtype=torch.uint8)
    for i, file in enumerate(files):
        pixels[i] = images.square(images.read_image(file, channels), side)
    return pixels, torch.tensor(labels, dtype=torch.int64)


def _label(path, folder, classes, needed):
    """Return the number of the class of a picture, or -1 where there are no classes."""
    name = path.parts[0]
    if classes and name not in classes and (needed or len(path.parts) > 1):
        raise ValueError(
            f"data.root={folder}: {name} is no class of train/, whose folders number the classes; "
            "take it out or add such a folder to train/"
        )
    return classes.get(name, -1)


def _npz(cfg, split):
    path = data_root(cfg)
    if not path.is_file():
        raise ValueError(f"data.root={path}: no such file; npz wants the path of the .npz itself")
    pixels, labels = images.npz_images(path, split)
    labels = torch.full((len(pixels),), -1) if labels is None else labels
    with np.load(path) as file:
        own_split = f"{split}_images" in file.files
    share = slice(None) if own_split else _share(cfg, split, len(pixels))
    return pixels[share], labels[share]


def _share(cfg, split, size):
    """Return the image numbers in a split of a set without splits: a fixed share is held out."""
    order = np.random.default_rng(0).permutation(size)
    count = round(size * cfg.holdout)
    return order[: size - count] if split == "train" else order[size - count :]


# name -> (reader, shape or None, classes or -1): None and -1 are read off the files.
DATASETS = {
    "digits": (_digits, (1, 8, 8), 10),
    "mnist": (_idx("MNIST"), (1, 28, 28), 10),
    "fashion_mnist": (_idx("FashionMNIST"), (1, 28, 28), 10),
    "cifar10": (_cifar10, (3, 32, 32), 10),
    "imagefolder": (_imagefolder, None, -1),
    "npz": (_npz, None, -1),
}

# What a model card says about the data.
TERMS = {
    "digits": "UCI optical recognition of handwritten digits (E. Alpaydin, C. Kaynak), CC BY 4.0.",
    "mnist": "MNIST (LeCun, Cortes, Burges), commonly stated as CC BY-SA 3.0.",
    "fashion_mnist": "Fashion-MNIST (Zalando SE), MIT licence.",
    "cifar10": "CIFAR-10 (Krizhevsky 2009): research use, cite the technical report.",
}


def data_root(cfg):
    """Return the folder (or file) of the data: data.root, else $GENMODELS_DATA, else ./data."""
    return Path(cfg.root or os.environ.get("GENMODELS_DATA") or "data").expanduser()


def load_split(cfg, split):
    """Return (images uint8 (N, C, H, W), labels int64 (N,), -1 = none) of one split.

    Raises:
        ValueError: unknown data set or split, missing or broken files.
    """
    if cfg.name not in DATASETS:
        raise ValueError(f"data.name={cfg.name}: choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split}: choose from {', '.join(SPLITS)}")
    pixels, labels = DATASETS[cfg.name][0](cfg, split)
    if cfg.pad:
        pixels = torch.nn.functional.pad(pixels, [cfg.pad] * 4)
    return pixels.contiguous(), labels


def fill_in(cfg, pixels=None, labels=None):
    """Set cfg.shape and cfg.classes from the data set (its files are read only if need be).

    Raises:
        ValueError: data.shape or data.classes was set by hand and is not what the data have.
    """
    if cfg.name not in DATASETS:
        raise ValueError(f"data.name={cfg.name}: choose from {', '.join(DATASETS)}")
    _, shape, classes = DATASETS[cfg.name]
    if shape is None and pixels is None and cfg.shape and cfg.classes >= 0:
        return cfg  # as saved with a model: its data need not be there
    if shape is None:
        if pixels is None:
            pixels, labels = load_split(cfg, "train")
        shape, classes = tuple(pixels.shape[1:]), int(labels.max()) + 1
    else:
        shape = (shape[0], shape[1] + 2 * cfg.pad, shape[2] + 2 * cfg.pad)
    if cfg.shape and list(cfg.shape) != list(shape):
        raise ValueError(f"data.shape={cfg.shape}: {cfg.name} has {list(shape)}; leave it out")
    if cfg.classes >= 0 and cfg.classes != classes:
        raise ValueError(f"data.classes={cfg.classes}: {cfg.name} has {classes}; leave it out")
    if cfg.labels and classes < 1:
        raise ValueError(f"data.labels=true: {cfg.name} at {data_root(cfg)} has no class labels")
    cfg.shape, cfg.classes = list(shape), classes
    return cfg


class TrainStream:
    """Endless iterable of training batches; which image is number n depends on (seed, n) alone.

    Every pass over the data is a fresh permutation. A batch is a dict: `image` uint8 (B, C, H, W),
    `label` int64 (B,), `n` int64 (B,) the position in the stream. Step s takes the numbers
    [s G, (s+1) G); its micro-batches and ranks take their slices.
    """

    def __init__(self, pixels, labels, seed, batch_size, first_step, accumulate=1, rank=0, world=1,
                 order=seeding.Stream.ORDER):  # fmt: skip
        if batch_size % (accumulate * world):
            nearest = -(-batch_size // (accumulate * world)) * accumulate * world
            raise ValueError(
                f"data.batch_size={batch_size}: must be a multiple of processes x accumulate = "
                f"{world} x {accumulate}; try {nearest}"
            )
        self.pixels, self.labels, self.seed = pixels, labels, seed
        self.batch_size, self.first_step = batch_size, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.order = order

    def __iter__(self):
        micro = self.batch_size // self.accumulate
        own = micro // self.world
        start = self.first_step() * self.batch_size + self.rank * own
        orders = {}
        while True:
            n = start + torch.arange(own)
            index = self._image_numbers(n, orders).to(self.pixels.device)
            yield {
                "image": self.pixels[index],
                "label": self.labels[index],
                "n": n.to(self.pixels.device),
            }
            start += micro

    def _image_numbers(self, n, orders):
        size = len(self.pixels)
        passes = n // size
        index = torch.empty_like(n)
        for number in passes.unique().tolist():
            if number not in orders:
                for old in [old for old in orders if old < number - 1]:
                    del orders[old]
                orders[number] = seeding.permutation(self.seed, number, size, self.order)
            here = passes == number
            index[here] = orders[number][n[here] % size]
        return index


class ImageDataModule(L.LightningDataModule):
    """The images of a DataConfig for Lightning: training stream and held-out batches.

    Args:
        cfg: a DataConfig; its shape and classes are filled in.
        seed: key of the order of images.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(self, cfg, seed=0, accumulate=1):
        super().__init__()
        self.cfg, self.seed, self.accumulate = cfg, seed, accumulate
        self.train = load_split(cfg, "train")
        self.held_out = load_split(cfg, "test")
        if not len(self.train[0]):
            raise ValueError(f"data.holdout={cfg.holdout}: leaves no image to train on")
        fill_in(cfg, *self.train)
        top = max(self.held_out[1].tolist(), default=-1)
        if cfg.labels and top >= cfg.classes:
            raise ValueError(
                f"data.holdout={cfg.holdout}: class {top} is among the held-out images only; "
                "hold out fewer, or put some of it into training"
            )

    def train_dataloader(self):
        """Return the stream, from the trainer's current step on, for this rank."""
        trainer = self.trainer
        pixels, labels = (tensor.to(self._device()) for tensor in self.train)
        rank, world = trainer.global_rank, trainer.world_size
        first_step = lambda: trainer.global_step  # noqa: E731  read when iteration starts
        return TrainStream(
            pixels, labels, self.seed, self.cfg.batch_size, first_step, self.accumulate, rank, world
        )

    def val_dataloader(self):
        """Return this rank's held-out batches; every rank has the same number of them."""
        pixels, labels = self.held_out
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = []
        for numbers in torch.arange(len(pixels)).split(self.cfg.batch_size):
            if len(numbers) >= world:
                own = numbers.tensor_split(world)[rank]
                n = seeding.HELD_OUT + own
                batches.append({"image": pixels[own], "label": labels[own], "n": n})
        return torch.utils.data.DataLoader(batches, batch_size=None)  # a bare list means loaders

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """Return the batch with its images as float32 in [-1, 1], training images flipped."""
        pixels = images.from_uint8(batch["image"])
        if self.cfg.flip and self.trainer.training:
            mirrored = seeding.uniform(self.seed, batch["n"], seeding.Stream.FLIP) < 0.5
            pixels = torch.where(mirrored.reshape(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return batch | {"image": pixels}

    def _device(self):
        """Return where the training images live: on the GPU if they take under half its memory."""
        device = self.trainer.strategy.root_device
        if device.type != "cuda" or self.cfg.device == "cpu":
            return torch.device("cpu")
        room = torch.cuda.get_device_properties(device).total_memory / 2
        return device if self.cfg.device == "cuda" or self.train[0].nbytes < room else "cpu"


def main(argv):
    """Print what a data set holds."""
    positionals, words, flags = cli.split_words(argv)
    if len(positionals) != 2 or positionals[0] != "info" or flags:
        raise ValueError("usage: python -m genmodels.data info NAME_OR_PATH [root= resolution=]")
    name = positionals[1]
    fields = {
        key: (type(getattr(DataConfig(), key)), getattr(DataConfig(), key), "")
        for key in ("root", "resolution", "channels", "pad", "holdout", "download")
    }
    options = cli.typed_words(words, fields)
    if name not in DATASETS and not Path(name).expanduser().exists():
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"data.name={name}: {hint}choose from {', '.join(DATASETS)}, or a path")
    if name not in DATASETS:
        options["root"], name = name, "npz" if name.endswith(".npz") else "imagefolder"
    cfg = DataConfig(name=name, **options)
    rows = []
    for split in SPLITS:
        pixels, labels = load_split(cfg, split)
        mean, std = images.mean_and_std(pixels)
        counts = torch.bincount(labels[labels >= 0]).tolist()
        rows.append((split, len(pixels), tuple(pixels.shape[1:]), f"{mean:.4f}", f"{std:.4f}",
                     f"{min(counts)}..{max(counts)}" if counts else "none",
                     len(counts)))  # fmt: skip
    columns = ("split", "images", "shape", "mean", "std (sigma_data)", "per class", "classes")
    cli.print_table(f"{name} on the [-1, 1] scale", columns, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
