"""Describe, convert, encode and fetch data sets.

python -m genmodels.data info digits                          shape, counts, mean and std of a set
python -m genmodels.data info SRC [resolution=64]             of a folder, .zip, .npz or .npy
python -m genmodels.data convert SRC out=X.zip resolution=64 crop=lanczos     or out=X.npy
python -m genmodels.data encode SRC vae=VAE out=DIR resolution=512 crop=adm    latents to train on
python -m genmodels.data get [NAME root=DIR]                  public sets: what they are, fetch one

VAE is a folder, or OWNER/NAME on the hub, of diffusers' AutoencoderKL. Run by torchrun, every
process encodes its share; the same command goes on where it was killed.
"""

import difflib
import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genmodels import cli, images
from genmodels.atomic import whole_file, write_bytes
from genmodels.config import DataConfig, Section, setting, settings_of
from genmodels.config.load import kind_of_files
from genmodels.config.schema import EDM2_VAE, LARGEST_PAD
from genmodels.config.words import (
    DEVICES,
    check_choice,
    check_device,
    check_flags,
    help_text,
    split_words,
    typed_words,
)
from genmodels.data import latents
from genmodels.data.encode import STATISTICS, encode_pictures
from genmodels.data.own import Split
from genmodels.data.sets import (
    BY_HAND,
    DATASETS,
    SPLITS,
    check_settings,
    class_names,
    data_set,
    gaps_in_words,
    load_split,
    open_split,
)
from genmodels.distributed import is_first, pick_device
from genmodels.images import CROPS, OnDisk
from genmodels.images.autoencoder import load_autoencoder
from genmodels.run import check_output


@dataclass
class InfoOptions(Section):
    """How a set is read."""

    root: str = setting("", "where a named set lies")
    resolution: int = setting(
        0, "crop and resize pictures to this side; 0: they have one size", ge=0
    )
    crop: str = setting("center", "how", choices=CROPS)
    channels: int = setting(0, "1 grey, 3 colour; 0: 3 for pictures, arrays as they are")
    pad: int = setting(0, "background pixels on each side", ge=0, le=LARGEST_PAD)
    holdout: float = setting(0.05, "share held out of a set without a test part", ge=0, lt=1)
    points: int = setting(10_000, "training points of a 2-D toy", ge=1, le=10**8)
    download: bool = setting(False, "fetch a missing public set")


@dataclass
class ConvertOptions(InfoOptions):
    """What is written."""

    out: str = setting("", "what to write: X.zip (PNG and dataset.json, as EDM's) or X.npy")
    holdout: float = setting(0.0, "share put into test/ of a set without a test part", ge=0, lt=1)
    remap: bool = setting(False, "number the classes that have an image 0, 1, 2, ...")
    split: str = setting("all", "an .npy takes one of the two", choices=("all", *SPLITS))


@dataclass
class EncodeOptions(InfoOptions):
    """What becomes latents."""

    vae: str = setting(
        EDM2_VAE.name,
        "folder, or OWNER/NAME on the hub, of the VAE; the default is EDM2's",
    )
    out: str = setting("", "folder to make")
    holdout: float = setting(0.0, "share put into the test part of a set without one", ge=0, lt=1)
    statistics: str = setting(
        "auto",
        "of the latents' channels: edm2 has those of Stable Diffusion 1's VAEs, measured takes "
        "them from the pictures; auto: by the VAE",
        choices=STATISTICS,
    )
    batch: int = setting(16, "pictures at a time", ge=1)
    workers: int = setting(2, "threads that read pictures ahead", ge=1)
    device: str = setting("auto", "what computes", choices=DEVICES)


@dataclass
class GetOptions(Section):
    """Where a set goes."""

    root: str = setting("data", "folder to put it in")


def commands_help(doc: str) -> str:
    """Return the help of the command line."""
    lines = [doc.strip(), "", f"NAME: {', '.join(DATASETS)}", ""]
    for title, cls in (
        ("convert", ConvertOptions),
        ("encode", EncodeOptions),
        ("get", GetOptions),
    ):
        lines.append(help_text(cls, f"{title}:"))
    return "\n".join(lines)


