"""The command genmodels: its first word says which command the others go to."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from genmodels import cli
from genmodels.version import __version__


class Command(NamedTuple):
    """A word of the command line.

    Attributes:
        runs: "module:function"; it takes the words behind the command and answers --help.
        line: what it does.
        clone: what does the same in a clone: a script, or a module of `python -m`.
    """

    runs: str
    line: str
    clone: str = ""


COMMANDS = {
    "train": Command(
        "genmodels.commands.train:train", "train a model, or go on with a run", "train.py"
    ),
    "sample": Command(
        "genmodels.commands.sample:sample",
        "generate images, restore noisy or measured ones",
        "sample.py",
    ),
    "evaluate": Command(
        "genmodels.commands.evaluate:evaluate", "score a model, or folders of images", "evaluate.py"
    ),
    "report": Command("genmodels.commands.report:report", "write a run's page anew: report.html"),
    "compare": Command("genmodels.commands.compare:compare", "several runs in one page"),
    "config": Command("genmodels.commands.config:config", "list or copy the configs"),
    "data": Command(
        "genmodels.data.commands:main", "describe, convert or fetch a data set", "genmodels.data"
    ),
    "export": Command(
        "genmodels.checkpoint.exports:main",
        "a model as a folder to share, ours or for diffusers",
        "genmodels.checkpoint",
    ),
    "push": Command("genmodels.checkpoint.push:main", "a model to the Hugging Face hub"),
    "checkpoint": Command(
        "genmodels.checkpoint.exports:main",
        "as export; checkpoint ema: averages of other widths",
        "genmodels.checkpoint",
    ),
    "merge": Command(
        "genmodels.checkpoint.merge:main", "several models of one network as their average"
    ),
    "import": Command(
        "genmodels.checkpoint.released:main",
        "weights released with EDM, EDM2, DDO or CDRL",
        "genmodels.importers",
    ),
}

PAGE = """Train image generators, sample from them, restore noisy pictures, score the results.

Try it (handwritten digits that come along, some minutes on a CPU):

    genmodels train edm_digits                             prints the folder of the run
    genmodels sample runs/edm_digits num=64 out=samples    its newest run: samples/grid.png
    genmodels evaluate runs/edm_digits data=digits:test metrics=nn1,fd features=digits
    genmodels sample noise2score denoise=PHOTO.png out=restored

With pictures of your own:

    genmodels data info FOLDER resolution=64               what is in them
    genmodels config edm_folder64 > my.yaml                a config to change
    genmodels train my.yaml data.root=FOLDER sample.every=500
    genmodels export runs/my out=shared format=diffusers   to hand on
    genmodels push runs/my to=USER/NAME license=mit        for all: genmodels sample USER/NAME

commands (each explains itself: genmodels COMMAND --help):
{commands}

Settings are written key=value. A config or a model is a path or the name of one that comes along:
`genmodels config` lists them. A model may also be USER/NAME on the Hugging Face hub. --version
prints the version.
"""


def page(name: str) -> str:
    """Return the help of the whole, to a user who calls it by this name."""
    lines = "\n".join(f"  {word:12} {command.line}" for word, command in COMMANDS.items())
    return PAGE.replace("genmodels ", f"{name} ").format(commands=lines).rstrip()


def dispatch(name: str, argv: Sequence[str]) -> Any:
    """Run the command that the first word names; return what it returns.

    Raises:
        ValueError: there is no such command.
    """
    word, *words = argv or ["--help"]
    if word in ("--help", "-h", "help"):
        print(page(name))
        return None
    if word == "--version":
        print(f"genmodels {__version__}")
        return None
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"command={word}: {hint}choose from {', '.join(COMMANDS)}; {name} --help explains them"
        )
    module, function = COMMANDS[word].runs.split(":")
    return getattr(importlib.import_module(module), function)(words)


def main(argv: Sequence[str] | None = None, name: str = "genmodels") -> int:
    """Return the exit code of a command line: 0 done, 2 the user's mistake, 1 anything else.

    Args:
        argv: the words; None: those of this process.
        name: by which the user calls it; help and messages write it so.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = {command.clone: f"{name} {word}" for word, command in COMMANDS.items() if command.clone}
    if argv and argv[0] in COMMANDS and COMMANDS[argv[0]].clone:
        names[COMMANDS[argv[0]].clone] = f"{name} {argv[0]}"  # of two that do the same
    return cli.run(partial(dispatch, name), argv, names)
