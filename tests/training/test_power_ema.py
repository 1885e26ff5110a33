"""Power-function averages of a training: values, files, resuming, the command, a sweep."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import genmodels
import train
from genmodels.checkpoint import ema, exports, read_checkpoint
from genmodels.evaluation.plots import is_drawn
from genmodels.evaluation.sources import Generated
from genmodels.run import Run
from genmodels.training.callbacks import Throughput
from tests.helpers.runs import assert_same, state

WORDS = (
    "ema.sigma_rel=0.05,0.10",
    "ema.half_life=0",
    "ema.snapshot=32",  # four steps
    "trainer.max_steps=10",
    "optim.lr=1e-2",
    "network.channels=[8,8]",
    "checkpoint.every=3",
    "sample.every=0",
)


@pytest.fixture(scope="module")
def trained(train_tiny):
    """A run of ten steps, and the weights after each of them."""
    seen, original = [], Throughput.on_train_batch_end

    def spy(self, trainer, module, *args):  # stands before the average in the list
        seen.append({name: p.detach().double().clone() for name, p in module.named_parameters()})
        return original(self, trainer, module, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Throughput, "on_train_batch_end", spy)
        run = train_tiny(*WORDS)
    return Run(run), seen


def exact(seen, step, sigma_rel, name):
    """The average after a step in float64, by the weights of its steps."""
    edges = (np.arange(step + 1) / step) ** (ema.exponent(sigma_rel) + 1)
    return sum(w * weights[name] for w, weights in zip(np.diff(edges), seen[:step]))


def test_files_hold_the_averages(trained):
    run, seen = trained
    found = ema.averages_of(run)
    assert [average[:2] for average in found] == [
        (step, width) for step in (4, 8, 10) for width in (0.05, 0.10)
    ]
    assert found[0].path.name == "step-00000004-0.050.safetensors"
    for step, width, path in found:
        for name, tensor in load_file(path).items():
            expected = exact(seen, step, width, name)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    last = load_file(found[-2].path)
    model = genmodels.load(run.folder)
    for name, parameter in model.named_parameters():  # the first width is the model
        assert torch.equal(parameter, last[name])


def test_resumed_it_is_the_same_to_the_bit(trained, train_tiny, tmp_path):
    run, _ = trained
    other = Run(train_tiny(*WORDS, "trainer.max_steps=7", out=tmp_path))
    average = ema.average_path(other, 9, 0.05)
    average.write_bytes(b"of a training that was killed before it saved step 9")
    assert train.main([f"resume={other.folder}", "trainer.max_steps=10"]) == 0
    assert not average.exists()
    assert_same(state(run.folder), state(other.folder))
    more = [read_checkpoint(part.last)["more_averages"] for part in (run, other)]
    assert_same(*more)
    assert list(more[0]) == ["0.1"]
    for kept in ema.averages_of(run):
        assert kept.path.read_bytes() == (other.averages / kept.path.name).read_bytes()


def test_exports_of_other_widths(trained, tmp_path):
    run, seen = trained
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="sigma_rel=0.2: its profile is met to"):
        exports.main(["ema", str(run.folder), "sigma_rel=0.05,0.2", f"out={out}"])
    kept, wide = (out / f"step-00000010-{width}" for width in ("0.050", "0.200"))
    again, averages = genmodels.load(kept), ema.averages_of(run)
    state = load_file(averages[-2].path)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, state[name], rtol=1e-6, atol=1e-7)
    weights, error = ema.weights_of([average[:2] for average in averages], 10, 0.2)
    states = [load_file(average.path) for average in averages]
    for name, parameter in genmodels.load(wide).named_parameters():
        expected = sum(w * state[name].double() for w, state in zip(weights, states))
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        assert (parameter.double() - exact(seen, 10, 0.2, name)).abs().max() < 0.01
    card = (wide / "README.md").read_text()
    assert "sigma_rel=0.2 at step 10, from 6 files" in card and f"{error:.2g}" in card
    assert json.loads((wide / "config.json").read_text())["genmodels_format"] == 1
    exports.main(["ema", str(run.folder), "sigma_rel=0.10", "step=8", f"out={tmp_path / 'one'}"])
    earlier = load_file(averages[3].path)
    for name, parameter in genmodels.load(tmp_path / "one").named_parameters():
        torch.testing.assert_close(parameter, earlier[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "words, message",
    [
        (["sigma_rel=0.3"], "sigma_rel=.*0.288675"),
        (["sigma_rel=0.1", "step=5"], "step=5: no average was kept then; the nearest is at 4"),
        (["sigma_rel="], "sigma_rel=.*usage"),
        (["sigma_rel=0.1", "half=true"], "half"),
    ],
)
def test_refused(trained, words, message, tmp_path):
    run, _ = trained
    with pytest.raises(ValueError, match=message):
        exports.main(["ema", str(run.folder), *words, f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_run_without_averages_is_refused(tiny_run):
    with pytest.raises(ValueError, match="has no averages; it was trained without ema.sigma_rel"):
        exports.main(["ema", str(tiny_run), "sigma_rel=0.1"])


SWEEP = ("num=64", "metrics=fd,nn1", "features=pixels", "resamples=0", "steps=2")


def test_scores_over_the_width(trained, tmp_path):
    """Each set is the export of that width; killed between two, the same command goes on."""
    run, _ = trained
    widths = (0.05, 0.1, 0.25)
    out, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    words = [str(run.folder), "sigma_rel=0.1,0.05,0.25", *SWEEP, f"out={out}", f"plot={plot}"]
    made, stops, original = [], [KeyboardInterrupt], Generated._make

    def stop(self, numbers):
        made.append(len(numbers))
        if sum(made) > 64 and stops:  # in the second set
            raise stops.pop()
        yield from original(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generated, "_make", stop)
        assert evaluate.main(words) == 1 and not out.exists()
        made.clear()
        assert evaluate.main(words) == 0
    assert sum(made) == 2 * 64  # the first set is not made again
    report = json.loads(out.read_text())
    assert is_drawn(plot) and report["options"]["sigma_rel"] == [0.1, 0.05, 0.25]
    found = {one["sigma_rel"]: one for one in report["sets"]}
    assert sorted(found) == list(widths)
    values = [one["metrics"]["fd"]["value"] for one in report["sets"]]
    assert values == sorted(values) and len(set(values)) == 3
    assert all(pair["paired"] for pair in report["differences"])  # of the same seeds
    assert any("sigma_rel=0.25: its profile is met to" in line for line in report["warnings"])
    exports.main(["ema", str(run.folder), "sigma_rel=0.05,0.1,0.25", f"out={tmp_path}"])
    for width in widths:
        one = tmp_path / f"{width}.json"
        model = str(tmp_path / f"step-00000010-{width:.3f}")
        assert evaluate.main([model, *SWEEP, f"out={one}"]) == 0
        alone = json.loads(one.read_text())["metrics"]
        assert alone == found[width]["metrics"]
        assert f"sigma_rel={width:g} at step 10" in found[width]["average"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["RUN", "sigma_rel=0.3"], "sigma_rel=0.3: must be in .0, 0.2886"),
        (["RUN", "sigma_rel=0.1,0.1"], "sigma_rel=.*names a width twice"),
        (["RUN", "sigma_rel=0.1,0.2", "per_class=true"], "per_class=true: is for one set"),
        (
            ["RUN", "sigma_rel=0.1", "cluster=digits", "metrics=fd"],
            "sigma_rel=.*is for images that a MODEL makes",
        ),
        (["RUN", "sigma_rel=0.1", "cluster=digits"], "sigma_rel=0.1: cluster= does not take it"),
        (["RUN", "sigma_rel=0.1", "likelihood=true"], "sigma_rel"),
        (["TINY", "sigma_rel=0.1"], "has no averages; it was trained without ema.sigma_rel"),
        (["images=A", "reference=B", "sigma_rel=0.1"], "sigma_rel=0.1: images= are there already"),
    ],
)
def test_a_sweep_is_refused_in_one_line(trained, tiny_run, words, message, capsys):
    models = {"RUN": str(trained[0].folder), "TINY": str(tiny_run)}
    assert evaluate.main([models.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
