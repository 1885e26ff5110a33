import math

import numpy as np
import pytest
import torch

from genmodels.data.augment import (
    SYM6,
    Distortion,
    augment,
    distort,
    distortion_values,
    draw_distortion,
)


def distortion(count=1, **parts):
    zeros = {name: torch.zeros(count) for name in Distortion._fields}
    given = {name: torch.as_tensor(value).float().expand(count) for name, value in parts.items()}
    return Distortion(**{**zeros, **given})


def blob(x, y):
    """A smooth, lopsided picture on the plane; x to the right, y down, pixels from the centre."""
    return np.exp(-((x - 5) ** 2 / 18 + (y + 3) ** 2 / 30)) - 0.6 * np.exp(
        -((x + 6) ** 2 + y**2) / 9
    )


def picture(height, width, back=None):
    """The blob on a grid of pixels, read at the places `back` maps the pixels to."""
    y, x = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    if back is not None:
        x, y = np.tensordot(back[:2, :2], np.stack([x, y]), 1) + back[:2, 2].reshape(2, 1, 1)
    return torch.from_numpy(blob(x, y)).float()[None, None]


def forward_matrix(d, height, width):
    """The 3x3 matrix of a distortion, each factor as the module's table says."""

    def around(angle):  # counter-clockwise as seen, where y points down
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    d = Distortion(*[float(part) for part in d])
    factor = 2 ** (0.2 * d.stretch)
    steps = [
        np.diag([1 - 2 * d.mirror, 1 - 2 * d.flip, 1]),
        np.diag([2 ** (0.2 * d.scale)] * 2 + [1]),
        around(d.angle),
        around(d.direction) @ np.diag([factor, 1 / factor, 1]) @ around(-d.direction),
        np.array([[1, 0, d.right * width / 8], [0, 1, d.down * height / 8], [0, 0, 1]]),
    ]
    matrix = np.eye(3)
    for step in steps:  # the first of the table is applied first
        matrix = step @ matrix
    return matrix


@pytest.mark.parametrize(
    "parts",
    [
        dict(mirror=1),
        dict(flip=1),
        dict(scale=-2.0),
        dict(scale=1.5),
        dict(angle=0.7),
        dict(stretch=1.5),
        dict(stretch=-1.5, direction=1.0),
        dict(right=1.0),
        dict(down=-0.7),
        dict(mirror=1, scale=0.5, angle=2.5, stretch=0.8, direction=-0.5, right=0.3, down=0.4),
    ],
    ids=lambda parts: "-".join(parts),
)
@pytest.mark.parametrize("shape", [(48, 48), (40, 56)])
def test_distorted_pictures_are_the_plane_read_backwards(parts, shape):
    d = distortion(**parts)
    expected = picture(*shape, np.linalg.inv(forward_matrix(d, *shape)))
    got = distort(picture(*shape), d)
    inside = (..., slice(8, -8), slice(8, -8))  # the border shows reflections
    assert (got - expected)[inside].abs().max() < 0.012  # 0.024 without the filter's offset
    assert (picture(*shape) - expected)[inside].abs().max() > 0.1  # the distortion is visible


def test_mirrors_are_exact_copies():
    images = torch.rand(2, 3, 9, 12)
    assert torch.equal(distort(images, distortion(2, mirror=[1.0, 0.0]))[0], images[0].flip(-1))
    assert torch.equal(distort(images, distortion(2, flip=[0.0, 1.0]))[1], images[1].flip(-2))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_counter_clockwise(quarters):
    images = picture(32, 32)
    turned = distort(images, distortion(angle=quarters * math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (-2, -1)), atol=0.012, rtol=0)


def test_a_full_turn_and_a_shift_by_whole_pixels_keep_every_detail():
    """White noise holds the highest frequencies: the wavelet pair gives them back unharmed."""
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    inside = (..., slice(8, -8), slice(8, -8))
    # By 4 pixels to the right; a full turn that is not recognised as no turn.
    shifted = distort(noise, distortion(4, right=1.0))
    torch.testing.assert_close(
        shifted[inside], noise.roll(4, dims=-1)[inside], atol=1e-4, rtol=1e-4
    )
    turned = distort(noise, distortion(4, angle=2 * math.pi))
    torch.testing.assert_close(turned[inside], noise[inside], atol=1e-4, rtol=1e-4)


def test_beyond_the_border_lies_a_reflection():
    images = torch.linspace(0, 1, 32).expand(1, 1, 32, 32).contiguous()
    shifted = distort(images, distortion(right=1.0))[0, 0, 16]
    torch.testing.assert_close(shifted[6:28], images[0, 0, 16, 2:24], atol=2e-3, rtol=0)
    assert (shifted[:3] - images[0, 0, 16, :3].flip(0)).abs().max() < 0.05


