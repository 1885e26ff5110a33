"""The data sets by name: what reads them, and what they hold."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from genmodels import images
from genmodels.data import own
from genmodels.data.own import OnDisk, data_root, held_out_share
from genmodels.data.toys import TOYS, points
from genmodels.images import arrays

SPLITS = ("train", "test")
ON_DISK = ("imagefolder", "zip", "npy", "hf")  # what data.device=disk can read as it is needed


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

            _fetch(
                cfg, lambda: getattr(torchvision.datasets, folder)(data_root(cfg), download=True)
            )
        parts = []
        for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"):
            found = _find(where / name)
            if found is None:
                raise ValueError(
                    f"data.root={data_root(cfg)}: {name}[.gz] is not in {where}; "
                    f"{where_to_get(cfg.name, data_root(cfg))}"
                )
            parts.append(arrays.read_idx(found))
        return parts[0][:, None], parts[1].to(torch.int64)

    return read


def _find(path):
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def _torchvision(name):
    """Return a reader of one of torchvision's data sets; it checks the files' md5."""

    def read(cfg, split):
        import torchvision

        make = getattr(torchvision.datasets, name)
        words = {"split": split} if name == "SVHN" else {"train": split == "train"}
        try:
            dataset = make(data_root(cfg), download=False, **words)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError):
            if not cfg.download:
                raise ValueError(
                    f"data.root={data_root(cfg)}: {cfg.name} is not there, or not whole; "
                    f"{where_to_get(cfg.name, data_root(cfg))}"
                ) from None
            dataset = _fetch(cfg, lambda: make(data_root(cfg), download=True, **words))
        pixels = torch.from_numpy(dataset.data)
        pixels = pixels if name == "SVHN" else pixels.permute(0, 3, 1, 2)
        labels = dataset.labels if name == "SVHN" else dataset.targets
        return pixels, torch.as_tensor(labels, dtype=torch.int64)

    return read


def _fetch(cfg, download):
    """Return download(), with one line where the network or the md5 fails."""
    try:
        return download()
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.download=true: {cfg.name} could not be fetched ({error}); "
            f"{where_to_get(cfg.name, data_root(cfg))}"
        ) from None


def where_to_get(name, root):
    """Return what to fetch from where and where to put it, for an error or for `get`."""
    url, place, names = PUBLIC[name]
    fetch = f"or run python -m genmodels.data get {name} root={root}"
    return f"put {names} from {url} into {Path(root) / place}, {fetch}"


def _toy(name):
    """Return a reader of one of the 2-D toys; the two splits are two draws."""

    def read(cfg, split):
        count = cfg.points if split == "train" else -(-cfg.points // 5)
        return points(name, count, seed=SPLITS.index(split))

    return read


def _hugging_face(cfg, split):
    """A data set of Hugging Face's library `datasets`: data.root is its name or its folder."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data.name=hf: needs Hugging Face's library; pip install datasets"
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ValueError(
            f"data.name=hf: datasets {datasets.__version__} would run scripts that come with data; "
            "pip install -U datasets"
        )
    if not cfg.root:
        raise ValueError("data.root=: say which, a name such as mnist or a folder on disk")
    try:
        if any((Path(cfg.root) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            parts = datasets.load_from_disk(cfg.root)
        else:
            local = datasets.DownloadConfig(local_files_only=not cfg.download)
            parts = datasets.load_dataset(cfg.root, download_config=local)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"data.root={cfg.root}: `datasets` cannot load it ({str(error).splitlines()[0]}); "
            "with data.download=true it may fetch it, else give a folder of save_to_disk"
        ) from None
    parts = parts if isinstance(parts, dict) else {"train": parts}
    train = parts.get("train", next(iter(parts.values())))
    held_out = next((parts[k] for k in ("test", "validation", "valid", "val") if k in parts), None)
    rows = train if split == "train" or held_out is None else held_out
    kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
    column = next((name for name, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise ValueError(f"data.root={cfg.root}: has no column of images, only {list(kinds)}")
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
    labels = torch.tensor(rows[label][:] if label else [-1] * len(rows), dtype=torch.int64)
    rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    numbers = torch.arange(len(rows))
    if held_out is None:
        numbers = held_out_share(cfg, split, len(rows))
    channels, side = cfg.channels or 3, cfg.resolution
    first = _read_rows(rows, column, channels, [0])[0]
    shape = (channels, side, side) if side else tuple(first.shape)
    read = partial(_read_fitted, rows, column, shape, (side, cfg.crop))
    return OnDisk(read, shape, numbers), labels[numbers]


def _read_rows(rows, column, channels, numbers):
    """Return pictures (C, H, W) of any size."""
    entries = [rows[number][column] for number in numbers]
    sources = [io.BytesIO(e["bytes"]) if e["bytes"] else e["path"] for e in entries]
    return [images.read_image(s, channels, f"row {n}") for s, n in zip(sources, numbers)]


def _read_fitted(rows, column, shape, fitting, numbers):
    pictures = _read_rows(rows, column, shape[0], numbers)
    return own.fit_all(pictures, shape, fitting, [f"row {number}" for number in numbers])


def _folder_of_pictures(cfg, split):
    """A named folder of pictures (PLACES); data.resolution= makes them of one size."""
    return own.pictures(replace(cfg, root=str(picture_tree(cfg).path)), split)


def picture_tree(cfg):
    """Return the files.Tree of a data set that is a folder or zip of pictures.

    Raises:
        ValueError: another kind of data set, or no folder there.
    """
    if cfg.name not in ("imagefolder", "zip", *PLACES):
        raise ValueError(
            f"data.name={cfg.name}: is no folder of pictures; choose from imagefolder, zip, "
            f"{', '.join(PLACES)}"
        )
    root = data_root(cfg)
    if cfg.name not in PLACES:
        return images.Tree(root, "data.root")
    place, url = PLACES[cfg.name]
    if not (root / place).is_dir():
        raise ValueError(f"data.root={root}: {place} is not in it; it is at {url}")
    return images.Tree(root / place, "data.root")


# Training pictures of the denoising papers: (folder below data.root, where it is to be had).
PLACES = {
    "train400": ("denoise/Train400", "https://github.com/cszn/DnCNN (TrainingCodes)"),
    "cbsd400": ("denoise/CBSD400", "https://github.com/BIDS/BSDS500 (train and test)"),
}

# name -> (reader, shape or None, classes or -1): None and -1 are read off the files.
DATASETS = {
    "digits": (_digits, (1, 8, 8), 10),
    "mnist": (_idx("MNIST"), (1, 28, 28), 10),
    "fashion_mnist": (_idx("FashionMNIST"), (1, 28, 28), 10),
    "cifar10": (_torchvision("CIFAR10"), (3, 32, 32), 10),
    "cifar100": (_torchvision("CIFAR100"), (3, 32, 32), 100),
    "svhn": (_torchvision("SVHN"), (3, 32, 32), 10),
    "imagefolder": (own.pictures, None, -1),
    "zip": (own.pictures, None, -1),
    "npz": (own.npz, None, -1),
    "npy": (own.npy, None, -1),
    "hf": (_hugging_face, None, -1),
    "train400": (_folder_of_pictures, None, -1),
    "cbsd400": (_folder_of_pictures, None, -1),
} | {name: (_toy(name), (2, 1, 1), parts) for name, (_, parts) in TOYS.items()}

# What a model card says about the data.
TERMS = {
    "digits": "UCI optical recognition of handwritten digits (E. Alpaydin, C. Kaynak), CC BY 4.0.",
    "mnist": "MNIST (LeCun, Cortes, Burges), commonly stated as CC BY-SA 3.0.",
    "fashion_mnist": "Fashion-MNIST (Zalando SE), MIT licence.",
    "cifar10": "CIFAR-10 (Krizhevsky 2009): research use, cite the technical report.",
    "cifar100": "CIFAR-100 (Krizhevsky 2009): research use, cite the technical report.",
    "svhn": "SVHN (Netzer et al. 2011): non-commercial use only.",
    "train400": "400 grey pictures from BSDS500 (Arbelaez et al. 2011): non-commercial research.",
    "cbsd400": "BSDS500, train and test (Arbelaez et al. 2011): non-commercial research.",
} | {name: "Points drawn by genmodels.data.toys." for name in TOYS}

# name -> (where it is fetched from, folder below data.root, files); `get` and errors name them.
PUBLIC = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw", "the four idx files"),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "FashionMNIST/raw",
        "the four idx files",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "",
        "cifar-10-batches-py (unpacked)",
    ),
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "",
        "cifar-100-python (unpacked)",
    ),
    "svhn": ("http://ufldl.stanford.edu/housenumbers/", "", "train_32x32.mat and test_32x32.mat"),
}


