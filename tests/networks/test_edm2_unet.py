"""EDM2's network: sizes, magnitudes, forced weights, its uncertainty. Figures are those of the
authors' classes, which were run beside this network with equal weights (largest relative difference
6e-7): parameter counts, numbers of tensors and names."""

import dataclasses
import math

import pytest
import torch

import genmodels
from genmodels import checkpoint
from genmodels.checkpoint import AtomicCheckpointIO
from genmodels.config import load_config, to_plain
from genmodels.config.schema import EDM2_VAE
from genmodels.data.sets import DATASETS, check_settings
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.networks.edm2_unet import (
    Block,
    EDM2UNet,
    EDM2UNetConfig,
    Fourier,
    UnitConv,
    UnitUncertainty,
    normalise_weights,
    rms_norm,
    unit_cat,
    unit_silu,
    unit_sum,
)
from genmodels.networks.precond import PRECONDS
from genmodels.training.pool import load_reference
from tests.helpers.paths import ROOT

TINY = {"channels": 64, "multipliers": [1, 2], "blocks": 1, "attention": [8]}


def rms(x, dims=None):
    return x.float().square().mean(dims).sqrt()


@pytest.mark.parametrize(
    ("channels", "shape", "count"),
    [
        (64, (4, 64, 64), 31_309_029),
        (128, (4, 64, 64), 124_713_253),
        (192, (4, 64, 64), 280_212_837),
        (256, (4, 64, 64), 497_807_781),
        (320, (4, 64, 64), 777_498_085),
        (384, (4, 64, 64), 1_119_283_749),
        (448, (4, 64, 64), 1_523_164_773),
        (128, (3, 64, 64), 124_710_949),
        (192, (3, 64, 64), 280_209_381),
        (256, (3, 64, 64), 497_803_173),
        (320, (3, 64, 64), 777_492_325),
        (384, (3, 64, 64), 1_119_276_837),
    ],
)
def test_the_published_sizes(channels, shape, count):
    with torch.device("meta"):
        net = EDM2UNet(EDM2UNetConfig(channels=channels), shape, 1000)
        uncertainty = UnitUncertainty()
    parts = [*net.parameters(), *uncertainty.parameters()]
    assert sum(p.numel() for p in parts) == count
    names = [*net.state_dict(), *uncertainty.state_dict()]
    assert len(names) == 203
    assert sum(isinstance(m, UnitConv) for m in net.modules()) == 161  # and one of the uncertainty
    assert sum(isinstance(m, Block) for m in net.modules()) == 36
    assert sum(isinstance(m, Block) and m.conv_skip is not None for m in net.modules()) == 19
    assert sum(isinstance(m, Block) and m.attn_qkv is not None for m in net.modules()) == 15


def test_tensors_have_the_names_of_the_released_weights():
    net = EDM2UNet(EDM2UNetConfig(**TINY), (3, 16, 16), 10)
    names = set(net.state_dict())
    assert len(names) == 60  # 63 with the uncertainty's weight, frequencies and phases
    assert sum(p.numel() for p in net.parameters()) + 128 == 2_889_035
    for name in (
        "out_gain",
        "emb_fourier.freqs",
        "emb_label.weight",
        "enc.16x16_conv.weight",
        "enc.8x8_down.emb_gain",
        "enc.8x8_block0.attn_qkv.weight",
        "dec.8x8_in0.attn_proj.weight",
        "dec.16x16_up.conv_res0.weight",
        "dec.16x16_block1.conv_skip.weight",
    ):
        assert name in names, name


