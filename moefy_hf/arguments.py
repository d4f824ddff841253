"""Command line arguments from the fields of a dataclass, and the numbers that they take."""

import argparse
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import MoefyError


def share_or_count(text: str) -> int | float:
    """Read a share of the experts (0.2) or a number of them (4)."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise ArgumentTypeError(f"a share like 0.2 or a number of experts, got {text!r}") from None


def name_and_number(text: str) -> tuple[str, int | float]:
    """Read NAME=NUMBER."""
    name, _, value = text.partition("=")
    try:
        return name, int(value) if value.isdigit() else float(value)
    except ValueError:
        raise ArgumentTypeError(f"a setting and a number like rank=64 or inputs=0.4, got {text!r}") from None


def positive(text: str) -> int:
    """Read a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"a whole number from 1, got {text!r}")
    return number


def switch(text: str) -> bool:
    """Read true or false."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ArgumentTypeError(f"true or false, got {text!r}")
    return words[text.lower()]


def about(help: str, parse: Callable[[str], Any], nargs: str | None = None, **made: Any) -> dict[str, Any]:
    """Describe a setting, as the `metadata` of a dataclass' field: what it means, and how a command line reads it.

    Args:
        parse: reads one word, as the `type` of argparse does.
        nargs: as argparse has it: "+" for several words.
        made: further argparse settings: `metavar`, `choices`.
    """
    return {"help": help, "parse": parse, "argparse": {"nargs": nargs, **made}}


def default_of(field: Field) -> Any:
    """The value that a field has where nobody sets it."""
    if field.default is not MISSING:
        return field.default
    assert field.default_factory is not MISSING, f"{field.name} has no default"
    return field.default_factory()


def add_arguments(parser: ArgumentParser, cls: type, leave_out: tuple[str, ...] = (), *, flags: bool = False) -> None:
    """Give a parser one argument for each field of a dataclass whose fields have `about` as metadata.

    What a command line does not say is absent from the parsed namespace: `given` finds the rest.
    """
    group = parser.add_argument_group(cls.__name__)
    for field in fields(cls):
        if field.name not in leave_out:
            default = default_of(field)
            shown = "" if default is None or default == {} else f" (default: {default})"
            made = {key: value for key, value in field.metadata["argparse"].items() if value is not None}
            made |= {"default": argparse.SUPPRESS, "help": (field.metadata["help"] + shown).replace("%", "%%")}
            if field.metadata["parse"] is switch and flags:
                made = {"default": argparse.SUPPRESS, "help": made["help"], "action": "store_true"}
            elif field.metadata["parse"] is switch:
                made |= {"type": switch, "nargs": "?", "const": True}
            else:
                made["type"] = field.metadata["parse"]
            group.add_argument(f"--{field.name}", **made)


def given(args: Namespace, cls: type) -> dict[str, Any]:
    """What a command line said of a dataclass' fields."""
    return {field.name: vars(args)[field.name] for field in fields(cls) if field.name in vars(args)}


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that says the same as settings out of a YAML file.

    A mapping becomes NAME=VALUE words, as `router_settings` takes them.
    """
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = [f"{key}={number}" for key, number in value.items()]
        if value == []:  # which is the default, where it is allowed
            continue
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        MoefyError: there is no such file, or it is no mapping of names to values.
    """
    if not Path(path).is_file():
        raise MoefyError(f"--config {path}: there is no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoefyError(f"--config {path} is no YAML: {error}") from None
    if not isinstance(settings, dict):
        raise MoefyError(f"--config {path} must hold NAME: VALUE lines")
    return {name: value for name, value in settings.items() if value is not None}
