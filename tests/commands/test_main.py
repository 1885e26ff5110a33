"""The command genmodels: its table, its help, configs and models by name, the newest run."""

import shutil
import subprocess
import sys
from importlib import import_module

import pytest

import evaluate
import genmodels
import sample
import train
from genmodels import checkpoint, cli
from genmodels.commands.main import COMMANDS, main
from genmodels.config.load import read_yaml
from genmodels.config.shipped import CONFIGS, MODELS, shipped
from genmodels.run import Run
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

IMPORTED = """
import sys
import genmodels.__main__
from genmodels.commands.main import main
assert main(["--help"]) == 0
print(*{"torch", "omegaconf", "numpy", "lightning", "diffusers"} & set(sys.modules), "none")
"""


def test_the_help_page_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *page, heavy = done.stdout.splitlines()
    assert (done.returncode, heavy) == (0, "none"), done.stderr
    for word in COMMANDS:
        assert any(line.startswith(f"  {word} ") for line in page), word


def test_every_command_of_the_page_is_one(capsys):
    assert main([]) == 0
    called = [line.split() for line in capsys.readouterr().out.splitlines() if line[:4] == "    "]
    assert len(called) > 5
    for name, word, *_ in called:
        assert name == "genmodels" and word in COMMANDS


@pytest.mark.parametrize("word", COMMANDS)
def test_help_of_each_command_speaks_of_the_command(word, capsys):
    """Not of scripts that only a clone has."""
    assert main([word, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"genmodels {word}" in text
    for other in ("train.py", "sample.py", "evaluate.py", "python -m"):
        assert other not in text.replace("python -m genmodels.diffusers_export", ""), other


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "command=trian: did you mean train? choose from train, sample, "),
        (["--verbose"], "command=--verbose: choose from train, sample, "),
        (["x=1"], "command=x=1: choose from train, "),
        (["train", "edm_digit"], "config=edm_digit: no such file; did you mean edm_digits?"),
        (["train", "seed=1"], "config=: name a file, e.g. genmodels train edm_digits\n"),
        (["sample", "noise2score_gray"], "exported folder; did you mean noise2score_grey?"),
        (["sample", "cdrl_digits"], "a config has this name (genmodels train cdrl_digits makes a "),
        (["export"], "usage: genmodels export MODEL out=DIR"),
        (["checkpoint"], "usage: genmodels checkpoint MODEL out=DIR"),
        (["export", "x", "out=y", "format=onnx"], "format=onnx: choose from genmodels, diffusers"),
        (["export", "x", "out=y", "format=diffusers", "half=true"], "half=True: is not for format"),
        (["config", "edm_digit"], "config=edm_digit: is none that comes along; did you mean edm_d"),
        (["config", "out=x.yaml"], "config=: name one"),
        (["config", "edm_digits", "to=x.yaml"], "unknown key to=x.yaml: "),
    ],
)
def test_mistakes_are_one_line(argv, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and line in error, error
    assert not list(tmp_path.iterdir())


def test_rows_of_the_table_can_be_called():
    for command in COMMANDS.values():
        module, function = command.runs.split(":")
        assert callable(getattr(import_module(module), function))
        if command.clone.endswith(".py"):
            assert (ROOT / command.clone).is_file()
        elif command.clone:
            import_module(command.clone)


def test_texts_call_commands_as_the_user_does(capsys):
    texts = {
        "go on with python train.py resume=runs/x": "go on with G train resume=runs/x",
        "python train.py configs/edm_digits.yaml configs/debug.yaml a=b": "G train edm_digits debug"
        " a=b",
        "python train.py runs/x/config.yaml init=y": "G train runs/x/config.yaml init=y",
        "torchrun --nproc_per_node 2 sample.py RUN": "torchrun --nproc_per_node 2 -m genmodels"
        " sample RUN",
        "srun --nodes 1 python train.py ...": "srun --nodes 1 G train ...",
        "(evaluate.py --help lists them)": "(G evaluate --help lists them)",
        "python -m genmodels.data convert x": "G data convert x",
        "python -m genmodels.checkpoint M": "G checkpoint M",
        "python -m genmodels.diffusers_export M": "python -m genmodels.diffusers_export M",
        'File "/a/genmodels/commands/train.py"': 'File "/a/genmodels/commands/train.py"',
        "my-train.py, x/sample.py, retrain.py": "my-train.py, x/sample.py, retrain.py",
        "configs/edm_digits.yaml": "configs/edm_digits.yaml",
    }
    for name in ("genmodels", "python -m genmodels"):
        for text, wanted in texts.items():
            names = {c.clone: f"{name} {word}" for word, c in COMMANDS.items() if c.clone}
            assert cli.run(lambda _, text=text: print(text, end=""), [], names) == 0
            assert capsys.readouterr().out == wanted.replace("G ", f"{name} ")
            assert cli.as_called(text) == text  # outside of a command


# ------------------------------------------------------------------------------------------------
# Configs by name


def test_a_config_is_copied_by_its_name_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "edm_digits"]) == 0
    printed = capsys.readouterr().out
    assert main(["config", "edm_digits", "out=my.yaml"]) == 0
    assert (tmp_path / "my.yaml").read_text() == printed
    assert "# Command:  genmodels train edm_digits" in printed
    original = ROOT / "configs/edm_digits.yaml"
    assert read_yaml("my.yaml") == read_yaml("edm_digits") == read_yaml(original)
    assert main(["config", "edm_digits", "out=my.yaml"]) == 2  # it is there
    assert main(["config", "edm_digits", "out=no/my.yaml"]) == 2
    capsys.readouterr()
    words = ["edm_digits", "debug", *TINY, "trainer.max_steps=1", "name=x"]
    assert main(["train", *words]) == 0
    (run,) = (tmp_path / "runs/x").iterdir()
    assert capsys.readouterr().out.endswith(f"run: {run.relative_to(tmp_path)}\n")


