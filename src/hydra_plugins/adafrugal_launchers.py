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
    """A launcher of jobs that run in other processes.

    Attributes:
        processes: number of processes per job.
        package: the package it needs.
        counts: settings that must be whole numbers from 1 on, by name.
    """

    processes: int
    package: str
    counts: dict[str, Any]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare for `launch`; `task_function` is an `adafrugal.launching.jobs.Jobs`.

        Raises:
            SettingError: a package is missing, a count is not a whole number from 1 on, or torchrun started train.py.
        """
        self._name = config.hydra.runtime.choices["hydra/launcher"]
        self._stop = task_function.stop
        self._always = [word for word in config.hydra.overrides.hydra if word.startswith("hydra.searchpath=")]
        if os.environ.get("WORLD_SIZE", "1") != "1":
            several = f"hydra/launcher is {self._name} and WORLD_SIZE is {os.environ['WORLD_SIZE']}"
            raise SettingError(f"{several}; start train.py without torchrun, which it uses itself")
        if find_spec(self.package) is None:
            given = f"hydra/launcher is {self._name}, which needs {self.package}"
            raise SettingError(f"{given}; pip install {self.package}, or leave it out")
        for setting, number in self.counts.items():
            if not isinstance(number, int) or number < 1:
                raise SettingError(f"hydra.launcher.{setting} is {number}; allowed: a whole number from 1 on")


class GpusLauncher(_Elsewhere):
    """Runs jobs in parallel on this machine.

    Args:
        gpus_per_job: number of GPUs and of processes per job; without GPUs, of processes.
        n_jobs: at a time. None: as many as the GPUs allow; without GPUs, one.
    """

    package = "joblib"

    def __init__(self, gpus_per_job: int, n_jobs: int | None) -> None:
        self.processes, self._n_jobs = gpus_per_job, n_jobs
        self.counts = {"gpus_per_job": gpus_per_job, "n_jobs": 1 if n_jobs is None else n_jobs}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs; one thread per slot waits for them."""
        from joblib import Parallel, delayed

        slots = self._slots()[: len(job_overrides)]
        jobs = local.SideBySide(slots, self.processes, self._stop)
        calls = (delayed(jobs.run)(initial_job_idx + n, [*o, *self._always]) for n, o in enumerate(job_overrides))
        self._stop.training = True  # the first signal is passed on, and the jobs end in order; a second one raises
        try:
            return [_returned(job) for job in Parallel(len(slots), backend="threading")(calls)]
        except KeyboardInterrupt:
            jobs.stop_at_once()
            raise
        finally:
            self._stop.training = False

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

    Args:
        cluster: slurm or local.
        submitit_folder: for submitit's files and the jobs' output.
        parameters: of submitit's executor, under submitit's names.
    """

    package = "submitit"

    def __init__(self, cluster: str, submitit_folder: str, **parameters: Any) -> None:
        self._cluster, self._folder, self._parameters = cluster, submitit_folder, parameters
        self.counts = {name: parameters[name] for name in ("nodes", "tasks_per_node", "timeout_min")}

    @property
    def processes(self) -> int:
        """Number of processes per job."""
        return self._parameters["nodes"] * self._parameters["tasks_per_node"]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit the jobs, and wait for them."""
        jobs = self._submit([[*overrides, *self._always] for overrides in job_overrides])
        for number, (job, overrides) in enumerate(zip(jobs, job_overrides, strict=True), initial_job_idx + 1):
            local.say(sys.stdout, f"── job {number}: {' '.join(overrides)} → {job.paths.stdout}\n")
        self._stop.training = self._cluster == "local"
        try:
            return self._ends(jobs, job_overrides)
        except KeyboardInterrupt:
            if self._cluster == "slurm":
                tell(f"the jobs stay with Slurm; `scancel {jobs[0].job_id.partition('_')[0]}` ends them")
            else:
                _terminate(jobs)
            raise
        finally:
            self._stop.training = False

    def _submit(self, jobs: list[list[str]]) -> Sequence[submitit.Job[Job]]:
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

    def _ends(self, jobs: Sequence[submitit.Job[Job]], job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Wait for all jobs and return their ends; pass the first signal on to those on this machine."""
        asked = False
        while not all(job.done() for job in jobs):
            if self._stop.requested and not asked:
                asked = True
                _terminate(jobs)
            time.sleep(0.5)
        return [_returned(_end(job, words)) for job, words in zip(jobs, job_overrides, strict=True)]


def _terminate(jobs: Sequence[submitit.Job[Job]]) -> None:
    """Send SIGTERM to submitit's processes on this machine, which pass it on; their job ids are process ids."""
    for job in jobs:
        if not job.done():
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)


def _end(job: submitit.Job[Job], overrides: Sequence[str]) -> Job:
    """Return the `Job` from a job's first process, or a failed one if the job left no result."""
    try:
        return job.results()[0]
    except RuntimeError:  # from submitit
        return Job(" ".join(overrides), FAILED, f"left no result ({job.state}); see {job.paths.stderr}")


def _returned(job: Job) -> JobReturn:
    return JobReturn(status=JobStatus.COMPLETED, _return_value=job)
