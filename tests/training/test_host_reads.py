"""On the stand-in device a step that is not logged reads nothing on the host; nothing is mixed."""

import pytest
import torch

import genmodels
from benchmarks import host_reads, stand_in
from genmodels.methods import METHODS
from genmodels.methods.base import Skips
from genmodels.methods.edm import EDM

needs_compiler = pytest.mark.skipif(not stand_in.has_compiler(), reason="no C++ compiler here")
DEVICE = stand_in.NAME


def test_every_method_is_watched():
    assert set(METHODS) <= set(host_reads.CASES)


def test_skips_are_counted_as_a_loop_counts_them():
    skips = Skips(torch.device("cpu"))
    for skipped in (0, 1, 1, 1, 0, 1, 1):
        skips.count(torch.tensor(bool(skipped)))
    assert skips.read() == (2, 3, 5)
    skips.count(torch.tensor(True))
    assert skips.read() == (3, 3, 1)  # the row goes on over a read
    skips.count(torch.tensor(False))
    assert skips.read() == (0, 3, 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains a case once: (run, what was seen)."""
    trained = {}

    def one(name):
        if name not in trained:
            trained[name] = host_reads.train(name, tmp_path_factory.mktemp(name))
        return trained[name]

    return one


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", host_reads.CASES)
def test_a_step_that_is_not_logged_reads_nothing(name, runs):
    seen = runs(name)[1]
    reads = seen["quiet"]["reads_where"]
    if name == "energy_matching":  # optimal transport within the batch is solved on the host
        reads = {key: count for key, count in reads.items() if " couple" not in key}
    assert not reads
    assert seen["due"]["reads"] > seen["quiet"]["reads"]  # the watch sees
    assert not seen["quiet"]["mixed"] and not seen["due"]["mixed"]


# Once a call, not once a step: which chains of the buffer are old enough, how many were accepted.
ONCE = {"gedi buffer": " aged <", "meco": " sample <"}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", host_reads.SAMPLERS)
def test_a_sampler_reads_nothing(name, runs):
    method, options = host_reads.SAMPLERS[name]
    seen = host_reads.sample(runs(method)[0], options)
    reads = {key: n for key, n in seen["reads_where"].items() if ONCE.get(name, "?") not in key}
    assert not reads and seen["reads"] <= (name in ONCE) and not seen["mixed"], seen


@needs_compiler
@pytest.mark.slow
def test_the_watch_sees_reads_copies_and_mixed_devices():
    stand_in.install()
    x = torch.arange(4.0).to(DEVICE)
    with stand_in.Watch() as watch:
        assert float(x.sum()) == 6
        x[x > 1].cpu()
        torch.ones(4).to(DEVICE)
        with pytest.raises(RuntimeError):
            torch.add(x, torch.ones(4))
    assert sum(watch.reads.values()) == 3  # a number, a mask, a copy
    assert sum(watch.copies.values()) == 1
    assert sum(watch.mixed.values()) == 1
    with stand_in.Watch() as watch:
        (x * 2 + 1).mean()
    assert not (watch.reads or watch.copies or watch.mixed)


@needs_compiler
@pytest.mark.slow
def test_a_loaded_model_brings_its_buffer_to_the_device(runs):
    model = genmodels.load(runs("gedi")[0], device=DEVICE)
    assert model.replay.entries.device.type == model.replay.visits.device.type == DEVICE


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm", "gbm"])
def test_labels_follow_the_images_to_the_device(name, runs):
    here = genmodels.load(runs(name)[0])
    there = genmodels.load(runs(name)[0], device=DEVICE)
    x = torch.rand(2, *here.shape, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    labels = torch.tensor([1, 3]) if here.classes else None
    for function in ("denoise", "score"):
        expected = getattr(here, function)(x, 0.5, labels)
        with stand_in.Watch() as watch:
            got = getattr(there, function)(x.to(DEVICE), 0.5, labels)
        assert not watch.mixed
        torch.testing.assert_close(got.cpu(), expected)


def spoiled(monkeypatch, steps):
    """Make the losses of these steps not a number."""
    loss = EDM.loss

    def spoil(self, batch):
        value, logs = loss(self, batch)
        return value * (float("nan") if self.global_step in steps else 1.0), logs

    monkeypatch.setattr(EDM, "loss", spoil)


@needs_compiler
@pytest.mark.slow
def test_a_device_skips_the_steps_that_a_cpu_skips(tmp_path, monkeypatch):
    """Weights, Adam's state and the average: a zero gradient would still move all three."""
    from genmodels.commands.train import train

    spoiled(monkeypatch, (2, 3, 5))
    (tmp_path / "device").mkdir()
    words = host_reads.words_of("edm", tmp_path / "cpu")
    runs = [
        train([*words, "trainer.progress=false"]),
        host_reads.train("edm", tmp_path / "device")[0],
    ]
    cpu, device = (genmodels.checkpoint.read_checkpoint(run) for run in runs)
    for key in ("state_dict", "current_model_state"):
        for name, value in cpu[key].items():
            torch.testing.assert_close(device[key][name], value, atol=1e-5, rtol=1e-4)
    moments = [one["optimizer_states"][0]["state"] for one in (cpu, device)]
    for k, state in moments[0].items():
        assert float(state["step"]) == float(moments[1][k]["step"]) == 5  # of 8
        torch.testing.assert_close(moments[1][k]["exp_avg"], state["exp_avg"], atol=1e-4, rtol=1e-3)


@needs_compiler
@pytest.mark.slow
def test_a_device_stops_after_too_many_skipped_steps(tmp_path, monkeypatch):
    spoiled(monkeypatch, (1, 2, 3))
    monkeypatch.setattr(host_reads, "COMMON", (*host_reads.COMMON, "trainer.max_nonfinite=3"))
    with pytest.raises(RuntimeError, match="max_nonfinite=3: that many steps in a row"):
        host_reads.train("edm", tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "word", "match"),
    [
        (
            "cdrl",
            "method.divergence=1e-9",
            "divergence=1e-09: exceeded in or before step 6 at level",
        ),
        ("gedi", "method.max_gap=1e-9", "max_gap=1e-09: energies of data and chains ran apart"),
    ],
)
def test_a_device_stops_a_diverged_run_where_it_diverged(name, word, match, tmp_path, monkeypatch):
    """It is found out at the next logged step, with the weights of the step that diverged."""
    monkeypatch.setattr(host_reads, "COMMON", (*host_reads.COMMON, word))
    with pytest.raises(RuntimeError, match=match):
        host_reads.train(name, tmp_path)
