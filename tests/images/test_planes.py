"""Numbers of planes along their axes."""

from genmodels.images.planes import Grid


def test_planes_have_positions_channels_and_labels():
    grid = Grid("TZC", (2, 3, 4))
    assert len(grid) == 24 and grid.channels == 4
    assert grid.index(23) == (1, 2, 3) and grid.index(5) == (0, 1, 1)
    assert grid.channel(5) == 1 and grid.position(5) == (0, 1) and grid.label(5) == "[t0,z1,c1]"
    single, plain = Grid("", ()), Grid("I", (7,))
    assert (len(single), single.channels, single.channel(0), single.label(0)) == (1, 1, 0, "")
    assert plain.label(3) == "[3]" and plain.position(3) == (3,) and plain.channels == 1
