"""The one way from YAML and key=value words to the dataclasses of genmodels.config, and back.

`load_config` is handed the methods and networks as two plain dicts and imports none of them. After
it there are only dataclasses.
"""

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genmodels.atomic import write_bytes
from genmodels.config.schema import Config, check, to_plain
from genmodels.config.words import parse_value


def load_config(
    sources: Iterable[str | Path | dict],
    overrides: Iterable[str] = (),
    *,
    methods: Mapping[str, Any],
    networks: Mapping[str, Any],
) -> Config:
    """Return the Config of the merged sources and overrides.

    Args:
        sources: YAML paths and plain dicts, merged left to right.
        overrides: "key=value" strings, applied last.
        methods, networks: name -> class with a `Config` dataclass; `method.name` and
            `network.name` choose from them.

    Raises:
        ValueError: unknown key, wrong type or value, unknown method or network, unreadable file;
            one line that names the key, the value and the remedy.
    """
    values: Any = OmegaConf.create()
    for source in sources:
        part = source if isinstance(source, dict) else _read_yaml(source)
        values = OmegaConf.merge(values, part)
    words = dict(_split_word(word) for word in overrides)
    schema = {}
    for slot, choices in (("method", methods), ("network", networks)):
        section = OmegaConf.select(values, slot)
        check(
            section is None or OmegaConf.is_dict(section),
            slot,
            section,
            f"is a section; set {slot}.KEY",
        )
        name = words.get(f"{slot}.name") or OmegaConf.select(values, f"{slot}.name")
        check(name is not None, f"{slot}.name", "", f"is missing; choose {', '.join(choices)}")
        known = isinstance(name, str) and name in choices
        check(known, f"{slot}.name", name, _nearest(str(name), choices))
        schema[slot] = choices[name].Config
    for key, text in words.items():
        OmegaConf.update(values, key, parse_value(key, text, _type_of(key, schema)))
    try:
        plain: Any = OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    _check_types(plain, Config, schema, "")
    _name_of_root(plain)
    structured = OmegaConf.structured(Config)
    for slot in schema:
        structured[slot] = OmegaConf.structured(schema[slot])
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(structured, plain))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if not config.name:
        paths = [source for source in sources if not isinstance(source, dict)]
        config.name = Path(paths[0]).stem if paths else config.method.name
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the config as YAML that load_config reads back, all or nothing."""
    write_bytes(path, OmegaConf.to_yaml(OmegaConf.create(to_plain(config))).encode())


def _name_of_root(plain: dict) -> None:
    """Say by data.root what the data are, where nothing else does."""
    section = plain.get("data", {})
    if section.get("root") and not section.get("name"):
        section["name"] = kind_of_files(section["root"])
        warnings.warn(f"data.name={section['name']}: by data.root={section['root']}", stacklevel=2)


def kind_of_files(path: str | Path) -> str:
    """Return the data.name that reads a path: npz, npy, zip, else imagefolder."""
    path = Path(path).expanduser()
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in ("npz", "npy", "zip") and not path.is_dir() else "imagefolder"


def _read_yaml(path: str | Path) -> DictConfig:
    path = Path(path).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in _configs()], 1)
        hint = f"; did you mean configs/{near[0]}.yaml?" if near else ""
        raise ValueError(f"config={path}: no such file{hint}")
    try:
        values: Any = OmegaConf.load(path)
    except Exception as error:  # the YAML reader raises many kinds
        raise ValueError(f"config={path}: not YAML: {' '.join(str(error).split())}") from None
    check(OmegaConf.is_dict(values), "config", path, "must hold key: value pairs")
    return values


def _configs() -> list[Path]:
    return sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def _split_word(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    check(equals and key, "argument", word, "write key=value")
    return key, text


def _fields(cls: type, schema: dict[str, type], prefix: str) -> dict[str, Any]:
    """Return {key: type} of a dataclass; method and network stand for the chosen Config."""
    hints = get_type_hints(cls)
    types = {item.name: hints[item.name] for item in dataclasses.fields(cls)}
    return types | schema if not prefix else types


def _type_of(key: str, schema: dict[str, type]) -> Any:
    cls, prefix = Config, ""
    for part in key.split("."):
        check(dataclasses.is_dataclass(cls), key, "", f"{prefix[:-1]} has no keys of its own")
        types = _fields(cls, schema, prefix)
        check(part in types, f"unknown key {prefix}{part}", "", _nearest(part, types, prefix))
        cls, prefix = types[part], f"{prefix}{part}."
    check(not dataclasses.is_dataclass(cls), key, "", f"is a section; set {key}.KEY=value")
    return cls


def _check_types(values: dict, cls: Any, schema: dict[str, type], prefix: str) -> None:
    types = _fields(cls, schema, prefix)
    for name, value in values.items():
        key = f"{prefix}{name}"
        check(name in types, f"unknown key {key}", "", _nearest(str(name), types, prefix))
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            check(isinstance(value, dict), key, value, f"is a section; set {key}.KEY")
            _check_types(value, kind, schema, f"{key}.")
        elif get_origin(kind) is list:
            inner = get_args(kind)[0]
            good = isinstance(value, list) and all(_fits(item, inner) for item in value)
            check(good, key, value, f"must be a list of {inner.__name__}")
        else:
            remedy = f"must be {kind.__name__}" + ("; quote it" if kind is str else "")
            if kind is int and isinstance(value, float) and value.is_integer():
                remedy += f"; write {int(value)}"
            check(_fits(value, kind), key, value, remedy)


def _fits(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _nearest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(choices), 1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{hint}choose from {', '.join(choices)}"