# lr, millions (2^20) of images and dropout of the published presets; parameters with u and labels.
PUBLISHED = {
    "img64_xs": (0.012, 1024, 0, 124_710_949),
    "img64_s": (0.010, 1024, 0, 280_209_381),
    "img64_m": (0.009, 2048, 0.1, 497_803_173),
    "img64_l": (0.008, 1024, 0.1, 777_492_325),
    "img64_xl": (0.007, 640, 0.1, 1_119_276_837),
    "img512_xxs": (0.017, 2048, 0, 31_309_029),
    "img512_xs": (0.012, 2048, 0, 124_713_253),
    "img512_s": (0.010, 2048, 0, 280_212_837),
    "img512_m": (0.009, 2048, 0.1, 497_807_781),
    "img512_l": (0.008, 1792, 0.1, 777_498_085),
    "img512_xl": (0.007, 1280, 0.1, 1_119_283_749),
    "img512_xxl": (0.0065, 896, 0.1, 1_523_164_773),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_have_the_published_settings(name):
    path = ROOT / f"configs/edm2_{name}.yaml"
    cfg = load_config([path], methods=METHODS, networks=NETWORKS)
    lr, images, dropout, count = PUBLISHED[name]
    small = name.startswith("img64")
    assert (cfg.optim.lr, cfg.network.dropout) == (lr, dropout)
    assert cfg.trainer.max_steps * cfg.data.batch_size == images * 2**20
    assert (cfg.optim.betas, cfg.optim.decay) == ([0.9, 0.99], "sqrt")
    assert (cfg.optim.t_ref, cfg.optim.rampup) == (35000 if small else 70000, 10_000_000)
    law = (-0.8, 1.6) if small else (-0.4, 1.0)
    assert (cfg.method.p_mean, cfg.method.p_std, cfg.method.sigma_data) == (*law, 0.5)
    assert (cfg.ema.sigma_rel, cfg.ema.snapshot) == ([0.05, 0.10], 8 * 2**20)
    assert cfg.method.uncertainty and not cfg.optim.clip
    assert not cfg.data.flip and not cfg.data.holdout
    assert cfg.trainer.precision == "16-mixed" and cfg.method.steps == 32 and cfg.data.labels
    if small:
        assert cfg.data.crop == "adm" and "imagefolder" in DATASETS
    else:
        assert (cfg.data.name, cfg.data.device) == ("latents", "disk")
        check_settings(cfg.data)
        cfg.data.vae = EDM2_VAE
    cfg.data.shape, cfg.data.classes = [3, 64, 64] if small else [4, 64, 64], 1000
    with torch.device("meta"):
        model = METHODS["edm"](cfg)
    assert sum(p.numel() for p in model.parameters()) == count


def test_ddo_of_latents_has_the_network_of_its_base():
    """EDM2-L without dropout; 28 rounds of 6.4 M real images, the others of the transcription."""
    base, cfg = (
        load_config([ROOT / f"configs/{name}.yaml"], methods=METHODS, networks=NETWORKS)
        for name in ("edm2_img512_l", "ddo_imagenet512")
    )
    assert dataclasses.replace(base.network, dropout=0.0) == cfg.network
    assert (base.method.sigma_data, base.method.precond) == (0.5, cfg.method.precond)
    assert cfg.method.rounds == 28 and cfg.trainer.max_steps * cfg.data.batch_size == 6_400_000
    stds = [*cfg.method.p_stds, *[cfg.method.p_stds[-1]] * (28 - len(cfg.method.p_stds))]
    assert [stds.count(std) for std in (1.6, 2.0, 3.0)] == [9, 10, 9] and len(stds) == 28
    assert len(cfg.method.alphas) * len(cfg.method.betas) == 20 and cfg.data.name == "latents"
    check_settings(cfg.data)


# ------------------------------------------------------------------------------------------------
# Magnitudes


def test_the_pieces_keep_the_magnitude():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 48, 32, 32)
    assert float(rms(unit_silu(a))) == pytest.approx(1.00079, abs=2e-3)
    # E[silu(z)^2] of a standard normal, by quadrature: 0.355776.
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    integral = float(torch.trapezoid(torch.nn.functional.silu(z) ** 2 * weight, z))
    assert integral == pytest.approx(0.355776, abs=1e-6)
    assert math.sqrt(integral) / 0.596 == pytest.approx(1.00079, abs=1e-5)
    assert float(rms(unit_sum(a, b, 0.3))) == pytest.approx(1, abs=1e-3)
    joined = unit_cat(a, b[:, :16])
    assert joined.shape[1] == 64 and float(rms(joined)) == pytest.approx(1, abs=1e-3)
    halves = [float(part.square().sum()) for part in (joined[:, :48], joined[:, 48:])]
    assert halves[0] / sum(halves) == pytest.approx(0.5, abs=2e-3)
    values = unit_sum(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.3)
    assert values.tolist() == pytest.approx([0.9191, 0.3939], abs=1e-4)
    features = Fourier(4096)(torch.tensor([-1.5, 0.0, 1.0]))
    assert (rms(features, 1) - 1).abs().max() < 0.1


