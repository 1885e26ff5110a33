"""Latents: encoded by a small AutoencoderKL, drawn in training, decoded again."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genmodels import cli, seeding
from genmodels.config import DataConfig
from genmodels.config.load import kind_of_files
from genmodels.config.schema import EDM2_VAE, VAEConfig
from genmodels.data import ImageDataModule, commands, encode, latents, load_split
from genmodels.data.sets import check_settings, fill_in
from genmodels.data.source import read_source
from genmodels.images.autoencoder import load_autoencoder
from genmodels.kernels.philox import philox_normal
from tests.helpers.processes import together
from tests.helpers.small_vae import FACTOR, picture_folder, save_vae


def run(*argv):
    return cli.run(commands.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def made(vae, folder, tmp_path_factory):
    """Latents of ten pictures, with EDM2's statistics."""
    out = tmp_path_factory.mktemp("made") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SHARD", 4)
        assert run("encode", folder, f"vae={vae}", f"out={out}", "statistics=edm2", "batch=3") == 0
    return out


def pictures_of(folder):
    """Pictures and labels, read by Pillow in the order of the names: cat 0, dog 1."""
    paths = sorted(folder.rglob("*.png"))
    levels = [np.asarray(Image.open(path)) for path in paths]
    return torch.tensor(np.stack(levels)).permute(0, 3, 1, 2), [p.parent.name for p in paths]


def test_encode_stores_what_diffusers_makes_of_the_pictures(made, vae, folder):
    from diffusers import AutoencoderKL

    assert sorted(p.name for p in made.iterdir()) == [
        "latents.json",
        *(f"train-0000{k}.npy" for k in range(3)),
        "train_labels.npy",
    ]
    pictures, names = pictures_of(folder)
    with torch.no_grad():  # EDM2 gives the VAE pixels on [0, 1]
        law = AutoencoderKL.from_pretrained(vae).encode(pictures.float() / 255).latent_dist
    stored = torch.tensor(np.concatenate([np.load(p) for p in sorted(made.glob("train-*.npy"))]))
    assert stored.dtype == torch.float32 and stored.shape == (10, 8, 4, 4)
    torch.testing.assert_close(stored, torch.cat([law.mean, law.std], 1), rtol=1e-5, atol=1e-6)
    assert np.load(made / "train_labels.npy").tolist() == [int(n == "dog") for n in names]
    about = json.loads((made / "latents.json").read_text())
    assert about["class_names"] == ["cat", "dog"] and about["splits"] == {"train": 10}
    assert about["vae"]["name"] == str(vae) and about["pictures"] == [3, 8, 8]


def test_a_latent_is_drawn_anew_each_time_an_image_is_met(made):
    """z = mean + std eps, x = (z - m) / (2 s) with EDM2's numbers; eps by (seed, n) alone."""
    cfg = DataConfig(name="latents", root=str(made), holdout=0.0, batch_size=4)
    data = ImageDataModule(cfg, seed=3)
    assert (cfg.shape, cfg.classes, cfg.vae) == ([4, 4, 4], 2, latents.read_description(made).vae)
    moments = data.train[0]
    m = torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(4, 1, 1)
    s = torch.tensor([4.17, 4.62, 3.71, 3.28]).reshape(4, 1, 1)
    n = torch.arange(20_000)
    drawn = latents.draw(moments[:1].expand(len(n), -1, -1, -1), cfg.vae, 3, n)
    mean, std = moments[0].chunk(2)
    z = drawn * 2 * s + m
    assert ((z.mean(0) - mean) / (std / len(n) ** 0.5)).abs().max() < 5
    assert (z.std(0) / std - 1).abs().max() < 5 / (2 * len(n)) ** 0.5
    noise = philox_normal((4, 4, 4), 3, n, stream=int(seeding.Stream.NOISE))
    correlation = (((z - mean) / std) * noise).mean(0)  # with the noise of training: none
    assert correlation.abs().max() < 5 / len(n) ** 0.5
    batch = {"image": moments[:4], "label": data.train[1][:4], "n": torch.tensor([7, 8, 9, 10])}
    data.trainer = None
    whole = data.on_after_batch_transfer(batch, 0)["image"]
    parts = [
        data.on_after_batch_transfer({k: v[i : i + 1] for k, v in batch.items()}, 0)["image"]
        for i in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts))
    later = data.on_after_batch_transfer(batch | {"n": batch["n"] + 10}, 0)["image"]
    assert not torch.equal(whole, later) and whole.dtype == torch.float32
    held = data.on_after_batch_transfer(batch | {"n": seeding.HELD_OUT + batch["n"]}, 0)["image"]
    assert not torch.equal(whole, held)


