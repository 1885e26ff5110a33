"""Networks of Noise2Score: sizes, parameter counts, what they see."""

import pytest
import torch

from genmodels.networks.denoiser import Denoiser, DenoiserConfig, N2SUNet, N2SUNetConfig


def small(channels=1):
    torch.manual_seed(0)
    net = Denoiser(DenoiserConfig(channels=[8, 8], blocks=[1, 1]), (channels, 16, 16))
    torch.nn.init.normal_(net.exit.weight, std=0.1)  # zero at first
    return net.double()


@pytest.mark.parametrize(("channels", "count"), [(1, 698_017), (3, 700_611)])
def test_the_papers_network_has_its_0_70_million_parameters(channels, count):
    net = N2SUNet(N2SUNetConfig(), (channels, 128, 128))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (31, 45), (64, 32)])
@pytest.mark.parametrize("kind", ["denoiser", "n2s_unet"])
def test_any_size_comes_back_as_it_was(kind, size):
    net = small() if kind == "denoiser" else N2SUNet(N2SUNetConfig(), (1, 32, 32)).double()
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    out = net(x, torch.ones(2))
    assert out.shape == x.shape and torch.isfinite(out).all()


def test_the_output_starts_at_zero_and_the_level_is_an_input():
    assert (
        Denoiser(DenoiserConfig(), (3, 16, 16))(torch.rand(1, 3, 16, 16), torch.ones(1)).eq(0).all()
    )
    net, x = small(), torch.rand(2, 1, 16, 16, dtype=torch.float64)
    out = net(x, torch.tensor([1.0, 2.0]))
    alone = net(x[1:], torch.tensor([2.0]))
    torch.testing.assert_close(out[1:], alone)
    assert (out - net(x, torch.tensor([1.0, 1.0])))[1].abs().max() > 1e-4


def test_shifted_by_its_multiple_it_gives_the_shifted_picture():
    """Away from the border; so tiles may be cut at multiples of it."""
    net, x = small(), torch.rand(1, 1, 96, 96, dtype=torch.float64)
    assert net.multiple == 4
    whole, part = net(x, torch.ones(1)), net(x[..., 4:, 8:], torch.ones(1))
    torch.testing.assert_close(whole[..., 44:60, 48:64], part[..., 40:56, 40:56])


def test_in_bf16_a_pixel_is_still_known_to_more_than_a_grey_level():
    """A network that hands its pixels on, deep scales and blocks silent, hands them on exactly."""
    net = Denoiser(DenoiserConfig(channels=[8, 8], blocks=[1, 1]), (1, 16, 16))
    with torch.no_grad():
        for layer in (net.entry, net.exit, net.up[0]):
            layer.weight.zero_()
            layer.bias.zero_()
        for k in range(4):
            net.entry.weight[k, k, 1, 1] = net.exit.weight[k, k, 1, 1] = 1
        for block in (net.before[0][0], net.after[0][0]):
            block.second.weight.zero_()
            block.second.bias.zero_()
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = net(x, torch.ones(1))
    torch.testing.assert_close(out, x, rtol=1e-6, atol=0)


def drawn(weight_norm):
    torch.manual_seed(0)
    return Denoiser(
        DenoiserConfig(channels=[8, 128], blocks=[1, 1], weight_norm=weight_norm), (1, 16, 16)
    )


def test_normalised_filters_give_the_same_network_at_first():
    plain, normalised = drawn(False), drawn(True)
    for net in (plain, normalised):
        torch.nn.init.ones_(net.exit.weight)
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(normalised(x, torch.ones(1)), plain(x, torch.ones(1)))


def test_steps_along_noise_do_not_make_normalised_filters_large():
    """Adam's steps have one size however small the gradient is: on noise alone filters wander."""
    largest = {}
    for weight_norm in (False, True):
        net, generator = drawn(weight_norm), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(300):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        weight = net.before[1][0].first.weight
        largest[weight_norm] = float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    # A random matrix of 128 filters of norm r has about r (1 + 1/3), r = 1/sqrt(3) at first.
    assert largest[True] < 1 < 1.6 < largest[False]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="network.blocks="):
        DenoiserConfig(channels=[8, 8], blocks=[1])
