"""Extend Hydra's basic sweeper: check the settings of every job before the first one starts.

Hydra finds plugins in the `hydra_plugins` namespace; `conf/config.yaml` selects this one.
"""

# No `from __future__ import annotations` here: Hydra executes plugins outside sys.modules, where dataclasses cannot
# look up annotations that are strings.
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from adafrugal.settings.compose import check
from adafrugal.settings.validate import refuse_credentials
from adafrugal.system.errors import SettingError


@dataclass
class CheckedSweeperConf:
    """The fields of Hydra's basic sweeper."""

    _target_: str = "hydra_plugins.adafrugal_sweeper.CheckedSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)


class CheckedSweeper(BasicSweeper):
    """Refuses a sweep if any job has a wrong setting; collects how its jobs ended, with any launcher.

    The task function is an `adafrugal.launching.jobs.Jobs`. A launcher may have `processes`, their number per job.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the task function, which collects the ends of jobs."""
        self._jobs = task_function
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs.

        Raises:
            SettingError: an override holds a credential, which Hydra would write beside the runs before any check.
        """
        for word in arguments:
            refuse_credentials(word, word.partition("=")[0])
        batches = super().sweep(arguments)
        self._jobs.ends.update(enumerate(job.return_value for batch in batches for job in batch))
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
                    each = f"and {several} processes make each job"
                    raise SettingError(f"trainer.parallel is none, {each}; allowed: ddp, fsdp")
            except SettingError as error:
                raise SettingError(f"no job was started, since {' '.join(overrides)} cannot run: {error}") from error


ConfigStore.instance().store(group="hydra/sweeper", name="adafrugal", node=CheckedSweeperConf, provider="adafrugal")
