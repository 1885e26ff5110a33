"""Several sets: their order, the errors of their differences, tables and plots of them."""

import csv
import io

import pytest
import torch

from genmodels.evaluation import comparison, plots
from genmodels.evaluation.comparison import Row, differences, in_order, short_names
from genmodels.evaluation.scorer import Scorer
from genmodels.images import read_image
from genmodels.metrics.errorbars import block_of, jackknife
from genmodels.metrics.features import Features, extract
from genmodels.metrics.frechet import Moments, frechet_distance
from genmodels.metrics.kernel_distance import kernel_distance
from genmodels.metrics.manifold import precision_recall

FEATURES = Features("six", None, "none", 6, lambda x: x.flatten(1)[:, :6].float() / 255)


def pictures(count, seed=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 1, 4, 4), generator=generator).byte()


REAL = pictures(70, seed=1)
ONE = pictures(60)
OTHER = (ONE.float() * 0.9).byte()  # image k of one set is nearly image k of the other


@pytest.fixture(scope="module")
def rows():
    scorer = Scorer(["fd", "kid", "prc", "nn1"], FEATURES, reference=REAL, resamples=20)
    found = []
    for name, images in (("a/one", ONE), ("a/other", OTHER)):
        scores = scorer(images)
        found.append(Row(name, 60, scores, dict(scorer.deviations), pairing="same images"))
    return found


def difference(rows, metric):
    return next(d for d in differences(rows) if d["metric"] == metric)


def test_the_error_of_a_paired_distance_is_the_jackknife_of_the_difference(rows):
    reference = Moments().update(extract(FEATURES, REAL))
    blocks = block_of(60)

    def fd(keep):
        one, other = (Moments().update(extract(FEATURES, x[keep])) for x in (ONE, OTHER))
        return float(frechet_distance(one, reference)) - float(frechet_distance(other, reference))

    without = [fd(blocks != b) for b in range(16)]
    sizes = torch.bincount(blocks).tolist()
    expected, _ = jackknife(fd(blocks >= 0), without, sizes)
    found = difference(rows, "fd")
    assert found["value"] == pytest.approx(fd(blocks >= 0), rel=1e-9) and found["paired"]
    assert found["stderr"] == pytest.approx(expected, rel=1e-9)
    alone = [row.scores["fd"]["stderr"] for row in rows]
    assert found["stderr"] < 0.7 * (alone[0] ** 2 + alone[1] ** 2) ** 0.5  # what pairing is for


def test_the_error_of_a_paired_kid_is_the_jackknife_over_single_images(rows):
    a, b, real = (extract(FEATURES, x).double() for x in (ONE, OTHER, REAL))

    def spread(values):
        values = torch.tensor(values)
        return (len(values) - 1) / len(values) * (values - values.mean()).square().sum()

    def kid(i, j):
        keep, kept = torch.arange(60) != i, torch.arange(70) != j
        return kernel_distance(a[keep], real[kept])[0] - kernel_distance(b[keep], real[kept])[0]

    images, reference = [kid(i, -1) for i in range(60)], [kid(-1, j) for j in range(70)]
    expected = float((spread(images) + spread(reference)) ** 0.5)
    assert difference(rows, "kid")["stderr"] == pytest.approx(expected, rel=1e-3)


def test_the_error_of_paired_means_is_that_of_the_paired_images(rows):
    found = [precision_recall(extract(FEATURES, x), extract(FEATURES, REAL)) for x in (ONE, OTHER)]
    for metric, part in (("precision", 0), ("recall", 1)):
        each = found[0][part].double() - found[1][part].double()
        expected = float(each.std() / len(each) ** 0.5)
        assert difference(rows, metric)["stderr"] == pytest.approx(expected, rel=1e-9)


def test_sets_without_a_pair_have_independent_errors(rows):
    apart = [rows[0], Row("b", 60, rows[1].scores, rows[1].deviations, pairing=None)]
    for metric in rows[0].scores:
        found, scores = difference(apart, metric), [row.scores[metric] for row in apart]
        assert not found["paired"]
        expected = sum(score["stderr"] ** 2 for score in scores) ** 0.5
        assert found["stderr"] == pytest.approx(expected)
    del apart[1].scores["nn1"]["stderr"]
    assert "stderr" not in difference(apart, "nn1")


def test_rows_come_in_the_order_of_the_metric():
    def order(metric, *values):
        rows = [Row(str(v), 9, {metric: {"value": v}}) for v in values]
        ordered, ends = in_order(rows, metric)
        return [row.scores[metric]["value"] for row in ordered], ends

    assert order("fd", 3, 1, 2) == ([1, 2, 3], "lowest first")
    assert order("fd_inf", 3, 1, 2) == ([1, 2, 3], "lowest first")
    assert order("nn1", 0.9, 0.45, 0.6) == ([0.45, 0.6, 0.9], "nearest 0.5 first")
    assert order("precision", 0.3, 0.8) == ([0.8, 0.3], "highest first")


def test_tables_hold_the_numbers(rows):
    text = comparison.csv_of(rows)
    first, *rest = csv.DictReader(io.StringIO(text))
    assert first["set"] == "a/one" and first["num"] == "60" and len(rest) == 1
    for metric, score in rows[0].scores.items():
        assert float(first[metric]) == score["value"]
        assert float(first[f"{metric}_stderr"]) == score["stderr"]
    lines = comparison.markdown_of(rows).splitlines()
    assert lines[0] == "| set | images | fd | kid | precision | recall | nn1 |"
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    value, _, error = cells[2].partition(" +- ")
    assert float(value) == pytest.approx(rows[0].scores["fd"]["value"], rel=1e-4)
    assert float(error) == pytest.approx(rows[0].scores["fd"]["stderr"], rel=0.06)


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["runs/a/1", "runs/b/1"]) == ["a/1", "b/1"]
    assert short_names(["x/samples", "y/more"]) == ["samples", "more"]
    assert short_names(["digits:test", "digits:train"]) == ["digits:test", "digits:train"]
    assert short_names(["a", "b/a"]) == ["a", "b/a"]


def boxes(axes, which):
    """Return the boxes of the labels that can be seen, on the screen."""
    axes.figure.canvas.draw()
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    axis = getattr(axes, f"{which}axis")
    ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [t.label1.get_window_extent() for t in ticks if t.label1.get_visible()]


def overlaps(labels):
    return [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :] if a.overlaps(b)]


def test_labels_of_plots_do_not_collide(rows, tmp_path, monkeypatch):
    figures, original = [], plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: (figures.append(figure), original(figure))[1])
    many = [Row(f"model number {k}", 60, rows[k % 2].scores) for k in range(12)]
    plots.draw_comparison(tmp_path / "many.png", many, [row.name for row in many])
    scorer = Scorer(["fd", "fd_inf", "prc"], FEATURES, reference=pictures(1500, 3))
    scorer(pictures(1500, 2, 250), curve=True)  # 1/n up to 0.01: long numbers
    plots.draw_scores(tmp_path / "one.png", scorer)
    for figure in figures:
        for axes in figure.axes:
            for which in ("x", "y") if axes.get_visible() else ():
                assert not overlaps(boxes(axes, which)), axes.get_title()
    names = [text.get_window_extent() for text in figures[1].axes[1].texts]
    assert names and not overlaps(names)
    assert read_image(tmp_path / "many.png").shape[0] == 3
