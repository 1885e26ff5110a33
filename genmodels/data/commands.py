"""Describe, convert and fetch data sets.

python -m genmodels.data info digits                          shape, counts, mean and std of a set
python -m genmodels.data info SRC [resolution=64]             of a folder, .zip, .npz or .npy
python -m genmodels.data convert SRC out=X.zip resolution=64 crop=adm     or out=X.npy
python -m genmodels.data get [NAME root=DIR]                  public sets: what they are, fetch one
"""

import difflib
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genmodels import cli, images
from genmodels.atomic import whole_file, write_bytes
from genmodels.config import DataConfig, Section, setting, settings_of
from genmodels.config.words import check_choice, check_flags, help_text, split_words, typed_words
from genmodels.data.sets import DATASETS, ON_DISK, PUBLIC, SPLITS, TERMS, load_split
from genmodels.images import CROPS


@dataclass
class InfoOptions(Section):
    """How a set is read."""

    root: str = setting("", "where a named set lies")
    resolution: int = setting(
        0, "crop and resize pictures to this side; 0: they have one size", ge=0
    )
    crop: str = setting("center", "how", choices=CROPS)
    channels: int = setting(0, "1 grey, 3 colour; 0: 3 for pictures, arrays as they are")
    pad: int = setting(0, "background pixels on each side", ge=0)
    holdout: float = setting(0.05, "share held out of a set without a test part", ge=0, lt=1)
    points: int = setting(10_000, "training points of a 2-D toy", ge=1)
    download: bool = setting(False, "fetch a missing public set")


@dataclass
class ConvertOptions(InfoOptions):
    """What is written."""

    out: str = setting("", "what to write: X.zip (PNG and dataset.json, as EDM's) or X.npy")
    holdout: float = setting(0.0, "share put into test/ of a set without a test part", ge=0, lt=1)
    split: str = setting("all", "an .npy takes one of the two", choices=("all", *SPLITS))


@dataclass
class GetOptions(Section):
    """Where a set goes."""

    root: str = setting("data", "folder to put it in")


# Sets that need an account or a licence: only named. (page, terms, how to make them ours)
BY_HAND = {
    "imagenet": (
        "https://image-net.org/download.php (ILSVRC2012)",
        "non-commercial research; an account is needed",
        "convert TRAIN_FOLDER out=imagenet64.zip resolution=64 crop=adm",
    ),
    "ffhq": (
        "https://github.com/NVlabs/ffhq-dataset",
        "CC BY-NC-SA 4.0",
        "convert FOLDER out=ffhq64.zip resolution=64",
    ),
}

# sha256 of the files whose md5 torchvision publishes: PATH without -ubyte.gz. Other sets rest on
# torchvision's md5 alone.
SHA256 = """
346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073 FashionMNIST/raw/t10k-images-idx3
67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5 FashionMNIST/raw/t10k-labels-idx1
3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84 FashionMNIST/raw/train-images-idx3
a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845 FashionMNIST/raw/train-labels-idx1
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 MNIST/raw/t10k-images-idx3
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 MNIST/raw/t10k-labels-idx1
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 MNIST/raw/train-images-idx3
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c MNIST/raw/train-labels-idx1
"""


def commands_help(doc):
    """Return the help of the command line."""
    lines = [doc.strip(), "", f"NAME: {', '.join(DATASETS)}", ""]
    for title, cls in (("convert", ConvertOptions), ("get", GetOptions)):
        lines.append(help_text(cls, f"{title}:"))
    return "\n".join(lines)


