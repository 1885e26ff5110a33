"""Pickles of EDM2's layout: what is read, what is refused. That the images are those of the
released classes was checked with them, outside of these tests: they have another licence."""

import numpy as np
import pytest
import torch

from genmodels import checkpoint
from genmodels.checkpoint.edm_pickles import convert, load_released, read_released
from genmodels.networks.edm2_unet import EDM2UNet, EDM2UNetConfig, UnitUncertainty
from genmodels.networks.precond import PRECONDS
from tests.helpers.edm_reference import released_edm2, write

SMALL = {"channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [8]}


@pytest.fixture(scope="module")
def network():
    """(raw network, u, {released name: tensor}) with numbers that float16 has."""
    torch.manual_seed(0)
    net, uncertainty = EDM2UNet(EDM2UNetConfig(**SMALL), (3, 16, 16), 4), UnitUncertainty()
    for part in (net, uncertainty):
        for tensor in part.state_dict().values():
            tensor.copy_((tensor + 0.1 * torch.randn(tensor.shape)).half())
    tensors = {f"unet.{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"logvar_{key}": value for key, value in uncertainty.state_dict().items()}
    return net, uncertainty, tensors


def test_an_edm2_pickle_becomes_the_same_denoiser(network, tmp_path):
    net, uncertainty, tensors = network
    spec, read = read_released(write(tmp_path, released_edm2(tensors)))
    assert spec["network"] == {"name": "edm2_unet", "dropout": 0.1, **SMALL}
    assert (spec["shape"], spec["classes"]) == ([3, 16, 16], 4)
    assert all(torch.equal(read[key], value) for key, value in tensors.items())
    model = checkpoint.load(convert(tmp_path / "network.pkl", tmp_path / "export"))
    assert (model.cfg.method.steps, model.cfg.method.uncertainty) == (32, True)
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.02, 0.7, 30.0])
    labels = torch.tensor([0, 3, 1])
    with torch.no_grad():
        truth = PRECONDS["edm"](net, 0.5).eval()(x, sigma, labels)
        assert torch.equal(model.denoise(x, sigma, labels), truth)
        assert torch.equal(model.uncertainty(sigma.log()), uncertainty(sigma.log()))


@pytest.fixture(scope="module")
def of_latents():
    """{released name: tensor} of a network of latents."""
    torch.manual_seed(0)
    net = EDM2UNet(EDM2UNetConfig(**SMALL), (4, 16, 16))
    tensors = {f"unet.{key}": value for key, value in net.state_dict().items()}
    return tensors | {f"logvar_{key}": v for key, v in UnitUncertainty().state_dict().items()}


def test_one_of_latents_brings_its_vae_along(of_latents, tmp_path):
    path = write(tmp_path, released_edm2(of_latents, channels=4, classes=0, vae=True))
    model = checkpoint.load(convert(path, tmp_path / "export"))
    cfg = model.cfg.data
    assert (cfg.name, cfg.vae.name, cfg.vae.pixels, model.shape) == (
        "latents",
        "stabilityai/sd-vae-ft-mse",
        "0..1",
        (4, 16, 16),
    )
    # Exactly: the scale of models that were trained here, which it may guide.
    assert cfg.vae.mean == [5.81, 3.25, 0.12, -2.15] and cfg.vae.std == [4.17, 4.62, 3.71, 3.28]
    assert "stabilityai/sd-vae-ft-mse" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(ValueError, match="data=cifar10: 'ema' was trained on latents"):
        load_released(path, data="cifar10")


def test_latents_without_an_encoder_are_taken_for_edm2s(of_latents, tmp_path):
    path = write(tmp_path, released_edm2(of_latents, channels=4, classes=0, vae=None))
    with pytest.warns(UserWarning, match="says of no encoder: stabilityai/sd-vae-ft-mse"):
        vae = read_released(path)[0]["vae"]
    assert (vae["mean"][0], vae["std"][3]) == (5.81, 3.28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "TinyEncoder"}, "its encoder must be of pixels or .*: TinyEncoder"),
        ({"scale": np.array([1, 1, 1], np.float32)}, "is not an EDM network"),
        ({"scale": np.array([1, 1, 1, -1], np.float32)}, "data.vae.std=.*must be > 0"),
        ({"bias": np.array([np.nan, 1, 1, 1], np.float32)}, "data.vae.mean=.*must be finite"),
        ({"vae_name": 7}, "vae_name of the encoder is no name"),
        ({"scale": 0.5}, "is not an EDM network"),
    ],
)
def test_other_encoders_are_refused(of_latents, change, message, tmp_path):
    path = write(tmp_path, released_edm2(of_latents, channels=4, classes=0, vae=change))
    with pytest.raises(ValueError, match=message):
        read_released(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"res_balance": 0.4}, "res_balance must be 0.3, found 0.4"),
        ({"attn_balance": 0.5}, "attn_balance must be 0.3"),
        ({"clip_act": None}, "clip_act must be 256.0, found None"),
        ({"resample_filter": [1, 3, 3, 1]}, "resample_filter must be .1, 1., found .1, 3, 3, 1"),
        ({"num_heads": 3}, "num_heads must be [01], found 3"),
        ({"unet": [("label_balance", 0.3)]}, "unet.label_balance must be 0.5"),
        ({"unet": [("concat_balance", 0.3)]}, "unet.concat_balance must be 0.5"),
    ],
)
def test_other_constants_are_refused(network, change, message, tmp_path):
    path = write(tmp_path, released_edm2(network[2], **change))
    with pytest.raises(ValueError, match=message):
        read_released(path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(network, change, tmp_path):
    tensors = dict(network[2])
    name = "unet.dec.8x8_in0.attn_proj.weight"
    if change == "missing":
        del tensors["unet.dec.8x8_in1.emb_linear.weight"]
        name = "unet.dec.8x8_in1.emb_linear.weight"
    elif change == "extra":
        name = "unet.dec.8x8_in1.attn_proj.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=name):
        read_released(write(tmp_path, released_edm2(tensors)))
