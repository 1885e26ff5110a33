import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import genmodels
import train
from genmodels import distributed
from genmodels.checkpoint import read_checkpoint, weights_hash
from genmodels.methods import ddo
from genmodels.methods.ddo import DDO
from genmodels.run import Run
from genmodels.training import judge, selfplay
from genmodels.training.callbacks import EMA
from tests.helpers.paths import ROOT
from tests.helpers.processes import once, together
from tests.helpers.tiny import last_words

SMALL = [  # the network is the base's, which init= brings along
    "trainer.progress=false",
    "trainer.loggers=csv",
    "trainer.accelerator=cpu",
]
ROUND = [
    "method.steps=2",
    "method.betas=60",
    "method.search=all",
    "method.pool=24",
    "method.shard=8",
    "data.batch_size=8",
    "trainer.max_steps=4",
    "eval.every=2",
    "eval.num=64",
    "optim.rampup=0",
    "optim.lr=1e-4",
    "checkpoint.every=1",
]
DDO_DIGITS = str(ROOT / "configs" / "ddo_digits.yaml")


@pytest.fixture(scope="module")
def base(train_tiny):
    """A tiny trained EDM with labels."""
    return train_tiny(
        "data.labels=true",
        "method.label_dropout=0",
        "trainer.max_steps=30",
        "optim.lr=3e-3",
        "ema.half_life=0",
    )


def argv(base, out, *words):
    return last_words([DDO_DIGITS, *SMALL, *ROUND, f"init={base}", f"out_dir={out}", *words])


def play(base, out, *words):
    assert train.main(argv(base, out, *words)) == 0
    (run,) = out.glob("*/*")
    return run


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """A self-play of two rounds that nothing stopped."""
    return play(base, tmp_path_factory.mktemp("straight"), *TWO)


TWO = ("method.rounds=2", "method.alphas=1,4", "method.patience=0")


def state(run, number=1):
    return json.loads((run / f"round-{number:02d}" / "state.json").read_text())


def timeless(value):
    """The same without seconds and without the place of the run."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value.split("/round-")[-1] if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------
# What a self-play leaves behind


def test_the_run_folder(straight):
    model = genmodels.load(straight)
    assert type(model) is DDO
    winner = state(straight, 2)["winner"]
    last = straight / f"round-{2 if winner['step'] else 1:02d}" / "winner.ckpt"
    assert (straight / "checkpoints" / "last.ckpt").read_bytes() == last.read_bytes()
    assert not list(straight.glob("**/pool")) and not list(straight.glob("round-*/*/checkpoints"))
    assert len(list((straight / "samples").glob("round-*.png"))) == 2
    assert "round-02 winner" in (straight / "report.html").read_text()
    with open(straight / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3  # rounds, candidates, steps 0, 2 and 4
    first = [row for row in rows if row["round"] == "1" and row["alpha"] == "4.0"]
    curve = state(straight)["candidates"][1]["curve"]
    assert [float(row["fd"]) for row in first[1:]] == [entry["fd"] for entry in curve]


def test_the_state_of_a_round(straight, base):
    first, second = state(straight), state(straight, 2)
    source = genmodels.load(base)
    assert first["reference"] == {"model": str(base), "sha256": weights_hash(source)}
    winner = genmodels.load(straight / "round-01" / "winner.ckpt")
    assert second["reference"]["sha256"] == weights_hash(winner)
    assert winner.cfg.method.reference == first["reference"]["sha256"]  # in the checkpoint
    values = [e["fd"] for c in first["candidates"] for e in c["curve"]] + [first["start"]["fd"]]
    assert first["winner"]["fd"] == min(values)
    assert [(c["alpha"], c["beta"]) for c in first["candidates"]] == [(1.0, 60.0), (4.0, 60.0)]
    for part in (first, second):
        assert {"value", "stderr"} == set(part["final"]["winner"]["fd"])
    ranges = [
        (first["pool"]["seeds"], 24),
        (second["pool"]["seeds"], 24),
        (first["score"]["seeds"], 64),
        (0, 64),
    ]
    drawn = [seed for start, count in ranges for seed in range(start, start + count)]
    assert len(set(drawn)) == len(drawn) and max(drawn) < 2**32  # generators take them modulo 2^32


def test_seeds_of_pools_and_choices_never_meet():
    pools = {(64 * seed + number) % 256 for seed in range(4) for number in range(1, 65)}
    assert len(pools) == 4 * 64
    assert selfplay.POOL_SEEDS + 256 * judge.SEEDS <= judge.CHOOSING_SEEDS
    assert judge.CHOOSING_SEEDS + 256 * judge.SEEDS <= 2**32


def test_a_candidate_is_an_ordinary_run_without_the_reference(base, tmp_path, monkeypatch):
    """Its checkpoint has an EDM's tensors, the average and the optimizer hold no others."""
    original, seen = EMA.on_train_batch_end, []

    def spy(self, trainer, module, *args):
        own = self._average_model.module
        seen.append((own.frozen is module.frozen, weights_hash(module.frozen.model)))
        return original(self, trainer, module, *args)

    monkeypatch.setattr(EMA, "on_train_batch_end", spy)
    kept = {}

    def keep(path, **options):
        saved = [read_checkpoint(p) for p in path.glob("last.ckpt")] if path.is_dir() else []
        kept.update({"last": saved[0]} if saved and "optimizer_states" in saved[0] else {})

    monkeypatch.setattr(shutil, "rmtree", keep)
    run = play(base, tmp_path, "method.p_stds=1.7,2", "method.rounds=1", "trainer.log_every=1")
    digest = weights_hash(genmodels.load(base))
    assert set(seen) == {(True, digest)}  # never copied, never changed
    names = set(genmodels.load(base).state_dict())
    assert set(kept["last"]["state_dict"]) == names == set(kept["last"]["current_model_state"])
    assert len(kept["last"]["optimizer_states"][0]["state"]) == len(names)
    config = (run / "round-01" / "alpha4-beta60" / "config.yaml").read_text()
    assert f"reference: {digest}" in config and "p_std: 1.7" in config
    assert kept["last"]["hyper_parameters"]["config"]["method"]["p_std"] == 1.7
    with open(run / "round-01" / "alpha4-beta60" / "metrics.csv") as file:
        header = file.readline()
    for name in ("delta_real", "delta_fake_std", "accuracy", "saturated", "edm_loss"):
        assert f"train/{name}" in header


