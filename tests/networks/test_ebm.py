"""Energy networks: sizes as published, spectral norm against torch, precision, any image size."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from genmodels.methods.cdrl import CDRLConfig, build_initializer
from genmodels.networks.ebm import (
    EBM,
    Conv,
    EBMConfig,
    Linear,
    fixed_weights,
    power_iteration,
)
from genmodels.networks.mlp import MLP, MLPConfig

TINY = {"channels": 8, "multipliers": [1, 2], "blocks": 1}


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize(
    ("options", "shape", "count", "gmac"),
    [
        ({}, (3, 32, 32), 34.8, 5.59),  # CIFAR-10
        ({"channels": 256}, (3, 32, 32), 139.3, 22.4),
        ({"blocks": 2}, (3, 32, 32), 9.1, 1.40),
        ({"channels": 64, "blocks": 2}, (3, 32, 32), 2.3, 0.35),
        ({"channels": 32, "blocks": 2}, (3, 32, 32), 0.57, 0.09),
        ({"multipliers": [1, 2, 2, 2, 4], "blocks": 6, "kind": "drl"}, (3, 64, 64), 56.3, 17.2),
    ],
)
def test_energy_network_has_the_published_size(options, shape, count, gmac):
    with FakeTensorMode():  # shapes alone
        net = EBM(EBMConfig(spectral_norm=False, **options), shape)
        digits = 2 if count < 1 else 1
        assert millions(net) == pytest.approx(count, abs=0.51 * 10**-digits)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, *shape), torch.empty(1))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.02)


@pytest.mark.parametrize("kind", ["adm", "cdrl"])
@pytest.mark.parametrize(("blocks", "classes", "count"), [(3, 0, 3.8), (2, 1000, 3.2)])
def test_initializer_has_the_published_size(kind, blocks, classes, count):
    config = CDRLConfig(initializer_kind=kind, initializer_blocks=blocks)
    with torch.device("meta"):
        net = build_initializer(config, (3, 32, 32), classes)
    assert millions(net) == pytest.approx(count, abs=0.051)


def test_initializer_starts_as_released():
    """Norms of 32 groups, eps 1e-6; a label layer of the deviation that the released one has."""
    config = CDRLConfig(initializer_kind="cdrl", initializer_blocks=1)
    net = build_initializer(config, (3, 32, 32), 1000)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)} and len(norms) > 20
    assert net.embedding.label.weight.shape == (256, 1001)
    assert float(net.embedding.label.weight.std()) == pytest.approx(0.0182, rel=0.01)
    assert not net.output.weight.any() and net.output.bias.all()
    x, level = torch.randn(2, 3, 32, 32), torch.full((2,), 300.0)
    first = net(x, level, torch.tensor([-1, 3]))
    torch.testing.assert_close(first, net.output.bias[:, None, None].expand_as(x))


def test_spectral_norm_agrees_with_torch_and_the_singular_value():
    torch.manual_seed(0)
    conv, linear = Conv(3, 5, 3), Linear(7, 4)
    for layer in (conv, linear):
        layer.iterate(200)
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        torch.testing.assert_close(layer.effective_weight(), layer.weight / largest)
    plain = torch.nn.Conv2d(3, 5, 3)
    plain.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    theirs = parametrizations.spectral_norm(plain, n_power_iterations=200)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(conv(x), theirs(x), rtol=1e-4, atol=1e-6)
    # The gradient goes through sigma, not through the singular vectors.
    conv(x).square().sum().backward()
    theirs(x).square().sum().backward()
    ours, other = conv.weight.grad, theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


def test_bounded_norm_lets_weights_shrink():
    small, large = Linear(4, 4, bounded=True), Linear(4, 4, bounded=True)
    with torch.no_grad():
        small.weight.mul_(0.1)
        large.weight.mul_(10)
    assert torch.equal(small.effective_weight(), small.weight)
    large.iterate(100)
    assert float(torch.linalg.matrix_norm(large.effective_weight().detach(), 2)) == pytest.approx(1)


def test_weights_that_start_at_zero_are_bounded_later():
    """kind=drl's second convolutions: zero, and still zero after a step with lr = 0."""
    torch.manual_seed(0)
    net = EBM(EBMConfig(**TINY, kind="drl"), (1, 8, 8))
    layer = net.stages[0][0].conv_out
    assert not layer.weight.any()
    power_iteration(net)
    assert torch.equal(layer.effective_weight(), layer.weight)
    with torch.no_grad():
        layer.weight.normal_(std=3)
    for _ in range(100):
        power_iteration(net)
    largest = torch.linalg.matrix_norm(layer.effective_weight().detach().flatten(1), 2)
    assert float(largest) == pytest.approx(1, rel=1e-3)


