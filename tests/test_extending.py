"""The recipes of docs/extending.md, performed as they stand there: code, rows and commands."""

import gzip
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import genmodels
import sample
import train
from genmodels import cli
from genmodels.checkpoint.__main__ import main as export_main
from genmodels.data import commands as data_commands
from genmodels.evaluation.scorer import metrics_help
from genmodels.networks import NETWORKS
from genmodels.noise import LAWS
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

PAGE = (ROOT / "docs/extending.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
DEBUG = ["configs/debug.yaml", "trainer.max_steps=1", "sample.every=0", "trainer.progress=false"]
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train.py": train.main,
    "sample.py": sample.main,
    "evaluate.py": evaluate.main,
    "-m genmodels.data": lambda argv: cli.run(data_commands.main, argv),
    "-m genmodels.checkpoint": lambda argv: cli.run(export_main, argv),
}


class Recipe:
    """A section of the page: `namespace` has its code, `folder` its configs and what it makes."""

    def __init__(self, title, folder, monkeypatch, capsys):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", RECIPES[title], re.S | re.M)
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.namespace = {}
        self.code = [text for language, text in blocks if language == "python"]
        self.lines = [
            line.partition("  #")[0].strip()
            for language, text in blocks
            if not language
            for line in text.splitlines()
        ]
        for language, text in blocks:
            if language == "yaml":
                name = re.search(r"^# Command:  python train.py (\S+)$", text, re.M)[1]
                (folder / name).write_text(text)

    def add(self):
        """Execute the files and add the rows, until the test ends."""
        for text in self.code:
            what = re.match(r"# (?:(\w+) in )?(genmodels/\S+\.py)\n", text)
            table, name = what[1], module_name(what[2])
            if table is None and (ROOT / what[2]).exists():  # more lines for a file that is there
                self.namespace |= vars(importlib.import_module(name))
                exec(text, self.namespace)
            elif table is None:
                module = types.ModuleType(name)
                self.monkeypatch.setitem(sys.modules, name, module)
                exec(text, vars(module))
                self.namespace |= vars(module)
            else:
                owner = vars(importlib.import_module(name))
                for key, row in eval(f"{{{text}}}", owner | self.namespace).items():
                    self.monkeypatch.setitem(owner[table], key, row)
        return self

    def run(self, *, train=(), sample=(), evaluate=(), **words):
        """Run the commands in turn and return what each printed.

        Args:
            train, sample, evaluate: words added to the commands of these scripts.
            words: what a capital word of the page stands for.
        """
        more = {"sample.py": sample, "evaluate.py": evaluate}
        printed = []
        for line in self.lines:
            script = next(name for name in COMMANDS if line.startswith(f"python {name} "))
            argv = shlex.split(line.removeprefix(f"python {script} "))
            for name, value in words.items():
                argv = [re.sub(rf"(^|=){name}$", rf"\g<1>{value}", word) for word in argv]
            if argv[0].startswith("resume="):
                argv += ["trainer.max_steps=2"]
            elif argv != ["--help"]:
                argv += [*DEBUG, *train] if script == "train.py" else more.get(script, ())
            argv = last_words(argv)
            assert COMMANDS[script](argv) == 0, self.capsys.readouterr().err
            printed.append(self.capsys.readouterr().out)
            if script == "train.py":
                words["RUN"] = printed[-1].splitlines()[-1].removeprefix("run: ")
        return printed


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path / "data"))
    return lambda title: Recipe(title, tmp_path, monkeypatch, capsys)


def test_every_recipe_of_the_page_is_performed():
    here = Path(__file__).read_text()
    assert len(RECIPES) == 6
    assert [title for title in RECIPES if f'recipe("{title}")' not in here] == []


