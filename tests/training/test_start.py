"""init=MODEL brings the model's network and data along; words win; a refused try leaves nothing."""

import shutil
import warnings

import pytest
import torch
from diffusers import UNet2DModel

import genmodels
import train
from genmodels import checkpoint, images
from genmodels.config import save_config, to_plain
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.training.pool import load_reference
from genmodels.training.resume import new_config
from genmodels.training.start import READING


def read(path, *words, note=None):
    """The config of a new run from a file and words; what init= brings has to be noted."""
    pairs = dict(word.split("=", 1) for word in words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cfg = new_config([path], pairs)
    brought = [str(w.message) for w in caught if "brings" in str(w.message)]
    if note is not None:
        assert brought == ([note] if note else [])
    return cfg


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 colour pictures of 20x20, in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=generator)
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        images.write_png(path, pixels)
    return folder


OWN = ("network.channels=[8,16]", "network.norm_groups=4", "network.dropout=0.25")
OWN_DATA = ("data.resolution=16", "data.labels=true", "data.holdout=0.25", "data.flip=true")


@pytest.fixture(scope="module")
def own_run(train_tiny, pictures):
    """A run on one's own pictures, with a network of its own."""
    words = ("data.name=imagefolder", f"data.root={pictures}", "method.sigma_data=0.6")
    return train_tiny(*OWN, *OWN_DATA, *words, "method.label_dropout=0")


def test_a_run_brings_its_network_and_its_data(own_run, pictures):
    run = genmodels.load(own_run).cfg
    cfg = read("ddo_digits", f"init={own_run}")
    # All of the network, but the dropout that the file says.
    assert vars(cfg.network) == vars(run.network) | {"dropout": 0.0}
    theirs, ours = to_plain(run)["data"], to_plain(cfg)["data"]
    filled_in = {"shape", "classes", "present"}
    for key in theirs.keys() - filled_in - set(READING):
        assert ours[key] == theirs[key], key
    assert ours["root"] == str(pictures) and ours["flip"] and ours["holdout"] == 0.25
    assert ours["batch_size"] == 128 and theirs["batch_size"] == 8  # of the file
    assert cfg.method.sigma_data == 0.6 and cfg.method.betas == [30, 60]
    assert cfg.optim.lr == 1.5e-3 and cfg.init == str(own_run)


def test_what_it_brings_is_said(own_run, pictures):
    parts = [
        "data.name=imagefolder",
        f"data.root={pictures}",
        "data.resolution=16",
        "data.flip=true",
        "data.holdout=0.25",
        "network.channels=[8,16]",
        "method.sigma_data=0.6",
    ]
    note = f"init={own_run}: brings {', '.join(parts)}"
    read("ddo_digits", f"init={own_run}", note=note)
    rest = ", ".join(part for part in parts if "flip" not in part)
    read("ddo_digits", f"init={own_run}", "data.flip=true", note=f"init={own_run}: brings {rest}")
    # From a file that says the same there is nothing to say.
    read(own_run / "config.yaml", f"init={own_run}", note="")
    other = read("ddo_cifar10", f"init={own_run}", "data.download=true")
    assert other.network.name == "unet" and not hasattr(other.network, "multipliers")


