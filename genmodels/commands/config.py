"""Copy a config that comes along, to change it; or list what comes along.

    genmodels config                          the configs and the pretrained models
    genmodels config edm_digits > my.yaml     one of them as text
    genmodels config edm_digits out=my.yaml   to a new file

`genmodels train my.yaml` trains the copy, `genmodels train edm_digits` the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genmodels import cli
from genmodels.atomic import write_bytes
from genmodels.config import Section, setting, settings_of
from genmodels.config.shipped import CONFIGS, MODELS, nearest, shipped
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.run import check_output


@dataclass
class CopyOptions(Section):
    """What copying a config takes."""

    out: str = setting("", "new file to write; empty: print it")


def config(argv: Sequence[str]) -> None:
    """Print, copy or list configs; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        print(f"{__doc__.strip()}\n\n{help_text(CopyOptions)}")
        return
    options = CopyOptions(**typed_words(words, settings_of(CopyOptions)))
    if not positionals and not options.out:
        print(listing())
        return
    if len(positionals) != 1:
        raise ValueError(f"config={' '.join(positionals)}: name one; without, they are listed")
    (name,) = positionals
    if name not in shipped(CONFIGS):
        raise ValueError(f"config={name}: is none that comes along{nearest(CONFIGS, name)}")
    text = cli.as_called(shipped(CONFIGS)[name].read_text())  # its comments have command lines
    if not options.out:
        print(text, end="")
        return
    check_output("out", options.out)  # refuses a file that is there
    if not Path(options.out).absolute().parent.is_dir():
        raise ValueError(f"out={options.out}: its folder does not exist; make it first")
    write_bytes(options.out, text.encode())
    print(f"written: {options.out}")


def listing() -> str:
    """Return the names that come along, each with the first line of its file or card."""
    lines = ["configs:"]
    for name, path in shipped(CONFIGS).items():
        lines.append(f"  {name:22} {path.read_text().splitlines()[0].removeprefix('# ')}")
    return "\n".join([*lines, "", "pretrained models:", *(f"  {name}" for name in shipped(MODELS))])
