"""From the words of a command and the repository's settings files to checked settings."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.optim import controls
from adafrugal.settings import REPOSITORY, explain
from adafrugal.settings.identity import locate_checkpoints
from adafrugal.settings.pairing import choose_source
from adafrugal.settings.ranges import check_ranges, parts
from adafrugal.settings.schema import SCHEMAS, LocalTracking, Settings, is_plain_name
from adafrugal.system import secrets
from adafrugal.system.errors import SettingError


@functools.cache  # once a process, because it takes a fifth of a composition's time
def register(repository: Path = REPOSITORY) -> None:
    """Register the schema, and the resolvers that the files use, with Hydra and OmegaConf."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Settings)
    for group, schemas in SCHEMAS.items():
        for schema in schemas:
            store.store(group=group, name=f"schema_{schema.kind}", node=schema)
    OmegaConf.register_new_resolver("repository", lambda path="": str(repository / path), replace=True)
    OmegaConf.register_new_resolver("groups", lambda: explain.groups(repository), replace=True)


def settings(overrides: Sequence[str]) -> Settings:
    """Return the checked settings of one run, as train.py would compose them from the same words.

    Raises:
        SettingError: a wrong setting, or no settings files, because the package was installed without them.
    """
    found, choices, _ = composed(overrides)
    return check(found, choices)


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str], DictConfig]:
    """Compose train.py's words; return unchecked settings, the file chosen for each group, and Hydra's settings.

    Raises:
        SettingError: a word that cannot be composed, or no settings files.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict

    if not (REPOSITORY / "conf" / "config.yaml").exists():
        raise SettingError(
            f"{REPOSITORY} has no conf/config.yaml; train.py and its settings are in the repository alone: "
            "`pip install -e .` in a clone of the repository"
        )
    register()
    _offer_controls()
    try:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            read_files_once()
            found = compose("config", list(overrides), return_hydra_config=True)
        hydra = found.hydra
        with open_dict(found):
            del found["hydra"]
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a number for a group
        raise SettingError(explain.explain(error)) from error
    return found, dict(hydra.runtime.choices), hydra


def _offer_controls() -> None:
    """Give each registered control of the user's own a name in its group, beside the files of conf/optimizer."""
    from hydra.core.config_store import ConfigStore

    for group, kinds in (("density", controls.DENSITIES), ("interval", controls.INTERVALS)):
        for kind, control in kinds.items():
            if not (REPOSITORY / "conf" / "optimizer" / group / f"{kind}.yaml").exists():
                given = {f.name: "???" if f.default is MISSING else f.default for f in fields(control) if f.init}
                ConfigStore.instance().store(group=f"optimizer/{group}", name=kind, node={"kind": kind} | given)
                _files.cache_clear()  # the class may have been defined anew


def read_files_once() -> None:
    """Let Hydra, while it is initialized, read each settings file once; that halves a composition's time."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().config_loader().repository = _files()


@functools.cache
def _files() -> Any:
    """Return Hydra's reader of the settings files, which keeps what it has read."""
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.global_hydra import GlobalHydra

    class Files(ConfigRepository):
        _read = functools.cache(ConfigRepository.load_config)

        def load_config(self, config_path: str) -> Any:
            return copy.deepcopy(self._read(config_path))  # compositions change what they get

        def __deepcopy__(self, _: Any) -> Files:  # Hydra makes a copy for each composition
            return self

    return Files(GlobalHydra.instance().config_loader().config_search_path)


def check(composed: DictConfig, choices: Mapping[str, str], to_run: bool = True) -> Settings:
    """Return the settings of one run: typed, valid, and in canonical form.

    Args:
        composed: the settings that Hydra composed.
        choices: group -> the chosen file; that of the optimizer is the arm's name if `arm` is null.
        to_run: whether to require the packages that the run needs.

    Raises:
        SettingError: an unknown key, a missing value or an impossible one; the message is one line.
    """
    _refuse_unknown_keys(composed)
    try:
        refuse_credentials(OmegaConf.to_container(composed, resolve=True))
        found: Settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise SettingError(explain.explain(error)) from error
    _refuse_choices(choices)
    found.arm = found.arm or choices["optimizer"]
    refuse_impossible(found)
    if to_run:
        _refuse_missing_packages(found)
    for part in parts(found):
        part.canonical(found)
    choose_source(found, choices, recorded)
    locate_checkpoints(found, choices)
    return found


def recorded(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a record's config.yaml, or of one with values exchanged; unknown keys are dropped.

    Its tracking is local, since who reads a record copies nothing, and may lack the package with which the run did.

    Raises:
        SettingError: an impossible value; the message is one line.
    """
    typed = OmegaConf.structured(Settings)
    try:
        for name, value in {**config, "tracking": {"kind": LocalTracking.kind}}.items():
            schemas = SCHEMAS.get(name, ())
            schema = next((s for s in schemas if s.kind == value["kind"]), OmegaConf.get_type(typed, name))
            if is_dataclass(schema):
                known = {f.name for f in fields(schema)}
                kept = {key: v for key, v in value.items() if key in known}  # an older version had others
                typed[name] = OmegaConf.merge(OmegaConf.structured(schema), kept)
            else:
                typed[name] = value
        found: Settings = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise SettingError(explain.explain(error)) from error
    refuse_impossible(found)
    _refuse_missing_packages(found)
    return found


def _refuse_missing_packages(settings: Settings) -> None:
    """Raise a SettingError about a part whose package is not installed."""
    for part in parts(settings):
        if part.package is not None and find_spec(part.package) is None:
            what = f"{part.path} needs the package {part.package}, which is not installed"
            raise SettingError(f"{what}; pip install {part.package.replace('_', '-')}, or choose another {part.path}")


def refuse_impossible(settings: Settings) -> None:
    """Raise a SettingError about the first value that is impossible, or does not go with the others."""
    settings.task.check(settings)  # first, because all other checks rely on the kinds of data and model
    for part in parts(settings):
        check_ranges(part)
    for part in parts(settings):
        part.check(settings)


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


def _refuse_unknown_keys(node: DictConfig, path: str = "") -> None:
    """Raise a SettingError if a key was added with + or removed with ~, since composition allows both."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    allowed = [f.name for f in fields(schema)]
    for name in allowed:
        if name not in node:  # missing, or removed
            why = "" if OmegaConf.is_missing(node, name) else f", since ~{path}{name} takes it away; leave that out"
            raise SettingError(f"{path}{name}: no value is given{why}")
    for key in node:
        if key not in allowed:
            raise SettingError(explain.no_such(f"{path}{key}", allowed))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown_keys(child, f"{path}{key}.")
        elif path == "" and key in SCHEMAS:
            raise SettingError(f"{key} is {node[key]!r}; name a file of conf/{key}, such as those in `--help`")


def _refuse_choices(choices: Mapping[str, str | None]) -> None:
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
