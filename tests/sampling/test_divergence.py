"""The divergence of a map: against closed forms, with and without a graph to its parameters."""

import pytest
import torch

from genmodels.sampling.divergence import score_and_divergence, value_and_divergence

MATRIX = torch.tensor([[1.0, 2.0, 0.0], [0.5, -3.0, 1.0], [0.0, 4.0, 0.25]]).double()


def linear(x):
    return x @ MATRIX.T


def test_exact_and_estimated_of_a_linear_map():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    value, exact = value_and_divergence(linear, x)
    assert torch.equal(value, linear(x))
    torch.testing.assert_close(exact, torch.full((4,), -1.75).double())
    # All eight vectors of signs together know the trace exactly.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    _, estimate = value_and_divergence(linear, x, [corner.expand(4, 3) for corner in corners])
    torch.testing.assert_close(estimate, exact)
    one = torch.ones(4, 3)
    _, single = value_and_divergence(linear, x, [one])
    torch.testing.assert_close(single, torch.full((4,), float(MATRIX.sum())).double())


@pytest.mark.parametrize("signs", [None, [torch.ones(2, 1, 2, 2)]])
def test_a_graph_where_gradients_are_enabled_and_none_elsewhere(signs):
    power = torch.nn.Parameter(torch.tensor(3.0))
    x = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(1)) + 0.5

    def score(y, variance):
        return variance * y**power

    call = score_and_divergence(score, signs)
    value, divergence = call(x, 2.0)
    (slope,) = torch.autograd.grad(divergence.sum(), power)
    # div = sum 2 p x^(p - 1), and its derivative in p.
    expected = (2 * x**2 * (1 + 3 * x.log())).sum()
    torch.testing.assert_close(divergence, (6 * x**2).flatten(1).sum(1))
    torch.testing.assert_close(slope, expected)
    assert value.requires_grad
    with torch.no_grad():
        bare, same = call(x, 2.0)
    assert not bare.requires_grad and not same.requires_grad
    assert torch.equal(same, divergence.detach()) and torch.equal(bare, value.detach())
