"""Noise2Score: objective and restored pixels where the score is known, settings; trained."""

import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

import genmodels
import sample
import train
from genmodels import seeding
from genmodels.noise import LAWS
from tests.helpers.paths import ROOT
from tests.helpers.tiny import last_words

CONFIG = str(ROOT / "configs" / "noise2score_bsd400.yaml")
PUBLISHED = str(ROOT / "configs" / "noise2score_published.yaml")
TAU, SIGMA = 0.2, 25 / 255  # of clean Gaussian pixels, and of the noise


def build(*more):
    return genmodels.build(
        CONFIG, "data.patch=16", "network.channels=[4]", "network.blocks=[1]", *more
    )


def gaussian_batch(count=400, seed=0):
    """Clean pixels N(0.5, TAU^2), which leave [0, 1] at times, under Gaussian noise of 25."""
    generator = torch.Generator().manual_seed(seed)
    clean, first, second = (torch.randn(count, 1, 16, 16, generator=generator) for _ in range(3))
    clean = 0.5 + TAU * clean
    image, other = ((clean + SIGMA * noise) * 2 - 1 for noise in (first, second))
    return {
        "image": image,
        "n": torch.arange(count),
        "level": torch.full((count,), 25.0),
        "clean": clean * 2 - 1,
        "second": other,
    }


