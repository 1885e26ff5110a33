"""CMMD against the definition, written out, and closed forms."""

import math

import pytest
import torch

from genmodels.metrics.cmmd import cmmd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("angle", [0.3, math.pi / 2, math.pi])
def test_two_point_masses(angle):
    """|x - y|^2 = 2 - 2 cos; lengths do not count."""
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64).repeat(5, 1)
    y = 0.1 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64).repeat(7, 1)
    truth = 1000 * (2 - 2 * math.exp(-(2 - 2 * math.cos(angle)) / 200))
    assert cmmd(x, y) == pytest.approx(truth, rel=1e-9)


def test_the_definition_with_all_pairs():
    x, y = normal(9, 4), normal(6, 4, seed=1) + 0.5
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (x, y))

    def mean(p, q):
        return sum(math.exp(-float((u - v).square().sum()) / 200) for u in p for v in q) / (
            len(p) * len(q)
        )

    truth = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(x, y) == pytest.approx(truth, rel=1e-9) and truth > 0.1
    assert cmmd(x.float(), y.float()) == pytest.approx(truth, rel=1e-4)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="metrics=cmmd: reference .* zero features"):
        cmmd(normal(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one dimension, got 3 and 2"):
        cmmd(normal(4, 3), normal(4, 2))
