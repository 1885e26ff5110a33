"""Feature extractors against known accuracies, Pillow, torch-fidelity and each other."""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.metrics import (
    DIGITS_SHA256,
    Features,
    Moments,
    extract,
    feature_rows,
    frechet_distance,
    load_features,
    mode_difference,
    nn1,
)
from genmodels.metrics.features import dinov2
from genmodels.metrics.features.grey_nets import GREY_NETS, weights_file


@pytest.fixture(scope="module")
def digits():
    """Training and held-out images with labels."""
    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    order = np.random.default_rng(0).permutation(1797)
    train, held = order[:1437], order[1437:]
    labels = torch.from_numpy(data.target)
    return images[train], labels[train], images[held], labels[held]


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def pictures(*shape, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))


def fd(a, b):
    return float(frechet_distance(Moments().update(a), Moments().update(b)))


# --- the in-tree nets ----------------------------------------------------------------------------


def test_digits_net_knows_digits(digits):
    train, _, held, labels = digits
    features = load_features("digits")
    rows = extract(features, held)
    assert rows.shape == (360, features.dim) and rows.dtype == torch.float32
    logits = features.net.logits(rows.double())
    assert (logits.argmax(1) == labels).double().mean() >= 0.98
    assert torch.nn.functional.cross_entropy(logits, labels) < 0.2
    assert extract(features, train).var(0).mean() == pytest.approx(1, rel=1e-3)


def test_digits_features_tell_a_gaussian_from_digits(digits):
    train, _, held, _ = digits
    flat = train.flatten(1).double()
    values, vectors = torch.linalg.eigh(flat.T.cov())
    gaussian = normal(360, 64) * values.clamp(min=0).sqrt() @ vectors.T + flat.mean(0)
    gaussian = gaussian.clamp(0, 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    digits_net = load_features("digits")
    real, fake, reference = (extract(digits_net, x) for x in (train[:360], gaussian, held))
    assert fd(real, reference) < 1 < 4 < fd(fake, reference)
    assert nn1(real, reference) < 0.6 < 0.75 < nn1(fake, reference)


@pytest.mark.parametrize(
    "name, accuracy, resize, size",
    [
        ("digits", 0.98, "none", 300_000),
        ("fashion", 0.9, "crop28", 1_000_000),
        ("mnist", 0.99, "crop28", 1_000_000),
    ],
)
def test_shipped_file_is_the_one_that_is_named(name, accuracy, resize, size):
    features, path = load_features(name), weights_file(name)
    assert features.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert features.resize == resize and features.dim == GREY_NETS[name].dim
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card["heldout_accuracy"] >= accuracy and card["seed"] == 0
    assert {"data", "command", "versions"} <= card.keys()
    assert path.stat().st_size < size


@pytest.mark.parametrize(
    "name, data, accuracy", [("fashion", "fashion_mnist", 0.9), ("mnist", "mnist", 0.985)]
)
def test_net_of_28_pixels_knows_its_images(name, data, accuracy):
    try:
        images, labels = load_split(DataConfig(name=data), "test")
    except ValueError as error:
        pytest.skip(str(error))
    images, labels = images[:2000], labels[:2000]
    features = load_features(name)
    rows = extract(features, images)
    logits = features.net.logits(rows.double())
    assert (logits.argmax(1) == labels).double().mean() >= accuracy
    assert rows.var(0).mean() == pytest.approx(1, rel=0.1)
    padded = torch.nn.functional.pad(images[:300], [2] * 4)
    assert torch.equal(extract(features, padded), rows[:300])


def test_other_weights_are_refused(tmp_path):
    data = bytearray(weights_file("digits").read_bytes())
    (tmp_path / "copy").write_bytes(data)
    assert load_features("digits", weights=tmp_path / "copy").sha256 == DIGITS_SHA256
    data[-1] ^= 1
    (tmp_path / "copy").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"needs {DIGITS_SHA256}")):
        load_features("digits", weights=tmp_path / "copy")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_features("digits", weights=tmp_path / "none")


# --- rows ----------------------------------------------------------------------------------------


def test_28_pixel_net_crops_padding_and_refuses_the_rest():
    features, images = load_features("fashion"), pictures(3, 1, 32, 32)
    rows = extract(features, images)
    assert torch.equal(rows, extract(features, images[..., 2:-2, 2:-2]))
    assert not torch.equal(rows, extract(features, images[..., 1:-3, 2:-2]))
    for shape in ((3, 32, 32), (1, 30, 30)):
        with pytest.raises(ValueError, match=r"\(1, 28, 28\) or \(1, 32, 32\), got"):
            extract(features, pictures(2, *shape))


