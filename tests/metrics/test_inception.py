"""FID's Inception-v3 against torch-fidelity, Pillow and the published forms of its weights."""

import hashlib
import shutil
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from genmodels.metrics import extract, load_features, mode_difference
from genmodels.metrics.features import inception
from genmodels.metrics.features import weights as weight_files
from tests.helpers.varied import varied

pytestmark = pytest.mark.filterwarnings("ignore:weights=.*is none of FID's published")


@pytest.fixture(scope="module")
def state():
    return inception.random_state(seed=0)


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def referee(weights):
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("referee", names, feature_extractor_weights_path=weights)


@pytest.fixture(scope="module")
def ours(weights):
    with pytest.warns(UserWarning, match="none of FID's published Inception networks"):
        return load_features("inception", weights)


def test_every_layer_equals_torch_fidelity(referee, ours):
    seen = {}

    def keep(tag, name):
        return lambda module, inputs, output: seen.__setitem__((tag, name), output.clone())

    names = [*inception.STEM, *inception.BLOCKS]
    hooks = [
        net.get_submodule(name).register_forward_hook(keep(tag, name))
        for tag, net in (("theirs", referee), ("ours", ours.net))
        for name in names
    ]
    images = varied(3, 40)
    theirs, own = referee(images), ours.all(images)
    for hook in hooks:
        hook.remove()
    for name in names:
        truth, got = seen["theirs", name], seen["ours", name]
        assert got.shape == truth.shape and truth.std() > 0.1, name
        assert (got - truth).abs().max() < 5e-6 * truth.abs().max(), name
    torch.testing.assert_close(own["features"], theirs[3], rtol=0, atol=2e-6)
    torch.testing.assert_close(own["logits"], theirs[4], rtol=0, atol=5e-6)


def test_spatial_features_are_seven_channels_in_tensorflows_order(referee, weights):
    """(height, width, channel), each number put where it belongs by hand."""
    kept = []
    layer = referee.get_submodule("Mixed_6d.branch1x1")
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
    images = varied(2, 40)
    referee(images)
    hook.remove()
    truth = np.zeros((2, 2023), np.float32)
    for h in range(17):
        for w in range(17):
            for c in range(7):
                truth[:, (h * 17 + w) * 7 + c] = kept[0][:, c, h, w]
    features = load_features("inception_spatial", weights)
    rows = extract(features, images, batch=2)
    assert features.name == "inception_spatial" and features.dim == 2023
    assert truth.std() > 0.1 and truth.min() == 0
    np.testing.assert_allclose(rows, truth, rtol=0, atol=5e-6 * truth.max())


@pytest.mark.slow
def test_moments_equal_torch_fidelitys(referee, ours):
    images = varied(16)
    theirs, own = referee(images)[3:], extract(ours, images, outputs=("features", "logits"))
    for truth, rows in zip(theirs, own.values()):
        truth, rows = truth.double(), rows.double()
        assert (rows.mean(0) - truth.mean(0)).norm() < 1e-6 * truth.mean(0).norm()
        assert (rows.T.cov() - truth.T.cov()).norm() < 1e-6 * truth.T.cov().trace()


def test_grey_images_are_repeated(ours):
    images = varied(2, channels=1)
    repeated = extract(ours, images.repeat(1, 3, 1, 1), batch=2)
    torch.testing.assert_close(extract(ours, images, batch=2), repeated, rtol=0, atol=1e-6)


def test_the_batch_changes_nothing_that_counts(ours):
    images = varied(3)
    rows = extract(ours, images, batch=4)
    assert torch.equal(extract(ours, images[:1], batch=4), rows[:1])
    for batch in (1, 2):
        torch.testing.assert_close(extract(ours, images, batch), rows, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (350, 299)])
def test_clean_is_pillows_bicubic_in_float_cut_to_grey_levels(size):
    random = np.random.default_rng(0)
    image = random.integers(0, 2, (*size, 3), dtype=np.uint8) * 255  # overshoots at every edge
    channels = [
        np.asarray(
            Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC)
        )
        for c in range(3)
    ]
    truth = torch.from_numpy(np.stack(channels).clip(0, 255))[None]
    assert truth.min() == 0 and truth.max() == 255
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    got = inception.prepare(images, "clean", torch.float32) * 128 + 128
    assert (got - truth).abs().max() < 1e-3


def test_resizes_are_named_and_differ(weights, ours):
    clean = load_features("inception", weights, resize="clean")
    assert (ours.resize, clean.resize) == ("tf1", "clean")
    rows, other = (extract(net, varied(2), batch=2) for net in (ours, clean))
    assert (rows - other).abs().max() > 0.01
    with pytest.raises(ValueError, match="resize=bilinear of features=inception: choose from tf1"):
        load_features("inception", weights, resize="bilinear")
    with pytest.raises(ValueError, match="resize=tf1 of features=pixels: there is no choice"):
        load_features("pixels", resize="tf1")


def test_facts_name_the_file(weights, ours):
    assert ours.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ours.name == "inception" and ours.dim == 2048 and not ours.standard
    assert load_features("inception", weights, sha256=ours.sha256[:8].upper()).mode == "exact"
    for wrong in ("0" * 64, ours.sha256[:7]):
        with pytest.raises(ValueError, match=f"sha256 is {ours.sha256}, not {wrong}"):
            load_features("inception", weights, sha256=wrong)


def test_only_published_weights_with_fids_resize_are_standard(weights, ours, monkeypatch):
    monkeypatch.setitem(inception.PUBLISHED, ours.sha256, "for this test")
    assert load_features("inception", weights).standard
    assert not load_features("inception", weights, resize="clean").standard