def test_the_filter_is_the_wavelet():
    taps = np.array(SYM6)
    shifts = [(taps[2 * k :] * taps[: len(taps) - 2 * k]).sum() for k in range(6)]
    np.testing.assert_allclose(shifts, [1, 0, 0, 0, 0, 0], atol=1e-11)
    wavelet = taps[::-1] * (-1.0) ** np.arange(12)
    moments = [(wavelet * np.linspace(-1, 1, 12) ** m).sum() for m in range(6)]
    np.testing.assert_allclose(moments, 0, atol=1e-10)


def test_values_are_zero_exactly_for_undistorted_images():
    n = torch.arange(4000)
    d = draw_distortion(0.2, 7, n)
    assert distortion_values(d).shape == (4000, 9)
    images = picture(16, 16).expand(4000, -1, -1, -1)
    changed = (distort(images, d) - images).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(changed, distortion_values(d).abs().amax(1) > 0)
    assert 0.5 * 0.8**4 * 0.9 * 0.9 < 1 - changed.float().mean() < 0.5 * 0.8**4 * 0.9 * 1.1


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_rates_and_laws(p):
    n = torch.arange(200_000)
    d = draw_distortion(p, 3, n)
    rates = [float((part != 0).double().mean()) for part in d]
    expected = [0.5, p / 2, p, p, p, p / 2, p, p]
    np.testing.assert_allclose(rates, expected, atol=5 * 0.5 / math.sqrt(len(n)))
    for part in (d.scale, d.stretch, d.right, d.down):
        drawn = part[part != 0].double()
        assert abs(drawn.mean()) < 5 / math.sqrt(len(drawn))
        assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / len(drawn))
        assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / len(drawn))
    for part in (d.angle, d.direction):
        drawn = part[part != 0].double() / math.pi
        assert abs(drawn.mean()) < 3 / math.sqrt(len(drawn)) and drawn.abs().max() <= 1
        assert abs(drawn.var() - 1 / 3) < 2 / math.sqrt(len(drawn))
    both = (d.right != 0) & (d.scale != 0)  # drawn apart from each other
    assert abs(both.double().mean() - p * p) < 5 * p / math.sqrt(len(n))
    for one, other in ((d.right, d.scale), (d.right, d.down), (d.stretch, d.direction)):
        both = (one != 0) & (other != 0)
        correlation = np.corrcoef(one[both].double(), other[both].double())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(int(both.sum()))


def test_every_part_is_drawn_apart_from_every_other():
    """With p = 1 all are on; of two that shared a number, values or sizes would go together."""
    d = draw_distortion(1.0, 5, torch.arange(100_000))
    drawn = torch.stack(d).double()
    for parts in (drawn, drawn.abs()):
        correlation = torch.corrcoef(parts[2:]) - torch.eye(6, dtype=torch.float64)
        assert correlation.abs().max() < 5 / math.sqrt(drawn.shape[1])
    coins = torch.corrcoef(torch.cat([drawn[:2], drawn[2:].sign(), drawn[2:].abs()]))
    assert coins[:2, 2:].abs().max() < 5 / math.sqrt(drawn.shape[1])
    half = draw_distortion(0.5, 5, torch.arange(100_000))  # which of them are on
    on = torch.stack([half.scale, half.angle, half.stretch, half.right]) != 0
    correlation = torch.corrcoef(on.double()) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_an_image_is_distorted_by_its_place_in_the_stream_alone():
    images = torch.rand(6, 3, 8, 8)
    n = torch.tensor([5, 0, 2**40, 17, 3, 9])
    whole, told = augment(images, 0.7, 11, n)
    for k in (0, 2, 5):
        alone, value = augment(images[k : k + 1], 0.7, 11, n[k : k + 1])
        torch.testing.assert_close(alone[0], whole[k], atol=1e-6, rtol=1e-6)
        assert torch.equal(value[0], told[k])
    assert not torch.equal(augment(images, 0.7, 12, n)[1], told)


def test_autocast_does_not_round_the_places():
    """Mixed-precision training must augment as full precision does."""
    x = torch.linspace(-1, 1, 32).expand(8, 3, 32, 32).contiguous()
    n = torch.arange(8)
    plain, told = augment(x, 1.0, 3, n)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, told_mixed = augment(x, 1.0, 3, n)
    assert torch.equal(plain, mixed) and torch.equal(told, told_mixed)


def test_the_largest_uniform_makes_a_finite_image(monkeypatch):
    import genmodels.data.augment as module

    top = 1 - 2**-24
    monkeypatch.setattr(
        module, "philox_uniform", lambda shape, seed, n, **_: torch.full((len(n), *shape), top)
    )
    images, told = augment(torch.zeros(2, 1, 8, 8), 1.0, 0, torch.arange(2))
    assert images.isfinite().all() and told.isfinite().all()
