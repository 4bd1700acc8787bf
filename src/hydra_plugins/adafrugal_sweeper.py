"""Extend Hydra's basic sweeper: check the settings of every job before the first one starts, or only plan the jobs.

Hydra finds plugins in the `hydra_plugins` namespace; `conf/config.yaml` selects this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from adafrugal.launching.dry_run import DryRun
from adafrugal.settings.compose import check, read_files_once, refuse_credentials
from adafrugal.system.errors import SettingError


class CheckedSweeper(BasicSweeper):
    """Refuses a sweep if any job has a wrong setting; collects how its jobs ended, with any launcher.

    The launcher's `task_function` is an `adafrugal.launching.jobs.Jobs`; its `processes`, if any, their number per job.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare for `sweep`; a dry run needs no launcher."""
        self._dry_run = task_function if isinstance(task_function, DryRun) else None
        if self._dry_run is None:
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs; give a dry run their settings instead, and write nothing.

        Raises:
            SettingError: an override holds a credential, which Hydra would write beside the runs before any check.
        """
        for word in arguments:
            refuse_credentials(word, word.partition("=")[0])
        if self._dry_run is not None:
            read_files_once()
            parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
            (jobs,) = self.split_arguments(parser.parse_overrides([*self._parse_config(), *arguments]), None)
            self._each(jobs, lambda overrides: self._dry_run.plan(overrides, *self._composed(overrides)))
            return []
        batches = super().sweep(arguments)
        self.launcher.task_function.ends.update(enumerate(job.return_value for batch in batches for job in batch))
        return batches

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Compose and check every job.

        Raises:
            SettingError: a job cannot run; the message names the job and its error.
        """
        several = getattr(self.launcher, "processes", 1)

        def checked(overrides: Sequence[str]) -> None:
            if check(*self._composed(overrides)).trainer.parallel == "none" and several > 1:
                given = f"trainer.parallel is none, and {several} processes make each job"
                raise SettingError(f"{given}; allowed: ddp, fsdp")

        self._each(batch, checked)

    def _each(self, jobs: Sequence[Sequence[str]], check_one: Callable[[Sequence[str]], None]) -> None:
        for overrides in jobs:
            try:
                check_one(overrides)
            except SettingError as error:
                raise SettingError(f"no job was started, since {' '.join(overrides)} cannot run: {error}") from error

    def _composed(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
        """Return the settings of one job, unchecked, and the file chosen for each group."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        choices = dict(composed.hydra.runtime.choices)
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        return composed, choices


_CONF = BasicSweeperConf(_target_="hydra_plugins.adafrugal_sweeper.CheckedSweeper", params={})
ConfigStore.instance().store(group="hydra/sweeper", name="adafrugal", node=_CONF, provider="adafrugal")
