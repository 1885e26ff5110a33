"""The default network: what its settings build, labels, and padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from genmodels.networks.unet import UNet, UNetConfig


def make(classes=0, shape=(3, 8, 8), **settings):
    plain = {
        "channels": [8, 16, 32],
        "layers": 1,
        "attention": [0],
        "head_dim": 4,
        "norm_groups": 4,
    }
    torch.manual_seed(0)
    return UNet(UNetConfig(**(plain | settings)), shape, classes)


def attentions(net):
    """Return (channels, heads) of every self-attention."""
    found = [module for module in net.modules() if type(module).__name__ == "Attention"]
    return [(module.to_q.in_features, module.heads) for module in found]


# ------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize(
    "labels, rows",
    [([-1, 0, 3], [4, 0, 3]), ([3, -1, -1], [3, 4, 4]), (None, [4, 4, 4])],
    ids=["first", "last", "none"],
)
def test_no_label_has_a_row_of_its_own(labels, rows):
    """Classes 0..3 and, in the last row of the embedding, no label."""
    net, seen = make(classes=4), []
    table = net.unet.class_embedding
    assert table.weight.shape[0] == 5
    table.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    net(torch.zeros(3, 3, 8, 8), torch.zeros(3), None if labels is None else torch.tensor(labels))
    assert seen == [rows]


def test_an_unconditional_network_takes_no_notice_of_labels():
    net = make()
    nn.init.normal_(net.unet.conv_out.weight)
    x, noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    assert net.unet.class_embedding is None
    assert torch.equal(net(x, noise, torch.tensor([0, -1])), net(x, noise))


def test_groups_of_one_channel_hide_the_level_and_are_told():
    """Diffusers adds noise level and class to whole channels, and a norm of each takes it away."""
    x, level = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 3.0])
    changes = {}
    for groups in (2, 8):
        if groups == 8:
            with pytest.warns(UserWarning, match=r"network\.norm_groups=8: each channel of"):
                net = make(channels=[8, 8], attention=[], norm_groups=groups)
        else:
            net = make(channels=[8, 8], attention=[], norm_groups=groups)
        nn.init.normal_(net.unet.conv_out.weight)
        with torch.no_grad():
            changes[groups] = float((net(x, level) - net(x, level.flip(0))).abs().max())
    assert changes[8] < 1e-4 and changes[2] > 0.01


# ------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("attention", [[], [0], [1], [0, 2]])
def test_attention_stands_at_its_levels_on_the_way_down_and_up(attention):
    unet = make(attention=attention).unet
    for levels, blocks in ((range(3), unet.down_blocks), (range(2, -1, -1), unet.up_blocks)):
        for level, block in zip(levels, blocks, strict=True):
            has = any(type(module).__name__ == "Attention" for module in block.modules())
            assert has == (level in attention), (level, type(block).__name__)
    # In the middle as well, but for attention=[], which means none at all.
    middle = any(type(module).__name__ == "Attention" for module in unet.mid_block.modules())
    assert middle == bool(attention)


@pytest.mark.parametrize("head_dim", [2, 4, 8])
def test_heads_have_their_number_of_channels(head_dim):
    found = attentions(make(attention=[0, 2], head_dim=head_dim))
    assert {channels for channels, _ in found} == {8, 32}
    assert all(heads == channels // head_dim for channels, heads in found)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_stands_in_every_residual_block(dropout):
    net = make(dropout=dropout)
    blocks = [module for module in net.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert len(blocks) == 3 + 2 + 3 * 2  # down, middle, up
    assert {block.dropout.p for block in blocks} == {dropout}
    nn.init.normal_(net.unet.conv_out.weight)
    x, noise = torch.randn(1, 3, 8, 8), torch.zeros(1)
    assert torch.equal(net.train()(x, noise), net(x, noise)) == (dropout == 0)
    assert torch.equal(net.eval()(x, noise), net(x, noise))


def test_channels_layers_and_groups():
    net = make(channels=[8, 24], layers=3, norm_groups=2, head_dim=8).unet
    assert [block.resnets[-1].out_channels for block in net.down_blocks] == [8, 24]
    assert [len(block.resnets) for block in net.down_blocks] == [3, 3]
    groups = {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {2}


# ------------------------------------------------------------------------------------------------
# Padding


@pytest.mark.parametrize(
    "size, padded, mode",
    [
        ((5, 7), (8, 8), "reflect"),
        ((8, 6), (8, 8), "reflect"),
        ((9, 12), (12, 12), "reflect"),
        ((8, 4), (8, 4), "reflect"),
        ((1, 1), (4, 4), "edge"),
        ((2, 8), (4, 8), "edge"),
    ],
)
def test_images_are_continued_at_the_right_and_bottom_and_cropped(size, padded, mode):
    """To multiples of 4 (three levels), mirrored about their last pixel if they are big enough."""
    net, seen = make(shape=(3, *size)), []

    class Same(nn.Module):
        def forward(self, x, *_):
            seen.append(x)
            return SimpleNamespace(sample=x)

    net.unet = Same()
    x = torch.randn(2, 3, *size)
    assert torch.equal(net(x, torch.zeros(2)), x)
    added = [(0, 0), (0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1])]
    assert seen[0].shape[-2:] == padded
    assert np.array_equal(seen[0].numpy(), np.pad(x.numpy(), added, mode=mode))
