"""denoise(), score() and energy() refuse what has no answer; seeds are whole; names are escaped."""

import math
from functools import partial

import pytest
import torch

from genmodels import checkpoint, cli, seeding
from genmodels.config import check
from genmodels.config.words import seed_list
from tests.helpers.paths import ROOT

OLD = ROOT / "tests/fixtures/old"


@pytest.mark.parametrize("name", ["edm", "gbm"])
def test_denoise_and_score_refuse(name):
    model = checkpoint.load(OLD / name / "run")
    x = torch.zeros(2, *model.shape)
    labels = torch.zeros(2, dtype=torch.int64) if model.classes else None
    for call in (partial(model.denoise, labels=labels), partial(model.score, labels=labels)):
        with torch.no_grad():
            assert call(x, 0.5).isfinite().all()
        for sigma in (0.0, -1.0, math.inf, math.nan, torch.tensor([0.5, 0.0])):
            with pytest.raises(ValueError, match="sigma=: must be finite and > 0"):
                call(x, sigma)
        for value in (math.nan, math.inf, 1e38):
            with pytest.raises(ValueError, match="image=: its pixels must be finite"):
                call(x.index_fill(0, torch.tensor([1]), value), 0.5)


def test_energy_refuses():
    model = checkpoint.load(OLD / "cdrl" / "run")
    with pytest.raises(ValueError, match="image=: its pixels must be finite"):
        model.energy(torch.full((1, *model.shape), math.nan))


@pytest.mark.parametrize("seeds", [[1.5], ["1"], [None], [2**63], [-1]])
def test_seeds_are_whole_numbers_below_2_63(seeds):
    with pytest.raises(ValueError, match="seeds="):
        seeding.checked_seeds(seeds)


@pytest.mark.parametrize(
    ("num", "seeds", "line"),
    [
        (10**12, "", "num=1000000000000: are more"),
        (1, "0-99999999999", "seeds=0-99999999999: are more"),
        (1, "0-9223372036854775807,0-9", "are more"),
    ],
)
def test_too_many_seeds_are_no_list(num, seeds, line):
    with pytest.raises(ValueError, match=line):
        seed_list(num, 0, seeds)


def test_what_a_terminal_would_obey_is_written_out(capsys):
    def fail(argv):
        check(False, "name", "\x1b[31mred\x07\u202e\x9b\udcff é 日本", "no")

    assert cli.run(fail, []) == 2
    shown = capsys.readouterr().err
    assert shown == "error: name=\\x1b[31mred\\x07\\u202e\\x9b\\udcff é 日本: no\n"

    def crash(argv):
        raise RuntimeError("\x1b]0;title\x07")

    assert cli.run(crash, []) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cdrl", "gedi", "energy_matching"])
def test_what_energies_say_of_images_refuses(name):
    if name == "energy_matching":
        words = ("data.name=moons", "data.labels=false", "network.width=8", "network.layers=1")
        model = checkpoint.build(ROOT / "configs/energy_digits.yaml", *words)
    else:
        model = checkpoint.load(OLD / name / "run")
    x = torch.zeros(2, *model.shape)
    calls = [model.energy, model.ood_scores, *([model.cluster] if model.CLUSTERS else [])]
    for call in calls:
        call(x)
        for value in (math.nan, math.inf, 1e38):
            with pytest.raises(ValueError, match="image=: its pixels must be finite"):
                call(x.index_fill(0, torch.tensor([1]), value))


def test_scores_and_estimates_of_noisy_pixels_refuse():
    model = checkpoint.load(OLD / "noise2score" / "run")
    y, level = torch.full((2, *model.shape), 0.5), model.levels.max().expand(2)
    for call in (model.score, model.estimate):
        with torch.no_grad():
            assert call(y, level).isfinite().all()
        for bad in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="level=: must be finite and > 0"):
                call(y, level.new_tensor([1.0, bad]))
        with pytest.raises(ValueError, match="image=: its pixels must be finite"):
            call(y * math.nan, level)


def test_chains_do_not_look(monkeypatch):
    """One look at what a user gives, none for each step."""
    model, looks = checkpoint.load(OLD / "gedi" / "run"), []
    monkeypatch.setattr(type(model), "check_finite", lambda *args: looks.append(1))
    model.sample([0], steps=3)
    assert not looks
