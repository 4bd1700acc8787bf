"""Run a sweep's jobs in parallel on one machine: each as one process, or as several under torchrun."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from adafrugal.launching.jobs import TOLD, Job
from adafrugal.settings.compose import REPOSITORY
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG
from adafrugal.system.signals import Stop

SECONDS_BETWEEN_LOOKS = 0.1  # between checks of a process


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


class SideBySide:
    """Runs jobs as child processes, one per slot at a time. One thread per slot calls `run`.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each slot; None: the GPUs of this process.
        processes: per job; torchrun starts more than one.
        stop: of this process. The first signal is passed on once to every job, which then ends in order.
    """

    def __init__(self, slots: Sequence[str | None], processes: int, stop: Stop) -> None:
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._threads = max(1, len(os.sched_getaffinity(0)) // (len(slots) * processes))
        self._processes, self._stop = processes, stop
        self._children: set[subprocess.Popen[str]] = set()

    def run(self, number: int, words: Sequence[str]) -> Job:
        """Run one job; print its output with the job's number before each line."""
        if self._stop.requested:
            return Job(" ".join(words), INTERRUPTED, "not started")
        slot = self._free.get()
        try:
            where = f" (GPU {slot})" if slot else ""
            say(sys.stdout, f"── job {number + 1}{where}: {' '.join(words)}\n")
            with tempfile.TemporaryDirectory(prefix="adafrugal-") as place:
                told = Path(place) / "end.json"
                code = self._wait(self._start(words, slot, told), f"[{number + 1}] ")
                job = Job(" ".join(words), *self._outcome(told, code))
        finally:
            self._free.put(slot)
        say(sys.stdout, f"── job {number + 1}: {job.outcome}\n")
        return job

    def stop_at_once(self) -> None:
        """Send SIGTERM, as the second signal, to all processes of every job."""
        for child in list(self._children):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)

    def _start(self, words: Sequence[str], slot: str | None, told: Path) -> subprocess.Popen[str]:
        environment = os.environ | {TOLD: str(told)}
        environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        return subprocess.Popen(
            command(words, self._processes),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on
        )

    def _wait(self, child: subprocess.Popen[str], label: str) -> int:
        self._children.add(child)
        streams = ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        readers = [threading.Thread(target=_pass_on, args=(*pair, label), daemon=True) for pair in streams]
        for reader in readers:
            reader.start()
        asked = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(SECONDS_BETWEEN_LOOKS)
                break
            if self._stop.requested and not asked:
                asked = True
                child.terminate()
        for reader in readers:
            reader.join()
        self._children.discard(child)
        return child.returncode

    def _outcome(self, told: Path, code: int) -> tuple[int, str]:
        """Return a job's code and reason, from the file that it wrote or else from its process's exit code."""
        if told.exists():
            _, code, reason = json.loads(told.read_text())
            return code, reason
        if code == INTERRUPTED or self._stop.requested:
            return INTERRUPTED, ""
        if code < 0:
            return FAILED, f"ended by {signal.Signals(-code).name}"
        return (code, "see what it printed") if code in (DONE, WRONG) else (FAILED, f"ended with exit code {code}")


def command(words: Sequence[str], processes: int) -> list[str]:
    """Return the command of one job."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        sys.executable,
        *(torchrun if processes > 1 else ()),
        str(REPOSITORY / "train.py"),
        *words,
        "hydra.mode=RUN",  # a file of sweeps/ sets MULTIRUN
    ]


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
