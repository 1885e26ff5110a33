"""The energy of a U-Net for images: each form from the U-Net's own image, by hand."""

import pytest
import torch
from torch.nn import functional as F

from genmodels.methods.composed import twice_differentiable
from genmodels.networks.potential import Potential, PotentialConfig

SMALL = {"kind": "ddpmpp", "channels": 8, "multipliers": [1], "blocks": 1, "attention": []}
TOKENS = {"form": "tokens", "width": 128, "layers": 2, "patch": 2}


def potential(shape, classes=0, **options):
    """Return a small network with random weights everywhere: at first its image is zero."""
    torch.manual_seed(0)
    net = Potential(PotentialConfig(**SMALL, **options), shape, classes).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("form", ["norm", "distance"])
def test_the_forms_of_a_distance(form):
    """-sqrt(|x - M|^2 + 1e-4) and -|x - M|^2 / 2, summed over all pixels, in float64 if asked."""
    net, labels = potential((3, 4, 6), 4, form=form), torch.tensor([0, 3, -1])
    x, level = torch.randn(3, 3, 4, 6), torch.zeros(3)
    image = net.net(x, level, labels)
    assert not torch.allclose(image[0], torch.zeros(()), atol=0.1)
    squares = (x.double() - image.double()).square().sum((1, 2, 3))
    expected = -squares / 2 if form == "distance" else -(squares + 1e-4).sqrt()
    found = net(x, level, labels, dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net(x, level, labels), expected.float())
    assert net(x, level, labels)[0] != net(x, level)[0]  # the label reaches the U-Net


def layer_by_hand(layer, h, heads):
    """Return h + attention(norm(h)), then + MLP(norm(.)), (B, T, W)."""
    attention = layer.self_attn
    inner = F.layer_norm(h, h.shape[-1:], layer.norm1.weight, layer.norm1.bias)
    parts = (inner @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (heads, 64)).transpose(1, 2) for part in parts)
    share = (q @ k.transpose(2, 3) / 8).softmax(dim=3)  # 8 = sqrt(64)
    h = h + attention.out_proj((share @ v).transpose(1, 2).flatten(2))
    inner = F.layer_norm(h, h.shape[-1:], layer.norm2.weight, layer.norm2.bias)
    return h + layer.linear2(F.gelu(layer.linear1(inner)))


def test_the_form_of_tokens():
    """Patches of M(x), row by row, with positions; the last norm before the mean over tokens."""
    net, x, level = potential((3, 4, 6), **TOKENS), torch.randn(2, 3, 4, 6), torch.zeros(2)
    image = net.net(x, level)
    patches = F.unfold(image, 2, stride=2).transpose(1, 2)  # (B, 6, 3 x 2 x 2)
    h = patches @ net.tokens.weight.flatten(1).T + net.tokens.bias + net.positions
    for layer in net.transformer.layers:
        h = layer_by_hand(layer, h, heads=2)
    h = F.layer_norm(h, (128,), net.norm.weight)
    expected = h.mean(dim=1) @ net.head.weight[0]
    torch.testing.assert_close(net(x, level), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^network.patch=2: must divide .* 4 x 5"):
        potential((3, 4, 5), **TOKENS)


@pytest.mark.parametrize("options", [{"form": "norm"}, TOKENS | {"layers": 1}])
def test_its_gradient_is_that_of_one_scalar(options):
    """As finite differences of f have it, and without curl: its Jacobian is symmetric."""
    net = potential((1, 4, 4), **options).double()
    x, level = torch.randn(1, 1, 4, 4).double(), torch.zeros(1).double()

    def f(flat):
        return net(flat.reshape(1, 1, 4, 4), level, dtype=torch.float64).sum()

    def slope(flat):
        return torch.autograd.grad(f(flat), flat, create_graph=True)[0]

    flat = x.flatten().requires_grad_(True)
    with twice_differentiable():
        found = slope(flat).detach()
        jacobian = torch.autograd.functional.jacobian(slope, flat)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(16).double()
        expected = torch.stack([(f(flat + e) - f(flat - e)) / 2e-5 for e in steps])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert jacobian.abs().max() > 1e-3
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)
