import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import genmodels
import sample
from genmodels import generation, images
from genmodels.config.words import parse_seeds
from tests.helpers.graphs import counted_graphs
from tests.helpers.processes import together
from tests.helpers.tiny import last_words


def pngs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


@pytest.fixture(scope="module")
def ten(tiny_run, tmp_path_factory):
    """Ten images, seeds 0..9."""
    out = tmp_path_factory.mktemp("ten")
    assert sample.main([str(tiny_run), "num=10", "steps=4", f"out={out}"]) == 0
    return out


def test_files_are_named_by_seed_with_a_grid(ten, tiny_run):
    assert sorted(path.name for path in ten.iterdir()) == [
        *(f"{seed:06d}.png" for seed in range(10)),
        "grid.png",
    ]
    model = genmodels.load(tiny_run)
    expected = images.to_uint8(model.sample(range(10), steps=4))
    assert torch.equal(images.read_images(ten), expected)


def test_batch_size_and_order_change_no_byte(ten, tiny_run, tmp_path):
    words = [str(tiny_run), "steps=4", f"out={tmp_path}", "batch=3"]
    assert sample.main([*words, "seeds=9,4-6,0-3,7-8"]) == 0
    assert pngs(tmp_path) == pngs(ten)


def test_two_processes_write_the_same_bytes(ten, tiny_run, tmp_path):
    words = [str(tiny_run), "num=10", "steps=4", "batch=3"]
    for form in ("png", "npz"):
        argv = [*words, f"format={form}", f"out={tmp_path / form}"]
        ended = together(argv, tmp_path, script="sample")
        assert [process.code for process in ended] == [0, 0], ended
        assert ended[0].text.startswith("10 images, ") and not ended[1].text
    assert pngs(tmp_path / "png") == pngs(ten)
    assert (tmp_path / "png" / "grid.png").read_bytes() == (ten / "grid.png").read_bytes()
    with np.load(tmp_path / "npz" / "images.npz") as file:
        expected = images.read_images(ten).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(file["images"], expected)
        assert file["seeds"].tolist() == list(range(10)) and file["labels"].tolist() == [-1] * 10


@pytest.mark.parametrize("form", ["png", pytest.param("npz", marks=pytest.mark.slow)])
def test_compiled_once_for_a_batch_it_makes_the_same_bytes(ten, tiny_run, tmp_path, capsys, form):
    """10 images by 4: the third batch is filled up; the warm-up comes first and is told."""
    with counted_graphs() as graphs:
        words = [str(tiny_run), "num=10", "steps=4", "batch=4", "compile=true", f"format={form}"]
        assert sample.main([*words, f"out={tmp_path}"]) == 0
    assert len(graphs) == 1
    warmed, done = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"compile: warmed up in \d+\.\d s with 4 images, not timed", warmed)
    assert done.startswith("10 images, 7 network evaluations each: ")
    if form == "png":
        assert pngs(tmp_path) == pngs(ten)
    else:
        with np.load(tmp_path / "images.npz") as file:
            made = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
        assert torch.equal(made, images.read_images(ten))


@pytest.mark.slow
def test_two_compiled_processes_write_the_same_bytes(ten, tiny_run, tmp_path):
    """Of 9 images the second process makes 4, in a batch of 5 as the first."""
    words = [str(tiny_run), "num=9", "steps=4", "compile=true", f"out={tmp_path / 'out'}"]
    with counted_graphs():  # the processes inherit it
        ended = together(words, tmp_path, script="sample")
    assert [process.code for process in ended] == [0, 0], ended
    assert " with 5 images, not timed\n9 images, " in ended[0].text and not ended[1].text
    made = pngs(tmp_path / "out")
    assert len(made) == 9 and made == {name: pngs(ten)[name] for name in made}


