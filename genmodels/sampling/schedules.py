"""Noise schedules: the decreasing sigmas a sampler walks through, ending in 0."""

import torch


def karras_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0, device=None):
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
    if steps < 1:
        raise ValueError(f"steps={steps}: must be >= 1")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min}: must be in (0, sigma_max={sigma_max})")
    if rho <= 0:
        raise ValueError(f"rho={rho}: must be > 0")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0] = sigma_max  # exactly, whatever the rounding of the powers
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, dtype=state_dtype(device))


def state_dtype(device):
    """Return the dtype of a sampler's state: float64 where the device has it."""
    return torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
