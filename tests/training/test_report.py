"""report.html and the page of several runs: what stands in them, read back out of them."""

import base64
import csv
import html
import itertools
import os
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
import torch

import train
from genmodels import images
from genmodels.commands import main as command
from genmodels.run import Run
from genmodels.training import callbacks, report
from genmodels.training.saver import Saver
from tests.helpers.old_words import OLD
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

WORDS = ("sample.every=2", "sample.num=4", "method.steps=1", "eval.loss_every=2")


class Page(HTMLParser):
    """The tags of a page, its text, its pictures, and the cells of its tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.cells, self.pre = [], [], [], ""
        self.within = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "action")]
        self.within.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if self.within[-1:] in (["td"], ["th"]) and self.cells:
            self.cells[-1].append(data)
        if self.within[-1:] == ["pre"]:
            self.pre += data


def page_of(path):
    """Return the page; it must need nothing from elsewhere."""
    page, text = Page(path), path.read_text()
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert "http:" not in text and "https:" not in text and "@import" not in text
    return page


@pytest.fixture(scope="module")
def run(train_tiny):
    return Run(train_tiny(*WORDS, "eval.every=4", "eval.num=8", "data.labels=true"))


def test_a_run_ends_with_its_report(run):
    page = page_of(run.report)
    pictures = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    grids = sorted(run.samples.glob("*.png"))
    assert len(pictures) == len(grids) == 2
    for data, grid in zip(pictures, grids):  # 512 pixels: as they are
        written = images.read_image(grid)
        assert (images.read_values(data, "a.png") == written.permute(1, 2, 0).numpy()).all()
    facts = dict(row for row in page.cells if len(row) == 2)
    assert facts["step"] == "4 of 4" and facts["folder"] == str(run.folder)
    assert f"torch {torch.__version__}" in facts["versions"] and "threads" in facts["machine"]
    with open(run.metrics, newline="") as file:
        *_, last = csv.DictReader(file)
    assert facts["eval/fd_8"] == f"{float(last['eval/fd_8']):.5g} (step 4)"
    assert float(facts["val/loss"].split()[0]) == pytest.approx(float(last["val/loss"]), rel=1e-4)
    assert "method.sigma_data = 0.75" in page.pre and "data.noise.law = " in page.pre


def test_the_curves_are_those_of_the_table(run):
    """Points of the figure, put back by its axis labels, are the lines of metrics.csv."""
    text = run.report.read_text()
    (figure,) = (svg for svg in re.findall("<svg.*?</svg>", text, re.S) if ">loss<" in svg)
    axis = re.findall(r'y="([\d.]+)" text-anchor="end">([-\d.e]+)<', figure)[:4]
    (y0, low), (y1, high) = ([float(v) for v in axis[k]] for k in (0, 3))
    lines = re.findall(r'points="([^"]*)".*?<title>(\w+)</title>', figure)
    drawn = {name: [float(p.split(",")[1]) for p in points.split()] for points, name in lines}
    with open(run.metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "val"):
        wanted = [float(row[f"{split}/loss"]) for row in rows if row[f"{split}/loss"]]
        found = [low + (y + 4 - y0) / (y1 - y0) * (high - low) for y in drawn[split]]
        assert found == pytest.approx(wanted, abs=0.01 * (high - low))
    assert {name: len(points) for name, points in drawn.items()} == {"train": 4, "val": 2}


def test_a_long_table_is_thinned_and_a_wide_range_is_logarithmic():
    points = [(float(step), 10.0 ** -(step / 5000)) for step in range(1, 20_001)]
    figure = report.draw("loss", {"train": points})
    drawn = re.search(r'points="([^"]*)"', figure)[1].split()
    assert 250 < len(drawn) <= 300 and "log scale" in figure and len(figure) < 6000
    across, down = zip(*(map(float, point.split(",")) for point in drawn))
    slope = [(b - a) for a, b in itertools.pairwise(down)]  # a straight line
    assert max(slope) - min(slope) < 0.3 and list(across) == sorted(across)
    odd = report.draw("x", {"a": [(1.0, 2.0)], "b": []})  # one point, and none
    assert odd.count("<circle") == 1


@pytest.mark.slow
def test_the_commands_of_a_report_run(run, tmp_path, capsys):
    """Those that go on and that sample; the run is a copy."""
    copy = Run(tmp_path / "and again")
    shutil.copytree(run.folder, copy.folder)
    assert command.main(["report", str(copy.folder)]) == 0
    assert capsys.readouterr().out.strip() == str(copy.report)
    lines = [line.partition("    #")[0] for line in page_of(copy.report).pre.splitlines()[:5]]
    resume, longer, sample, evaluate, again = map(shlex.split, lines)
    assert resume[:2] == longer[:2] == ["genmodels", "train"]
    assert again == ["genmodels", "report", str(copy.folder)]
    assert command.main(longer[1:]) == 0 and copy.report.stat().st_size
    assert "8 of 8" in copy.report.read_text()
    sample = [word if word != "num=100" else "num=2" for word in sample]
    assert command.main([*sample[1:-1], f"out={tmp_path}/made"]) == 0
    evaluate = [word if word != "num=1000" else "num=8" for word in evaluate]
    assert command.main(evaluate[1:]) == 0
    assert command.main(again[1:]) == 0
    rows = {row[0] for row in page_of(copy.report).cells if row}
    assert {"scores.json fd", "scores.json nn1"} <= rows


@pytest.mark.parametrize(
    "number", [0, pytest.param(15, marks=pytest.mark.slow)], ids=["time", "signal"]
)
def test_a_run_that_is_stopped_has_a_report(tmp_path, monkeypatch, number):
    original = Saver.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step == 2:
            self.signal, self.deadline = number, 0.0
        return original(self, trainer, *rest)

    monkeypatch.setattr(Saver, "on_train_batch_end", stop)
    words = [str(ROOT / f"configs/{name}.yaml") for name in ("edm_digits", "debug")]
    words += [*TINY, "trainer.max_steps=50", "sample.every=0", f"out_dir={tmp_path}"]
    assert train.main(words) == (128 + number if number else 0)
    (folder,) = tmp_path.glob("*/*")
    assert "<td>2 of 50</td>" in Run(folder).report.read_text()


def test_a_report_is_made_anew_at_each_evaluation(train_tiny, monkeypatch):
    steps = []
    monkeypatch.setattr(
        callbacks.report, "update", lambda run, *rest: steps.append((len(rest), run.report.name))
    )
    train_tiny("method.steps=1", "eval.every=2", "eval.num=8")
    assert steps == [(0, "report.html"), (0, "report.html"), (2, "report.html")]


def test_a_report_that_fails_ends_nothing(train_tiny, monkeypatch, capsys):
    monkeypatch.setattr(report, "run_page", lambda run: 1 / 0)
    run = Run(train_tiny())
    said = capsys.readouterr()
    assert f"{run.report}: not written (division by zero)" in said.err
    assert said.out.splitlines()[-1] == f"run: {run.folder}" and not run.report.exists()
    assert not list(run.folder.glob("*.partial"))


def test_names_and_values_are_no_markup(run, tmp_path):
    copy = Run(tmp_path / "<b>&")
    shutil.copytree(run.folder, copy.folder)
    text = copy.config.read_text().replace("name: edm_digits", "name: '<script>x</script>'")
    copy.config.write_text(text)
    copy.metrics.write_text("step,train/<i>loss\n1,2\n2,3\n")
    (copy.samples / "step-00000001.png").write_bytes(b"no picture")
    shutil.copy(copy.samples / "step-00000002.png", copy.samples / "<u>.png")
    page = page_of(report.write_report(copy))
    assert not {"script", "b", "i", "u"} & set(page.tags)
    assert html.escape("<script>x</script>") in copy.report.read_text()


def test_old_and_broken_runs_have_a_page(tmp_path, capsys):
    """What an older version did not write down is not made up."""
    for name in ("edm", "ddo", "gedi"):
        run = Run(tmp_path / name)
        shutil.copytree(OLD / name / "run", run.folder)
        assert command.main(["report", str(run.folder)]) == 0
        facts = dict(row for row in page_of(run.report).cells if len(row) == 2)
        assert facts["machine"] == facts["time"] == facts["versions"] == "not recorded"
    scored = {row[0] for row in page_of(tmp_path / "ddo/report.html").cells if row}
    assert {"round-01 init fd", "round-01 winner fd"} <= scored
    assert "round 1, alpha 4" in (tmp_path / "ddo/report.html").read_text()
    run = Run(tmp_path / "edm")
    run.metrics.write_bytes(b"\xff\x00step,\n1,2,3\n")
    run.training.write_text("[1]")
    (run.folder / "scores.json").write_text('{"metrics": {"fd": {"value": "x"}, "a": 3}}')
    assert command.main(["report", str(run.folder)]) == 0
    run.metrics.write_text(f"step,{'x' * 200_000}\n1,2\n")  # csv takes no such cell
    assert command.main(["report", str(run.folder)]) == 0
    os.truncate(run.metrics, 1 << 34)  # and this is no table, but a hole
    run.training.write_text(f'{{"seconds": 1{"0" * 400}, "versions": {"[" * 9999}')
    (run.folder / "scores.json").write_text(f'{{"metrics": {{"fd": {{"value": 1{"0" * 400}}}}}}}')
    os.mkfifo(run.folder / "pipe.json")
    os.mkfifo(run.samples / "pipe.png")
    assert command.main(["report", str(run.folder)]) == 0
    assert command.main(["report", str(tmp_path / "nothing")]) == 2
    assert "no config.yaml there" in capsys.readouterr().err


def test_runs_side_by_side(run, train_tiny, tmp_path, capsys):
    other = Run(train_tiny(*WORDS, "optim.lr=2e-3", "trainer.max_steps=6", "data.labels=true"))
    out = tmp_path / "compare.html"
    words = ["compare", str(run.folder), str(other.folder), f"out={out}"]
    assert command.main(words) == command.main(words) == 0  # its own page is written over
    printed = capsys.readouterr().out
    assert "val/loss" in printed and printed.splitlines()[-1] == str(out)
    page = page_of(out)
    rows = {row[0]: row[1:] for row in page.cells if row}
    assert rows["optim.lr"] == ["0.001", "0.002"] and rows["trainer.max_steps"] == ["4", "6"]
    assert "seed" not in rows and "method.sigma_data" not in rows
    assert rows["step"] == ["4 of 4", "6 of 6"] and len(rows["val/loss"]) == 2
    assert len(page.links) == 2 + 2 + 2  # of two common steps, and the newest of each
    figures = re.findall("<svg.*?</svg>", out.read_text(), re.S)
    (loss,) = (figure for figure in figures if ">loss<" in figure)
    assert loss.count("<polyline") == 4 and loss.count("stroke-dasharray") == 2


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "run=: name 2 or more run folders"),
        (["{run}"], "name 2 or more run folders"),
        (["{run}", "{run}", "out=x.png"], "out=x.png: must end in .html"),
        (["{run}", "{run}", "out={run}/report.html"], "lies among the own files of the run"),
        (["{run}", "{run}", "out={other}"], "exists, and is no earlier output"),
        (["{run}", "{run}", "lr=3"], "lr=3"),
        (["{run}", "nowhere"], "run=nowhere: no config.yaml there"),
    ],
)
def test_what_compare_refuses(run, tmp_path, capsys, words, line):
    other = tmp_path / "mine.html"
    other.write_text("<html>")
    words = [word.format(run=run.folder, other=other) for word in words]
    assert command.main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert other.read_text() == "<html>"