def test_only_power_iteration_moves_the_singular_vectors():
    net, x = EBM(EBMConfig(**TINY), (1, 8, 8)).train(), torch.randn(2, 1, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items() if k.endswith(".u")}
    assert len(before) == 2 + 1 + 3 + 4  # embedding, stem, blocks (one with a shortcut)
    net(x, torch.zeros(2)).sum().backward()
    state = net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    power_iteration(net)
    assert all(not torch.equal(net.state_dict()[key], value) for key, value in before.items())


# ------------------------------------------------------------------------------------------------
# DRL's released network. DRL_F and DRL_GRAD are what its own code gave (commit c77cc05, TensorFlow
# 2.21 with Keras 2, group_norm's import left out) for the weights and images of drl_sines(), in
# three calls one after the other; DRL_START what its initializers make of these shapes.


def numbers(text):
    """Return the numbers of a text."""
    return [float(word) for word in text.split()]


DRL_F = (
    (-0.28396207, -0.39582604),
    (-0.37514222, -0.35789526),
    (-0.38177103, -0.36996636),
)
DRL_GRAD = (
    numbers(
        "0.02355388 0.04914879 0.14150995 -0.03896634 0.01551782 0.08134704 "
        "-0.01253075 0.03460499 -0.0274642 0.04256034 0.02651776"
    ),
    numbers(
        "0.0008178 0.00121251 0.01702553 0.00240824 0.0020689 -0.0055013 "
        "-0.00389035 0.0077549 0.00234281 0.01365651 0.001803"
    ),
    numbers(
        "0.00073159 0.00233089 0.01375083 0.00359494 0.00006784 -0.00408103 "
        "-0.00299317 0.00510256 0.00164872 0.00978138 0.00098815"
    ),
)
DRL_START = {"conv_in": (0.11570, 0.20374), "shift": (0.22917, 0.38444), "head": (0.20384, 0.35091)}
DRL_START |= {"conv_out": (1.2076e-6, 2.0385e-6), "shortcut": (0.09665, 0.16648)}


def drl_layers(net):
    """Return the layers in the order of the released code's variables."""
    layers = [net.embedding.hidden, net.embedding.outer, net.head]
    for block in (block for blocks in net.stages for block in blocks):
        layers += [block.shift, block.conv_in, block.conv_out]
        layers += [block.shortcut] if isinstance(block.shortcut, Conv) else []
    return [*layers, net.stem]


@torch.no_grad()
def drl_sines(net):
    """Set weights and u to sines of their positions; return images (2, 3, 8, 8)."""
    gains = {id(b.conv_out): b.gain for blocks in net.stages for b in blocks}
    k = 0

    def sine(shape, step=0.7):
        count = math.prod(shape)
        return torch.sin(step * torch.arange(count).double() + k).reshape(shape)

    layers = drl_layers(net)
    for layer in layers:
        size = layer.weight.shape
        scale = 0.3 / math.sqrt(math.prod(size[1:])) * (20 if id(layer) in gains and k % 2 else 1)
        layer.weight.copy_(scale * sine(size))
        k += 1
        layer.bias.copy_(0.1 * sine(layer.bias.shape))
        k += 1
        if id(layer) in gains:
            gains[id(layer)].copy_(1 + 0.1 * sine(size[:1]))
            k += 1
    layers.remove(net.head)
    for k, layer in enumerate(layers):  # noqa: B007  (sine reads it)
        layer.u.copy_(torch.nn.functional.normalize(sine(layer.u.shape, 1.1), dim=0))
    k = 0
    return sine((2, 3, 8, 8), 1.3).float()


