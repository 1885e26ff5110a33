"""Files of reference statistics: ours, and those of other programs."""

import json

import numpy as np
import pytest
import torch

from genmodels.metrics.features import Features, load_features
from genmodels.metrics.frechet import Moments
from genmodels.metrics.stats import is_stats, load_stats, stats_bytes

ROWS = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 6)))


def net(name="net", sha256="a" * 64, resize="tf1", dim=6):
    return Features(name, sha256, resize, dim, None)


@pytest.fixture
def stats(tmp_path):
    path = tmp_path / "stats.npz"
    path.write_bytes(stats_bytes(Moments().update(ROWS), net(), data="digits:train"))
    return path


def test_statistics_survive_the_file(stats):
    moments, meta = load_stats(stats, net())
    assert is_stats(stats) and moments.count == 50 and meta["data"] == "digits:train"
    assert torch.equal(moments.mean, ROWS.mean(0))
    np.testing.assert_allclose(moments.cov, np.cov(ROWS.numpy().T), rtol=1e-12)
    with np.load(stats) as file:  # as pytorch-fid and EDM read it
        np.testing.assert_allclose(file["mu"], ROWS.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(ROWS.numpy().T), rtol=1e-12)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (net(name="inception"), "features' name net, these have inception"),
        (net(sha256="b" * 64), "features' sha256 aaa.*, these have bbb"),
        (net(resize="clean"), "features' resize tf1, these have clean"),
    ],
)
def test_statistics_of_other_features_are_refused(stats, other, message):
    with pytest.raises(ValueError, match=message):
        load_stats(stats, other)


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(4), "sigma_s": np.eye(4)}])
def test_files_of_other_programs_are_taken_with_a_warning(tmp_path, extra):
    path = tmp_path / "fid.npz"
    np.savez(path, mu=np.zeros(6, np.float32), sigma=np.eye(6), **extra)
    with pytest.warns(UserWarning, match="fid.npz names no features: make sure"):
        moments, meta = load_stats(path, net())
    assert meta == {} and moments.count > 1e6 and moments.mean.dtype == torch.float64
    torch.testing.assert_close(moments.cov, torch.eye(6).double())
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="dimension 7: .* another net"):
        load_stats(path, net(dim=7))


def test_adms_spatial_moments_are_those_of_the_spatial_features(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    spatial = np.arange(4.0), 2 * np.eye(4)
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6), mu_s=spatial[0], sigma_s=spatial[1])
    with pytest.warns(UserWarning, match="names no features"):
        moments, _ = load_stats(path, net("inception_spatial", dim=4))
    np.testing.assert_array_equal(moments.mean, spatial[0])
    np.testing.assert_allclose(moments.cov, spatial[1], rtol=1e-9)


def test_broken_files_are_one_error(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="reference=.*x.npz: cannot be read"):
        is_stats(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"\(3,\) and sigma \(2, 2\)"):
        load_stats(path, net(dim=None))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), meta=np.array("{"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_stats(path, net())
    np.savez(path, mu=np.array([{}], object), sigma=np.eye(3))  # a pickle is never executed
    with pytest.raises(ValueError, match="cannot be read"):
        load_stats(path, net())
    np.savez(path, mu=np.zeros(()), sigma=np.eye(3))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"mu has shape \(\)"):
        load_stats(path, net(dim=None))
    for meta in ([1], {"num": 5, "features": None}, {"num": "x", "features": {}}):
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3), meta=np.array(json.dumps(meta)))
        with pytest.raises(ValueError, match="cannot be read"):
            load_stats(path, net(dim=3))
    for sigma in (-np.eye(3), np.triu(np.ones((3, 3)))):
        np.savez(path, mu=np.zeros(3), sigma=sigma)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="sigma is no covariance"):
            load_stats(path, net(dim=3))
    np.savez(path, images=np.zeros((3, 8, 8, 1), np.uint8))
    assert not is_stats(path) and not is_stats(tmp_path) and not is_stats("digits:train")


def test_another_mode_is_told(tmp_path):
    features = load_features("pixels")
    data = stats_bytes(Moments().update(ROWS), features)
    path = tmp_path / "s.npz"
    path.write_bytes(data)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    meta["features"]["mode"] = "fast"
    np.savez(path, **arrays | {"meta": np.array(json.dumps(meta))})
    with pytest.warns(UserWarning, match="made in mode=fast, the images are scored in mode=exact"):
        load_stats(path, features)
