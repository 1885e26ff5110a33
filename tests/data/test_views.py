import pytest
import torch
from torchvision.transforms import functional

from genmodels.data import views

KINDS = [
    {"affine": 1.0},
    {"crop": 2},
    {"flip": True},
    {"jitter": 1.0},
    {"grey": 0.5},
    {"noise": 0.1},
]


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(40, 3, 12, 10, generator=generator) - 1, torch.arange(40)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind)))
def test_a_view_depends_on_its_image_and_number_alone(pictures, kind):
    x, n = pictures
    view = views.view(x, 7, n, **kind)
    assert torch.equal(views.view(x[5:9], 7, n[5:9], **kind), view[5:9])
    assert not torch.equal(views.view(x, 7, n, which=1, **kind), view)
    assert not torch.equal(views.view(x, 8, n, **kind), view)
    assert view.shape == x.shape and not torch.equal(view, x)
    if "noise" not in kind:
        assert view.abs().max() <= 1


def test_nothing_asked_nothing_done(pictures):
    x, n = pictures
    assert torch.equal(views.view(x, 7, n), x)


def test_crops_are_shifts_of_the_reflected_image(pictures):
    x, n = pictures
    padded = torch.nn.functional.pad(x, [2] * 4, mode="reflect")
    found = []
    for image, view in zip(padded, views.view(x, 7, n, crop=2)):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(image[:, i : i + 12, j : j + 10], view)
        ]
        found += places
    assert len(found) == 40 and len(set(found)) > 12


def test_flips_and_greys_are_as_frequent_as_asked():
    x = torch.rand(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    flipped = views.view(x, 1, torch.arange(2000), flip=True)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert abs(int(mirrored.sum()) - 1000) < 5 * 22.4
    grey = views.view(x, 1, torch.arange(2000), grey=0.2)
    changed = (grey != x).flatten(1).any(1)
    torch.testing.assert_close(grey[changed], x[changed].mean(1, keepdim=True).repeat(1, 3, 1, 1))
    assert abs(int(changed.sum()) - 400) < 5 * 17.9


def test_a_turn_is_that_of_torchvision():
    """Full strength: angle 20 degrees at the end of the range; on a smooth image."""
    axis = torch.linspace(-1, 1, 33)
    x = torch.exp(-20 * ((axis[None] - 0.3) ** 2 + 2 * (axis[:, None] + 0.2) ** 2))[None, None]
    turned = views._warp(x, torch.tensor([[1.0, 0, 0, 0, 0]]))
    expected = functional.rotate(x, 20, functional.InterpolationMode.BILINEAR)
    inner = (..., slice(8, 25), slice(8, 25))
    torch.testing.assert_close(turned[inner], expected[inner], rtol=0, atol=1e-5)
    moved = views._warp(x, torch.tensor([[0, 0, 0, 1.0, 0]]))  # by 10 % of the width, 3.3 pixels
    columns = (x[0, 0].sum(0) * torch.arange(33)).sum() / x.sum()
    shifted = (moved[0, 0].sum(0) * torch.arange(33)).sum() / moved.sum()
    assert abs(float(columns - shifted)) == pytest.approx(3.3, abs=0.15)


def test_a_turn_keeps_distances_in_oblong_images():
    """A disc stays a disc: the grid's units are half sides, not pixels."""
    row, column = torch.meshgrid(torch.arange(40.0), torch.arange(20.0), indexing="ij")
    disc = ((row - 19.5) ** 2 + (column - 9.5) ** 2 < 36).float()[None, None]
    turned = views._warp(disc, torch.tensor([[1.0, 0, 0, 0, 0]]))
    assert (turned - disc).abs().mean() < 0.02


def test_the_noise_has_its_standard_deviation(pictures):
    x, n = pictures
    noise = views.add_noise(x, 0.3, 1, n) - x
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    assert views.add_noise(x, 0.0, 1, n) is x
