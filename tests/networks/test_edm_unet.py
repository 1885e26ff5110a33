import pytest
import torch

from genmodels.checkpoint.edm_pickles import state_from_released
from genmodels.config import load_config
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig
from tests.helpers import edm_networks as networks
from tests.helpers.paths import ROOT

KINDS = ["ddpmpp", "ncsnpp", "adm"]


def small(kind, classes=5, augment=True):
    """A reference configuration of 2 levels at 8x8 and our network of the same architecture."""
    cfg = dict(kind=kind, size=8, channels=64 if kind == "adm" else 16, multipliers=[1, 2])
    cfg.update(blocks=1, attention=[4], classes=classes, augment=augment)
    return cfg, EDMUNet(config(cfg), (3, 8, 8), classes)


def config(cfg, **more):
    names = ("kind", "channels", "multipliers", "blocks", "attention", "augment")
    return EDMUNetConfig(**{name: cfg[name] for name in names}, **more)


def inputs(size=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, size, size, generator=generator, dtype=dtype)
    noise = torch.tensor([-1.5, 0.2, 0.9, 1.1], dtype=dtype)
    labels = torch.tensor([3, -1, 0, 4])
    return x, noise, labels, torch.randn(4, 9, generator=generator, dtype=dtype)


def fill(net, scale=0.05, seed=0):
    """Random weights everywhere: at initialisation the residual branches are off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return net.eval()


@pytest.mark.parametrize(
    "kind, shape, classes, count",
    [
        ("ddpmpp", (3, 32, 32), 0, 55_733_891),
        ("ddpmpp", (3, 32, 32), 10, 55_735_299),
        ("ddpmpp", (3, 64, 64), 0, 61_805_571),
        ("ncsnpp", (3, 32, 32), 0, 56_397_827),
        ("ncsnpp", (3, 32, 32), 10, 56_400_643),
        ("ncsnpp", (3, 64, 64), 0, 62_761_091),
        ("adm", (3, 64, 64), 1000, 295_899_267),
    ],
)
def test_parameter_counts_are_the_published_ones(kind, shape, classes, count):
    cfg = EDMUNetConfig(kind=kind, multipliers=[1, 2, 2, 2] if shape[1] == 64 else [2, 2, 2])
    if kind == "adm":
        cfg = EDMUNetConfig("edm_unet", "adm", 192, [1, 2, 3, 4], 3, [32, 16, 8], 0.1, False)
    with torch.device("meta"):
        net = EDMUNet(cfg, shape, classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind):
    cfg, net = small(kind)
    forward = networks.dhariwal if kind == "adm" else networks.song
    weights = networks.Weights()
    with torch.no_grad():
        forward(weights, cfg, *inputs())
        net.load_state_dict(state_from_released(net, weights, 8))
        net.eval()
        exact = [value.double() if value.is_floating_point() else value for value in inputs()]
        difference = net(*inputs()).double() - forward(weights, cfg, *exact)
        assert difference.abs().max() < 1e-5
        if kind == "ncsnpp":  # its Fourier features go with c_noise of EDM or VE
            return
        exact[1:2] = [exact[1] * 300 + 500]  # the noise levels of VP and iDDPM reach 999
        ours = net(*[value.to(torch.float32) if i < 2 else value for i, value in enumerate(exact)])
        difference = ours.double() - forward(weights, cfg, *exact)
        assert difference.abs().max() < 2e-4  # 999 * 2^-24 radians


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_and_no_augmentation_are_zero_vectors(kind):
    net = fill(small(kind)[1])
    x, noise, labels, augment = inputs()
    with torch.no_grad():
        null = net(x, noise, torch.full_like(labels, -1), torch.zeros_like(augment))
        torch.testing.assert_close(net(x, noise), null)
        assert (net(x, noise, labels)[[0, 2, 3]] - null[[0, 2, 3]]).abs().amax(
            (1, 2, 3)
        ).min() > 1e-3
        assert (net(x, noise, None, augment) - null).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_nearly_zero_and_every_parameter_learns(kind):
    torch.manual_seed(0)
    net = small(kind)[1]
    x, noise, labels, augment = inputs()
    # 1e-5 on the last convolutions, or zero for ADM: F = 0, the loss per element starts at one.
    assert net(x, noise, labels, augment).abs().max() < 1e-3
    fill(net).train()
    net(x, noise, labels, augment).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given_leaves_no_parameter_without_a_gradient(kind):
    """DDP refuses such a parameter: without labels and augmentation values they are zeros."""
    net = fill(small(kind)[1]).train()
    x, noise, _, _ = inputs()
    net(x, noise).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert not net.embedding.augment.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_have_the_published_spread(kind):
    """Xavier for DDPM++ and NCSN++, uniform; PyTorch's default for ADM, N(0, 1) for its labels."""
    torch.manual_seed(0)
    cfg = EDMUNetConfig(kind=kind, channels=64, multipliers=[1], blocks=1, attention=[])
    net = EDMUNet(cfg, (3, 8, 8), 100)
    qkv, label, conv = net.middle[0].attention.qkv, net.embedding.label, net.middle[0].conv_in
    if kind == "adm":  # uniform in +-1/sqrt(inputs): variance 1/(3 inputs)
        limits = {conv.weight: 1 / (3 * 64 * 9), qkv.weight: 1 / (3 * 64), label.weight: 1.0}
    else:  # uniform with variance 2/(inputs + outputs)
        features = label.weight.shape[0]
        limits = {conv.weight: 1 / (64 * 9), qkv.weight: 0.2 * 2 / (64 + 192)}
        limits[label.weight] = 2 / (100 + features)
    for weight, variance in limits.items():
        assert float(weight.detach().var()) == pytest.approx(variance, rel=0.1)
    last = [net.output.weight, net.middle[0].conv_out.weight, net.middle[0].attention.proj.weight]
    assert all(float(weight.detach().abs().max()) < 1e-4 for weight in last)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_level_is_not_rounded_under_autocast(kind):
    net = fill(small(kind)[1])
    seen = []
    net.embedding.register_forward_hook(lambda module, given, out: seen.append(out))
    x, *others = inputs()
    with torch.no_grad():
        net(x, *others)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x, *others).dtype == torch.bfloat16
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", KINDS)
def test_captures_as_one_graph_in_channels_last_memory(kind):
    net = fill(small(kind)[1])
    x, *others = inputs()
    with torch.no_grad():
        plain = net(x, *others)
        net.to(memory_format=torch.channels_last)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        fast = compiled(x.to(memory_format=torch.channels_last), *others)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert fast.is_contiguous(memory_format=torch.channels_last)


