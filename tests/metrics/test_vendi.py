"""The Vendi score of sets whose spectrum is known."""

import math

import pytest
import torch

from genmodels.metrics.vendi import vendi


@pytest.mark.parametrize("n", [3, 50])  # fewer rows than dimensions, and more
def test_identical_rows_are_worth_one(n):
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.arange(1, n + 1)[:, None]  # which do not count
    assert vendi(row * lengths) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("groups", "dim"), [(5, 200), (5, 6)])
def test_orthogonal_groups_are_worth_their_number(groups, dim):
    rows = torch.eye(dim, dtype=torch.float64)[:groups].repeat(20, 1)
    assert vendi(rows) == pytest.approx(groups, rel=1e-9)


def test_unequal_groups_by_their_entropy():
    rows = torch.eye(4)[torch.tensor([0] * 5 + [1] * 3 + [2] * 2)]
    truth = math.exp(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)))
    assert vendi(rows) == pytest.approx(truth, rel=1e-9)


def test_both_matrices_give_the_definition():
    """Two unit vectors at an angle a: the eigenvalues of K / 2 are (1 +- cos a) / 2."""
    angle = 0.7
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    halves = [(1 + s * math.cos(angle)) / 2 for s in (1, -1)]
    truth = math.exp(-sum(p * math.log(p) for p in halves))
    assert vendi(pair) == pytest.approx(truth, rel=1e-9)
    assert vendi(pair.repeat(9, 1)) == pytest.approx(truth, rel=1e-9)
    assert vendi(torch.nn.functional.pad(pair.repeat(9, 1), (0, 40))) == pytest.approx(truth)


def test_zero_features_are_refused():
    with pytest.raises(ValueError, match="metrics=vendi: needs some rows none of which is zero"):
        vendi(torch.zeros(3, 2))
