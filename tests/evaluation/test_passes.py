"""One pass over images: moments in blocks, rows in order, parts that survive a kill."""

import numpy as np
import pytest
import torch

import genmodels
from genmodels import images
from genmodels.evaluation import passes
from genmodels.evaluation.passes import Scored, Store, score_pass
from genmodels.evaluation.scorer import Scorer
from genmodels.evaluation.sources import Generated, Pictures
from genmodels.metrics.errorbars import block_of
from genmodels.metrics.features import extract, load_features
from genmodels.metrics.frechet import Moments

PIXELS = torch.randint(0, 256, (203, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture
def features():
    return load_features("pixels")


def test_a_pass_gives_rows_in_order_and_the_moments_of_blocks(features, monkeypatch):
    monkeypatch.setattr(passes, "_BUFFER", 7)  # several products for each block
    found = score_pass(Pictures(PIXELS), features, rows=True, shift=torch.full((16,), 0.5))
    rows = extract(features, PIXELS)
    assert torch.equal(found.rows, rows) and found.logits is None
    whole = Moments().update(rows)
    assert found.moments().count == 203
    torch.testing.assert_close(found.moments().mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.moments().cov, whole.cov, rtol=1e-11, atol=1e-14)
    blocks = block_of(203)
    for number, block in enumerate(found.blocks):
        own = Moments().update(rows[blocks == number])
        assert block.count == own.count
        torch.testing.assert_close(block.mean, own.mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_the_batch_of_the_net_changes_nothing(features, batch):
    found, other = (
        score_pass(Pictures(PIXELS), features, batch=b, rows=True) for b in (None, batch)
    )
    assert torch.equal(found.rows, other.rows)
    for one, two in zip(found.blocks, other.blocks):
        assert torch.equal(one.outer, two.outer) and torch.equal(one.total, two.total)


def test_fewer_images_than_blocks(features):
    found = score_pass(Pictures(PIXELS[:5]), features, rows=True)
    assert sum(block.count for block in found.blocks) == 5
    assert found.moments().cov.isfinite().all() and found.rows.shape == (5, 16)


@pytest.mark.parametrize("world", [1, 2, 3, 16, 40])
def test_processes_share_out_every_image_once(world):
    shares = [passes._share_of_units(1003, rank, world) for rank in range(world)]
    units = [unit for _, own in shares for unit in own]
    split = shares[0][0]
    assert sorted(units) == list(range(16 * split)) and split == max(1, -(-world // 16))
    places = torch.cat([index for _, own in shares for index in own.values()])
    assert torch.equal(places.sort().values, torch.arange(1003))
    blocks = block_of(1003)
    assert all((blocks[i] == unit // split).all() for _, own in shares for unit, i in own.items())
    assert min(len(own) for _, own in shares) > 0


class Stopping:
    """Pictures that stop like a killed process after some reads."""

    def __init__(self, pixels, after):
        self.inner, self.after, self.shape = Pictures(pixels), after, tuple(pixels.shape[1:])

    def __len__(self):
        return len(self.inner)

    def read(self, index):
        for i, part in enumerate(self.inner.read(index, batch=1)):
            if i == self.after:
                raise KeyboardInterrupt
            yield part


def test_a_killed_pass_goes_on(features, tmp_path):
    def store(identity="a"):
        return Store(tmp_path / "r.json.blocks", "images", identity)

    whole = score_pass(Pictures(PIXELS), features, rows=True)
    with pytest.raises(KeyboardInterrupt):
        score_pass(Stopping(PIXELS, 100), features, rows=True, batch=1, store=store())
    done = len(store().files())
    assert 5 <= done <= 8  # of 16, after half of the images
    read = []

    class Counting(Pictures):
        def read(self, index, batch=64):
            read.append(len(index))
            return super().read(index, batch)

    found = score_pass(Counting(PIXELS), features, rows=True, batch=1, store=store())
    assert sum(read) == 203 - sum((block_of(203) == b).sum() for b in range(done))
    assert torch.equal(found.rows, whole.rows)
    for one, two in zip(found.blocks, whole.blocks):
        assert torch.equal(one.outer, two.outer) and one.count == two.count
    with pytest.raises(ValueError, match="out=.*r.json: .*left by another evaluation; delete"):
        store("b")
    store().files()[0].write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read .*; delete it"):
        store()
    Store.clear(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_generated_images_stream_and_are_kept_where_asked(features, tiny_run, tmp_path):
    model = genmodels.load(tiny_run)
    expected = images.to_uint8(model.sample(range(3, 12), steps=2))
    made = []
    sample = model.sample
    model.sample = lambda seeds, *a, **k: made.append(len(seeds)) or sample(seeds, *a, **k)
    options = {"steps": 2, "batch": 4}
    for save in ("", str(tmp_path / "png"), str(tmp_path / "a.npz")):
        made.clear()
        source = Generated(model, range(3, 12), save=save, **options)
        rows = score_pass(source, features, rows=True, batch=4).rows
        source.write_npz()
        assert torch.equal(rows, extract(features, expected))
        assert max(made) <= 4 and sum(made) == 9
    assert sorted(p.name for p in (tmp_path / "png").iterdir())[0] == "000003.png"
    assert torch.equal(images.read_images(tmp_path / "png"), expected)
    with np.load(tmp_path / "a.npz") as file:
        assert file["seeds"].tolist() == list(range(3, 12))
        assert np.array_equal(file["images"], expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match="png: holds images of 6 other seeds"):
        Generated(model, range(3, 6), save=str(tmp_path / "png"), **options)


def test_identity_tells_weights_seeds_and_settings_apart(tiny_run):
    model = genmodels.load(tiny_run)
    sources = [
        Generated(model, range(4), steps=2),
        Generated(model, range(5), steps=2),
        Generated(model, range(4), steps=3),
        Generated(model, range(4), [0] * 4, steps=2),
    ]
    marks = [str(source.identity()) for source in sources]
    assert len(set(marks)) == 4 and marks[0] == str(Generated(model, range(4), steps=2).identity())
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert str(sources[0].identity()) != marks[0]
    assert Pictures(PIXELS).identity() == Pictures(PIXELS.clone()).identity()
    changed = PIXELS.clone()
    changed[200, 0, 0, 0] ^= 1
    assert Pictures(changed).identity() != Pictures(PIXELS).identity()


def test_what_does_not_fit_is_refused_or_summed_without_blocks(features, monkeypatch):
    """At D = 16 with a limit of 16 x 16 x 8 bytes there is room for one covariance alone."""
    monkeypatch.setattr(passes, "_MEMORY", 8 * 16 * 16)
    with pytest.warns(UserWarning, match="16 blocks of 203 images in 16 dimensions would not fit"):
        found = score_pass(Pictures(PIXELS), features)
    assert len(found.blocks) == 1
    whole = Moments().update(extract(features, PIXELS))
    torch.testing.assert_close(found.moments().cov, whole.cov, rtol=1e-11, atol=1e-14)
    monkeypatch.setattr(passes, "_MEMORY", 8 * 16 * 16 - 1)
    with pytest.raises(ValueError, match="moments of 203 images in 16 dimensions do not fit"):
        score_pass(Pictures(PIXELS), features)
    score_pass(Pictures(PIXELS[:15]), features)  # whose rows are smaller than a covariance


def test_few_images_of_many_pixels_build_no_covariance(features, monkeypatch):
    """30 pictures of 3 x 64 x 64: D = 12288, whose covariance would be 1.2 GB."""
    monkeypatch.setattr(Moments, "outer", property(lambda self: pytest.fail("built")))
    wide = torch.randint(0, 256, (60, 3, 64, 64), dtype=torch.uint8)
    scorer = Scorer(["fd"], features, reference=wide[:30])
    with pytest.warns(UserWarning, match="30 images in 12288 dimensions"):
        found = scorer(wide[30:])["fd"]["value"]
    # With the law of the pixels' n x n Gram matrices: tr (S1 S2)^1/2 is the nuclear norm of the
    # cross-Gram matrix, here by numpy.
    one, two = (wide[k : k + 30].reshape(30, -1).numpy() / 255.0 for k in (30, 0))
    means = [x.mean(0) for x in (one, two)]
    centred = [(x - m) / 29**0.5 for x, m in zip((one, two), means)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum((x**2).sum() for x in centred)
    expected = ((means[0] - means[1]) ** 2).sum() + traces - 2 * cross
    assert found == pytest.approx(expected, rel=1e-6)  # the rows are float32


def test_one_moments_of_all_images_is_the_sum_of_the_blocks(features):
    blocks, whole = (score_pass(Pictures(PIXELS), features, whole=w) for w in (False, True))
    assert len(blocks.blocks) == 16 and len(whole.blocks) == 1
    assert torch.equal(blocks.moments().outer, whole.moments().outer)


def test_equal_images_have_equal_marks(features):
    twice = torch.cat([PIXELS[:50], PIXELS[:50]])
    marks = score_pass(Pictures(twice), features).marks
    assert torch.equal(marks[:50], marks[50:]) and len(marks.unique()) == 50


def test_rows_give_what_their_pass_left(features):
    shift = torch.full((16,), 0.5)
    left = score_pass(Pictures(PIXELS), features, rows=True, shift=shift)
    found = Scored.of_rows(left.rows, features, shift)
    for one, two in zip(left.blocks, found.blocks):
        assert torch.equal(one.outer, two.outer) and torch.equal(one.total, two.total)
