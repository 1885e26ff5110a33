"""Every command of the README runs as written, on a tiny model; what cannot run here is listed."""

import re
import shlex

import pytest
import torch
from sklearn.datasets import load_sample_image

import evaluate
import sample
import train
from genmodels import images
from genmodels.commands.main import main as genmodels_main
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
LINES = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
]
CALLS = ("python ", "genmodels ")
COMMANDS = [line.partition("  #")[0].strip() for line in LINES if line.startswith(CALLS)]
# In need of what is not here: released weights, CIFAR-10, the hub.
ELSEWHERE = ("genmodels push",)
SMALL = ["network.channels=[8]", "network.blocks=[1]", "trainer.progress=false"]


@pytest.fixture(scope="module")
def things(train_tiny, tmp_path_factory):
    """What the README's capital words stand for."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pictures", "photos"):
        (folder / name).mkdir()
    for i in range(20):
        picture = torch.randint(0, 256, (3, 70, 66 + i), dtype=torch.uint8)
        images.write_png(folder / "pictures" / f"{i}.png", picture)
    run = train_tiny("data.labels=true")
    noisy = folder / "noisy"
    noisy.mkdir()
    images.write_png(noisy / "0.png", torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8))
    photo = torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1)[:, :240, :320]
    photo = (photo + 10 * torch.randn(photo.shape)).clamp(0, 255).byte()
    images.write_png(folder / "photo.png", photo)
    for i in range(3):
        images.write_png(folder / f"photos/{i}.png", photo[:1, 80 * i : 80 * i + 80])
    sample.main([str(run), "num=8", "steps=1", f"out={folder / 'samples'}"])
    for name in ("real", "noisy", "gaussian"):
        (folder / "sets" / name).mkdir(parents=True)
        for i in range(8):
            picture = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
            images.write_png(folder / "sets" / name / f"{i}.png", picture)
    return {
        "RUN": run,
        "runs/edm_digits/TIME": run,
        "runs/edm_digits": run.parent,
        "MODEL": run,
        "SMALLER_MODEL": run,
        "GBM_RUN": train_tiny("data.labels=true", config="configs/gbm_digits.yaml"),
        "NOISY": noisy,
        "MEASURED": noisy,
        "PHOTO.png": folder / "photo.png",
        "PICTURES": folder / "photos",
        "FOLDER": folder / "pictures",
        "DIR": folder / "made",
    }


def test_the_commands_are_found():
    assert all("…" not in command for command in COMMANDS)
    assert len(COMMANDS) == len(re.findall("^(?:python|genmodels) ", README, re.M)) > 15


def words_of(command, things):
    """The words of a command, as a clone's script or module is called, with what they stand for."""
    name, *words = shlex.split(command)
    if name == "genmodels" and words[0] in ("train", "sample", "evaluate"):
        words[0] += ".py"
    for name, path in things.items():
        words = [re.sub(rf"(^|=){name}$", rf"\g<1>{path}", word) for word in words]
    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, things, tmp_path, monkeypatch):
    if command.startswith(ELSEWHERE):
        pytest.skip("needs a hub; tests/checkpoint/test_hub.py has one")
    monkeypatch.chdir(ROOT)
    words = words_of(command, things)
    if command.startswith("genmodels ") and not words[0].endswith(".py"):
        words = [re.sub(r"^out=.+", f"out={tmp_path}/made", word) for word in words]
        assert genmodels_main(words) == 0
        return
    script, argv = (
        {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}[words[0]],
        words[1:],
    )
    if script is train and not any(word.startswith(("resume=", "--")) for word in argv):
        tiny = [*TINY, "data.labels=true"] if "noise2score" not in argv[0] else SMALL
        tiny = TINY if "folder64" in argv[0] else tiny
        argv = [
            argv[0],
            "configs/debug.yaml",
            *tiny,
            *argv[1:],
            "trainer.max_steps=1",
            f"out_dir={tmp_path}",
        ]
        if "ddo" in argv[0]:
            argv += ["method.steps=2", "method.pool=16", "eval.num=40", "method.label_dropout=0"]
    if script is sample:
        argv = [f"out={tmp_path}" if word.startswith("out=") else word for word in argv]
        argv = [re.sub(r"^num=\d+", "num=4", word) for word in argv]
        argv += [] if "denoise=" in command else ["steps=1"]
    if script is evaluate:
        argv = [f"out={tmp_path}/scores.json" if w.startswith("out=") else w for w in argv]
        argv = [
            re.sub(r"^images=samples$", f"images={things['DIR'].parent}/samples", w) for w in argv
        ]
        if "images=real" in command:
            sets = [things["DIR"].parent / "sets" / name for name in ("real", "noisy", "gaussian")]
            argv = [re.sub(r"^images=.*", f"images={','.join(map(str, sets))}", w) for w in argv]
            argv = [re.sub(r"^(table|plot|keep)=", rf"\1={tmp_path}/", w) for w in argv]
        if "likelihood" in command:
            argv += ["num=4", "steps=2"]
        elif "RUN" in command:
            argv += ["resamples=2", "num=8", "steps=1"]
    assert script.main(last_words(argv)) == 0


def test_python(things):
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    block = block.replace("runs/edm_digits/TIME", str(things["RUN"]))
    space = {}
    exec(block.replace('"configs/', f'"{ROOT}/configs/'), space)
    assert space["images"].shape == (16, 1, 8, 8) and space["clean"].shape == (16, 1, 8, 8)