@pytest.mark.slow
def test_compiled_images_are_the_same_but_for_rounding(tiny_run, tmp_path):
    words = ["num=6", "steps=4", "compile=true", "channels_last=true", f"out={tmp_path}"]
    assert sample.main([str(tiny_run), *words]) == 0
    plain = images.to_uint8(genmodels.load(tiny_run).sample(range(6), steps=4))
    assert (images.read_images(tmp_path).int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model=nothing: name one run folder"),
        (["a", "b"], "model=a b: name one run folder"),
        (["num=0"], "num=0: must be >= 1"),
        (["num=many"], "num=many: must be a whole number"),
        (["seed=-1"], "seed=-1: must be in [0, 2^63)"),
        (["seeds=5-1"], "seeds=5-1: '5-1' runs backwards; write 1-5"),
        (["seeds=1,,2"], "seeds=1,,2: '' is no seed"),
        (["stpes=4"], "unknown key stpes=4: did you mean steps?"),
        (["steps=0"], "steps=0: must be >= 1"),
        (["sampler=ddim"], "sampler=ddim: choose from"),
        (["labels=3"], "labels=3: this model is unconditional"),
        (["format=jpg"], "format=jpg: choose from png, npz"),
        (["precision=fp8"], "precision=fp8: choose from fp32, bf16"),
        (["--num", "3"], "--num: settings are written num=..."),
        (["batch=0"], "batch=0: must be >= 1"),
        (["device=tpu"], "device=tpu: choose from auto, cpu, cuda, mps"),
        (["device=cuda"], "device=cuda: torch finds no such device here; write auto"),
        (["noise=tpu"], "noise=tpu: choose from cpu, cuda, mps"),
        (["noise=cuda"], "noise=cuda: torch finds no such device here; write cpu"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, message, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = [] if words in ([], ["a", "b"]) else [str(tiny_run)]
    assert sample.main([*model, *(words or ["num=3"])]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_images_of_other_seeds_is_refused(tiny_run, tmp_path, capsys):
    words = [str(tiny_run), "steps=1", f"out={tmp_path}"]
    assert sample.main([*words, "num=3"]) == 0
    first = pngs(tmp_path)
    assert sample.main([*words, "seeds=0-1,7"]) == 2
    errors = capsys.readouterr().err
    assert f"out={tmp_path}: holds images of 1 other seeds (000002.png, ...)" in errors
    assert "name an empty folder or delete them" in errors and errors.count("\n") == 1
    assert pngs(tmp_path) == first
    assert (
        sample.main(last_words([*words, "num=4", "steps=2"])) == 0
    )  # the same seeds are overwritten
    changed = pngs(tmp_path)
    assert len(changed) == 4 and all(changed[name] != first[name] for name in first)
    assert sample.main([*words, "num=1", "format=npz"]) == 0
    assert sample.main([str(tiny_run), f"out={tmp_path}/000000.png"]) == 2
    assert "000000.png: is a file; name a folder" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    from genmodels.commands.sample import ALL_KEYS

    assert sample.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}=" in shown for key in ALL_KEYS)


@pytest.mark.parametrize(
    ("text", "labels"),
    [("", None), ("3", [3, 3, 3]), ("3,5", [3, 5, 3]), ("balanced", [0, 1, 2])],
)
def test_labels_are_a_function_of_the_seed(text, labels):
    assert generation.labels_for([10, 21, 32], text, 10) == labels


@pytest.mark.parametrize("text", ["10", "x", "1,", "-1"])
def test_labels_refuse(text):
    with pytest.raises(ValueError, match=f"labels={text}: write balanced, or classes 0..9"):
        generation.labels_for([0], text, 10)


def test_seed_ranges():
    assert parse_seeds("0-3,100") == [0, 1, 2, 3, 100]
    assert parse_seeds("7") == [7]


def test_uint8_round_trip_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.from_uint8(levels)), levels)
    assert images.to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_survive_png_zip_and_npz(tmp_path, channels):
    pixels = torch.randint(0, 256, (4, channels, 5, 7), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        images.write_png(tmp_path / f"{i}.png", image)
    assert torch.equal(images.read_images(tmp_path), pixels)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(4):
            archive.write(tmp_path / f"{i}.png", f"deep/{i}.png")
    assert torch.equal(images.read_images(tmp_path / "set.zip"), pixels)
    images.write_npz(tmp_path / "set.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    assert torch.equal(images.read_images(tmp_path / "set.npz"), pixels)


@pytest.mark.parametrize(("channels", "mode"), [(None, "L"), (1, "L"), (3, "RGB")])
def test_16_bits_become_8(tmp_path, channels, mode):
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    expected = np.rint(levels / 257).astype(np.uint8).tolist()
    read = images.read_image(tmp_path / "a.png", channels)
    assert read.tolist() == [expected] * len(mode)


def test_more_than_16_bits_are_refused(tmp_path):
    for name, levels in (("a.tif", np.full((2, 2), 0.5, np.float32)), ("b.tif", [[-1, 70000]])):
        levels = levels if name == "a.tif" else np.array(levels, np.int32)
        Image.fromarray(levels).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: has more than 16 bits"):
            images.read_image(tmp_path / name)


def test_alpha_is_dropped_and_a_palette_becomes_its_colours(tmp_path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (2, 2), (40, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70])
    palette.save(tmp_path / "p.png", transparency=1)
    for name, expected in (("rgba", [10, 20, 30]), ("la", [40]), ("p", [50, 60, 70])):
        image = images.read_image(tmp_path / f"{name}.png")
        assert image[:, 0, 0].tolist() == expected, name


def test_hidden_entries_are_skipped(tmp_path):
    """A zip made on macOS holds a __MACOSX/._a.png beside each a.png; folders alike."""
    folder, pixels = tmp_path / "folder", torch.full((1, 1, 4, 4), 9, dtype=torch.uint8)
    folder.mkdir()
    images.write_png(folder / "a.png", pixels[0])
    for hidden in ("__MACOSX/a.png", ".trash/b.png", "._a.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"resource fork")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    assert torch.equal(images.read_images(folder), pixels)
    assert torch.equal(images.read_images(tmp_path / "set.zip"), pixels)