def test_latents_on_disk_are_those_in_memory(made):
    cfgs = [DataConfig(name="latents", root=str(made), device=d) for d in ("cpu", "disk")]
    memory, disk = (load_split(cfg, "train") for cfg in cfgs)
    picked = torch.tensor([8, 0, 5, 3])
    assert torch.equal(memory[0][picked], disk[0][picked]) and torch.equal(memory[1], disk[1])
    assert disk[0].nbytes == 10 * 8 * 16 * 4 - 8 * 16 * 4 * (10 - len(disk[0]))
    held = load_split(DataConfig(name="latents", root=str(made), holdout=0.3), "test")
    assert len(held[0]) == 3


def test_reading_them_as_pictures_decodes_the_means(made, vae):
    from diffusers import AutoencoderKL

    source = read_source("latents", root=str(made), device="cpu")
    moments = load_split(DataConfig(name="latents", root=str(made)), "train")[0]
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(vae).decode(moments[:, :4]).sample
    expected = (decoded.clamp(0, 1) * 255).to(torch.uint8)  # as EDM2's decoder cuts off
    off = (source.pixels[torch.arange(len(moments))].int() - expected.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    assert source.pixels.shape[1:] == (3, 4 * FACTOR, 4 * FACTOR)


def test_measured_statistics_are_those_of_the_draws(vae, folder, tmp_path, capsys):
    out = tmp_path / "latents"
    assert run("encode", folder, f"vae={vae}", f"out={out}", "statistics=measured") == 0
    about = latents.read_description(out)
    assert about.vae.pixels == "-1..1"
    pictures, _ = pictures_of(folder)
    moments = load_autoencoder(str(vae)).moments(pictures, "-1..1")
    torch.manual_seed(0)
    mean, std = moments.chunk(2, dim=1)
    z = torch.cat([mean + std * torch.randn(mean.shape) for _ in range(400)])
    z = z.movedim(1, 0).flatten(1).double()
    assert torch.tensor(about.vae.mean) == pytest.approx(z.mean(1), abs=0.02)
    assert torch.tensor(about.vae.std) == pytest.approx(z.std(1), rel=0.01)
    capsys.readouterr()
    assert run("info", out) == 0
    shown = capsys.readouterr().out
    assert "0 cat, 1 dog" in shown and "(4, 4, 4)" in shown
    row = next(line for line in shown.splitlines() if "│ train" in line)
    assert float(row.split("│")[5]) == pytest.approx(0.5, abs=0.02)


def test_statistics_that_do_not_fit_are_said(vae, folder, tmp_path, capsys):
    assert run("encode", folder, f"vae={vae}", f"out={tmp_path / 'a'}", "statistics=edm2") == 0
    assert "statistics=measured fits them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "0..1"), ({"scaling_factor": 0.13025}, "-1..1"), ({"latent_channels": 16}, "-1..1")],
)
def test_only_vaes_of_the_first_stable_diffusion_get_edm2s_statistics(
    settings, expected, folder, tmp_path
):
    save_vae(tmp_path / "pipeline" / "vae", **settings)  # SDXL's factor; SD3's channels
    assert run("encode", folder, f"vae={tmp_path / 'pipeline'}", f"out={tmp_path / 'a'}") == 0
    vae = latents.read_description(tmp_path / "a").vae
    assert vae.pixels == expected
    assert (vae.mean == EDM2_VAE.mean) == (expected == "0..1")


