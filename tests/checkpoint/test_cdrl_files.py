"""Checkpoints released with CDRL: figures of the released classes, and what is refused."""

import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import sample
from genmodels import checkpoint, cli
from genmodels.checkpoint.cdrl_files import convert, left_vector, load_released
from genmodels.checkpoint.released import main
from genmodels.networks.ebm import power_iteration
from tests.helpers import cdrl_released as theirs

# log SNR -> the code of the level, 1000 (2 / pi) atan(exp(-SNR / 2))
CODES = torch.tensor([2000 / math.pi * math.atan(math.exp(-snr / 2)) for snr in theirs.SNR])


def written(folder, content):
    path = folder / "best.pth.tar"
    torch.save(content, path)
    return path


def answers(model, classes):
    """Return what FIGURES has: f at both orders of the levels, and numbers of g(x) - x."""
    x, codes = theirs.inputs(), CODES
    labels = torch.tensor(theirs.LABELS) - 1 if classes else None
    with torch.no_grad():
        f = torch.cat([model.net(x, codes, labels), model.net(x, codes.flip(0), labels)])
        g = model.initializer(x, codes, labels)
    return f, g.flatten()[::617]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("unconditional", "raw"),
        ("conditional", "ema"),
        pytest.param("unconditional", "ema", marks=pytest.mark.slow),
        pytest.param("conditional", "raw", marks=pytest.mark.slow),
    ],
)
def test_energy_and_initializer_equal_the_released_classes(kind, key, tmp_path):
    size = theirs.SIZES[kind]
    path = written(tmp_path, theirs.content(**size))
    model = checkpoint.load(convert(path, tmp_path / "made", key=key))
    f, g = answers(model, size["classes"])
    expected_f, expected_g = theirs.FIGURES[kind, key]
    torch.testing.assert_close(f, torch.tensor(expected_f), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(g, torch.tensor(expected_g), rtol=1e-5, atol=1e-5)
    assert model.cfg.network.multipliers == [1, 2] and model.cfg.network.blocks == 2
    assert model.cfg.method.initializer_attention == [16, 8]
    assert model.cfg.method.tweedie_scale == 2.0 and model.classes == size["classes"]


def test_without_spectral_norm(tmp_path):
    """W / sigma laid ready as plain weights: the same energies."""
    content = theirs.content()
    state = content["pi_state_dict"]
    plain = {}
    for name, value in state.items():
        stem, _, part = name.rpartition(".")
        if part == "weight_orig":
            u, v = state[f"{stem}.weight_u"], state[f"{stem}.weight_v"]
            plain[f"{stem}.weight"] = value / (u @ value.flatten(1) @ v)
        elif part not in ("weight_u", "weight_v"):
            plain[name] = value
    content["pi_state_dict"] = plain
    model = load_released(written(tmp_path, content), key="raw")
    assert not model.cfg.network.spectral_norm
    expected = torch.tensor(theirs.FIGURES["unconditional", "raw"][0])
    torch.testing.assert_close(answers(model, 0)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 3, 3, 3)])
