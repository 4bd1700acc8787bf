"""Run a sweep's jobs in parallel on one machine: each as one process, or as several under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from adafrugal.launching.jobs import TOLD, Job, after_a_refusal
from adafrugal.settings.compose import REPOSITORY
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG
from adafrugal.system.signals import Stop

SECONDS_BETWEEN_LOOKS = 0.1  # at the processes


def gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def run(
    jobs: Sequence[Sequence[str]], slots: Sequence[str | None], processes: int, stop: Stop, first: int = 0
) -> list[Job]:
    """Run jobs as child processes, one per slot at a time, and return how they ended.

    The first signal is passed on once to every job, which then ends in order, and no more jobs start. A second one, a
    KeyboardInterrupt, is sent to all processes of every job.

    Args:
        jobs: their overrides.
        slots: CUDA_VISIBLE_DEVICES of each slot; None: the GPUs of this process.
        processes: per job; torchrun starts more than one.
        stop: of this process.
        first: the number of the first job.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (len(slots) * processes))
    waiting, free, ends, asked = deque(enumerate(jobs, first)), deque(slots), {}, False
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and free and not stop.requested:
                running.append(_Running(*waiting.popleft(), free.popleft(), processes, threads))
            if stop.requested and not asked:
                asked = True
                for one in running:
                    one.process.terminate()
                ends |= {number: Job(" ".join(words), INTERRUPTED, "not started") for number, words in waiting}
                waiting.clear()
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                free.appendleft(one.slot)
                ends[one.number] = one.end(asked)
            for number, words in list(waiting):
                if (refused := after_a_refusal(ends, " ".join(words))) is not None:
                    ends[number] = Job(" ".join(words), WRONG, refused)
                    waiting.remove((number, words))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        for one in running:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGTERM)
        raise
    return [ends[number] for number in sorted(ends)]


class _Running:
    """A job under way; its output is printed with the job's number before each line."""

    def __init__(self, number: int, words: Sequence[str], slot: str | None, processes: int, threads: int) -> None:
        self.number, self.slot, self._words = number, slot, " ".join(words)
        say(sys.stdout, f"── job {number + 1}{f' (GPU {slot})' if slot else ''}: {self._words}\n")
        self._place = tempfile.TemporaryDirectory(prefix="adafrugal-")
        self._told = Path(self._place.name) / "end.json"
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {TOLD: str(self._told)}
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        self.process = subprocess.Popen(
            command(words, processes), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
        )  # fmt: skip
        pairs = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        label = f"[{number + 1}] "
        self._readers = [threading.Thread(target=_pass_on, args=(*pair, label), daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    def is_over(self) -> bool:
        """Whether its process has ended and all output is printed."""
        return self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers)

    def end(self, was_asked: bool) -> Job:
        """Return how it ended: from the file that it wrote, or else from its process's exit code."""
        code, reason, is_shared = self.process.returncode, "", False
        if self._told.exists():
            _, code, reason, is_shared = Job(*json.loads(self._told.read_text()))
        elif code == INTERRUPTED or was_asked:
            code = INTERRUPTED
        elif code in (DONE, WRONG):
            reason = "see what it printed"
        else:
            reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            code = FAILED
        self._place.cleanup()
        job = Job(self._words, code, reason, is_shared)
        say(sys.stdout, f"── job {self.number + 1}: {job.outcome}\n")
        return job


def command(words: Sequence[str], processes: int) -> list[str]:
    """Return the command of one job."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else ()), str(REPOSITORY / "train.py")]
    return [*start, *words, "hydra.mode=RUN"]  # a file of sweeps/ sets MULTIRUN


def _pass_on(stream: TextIO, to: TextIO, label: str) -> None:
    for line in stream:
        say(to, f"{label}{line.rstrip()}\n" if line.strip() else "")


def say(to: TextIO, text: str) -> None:
    """Print; if the pipe is closed, discard this and later output, so that jobs go on."""
    try:
        to.write(text)
        to.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())
