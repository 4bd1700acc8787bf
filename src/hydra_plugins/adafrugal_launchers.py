"""Hydra launchers of a sweep's jobs: on the GPUs of this machine, or through submitit.

A file of conf/hydra/launcher selects one. A job is sent as its overrides, and its settings are composed when it starts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from adafrugal.launching import local
from adafrugal.launching.jobs import Job
from adafrugal.system.errors import FAILED, SettingError, line
from adafrugal.system.stderr import tell

if TYPE_CHECKING:
    import submitit


class _Elsewhere(Launcher):
    """A launcher of jobs that run in other processes."""

    processes: int  # per job
    counts: dict[str, Any]  # settings that must be whole numbers from 1 on, by name
    package: str | None = None  # that it needs
    passes_on: bool = True  # whether the first signal goes to the jobs, which end in order; else it ends the waiting

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare for `launch`; `task_function` is an `adafrugal.launching.jobs.Jobs`.

        Raises:
            SettingError: a package is missing, a count is not a whole number from 1 on, or torchrun started train.py.
        """
        self.task_function, self._stop = task_function, task_function.stop
        self._name = config.hydra.runtime.choices["hydra/launcher"]
        self._always = [word for word in config.hydra.overrides.hydra if word.startswith("hydra.searchpath=")]
        if os.environ.get("WORLD_SIZE", "1") != "1":
            several = f"hydra/launcher is {self._name} and WORLD_SIZE is {os.environ['WORLD_SIZE']}"
            raise SettingError(f"{several}; start train.py without torchrun, which it uses itself")
        if self.package is not None and find_spec(self.package) is None:
            given = f"hydra/launcher is {self._name}, which needs {self.package}"
            raise SettingError(f"{given}; pip install {self.package}, or leave it out")
        for setting, number in self.counts.items():
            if not isinstance(number, int) or number < 1:
                raise SettingError(f"hydra.launcher.{setting} is {number}; allowed: a whole number from 1 on")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs and return their ends; a second signal raises KeyboardInterrupt."""
        self._stop.training = self.passes_on
        try:
            ends = self._run([[*overrides, *self._always] for overrides in job_overrides], initial_job_idx)
        finally:
            self._stop.training = False
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=job) for job in ends]

    def _run(self, jobs: Sequence[Sequence[str]], first: int) -> list[Job]:
        raise NotImplementedError


class GpusLauncher(_Elsewhere):
    """Runs jobs in parallel on this machine; its settings are described in conf/hydra/launcher/gpus.yaml."""

    def __init__(self, gpus_per_job: int, n_jobs: int | None) -> None:
        self.processes, self._n_jobs = gpus_per_job, n_jobs
        self.counts = {"gpus_per_job": gpus_per_job, "n_jobs": 1 if n_jobs is None else n_jobs}

    def _run(self, jobs: Sequence[Sequence[str]], first: int) -> list[Job]:
        return local.run(jobs, self._slots()[: len(jobs)], self.processes, self._stop, first)

    def _slots(self) -> list[str | None]:
        """Return the GPUs of each concurrent job; more jobs than there are groups of GPUs share these evenly."""
        found, each = local.gpus(), self.processes
        if found and len(found) < each:
            raise SettingError(f"hydra.launcher.gpus_per_job is {each}; allowed: up to {len(found)}, which are here")
        if not found and self._n_jobs is None:
            several = "hydra.launcher.n_jobs=2: two at a time, on the CPU"
            local.say(sys.stdout, f"no GPU is found, so jobs run one by one; {several}\n")
        groups = [",".join(found[first : first + each]) for first in range(0, len(found) - each + 1, each)] or [None]
        return [groups[n % len(groups)] for n in range(self._n_jobs or len(groups))]


class SubmititLauncher(_Elsewhere):
    """Starts jobs through submitit: as one array on Slurm, or, for a trial, all at once on this machine.

    Its settings are described in conf/hydra/launcher/slurm.yaml; `parameters` are those of submitit's executor.
    """

    package = "submitit"

    def __init__(self, cluster: str, submitit_folder: str, **parameters: Any) -> None:
        self._cluster, self._folder, self._parameters = cluster, submitit_folder, parameters
        self.counts = {name: parameters[name] for name in ("nodes", "tasks_per_node", "timeout_min")}
        self.passes_on = cluster == "local"

    @property
    def processes(self) -> int:
        """Number of processes per job."""
        return self._parameters["nodes"] * self._parameters["tasks_per_node"]

    def _run(self, jobs: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Submit the jobs, and wait for them."""
        submitted, asked = self._submit(jobs), False
        for number, (job, words) in enumerate(zip(submitted, jobs, strict=True), first + 1):
            local.say(sys.stdout, f"── job {number}: {' '.join(words)} → {job.paths.stdout}\n")
        try:
            while not all(job.done() for job in submitted):
                if self._stop.requested and not asked:
                    asked = True
                    _terminate(submitted)
                time.sleep(0.2)
        except KeyboardInterrupt:
            if self.passes_on:
                _terminate(submitted)
            else:
                tell(f"the jobs stay with Slurm; `scancel {submitted[0].job_id.partition('_')[0]}` ends them")
            raise
        return [_end(job, words) for job, words in zip(submitted, jobs, strict=True)]

    def _submit(self, jobs: Sequence[Sequence[str]]) -> Sequence[submitit.Job[Job]]:
        import submitit

        from adafrugal.launching import slurm

        try:
            executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
            given = {name: value for name, value in self._parameters.items() if value is not None}
            executor.update_parameters(**{f"{self._cluster}_{name}": value for name, value in given.items()})
            # block SIGINT in the children: on this machine Ctrl-C would make submitit's processes end their jobs
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return executor.map_array(slurm.run, jobs)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except (RuntimeError, ValueError, NameError, TypeError) as error:  # from submitit, also if Slurm refuses
            raise SettingError(f"hydra/launcher is {self._name}: {line(error)}") from error


def _terminate(jobs: Sequence[submitit.Job[Job]]) -> None:
    """Send SIGTERM to submitit's processes on this machine, which pass it on; their job ids are process ids."""
    for job in jobs:
        if not job.done():
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)


def _end(job: submitit.Job[Job], words: Sequence[str]) -> Job:
    """Return the `Job` from a job's first process, or a failed one if the job left no result."""
    try:
        return job.results()[0]
    except RuntimeError:  # from submitit
        return Job(" ".join(words), FAILED, f"left no result ({job.state}); see {job.paths.stderr}")
