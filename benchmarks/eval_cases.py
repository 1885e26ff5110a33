"""The kernels of evaluation: input of the feature network, KID, precision."""

import torch

from genmodels.kernels.mmd import mmd
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums
from genmodels.kernels.resize_normalize import resize_normalize

from .case import Case, compiled_form, error_of, state

__all__ = ["kid", "manifold", "resize"]


def resize(images, source, target, device):
    pixels = torch.randint(0, 256, (images, source, source, 3), dtype=torch.uint8).to(device)

    def eager(pixels):
        planes = pixels.permute(0, 3, 1, 2).float()
        planes = torch.nn.functional.interpolate(planes, target, mode="bilinear")
        return (planes / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def ours():
        return resize_normalize(pixels, target, mode="bilinear", layout="nhwc")

    compiled = compiled_form(eager, device)
    variants = {"ours": ours, "eager": lambda: eager(pixels), "compile": lambda: compiled(pixels)}
    traffic = images * (target[0] * target[1] * 12 + source * source * 3)
    size = f"{images} x {source}^2 -> {target[0]}^2"

    def error():
        planes = pixels[:4].permute(0, 3, 1, 2).double()
        exact = torch.nn.functional.interpolate(planes, target, mode="bilinear") / 127.5 - 1
        return error_of(ours()[:4], exact)

    return Case("resize_normalize", size, "uint8", variants, traffic, 0, error, 1e-5)


def kid(count, width, device):
    x, y = state((count, width), device), state((count, width), device, seed=1) * 1.01

    def ours(x=x, y=y):
        between = polynomial_sums(x, y, columns=True)
        return mmd(polynomial_sums(x), polynomial_sums(y), *between)

    def full(x=x, y=y):
        n = len(x)
        xx, yy, xy = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        off = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
        return off - 2 * xy.mean()

    def error():  # of the sums: the difference of their means is near zero here
        a, b = x[:2000], y[:2000]
        exact = (a.double() @ b.double().T / width + 1) ** 3
        rows, columns = polynomial_sums(a, b, columns=True)
        own = (a.double() @ a.double().T / width + 1) ** 3
        own = error_of(polynomial_sums(a), own.fill_diagonal_(0).sum(1))
        return max(error_of(rows, exact.sum(1)), error_of(columns, exact.sum(0)), own)

    variants = {"ours (with error bar)": ours, "eager": full}
    # Two triangles and one square of products; the eager form computes three squares.
    return Case(
        "KID, all pairs",
        f"{count} x {width}",
        "float32",
        variants,
        0,
        4.0 * count**2 * width,
        error,
        1e-6,
        graph=False,
    )


def manifold(count, width, device):
    x, y = state((count, width), device), state((count, width), device, seed=1)

    def ours(x=x, y=y):
        radius = knn_radius(x, k=3)
        return radius, (ball_count(y, x, radius) > 0).float().mean()

    def full(x=x, y=y):
        radius = torch.cdist(x, x).kthvalue(4, dim=1).values
        return radius, (torch.cdist(y, x) <= radius).any(1).float().mean()

    def error():
        part = x[:1000], y[:1000]
        return error_of(ours(*part)[0], full(*(p.double() for p in part))[0])

    variants = {"ours": ours, "eager": full}
    return Case(
        "precision (k = 3)",
        f"{count} x {width}",
        "float32",
        variants,
        0,
        4.0 * count**2 * width,
        error,
        1e-4,
        graph=False,
    )
