"""The data sets by name, one row each: what reads them, what they hold, where they come from."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels import images
from genmodels.config import DataConfig, check
from genmodels.config.load import kind_of_files
from genmodels.data import latents, own
from genmodels.data.own import Split, data_root, fit_pictures, held_out_share
from genmodels.data.parts import split_of
from genmodels.data.toys import TOYS, toy_points
from genmodels.images import OnDisk, arrays

SPLITS = ("train", "test")
# Settings that mean nothing to some of the sets, which DataSet.takes of the others names.
SETTINGS_OF_SETS = ("root", "resolution", "crop", "channels", "holdout", "points", "leave_out")
PICTURES = ("root", "resolution", "crop", "channels", "holdout", "leave_out")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set; DATASETS has them by name, and a row there is all that a new one takes.

    Attributes:
        read: (DataConfig, "train" or "test") -> (images uint8 (N, C, H, W), labels int64 (N,)),
            without data.pad; OnDisk images if they can be read as they are needed.
        shape: (C, H, W); None: read off the files.
        classes: how many; -1: read off the files.
        terms: whose it is and on what terms, for the model card.
        url: where it is fetched from.
        folder: below data.root, where its files lie.
        files: which files belong there, in words.
        sha256: of files in that folder, by name.
        takes: which settings of DataConfig it reads, of those in SETTINGS_OF_SETS.
        latents: it holds mean and std of latents, float32 (N, 2C, h, w), in place of images.
    """

    read: Callable[[DataConfig, str], Split]
    shape: tuple[int, int, int] | None = None
    classes: int = -1
    terms: str = "your own data: say here where they come from"
    url: str = ""
    folder: str = ""
    files: str = "its files"
    sha256: dict[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ("root",)
    latents: bool = False

    def how_to_get(self, name: str, root: Path) -> str:
        """Return what to fetch from where and where to put it, for an error."""
        return (
            f"put {self.files} from {self.url} into {root / self.folder}, "
            f"or run python -m genmodels.data get {name} root={root}"
        )


def data_set(name: str) -> DataSet:
    """Return the DataSet of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name={name}: choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def read_digits(cfg: DataConfig, split: str) -> Split:
    """Scikit-learn's copy of the UCI optical digits: 1,797 images 8x8; the last 360 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    order = order[:1437] if split == "train" else order[1437:]
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[order]
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target[order])


def read_idx_files(cfg: DataConfig, split: str, kind: str) -> Split:
    """The idx files of (Fashion-)MNIST, gzipped or not; `kind` is torchvision's name of the set."""
    root = data_root(cfg)
    row = data_set(cfg.name)
    folder = root / row.folder
    stem = "train" if split == "train" else "t10k"
    if cfg.download and not _plain_or_gz(folder / f"{stem}-labels-idx1-ubyte"):
        import torchvision

        _fetch(cfg, lambda: getattr(torchvision.datasets, kind)(root, download=True))
    parts = []
    for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"):
        path = _plain_or_gz(folder / name)
        if path is None:
            raise ValueError(
                f"data.root={root}: {name}[.gz] is not in {folder}; "
                f"{row.how_to_get(cfg.name, root)}"
            )
        parts.append((path, arrays.read_idx(path)))
    _check_idx(row, *parts)
    (_, pixels), (_, labels) = parts
    return pixels[:, None], labels.to(torch.int64)


def _check_idx(
    row: DataSet, images: tuple[Path, torch.Tensor], labels: tuple[Path, torch.Tensor]
) -> None:
    """Raise ValueError, which names the file, unless both hold what belongs to this data set.

    Args:
        row: the data set.
        images, labels: where each was read, and what is in it.
    """
    (path, pixels), (label_path, numbers) = images, labels
    _, height, width = row.shape
    shape, label_shape = list(pixels.shape), list(numbers.shape)
    if pixels.ndim != 3 or shape[1:] != [height, width] or not len(pixels):
        problem = f"data={path}: holds an array {shape}, not images (N, {height}, {width})"
    elif numbers.ndim != 1 or len(numbers) != len(pixels):
        problem = f"data={label_path}: holds an array {label_shape} for {len(pixels)} images"
    elif int(numbers.max()) >= row.classes:
        problem = f"data={label_path}: holds a label {int(numbers.max())} of {row.classes} classes"
    else:
        return
    raise ValueError(f"{problem}; fetch it again")


