"""per_class=true: each class's rows against that class's real rows, by hand."""

import json
import re

import numpy as np
import pytest
import torch

import evaluate
from genmodels.data.source import read_source
from genmodels.evaluation.scorer import Scorer
from genmodels.images import write_png
from tests.helpers.tiny import last_words


def words(*more):
    return last_words(["features=digits", "resamples=0", *more])


def test_a_data_set_against_its_training_images(tmp_path):
    out = tmp_path / "r.json"
    given = ["images=digits:test", "reference=digits:train", "num=200", "seed=3"]
    done = evaluate.main(words(*given, "metrics=fd,prc", "per_class=true", f"out={out}"))
    assert done == 0
    report = json.loads(out.read_text())
    classes = report["per_class"]
    assert sorted(classes) == [str(k) for k in range(10)]
    assert sum(each["num"] for each in classes.values()) == 200
    real, made = read_source("digits:train"), read_source("digits:test")
    order = torch.from_numpy(np.random.default_rng(3).permutation(360)[:200])
    pixels, labels = made.pixels[order.sort().values], made.labels[order.sort().values]
    truth = Scorer(["fd", "prc"], "digits", reference=real.pixels[real.labels == 4])(
        pixels[labels == 4]
    )
    for name in ("fd", "precision", "recall"):
        value = classes["4"]["metrics"][name]["value"]
        assert value == pytest.approx(truth[name]["value"], rel=1e-9), name
    plain = tmp_path / "p.json"
    assert evaluate.main(words(*given, "metrics=fd,prc", f"out={plain}")) == 0
    assert json.loads(plain.read_text())["metrics"] == report["metrics"]
    assert any("per_class: classes of as few as" in note for note in report["warnings"])


def test_folders_with_a_folder_for_each_class(tmp_path):
    real = read_source("digits:test")
    for side, swapped in (("a", True), ("b", False)):
        for label in (0, 1):
            folder = tmp_path / side / f"digit{1 - label if swapped else label}"
            folder.mkdir(parents=True)
            for k, picture in enumerate(real.pixels[real.labels == label][:9]):
                write_png(folder / f"{k}.png", picture)
    out = tmp_path / "r.json"
    given = ["metrics=fd,prc", "per_class=true", f"out={out}"]
    assert evaluate.main(words(f"images={tmp_path}/a", f"reference={tmp_path}/b", *given)) == 0
    report = json.loads(out.read_text())
    # The sets are the same; only the names of the classes are exchanged.
    assert report["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-6)
    assert set(report["per_class"]) == {"digit0", "digit1"}
    for each in report["per_class"].values():
        assert each["metrics"]["precision"]["value"] == 0 and each["metrics"]["fd"]["value"] > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["images=digits:test,digits:train", "reference=digits:train"], "is for one set"),
        (["images=digits:test", "reference=digits:train", "metrics=is"], "none of metrics=is"),
        (["images={flat}", "reference=digits:train"], "images=.* has no classes; name a data set"),
        (["images={named}", "reference=digits:train"], "no class is on both sides, .* have x, the"),
    ],
)
def test_refusals(tmp_path, capsys, given, message):
    pixels = read_source("digits:test").pixels[:5]
    for folder in ("flat", "named/x"):
        (tmp_path / folder).mkdir(parents=True)
        for k, picture in enumerate(pixels):
            write_png(tmp_path / folder / f"{k}.png", picture)
    paths = {name: tmp_path / name for name in ("flat", "named")}
    given = [word.format(**paths) for word in given]
    assert evaluate.main(words("metrics=fd", *given, "per_class=true")) == 2
    assert re.search(f"per_class=true: {message}", capsys.readouterr().err)


def test_a_conditional_model(train_tiny, tmp_path, capsys):
    run = train_tiny("data.labels=true")
    out = tmp_path / "r.json"
    given = [str(run), "data=digits:test", "num=40", "steps=1", "metrics=fd", "per_class=true"]
    assert evaluate.main(words(*given)) == 2
    assert "per_class=true: the classes of a model's images" in capsys.readouterr().err
    assert evaluate.main(words(*given, "labels=balanced", f"out={out}")) == 0
    classes = json.loads(out.read_text())["per_class"]
    assert {name: each["num"] for name, each in classes.items()} == {str(k): 4 for k in range(10)}
