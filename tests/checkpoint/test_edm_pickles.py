import contextlib
import pickletools

import numpy as np
import pytest
import torch

import sample
from genmodels import checkpoint, cli
from genmodels.checkpoint.edm_pickles import (
    convert,
    load_released,
    read_released,
    state_from_released,
)
from genmodels.checkpoint.inert_pickle import Record, load_pickle
from genmodels.checkpoint.released import main
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig
from tests.helpers import edm_reference as reference
from tests.helpers.edm_reference import released, write

KINDS = ["ddpmpp", "ncsnpp", "adm"]
PRECONDS = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return released(request.param)


def test_spec_is_read_off_the_tensors(model, tmp_path):
    cfg, weights, data = model
    spec, tensors = read_released(write(tmp_path, data))
    expected = {name: cfg[name] for name in ("kind", "channels", "multipliers", "blocks")}
    expected.update(attention=[8], augment=cfg["augment"], dropout=0.13, name="edm_unet")
    assert spec["network"] == expected
    assert (spec["shape"], spec["classes"]) == ([3, 16, 16], 4)
    assert spec["method"] == {"precond": "edm", "sigma_data": 0.5, "label_dropout": 0.2}
    assert set(tensors) == set(weights)


SIGMAS = torch.tensor([0.03, 0.5, 3.0, 70.0])


@pytest.mark.parametrize("precond", PRECONDS)
def test_same_denoiser(model, precond, tmp_path):
    """The converted folder, loaded, against the description evaluated in float64."""
    kind = model[0]["kind"]
    cfg, weights, data = released(kind, precond)
    out = convert(write(tmp_path, data), tmp_path / "export")
    own = checkpoint.load(out)
    assert own.cfg.method.precond == read_released(tmp_path / "network.pkl")[0]["method"]["precond"]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x, labels = x * (1 + SIGMAS.reshape(-1, 1, 1, 1)), torch.tensor([2, 0, -1, 3])
    sigma = own.net.known_sigma(SIGMAS)
    truth = reference.denoiser(weights, cfg, precond)
    with torch.no_grad():
        for k in range(4):
            one = slice(k, k + 1)
            expected = truth(x[one].double(), float(sigma[k]), labels[one])
            difference = own.denoise(x[one], sigma[one], labels[one]) - expected
            # Where c_out = sigma the network's rounding is magnified by it.
            scale = 1 if precond == "EDMPrecond" else max(1, float(sigma[k]))
            assert difference.abs().max() < tolerance(precond, kind) * scale


def tolerance(precond, kind):
    """1e-5; more where c_noise <= 999 is rounded to 3e-5, and features with a factor 16 see it."""
    if precond in ("EDMPrecond", "VEPrecond"):
        return 1e-5
    return 1e-2 if kind == "ncsnpp" else 3e-5


@pytest.mark.parametrize("options", [{}, dict(churn=20.0, low=0.05, high=50.0, noise=1.003)])
def test_same_images(model, options, tmp_path):
    """sample.py on the converted folder against the released generator, byte by byte."""
    cfg, weights, data = model
    argv = [str(write(tmp_path, data)), f"out={tmp_path / 'export'}"]
    assert cli.run(main, argv) == 0
    expected, _ = reference.released_images(weights, cfg, "EDMPrecond", [0, 7, 2**33], 5, **options)
    names = dict(churn="churn", low="churn_min", high="churn_max", noise="churn_noise")
    words = [f"{names[key]}={value}" for key, value in options.items()]
    words += ["seeds=0,7,8589934592", "steps=5", "format=npz", "batch=2", "device=cpu"]
    assert sample.main([str(tmp_path / "export"), f"out={tmp_path / 'out'}", *words]) == 0
    images = np.load(tmp_path / "out" / "images.npz")["images"]
    assert images.std() > 20  # not all black or white
    distance = np.abs(images.astype(int) - expected.astype(int))
    assert (distance <= 1).mean() >= 0.999


