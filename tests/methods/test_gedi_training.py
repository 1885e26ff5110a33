"""GEDI through the scripts: training, resuming, sampling, clusters, evaluation."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import genmodels
import sample
import train
from genmodels import checkpoint
from genmodels.checkpoint import read_checkpoint
from genmodels.checkpoint.cards import scores_of_report
from genmodels.checkpoint.ema import write_average, write_averages
from genmodels.checkpoint.merge import merge
from genmodels.methods import gedi
from genmodels.methods.gedi import GEDI
from genmodels.run import Run
from tests.helpers.gedi_models import SMALL, batch_of, build, points, run_of, state_of
from tests.helpers.paths import ROOT


@pytest.fixture
def x():
    return points()


def test_resume_is_exact_with_buffer_and_marginal(tmp_path):
    words = ("method.marginal_ema=0.5", "trainer.accumulate=2", "ema.half_life=100")
    straight = run_of(tmp_path, *words, "trainer.max_steps=6")
    stopped = run_of(tmp_path, *words, "trainer.max_steps=3")
    middle = state_of(stopped)
    assert train.main([f"resume={stopped}", "trainer.max_steps=6"]) == 0
    first, second = state_of(straight), state_of(stopped)
    assert first.keys() == second.keys() and any(key.startswith("raw.") for key in first)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(middle["entries"], first["entries"])
    assert 0 < middle["mean_gap"] != first["mean_gap"]
    assert first["visits"].max() > 1 and first["log_ema"].exp().sum() == pytest.approx(1, abs=1e-5)


def test_a_run_that_diverges_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    original = GEDI.outputs

    def outputs(self, x):
        z, f = original(self, x)
        blow = 1e6 if self.training and self.global_step >= 3 and not self.cfg.method.retry else 0
        return z, f + blow * torch.linspace(0, 1, len(f))

    monkeypatch.setattr(GEDI, "outputs", outputs)
    out = tmp_path / "run"
    argv = [
        str(ROOT / "configs/gedi_moons.yaml"),
        str(ROOT / "configs/debug.yaml"),
        *SMALL,
        f"out_dir={out}",
        "sample.every=0",
        "trainer.progress=false",
        "data.points=200",
        "checkpoint.every=1",
        "trainer.max_steps=6",
        "optim.decay=none",
    ]
    assert train.main(argv) == 1
    error = capsys.readouterr().err
    (run,) = out.glob("*/*")
    assert "method.max_gap=1000: energies of data and chains ran apart at step 3" in error
    assert "'gap': " in error and f"python train.py resume={run} method.retry=1" in error
    before = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert before["global_step"] == 3 and torch.isfinite(before["replay"]["entries"]).all()
    assert train.main([f"resume={run}", "method.retry=1"]) == 0
    after = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert after["global_step"] == 6
    assert after["hyper_parameters"]["config"]["method"]["retry"] == 1
    lr = after["optimizer_states"][0]["param_groups"][0]["lr"]
    assert lr == 0.5 * before["optimizer_states"][0]["param_groups"][0]["lr"]


def test_chains_that_are_not_finite_stop_the_run_and_spare_the_buffer(x):
    model = build()
    model.loss(batch_of(x))
    before = model.replay.entries.clone()
    with torch.no_grad():
        model.head[0].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="ran apart"):
        model.loss(batch_of(x) | {"n": torch.arange(32, 64)})
    assert torch.equal(model.replay.entries, before)


def test_a_collapsed_run_says_so(tmp_path, capsys):
    words = (
        "trainer.max_steps=100",
        "method.w_gen=0",
        "method.w_inv=0",
        "method.tau=1000",
        "trainer.log_every=100",
    )
    run_of(tmp_path, *words)
    assert capsys.readouterr().out.count("every prediction is uniform") == 1


def test_a_run_without_clustering_terms_is_not_warned_of_clusters(tmp_path, capsys):
    words = (
        "trainer.max_steps=100",
        "method.w_gen=0",
        "method.w_inv=0",
        "method.w_prior_mean=0",
        "method.w_label=1",
        "method.tau=1000",
        "trainer.log_every=100",
    )
    run_of(tmp_path, *words)
    assert "every prediction is uniform" not in capsys.readouterr().out


def test_chains_on_another_process_stop_this_one(x):
    model = build()
    anyone = SimpleNamespace(reduce_boolean_decision=lambda decision, all: not all)
    model._trainer = SimpleNamespace(strategy=anyone, global_step=7, global_rank=0, world_size=2)
    with pytest.raises(FloatingPointError, match="ran apart at step 7"):
        model.loss(batch_of(x))


def test_two_processes_share_the_buffer_and_go_on_exactly(tmp_path):
    words = ("trainer.devices=2", "trainer.strategy=ddp_fork", "trainer.accelerator=cpu")
    straight = run_of(tmp_path, *words, "trainer.max_steps=4")
    stopped = run_of(tmp_path, *words, "trainer.max_steps=2")
    assert train.main([f"resume={stopped}", "trainer.max_steps=4"]) == 0
    first, second = state_of(straight), state_of(stopped)
    assert first["entries"].shape == (64, 2, 1, 1)
    assert not torch.equal(first["entries"][:32], first["entries"][32:])
    # Each process visits 16 of its 32 entries in each of the 4 steps.
    assert [int(first["visits"][part].sum() > 0) for part in (slice(32), slice(32, 64))] == [1, 1]
    for key in first:
        if first[key] is not None:
            assert torch.equal(first[key], second[key]), key


def test_pairs_of_training_images_stay_together():
    """Images 2k and 2k + 1 are neighbours at an even n; every pass holds each once, reordered."""
    from genmodels.data import TrainStream

    pixels = torch.arange(11, dtype=torch.uint8).reshape(11, 1, 1, 1)
    stream = TrainStream(pixels, torch.arange(11), 0, 4, lambda: 0, pairs=True)
    batches = [batch for batch, _ in zip(stream, range(10))]
    numbers = torch.cat([batch["label"] for batch in batches])
    assert torch.equal(numbers[0::2] % 2, torch.zeros(20, dtype=torch.int64))
    assert torch.equal(numbers[1::2], numbers[0::2] + 1)
    passes = numbers.reshape(4, 10)  # the odd one, image 10, is left out
    assert all(sorted(row.tolist()) == list(range(10)) for row in passes)
    assert len({tuple(row.tolist()) for row in passes}) == 4
    with pytest.raises(ValueError, match="data.pairs=True: does not go with data.balanced"):
        build("data.pairs=true", "data.balanced=true")


# ------------------------------------------------------------------------------------------------
# Sampling, exports, clusters


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A short run on the digits, with a buffer."""
    out = tmp_path_factory.mktemp("digits")
    config = out / "tiny.yaml"
    config.write_text(
        "data: {name: digits, batch_size: 32}\nnetwork: {name: resnet8, width: 8}\n"
        "method: {name: gedi, tau: 0.1, w_inv: 1, w_prior_mean: 1, step: 0.01, noise_scale: 0,\n"
        "  chain_steps: 2, buffer: 64, steps: 4, view_affine: 0.5}\n"
    )
    argv = [
        str(config),
        str(ROOT / "configs/debug.yaml"),
        f"out_dir={out}",
        "trainer.progress=false",
    ]
    assert train.main(argv) == 0
    (run,) = out.glob("tiny/*")
    return run


