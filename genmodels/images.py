"""Pictures: ranges, grids, and PNG, zip, npz and idx files in and out."""

import gzip
import io
import math
import os
import zipfile
import zlib
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.utils import make_grid

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def to_uint8(x):
    """Return images in [-1, 1] as uint8: clip(x * 127.5 + 128, 0, 255), truncated (EDM's rule)."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(images):
    """Return uint8 images as float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def mean_and_std(pixels):
    """Return mean and standard deviation, on the [-1, 1] scale, of uint8 images (N, C, H, W).

    Points in the plane (float32) are taken as they are.
    """
    if pixels.is_floating_point():
        return pixels.double().mean(), pixels.double().std()
    counts = sum(torch.bincount(part.flatten(), minlength=256) for part in pixels.split(1024))
    levels = from_uint8(torch.arange(256)).double()
    mean = (counts * levels).sum() / counts.sum()
    return mean, ((counts * (levels - mean) ** 2).sum() / (counts.sum() - 1)).sqrt()


def square(image, side):
    """Return the largest central square of the image (C, H, W), resized to side x side."""
    from torchvision.transforms.v2 import functional

    short = min(image.shape[-2:])
    return functional.resize(functional.center_crop(image, [short, short]), [side, side])


def grid(images, columns=None):
    """Return a contact sheet (3, H, W) uint8 of images (N, C, H, W) uint8, one pixel apart.

    Of points in the plane, (N, 2, 1, 1), it is a map (3, 128, 128) of how many lie where.
    """
    if images.shape[1:] == (2, 1, 1):
        return _density(images)
    columns = columns or max(1, round(len(images) ** 0.5))
    return make_grid(images.cpu(), nrow=columns, padding=1, pad_value=128)


def _density(points):
    """Return a map (3, 128, 128) of points (N, 2, 1, 1) as bytes; y grows upwards."""
    column, row = (points.cpu().flatten(1).long() // 2).T
    counts = torch.bincount((127 - row) * 128 + column, minlength=128**2).float()
    return (
        (255 * (counts / counts.max()).sqrt()).to(torch.uint8).reshape(1, 128, 128).repeat(3, 1, 1)
    )


def enlarge(image, factor):
    """Return the image (C, H, W) with every pixel repeated factor x factor times."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def write_png(path, image):
    """Write one uint8 image (C, H, W), C = 1 or 3, all or nothing.

    Raises:
        ValueError: points in the plane, or another number of channels.
    """
    if image.shape[0] not in (1, 3):
        raise ValueError(
            f"format=png: a picture has 1 or 3 channels, not {image.shape[0]}; write format=npz"
        )
    array = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def write_npz(path, **arrays):
    """Write arrays to an npz file, all or nothing."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def write_bytes(path, data):
    """Write a file through a temporary name in the same folder: a kill leaves old or new."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_image(file, channels=None, name=None):
    """Return one picture as uint8 (C, H, W), levels 0..255.

    Palettes become their colours. Alpha is dropped, not composited, as in the published protocols:
    a transparent pixel shows the colour stored under it. 16-bit grey v (0..65535) becomes
    round(v / 257); of 16-bit colour Pillow keeps the high byte.

    Args:
        file: path or open binary file.
        channels: 1 or 3 converts; None keeps grey as 1 channel and makes anything else 3.
        name: what errors call the file.

    Raises:
        ValueError: not a picture, truncated, or of more than 16 bits.
    """
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                picture = _to_8_bits(picture, name or file)
            if channels is None:
                channels = 1 if picture.mode in ("1", "L", "LA") else 3
            array = np.array(picture.convert("L" if channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image={name or file}: cannot be read ({error}); remove it") from None
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _to_8_bits(picture, name):
    """Return a grey picture of 16 bits as one of 8; Pillow's own conversion clips it at 255."""
    levels = np.asarray(picture)
    if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"image={name}: has more than 16 bits a pixel; convert it to 8 or 16 bits")
    return Image.fromarray(np.rint(levels / 257).astype(np.uint8))


def find_images(folder):
    """Return the picture files below a folder, sorted by path, without hidden ones."""
    paths = Path(folder).rglob("*")
    return sorted(path for path in paths if _is_picture(path.relative_to(folder)))


def _is_picture(path):
    """Return whether a relative path names a picture; nothing below .name or __MACOSX does."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def split_folders(root):
    """Return (the folder of the training pictures, that of the held-out ones or None)."""
    train = root / "train"
    if not train.is_dir():
        return root, None
    names = {file.relative_to(root).parts[0] for file in find_images(root)}
    for name in ("test", "val"):
        if name in names:
            return train, root / name
    # Beside other folders of pictures, train is a class: cars, planes, trains.
    return (train, None) if names <= {"train"} else (root, None)


def read_images(path, channels=None):
    """Return all images of a folder, zip or npz as one tensor, uint8 (N, C, H, W).

    Hidden files and the `grid.png` of sample.py are skipped. An npz holds `images` (or
    its first array) as uint8 NHWC or NHW.

    Raises:
        ValueError: nothing there, mixed sizes, or a broken picture.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return npz_images(path)[0]
    if path.suffix == ".zip" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in sorted(archive.namelist()) if _is_picture(PurePath(name))]
                names = [name for name in names if PurePath(name).name != "grid.png"]
                named = [(n, read_image(io.BytesIO(archive.read(n)), channels, n)) for n in names]
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"images={path}: cannot be read ({error}); fetch it again") from None
    elif path.is_dir():
        files = [file for file in find_images(path) if file.name != "grid.png"]
        named = [(file, read_image(file, channels)) for file in files]
    else:
        raise ValueError(f"images={path}: no such folder, .zip or .npz")
    if not named:
        raise ValueError(f"images={path}: holds no picture ({', '.join(SUFFIXES)})")
    first_name, first = named[0]
    for name, image in named:
        if image.shape != first.shape:
            raise ValueError(
                f"images={path}: mixed sizes, {name} is {tuple(image.shape)} but {first_name} is "
                f"{tuple(first.shape)}; resize them or, if grey and colour are mixed, convert them"
            )
    return torch.stack([image for _, image in named])


def npz_images(path, split=None):
    """Return (images uint8 (N, C, H, W), labels int64 (N,) or None) of an npz file.

    Looks for `{split}_images` and `{split}_labels` if a split is named, then for `images` and
    `labels`, then takes the first array.

    Raises:
        ValueError: not an npz, or not uint8 NHWC / NHW images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [f"{split}_images", "images", *file.files[:1]]
            name = next(name for name in names if name in file.files)
            images = file[name]
            label_name = f"{split}_labels" if name == f"{split}_images" else "labels"
            labels = file[label_name] if label_name in file.files else None
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"npz={path}: cannot be read ({type(error).__name__}: {error})") from None
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"npz={path}: {name} is {images.dtype} {images.shape}; must be uint8 (N, H, W, 1 or 3)"
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f"npz={path}: {label_name} has shape {labels.shape} for {len(images)} images; "
            "give one whole number for each image"
        )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return tensor, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def read_idx(path):
    """Return the uint8 array of an idx file (MNIST's format), gzipped if it ends in .gz.

    Raises:
        ValueError: not an idx file of bytes, or truncated.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
        if data[:3] != b"\0\0\x08":
            raise OSError("it does not begin as an idx file of bytes")
        start = 4 + 4 * data[3]
        shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
        size = len(data) - start
        if size != math.prod(shape):
            raise OSError(f"{size} bytes for shape {shape}")
    except (EOFError, OSError, IndexError, zlib.error) as error:
        raise ValueError(f"data={path}: cannot be read ({error}); fetch it again") from None
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