def test_words_win(own_run, pictures, tmp_path):
    words = (
        "network.dropout=0.125",
        "data.labels=false",
        "method.sigma_data=0.5",
        "data.flip=false",
    )
    cfg = read("edm_digits", f"init={own_run}", *words)
    assert cfg.network.dropout == 0.125 and cfg.method.sigma_data == 0.5
    assert not cfg.data.labels and not cfg.data.flip and cfg.data.root == str(pictures)
    # Of other data only the form is the model's; and the set is the one that they are of.
    for given in ("imagefolder", "zip"):
        root = tmp_path / ("x.zip" if given == "zip" else "x")
        cfg = read("edm_digits", f"init={own_run}", f"data.root={root}")
        assert (cfg.data.name, cfg.data.root) == (given, str(root))
        assert (cfg.data.resolution, cfg.data.channels, cfg.data.holdout) == (16, 3, 0.05)
        assert cfg.data.flip is False and cfg.network.channels == [8, 16]
    cfg = read("edm_digits", f"init={own_run}", "data.name=mnist", "data.pad=2")
    assert (cfg.data.name, cfg.data.resolution, cfg.data.pad) == ("mnist", 0, 2)
    assert read("edm_cifar10", f"init={own_run}", "data.root=x").data.name == "imagefolder"
    cfg = read("edm_digits", f"init={own_run}", "data.root=x", "data.resolution=24")
    assert cfg.data.resolution == 24
    cfg = read("edm_folder64", f"init={own_run}", "data.root=x.zip")
    assert cfg.data.name == "imagefolder"  # as the file has it; it reads zips too


def test_a_file_that_was_filled_in_and_padded_takes_the_form(own_run, tiny_run, pictures, tmp_path):
    filled = read(tiny_run / "config.yaml", f"init={own_run}", f"data.root={pictures}")
    assert (filled.data.name, filled.data.shape, filled.data.classes) == ("imagefolder", [], -1)
    file = tmp_path / "my.yaml"
    file.write_text("data: {name: imagefolder, pad: 2}\nmethod: {name: edm}")
    data = read(file, f"init={own_run}", f"data.root={pictures}").data
    assert (data.pad, data.resolution) == (0, 16)


def test_data_by_name_and_own_pictures_do_not_mix(tiny_run):
    cfg = read("edm_folder64", f"init={tiny_run}", "data.root=mine")
    assert (cfg.data.name, cfg.data.root) == ("imagefolder", "mine")
    assert (cfg.data.resolution, cfg.data.channels) == (8, 1)
    assert read("edm_folder64", f"init={tiny_run}").data.name == "digits"
    assert read("edm_cifar10", f"init={tiny_run}", "data.root=x").data.name == "cifar10"


def test_an_export_does_not_say_where_its_pictures_lay(own_run, pictures, tmp_path):
    export = checkpoint.export(own_run, tmp_path / "export")
    with pytest.raises(ValueError, match="^data.root=: init=.*export learned from pictures that"):
        read("edm_digits", f"init={export}")
    cfg = read("edm_digits", f"init={export}", f"data.root={pictures}")
    assert cfg.network.channels == [8, 16] and cfg.data.resolution == 16
    file = tmp_path / "my.yaml"
    file.write_text(
        f"data: {{name: imagefolder, root: {pictures}, flip: true}}\n"
        f"network: {{name: unet}}\nmethod: {{name: edm}}\ninit: {export}\n"
    )
    cfg = read(file)
    assert cfg.data.root == str(pictures) and cfg.data.flip and cfg.data.resolution == 16
    assert cfg.network.channels == [8, 16] and cfg.method.sigma_data == 0.6


def test_a_diffusers_folder_brings_its_network(tmp_path, pictures):
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    unet.save_pretrained(tmp_path / "unet")
    words = ("debug", f"init={tmp_path / 'unet'}", f"data.root={pictures}", "trainer.max_steps=1")
    argv = ["edm_folder64", *words, f"out_dir={tmp_path}/runs", "data.holdout=0.25"]
    assert train.main([*argv, "optim.lr=1e-12", "sample.every=0", "trainer.progress=false"]) == 0
    (run,) = (tmp_path / "runs/edm_folder64").iterdir()
    model = genmodels.load(run)
    assert model.shape == (3, 16, 16)
    for key, value in unet.state_dict().items():
        ours = model.net.net.unet.state_dict()[key]
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-9)