def load_split(cfg, split):
    """Return (images uint8 (N, C, H, W), labels int64 (N,), -1 = none) of one split.

    The 2-D toys are float32 (N, 2, 1, 1) in [-1, 1]. With data.device=disk, sets of files come as
    OnDisk, which stands in for a tensor.

    Raises:
        ValueError: unknown data set or split, missing or broken files.
    """
    if cfg.name not in DATASETS:
        raise ValueError(f"data.name={cfg.name}: choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split}: choose from {', '.join(SPLITS)}")
    pixels, labels = DATASETS[cfg.name][0](cfg, split)
    if isinstance(pixels, OnDisk):
        pixels = replace(pixels, pad=cfg.pad)
        return (pixels if cfg.device == "disk" else pixels.load()), labels
    if cfg.device == "disk":
        raise ValueError(
            f"data.device=disk: {cfg.name} is read whole; convert it to .npy or .zip (python -m "
            "genmodels.data convert), or leave data.device out"
        )
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
    if cfg.patch:
        cfg.shape, cfg.classes = [cfg.channels or 3, cfg.patch, cfg.patch], 0
        return cfg
    _, shape, classes = DATASETS[cfg.name]
    if shape is None and pixels is None and cfg.shape and cfg.classes >= 0:
        return cfg  # as saved with a model: its data need not be there
    if shape is None:
        if pixels is None:
            # The shape is in the header of one file.
            quick = replace(cfg, device="disk") if cfg.name in ON_DISK else cfg
            pixels, labels = load_split(quick, "train")
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
