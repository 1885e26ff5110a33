"""Feature extractors: uint8 images (N,C,H,W) in, rows (N,D) out, named and hashed.

A score is only comparable with another one when net, weights and preprocessing agree, so the three
travel together: `Features` carries its name, the sha256 of its weights and the name of its resize.
"""

import difflib
import hashlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

__all__ = ["DIGITS_SHA256", "FEATURES", "DigitsNet", "Features", "check_rows", "extract"]
__all__ += ["load_features"]

DIGITS_WEIGHTS = Path(__file__).parent / "digits_net.safetensors"
# Written by `python -m benchmarks.digits_net`; the header of the file says from what and how.
DIGITS_SHA256 = "39f3321754d1fdbef4e0fb33edb84bb57a26261639d994c82790004268d3f9db"


@dataclass(frozen=True)
class Features:
    """A feature extractor: calling it with uint8 (B,C,H,W) returns float32 (B,D) rows.

    Args:
        name: what a report calls it.
        sha256: of the weights file; None where there are no weights.
        resize: name of the preprocessing; "none" = images are taken as they are.
        dim: D; None where it depends on the images.
        net: the callable behind it, uint8 (B,C,H,W) -> (B,D,...).
        shape: the only (C,H,W) it takes; None = any.
        device: where it computes.
    """

    name: str
    sha256: str | None
    resize: str
    dim: int | None
    net: Callable
    shape: tuple[int, int, int] | None = None
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, images):
        """Return (B,D) float32 rows on `device`.

        Raises:
            ValueError: images that are not uint8 (B,C,H,W) or not of the size the net was made for;
                a net that does not give one row per image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 of shape (B,C,H,W), got {images.dtype} of shape "
                f"{tuple(images.shape)}: convert to 0..255 first"
            )
        if self.shape is not None and tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"features={self.name} takes images of shape (C,H,W) = {self.shape}, got "
                f"{tuple(images.shape[1:])}: choose other features, for example features=pixels"
            )
        with _exact(self.device):
            rows = self.net(images.to(self.device))
        if not isinstance(rows, torch.Tensor) or rows.ndim < 2 or len(rows) != len(images):
            got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(
                f"features={self.name} must return one row per image, (B,D), got {got} for "
                f"{len(images)} images: wrap the net so that it returns its features only"
            )
        return rows.flatten(1).float()


class DigitsNet(nn.Module):
    """A classifier of 8x8 grey digits; calling it returns the 32 values before the last layer.

    Trained by `python -m benchmarks.digits_net` on scikit-learn's digits. `scale` makes the average
    variance of a feature over the training digits one, so that distances have a unit.
    Computes in float64 (load_features sees to it): the float32 rows it yields then agree between
    machines, thread counts and batch sizes up to the last bit.
    """

    def __init__(self, width=32, dim=32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * width, dim),
        )
        self.head = nn.Linear(dim, 10)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images):
        """Return (B,32) features of uint8 images (B,1,8,8)."""
        x = images.to(self.scale.dtype) / 127.5 - 1
        return self.body(x) / self.scale

    def logits(self, features):
        """Return (B,10) class scores of features (B,32)."""
        return self.head(F.silu(features * self.scale))


def _pixels(weights, device):
    """Return the pixels themselves as features: values in [0,1], flattened in (C,H,W) order."""
    if weights is not None:
        raise ValueError(f"features=pixels has no weights, got weights={weights}: leave it out")
    return Features(
        "pixels", None, "none", None, lambda x: x.flatten(1).float() / 255, None, device
    )


def _digits(weights, device):
    """Return the in-tree digits net, from the shipped file or a copy of it."""
    data = _read(weights or DIGITS_WEIGHTS)
    found = hashlib.sha256(data).hexdigest()
    if found != DIGITS_SHA256:
        raise ValueError(
            f"weights={weights or DIGITS_WEIGHTS} has sha256 {found}, features=digits needs "
            f"{DIGITS_SHA256}: restore digits_net.safetensors from the release, scores of other "
            "weights are not comparable"
        )
    net = DigitsNet()
    net.load_state_dict(load(data))
    net = net.double().eval().requires_grad_(False).to(device)
    return Features("digits", found, "none", 32, net, (1, 8, 8), device)


def _file(path, device):
    """Return the TorchScript net in a file; its resize, if any, is inside the file."""
    sha256 = hashlib.sha256(_read(path)).hexdigest()
    try:
        with warnings.catch_warnings():
            # Deprecated in torch in favour of torch.export, but what published nets come as.
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"features={path} is not a TorchScript file: save the net with torch.jit.save "
            f"({str(error).splitlines()[0][:100]})"
        ) from None
    return Features(Path(path).stem, sha256, "in-file", None, net, None, device)


FEATURES = {"digits": _digits, "pixels": _pixels}


def load_features(name, weights=None, device="cpu"):
    """Return the feature extractor called `name`.

    Args:
        name: a key of FEATURES, or the path of a TorchScript file that maps uint8 (B,C,H,W) to
            (B,D). "pixels" = values in [0,1], flattened; "digits" = the in-tree net on 8x8 grey.
        weights: a file to read the weights from in place of the shipped one; its hash must agree.
        device: where to compute.

    Raises:
        ValueError: unknown name, a missing file, not TorchScript, or weights with another sha256.
    """
    device = torch.device(device)
    if str(name) in FEATURES:
        return FEATURES[str(name)](weights, device)
    if Path(name).is_file():
        if weights is not None:
            raise ValueError(f"features={name} holds its weights: leave out weights={weights}")
        return _file(name, device)
    near = difflib.get_close_matches(str(name), FEATURES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"features must be one of {', '.join(FEATURES)} or an existing TorchScript file, "
        f"got {str(name)!r}{hint}"
    )


def extract(features, images, batch=256):
    """Return (N,D) float32 rows of uint8 images (N,C,H,W), on the CPU.

    Every call of the net sees exactly `batch` images, the last one padded with black ones: the
    library then picks the same algorithm throughout, and a row does not depend on what else, or how
    much else, was scored with it.

    Raises:
        ValueError: no images, batch < 1, or what `features` refuses.
    """
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got 0")
    rows = []
    for part in images.split(batch):
        padded = F.pad(part, (0,) * (2 * part.ndim - 1) + (batch - len(part),))
        rows.append(features(padded)[: len(part)].cpu())
    return torch.cat(rows)


def check_rows(rows, name="features"):
    """Return rows as a float64 (N,D) tensor.

    Raises:
        ValueError: not two-dimensional, no column, or a NaN or infinite value among them.
    """
    rows = torch.as_tensor(rows).detach()
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N,D) with D >= 1, got {tuple(rows.shape)}")
    rows = rows.double()
    bad = int((~rows.isfinite()).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values in {bad} of {len(rows)} rows: "
            "look at the images (or the feature net) that gave them"
        )
    return rows


@contextmanager
def _exact(device):
    """Compute in the net's own precision whatever the caller has set: no autocast, no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _read(path):
    """Return the bytes of a file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"weights={path} cannot be read: {error.strerror}") from None