def test_evaluate_and_sample_take_the_run(straight, tmp_path):
    import evaluate
    import sample

    assert sample.main([str(straight), "num=4", "steps=2", f"out={tmp_path / 'a'}"]) == 0
    assert (
        evaluate.main(
            [str(straight), "num=8", "steps=2", "resamples=0", f"out={tmp_path / 'b.json'}"]
        )
        == 0
    )
    export = tmp_path / "export"
    genmodels.checkpoint.export(straight, export)
    assert genmodels.load(export).cfg.method.name == "ddo"


# ------------------------------------------------------------------------------------------------
# Stopping and going on


POINTS = (
    "round-01/pool/shard-00000.npz",
    "round-01/alpha1-beta60/checkpoints/step-00000001.ckpt",
    "round-01/scored/alpha1-beta60-step2-*/shard-00000.npz",
    "round-01/alpha1-beta60/best.ckpt",
    "round-02/pool/shard-00001.npz",
)


@pytest.mark.slow
def test_kill_9_at_several_points_and_the_same_command_again(base, straight, tmp_path):
    """Each time the file appears the process is killed; the last command runs to the end."""
    out = tmp_path / "runs"
    for point in POINTS:
        there = partial(lambda point: list(out.glob(f"*/*/{point}")), point)
        during = once(there, lambda processes: os.kill(processes[0], signal.SIGKILL))
        (ended,) = together(argv(base, out, *TWO), tmp_path, devices=1, during=during)
        assert ended.code == -signal.SIGKILL
    run = play(base, out, *TWO)  # the same folder: play() finds exactly one
    for number in (1, 2):
        assert timeless(state(run, number)) == timeless(state(straight, number))
    ours, theirs = (genmodels.load(folder) for folder in (run, straight))
    assert weights_hash(ours) == weights_hash(theirs)
    assert (run / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_max_time_stops_and_resume_goes_on(base, tmp_path, capsys):
    words = ("method.rounds=1", "trainer.max_time=0.01s")
    run = play(base, tmp_path, *words)
    output = capsys.readouterr().out
    assert f"python train.py resume={run}" in output and output.endswith(f"run: {run}\n")
    assert type(genmodels.load(run)) is DDO  # the reference, so far
    assert train.main([f"resume={run}", "trainer.max_time=", "method.rounds=1"]) == 0
    assert state(run)["winner"]
    assert train.main([f"resume={run}", "method.rounds=2"]) == 0  # another round on top
    assert bool(state(run)["winner"]["step"]) == (run / "round-02").is_dir()


def test_a_finished_command_starts_anew(straight):
    assert selfplay._finished(Run(straight), 2)
    assert not selfplay._finished(Run(straight / "none"), 1)
    assert selfplay._finished(Run(straight), 3) == (state(straight, 2)["winner"]["step"] == 0)


def test_a_second_process_is_refused(straight, capsys):
    with Run(straight).lock():
        assert train.main([f"resume={straight}"]) == 2
    assert "another process is at work there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["init="], "init=: DDO finetunes a trained model"),
        (["method.sigma_data=0.5"], "method.sigma_data=0.5: init=.* was trained with 0.75"),
        (["network.channels=[8,8]", "network.norm_groups=4"], "init=.*use the network"),
        (["eval.metrics=nn1_fake"], "eval.metrics=nn1_fake: .*one of fd"),
        (["eval.metrics="], "metrics=: name some of fd"),
        (["trainer.precision=bf16-mixed"], "use 32-true"),
        (["method.label_dropout=0.1"], "method.label_dropout=0.1: init=.*every image; use 0"),
    ],
)
def test_refused_in_one_line(base, tmp_path, capsys, words, message):
    assert train.main(argv(base, tmp_path, *words)) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: init=") for note in notes)  # what init= brought
    assert error.startswith("error: ") and re.search(message, error), error
    assert not list(tmp_path.iterdir())  # nothing is left of it


