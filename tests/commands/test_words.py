"""Words that would be ignored, given twice or out of range; ~ in paths; one's own folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import genmodels
import sample
import train
from genmodels import cli
from genmodels.checkpoint.exports import main as export_main
from genmodels.config import DataConfig, load_config
from genmodels.config.words import parse_seeds, seed_list, split_words
from genmodels.data import DATASETS, check_settings, commands
from genmodels.data.sets import SETTINGS_OF_SETS
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.seeding import ImageGenerators
from tests.helpers.paths import ROOT
from tests.helpers.small_sets import png
from tests.helpers.tiny import TINY, last_words

DIGITS, DEBUG = (str(ROOT / f"configs/{name}.yaml") for name in ("edm_digits", "debug"))
FOLDER = str(ROOT / "configs/edm_folder64.yaml")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TEN = {"data": {"shape": [1, 8, 8], "classes": 10}}


def one_line(capsys, *parts):
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors, errors


# ------------------------------------------------------------------------------------------------
# Settings that the set ignores


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.root=FOLDER"], "data.root=FOLDER: digits does not take it; leave it out, or name "
                               "the kind: data.name=imagefolder"),
        (["data.root=a/X.NPZ"], "or name the kind: data.name=npz"),
        (["data.resolution=64"], "data.resolution=64: digits does not take it; leave it out"),
        (["data.crop=adm"], "data.crop=adm: digits does not take it"),
        (["data.channels=3"], "data.channels=3: digits does not take it"),
        (["data.holdout=0.5"], "data.holdout=0.5: digits does not take it"),
        (["data.points=5"], "data.points=5: digits does not take it"),
        (["data.noise.level=3"], "data.noise.level=3.0: needs data.noise.law=; leave it out"),
        (["data.name=moons", "data.root=x"], "data.root=x: moons does not take it"),
        (["data.name=moons", "data.holdout=0"], "data.holdout=0.0: moons does not take it"),
        (["data.name=mnist", "data.resolution=32"], "data.resolution=32: mnist does not take it"),
        (["data.name=mnist", "data.channels=3"], "data.channels=3: mnist does not take it"),
        (["data.name=npz", "data.channels=3"], "data.channels=3: npz does not take it"),
        (["data.name=npy", "data.crop=none"], "data.crop=none: npy does not take it"),
        (["data.name=imagefolder", "data.crop=adm"], "data.crop=adm: crops to data.resol"),
    ],
)  # fmt: skip
def test_settings_that_the_set_ignores(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(last_words([DIGITS, DEBUG, *TINY, *words])) == 2
    one_line(capsys, line)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=line.split(":")[0]):
        genmodels.build([DIGITS, TEN], *words)


@pytest.mark.parametrize("words", [["resolution=64"], ["root=x"], ["crop=adm"], ["channels=3"]])
def test_the_data_commands_refuse_them_too(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(commands.main, ["info", "digits", *words]) == 2
    one_line(capsys, f"error: {words[0]}: digits does not take it; leave it out")
    assert cli.run(commands.main, ["convert", "digits", "out=a.zip", *words]) == 2
    one_line(capsys, f"error: {words[0]}: digits does not take it")
    assert not list(tmp_path.iterdir())


def test_arrays_are_not_resized(tmp_path, capsys):
    """A resolution says what they are: that they are so is checked."""
    np.save(tmp_path / "a.npy", np.zeros((30, 8, 8, 1), np.uint8))
    words = ["data.name=npy", f"data.root={tmp_path}/a.npy", f"out_dir={tmp_path}/runs"]
    argv = [DIGITS, DEBUG, *TINY, *words, "sample.every=0"]
    assert train.main([*argv, "data.resolution=16"]) == 2
    one_line(capsys, "data.resolution=16: npy holds images (1, 8, 8) and is not resized; leave it")
    assert train.main([*argv, "data.resolution=8"]) == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_of_the_repository_sets_what_is_ignored(path):
    if path.stem == "debug":  # which comes after another
        return
    check_settings(load_config([path], methods=METHODS, networks=NETWORKS).data)


def test_every_row_says_what_it_takes():
    for name, row in DATASETS.items():
        assert set(row.takes) <= set(SETTINGS_OF_SETS), name
        check_settings(DataConfig(name=name))


def test_a_model_of_an_older_version_may_hold_them(tiny_run, tmp_path):
    """Its config says what was ignored then; it is loaded and goes on."""
    model = genmodels.load(tiny_run)
    model.cfg.data.resolution, model.cfg.data.root = 64, "elsewhere"
    genmodels.build(model.cfg)


def test_init_is_not_ignored_by_build():
    with pytest.raises(ValueError, match="init=/no/such/model: build.. makes an untrained model"):
        genmodels.build(DIGITS, "init=/no/such/model")


# ------------------------------------------------------------------------------------------------
# Words given twice


def test_a_key_given_two_values_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^a=2: was given as a=1 too; leave one out$"):
        split_words(["a=1", "x", "a=2"])
    assert split_words(["a=1", "--b", "x", "a=1"]) == (["x"], {"a": "1"}, ["--b"])
    for main, words, line in (
        (
            evaluate.main,
            ["images=A", "images=B", "reference=digits:test"],
            "images=B: was given as",
        ),
        (sample.main, ["run", "steps=1", "steps=2"], "steps=2: was given as steps=1 too"),
        (train.main, [DIGITS, "optim.lr=1", "optim.lr=2"], "optim.lr=2: was given as optim.lr=1"),
        (lambda w: cli.run(commands.main, w), ["info", "digits", "pad=1", "pad=2"], "pad=2: was"),
        (lambda w: cli.run(export_main, w), ["run", "out=a", "out=b"], "out=b: was given as out=a"),
    ):
        assert main(words) == 2
        one_line(capsys, line)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=9223372036854775808"], "seed=9223372036854775808: must be in [0, 2^63)"),
        (["seed=9223372036854775800"], "seed=9223372036854775800: with num=64: seeds must be in"),
        (["seeds=9223372036854775808"], "seeds=9223372036854775808: must be in [0, 2^63)"),
        (["seeds=0-99999999999999999999"], "seeds=0-99999999999999999999: must be in [0, 2^63)"),
        (["seed=-1"], "seed=-1: must be in [0, 2^63)"),
    ],
)
def test_seeds_out_of_range(words, line, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main([str(tiny_run), "steps=1", *words]) == 2
    one_line(capsys, line)
    if words[0] != "seed=9223372036854775800":
        assert evaluate.main([str(tiny_run), "data=digits:test", "num=8", "steps=1", *words]) == 2
        one_line(capsys, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5])
def test_seeds_of_the_library(tiny_run, seed):
    with pytest.raises(ValueError, match=rf"^seeds={seed}: must be in \[0, 2\^63\)$"):
        genmodels.load(tiny_run).sample([seed], steps=1)


def test_the_largest_seed_is_one():
    top = 2**63 - 1
    assert parse_seeds(f"{top - 1}-{top}") == seed_list(2, top - 1, "") == [top - 1, top]
    expected = torch.randn(3, generator=torch.Generator().manual_seed(top % 2**32))
    assert torch.equal(ImageGenerators([top]).randn((3,))[0], expected)


# ------------------------------------------------------------------------------------------------
# The home of the user


def test_a_quoted_tilde_is_the_home(tmp_path, monkeypatch, capsys):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    (home / "own.yaml").write_text(Path(DIGITS).read_text())
    words = [*TINY, "sample.every=0", "name=x", "out_dir=~/runs"]
    assert train.main(["~/own.yaml", DEBUG, *words]) == 0
    (run,) = (home / "runs" / "x").iterdir()
    run = f"~/{run.relative_to(home)}"
    assert train.main([f"resume={run}", "trainer.max_steps=5"]) == 0
    assert sample.main([run, "num=6", "steps=1", "out=~/made", f"guide={run}", "guidance=2"]) == 0
    assert sample.main(["~/runs/none", "num=6"]) == 2
    assert str(home / "runs" / "none") in capsys.readouterr().err
    scores = ["images=~/made", "reference=digits:test", "out=~/s.json", "metrics=fd", "resamples=0"]
    assert evaluate.main([*scores, "features=digits"]) == 0
    assert json.loads((home / "s.json").read_text())["metrics"]
    stats = ["stats", "data=digits:test", "features=digits", "out=~/stats.npz"]
    assert evaluate.main(stats) == 0 and (home / "stats.npz").is_file()
    assert cli.run(export_main, [run, "out=~/model"]) == 0
    assert cli.run(commands.main, ["convert", "~/made", "out=~/a.zip", "resolution=8"]) == 0
    assert cli.run(commands.main, ["info", "~/a.zip"]) == 0
    genmodels.load("~/model")
    again = ["~/own.yaml", DEBUG, *words, "init=~/model"]
    assert train.main(last_words([*again, "out_dir=~/again"])) == 0
    config = work / "b.yaml"  # in a file nobody has expanded it
    config.write_text("out_dir: ~/third\ninit: ~/model\n")
    assert train.main([*again[:2], str(config), *words[:-1]]) == 0
    assert (home / "third" / "x").is_dir()
    assert sorted(path.name for path in work.iterdir()) == ["b.yaml"]


def test_other_tildes_stay():
    words = ["~", "~x/y", "a~b", "k=~", "k2=~nobody/x", "k3=a/~/b"]
    home = str(Path("~").expanduser())
    assert split_words(words) == (
        [home, "~x/y", "a~b"],
        {"k": home, "k2": "~nobody/x", "k3": "a/~/b"},
        [],
    )


# ------------------------------------------------------------------------------------------------
# One's own folder


def test_the_kind_of_data_by_its_root(tmp_path, capsys):
    own = {"method": {"name": "edm"}, "network": {"name": "unet"}}

    def name(root, **more):
        data = {"root": root} | more
        return load_config([own | {"data": data}], methods=METHODS, networks=NETWORKS).data.name

    for root, kind in (
        ("pictures", "imagefolder"),
        ("~/a.ZIP", "zip"),
        ("a.npz", "npz"),
        ("a.b/c.NPY", "npy"),
    ):
        with pytest.warns(UserWarning, match=f"^data.name={kind}: by data.root={root}$"):
            assert name(root) == kind
    assert name("pictures", name="hf") == "hf" and name("") == "digits"
    pictures = tmp_path / "set"
    pictures.mkdir()
    for number in range(20):
        (pictures / f"{number}.png").write_bytes(png(number))
    config = tmp_path / "own.yaml"
    config.write_text("method: {name: edm}\nnetwork: {name: unet}\n")
    words = [str(config), DEBUG, *TINY, f"data.root={pictures}", "data.resolution=8"]
    assert train.main([*words, f"out_dir={tmp_path}/runs", "sample.every=0"]) == 0
    assert capsys.readouterr().err == f"note: data.name=imagefolder: by data.root={pictures}\n"


def test_the_config_for_ones_own_folder(tmp_path):
    """As it stands, but for what makes it small: a grid is drawn, a part is held out."""
    for number in range(20):
        (tmp_path / "set" / f"{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "set" / f"{number}.png").write_bytes(png(number, (70, 66 + number)))
    cfg = load_config([FOLDER], methods=METHODS, networks=NETWORKS)
    assert cfg.sample.every and cfg.eval.loss_every and cfg.trainer.devices == 1
    small = ["data.resolution=16", "network.channels=[8,8]", "network.attention=[1]"]
    small += ["network.norm_groups=4", "network.head_dim=8", "network.layers=1"]
    small += ["trainer.max_steps=2", "sample.every=2", "eval.loss_every=1", "data.batch_size=4"]
    small += ["trainer.progress=false", "method.steps=2", "sample.num=4"]
    words = [FOLDER, f"data.root={tmp_path}/set", f"out_dir={tmp_path}/runs", *small]
    assert train.main(words) == 0
    (run,) = (tmp_path / "runs").glob("*/*")
    assert list((run / "samples").iterdir()) and genmodels.load(run).shape == (3, 16, 16)


def test_a_root_of_another_kind_says_how_to_read_it(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((30, 64, 64, 3), np.uint8))
    assert train.main([FOLDER, f"data.root={tmp_path}/a.npy", f"out_dir={tmp_path}/runs"]) == 2
    one_line(capsys, "data.name=imagefolder: ", "a.npy is an array; read it with data.name=npy")
