"""The one way from YAML and key=value words to the dataclasses of genmodels.config, and back.

`load_config` is handed the methods and networks as two plain dicts and imports none of them. After
it there are only dataclasses.
"""

import dataclasses
import difflib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genmodels.atomic import write_bytes
from genmodels.config.schema import Config, check, to_plain
from genmodels.config.shipped import CONFIGS, nearest, shipped
from genmodels.config.words import parse_value
from genmodels.foreign import read_plain

LARGEST = 1 << 20  # bytes of a YAML file
DEEPEST = 12  # sections, lists and what is in them
MOST_VALUES = 100_000
LATENTS = "latents.json"  # what a folder of latents has
MOST_REFERENCES = 100  # ${...} in a file; each value gets no longer than its file

# What a YAML file may leave to be filled in: an environment variable, or another key's value.
REFERENCE = re.compile(r"\$\{(?:oc\.env:(\w+)(?:,[^${}]*)?|([A-Za-z_][\w.]*))\}")


def load_config(
    sources: Iterable[str | Path | dict],
    overrides: Iterable[str] = (),
    *,
    methods: Mapping[str, Any],
    networks: Mapping[str, Any],
    bring: Callable[[str, dict, Mapping[str, str]], dict] | None = None,
) -> Config:
    """Return the Config of the merged sources and overrides.

    Args:
        sources: YAML paths and plain dicts, merged left to right.
        overrides: "key=value" strings, applied last.
        methods, networks: name -> class with a `Config` dataclass; `method.name` and
            `network.name` choose from them.
        bring: maps (init, merged sources, overrides) to the sources with what the model of init=
            brings along, where one is given.

    Raises:
        ValueError: unknown key, wrong type or value, unknown method or network, unreadable file;
            one line that names the key, the value and the remedy.
    """
    parts = [source if isinstance(source, dict) else read_yaml(source) for source in sources]
    try:
        return _merged(parts, overrides, sources, methods, networks, bring)
    except ValueError as error:
        raise ValueError(_without_secrets(str(error), parts)) from None


def _merged(
    parts: Sequence[dict],
    overrides: Iterable[str],
    sources: Iterable[str | Path | dict],
    methods: Mapping[str, Any],
    networks: Mapping[str, Any],
    bring: Callable[[str, dict, Mapping[str, str]], dict] | None,
) -> Config:
    """Return the Config of plain dicts and overrides; see load_config."""
    try:
        values: Any = OmegaConf.merge(OmegaConf.create(), *parts)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    words = dict(_split_word(word) for word in overrides)
    if bring:
        values = _with_model(values, words, bring)
    schema = {}
    for slot, choices in (("method", methods), ("network", networks)):
        section = OmegaConf.to_container(values).get(slot)  # type: ignore[union-attr]
        check(
            section is None or isinstance(section, dict),
            slot,
            section,
            f"is a section; set {slot}.KEY",
        )
        name = words.get(f"{slot}.name") or (section or {}).get("name")
        check(name is not None, f"{slot}.name", "", f"is missing; choose {', '.join(choices)}")
        known = isinstance(name, str) and name in choices
        check(known, f"{slot}.name", name, _nearest(str(name), choices))
        schema[slot] = choices[str(name)].Config
    for key, text in words.items():
        check("${" not in text, key, text, "write the value itself; ${ is for YAML files")
        OmegaConf.update(values, key, parse_value(key, text, _type_of(key, schema, text)))
    _check_keys(OmegaConf.to_container(values), Config, schema, "")  # type: ignore[arg-type]
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


def _with_model(
    values: Any, words: Mapping[str, str], bring: Callable[[str, dict, Mapping[str, str]], dict]
) -> Any:
    """Return merged sources with what the model of init= brings along; see load_config."""
    plain: Any = OmegaConf.to_container(values)
    sections = [plain.get(name, {}) for name in ("network", "data", "method")]
    try:
        init = words.get("init", OmegaConf.select(values, "init"))
    except OmegaConfBaseException:
        return values  # what cannot be filled in is said later, and so are sections that are none
    if not init or not isinstance(init, str) or not all(isinstance(s, dict) for s in sections):
        return values
    return OmegaConf.create(bring(init, plain, words))


def check_foreign(plain: object) -> None:
    """Raise ValueError unless this is a plain config, as models bring theirs along.

    Nothing in it may ask for more than it says: no ${ that would be filled in with an environment
    variable or a copy, no depth or number of values beyond any config's.
    """
    check(isinstance(plain, dict), "config", type(plain).__name__, "must hold key: value pairs")
    for key, value in _leaves(plain):
        check(value != "???", key, value, "is missing")
        if isinstance(value, str):
            check("${" not in value, key, value, "a model's config holds values, no ${")
        else:
            good = value is None or isinstance(value, bool | int | float)
            check(good, key, f"<{type(value).__name__}>", "must be text, a number or a list")


def _leaves(plain: Any) -> list[tuple[str, Any]]:
    """Return (key, value) of all that is no section and no list.

    Raises:
        ValueError: nested too deep, or too many values.
    """
    level, found, count = [("", plain)], [], 0
    for _ in range(DEEPEST):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                prefix = f"{key}." if key else ""
                below += [(f"{prefix}{name}", item) for name, item in value.items()]
            elif isinstance(value, list | tuple):
                below += [(key, item) for item in value]
            else:
                found.append((key, value))
            count += 1
            check(len(below) + count <= MOST_VALUES, "config", "", "holds too many values")
        level = below
        if not level:
            return found
    raise ValueError(f"config: is nested more than {DEEPEST} deep ({level[0][0][:40]})")


