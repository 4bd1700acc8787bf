"""Run one job of a sweep in a process that submitit started; a job may have several processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import submitit
from submitit.helpers import TorchDistributedEnvironment

from adafrugal.launching import jobs
from adafrugal.launching.jobs import Job
from adafrugal.settings import compose
from adafrugal.system.errors import INTERRUPTED, SettingError, line
from adafrugal.system.signals import Stop
from adafrugal.training.failure import End


def run(words: Sequence[str]) -> Job:
    """Make the run of these overrides; requeue the job if Slurm interrupts it.

    During the run `Stop` handles Slurm's signals instead of submitit, so that the run stops in order.

    Raises:
        SystemExit: the job was requeued; its submitter continues to wait.
    """
    environment = submitit.JobEnvironment()
    try:
        with Stop() as stop:
            if environment.num_tasks > 1:  # each process sees all GPUs of its node
                TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            try:
                composed, choices, _ = compose.composed(words)
                end = jobs.run(composed, choices, stop, words)
            except SettingError as error:
                end = jobs.ended(error, stop, is_alike=True)
    except KeyboardInterrupt:
        end = End(INTERRUPTED)
    reason = end.reason
    if end.code == INTERRUPTED and environment.cluster == "slurm" and environment.global_rank == 0:
        reason = _put_back(environment.job_id)
        if not reason:
            sys.exit(INTERRUPTED)
    return Job(" ".join(words), end.code, reason, end.is_shared)


def _put_back(job: str) -> str:
    """Requeue a job unless it was cancelled; return why it was not requeued, or "".

    A cancelled job gets the same signals as a preempted one, but its state differs.
    """
    try:
        if "JobState=RUNNING" not in _scontrol("show", "job", "--oneliner", job):
            return "cancelled"
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or line(error)
        return f"not requeued: {' '.join(said.split())}"
    return ""


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=60).stdout
