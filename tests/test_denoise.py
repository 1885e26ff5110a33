"""sample.py MODEL denoise=PATH: noisy images in, restored ones out."""

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torch import nn

import genmodels
import sample
from genmodels import checkpoint, images
from genmodels.data import ImageDataModule
from genmodels.images import to_uint8


@pytest.fixture(scope="module")
def trained():
    """A GBM fitted to the digits, whose last layer is not zero."""
    model = genmodels.build(str(ROOT / "configs/gbm_digits.yaml"), *TINY, "method.sigma_max=1.5")
    model.prepare(ImageDataModule(model.cfg.data))
    torch.manual_seed(0)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    return model.eval()


def test_denoise_command(trained, tmp_path):
    """Files in, files out in their order; the level given or estimated."""
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    pixels = ImageDataModule(trained.cfg.data).held_out[0][:5]
    for i, picture in enumerate(pixels):
        (tmp_path / "noisy").mkdir(exist_ok=True)
        images.write_png(tmp_path / "noisy" / f"{i}.png", picture)
    words = [str(run), f"denoise={tmp_path}/noisy", "law=lognormal"]
    assert sample.main([*words, "level=0.2", f"out={tmp_path}/a"]) == 0
    expected = trained.restore(images.from_uint8(pixels), "lognormal", 0.2)[0]
    assert torch.equal(images.read_images(tmp_path / "a"), to_uint8(expected))
    assert sample.main([*words, "level=auto", "batch=2", f"out={tmp_path}/b"]) == 0
    assert len(list((tmp_path / "b").glob("[0-9]*.png"))) == 5
    floats = (pixels.permute(0, 2, 3, 1).numpy() * 1.5).astype(np.float32)  # beyond 255
    np.save(tmp_path / "noisy.npy", floats)
    assert (
        sample.main([*words, f"denoise={tmp_path}/noisy.npy", "level=0.2", f"out={tmp_path}/c"])
        == 0
    )
    noisy = torch.from_numpy(floats).permute(0, 3, 1, 2) / 127.5 - 1
    expected = trained.restore(noisy, "lognormal", 0.2)[0]
    assert torch.equal(images.read_images(tmp_path / "c"), to_uint8(expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["law=poisson", "level=1"], "law=poisson: choose from lognormal"),
        (["law=lognormal", "level=9"], "level=9.0: this model knows 0.005 to 1.5"),
        (["law=lognormal", "level=much"], "level=much: must be a number, or auto"),
        (["level=0.1"], "law=: choose from lognormal"),
        (["law=lognormal", "level=0.1", "steps=3"], "unknown key steps=3"),
        (["law=lognormal", "level=0.1", "denoise=nowhere"], "no such folder, .zip or .npz"),
    ],
)
def test_denoise_command_refuses(trained, tmp_path, capsys, words, message):
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    images.write_png(tmp_path / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    assert sample.main([str(run), f"denoise={tmp_path}/1.png", f"out={tmp_path}/o", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "o").exists()
