"""The processes that make one run together, as torchrun starts them: the first writes, prints and decides for all.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of a store in the environment. Without them a process is the
first of one, and nothing here imports torch.
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

_LOOKS_EVERY = 0.1  # seconds between two looks at what another process has told
_TELLS_WITHIN = 2.0  # seconds that a process which fails has for telling why, after others have noticed
_SAME_WITHIN = 1.0  # seconds in which all have found out what is wrong for all, and the first has told it
_SPEAKS_WITHIN = 2.0  # seconds that each has for telling its error before one of them has ended
_RUNS = count()  # of this process: each has its own part of the store


class LostError(TrainingError):
    """Another process has ended, or does not come.

    Args:
        reason: in one line.
        is_told: whether that process tells its error itself.
    """

    def __init__(self, reason: str, is_told: bool) -> None:
        super().__init__(reason)
        self.is_told = is_told


def is_alone() -> bool:
    """Whether this process makes its runs by itself."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def is_first() -> bool:
    """Whether it is this process that prints and writes."""
    return is_alone() or os.environ.get("RANK", "0") == "0"


class Ranks:
    """One process among those of its run. Made by `joined`.

    Attributes:
        rank: of this process, from 0.
        size: the number of processes.
        local: the number of this process on its machine: the number of its GPU.
        writing: a group that checkpoints talk in; None where there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, timeout: float = 0) -> None:
        self.rank, self.size, self.local, self._timeout = rank, size, local, timeout
        self.writing: ProcessGroup | None = None
        self._talking: ProcessGroup | None = None
        self._store: Store | None = None
        self._told = count()
        self._at = "its start"

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    # -- what all say ---------------------------------------------------------------------------------------------

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in double precision: the same bits on each."""
        if self.size == 1 or not values:
            return list(values)
        return self._reduced(values, "SUM")

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on one of the processes."""
        if self.size == 1:
            return list(flags)
        return [bool(flag) for flag in self._reduced(flags, "MAX")]

    def gather(self, value: Any) -> list[Any]:
        """What each process says, in their order; plain values."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._heard():
            dist.all_gather_object(found, value, group=self._talking)
        return found

    def insist_alike(self, value: Any, what: str) -> None:
        """Refuse to go on where processes that must agree do not.

        Raises:
            TrainingError: with what each has.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            listed = ", ".join(f"{rank}: {given}" for rank, given in enumerate(found))
            raise TrainingError(
                f"the processes have come apart at {self._at}: {what} is not the same on all ({listed}); "
                "the same command goes on from the last checkpoint"
            )

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        with self._heard():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self._talking)
        return tensor.tolist()

    # -- what the first says --------------------------------------------------------------------------------------

    def tell(self, value: Any = None) -> Any:
        """What the first process says, as JSON has it; the others wait for it, however long that takes."""
        if self.size == 1:
            return value
        key = f"told {next(self._told)}"
        if self.first:
            self._store.set(key, json.dumps(value))
            return value
        with self._heard():
            while not self._store.check([key]):
                self._raise_what_was_announced()
                time.sleep(_LOOKS_EVERY)
            return json.loads(self._store.get(key))

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what is within, then the others do: they find there what it made."""
        if not self.first:
            self.tell()
        yield
        if self.first:
            self.tell()

    # -- how it ends ----------------------------------------------------------------------------------------------

    def arrive(self, at: str) -> None:
        """Note where this process is, for those who may wait for it."""
        self._at = at
        if self.size > 1:
            with self._heard():
                self._store.set(f"at {self.rank}", json.dumps([at, time.time()]))

    def lost(self, error: BaseException) -> LostError | None:
        """What to say of an error that came of another process's end or absence; None for all others."""
        if self.size == 1 or not _is_of_communication(error):
            return None
        try:
            until = time.monotonic() + _TELLS_WITHIN
            while time.monotonic() < until:
                self._raise_what_was_announced()
                time.sleep(_LOOKS_EVERY)
        except LostError as told:
            return told
        except Exception:  # the store is gone with the process that kept it
            return LostError(f"process {self.rank} of {self.size} has lost the others at {self._at}", is_told=False)
        said = line(error)
        how = f"for {self._timeout:g} s (trainer.timeout)" if "imed out" in said else "until one of them was gone"
        others = "; ".join(self._last_seen())
        return LostError(
            f"process {self.rank} of {self.size} waited at {self._at} for the others {how}; last seen: {others}; "
            "the same command goes on from the last checkpoint",
            is_told=False,
        )

    def announce(self, error: BaseException) -> bool:
        """Tell the others why this process ends, so that the first can note it; True where the first tells the same."""
        if isinstance(error, LostError):
            return False
        kind = "error" if isinstance(error, Exception) else "interrupted"
        with suppress(Exception):  # they may be gone
            until = time.monotonic() + (0 if self.first else _SAME_WITHIN)
            while time.monotonic() < until and not self._store.check(["failed"]):
                time.sleep(_LOOKS_EVERY)
            told = self._store.compare_set("failed", "", json.dumps([self.rank, kind, line(error)]))
            rank, _, reason = json.loads(told)
            return rank != self.rank and kind == "error" and reason == line(error)
        return False

    def _raise_what_was_announced(self) -> None:
        if not self._store.check(["failed"]):
            return
        rank, kind, reason = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return
        if kind == "interrupted":
            raise KeyboardInterrupt
        raise LostError(f"process {rank}: {reason}", is_told=True)

    def _last_seen(self) -> list[str]:
        found = []
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"at {rank}"]):
                at, when = json.loads(self._store.get(f"at {rank}"))
                found.append(f"process {rank} at {at}, {max(0, time.time() - when):.0f} s ago")
        return found or ["none of them"]

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except LostError:
            raise
        except Exception as error:
            raise self.lost(error) or error from error