def test_other_forms_give_the_same_network(state, ours, tmp_path):
    save_file(
        {f"inception.{key}": value for key, value in state.items()}, tmp_path / "a.safetensors"
    )
    torch.save({"state_dict": state}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        net = load_features("inception", tmp_path / name).net
        for key, value in ours.net.state_dict().items():
            assert torch.equal(net.state_dict()[key], value)


class Script(torch.nn.Module):
    """A small stand-in with the interface of NVIDIA's TorchScript file."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 2048, 3), torch.nn.AdaptiveAvgPool2d(1)
        )
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers((img.float() - 128) / 128).flatten(1)
        if return_features:
            return features
        return torch.softmax(self.output(features), dim=1)


@pytest.mark.slow
def test_torchscript_is_called_as_it_is(tmp_path):
    script, images = Script().eval(), varied(3, 9)
    torch.jit.script(script).save(str(tmp_path / "inception.pt"))
    with pytest.raises(ValueError, match="weights=.*inception.pt: a TorchScript file is a program"):
        load_features("inception", tmp_path / "inception.pt")
    features = load_features("inception", tmp_path / "inception.pt", weights_are_code=True)
    rows = extract(features, images, batch=3, outputs=features.outputs)
    truth = script(images, return_features=True)
    torch.testing.assert_close(rows["features"], truth)
    torch.testing.assert_close((rows["logits"] + script.output.bias).softmax(dim=1), script(images))
    grey = images[:, :1]
    torch.testing.assert_close(
        extract(features, grey, 3), script(grey.expand(-1, 3, -1, -1), return_features=True)
    )
    clean = load_features(
        "inception", tmp_path / "inception.pt", resize="clean", weights_are_code=True
    )
    x = inception.prepare(images, "clean", torch.float32)
    torch.testing.assert_close(extract(clean, images, 3), script.layers(x).flatten(1))


def test_unfit_weights_are_one_clear_line(state, tmp_path, ours):
    path = tmp_path / "weights.pth"

    def refusal(saved):
        torch.save(saved, path)
        with pytest.raises(ValueError) as caught:
            load_features("inception", path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    fewer = {key: value for key, value in state.items() if "Mixed_6b.branch7x7_2" not in key}
    assert "Mixed_6b.branch7x7_2.conv.weight is missing" in refusal(fewer)
    other = state | {"fc.weight": torch.zeros(1000, 2048)}
    assert "fc.weight has shape (1000, 2048) and not (1008, 2048)" in refusal(other)
    assert "holds no state dict" in refusal([1, 2])
    assert "holds no state dict" in refusal({"code": pytest.approx})  # would have to be executed
    path.write_text("nothing")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_features("inception", path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_features("inception", tmp_path / "none")
    with pytest.raises(ValueError, match="weights= is missing: .*https.*6726825d.*=download"):
        load_features("inception")
    with pytest.raises(ValueError, match="grey or RGB for this network, got 4 channels"):
        extract(ours, torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_download_is_checked_and_leaves_nothing_half_done(tmp_path, monkeypatch, state):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(url, path):
        open(path, "wb").close()
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(weight_files.urllib.request, "urlretrieve", offline)
    with pytest.raises(ValueError, match=r"6726825d.pth cannot be fetched \(no route to host\)"):
        load_features("inception", "download")
    broken = lambda url, path: open(path, "wb").write(b"broken")  # noqa: E731
    monkeypatch.setattr(weight_files.urllib.request, "urlretrieve", broken)
    with pytest.raises(ValueError, match=f"sha256 is .*, not {inception.SHA256}"):
        load_features("inception", "download")
    assert not list((tmp_path / "checkpoints").iterdir())
    same = tmp_path / "same.pth"
    torch.save(state, same)
    fetch = lambda url, path: shutil.copy(same, path)  # noqa: E731
    monkeypatch.setattr(weight_files.urllib.request, "urlretrieve", fetch)
    monkeypatch.setattr(inception, "SHA256", weight_files.read_weights(same)[1])
    assert load_features("inception", "download").sha256 == inception.SHA256
    monkeypatch.setattr(weight_files.urllib.request, "urlretrieve", offline)
    assert load_features("inception", "download").dim == 2048  # fetched once


def test_fast_mode_says_what_it_costs(weights, ours):
    fast = load_features("inception", weights, mode="fast")
    assert fast.mode == "fast" and fast.exact.mode == "exact" and fast.sha256 == ours.sha256
    fast, twin = replace(fast, batch=3), replace(fast.exact, batch=3)
    fast, images = replace(fast, exact=twin), varied(4)
    difference = mode_difference(fast, images, num=3)
    rows, exact = (extract(net, images[:3], batch=3).double() for net in (fast, ours))
    spread = (exact - exact.mean(0)).norm()
    assert difference == pytest.approx(float((rows - exact).norm() / spread), rel=1e-6)
    assert mode_difference(ours, images) is None
    half = fast.net.fc.weight.dtype != torch.float32  # where the CPU has it
    assert 0 < difference < 0.1 if half else difference == 0


@pytest.mark.gpu
def test_gpu_gives_the_same_rows_and_fast_mode_nearly(weights, ours):
    images = varied(12)
    fast = load_features("inception", weights, "cuda", mode="fast")
    truth, rows = extract(ours, images).double(), extract(fast.exact, images).double()
    assert (rows - truth).norm() < 1e-4 * (truth - truth.mean(0)).norm()
    assert torch.equal(extract(fast.exact, images[:3]).double(), rows[:3])
    assert 0 < mode_difference(fast, images) < 0.05