def test_weights_are_forced_to_unit_rows_and_stay_there():
    torch.manual_seed(0)
    layer = UnitConv(32, 64, 3)
    with torch.no_grad():
        layer.weight.mul_(3)
    x = torch.randn(4, 32, 8, 8)
    before = layer(x).detach()
    normalise_weights(layer)
    rows = rms(layer.weight.detach(), (1, 2, 3))
    assert (rows - 1).abs().max() < 1e-4
    normalise_weights(layer)
    torch.testing.assert_close(layer(x).detach(), before, rtol=0, atol=5e-4)
    assert float(rms(before[..., 1:-1, 1:-1])) == pytest.approx(1, abs=0.05)  # borders see zeros
    layer.zero_grad()
    (layer(x) * torch.randn(4, 64, 8, 8)).sum().backward()
    weight, grad = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(weight, grad, dim=1)
    assert cosine.abs().max() < 3e-4  # the gradient is tangent to the sphere


def test_without_gains_the_magnitudes_are_those_of_the_authors_network():
    """Two blocks a level, unit input: rms of each block's output, in the mean over 8 seeds.

    Theirs lie within 0.96 to 0.99 in the encoder and 0.86 to 0.95 in the decoder.
    """
    found = {}
    for seed in range(8):
        torch.manual_seed(seed)
        net = EDM2UNet(EDM2UNetConfig(**TINY | {"blocks": 2}), (3, 16, 16), 10)
        for name, block in net.named_modules():
            if isinstance(block, Block):
                rows = found.setdefault(name, [])
                block.register_forward_hook(lambda m, i, o, rows=rows: rows.append(float(rms(o))))
        with torch.no_grad():
            net(torch.randn(8, 3, 16, 16), torch.zeros(8), torch.arange(8))
    means = {name: sum(rows) / len(rows) for name, rows in found.items()}
    encoder = [value for name, value in means.items() if name.startswith("enc")]
    decoder = [value for name, value in means.items() if name.startswith("dec")]
    assert min(encoder) > 0.94 and max(encoder) < 1.01
    assert min(decoder) > 0.84 and max(decoder) < 0.97


def test_at_first_the_denoiser_is_its_skip_and_the_loss_one():
    torch.manual_seed(0)
    words = ("method.uncertainty=false", "network.channels=16")
    model = genmodels.build(str(ROOT / "configs/edm2_digits.yaml"), *words)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.5, 5.0])
    data = model.cfg.method.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    with torch.no_grad():
        denoised = model.net(x, sigma, torch.tensor([0, -1, 4]))
    torch.testing.assert_close(denoised, skip.reshape(-1, 1, 1, 1) * x)
    n = torch.arange(1000)
    image = data * torch.randn(1000, 1, 8, 8)
    _, logs = model.loss({"image": image, "label": n % 10, "n": n})
    assert float(logs["loss"]) == pytest.approx(1, abs=0.03)


