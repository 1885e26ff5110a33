"""Noise schedules: the decreasing sigmas a sampler walks through, ending in 0.

Which sigmas are visited (the functions below that return steps + 1 numbers) is one choice; how
time runs along them, sigma(t) and the scaling s(t), another: `Schedule`.

Reference: Karras et al. 2022, arXiv 2206.00364, table 1 and appendix C.
"""

import math

import torch
from torch import Tensor

from genmodels.networks.precond import iddpm_levels

__all__ = [
    "SIGMAS",
    "TIME_SCHEDULES",
    "Schedule",
    "VESchedule",
    "VPSchedule",
    "iddpm_sigmas",
    "karras_sigmas",
    "state_dtype",
    "ve_sigmas",
    "vp_sigmas",
]

Device = torch.device | str | None


def karras_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: Device = None,
) -> Tensor:
    """Return sigma_0 = sigma_max > ... > sigma_{steps-1} = sigma_min > 0, float64 (steps + 1,).

    sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Args:
        steps: number of steps, >= 1 (one step goes from sigma_max straight to 0).
        sigma_min, sigma_max: noise levels on the [-1, 1] scale, 0 < sigma_min < sigma_max.
        rho: > 0; larger puts more steps at small noise.
        device: where the result lies; float32 there if the device has no float64.

    Raises:
        ValueError: a value out of range.

    Reference: Karras et al. 2022, arXiv 2206.00364, equation 5.
    """
    ramp = _ramp(steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min}: must be in (0, sigma_max={sigma_max})")
    if rho <= 0:
        raise ValueError(f"rho={rho}: must be > 0")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0] = sigma_max  # exactly, whatever the rounding of the powers
    return _ended(sigmas, device)


def vp_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float | None = None,
    device: Device = None,
) -> Tensor:
    """Return sigma(t_i) of the VP schedule at t_i = 1 + i / (steps - 1) (0.001 - 1), then 0.

    The schedule is the one with sigma(0.001) = sigma_min and sigma(1) = sigma_max. Arguments as
    for karras_sigmas, without rho.
    """
    t = 1 + _ramp(steps) * (0.001 - 1)
    return _ended(VPSchedule(sigma_min, sigma_max).sigma(t), device)


def ve_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float | None = None,
    device: Device = None,
) -> Tensor:
    """Return a geometric sequence from sigma_max to sigma_min, then 0. Arguments as above."""
    return _ended(sigma_max * (sigma_min / sigma_max) ** _ramp(steps), device)


def iddpm_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float | None = None,
    device: Device = None,
) -> Tensor:
    """Return levels of improved DDPM between sigma_min and sigma_max, evenly by index, then 0.

    Arguments as above.

    Raises:
        ValueError: more steps than levels.
    """
    levels = [level for level in iddpm_levels() if sigma_min <= level <= sigma_max]
    if steps > len(levels):
        raise ValueError(f"steps={steps}: iddpm has {len(levels)} levels in this range")
    index = (_ramp(steps) * (len(levels) - 1)).round().long()
    return _ended(torch.tensor(levels, dtype=torch.float64)[index], device)


SIGMAS = {"edm": karras_sigmas, "vp": vp_sigmas, "ve": ve_sigmas, "iddpm": iddpm_sigmas}


class Schedule:
    """Time itself: sigma(t) = t, s(t) = 1, EDM's choice; `linear`.

    The state at time t is s(t) times a sample at noise level sigma(t). Every function takes and
    returns tensors.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t."""
        return t

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time at which the noise level is sigma."""
        return sigma

    def slope(self, t: Tensor) -> Tensor:
        """Return d sigma / d t."""
        return torch.ones_like(t)


class VESchedule(Schedule):
    """sigma(t) = sqrt(t): the variance-exploding diffusion of Song et al. 2021."""

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t."""
        return t.sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time at which the noise level is sigma."""
        return sigma**2

    def slope(self, t: Tensor) -> Tensor:
        """Return d sigma / d t."""
        return 1 / (2 * t.sqrt())


class VPSchedule(Schedule):
    """sigma(t)^2 = exp(b t^2 / 2 + a t) - 1 with sigma(0.001) = sigma_min, sigma(1) = sigma_max."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        # Two linear equations in a and b: the exponents at t = 0.001 and t = 1.
        early, late = math.log1p(sigma_min**2) / 0.001, math.log1p(sigma_max**2)
        self.b = 2 * (late - early) / (1 - 0.001)
        self.a = late - self.b / 2
        if self.a + self.b < 0:
            raise ValueError(
                f"sigma_min={sigma_min}: too large for the vp schedule, which would fall"
            )

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t."""
        return (self.b * t**2 / 2 + self.a * t).expm1().sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time at which the noise level is sigma."""
        return ((self.a**2 + 2 * self.b * (sigma**2).log1p()).sqrt() - self.a) / self.b

    def slope(self, t: Tensor) -> Tensor:
        """Return d sigma / d t."""
        sigma = self.sigma(t)
        return (self.a + self.b * t) * (sigma + 1 / sigma) / 2


TIME_SCHEDULES = {"linear": Schedule, "ve": VESchedule, "vp": VPSchedule}


def _ramp(steps: int) -> Tensor:
    """Return i / (steps - 1), float64 (steps,)."""
    if steps < 1:
        raise ValueError(f"steps={steps}: must be >= 1")
    return torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)


def _ended(sigmas: Tensor, device: Device) -> Tensor:
    """Return the sigmas and a 0 after them, on the device."""
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, dtype=state_dtype(device))


def state_dtype(device: Device) -> torch.dtype:
    """Return the dtype of a sampler's state: float64 where the device has it."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
