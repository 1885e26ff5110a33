"""Convert released weights of others to config.json and safetensors; nothing in them is executed.

    python -m genmodels.importers edm-cifar10-32x32-cond-vp.pkl out=models/edm_cifar10 data=cifar10
    python -m genmodels.importers Cifar_10_best.pth.tar out=models/cdrl_cifar10 data=cifar10

Handled: the pickles of EDM, EDM2 and DDO (SongUNet and DhariwalUNet under EDMPrecond, VPPrecond,
VEPrecond and iDDPMPrecond, EDM2's UNet under Precond), and the checkpoints of CDRL. The weights
keep the licence they were released under (EDM's: CC BY-NC-SA 4.0, non-commercial).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genmodels.checkpoint import cdrl_files, edm_pickles
from genmodels.config import Section, setting, settings_of
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.foreign import is_torch_file


def convert(
    path: Path | str, out: Path | str, *, data: str = "imagefolder", key: str = "ema"
) -> Path:
    """Write released weights as a folder that sample.py, evaluate.py and init= take; return it.

    Args:
        path: EDM's pickle or CDRL's checkpoint.
        out: folder to make; must not exist.
        data: name of the data it was trained on, where genmodels.data knows them.
        key: which network of the file; of CDRL's "ema" or "raw".

    Raises:
        ValueError: it is neither, or broken; or `out` exists.
    """
    reader = cdrl_files if is_torch_file(path) else edm_pickles
    return reader.convert(path, out, data=data, key=key)


@dataclass
class ImportOptions(Section):
    """What python -m genmodels.importers takes."""

    out: str = setting("", "folder to make")
    data: str = setting("imagefolder", "the data it was trained on, e.g. cifar10")
    key: str = setting("ema", "which network of the file (CDRL: ema or raw)")


def main(argv: Sequence[str]) -> None:
    """Convert one file; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(f"{__doc__.strip()}\n\n{help_text(ImportOptions)}")
        return
    options = ImportOptions(**typed_words(words, settings_of(ImportOptions)))
    if len(positionals) != 1 or not options.out:
        raise ValueError("usage: python -m genmodels.importers FILE out=DIR [data=cifar10]")
    out = convert(positionals[0], options.out, data=options.data, key=options.key)
    print(f"converted: {out}")
