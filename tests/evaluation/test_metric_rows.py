"""A row of METRICS is all that a new score needs; what a row needs wrongly is an error."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from genmodels import images
from genmodels.config import Config, EvalConfig
from genmodels.data.source import read_source
from genmodels.evaluation import scorer
from genmodels.evaluation.scorer import METRICS, Metric, Scorer, expand_metrics, metrics_help
from genmodels.metrics.features import extract, load_features
from genmodels.training.judge import Judge
from tests.helpers.paths import ROOT


def cosine(rows, reference):
    """Return the cosine of the angle between the two mean rows."""
    means = [x.double().mean(dim=0) for x in (rows, reference)]
    return float(torch.nn.functional.cosine_similarity(*means, dim=0))


@pytest.fixture
def with_cosine(monkeypatch):
    row = Metric("cosine of the mean features", cosine, least=200, better="higher", halves=True)
    monkeypatch.setitem(METRICS, "cosine", row)


def report(words, folder):
    out = folder / "report.json"
    assert evaluate.main([*words, f"out={out}"]) == 0
    return json.loads(out.read_text())


def test_a_row_is_a_metric_of_the_command(with_cosine, tmp_path, capsys):
    words = ["images=digits:train", "reference=digits:test", "features=digits", "resamples=5"]
    scores = report([*words, "metrics=cosine"], tmp_path)["metrics"]
    features = load_features("digits")
    rows = [extract(features, read_source(f"digits:{x}").pixels) for x in ("train", "test")]
    assert list(scores) == ["cosine"]
    assert scores["cosine"]["value"] == pytest.approx(cosine(*rows), rel=1e-12)
    assert 0 < scores["cosine"]["stderr"] < 0.1
    both = report([*words, "metrics=cosine,fd"], tmp_path)["metrics"]
    assert list(both) == ["cosine", "fd"] and both["cosine"] == scores["cosine"]
    assert "cosine: cosine of the mean features" in metrics_help()
    assert expand_metrics(["prc", "cosine"]) == ["precision", "recall", "cosine"]
    capsys.readouterr()
    assert evaluate.main([*words, "metrics=cosines"]) == 2
    assert "metrics=cosines: choose from fd, " in capsys.readouterr().err


def test_a_row_says_how_many_images_it_needs(with_cosine):
    pixels = read_source("digits:test").pixels
    scores = Scorer(["cosine"], "pixels", reference=pixels, num=200)
    with pytest.raises(ValueError, match="metrics=cosine: needs at least 200 images on each side"):
        scores(pixels[:199])
    assert set(scores(pixels[:200])["cosine"]) == {"value"}  # no resamples, no error bar


def test_a_row_of_rows_needs_the_images_of_the_reference(with_cosine):
    assert scorer.tables_to_keep(["cosine"]) == (True, False)
    moments = Scorer(["fd"], "pixels", reference=read_source("digits:test").pixels).moments
    with pytest.raises(ValueError, match="metrics=cosine: needs the reference's images"):
        Scorer(["cosine"], "pixels", reference=moments)


def test_a_row_may_choose_a_model(with_cosine):
    def judge(metric):
        cfg = Config(eval=EvalConfig(metrics=[metric]))
        return Judge(cfg, SimpleNamespace(), torch.device("cpu"))

    assert judge("cosine").distance({"cosine": 0.9}) < judge("cosine").distance({"cosine": 0.8})
    assert judge("nn1").distance({"nn1": 0.45}) < judge("nn1").distance({"nn1": 0.6})
    assert judge("fd").distance({"fd": 1.0}) < judge("fd").distance({"fd": 2.0})
    with pytest.raises(
        ValueError, match="eval.metrics=recall: .*one of fd, fid, .*kid, nn1, .*cosine"
    ):
        judge("recall")


def test_a_row_of_moments_keeps_no_rows_and_may_be_an_entry_or_a_part(monkeypatch):
    def two(frechet):
        return {"value": 2 * frechet.value, "stderr": 1.0}, frechet.value

    monkeypatch.setitem(METRICS, "twice", Metric("2 fd", two, needs=("frechet",), part=0))
    monkeypatch.setitem(METRICS, "once", Metric("fd", two, needs=("frechet",), part=1))
    pixels = read_source("digits:test").pixels
    assert scorer.tables_to_keep(["twice"]) == (False, False)
    scores = Scorer(["twice", "once", "fd"], "digits", reference=pixels)(pixels[:180])
    assert scores["once"] == {"value": scores["fd"]["value"]}
    assert scores["twice"] == {"value": 2 * scores["fd"]["value"], "stderr": 1.0}


def test_words_that_ask_for_several_metrics_come_from_the_rows(monkeypatch):
    monkeypatch.setitem(METRICS, "third", Metric("a third", cosine, comes_with=("prc",)))
    assert expand_metrics(["prc"]) == ["precision", "recall", "third"]
    assert expand_metrics(["coverage", "density"]) == ["coverage", "density"]
    assert expand_metrics(["density"]) == ["density", "coverage"]
    assert metrics_help().endswith(
        "prc: precision and recall and third; density comes with coverage"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"needs": ("rows", "pixels")}, "a metric needs 'pixels': choose from rows, reference"),
        ({"needs": ()}, "a metric needs some of rows, reference"),
        ({"better": "up"}, "better='up': choose from lower, higher, half"),
        ({"least": 3}, "least=3: must be >= 4"),
        ({"needs": ("logits",), "halves": True}, "halves=True: needs rows"),
        ({"needs": ("rows", "train"), "in_blocks": True}, "in_blocks=True: needs rows and ref"),
    ],
)
def test_a_wrong_row_is_an_error_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        Metric("a score", cosine, **fields)


def test_every_row_states_what_its_function_takes():
    for name, metric in METRICS.items():
        inspect.signature(metric.score).bind(*metric.needs)
        assert metric.doc, name


def test_scores_of_images_load_no_trainer(tmp_path):
    """Importing lightning and diffusers takes seconds that a score of two files need not wait."""
    images.write_npz(tmp_path / "a.npz", images=np.zeros((8, 4, 4, 1), np.uint8))
    words = [f"images={tmp_path}/a.npz", f"reference={tmp_path}/a.npz", f"out={tmp_path}/r.json"]
    code = (
        "import sys, evaluate\n"
        "assert evaluate.main([*sys.argv[1:], 'metrics=nn1', 'resamples=2']) == 0\n"
        "heavy = {'lightning', 'diffusers', 'scipy', 'sklearn', 'matplotlib', 'torchmetrics'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
    versions = json.loads((tmp_path / "r.json").read_text())["versions"]
    assert list(versions) == ["genmodels", "torch", "lightning", "diffusers", "numpy"]


def test_scores_of_the_newer_rows_are_their_functions():
    """And vendi, which needs no real images, is had against statistics too."""
    from genmodels.metrics.cmmd import cmmd
    from genmodels.metrics.sliced import mind
    from genmodels.metrics.vendi import vendi

    pixels, real = read_source("digits:test").pixels[:60], read_source("digits:train").pixels[:80]
    scorer_of_all = Scorer(["cmmd", "mind", "vendi", "fd"], "digits", reference=real)
    scores = scorer_of_all(pixels)
    rows, reference = (extract(load_features("digits"), x) for x in (pixels, real))
    assert scores["cmmd"]["value"] == pytest.approx(cmmd(rows, reference), rel=1e-12)
    assert scores["mind"]["value"] == pytest.approx(mind(rows, reference), rel=1e-12)
    assert scores["vendi"]["value"] == pytest.approx(vendi(rows), rel=1e-12)
    bare = Scorer(["vendi"], "digits", reference=scorer_of_all.moments)
    assert bare(pixels)["vendi"] == scores["vendi"]
    with pytest.raises(ValueError, match="metrics=mind: needs the reference's images"):
        Scorer(["mind"], "digits", reference=scorer_of_all.moments)