def read_config(source: str, options: InfoOptions) -> DataConfig:
    """Return the DataConfig of a data set's name or the path of own data.

    Raises:
        ValueError: neither.
    """
    settings = {key: getattr(options, key) for key in settings_of(InfoOptions)}
    if source not in DATASETS:
        path = Path(source).expanduser()
        if not path.exists():
            near = difflib.get_close_matches(source, DATASETS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            choices = ", ".join(DATASETS)
            raise ValueError(f"data.name={source}: {hint}choose from {choices}, or a path")
        settings["root"] = source
        source = kind_of_files(path)
    cfg = DataConfig(name=source, **settings)
    nothing = type(options)()
    plain = DataConfig(**{key: getattr(nothing, key) for key in settings_of(InfoOptions)})
    check_settings(cfg, "", plain)
    return cfg


def info(sources: list[str], words: dict[str, str]) -> None:
    """Print what a data set holds."""
    options = InfoOptions(**typed_words(words, settings_of(InfoOptions)))
    cfg = read_config(_only(sources, "info NAME_OR_PATH [root= resolution=]"), options)
    rows = []
    of_latents = data_set(cfg.name).latents
    if of_latents:
        print(latents.in_words(cfg))
    for split in SPLITS:
        pixels, labels = open_split(cfg, split)
        if not len(pixels):
            continue
        if of_latents:
            mean, std = latents.mean_and_std(pixels, cfg.vae)
        else:
            mean, std = images.mean_and_std(pixels)
        counts = torch.bincount(labels[labels >= 0]).tolist()
        if split == "train" and (gaps := gaps_in_words(labels[labels >= 0].unique().tolist())):
            warnings.warn(f"{gaps}; convert with remap=true numbers them anew", stacklevel=2)
        rows.append(
            (
                split,
                len(pixels),
                latents.shape_of(pixels) if of_latents else tuple(pixels.shape[1:]),
                f"{mean:.4f}",
                f"{std:.4f}",
                f"{min(counts)}..{max(counts)}" if counts else "none",
                len(counts),
            )
        )
    columns = ("split", "images", "shape", "mean", "std (sigma_data)", "per class", "classes")
    scale = "the model's scale" if of_latents else "the [-1, 1] scale"
    cli.print_table(f"{cfg.name} on {scale}", columns, rows)


def convert(sources: list[str], words: dict[str, str]) -> None:
    """Write a data set as one .zip or .npy, all or nothing.

    The zip is EDM's: 00000/img00000000.png, ... and dataset.json with the labels; where there is a
    test part, the two lie below train/ and test/. The .npy is uint8 NHWC, labels in X_labels.npy.

    Raises:
        ValueError: what is read or asked for is wrong; nothing is written then.
    """
    options = ConvertOptions(**typed_words(words, settings_of(ConvertOptions)))
    source = _only(sources, "convert SRC out=X.zip [resolution=64 crop=lanczos]")
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
    check_output("out", out, [source])
    parts = _picture_parts(read_config(source, options), options.split)
    if options.remap:
        parts = _numbered_anew(parts)
    write = _write_zip if out.suffix == ".zip" else _write_npy
    count = write(out, parts)
    print(f"{count} images {tuple(next(iter(parts.values()))[0].shape[1:])}: {out}")


def encode(sources: list[str], words: dict[str, str]) -> None:
    """Write the latents of pictures as a folder to train on (data.root=DIR).

    Raises:
        ValueError: what is read or asked for is wrong.
    """
    options = EncodeOptions(**typed_words(words, settings_of(EncodeOptions)))
    source = _only(sources, "encode SRC vae=VAE out=DIR [resolution=512 crop=adm]")
    options.check(options.out, "out", "name the folder to make")
    check_device("device", options.device)
    out = Path(options.out).expanduser()
    check_output("out", out, [source], folder=True)
    cfg = read_config(source, options)
    parts = _picture_parts(cfg)
    about = encode_pictures(
        parts,
        out,
        load_autoencoder(options.vae, pick_device(options.device)),
        statistics=options.statistics,
        batch=options.batch,
        workers=options.workers,
        source={"name": cfg.name, "resolution": cfg.resolution, "crop": cfg.crop},
        class_names=class_names(cfg),
    )
    if is_first():
        print(
            f"{sum(about.splits.values())} images {about.pictures} as latents {about.shape}: {out}"
        )


def _picture_parts(cfg: DataConfig, split: str = "all") -> dict[str, Split]:
    """Return {split: (pictures, labels)} of the splits that hold any.

    Raises:
        ValueError: there is none, or they are no pictures.
    """
    wanted = SPLITS if split == "all" else (split,)
    parts = {split: open_split(cfg, split) for split in wanted}
    parts = {split: part for split, part in parts.items() if len(part[0])}
    if not parts:
        raise ValueError(f"split={split}: there is no image in it")
    if any(pixels.is_floating_point() for pixels, _ in parts.values()):
        what = "latents" if data_set(cfg.name).latents else "points in the plane"
        raise ValueError(f"data.name={cfg.name}: {what} are no pictures")
    return parts


def _numbered_anew(parts: dict[str, Split]) -> dict[str, Split]:
    """Return the parts with their classes numbered 0, 1, 2, ... in order; say what became what."""
    labels = torch.cat([labels for _, labels in parts.values()])
    seen = labels[labels >= 0].unique()
    if not len(seen):
        raise ValueError("remap=true: there are no labels; leave it out")
    changed = [f"{old} -> {new}" for new, old in enumerate(seen.tolist()) if new != old]
    print(f"{len(seen)} classes" + (f": {', '.join(changed)}" if changed else ""))

    def anew(labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels < 0, -1, torch.searchsorted(seen, labels))

    return {split: (pixels, anew(labels)) for split, (pixels, labels) in parts.items()}


def _write_zip(out: Path, parts: dict[str, Split]) -> int:
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


def _write_npy(out: Path, parts: dict[str, Split]) -> int:
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


def _labels_beside(out: Path) -> Path:
    return out.with_name(f"{out.stem}_labels.npy")


def _one_by_one(pixels: torch.Tensor | OnDisk) -> Iterator[torch.Tensor]:
    for part in pixels.split(64):
        yield from part


def get(sources: list[str], words: dict[str, str]) -> None:
    """Fetch a public data set, or print what there is."""
    options = GetOptions(**typed_words(words, settings_of(GetOptions)))
    public = [name for name, row in DATASETS.items() if row.url] + list(BY_HAND)
    if not sources:
        for name in public:
            row = DATASETS.get(name) or BY_HAND[name]
            print(f"{name:14} {row.url}\n{'':14} {row.terms}")
        return
    name = _only(sources, "get NAME [root=DIR]")
    if name in BY_HAND:
        row = BY_HAND[name]
        print(
            f"{name}: fetch it by hand from {row.url} ({row.terms}), then\n"
            f"  python -m genmodels.data {row.convert}"
        )
        return
    check_choice("name", name, tuple(public))
    row = data_set(name)
    root = Path(options.root).expanduser()
    print(f"{name}: {row.url}\n{row.terms}")
    for split in SPLITS:
        pixels, _ = load_split(DataConfig(name=name, root=str(root), download=True), split)
        print(f"{split}: {len(pixels)} images {tuple(pixels.shape[1:])} in {root}")
    for file, digest in row.sha256.items():
        path = root / row.folder / file
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise ValueError(f"root={root}: {file} has another sha256; fetch it again")
            print(f"{file}: sha256 {digest}")


def _only(sources: list[str], usage: str) -> str:
    if len(sources) != 1:
        raise ValueError(f"source={' '.join(sources)}: usage: python -m genmodels.data {usage}")
    return sources[0]


COMMANDS = {"info": info, "convert": convert, "encode": encode, "get": get}


def main(argv: list[str]) -> None:
    """Describe, convert, encode or fetch a data set; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(commands_help(__doc__))
        return
    command, *sources = positionals or [""]
    check_choice("command", command, tuple(COMMANDS))
    with cli.warnings_as_notes(late=True):
        COMMANDS[command](sources, words)
