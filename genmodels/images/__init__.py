"""Images: as tensors (pixels), from files (read, tiff, arrays), pictures of any size and depth."""

from genmodels.images.arrays import OnDisk
from genmodels.images.pixels import (
    CROPS,
    as_bytes,
    contact_sheet,
    enlarge,
    fit,
    from_uint8,
    grid,
    mean_and_std,
    picture_bytes,
    png_bytes,
    to_uint8,
    write_npz,
    write_png,
)
from genmodels.images.read import (
    SUFFIXES,
    Tree,
    open_images,
    read_image,
    read_images,
    read_values,
    split_page,
)

__all__ = [
    "CROPS",
    "SUFFIXES",
    "OnDisk",
    "Tree",
    "as_bytes",
    "contact_sheet",
    "enlarge",
    "fit",
    "from_uint8",
    "grid",
    "mean_and_std",
    "open_images",
    "picture_bytes",
    "png_bytes",
    "read_image",
    "read_images",
    "read_values",
    "split_page",
    "to_uint8",
    "write_npz",
    "write_png",
]
