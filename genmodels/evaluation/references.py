"""What images are scored against: images, or moments of their features, in files of any origin.

images      a data set, folder, .zip, .npz, .npy
npz         mu and sigma: `evaluate.py stats`, pytorch-fid, EDM; with `rows` of ours other scores
            than Frechet distances can be had too
npz of ADM  mu and sigma of the whole set beside arr_0, 10,000 of its images, from which
            precision and recall are taken
pkl         EDM2's: mu and sigma of Inception and of DINOv2; nothing in it is executed
URL         any of these by https://, http:// or hf://[datasets/]OWNER/NAME/FILE, fetched once;
            with #sha256=HEX behind it, no other file than that
"""

import hashlib
import http.client
import re
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels.atomic import whole_path
from genmodels.data.source import SourceImages, read_source
from genmodels.distributed import barrier, rank
from genmodels.evaluation.passes import Scored
from genmodels.evaluation.sources import Pictures
from genmodels.foreign import open_npz
from genmodels.images.arrays import npz_images
from genmodels.metrics.features import Features
from genmodels.metrics.frechet import Moments
from genmodels.metrics.stats import checked_stats, is_stats, load_rows, load_stats

PickleReader = Callable[[str], Any]  # the inert reader: path -> plain data and numpy arrays
_PATIENCE = 60  # seconds without a byte
LARGEST_FILE = 1 << 34  # bytes of a file that is fetched; ADM's of ImageNet have 2 GB
EDM2 = {"inception": "fid", "dinov2": "fd_dinov2"}  # features -> what EDM2's files call them


@dataclass(frozen=True)
class Reference:
    """A reference as it was read.

    Args:
        source: Pictures; or Scored, the moments of a file and its rows if it keeps them.
        images: Pictures beside the moments of a file, where there are any.
        known: "num", "shape" and "mean" of it, as far as they are known.
        splits: {"train": ..., "held_out": ...} of a data set, where asked for.
        named: the images of files or of a data set, or None.
    """

    source: Pictures | Scored
    images: Pictures | None = None
    known: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    named: SourceImages | None = None


def open_reference(
    source: str,
    features: Features,
    *,
    splits: bool = False,
    key: str = "reference",
    read_pickle: PickleReader | None = None,
    **options: Any,
) -> Reference:
    """Return the Reference that a word names.

    Args:
        source: see above.
        features: that moments must agree with.
        splits: also read both splits of a data set; of files there are none.
        key: the word's key, for errors.
        read_pickle: what reads a .pkl, executing nothing; None: it is refused.
        options: of read_source.

    Raises:
        ValueError: it cannot be read, is of other features, or cannot be fetched.
    """
    fetched: dict[str, Any] = {}
    path = source
    if is_url(source):
        path = str(fetch(source, key))
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = source.partition("#sha256=")[2].lower()
        if not sha256.startswith(wanted):
            raise ValueError(
                f"{key}={source}: its sha256 is {sha256}: another or a broken file; delete {path} "
                "to fetch it anew"
            )
        fetched = {"file": {"url": source, "sha256": sha256}}
        if rank() == 0:
            print(f"{key}: {source} is {path}, sha256 {sha256}")
    if path.lower().endswith(".pkl") and Path(path).is_file() and read_pickle:
        try:
            tables = read_pickle(path)
        except ValueError as error:
            raise ValueError(f"{key}={error}") from None
        moments = _edm2_moments(path, tables, features, key)
        return Reference(Scored([moments]), known=fetched)
    if is_stats(path):
        moments, meta = load_stats(path, features)
        rows = load_rows(path, len(moments.mean))
        scored = Scored([moments], rows)
        images = None if rows is not None else _images_beside(path)
        return Reference(scored, images, meta | fetched)
    named = read_source(path, key=key, **options)
    known = {"num": len(named.pixels), "shape": tuple(named.pixels.shape[1:])} | fetched
    held = named.splits() if splits else {}
    return Reference(Pictures(named.pixels), known=known, splits=held, named=named)


