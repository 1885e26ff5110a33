"""Patches of noisy pictures: what is fixed, what is fresh, and that nothing clean gets out."""

from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from genmodels.config import DataConfig, NoiseConfig
from genmodels.data import patches
from genmodels.data.patches import NoisyDataModule, Pictures
from genmodels.data.scenes import draw_scene
from genmodels.images import stacks
from genmodels.images.scale import Scale


@pytest.fixture
def folder(tmp_path):
    """Ten flat pictures, number k of grey 20 k + 30, two of them upright."""
    for k in range(10):
        size = (24, 40) if k < 2 else (40, 24)
        Image.new("L", size, 20 * k + 30).save(tmp_path / f"{k}.png")
    return tmp_path


def make(folder, seed=0, rank=0, world=1, step=0, batch=8, holdout=0.2, **noise):
    noise = {"law": "gaussian", "level": 10.0} | noise
    cfg = DataConfig(
        name="imagefolder",
        root=str(folder),
        channels=1,
        patch=16,
        holdout=holdout,
        batch_size=batch,
        noise=NoiseConfig(**noise),
    )
    data = NoisyDataModule(cfg, seed)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        global_step=step, global_rank=rank, world_size=world, strategy=strategy
    )
    return data


def batches(data, count=1):
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(count)]


def greys(batch):
    """Which picture each patch is of."""
    means = (batch["image"].mean(dim=(1, 2, 3)) + 1) / 2 * 255
    return ((means - 30) / 20).round().long()


