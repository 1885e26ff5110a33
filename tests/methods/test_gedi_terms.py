"""The closed forms of the loss: letters are those of the list in the method's description."""

import math

import pytest
import torch
from torch.func import hessian

from genmodels.methods.gedi_terms import (
    Marginal,
    collapse,
    invariance,
    log_marginal,
    log_sum,
    prior_cross_entropy,
)

C = 10


def one_hot(clusters, sharp=60.0, count=C):
    """Logits of confident predictions of these clusters, (B, count)."""
    return sharp * torch.nn.functional.one_hot(torch.as_tensor(clusters), count).double()


def value(z, z_view):
    """L_INV, L_PRIOR (both <= 0) of a batch of logits."""
    return (
        -float(invariance(z, z_view).mean()),
        -float(prior_cross_entropy(log_marginal(z))),
    )


def logits_of(p, count=8):
    return torch.as_tensor(p, dtype=torch.float64).log().repeat(count, 1)


def prior_of(epsilon):
    """(1/C) sum_c log pi_c of a marginal with epsilon in all clusters but one."""
    return (math.log(1 - (C - 1) * epsilon) + (C - 1) * math.log(epsilon)) / C


def test_a_uniform_predictions():
    z = torch.full((32, C), 1.7, dtype=torch.float64)
    inv, prior = value(z, z)
    assert inv == pytest.approx(-math.log(C)) and prior == pytest.approx(-math.log(C))
    assert inv + prior == pytest.approx(-4.60517, abs=1e-5)


def test_b_confident_invariant_balanced():
    z = one_hot(torch.arange(40) % C)
    inv, prior = value(z, z)
    assert inv == pytest.approx(0, abs=1e-12) and prior == pytest.approx(-2.30259, abs=1e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-8, 1e-30])
def test_c_cluster_collapse_meets_a_barrier(epsilon):
    """And the gradient in pbar_c is 1 / (C pbar_c) down to where a floor would have cut it."""
    p = torch.full((C,), epsilon, dtype=torch.float64)
    p[0] = 1 - (C - 1) * epsilon
    z = p.log().repeat(8, 1)
    inv, prior = value(z, z)
    entropy = -float((p * p.log()).sum())
    assert inv == pytest.approx(-entropy, abs=1e-12) and inv > -0.1
    assert prior == pytest.approx(prior_of(epsilon), rel=1e-12)
    log_pbar = p.log().requires_grad_(True)
    (grad,) = torch.autograd.grad(prior_cross_entropy(log_pbar), log_pbar)
    torch.testing.assert_close(-grad / p, 1 / (C * p))


def test_d_constant_prediction():
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    inv, prior = value(logits_of(pi), logits_of(pi))
    assert inv == pytest.approx(float((pi * pi.log()).sum()))
    assert prior == pytest.approx(float(pi.log().mean()))


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(32, C, generator=generator, dtype=torch.float64) for _ in range(2))


def test_e_both_views_permuted_together(pair):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert value(*(z[order] for z in pair)) == pytest.approx(value(*pair))


def test_f_one_view_permuted():
    z = one_hot(torch.arange(40) % C, sharp=9.0)
    inv, prior = value(z, z.roll(1, 0))
    assert prior == pytest.approx(value(z, z)[1]) and inv < value(z, z)[0] - 8


def test_g_clusters_renamed(pair):
    order = torch.randperm(C, generator=torch.Generator().manual_seed(1))
    assert value(*(z[:, order] for z in pair)) == pytest.approx(value(*pair))


def test_l_low_temperature(pair):
    """Separated logits: the invariance term vanishes, tau logsumexp(z / tau) is the largest z."""
    z = pair[0]
    z[:, 0] = z.amax(dim=1) + 1
    for tau, bound in ((0.1, 1e-3), (0.02, 1e-18)):
        assert -value(z / tau, z / tau)[0] < bound
    torch.testing.assert_close(0.02 * (z / 0.02).logsumexp(1), z.amax(1))


def test_m_sum_and_mean_normalisation(pair):
    """-SUM_c log pbar_c, as others write the prior term, is C times the mean; its least C log C."""
    log_pbar = log_marginal(pair[0])
    assert float(-log_pbar.sum()) == pytest.approx(C * float(prior_cross_entropy(log_pbar)))
    uniform = torch.full((C,), -math.log(C), dtype=torch.float64)
    assert C * float(prior_cross_entropy(uniform)) == pytest.approx(C * math.log(C))


def test_given_prior_is_least_at_itself():
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    least = float(prior_cross_entropy(prior.log(), prior))
    assert least == pytest.approx(-float((prior * prior.log()).sum()))
    for other in ([0.4, 0.4, 0.2], [1 / 3] * 3):
        assert float(prior_cross_entropy(torch.tensor(other).log().double(), prior)) > least