class Exact(torch.nn.Module):
    """F of Gaussian pixels, times a factor: the score is -(z - 1/2) / (TAU^2 + t)."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, z, noise):
        deviation = noise.reshape(-1, 1, 1, 1) / 10
        return self.factor * deviation * (z - 0.5) / (TAU**2 + deviation**2)


# ------------------------------------------------------------------------------------------------
# Objectives


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_of_the_true_score_is_its_floor(share):
    """AR-DAE: 1 - a^2 (t - mmse) / t^2, mmse that of z; any other score costs more."""
    model = build(f"method.sigma_a_min={share}", f"method.sigma_a_max={share}")
    batch, a = gaussian_batch(), share * SIGMA
    t = SIGMA**2 + a**2
    mmse = TAU**2 * t / (TAU**2 + t)
    losses = {}
    for factor in (0.8, 1.0, 1.2):
        model.net = Exact(factor)
        losses[factor] = float(model.loss(batch)[0])
    floor = 1 - a**2 * (t - mmse) / t**2
    assert losses[1.0] == pytest.approx(floor, abs=4 * math.sqrt(2 / batch["image"].numel()))
    extra = 0.04 * a**2 / (TAU**2 + t)  # 0.2^2 a^2 E s^2
    for factor in (0.8, 1.2):
        assert losses[factor] - losses[1.0] == pytest.approx(extra, rel=0.5)


def test_the_score_that_is_learned_is_the_score():
    """The best linear F, by least squares on the loss itself, has the slope of the formula."""
    model, batch = build("method.sigma_a_min=0.5", "method.sigma_a_max=0.5"), gaussian_batch(2000)
    linear = torch.nn.Conv2d(1, 1, 1)
    model.noise_in = lambda z, deviation: linear(z)
    best = torch.optim.LBFGS(linear.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        best.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        return loss

    best.step(closure)
    deviation = SIGMA * math.sqrt(1.25)
    slope = deviation / (TAU**2 + deviation**2)
    # The loss has slope noise 1 / (a / sqrt(t) * sd(z) * sqrt(count)).
    spread = math.sqrt(5) / math.sqrt((TAU**2 + deviation**2) * batch["image"].numel())
    assert float(linear.weight.detach()) == pytest.approx(slope, abs=4 * spread)
    assert float(linear.bias.detach()) == pytest.approx(-slope / 2, abs=4 * spread)


def test_r2r_is_the_score_objective_with_another_weight():
    """Their errors differ by the factor t / (sigma sigma_a), pixel by pixel."""
    batch, share = gaussian_batch(20), 0.5
    losses = []
    for objective in ("score", "r2r"):
        model = build(
            f"method.objective={objective}",
            f"method.sigma_a_min={share}",
            f"method.sigma_a_max={share}",
        )
        model.net = Exact(0.7)
        losses.append(float(model.loss(batch)[0]))
    assert losses[1] == pytest.approx(((1 + share**2) / share) ** 2 * losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "target"), [("supervised", "clean"), ("noise2noise", "second")]
)
def test_baselines_with_the_true_denoiser_stand_at_their_floors(objective, target):
    """MMSE / sigma^2 for clean targets, one more for noisy ones."""
    model, batch = (
        build(f"method.objective={objective}", f"data.noise.target={target}"),
        gaussian_batch(),
    )
    model.net = Exact()
    loss = float(model.loss(batch | {"target": batch[target]})[0])
    mmse = TAU**2 * SIGMA**2 / (TAU**2 + SIGMA**2)
    floor = mmse / SIGMA**2 + (objective == "noise2noise")
    assert loss == pytest.approx(floor, abs=4 * floor * math.sqrt(2 / batch["image"].numel()))


def test_perturbations_are_a_function_of_n_and_stay_in_range():
    model, sigma = build(), torch.full((64, 1, 1, 1), SIGMA)
    n = torch.arange(64)
    a = model.sigma_a(n, sigma) / SIGMA
    # What is drawn for n is equal to the bit; a power of torch's depends in its last bit on where
    # in memory its number lies.
    again = model.sigma_a(n[10:], sigma[10:]) / SIGMA
    torch.testing.assert_close(a[10:], again, rtol=3e-7, atol=0)
    drawn = seeding.uniform(0, n, seeding.Stream.SIGMA)
    assert torch.equal(drawn[10:], seeding.uniform(0, n[10:], seeding.Stream.SIGMA))
    assert 0.25 <= a.min() < 0.35 and 0.75 < a.max() <= 1
    blind = build("data.noise.level=5", "data.noise.level_max=50")
    for level in (5, 25, 50):  # each shows levels from its own up to the highest
        own = torch.full((64, 1, 1, 1), level / 255)
        t = (own**2 + blind.sigma_a(n, own) ** 2).sqrt() * 255
        lowest, highest = level * math.sqrt(1 + 0.25**2), 50 * math.sqrt(2)
        assert lowest <= t.min() < 1.1 * lowest and 0.8 * highest < t.max() < 1.001 * highest
    # Elsewhere the noise in w is not Gaussian, or sigma_a is that of the config: not beyond.
    gamma = build("data.noise.law=gamma", "data.noise.level=20", "data.noise.level_max=200")
    assert (gamma.sigma_a(n, sigma) / SIGMA).max() <= 1
    plain = build(
        "method.form=published",
        "method.sigma_a_max=0.05",
        "method.sigma_a_min=0.001",
        "data.noise.level=5",
        "data.noise.level_max=50",
    )
    assert plain.sigma_a(n, sigma).min() >= 0.001 and plain.sigma_a(n, sigma).max() <= 0.05
    published = build(
        "method.form=published",
        "method.sigma_a_max=0.05",
        "method.sigma_a_min=0.001",
        "method.anneal=22000",
    )
    a = published.sigma_a(torch.tensor([0, 11_000, 22_000, 50_000]), sigma[:4]).flatten()
    torch.testing.assert_close(a, torch.tensor([0.05, 0.0255, 0.001, 0.001]))


def test_the_noise_of_perturbed_pictures_is_even_in_log_if_asked_for():
    model = build("data.noise.level=1", "data.noise.level_max=55", "method.drawn=t")
    n, level = torch.arange(4000), 4.0
    sigma = torch.full((4000, 1, 1, 1), level / 255)
    t = (sigma**2 + model.sigma_a(n, sigma) ** 2).sqrt() * 255
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    low, high = level * math.sqrt(1 + 0.25**2), 55 * math.sqrt(2)
    expected = low * (high / low) ** shares
    torch.testing.assert_close(t.quantile(shares), expected, rtol=0.08, atol=0)


def test_published_form_is_ar_dae_of_the_bare_network():
    model = build(
        "method.form=published",
        "method.domain=pixels",
        "method.sigma_a_max=0.05",
        "method.sigma_a_min=0.05",
    )
    batch, t = gaussian_batch(), SIGMA**2 + 0.05**2

    class Score(torch.nn.Module):
        def forward(self, z, noise):
            return -(z - 0.5) / (TAU**2 + t)

    model.net = Score()
    floor = 1 - 0.05**2 / (TAU**2 + t)
    loss = float(model.loss(batch)[0])
    assert loss == pytest.approx(floor, abs=4 * math.sqrt(2 / batch["image"].numel()))


# ------------------------------------------------------------------------------------------------
# Restoring


def test_restored_gaussian_pixels_have_the_error_of_the_posterior_mean():
    model, batch = build(), gaussian_batch()
    model.net = Exact()
    restored, levels = model.restore(batch["image"], "gaussian", 25)
    error = (model.estimate((batch["image"] + 1) / 2, levels) - (batch["clean"] + 1) / 2).square()
    mmse = TAU**2 * SIGMA**2 / (TAU**2 + SIGMA**2)
    assert float(error.mean()) == pytest.approx(mmse, rel=4 * math.sqrt(2 / error.numel()))
    assert restored.min() >= -1 and restored.max() <= 1 and levels.eq(25).all()


def test_r2r_averages_over_perturbed_pictures():
    """E[x | z] of Gaussian pixels is linear in z: the mean nears it at z = y, less its noise."""
    model = build("method.objective=r2r", "method.sigma_a_max=0.5", "method.probes=400")
    model.net, batch = Exact(), gaussian_batch(4)
    y, t = (batch["image"] + 1) / 2, 1.25 * SIGMA**2
    gain = TAU**2 / (TAU**2 + t)
    found = model.estimate(y, batch["level"])
    error = (found - (0.5 + gain * (y - 0.5))) / (gain * 0.5 * SIGMA / 20)
    assert float(error.std()) == pytest.approx(1, abs=0.2) and abs(float(error.mean())) < 0.2


@pytest.mark.parametrize("domain", ["even", "pixels"])
@pytest.mark.parametrize(("law", "level"), [("poisson", 0.05), ("gamma", 20.0), ("lognormal", 0.2)])
def test_the_domain_changes_nothing_where_the_score_is_exact(law, level, domain):
    """A network that knows the score of w gives the law's estimate with the score of y."""
    model = build(f"data.noise.law={law}", f"data.noise.level={level}", f"method.domain={domain}")
    entry = LAWS[law]
    y = torch.linspace(0.1, 1, 16 * 16, dtype=torch.float64).reshape(1, 1, 16, 16)
    column, told = (torch.full(size, level, dtype=torch.float64) for size in ((1, 1, 1, 1), (1,)))

    def log_p_y(y):  # any smooth density
        return -((y - 0.5) ** 2) / 0.1 + torch.sin(3 * y)

    def score_of(log_p, at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(log_p(at).sum(), at)[0]

    def log_p_w(w):
        if domain == "pixels":
            return log_p_y(w)
        slope = entry.state.slopes(w, column)[0]
        return log_p_y(entry.from_state(w, column)) + slope.log()

    model.noise_in = lambda w, deviation: -deviation * score_of(log_p_w, w)
    expected = entry.estimate(y, score_of(log_p_y, y), column)
    torch.testing.assert_close(model.estimate(y, told), expected, rtol=1e-9, atol=1e-9)


def test_corrected_estimator_uses_the_diagonal_of_the_jacobian():
    """With a score of each pixel alone, Hutchinson's signs give the derivative exactly."""
    model = build("data.noise.law=gamma", "data.noise.level=20", "method.estimator=corrected")
    y, level = torch.rand(1, 1, 16, 16, dtype=torch.float64) + 0.2, torch.tensor([20.0]).double()
    model._score = lambda y, level: torch.sin(4 * y) - y**2
    torch.testing.assert_close(model.diagonal(y, level), 4 * torch.cos(4 * y) - 2 * y)
    column = level.reshape(1, 1, 1, 1)
    s = model._score(y, level)
    expected = LAWS["gamma"].corrected(y, s, 4 * torch.cos(4 * y) - 2 * y, column)
    torch.testing.assert_close(model.estimate(y, level), expected)
    assert not torch.allclose(expected, LAWS["gamma"].estimate(y, s, column), atol=1e-3)


@pytest.mark.parametrize(("law", "level"), [("poisson", 0.02), ("gamma", 50), ("lognormal", 0.1)])
def test_the_noise_is_told_in_the_units_of_its_domain(law, level):
    """At mid grey the standard deviation of w is that of samples."""
    for domain in ("even", "pixels"):
        model = build(
            f"data.noise.law={law}", f"data.noise.level={level}", f"method.domain={domain}"
        )
        y = LAWS[law].sample(np.full((1, 1, 300, 300), 0.5), level, np.random.default_rng(0))
        w, sigma = model.to_state(torch.from_numpy(y), torch.full((1, 1, 1, 1), level).double())
        assert float(w.std()) == pytest.approx(float(sigma), rel=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 17)])