def test_uncertainty_is_bounded_and_weighs_the_loss():
    torch.manual_seed(0)
    u = UnitUncertainty()
    values = u(torch.linspace(-2, 1.2, 400)).detach()
    assert values.abs().max() <= 16 and values.std() > 0.1
    assert u(torch.zeros(1)).dtype == torch.float32


def test_attention_is_that_of_torch():
    """Against nn.functional.multi_head arithmetic written out: q, k and v normalised per head."""
    torch.manual_seed(0)
    block = Block(64, 64, 32, encoder=True, attention=True)
    x = torch.randn(2, 64, 4, 4)
    qkv = block.attn_qkv(x).reshape(2, 64, 3, 16)
    q, k, v = (rms_norm(qkv, 1)[:, :, i] for i in range(3))
    weights = (q.transpose(1, 2) @ k / 8).softmax(dim=-1)
    y = (v @ weights.transpose(1, 2)).reshape(2, 64, 4, 4)
    torch.testing.assert_close(block._attend(x), block.attn_proj(y), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# In training


def test_weights_are_forced_once_for_each_step_whatever_the_micro_batches():
    model = genmodels.build(
        str(ROOT / "configs/edm2_digits.yaml"), "trainer.accumulate=2", "network.channels=16"
    )
    layers = [m for m in model.modules() if isinstance(m, UnitConv)]
    for batch_index, forced in ((0, True), (1, False), (2, True)):
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(2)
        model.on_train_batch_start({}, batch_index)
        rows = torch.stack([rms(m.weight.detach().flatten(1), 1).mean() for m in layers])
        assert ((rows - 1).abs().max() < 1e-3) == forced
    assert any(layer is model.uncertainty.linear for layer in layers)


def test_evaluation_does_not_depend_on_the_length_of_rows():
    torch.manual_seed(0)
    net = PRECONDS["edm"](EDM2UNet(EDM2UNetConfig(**TINY), (3, 16, 16), 10), 0.5)
    with torch.no_grad():
        net.net.out_gain.fill_(1)
        x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 2.0])
        before = net(x, sigma)
        for layer in net.modules():
            if isinstance(layer, UnitConv):
                layer.weight.mul_(7)
        after = net(x, sigma)
    assert float((after - before).norm() / before.norm()) < 3e-4


def test_ddo_starts_at_a_reference_that_is_forced_once(tmp_path):
    """Delta is 0 to the bit in the first step; row lengths of the loaded weights do not matter."""
    small = ("network.channels=16", "method.label_dropout=0")
    base = genmodels.build(str(ROOT / "configs/edm2_digits.yaml"), *small)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "base.ckpt"
    saved = {"state_dict": base.state_dict(), "hyper_parameters": {"config": to_plain(base.cfg)}}
    AtomicCheckpointIO().save_checkpoint(saved | {"global_step": 0}, path)

    ddo = ("method.name=ddo", "method.uncertainty=false")
    model = genmodels.build(str(ROOT / "configs/edm2_digits.yaml"), *small, *ddo)
    reference = load_reference(model.cfg, str(path), torch.device("cpu"))
    rows = [
        rms(m.weight.flatten(1), 1).mean() for m in reference.modules() if isinstance(m, UnitConv)
    ]
    assert (torch.stack(rows) - 1).abs().max() < 1e-3
    assert not any("uncertainty" in name for name, _ in reference.named_parameters())

    model = checkpoint.build(model.cfg, reference=reference)
    model.load_state_dict(reference.state_dict())
    images = torch.rand(2, 8, 1, 8, 8, generator=generator) * 2 - 1
    labels, n = torch.arange(8), torch.arange(8)
    batch = {"image": images[0], "fake": images[1], "label": labels, "fake_label": labels, "n": n}
    model.train().on_train_batch_start(batch, 0)
    loss, logs = model.loss(batch)
    for side in ("real", "fake"):
        assert float(logs[f"delta_{side}"]) == float(logs[f"delta_{side}_std"]) == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # else DDP stops
