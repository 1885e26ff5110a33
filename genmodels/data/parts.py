"""The splits of a folder or zip of pictures, by the names of its folders."""

import warnings
from dataclasses import dataclass
from functools import partial

from genmodels.images import Tree

# What Hugging Face's `datasets` takes for a split, in any case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Part:
    """The pictures of a split: all those below a folder ("" the root, else it ends in /)."""

    folder: str
    names: list[str]

    def within(self, name: str) -> str:
        """Return the path of a picture within the folder."""
        return name.removeprefix(self.folder)


def split_of(folder: str) -> str:
    """Return which split a folder of this name is: train, validation, test, or "" for none."""
    return next((key for key, names in SPLIT_NAMES.items() if folder.lower() in names), "")


def tree_parts(tree: Tree) -> tuple[Part, Part | None]:
    """Return (the training pictures, the held-out ones or None) of a folder or zip.

    A folder around all of them may lie around the splits. Of test and validation the first is held
    out. Beside other folders of pictures a folder train that holds pictures itself, with no test
    or validation there, is a class: cars, planes, trains.

    Raises:
        ValueError: splits beside classes, two folders for one split, or none for training.
    """
    around, tops, lone = _top_folders(tree.names)
    folders: dict[str, list[str]] = {}
    for top in tops:
        folders.setdefault(split_of(top), []).append(f"{around}{top}/")
    classes = folders.pop("", [])
    part = partial(_part, tree.names)
    if lone and folders:  # a split with nothing beside it is the set
        return part(f"{around}{tops[0]}/"), None
    if not folders or _is_class(folders, classes, tree.names):
        return Part("", tree.names), None
    _check_folders(tree, folders, classes)
    training = part(folders["train"][0])
    held_out = part((folders.get("test") or folders["validation"])[0])
    rest = set(tree.names).difference(training.names, held_out.names)
    if rest:
        warnings.warn(
            f"data.root={tree.path}: {len(rest)} pictures lie outside {training.folder} and "
            f"{held_out.folder} ({min(rest)}, ...); they are not read",
            stacklevel=2,
        )
    return training, held_out


def _part(names: list[str], folder: str) -> Part:
    return Part(folder, [name for name in names if name.startswith(folder)])


def _top_folders(names: list[str]) -> tuple[str, list[str], bool]:
    """Return (the folder around all that is no split, those in it, whether one holds all)."""
    around = ""
    while True:
        below = [name.removeprefix(around) for name in names]
        tops = sorted({name.split("/")[0] for name in below if "/" in name})
        lone = len(tops) == 1 and all("/" in name for name in below)
        if not lone or split_of(tops[0]):
            return around, tops, lone
        around += f"{tops[0]}/"


def _is_class(folders: dict[str, list[str]], classes: list[str], names: list[str]) -> bool:
    """Return whether the one folder that is called as a split is a class, or one of any folders."""
    if sum(map(len, folders.values())) > 1:
        return False
    ((folder,),) = folders.values()
    part = _part(names, folder)
    return not classes or any("/" not in part.within(name) for name in part.names)


def _check_folders(tree: Tree, folders: dict[str, list[str]], classes: list[str]) -> None:
    """Raise ValueError for folders that are not one for training and one or two to be held out."""
    shown = ", ".join(folder for some in folders.values() for folder in some)
    if classes:
        raise ValueError(
            f"data.root={tree.path}: mixes splits ({shown}) and classes ({classes[0]}); move the "
            "classes into the splits, or name one of these folders"
        )
    if "train" not in folders:
        raise ValueError(
            f"data.root={tree.path}: holds {shown} and no train/; name the folder to train on"
        )
    for some in folders.values():
        if len(some) > 1:
            raise ValueError(
                f"data.root={tree.path}: {' and '.join(some)} are one split; join or rename them"
            )
