"""key=value words of a command line: read, checked, explained by --help."""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from genmodels.config.schema import Config, Section, check, settings_of

Options = TypeVar("Options", bound=Section)
DEVICES = ("auto", "cpu", "cuda", "mps")
LARGEST_SEED = 2**63  # seeds lie below
MOST_SEEDS = 10**7  # images of one command


def parse_value(key: str, text: str, kind: Any) -> Any:
    """Return the word's text as the type the schema asks for (never by YAML's guess).

    YAML alone reads 12:30 as 750, 1e-4 as text, 3,5 as text and a bare word as null.
    """
    if isinstance(kind, UnionType):  # "float | None": None is only ever a default
        kind = get_args(kind)[0]
    if kind is str or kind is Any:
        return text
    if get_origin(kind) is list:
        items = text.strip().removeprefix("[").removesuffix("]")
        parts = [item.strip() for item in items.split(",")] if items else []
        return [parse_value(key, part, get_args(kind)[0]) for part in parts]
    if kind is bool:
        choices = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        check(text.lower() in choices, key, text, "must be true or false")
        return choices[text.lower()]
    try:
        return kind(text)
    except ValueError:
        pass
    remedy = "must be a number" if kind is float else "must be a whole number"
    if kind is int and re.fullmatch(r"[\d.]+e\+?\d+", text.lower()) and float(text).is_integer():
        remedy += f"; write {int(float(text))}"
    raise ValueError(f"{key}={text}: {remedy}")


def split_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return (positionals, {key: text}, flags): words with =, words without, words with --.

    A word is key=value if what stands before the first = could be a key (letters, digits, _ and .).
    A ~ that begins a value or a positional is the user's home, which shells leave to the command
    there.

    Raises:
        ValueError: a key is given two values.
    """
    positionals: list[str] = []
    words: dict[str, str] = {}
    flags: list[str] = []
    for word in argv:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            flags.append("--help" if word == "-h" else word)
        elif equals and key.replace("_", "").replace(".", "").isalnum():
            text = _at_home(text)
            if words.get(key, text) != text:
                raise ValueError(
                    f"{key}={text}: was given as {key}={words[key]} too; leave one out"
                )
            words[key] = text
        else:
            positionals.append(_at_home(word))
    return positionals, words, flags


def _at_home(text: str) -> str:
    """Return a path with the home of the user in place of its ~; any other text as it is."""
    return str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text


def joined_flags(argv: Sequence[str], key: str) -> list[str]:
    """Return the words with `--key value` and `--key=value` written as key=value."""
    words = list(argv)
    if f"--{key}" in words[:-1]:
        place = words.index(f"--{key}")
        words[place : place + 2] = [f"{key}={words[place + 1]}"]
    return [word.removeprefix("--") if word.startswith(f"--{key}=") else word for word in words]


def check_flags(flags: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise ValueError for a --word that is not allowed."""
    for flag in flags:
        if flag not in allowed:
            hint = f"{flag.lstrip('-').split('=')[0]}=..."
            raise ValueError(f"{flag}: settings are written {hint}; flags are {', '.join(allowed)}")


def check_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value}: choose from {', '.join(choices)}")


def check_device(key: str, value: str) -> None:
    """Raise ValueError unless torch has a device of this name here."""
    import torch

    if value in ("cuda", "mps") and not getattr(torch, value).is_available():
        remedy = "auto" if key == "device" else "cpu"
        raise ValueError(f"{key}={value}: torch finds no such device here; write {remedy}")


def one_model(positionals: Sequence[str]) -> str:
    """Return the one positional word, the MODEL.

    Raises:
        ValueError: none, or more than one.
    """
    if len(positionals) != 1:
        given = " ".join(positionals) or "nothing"
        raise ValueError(f"model={given}: name one run folder, .ckpt or exported folder")
    return positionals[0]


def seed_list(num: int, seed: int, seeds: str) -> list[int]:
    """Return the seeds that the options num, seed and seeds name.

    Raises:
        ValueError: a malformed range, a seed beyond 2^63, or too many for one command.
    """
    if seeds:
        return parse_seeds(seeds)
    check(num <= MOST_SEEDS, "num", num, _TOO_MANY)
    check(seed + num <= LARGEST_SEED, "seed", seed, f"with num={num}: seeds must be in [0, 2^63)")
    return list(range(seed, seed + num))