def test_a_killed_encoding_goes_on(made, vae, folder, tmp_path, monkeypatch):
    out, words = tmp_path / "latents", [f"vae={vae}", "statistics=edm2", "batch=3"]
    monkeypatch.setattr(encode, "SHARD", 4)
    shards = [0]

    def save(file, array):
        shards[0] += 1
        np.lib.format.write_array(file, array[: 2 if shards[0] == 2 else None])
        if shards[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode.np, "save", save)
        with pytest.raises(KeyboardInterrupt):
            commands.encode([str(folder)], dict(w.split("=") for w in [*words, f"out={out}"]))
    assert sorted(p.name for p in out.iterdir()) == ["encoding.json", "train-00000.npy"]
    with pytest.raises(ValueError, match=r"data.root=.*: has no latents.json"):
        load_split(DataConfig(name="latents", root=str(out)), "train")
    assert run("encode", folder, f"out={out}", f"vae={vae}", "statistics=measured") == 2
    before = (out / "train-00000.npy").stat().st_mtime_ns
    assert run("encode", folder, f"out={out}", *words) == 0
    assert (out / "train-00000.npy").stat().st_mtime_ns == before
    for path in made.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path


@pytest.mark.slow
def test_two_processes_encode_the_same(made, vae, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 4)
    words = [str(folder), f"vae={vae}", f"out={tmp_path / 'out'}", "statistics=edm2", "batch=3"]
    ended = together(["data", "encode", *words], tmp_path, script="genmodels.commands.main")
    assert [process.code for process in ended] == [0, 0], ended
    assert "10 images" in ended[0].text and "10 images" not in ended[1].text, ended
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path


def test_splits_and_grey_pictures_are_kept(vae, folder, tmp_path):
    words = [f"vae={vae}", f"out={tmp_path / 'a'}", "channels=1", "holdout=0.3"]
    assert run("encode", folder, *words) == 0
    cfg = DataConfig(name="latents", root=str(tmp_path / "a"))
    given = {"name": "imagefolder", "root": str(folder), "channels": 1, "holdout": 0.3}
    for split, count in (("train", 7), ("test", 3)):
        pixels, labels = load_split(cfg, split)
        grey, expected = load_split(DataConfig(**given), split)
        assert torch.equal(labels, expected) and pixels.shape == (count, 8, 4, 4)
        colour = grey.expand(-1, 3, -1, -1)
        assert torch.allclose(pixels, load_autoencoder(str(vae)).moments(colour, "0..1"), atol=1e-5)
    assert kind_of_files(tmp_path / "a") == "latents"


def test_the_zip_of_edm2s_tool_is_read_as_it_is(tmp_path, monkeypatch):
    """00000/img-mean-std-00000000.npy, (8, h, w) in float32, labels in dataset.json."""
    rows = torch.randn(6, 8, 4, 4)
    names = [f"00000/img-mean-std-{k:08d}.npy" for k in range(6)]
    path = tmp_path / "img512-sd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, row in zip(names, rows):
            buffer = io.BytesIO()
            np.save(buffer, row.numpy())
            archive.writestr(name, buffer.getvalue())
        archive.writestr(
            "dataset.json", json.dumps({"labels": [[n, 5 - k] for k, n in enumerate(names)]})
        )
    cfg = DataConfig(name="latents", root=str(path), holdout=0.0)
    pixels, labels = load_split(cfg, "train")
    assert torch.equal(pixels, rows) and labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert fill_in(cfg).shape == [4, 4, 4] and cfg.vae == EDM2_VAE
    with pytest.raises(ValueError, match="latents as EDM2 stores them are data.name=latents"):
        load_split(DataConfig(name="zip", root=str(path)), "train")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("00000/img-mean-std-00000006.npy", b"no array")
    latents._edm2_tree.cache_clear()
    with pytest.raises(ValueError, match="img-mean-std-00000006.npy cannot be read|has no label"):
        load_split(cfg, "train")


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genmodels_latents": 2, "more": 1}, "is of a newer format; upgrade genmodels"),
        ({"shape": [3, 4, 4]}, "its numbers do not go together"),
        ({"shape": [4, 4]}, "its numbers do not go together"),
        ({"splits": {"test": 3}}, "its numbers do not go together"),
        ({"splits": None}, "cannot be read"),
        ({"vae": {"name": "a"}}, "does not say on what scale"),
        ({"vae": {"std": [0, 1, 1, 1]}}, "data.vae.std=.*must be > 0"),
        ({"vae": 3}, "cannot be read"),
    ],
)
def test_a_spoiled_description_is_one_line(change, message, made, tmp_path):
    plain = json.loads((made / "latents.json").read_text())
    (tmp_path / "latents.json").write_text(json.dumps(plain | change))
    with pytest.raises(ValueError, match=f"data.root=.*{message}"):
        load_split(DataConfig(name="latents", root=str(tmp_path)), "train")