def test_terms_agree_with_torch(pair):
    z, z_view = pair
    cross = torch.nn.functional.cross_entropy(z, z_view.softmax(1), reduction="none")
    torch.testing.assert_close(invariance(z, z_view), cross)
    torch.testing.assert_close(log_marginal(z), z.softmax(1).mean(0).log())


def test_detached_target_has_the_same_value_and_half_the_gradient(pair):
    z, z_view = (x.requires_grad_(True) for x in pair)
    torch.testing.assert_close(invariance(z, z_view, True), invariance(z, z_view))
    grads = torch.autograd.grad(invariance(z, z_view, True).sum(), (z, z_view), allow_unused=True)
    torch.testing.assert_close(grads[0], z.softmax(1) - z_view.softmax(1))
    assert grads[1] is None


def test_the_averaged_marginal_counts_earlier_batches():
    """Value: mean over batches with weights 0.9^k; gradient: that of one large batch."""
    marginal = Marginal(0.9)
    p = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    mean = p[0].clone()
    for row in p:
        log_pbar = row.log().requires_grad_(True)
        averaged = marginal.average(log_pbar)
        mean = 0.9 * mean + 0.1 * row
        torch.testing.assert_close(averaged.detach().exp(), mean)
        (grad,) = torch.autograd.grad(-averaged.mean(), log_pbar)
        torch.testing.assert_close(grad, -0.5 * row / mean)
    z = p.log()
    torch.testing.assert_close(marginal(z, update=False), log_marginal(z))
    torch.testing.assert_close(Marginal(0)(z), log_marginal(z))


# ------------------------------------------------------------------------------------------------
# Collapse basins of a constant predictor


def objective(logits, w_inv, w_prior, detach=False):
    """w_inv L_INV + w_prior L_PRIOR of the constant prediction softmax(logits)."""
    z = logits.repeat(4, 1)
    terms = w_inv * invariance(z, z, detach).mean() + w_prior * prior_cross_entropy(log_marginal(z))
    return -terms


