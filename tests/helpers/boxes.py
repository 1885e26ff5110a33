"""A stand-in for a denoiser of pictures of any size: an exact box filter."""

import torch
from torch.nn import functional

from genmodels.config import Config, check
from genmodels.noise import LAWS


class Box:
    """The mean over a square of side 2 radius + 1, edges repeated, moved right by `shift`.

    It records what it was given. Its Gaussian level is the standard deviation of all pixels, its
    Poisson level 0.05; it knows levels up to `most`.
    """

    ANY_SIZE, most, ESTIMATORS = True, float("inf"), ("law",)
    classes = 0
    device = torch.device("cpu")
    cfg = Config()

    def __init__(self, radius=1, channels=1, shift=0, laws=("gaussian", "poisson")):
        self.radius, self.shape, self.shift = radius, (channels, 8, 8), shift
        self.DENOISE_LAWS = {law: LAWS[law].unit for law in laws}
        self.seen, self.told, self.laws, self.asked, self.autocast = [], [], [], [], []

    def noisy_state(self, x):
        assert x.shape[1] == self.shape[0] and torch.isfinite(x).all()
        return x

    def check_level(self, level, law=""):
        check(level <= self.most, "level", f"{level:.4g}", f"this model knows up to {self.most}")

    def nearest_level(self, level, law=""):
        return min(level, self.most)

    def treatment(self, law, level):
        return ""

    def restore(self, x, law, level=None, labels=None, clip=True):
        LAWS[law or "gaussian"].check(level)
        assert x.dtype == torch.float32 and x.shape[1] == self.shape[0]
        self.seen.append(x)
        self.told.append(level)
        self.laws.append(law)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        r, (height, width) = self.radius, x.shape[-2:]
        wide = functional.pad(x, (r, r, r, r), mode="replicate")
        total = sum(
            wide[..., i : i + height, j : j + width]
            for i in range(2 * r + 1)
            for j in range(2 * r + 1)
        )
        mean = (total / (2 * r + 1) ** 2).roll(self.shift, -1)
        return mean.clamp(-1, 1) if clip else mean, torch.full((len(x),), float(level))

    def noise_level(self, image, law):
        assert image.shape[0] == self.shape[0]
        self.asked.append(tuple(image.shape))
        if law == "poisson":
            return 0.05
        return max(0.1, float(image.double().std(correction=0) * 127.5))
