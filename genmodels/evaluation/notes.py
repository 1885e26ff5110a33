"""What a user should know of two sets of images before believing their scores."""

import warnings
from pathlib import PurePath

import torch

from genmodels.data.source import SourceImages
from genmodels.images import as_bytes

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
_LOOKED_AT = 64  # images of a set that are looked at
_SHARE = 0.01  # of a set, from which on copies are worth a line


def note_files(sets: dict[str, SourceImages]) -> None:
    """Warn of sets of which some are JPEG and others are not, and of grey saved as colour.

    Args:
        sets: {what a note calls it: its images}.
    """
    shares = {}
    for name, images in sets.items():
        suffixes = [PurePath(file.partition("[")[0]).suffix.lower() for file in images.files]
        if any(suffixes):  # those of arrays are numbers
            shares[name] = sum(suffix in LOSSY for suffix in suffixes) / len(suffixes)
        if images.files and _is_grey(images):
            warnings.warn(
                f"{name}: its pictures are grey, saved as colour; against real colour every score "
                "sees that first",
                stacklevel=2,
            )
    if shares and min(shares.values()) < 0.5 < max(shares.values()):
        lossy = ", ".join(name for name, share in shares.items() if share > 0.5)
        others = ", ".join(name for name, share in shares.items() if share <= 0.5)
        warnings.warn(
            f"{lossy}: JPEG, and {others}: not; scores see the compression too", stacklevel=2
        )


def _is_grey(images: SourceImages) -> bool:
    """Return whether all of some evenly chosen images have three equal channels."""
    count = len(images.pixels)
    if images.pixels.shape[1] != 3 or not count:
        return False
    pick = torch.linspace(0, count - 1, min(count, _LOOKED_AT)).round().long()
    some = as_bytes(images.pixels[pick])
    return bool((some[:, :1] == some).all())


def note_copies(name: str, marks: torch.Tensor | None, reference: torch.Tensor | None) -> None:
    """Warn of images that are copies of each other, or of images of the reference.

    Args:
        name: what a note calls the images.
        marks: int64 (N,), equal where images are, or None.
        reference: the same of the reference.
    """
    if marks is None:
        return
    count = len(marks)
    copies = count - len(marks.unique())
    if copies > _SHARE * count:
        warnings.warn(
            f"{name}: {copies} of {count} images are copies of others, byte for byte", stacklevel=2
        )
    shared = 0 if reference is None else int(torch.isin(marks, reference).sum())
    if shared > _SHARE * count:
        warnings.warn(
            f"{name}: {shared} of {count} images are in the reference, byte for byte: the scores "
            "say how well it was copied",
            stacklevel=2,
        )