def test_pictures_of_any_size_are_restored(shape):
    model = build()
    restored, _ = model.restore(torch.zeros(2, 1, *shape), "gaussian", 25)
    assert restored.shape == (2, 1, *shape)
    assert restored.abs().max() == 0  # F = 0 at first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((torch.zeros(1, 3, 8, 8), "gaussian", 25), "the model knows 1 channels"),
        ((torch.zeros(1, 1, 8, 8), "rice", 0.1), "law=rice: choose from gaussian, poisson-g"),
        ((torch.zeros(1, 1, 8, 8), "gaussian", 900), "level=900: must be above 0, at most 255"),
        ((torch.zeros(1, 1, 8, 8), "poisson", 2), "level=2: must be above 0, at most 1"),
        ((torch.zeros(1, 1, 8, 8), "poisson-gaussian", 2), "level=2: law=poisson-gaussian takes"),
        ((torch.full((1, 1, 8, 8), math.nan), "gaussian", 25), "must be finite"),
    ],
)
def test_restore_says_what_it_cannot_do(call, message):
    with pytest.raises(ValueError, match=message):
        build().restore(*call)


# ------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.noise.law=salt"], "data.noise.law=salt: choose from gaussian"),
        (["data.noise.level=-3"], "data.noise.level=-3.0: must be >= 0"),
        (["data.noise.law=poisson"], "level=25.0: must be 0.0001 to 1"),
        (["method.objective=supervised"], "data.noise.target=none: method.objective=supervised le"),
        (
            ["data.noise.target=clean"],
            "data.noise.target=clean: method.objective=score learns from",
        ),
        (
            ["data.noise.law=poisson", "data.noise.level=0.01", "method.sigma_a_min=0.5"],
            "method.sigma_a_min=0.5: must be >= 0.55",
        ),
        (["method.sigma_a_max=0.1"], "method.sigma_a_max=0.1: must be >= 0.25"),
        (["data.noise.level_max=5"], "data.noise.level_max=5.0: must be over"),
        (["data.patch=0"], "data.patch=0: must be > 0"),
        (
            [
                "method.form=published",
                "data.noise.law=poisson",
                "data.noise.level=0.1",
                "method.sigma_a_min=0.03",
            ],
            "method.sigma_a_min=0.03: must be >= 0.087",
        ),
        (
            [
                "method.form=published",
                "data.noise.law=poisson",
                "data.noise.level=0.1",
                "method.domain=pixels",
                "method.sigma_a_min=0.03",
            ],
            "sigma_a_min=0.03: must be >= 0.05:",
        ),
        (
            ["method.objective=r2r", "data.noise.law=poisson", "data.noise.level=0.1"],
            "method.objective=r2r: averages w, in which the noise must be Gaussian",
        ),
        (
            [
                "method.objective=r2r",
                "data.noise.law=lognormal",
                "data.noise.level=0.1",
                "method.domain=pixels",
            ],
            "method.objective=r2r: averages w, in which the noise must be",
        ),
        (
            ["method.drawn=t", "method.anneal=100"],
            "method.drawn=t: goes with objective=score, form",
        ),
        (["data.scenes=3", "data.noise.copies=given"], "data.scenes=3: needs data.noise.law= and"),
        (["method.estimator=corrected"], "method.estimator=corrected: is for the score of poisson"),
        (["data.noise.level_max=300"], "data.noise.level_max=300.0: must be 0.1 to 255"),
    ],
)
def test_bad_settings_are_one_line(more, message):
    with pytest.raises(ValueError, match=message):
        build(*more)