def read_config(source, options):
    """Return the DataConfig of a data set's name or the path of own data.

    Raises:
        ValueError: neither.
    """
    own = {key: getattr(options, key) for key in settings_of(InfoOptions)}
    if source not in DATASETS:
        path = Path(source).expanduser()
        if not path.exists():
            near = difflib.get_close_matches(source, DATASETS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            choices = ", ".join(DATASETS)
            raise ValueError(f"data.name={source}: {hint}choose from {choices}, or a path")
        own["root"] = source
        source = {".npz": "npz", ".npy": "npy", ".zip": "zip"}.get(path.suffix, "imagefolder")
    return DataConfig(name=source, **own)


def _one_pass(cfg):
    """Have files read as they are needed, for all of them may not fit into memory."""
    if cfg.name in ON_DISK:
        cfg.device = "disk"


def info(sources, words):
    """Print what a data set holds."""
    options = InfoOptions(**typed_words(words, settings_of(InfoOptions)))
    cfg = read_config(_only(sources, "info NAME_OR_PATH [root= resolution=]"), options)
    _one_pass(cfg)
    rows = []
    for split in SPLITS:
        pixels, labels = load_split(cfg, split)
        if not len(pixels):
            continue
        mean, std = images.mean_and_std(pixels)
        counts = torch.bincount(labels[labels >= 0]).tolist()
        rows.append(
            (
                split,
                len(pixels),
                tuple(pixels.shape[1:]),
                f"{mean:.4f}",
                f"{std:.4f}",
                f"{min(counts)}..{max(counts)}" if counts else "none",
                len(counts),
            )
        )
    columns = ("split", "images", "shape", "mean", "std (sigma_data)", "per class", "classes")
    cli.print_table(f"{cfg.name} on the [-1, 1] scale", columns, rows)


def convert(sources, words):
    """Write a data set as one .zip or .npy, all or nothing.

    The zip is EDM's: 00000/img00000000.png, ... and dataset.json with the labels; where there is a
    test part, the two lie below train/ and test/. The .npy is uint8 NHWC, labels in X_labels.npy.

    Raises:
        ValueError: what is read or asked for is wrong; nothing is written then.
    """
    options = ConvertOptions(**typed_words(words, settings_of(ConvertOptions)))
    source = _only(sources, "convert SRC out=X.zip [resolution=64 crop=adm]")
    out = Path(options.out).expanduser()
    if out.suffix not in (".zip", ".npy"):
        raise ValueError(f"out={options.out}: name a file that ends in .zip or .npy")
    if out.exists():
        raise ValueError(f"out={out}: exists; delete it or choose another name")
    if out.suffix == ".npy" and _labels_beside(out).exists():
        # They would be taken for the labels of the new images.
        raise ValueError(
            f"out={out}: {_labels_beside(out).name} exists; delete it or choose another name"
        )
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: its folder does not exist; make it first")
    cfg = read_config(source, options)
    _one_pass(cfg)
    wanted = SPLITS if options.split == "all" else (options.split,)
    parts = {split: load_split(cfg, split) for split in wanted}
    parts = {split: part for split, part in parts.items() if len(part[0])}
    if not parts:
        raise ValueError(f"split={options.split}: there is no image in it")
    if any(pixels.is_floating_point() for pixels, _ in parts.values()):
        raise ValueError(f"data.name={cfg.name}: points in the plane are no pictures")
    write = _write_zip if out.suffix == ".zip" else _write_npy
    count = write(out, parts)
    print(f"{count} images {tuple(next(iter(parts.values()))[0].shape[1:])}: {out}")


def _write_zip(out, parts):
    """Return how many images went into the zip; the same images give the same bytes."""
    entries = []
    # Stored, for PNG is packed already.
    with whole_file(out) as file, zipfile.ZipFile(file, "w") as archive:
        for split, (pixels, labels) in parts.items():
            prefix = f"{split}/" if len(parts) > 1 else ""
            for number, (image, label) in enumerate(zip(_one_by_one(pixels), labels.tolist())):
                name = f"{prefix}{number // 1000:05d}/img{number:08d}.png"
                archive.writestr(zipfile.ZipInfo(name), images.png_bytes(image))
                entries.append([name, label])
        known = any(label >= 0 for _, label in entries)
        text = json.dumps({"labels": entries if known else None})
        archive.writestr(zipfile.ZipInfo("dataset.json"), text)
    return len(entries)


def _write_npy(out, parts):
    """Return how many images went into the array."""
    if len(parts) > 1:
        raise ValueError(f"out={out}: an .npy holds one part; add split=train or split=test")
    ((pixels, labels),) = parts.values()
    count, channels, height, width = pixels.shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    try:
        with whole_file(out) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in _one_by_one(pixels):  # no memory map: there a full disk would be SIGBUS
                file.write(image.permute(1, 2, 0).contiguous().numpy())
            if labels.max() >= 0:
                buffer = io.BytesIO()
                np.save(buffer, labels.numpy())
                write_bytes(_labels_beside(out), buffer.getvalue())
    except BaseException:
        _labels_beside(out).unlink(missing_ok=True)
        raise
    return count


def _labels_beside(out):
    return out.with_name(f"{out.stem}_labels.npy")


def _one_by_one(pixels):
    for part in pixels.split(64):
        yield from part


def get(sources, words):
    """Fetch a public data set, or print what there is."""
    options = GetOptions(**typed_words(words, settings_of(GetOptions)))
    if not sources:
        rows = [(name, PUBLIC[name][0], TERMS[name]) for name in PUBLIC]
        rows += [(name, page, terms) for name, (page, terms, _) in BY_HAND.items()]
        for name, page, terms in rows:
            print(f"{name:14} {page}\n{'':14} {terms}")
        return
    name = _only(sources, "get NAME [root=DIR]")
    if name in BY_HAND:
        page, terms, command = BY_HAND[name]
        print(
            f"{name}: fetch it by hand from {page} ({terms}), then\n"
            f"  python -m genmodels.data {command}"
        )
        return
    check_choice("name", name, (*PUBLIC, *BY_HAND))
    root = Path(options.root).expanduser()
    print(f"{name}: {PUBLIC[name][0]}\n{TERMS[name]}")
    for split in SPLITS:
        pixels, _ = load_split(DataConfig(name=name, root=str(root), download=True), split)
        print(f"{split}: {len(pixels)} images {tuple(pixels.shape[1:])} in {root}")
    _check_sums(root, PUBLIC[name][1])


def _check_sums(root, place):
    """Compare the packed files below root/place with the known sums."""
    for line in SHA256.split("\n")[1:-1]:
        digest, name = line.split()
        path = root / f"{name}-ubyte.gz"
        if name.startswith(f"{place}/") and path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise ValueError(f"root={root}: {path.name} has another sha256; fetch it again")
            print(f"{path.name}: sha256 {digest}")


def _only(sources, usage):
    if len(sources) != 1:
        raise ValueError(f"source={' '.join(sources)}: usage: python -m genmodels.data {usage}")
    return sources[0]


COMMANDS = {"info": info, "convert": convert, "get": get}


def main(argv):
    """Describe, convert or fetch a data set; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(commands_help(__doc__))
        return
    command, *sources = positionals or [""]
    check_choice("command", command, tuple(COMMANDS))
    COMMANDS[command](sources, words)
