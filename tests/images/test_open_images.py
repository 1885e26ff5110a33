"""One way from a path to images: a picture, a folder, a zip, an npz or an npy."""

import zipfile

import numpy as np
import pytest
import torch

from genmodels import images


@pytest.fixture
def pixels(tmp_path):
    """Five pictures in every form."""
    tensor = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    nhwc = tensor.permute(0, 2, 3, 1).numpy()
    (tmp_path / "folder").mkdir()
    for k, picture in enumerate(tensor):
        images.write_png(tmp_path / "folder" / f"{k}.png", picture)
    images.write_png(tmp_path / "folder" / "grid.png", images.grid(tensor))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for k in range(5):
            archive.write(tmp_path / "folder" / f"{k}.png", f"{k}.png")
    np.savez(tmp_path / "a.npz", images=nhwc)
    np.save(tmp_path / "a.npy", nhwc)
    return tensor


@pytest.mark.parametrize(
    ("form", "on_disk"),
    [("folder", True), ("a.zip", True), ("a.npy", True), ("a.npz", False)],
)
def test_every_form_gives_the_same_images(tmp_path, pixels, form, on_disk):
    opened, names = images.open_images(tmp_path / form)
    assert isinstance(opened, images.OnDisk) == on_disk
    assert tuple(opened.shape) == (5, 3, 6, 4)
    assert torch.equal(opened[torch.tensor([3, 1])], pixels[[3, 1]])
    ending = "" if form in ("a.npy", "a.npz") else ".png"
    assert names == [f"{k}{ending}" for k in range(5)]
    assert torch.equal(images.read_images(tmp_path / form), pixels)


def test_a_picture_is_a_path_too(tmp_path, pixels):
    opened, names = images.open_images(tmp_path / "folder" / "2.png")
    assert torch.equal(opened, pixels[2:3]) and names == ["2.png"]
    assert images.read_images(str(tmp_path / "folder" / "2.png"), 1).shape == (1, 1, 6, 4)
