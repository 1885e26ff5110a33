"""Put a model on the Hugging Face hub, where others load it by its name.

    genmodels push MODEL to=OWNER/NAME [private=true] [license=apache-2.0]

MODEL is a run, a .ckpt or an exported folder. A run is exported first, with a model card: a grid
of images, the scores of its training or those of scores=FILE.json, the licence. An exported folder
goes there as it is, config.json, model.safetensors, README.md and pictures, with the card that you
may have changed; in its title and commands the model is called OWNER/NAME. Log in before:
`hf auth login`, or HF_TOKEN.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genmodels.checkpoint import hub
from genmodels.checkpoint.cards import CardOptions
from genmodels.checkpoint.exports import card_words, export, note_license, save_model
from genmodels.checkpoint.models import load, model_path
from genmodels.config import check, setting, settings_of
from genmodels.config.words import check_flags, help_text, split_words, typed_words


def push(path: Path | str, to: str, *, private: bool = False, **words: Any) -> str:
    """Put a trained model into a repository of the hub, made if need be; return its URL.

    Args:
        path: run folder, .ckpt file or export.
        to: OWNER/NAME.
        private: nobody else is to see it.
        words: half, license, scores, samples of export(), and token.

    Raises:
        ValueError: the model cannot be read; see hub.upload and export().
    """
    token = words.pop("token", None)
    _check_name(to)
    folder = model_path(path)
    if _goes_as_it_is(folder):
        for key, value in words.items():
            check(not value, key, value, "an exported folder goes as it is; export it anew with it")
        load(folder)  # whole, and one of ours
        with tempfile.TemporaryDirectory() as above:
            shown = Path(above) / "model"
            shown.mkdir()
            for file in folder.iterdir():
                (shown / file.name).symlink_to(file.resolve())
            card = renamed((folder / "README.md").read_text(encoding="utf8"), folder.name, to)
            (shown / "README.md").unlink()
            (shown / "README.md").write_text(card, encoding="utf8")
            return hub.upload(shown, to, private=private, token=token)
    with tempfile.TemporaryDirectory() as above:
        made = export(folder, Path(above) / "model", name=to, **words)
        return hub.upload(made, to, private=private, token=token)


def push_model(model: Any, to: str, *, private: bool = False, **words: Any) -> str:
    """Put a model that is in memory into a repository of the hub; see push()."""
    token = words.pop("token", None)
    _check_name(to)
    with tempfile.TemporaryDirectory() as above:
        made = save_model(model, Path(above) / "model", name=to, **words)
        return hub.upload(made, to, private=private, token=token)


def renamed(card: str, name: str, to: str) -> str:
    """Return a card whose title and commands name a model as it is called on the hub."""
    name = re.escape(name)
    for before, after in (("# ", "$"), ("genmodels sample ", " "), ('genmodels.load\\("', '"')):
        card = re.sub(f"(?m)^(.*?{before}){name}(?={after})", lambda m: m[1] + to, card)
    return card


def _goes_as_it_is(folder: Path) -> bool:
    """Return whether a folder is an export with its card."""
    return all((folder / name).is_file() for name in (hub.SETTINGS, "README.md"))


def _check_name(to: str) -> None:
    named = hub.repository(f"hf://{to}")
    check(named == (to, None), "to", to, "write OWNER/NAME, as the hub calls it")


@dataclass
class PushOptions(CardOptions):
    """What the command takes."""

    to: str = setting("", "repository of the hub, OWNER/NAME; made if there is none")
    private: bool = setting(False, "nobody else is to see it")
    half: bool = setting(False, "store float16")


def main(argv: Sequence[str]) -> None:
    """Push a model; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags:
        print(f"{__doc__.strip()}\n\n{help_text(PushOptions)}")
        return
    options = PushOptions(**typed_words(words, settings_of(PushOptions)))
    if len(positionals) != 1 or not options.to:
        raise ValueError("usage: genmodels push MODEL to=OWNER/NAME")
    folder, given = model_path(positionals[0]), card_words(options)
    if _goes_as_it_is(folder):
        given = {key: value for key, value in given.items() if key in words}
    else:
        note_license(options.license)
    url = push(folder, options.to, private=options.private, **given)
    print(f"pushed: {url}")
