"""Coefficients against the published schedules' table; chains against Gaussians in closed form."""

import math

import pytest
import torch

from genmodels.networks.ebm import EBM, EBMConfig, fixed_weights
from genmodels.sampling.recovery import (
    RecoverySchedule,
    denoise_tweedie,
    recovery_chain,
    recovery_mala,
)

# Level: log SNR, sqrt(A), sbar; worked out from the formulas of the two released codes.
LEVELS = {
    "cdrl": [(9.800, 0.99997, 0.00745), (2.689, 0.96766, 0.25226), (1.197, 0.87634, 0.48170),
             (0.141, 0.73158, 0.68176), (-0.876, 0.54221, 0.84024), (-2.172, 0.31978, 0.94749),
             (-5.100, 0.07784, 0.99697)],
    "drl": [(9.210, 0.99995, 0.01000), (2.144, 0.94612, 0.32382), (0.647, 0.81015, 0.58622),
            (-0.430, 0.62770, 0.77845), (-1.427, 0.43997, 0.89801), (-2.473, 0.27892, 0.96031),
            (-10.118, 0.00635, 0.99998)],
}  # fmt: skip
DIGITS = (5, 5, 2, 5, 5, 5, 4)  # decimal places of the columns of PAIRS
# t: sqrt(a_t), sigma_t, c_t, s_t, k_t, std of the initializer's noise, weight of the loss
PAIRS = {
    1: (0.96769, 0.25216, 1.000, 0.00504, 0.00020, 0.00720, 1.0000),
    2: (0.90563, 0.42407, 33.88, 0.04937, 0.00678, 0.20113, 0.5946),
    3: (0.83481, 0.55053, 64.69, 0.08856, 0.01294, 0.32473, 0.4580),
    4: (0.74115, 0.67134, 91.56, 0.12847, 0.01831, 0.40371, 0.3756),
    5: (0.58977, 0.80757, 112.84, 0.17157, 0.02257, 0.42237, 0.3122),
    6: (1.0, 0.96992, 127.24, 0.21882, 0.0, 0.92179, 0.2600),
}


@pytest.mark.parametrize("angles", ["cdrl", "drl"])
def test_noise_levels(angles):
    exact = RecoverySchedule(angles).exact
    assert len(exact.cos) == 7
    for t, (snr, cos, sin) in enumerate(LEVELS[angles]):
        assert float(exact.cos[t]) == pytest.approx(cos, abs=6e-6)
        assert float(exact.sin[t]) == pytest.approx(sin, abs=6e-6)
        assert 2 * math.log(exact.cos[t] / exact.sin[t]) == pytest.approx(snr, abs=6e-4)


def test_table_of_coefficients():
    schedule = RecoverySchedule("cdrl", 6, 4e-4)
    for t, row in PAIRS.items():
        for level in (Level64(schedule, t), schedule.at(torch.tensor([t]))):
            values = [level.scale, level.sigma, level.c, level.s, level.k, level.v**0.5, level.w]
            for value, expected, digits in zip(values, row, DIGITS):
                assert float(value) == pytest.approx(expected, abs=0.51 * 10**-digits)
    angles = torch.atan2(schedule.exact.sin, schedule.exact.cos)
    torch.testing.assert_close(angles.diff(), torch.full((6,), 0.24757).double(), rtol=0, atol=5e-6)
    assert float(schedule.exact.noise[6]) == pytest.approx(2000 / math.pi * 1.4929, abs=0.05)
    assert torch.equal(schedule.exact.noise_clean[1:], schedule.exact.noise[:-1])


# Log SNR and code of the level, 1000 (2 / pi) atan(exp(-SNR / 2)), of t = 0, 3, 6: what CDRL's
# released code gives for logsnr_max = 8 and logsnr_min = -4.
OTHER = {0: (8.0, 11.658794), 3: (0.2329336, 463.01099), 6: (-4.0, 914.36318)}


def test_other_ends_and_other_codes():
    schedule = RecoverySchedule("cdrl", 6, 4e-4, snr_max=8.0, snr_min=-4.0)
    for t, (snr, code) in OTHER.items():
        found = 2 * math.log(schedule.exact.cos[t] / schedule.exact.sin[t])
        assert found == pytest.approx(snr, abs=1e-5)
        assert float(schedule.exact.noise[t]) == pytest.approx(code, rel=1e-5)
    counted = RecoverySchedule("drl", 6, 2e-4, code="index").exact
    assert counted.noise.tolist() == list(range(7)) and counted.noise_clean[1:].tolist() == list(
        range(6)
    )