def _check_references(plain: dict, path: Path) -> None:
    """Raise ValueError for ${...} of a YAML file that could grow without bound, or run in circles.

    Each names an environment variable or a key whose value is written out.
    """
    leaves = _leaves(plain)
    count = 0
    for key, value in leaves:
        if not isinstance(value, str) or "${" not in value:
            continue
        count += len(REFERENCE.findall(value))
        rest = REFERENCE.sub("", value)
        check("${" not in rest, key, value, "write ${KEY} or ${oc.env:VARIABLE}")
        for _, name in REFERENCE.findall(value):
            named = [
                text for other, text in leaves if name and (other + ".").startswith(name + ".")
            ]
            # One that is in another file is found, or not, when both are merged.
            check(
                not any(isinstance(text, str) and "${" in text for text in named)
                and len(named) < 2,
                key,
                value,
                f"{name} must be a value that is written out",
            )
    if count > MOST_REFERENCES:
        raise ValueError(f"config={path}: {count} times ${{; write the values out")


def _without_secrets(line: str, parts: Sequence[dict]) -> str:
    """Return an error's line with the values of environment variables taken out again."""
    for part in parts:
        for _, value in _leaves(part):
            for name, _ in REFERENCE.findall(value) if isinstance(value, str) else ():
                if name and len(os.environ.get(name, "")) > 2:
                    line = line.replace(os.environ[name], f"${{oc.env:{name}}}")
    return line


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
    """Return the data.name that reads a path: npz, npy, zip, latents, else imagefolder."""
    path = Path(path).expanduser()
    if (path / LATENTS).is_file():
        return "latents"
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in ("npz", "npy", "zip") and not path.is_dir() else "imagefolder"


def read_yaml(path: str | Path) -> dict:
    """Return what a YAML file holds, ${...} as it stands there.

    Args:
        path: of the file, or the name of a config that comes along; a path that exists wins.

    Raises:
        ValueError: no such file, not YAML of keys and values, too large or too deep.
    """
    path = Path(path).expanduser()
    if not path.exists():
        path = shipped(CONFIGS).get(str(path), path)
    if not path.is_file():
        section = str(path).partition(".")[0]
        if section in {item.name for item in dataclasses.fields(Config)}:
            raise ValueError(f"config={path}: no such file; to change a setting write {path}=VALUE")
        raise ValueError(f"config={path}: no such file{nearest(CONFIGS, path.stem)}")
    try:
        data = read_plain(path)
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MB")
        text, depth = data.decode(), 0
        # The reader calls itself for what is nested; looking at the events does not.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            starts = isinstance(event, yaml.CollectionStartEvent)
            depth += starts - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
        values: Any = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # the YAML reader raises many kinds
        raise ValueError(f"config={path}: not YAML: {' '.join(str(error).split())}") from None
    check(OmegaConf.is_dict(values), "config", path, "must hold key: value pairs")
    plain: Any = OmegaConf.to_container(values)
    _check_references(plain, path)
    return plain


def _split_word(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    check(equals and key, "argument", word, "write key=value")
    return key, text


def _fields(cls: type, schema: dict[str, type], prefix: str) -> dict[str, Any]:
    """Return {key: type} of a dataclass; method and network stand for the chosen Config."""
    hints = get_type_hints(cls)
    types = {item.name: hints[item.name] for item in dataclasses.fields(cls)}
    return types | schema if not prefix else types


def _type_of(key: str, schema: dict[str, type], text: str) -> Any:
    cls, prefix = Config, ""
    for part in key.split("."):
        check(dataclasses.is_dataclass(cls), key, "", f"{prefix[:-1]} has no keys of its own")
        types = _fields(cls, schema, prefix)
        check(part in types, f"unknown key {prefix}{part}", text, _nearest(part, types, prefix))
        cls, prefix = types[part], f"{prefix}{part}."
    check(not dataclasses.is_dataclass(cls), key, "", f"is a section; set {key}.KEY=value")
    return cls


def _check_keys(values: dict, cls: Any, schema: dict[str, type], prefix: str) -> None:
    """Raise ValueError for an unknown key or a section that is none."""
    types = _fields(cls, schema, prefix)
    for name, value in values.items():
        key = f"{prefix}{name}"
        check(name in types, f"unknown key {key}", "", _nearest(str(name), types, prefix))
        check(value != "???", key, "???", "is missing; give a value")
        if dataclasses.is_dataclass(types[name]):
            check(isinstance(value, dict), key, value, f"is a section; set {key}.KEY")
            _check_keys(value, types[name], schema, f"{key}.")


def _check_types(values: dict, cls: Any, schema: dict[str, type], prefix: str) -> None:
    types = _fields(cls, schema, prefix)
    for name, value in values.items():
        key, kind = f"{prefix}{name}", types[name]
        if dataclasses.is_dataclass(kind):
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
    if kind is float:  # JSON has no infinity, and YAML's is .inf
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number or value in ("inf", "-inf")
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _nearest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(choices), 1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{hint}choose from {', '.join(choices)}"
