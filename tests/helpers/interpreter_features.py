"""Checks of the kernels of evaluation under Triton's interpreter, see interpreter_steps.py."""

import torch

from genmodels.kernels import pairwise, resize_normalize
from tests.helpers.interpreter_steps import GENERATOR, both, close, draw


def check_pairwise():
    for n, m, d, dtype in (
        (37, 53, 19, torch.float32),
        (70, 100, 130, torch.float32),
        (40, 20, 33, torch.float16),  # the interpreter's bfloat16 product is wrong: cast up
        (40, 20, 33, torch.bfloat16),
    ):
        x, y = draw(n, d, dtype=dtype) + 1, draw(m, d, dtype=dtype) + 1
        close(*both(pairwise.polynomial_sums, x, y), rtol=1e-6)
        close(*both(pairwise.polynomial_sums, x, degree=2, gamma=0.1, coef=0.5), rtol=1e-6)
        for function, options in (
            (pairwise.polynomial_sums, {}),
            (pairwise.rbf_sums, {"bandwidth": d**0.5}),
        ):
            for a, b in zip(*both(function, x, y, columns=True, **options)):
                close(a, b, rtol=1e-6)
        close(*both(pairwise.rbf_sums, x, y, bandwidth=d**0.5), rtol=1e-6)
        close(*both(pairwise.rbf_sums, x, bandwidth=d**0.5), rtol=1e-6)
        close(*both(pairwise.knn_radius, x, y, k=5), rtol=1e-5)
        close(*both(pairwise.knn_radius, x, k=3), rtol=1e-5)
        assert torch.equal(*both(pairwise.ball_count, x, y, draw(m).abs() * d**0.5))
        assert torch.equal(*both(pairwise.ball_count, x, y, draw(n).abs() * d**0.5, owner="x"))


def check_pairwise_tiles():
    """Splits, several tiles, tiles cut by each edge and by the diagonal: only rounding differs."""
    tile = (16, 32, 16, 1)
    for n, m in ((40, 90), (32, 64), (17, 33), (48, 31), (1, 1), (65, 16)):
        x, y = draw(n, 24), draw(m, 24)
        numbers = {
            "kind": "polynomial",
            "scale": 1 / 24,
            "bias": 1.0,
            "degree": 3,
            "centre": None,
            "x2": None,
            "y2": None,
        }
        for within in (False, True):
            other = x if within else y
            arguments = {**numbers, "columns": True, "within": within}
            plain = pairwise._reference_sums(x, other, **{**arguments, "centre": torch.zeros(())})
            for options in (
                {},
                {"tile": tile, "splits": 1},
                {"tile": tile, "splits": 3},
                {"tile": tile, "chunk": 1},
                {"tile": (32, 16, 16, 1), "chunk": 2, "splits": 2},
            ):
                for a, b in zip(plain, pairwise._kernel_sums(x, other, **arguments, **options)):
                    close(a, b, rtol=1e-6)
        centre = y.mean(0)
        x2, y2 = pairwise._squares(x, centre), pairwise._squares(y, centre)
        arguments = {
            "kind": "nearest",
            "within": False,
            "k": min(3, m),
            "centre": centre,
            "x2": x2,
            "y2": y2,
            "radius": None,
            "owner": "y",
        }
        whole = pairwise._reference(x, y, **arguments)
        for splits in (1, 3):
            close(whole, pairwise._kernel(x, y, **arguments, tile=tile, splits=splits), rtol=1e-5)


def check_pairwise_keeps_nan():
    """A diverged model's features must not become neighbours of everything."""
    for which in range(2):
        sets = [draw(20, 8), draw(30, 8)]
        sets[which][3, 2] = float("nan")
        x, y = sets
        for a, b in zip(*both(pairwise.rbf_sums, x, y, bandwidth=3.0, columns=True)):
            assert b.isnan().any()
            close(a, b, rtol=1e-6)
        for arguments in ((x, y), (y,)):
            assert torch.allclose(*both(pairwise.knn_radius, *arguments, k=3), rtol=1e-5)
        clean = torch.cat([sets[1][:3], sets[1][4:]]) if which else sets[1]  # without the NaN row
        rows = torch.arange(20) != 3 if not which else torch.arange(20) >= 0
        for radii in both(pairwise.knn_radius, x, y, k=3):
            expected = torch.cdist(x[rows].double(), clean.double()).topk(3, largest=False).values
            assert torch.allclose(radii[rows].double(), expected[:, 2], atol=1e-3)
        a, b = both(pairwise.ball_count, x, y, torch.full((30,), 3.0))
        assert torch.equal(a, b)
        if which == 0:
            assert b[3] == 0
        else:
            assert torch.equal(b, pairwise.ball_count(x, clean, torch.full((29,), 3.0)))


def check_balls_compare_squares():
    """Radii that are distances of these very pairs: each ball holds its own k neighbours."""
    x = draw(60, 8)

    def count():
        return pairwise.ball_count(x, x, pairwise.knn_radius(x, k=3), owner="x")

    for counts in both(count):
        assert torch.equal(counts, torch.full((60,), 4))  # itself and three others


def check_resize_normalize():
    for source, target in (((16, 16), (37, 41)), ((33, 47), (15, 16)), ((3, 1), (5, 4))):
        for channels in (1, 3) if source == (3, 1) else (3,):
            pixels = torch.randint(
                0, 256, (2, channels, *source), generator=GENERATOR, dtype=torch.uint8
            )
            strided = pixels.permute(0, 2, 3, 1).contiguous()
            for mode, quantize in (
                ("tf1", False),
                ("bilinear", False),
                ("bicubic", False),
                ("bicubic", True),
            ):
                options = {"mode": mode, "quantize": quantize, "mean": 0, "std": 1}
                a, b = both(resize_normalize.resize_normalize, pixels, target, **options)
                close(a, b, atol=0 if quantize else 1e-3)
                assert b.is_contiguous(memory_format=torch.channels_last)
                options["layout"] = "nhwc"
                assert torch.equal(b, resize_normalize.resize_normalize(strided, target, **options))
    half = both(resize_normalize.resize_normalize, pixels, target, dtype=torch.float16, std=99.0)
    close(*half, atol=2**-9)