def test_words_against_the_network_are_one_line_and_leave_nothing(tiny_run, tmp_path, capsys):
    words = ["debug", f"init={tiny_run}", f"out_dir={tmp_path}", "trainer.max_steps=1"]
    for argv, end in (
        (["edm_digits", "network.channels=[16,32]"], "network.channels=[16, 16], not [16, 32]"),
        (["edm2_digits", "network.name=edm2_unet"], "network.name=unet, not edm2_unet"),
        (["ddo_digits", "network.channels=[8,8]"], "network.channels=[16, 16], not [8, 8]"),
    ):
        assert train.main([*argv, *words, "trainer.progress=false"]) == 2
        *notes, line = capsys.readouterr().err.splitlines()
        assert all(note.startswith("note: ") for note in notes)
        assert line.startswith(f"error: init={tiny_run}: net.") and line.endswith(f": {end}"), line
        assert not list(tmp_path.iterdir())
    # No weights depend on this one.
    assert read("edm_digits", f"init={tiny_run}", "network.norm_groups=4").network.norm_groups == 4


def test_a_folder_of_runs_is_its_newest_for_good(tiny_run, tmp_path):
    """The config names the run, so that a resumed run starts from no other."""
    newest = tmp_path / "x" / "20260102-000000"
    shutil.copytree(tiny_run, newest)
    assert read("edm_digits", f"init={tmp_path / 'x'}").init == str(newest)


def with_data(run, path, *without, **settings):
    """Write a run's checkpoint with other settings of its data; return the file."""
    saved = checkpoint.read_checkpoint(run)
    plain = to_plain(genmodels.load(run).cfg)
    plain["data"] |= settings
    for key in without:
        section, name = key.split(".")
        del plain[section][name]
    saved["hyper_parameters"]["config"] = plain
    torch.save(saved, path)
    return path


def test_an_old_run_brings_what_its_data_take(tiny_run, tmp_path):
    """Once data sets held settings that they did not read, and some settings were not there."""
    young = ("network.dropout", "data.patch")
    old = with_data(tiny_run, tmp_path / "old.ckpt", *young, root="somewhere", points=3)
    cfg = read("edm_digits", f"init={old}")
    assert (cfg.data.root, cfg.data.points) == ("", 10_000)


def test_the_place_of_a_public_set_is_that_of_the_file_if_the_model_names_none(tiny_run, tmp_path):
    facts = {"name": "fashion_mnist", "shape": [1, 28, 28]}
    model = with_data(tiny_run, tmp_path / "a.ckpt", **facts, root="")
    here = with_data(tiny_run, tmp_path / "b.ckpt", **facts, root="here")
    file = tmp_path / "my.yaml"
    start = f"init: {model}\nnetwork: {{name: unet}}\nmethod: {{name: edm}}\n"
    file.write_text(start + "data: {name: fashion_mnist, root: there, batch_size: 7}\n")
    assert (read(file).data.root, read(file).data.batch_size) == ("there", 7)
    assert read(file, f"init={here}").data.root == "here"
    file.write_text(start + "data: {name: imagefolder, root: there, resolution: 9}\n")
    data = read(file).data
    assert (data.name, data.root, data.resolution) == ("fashion_mnist", "", 0)


def test_settings_of_weights_are_settings_of_the_method():
    for method in METHODS.values():
        assert set(method.OF_WEIGHTS) <= set(vars(method.Config()))


def test_a_config_that_names_no_model_is_as_it_was(tmp_path):
    cfg = read("edm_digits", note="")
    save_config(cfg, tmp_path / "a.yaml")
    again = genmodels.config.load_config([tmp_path / "a.yaml"], methods=METHODS, networks=NETWORKS)
    assert to_plain(again) == to_plain(cfg)


def test_ddo_says_that_its_reference_knows_no_classes(train_tiny):
    run = train_tiny()
    cfg = read("ddo_digits", f"init={run}", "data.name=digits", "data.labels=true")
    cfg.data.shape, cfg.data.classes = [1, 8, 8], 10
    with pytest.raises(
        ValueError, match=r"^init=.*: lacks .*: it was trained with data.labels=false"
    ):
        load_reference(cfg, str(run), torch.device("cpu"))
