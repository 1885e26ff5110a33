"""What each setting does to a training, seen in the run itself or worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import genmodels
import train
from genmodels import generation
from genmodels.checkpoint import read_checkpoint
from genmodels.methods.edm import EDM
from genmodels.networks.precond import Precond
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

OUT = "net.net.unet.conv_out.weight"


def build(*words):
    configs = [str(ROOT / "configs" / name) for name in ("edm_digits.yaml", "debug.yaml")]
    return genmodels.build(configs, *TINY, *words)


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


# ------------------------------------------------------------------------------------------------
# Which weights are looked at


@pytest.mark.parametrize("half_life", [100, 0])
def test_grids_and_metrics_show_the_averaged_weights(train_tiny, monkeypatch, half_life):
    """The average of the same step, in eval mode; without an average the raw weights."""
    original, seen = EDM.sample, {}

    def spy(self, seeds, *args, **options):
        seen[len(seeds)] = (self.state_dict()[OUT].clone(), self.training)
        return original(self, seeds, *args, **options)

    monkeypatch.setattr(EDM, "sample", spy)
    run = train_tiny(
        "sample.every=4",
        "sample.num=3",
        "eval.every=4",
        "eval.num=5",
        "eval.metrics=nn1",
        "method.steps=1",
        "ema.rampup=0",
        f"ema.half_life={half_life}",
    )
    saved = last(run)
    assert sorted(seen) == [3, 5]  # the grid and the metrics
    for weights, training in seen.values():
        assert torch.equal(weights, saved["state_dict"][OUT]) and not training
        if half_life:
            assert (weights - saved["current_model_state"][OUT]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------
# Optimizer


def train_with_gradients(train_tiny, monkeypatch, gradients, *words):
    """Train on a loss whose gradient in conv_in (weight, bias) is given for each step.

    Returns the two parameters before the first and after the last step, and the lr of each loss.
    """
    first, rates = [], []

    def loss(self, batch):
        unet = self.net.net.unet
        parameters = (unet.conv_in.weight, unet.conv_in.bias)
        if not first:
            first.extend(parameter.detach().clone().double() for parameter in parameters)
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        both = zip(gradients[self.global_step], parameters)
        value = sum(gradient * parameter.sum() for gradient, parameter in both)
        return value, {"loss": value.detach()}

    monkeypatch.setattr(EDM, "loss", loss)
    run = train_tiny(f"trainer.max_steps={len(gradients)}", *words)
    state = last(run)["current_model_state"]
    ends = [state[f"net.net.unet.conv_in.{name}"].double() for name in ("weight", "bias")]
    return first, ends, rates


def adamw(w, gradients, lr, betas, eps, decay):
    """Kingma and Ba 2015, algorithm 1, with Loshchilov and Hutter's decoupled decay."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        corrected = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * decay * w - lr * corrected[0] / (math.sqrt(corrected[1]) + eps)
    return w


GRADIENTS = [(0.5, -2.0), (-0.1, 1.0), (0.3, 0.2)]  # of conv_in's 144 weights and 16 biases


@pytest.mark.parametrize(
    "betas, eps, decay",
    [
        ((0.5, 0.999), 1e-8, 0.0),
        ((0.9, 0.6), 1e-8, 0.0),
        ((0.9, 0.999), 0.5, 0.0),
        ((0.9, 0.999), 1e-8, 2.0),
    ],
    ids=["beta1", "beta2", "eps", "weight_decay"],
)
def test_adam_with_the_settings_of_the_config(train_tiny, monkeypatch, betas, eps, decay):
    words = (
        "optim.lr=0.01",
        f"optim.betas={betas[0]},{betas[1]}",
        f"optim.eps={eps}",
        f"optim.weight_decay={decay}",
    )
    starts, ends, _ = train_with_gradients(train_tiny, monkeypatch, GRADIENTS, *words)
    for k, (start, end) in enumerate(zip(starts, ends)):
        expected = adamw(start, [pair[k] for pair in GRADIENTS], 0.01, betas, eps, decay)
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradients_are_clipped_to_a_joint_norm(train_tiny, monkeypatch, clip):
    """The norm is over all parameters together; a smaller gradient is left alone."""
    gradients = [(0.5, -2.0), (0.02, 0.05), (0.25, 0.0)]
    norms = [math.sqrt(144 * a * a + 16 * b * b) for a, b in gradients]
    assert norms == pytest.approx([10, 0.3124, 3], rel=1e-4)
    factors = [min(1.0, clip / norm) if clip else 1.0 for norm in norms]
    words = ("optim.lr=0.1", f"optim.clip={clip}", "optim.eps=1")  # Adam alone knows no scale
    starts, ends, _ = train_with_gradients(train_tiny, monkeypatch, gradients, *words)
    for k, (start, end) in enumerate(zip(starts, ends)):
        used = [factor * pair[k] for factor, pair in zip(factors, gradients)]
        expected = adamw(start, used, 0.1, (0.9, 0.999), 1.0, 0.0)
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lr_rises_over_images(train_tiny, monkeypatch, accumulate):
    """Batches of 8 images, 20 images of ramp-up, whatever the micro-batches."""
    words = ("optim.lr=0.01", "optim.rampup=20", f"trainer.accumulate={accumulate}")
    _, _, rates = train_with_gradients(train_tiny, monkeypatch, [(0.1, 0.1)] * 5, *words)
    steps = [0, 0.004, 0.008, 0.01, 0.01]
    assert rates == pytest.approx([rate for rate in steps for _ in range(accumulate)])


