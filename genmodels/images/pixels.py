"""Images as tensors: ranges, crops, contact sheets, and writing them. Reading: read.py."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from genmodels.atomic import write_bytes
from genmodels.images.arrays import OnDisk


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] as uint8: clip(x * 127.5 + 128, 0, 255), truncated (EDM's rule)."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Return images as uint8 for metrics: bytes as they are, points in the plane rounded."""
    return to_uint8(pixels) if pixels.is_floating_point() else pixels


def mean_and_std(pixels: torch.Tensor | OnDisk) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, on the [-1, 1] scale, of uint8 images (N, C, H, W).

    Points in the plane (float32) are taken as they are.
    """
    if pixels.is_floating_point():
        return pixels.double().mean(), pixels.double().std()
    counts = sum(torch.bincount(part.flatten(), minlength=256) for part in pixels.split(1024))
    values = from_uint8(torch.arange(256)).double()
    mean = (counts * values).sum() / counts.sum()
    return mean, ((counts * (values - mean) ** 2).sum() / (counts.sum() - 1)).sqrt()


CROPS = ("center", "lanczos", "adm", "none")


def fit(image: torch.Tensor, side: int, crop: str = "center") -> torch.Tensor:
    """Return the image (C, H, W) uint8 as side x side; side 0 leaves it as it is.

    Args:
        image: uint8 (C, H, W).
        side: pixels.
        crop: how. "center": the largest central square, then antialiased bilinear. "lanczos": the
            same square, then Pillow's Lanczos filter, as EDM's ImageNet-64 and FFHQ-64 were made.
            "adm": halved with a box filter while the short side is >= 2 side, then bicubic, then
            the central square, as the ImageNet of ADM and EDM2 was made. "none": has to have that
            size already.

    Raises:
        ValueError: crop="none" and another size.

    Reference: Dhariwal and Nichol 2021, arXiv 2105.05233 (adm); Karras et al. 2022, arXiv
    2206.00364 (lanczos).
    """
    if not side or image.shape[1:] == (side, side):
        return image
    if crop == "none":
        raise ValueError(
            f"crop=none: {tuple(image.shape)} is not {side} x {side}; write crop=center, lanczos "
            "or adm"
        )
    if crop == "adm":
        return _fit_adm(image, side)
    short = min(image.shape[-2:])
    if crop == "lanczos":
        top, left = ((size - short) // 2 for size in image.shape[-2:])
        square = image[:, top : top + short, left : left + short]
        return _of_pillow(_as_pillow(square).resize((side, side), Image.Resampling.LANCZOS))
    from torchvision.transforms.v2 import functional

    return functional.resize(functional.center_crop(image, [short, short]), [side, side])


def with_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the image (C, H, W) uint8 as grey (1 channel) or RGB (3), by Pillow's weights."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    return _of_pillow(_as_pillow(image).convert("L"))


def _fit_adm(image: torch.Tensor, side: int) -> torch.Tensor:
    picture = _as_pillow(image)
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    resized = _of_pillow(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = ((length - side) // 2 for length in resized.shape[-2:])
    return resized[:, top : top + side, left : left + side]


def _as_pillow(image: torch.Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if len(image) == 1 else array)


def _of_pillow(picture: Image.Image) -> torch.Tensor:
    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Return a contact sheet (3, H, W) uint8 of images (N, C, H, W) uint8, one pixel apart.

    Of points in the plane, (N, 2, 1, 1), it is a map (3, 128, 128) of how many lie where.
    """
    if images.shape[1:] == (2, 1, 1):
        return _density(images)
    from torchvision.utils import make_grid

    columns = columns or max(1, round(len(images) ** 0.5))
    return make_grid(images.cpu(), nrow=columns, padding=1, pad_value=128)


def contact_sheet(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Return a grid of the images, enlarged by a whole factor where it is under 512 pixels wide.

    Arguments as for grid().
    """
    sheet = grid(images, columns)
    return enlarge(sheet, max(1, 512 // sheet.shape[-1]))


def _density(points: torch.Tensor) -> torch.Tensor:
    """Return a map (3, 128, 128) of points (N, 2, 1, 1) as bytes; y grows upwards."""
    column, row = (points.cpu().flatten(1).long() // 2).T
    counts = torch.bincount((127 - row) * 128 + column, minlength=128**2).float()
    return (
        (255 * (counts / counts.max()).sqrt()).to(torch.uint8).reshape(1, 128, 128).repeat(3, 1, 1)
    )


def enlarge(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the image (C, H, W) with every pixel repeated factor x factor times."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def write_png(path: Path | str, image: torch.Tensor) -> None:
    """Write one uint8 image (C, H, W), C = 1 or 3, all or nothing.

    Raises:
        ValueError: points in the plane, or another number of channels.
    """
    write_bytes(path, png_bytes(image))


def png_bytes(image: torch.Tensor) -> bytes:
    """Return one uint8 image (C, H, W), C = 1 or 3, as PNG; see write_png."""
    if image.shape[0] not in (1, 3):
        raise ValueError(
            f"format=png: a picture has 1 or 3 channels, not {image.shape[0]}; write format=npz"
        )
    array = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def picture_bytes(values: np.ndarray, kind: str) -> bytes:
    """Return one picture (H, W, C), C = 1 or 3, as a file: the inverse of read_values.

    Args:
        values: uint8 or uint16, or float32 (H, W, 1) of a TIFF.
        kind: "png" or "tiff".
    """
    grey = values.shape[-1] == 1
    buffer = io.BytesIO()
    if values.dtype == np.uint16 and kind == "png":
        return _deep_png(values)
    if values.dtype == np.uint16 and not grey:
        import tifffile

        tifffile.imwrite(buffer, values, photometric="rgb")
    else:
        Image.fromarray(values[..., 0] if grey else values).save(buffer, kind.upper())
    return buffer.getvalue()


def _deep_png(values: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a channel, which Pillow writes of grey only.

    Reference: the PNG specification, third edition, W3C 2025: chunks IHDR, IDAT, IEND.
    """
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (1, 0)))  # filter 0 before each row: as it is
    colour = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    """Write arrays to an npz file, all or nothing."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
