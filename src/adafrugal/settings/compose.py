"""The repository's settings files, for the commands beside train.py that take the same settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from adafrugal.settings import check, schema
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError

REPOSITORY = Path(__file__).resolve().parents[3]


@functools.cache  # once a process: it costs a fifth of a composition
def register(repository: Path = REPOSITORY) -> None:
    """What composition needs beside the files: the schema, and the resolvers that they use."""
    schema.register()
    OmegaConf.register_new_resolver("repository", lambda path="": str(repository / path), replace=True)
    OmegaConf.register_new_resolver("groups", lambda: check.groups(repository), replace=True)


def settings(overrides: Sequence[str]) -> Settings:
    """The checked settings of one run, as train.py would compose them from the same words.

    Raises:
        SettingError: a wrong setting, or there are no settings files, since the package is installed without them.
    """
    found, choices, _ = composed(overrides)
    return check.check(found, choices)


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str], DictConfig]:
    """What train.py's words compose, not checked yet: the settings, the files that were chosen, and Hydra's own part.

    Raises:
        SettingError: a word that cannot be composed, or there are no settings files.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    if not (REPOSITORY / "conf" / "config.yaml").exists():
        raise SettingError(f"{REPOSITORY} has no conf/config.yaml; `pip install -e .` in a clone of the repository")
    register()
    try:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            found = compose("config", list(overrides), return_hydra_config=True)
        hydra = found.hydra
        with open_dict(found):
            del found["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(check.explain(error)) from error
    return found, dict(hydra.runtime.choices), hydra
