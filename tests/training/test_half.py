"""trainer.precision=16-mixed: fp16 activations of EDM2's network, float32 for the rest."""

import csv

import pytest
import torch

import train
from genmodels import checkpoint
from genmodels.networks.edm2_unet import EDM2UNet, UnitConv
from genmodels.training import fit
from tests.helpers.paths import ROOT

SMALL = ["network.channels=32", "trainer.precision=16-mixed", "method.label_dropout=0.1"]


def build(*words, config="edm2_digits"):
    return checkpoint.build(ROOT / f"configs/{config}.yaml", *words)


def batch(count=8):
    torch.manual_seed(0)
    images, labels = 0.5 * torch.randn(count, 1, 8, 8), torch.arange(count) % 10
    return {"image": images, "label": labels, "n": torch.arange(count)}


def test_only_activations_are_half():
    """The embedding, the weights, u, D and the loss stay in float32."""
    model, seen = build(*SMALL), {}

    def note(name):
        def hook(module, args, output):
            seen[name] = (args[0].dtype, output.dtype)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, UnitConv | EDM2UNet):
            module.register_forward_hook(note(name))
    with fit.Half("cpu").autocast_context_manager():
        loss, _ = model.loss(batch())
    loss.backward()
    embedding = ("emb_noise", "emb_label", "emb_linear", "uncertainty.linear")
    for name, (_, output) in seen.items():
        kind = torch.float32 if any(part in name for part in embedding) else torch.float16
        assert output == kind, name
    assert len(seen) > 30 and loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.ndim)


def test_half_has_no_loss_scale_and_skips_like_any_other(monkeypatch):
    """Gradients are those of float32 but for rounding: nothing multiplies them."""
    plugin = fit.Half("cpu")
    assert plugin.scaler is None and not plugin.state_dict()
    norms = []
    for context in (plugin.autocast_context_manager(), torch.autocast("cpu", enabled=False)):
        model = build(*SMALL)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gain"):
                    parameter.fill_(0.5)
        with context:
            loss, _ = model.loss(batch())
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]))
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("config", ["edm_digits", "gbm_digits", "cdrl_digits", "energy_digits"])
def test_other_networks_refuse_it_in_one_line(config):
    with pytest.raises(ValueError, match=r"^trainer.precision=16-mixed: is for .*=edm2_unet; .*"):
        build("trainer.precision=16-mixed", config=config)


def test_a_cpu_trains_in_fp32_and_says_so(tmp_path, capsys):
    words = [*SMALL, "trainer.max_steps=1", "data.batch_size=8", "sample.every=0"]
    words += ["eval.loss_every=0", "trainer.accelerator=cpu", f"out_dir={tmp_path}"]
    assert train.main([str(ROOT / "configs/edm2_digits.yaml"), *words]) == 0
    assert "16-mixed: a CPU has no fast fp16, training in 32-true" in capsys.readouterr().out


@pytest.mark.slow
def test_some_hundred_steps_in_half_learn_what_fp32_learns(tmp_path, monkeypatch):
    """By the command, on the digits: the same losses within 3 %, no step skipped.

    On a GPU where there is one, else on the CPU, whose fp16 the command itself does not use.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(fit, "usable_precision", lambda precision, accelerator: precision)
    words = ["network.channels=32", "data.batch_size=32", "trainer.max_steps=300"]
    words += [f"trainer.accelerator={device}", "trainer.progress=false", "trainer.loggers=[csv]"]
    words += ["sample.every=0", "eval.loss_every=100", "trainer.log_every=1", "ema.half_life=2000"]
    losses = {}
    for precision in ("16-mixed", "32-true"):
        out = tmp_path / precision
        argv = [*words, f"trainer.precision={precision}", f"out_dir={out}"]
        assert train.main([str(ROOT / "configs/edm2_digits.yaml"), *argv]) == 0
        (table,) = out.glob("*/*/metrics.csv")
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(float(row["train/grad_norm"]) > 0 for row in rows)  # none was skipped
        losses[precision] = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses["16-mixed"]) == 3 and losses["32-true"][-1] < 0.6 * losses["32-true"][0] + 1
    assert losses["16-mixed"] != losses["32-true"]
    assert losses["16-mixed"] == pytest.approx(losses["32-true"], rel=0.03)
