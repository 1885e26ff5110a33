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
        (["law=lognormal", "level=0.1", "format=npz"], "format=npz: choose from png"),
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


@pytest.mark.parametrize("value", [np.inf, np.nan, -300.0])
def test_a_bad_image_is_refused_before_any_is_written(trained, tmp_path, capsys, value):
    """The scale is 0..255 and the offset 1: -255 has no logarithm, nor has what is not finite."""
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    noisy = np.full((3, 8, 8, 1), 100, np.float32)
    noisy[2, 4, 4] = value
    np.save(tmp_path / "noisy.npy", noisy)
    words = [f"denoise={tmp_path}/noisy.npy", "law=lognormal", "level=0.2", "batch=1"]
    assert sample.main([str(run), *words, f"out={tmp_path}/o"]) == 2
    assert "keeps pixels finite, above -offset = -1.0" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    np.save(tmp_path / "noisy.npy", noisy[:0])
    assert sample.main([str(run), *words, f"out={tmp_path}/o"]) == 2
    assert "0 images of shape (1, 8, 8), must be one or more" in capsys.readouterr().err


def test_a_conditional_model_asks_for_labels(tmp_path, capsys):
    """Without one it would be given the embedding of no class, which no training has touched."""
    model = genmodels.build(str(ROOT / "configs/gbm_digits.yaml"), *TINY, "data.labels=true").eval()
    run = checkpoint.write_export(model, tmp_path / "model", "card")
    images.write_png(tmp_path / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    words = [str(run), f"denoise={tmp_path}/1.png", "law=lognormal", "level=0.1"]
    assert sample.main([*words, f"out={tmp_path}/o"]) == 2
    assert "labels=: this model was trained with a class" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert sample.main([*words, "labels=3", f"out={tmp_path}/o"]) == 0
