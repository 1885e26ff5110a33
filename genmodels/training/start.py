"""What init=MODEL brings along: the settings that its weights belong to, and its data.

network.*   all of them; but the config files may set dropout as they like
data.*      which images, how they are cut and labelled; not how they are read (READING). Of other
            data, named by data.root= or data.name=, only the form is that of the model's
method.*    what the method declares in OF_WEIGHTS, e.g. sigma_data

They take the place of what the config files say; key=value words win.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from genmodels import checkpoint
from genmodels.config import DataConfig
from genmodels.config.load import kind_of_files
from genmodels.data import DATASETS
from genmodels.data.sets import SETTINGS_OF_SETS
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS

READING = ("batch_size", "device", "workers", "download", "fingerprint")
DERIVED = ("shape", "classes", "present")
FILES = ("imagefolder", "zip", "npz", "npy", "latents")  # what kind_of_files tells apart

Settings = Mapping[str, Any]


def bring(init: str, values: dict[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """Return the merged sections of config files with what a model brings along.

    A warning names what is not as in the files.

    Args:
        init: path or name of the model.
        values: the sections as plain dicts.
        words: {key: text} of the command line.

    Raises:
        ValueError: there is no such model; its data are not here and no others are named.
    """
    theirs = checkpoint.settings_of_model(init)
    network, data, method = (values.get(name, {}) for name in ("network", "data", "method"))
    name = words.get("method.name", method.get("name"))
    of_weights = METHODS[name].OF_WEIGHTS if name in METHODS else ()
    merged = values | {
        "network": _network(network, theirs["network"], words),
        "data": _data(data, theirs["data"], words, init),
        "method": method | {k: v for k, v in theirs["method"].items() if k in of_weights},
    }
    if changed := _changed(_known(values), _known(merged), words):
        warnings.warn(f"init={init}: brings {', '.join(changed)}", stacklevel=2)
    return merged


def flat(plain: Settings, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of nested dicts."""
    rows: dict[str, Any] = {}
    for key, value in plain.items():
        nested = isinstance(value, dict)
        rows |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return rows


def _network(ours: Settings, theirs: Settings, words: Mapping[str, str]) -> dict[str, Any]:
    """Return the network's settings; those of the files where the words name another network."""
    if words.get("network.name", theirs["name"]) != theirs["name"]:
        return dict(ours)
    kept = {key: ours[key] for key in ("dropout",) if key in ours and key in theirs}
    return {**theirs, **kept}


def _data(ours: Settings, theirs: Settings, words: Mapping[str, str], init: str) -> dict[str, Any]:
    """Return the settings of the data."""
    ours = {key: value for key, value in ours.items() if key not in DERIVED}
    if "data.name" in words:
        return {**ours, **_form(words["data.name"], theirs)}
    if "data.root" in words:
        name = _name_at(words["data.root"], ours.get("name", ""), theirs.get("name", ""))
        return {**ours, "name": name, **_form(name, theirs)}
    taken = {key: value for key, value in theirs.items() if key not in (*READING, *DERIVED)}
    if (row := DATASETS.get(taken.get("name", ""))) is not None:  # an old run may hold others
        taken = {k: v for k, v in taken.items() if k not in SETTINGS_OF_SETS or k in row.takes}
    name, root = taken.get("name", ""), ours.get("root", "")
    here = name not in ("", *FILES) or taken.get("root")
    if not here and (root or ours.get("name") in FILES):
        return {**ours, **_form(ours.get("name") or kind_of_files(root), theirs)}
    if not here and name:  # an export does not say where they lay
        raise ValueError(
            f"data.root=: init={init} learned from pictures that are not here; say which to train "
            "on: data.root=FOLDER"
        )
    if not here:  # a bare network
        return {**ours, **_form(ours.get("name", DataConfig.name), theirs)}
    if not taken.get("root") and name == ours.get("name"):
        taken["root"] = root
    return {key: value for key, value in ours.items() if key in READING} | taken


def _name_at(root: str, ours: str, theirs: str) -> str:
    """Return the data.name of what lies at data.root, given those of the files and the model."""
    if ours in FILES:
        return ours
    if theirs not in FILES:
        for name in (theirs, ours):
            if name in DATASETS and "root" in DATASETS[name].takes:
                return name
    return kind_of_files(root)


def _form(name: str, theirs: Settings) -> dict[str, Any]:
    """Return the settings that give data of this name the form of the model's."""
    if theirs.get("patch"):
        return {"patch": theirs["patch"], "channels": theirs["channels"]}
    if theirs.get("vae", {}).get("mean"):  # latents of another scale are refused
        return {"vae": theirs["vae"]}
    channels, *sides = theirs.get("shape") or (0, 0, 1)
    if name not in DATASETS or "crop" not in DATASETS[name].takes or len(set(sides)) > 1:
        return {}
    return {"resolution": sides[0], "channels": channels, "pad": 0}


def _known(values: Settings) -> dict[str, Any]:
    """Return what config files say, and the defaults of the rest."""
    rows: Mapping[str, Mapping[str, Any]] = {"network": NETWORKS, "method": METHODS}
    known: dict[str, Any] = {"data": asdict(DataConfig()) | values.get("data", {})}
    for section, choices in rows.items():
        said = values.get(section, {})
        row = choices.get(said.get("name", ""))
        known[section] = (asdict(row.Config()) if row else {}) | said
    return known


def _changed(before: Settings, after: Settings, words: Mapping[str, str]) -> list[str]:
    """Return what is not as it was, "key=value", but for what the words say anyway."""
    old, new = flat(before), flat(after)
    keys = [key for key, value in new.items() if key not in words and value != old.get(key)]
    keys = [key for key in keys if key.removeprefix("data.") not in DERIVED]
    if old.get("network.name") == new.get("network.name"):
        return [f"{key}={_shown(new[key])}" for key in keys]
    others = [f"{key}={_shown(new[key])}" for key in keys if not key.startswith("network.")]
    return [f"network.name={new['network.name']} with its settings", *others]


def _shown(value: Any) -> str:
    """Return a value as a word has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