def test_one_vector_stands_for_two(shape):
    """|W' u'| = u . W v: of one iteration, and of an average to which neither u nor v belongs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = weight.flatten(1)
    unit = torch.nn.functional.normalize
    v = unit(rows.T @ torch.randn(shape[0], generator=generator, dtype=torch.float64), dim=0)
    u = unit(rows @ v, dim=0)
    other = weight + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
    for w in (weight, other):
        found = left_vector(w, u, v).double()
        assert float(found.norm()) == pytest.approx(1, abs=1e-6)
        sigma = float(u @ w.flatten(1) @ v)
        assert float((w.flatten(1).T @ found).norm()) == pytest.approx(sigma, rel=1e-6)


def test_the_spectral_norm_goes_on(tmp_path):
    """Trained on, u returns to the largest singular value."""
    net = load_released(written(tmp_path, theirs.content())).net
    for _ in range(300):
        power_iteration(net)
    largest = torch.linalg.matrix_norm(net.stem.effective_weight().detach().flatten(1), 2)
    assert float(largest) == pytest.approx(1, abs=1e-4)


def test_by_command(tmp_path, capsys):
    path = written(tmp_path, theirs.content(classes=3))
    assert cli.run(main, [str(path), f"out={tmp_path / 'made'}", "key=raw"]) == 0
    assert "CDRL, weights: raw" in (tmp_path / "made/README.md").read_text()
    words = [str(tmp_path / "made"), "num=2", "steps=1", "labels=2", f"out={tmp_path / 'out'}"]
    assert sample.main(words) == 0 and (tmp_path / "out/000001.png").is_file()
    capsys.readouterr()
    for words, line in (
        ([f"out={tmp_path / 'new'}", "key=pi"], "key=pi: choose from ema, raw"),
        ([f"out={tmp_path / 'made'}"], "made: exists"),
        ([f"out={tmp_path / 'new'}", "data=mnist"], "data=mnist: has images (1, 28, 28)"),
    ):
        assert cli.run(main, [str(path), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and line in error and not (tmp_path / "new").exists()


def without(name):
    return lambda content: content["pi_state_dict"].pop(name)


def changed(part, name, value):
    return lambda content: content[f"{part}_state_dict"].update({f"module.{name}": value})


SPOILED = {
    "no dict": lambda content: content.clear(),
    "a tensor less": without("module.module_list.1.conv1.weight_orig"),
    "a tensor more": changed("p", "downs.0.0.extra.weight", torch.zeros(3)),
    "another shape": changed("p", "mid_block1.conv1.weight", torch.zeros(3, 3)),
    "not finite": lambda content: content["pi_ema_state_dict"]["shadow_params"][-1].fill_(math.nan),
    "no direction": changed("pi", "module_list.0.weight_u", torch.full((8,), math.nan)),
    "no norm": changed("pi", "module_list.0.weight_v", torch.zeros(27)),
    "text": changed("pi", "temb_final.weight", "weights"),
    "huge": changed("pi", "module_list.0.weight_orig", torch.zeros(1, 1).expand(1, 1)),
    "short average": lambda content: content["p_ema_state_dict"]["shadow_params"].pop(),
    "no average": lambda content: content.pop("pi_ema_state_dict"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_file_is_one_line(what, tmp_path, capsys):
    content = theirs.content()
    SPOILED[what](content)
    path = written(tmp_path, content)
    assert cli.run(main, [str(path), f"out={tmp_path / 'made'}"]) == 2
    error = capsys.readouterr().err
    assert "is not a checkpoint released with CDRL; found: " in error and error.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_beside_the_released_classes(tmp_path):
    """GENMODELS_CDRL=FOLDER of AlvinZhuyx/CDRL (d09d55a): files of the classes themselves."""
    folder = os.environ.get("GENMODELS_CDRL", "")
    if not Path(folder, "models/ebm_cond.py").is_file():
        pytest.skip("needs GENMODELS_CDRL, a copy of CDRL's released code, and einops")
    sys.path.insert(0, folder)
    absent = types.ModuleType("tkinter")  # imported there and not used
    absent.W = None
    sys.modules.setdefault("tkinter", absent)
    try:
        from models.ebm_cond import EBM
        from models.unet_cond import Unet
    finally:
        sys.path.remove(folder)
    torch.manual_seed(0)
    energy = EBM(temb_dim=16, n_blocks=2, use_sn=True, n_class=5)
    guess = Unet(dim=32, num_res_blocks=2, tanh_out=False, residual=True, n_class=5)
    for part in (energy, guess):
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    x, snr, y = torch.randn(4, 3, 32, 32), torch.tensor([9.0, 1.0, -1.0, -5.0]), torch.arange(4)
    energy.train()(x, snr.clone(), y)  # one power iteration
    energy.eval(), guess.eval()
    content = {
        f"{name}_state_dict": {f"module.{k}": v for k, v in part.state_dict().items()}
        for name, part in (("pi", energy), ("p", guess))
    }
    model = load_released(written(tmp_path, content), key="raw")
    codes = 2000 / math.pi * torch.atan(torch.exp(-snr / 2))
    x.requires_grad_(True)
    f, other = energy(x, snr.clone(), y), model.net(x, codes, y - 1)
    torch.testing.assert_close(other, f, rtol=1e-5, atol=1e-5)
    (grad,), (expected,) = (torch.autograd.grad(v.sum(), x) for v in (other, f))
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        shift = guess(x, snr.clone(), y) - x
        torch.testing.assert_close(model.initializer(x, codes, y - 1), shift, rtol=1e-4, atol=1e-5)