def test_the_new_files_are_written_as_the_package_is():
    blocks = re.findall(r"^```python\n(# (genmodels/\S+)\n\"{3}.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == 3
    for text, path in blocks:
        for words in (["check", "-q"], ["format", "--check", "-q"]):
            command = [sys.executable, "-m", "ruff", *words, "--stdin-filename", path, "-"]
            done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, (path, done.stdout, done.stderr)


def test_a_method(recipe):
    done = recipe("A method").add()
    done.run(
        train=TINY,
        sample=["num=4", "steps=2"],
        evaluate=["num=40", "steps=2", "resamples=2", "out=scores.json"],
    )
    assert len(list((done.folder / "samples").glob("00*.png"))) == 4
    scores = json.loads((done.folder / "scores.json").read_text())["metrics"]
    assert scores.keys() == {"nn1", "fd"}
    model = genmodels.load(done.folder / "exported")
    torch.testing.assert_close(model.sample([3, 5], steps=2)[1:], model.sample([5], steps=2))
    # The velocity towards one image is known, and Euler's straight steps then lead to it.
    image = model.sample([0], steps=1).detach()
    model.net = Towards(image)
    batch = {"image": image.expand(8, -1, -1, -1), "label": torch.full((8,), -1)}
    loss, _ = model.loss(batch | {"n": torch.arange(8)})
    assert float(loss) < 1e-6
    torch.testing.assert_close(model.sample([1, 2], steps=5), image.expand(2, -1, -1, -1))


class Towards(torch.nn.Module):
    """The velocity where all data are one image: (x - image) / t."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x, t, labels):
        return (x - self.image) / t.reshape(-1, 1, 1, 1)


def test_a_network(recipe):
    done = recipe("A network").add()
    done.run(sample=["num=4", "steps=2"])
    assert len(list((done.folder / "samples").glob("00*.png"))) == 4
    net = NETWORKS["convnet"](NETWORKS["convnet"].Config(), (3, 8, 8))
    assert net(torch.zeros(2, 3, 5, 7), torch.zeros(2)).shape == (2, 3, 5, 7)
    assert train.main(["configs/edm_convnet.yaml", "network.width=0"]) == 2
    assert "network.width=0: must be >= 1" in done.capsys.readouterr().err


def test_a_metric(recipe):
    done = recipe("A metric").add()
    done.run(evaluate=["resamples=3"])
    assert "spread: variance of the features over that of the real ones" in metrics_help()
    scores = json.loads((done.folder / "scores.json").read_text())["metrics"]
    assert list(scores) == ["spread", "fd"]
    assert 0.8 < scores["spread"]["value"] < 1.2 and scores["spread"]["stderr"] > 0
    rows = torch.randn(50, 3)
    assert done.namespace["spread"](rows, rows) == 1
    assert done.namespace["spread"](rows / 2 + 5, rows) == pytest.approx(0.25)


def test_a_data_set(recipe):
    done = recipe("A data set").add()
    raw = done.folder / "data/KMNIST/raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 10)):
        pixels = np.arange(count * 784).reshape(count, 28, 28)
        write_idx(raw / f"{stem}-images-idx3-ubyte.gz", pixels)
        write_idx(raw / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    shown = done.run(train=TINY, evaluate=["resamples=0"])
    assert "800" in shown[0] and "20" in shown[1]
    bars = np.load(done.folder / "bars.npy")
    assert bars.shape == (800, 8, 8, 1) and bars.sum() == 800 * 8 * 255
    assert np.load(done.folder / "bars_labels.npy").tolist() == [k % 8 for k in range(800)]


def write_idx(path, values):
    """Write bytes as MNIST's files have them: their number of axes, lengths, values."""
    sizes = np.array(values.shape, ">i4").tobytes()
    head = bytes([0, 0, 8, values.ndim]) + sizes
    path.write_bytes(gzip.compress(head + (values % 256).astype(np.uint8).tobytes()))


def test_a_noise_law(recipe):
    done = recipe("A noise law").add()
    pictures = done.folder / "pictures"
    pictures.mkdir()
    ramp = np.linspace(60, 200, 64)[:, None] + np.zeros(64)
    for k in range(2):
        Image.fromarray(np.rot90(ramp, k).astype(np.uint8)).save(pictures / f"{k}.png")
    done.run(
        train=[
            "data.name=imagefolder",
            f"data.root={pictures}",
            "data.holdout=0.5",
            "data.patch=16",
            "network.channels=[4]",
            "network.blocks=[1]",
        ],
        PICTURES=pictures,
    )
    assert {path.name for path in (done.folder / "restored").glob("*.png")} >= {"0.png", "1.png"}


@pytest.mark.parametrize("k", [0.8, 2.0, 8.0])
def test_the_estimate_of_the_law_is_a_posterior_mean(recipe, k):
    """Against the sum over a prior of 2000 points, and the spread of the noise it draws."""
    recipe("A noise law").add()
    law = LAWS["weibull"]
    x = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    y = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    log_p = math.log(k) + (k - 1) * y[:, None].log() - k * x.log() - (y[:, None] / x) ** k
    (s,) = torch.autograd.grad(log_p.logsumexp(1).sum(), y)
    weights = (log_p - log_p.logsumexp(1, keepdim=True)).exp().detach()
    wanted = (weights @ x**-k) ** (-1 / k)
    torch.testing.assert_close(law.estimate(y.detach(), s, k), wanted, rtol=1e-6, atol=0)
    noisy = law.sample(np.full(200_000, 0.5), k, np.random.default_rng(0))
    assert np.log(noisy).std() == pytest.approx(law.state_std(k), rel=0.02)
    assert law.from_state_std(law.state_std(k)) == pytest.approx(k)


def test_an_option_of_a_command(recipe, tiny_run):
    """The two blocks are put into the command's source where the page says."""
    done = recipe("An option of a command")
    field, use = (re.sub(r"^# .*\n", "", text) for text in done.code)
    source = (ROOT / "genmodels/commands/sample.py").read_text()
    for start, lines in (
        (r"^class GenerateOptions\(Section\):\n    \"\"\".*?\"\"\"\n", field),
        (r"^def generate\(.*?:\n    \"\"\".*?\"\"\"\n", use),
    ):
        at = re.search(start, source, re.S | re.M).end()
        source = source[:at] + textwrap.indent(lines, "    ") + source[at:]
    module = types.ModuleType("genmodels.commands.sample")
    done.monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, vars(module))
    done.monkeypatch.setitem(COMMANDS, "sample.py", module.main)
    shown, help_page = done.run(RUN=tiny_run)
    assert shown == "5 images: samples\n" and not (done.folder / "samples").exists()
    assert "dry=false" in help_page and "say what would be made, make nothing" in help_page
    assert module.main([str(tiny_run), "dry=perhaps"]) == 2
    assert "dry=perhaps: must be true or false" in done.capsys.readouterr().err
    assert module.main([str(tiny_run), f"denoise={done.folder}", "dry=true"]) == 2
    assert "dry=true: denoise= does not take it" in done.capsys.readouterr().err
