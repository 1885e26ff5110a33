"""How near a restored picture is to the clean one, and BM3D as the classical bar.

    PSNR = -10 log10 mean (x_hat - x)^2,  x_hat clipped to [0, 1] by the caller
    BM3D knows Gaussian noise of one level, so the others are first made nearly that:
        poisson   z = 2 sqrt(y / zeta + 3/8), standard deviation 1; back by the unbiased inverse
        gamma     z = log y, standard deviation sqrt(trigamma(k)); back by exp(z - psi(k) + log k)

Pictures are numpy, float64 (H, W, C) on [0, 1], C = 1 or 3; noisy ones are not clipped.

References: Wang et al. 2004 (SSIM: Gaussian window of 11 x 11, sigma 1.5); Makinen, Azzari and Foi
2020, IEEE TIP 29 (the package bm3d); Makitalo and Foi 2011, IEEE TIP 20 (closed form of the
unbiased inverse of Anscombe's transform).
"""

import math
from types import ModuleType

import numpy as np
import torch

from genmodels.noise.poisson_gaussian import anscombe_inverse

__all__ = ["BM3D_LAWS", "LEAST_SIDE", "bm3d", "load_bm3d", "psnr", "ssim"]

LEAST_SIDE = 11  # of SSIM's window
FLOOR = 1 / 1020  # a quarter of a grey level: the darkest pixel that a logarithm is taken of


def psnr(estimate: np.ndarray, clean: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, of peak 1; infinite for equal pictures."""
    error = float(np.mean((estimate - clean) ** 2))
    return -10 * math.log10(error) if error else math.inf


def ssim(estimate: np.ndarray, clean: np.ndarray) -> float:
    """Return the structural similarity, the mean over windows that lie in the picture.

    Raises:
        ValueError: a side shorter than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(clean.shape[:2]) < LEAST_SIDE:
        raise ValueError(f"image={clean.shape}: SSIM needs sides of {LEAST_SIDE} pixels or more")
    ours, truth = (torch.from_numpy(x.transpose(2, 0, 1).copy())[None] for x in (estimate, clean))
    _, full = structural_similarity_index_measure(
        ours, truth, sigma=1.5, data_range=1.0, return_full_image=True
    )
    edge = LEAST_SIDE // 2  # torchmetrics mirrors the picture there; the definition leaves it out
    return float(full[..., edge:-edge, edge:-edge].mean())


def load_bm3d() -> ModuleType:
    """Return the package bm3d.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import bm3d
    except ImportError:
        raise ValueError(
            "against=bm3d: the package is not here; pip install bm3d (its licence is for "
            "non-commercial use), or leave against out"
        ) from None
    return bm3d


def bm3d(noisy: np.ndarray, law: str, level: float) -> np.ndarray:
    """Return BM3D's estimate, clipped to [0, 1], of a noisy picture (H, W, C).

    Args:
        noisy: not clipped.
        law: a key of BM3D_LAWS.
        level: the true one, in the law's unit.

    Raises:
        ValueError: an unknown law, or the package is not installed.
    """
    if law not in BM3D_LAWS:
        raise ValueError(f"against=bm3d: knows {', '.join(BM3D_LAWS)}, not {law}; leave it out")
    return BM3D_LAWS[law](noisy, level).clip(0, 1)


def _gaussian(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Return the estimate under Gaussian noise of standard deviation sigma on the 0..255 scale."""
    package = load_bm3d()
    if noisy.shape[-1] == 3:
        return package.bm3d_rgb(noisy, sigma / 255)
    return package.bm3d(noisy[..., 0], sigma / 255).reshape(noisy.shape)


def _scaled(z: np.ndarray, std: float) -> np.ndarray:
    """Return the estimate of z, of any range, under Gaussian noise of `std` in its unit.

    BM3D's thresholds are made for pictures on [0, 1].
    """
    low, high = float(z.min()), float(z.max())
    span = high - low or 1.0
    return _gaussian((z - low) / span, 255 * std / span) * span + low


def _poisson(noisy: np.ndarray, zeta: float) -> np.ndarray:
    z = 2 * np.sqrt(np.maximum(noisy / zeta, 0) + 3 / 8)
    return zeta * anscombe_inverse(torch.from_numpy(_scaled(z, 1.0))).numpy()


def _gamma(noisy: np.ndarray, k: float) -> np.ndarray:
    shape = torch.tensor(float(k), dtype=torch.float64)
    z = _scaled(np.log(np.maximum(noisy, FLOOR)), float(torch.polygamma(1, shape).sqrt()))
    return np.exp(z - float(torch.digamma(shape) - shape.log()))


BM3D_LAWS = {"gaussian": _gaussian, "poisson": _poisson, "gamma": _gamma}