def Level64(schedule, t):
    return schedule.at(torch.tensor([t]), exact=True)


def test_the_first_pair_of_drl():
    """The parent's step: b^2 = 2e-4, no initializer; s_1 = sqrt(2e-4) sigma_1."""
    level = Level64(RecoverySchedule("drl", 6, 2e-4), 1)
    assert float(level.s) == pytest.approx(math.sqrt(2e-4) * math.sqrt(1 - 0.94617**2), rel=1e-4)
    constant = RecoverySchedule("cdrl", 6, 2e-3, "constant")
    assert constant.exact.c.tolist() == pytest.approx([134.29] * 7, abs=0.01)
    assert float(Level64(constant, 3).s) == pytest.approx(
        (2e-3 * 134.29) ** 0.5 * 0.55053, rel=1e-4
    )


def test_units_of_the_noise():
    """Data that are one point: log p(y) = -|y - m|^2 / (2 n^2), so F = -|y - m|^2 / 2 needs f =
    s^2 / n^2 F at every level; the weights of the loss, on F, stay the papers'."""
    step, noise = (RecoverySchedule("cdrl", 6, 4e-4, units=u).exact for u in ("step", "noise"))
    for t in range(1, 7):
        n = float(noise.scale[t] * noise.sin_clean[t])
        assert float(noise.gain[t]) == pytest.approx(float(noise.s[t]) ** 2 / n**2, rel=1e-12)
        assert float(noise.gain[t] * noise.w[t]) == pytest.approx(PAIRS[t][6], abs=6e-5)
        assert float(step.gain[t]) == 1 and float(step.w[t]) == pytest.approx(PAIRS[t][6], abs=6e-5)
    assert float(noise.gain[1]) == pytest.approx(0.4898, abs=1e-4)  # 4e-4 sigma_1^2 / a_1 sin_0^2
    capped = RecoverySchedule("cdrl", 6, 2e-3, "constant", "noise").exact.gain
    assert capped[1] == 1 and float(capped[2]) == pytest.approx(0.9256, abs=1e-3)
    assert RecoverySchedule(units="noise", limit=0.05).exact.gain[[1, 2]].tolist() == [
        0.05,
        pytest.approx(0.0467, abs=1e-4),
    ]


# ------------------------------------------------------------------------------------------------
# Chains. Data N(m, c^2) in each element: y at level t-1 is N(M, V), so p(y | x_t) is normal with
# precision q = 1 / V + r / sigma^2. n chains of 4 elements; errors of five standard errors.

N, MEAN, STD = 8000, 0.3, 0.4
SCHEDULE = RecoverySchedule("cdrl", 6, 2e-3, "constant")


def gaussian(level):
    """Return f(y) = s^2 log N(y; M, V), M and V of y."""
    mean = float(level.scale[0] * level.cos_clean[0]) * MEAN
    variance = float(level.scale[0]) ** 2 * float(
        (level.cos_clean[0] * STD) ** 2 + level.sin_clean[0] ** 2
    )
    s2 = level.s.double() ** 2
    return (
        lambda y: s2.to(y.dtype) * (-0.5 * (y - mean) ** 2 / variance).flatten(1).sum(1),
        mean,
        variance,
    )


def posterior(mean, variance, x_t, level, t):
    q = 1 / variance + (0 if t == 6 else 1 / float(level.sigma[0]) ** 2)
    pull = mean / variance + (0 if t == 6 else x_t / float(level.sigma[0]) ** 2)
    return pull / q, 1 / q


def check_law(y, mean, variance):
    rows = y.flatten()
    assert abs(float(rows.mean()) - mean) < 5 * (variance / len(rows)) ** 0.5
    assert abs(float(rows.var()) / variance - 1) < 5 * (2 / len(rows)) ** 0.5