def _plain_or_gz(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def read_torchvision(cfg: DataConfig, split: str, kind: str) -> Split:
    """A data set of torchvision, which checks the files' md5."""
    import torchvision

    make = getattr(torchvision.datasets, kind)
    which = {"split": split} if kind == "SVHN" else {"train": split == "train"}
    try:
        dataset = make(data_root(cfg), download=False, **which)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError):
        if not cfg.download:
            raise ValueError(
                f"data.root={data_root(cfg)}: {cfg.name} is not there, or not whole; "
                f"{data_set(cfg.name).how_to_get(cfg.name, data_root(cfg))}"
            ) from None
        dataset = _fetch(cfg, lambda: make(data_root(cfg), download=True, **which))
    pixels = torch.from_numpy(dataset.data)
    pixels = pixels if kind == "SVHN" else pixels.permute(0, 3, 1, 2)
    labels = dataset.labels if kind == "SVHN" else dataset.targets
    return pixels, torch.as_tensor(labels, dtype=torch.int64)


def _fetch(cfg: DataConfig, download: Callable[[], Any]) -> Any:
    """Return download(), with one line where the network or the md5 fails."""
    try:
        return download()
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.download=true: {cfg.name} could not be fetched ({error}); "
            f"{data_set(cfg.name).how_to_get(cfg.name, data_root(cfg))}"
        ) from None


