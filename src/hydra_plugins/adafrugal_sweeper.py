"""Extend Hydra's basic sweeper: check the settings of every job before the first one starts.

Hydra finds plugins in the `hydra_plugins` namespace; `conf/config.yaml` selects this one.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from omegaconf import open_dict, read_write

from adafrugal.settings.compose import check, refuse_credentials
from adafrugal.system.errors import SettingError


class CheckedSweeper(BasicSweeper):
    """Refuses a sweep if any job has a wrong setting; collects how its jobs ended, with any launcher.

    The launcher's `task_function` is an `adafrugal.launching.jobs.Jobs`; its `processes`, if any, their number per job.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs.

        Raises:
            SettingError: an override holds a credential, which Hydra would write beside the runs before any check.
        """
        for word in arguments:
            refuse_credentials(word, word.partition("=")[0])
        batches = super().sweep(arguments)
        self.launcher.task_function.ends.update(enumerate(job.return_value for batch in batches for job in batch))
        return batches

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Compose and check every job.

        Raises:
            SettingError: a job cannot run; the message names the job and its error.
        """
        several = getattr(self.launcher, "processes", 1)
        for overrides in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            choices = dict(composed.hydra.runtime.choices)
            with read_write(composed), open_dict(composed):
                del composed["hydra"]
            try:
                if check(composed, choices).trainer.parallel == "none" and several > 1:
                    given = f"trainer.parallel is none, and {several} processes make each job"
                    raise SettingError(f"{given}; allowed: ddp, fsdp")
            except SettingError as error:
                raise SettingError(f"no job was started, since {' '.join(overrides)} cannot run: {error}") from error


_CONF = BasicSweeperConf(_target_="hydra_plugins.adafrugal_sweeper.CheckedSweeper", params={})
ConfigStore.instance().store(group="hydra/sweeper", name="adafrugal", node=_CONF, provider="adafrugal")
