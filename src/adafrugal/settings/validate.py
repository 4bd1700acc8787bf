"""Refuse invalid settings: unknown keys, credentials, impossible values, missing packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adafrugal.settings import REPOSITORY
from adafrugal.settings.explain import no_such
from adafrugal.settings.ranges import check_ranges, parts
from adafrugal.settings.schema import SCHEMAS, Settings, is_plain_name
from adafrugal.system import secrets
from adafrugal.system.errors import SettingError


def refuse_impossible(settings: Settings) -> None:
    """Raise a SettingError about the first value that is impossible, or does not go with the others."""
    settings.task.check(settings)  # first, because all other checks rely on the kinds of data and model
    for part in parts(settings):
        check_ranges(part)
    for part in parts(settings):
        part.check(settings)


def refuse_uninstalled(settings: Settings) -> None:
    """Raise a SettingError if the optimizer or the model needs a package that is not installed."""
    for part in (settings.optimizer, settings.model):
        if part.package is not None and find_spec(part.package) is None:
            what = f"{part.path} needs the package {part.package}, which is not installed"
            raise SettingError(f"{what}; pip install {part.package.replace('_', '-')}, or choose another {part.path}")


def refuse_unknown_keys(node: DictConfig, path: str = "") -> None:
    """Raise a SettingError if a key was added with + or removed with ~, since composition allows both."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    allowed = [f.name for f in fields(schema)]
    for name in allowed:
        if name not in node and not OmegaConf.is_missing(node, name):
            raise SettingError(f"{path}{name}: no value is given, since ~{path}{name} takes it away; leave that out")
    for key in node:
        if key not in allowed:
            raise SettingError(no_such(f"{path}{key}", allowed))
        if OmegaConf.is_missing(node, key):
            raise SettingError(f"{path}{key}: no value is given")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            refuse_unknown_keys(child, f"{path}{key}.")
        elif path == "" and key in SCHEMAS:
            raise SettingError(f"{key} is {node[key]!r}; name a file of conf/{key}, such as those in `--help`")


def refuse_credentials(value: Any, name: str = "") -> None:
    """Raise a SettingError if a setting, also in a container, holds a credential, since settings are recorded."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_credentials(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, str):
        for variable, secret in secrets.named().items():
            if secret in value:
                raise SettingError(
                    f"{name} holds the value of {variable} in the environment, and every setting stands in the record; "
                    "allowed: settings without keys. What needs one reads the variable itself"
                )


def refuse_choices(choices: Mapping[str, str | None]) -> None:
    """Raise a SettingError if a group's choice is missing, a path, or without effect."""
    for group in ("trainer", "eval"):  # without a file, the schema's defaults would be used silently
        if choices.get(group) is None:
            raise SettingError(f"{group}: no value is given, since ~{group} takes it away; leave that out")
    for group in ("task", "data", "model", "optimizer"):  # their names form the name of the run's directory
        if not is_plain_name(given := str(choices.get(group))):
            raise SettingError(f"{group} is {given!r}; allowed: the name of a file of conf/{group}, not a path to it")
    optimizers, optimizer = REPOSITORY / "conf" / "optimizer", choices["optimizer"]
    if not (optimizers / "for" / f"{choices.get('optimizer/for@optimizer')}.yaml").exists():
        return
    listed = OmegaConf.load(optimizers / f"{optimizer}.yaml").defaults
    usual = {group: name for entry in listed if not isinstance(entry, str) for group, name in entry.items()}
    instead = {"density": "optimizer.rank={kind:cosine,start:8,end:2}", "interval": "optimizer.interval=50"}
    for group, value in instead.items():
        if (given := choices.get(f"optimizer/{group}")) != usual.get(group):
            raise SettingError(
                f"optimizer/{group} is {given}, which optimizer={optimizer} overrules with its own for "
                f"task={choices['task']}; write a value instead, such as {value}"
            )