def _images_beside(path: str) -> Pictures | None:
    """Return the images in a file of moments, as ADM's have them, or None."""
    with open_npz(path) as file:
        if not {"arr_0", "images"} & set(file.files):
            return None
    return Pictures(npz_images(path)[0])


def _edm2_moments(path: str, tables: Any, features: Features, key: str) -> Moments:
    """Return the moments of these features in {"fid": {"mu": ..., "sigma": ...}, ...}."""
    name = EDM2.get(features.name, features.name)
    if not isinstance(tables, dict) or not isinstance(tables.get(name), dict):
        there = ", ".join(map(str, tables))[:100] if isinstance(tables, dict) else "none"
        raise ValueError(
            f"{key}={path}: has no {name}, which are the statistics of features={features.name} "
            f"(it has {there}); choose from features={', '.join(EDM2)}"
        )
    values = [tables[name].get(part) for part in ("mu", "sigma")]
    if not all(isinstance(value, np.ndarray) for value in values):
        raise ValueError(f"{key}={path}: {name} has no mu and sigma; fetch it again")
    warnings.warn(
        f"{key}={path} does not name the weights that made it: make sure that these are the same",
        stacklevel=3,
    )
    mean, cov = (torch.from_numpy(np.asarray(value, np.float64)) for value in values)
    return checked_stats(path, mean, cov, features)


class _Unfit(ValueError):
    """An address that is none; the text says of which word."""


def is_url(source: str) -> bool:
    """Return whether a source is to be fetched."""
    return re.match(r"(https?|hf)://", source) is not None


def fetch(url: str, key: str = "reference") -> Path:
    """Return the path of a file fetched into torch's cache (of hf:// into that of the hub), once.

    Args:
        url: https://..., http://... or hf://[datasets/]OWNER/NAME/PATH of the Hugging Face hub;
            what stands behind a # is not asked for.
        key: what errors call it.

    Raises:
        ValueError: no connection, no such file, or one of more than LARGEST_FILE bytes.
    """
    if rank() == 0:
        path = _fetched(url, key)
    barrier()
    return path if rank() == 0 else _fetched(url, key)


def _fetched(url: str, key: str) -> Path:
    address, _, pin = url.partition("#")
    if "#" in url and not re.fullmatch("sha256=[0-9a-fA-F]{8,64}", pin):
        raise ValueError(f"{key}={url}: behind # stands sha256=HEX, of 8 or more digits")
    try:
        if address.startswith("hf://"):
            return _from_hub(address, key)
        folder = hashlib.sha256(address.encode()).hexdigest()[:12]
        name = address.partition("?")[0].rstrip("/").rsplit("/", 1)[1]
        path = Path(torch.hub.get_dir()) / "references" / folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_path(path, several=True) as partial, open(partial, "wb") as file:
                with urllib.request.urlopen(address, timeout=_PATIENCE) as answer:
                    size = int(answer.headers.get("Content-Length") or -1)
                    while file.tell() <= LARGEST_FILE >= size and (block := answer.read(1 << 20)):
                        file.write(block)
                if max(size, file.tell()) > LARGEST_FILE:
                    raise OSError(f"it has more than {LARGEST_FILE / 1e9:.3g} GB")
                if file.tell() != size >= 0:
                    raise OSError(f"it broke off after {file.tell()} of {size} bytes")
    except _Unfit:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # of names, too
        reason = " ".join(str(getattr(error, "reason", error)).split())[:200]
        raise ValueError(
            f"{key}={url}: cannot be fetched ({reason}); fetch it elsewhere and name the file"
        ) from None
    return path


def _from_hub(url: str, key: str) -> Path:
    from huggingface_hub import hf_hub_download

    kind = "dataset" if url.startswith("hf://datasets/") else "model"
    parts = url.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise _Unfit(f"{key}={url}: write hf://OWNER/NAME/FILE or hf://datasets/OWNER/NAME/FILE")
    owner, name, file = parts
    return Path(hf_hub_download(f"{owner}/{name}", file, repo_type=kind))