def test_another_reference_under_the_same_name_is_refused(base, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "round-02" / "state.json").unlink()
    path = run / "round-01" / "state.json"
    path.write_text(json.dumps(state(run) | {"winner": None}))
    checkpoint = read_checkpoint(base / "checkpoints" / "last.ckpt")
    first = next(iter(checkpoint["state_dict"].values()))
    first += 1.0
    torch.save(checkpoint, tmp_path / "other.ckpt")
    config = (
        (run / "config.yaml").read_text().replace(f"init: {base}", f"init: {tmp_path}/other.ckpt")
    )
    (run / "config.yaml").write_text(config)
    assert train.main([f"resume={run}"]) == 2
    assert "its weights are not those that round 1 was begun with" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Its parts


def play_of(curve, patience=2, metric="fd", steps=100):
    """A SelfPlay that knows only its scores."""
    own = selfplay.SelfPlay.__new__(selfplay.SelfPlay)
    method, trainer = SimpleNamespace(patience=patience), SimpleNamespace(max_steps=steps)
    own.cfg, own.metric = SimpleNamespace(method=method, trainer=trainer), metric
    own.judge = judge.Judge.__new__(judge.Judge)
    own.judge.metric, own.state = metric, {"start": {"step": 0, metric: curve[0]}}
    return own, [{"step": 10 * i, metric: value} for i, value in enumerate(curve)][1:]


@pytest.mark.parametrize(
    "curve, patience, stops",
    [
        ((3, 2, 1), 2, False),
        ((3, 2, 2.1, 2.2), 2, True),
        ((3, 2, 2.1, 2.05, 2.2), 2, False),
        ((1, 2, 3), 2, True),
        ((3, 2, 2.1), 1, True),
        ((1, 2, 3, 4), 0, False),
        ((3, 4), 2, False),
    ],
)
def test_stops_when_the_score_rises_twice(curve, patience, stops):
    own, entries = play_of(curve, patience)
    assert bool(own.end(entries)) == stops


