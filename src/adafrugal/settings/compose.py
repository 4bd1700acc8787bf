"""Compose the words of a command and the repository's settings files into checked settings."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.settings import REPOSITORY, explain, schema, validate
from adafrugal.settings.ranges import parts
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError


@functools.cache  # once a process, because it takes a fifth of a composition's time
def register(repository: Path = REPOSITORY) -> None:
    """Register the schema, and the resolvers that the files use, with Hydra and OmegaConf."""
    schema.register()
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
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import open_dict

    if not (REPOSITORY / "conf" / "config.yaml").exists():
        raise SettingError(f"{REPOSITORY} has no conf/config.yaml; `pip install -e .` in a clone of the repository")
    register()
    try:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            loader.repository = _files(REPOSITORY)
            found = compose("config", list(overrides), return_hydra_config=True)
        hydra = found.hydra
        with open_dict(found):
            del found["hydra"]
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a number for a group
        raise SettingError(explain.explain(error)) from error
    return found, dict(hydra.runtime.choices), hydra


@functools.cache
def _files(repository: Path) -> Any:
    """Return Hydra's reader of the settings files; it reads each file once, which halves a composition's time."""
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
    validate.refuse_unknown_keys(composed)
    try:
        validate.refuse_credentials(OmegaConf.to_container(composed, resolve=True))
        found: Settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise SettingError(explain.explain(error)) from error
    validate.refuse_choices(choices)
    found.arm = found.arm or choices["optimizer"]
    validate.refuse_impossible(found)
    if to_run:
        validate.refuse_uninstalled(found)
    for part in parts(found):
        part.canonical(found)
    return found
