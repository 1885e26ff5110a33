import csv
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genmodels import generation, images
from genmodels.checkpoint import read_checkpoint
from genmodels.training import callbacks
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY


def edm_ema(weights, half_life, rampup, batch):
    """The average after each step by the published rule, in float64, one number at a time."""
    average, averages = None, []
    for step, weight in enumerate(weights):
        seen = step * batch
        life = min(half_life, rampup * seen) if rampup else half_life
        beta = 0.5 ** (batch / max(life, 1e-8))
        average = weight if average is None else beta * average + (1 - beta) * weight
        averages.append(average)
    return averages


@pytest.mark.parametrize("rampup", [0.0, 0.05])
def test_ema_follows_the_published_rule(rampup):
    ema = callbacks.EMA(half_life=1000.0, rampup=rampup, batch_size=32)
    model = nn.Linear(1, 1, bias=False)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ema._average_model = average = torch.optim.swa_utils.AveragedModel(model)
    expected = edm_ema(weights.tolist(), 1000.0, rampup, 32)
    for step, weight in enumerate(weights):
        nn.init.constant_(model.weight, float(weight))
        ema.update(model)
        ema._latest_update_step = step + 1
        assert float(average.module.weight) == pytest.approx(expected[step], abs=1e-5)


def test_ema_follows_the_model_to_its_device():
    """Stands in for a GPU: the averaged LightningModule must know where its weights are."""
    import genmodels

    model = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *TINY)
    ema = callbacks.EMA(half_life=100.0, rampup=0.0, batch_size=1)
    ema.setup(None, model, "fit")
    ema.on_fit_start(None, model.to("meta"))
    assert ema.module.device.type == "meta"
    assert next(ema.module.parameters()).device.type == "meta"


def test_ema_leaves_frozen_weights_alone():
    ema = callbacks.EMA(half_life=100.0, rampup=0.0, batch_size=1)
    model = nn.Linear(50, 50)
    ema._average_model = average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(500):
        ema.update(model)
    assert torch.equal(average.module.weight, model.weight)


def test_the_matrix_precision_can_be_sent_to_a_spawned_process():
    """trainer.strategy=ddp_spawn pickles the callbacks."""
    assert pickle.loads(pickle.dumps(callbacks.MatrixPrecision(True))).tf32


def test_sampling_restores_the_matrix_precision(tiny_run):
    import genmodels

    model = genmodels.load(tiny_run)
    with generation.tf32(True):
        generation.generate_all(model, range(2), steps=1, progress=False)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32


