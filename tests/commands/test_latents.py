"""A model of latents from its training to its scores, by the commands."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import genmodels
import sample
import train
from genmodels import checkpoint, cli, generation
from genmodels.checkpoint import exports
from genmodels.checkpoint.cards import vae_to_share
from genmodels.checkpoint.diffusers import export_diffusers
from genmodels.checkpoint.merge import check_alike, merge
from genmodels.config import EvalConfig
from genmodels.config.schema import EDM2_VAE
from genmodels.data import commands
from genmodels.generation import to_pictures
from genmodels.methods.interpolant import Interpolant
from genmodels.training import start
from genmodels.training.judge import make_scorer
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows, state
from tests.helpers.small_vae import picture_folder, save_vae
from tests.helpers.tiny import last_words

SMALL = [
    "network.channels=16",
    "network.attention=[4]",
    "data.batch_size=4",
    "data.holdout=0.2",
    "method.steps=3",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "trainer.loggers=[csv]",
    "optim.decay=none",
    "optim.t_ref=0",
    "sample.every=0",
    "eval.loss_every=0",
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "latents"
    words = ["encode", picture_folder(folder), f"vae={vae}", f"out={out}", "statistics=edm2"]
    assert cli.run(commands.main, list(map(str, words))) == 0
    return out


def trained(out, latents, *words, config="edm2_digits"):
    argv = [str(ROOT / f"configs/{config}.yaml"), *SMALL, f"data.root={latents}", f"out_dir={out}"]
    argv += ["data.name=latents", "trainer.max_steps=2", *words]
    assert train.main(last_words(argv)) == 0
    (run,) = out.glob("*/*")
    return run


@pytest.fixture(scope="module")
def run(latents, tmp_path_factory):
    """Two steps, with a grid and a score on the way."""
    words = ["sample.every=2", "sample.num=4", "eval.every=2", "eval.num=8", "eval.metrics=[fd]"]
    return trained(tmp_path_factory.mktemp("runs"), latents, *words)


def decoded(vae, model, seeds, **options):
    """What diffusers alone makes of the model's latents, on EDM2's scale, uint8 (N, 3, H, W)."""
    from diffusers import AutoencoderKL

    x = model.sample(seeds, **options)
    m, s = (torch.tensor(v).reshape(4, 1, 1) for v in (EDM2_VAE.mean, EDM2_VAE.std))
    with torch.no_grad():
        pictures = AutoencoderKL.from_pretrained(vae).decode(x / 0.5 * s + m).sample
    return (pictures.clamp(0, 1) * 255).to(torch.uint8)


def test_training_remembers_the_vae_and_draws_decoded_grids(run, vae):
    model = genmodels.load(run)
    assert model.shape == (4, 4, 4) and model.cfg.data.vae.name == str(vae)
    assert model.cfg.data.vae.mean == EDM2_VAE.mean
    with Image.open(run / "samples" / "step-00000002.png") as grid:
        assert grid.mode == "RGB" and min(grid.size) >= 16
    assert "eval/fd_8" in (run / "metrics.csv").read_text()


def test_sample_writes_decoded_pictures(run, vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample.main([str(run), "num=3", f"out={out}"]) == 0
    found = torch.stack(
        [torch.tensor(np.asarray(Image.open(out / f"00000{k}.png"))) for k in range(3)]
    )
    off = found.permute(0, 3, 1, 2).int() - decoded(vae, genmodels.load(run), range(3)).int()
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 1e-2 and found.shape[1:3] == (8, 8)
    other = save_vae(tmp_path / "other", norm_num_groups=1)
    assert sample.main([str(run), "num=3", f"out={tmp_path / 'b'}", f"vae={other}"]) == 0
    assert (tmp_path / "b/000000.png").read_bytes() != (out / "000000.png").read_bytes()
    words = [str(run), "num=3", f"out={tmp_path}", "format=npz"]
    assert sample.main(words) == 0
    with np.load(tmp_path / "images.npz") as file:
        assert np.array_equal(file["images"], found)


def test_evaluate_scores_decoded_pictures(run, latents, vae, tmp_path, capsys):
    """Against the decoded means, and against the pictures themselves."""
    words = [str(run), "num=8", "metrics=fd", "features=pixels", "seed=3"]
    saved = f"save_images={tmp_path / 'made.npz'}"
    assert evaluate.main([*words, saved, f"out={tmp_path / 'a.json'}"]) == 0
    with np.load(tmp_path / "made.npz") as file:
        made = torch.tensor(file["images"]).permute(0, 3, 1, 2)
    expected = decoded(vae, genmodels.load(run), range(3, 11))
    assert (made.int() - expected.int()).abs().max() <= 1
    pictures = picture_folder(tmp_path / "pictures")
    assert evaluate.main([*words, f"reference={pictures}", f"out={tmp_path / 'b.json'}"]) == 0
    scores = [(tmp_path / f"{name}.json").read_text() for name in "ab"]
    assert scores[0] != scores[1]


@pytest.mark.slow
def test_scores_in_training_against_statistics_of_pictures(run, latents, tmp_path):
    """eval.reference=: the score that evaluate.py gives the same images against the same file."""
    stats, pictures = tmp_path / "stats.npz", picture_folder(tmp_path / "pictures")
    words = ["stats", f"images={pictures}", "features=pixels", f"out={stats}"]
    assert evaluate.main(words) == 0
    words = ["eval.every=2", "eval.num=8", "eval.metrics=[fd]", f"eval.reference={stats}"]
    found = trained(tmp_path / "runs", latents, *words)
    words = [str(found), "num=8", "metrics=fd", f"reference={stats}", f"out={tmp_path / 'a.json'}"]
    assert evaluate.main(words) == 0
    score = json.loads((tmp_path / "a.json").read_text())["metrics"]["fd"]["value"]
    (row,) = [row for row in rows(found) if row["eval/fd_8"]]
    assert float(row["eval/fd_8"]) == pytest.approx(score, rel=1e-4)
    decoded_means = [row for row in rows(run) if row["eval/fd_8"]]
    assert float(decoded_means[0]["eval/fd_8"]) != pytest.approx(score, rel=1e-3)
    with pytest.raises(ValueError, match=r"eval.reference=nothing"):
        make_scorer(EvalConfig(reference="nothing"), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vae=nowhere"], "vae=nowhere: no such folder"),
        (["vae={latents}"], "is no folder of diffusers"),
        (["vae={wide}"], "has latents of 8 channels, the model's have 4"),
        (["inpaint=a.png", "mask=b.png"], "does not complete images"),
    ],
)
def test_a_mistake_is_one_line_before_sampling(
    words, message, run, latents, tmp_path, capsys, monkeypatch
):
    wide = save_vae(tmp_path / "wide", latent_channels=8) if "wide" in words[0] else ""
    monkeypatch.setattr(generation, "_sample", None)
    words = [word.format(latents=latents, wide=wide) for word in words]
    assert sample.main([str(run), f"out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_without_diffusers_sampling_says_so(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    elsewhere = shutil.copytree(genmodels.load(run).cfg.data.vae.name, tmp_path / "vae")
    assert sample.main([str(run), "num=1", f"vae={elsewhere}", f"out={tmp_path / 'out'}"]) == 2
    assert "needs diffusers; pip install diffusers" in capsys.readouterr().err


def test_a_training_whose_vae_is_gone_goes_on_without_grids(latents, tmp_path, capsys):
    words = ["sample.every=1", "sample.num=1", f"data.vae.name={tmp_path / 'gone'}"]
    run = trained(tmp_path / "runs", latents, *words)
    assert "no grid of step 1 (vae=" in capsys.readouterr().err
    assert not any((run / "samples").iterdir())


@pytest.mark.slow
def test_cut_and_resumed_or_read_from_disk_a_run_ends_the_same(latents, tmp_path):
    """Bit for bit, also where the VAE lies elsewhere by then."""
    whole = trained(tmp_path / "whole", latents, "trainer.max_steps=4")
    disk = trained(
        tmp_path / "disk", latents, "trainer.max_steps=4", "data.device=disk", "data.workers=1"
    )
    cut = trained(tmp_path / "cut", latents)
    words = [f"resume={cut}", "trainer.max_steps=4", "data.vae.name=other/vae"]
    assert train.main(words) == 0
    assert_same(state(cut), state(whole))
    assert_same(state(disk), state(whole))
    assert genmodels.load(cut).cfg.data.vae.name == "other/vae"
    other = shutil.copytree(latents, tmp_path / "other")
    plain = json.loads((other / "latents.json").read_text())
    plain["vae"]["std"] = [1.0, 1.0, 1.0, 1.0]
    (other / "latents.json").write_text(json.dumps(plain))
    assert train.main([f"resume={cut}", "trainer.max_steps=5", f"data.root={other}"]) == 2


def test_likelihoods_and_pipelines_of_latents_are_refused(run, tmp_path, capsys):
    assert evaluate.main([str(run), "likelihood=true"]) == 2
    assert "no bits of pictures" in capsys.readouterr().err
    assert evaluate.main([str(run), "likelihood=true", "vae=x"]) == 2
    with pytest.raises(ValueError, match="diffusers has a place for edm with unet only|latents"):
        export_diffusers(run, tmp_path / "out")


def test_pictures_take_no_vae(tiny_run, tmp_path, capsys):
    assert sample.main([str(tiny_run), "num=1", "vae=x", f"out={tmp_path / 'a'}"]) == 2
    assert "vae=x: this model makes pictures, no latents" in capsys.readouterr().err
    assert evaluate.main([str(tiny_run), "num=4", "vae=x"]) == 2
    assert "vae=x: this model makes pictures, no latents" in capsys.readouterr().err


def test_an_export_keeps_the_scale_and_no_path_of_this_machine(run, vae, tmp_path, capsys):
    assert vae_to_share("stabilityai/sd-vae-ft-mse") == "stabilityai/sd-vae-ft-mse"
    assert not vae_to_share("docs/vae") and not vae_to_share("~/vae") and not vae_to_share("vae")
    folder = exports.export(run, tmp_path / "shared", samples=2)
    assert (folder / "samples.png").is_file()
    assert str(vae) not in "".join(p.read_text() for p in folder.glob("*.[jm][sd]*"))
    assert sample.main([str(folder), "num=2", f"out={tmp_path / 'a'}"]) == 2
    assert "vae=: which VAE made these latents is not known" in capsys.readouterr().err
    words = [str(folder), "num=2", f"vae={vae}", f"out={tmp_path / 'a'}"]
    assert sample.main(words) == 0
    model = checkpoint.load(folder)
    generation.choose_vae(model, str(vae))
    made = to_pictures(model, model.sample([0]))
    assert torch.equal(
        made[0].permute(1, 2, 0), torch.tensor(np.asarray(Image.open(tmp_path / "a/000000.png")))
    )


def test_other_methods_refuse_latents(latents):
    for config in ("gbm_digits", "cdrl_digits"):
        with pytest.raises(ValueError, match="learns no latents; edm, ddo, interpolant do"):
            checkpoint.build(
                ROOT / f"configs/{config}.yaml", "data.name=latents", f"data.root={latents}"
            )


def test_an_edm_of_latents_is_an_interpolant_of_latents(run):
    edm = genmodels.load(run)
    made = Interpolant.from_edm(edm)
    options = {"steps": 3, "sampler": "euler"}
    torch.testing.assert_close(
        made.sample([0], **options), edm.sample([0], **options), rtol=1e-4, atol=1e-4
    )
    assert to_pictures(made, made.sample([0], steps=2)).dtype == torch.uint8


def test_a_guide_of_another_scale_is_refused(run):
    model, guide = genmodels.load(run), genmodels.load(run)
    guide.cfg.data.vae.std = [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"guide=a model of latents on another scale: must have"):
        model.sample([0], guide=guide, guidance=2.0)


def test_merging_wants_latents_of_one_scale(run, tmp_path):
    made = checkpoint.load(merge([run, run], tmp_path / "merged"))
    seeds = range(2)
    assert torch.allclose(made.sample(seeds), genmodels.load(run).sample(seeds), atol=1e-5)
    with pytest.raises(ValueError, match="fisher=digits: is of pictures, the models are of lat"):
        merge([run, run], tmp_path / "other", fisher="digits")
    model, other = genmodels.load(run), genmodels.load(run)
    other.cfg.data.vae.std = [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="data.vae.std, of latents, differs"):
        check_alike(model, other, run)


def test_init_brings_the_scale_along(run, latents):
    """Latents of another scale are then refused, see fill_in_vae; pictures are too."""
    plain = {"network": {}, "method": {"name": "edm"}, "data": {}}
    for words in ({"data.root": str(latents)}, {}):
        data = start.bring(str(run), plain, words)["data"]
        assert data["vae"]["mean"] == EDM2_VAE.mean, words


@pytest.mark.slow
def test_ddo_of_latents(run, latents, tmp_path):
    """Fakes are kept as latents, scores are of decoded pictures."""
    words = [f"init={run}", "method.rounds=1", "method.pool=8", "method.alphas=[4]"]
    words += ["method.betas=[0.02]", "eval.num=8", "eval.metrics=[fd]", "eval.features=pixels"]
    words += [
        "data.holdout=0",
        "eval.every=1",
        "method.label_dropout=0.1",
        "method.name=ddo",
        "method.shard=4",
    ]
    kept, remove = {}, shutil.rmtree

    def look(path, **options):
        for shard in sorted(path.glob("shard-*.npz")) if path.name == "pool" else ():
            with np.load(shard) as file:
                kept[shard.name] = {key: file[key] for key in file.files}
        remove(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", look)
        ddo = trained(tmp_path / "ddo", latents, *words, config="ddo_digits")
    assert checkpoint.load(ddo).cfg.data.vae.mean == EDM2_VAE.mean
    pool = kept["shard-00000.npz"]
    model = genmodels.load(run)
    labels = torch.tensor(pool["labels"])
    expected = model.sample(pool["seeds"].tolist(), labels)
    assert pool["latents"].dtype == np.float32 and pool["latents"].shape == (4, 4, 4, 4)
    torch.testing.assert_close(torch.tensor(pool["latents"]), expected, rtol=1e-3, atol=1e-4)
