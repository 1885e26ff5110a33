"""key=value words of a command line: read, checked, explained by --help."""

import dataclasses
import difflib
import re
from typing import Any, get_args, get_origin

import torch

from genmodels.config.schema import Config, check


def parse_value(key, text, kind):
    """Return the word's text as the type the schema asks for (never by YAML's guess).

    YAML alone reads 12:30 as 750, 1e-4 as text, 3,5 as text and a bare word as null.
    """
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


def split_words(argv):
    """Return (positionals, {key: text}, flags): words with =, words without, words with --.

    Of a key given twice the later value holds. A word is key=value if what stands before the first
    = could be a key (letters, digits, _ and .).
    """
    positionals, words, flags = [], {}, []
    for word in argv:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            flags.append(word)
        elif equals and key.replace("_", "").replace(".", "").isalnum():
            words[key] = text
        else:
            positionals.append(word)
    return positionals, words, flags


def joined_flags(argv, key):
    """Return the words with `--key value` and `--key=value` written as key=value."""
    words = list(argv)
    if f"--{key}" in words[:-1]:
        place = words.index(f"--{key}")
        words[place : place + 2] = [f"{key}={words[place + 1]}"]
    return [word.removeprefix("--") if word.startswith(f"--{key}=") else word for word in words]


def check_flags(flags, allowed):
    """Raise ValueError for a --word that is not allowed."""
    for flag in flags:
        if flag not in allowed:
            hint = f"{flag.lstrip('-').split('=')[0]}=..."
            raise ValueError(f"{flag}: settings are written {hint}; flags are {', '.join(allowed)}")


def check_choice(key, value, choices):
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value}: choose from {', '.join(choices)}")


def check_device(key, value, choices):
    """Raise ValueError unless the value is one of the choices and torch has such a device here."""
    check_choice(key, value, choices)
    if value in ("cuda", "mps") and not getattr(torch, value).is_available():
        raise ValueError(f"{key}={value}: torch finds no such device here; write {choices[0]}")


def one_model(positionals):
    """Return the one positional word, the MODEL.

    Raises:
        ValueError: none, or more than one.
    """
    if len(positionals) != 1:
        given = " ".join(positionals) or "nothing"
        raise ValueError(f"model={given}: name one run folder, .ckpt or exported folder")
    return positionals[0]


def seed_list(options):
    """Return the seeds of the options num, seed and seeds.

    Raises:
        ValueError: num or batch < 1, a negative seed, or a malformed range.
    """
    for key, least in (("num", 1), ("seed", 0), ("batch", 1)):
        if options[key] < least:
            raise ValueError(f"{key}={options[key]}: must be >= {least}")
    if options["seeds"]:
        return parse_seeds(options["seeds"])
    return list(range(options["seed"], options["seed"] + options["num"]))


def typed_words(words, schema, also=()):
    """Return the words as values of the schema's types, defaults filled in.

    Args:
        words: {key: text}.
        schema: {key: (type, default, doc)}.
        also: further keys to name in an error.

    Raises:
        ValueError: an unknown key, or a text that is not of the type.
    """
    values = {key: default for key, (_, default, _) in schema.items()}
    for key, text in words.items():
        if key not in schema:
            known = [*schema, *also]
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown key {key}={text}: {hint}choose from {', '.join(known)}")
        values[key] = parse_value(key, text, schema[key][0])
    return values


def help_text(doc, schema):
    """Return a script's docstring followed by its keys with defaults and meaning."""
    lines = [doc.strip(), "", "keys:"]
    for key, (_, default, meaning) in schema.items():
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        lines.append(f"  {f'{key}={shown}':28} {meaning}")
    return "\n".join(lines)


def describe(methods, networks):
    """Return the schema as text: every key with its default and meaning (for --help)."""
    lines = []

    def section(title, cls, prefix):
        lines.append(f"\n{title}: {cls.__doc__.splitlines()[0]}")
        for item in dataclasses.fields(cls):
            if "doc" in item.metadata:
                default = item.default_factory() if callable(item.default_factory) else item.default
                shown = ",".join(map(str, default)) if isinstance(default, list) else default
                shown = str(shown).lower() if isinstance(shown, bool) else shown
                lines.append(f"  {f'{prefix}{item.name}={shown}':34} {item.metadata['doc']}")
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(item.type):
                section(f"{prefix}{item.name}", item.type, f"{prefix}{item.name}.")

    section("general", Config, "")
    for slot, choices in (("method", methods), ("network", networks)):
        for name, cls in choices.items():
            section(f"{slot}.name={name}", cls.Config, f"{slot}.")
    return "\n".join(lines)


def parse_seeds(text, key="seeds"):
    """Return the list of seeds in "0-63,100".

    Raises:
        ValueError: an empty or backward range, or a word that is no range.
    """
    seeds = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"{key}={text}: {part!r} is no seed; write 0-63 or 0-63,100")
        if dash and int(high) < int(low):
            raise ValueError(f"{key}={text}: {part!r} runs backwards; write {high}-{low}")
        seeds += range(int(low), int(high if dash else low) + 1)
    return seeds