def test_rows_come_block_by_block_whatever_the_blocks_are(digits):
    images, features = digits[0][:100], load_features("digits")
    whole = list(feature_rows(features, images, batch=32))
    assert [len(rows) for rows in whole] == [32, 32, 32, 4]
    for sizes in ([100], [1, 2, 3, 94], [31, 0, 69], [64, 32, 4]):
        blocks = iter(images.split(sizes))
        rows = list(feature_rows(features, blocks, batch=32))
        assert all(torch.equal(a, b) for a, b in zip(rows, whole)) and len(rows) == 4
    taken = []
    blocks = (taken.append(k) or images[10 * k : 10 * k + 10] for k in range(10))
    next(feature_rows(features, blocks, batch=20))
    assert taken == [0, 1]  # no image is asked for before it is needed
    with pytest.raises(ValueError, match=r"one shape, got \(1, 8, 8\) and \(1, 9, 8\): resize"):
        list(feature_rows(features, [images, pictures(2, 1, 9, 8)], batch=64))
    with pytest.raises(ValueError, match="at least one image, got 0"):
        list(feature_rows(features, []))


@pytest.mark.slow
def test_the_script_still_makes_the_shipped_digits_net(tmp_path):
    from benchmarks import feature_nets

    out = tmp_path / "digits.safetensors"
    assert feature_nets.main(["digits", f"out={out}"]) == 0
    made, shipped = load_file(out), load_file(weights_file("digits"))
    for key, value in shipped.items():  # another processor: other last digits
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-5)
    assert feature_nets.main(["digit"]) == 2


@pytest.mark.parametrize("name", ["digits", "pixels"])
def test_a_row_does_not_depend_on_its_company(digits, name):
    images, features = digits[0][:300], load_features(name)
    rows = extract(features, images)
    assert torch.equal(extract(features, images[:5]), rows[:5])
    flipped = extract(features, images.flip(0)).flip(0)
    torch.testing.assert_close(flipped, rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(extract(features, images, batch=7), rows, rtol=1e-6, atol=1e-6)


def test_a_net_always_sees_a_full_batch_in_its_own_precision():
    seen, weight = [], torch.nn.Parameter(torch.ones(2, 2))

    def net(images):
        rows = torch.ones(len(images), 2) @ weight
        tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        seen.append((len(images), rows.dtype, *tf32))
        return rows

    features = Features("mine", None, "none", 2, net)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = extract(features, torch.zeros(10, 3, 4, 4, dtype=torch.uint8), batch=4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(4, torch.float32, False, "highest")] * 3
    assert rows.shape == (10, 2) and rows.dtype == torch.float32 and not rows.requires_grad


def test_fast_mode_is_measured_against_the_exact_one(digits):
    images, exact = digits[0][:200], load_features("digits")
    fast = load_features("digits", mode="fast")
    assert (fast.mode, fast.exact.mode) == ("fast", "exact") and fast.sha256 == exact.sha256
    a, b = (extract(net, images[:50]).double() for net in (fast, exact))
    truth = float((a - b).norm() / (b - b.mean(0)).norm())
    assert 0 < truth < 1e-5
    assert mode_difference(fast, images, num=50) == pytest.approx(truth, rel=1e-9)
    assert mode_difference(exact, images) is None
    with pytest.raises(ValueError, match="mode=quick: choose exact or fast"):
        load_features("digits", mode="quick")


def test_any_callable_gives_named_outputs_of_one_pass():
    calls = []

    def net(images):
        calls.append(len(images))
        x = images.float()
        return {"mean": x.mean(dim=(2, 3)), "top": x.amax(dim=(2, 3)), "more": None}

    features = Features("mine", "0" * 64, "none", 3, net, batch=4, outputs=("mean", "top"))
    assert load_features(features) is features
    images = pictures(6, 3, 5, 5)
    rows = extract(features, images, outputs=("top", "mean"))
    assert list(rows) == ["top", "mean"] and calls == [4, 4]
    assert torch.equal(rows["top"], images.amax(dim=(2, 3)).float())
    assert torch.equal(extract(features, images), rows["mean"])
    with pytest.raises(ValueError, match="features=mine has no more, only mean, top"):
        extract(features, images, outputs=("more",))
    with pytest.raises(ValueError, match=r"one row per image, \(B,D\), got NoneType for 2 images"):
        Features("mine", None, "none", 3, net, outputs=("more",))(images[:2])


def test_rows_that_are_not_finite_are_named():
    def net(images):
        return images.flatten(1).float() / images[:, 0, :1, 0]  # 0/0 for a black corner

    images = pictures(8, 1, 2, 2).clamp(min=1)
    images[5] = 0
    message = "mine: features of images from 4 on must be finite, got NaN or infinite .* 1 of 4"
    with pytest.raises(ValueError, match=message):
        extract(Features("mine", None, "none", 4, net, batch=4), images)
    with pytest.raises(ValueError, match="weights=.*: sha256 is .*, not 12345678"):
        load_features("digits", sha256="12345678")


# --- DINOv2 --------------------------------------------------------------------------------------


def test_dinov2_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="features=dinov2 needs timm: pip install timm"):
        load_features("dinov2", "file")


