"""The Lanczos crop against what EDM's own tool made, by sums."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import images
from genmodels.config import DataConfig
from genmodels.data import load_split

# (height, width, side) of each own picture, every fourth grey, and the first 16 digits of the
# sha256 of the RGB bytes that NVlabs/edm made of it: dataset_tool.py, --transform=center-crop,
# Pillow 13.0.0.
SUMS = {
    (96, 96, 64): "597eecbf44f7057d",
    (64, 64, 64): "f48449f00fa8808e",
    (97, 131, 64): "9b5670a772b22edd",
    (131, 97, 64): "105b46a81d4f640e",
    (500, 375, 64): "b979a7a021fea9e2",
    (375, 500, 64): "ea52d3259d67acf5",
    (333, 500, 32): "bdc76470b7448bc8",
    (500, 334, 64): "4c5fc8e613557e1c",
    (50, 70, 64): "b6b42be3b9b2c721",
    (33, 21, 64): "13f0ef4ed1e5c549",
    (64, 65, 64): "f4dbb117eb9c5641",
    (65, 64, 64): "ae9ee3e0c48a518a",
    (128, 127, 64): "bf5ecd977a6c4b80",
    (256, 256, 64): "06db4fe1be7ac54a",
    (255, 201, 64): "9315086aecf0019b",
    (400, 100, 64): "95715391b8e08baf",
    (101, 401, 28): "e01a9da546fe8c77",
    (77, 300, 32): "327029a50056f718",
    (20, 20, 64): "8185d4ac140db020",
    (641, 480, 64): "60ad1d3cc5a11d1a",
}


def own_picture(number, height, width):
    """Return a picture with slopes, edges and texture, uint8 (H, W, 3), the same everywhere."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    levels = [
        (number * 37 + x * (3 + c) + y * (5 - c) + (x * y // (7 + number)) % (11 + c)) % 256
        for c in range(3)
    ]
    levels[1] = np.where((x // 9 + y // 5) % 2, levels[1], 255 - levels[1])
    return np.stack(levels, -1).astype(np.uint8)


def sum_of(pixels):
    """Return the first 16 digits of the sha256 of uint8 (C, H, W), row by row."""
    return hashlib.sha256(pixels.permute(1, 2, 0).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("number", "case"), enumerate(SUMS))
def test_lanczos_makes_the_bytes_of_edms_tool(number, case):
    height, width, side = case
    array = own_picture(number, height, width)
    array = array[..., 0] if number % 4 == 3 else array
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    made = images.fit(images.read_image(buffer, 3), side, "lanczos")
    assert made.shape == (3, side, side) and sum_of(made) == SUMS[case]


def test_lanczos_of_grey_is_that_of_each_channel():
    image = torch.from_numpy(own_picture(0, 60, 41)).permute(2, 0, 1)
    whole = images.fit(image, 16, "lanczos")
    parts = [images.fit(channel[None], 16, "lanczos") for channel in image]
    assert torch.equal(torch.cat(parts), whole)


def test_a_data_set_is_cropped_by_it(tmp_path):
    (case,) = (case for case in SUMS if case[:2] == (97, 131))
    number = list(SUMS).index(case)
    Image.fromarray(own_picture(number, 97, 131)).save(tmp_path / "a.png")
    cfg = DataConfig(
        name="imagefolder", root=str(tmp_path), resolution=64, crop="lanczos", holdout=0.0
    )
    pixels, _ = load_split(cfg, "train")
    assert sum_of(pixels[0]) == SUMS[case]