def test_tensorboard_keeps_its_points_over_a_resume(train_tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import train

    words = ("method.steps=1", "eval.every=2", "eval.num=8", "trainer.loggers=[csv,tensorboard]")
    run = train_tiny("trainer.max_steps=4", *words)
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 0
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("eval/fd_8")] == [1, 3, 5]  # counted from 0
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_grids_and_metrics_while_training(train_tiny):
    run = train_tiny(
        "sample.every=2",
        "sample.num=4",
        "method.steps=2",
        "eval.every=2",
        "eval.num=8",
        "eval.metrics=fd,nn1",
        "eval.features=digits",
        "eval.loss_every=2",
        "trainer.loggers=[csv,tensorboard]",
    )
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["step-00000002.png", "step-00000004.png"]
    sheet = images.read_image(run / "samples" / grids[0])
    assert sheet.shape[-1] >= 480  # tiny images are enlarged to be seen
    rows = read(run / "metrics.csv")
    assert [row["step"] for row in rows if row["eval/fd_8"]] == ["2", "4"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["2", "4"]
    assert all(float(row["eval/nn1_8"]) <= 1 for row in rows if row["eval/fd_8"])
    assert all(float(row["train/images_per_second"]) > 0 for row in rows)
    assert list(run.glob("events.out.tfevents.*"))


def test_the_first_grid_is_early_and_each_class_has_a_column(train_tiny, monkeypatch):
    """Column k of the sheet is drawn with class k; the seeds are the same at every step."""
    from genmodels.methods.edm import EDM

    asked = []

    def by_label(self, seeds, labels=None, **options):
        asked.append(list(seeds))
        grey = torch.tensor(labels).float() / 5 - 0.9
        return grey.reshape(-1, 1, 1, 1).expand(-1, *self.shape)

    monkeypatch.setattr(EDM, "sample", by_label)
    monkeypatch.setattr(callbacks, "EARLY", 2)
    run = train_tiny("data.labels=true", "trainer.max_steps=6", "sample.every=3", "sample.num=20")
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 3, 6)]
    assert asked == [list(range(20))] * 3
    sheet = images.read_image(run / "samples" / names[0])[0]
    cell = sheet.shape[1] // 10
    middles = sheet[sheet.shape[0] // 4 :: sheet.shape[0] // 2, cell // 2 :: cell]
    expected = ((torch.arange(10) / 5 - 0.9) * 127.5 + 128).clip(0, 255).to(torch.uint8)
    assert middles.shape == (2, 10) and (middles == expected).all()


@pytest.mark.parametrize(
    "classes, present, num, labels, columns",
    [
        (0, [], 64, None, None),
        (10, [], 64, [*range(10)] * 6, 10),
        (10, [2, 7], 6, [2, 7] * 3, 2),
        (10, [2, 7], 60, [2, 2, 2, 2, 7, 7, 7, 7] * 7, 8),
        (1000, [], 64, [k * 125 for k in range(8)] * 8, 8),
        (10, [], 4, [0, 5] * 2, 2),
        (10, [], 10, [*range(10)], 10),
        (3, [], 1, [0], 1),
    ],
)
def test_labels_of_a_grid(classes, present, num, labels, columns):
    model = SimpleNamespace(classes=classes, present=present, CLUSTERS=False)
    assert generation.class_grid(model, num) == (labels, columns)
    model.CLUSTERS = True  # its labels name clusters; None is the model of all of them
    assert generation.class_grid(model, num) == (None, None)


@pytest.mark.parametrize(
    "labels, columns",
    [
        (None, None),
        ([], None),
        ([3] * 9, 3),
        ([1, 2, 1, 2, 1], 2),
        ([1, 2] * 50, 10),
        ([*range(10)] * 2, 10),
        ([1, 2, 2, 1], None),
        ([0, 1, 2], 3),
    ],
)
def test_columns_of_labels_that_recur(labels, columns):
    assert generation.class_columns(labels) == columns


def test_wandb_gets_grids_and_plots(train_tiny, monkeypatch):
    """Offline: the pictures lie in its folder, and its own record names them."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ("sample.every=2", "sample.num=4", "method.steps=1", "trainer.loggers=[csv,wandb]")
    run = train_tiny(*words, "eval.every=4", "eval.num=8", "eval.metrics=prc")
    (media,) = run.glob("wandb/offline-run-*/files/media/images")
    names = sorted(path.name.partition("_")[0] for path in media.iterdir())
    assert names == ["samples", "samples", "scores"]
    sheet = images.read_image(run / "samples" / "step-00000002.png")
    shown = [images.read_image(path) for path in media.glob("samples_*")]
    assert any(torch.equal(picture, sheet) for picture in shown)


def test_tensorboard_gets_grids_and_plots(train_tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("sample.every=2", "sample.num=4", "method.steps=1", "eval.every=4", "eval.num=8")
    run = train_tiny(*words, "eval.metrics=prc", "trainer.loggers=[csv,tensorboard]")
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [1, 3]  # counted from 0
    assert "train/loss" in events.Tags()["scalars"] and "hp_metric" not in events.Tags()["scalars"]
    (plot,) = events.Images("scores")
    assert plot.width > 400 and plot.encoded_image_string.startswith(b"\x89PNG")
    grid = events.Images("samples")[1].encoded_image_string
    written = images.read_image(run / "samples" / "step-00000004.png")
    assert (images.read_values(grid, "a.png") == written.permute(1, 2, 0).numpy()).all()


def test_looking_does_not_change_training(train_tiny):
    """Grids, metrics and the held-out loss draw noise of their own."""
    words = ("trainer.max_steps=4", "network.dropout=0.2", "method.steps=2")
    plain = train_tiny(*words)
    looked = train_tiny(*words, "sample.every=1", "eval.every=2", "eval.num=8", "eval.loss_every=1")
    states = [
        read_checkpoint(run / "checkpoints" / "last.ckpt")["current_model_state"]
        for run in (plain, looked)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_non_finite_gradients_are_skipped_then_stop_the_run(
    train_tiny, monkeypatch, capsys, tmp_path
):
    """Steps 3 and 4 are bad: they leave the weights alone; three in a row stop the run."""
    import train
    from genmodels.methods.edm import EDM

    original = EDM.loss

    def poisoned(bad):
        def loss(self, batch):
            value, logs = original(self, batch)
            return value * (float("nan") if self.global_step in bad else 1.0), logs

        return loss

    words = ("trainer.max_steps=5", "checkpoint.every=1", "checkpoint.keep=0")
    monkeypatch.setattr(EDM, "loss", poisoned({2, 3}))
    run = train_tiny(*words)
    assert capsys.readouterr().out.count("step skipped") == 2
    weights = [
        read_checkpoint(run / "checkpoints" / f"step-{step:08d}.ckpt")["current_model_state"]
        for step in (2, 3, 4, 5)
    ]
    key = "net.net.unet.conv_out.weight"
    assert torch.equal(weights[0][key], weights[2][key])
    assert not torch.equal(weights[2][key], weights[3][key])
    assert all(torch.isfinite(tensor).all() for tensor in weights[3].values())
    monkeypatch.setattr(EDM, "loss", poisoned(range(2, 99)))
    argv = [
        str(ROOT / "configs/edm_digits.yaml"),
        str(ROOT / "configs/debug.yaml"),
        *TINY,
        "sample.every=0",
        f"out_dir={tmp_path}",
        "trainer.max_steps=50",
        "trainer.max_nonfinite=3",
    ]
    assert train.main(argv) == 1
    assert "trainer.max_nonfinite=3: that many steps in a row" in capsys.readouterr().err
    (stopped,) = tmp_path.glob("*/*")
    assert read_checkpoint(stopped / "checkpoints" / "last.ckpt")["global_step"] == 4