def test_any_size_is_reflected_and_cropped():
    net = fill(EDMUNet(EDMUNetConfig(channels=16, blocks=1, attention=[2]), (1, 7, 10)))
    x, noise = torch.randn(2, 1, 7, 10), torch.tensor([0.1, 0.3])
    with torch.no_grad():
        y = net(x, noise)
        padded = torch.nn.functional.pad(x, (0, 2, 0, 1), mode="reflect")
        assert y.shape == x.shape
        torch.testing.assert_close(y, net(padded, noise)[..., :7, :10])


def test_a_height_of_attention_that_no_level_has_is_refused():
    with pytest.raises(ValueError, match=r"network.attention=\[16\]: must be heights .*\[28, 14"):
        EDMUNet(EDMUNetConfig(channels=16, blocks=1, attention=[16]), (1, 28, 28))


def test_attention_is_global_and_convolutions_are_not():
    x = torch.zeros(1, 3, 16, 16)
    x[..., 0, 0] = 1
    reach = []
    for attention in ([], [16]):
        cfg = EDMUNetConfig(channels=16, multipliers=[1], blocks=1, attention=attention)
        net = fill(EDMUNet(cfg, (3, 16, 16)))
        net.middle[0].attention = None  # the middle always attends
        for module in net.modules():  # group norms are global as well
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
        with torch.no_grad():
            change = net(x, torch.zeros(1)) - net(0 * x, torch.zeros(1))
        reach.append(change[..., -1, -1].abs().max() > 0)
    assert reach == [False, True]