def test_grids_are_made_while_training(digits_run):
    assert [p.name for p in (digits_run / "samples").iterdir()] == ["step-00000004.png"]


def test_sampling_says_where_the_chains_came_from(digits_run, tmp_path, capsys):
    assert sample.main([str(digits_run), "num=4", "steps=3", f"out={tmp_path / 'a'}"]) == 0
    assert "4 images, fresh chains of 3 steps, 3 network" in capsys.readouterr().out
    words = ["num=4", "start=buffer", f"out={tmp_path / 'b'}"]
    assert sample.main([str(digits_run), *words, "labels=3"]) == 2
    assert "steps=0: leaves the buffer's images in any cluster" in capsys.readouterr().err
    assert sample.main([str(digits_run), *words]) == 0
    assert "4 images, the replay buffer's chains, 0 steps on" in capsys.readouterr().out
    model = genmodels.load(digits_run)
    entries = read_checkpoint(digits_run / "checkpoints/last.ckpt")["replay"]["entries"]
    assert torch.equal(model.sample([65], start="buffer")[0], entries[1])


def test_exports_cluster_and_go_on_from_the_chains(digits_run, tmp_path, capsys):
    out = checkpoint.export(digits_run, tmp_path / "model", half=True)
    model, run = genmodels.load(out), genmodels.load(digits_run)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model.cluster(x), run.cluster(x), atol=2e-3, rtol=0)
    ours, theirs = (m.sample(range(64), start="buffer") for m in (model, run))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    with pytest.warns(UserWarning, match="seeds from 64 on give the same images again"):
        assert torch.equal(model.sample([67], start="buffer")[0], ours[3])
    assert sample.main([str(out), "num=1", "start=buffer", f"out={tmp_path / 'a'}"]) == 0
    again = genmodels.load(checkpoint.export(out, tmp_path / "again", half=True))
    assert torch.equal(again.sample([3], start="buffer")[0], ours[3])