def typed_words(
    words: Mapping[str, str], schema: Mapping[str, Field], also: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the words as values of the types of these settings; keys not given are left out.

    Args:
        words: {key: text}.
        schema: {key: field}, see settings_of.
        also: further keys to name in an error.

    Raises:
        ValueError: an unknown key, a text that is not of the type, a value beyond the limits.
    """
    values = {}
    for key, text in words.items():
        if key not in schema:
            known = [*schema, *also]
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown key {key}={text}: {hint}choose from {', '.join(known)}")
        item = schema[key]
        values[key] = parse_value(key, text, item.type)
        limits = item.metadata["limits"]
        for part in values[key] if isinstance(values[key], list) else [values[key]]:
            check(limits.allow(part), key, text, limits.remedy)
            check(limits.finite(part), key, text, "must be finite")
    return values


def read_options(
    modes: Mapping[str, type[Options]], words: Mapping[str, str], mode: str | None = None
) -> tuple[str, Options, dict[str, str]]:
    """Return (mode, its options, the words that are no option of any mode: a method's).

    Args:
        modes: {mode: its dataclass of options}; "" is the mode where no other is asked for. A mode
            is asked for by a word of its name, and where several are the first in this order is
            meant.
        words: {key: text}.
        mode: the mode, where something else than a word says it.

    Raises:
        ValueError: an option of another mode, a text that is not of its type, a value beyond its
            limits, and what the dataclass refuses.
    """
    if mode is None:
        mode = next((name for name in modes if name and words.get(name)), "")
    taken = settings_of(modes[mode])
    values: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for key, text in words.items():
        others = [name for name, cls in modes.items() if key in settings_of(cls)]
        if key in taken:
            values |= typed_words({key: text}, taken)
        elif not others:
            rest[key] = text
        elif mode and (text or key not in modes):
            asked = f"{mode}=" if mode in settings_of(modes[mode]) else mode
            raise ValueError(f"{key}={text}: {asked} does not take it; leave it out")
        elif text:
            raise ValueError(f"{key}={text}: needs {others[0]}=; leave it out")
        else:  # `denoise=$EMPTY` asks for nothing, but has to be of its type all the same
            typed_words({key: text}, settings_of(modes[others[0]]))
    return mode, modes[mode](**values), rest


def help_text(cls: type[Section], title: str = "keys:") -> str:
    """Return the title and a line for each option: its default, meaning and limits."""
    return "\n".join([title, *(_line(item, "", 28) for item in settings_of(cls).values())])


def _line(item: Field, prefix: str, width: int) -> str:
    """Return one line of help: key=default, what it means, what it may be."""
    default = item.default_factory() if callable(item.default_factory) else item.default
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    shown = str(shown).lower() if isinstance(shown, bool) else shown
    doc, limits = item.metadata["doc"], item.metadata["limits"]
    if limits.choices:
        doc = f"{doc}: {limits}" if doc else str(limits)
    elif str(limits):
        doc = f"{doc} ({limits})"
    return f"  {f'{prefix}{item.name}={shown}':{width}} {doc}".rstrip()


def describe(methods: Mapping[str, Any], networks: Mapping[str, Any]) -> str:
    """Return the schema as text: every key with its default and meaning (for --help)."""
    lines: list[str] = []

    def section(title: str, cls: type, prefix: str) -> None:
        lines.append(f"\n{title}: {(cls.__doc__ or '').splitlines()[0]}")
        lines.extend(_line(item, prefix, 34) for item in settings_of(cls).values())
        for item in dataclasses.fields(cls):
            if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
                section(f"{prefix}{item.name}", item.type, f"{prefix}{item.name}.")

    section("general", Config, "")
    for slot, choices in (("method", methods), ("network", networks)):
        for name, cls in choices.items():
            section(f"{slot}.name={name}", cls.Config, f"{slot}.")
    return "\n".join(lines)


_TOO_MANY = f"are more than the {MOST_SEEDS} images of one command; make them in parts"


def parse_seeds(text: str, key: str = "seeds") -> list[int]:
    """Return the list of seeds in "0-63,100".

    Raises:
        ValueError: an empty or backward range, a word that is no range, or too many of them.
    """
    ranges: list[range] = []  # no list, before it is known how long it gets
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"{key}={text}: {part!r} is no seed; write 0-63 or 0-63,100")
        check(int(high or low) < LARGEST_SEED, key, text, "must be in [0, 2^63)")
        if dash and int(high) < int(low):
            raise ValueError(f"{key}={text}: {part!r} runs backwards; write {high}-{low}")
        ranges.append(range(int(low), int(high if dash else low) + 1))
    # Not len(): it knows no more than 2^63.
    count = sum(seeds.stop - seeds.start for seeds in ranges)
    check(count <= MOST_SEEDS, key, text, _TOO_MANY)
    return [seed for seeds in ranges for seed in seeds]