def test_metrics_of_generated_images_are_refused():
    with pytest.raises(ValueError, match="eval.every=2: scores generated images"):
        build("eval.every=2")


# ------------------------------------------------------------------------------------------------
# Trained: what is learned from, resuming, levels, the model card


@pytest.fixture
def folder(tmp_path):
    """Twelve small pictures, smooth, grey, of two sizes."""
    rng = np.random.default_rng(0)
    for k in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8))
        coarse.resize((36, 24 + k % 2 * 8), Image.Resampling.BICUBIC).save(tmp_path / f"{k:02}.png")
    return tmp_path


def words(folder):
    return (
        "data.name=imagefolder",
        f"data.root={folder}",
        "data.patch=16",
        "data.holdout=0.2",
        "network.channels=[8]",
        "network.blocks=[1]",
    )


def test_every_study_of_the_benchmark_can_be_built():
    from benchmarks.noise2score import STUDIES

    for config, variants, _ in STUDIES.values():
        for words in variants.values():
            own = words if words[:1] and words[0].endswith(".yaml") else (config, *words)
            genmodels.build(str(ROOT / own[0]), *own[1:])


def test_other_methods_refuse_the_noise_of_pictures():
    with pytest.raises(ValueError, match="makes its own noise"):
        genmodels.build(
            str(ROOT / "configs/edm_digits.yaml"), "data.noise.law=gaussian", "data.patch=8"
        )