@contextmanager
def joined(settings: TrainerSettings) -> Iterator[Ranks]:
    """Be one of the run's processes: in a context, since each run of a sweep has its own groups.

    Raises:
        SettingError: as many processes as the settings do not allow.
    """
    size = _number("WORLD_SIZE", 1)
    try:
        _refuse_size(settings, size)
    except SettingError as error:
        raise (error if is_first() else LostError(str(error), is_told=True)) from None
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    from adafrugal.training import devices

    found = Ranks(_number("RANK"), size, _number("LOCAL_RANK"), settings.timeout)
    patience = timedelta(seconds=settings.timeout)
    on_gpu = devices.open_device(settings, found.local).is_gpu  # refuses one that is not there
    try:
        found._store = dist.PrefixStore(f"run {next(_RUNS)}", _environments_store(patience))
    except (RuntimeError, ValueError) as error:  # torch's, of a store that is not reached or an address that is not set
        raise TrainingError(f"process {found.rank} of {size} does not reach the others: {line(error)}") from error
    groups = dist.PrefixStore("groups", found._store)
    # NCCL ends a process that waits too long; the talk on the CPU, which says who is missing, gives up before it
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=groups,
            rank=found.rank,
            world_size=size,
            timeout=patience + timedelta(seconds=60 if on_gpu else 0),
        )
        found._talking, found.writing = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
        yield found
    except BaseException as caught:
        error = found.lost(caught) or caught
        if found.announce(error):
            raise LostError(line(error), is_told=True) from caught
        if error is caught:
            raise
        raise error from caught
    finally:
        with suppress(Exception):  # of processes that are gone
            dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    """A number in the environment."""
    given = os.environ.get(name, "" if default is None else str(default))
    if not given.isdecimal():
        raise SettingError(f"{name} is {given or 'not set'}; allowed: a number, as torchrun puts it there")
    return int(given)


def _refuse_size(settings: TrainerSettings, size: int) -> None:
    """Refuse as many processes as the settings do not allow."""
    given = f"WORLD_SIZE is {size}"
    if size > 1 and settings.parallel == "none":
        raise SettingError(
            f"{given} and trainer.parallel is none; allowed with several processes: trainer.parallel=ddp or fsdp; "
            "or start train.py without torchrun"
        )
    if not size or settings.batch_size % size:
        raise SettingError(f"{given}; allowed: a divisor of trainer.batch_size ({settings.batch_size})")
    if size % settings.replicas:
        raise SettingError(f"trainer.replicas is {settings.replicas}; allowed: a divisor of WORLD_SIZE ({size})")
    if settings.offload and size == 1:
        raise SettingError("trainer.offload is true; allowed: false with one process, which is not sharded")


@cache
def _environments_store(patience: timedelta) -> Store:
    """The store whose address is in the environment; one for all runs of this process."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    return store


def let_all_speak() -> None:
    """Wait before a process ends in an error: torchrun ends all as soon as one has ended, and each is to be heard."""
    if not is_alone():
        time.sleep(_SPEAKS_WITHIN)


def silence_others() -> None:
    """Let what all processes would print be printed by the first; errors still are by each that has one."""
    if not is_first():
        import warnings

        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 — for as long as the process lives
        warnings.simplefilter("ignore")


def _is_of_communication(error: BaseException) -> bool:
    """Whether torch.distributed raised it; gloo's errors have no class of their own."""
    if isinstance(error, TrainingError):  # which says it itself, and may quote a disk's answer
        return False
    said = str(error)
    words = ("gloo", "Connection closed by peer", "NCCL", "imed out", "TCPStore", "onnection reset", "Broken pipe")
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(word in said for word in words)
    )