def test_a_batch_holds_noisy_patches_and_their_level_and_nothing_clean(folder):
    (batch,) = batches(make(folder))
    assert set(batch) == {"image", "level", "label", "n"}
    assert batch["image"].shape == (8, 1, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["level"].tolist() == [10.0] * 8
    spread = batch["image"].std(dim=(1, 2, 3)) * 127.5
    assert torch.all((spread - 10).abs() < 4 * 10 / np.sqrt(2 * 256))


def test_every_pass_takes_every_training_picture_once(folder):
    data = make(folder)
    passes = [greys(batch).tolist() for batch in batches(data, 3)]
    for order in passes:
        assert sorted(order) == sorted(data.numbers["train"].tolist())
    assert passes[0] != passes[1]
    held_out = greys(next(iter(data.val_dataloader()))).tolist()
    assert not set(held_out) & set(passes[0])


@pytest.mark.parametrize("copies", ["fixed", "fresh"])
def test_fixed_noise_comes_again_and_fresh_noise_does_not(folder, copies):
    """Of a picture no larger than a patch, up to turning: the sorted pixels."""
    for k in range(10):
        Image.new("L", (16, 16), 20 * k + 30).save(folder / f"{k}.png")
    seen = {}
    for batch in batches(make(folder, copies=copies), 3):
        for number, patch in zip(greys(batch).tolist(), batch["image"]):
            seen.setdefault(number, []).append(patch.flatten().sort().values)
    for first, *others in seen.values():
        assert all(torch.equal(first, other) == (copies == "fixed") for other in others)


@pytest.mark.parametrize("copies", ["fixed", "fresh"])
def test_a_patch_is_a_function_of_seed_and_n(folder, copies):
    whole = batches(make(folder, copies=copies), 2)
    halves = [batches(make(folder, copies=copies, rank=rank, world=2), 2) for rank in (0, 1)]
    later = batches(make(folder, copies=copies, step=1))[0]
    for step in (0, 1):
        parts = torch.cat([halves[rank][step]["image"] for rank in (0, 1)])
        assert torch.equal(parts, whole[step]["image"])
    assert torch.equal(later["image"], whole[1]["image"])
    assert not torch.equal(batches(make(folder, 1, copies=copies))[0]["image"], whole[0]["image"])


@pytest.mark.parametrize("copies", ["fixed", "fresh"])
def test_targets_lie_on_the_same_place(folder, copies):
    """A clean target has the picture's grey; a second copy has noise of its own."""
    for k in range(10):  # a ramp, so that a patch tells where it was cut and how it was turned
        ramp = np.add.outer(3 * np.arange(24), 2 * np.arange(40)) + k
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{k}.png")
    clean, second = (batches(make(folder, copies=copies, target=t))[0] for t in ("clean", "second"))
    assert torch.equal(clean["image"], second["image"])
    noise = (clean["image"] - clean["target"]) * 127.5
    other = (second["target"] - clean["target"]) * 127.5
    for part in (noise, other):
        assert abs(float(part.std()) - 10) < 0.8 and abs(float(part.mean())) < 1
    assert abs(float((noise * other).mean())) < 6


def test_blind_levels_are_fixed_for_a_picture_or_drawn_for_a_patch(folder):
    (low, high), seen = (5.0, 50.0), {}
    for copies in ("fixed", "fresh"):
        data = make(folder, copies=copies, level=low, level_max=high)
        for batch in batches(data, 4):
            assert batch["level"].min() >= low and batch["level"].max() <= high
            spread = batch["image"].std(dim=(1, 2, 3)) * 127.5
            assert torch.all((spread / batch["level"] - 1).abs() < 0.25)
            # Under so much noise a mean tells the picture to half a grey step only on average.
            for n, level in zip(batch["n"].tolist(), batch["level"].tolist()):
                seen.setdefault(copies, {})[n] = level
        if copies == "fixed":
            assert set(seen[copies].values()) <= set(map(float, np.float32(data.levels)))
    assert len(set(seen["fresh"].values())) == 32 and len(set(seen["fixed"].values())) == 8


def test_all_turns_and_places_occur(folder):
    for k in range(10):
        ramp = np.add.outer(5 * np.arange(17), 1 * np.arange(17)) + 20
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{k}.png")
    batch = torch.cat([b["image"] for b in batches(make(folder, level=0.1), 40)]) * 127.5
    down, right = (batch.diff(dim=d).mean(dim=(1, 2, 3)).round().int() for d in (2, 3))
    turns = set(zip(down.tolist(), right.tolist()))
    assert turns == {
        (a, b) for a, b in [(5, 1), (5, -1), (-5, 1), (-5, -1), (1, 5), (1, -5), (-1, 5), (-1, -5)]
    }
    corners = (batch.amin(dim=(1, 2, 3)) + 127.5).round().int()
    assert {20, 21, 25, 26} == set(corners.tolist())


def test_given_pictures_are_taken_as_they_are(tmp_path, monkeypatch):
    """16 bits and floats beyond 0..255 keep their digits; colours are three grey pictures."""
    rng = np.random.default_rng(0)
    floats = rng.normal(100, 90, (20, 20)).astype(np.float32)
    np.save(tmp_path / "a.npy", floats)
    wide = rng.integers(0, 65536, (20, 20), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    data = make(tmp_path, copies="given", holdout=0)
    assert [tuple(p.shape) for p in data.views["image"]] == [(1, 20, 20)] * 5
    torch.testing.assert_close(data.views["image"][0][0], torch.from_numpy(floats / 127.5 - 1))
    torch.testing.assert_close(
        data.views["image"][1][0].double(), torch.from_numpy(wide / 32767.5 - 1), atol=1e-6, rtol=0
    )
    (batch,) = batches(data)
    assert set(batch) == {"image", "level", "label", "n"} and batch["level"].tolist() == [10] * 8
    levels = iter([3.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(patches, "level_from_patches", lambda y, law: next(levels))
    assert make(tmp_path, copies="given", level=0.0, holdout=0).levels == [3, 4, 5, 6, 7]


def saved_noise(path, values):
    """Write float32 (48, 48) whose deviation from these values is 1, as an .npy."""
    noise = np.random.default_rng(0).standard_normal((48, 48))
    np.save(path, (noise + values).astype(np.float32))


def test_a_level_that_is_found_beyond_the_law_is_told_or_refused(tmp_path):
    """Photon counts in 16 bits: a count is 1/65535, weaker than Poisson noise may be."""
    counts = np.random.default_rng(0).poisson(np.linspace(20, 60, 48), (48, 48))
    Image.fromarray(counts.astype(np.uint16)).save(tmp_path / "a.png")
    found = {"copies": "given", "level": 0.0, "holdout": 0}
    match = r"level=0: a.png: level 1.\d*e-05 is found, where poisson noise has 0.0001 to 1; 1 of 1"
    with pytest.warns(UserWarning, match=match):
        assert make(tmp_path, law="poisson", **found).levels == [1e-4]
    told = make(tmp_path, law="poisson", black=[0.0], white=[100.0], **found)
    assert told.levels == pytest.approx([0.01], rel=0.15)
    (tmp_path / "a.png").unlink()
    saved_noise(tmp_path / "strong.npy", 0)
    with pytest.raises(ValueError, match=r"strong.npy: level 2.*e\+04 is found, where gaussian"):
        make(tmp_path, black=[0.0], white=[0.01], **found)
    saved_noise(tmp_path / "weak.npy", 0)
    (tmp_path / "strong.npy").rename(tmp_path / "strong.npy.kept")
    with pytest.warns(UserWarning, match=r"weak.npy: level 0.0\d* is found, .*: tell data.noise"):
        make(tmp_path, black=[0.0], white=[1e4], **found)
    np.save(tmp_path / "other.npy", 50 * np.load(tmp_path / "weak.npy"))
    with pytest.warns(UserWarning, match=r"weak.npy: .*; 1 of 2 pictures, .*, count as 0.1: leave"):
        levels = make(tmp_path, black=[0.0], white=[1e4], **found).levels
    assert levels == [pytest.approx(1.275, rel=0.1), 0.1]


def test_a_level_that_is_told_in_another_unit_is_refused(tmp_path):
    saved_noise(tmp_path / "a.npy", 30)
    with pytest.raises(
        ValueError, match="level=200.0: is [5-9]\d{3} on the scale of a.npy, .* most 255"
    ):
        make(tmp_path, copies="given", level=200.0, holdout=0, scale="quantiles")


@pytest.mark.parametrize(
    ("key", "value"),
    [("resolution", 32), ("pad", 2), ("labels", True), ("flip", True), ("balanced", True)],
)
def test_settings_of_other_data_are_refused(folder, key, value):
    cfg = DataConfig(
        name="imagefolder",
        root=str(folder),
        patch=16,
        noise=NoiseConfig(law="gaussian"),
        **{key: value},
    )
    with pytest.raises(ValueError, match=f"data.{key}={value}: is not for patches of noisy"):
        NoisyDataModule(cfg)


def test_what_cannot_be_is_one_line(folder):
    with pytest.raises(ValueError, match="data.patch=16: 0.png is"):
        Image.new("L", (10, 40)).save(folder / "0.png")
        make(folder)
    with pytest.raises(ValueError, match="data.noise.copies=given: knows no target"):
        NoiseConfig(law="gaussian", copies="given", target="clean")
    with pytest.raises(ValueError, match="is no folder of pictures"):
        NoisyDataModule(DataConfig(name="digits", patch=4, noise=NoiseConfig(law="gaussian")))


def test_drawn_scenes_join_the_pictures(folder):
    cfg = DataConfig(
        name="imagefolder",
        root=str(folder),
        channels=3,
        patch=16,
        scenes=4,
        holdout=0,
        noise=NoiseConfig(law="gaussian", level=2.0, copies="fixed", target="clean"),
    )
    data = NoisyDataModule(cfg)
    assert len(data.numbers["train"]) == 14
    scenes = [data.views["target"][k] for k in range(10, 14)]
    for k, scene in enumerate(scenes):
        assert torch.equal(scene, draw_scene(k, 3)) and scene.max() >= 150
        # The diagonal details of 2 x 2 pixels: nearly none, where photographs have grain.
        x = scene.double()
        details = (x[:, ::2, ::2] - x[:, ::2, 1::2] - x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 2
        assert details.abs().median() <= 0.5
        noise = (data.views["image"][10 + k] + 1) * 127.5 - scene
        assert float(noise.std()) == pytest.approx(2, rel=0.02)
    assert len({scene.double().mean().item() for scene in scenes}) == 4


def test_pictures_are_left_out_by_name(folder):
    cfg = DataConfig(
        name="imagefolder",
        root=str(folder),
        channels=1,
        patch=16,
        leave_out=["3", "7"],
        noise=NoiseConfig(law="gaussian", level=2.0, target="clean"),
    )
    left = {int(NoisyDataModule(cfg).views["target"][k].max()) for k in range(8)}
    assert left == {20 * k + 30 for k in range(10)} - {90, 170}
    cfg.leave_out = ["elsewhere"]
    with pytest.raises(ValueError, match="data.leave_out=elsewhere: no picture of .* is called so"):
        NoisyDataModule(cfg)


def test_patches_cut_at_once_are_those_cut_one_by_one():
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 9, 7), (2, 5, 12), (2, 8, 8)]
    pictures = [torch.rand(size, generator=generator) for size in sizes]
    numbers = torch.randint(3, (200,), generator=generator)
    row, column, turn = torch.rand(3, 200, generator=generator).double()
    patches = Pictures(pictures).cut(numbers, 5, row, column, turn)
    for k, number in enumerate(numbers.tolist()):
        _, height, width = sizes[number]
        top, left = int(row[k] * (height - 4)), int(column[k] * (width - 4))
        patch = pictures[number][:, top : top + 5, left : left + 5]
        patch = torch.rot90(patch, int(turn[k] * 4), (1, 2))
        patch = patch.flip(-1) if int(turn[k] * 8) % 2 else patch
        assert torch.equal(patches[k], patch)


def test_no_noise_is_that_of_a_test_picture(folder):
    """evaluate.py adds the noise of default_rng([seed, k]) to picture k, also with this seed."""
    data = make(folder, target="second")
    for k in range(10):
        tested = torch.from_numpy(np.random.default_rng([0, k]).standard_normal(24 * 40))
        for view in ("image", "target"):
            noise = data.views[view][k].flatten().double()
            assert abs(torch.corrcoef(torch.stack([noise, tested]))[0, 1]) < 5 / (24 * 40) ** 0.5


def test_the_pictures_of_an_array_are_split(tmp_path):
    np.save(tmp_path / "many.npy", np.random.default_rng(0).uniform(0, 255, (10, 20, 20, 1)))
    numbers = make(tmp_path, copies="given", holdout=0.2).numbers
    assert len(numbers["train"]) == 8 and len(numbers["test"]) == 2


def stack_of(*counts, size=(20, 21), seed=0):
    """Return planes (*counts, *size) with noise of 30, uint16, brighter on the right."""
    planes = np.random.default_rng(seed).normal(1000, 30, (*counts, *size))
    return (planes + 300 * (np.arange(size[1]) > 14)).round().astype(np.uint16)


def test_planes_of_a_lone_stack_are_pictures_and_the_last_are_held_out(tmp_path):
    """With all channels of that time; each channel on its own scale, which is kept."""
    stack = stack_of(5, 2, size=(64, 64)) * np.array([1, 9], np.uint16)[:, None, None]
    tifffile.imwrite(
        tmp_path / "a.ome.tif", stack, ome=True, metadata={"axes": "TCYX"}, photometric="minisblack"
    )
    data = make(tmp_path, copies="given", level=0.0, holdout=0.4)
    assert data.numbers["train"].tolist() == list(range(6))
    assert data.numbers["test"].tolist() == list(range(6, 10))
    ends = [
        np.quantile(stack[:, c], [0.001, 0.999], method="inverted_cdf").astype(float)
        for c in (0, 1)
    ]
    noise = data.cfg.noise
    assert noise.scale == "quantiles"
    assert (noise.black, noise.white) == ([e[0] for e in ends], [e[1] for e in ends])
    for k, plane in enumerate(stack.reshape(10, 64, 64)):
        low, high = ends[k % 2]
        found = data.views["image"][k][0].double().numpy()
        assert np.abs(found - (2 * (plane - low) / (high - low) - 1)).max() < 1e-6
    # All planes of a channel have one level, 30 levels of the camera.
    assert len(set(data.levels)) == 2
    true = [30 * 255 / (ends[0][1] - ends[0][0]), 270 * 255 / (ends[1][1] - ends[1][0])]
    assert data.levels[:2] == pytest.approx(true, rel=0.1)
    assert batches(data)[0]["image"].shape == (8, 1, 16, 16)


def test_stacks_are_held_out_by_file(tmp_path):
    for k in range(5):
        tifffile.imwrite(tmp_path / f"{k}.tif", stack_of(3, seed=k), photometric="minisblack")
    Image.fromarray(stack_of(1)[0]).save(tmp_path / "single.png")
    data = make(tmp_path, copies="given", level=0.0, holdout=0.5)
    files = [*np.repeat(range(5), 3).tolist(), 5]
    train, test = ({files[k] for k in data.numbers[split]} for split in ("train", "test"))
    assert len(train) == len(test) == 3 and not train & test
    assert len(data.numbers["train"]) + len(data.numbers["test"]) == 16
    with pytest.raises(ValueError, match=r"data.patch=30: 0.tif\[0\] is \(20, 21\); take smaller"):
        cfg = data.cfg
        NoisyDataModule(
            DataConfig(
                name="imagefolder",
                root=cfg.root,
                channels=1,
                patch=30,
                noise=NoiseConfig(law="gaussian", copies="given"),
            )
        )


def test_the_channels_of_a_picture_are_held_out_together(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            tmp_path / f"{k}.png"
        )
    numbers = make(tmp_path, copies="given", holdout=0.4).numbers
    assert len(numbers["train"]) == 9 and len(numbers["test"]) == 6
    assert not set((numbers["train"] // 3).tolist()) & set((numbers["test"] // 3).tolist())


@pytest.mark.parametrize("kind", ["pages", "one header", "big-endian", "packed", "in colour"])
def test_values_stay_as_they_are_stored(tmp_path, monkeypatch, kind):
    """Unpacked grey planes of large stacks in the file; and patches are those of all as floats."""
    monkeypatch.setattr(stacks, "MAPPED", 1)
    values = np.random.default_rng(0).integers(0, 4000, (6, 24, 30), dtype=np.uint16)
    options = {"photometric": "minisblack"}
    if kind == "in colour":
        values = np.stack([values, values + 1, values + 2], axis=-1)
        options = {"photometric": "rgb"}
    options |= {"byteorder": ">"} if kind == "big-endian" else {}
    options |= {"compression": "zlib"} if kind == "packed" else {}
    options |= {"metadata": None} if kind in ("pages", "one header") else {}
    if kind == "one header":  # as ImageJ writes more than 4 GB
        options["description"] = "ImageJ=1.53t\nimages=6\nslices=6\n"
        tifffile.imwrite(tmp_path / "stack.tif", values[0], **options)
        with open(tmp_path / "stack.tif", "ab") as file:
            file.write(values[1:].tobytes())
    else:
        tifffile.imwrite(tmp_path / "stack.tif", values, **options)
    data = make(tmp_path, copies="given", level=0.0, holdout=0)
    view = data.views["image"]
    planes = values.reshape(6, 24, 30, -1).transpose(0, 3, 1, 2).reshape(-1, 24, 30, 1)
    assert len(view.values) == len(planes)
    for found, plane in zip(view.values, planes):
        assert np.array_equal(found, plane) and found.dtype.newbyteorder("=") == np.uint16
        assert isinstance(found, np.memmap) == (kind not in ("packed", "in colour"))
    scale = Scale(data.cfg.noise.black[0], data.cfg.noise.white[0])
    floats = Pictures([scale.tensor(plane) for plane in planes])
    numbers = torch.arange(60) % len(planes)
    at = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(view.cut(numbers, 16, *at), floats.cut(numbers, 16, *at))
    assert torch.equal(view[2], floats[2])


def test_axes_of_training_stacks_can_be_told(tmp_path):
    def given(axes="", **more):
        noise = NoiseConfig(law="gaussian", level=0.1, copies="given", scale="quantiles")
        options = {"name": "imagefolder", "root": str(tmp_path), "channels": 1, "patch": 16}
        return NoisyDataModule(DataConfig(**options, axes=axes, noise=noise, **more))

    planes = stack_of(4, 2)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack")
    assert len(given().cfg.noise.black) == 1
    ends = np.quantile(planes.swapaxes(0, 1).reshape(2, -1), 0.001, axis=1, method="inverted_cdf")
    assert given("TCYX").cfg.noise.black == ends.tolist()
    with pytest.raises(ValueError, match="has 4 dimensions, QQYX; axes=ZYX must name as many"):
        given("ZYX")
    with pytest.raises(ValueError, match="data.axes=ZYX: needs data.noise.law= and copies=given"):
        DataConfig(axes="ZYX", patch=16, noise=NoiseConfig(law="gaussian"))
    Image.fromarray(stack_of(1)[0]).save(tmp_path / "b.png")
    assert len(given(leave_out=["b"]).views["image"].values) == 8