def run(folder, out, *more):
    """Train on the folder for four steps and return the run."""
    config, *more = more if PUBLISHED in more else (CONFIG, *more)
    own = words(folder)[: 4 if config == PUBLISHED else None]
    quick = (
        "trainer.max_steps=4",
        "data.batch_size=4",
        "trainer.progress=false",
        "trainer.log_every=1",
        "eval.loss_every=2",
    )
    assert train.main(last_words([config, *own, *quick, f"out_dir={out}", *more])) == 0
    return next(Path(out).glob("*/*"))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("data.noise.copies=fresh", "data.noise.level=5", "data.noise.level_max=50"),
        ("data.noise.law=gamma", "data.noise.level=50"),
        ("method.objective=noise2noise", "data.noise.target=second"),
        (PUBLISHED,),
    ],
    ids=["strict", "fresh", "gamma", "noise2noise", "published"],
)
def test_trains_and_restores(folder, tmp_path, more):
    model = genmodels.load(run(folder, tmp_path, *more))
    law = next(iter(model.DENOISE_LAWS))
    restored, _ = model.restore(torch.rand(1, 1, 20, 30), law, float(model.levels[0]))
    assert restored.shape == (1, 1, 20, 30) and torch.isfinite(restored).all()


def test_resumed_run_is_the_run_that_never_stopped(folder, tmp_path):
    straight = run(folder, tmp_path / "a", "optim.decay=none")
    stopped = run(folder, tmp_path / "b", "optim.decay=none", "trainer.max_steps=2")
    assert train.main([f"resume={stopped}", "trainer.max_steps=4"]) == 0
    first, second = (
        genmodels.checkpoint.read_checkpoint(r / "checkpoints/last.ckpt")
        for r in (straight, stopped)
    )
    for key, value in first["current_model_state"].items():
        assert torch.equal(value, second["current_model_state"][key]), key
    assert (straight / "metrics.csv").read_text().count("val/loss") == 1


def test_the_levels_are_those_of_its_own_training(folder, tmp_path):
    """Also where it starts from a model of other noise, and whatever noise it learns from."""
    first = run(folder, tmp_path / "a")
    for copies in ("fixed", "fresh"):
        more = (f"init={first}", "data.noise.level=50", f"data.noise.copies={copies}")
        model = genmodels.load(run(folder, tmp_path / copies, *more))
        assert model.levels.tolist() == [50, 50]
        model.restore(torch.zeros(1, 1, 8, 8), "gaussian", 50)


def test_noisy_pictures_alone_are_learned_from(folder, tmp_path):
    """Of unknown noise: the levels are those found in them, and known when it restores."""
    rng, given = np.random.default_rng(1), tmp_path / "given"
    given.mkdir()
    for k, path in enumerate(sorted(folder.glob("*.png"))):
        smooth = np.asarray(Image.open(path)) * 0.4 + 76.0
        noisy = smooth + (10 + k) * rng.standard_normal(smooth.shape)
        Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(given / path.name)
    made = run(given, tmp_path / "runs", "data.noise.copies=given", "data.noise.level=0")
    model = genmodels.load(made)
    low, high = model.levels.tolist()
    assert 5 < low < 15 < high < 35
    assert "nan" not in (made / "metrics.csv").read_text()
    assert sample.main([str(made), f"denoise={given}", f"out={tmp_path}/restored"]) == 0
    assert len(list((tmp_path / "restored").glob("*.png"))) == 13