def test_a_merged_model_brings_no_chains_of_its_first(digits_run, tmp_path):
    merged = merge([digits_run, digits_run], tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["genmodels_format"] == 1
    assert genmodels.load(merged).replay.entries is None


def test_an_average_of_an_earlier_step_brings_no_chains_of_the_last(digits_run, tmp_path):
    run = Run(shutil.copytree(digits_run, tmp_path / "run"))
    state = dict(genmodels.load(digits_run).named_parameters())
    for step in (2, 4):
        write_average(run, step, 0.1, state)
    for step, words in ((2, {"step": "2"}), (4, {})):
        out = tmp_path / str(step)
        write_averages([str(run.folder)], {"sigma_rel": "0.1", "out": str(out), **words})
        assert (genmodels.load(out).replay.entries is not None) == (step == 4)


def test_an_export_without_old_chains_has_none(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gedi, "KEPT", 5)
    model = genmodels.load(digits_run)
    assert len(model.kept_chains()["entries"]) == 5
    model.replay.visits = torch.arange(64)
    model.cfg.method.min_visits = 62
    chains = model.kept_chains()
    assert torch.equal(chains["entries"], model.replay.entries[62:].half())
    assert chains["visits"].tolist() == [62, 63]
    model.cfg.method.min_visits = 99
    model.save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert written["genmodels_format"] == 1
    words = [str(tmp_path / "model"), "num=1", "start=buffer", f"out={tmp_path / 'a'}"]
    assert sample.main(words) == 2
    assert "this model has no chains of a training" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entries",
    [torch.zeros(64, 1, 8, 9), torch.full((64, 1, 8, 8), math.nan), torch.zeros(3, 1, 8, 8)],
    ids=["shape", "nan", "count"],
)
def test_odd_chains_in_an_export_are_refused(entries, digits_run, tmp_path):
    out = checkpoint.export(digits_run, tmp_path / "model")
    state = load_file(out / "model.safetensors")
    save_file(state | {"chains.entries": entries}, out / "model.safetensors", {"format": "pt"})
    described = json.loads((out / "config.json").read_text())
    described.pop("weights_sha256")  # as of an older export
    (out / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="keeps beside the weights cannot be read .*chains of"):
        genmodels.load(out)


def test_a_folder_goes_before_the_data_set_of_its_name(digits_run, tmp_path, capsys, monkeypatch):
    sample.main([str(digits_run), "num=3", "steps=1", f"out={tmp_path / 'digits'}"])
    run = digits_run.absolute()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert sample.main([str(run), "cluster=digits", "out=made"]) == 0
    assert "3 images in clusters" in capsys.readouterr().out


def test_a_plot_beside_ood(digits_run, tmp_path):
    """The facts of the images, and with them the plot, are kept beside those of ood=."""
    words = ["ood=constant", "metrics=prc", "num=20", "steps=1", "resamples=0"]
    words += [f"plot={tmp_path}/p.png", f"out={tmp_path}/r.json"]
    assert evaluate.main([str(digits_run), *words]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "p.png").exists() and report["features"]["name"] == "pixels"
    assert {"precision", "recall"} < set(report["metrics"])