def test_dropout_acts_in_training_only():
    net = fill(EDMUNet(EDMUNetConfig(channels=16, blocks=1, attention=[], dropout=0.5), (3, 8, 8)))
    x, noise, *_ = inputs()
    with torch.no_grad():
        assert torch.equal(net(x, noise), net(x, noise))
        net.train()
        assert not torch.equal(net(x, noise), net(x, noise))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(kind="unet"), "network.kind=unet: choose from ddpmpp, ncsnpp, adm"),
        (dict(channels=17), "network.channels=17: a level gets 34 .* multiple of 32"),
        (dict(kind="adm", channels=48), "network.channels=48: a level gets 96 .* heads of 64"),
        (dict(multipliers=[]), r"network.multipliers=\[\]: must be positive"),
        (dict(dropout=1.0), r"network.dropout=1.0: must be in \[0, 1\)"),
        (dict(blocks=0), "network.blocks=0: must be >= 1"),
    ],
)
def test_wrong_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        EDMUNetConfig(**fields)


def test_augmentation_without_an_input_for_it_is_an_error():
    net = EDMUNet(EDMUNetConfig(channels=16, blocks=1, attention=[], augment=False), (3, 8, 8))
    x, noise, _, augment = inputs()
    with pytest.raises(ValueError, match="network.augment is false"):
        net(x, noise, None, augment)


@pytest.mark.parametrize(
    "name, shape, images, count",
    [
        ("edm_cifar10", (3, 32, 32), 200_000_000, 55_733_891),
        ("edm_ffhq64", (3, 64, 64), 200_000_000, 61_805_571),
        ("edm_imagenet64", (3, 64, 64), 2_500_000_000, 295_899_267),
    ],
)
def test_configs_build_the_published_networks(name, shape, images, count):
    cfg = load_config([ROOT / f"configs/{name}.yaml"], methods=METHODS, networks=NETWORKS)
    with torch.device("meta"):
        net = EDMUNet(cfg.network, shape, 1000 if cfg.data.labels else 0)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert abs(cfg.trainer.max_steps * cfg.data.batch_size / images - 1) < 1e-5
    assert (cfg.method.augment > 0) == cfg.network.augment


# Karras et al. 2022, tables 5 and 7 and appendix F.2: what the published networks were trained and
# sampled with. Half-lives and ramps are in images.
PUBLISHED = {
    "edm_cifar10": {
        "optim.lr": 1e-3,
        "data.batch_size": 512,
        "ema.half_life": 500_000,
        "network.dropout": 0.13,
        "method.augment": 0.12,
        "trainer.precision": "32-true",
        "method.steps": 18,
        "method.churn": 0,
    },
    "edm_ffhq64": {
        "optim.lr": 2e-4,
        "data.batch_size": 256,
        "ema.half_life": 500_000,
        "network.dropout": 0.05,
        "method.augment": 0.15,
        "trainer.precision": "32-true",
        "method.steps": 40,
        "method.churn": 0,
    },
    "edm_imagenet64": {
        "optim.lr": 1e-4,
        "data.batch_size": 4096,
        "ema.half_life": 50_000_000,
        "network.dropout": 0.1,
        "method.augment": 0,
        "trainer.precision": "bf16-mixed",  # theirs: fp16
        "method.steps": 256,
        "method.churn": 40,
        "method.churn_min": 0.05,
        "method.churn_max": 50,
        "method.churn_noise": 1.003,
    },
}
OF_ALL = {
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.weight_decay": 0,
    "optim.rampup": 10_000_000,
    "optim.decay": "none",
    "optim.clip": 0,
    "ema.rampup": 0.05,
    "method.precond": "edm",
    "method.sigma_data": 0.5,
    "method.p_mean": -1.2,
    "method.p_std": 1.2,
    "method.sampler": "heun",
    "method.sigma_min": 0.002,
    "method.sigma_max": 80,
    "method.rho": 7,
    "method.label_dropout": 0,
    "data.flip": False,
    "trainer.tf32": False,
    "trainer.accumulate": 1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_train_and_sample_as_published(name):
    cfg = load_config([ROOT / f"configs/{name}.yaml"], methods=METHODS, networks=NETWORKS)
    expected = OF_ALL | PUBLISHED[name]
    found = {key: getattr(getattr(cfg, key.split(".")[0]), key.split(".")[1]) for key in expected}
    assert found == expected