def read_toy(cfg: DataConfig, split: str) -> Split:
    """One of the 2-D toys; the two splits are two draws."""
    count = cfg.points if split == "train" else -(-cfg.points // 5)
    return toy_points(cfg.name, count, seed=SPLITS.index(split))


def read_pictures(cfg: DataConfig, split: str) -> Split:
    """A folder or zip of pictures; see own.read_tree."""
    return own.read_tree(picture_tree(cfg), cfg, split)


def picture_tree(cfg: DataConfig) -> images.Tree:
    """Return the images.Tree of a data set that is a folder or zip of pictures.

    Raises:
        ValueError: another kind of data set, or no folder there.
    """
    row = DATASETS.get(cfg.name)
    if row is None or row.read is not read_pictures:
        names = [name for name, row in DATASETS.items() if row.read is read_pictures]
        raise ValueError(
            f"data.name={cfg.name}: is no folder of pictures; choose from {', '.join(names)}"
        )
    root = data_root(cfg)
    if row.folder and not (root / row.folder).is_dir():
        raise ValueError(f"data.root={root}: {row.folder} is not in it; it is at {row.url}")
    kind = kind_of_files(root)
    if kind.startswith("np") and root.is_file():
        raise ValueError(f"data.name={cfg.name}: {root} is an array; read it with data.name={kind}")
    return images.Tree(root / row.folder, "data.root", cfg.leave_out)


def class_names(cfg: DataConfig) -> list[str]:
    """Return the names of the classes 0, 1, ... of a folder of pictures; [] if it has none."""
    row = data_set(cfg.name)
    return own.class_folders(picture_tree(cfg)) if row.read is read_pictures else []


def read_hugging_face(cfg: DataConfig, split: str) -> Split:
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
    root = str(Path(cfg.root).expanduser()) if cfg.root.startswith("~") else cfg.root
    if not root:
        raise ValueError("data.root=: say which, a name such as mnist or a folder on disk")
    try:
        if any((Path(root) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            parts = datasets.load_from_disk(root)
        else:
            local = datasets.DownloadConfig(local_files_only=not cfg.download)
            parts = datasets.load_dataset(root, download_config=local)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"data.root={cfg.root}: `datasets` cannot load it ({str(error).splitlines()[0]}); "
            "with data.download=true it may fetch it, else give a folder of save_to_disk"
        ) from None
    parts = parts if isinstance(parts, dict) else {"train": parts}
    train = parts.get("train", next(iter(parts.values())))
    found = {split_of(name): part for name, part in parts.items()}
    held_out = found.get("test", found.get("validation"))
    held_out = None if held_out is train else held_out
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
    channels = cfg.channels or 3
    side = cfg.resolution
    first = _read_rows(rows, column, channels, [0])[0]
    shape = (channels, side, side) if side else tuple(first.shape)
    read = partial(_read_fitted_rows, rows, column, shape, side, cfg.crop)
    raw = partial(_read_row, rows, column)
    return OnDisk(read, shape, numbers, raw=raw), labels[numbers]


def _read_row(rows: Any, column: str, number: int) -> bytes:
    entry = rows[number][column]
    return entry["bytes"] or Path(entry["path"]).read_bytes()


def _read_rows(rows: Any, column: str, channels: int, numbers: list[int]) -> list[torch.Tensor]:
    """Return pictures (C, H, W) of any size."""
    entries = [rows[number][column] for number in numbers]
    files = [io.BytesIO(e["bytes"]) if e["bytes"] else e["path"] for e in entries]
    return [images.read_image(f, channels, f"row {n}") for f, n in zip(files, numbers)]


def _read_fitted_rows(
    rows: Any, column: str, shape: tuple[int, int, int], side: int, crop: str, numbers: list[int]
) -> torch.Tensor:
    pictures = _read_rows(rows, column, shape[0], numbers)
    return fit_pictures(pictures, shape, side, crop, [f"row {number}" for number in numbers])


def _idx_sums(test_images: str, test_labels: str, train_images: str, train_labels: str) -> dict:
    """Return the sha256 of the files whose md5 torchvision publishes, by name."""
    return {
        "t10k-images-idx3-ubyte.gz": test_images,
        "t10k-labels-idx1-ubyte.gz": test_labels,
        "train-images-idx3-ubyte.gz": train_images,
        "train-labels-idx1-ubyte.gz": train_labels,
    }


DATASETS = {
    "digits": DataSet(
        read=read_digits,
        shape=(1, 8, 8),
        classes=10,
        terms="UCI optical recognition of handwritten digits (E. Alpaydin, C. Kaynak), CC BY 4.0.",
        takes=(),
    ),
    "mnist": DataSet(
        read=partial(read_idx_files, kind="MNIST"),
        shape=(1, 28, 28),
        classes=10,
        terms="MNIST (LeCun, Cortes, Burges), commonly stated as CC BY-SA 3.0.",
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        folder="MNIST/raw",
        files="the four idx files",
        sha256=_idx_sums(
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
    ),
    "fashion_mnist": DataSet(
        read=partial(read_idx_files, kind="FashionMNIST"),
        shape=(1, 28, 28),
        classes=10,
        terms="Fashion-MNIST (Zalando SE), MIT licence.",
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        folder="FashionMNIST/raw",
        files="the four idx files",
        sha256=_idx_sums(
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
    ),
    "cifar10": DataSet(
        read=partial(read_torchvision, kind="CIFAR10"),
        shape=(3, 32, 32),
        classes=10,
        terms="CIFAR-10 (Krizhevsky 2009): research use, cite the technical report.",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        files="cifar-10-batches-py (unpacked)",
    ),
    "cifar100": DataSet(
        read=partial(read_torchvision, kind="CIFAR100"),
        shape=(3, 32, 32),
        classes=100,
        terms="CIFAR-100 (Krizhevsky 2009): research use, cite the technical report.",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        files="cifar-100-python (unpacked)",
    ),
    "svhn": DataSet(
        read=partial(read_torchvision, kind="SVHN"),
        shape=(3, 32, 32),
        classes=10,
        terms="SVHN (Netzer et al. 2011): non-commercial use only.",
        url="http://ufldl.stanford.edu/housenumbers/",
        files="train_32x32.mat and test_32x32.mat",
    ),
    "imagefolder": DataSet(read=read_pictures, takes=PICTURES),
    "zip": DataSet(read=read_pictures, takes=PICTURES),
    # A resolution of arrays is what they must have: see fill_in.
    "npz": DataSet(read=own.read_npz, takes=("root", "resolution", "holdout")),
    "npy": DataSet(read=own.read_npy, takes=("root", "resolution", "holdout")),
    "hf": DataSet(read=read_hugging_face, takes=PICTURES[:-1]),
    "latents": DataSet(read=latents.read_latents, takes=("root", "holdout"), latents=True),
    # Training pictures of the denoising papers; data.resolution= makes them of one size.
    "train400": DataSet(
        read=read_pictures,
        terms="400 grey pictures from BSDS500 (Arbelaez et al. 2011): non-commercial research.",
        url="https://github.com/cszn/DnCNN (TrainingCodes)",
        folder="denoise/Train400",
        takes=PICTURES,
        files="the 400 pictures",
    ),
    "cbsd400": DataSet(
        read=read_pictures,
        terms="BSDS500, train and test (Arbelaez et al. 2011): non-commercial research.",
        url="https://github.com/BIDS/BSDS500 (train and test)",
        folder="denoise/CBSD400",
        takes=PICTURES,
        files="the 400 pictures",
    ),
} | {
    name: DataSet(
        read=read_toy,
        shape=(2, 1, 1),
        classes=toy.parts,
        terms="Points drawn by genmodels.data.toys.",
        takes=("points",),
    )
    for name, toy in TOYS.items()
}


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """A data set that needs an account or a licence: only named, and read once it is converted.

    Attributes:
        url: where it is to be had.
        terms: on what terms.
        convert: words of `python -m genmodels.data` that make it ours.
    """

    url: str
    terms: str
    convert: str


BY_HAND = {
    "imagenet": ByHand(
        url="https://image-net.org/download.php (ILSVRC2012)",
        terms="non-commercial research; an account is needed",
        convert="convert TRAIN_FOLDER out=imagenet64.zip resolution=64 crop=lanczos",
    ),
    "ffhq": ByHand(
        url="https://github.com/NVlabs/ffhq-dataset",
        terms="CC BY-NC-SA 4.0",
        convert="convert FOLDER out=ffhq64.zip resolution=64 crop=lanczos",
    ),
}


def check_settings(cfg: DataConfig, prefix: str = "data.", plain: DataConfig | None = None) -> None:
    """Raise ValueError for a setting that would be ignored.

    Only what is asked for anew is checked: a model of an older version may hold such settings.

    Args:
        cfg: what is asked for.
        prefix: stands before the keys in an error.
        plain: what is not asked for; None: the defaults.
    """
    row = data_set(cfg.name)
    plain = plain or DataConfig()
    for key in SETTINGS_OF_SETS:
        value = getattr(cfg, key)
        if key not in row.takes and value != getattr(plain, key):
            remedy = f"leave it out (or set {prefix}{key}={getattr(plain, key)})"
            if key == "root" and prefix:
                remedy = f"leave it out, or name the kind: data.name={kind_of_files(value)}"
            raise ValueError(f"{prefix}{key}={value}: {cfg.name} does not take it; {remedy}")
    if cfg.crop != "none":
        needed = cfg.resolution or cfg.crop == plain.crop
        check(needed, f"{prefix}crop", cfg.crop, f"crops to {prefix}resolution=SIDE; give that too")
    unread = {} if cfg.noise.law else {"noise": "needs data.noise.law=; leave it out"}
    if not row.latents:
        unread["vae"] = "is for data.name=latents; leave it out"
    for section, remedy in unread.items():
        for item in fields(getattr(cfg, section)):
            value, default = (getattr(getattr(c, section), item.name) for c in (cfg, plain))
            check(value == default, f"{prefix}{section}.{item.name}", value, remedy)
    for key in ("flip", "pad") if row.latents else ():
        remedy = "changes pictures, not latents; do so before they are encoded"
        check(not getattr(cfg, key), f"{prefix}{key}", getattr(cfg, key), remedy)


def open_split(cfg: DataConfig, split: str) -> Split:
    """Return (images, labels) of one split as load_split, but sets of files always as OnDisk.

    Raises:
        ValueError: as load_split.
    """
    row = data_set(cfg.name)
    if split not in SPLITS:
        raise ValueError(f"split={split}: choose from {', '.join(SPLITS)}")
    pixels, labels = row.read(cfg, split)
    if isinstance(pixels, OnDisk):
        return replace(pixels, pad=cfg.pad), labels
    if cfg.device == "disk":
        raise ValueError(
            f"data.device=disk: {cfg.name} is read whole; convert it to .npy or .zip (python -m "
            "genmodels.data convert), or leave data.device out"
        )
    if cfg.pad:
        pixels = torch.nn.functional.pad(pixels, [cfg.pad] * 4)
    return pixels.contiguous(), labels


def load_split(cfg: DataConfig, split: str) -> Split:
    """Return (images uint8 (N, C, H, W), labels int64 (N,), -1 = none) of one split.

    The 2-D toys are float32 (N, 2, 1, 1) in [-1, 1], latents float32 (N, 2C, h, w), mean and std.
    With data.device=disk, sets of files come as OnDisk, which stands in for a tensor.

    Raises:
        ValueError: unknown data set or split, missing or broken files.
    """
    pixels, labels = open_split(cfg, split)
    return pixels if cfg.device == "disk" else in_memory(pixels), labels


def load_source(cfg: DataConfig, split: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the images of data.source, as load_split; their form is that of the data.

    Args:
        cfg: DataConfig of the run; its root, pad, points and holdout hold for both sets.
        split: "train" or "test".
        shape: (C, H, W) that they must have.

    Raises:
        ValueError: no such data set, missing files, another shape.
    """
    check(cfg.source in DATASETS, "data.source", cfg.source, f"choose from {', '.join(DATASETS)}")
    takes = DATASETS[cfg.source].takes
    of_both = {"points": cfg.points, "holdout": cfg.holdout, "root": cfg.source_root or cfg.root}
    if "crop" in takes:
        of_both |= {"resolution": shape[-1], "channels": shape[0]}
    settings = {key: value for key, value in of_both.items() if key in takes}
    check(
        not cfg.source_root or "root" in takes,
        "data.source_root",
        cfg.source_root,
        f"{cfg.source} does not take it; leave it out",
    )
    pad = 0 if "crop" in takes else cfg.pad
    source = DataConfig(name=cfg.source, pad=pad, download=cfg.download, **settings)
    pixels, _ = load_split(source, split)
    check(
        tuple(pixels.shape[1:]) == tuple(shape),
        "data.source",
        cfg.source,
        f"holds images {tuple(pixels.shape[1:])}, data.name={cfg.name} {tuple(shape)}; both must "
        "be alike",
    )
    return pixels


def in_memory(pixels: torch.Tensor | OnDisk) -> torch.Tensor:
    """Return the images as one tensor."""
    return pixels.load() if isinstance(pixels, OnDisk) else pixels


def _check_sides(cfg: DataConfig, row: DataSet, shape: Sequence[int]) -> None:
    """Raise ValueError if arrays are asked to have another side than they have."""
    check(
        "crop" in row.takes
        or not cfg.resolution
        or all(side == cfg.resolution + 2 * cfg.pad for side in shape[1:]),
        "data.resolution",
        cfg.resolution,
        f"{cfg.name} holds images {tuple(shape)} and is not resized; leave it out, or convert "
        "pictures with resolution=",
    )


def _classes_present(cfg: DataConfig, labels: torch.Tensor) -> list[int]:
    """Return the classes that have an image, where the labels are used and there are gaps.

    Raises:
        ValueError: there are far more classes than are seen.
    """
    seen = labels.unique().tolist()
    seen = seen[seen[:1] == [-1] :]
    count = int(labels.max()) + 1
    if not cfg.labels or len(seen) == count:
        return []
    if count > 1000 and count > 10 * len(seen):
        raise ValueError(
            f"data.labels=true: {cfg.name} numbers its {len(seen)} classes up to {count - 1}; "
            "number them from 0 with python -m genmodels.data convert SRC out=X.zip remap=true"
        )
    warnings.warn(f"data.labels=true: {gaps_in_words(seen)}; they are never drawn", stacklevel=2)
    return seen


def gaps_in_words(seen: Sequence[int]) -> str:
    """Return which of the classes below the largest have no image, in words; "" if none."""
    missing = sorted(set(range(max(seen, default=-1) + 1)).difference(seen))
    if not missing:
        return ""
    shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return f"{len(missing)} of the classes 0..{max(seen)} have no training image ({shown})"


def fill_in(
    cfg: DataConfig,
    pixels: torch.Tensor | OnDisk | None = None,
    labels: torch.Tensor | None = None,
) -> DataConfig:
    """Set cfg.shape, classes and present from the data set (its files are read only if need be).

    Args:
        cfg: changed in place, and returned.
        pixels, labels: of the training split, if they have been read already.

    Raises:
        ValueError: data.shape or data.classes was set by hand and is not what the data have.
    """
    row = data_set(cfg.name)
    if cfg.patch:
        cfg.shape = [cfg.channels or 3, cfg.patch, cfg.patch]
        cfg.classes = 0
        return cfg
    if row.shape is None or row.classes < 0:
        if pixels is None:
            if cfg.shape and cfg.classes >= 0:
                return cfg  # as saved with a model: its data need not be there
            pixels, labels = open_split(cfg, "train")  # the shape is in the header of one file
        shape = tuple(pixels.shape[1:])
        if row.latents:
            shape = latents.shape_of(pixels)
            latents.fill_in_vae(cfg)
        classes = int(labels.max()) + 1
        if cfg.classes < 0:  # not as saved with a model
            _check_sides(cfg, row, shape)
            cfg.present = _classes_present(cfg, labels)
    else:
        channels, height, width = row.shape
        shape = (channels, height + 2 * cfg.pad, width + 2 * cfg.pad)
        classes = row.classes
    if cfg.shape and list(cfg.shape) != list(shape):
        raise ValueError(f"data.shape={cfg.shape}: {cfg.name} has {list(shape)}; leave it out")
    if cfg.classes >= 0 and cfg.classes != classes:
        raise ValueError(f"data.classes={cfg.classes}: {cfg.name} has {classes}; leave it out")
    if cfg.labels and classes < 1:
        raise ValueError(f"data.labels=true: {cfg.name} at {data_root(cfg)} has no class labels")
    cfg.shape = list(shape)
    cfg.classes = classes
    return cfg