def test_a_stack_is_learned_from_and_restored_on_its_scale(tmp_path, capsys):
    """12 bits in a file of 16: the run goes on, and its export restores, from black to white."""
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:40, :44]
    stack = 300 + 8 * x + 9 * y + rng.normal(0, 15, (6, 40, 44))
    (tmp_path / "in").mkdir()
    tifffile.imwrite(
        tmp_path / "in" / "a.tif", stack.astype(np.uint16), imagej=True, metadata={"axes": "TYX"}
    )
    given = ("data.noise.copies=given", "data.noise.level=0")
    made = run(tmp_path / "in", tmp_path / "runs", *given)
    low, high = np.quantile(stack.astype(np.uint16), [0.001, 0.999], method="inverted_cdf")
    config = yaml.safe_load((made / "config.yaml").read_text())["data"]["noise"]
    assert (config["scale"], config["black"], config["white"]) == ("quantiles", [low], [high])
    assert train.main([f"resume={made}"]) == 0  # which compares the pictures and the config
    out = genmodels.checkpoint.export(made, tmp_path / "model")
    assert genmodels.load(out).levels.tolist() == pytest.approx(
        [15 * 255 / (high - low)] * 2, rel=0.2
    )
    noisy = (stack[:2] + 200).astype(np.uint16)  # of the same camera, brighter
    tifffile.imwrite(tmp_path / "b.tif", noisy, photometric="minisblack")
    capsys.readouterr()
    assert sample.main([str(out), f"denoise={tmp_path}/b.tif", f"out={tmp_path}/o"]) == 0
    assert f"scale: black {low}, white {high}, put back on writing" in capsys.readouterr().out
    found = tifffile.imread(tmp_path / "o" / "b.tif")
    assert found.shape == noisy.shape and found.max() > high  # beyond white, and not cut off


def test_unknown_noise_is_one_line(folder, tmp_path, capsys):
    words_of = {"law=salt": "data.noise.law=salt: choose from", "law=poisson": "level=25.0: must"}
    for word, message in words_of.items():
        assert (
            train.main([CONFIG, *words(folder), f"data.noise.{word}", f"out_dir={tmp_path}/r"]) == 2
        )
        assert message in capsys.readouterr().err


def test_given_pictures_too_even_to_measure_are_named(folder, tmp_path, capsys):
    Image.new("L", (20, 20), 128).save(folder / "00.png")
    given = ("data.noise.copies=given", "data.noise.level=0", f"out_dir={tmp_path}/r")
    assert train.main([CONFIG, *words(folder), *given]) == 2
    message = (
        "data.noise.level=0: 00.png: the picture has no noise to measure; give data.noise.level"
    )
    assert message in capsys.readouterr().err


def test_the_debug_overlay_shows_noisy_beside_restored_patches(folder, tmp_path):
    made = run(folder, tmp_path / "runs", str(ROOT / "configs/debug.yaml"), "sample.num=9")
    sheet = np.asarray(Image.open(made / "samples/step-00000004.png").convert("L"))
    assert sheet.shape == (5 * (3 * 17 + 1), 5 * (3 * 33 + 1))  # enlarged five times
    noisy, restored = sheet[5:85, 5:85].astype(int), sheet[5:85, 85:165]
    assert noisy.std() > 10 and 0 < abs(noisy - restored).mean() < 10


def test_the_model_card_tells_what_was_learned_from(folder, tmp_path):
    made = run(folder, tmp_path / "runs", "data.noise.copies=fresh", "data.noise.level_max=50")
    for half in (False, True):
        out = genmodels.checkpoint.export(made, tmp_path / f"model{half}", half=half)
        card = (out / "README.md").read_text()
        assert "gaussian noise of level 25 to 50; new noise on clean pictures" in card
        assert "no target; objective: score" in card and "image-generation" not in card
        assert f"genmodels sample {out.name} denoise=PICTURE_OR_FOLDER law=gaussian" in card
        plain = genmodels.load(out)
        assert plain.levels.tolist() == [25, 50]


def test_drawn_scenes_are_told_of():
    assert build("data.scenes=3").learned_from().endswith("; drawn scenes among the pictures")
    assert "scenes" not in build().learned_from()


def test_it_generates_nothing(folder, tmp_path, capsys):
    made = run(folder, tmp_path / "runs")
    capsys.readouterr()
    assert sample.main([str(made), "num=1", f"out={tmp_path}/none"]) == 2
    assert "restores pictures" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