@pytest.mark.parametrize(
    "count, every, search, rungs",
    [
        (4, 25, "all", [(200, 4)]),
        (1, 25, "halving", [(200, 1)]),
        (2, 25, "halving", [(100, 1), (200, 2)]),
        (4, 25, "halving", [(50, 2), (100, 1), (200, 4)]),
        (5, 25, "halving", [(25, 3), (50, 2), (100, 1), (200, 5)]),
        (4, 60, "halving", [(60, 2), (120, 1), (200, 4)]),
        (4, 0, "halving", [(50, 2), (100, 1), (200, 4)]),
        (20, 500, "halving", [(12500, 20)]),
    ],
)
def test_rungs_of_halving(count, every, search, rungs):
    own, _ = play_of((3, 2), steps=rungs[-1][0])
    own.cfg.eval, own.cfg.method.search = SimpleNamespace(every=every), search
    own.state["candidates"] = [{}] * count
    if count == 20:  # 391, 782, 1563, 3125 and 6250, rounded up to where a score is
        rungs = [(500, 10), (1000, 5), (2000, 3), (3500, 2), (6500, 1), (12500, 20)]
    assert own.rungs() == rungs


def test_the_worst_by_their_latest_scores_are_dropped():
    own, _ = play_of((3, 2))
    curves = {"a": [1, 4], "b": [5, 2], "c": [9], "d": [3, 3]}
    own.state["candidates"] = [
        {"name": n, "curve": [{"fd": v} for v in c], "end": "diverged" if n == "c" else ""}
        for n, c in curves.items()
    ]
    own.state["round"], own.first = 1, False
    own.drop(20, 3)
    assert [c["end"] for c in own.state["candidates"]] == ["", "", "diverged", ""]
    own.drop(20, 1)
    dropped = "not among the best 1 at step 20"
    assert [c["end"] for c in own.state["candidates"]] == [dropped, "", "diverged", dropped]


