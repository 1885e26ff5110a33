"""What the old files are made and checked with: words of the methods, what commands say and leave.

Only the commands and genmodels.load are used, so that it holds whatever lies below them.
"""

import contextlib
import io
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

import evaluate
import genmodels
import sample
import train
from tests.helpers.paths import ROOT

OLD = ROOT / "tests" / "fixtures" / "old"
STEPS, MORE = 2, 4  # where the runs stopped, and to where they are resumed

# method -> options of sample(); seeds 0 to 3 are drawn
SAMPLED = {
    "edm": {"labels": [0, 3, 5, 9], "steps": 3, "sigma_max": 1.0},
    "ddo": {"steps": 3, "sigma_max": 1.0},
    "cdrl": {"labels": [0, 3, 5, 9]},
    "gbm": {"labels": [0, 3, 5, 9], "steps": 3, "sigma_max": 0.3},
    "gedi": {"steps": 3},
}
METHODS = (*SAMPLED, "noise2score")
# What came into 0.1.0 later, in tests/fixtures/v0_1_0 -> options of sample()
LATER = {
    "interpolant": {"labels": [0, 3, 5, 9], "steps": 3},
    "energy_matching": {"labels": [0, 3, 5, 9]},
    "edm2": {"labels": [0, 3, 5, 9], "steps": 3, "sigma_max": 1.0},
}
MODULES = ("data", "checkpoint", "importers", "diffusers_export")
COMMANDS = ("train.py", "sample.py", "evaluate.py", *(f"genmodels.{name}" for name in MODULES))


def command(name, *argv):
    """Return (exit code, what it printed) of a command, run in this process."""
    said, argv = io.StringIO(), [str(word) for word in argv]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if name.endswith(".py"):
            script = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}[name]
            code = script.main(argv)
        else:
            code = run_module(name, argv)
    return code, said.getvalue()


def run_module(name, argv):
    """Return the exit code of `python -m NAME ARGV`."""
    kept = sys.argv
    sys.argv = [name, *argv]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = kept
    return 0


def done(name, *argv):
    """Run a command that must succeed and return what it printed."""
    code, said = command(name, *argv)
    assert code == 0, said
    return said


# ------------------------------------------------------------------------------------------------
# Words


def words_in(text):
    """Return the words that a help text lists: keys, flags, subcommands, names of data sets.

    Words in prose do not count: keys begin a line, all else stands in lines of usage.
    """
    found = set()
    for line in text.splitlines():
        if key := re.match(r"\s+([a-z][\w.]*=)", line):
            found.add(key[1])
        elif re.search(r"python (-m )?[\w.]+|torchrun", line):
            found |= set(re.findall(r"(?<![\w.])[a-z][\w.]*=", line))
            found |= set(re.findall(r"(?<= )\[?(--[a-z]+)", line))
            found |= set(re.findall(r"(?:\.py|genmodels\.\w+) ([a-z]+)\b(?![=./-])", line))
        elif line.startswith("NAME: "):
            found |= set(line.removeprefix("NAME: ").split(", "))
        else:
            found |= set(re.findall(r"^(?:method|network)\.name=\w+", line))
    return found - {"--nproc"}  # torchrun's


def says(text, word):
    """Return whether a word of words_in() stands anywhere in a text."""
    after = "" if word.endswith("=") else r"(?![\w-])"
    return re.search(rf"(?<![\w.-]){re.escape(word)}{after}", text) is not None


def help_of(name):
    """Return what a command says to --help (a usage line is as good)."""
    return command(name, "--help")[1]


def refusals(old):
    """Return {what: (command, words)}: each is refused, with a list of what to choose from.

    Args:
        old: folder of the old files.
    """
    edm, out = ROOT / "configs/edm_digits.yaml", "out=nowhere"
    noisy = ROOT / "configs/noise2score_bsd400.yaml"
    # Of a key that no method has, the nearest is guessed and all are named.
    asked = {
        f"sample options of {method}": ("sample.py", old / method / "run", "zzz=1", out)
        for method in SAMPLED
    }
    for method in ("edm", "cdrl", "gbm"):
        words = ("evaluate.py", old / method / "run", "likelihood=true", "zzz=1")
        asked[f"likelihood options of {method}"] = words
    return asked | {
        "methods": ("train.py", edm, "method.name=zzz"),
        "networks": ("train.py", edm, "network.name=zzz"),
        "laws": (
            "train.py",
            noisy,
            "data.noise.law=zzz",
            f"data.root={old / 'pictures'}",
            "data.name=imagefolder",
            "data.patch=16",
        ),
        "data sets": ("genmodels.data", "info", "zzz"),
        "subcommands of genmodels.data": ("genmodels.data", "zzz"),
        "metrics": ("evaluate.py", "images=a", "reference=b", "metrics=zzz"),
        "features": ("evaluate.py", "images=a", "reference=b", "features=zzz"),
        "formats": ("sample.py", old / "edm" / "run", "format=zzz", out),
        "starts of gedi": ("sample.py", old / "gedi" / "run", "start=zzz", out),
        "laws of gbm": ("sample.py", old / "gbm" / "run", f"denoise={old}", "law=zzz", out),
    }


