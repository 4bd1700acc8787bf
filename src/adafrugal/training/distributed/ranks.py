"""The processes that make one run, as torchrun starts them: rank 0 writes, prints and decides for all.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of a store in the environment. Without them the run has one
process, and nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import SettingError, TrainingError, line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

_LOOKS_EVERY = 0.1  # seconds between two looks at the store
_TELLS_WITHIN = 2.0  # seconds in which a failed process announces its error, after others have noticed its end
_SAME_WITHIN = 1.0  # seconds in which rank 0 announces an error that all ranks have
_SPEAKS_WITHIN = 2.0  # seconds from the first error to the first exit, after which torchrun ends all processes
_RUNS = count()  # each run of this process has its own part of the store


class LostError(TrainingError):
    """Another process ended or did not arrive; `is_told`: it prints its error itself."""

    def __init__(self, reason: str, is_told: bool) -> None:
        super().__init__(reason)
        self.is_told = is_told


def is_alone() -> bool:
    """Whether this process makes its runs by itself."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def is_first() -> bool:
    """Whether this process prints and writes."""
    return is_alone() or os.environ.get("RANK", "0") == "0"


class Ranks:
    """One process of a run. Call `join` first and `leave` last: each run has its own process groups.

    Attributes:
        rank: of this process, from 0.
        size: the number of processes.
        local: the rank of this process on its machine: the number of its GPU.
        writing: a group for checkpoints; None where there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self.writing: ProcessGroup | None = None
        self._talking: ProcessGroup | None = None
        self._store: Store | None = None
        self._timeout = 0.0
        self._told = count()
        self._at = "its start"

    @classmethod
    def of_environment(cls, settings: TrainerSettings) -> Ranks:
        """The process that the environment describes; SettingError where it is wrong or the settings forbid it."""
        size = _number("WORLD_SIZE", 1)
        try:
            settings.refuse_processes(size, f"WORLD_SIZE is {size}")
        except SettingError as error:  # rank 0 prints it
            raise (error if is_first() else LostError(str(error), is_told=True)) from None
        return cls() if size == 1 else cls(_number("RANK"), size, _number("LOCAL_RANK"))

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def join(self, settings: TrainerSettings) -> None:
        """Meet the other processes of the run.

        Raises:
            SettingError: the GPU of this process is missing.
            TrainingError: the others cannot be reached.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        from adafrugal.training import devices

        self._timeout = settings.timeout
        patience = timedelta(seconds=settings.timeout)
        try:
            self._store = dist.PrefixStore(f"run {next(_RUNS)}", _environments_store(patience))
        except (RuntimeError, ValueError) as error:  # torch's, if the address is not set or does not answer
            raise TrainingError(
                f"process {self.rank} of {self.size} does not reach the others: {line(error)}"
            ) from error
        on_gpu = devices.open_device(settings, self.local).is_gpu
        # the CPU groups time out first: their errors say who is missing, while NCCL ends the process
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("groups", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=patience + timedelta(seconds=60 if on_gpu else 0),
        )
        self._talking, self.writing = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))

    def leave(self) -> None:
        """Destroy the process groups of this run."""
        if self._store is not None:
            import torch.distributed as dist

            with suppress(Exception):  # the other processes may be gone
                dist.destroy_process_group()

    # -- collectives ----------------------------------------------------------------------------------------------

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in double precision: the same bits on each."""
        if self.size == 1 or not values:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(tensor, group=self._talking)
        return tensor.tolist()

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on one of the processes."""
        return [total > 0 for total in self.sum(flags)]

    def gather(self, value: Any) -> list[Any]:
        """A plain value of each process, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._talking)
        return found

    def insist_alike(self, checksum: Any) -> None:
        """Raise a TrainingError where the checksum of what was selected differs between processes."""
        found = self.gather(checksum)
        if any(other != found[0] for other in found):
            listed = ", ".join(f"{rank}: {given}" for rank, given in enumerate(found))
            raise TrainingError(
                f"the processes have come apart at {self._at}: the checksum of ρ, T and what is selected is not the "
                f"same on all ({listed}); the same command goes on from the last checkpoint"
            )

    # -- from rank 0 to all ---------------------------------------------------------------------------------------

    def tell(self, value: Any = None) -> Any:
        """Send rank 0's value, as JSON, to the others, which wait for it without a limit."""
        if self.size == 1:
            return value
        key = f"told {next(self._told)}"
        if self.first:
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            if announced := self._announced():
                raise announced
            time.sleep(_LOOKS_EVERY)
        return json.loads(self._store.get(key))

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Run the body on rank 0 before the others, which use its results."""
        if not self.first:
            self.tell()
        yield
        if self.first:
            self.tell()

    # -- errors ---------------------------------------------------------------------------------------------------

    def arrive(self, at: str) -> None:
        """Publish the position of this process, for messages of those that wait for it."""
        self._at = at
        if self.size > 1:
            self._store.set(f"at {self.rank}", json.dumps([at, time.time()]))

    def lost(self, error: BaseException) -> BaseException | None:
        """The error of another process that caused this error of communication; None for all other errors."""
        if self._store is None or not _is_of_communication(error):
            return None
        given = f"process {self.rank} of {self.size}"
        try:
            until = time.monotonic() + _TELLS_WITHIN
            while time.monotonic() < until:
                if announced := self._announced():
                    return announced
                time.sleep(_LOOKS_EVERY)
            others = "; ".join(self._last_seen()) or "none of them"
        except Exception:  # the store ended with the process that held it
            return LostError(f"{given} has lost the others at {self._at}", is_told=False)
        timed_out = "imed out" in line(error)
        how = f"for {self._timeout:g} s (trainer.timeout)" if timed_out else "until one of them was gone"
        waited = f"{given} waited at {self._at} for the others {how}; last seen: {others}"
        return LostError(f"{waited}; the same command goes on from the last checkpoint", is_told=False)

    def announce(self, error: BaseException) -> BaseException:
        """Tell the others why this process ends; return the error to raise, a LostError where rank 0 has the same."""
        if self._store is None or isinstance(error, LostError):
            return error
        kind = "error" if isinstance(error, Exception) else "interrupted"
        with suppress(Exception):  # they may be gone
            until = time.monotonic() + (0 if self.first else _SAME_WITHIN)
            while time.monotonic() < until and not self._store.check(["failed"]):
                time.sleep(_LOOKS_EVERY)
            told = self._store.compare_set("failed", "", json.dumps([self.rank, kind, line(error)]))
            rank, _, reason = json.loads(told)
            if rank != self.rank and kind == "error" and reason == line(error):
                return LostError(reason, is_told=True)
        return error

    def _announced(self) -> BaseException | None:
        """The error that another process has announced."""
        if not self._store.check(["failed"]):
            return None
        rank, kind, reason = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return None
        return KeyboardInterrupt() if kind == "interrupted" else LostError(f"process {rank}: {reason}", is_told=True)

    def _last_seen(self) -> Iterator[str]:
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"at {rank}"]):
                at, when = json.loads(self._store.get(f"at {rank}"))
                yield f"process {rank} at {at}, {max(0, time.time() - when):.0f} s ago"


def _number(name: str, default: int | None = None) -> int:
    """A number in the environment."""
    given = os.environ.get(name, "" if default is None else str(default))
    if not given.isdecimal():
        raise SettingError(f"{name} is {given or 'not set'}; allowed: a number, as torchrun puts it there")
    return int(given)


@cache
def _environments_store(patience: timedelta) -> Store:
    """The store whose address is in the environment; one for all runs of this process."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    return store


def let_all_speak() -> None:
    """Wait before a process ends in an error, so that all can print: torchrun ends all once one has ended."""
    if not is_alone():
        time.sleep(_SPEAKS_WITHIN)


def silence_others() -> None:
    """Let rank 0 alone print to stdout; each process still prints its own errors."""
    if not is_first():
        import warnings

        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 — for as long as the process lives
        warnings.simplefilter("ignore")


def _is_of_communication(error: BaseException) -> bool:
    """Whether torch.distributed raised it; gloo's errors are plain RuntimeErrors."""
    if isinstance(error, TrainingError):  # its text may contain the same words
        return False
    words = ("gloo", "Connection closed by peer", "NCCL", "imed out", "TCPStore", "onnection reset", "Broken pipe")
    is_said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return is_said or type(error).__name__.startswith("Dist")