@pytest.mark.parametrize(
    "words, table",
    [
        ((), {0: 1, 1: 1, 1000: 1}),
        (("optim.rampup=40",), {0: 0, 1: 0.2, 2: 0.4, 4: 0.8, 5: 1, 6: 1, 1000: 1}),
        (
            ("optim.decay=cosine", "trainer.max_steps=6"),
            {0: 1, 1: 0.9330127, 2: 0.75, 3: 0.5, 4: 0.25, 5: 0.0669873, 6: 0, 7: 0},
        ),
        (
            ("optim.decay=cosine", "trainer.max_steps=6", "optim.rampup=24"),
            {0: 0, 1: 0.3110042, 2: 0.5, 3: 0.5, 4: 0.25, 6: 0},
        ),
        (
            ("optim.decay=sqrt", "optim.t_ref=4"),
            {0: 1, 4: 1, 5: 0.8944272, 8: 0.7071068, 16: 0.5, 25: 0.4, 400: 0.1},
        ),
        (("optim.decay=sqrt", "optim.t_ref=2", "optim.rampup=40"), {0: 0, 1: 0.2, 4: 0.5656854}),
    ],
    ids=["constant", "ramp", "cosine", "both", "sqrt", "ramp and sqrt"],
)
def test_lr_factor(words, table):
    """By hand: step B / ramp-up, (1 + cos(pi step / steps)) / 2, sqrt(t_ref / step)."""
    model = build(*words)
    assert {step: model.lr_factor(step) for step in table} == pytest.approx(table, abs=1e-7)