def test_a_spoiled_file_is_named(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "latents")
    (folder / "train-00001.npy").write_bytes((folder / "train-00001.npy").read_bytes()[:-1])
    cfg = DataConfig(name="latents", root=str(folder), holdout=0.0)
    with pytest.raises(ValueError, match=r"npy=.*train-00001.npy: cannot be read"):
        load_split(cfg, "train")
    np.save(folder / "train-00001.npy", np.zeros((4, 8, 4, 4)))
    with pytest.raises(ValueError, match=r"npy=.*train-00001.npy: holds float64"):
        load_split(cfg, "train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vae=nowhere"], "vae=nowhere: no such folder, and no OWNER/NAME of the hub"),
        (["vae=no/such"], "vae=no/such: cannot be loaded"),
        (["vae={folder}"], "is no folder of diffusers"),
        (["resolution=7"], "give a resolution= that is a multiple of 2"),
        (["out={made}"], "holds finished latents"),
        (["out={folder}"], "is what the command reads"),
        (["out="], "out=: name the folder to make"),
        (["statistics=sd"], "statistics=sd: choose from auto, edm2, measured"),
        (["batch=0"], "batch=0: must be >= 1"),
    ],
)
def test_a_mistake_is_one_line(words, message, vae, folder, made, tmp_path, capsys):
    given = {"vae": vae, "out": tmp_path / "out"}
    given |= dict(word.format(folder=folder, made=made).split("=") for word in words)
    assert run("encode", folder, *(f"{k}={v}" for k, v in given.items())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_vae_of_an_old_diffusers_is_read(vae, folder, tmp_path):
    """Stable Diffusion's VAEs were saved when attention's weights had other names."""
    old = shutil.copytree(vae, tmp_path / "old")
    file = old / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = load_file(file), {}
    for key, tensor in state.items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.")
        renamed[key] = tensor
    assert renamed.keys() != state.keys()
    save_file(renamed, file, {"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    del config["scaling_factor"]  # there was none, and it means Stable Diffusion 1's
    (old / "config.json").write_text(json.dumps(config))
    pictures, _ = pictures_of(folder)
    ours, theirs = (load_autoencoder(str(path)) for path in (old, vae))
    assert ours.is_first_sd
    assert torch.equal(ours.moments(pictures, "0..1"), theirs.moments(pictures, "0..1"))


def test_weights_that_lack_something_are_no_vae(vae, tmp_path):
    """Diffusers would draw it at random, and say so in a log."""
    broken = shutil.copytree(vae, tmp_path / "broken")
    file = broken / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["decoder.conv_out.bias"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those of its AutoencoderKL: decoder.conv_out"):
        load_autoencoder(str(broken))


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(ValueError, match="is a AutoencoderTiny; give an AutoencoderKL"):
        load_autoencoder(str(tmp_path))


def test_latents_of_latents_are_refused(made, vae, tmp_path, capsys):
    assert run("encode", made, f"vae={vae}", f"out={tmp_path / 'a'}") == 2
    assert "latents are no pictures" in capsys.readouterr().err
    assert run("convert", made, f"out={tmp_path / 'a.zip'}") == 2
    assert "latents are no pictures" in capsys.readouterr().err


def test_settings_that_mean_nothing_to_latents_are_refused():
    for key, value in (("flip", True), ("pad", 2)):
        with pytest.raises(ValueError, match=f"data.{key}=.*changes pictures, not latents"):
            check_settings(DataConfig(name="latents", **{key: value}))
    with pytest.raises(ValueError, match=r"data.vae.name=x: is for data.name=latents"):
        check_settings(DataConfig(vae=VAEConfig(name="x")))


def test_a_model_goes_on_with_latents_of_its_own_scale_alone(made):
    cfg = DataConfig(name="latents", root=str(made), vae=VAEConfig(name="other/vae"))
    assert fill_in(cfg).vae.name == "other/vae" and cfg.vae.mean == EDM2_VAE.mean
    cfg.vae.std = [1.0, 1.0, 1.0, 1.0]
    cfg.shape, cfg.classes = [], -1
    with pytest.raises(ValueError, match=r"data.vae.std=.*the latents at data.root=.* have"):
        fill_in(cfg)