@pytest.mark.parametrize("t", [1, 3, 6])
def test_recovery_posterior(t):
    """The unadjusted chain has the posterior's mean and 1 / (q (1 - h q / 4)), h = s^2; MALA 1 / q.

    A start far from both; 60 steps forget it (1 - h q / 2 < 0.87 at every level here).
    """
    level = SCHEDULE.at(torch.full((N,), t))
    f, mean, variance = gaussian(level)
    x_t = torch.full((N, 1, 2, 2), 0.9)
    start = torch.randn(N, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    mean, variance = posterior(mean, variance, 0.9, level, t)
    biased = variance / (1 - float(level.s[0]) ** 2 / (4 * variance))
    assert biased > 1.06 * variance  # so that MALA's exactness is a statement
    options = {"seed": torch.arange(N)}
    plain = recovery_chain(f, start, x_t, level, steps=60, **options)
    check_law(plain.y, mean, biased)
    exact = recovery_mala(f, start, x_t, level, steps=120, rate=0.8, **options)
    check_law(exact.y, mean, variance)
    assert 0.5 < exact.acceptance.mean() < 1


def test_fewer_steps_keep_drift_and_noise():
    """rate = K / K': on a flat energy the variance of the noise, and of one K the drift, agree."""
    level = SCHEDULE.at(torch.full((N,), 6))
    flat = lambda y: 0 * y.flatten(1).sum(1)  # noqa: E731
    zero = torch.zeros(N, 1, 2, 2)
    for steps in (15, 5):
        y = recovery_chain(
            flat, zero, zero, level, steps=steps, rate=15 / steps, seed=torch.arange(N)
        ).y
        check_law(y, 0, 15 * float(level.s[0]) ** 2)
        slope = lambda y: y.flatten(1).sum(1)  # noqa: E731  gradient one
        y = recovery_chain(
            slope,
            zero,
            zero,
            level,
            steps=steps,
            rate=15 / steps,
            noise_scale=0.0,
            seed=torch.arange(N),
        ).y
        torch.testing.assert_close(y, zero + 7.5)
    tied = SCHEDULE.at(torch.full((N,), 3))
    y = recovery_chain(
        flat, zero, zero + 1, tied, steps=1, rate=3.0, noise_scale=0.0, seed=torch.arange(N)
    ).y
    torch.testing.assert_close(y, zero + 3 * 2e-3 / 0.0074464 / 2, rtol=1e-4, atol=0)


def test_levels_of_a_batch_are_the_images_own():
    """One batch with mixed levels = each image alone, bit for bit; masked elements do not move."""
    t = torch.tensor([1, 6, 3, 2])
    torch.manual_seed(0)
    level, y = SCHEDULE.at(t), torch.randn(4, 1, 2, 2)
    x_t, mask = torch.randn(4, 1, 2, 2), torch.rand(4, 1, 2, 2) < 0.5
    f = lambda y: -(y**4).flatten(1).sum(1)  # noqa: E731
    seeds = torch.arange(4)
    whole = recovery_chain(f, y, x_t, level, steps=5, seed=seeds, mask=mask).y
    for k in range(4):
        own = type(level)(*(value[k : k + 1] for value in level))
        alone = recovery_chain(
            f,
            y[k : k + 1],
            x_t[k : k + 1],
            own,
            steps=5,
            seed=seeds[k : k + 1],
            mask=mask[k : k + 1],
        ).y
        assert torch.equal(alone[0], whole[k])
    assert torch.equal(whole[~mask], y[~mask]) and (whole[mask] != y[mask]).all()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_tweedie_is_the_posterior_mean(scale):
    """Data N(m, c^2): E[x_0 | x] = m + A c^2 / (A c^2 + sbar^2) (x - sqrt(A) m) / sqrt(A)."""
    level = SCHEDULE.at(torch.full((5,), 1))
    f, _, _ = gaussian(level)
    y = torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2)
    x, cos, sin = y / level.scale[0], float(level.cos_clean[0]), float(level.sin_clean[0])
    shrunk = (cos * STD) ** 2 / ((cos * STD) ** 2 + sin**2)
    once = MEAN + shrunk * (x - cos * MEAN) / cos
    expected = x / cos + scale * (once - x / cos)
    torch.testing.assert_close(denoise_tweedie(f, y, level, scale), expected, rtol=0, atol=2e-6)


def test_a_chain_computes_each_weight_once():
    net = EBM(EBMConfig(channels=4, multipliers=[1], blocks=1), (1, 4, 4))
    level, y = SCHEDULE.at(torch.tensor([2, 5])), torch.randn(2, 1, 4, 4)
    f = lambda y: net(y, level.noise_clean)  # noqa: E731
    options = {"steps": 3, "seed": torch.arange(2), "freeze": (net,)}
    plain = recovery_chain(f, y, y, level, **options).y
    calls = []
    original = net.stem.effective_weight
    net.stem.effective_weight = lambda: calls.append(net.stem.used is not None) or original()
    with fixed_weights(net):
        fixed = recovery_chain(f, y, y, level, **options).y
    assert torch.equal(plain, fixed) and calls[1:] == [True] * 3
    assert net.stem.used is None and net.stem.weight.requires_grad