def test_lr_of_the_published_edm2_img64_s(monkeypatch):
    """Batches of 2048, lr 0.01, t_ref 35k: falls from 71.7 M images on, 2.584e-3 after 2^30."""
    model = build("optim.decay=sqrt", "optim.t_ref=35000", "optim.rampup=10000000")
    monkeypatch.setattr(model.cfg.data, "batch_size", 2048)
    assert model.lr_factor(35000) == 1 and 35000 * 2048 == 71_680_000
    assert 0.01 * model.lr_factor(2**30 // 2048) == pytest.approx(2.584e-3, rel=2e-4)


# ------------------------------------------------------------------------------------------------
# What is drawn


def test_dropout_differs_between_micro_batches_steps_and_ranks():
    """And is the same after a resume, where Lightning counts batches from 0 again."""

    models = [build("trainer.accumulate=2", f"seed={seed}") for seed in range(2)]

    def draw(step, batch_idx, rank, seed=0):
        model = models[seed]
        model.trainer = SimpleNamespace(
            global_step=step, global_rank=rank, world_size=3, max_steps=9, log_every_n_steps=50
        )
        model.log_dict = lambda *args, **kwargs: None
        model.loss = lambda batch: (torch.rand(4), {})
        return tuple(model.training_step({}, batch_idx).tolist())

    places = [
        (step, 2 * step + micro, rank)
        for step in range(3)
        for micro in range(2)
        for rank in range(3)
    ]
    draws = {place: draw(*place) for place in places}
    assert len(set(draws.values())) == len(places)
    assert draw(2, 1, 1) == draws[2, 5, 1]
    assert draw(2, 5, 1, seed=1) not in draws.values()


def test_dropout_differs_throughout_a_training(train_tiny, monkeypatch):
    original, draws = EDM.loss, []

    def spy(self, batch):
        draws.append(torch.get_rng_state())
        return original(self, batch)

    monkeypatch.setattr(EDM, "loss", spy)
    train_tiny("trainer.max_steps=3", "trainer.accumulate=2", "network.dropout=0.5")
    assert len(draws) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_hidden_labels_have_nothing_to_do_with_flips_and_noise_levels(train_tiny, monkeypatch):
    original, seen = EDM.loss, []

    def loss(self, batch):
        seen.append({"image": batch["image"]})
        return original(self, batch)

    def forward(self, x, sigma, labels=None, augment=None):
        seen[-1] |= {"hidden": labels == -1, "sigma": sigma}
        return 0 * x + self.net.unet.conv_out.bias

    monkeypatch.setattr(EDM, "loss", loss)
    monkeypatch.setattr(Precond, "forward", forward)
    words = (
        "data.labels=true",
        "method.label_dropout=0.5",
        "data.batch_size=1000",
        "trainer.max_steps=2",
        "network.dropout=0",
    )
    for flip in ("true", "false"):
        train_tiny(*words, f"data.flip={flip}")
    both = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
    mirrored = (both["image"][:2000] != both["image"][2000:]).flatten(1).any(dim=1)
    hidden, z = both["hidden"][:2000], (both["sigma"][:2000].log() + 1.2) / 1.2
    for other in (mirrored, z, z.abs()):  # |z|: Box and Muller's radius is one uniform
        pair = torch.stack([hidden.float(), other.float()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(2000)
    assert 880 < mirrored.sum() < 1120 and 880 < hidden.sum() < 1120  # 1000, sd 22


# ------------------------------------------------------------------------------------------------
# How it runs


def test_a_signal_on_another_process_alone_stops_the_run(train_tiny, monkeypatch, capsys):
    """This process caught nothing; of the two, the other one did after step 3."""

    def of_two(self, decision, all=True):
        other = self.lightning_module.trainer.global_step >= 3
        return decision and other if all else decision or other

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", of_two)
    run = train_tiny("trainer.max_steps=6", "checkpoint.every=1000")
    assert last(run)["global_step"] == 3
    assert f"python train.py resume={run}" in capsys.readouterr().out


@pytest.fixture
def math_settings():
    """Put the process-wide settings back after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_a_fit_that_fails_puts_the_matrix_precision_back(math_settings, monkeypatch, tmp_path):
    """At once, and not whenever what is left of it is collected, in the middle of the next one."""

    def loss(self, batch):
        assert torch.get_float32_matmul_precision() == "highest"
        raise RuntimeError("no")

    monkeypatch.setattr(EDM, "loss", loss)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    words = [str(ROOT / "configs/edm_digits.yaml"), str(ROOT / "configs/debug.yaml"), *TINY]
    assert train.main([*words, f"out_dir={tmp_path}", "trainer.tf32=false"]) == 1
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("sampling", [False, True])
def test_tf32_is_as_set_in_every_step(train_tiny, monkeypatch, math_settings, tf32, sampling):
    """Whatever was set before, and though generating images in between forbids TF32."""
    original, seen = EDM.loss, []

    def spy(self, batch):
        if self.training:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return original(self, batch)

    torch.set_float32_matmul_precision("highest" if tf32 else "high")
    torch.backends.cudnn.allow_tf32 = not tf32
    if sampling:
        generation.generate_all(build().eval(), [0], progress=False, steps=1)
    monkeypatch.setattr(EDM, "loss", spy)
    looks = (
        "sample.every=1",
        "sample.num=1",
        "method.steps=1",
        "eval.every=2",
        "eval.num=4",
        "eval.metrics=nn1",
        "eval.loss_every=3",
    )
    train_tiny(f"trainer.tf32={str(tf32).lower()}", *(looks if sampling else ()))
    assert seen == [("high" if tf32 else "highest", tf32)] * 4


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last_is_the_layout_of_the_weights(train_tiny, monkeypatch, wanted):
    original, strides = EDM.loss, []

    def spy(self, batch):
        strides.append(self.net.net.unet.down_blocks[0].resnets[0].conv1.weight.stride())
        return original(self, batch)

    monkeypatch.setattr(EDM, "loss", spy)
    train_tiny("trainer.max_steps=2", f"trainer.channels_last={str(wanted).lower()}")
    nhwc, nchw = (16 * 9, 1, 3 * 16, 16), (16 * 9, 9, 3, 1)  # of a 16 x 16 x 3 x 3 kernel
    assert strides == [nhwc if wanted else nchw] * 2


@pytest.mark.parametrize("wanted", [True, False])
def test_the_compiled_network_is_the_one_that_trains(train_tiny, monkeypatch, wanted):
    calls = []

    def compiler(function=None, **options):
        def compiled(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    run = train_tiny("trainer.max_steps=3", f"trainer.compile={str(wanted).lower()}")
    assert len(calls) == (3 if wanted else 0)
    assert OUT in last(run)["state_dict"]  # under its usual name