@pytest.mark.slow
def test_halving_ends_the_worst_and_goes_on_where_it_was(base, tmp_path, monkeypatch):
    """Of four pairs two go on behind step 1 and one behind step 2; killed in between, the same."""
    words = ("method.search=halving", "method.alphas=1,2,4,8", "method.rounds=1", "eval.every=1")
    words += ("method.patience=0", "optim.lr=3e-3")  # so that the pairs differ
    run = play(base, tmp_path / "a", *words)
    curves = {c["name"]: [e["fd"] for e in c["curve"]] for c in state(run)["candidates"]}
    assert sorted(map(len, curves.values())) == [1, 1, 2, 4]
    for step in (1, 2):
        going = {name: curve[step - 1] for name, curve in curves.items() if len(curve) >= step}
        best = sorted(going, key=going.get)[: 2 // step]
        assert set(best) == {name for name, curve in curves.items() if len(curve) > step}
    ends = sorted(candidate["end"] for candidate in state(run)["candidates"])
    assert ends[:1] == ["end of the round"] and ends[1] == "not among the best 1 at step 2"

    stops = [(1, "before"), (2, "after")]
    original = selfplay.SelfPlay.drop

    def drop(self, step, keep):
        if stops and stops[0] == (step, "before"):
            stops.pop(0)
            raise KeyboardInterrupt
        original(self, step, keep)
        if stops and stops[0] == (step, "after"):
            stops.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(selfplay.SelfPlay, "drop", drop)
    command = argv(base, tmp_path / "b", *words)
    assert [train.main(command) for _ in range(3)] == [130, 130, 0] and not stops
    (other,) = (tmp_path / "b").glob("*/*")
    assert timeless(state(other)) == timeless(state(run))


def test_the_end_of_a_round_and_the_distance_of_nn1():
    own, entries = play_of((3, 2), steps=10)
    assert own.end(entries) == "end of the round"
    own, entries = play_of((0.4, 0.55, 0.46), metric="nn1")  # 0.1, 0.05, 0.04 from one half
    assert not own.end(entries) and [own.judge.distance(e) for e in entries] == pytest.approx(
        [0.05, 0.04]
    )


@pytest.mark.parametrize("every, scored", [(100, [50, 100, 200, 300]), (25, [50, 75, 100])])
def test_another_eval_every_goes_on_behind_the_last_score(every, scored):
    own, (entry,) = play_of((3, 2), steps=300 if every == 100 else 100)
    own.cfg.eval, own.first = SimpleNamespace(every=every), True
    own.state["candidates"] = [{"name": "a", "curve": [entry | {"step": 50}], "end": ""}]
    own.train_to = lambda *args: None
    own.score = lambda candidate, step: {"step": step, "fd": 1 / step}
    own.forget = lambda name: None
    own.settle = lambda change, *keys: change(own.state)
    own.finetune(0, None, own.cfg.trainer.max_steps)
    (candidate,) = own.state["candidates"]
    assert [entry["step"] for entry in candidate["curve"]] == scored
    assert candidate["end"] == "end of the round"


def test_a_candidate_whose_images_are_not_finite_ends_alone(base, tmp_path, monkeypatch):
    """Of two pairs the other one goes on, and the state can be read again."""
    original = judge.Judge.score

    def score(self, model, folder):
        if model.cfg.method.alphas == [1.0] and model.cfg.method.reference:
            model.net.net.unet.conv_out.bias.data.fill_(math.nan)
        return original(self, model, folder)

    monkeypatch.setattr(judge.Judge, "score", score)
    run = play(base, tmp_path, "method.rounds=1", "method.alphas=1,4", "method.patience=0")
    first, second = state(run)["candidates"]
    assert first["end"] == "diverged: non-finite images" and len(first["curve"]) == 1
    assert second["end"] == "end of the round" and state(run)["winner"]["name"] != first["name"]


def test_only_a_process_alone_stops_by_its_own_clock(monkeypatch):
    own, _ = play_of((3, 2))
    own.deadline, own.first, own.run = -math.inf, False, Run(Path("run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    own.pause_if_late()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(selfplay.Paused):
        own.pause_if_late()


def test_scored_models_are_in_eval_mode(base, monkeypatch):
    seen = []
    monkeypatch.setattr(
        judge.generation, "generate_all", lambda model, *a, **k: seen.append(model.training)
    )
    own = judge.Judge.__new__(judge.Judge)
    own.data = SimpleNamespace(train=(None, torch.arange(10)))
    own.generate(genmodels.load(base).train(), range(2))
    assert seen == [False]


@pytest.mark.slow
def test_two_processes_play_to_the_same_scores(base, tmp_path):
    """Both train and make images; one scores. Rounding apart, it is what one process does."""
    words = (
        "method.rounds=2",
        "method.alphas=1",
        "method.patience=0",
        "optim.eps=1e-2",
        "eval.num=64",
    )
    one = play(base, tmp_path / "one", *words)
    two = tmp_path / "two"
    command = [sys.executable, "train.py", *argv(base, two, *words), "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500)
    (run,) = two.glob("*/*")
    for number in (1, 2):
        curves = [[e["fd"] for e in state(f, number)["candidates"][0]["curve"]] for f in (one, run)]
        assert curves[0] == pytest.approx(curves[1], rel=0.02)


@pytest.mark.slow
def test_halving_on_two_processes_trains_each_candidate_on_both(base, tmp_path, monkeypatch):
    """Half of every batch on each; the same pairs go on as with one process, to the same scores."""
    words = ("method.search=halving", "method.alphas=1,2,4,8", "method.rounds=1", "eval.every=1")
    words += ("method.patience=0", "optim.lr=3e-3", "optim.eps=1e-2")
    original = ddo.Discriminative.loss

    def loss(self, batch):
        if "fake" in batch:
            pair, numbers = self.cfg.method.alphas[0], batch["n"].tolist()
            with open(tmp_path / f"rank-{distributed.rank()}-trained", "a") as file:
                file.write(json.dumps([pair, self.global_step, sorted(numbers)]) + "\n")
        return original(self, batch)

    monkeypatch.setattr(ddo.Discriminative, "loss", loss)

    def trained(rank):
        path = tmp_path / f"rank-{rank}-trained"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return {(pair, step): numbers for pair, step, numbers in rows}

    one = play(base, tmp_path / "one", *words)
    alone = trained(0)
    ended = together([*argv(base, tmp_path / "two", *words), "trainer.devices=2"], tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].text + ended[1].text
    (two,) = (tmp_path / "two").glob("*/*")
    for one_of, other in zip(state(one)["candidates"], state(two)["candidates"]):
        assert one_of["end"] == other["end"]
        curves = [[entry["fd"] for entry in each["curve"]] for each in (one_of, other)]
        assert curves[0] == pytest.approx(curves[1], rel=0.02)
    shares = [trained(0), trained(1)]
    assert len(alone) == 4 + 2 + 1 + 1  # steps: of four pairs, of two, and two of the last one
    assert shares[0].keys() == shares[1].keys() == alone.keys()
    for key, numbers in alone.items():
        assert len(shares[0][key]) == len(shares[1][key]) == len(numbers) / 2
        assert sorted(shares[0][key] + shares[1][key]) == numbers
