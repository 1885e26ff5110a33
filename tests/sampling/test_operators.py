"""Operators against dense matrices: the adjoint, Penrose's four equations, the ridge inverse."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from genmodels.sampling.operators import (
    CUTOFF,
    LUMA,
    Blur,
    Foreign,
    Mask,
    Resize,
    Slanted,
    as_operator,
    named_operator,
)

SHAPE = (3, 8, 4)  # not square
SHARP = torch.tensor([[0.0, 0.1, 0.05], [0.2, 0.5, 0.1], [0.0, 0.05, 0.0]])  # no symmetry
WORDS = (
    *("inpaint", "inpaint:left", "inpaint:top", "inpaint:bottom", "inpaint:centre", "inpaint:0.6"),
    *("downsample", "downsample:2", "bicubic:4", "bicubic:2", "blur:0.6", "blur", "grey"),
)


def operators():
    found = {word: named_operator(word, SHAPE) for word in WORDS}
    slope = 0.5 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)).double()
    found["mask"] = named_operator("mask:x", SHAPE, torch.arange(96).reshape(SHAPE) % 3 > 0)
    found["kernel"] = Blur(SHARP, 8, 4)
    found["foreign"] = Foreign(found["kernel"], found["kernel"].adjoint)
    found["slanted"] = Slanted(found["downsample:2"], slope)
    return found


OPERATORS = operators()


def dense(operator, adjoint=False):
    """The matrix of A, or of A^T, column by column, float64."""
    shape = operator(torch.zeros(1, *SHAPE, dtype=torch.float64)).shape[1:] if adjoint else SHAPE
    unit = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    return (operator.adjoint(unit) if adjoint else operator(unit)).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_one(name):
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(0)
    x = torch.randn(5, *SHAPE, generator=generator, dtype=torch.float64)
    y = torch.randn(operator(x).shape, generator=generator, dtype=torch.float64)
    there, back = (operator(x) * y).sum(), (x * operator.adjoint(y)).sum()
    assert abs(float(there - back)) < 1e-6 * float(operator(x).norm() * y.norm())
    assert abs(float(there / back) - 1) < 1e-6
    torch.testing.assert_close(dense(operator, adjoint=True), dense(operator).T)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_pseudo_inverse_solves_penroses_equations(name):
    """Where no singular value falls to the cut-off; else it is numpy's with that cut-off."""
    operator = OPERATORS[name]
    a = dense(operator)
    unit = torch.eye(len(a), dtype=torch.float64)
    measured = operator(torch.zeros(1, *SHAPE, dtype=torch.float64)).shape[1:]
    p = operator.pull(unit.reshape(-1, *measured), 0.0).flatten(1).T
    np.testing.assert_allclose(p, np.linalg.pinv(a.numpy(), rcond=CUTOFF), atol=1e-9)
    singular = torch.linalg.svdvals(a)
    singular = singular[singular > 1e-12]
    if name == "blur":
        assert singular.min() < CUTOFF * singular.max()
        return
    for made, whole in ((a @ p @ a, a), (p @ a @ p, p), ((a @ p).T, a @ p), ((p @ a).T, p @ a)):
        torch.testing.assert_close(made, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_pull_is_the_mean_of_a_gaussian_posterior(name):
    """m + pull(y - A m, s^2 / r^2) minimises |y - A x|^2 / s^2 + |x - m|^2 / r^2."""
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(1)
    a, s, r = dense(operator), 0.3, 0.7
    m = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    y = torch.randn(operator(m).shape, generator=generator, dtype=torch.float64)
    precision = a.T @ a / s**2 + torch.eye(a.shape[1]) / r**2
    expected = torch.linalg.solve(
        precision, (y.flatten(1) @ a / s**2 + m.flatten(1) / r**2).T
    ).T.reshape(m.shape)
    torch.testing.assert_close(m + operator.pull(y - operator(m), s**2 / r**2), expected)


def test_what_each_does_to_a_picture():
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(OPERATORS["downsample:2"](x), functional.avg_pool2d(x, 2))
    small = functional.interpolate(x, (4, 2), mode="bicubic", antialias=True)
    torch.testing.assert_close(OPERATORS["bicubic:2"](x), small)
    torch.testing.assert_close(
        OPERATORS["grey"](x)[:, 0], torch.einsum("bchw,c->bhw", x, torch.tensor(LUMA))
    )
    wide = functional.pad(x, (1, 1, 1, 1), mode="circular")
    turned = SHARP.flip(0, 1).expand(3, 1, 3, 3)  # conv2d correlates
    torch.testing.assert_close(OPERATORS["kernel"](x), functional.conv2d(wide, turned, groups=3))
    blurred = named_operator("blur:1.2", (1, 33, 40))(_point(33, 40))
    rows = torch.arange(33) - 16.0
    spread = float((blurred.sum(3).flatten() * rows**2).sum())
    assert abs(float(blurred.sum()) - 1) < 1e-5 and abs(spread - 1.44) < 0.01
    for word, kept in (("right", (..., slice(2))), ("top", (..., slice(4, None), slice(None)))):
        y = named_operator(f"inpaint:{word}", SHAPE)(x)
        assert torch.equal(y[kept], x[kept]) and float(y.abs().sum()) == float(x[kept].abs().sum())
    share = named_operator("inpaint:0.3", (1, 50, 60)).known.float().mean()
    assert abs(float(share) - 0.7) < 0.03


def _point(height, width):
    x = torch.zeros(1, 1, height, width)
    x[..., height // 2, width // 2] = 1
    return x


class Plain:
    def __init__(self, matrix, shift=0.0, back=None):
        self.matrix, self.shift, self.back = matrix, shift, matrix if back is None else back

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T.to(x) + self.shift

    def adjoint(self, y):
        return (y @ self.back.to(y)).reshape(-1, *SHAPE)


def test_anybodys_operator_is_taken_and_a_wrong_one_refused_in_one_line():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(7, 96, generator=generator, dtype=torch.float64)
    operator = as_operator(Plain(a), SHAPE)
    v = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    expected = (v @ torch.linalg.pinv(a).T).reshape(3, *SHAPE)
    torch.testing.assert_close(operator.pull(v, 0.0), expected)
    refused = [
        (torch.nn.Identity(), "operator=Identity: needs __call__ and adjoint, or A and A_adjoint"),
        (Plain(a, shift=1.0), "operator=Plain: is not linear: A 0 must be 0"),
        (Plain(a, back=2 * a), "operator=Plain: its adjoint is none: <A x, A x> = "),
    ]
    for wrong, line in refused:
        with pytest.raises(ValueError, match=line.replace(".", r"\.")) as error:
            as_operator(wrong, SHAPE)
        assert "\n" not in str(error.value)
    assert as_operator(OPERATORS["grey"], SHAPE) is OPERATORS["grey"]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (Mask(torch.ones(1, 4, 4) > 0), "operator=Mask: does not measure pictures (3, 8, 4) ("),
        (Resize(4, 4, 2), "operator=Resize: does not measure pictures (3, 8, 4) ("),
        (Blur(SHARP, 4, 4), "operator=Blur: does not measure pictures (3, 8, 4) ("),
        (Blur(SHARP, 8, 5), "operator=Blur: its adjoint makes (3, 8, 5) of (3, 8, 4)"),
    ],
)
def test_an_operator_of_another_size_is_one_line(wrong, line):
    with pytest.raises(ValueError) as error:
        as_operator(wrong, SHAPE)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "shape", "line"),
    [
        ("zoom", SHAPE, "operator=zoom: choose from inpaint, downsample"),
        ("", SHAPE, "operator=: choose from"),
        ("downsample:3", SHAPE, "operator=downsample:3: 3 must divide the sides 8 x 4"),
        ("downsample:2.5", SHAPE, "operator=downsample:2.5: must be a whole number"),
        ("bicubic:0", SHAPE, "operator=bicubic:0: 0 must divide"),
        ("blur:-1", SHAPE, "operator=blur:-1: blur in pixels, > 0"),
        ("blur:wide", SHAPE, "operator=blur:wide: 'wide' is no number"),
        ("blur:nan", SHAPE, "operator=blur:nan: 'nan' is no number"),
        ("grey", (1, 8, 8), "operator=grey: is for colour; the model has 1 channels"),
        ("grey:1", SHAPE, "operator=grey:1: takes no value"),
        ("inpaint:half", SHAPE, "operator=inpaint:half: hides one of right, left"),
        ("inpaint:1", SHAPE, "operator=inpaint:1: hides one of"),
        ("mask", SHAPE, "operator=mask: name the file: mask:FILE"),
    ],
)
def test_a_wrong_word_is_one_line(word, shape, line):
    with pytest.raises(ValueError) as error:
        named_operator(word, shape)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_known_pixels_pass_unchanged_bit_for_bit():
    x = torch.randn(2, *SHAPE)
    known = torch.rand(SHAPE) > 0.5
    assert torch.equal(Mask(known)(x)[:, known], x[:, known])
    with pytest.raises(ValueError, match="kernel=2 x 3: must have odd sides"):
        Blur(torch.ones(2, 3), 8, 4)
    with pytest.raises(ValueError, match="known=torch.float32: must be bool"):
        Mask(torch.ones(SHAPE))
    with pytest.raises(ValueError, match="known=none: all pixels are hidden"):
        Mask(torch.zeros(SHAPE) > 0)
    with pytest.raises(ValueError, match="operator=mask:black.png: hides all pixels"):
        named_operator("mask:black.png", SHAPE, torch.zeros(SHAPE) > 0)
    assert Resize(8, 4, 1)(x).equal(x)