def test_clusters_as_csv_and_exemplars(digits_run, tmp_path, capsys):
    out = tmp_path / "clusters"
    assert sample.main([str(digits_run), "cluster=digits:test", f"out={out}"]) == 0
    lines = (out / "clusters.csv").read_text().splitlines()
    assert lines[0] == "image,cluster,probability," + ",".join(f"p{c}" for c in range(10))
    assert len(lines) == 361
    row = lines[5].split(",")
    probabilities = [float(text) for text in row[3:]]
    assert row[0] == "4" and sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert probabilities[int(row[1])] == max(probabilities) == float(row[2])
    assert (out / "exemplars.png").exists()
    # Images in a folder go by their names.
    sample.main([str(digits_run), "num=3", "steps=1", f"out={tmp_path / 'made'}"])
    assert sample.main([str(digits_run), f"cluster={tmp_path / 'made'}", f"out={out}"]) == 0
    lines = (out / "clusters.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"00000{i}.png" for i in range(3)]
    capsys.readouterr()
    assert sample.main([str(digits_run), "cluster=moons", f"out={out}"]) == 2
    assert "cluster=moons: images of shape (2, 1, 1)" in capsys.readouterr().err


def test_evaluate_scores_clusters_and_images_together(digits_run, tmp_path, capsys):
    import json

    from sklearn.metrics import normalized_mutual_info_score

    from genmodels.data import load_split

    out = tmp_path / "scores.json"
    words = [
        "cluster=digits:test",
        "metrics=nmi,acc,fd",
        "num=20",
        "resamples=0",
        "steps=2",
        "features=pixels",
        f"out={out}",
    ]
    assert evaluate.main([str(digits_run), *words]) == 0
    scores = json.loads(out.read_text())["metrics"]
    assert list(scores) == ["nmi", "acc", "fd"]
    told = [(score.metric, score.data, score.num) for score in scores_of_report(out)]
    assert told == [
        ("nmi", "digits:test", 0),
        ("acc", "digits:test", 0),
        ("fd(pixels)", "digits", 20),
    ]
    model = genmodels.load(digits_run)
    pixels, labels = load_split(model.cfg.data, "test")
    found = model.cluster(pixels.float() / 127.5 - 1).argmax(1)
    expected = normalized_mutual_info_score(labels, found)
    assert scores["nmi"]["value"] == pytest.approx(expected, abs=1e-6)
    assert evaluate.main([str(digits_run), *words, "ood=noise"]) == 0  # all three in one command
    together = json.loads(out.read_text())["metrics"]
    assert together["fd"]["value"] == pytest.approx(scores["fd"]["value"], rel=1e-6)
    assert together["nmi"] == scores["nmi"] and "auroc_noise_f" in together
    assert evaluate.main([str(digits_run), "cluster=digits:test", f"out={out}"]) == 0
    assert list(json.loads(out.read_text())["metrics"]) == ["nmi", "acc", "ari", "ami"]
    capsys.readouterr()
    assert evaluate.main([str(digits_run), "ood=noise", "steps=2"]) == 2
    assert "unknown key steps=2" in capsys.readouterr().err
    assert evaluate.main([str(digits_run), "cluster=mnist", "metrics=nmi,bad"]) == 2
    assert "metrics=bad: choose from" in capsys.readouterr().err


def test_out_of_distribution_scores(digits_run):
    model = genmodels.load(digits_run)
    x = 2 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    scores = model.ood_scores(x)
    torch.testing.assert_close(scores["f"], -model.energy(x).detach())
    torch.testing.assert_close(scores["confidence"], model.cluster(x).amax(1))
    step, direction = 1e-2, torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    direction = direction / direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    slope = (model.energy(x + step * direction) - model.energy(x - step * direction)) / (2 * step)
    assert (slope.detach().abs() <= -scores["grad_norm"] * 1.01).all()
    y = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(model.energy(y).sum(), y)
    torch.testing.assert_close(scores["grad_norm"], -grad.square().sum((1, 2, 3)).sqrt())
