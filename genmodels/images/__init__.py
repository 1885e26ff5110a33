"""Images: as tensors (pixels), from files (read, arrays), and pictures of any size and depth."""

from genmodels.images.pixels import (
    CROPS,
    as_bytes,
    enlarge,
    fit,
    from_uint8,
    grid,
    level_bytes,
    mean_and_std,
    png_bytes,
    to_uint8,
    write_npz,
    write_png,
)
from genmodels.images.read import (
    SUFFIXES,
    Tree,
    picture_size,
    read_image,
    read_images,
    read_levels,
    read_samples,
    sample_tree,
)

__all__ = [
    "CROPS",
    "SUFFIXES",
    "Tree",
    "as_bytes",
    "enlarge",
    "fit",
    "from_uint8",
    "grid",
    "level_bytes",
    "mean_and_std",
    "picture_size",
    "png_bytes",
    "read_image",
    "read_images",
    "read_levels",
    "read_samples",
    "sample_tree",
    "to_uint8",
    "write_npz",
    "write_png",
]