def choices(name, *argv):
    """Return the list that a refused command offers."""
    code, said = command(name, *argv)
    found = re.search(r"(?:choose from|must be one of) (.*)", said)
    assert code == 2 and found, said
    return re.findall(r"\w+", re.split(r",? or |;", found[1])[0])


def resolved(names):
    """Return the resolved config of one or several files of configs/, as nested dicts."""
    paths = [ROOT / "configs" / name for name in names.split()]
    return OmegaConf.to_container(OmegaConf.create(done("train.py", *paths, "--print")))


def config_names():
    """Return what `resolved` is asked for: every file; an overlay stands on another one."""
    names = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    return ["edm_digits.yaml debug.yaml" if name == "debug.yaml" else name for name in names]


# ------------------------------------------------------------------------------------------------
# Results


def losses(run):
    """Return what the lines of metrics.csv say of the loss (of a self-play, of the distance)."""
    lines = (Path(run) / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    column = names.index("fd" if "fd" in names else "train/loss")
    return np.array([float(line.split(",")[column]) for line in lines[1:]], np.float32)


def noisy_picture(old):
    """Return a picture under noise, float32 (1, 1, H, W) on the [-1, 1] scale."""
    return torch.from_numpy(np.load(old / "noisy.npy") / 127.5 - 1).float()[None, None]


def outputs(model, method, old, buffer=False):
    """Return {name: what the model makes}, as numpy arrays."""
    if method == "noise2score":
        return {"images": model.restore(noisy_picture(old), "gaussian", 25.0)[0].numpy()}
    made = {"images": model.sample(range(4), **SAMPLED[method])}
    if method == "gbm":
        noisy = made["images"] * 0.5 + 0.1
        made["restored"] = model.restore(noisy, "lognormal", 0.2, torch.tensor([0, 3, 5, 9]))[0]
    if method == "gedi":
        made["clusters"] = model.cluster(made["images"])
        if buffer:
            made["buffer"] = model.sample(range(4), start="buffer", steps=2)
    return {name: value.numpy() for name, value in made.items()}


def drawn(path, name):
    """Return {"images": of seeds 0 to 3} of a model of LATER, and {"raw": without its average}."""
    both = {"images": load(path), "raw": load(path, ema=False)}
    return {key: model.sample(range(4), **LATER[name]).numpy() for key, model in both.items()}


def tree(folder):
    """Return the names of all files in a folder, hidden ones left out."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not path.name.startswith("."))


def sampled(old, out):
    """Return {kind: the files it leaves} of sample.py and of an export; `out` is a new folder."""
    edm, gedi, cdrl = (old / method / "run" for method in ("edm", "gedi", "cdrl"))
    noise2score, digits = old / "noise2score" / "run", out / "digits"
    done("sample.py", edm, "num=2", "steps=1", f"out={digits}")
    done("sample.py", edm, "num=2", "steps=1", "format=npz", f"out={out / 'npz'}")
    done("sample.py", gedi, "cluster=digits:test", f"out={out / 'cluster'}")
    done(
        "sample.py",
        cdrl,
        "num=1",
        f"inpaint={digits / '000000.png'}",
        f"mask={digits / '000001.png'}",
        f"out={out / 'inpaint'}",
    )
    done(
        "sample.py",
        noise2score,
        f"denoise={old / 'pictures'}",
        "level=25",
        f"out={out / 'denoise'}",
    )
    done("genmodels.checkpoint", edm, f"out={out / 'export'}")
    kinds = {"png": "digits"} | {k: k for k in ("npz", "cluster", "inpaint", "denoise", "export")}
    return {kind: tree(out / name) for kind, name in kinds.items()}


def evaluated(old, out, kinds=("images", "model", "denoise", "likelihood", "cluster", "ood")):
    """Return {kind: the JSON that evaluate.py writes}; `out` is an empty folder."""
    edm, gedi, noise2score = (old / method / "run" for method in ("edm", "gedi", "noise2score"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    np.savez(out / "images.npz", images=pixels)
    asked = {
        "images": (
            f"images={out / 'images.npz'}",
            f"reference={old / 'stats.npz'}",
            "features=digits",
            "metrics=fd",
        ),
        "model": (
            edm,
            "data=digits:test",
            "num=16",
            "steps=1",
            "resamples=2",
            "metrics=fd,nn1,memorised,prc",
        ),
        "denoise": (
            noise2score,
            f"denoise={old / 'pictures'}",
            "law=gaussian",
            "level=25",
            "blind=true",
            "num=1",
        ),
        "likelihood": (edm, "likelihood=true", "data=digits:test", "num=2", "steps=2"),
        "cluster": (gedi, "cluster=digits:test"),
        "ood": (gedi, "ood=noise", "num=20"),
    }
    found = {}
    for kind in kinds:
        done("evaluate.py", *asked[kind], f"out={out / kind}.json", "device=cpu")
        found[kind] = json.loads((out / f"{kind}.json").read_text())
    return found


def keys_of(reports):
    """Return {kind: {"keys": top-level ones, "metrics": names of the scores}}, and of rows."""
    kinds = {}
    for kind, report in reports.items():
        kinds[kind] = {"keys": sorted(report), "metrics": sorted(report["metrics"])}
        if report.get("rows"):
            kinds[kind]["rows"] = sorted(report["rows"][0])
    return kinds


def load(path, **options):
    """Return a trained model on the CPU."""
    return genmodels.load(path, **options)
