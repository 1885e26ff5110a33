"""Averages of models: a convex problem in closed form, and two finetunes of a digits model."""

import json

import pytest
import torch

import genmodels
import train
from genmodels.checkpoint.merge import fisher_diagonal, merge, merged_state
from genmodels.commands.main import main
from genmodels.data import load_split
from genmodels.images import from_uint8
from tests.helpers.paths import ROOT

TINY = ("data.name=digits", "network.width=16", "network.layers=1")
DIGITS = str(ROOT / "configs/dae_toy.yaml")


# ------------------------------------------------------------------------------------------------
# A convex problem: least squares with columns at right angles, whose Fisher matrix is diagonal


def regression(rows, seed):
    """Return (X, y) with X'X diagonal, the numbers on it far apart."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(rows, 4, dtype=torch.float64, generator=generator)).Q
    scale = torch.rand(4, dtype=torch.float64, generator=generator) * 5 + 0.1
    return q * scale, torch.randn(rows, dtype=torch.float64, generator=generator)


def solution(x, y):
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


def test_by_fisher_information_it_is_the_solution_on_all_data():
    problems = [regression(rows, seed) for seed, rows in enumerate((20, 30, 50))]
    states = [{"w": solution(x, y)} for x, y in problems]
    fishers = [{"w": (x**2).mean(dim=0)} for x, _ in problems]  # of one row, unit variance
    expected = solution(*(torch.cat(parts) for parts in zip(*problems)))
    found = merged_state(states, [20, 30, 50], fishers)["w"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    plain = merged_state(states, [20, 30, 50])["w"]
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(
        plain, 0.2 * states[0]["w"] + 0.3 * states[1]["w"] + 0.5 * states[2]["w"]
    )


def test_what_no_loss_depends_on_is_averaged_plainly():
    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    fishers = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    assert merged_state(states, [3, 1], fishers)["w"].tolist() == [1.5, 6.0]
    assert merged_state(states, [2, -1])["w"].tolist() == [-1.0, -2.0]  # away from the second


class Line(torch.nn.Module):
    """A loss (a x_1 + b x_2)^2 / 2 of an image's two values; `idle` has no share in it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        self.idle = torch.nn.Parameter(torch.tensor(1.0))

    def loss(self, batch):
        return (batch["image"].flatten(1) @ self.w).square().mean() / 2, {}


def test_the_fisher_diagonal_is_the_mean_squared_gradient_of_each_image():
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]])
    found = fisher_diagonal(Line(), x.reshape(3, 2, 1, 1))
    residual = x @ torch.tensor([2.0, -1.0])
    expected = (residual[:, None] * x).square().mean(dim=0).double()
    torch.testing.assert_close(found["w"], expected)
    assert float(found["idle"]) == 0


# ------------------------------------------------------------------------------------------------
# Two finetunes of a digits model


@pytest.fixture(scope="module")
def finetunes(tmp_path_factory):
    """A digits model and two finetunes of it, with other seeds; their runs."""
    folder, runs = tmp_path_factory.mktemp("merge"), []
    for k, more in enumerate(([], ["seed=1"], ["seed=2"])):
        words = [DIGITS, str(ROOT / "configs/debug.yaml"), *TINY, f"out_dir={folder}/{k}"]
        words += ["trainer.progress=false", "trainer.max_steps=2", "sample.every=0", *more]
        words += [f"init={runs[0]}"] if k else []
        assert train.main(words) == 0
        runs += (folder / str(k)).glob("*/*")
    return runs


def parameters(path, **options):
    return dict(genmodels.load(path, **options).named_parameters())


def test_finetunes_are_averaged(finetunes, tmp_path, capsys):
    _, a, b = finetunes
    out = tmp_path / "merged"
    assert main(["merge", str(a), str(b), f"out={out}", "weights=3,1", "license=mit"]) == 0
    assert f"merged: {out}" in capsys.readouterr().out
    one, two, both = (parameters(path) for path in (a, b, out))
    assert any((one[name] != two[name]).any() for name in one)
    for name, value in both.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name], rtol=1e-6, atol=1e-9)
    model = genmodels.load(out)
    assert torch.isfinite(model.sample([0], sampler="heun", steps=2)).all()
    card = (out / "README.md").read_text()
    assert f"{a.name} 0.75, {b.name} 0.25" in card and "license: mit" in card
    assert json.loads((out / "config.json").read_text())["config"]["data"]["root"] == ""
    merge([a, b], tmp_path / "same", weights=[1, 0])
    assert all(torch.equal(p, one[n]) for n, p in parameters(tmp_path / "same").items())
    raw = parameters(merge([a, b], tmp_path / "raw", ema=False))
    expected = [parameters(path, ema=False) for path in (a, b)]
    for name, value in raw.items():
        torch.testing.assert_close(value, (expected[0][name] + expected[1][name]) / 2)


def test_by_fisher_information_each_number_lies_between(finetunes, tmp_path):
    _, a, b = finetunes
    out = tmp_path / "merged"
    merge([a, b], out, fisher="digits", fisher_images=6)
    one, two, both = (parameters(path) for path in (a, b, out))
    models = [genmodels.load(path) for path in (a, b)]
    pixels, labels = load_split(models[0].cfg.data, "train")
    index = torch.arange(6) * len(pixels) // 6
    fishers = [fisher_diagonal(m, from_uint8(pixels[index]), labels[index]) for m in models]
    for name, value in both.items():
        low, high = torch.minimum(one[name], two[name]), torch.maximum(one[name], two[name])
        assert ((value >= low - 1e-7) & (value <= high + 1e-7)).all()
        f, g = (fisher[name] for fisher in fishers)
        known = f + g > 0
        expected = (f * one[name] + g * two[name]) / (f + g)
        torch.testing.assert_close(value.double()[known], expected[known], rtol=1e-5, atol=1e-8)
    means = [(one[name] + two[name]) / 2 - both[name] for name in both]
    assert max(float(difference.detach().abs().max()) for difference in means) > 1e-6


def test_what_cannot_be_merged_is_one_line(finetunes, tmp_path):
    _, a, b = finetunes
    out = tmp_path / "out"
    other = genmodels.build(DIGITS, *TINY, "network.width=8")
    other.save_pretrained(tmp_path / "other")
    wider = genmodels.build(DIGITS, *TINY, "method.sigma_data=0.6")
    wider.save_pretrained(tmp_path / "scaled")
    for paths, words, line in (
        ([a], {}, "models=1: name two or more"),
        ([a, b], {"weights": [1.0]}, r"weights=\[1.0\]: give 2"),
        ([a, b], {"weights": [1.0, -1.0]}, "weights=.*must not be 0"),
        ([a, b], {"weights": [2.0, -1.0], "fisher": "digits"}, "weights=.*must be >= 0"),
        ([a, b], {"fisher": "moons"}, r"fisher=moons: holds images \(2, 1, 1\)"),
        ([a, tmp_path / "other"], {}, "model=.*other: network.width differs"),
        ([a, tmp_path / "scaled"], {}, "model=.*scaled: method.sigma_data differs"),
        ([a, tmp_path / "none"], {}, "model=.*none"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            merge(paths, out, **words)
        assert "\n" not in str(error.value) and not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="^out=.*exists"):
        merge([a, b], out)
