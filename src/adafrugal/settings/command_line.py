"""The options of a command, `--name`: argparse, whose errors are a line each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

from adafrugal.settings.explain import nearest
from adafrugal.system.errors import SettingError

_NUMBERS = {"int": "a whole number", "float": "a number"}
_FIRST = ("trainer", "optimizer", "data", "model", "schedule")  # groups, where several have a setting of a name


class Parser(argparse.ArgumentParser):
    """Raises a SettingError where argparse prints its usage and exits; takes no abbreviated options.

    Args:
        beside_settings: whether the command takes settings, too, which may be meant.
        how: of argparse.
    """

    def __init__(self, *, beside_settings: bool = False, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)
        self._beside_settings = beside_settings

    def error(self, message: str) -> NoReturn:
        """Raise a SettingError: what was given, and what is allowed."""
        name, _, said = message.removeprefix("argument ").partition(": ")
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        if name == "unrecognized arguments":
            word = next((word for word in said.split() if word.startswith("-")), None)
            if word is not None:
                raise SettingError(no_option(word, self._option_string_actions, self._beside_settings))
            raise SettingError(f"{said} is more than the command takes; allowed: {usage}")
        if value := re.fullmatch(r"invalid (\w+) value: (.*)", said):
            raise SettingError(f"{name} is {value[2]}; allowed: {_NUMBERS.get(value[1], value[1])}")
        if name == "the following arguments are required":
            raise SettingError(f"{said}: not given; allowed: {usage}")
        if said.startswith("expected "):
            raise SettingError(f"{name}: no value is given; allowed: {usage}")
        raise SettingError(f"{message}; allowed: {usage}")


def no_option(word: str, options: Iterable[str], beside_settings: bool) -> str:
    """Return the message for an option that does not exist: the setting that may be meant, or the nearest option."""
    name, _, value = word.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    meant = [setting for setting in _settings() if plain in (setting, setting.rpartition(".")[2])]
    if beside_settings and meant:
        order = lambda s: (s.count("."), [*_FIRST, group := s.partition(".")[0]].index(group))  # noqa: E731
        setting = f"{min(meant, key=order)}={value or '…'}"
        return f"there is no option {name}; did you mean {setting}? Settings are written without dashes"
    known = [option for option in options if option.startswith("--")]
    return f"there is no option {name}; {nearest(name, known, '--help lists them')}"


def _settings() -> set[str]:
    """Return the names of all settings."""
    from adafrugal.settings.ranges import parts
    from adafrugal.settings.schema import SCHEMAS, Settings

    known = (Settings, *(schema for schemas in SCHEMAS.values() for schema in schemas))
    return {f"{part.path}.{f.name}".lstrip(".") for schema in known for part in parts(schema()) for f in fields(part)}
