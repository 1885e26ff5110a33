"""Scores of images: against torch-fidelity, against the functions behind them, and of digits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import demo
from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.evaluation import scorer as scoring
from genmodels.evaluation.scorer import Scorer
from genmodels.evaluation.sources import Pictures
from genmodels.metrics import Moments, load_features
from genmodels.metrics.features import Features, extract, inception
from genmodels.metrics.frechet import frechet_distance
from genmodels.metrics.inception_score import inception_score
from genmodels.metrics.kernel_distance import kernel_distance_subsets
from tests.helpers.varied import varied


class Set(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights=.*is none of FID's published")
@pytest.mark.filterwarnings("ignore:a Frechet distance from 24 images in 2048 dimensions")
def test_every_score_of_inception_against_torch_fidelity(tmp_path):
    import torch_fidelity

    path = tmp_path / "inception.pth"
    torch.save(inception.random_state(seed=0), path)
    pixels = varied(48)
    made, real = pixels[:24], 255 - pixels[24:] // 2
    referee = torch_fidelity.calculate_metrics(
        input1=Set(made),
        input2=Set(real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=path,
        batch_size=16,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        isc_splits=3,
        kid_subsets=20,
        kid_subset_size=16,
        cuda=False,
        cache=False,
        verbose=False,
    )
    features = load_features("inception", path)
    found = extract(features, made, outputs=("features", "logits"))
    value, spread = inception_score(found["logits"], 3)
    assert value == pytest.approx(referee["inception_score_mean"], abs=1e-5)
    assert spread == pytest.approx(referee["inception_score_std"], abs=1e-5)
    rows = extract(features, real)
    value, spread = kernel_distance_subsets(found["features"], rows, subsets=20, size=16)
    assert value == pytest.approx(referee["kernel_inception_distance_mean"], abs=1e-5)
    assert spread == pytest.approx(referee["kernel_inception_distance_std"], abs=1e-5)
    scorer = Scorer(["fd", "prc", "is"], features, reference=real)
    scores = scorer(made)
    assert scores["precision"]["value"] == pytest.approx(referee["precision"], abs=1e-6)
    assert scores["recall"]["value"] == pytest.approx(referee["recall"], abs=1e-6)
    # With n < D the referee's eigenvalues of rounding size count with their roots.
    traces = float(Moments().update(found["features"]).cov.trace() + scorer.moments.cov.trace())
    fid = referee["frechet_inception_distance"]
    assert scores["fd"]["value"] == pytest.approx(fid, abs=4e-5 * traces)
    assert fid > 0.1 * traces


@pytest.fixture
def named():
    """Return a function making features of 4x4 grey images that call themselves what is asked."""

    def make(name="inception", resize="tf1", **options):
        def net(images):
            x = images.flatten(1).float() / 255
            return {"features": x[:, :6], "logits": 20 * x[:, 6:10]}

        options = {"outputs": ("features", "logits")} | options
        return Features(name, "0" * 64, resize, 6, net, **options)

    return make


def pictures(count, seed=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 1, 4, 4), generator=generator).byte()


def test_fid_is_the_name_for_published_features_only(named):
    real, made = pictures(90), pictures(80, 1, 200)
    standard = Scorer(["fid", "fid_inf", "fd"], named(standard=True), reference=real)(made)
    assert standard["fid"] == standard["fd"] and standard["fid_inf"]["stderr"] > 0
    for other in (named(), named("inception", "clean"), named("pixels", "none")):
        for metric in ("fid", "fid_inf"):
            with pytest.raises(
                ValueError, match=f"metrics={metric}: is kept for .* write metrics="
            ):
                Scorer([metric], other, reference=real)


def test_sfid_is_the_name_for_the_published_spatial_features_only(named):
    real, made = pictures(90), pictures(80, 1, 200)
    spatial = named("inception_spatial", standard=True)
    scores = Scorer(["sfid", "fd"], spatial, reference=real)(made)
    assert scores["sfid"] == scores["fd"]
    for metric, features, wanted in (
        ("sfid", named(standard=True), "inception_spatial"),
        ("sfid", named("inception_spatial"), "inception_spatial"),
        ("fid", spatial, "inception"),
    ):
        with pytest.raises(ValueError, match=f"metrics={metric}: .*features={wanted}, .*=fd$"):
            Scorer([metric], features, reference=real)


def test_rows_are_kept_only_where_a_score_needs_them(named, monkeypatch):
    kept = []
    original = scoring.score_pass

    def watch(*args, **options):
        found = original(*args, **options)
        kept.append((found.rows is not None, found.logits is not None))
        return found

    monkeypatch.setattr(scoring, "score_pass", watch)
    for metrics, expected in (
        (["fd", "fd_inf"], [(False, False), (False, False)]),
        (["fd", "is"], [(False, False), (False, True)]),
        (["kid"], [(True, False), (True, False)]),
    ):
        kept.clear()
        Scorer(metrics, named(), reference=pictures(60))(pictures(50, 1))
        assert kept == expected


def test_scores_are_those_of_the_functions(named):
    made, real = pictures(50, 1, 220), pictures(60)
    features = named()
    scorer = Scorer(["fd", "is", "density"], features, reference=Pictures(real))
    scores = scorer(Pictures(made))
    rows = [extract(features, x) for x in (made, real)]
    truth = frechet_distance(*(Moments().update(x) for x in rows)).value
    assert scores["fd"]["value"] == pytest.approx(truth, rel=1e-10)
    logits = extract(features, made, outputs=("logits",))["logits"]
    value, spread = inception_score(logits)
    assert scores["is"] == {"value": value, "stderr": pytest.approx(spread / 3), "spread": spread}
    assert list(scores) == ["fd", "is", "density", "coverage"]
    assert scorer(made) == scores  # and again, from the same prepared reference


def test_statistics_as_a_reference_give_distances_only(named):
    made, real = pictures(50, 1, 220), pictures(60)
    full = Scorer(["fd"], named(), reference=real)
    stats = Scorer(["fd"], named(), reference=full.moments)
    assert stats(made)["fd"]["value"] == pytest.approx(full(made)["fd"]["value"], rel=1e-12)
    for metrics, options in ((["kid"], {}), (["fd"], {"equal": True}), (["nn1"], {})):
        with pytest.raises(ValueError, match="needs the reference's images, statistics give fd"):
            Scorer(metrics, named(), reference=full.moments, **options)


def test_expand_metrics_names_every_score_once():
    assert scoring.expand_metrics(["prc", "fd", "recall"]) == ["precision", "recall", "fd"]
    with pytest.raises(ValueError, match="metrics=fad: choose from fd, .*prc"):
        scoring.expand_metrics(["fad"])


def test_fast_mode_tells_its_difference(named):
    exact = named()

    def rough(images):
        x = (images.flatten(1).float() / 255).half().float()
        return {"features": x[:, :6], "logits": x[:, 6:10]}

    fast = replace(exact, net=rough, mode="fast", exact=exact)
    with pytest.warns(UserWarning, match="mode=fast: rows differ from exact ones by"):
        told = scoring.fast_difference(fast, Moments(), Pictures(pictures(70)))
    assert 1e-6 < told["difference"] < 1e-2
    assert scoring.fast_difference(exact, Pictures(pictures(70))) == {}


def test_memorised_needs_both_splits(named):
    with pytest.raises(ValueError, match="metrics=memorised: needs a data set with"):
        Scorer(["memorised"], named(), reference=pictures(60))
    train, held_out = pictures(100), pictures(60, 1)
    scorer = Scorer(["memorised"], named(), reference=held_out, train=train, held_out=held_out)
    assert set(scorer.seconds) == {"reference", "train"}  # no set is passed over twice
    assert scorer(train[:30])["memorised"]["value"] == 1
    assert np.isclose(scorer(held_out)["memorised"]["value"], 0.05)


def test_real_digits_score_as_real_and_a_gaussian_does_not(digits):
    """The demo's controls: training digits at the floor, the pixels' Gaussian far from it."""
    scorer = Scorer(["nn1", "fd"], "digits", reference=digits[1], equal=True)
    real = scorer(digits[0])
    fake = scorer(demo.gaussian_twin(digits[0], 720))
    assert abs(real["nn1"]["value"] - 0.5) < 0.05 and fake["nn1"]["value"] > 0.85
    assert fake["fd"]["value"] > 5 * real["fd"]["value"]


def test_both_sides_of_nn1_see_noise_that_nn1_itself_passes(digits):
    """Digits under heavy noise: every real one is known, no fake one is, and the mean says 0.55."""
    noise = 100 * torch.randn(360, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = (digits[0][:360] + noise).round().clip(0, 255).to(torch.uint8)
    names = ["nn1", "nn1_fake", "nn1_real"]
    scorer = Scorer(names, "pixels", reference=digits[1])
    mean, fake, real = (scorer(noisy)[name]["value"] for name in names)
    assert mean == pytest.approx((fake + real) / 2) and mean < 0.58
    assert fake < 0.15 and real > 0.95


def test_the_order_of_files_does_not_bias_nn1(digits):
    """Fewer images than the reference, and the reference sorted by class as folders are."""
    labels = load_split(DataConfig(), "train")[1]
    by_class = digits[0][labels.argsort(stable=True)]
    for reference in (digits[0], by_class):
        scorer = Scorer(["nn1"], "digits", reference=reference)
        assert abs(scorer(digits[1][:300])["nn1"]["value"] - 0.5) < 0.07


def test_memorised_knows_a_copy(digits):
    scorer = Scorer(
        ["memorised"], "pixels", reference=digits[1], train=digits[0], held_out=digits[1]
    )
    assert scorer(digits[0][:100])["memorised"]["value"] == 1
    assert scorer(digits[1])["memorised"]["value"] == pytest.approx(0.05)


def test_equal_takes_the_mean_over_blocks(digits):
    small = digits[1][:100]
    scorer = Scorer(["fd"], "digits", reference=small, equal=True)
    together = scorer(digits[0][:300])["fd"]["value"]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    apart = [scorer(digits[0][order[i : i + 100]])["fd"]["value"] for i in (0, 100, 200)]
    assert together == pytest.approx(np.mean(apart))