@pytest.mark.parametrize("precond", PRECONDS[1:])
def test_same_images_with_the_older_preconditionings(precond, tmp_path):
    cfg, weights, data = released("ddpmpp", precond)
    own = load_released(write(tmp_path, data))
    more = dict(churn=20.0, low=0.05, high=50.0)
    # Before they become bytes: random weights drive nearly all of those to 0 or 255.
    expected, _ = reference.released_states(weights, cfg, precond, [3, 4], 5, **more)
    images = own.sample([3, 4], steps=5, churn=20.0, churn_min=0.05, churn_max=50.0)
    error = (images - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, error


def test_the_table_of_noise_levels_is_the_file_s(tmp_path):
    table = torch.tensor(reference.iddpm_table()) * 1.0001
    *_, data = released("ddpmpp", "iDDPMPrecond", u=table)
    own = load_released(write(tmp_path, data))
    assert torch.equal(own.net.levels, table[:-1])


def test_constants_that_differ_are_refused(tmp_path):
    for name, right, wrong in (("beta_d", "19.9", 18.0), ("epsilon_t", "1e-05", 1e-3)):
        *_, data = released("ddpmpp", "VPPrecond", **{name: wrong})
        with pytest.raises(ValueError, match=f"{name} must be {right}, found {wrong}"):
            read_released(write(tmp_path, data))


@pytest.mark.parametrize("kind, taps", [("ddpmpp", [1, 3, 3, 1]), ("ncsnpp", [1, 1])])
def test_resampling_filters_of_another_kind_are_refused(kind, taps, tmp_path):
    *_, data = released(kind, taps=taps)
    with pytest.raises(ValueError, match=f"resample_filter must be the filter .* of {kind}"):
        read_released(write(tmp_path, data))


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    path = write(tmp_path, b"no pickle")
    assert cli.run(main, [str(path), f"out={tmp_path / 'x'}"]) == 2
    assert "is not a released EDM pickle" in capsys.readouterr().err
    assert cli.run(main, [str(path)]) == 2
    assert cli.run(main, [str(tmp_path / "missing.pkl"), f"out={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(model, change):
    cfg, weights, _ = model
    net = EDMUNet(EDMUNetConfig(**small_config(cfg)), (3, 16, 16), 4)
    tensors = dict(weights)
    if change == "missing":
        del tensors["enc.16x16_block0.conv0.weight"]
    elif change == "extra":
        tensors["enc.16x16_block7.conv0.weight"] = torch.zeros(1)
    else:
        tensors["enc.16x16_block0.conv0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="enc.16x16_block[07].conv0.weight"):
        state_from_released(net, tensors, 16)


def small_config(cfg):
    return {
        k: cfg[k] for k in ("kind", "channels", "multipliers", "blocks", "attention", "augment")
    }


def test_embedded_sources_are_skipped_and_unknown_classes_named(model, tmp_path):
    *_, data = model
    assert b"raise SystemExit" in data  # it would end the process if it were run
    content = load_pickle(write(tmp_path, data))
    assert isinstance(content["loss_fn"], Record) and content["loss_fn"].state["P_mean"] == -1.2
    assert content["dataset_kwargs"]["path"] == "x.zip"
    with pytest.raises(ValueError, match="'loss_fn' must be one of EDMPrecond.*found .EDMLoss"):
        read_released(write(tmp_path, data), key="loss_fn")
    with pytest.raises(ValueError, match="found NoneType"):
        read_released(write(tmp_path, data), key="augment_pipe")


def test_modules_that_contain_themselves_are_refused(tmp_path):
    net = reference.persistent("EDMPrecond", sigma_data=0.5)
    net._modules["model"] = model = reference.persistent("SongUNet")
    shared = reference.persistent("UNetBlock")
    model._modules.update(a=shared, b=shared)
    with pytest.raises(ValueError, match="occurs twice"):
        read_released(write(tmp_path, reference.dumps({"ema": net})))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_single_byte_change_is_refused_or_harmless(tmp_path, count):
    """Flip bytes outside the tensors: never anything but a result or a one-line ValueError."""
    data = bytearray(released("ddpmpp")[2])
    arrays = set()
    for _, argument, position in pickletools.genops(bytes(data)):
        if isinstance(argument, bytes) and len(argument) > 100:
            arrays.update(range(position, position + len(argument)))
    places = [place for place in range(len(data)) if place not in arrays]
    generator = torch.Generator().manual_seed(0)
    for choice in torch.randint(len(places), (count,), generator=generator).tolist():
        changed = bytearray(data)
        changed[places[choice]] ^= 1 << (choice % 8)
        with contextlib.suppress(ValueError):
            read_released(write(tmp_path, bytes(changed)))
