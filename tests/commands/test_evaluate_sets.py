"""evaluate.py on several sets, on folders as they are in life, and with kept features."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from genmodels import generation, images
from genmodels.evaluation.scorer import of_features
from genmodels.metrics.features import Features
from tests.helpers.tiny import last_words
from tests.helpers.varied import varied

TRUE = ["reference=digits:test", "features=digits", "resamples=4"]


def report(words, folder, name="r.json"):
    assert evaluate.main(last_words([*words, f"out={folder / name}"])) == 0
    return json.loads((folder / name).read_text())


def write(folder, pixels, suffix=".png", names=None):
    folder.mkdir(exist_ok=True)
    for k, pixel in enumerate(pixels):
        array = pixel.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        picture.save(folder / f"{names[k] if names else f'{k:03d}'}{suffix}")
    return folder


@pytest.fixture
def folders(tmp_path, digits):
    pixels = digits[0][:80]
    write(tmp_path / "good", pixels)
    write(tmp_path / "dark", (pixels.float() * 0.7).byte())
    write(tmp_path / "other", digits[0][80:160], names=[f"x{k}" for k in range(80)])
    return [str(tmp_path / name) for name in ("dark", "good", "other")]


def test_three_folders_give_what_each_gives_alone(folders, tmp_path, capsys):
    words = ["metrics=fd,kid,nn1", *TRUE]
    files = [f"table={tmp_path}/t.md", f"plot={tmp_path}/p.png"]
    together = report([f"images={','.join(folders)}", *words, *files], tmp_path)
    shown = capsys.readouterr().out
    alone = {f: report([f"images={f}", *words], tmp_path, "one.json") for f in folders}
    assert {s["name"]: s["metrics"] for s in together["sets"]} == {
        name: one["metrics"] for name, one in alone.items()
    }
    values = [s["metrics"]["fd"]["value"] for s in together["sets"]]
    assert values == sorted(values) and together["sorted_by"] == "fd"
    assert not {"metrics", "model", "num"} & set(together)  # which are of one set
    pairs = {frozenset((d["first"], d["second"])): d["paired"] for d in together["differences"]}
    dark, good, other = folders
    assert pairs == {
        frozenset((dark, good)): True,  # files of the same names
        frozenset((dark, other)): False,
        frozenset((good, other)): False,
    }
    assert "lowest first by fd" in " ".join(shown.split()) and "less " in shown
    assert (tmp_path / "t.md").read_text().count("\n") == 5
    assert images.read_image(tmp_path / "p.png").shape[-1] > 600
    assert not list(tmp_path.glob("*.blocks"))


def test_out_may_be_a_table(folders, tmp_path):
    words = [f"images={folders[0]}", "metrics=fd", *TRUE]
    assert evaluate.main([*words, f"out={tmp_path}/x.csv"]) == 0
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    expected = report(words, tmp_path)["metrics"]["fd"]
    assert (float(row["fd"]), float(row["fd_stderr"])) == (expected["value"], expected["stderr"])
    assert row["set"] == folders[0] and row["num"] == "80"


def test_models_share_their_seeds(tiny_run, tmp_path):
    from genmodels.checkpoint.exports import main as export

    assert export([str(tiny_run), f"out={tmp_path / 'copy'}"]) in (None, 0)
    words = [str(tiny_run), str(tmp_path / "copy"), "steps=2", "num=64", "metrics=fd,kid", *TRUE]
    found = report(words, tmp_path)
    assert [s["num"] for s in found["sets"]] == [64, 64]
    for entry in found["differences"]:  # the same weights, so the same images
        assert entry["paired"] and entry["value"] == pytest.approx(0, abs=1e-9)
        assert entry["stderr"] < 1e-6


def test_kept_features_spare_the_pass(folders, tmp_path, monkeypatch):
    words = [f"images={','.join(folders[:2])}", *TRUE, f"keep={tmp_path}/kept.npz"]
    first = report([*words, "metrics=fd"], tmp_path)
    assert first["kept"]["reused"] == 0
    calls, original = [], Features.all
    monkeypatch.setattr(Features, "all", lambda s, x: calls.append(1) or original(s, x))
    again = report([*words, "metrics=fd,kid"], tmp_path)
    assert not calls and again["kept"]["reused"] == 3
    assert [s["metrics"]["fd"] for s in again["sets"]] == [
        s["metrics"]["fd"] for s in first["sets"]
    ]
    changed = images.read_image(next((tmp_path / "good").iterdir()))
    images.write_png(tmp_path / "good" / "000.png", 255 - changed)
    assert report([*words, "metrics=fd"], tmp_path)["kept"]["reused"] == 2 and calls
    (tmp_path / "kept.npz").write_bytes(b"x")
    assert evaluate.main([*words, "metrics=fd"]) == 2


def test_num_of_a_folder_is_drawn_by_the_seed(folders, tmp_path):
    words = [f"images={folders[1]}", "metrics=fd", *TRUE, "num=40"]
    zero, again, one = (report([*words, f"seed={s}"], tmp_path) for s in (0, 0, 1))
    assert zero["num"] == 40 and zero["metrics"] == again["metrics"] != one["metrics"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["images=a,b,a"], "images=a,b,a: names a twice"),
        (["images=a,,b"], "names nothing twice"),
        (["images=a", "crop=adm"], "crop=adm: needs resolution=SIDE"),
        (["images=a", "channels=2"], "channels=2: must be 1 or 3"),
        (["images=a", "table=t.txt"], "table=t.txt: name a .csv or .md"),
        (["images=digits:train", "resolution=8"], "resolution=8: is for images in files"),
        (["{run}", "{run}"], "model={run},{run}: names {run} twice"),
        (["{run}", "b", "ood=noise", "num=9"], "model={run} b: name one run folder"),
        (["{run}", "{run}/checkpoints/last.ckpt", "save_images=x.npz"], "holds the images of one"),
    ],
)
def test_bad_words_are_one_line(words, line, tiny_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("{run}", str(tiny_run)) for word in words]
    extra = [] if "ood=noise" in words else ["reference=digits:test"]
    assert evaluate.main([*words, *extra]) == 2
    errors = capsys.readouterr().err
    assert line.replace("{run}", str(tiny_run)) in errors and errors.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Folders as they are in life

MIXED = ["features=pixels", "metrics=fd"]


def notes(capsys):
    return [" ".join(n.split()) for n in capsys.readouterr().err.splitlines() if "note:" in n]


def test_a_grey_picture_among_colour_becomes_colour(tmp_path, capsys):
    pixels = varied(60, size=8)
    mixed = write(tmp_path / "mixed", pixels)
    write(tmp_path / "mixed", pixels[30:31, :1], names=["030"])  # one of 60 is grey
    words = [f"images={mixed}", *MIXED]
    same = pixels.clone()
    same[30] = pixels[30, :1].expand(3, -1, -1)
    images.write_npz(tmp_path / "same.npz", images=same.permute(0, 2, 3, 1).numpy())
    found = report([*words, f"reference={tmp_path}/same.npz"], tmp_path)
    assert found["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-9)
    text = "\n".join(found["warnings"])
    assert "1 of 60 pictures are grey (030.png, ...) and become colour" in text
    assert "60 of 60 images are in the reference, byte for byte" in text


def test_sizes_and_channels_are_brought_to_one(tmp_path, capsys):
    pixels = varied(40, size=12)
    folder = write(tmp_path / "photos", pixels)
    write(folder, varied(1, size=20), names=["big"])
    words = [f"images={folder}", f"reference={tmp_path}/r.npz", *MIXED]
    small = [images.fit(p, 8, "center") for p in [*pixels, varied(1, size=20)[0]]]
    images.write_npz(tmp_path / "r.npz", images=torch.stack(small).permute(0, 2, 3, 1).numpy())
    assert evaluate.main(words) == 2
    error = capsys.readouterr().err
    assert "mixed sizes, big.png is (3, 20, 20) but 000.png is (3, 12, 12) (1 of 41" in error
    assert "resolution=SIDE" in error
    found = report([*words, "resolution=8"], tmp_path)
    assert found["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["options"]["resolution"] == 8
    adm = report([*words, "resolution=8", "crop=adm"], tmp_path)
    assert adm["metrics"]["fd"]["value"] > 1e-4  # another filter, so other pixels
    grey = report([*words, "resolution=8", "channels=1"], tmp_path)
    assert grey["metrics"]["fd"]["value"] < 0.1 and grey["options"]["channels"] == 1
    array = np.load(tmp_path / "r.npz")["images"]
    assert array.shape[-1] == 3  # the arrays of an npz become grey as well


def test_compression_copies_and_grey_as_colour_are_told(tmp_path, capsys):
    pixels = varied(40, size=8)
    grey = pixels[:, :1].expand(-1, 3, -1, -1).contiguous()
    photos = write(tmp_path / "photos", pixels, ".jpg")
    drawn = write(tmp_path / "drawn", grey)
    one = write(tmp_path / "one", pixels[:1].expand(40, -1, -1, -1))
    report([f"images={drawn}", f"reference={photos}", *MIXED], tmp_path)
    text = "\n".join(notes(capsys))
    assert f"reference={photos}: JPEG, and images={drawn}: not" in text
    assert f"images={drawn}: its pictures are grey, saved as colour" in text
    report([f"images={one}", f"reference={photos}", *MIXED], tmp_path)
    assert "39 of 40 images are copies of others" in "\n".join(notes(capsys))
    other = write(tmp_path / "other", 255 - pixels)
    report([f"images={write(tmp_path / 'plain', pixels)}", f"reference={other}", *MIXED], tmp_path)
    told = "\n".join(notes(capsys))  # nothing of this kind to tell of plain PNG
    assert not any(word in told for word in ("JPEG", "copies", "grey", "byte for byte")), told


def test_our_own_sheets_and_other_files_are_left_out_and_counted(tmp_path, capsys):
    pixels = varied(30, size=8)
    folder = write(tmp_path / "made", pixels)
    for sheet in ("before_after", "grid"):
        write(folder, varied(1, size=32), names=[sheet])
    (folder / "notes.txt").write_text("x")
    (folder / "photo.avif").write_bytes(b"x")
    write(folder, pixels[:1], ".gif", names=["moving"])
    reference = write(tmp_path / "real", 255 - pixels)
    found = report([f"images={folder}", f"reference={reference}", *MIXED], tmp_path)
    assert found["num"] == 31  # the .gif is read
    text = "\n".join(found["warnings"])
    assert "2 files are left out, being a sheet of sample.py (before_after.png, grid.png)" in text
    assert "2 files are not read, being no pictures (1 .avif, 1 .txt)" in text


def test_several_features_give_what_each_gives_alone(folders, tmp_path, capsys):
    words = [f"images={','.join(folders[:2])}", "metrics=fd,kid", *TRUE]
    both = report([*words, "features=digits,pixels"], tmp_path)
    assert [f["name"] for f in both["features"]] == ["digits", "pixels"]
    for name in ("digits", "pixels"):
        alone = report([*words, f"features={name}"], tmp_path, "one.json")
        scores = {s["name"]: s["metrics"] for s in alone["sets"]}
        for one in both["sets"]:
            found = {k.partition("@")[0]: v for k, v in one["metrics"].items() if name in k}
            assert found == scores[one["name"]]
    assert both["sorted_by"] == "fd@digits" and "fd@pixels" in capsys.readouterr().out
    assert {"reference@digits", "reference@pixels"} <= set(both["stages"])


def test_several_features_make_a_models_images_once(tiny_run, tmp_path, monkeypatch):
    words = [str(tiny_run), "num=20", "batch=20", "steps=2", "metrics=fd,kid", "data=digits:test"]
    single = {
        name: report([*words, f"features={name}"], tmp_path, "one.json")["metrics"]
        for name in ("digits", "pixels")
    }
    made, original = [], generation.generate

    def counted(model, seeds, *args, **options):
        made.extend(seeds)
        return original(model, seeds, *args, **options)

    monkeypatch.setattr(generation, "generate", counted)
    found = report([*words, "features=digits,pixels"], tmp_path)["metrics"]
    assert found == {f"{m}@{name}": single[name][m] for name in single for m in ("fd", "kid")}
    assert sorted(made) == list(range(20))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["features=digits,digits"], "features=digits,digits: names one twice"),
        (["features=digits,pixels", "weights=a,b,c"], "weights=a,b,c: there are 2 features"),
        (["features=digits,pixels", "sha256=ab"], "sha256=ab: there are 2 features"),
        (["features=digits,pixels", "weights=x"], "weights=x: none of features=digits,pixels"),
        (["features=digits,pixels", "resize=clean"], "resize=clean: none of features"),
        (["features=digits,pixels", "metrics=fid"], "metrics=fid: is kept for features=inception"),
        (["features=digits,pixels", "metrics=kid,is"], "metrics=is: features=digits gives no"),
        (["features=digits,pixels", "plot=p.png"], "plot=p.png: is of one kind of features"),
        (["features=digits,pixels", "per_class=true"], "per_class=True: is of one kind"),
    ],
)
def test_words_that_do_not_fit_several_features(folders, words, line, capsys):
    assert evaluate.main(last_words([f"images={folders[1]}", *TRUE, *words])) == 2
    assert line in capsys.readouterr().err


def test_a_metric_kept_for_some_features_takes_the_place_of_the_general_one():
    def net(pixels):
        return pixels.flatten(1).float()

    published = Features("inception", "a", "tf1", 4, net, standard=True)
    other = Features("dinov2", "b", "none", 4, net)
    found = of_features(["fid", "fd", "kid"], [published, other])
    assert found == [["fid", "kid"], ["fd", "kid"]]