def test_a_path_that_exists_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edm_digits").write_text("name: mine")
    assert read_yaml("edm_digits") == {"name": "mine"}
    (tmp_path / "noise2score_grey").mkdir()
    with pytest.raises(ValueError, match="model=noise2score_grey: is no run folder"):
        genmodels.load("noise2score_grey")


def test_what_comes_along_is_listed(capsys):
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in [*shipped(CONFIGS), *shipped(MODELS)]:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert {"edm_digits", "debug"} < set(shipped(CONFIGS)) and "noise2score_grey" in shipped(MODELS)


# ------------------------------------------------------------------------------------------------
# Models by name, and the newest of several runs


@pytest.fixture
def runs(tiny_run, tmp_path):
    """A folder of three runs: an old one, the newest, and one that has saved nothing yet."""
    folder = tmp_path / "runs/edm_digits"
    for name in ("20260101-000000", "20260102-000000", "20260102-000000-2", "best"):
        shutil.copytree(tiny_run, folder / name)
    shutil.rmtree(folder / "20260102-000000-2/checkpoints")
    (folder / "20260102-000000-2/checkpoints").mkdir()
    return folder


def test_the_newest_of_several_runs_is_taken_and_said(runs, tmp_path, capsys, monkeypatch):
    newest = runs / "20260102-000000"
    assert Run.newest(runs) == Run(newest)
    note = f"note: model={runs}: is a folder of runs; its newest is {newest}\n"
    assert sample.main([str(runs), "num=1", "steps=1", f"out={tmp_path}/a"]) == 0
    assert capsys.readouterr().err.count(note) == 1
    words = ["data=digits:test", "num=8", "steps=1", "metrics=fd", "resamples=2"]
    assert evaluate.main([str(runs), *words, f"out={tmp_path}/a.json"]) == 0
    assert capsys.readouterr().err.count(note) == 1
    assert str(newest) in (tmp_path / "a.json").read_text()
    assert main(["export", str(runs), f"out={tmp_path}/export"]) == 0
    assert capsys.readouterr().err.count(note) == 1
    assert "4 steps of 8 images" in (tmp_path / "export/README.md").read_text()
    assert train.main([f"resume={runs}"]) == 2  # what is written to is named in full
    assert f"give the folder of a run; its newest is {newest}" in capsys.readouterr().err


def test_a_run_or_an_export_is_not_looked_into(tiny_run):
    assert checkpoint.newest_run(tiny_run) == tiny_run
    assert checkpoint.newest_run("nowhere") == "nowhere"
    assert checkpoint.newest_run(tiny_run / "checkpoints") == tiny_run / "checkpoints"