def test_position_embeddings_follow_the_shifted_grid():
    # Torch's cubic keeps a ramp within 0.05: target i reads source (i + 1/2) 37/16.1 - 1/2.
    ramp = torch.arange(37.0).expand(37, 37)
    grid = torch.stack([ramp, ramp.T, torch.ones(37, 37)], dim=-1).reshape(1, 37 * 37, 3)
    token = torch.full((1, 1, 3), 7.0)
    whole = dinov2.position_embeddings(torch.cat([token, grid], dim=1), 16)
    assert whole.shape == (1, 257, 3) and torch.equal(whole[:, :1], token)
    got = whole[0, 1:].reshape(16, 16, 3)
    truth = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    size = (torch.arange(16) + 0.5) * 37 / 16 - 0.5  # what asking for the size would read
    for line in (got[5, 1:-1, 0], got[1:-1, 5, 1]):
        assert (line - truth[1:-1]).abs().max() < 0.06 < 0.15 < (line - size[1:-1]).abs().max()
    torch.testing.assert_close(got[..., 2], torch.ones(16, 16))
    assert torch.equal(dinov2.position_embeddings(whole, 16), whole)


def test_dinov2_is_timms_network_on_pillows_resize(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr(dinov2, "NAME", "vit_small_patch14_dinov2")
    torch.manual_seed(0)
    state = timm.create_model(dinov2.NAME, num_classes=0).state_dict()  # for 37 x 37 patches
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    images = pictures(2, 3, 40, 32)
    rows = extract(load_features("dinov2", tmp_path / "dinov2.pth"), images, batch=2)
    x = np.stack(
        [
            Image.fromarray(np.asarray(image.permute(1, 2, 0))).resize((224, 224), Image.BICUBIC)
            for image in images
        ]
    )
    x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    net = timm.create_model(dinov2.NAME, num_classes=0, img_size=224).eval()
    net.load_state_dict(state | {"pos_embed": dinov2.position_embeddings(state["pos_embed"], 16)})
    truth = net(torch.from_numpy(x).permute(0, 3, 1, 2).float()).detach()
    torch.testing.assert_close(rows, truth, rtol=1e-4, atol=1e-5)
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights=: not DINOv2 ViT-L/14 as published"):
        load_features("dinov2", tmp_path / "other.pth")


def test_pixels_are_values_between_zero_and_one():
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2) * 11
    rows = extract(load_features("pixels"), images)
    np.testing.assert_allclose(rows, images.numpy().reshape(2, 12) / 255.0, rtol=1e-6)
    assert load_features("pixels").sha256 is None


def test_torchscript_file(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.float().mean(dim=[2, 3])

    path = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(path))
    with pytest.raises(ValueError, match="is a program, .* add weights_are_code=true"):
        load_features(str(path))
    with pytest.raises(ValueError, match="weights_are_code=true: features=digits runs no code"):
        load_features("digits", weights_are_code=True)
    features = load_features(str(path), weights_are_code=True)
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    torch.testing.assert_close(extract(features, images), images.float().mean(dim=(2, 3)))
    assert features.name == "mean" and len(features.sha256) == 64
    path.write_text("not a net")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_features(path, weights_are_code=True)


def test_features_refuse():
    grey = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_features("digit")
    with pytest.raises(ValueError, match="pixels has no weights"):
        load_features("pixels", weights="file")
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), got \(3, 32, 32\)"):
        extract(load_features("digits"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8 .* got torch.float32"):
        extract(load_features("pixels"), grey.float())
    with pytest.raises(ValueError, match="at least one image, got 0"):
        extract(load_features("pixels"), grey[:0])
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        extract(load_features("pixels"), grey, batch=0)
    scalar = Features("scalar", None, "none", 1, lambda x: x.float().mean())
    with pytest.raises(ValueError, match="one row per image"):
        extract(scalar, grey)