def test_drl_equals_its_released_code():
    """f and its gradient, call after call: each does a power iteration of its own."""
    net = EBM(EBMConfig(channels=8, multipliers=[1, 2], blocks=2, kind="drl_released"), (3, 8, 8))
    x = drl_sines(net.train()).requires_grad_(True)
    norms = [torch.linalg.matrix_norm(b.conv_out.weight.flatten(1), 2) for b in net.stages[0]]
    assert norms[0] < 1 < norms[1]  # of these the bound leaves one as it is
    for expected, slopes in zip(DRL_F, DRL_GRAD):
        with fixed_weights(net):  # as in a chain: nothing is fixed here
            f = net(x, torch.tensor([1.0, 4.0]))
        torch.testing.assert_close(f.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(f.sum(), x)
        torch.testing.assert_close(grad.flatten()[::37], torch.tensor(slopes), rtol=1e-3, atol=1e-7)


def test_drl_starts_as_its_released_code():
    """Standard deviation and largest weight; of 576 numbers the first is known to 5 %."""
    torch.manual_seed(0)
    net = EBM(EBMConfig(channels=8, multipliers=[1, 2], blocks=2, kind="drl_released"), (3, 8, 8))
    block, second = net.stages[0][0], net.stages[1][0]
    layers = {"conv_in": block.conv_in, "shift": block.shift, "conv_out": block.conv_out}
    layers |= {"shortcut": second.shortcut, "head": net.head}
    for name, layer in layers.items():
        deviation, bound = DRL_START[name]
        assert float(layer.weight.std()) == pytest.approx(deviation, rel=0.08), name
        assert 0.94 * bound < float(layer.weight.abs().max()) < 1.02 * bound, name
        assert not layer.bias.any()
    bounded = [name for name, layer in net.named_modules() if getattr(layer, "bounded", False)]
    assert bounded == [f"stages.{i}.{j}.conv_out" for i in range(2) for j in range(2)]


def test_drl_in_eval_mode_depends_on_its_input_alone():
    """Sampling iterates nowhere; in training chains and the loss do, and the step after it not."""
    torch.manual_seed(0)
    net = EBM(EBMConfig(**TINY, kind="drl_released"), (1, 8, 8)).eval()
    x, before = torch.randn(2, 1, 8, 8), net.stem.u.clone()
    with torch.no_grad():
        net.stem.weight.normal_()
    first = net(x, torch.zeros(2))
    assert torch.equal(net(x, torch.zeros(2)), first) and torch.equal(net.stem.u, before)
    net.train()
    power_iteration(net)
    assert torch.equal(net.stem.u, before)
    u, rows = before, net.stem.weight.detach().flatten(1)
    for _ in range(3):
        net(x, torch.zeros(2)).sum().backward()
        u = torch.nn.functional.normalize(rows @ (rows.T @ u), dim=0)
        torch.testing.assert_close(net.stem.u, u)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (3, 16)])
def test_any_size_labels_and_levels_matter(size):
    net = EBM(EBMConfig(**TINY), (3, *size), classes=4)
    x = torch.randn(2, 3, *size)
    f = net(x, torch.zeros(2), torch.tensor([-1, 3]))
    assert f.shape == (2,) and f.dtype == torch.float32
    none = net(x, torch.zeros(2))
    assert f[0] == none[0] and f[1] != none[1]
    assert (net(x, torch.full((2,), 300.0)) != none).all()
    with pytest.raises(ValueError, match="takes no augmentation"):
        net(x, torch.zeros(2), None, torch.zeros(2, 9))


@pytest.mark.parametrize("kind", ["cdrl", "drl"])
def test_block_by_hand(kind):
    """h + g conv(act(conv(act(h)) + shift)); shift = act(Linear(.)) in CDRL, Linear(.) in DRL."""
    torch.manual_seed(0)
    net = EBM(EBMConfig(channels=4, multipliers=[1], blocks=1, kind=kind), (1, 4, 4))
    block, conv, act = net.stages[0][0], torch.nn.functional.conv2d, torch.nn.functional.leaky_relu
    torch.nn.init.normal_(block.conv_out.weight)
    torch.nn.init.normal_(block.gain)
    h, e = torch.randn(2, 4, 4, 4), torch.randn(2, 16)
    shift = e @ block.shift.effective_weight().T + block.shift.bias
    assert (shift < 0).any()
    shift = act(shift, 0.2) if kind == "cdrl" else shift
    inner = conv(act(h, 0.2), block.conv_in.effective_weight(), block.conv_in.bias, padding=1)
    inner = act(inner + shift[..., None, None], 0.2)
    inner = conv(inner, block.conv_out.effective_weight(), block.conv_out.bias, padding=1)
    expected = h + block.gain[:, None, None] * inner
    torch.testing.assert_close(block(h, e), expected, rtol=1e-4, atol=1e-5)


def test_odd_images_lose_no_pixel():
    """Each pixel of a 7 x 5 image reaches f, the last row and column too."""
    net = EBM(EBMConfig(**TINY, activation="silu"), (1, 7, 5))
    x = torch.randn(1, 1, 7, 5, requires_grad=True)
    net(x, torch.zeros(1)).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize(("activation", "second"), [("leaky", False), ("silu", True)])