@pytest.mark.parametrize("w_inv, w_prior", [(1.0, 1.0), (5.0, 1.0), (1.0, 5.0)])
def test_curvature_at_uniform(w_inv, w_prior):
    """Along a direction d of probabilities it is C (w_inv - w_prior) |d|^2."""
    at = torch.zeros(C, dtype=torch.float64)
    curvature = hessian(lambda logits: objective(logits, w_inv, w_prior))(at)
    step = torch.randn(C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step -= step.mean()
    d = step / C  # of the probabilities, for a small step of the logits
    expected = C * (w_inv - w_prior) * float(d @ d)
    assert float(step @ curvature @ step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "clusters, w_inv, w_prior, mass, best, uniform",
    [
        (10, 1.0, 1.0, 0.729, -4.364, -4.605),
        (10, 50.0, 10.0, 0.968, -61.4, -138.2),
        (100, 50.0, 10.0, 0.976, None, None),
    ],
)
def test_best_constant_with_one_cluster_up(clusters, w_inv, w_prior, mass, best, uniform):
    grid = torch.linspace(1 / clusters + 1e-4, 0.9999, 20001, dtype=torch.float64)
    rest = (1 - grid) / (clusters - 1)
    p = torch.cat([grid[:, None], rest[:, None].expand(-1, clusters - 1)], 1)
    values = torch.stack([objective(row.log(), w_inv, w_prior) for row in p[::40]])
    top = int(values.argmax())
    assert float(p[::40][top, 0]) == pytest.approx(mass, abs=2e-3)
    if best is not None:
        assert float(values[top]) == pytest.approx(best, abs=0.05)
        at_uniform = objective(torch.zeros(clusters, dtype=torch.float64), w_inv, w_prior)
        assert float(at_uniform) == pytest.approx(uniform, abs=0.05)


@pytest.mark.parametrize(
    "w_inv, detach, collapsed", [(50.0, False, True), (50.0, True, False), (5.0, False, False)]
)
def test_a_constant_predictor_falls_in_the_basin_or_does_not(w_inv, detach, collapsed):
    """w_inv > w_prior = 10 pushes it into one cluster; detach_target or w_inv <= w_prior do not."""
    logits = 0.01 * torch.randn(C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (-objective(logits, w_inv, 10.0, detach)).backward()
        optimizer.step()
    largest = float(logits.detach().softmax(0).max())
    assert largest == pytest.approx(0.968, abs=3e-3) if collapsed else largest < 0.11


# ------------------------------------------------------------------------------------------------
# Sums of two digits


def test_sums_are_a_convolution(pair):
    p, q = (z[:4].log_softmax(1) for z in pair)
    table = log_sum(p, q)
    assert table.shape == (4, 2 * C - 1)
    for row, a, b in zip(table.exp(), p.exp(), q.exp()):
        expected = torch.nn.functional.conv1d(
            a.reshape(1, 1, C), b.flip(0).reshape(1, 1, C), padding=C - 1
        ).flatten()
        torch.testing.assert_close(row, expected)
    torch.testing.assert_close(table.exp().sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(log_sum(q, p), table)


def test_uniform_digits_cost_2_7938_nats():
    p = torch.full((1, C), -math.log(C), dtype=torch.float64)
    table = log_sum(p, p)[0]
    assert float(-(table.exp() * table).sum()) == pytest.approx(2.7938, abs=1e-4)


def test_certain_digits_cost_nothing_or_everything():
    p = torch.full((1, C), -math.inf, dtype=torch.float64)
    q = p.clone()
    p[0, 3], q[0, 4] = 0.0, 0.0
    table = log_sum(p, q)[0]
    assert float(table[7]) == 0 and torch.isinf(table[torch.arange(19) != 7]).all()


def test_the_gradient_of_sums_is_finite_where_few_pairs_make_one(pair):
    z = (20 * pair[0][:2]).requires_grad_(True)
    log_p = z.log_softmax(1)
    for s in (0, 9, 18):
        (grad,) = torch.autograd.grad(log_sum(log_p[:1], log_p[1:])[0, s], z, retain_graph=True)
        assert torch.isfinite(grad).all() and grad.abs().max() > 0


def test_only_the_identity_explains_all_sums():
    """alpha(i) + alpha(j) = i + j for all pairs, by trying every map of three digits."""
    maps = torch.cartesian_prod(*[torch.arange(3)] * 3)
    fit = [
        m.tolist() for m in maps if all(m[i] + m[j] == i + j for i in range(3) for j in range(3))
    ]
    assert fit == [[0, 1, 2]]


# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((1.0, 0.0, 0.1, 0.1), "uniform"),
        ((0.0, 8.0, 0.999, 1.0), "one cluster"),
        ((0.1, 0.0, 0.12, 0.9), ""),
        ((0.97, 1.0, 0.5, 0.5), ""),
        ((3.0, 0.01, 0.12, 1.0), ""),
    ],
)
def test_collapse_in_words(numbers, words):
    assert words in collapse(*numbers, C) and bool(collapse(*numbers, C)) == bool(words)


@pytest.mark.parametrize("clusters, mass", [(2, 0.975), (10, 0.968), (100, 0.976)])
def test_the_basin_of_a_constant_predictor_is_named(clusters, mass):
    """The best constant at weights 50 and 10; the same marginal is right where the prior is it."""
    p = torch.full((clusters,), (1 - mass) / (clusters - 1), dtype=torch.float64)
    p[0] = mass
    inv, prior = value(logits_of(p), logits_of(p))
    numbers = -inv / math.log(clusters), -prior - math.log(clusters), mass, mass
    assert "one cluster" in collapse(*numbers, clusters)
    gap = float(prior_cross_entropy(p.log(), p) + (p * p.log()).sum())
    assert collapse(numbers[0], gap, mass, mass, clusters) == ""


# ------------------------------------------------------------------------------------------------
# Two processes


def _of_one_process(rank, address, parts, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    weight = torch.ones(C, C, dtype=torch.float64).requires_grad_(True)
    log_pbar = log_marginal(parts[rank] @ weight.tril())
    prior_cross_entropy(log_pbar).backward()
    torch.distributed.all_reduce(weight.grad)  # DDP's mean over processes
    queue.put((rank, log_pbar.detach().numpy(), (weight.grad / 2).numpy()))
    torch.distributed.destroy_process_group()


def test_the_marginal_is_that_of_all_processes_with_its_gradient(tmp_path, pair):
    """Two gloo processes with half of the batch each, averaged as DDP does, are one with all."""
    z = pair[0].detach()
    z[16:, 1] += 40  # the halves disagree: a mean of logs would be far from the log of the mean
    z[16:, 0] -= 200  # and this cluster is dead beyond exp's range in one of them
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [
        context.Process(
            target=_of_one_process, args=(rank, f"file://{tmp_path}/store", z.split(16), queue)
        )
        for rank in range(2)
    ]
    for job in jobs:
        job.start()
    results = dict((rank, found) for rank, *found in (queue.get(timeout=120) for _ in jobs))
    for job in jobs:
        job.join()
    weight = torch.ones(C, C, dtype=torch.float64).requires_grad_(True)
    log_pbar = log_marginal(z @ weight.tril())
    prior_cross_entropy(log_pbar).backward()
    for found, grad in results.values():
        torch.testing.assert_close(torch.from_numpy(found), log_pbar.detach())
        torch.testing.assert_close(torch.from_numpy(grad), weight.grad)
    assert weight.grad.abs().max() > 1e-3
