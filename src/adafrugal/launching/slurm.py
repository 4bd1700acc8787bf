"""One job of a sweep where a scheduler started it, through submitit: alone, or as one process of several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import submitit
from submitit.helpers import TorchDistributedEnvironment

from adafrugal.launching import jobs
from adafrugal.launching.jobs import INTERRUPTED, End
from adafrugal.settings import compose
from adafrugal.system.errors import SettingError
from adafrugal.system.signals import Stop


def run(words: Sequence[str]) -> End:
    """Make the run of these words; where Slurm ends the job before the run is done, the job goes back to its queue.

    Slurm's signal, which submitit would answer by itself, is the run's while there is one, so that it stops in order.

    Raises:
        SystemExit: the job is in the queue again, and has not ended. Who waits for its end goes on waiting.
    """
    environment = submitit.JobEnvironment()
    try:
        with Stop() as stop:
            code, reason = _run(words, environment, stop)
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, ""
    if code == INTERRUPTED and environment.cluster == "slurm" and environment.global_rank == 0:
        reason = _put_back(environment.job_id)
        if not reason:
            sys.exit(INTERRUPTED)
    return End(" ".join(words), code, reason)


def _run(words: Sequence[str], environment: submitit.JobEnvironment, stop: Stop) -> tuple[int, str]:
    if environment.num_tasks > 1:  # each sees all GPUs of its node
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    try:
        composed, choices, _ = compose.composed(words)
    except SettingError as error:
        return jobs.ended(error)
    return jobs.run(composed, choices, stop)


def _put_back(job: str) -> str:
    """Requeue a job that Slurm has not been told to end for good; why not, if not.

    A job that its owner cancels gets the same signals as one that is preempted, but its state says so.
    """
    try:
        if "JobState=RUNNING" not in _scontrol("show", "job", "--oneliner", job):
            return "cancelled"
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"not requeued: {' '.join(str(said).split())}"
    return ""


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=60).stdout