def test_second_derivative(activation, second):
    """Leaky ReLU: the gradient is piecewise constant. SiLU: smooth."""
    net = EBM(EBMConfig(**TINY, activation=activation), (1, 4, 4)).double()
    x = torch.randn(1, 1, 4, 4).double().requires_grad_(True)
    f = net(x, torch.zeros(1), dtype=torch.float64).sum()
    (grad,) = torch.autograd.grad(f, x, create_graph=True)
    curvature = 0.0
    if grad.requires_grad:
        (twice,) = torch.autograd.grad(grad.square().sum(), x, allow_unused=True)
        curvature = 0.0 if twice is None else float(twice.abs().max())
    assert (curvature > 1e-8) == second


def test_head_is_exact_under_autocast_and_in_float64():
    """The trunk may be bf16; the sum is not, and float64 adds no rounding of its own."""
    torch.manual_seed(0)
    net = EBM(EBMConfig(**TINY), (1, 8, 8))
    x, level = torch.randn(64, 1, 8, 8), torch.rand(64) * 1000
    exact = net.double()(x.double(), level.double(), dtype=torch.float64)
    net = net.float()
    torch.testing.assert_close(net(x, level, dtype=torch.float64), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, level)
    assert half.dtype == torch.float32
    assert len(half.detach().bfloat16().float().unique()) < len(half.unique())


def test_fixed_weights_serve_all_calls_and_carry_no_gradient():
    net, x = EBM(EBMConfig(**TINY), (1, 8, 8)), torch.randn(2, 1, 8, 8)
    plain = net(x, torch.zeros(2))
    with fixed_weights(net):
        fixed = net(x, torch.zeros(2))
        with torch.no_grad():
            net.stem.weight.mul_(3)
        assert torch.equal(net(x, torch.zeros(2)), fixed)
    assert torch.equal(plain, fixed) and net.stem.used is None
    assert not net.stem.effective_weight().detach().isnan().any()


def test_mlp_is_an_energy_or_a_map_that_starts_at_zero():
    x = torch.randn(3, 2, 1, 1)
    energy = MLP(MLPConfig(width=16), (2, 1, 1), classes=3)
    f = energy(x, torch.zeros(3), torch.tensor([0, 1, -1]))
    assert f.shape == (3,) and energy(x, torch.zeros(3), dtype=torch.float64).dtype == torch.float64
    change = MLP(MLPConfig(width=16, form="distance"), (2, 1, 1), energy=False)
    assert torch.equal(change(x, torch.zeros(3)), torch.zeros_like(x))


def test_the_stem_of_the_mlp_can_start_sharp():
    plain, sharp = (
        torch.manual_seed(0) and MLP(MLPConfig(width=16, stem_scale=scale), (2, 1, 1))
        for scale in (1.0, 6.0)
    )
    torch.testing.assert_close(sharp.stem.weight, 6 * plain.stem.weight)
    torch.testing.assert_close(sharp.stem.bias, plain.stem.bias)


def test_mlp_of_the_form_distance():
    """-|x - M(x)|^2 / 2 with the M of the same weights; at first M = 0."""
    x, level, labels = torch.randn(5, 1, 4, 2), torch.rand(5), torch.arange(5) - 1
    energy = MLP(MLPConfig(width=16, form="distance"), (1, 4, 2), classes=4)
    change = MLP(MLPConfig(width=16), (1, 4, 2), classes=4, energy=False)
    start = energy(x, level, labels)
    torch.testing.assert_close(start, -0.5 * x.square().sum((1, 2, 3)))
    torch.nn.init.normal_(energy.head.weight)
    change.load_state_dict(energy.state_dict())
    found = energy(x, level, labels, dtype=torch.float64)
    expected = -0.5 * (x - change(x, level, labels)).double().square().sum((1, 2, 3))
    assert found.dtype == torch.float64 and not torch.allclose(found.float(), start)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (EBMConfig, {"kind": "dlr"}, "network.kind=dlr: choose from cdrl, drl"),
        (EBMConfig, {"channels": 3}, "network.channels=3: must be even"),
        (EBMConfig, {"multipliers": []}, "network.multipliers="),
        (EBMConfig, {"blocks": 0}, "network.blocks=0: must be >= 1"),
        (EBMConfig, {"activation": "relu"}, "network.activation=relu: choose from leaky, silu"),
        (MLPConfig, {"width": 3}, "network.width=3: must be even"),
        (MLPConfig, {"layers": 0}, "network.layers=0: must be >= 1"),
        (MLPConfig, {"stem_scale": 0.0}, "network.stem_scale=0.0: must be > 0"),
        (MLPConfig, {"form": "sum"}, "network.form=sum: choose from dot, distance"),
    ],
)
def test_settings_refuse(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
