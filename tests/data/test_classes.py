"""Labels with gaps: classes without an image are told, and never drawn."""

import json

import numpy as np
import pytest
import torch

import genmodels
import train
from genmodels import checkpoint, cli, generation
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, commands, fill_in
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

DIGITS, DEBUG = (str(ROOT / f"configs/{name}.yaml") for name in ("edm_digits", "debug"))
WORDS = [w for w in TINY if w != "data.labels=false"]


def array(path, labels):
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
    np.save(path, pixels)
    np.save(path.with_name(f"{path.stem}_labels.npy"), np.array(labels))
    return DataConfig(name="npy", root=str(path), labels=True, holdout=0.0)


def data(command, *words):
    return cli.run(commands.main, [command, *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on labels 1, 2 and 5."""
    folder = tmp_path_factory.mktemp("gaps")
    cfg = array(folder / "a.npy", [1, 2, 5] * 10)
    words = ["data.name=npy", f"data.root={cfg.root}", "data.labels=true", f"out_dir={folder}/runs"]
    assert train.main([DIGITS, DEBUG, *WORDS, *words, "sample.every=0", "ema.half_life=0"]) == 0
    (run,) = (folder / "runs").glob("*/*")
    return run


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ([1, 2, 3], "1 of the classes 0..3 have no training image (0)"),
        ([0, 7], "6 of the classes 0..7 have no training image (1, 2, 3, 4, 5, 6)"),
        ([3, 20, -1], "19 of the classes 0..20 have no training image (0, 1, 2, 4, 5, 6, 7, 8, 9,"),
    ],
)
def test_gaps_are_told(tmp_path, capsys, labels, line):
    cfg = array(tmp_path / "a.npy", labels * 10)
    assert data("info", cfg.root) == 0
    told = capsys.readouterr().err
    assert told.startswith("note: ") and line in told and told.count("\n") == 1
    with pytest.warns(UserWarning) as warned:
        ImageDataModule(cfg)
    assert line in str(warned[0].message) and "they are never drawn" in str(warned[0].message)
    assert cfg.present == sorted({label for label in labels if label >= 0})


def test_nothing_is_told_without_gaps(tmp_path, capsys):
    cfg = array(tmp_path / "a.npy", [0, 1, 2] * 10)
    assert data("info", cfg.root) == 0 and capsys.readouterr().err == ""
    fill_in(cfg)
    assert cfg.present == [] and cfg.classes == 3
    cfg = array(tmp_path / "b.npy", [1, 2] * 10)
    cfg.labels = False  # nobody draws a class
    assert fill_in(cfg).present == [] and cfg.classes == 3


def test_training_says_it_and_stores_it(trained, tmp_path):
    model = genmodels.load(trained)
    assert model.classes == 6 and model.present == [1, 2, 5]
    assert "present:" in (trained / "config.yaml").read_text()
    export = checkpoint.write_export(model, tmp_path / "model", "card")
    assert json.loads((export / "config.json").read_text())["config"]["data"]["present"] == [
        1,
        2,
        5,
    ]
    assert genmodels.load(export).present == [1, 2, 5]


def drawn(model, count=300):
    from genmodels.seeding import ImageGenerators

    return model.image_labels(ImageGenerators(range(count)))


def test_empty_classes_are_never_drawn(trained):
    model = genmodels.load(trained)
    counts = torch.bincount(drawn(model), minlength=6).tolist()
    assert counts[0] == counts[3] == counts[4] == 0
    assert all(abs(counts[c] - 100) < 5 * (300 * 2 / 9) ** 0.5 for c in (1, 2, 5))
    assert generation.labels_for(range(5), "balanced", 6, model.present) == [1, 2, 5, 1, 2]
    with pytest.raises(ValueError, match="labels=1,3: class 3 had no training image; .* 1, 2, 5"):
        generation.labels_for(range(5), "1,3", 6, model.present)


def test_the_noise_after_the_draw_is_the_same(trained):
    """With the labels that were drawn given, the images are those of the random labels."""
    model = genmodels.load(trained)
    seen, image_labels = [], model.image_labels
    model.image_labels = lambda *some: seen.append(image_labels(*some)) or seen[-1]
    random = model.sample(range(6), steps=2)
    assert set(seen[0].tolist()) <= {1, 2, 5} and len(seen[0].unique()) > 1
    assert torch.equal(random, model.sample(range(6), seen[0].tolist(), steps=2))


def test_seeds_of_models_without_gaps_keep_their_labels(trained):
    """As ever: one randint over all classes after the latents' place in the generator."""
    model = genmodels.load(trained)
    model.present = []
    expected = [
        int(torch.randint(6, (), generator=torch.Generator().manual_seed(s))) for s in range(40)
    ]
    assert drawn(model, 40).tolist() == expected


def test_a_run_of_an_older_version_draws_as_it_did(tmp_path):
    """Its classes are filled in, and no list beside them."""
    cfg = array(tmp_path / "a.npy", [1, 2] * 10)
    cfg.shape, cfg.classes = [1, 8, 8], 3
    ImageDataModule(cfg)
    assert cfg.present == []


def test_a_label_table_far_larger_than_the_classes_is_refused(tmp_path, capsys):
    cfg = array(tmp_path / "a.npy", [5, 70_000, 40_000] * 5)
    with pytest.raises(
        ValueError, match="numbers its 3 classes up to 70000; .* convert .*remap=true"
    ):
        ImageDataModule(cfg)
    assert data("convert", cfg.root, f"out={tmp_path}/b.npy", "remap=true") == 0
    assert "3 classes: 5 -> 0, 40000 -> 1, 70000 -> 2" in capsys.readouterr().out
    assert np.load(tmp_path / "b_labels.npy").tolist() == [0, 2, 1] * 5
    assert data("convert", cfg.root, f"out={tmp_path}/c.zip", "remap=true", "holdout=0.4") == 0
    for name in ("b.npy", "c.zip"):
        kind = name[-3:]
        made = DataConfig(name=kind, root=str(tmp_path / name), labels=True, channels=0)
        ImageDataModule(made)
        assert made.classes == 3 and made.present == []


def test_a_hundred_of_the_thousand_classes_of_imagenet_are_taken(tmp_path):
    cfg = array(tmp_path / "a.npy", list(range(9, 1000, 10)))
    with pytest.warns(UserWarning, match="900 of the classes 0..999 have no training image"):
        fill_in(cfg)
    assert cfg.classes == 1000 and len(cfg.present) == 100


def test_remap_needs_labels(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4, 3), np.uint8))
    assert data("convert", tmp_path / "a.npy", f"out={tmp_path}/b.npy", "remap=true") == 2
    assert "remap=true: there are no labels; leave it out" in capsys.readouterr().err


def test_one_class_and_few_of_one_train(tmp_path):
    """20 to 1, drawn in balance; and one class alone."""
    for name, labels in (("one", [0] * 12), ("few", [0] * 20 + [1])):
        cfg = array(tmp_path / f"{name}.npy", labels)
        words = [f"data.root={cfg.root}", "data.labels=true", "data.balanced=true"]
        words += ["data.name=npy", "data.holdout=0", f"out_dir={tmp_path}/{name}", "sample.every=0"]
        assert train.main(last_words([DIGITS, DEBUG, *TINY, *words])) == 0
